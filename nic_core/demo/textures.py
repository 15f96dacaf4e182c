"""Tileable stain textures: one table per tissue, computed once per process.

A table contains the optical densities of eosin and haematoxylin of ``SIDE x SIDE`` texels.
Isotropic tissues are looked up by position, one texel per pixel. Fibrous tissues are looked up by
(across, along) the fibre, two texels per pixel across and half a texel per pixel along, so that the
texture follows the fibres, which are the level sets of a potential.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage, spatial

from nic_core.demo.tissues import Tissue

SIDE = 1024  # texels; a power of two, so that a bit mask wraps an index
SCALE = 100.0  # stored uint8 = optical density * SCALE
FIBROUS = (Tissue.STROMA, Tissue.RIM, Tissue.MUSCLE, Tissue.MUCUS)
ACROSS, ALONG = 2.0, 0.5  # texels per pixel

Floats = NDArray[np.float32]
_Stains = tuple[NDArray[np.floating], NDArray[np.floating]]  # eosin, haematoxylin


def noise(rng: np.random.Generator, across: float, along: float | None = None) -> Floats:
    """Return tileable Gaussian noise of unit variance, smoothed over ``across`` x ``along``."""
    along = across if along is None else along
    rows = np.exp(-2 * (np.pi * across * fft.fftfreq(SIDE)) ** 2).astype(np.float32)
    columns = np.exp(-2 * (np.pi * along * fft.rfftfreq(SIDE)) ** 2).astype(np.float32)
    white = rng.standard_normal((SIDE, SIDE), dtype=np.float32)
    out = fft.irfft2(fft.rfft2(white) * (rows[:, None] * columns), (SIDE, SIDE))
    return np.asarray(out / out.std(), np.float32)


def warp(table: NDArray[np.floating], rows: Floats, columns: Floats) -> Floats:
    """Displace the texels of ``table`` by ``rows`` and ``columns``, wrapping at the borders."""
    y, x = np.indices(table.shape, dtype=np.float32)
    return np.asarray(
        ndimage.map_coordinates(table, (y + rows, x + columns), order=1, mode="grid-wrap"),
        np.float32,
    )


@cache
def stain_tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the eosin and haematoxylin tables, uint8 ``(tissue, SIDE, SIDE)`` in 1 / SCALE."""
    eosin = np.zeros((len(Tissue), SIDE, SIDE), np.uint8)
    haematoxylin = np.zeros_like(eosin)
    rng = np.random.default_rng(1895)
    for tissue, make in _MAKERS.items():
        e, h = make(rng)
        eosin[tissue] = np.clip(e * SCALE, 0, 255)
        haematoxylin[tissue] = np.clip(h * SCALE, 0, 255)
    return eosin, haematoxylin


@cache
def grain_table() -> NDArray[np.int8]:
    """Return fine noise of standard deviation 16, int8 ``(SIDE, SIDE)``."""
    table = noise(np.random.default_rng(2012), 0.5)
    return np.asarray(np.clip(table * 16, -127, 127), np.int8)


@cache
def mottle_table() -> NDArray[np.int8]:
    """Return the mottled look of real tissue, noise of standard deviation 32, int8."""
    rng = np.random.default_rng(2026)
    table = 0.75 * noise(rng, 1.1) + 0.5 * noise(rng, 2.6) + 0.43 * noise(rng, 6)
    return np.asarray(np.clip(table * 32, -127, 127), np.int8)


@cache
def ragged_table() -> NDArray[np.int8]:
    """Return displacements in px (-4..4) that roughen the borders between tissues, int8."""
    table = noise(np.random.default_rng(1971), 3.0)
    return np.asarray(np.clip(np.rint(table * 2.2), -4, 4), np.int8)


