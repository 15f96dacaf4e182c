"""Augmentation of a batch of patches, in torch, on the batch's device.

The kinds are the paper's (B: rotation, colour, brightness, contrast, zoom, elastic
deformation, Gaussian noise; heavy colour augmentation helps, A); ranges, the stain-space
jitter and their order are [choice].

It works on what the network sees [choice]: on *pooled* patches (64 px at 1.0 um/px for a 128 px
patch) where the encoder pools anyway, which costs a quarter; on whole ones for the VAE, whose
decoder draws them, and for an encoder that does not pool. The tissue moves as far either way;
noise is that of a pixel, so of whole patches half as strong once it is pooled. All spatial changes
of a patch are one resampling, all colour changes two 3 x 3 matrices, one in optical density and one
in RGB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

# Ruifrok & Johnston 2001: optical densities (R, G, B) of haematoxylin, eosin, residual
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Strength:
    """Ranges of the random changes; every value is drawn for each patch."""

    rotation: float = math.radians(15)  # uniform +-, rad, besides the 8 orientations
    zoom: float = 0.12  # scale uniform in 1 +- zoom
    elastic: float = 1.5 / 64  # standard deviation of the displacement, of the patch's side
    elastic_nodes: int = 6  # nodes a side of the displacement field
    stain: float = 0.20  # H and E multiplied by uniform 1 +- stain
    stain_shift: float = 0.03  # added to H and E, uniform +-
    hue: float = 0.12  # turn about the grey axis, uniform +-, rad
    saturation: float = 0.20  # uniform 1 +- saturation
    brightness: float = 0.08  # added, uniform +-, of the full range
    contrast: float = 0.20  # uniform 1 +- contrast about the patch's mean
    noise: float = 0.02  # largest standard deviation of Gaussian noise, of the full range


HEAVY = Strength()


def augment(patches: Tensor, generator: torch.Generator, strength: Strength = HEAVY) -> Tensor:
    """A random variant of each patch: float (B, 3, S, S) in [0, 1] to the same.

    ``generator`` lives on the batch's device and is the only source of chance.
    """
    warped = functional.grid_sample(
        patches,
        _sampling_grid(patches, generator, strength),
        padding_mode="reflection",
        align_corners=False,
    )
    coloured = _jitter_colour(warped, generator, strength)
    size = (len(coloured), 1, 1, 1)
    sigma = torch.rand(size, generator=generator, device=patches.device) * strength.noise
    noise = torch.randn(coloured.shape, generator=generator, device=patches.device)
    return coloured.addcmul_(noise, sigma).clamp_(0, 1)


def _sampling_grid(patches: Tensor, generator: torch.Generator, strength: Strength) -> Tensor:
    """Where each output pixel looks, (B, S, S, 2) in [-1, 1]: orientation, turn, zoom, warp."""
    size, side, device = len(patches), patches.shape[-1], patches.device

    def uniform(extent: float) -> Tensor:
        return torch.empty(size, device=device).uniform_(-extent, extent, generator=generator)

    quarter = torch.randint(4, (size,), generator=generator, device=device) * (math.pi / 2)
    flip = torch.randint(2, (size,), generator=generator, device=device) * 2.0 - 1
    angle, zoom = quarter + uniform(strength.rotation), 1 + uniform(strength.zoom)
    cos, sin, zero = torch.cos(angle) * zoom, torch.sin(angle) * zoom, torch.zeros_like(angle)
    affine = torch.stack([cos * flip, -sin, zero, sin * flip, cos, zero], 1).view(size, 2, 3)
    grid = functional.affine_grid(affine, [size, 1, side, side], align_corners=False)
    count = strength.elastic_nodes
    nodes = torch.randn(size, 2, count, count, generator=generator, device=device)
    between = _interpolation(count, side).to(device)
    field = between @ nodes @ between.T
    return grid.add_(field.permute(0, 2, 3, 1), alpha=strength.elastic * 2)


@lru_cache(maxsize=8)
def _interpolation(nodes: int, side: int) -> Tensor:
    """Bicubic interpolation from ``nodes`` values to ``side``, as a matrix (side, nodes).

    Two small products with it cost a twentieth of interpolating each field.
    """
    unit = torch.eye(nodes)[None, None]
    size = (side, nodes)
    return functional.interpolate(unit, size=size, mode="bicubic", align_corners=True)[0, 0]


def _jitter_colour(pixels: Tensor, generator: torch.Generator, strength: Strength) -> Tensor:
    size, device = len(pixels), pixels.device

    def uniform(extent: float, *shape: int) -> Tensor:
        return torch.empty(size, *shape, device=device).uniform_(
            -extent, extent, generator=generator
        )

    # optical density = matrix.T @ stains; only haematoxylin and eosin are touched
    matrix = functional.normalize(torch.tensor(STAINS, device=device), dim=1)
    amounts = torch.ones(size, 3, device=device)
    amounts[:, :2] += uniform(strength.stain, 2)
    shifts = torch.zeros(size, 3, 1, device=device)
    shifts[:, :2, 0] = uniform(strength.stain_shift, 2)
    stain = (matrix.T * amounts[:, None, :]) @ matrix.T.inverse()
    flat = pixels.flatten(2)
    density = flat.clamp(min=1 / 255).log_().neg_()
    flat = torch.baddbmm(matrix.T @ shifts, stain, density).neg_().exp_()

    luma = torch.tensor(LUMA, device=device).view(1, 1, 3)
    amount = 1 + uniform(strength.saturation, 1, 1)
    saturate = amount * torch.eye(3, device=device) + (1 - amount) * luma
    gain = 1 + uniform(strength.contrast, 1, 1)
    colour = saturate @ _hue_turn(uniform(strength.hue)) * gain
    mean = luma @ flat.mean(2, keepdim=True)
    offset = (1 - gain) * mean + uniform(strength.brightness, 1, 1)
    flat = torch.baddbmm(offset, colour, flat)
    return flat.view(pixels.shape)


def _hue_turn(angle: Tensor) -> Tensor:
    """Rotations (B, 3, 3) of RGB about the grey axis (Rodrigues' formula)."""
    axis = 1 / math.sqrt(3)
    cross = torch.tensor([[0, -axis, axis], [axis, 0, -axis], [-axis, axis, 0]])
    cross = cross.to(angle.device)
    along = torch.full((3, 3), 1 / 3, device=angle.device)
    cos, sin = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1)
    return cos * torch.eye(3, device=angle.device) + (1 - cos) * along + sin * cross
