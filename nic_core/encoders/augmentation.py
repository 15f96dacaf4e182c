"""Section 3, augmentation of patches: random variants of a batch, computed on its device.

The kinds of augmentation are published: rotation, colour, brightness, contrast, zoom, elastic
deformation and Gaussian noise [B]; heavy colour augmentation helps [A]. The ranges, the jitter in
stain space and the order are [choice].

Augmentation is applied to the network's input [choice]: to *pooled* patches (64 px at 1.0 um/px for
a patch of 128 px) if the encoder pools, which takes a quarter of the time, and to full patches for
the VAE, whose decoder generates full patches, and for encoders without pooling. Spatial changes are
relative to the side of the patch, so both are the same. Noise is per pixel, so pooling halves the
noise of a full patch. All spatial changes of a patch are one resampling; all colour changes are two
3 x 3 matrices, one in optical density and one in RGB.
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
    """Ranges of the random changes, drawn for each patch; uniform unless stated otherwise."""

    rotation: float = math.radians(15)  # +- rad, in addition to the 8 orientations
    zoom: float = 0.12  # scale in 1 +- zoom
    elastic: float = 1.5 / 64  # Gaussian, standard deviation of the displacement / side
    elastic_nodes: int = 6  # nodes per side of the displacement field
    stain: float = 0.20  # haematoxylin and eosin times 1 +- stain
    stain_shift: float = 0.03  # haematoxylin and eosin plus +- stain_shift, optical density
    hue: float = 0.12  # rotation about the grey axis, +- rad
    saturation: float = 0.20  # factor in 1 +- saturation
    brightness: float = 0.08  # added, +- share of the full range
    contrast: float = 0.20  # factor in 1 +- contrast, about the mean of the patch
    noise: float = 0.02  # upper limit of the standard deviation / full range


HEAVY = Strength()


def augment(patches: Tensor, generator: torch.Generator, strength: Strength = HEAVY) -> Tensor:
    """Return a random variant of each patch, float (B, 3, S, S) in [0, 1].

    ``generator`` is on the device of ``patches`` and is the only source of randomness.
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
    """Return the source position of each output pixel, (B, S, S, 2) in [-1, 1].

    It combines orientation, rotation, zoom and elastic deformation.
    """
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
    between = _interpolation(count, side, device)
    field = between @ nodes @ between.T
    return grid.add_(field.permute(0, 2, 3, 1), alpha=strength.elastic * 2)


@lru_cache(maxsize=8)
def _interpolation(nodes: int, side: int, device: torch.device) -> Tensor:
    """Return bicubic interpolation from ``nodes`` to ``side`` values as a matrix (side, nodes).

    Two products with it take a twentieth of the time of ``interpolate`` on each field.
    """
    unit = torch.eye(nodes)[None, None]
    size = (side, nodes)
    between = functional.interpolate(unit, size=size, mode="bicubic", align_corners=True)[0, 0]
    return between.to(device)


@lru_cache(maxsize=8)
def _colour_constants(device: torch.device) -> tuple[Tensor, ...]:
    """Return the stain matrix, the inverse of its transpose, luma weights, and a cross product.

    (3, 3), (3, 3), (1, 1, 3), and (3, 3): the matrix of the cross product with the grey axis. They
    are made once for each device, because copying to a GPU waits for it, and so does an inverse.
    """
    matrix = functional.normalize(torch.tensor(STAINS), dim=1)
    axis = 1 / math.sqrt(3)
    cross = torch.tensor([[0, -axis, axis], [axis, 0, -axis], [-axis, axis, 0]])
    luma = torch.tensor(LUMA).view(1, 1, 3)
    return tuple(each.to(device) for each in (matrix, matrix.T.inverse(), luma, cross))


def _jitter_colour(pixels: Tensor, generator: torch.Generator, strength: Strength) -> Tensor:
    """Change stain, hue, saturation, contrast and brightness of (B, 3, S, S)."""
    size, device = len(pixels), pixels.device

    def uniform(extent: float, *shape: int) -> Tensor:
        return torch.empty(size, *shape, device=device).uniform_(
            -extent, extent, generator=generator
        )

    # optical density = matrix.T @ stains; only haematoxylin and eosin change
    matrix, inverse, luma, _ = _colour_constants(device)
    amounts = torch.ones(size, 3, device=device)
    amounts[:, :2] += uniform(strength.stain, 2)
    shifts = torch.zeros(size, 3, 1, device=device)
    shifts[:, :2, 0] = uniform(strength.stain_shift, 2)
    stain = (matrix.T * amounts[:, None, :]) @ inverse
    flat = pixels.flatten(2)
    density = flat.clamp(min=1 / 255).log_().neg_()
    flat = torch.baddbmm(matrix.T @ shifts, stain, density).neg_().exp_()

    amount = 1 + uniform(strength.saturation, 1, 1)
    saturate = amount * torch.eye(3, device=device) + (1 - amount) * luma
    gain = 1 + uniform(strength.contrast, 1, 1)
    colour = saturate @ _hue_rotation(uniform(strength.hue)) * gain
    mean = luma @ flat.mean(2, keepdim=True)
    offset = (1 - gain) * mean + uniform(strength.brightness, 1, 1)
    flat = torch.baddbmm(offset, colour, flat)
    return flat.view(pixels.shape)


def _hue_rotation(angle: Tensor) -> Tensor:
    """Return rotations (B, 3, 3) of RGB about the grey axis by angles (B,) in rad (Rodrigues)."""
    *_, cross = _colour_constants(angle.device)
    along = torch.full((3, 3), 1 / 3, device=angle.device)
    cos, sin = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1)
    return cos * torch.eye(3, device=angle.device) + (1 - cos) * along + sin * cross
