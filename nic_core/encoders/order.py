"""Order of the images of a patch task whose patients are unknown.

Collections are often numbered patient by patient. If patients are not stated, neighbours in the
order of the names may therefore show the same patient, and a split by single images tests a
network on patients it was trained on. Such a task is split by blocks of consecutive images, and
its order is tested: are neighbours more alike than images at random, in colour or in texture?
Texture also finds the order of a collection whose colours were normalised. [choice]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nic_core.natural_order import natural_key
from nic_core.types import Pixels

BLOCKS = 20  # of each class; with fewer images, each is a block
PERMUTATIONS = 999
TEXTURE_SCALES = (1, 2, 4)  # px
MAX_P, MIN_CORRELATION = 0.01, 0.1  # of an order that is reported


@dataclass(frozen=True)
class OrderTest:
    """How alike neighbours are.

    Attributes
    ----------
    correlation
        Of the features of an image with those of the next image of its class, 0 by chance: the
        mean over features, each without the mean and the scale of the class.
    p
        Share of random orders within the classes that reach it.
    """

    correlation: float
    p: float

    @property
    def ordered(self) -> bool:
        """Whether neighbours are more alike than by chance."""
        return self.p <= MAX_P and self.correlation >= MIN_CORRELATION


def blocks_of_order(labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Divide each class into at most ``BLOCKS`` blocks of consecutive images, equally large.

    Parameters
    ----------
    labels, names : sequence of str
        Class and name of each image (N,).

    Returns
    -------
    list of str
        Name of the block of each image (N,), such as ``block 03 of tumour``.
    """
    blocks = [""] * len(labels)
    order = _order(names)
    for label in sorted(set(labels)):
        members = [int(i) for i in order if labels[i] == label]
        for number, block in enumerate(np.array_split(members, min(BLOCKS, len(members)))):
            for i in block:
                blocks[i] = f"block {number + 1:02d} of {label}"
    return blocks


def texture(patches: Pixels) -> NDArray[np.float64]:
    """Return features of patches that do not depend on their mean colour.

    uint8 (N, P, P, 3) to (N, 6). At each of the scales 1, 2 and 4 px: log(1 + x) of the mean
    absolute difference between neighbouring grey values and of their standard deviation, grey
    values 0..255 [choice].
    """
    grey = patches.mean(-1, dtype=np.float32)
    found = []
    for scale in TEXTURE_SCALES:
        side = grey.shape[1] // scale
        blocks = grey[:, : side * scale, : side * scale].reshape(-1, side, scale, side, scale)
        coarse = blocks.mean((2, 4))
        steps = [np.abs(np.diff(coarse, axis=axis)).mean((1, 2)) for axis in (1, 2)]
        found += [(steps[0] + steps[1]) / 2, coarse.std((1, 2))]
    return np.log1p(np.stack(found, 1, dtype=np.float64))


def order_test(
    features: NDArray[np.floating], labels: Sequence[str], names: Sequence[str], *, seed: int = 0
) -> OrderTest | None:
    """Test whether neighbours in the order of the names are alike.

    Parameters
    ----------
    features : ndarray
        Of each image (N, F), any scale, such as its mean colour or :func:`texture`.
    labels, names : sequence of str
        Class and name of each image (N,).
    seed : int
        Of the random orders.

    Returns
    -------
    OrderTest or None
        None if no class has three images in which every feature varies.
    """
    order = _order(names)
    classes = np.unique(np.asarray(labels), return_inverse=True)[1]
    series = []
    for number in range(int(classes.max()) + 1):
        values = features[order[classes[order] == number]].astype(np.float64)
        spread = values.std(0)
        if len(values) > 2 and (spread > 0).all():
            series.append((values - values.mean(0)) / spread)
    if not series:
        return None
    rng = np.random.default_rng(seed)
    found = _correlation(series)
    random = [_correlation([rng.permutation(s) for s in series]) for _ in range(PERMUTATIONS)]
    reached = sum(value >= found for value in random)
    return OrderTest(found, (reached + 1) / (PERMUTATIONS + 1))


def _correlation(series: list[NDArray[np.float64]]) -> float:
    """Return the mean product of neighbours over all classes and features."""
    total = sum(float((values[:-1] * values[1:]).sum()) for values in series)
    return total / sum(values[1:].size for values in series)


def _order(names: Sequence[str]) -> NDArray[np.intp]:
    """Return the indices (N,) that sort the names; digits count as numbers."""
    keys = [natural_key(name) for name in names]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.intp)
