"""How widely painted patients differ: stain, optics, scale and shapes.

Ordinary patients differ as much as those of the demo cohort. Each part of :class:`Variety` widens
one thing, for encoders that will read real tissue. All ranges are [choice], made by comparing
painted with real patches of several laboratories by eye and by their mean colours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nic_core.demo.nuclei import SERIES
from nic_core.demo.painter import ORDINARY_SHAPES, RASTER, Floats, Shapes, Stain, random_stain
from nic_core.demo.tissues import Tissue
from nic_core.libvips import pyvips

PATCH = 128  # px per side
MPP = 0.5  # um/px of the painter, and of ordinary patches
WIDE_MPP = (0.35, 0.70)
JPEG_QUALITY = 88  # of ordinary patches
WIDE_JPEG_QUALITY = (55, 96)

_CYTOPLASM = (Tissue.TUMOUR, Tissue.GLAND, Tissue.LYMPHOCYTES)


@dataclass(frozen=True)
class Variety:
    """What differs more widely between painted patients than in the demo cohort.

    Attributes
    ----------
    stain
        Stain vectors and strengths, colour of the glass, section thickness.
    optics
        Blur, sensor noise and JPEG quality.
    scale
        um/px, drawn from ``WIDE_MPP`` instead of ``MPP``.
    shapes
        Size, outline and chromatin of nuclei, their distances, thickness of fibres, radius of
        glands, and the stain of each tissue: clear, pale or eosinophilic cytoplasm.
    """

    stain: bool = False
    optics: bool = False
    scale: bool = False
    shapes: bool = False


ORDINARY = Variety()
WIDE = Variety(stain=True, optics=True, scale=True, shapes=True)


@dataclass(frozen=True)
class Form:
    """Scale and shapes of a painted patient.

    Attributes
    ----------
    window
        Side of a patch in raster points of the scene: it covers ``window * RASTER`` painted px.
    shapes
        Forms of cells and fibres.
    glands
        Factor of the radii of glands.
    """

    window: int = PATCH // RASTER
    shapes: Shapes = ORDINARY_SHAPES
    glands: float = 1.0

    @property
    def side(self) -> int:
        """Side of a patch in painted px."""
        return self.window * RASTER


def draw_form(rng: np.random.Generator, variety: Variety) -> Form:
    """Draw scale and shapes of a patient, from generators that ``rng`` spawns.

    ``rng`` itself is not advanced: what is painted next is the same for every variety.
    """
    of_scale, of_shapes = rng.spawn(2)
    form = Form()
    if variety.scale:
        form = replace(form, window=round(PATCH * of_scale.uniform(*WIDE_MPP) / MPP / RASTER))
    if variety.shapes:
        glands = float(np.exp(of_shapes.normal(0, 0.22)))
        form = replace(form, shapes=_wide_shapes(of_shapes), glands=glands)
    return form


def draw_stain(rng: np.random.Generator, variety: Variety) -> Stain:
    """Draw stain and scanner of a patient; ``rng`` advances as for an ordinary patient."""
    stain = random_stain(rng)
    of_stain, of_optics = rng.spawn(2)
    if variety.stain:
        stain = _wide_stain(of_stain, stain)
    if variety.optics:
        blur, noise = np.exp(of_optics.uniform(np.log((0.3, 0.5)), np.log((1.4, 6.0)))).tolist()
        stain = replace(stain, blur=blur, noise=noise)
    return stain


def draw_jpeg_quality(rng: np.random.Generator, variety: Variety) -> int:
    """Draw the JPEG quality of a patient's patches, 1..100."""
    return int(rng.integers(*WIDE_JPEG_QUALITY)) if variety.optics else JPEG_QUALITY


