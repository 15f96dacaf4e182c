"""Section 3, variational autoencoder (VAE) [B].

The encoder gives mu and sigma, the decoder maps the embedding back to the patch, and the loss is
MSE + 5e-5 * KL with a positive KL divergence. [choice]: augmented patches as input and target, a
log-variance instead of sigma, the KL summed over the embedding and the MSE averaged over pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from nic_core.encoders.networks import (
    BN_EPSILON,
    BN_MOMENTUM,
    SLOPE,
    PatchEncoder,
    initialise_as_keras,
    pool_patches,
)
from nic_core.encoders.objectives.base import PatchObjective, Selection, Sizes, Validation
from nic_core.encoders.objectives.sampling import patch_tensor, training_inputs
from nic_core.encoders.patch_tasks import PatchDataset

KL_WEIGHT = 5e-5


def upsampling_block(channels: int, filters: int) -> list[nn.Module]:
    """Return layers: nearest-neighbour upsampling x2, 3x3 convolution, BatchNorm, LeakyReLU."""
    return [
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(channels, filters, kernel_size=3, padding=1),
        nn.BatchNorm2d(filters, eps=BN_EPSILON, momentum=BN_MOMENTUM),
        nn.LeakyReLU(SLOPE),
    ]


class Decoder(nn.Module):
    """Embedding (B, C) to patch in [-1, 1], float32 (B, 3, side, side).

    Dense 8192 to 4 x 4 x 512 (for 128 px), 5 x (nearest upsampling, convolution with 256, 128,
    64, 32, 16 filters), convolution with 3 filters, tanh. BatchNorm and LeakyReLU are [choice].

    Raises
    ------
    ValueError
        ``side`` is not a multiple of 32.
    """

    FILTERS = (256, 128, 64, 32, 16)
    FIRST = 512

    def __init__(self, embedding_size: int, side: int) -> None:
        super().__init__()
        self.start = side // 2 ** len(self.FILTERS)
        if self.start * 2 ** len(self.FILTERS) != side:
            raise ValueError(
                f"a patch of {side} px cannot be decoded: the side must be a multiple of "
                f"{2 ** len(self.FILTERS)} px"
            )
        self.dense = nn.Linear(embedding_size, self.start**2 * self.FIRST)
        layers: list[nn.Module] = []
        for channels, filters in zip((self.FIRST, *self.FILTERS), self.FILTERS, strict=False):
            layers += upsampling_block(channels, filters)
        self.layers = nn.Sequential(
            *layers, nn.Conv2d(self.FILTERS[-1], 3, kernel_size=3, padding=1), nn.Tanh()
        )
        initialise_as_keras(self)

    def forward(self, embeddings: Tensor) -> Tensor:
        maps = self.dense(embeddings).view(-1, self.FIRST, self.start, self.start)
        patches: Tensor = self.layers(maps)
        return patches


def kl_divergence(mu: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mu, sigma^2) || N(0, 1)) >= 0, sum over the embedding, mean over the batch."""
    return 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()


class VariationalAutoencoder(PatchObjective):
    """The VAE objective: equal numbers of patches of each task, labels unused.

    The embedding of a patch is mu.
    """

    selection = Selection("validation/loss", "min")
    learning_rate = 1e-3  # [B]

    def __init__(
        self, encoder: PatchEncoder, tasks: Sequence[PatchDataset], **sizes: Unpack[Sizes]
    ) -> None:
        super().__init__(encoder, tasks, **sizes)
        network = encoder.network
        self.decoder = Decoder(network.embedding_size, network.side * network.pooling)
        self.log_variance = nn.Linear(network.dense.in_features, network.embedding_size)
        initialise_as_keras(self.log_variance)
        self.add_networks(log_variance=self.log_variance, decoder=self.decoder)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw augmented patches (B, 3, P, P) in [-1, 1] and noise (B, C) for the embedding."""
        draws = zip(self.tasks, self.sampler.draw(generator), strict=True)
        patches = training_inputs(draws, 1, generator)
        noise = torch.randn(
            len(patches),
            self.encoder.network.embedding_size,
            generator=generator,
            device=self.device,
        )
        return patches, noise

    def losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        patches, noise = batch
        mu, log_variance = self._posterior(patches)
        embeddings = mu + noise * (0.5 * log_variance).exp()
        mse = functional.mse_loss(self.decoder(embeddings), patches)
        kl = kl_divergence(mu, log_variance)
        return {"loss": mse + KL_WEIGHT * kl, "loss/mse": mse, "loss/kl": kl}

    def _posterior(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        network = self.encoder.network
        features = network.features(pool_patches(patches, network.pooling))
        return network.dense(features).float(), self.log_variance(features).float()

    @torch.inference_mode()
    def validate(self) -> Validation:
        """Evaluate the loss without randomness: unaugmented patches, decoded from mu."""
        sums = torch.zeros(3, dtype=torch.float64)
        for task, rows in zip(self.tasks, self.validation_rows, strict=True):
            for start in range(0, len(rows), 64):
                pixels = patch_tensor(task, rows[start : start + 64], self.device)
                patches = pixels.float().mul_(2 / 255).sub_(1)
                mu, log_variance = self._posterior(patches)
                mse = functional.mse_loss(self.decoder(mu), patches)
                kl = kl_divergence(mu, log_variance)
                sums += len(patches) * torch.tensor([mse.item(), kl.item(), 1.0])
        mse, kl = (sums[:2] / sums[2]).tolist()
        return Validation(
            {
                "validation/loss": mse + KL_WEIGHT * kl,
                "validation/mse": mse,
                "validation/kl": kl,
            }
        )