def _ramp(x: Floats, low: float, high: float) -> Floats:
    """Return 0 below ``low``, 1 above ``high`` and a smooth step between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _voronoi(rng: np.random.Generator, cells: int) -> tuple[Floats, Floats]:
    """Return the distance to the nearest cell border and a random number per cell, tileable."""
    points = rng.uniform(0, SIDE, (cells, 2))
    tree = spatial.cKDTree(points, boxsize=SIDE)
    y, x = np.mgrid[0:SIDE:2, 0:SIDE:2]
    distance, index = tree.query(np.column_stack([y.ravel(), x.ravel()]), k=2)
    border = (distance[:, 1] - distance[:, 0]).reshape(y.shape) / 2
    value = rng.uniform(size=cells)[index[:, 0]].reshape(y.shape)
    return (
        np.asarray(ndimage.zoom(border, 2, order=1, mode="grid-wrap", grid_mode=True), np.float32),
        np.asarray(value.repeat(2, 0).repeat(2, 1), np.float32),
    )


def _background(rng: np.random.Generator) -> _Stains:
    dust = 0.006 * noise(rng, 6)
    return 0.012 + dust, 0.012 + dust


def _stroma(rng: np.random.Generator) -> _Stains:
    bundles = noise(rng, 9, 34)
    fibres = noise(rng, 2.2, 22)
    clefts = noise(rng, 5, 18) + 0.4 * noise(rng, 12, 40)
    rows = 34 * noise(rng, 60, 22) + 9 * noise(rng, 30, 9)  # crimped collagen
    e = (0.62 + 0.13 * bundles + 0.15 * fibres) * (0.22 + 0.78 * _ramp(clefts, -1.8, -0.9))
    h = 0.13 + 0.03 * noise(rng, 14) + 0.03 * bundles
    zero = np.zeros_like(e)
    return warp(e, rows, zero), warp(h, rows, zero)


def _rim(rng: np.random.Generator) -> _Stains:
    """Dense collagen with the mean colour of loose stroma, so that only the texture differs."""
    bundles = noise(rng, 7, 60)
    fibres = noise(rng, 1.6, 40)
    seams = 1 - _ramp(np.abs(noise(rng, 6, 70)), 0.0, 0.22)
    rows = 7 * noise(rng, 50, 30)
    e = (0.623 + 0.07 * bundles + 0.12 * fibres) * (1 - 0.8 * seams)
    h = 0.050 + 0.02 * fibres + 0.04 * seams
    zero = np.zeros_like(e)
    return warp(e, rows, zero), warp(h, rows, zero)


def _muscle(rng: np.random.Generator) -> _Stains:
    fibres = noise(rng, 5, 90)
    striae = noise(rng, 1.5, 30)
    clefts = _ramp(noise(rng, 5, 40), -2.6, -2.0)
    rows = 16 * noise(rng, 90, 60)
    e = (0.74 + 0.10 * fibres + 0.04 * striae) * (0.35 + 0.65 * clefts)
    h = 0.12 + 0.03 * fibres
    zero = np.zeros_like(e)
    return warp(e, rows, zero), warp(h, rows, zero)


def _mucus(rng: np.random.Generator) -> _Stains:
    wisps = np.abs(noise(rng, 7, 60))
    threads = _ramp(-wisps, -0.25, 0.0)
    strands = _ramp(noise(rng, 3, 40), 0.5, 2.2)
    rows = 60 * noise(rng, 70, 50) + 10 * noise(rng, 20, 14)
    cloud = noise(rng, 40, 30)
    h = 0.13 + 0.04 * cloud + 0.16 * threads + 0.16 * strands + 0.02 * noise(rng, 1.2)
    e = 0.05 + 0.02 * cloud + 0.05 * threads + 0.10 * _ramp(noise(rng, 4, 50), 1.2, 2.2)
    zero = np.zeros_like(e)
    return warp(e, rows, zero), warp(h, rows, zero)


def _tumour(rng: np.random.Generator) -> _Stains:
    border, value = _voronoi(rng, SIDE * SIDE // 520)
    shift_y, shift_x = 3 * noise(rng, 8), 3 * noise(rng, 8)
    border, value = warp(border, shift_y, shift_x), warp(value, shift_y, shift_x)
    membrane = _ramp(-border, -1.6, 0.0)
    foam = noise(rng, 1.6)
    e = 0.43 + 0.10 * value + 0.07 * foam + 0.05 * noise(rng, 20) + 0.12 * membrane
    gaps = _ramp(noise(rng, 5), 2.0, 2.8)
    h = 0.19 + 0.07 * value + 0.03 * foam + 0.04 * membrane
    return e * (1 - 0.8 * gaps), h * (1 - 0.8 * gaps)


def _lymphocytes(rng: np.random.Generator) -> _Stains:
    net = _ramp(-np.abs(noise(rng, 5)), -0.5, 0.0)
    pale = _ramp(noise(rng, 9), -0.3, 1.6)
    e = (0.16 + 0.22 * net + 0.04 * noise(rng, 1.5)) * (1 - 0.7 * pale) + 0.03
    h = (0.12 + 0.08 * net) * (1 - 0.7 * pale) + 0.02
    return e, h


def _necrosis(rng: np.random.Generator) -> _Stains:
    clumps = noise(rng, 4)
    fine = noise(rng, 1.3)
    smudge = noise(rng, 24)
    holes = _ramp(clumps + 0.4 * smudge, -2.1, -1.2)
    dust = _ramp(noise(rng, 1.1), 2.2, 3.0)
    e = (0.66 + 0.10 * smudge + 0.10 * clumps + 0.10 * fine) * (0.2 + 0.8 * holes)
    h = 0.13 + 0.05 * smudge + 0.05 * _ramp(noise(rng, 3), 0.5, 2) + 0.55 * dust
    return e, h * (0.3 + 0.7 * holes)


def _fat(rng: np.random.Generator) -> _Stains:
    border, value = _voronoi(rng, SIDE * SIDE // 7200)
    shift_y, shift_x = 9 * noise(rng, 22), 9 * noise(rng, 22)
    border = warp(border, shift_y, shift_x)
    width = 1.7 + 0.9 * noise(rng, 30)
    septum = _ramp(width - border, -0.9, 0.9)
    e = 0.02 + septum * (0.48 + 0.12 * noise(rng, 3)) + 0.012 * value
    h = 0.015 + septum * (0.14 + 0.05 * noise(rng, 4))
    return e, h


def _gland(rng: np.random.Generator) -> _Stains:
    foam = noise(rng, 1.8)
    streak = noise(rng, 5)
    return (
        0.42 + 0.06 * foam + 0.06 * streak,
        0.19 + 0.04 * foam + 0.05 * noise(rng, 7),
    )


def _lumen(rng: np.random.Generator) -> _Stains:
    secretion = _ramp(noise(rng, 9), 0.9, 2.2)
    wisp = secretion * (0.6 + 0.4 * _ramp(noise(rng, 1.5), -0.5, 1))
    return 0.02 + 0.20 * wisp, 0.02 + 0.05 * wisp


def _blood(rng: np.random.Generator) -> _Stains:
    plasma = _ramp(noise(rng, 12), -0.5, 1.5)
    return 0.03 + 0.12 * plasma, 0.015 + 0.01 * plasma


_MAKERS = {
    Tissue.BACKGROUND: _background,
    Tissue.STROMA: _stroma,
    Tissue.RIM: _rim,
    Tissue.MUSCLE: _muscle,
    Tissue.MUCUS: _mucus,
    Tissue.TUMOUR: _tumour,
    Tissue.LYMPHOCYTES: _lymphocytes,
    Tissue.NECROSIS: _necrosis,
    Tissue.FAT: _fat,
    Tissue.GLAND: _gland,
    Tissue.LUMEN: _lumen,
    Tissue.BLOOD: _blood,
}
