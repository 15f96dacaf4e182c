"""Section 3, bidirectional GAN (BiGAN) [B].

The discriminator is trained to separate pairs (patch, E(patch)) from pairs (G(z), z) with
z ~ N(0, 1)^C; encoder E and generator G are trained against it. The learning rate is fixed and
the last weights are kept. One step trains all three networks: the discriminator's loss has no
gradient through embeddings and generated patches, and the loss of encoder and generator has none
through the discriminator's weights. Real and generated pairs are separate batches of the
discriminator [choice].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from nic_core.encoders.networks import (
    SLOPE,
    PatchEncoder,
    TellezEncoder,
    initialise_as_keras,
    pool_patches,
)
from nic_core.encoders.objectives.base import PatchObjective, Sizes, Validation
from nic_core.encoders.objectives.sampling import patch_tensor, training_inputs
from nic_core.encoders.objectives.vae import upsampling_block
from nic_core.encoders.patch_tasks import PatchDataset


class Generator(nn.Module):
    """z (B, C) to pooled patch in [-1, 1], float32 (B, 3, side, side).

    Dense 1024 to 4 x 4 x 64 (for 64 px), 4 x (nearest upsampling, convolution with 128 filters,
    BatchNorm, LeakyReLU), convolution with 3 filters, tanh.

    Raises
    ------
    ValueError
        ``side`` is not a multiple of 16.
    """

    FIRST = 64
    FILTERS = 128
    STAGES = 4

    def __init__(self, embedding_size: int, side: int) -> None:
        super().__init__()
        self.start = side // 2**self.STAGES
        if self.start * 2**self.STAGES != side:
            raise ValueError(
                f"a pooled patch of {side} px cannot be generated: the side must be a multiple of "
                f"{2**self.STAGES} px"
            )
        self.dense = nn.Linear(embedding_size, self.start**2 * self.FIRST)
        layers: list[nn.Module] = []
        for channels in (self.FIRST, *[self.FILTERS] * (self.STAGES - 1)):
            layers += upsampling_block(channels, self.FILTERS)
        self.layers = nn.Sequential(
            *layers, nn.Conv2d(self.FILTERS, 3, kernel_size=3, padding=1), nn.Tanh()
        )
        initialise_as_keras(self)

    def forward(self, z: Tensor) -> Tensor:
        maps = self.dense(z).view(-1, self.FIRST, self.start, self.start)
        patches: Tensor = self.layers(maps)
        return patches


class Discriminator(nn.Module):
    """(pooled patch, z) to the logit (B,) that the pair is (patch, E(patch)).

    An image branch like the encoder with separate weights, concatenated with z, 2 x (dense 1024,
    LeakyReLU, dropout 0.5), one output.
    """

    HIDDEN = 1024

    def __init__(self, embedding_size: int, side: int) -> None:
        super().__init__()
        self.image = TellezEncoder(embedding_size, side)
        self.pair = nn.Sequential(
            nn.Linear(2 * embedding_size, self.HIDDEN),
            nn.LeakyReLU(SLOPE),
            nn.Dropout(0.5),
            nn.Linear(self.HIDDEN, self.HIDDEN),
            nn.LeakyReLU(SLOPE),
            nn.Dropout(0.5),
            nn.Linear(self.HIDDEN, 1),
        )
        initialise_as_keras(self)

    def forward(self, patches: Tensor, z: Tensor) -> Tensor:
        logits: Tensor = self.pair(torch.cat([self.image(patches), z], 1))
        return logits[:, 0]


class BidirectionalGAN(PatchObjective):
    """The BiGAN objective: equal numbers of patches of each task, labels unused."""

    selection = None
    learning_rate = 2e-4  # [B]

    def __init__(
        self, encoder: PatchEncoder, tasks: Sequence[PatchDataset], **sizes: Unpack[Sizes]
    ) -> None:
        super().__init__(encoder, tasks, **sizes)
        network = encoder.network
        self.generator = Generator(network.embedding_size, network.side)
        self.discriminator = Discriminator(network.embedding_size, network.side)
        self.add_networks(generator=self.generator, discriminator=self.discriminator)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw augmented pooled patches (B, 3, S, S) in [-1, 1] and z (B, C)."""
        network = self.encoder.network
        draws = zip(self.tasks, self.sampler.draw(generator), strict=True)
        patches = training_inputs(draws, network.pooling, generator)
        z = torch.randn(
            len(patches), network.embedding_size, generator=generator, device=self.device
        )
        return patches, z

    def losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        patches, z = batch
        embeddings, generated = self.encoder.network(patches), self.generator(z)
        discriminator = _pair_loss(
            self.discriminator(patches, embeddings.detach()),
            self.discriminator(generated.detach(), z),
        )
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        adversarial = _pair_loss(
            functional_call(self.discriminator, frozen, (generated, z)),
            functional_call(self.discriminator, frozen, (patches, embeddings)),
        )
        return {
            "loss": discriminator + adversarial,
            "loss/discriminator": discriminator,
            "loss/encoder_generator": adversarial,
        }

    @torch.inference_mode()
    def validate(self) -> Validation:
        """Evaluate the mean squared error of G(E(patch)) against the patch, in [-1, 1] units."""
        error, count = 0.0, 0
        network = self.encoder.network
        for task, rows in zip(self.tasks, self.validation_rows, strict=True):
            for start in range(0, len(rows), 64):
                pixels = patch_tensor(task, rows[start : start + 64], self.device)
                patches = pool_patches(pixels, network.pooling).mul(2 / 255).sub_(1)
                rebuilt = self.generator(network(patches))
                error += functional.mse_loss(rebuilt, patches).item() * len(patches)
                count += len(patches)
        return Validation({"validation/reconstruction": error / count})


def _pair_loss(real_logits: Tensor, generated_logits: Tensor) -> Tensor:
    """Return the binary cross-entropy of logits with target 1 (real) and 0 (generated)."""
    real, generated = real_logits.float(), generated_logits.float()
    return functional.softplus(-real).mean() + functional.softplus(generated).mean()