def _wide_stain(rng: np.random.Generator, stain: Stain) -> Stain:
    # log factors of R, G, B; real haematoxylin is often bluer and real eosin more magenta
    centre = np.array([(0.08, 0.0, -0.18), (-0.25, 0.03, -0.15), (0.0, 0.0, 0.0)])
    spread = np.array([(0.12, 0.07, 0.22), (0.36, 0.06, 0.24), (0.30, 0.08, 0.20)])
    jitter = np.exp(centre + spread * rng.normal(0, 1, (3, 3)).clip(-2, 2))
    return replace(
        stain,
        vectors=(stain.vectors * jitter).astype(np.float32),
        haematoxylin=float(np.exp(rng.uniform(-0.40, 0.60))),
        eosin=float(np.exp(rng.uniform(-0.50, 0.65))),
        white=(rng.uniform(222, 253) + rng.normal(0, 3, 3)).clip(205, 254).astype(np.float32),
        shading=float(rng.uniform(0.004, 0.03)),
        unevenness=float(rng.uniform(0.05, 0.30)),
    )


def _wide_shapes(rng: np.random.Generator) -> Shapes:
    eosin, haematoxylin = (
        np.exp(rng.normal(0, 0.15, len(Tissue))).astype(np.float32) for _ in range(2)
    )
    # clear, pale, ordinary or eosinophilic cytoplasm
    eosin[list(_CYTOPLASM)] *= rng.choice((0.25, 0.6, 1.0, 1.4), p=(0.2, 0.25, 0.35, 0.2))
    haematoxylin[list(_CYTOPLASM)] *= rng.uniform(0.3, 1.3)
    return Shapes(
        nuclei=int(rng.integers(SERIES)),
        spacing=float(np.exp(rng.uniform(-0.12, 0.25))),
        texture=float(np.exp(rng.uniform(-0.45, 0.45))),
        eosin=eosin,
        haematoxylin=haematoxylin,
        mottle=float(rng.uniform(0.05, 0.40)),
    )


def resized(sheet: NDArray[np.uint8], form: Form) -> NDArray[np.uint8]:
    """Return a painted sheet, uint8 (H, W, 3), at the patient's um/px: a patch has PATCH px."""
    if form.side == PATCH:
        return sheet
    image = pyvips.Image.new_from_array(sheet).resize(PATCH / form.side)
    return np.ascontiguousarray(image.numpy(), np.uint8)


def compressed(pixels: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Return a patch, uint8 (PATCH, PATCH, 3), as a JPEG file of this quality gives it."""
    data = pyvips.Image.new_from_array(np.ascontiguousarray(pixels)).jpegsave_buffer(Q=quality)
    return np.ascontiguousarray(pyvips.Image.new_from_buffer(data, "").numpy(), np.uint8)


def exchange_colours(
    patches: NDArray[np.uint8], white: Floats, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Give each patch the mean colour of another one, so that mean colours carry hardly any label.

    The optical density of each channel of a patch is multiplied by the factor (0.4 to 2.5) that
    makes the channel's mean that of the patch in its place in a random permutation, as other
    section thickness and uptake of stain would do. Glass stays as it is.

    Parameters
    ----------
    patches : uint8 (N, H, W, 3)
        Patches of one patient.
    white : float (3,)
        Colour of the glass, 0..255.
    rng : numpy.random.Generator

    Returns
    -------
    uint8 (N, H, W, 3)
    """
    n = len(patches)
    flat = patches.reshape(n, -1, 3)
    values = np.arange(256, dtype=np.float64)
    target = flat.mean(1)[rng.permutation(n)]
    out = np.empty_like(flat)
    for c in range(3):
        density = np.log(white[c] / values.clip(1)).clip(0)
        bright = np.maximum(values, white[c])  # the light at density 0
        counts = np.stack([np.bincount(p, minlength=256) for p in flat[:, :, c]])
        shares = counts / flat.shape[1]
        factor = np.ones(n)
        for _ in range(8):  # Newton's method; the mean is a convex function of the factor
            light = bright * np.exp(-factor[:, None] * density)
            slope = (shares * light * density).sum(1)
            factor += ((shares * light).sum(1) - target[:, c]) / np.maximum(slope, 1e-6)
            np.clip(factor, 0.4, 2.5, out=factor)
        table = np.rint(bright * np.exp(-factor[:, None] * density)).astype(np.uint8)
        out[:, :, c] = np.take_along_axis(table, flat[:, :, c].astype(np.intp), 1)
    return out.reshape(patches.shape)
