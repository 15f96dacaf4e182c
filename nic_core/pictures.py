"""What all pictures share: colours, sizes, print quality, captions, scale bars, colour keys.

A figure (matplotlib) is at most :data:`WIDTH` inches wide, so that its text is readable where a
page shows it at 96 px an inch. Colours are those of Okabe and Ito, which remain distinct with
colour-blindness; a second mark (line style, marker) distinguishes them in grey.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nic_core.types import Pixels

BLUE, RED, GREEN, PURPLE, ORANGE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
GREY = "#7f7f7f"
SERIES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)  # in the order of use
MARKERS = "osD^vP"
WIDTH = 9.6  # inches
PRINT_DPI = 200  # px an inch of figures in files
FIGURES = "figures"  # folder of the figures of a product
HEAT_COLOURS, HEAT_OPACITY = "coolwarm", 0.55  # colour map and its weight over a thumbnail
_KEY_WIDTH = 360  # px that the key below a picture has at least


class Style(NamedTuple):
    """How one of several series is drawn."""

    colour: str
    marker: str


def series_styles(count: int) -> list[Style]:
    """Return a style for each of several series; the first 36 differ.

    Neighbours differ in colour and in marker.
    """
    size = len(SERIES)
    return [Style(SERIES[i % size], MARKERS[(i + i // size) % size]) for i in range(count)]


def encoder_styles(encoders: Sequence[str]) -> dict[str, Style]:
    """Return the style of each encoder, by its place among the encoders of the study."""
    return dict(zip(encoders, series_styles(len(encoders)), strict=True))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, width and height in inches, without an interactive window."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def hide_frame(axes: Axes) -> None:
    """Hide the top and right borders of a plot."""
    axes.spines[["top", "right"]].set_visible(False)


def draw_shares(
    axes: Axes, counts: NDArray[np.int64], classes: Sequence[str], *, unit: str
) -> None:
    """Draw a confusion matrix: the colour is the share of the true class, the number counts.

    Parameters
    ----------
    counts : int64 (classes, classes)
        True class by predicted class.
    unit
        What is counted, for the label of the colours: patches, slides, patients.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # a mesh, and not an image, stays sharp in a vector format
    mesh = axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.6 else "black"
        place = (column + 0.5, row + 0.5)
        axes.text(*place, f"{count}", ha="center", va="center", color=colour, fontsize=8)
    centres = np.arange(len(classes)) + 0.5
    axes.set_xticks(centres, classes, fontsize=8)
    if sum(map(len, classes)) > 30:  # names side by side would overlap
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(centres, classes, fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class", aspect="equal")
    axes.invert_yaxis()
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(mesh, ax=axes, shrink=0.8)
    bar.set_label(f"share of the {unit} of a true class", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG at print quality (:data:`PRINT_DPI`)."""
    figure.savefig(path, dpi=PRINT_DPI)


def save_figures(figures: Mapping[str, Figure], folder: Path) -> None:
    """Write each figure into a folder, which is made if there are any; see :func:`save_figure`."""
    for name, figure in figures.items():
        folder.mkdir(exist_ok=True)
        save_figure(figure, folder / f"{name}.png")


def read_picture(path: Path) -> Pixels:
    """Read a picture as RGB, uint8 (H, W, 3); transparency is dropped."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def with_caption(picture: Pixels, caption: str) -> Pixels:
    """Add lines of text below a picture; they are wrapped at its width.

    The picture keeps its place at the top left; a narrow one gets a white margin on the right.

    Parameters
    ----------
    picture : uint8 (H, W, 3)

    Returns
    -------
    uint8 (more than H, at least W, 3)
    """
    return _below(picture, _text(_width(picture), caption, _font(picture)))


def with_colour_key(picture: Pixels, *, low: str, high: str, caption: str) -> Pixels:
    """Add a key of the heat colours, from blue to red, and a caption below a picture.

    Parameters
    ----------
    picture : uint8 (H, W, 3)
    low, high
        Values at the blue end and at the red end.
    caption
        What the values are and what a high one means.

    Returns
    -------
    uint8 (more than H, at least W, 3)
        The picture is at the top left.
    """
    width, font = _width(picture), _font(picture)
    size = round(font.size)
    strip = Image.new("RGB", (width, 2 * size), "white")
    draw = ImageDraw.Draw(strip)
    middle, start = size, size // 2 + draw.textlength(low, font) + size // 2
    length = max(1, width // 3)
    ramp = matplotlib.colormaps[HEAT_COLOURS](np.linspace(0, 1, length))[None, :, :3]
    # as over glass, which is nearly white
    mixed = (1 - HEAT_OPACITY) * 255 + HEAT_OPACITY * 255 * np.repeat(ramp, size, axis=0)
    draw.text((size // 2, middle), low, "black", font, anchor="lm")
    strip.paste(Image.fromarray(mixed.round().astype(np.uint8)), (round(start), size // 2))
    draw.text((start + length + size // 2, middle), high, "black", font, anchor="lm")
    return _below(picture, np.concatenate([np.asarray(strip), _text(width, caption, font)]))


def with_scale_bar(picture: Pixels, mpp: float) -> Pixels:
    """Draw the longest bar of 1, 2 or 5 times a power of ten um within a fifth of the width.

    Parameters
    ----------
    picture : uint8 (H, W, 3)
    mpp
        um/px of the picture.
    """
    longest = picture.shape[1] / 5 * mpp  # um
    power = 10.0 ** np.floor(np.log10(longest))
    length = power * max(step for step in (1, 2, 5) if step * power <= longest)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} um"
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    pixels, margin, thick = round(length / mpp), 12, 5
    bottom = picture.shape[0] - margin
    draw.rectangle((margin, bottom - thick, margin + pixels - 1, bottom), "black", "black")
    draw.text(
        (margin + pixels / 2, bottom - thick - 4),
        text,
        "black",
        _font_of_size(16),
        anchor="mb",
        stroke_width=2,
        stroke_fill="white",
    )
    return np.asarray(image)


def _font_of_size(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib's own font has the letters of most alphabets; Pillow's has few beyond ASCII
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def _font(picture: Pixels) -> ImageFont.FreeTypeFont:
    """Return a font that stays readable if a large picture is shown at 600 px."""
    return _font_of_size(max(12, picture.shape[1] // 48))


def _width(picture: Pixels) -> int:
    return max(_KEY_WIDTH, int(picture.shape[1]))


def _text(width: int, text: str, font: ImageFont.FreeTypeFont) -> Pixels:
    """Draw text, wrapped at spaces, and within a word that is longer than a line."""
    size, lines = round(font.size), [""]
    for line in text.split("\n"):
        for word in line.split():
            joined = f"{lines[-1]} {word}".lstrip()
            if font.getlength(joined) <= width - size:
                lines[-1] = joined
                continue
            if lines[-1]:
                lines.append("")
            for letter in word:
                if font.getlength(lines[-1] + letter) > width - size:
                    lines.append("")
                lines[-1] += letter
        lines.append("")
    shown = "\n".join(lines[:-1])
    height = round(1.25 * size) * (len(lines) - 1) + size // 2
    strip = Image.new("RGB", (width, height), "white")
    for number, line in enumerate(shown.split("\n")):
        place = (size // 2, size // 4 + round(1.25 * size) * number)
        ImageDraw.Draw(strip).text(place, line, "black", font)
    return np.asarray(strip)


def _below(picture: Pixels, strip: Pixels) -> Pixels:
    height, width = picture.shape[:2]
    wide = np.full((height, strip.shape[1], 3), 255, np.uint8)
    wide[:, :width] = picture
    return np.concatenate([wide, strip])


def figure_uri(figure: Figure, *, vector_bytes: int, dpi: float) -> str:
    """Return a figure as ``data:`` URI.

    A vector drawing stays sharp when it is enlarged; a figure of many points or pixels is smaller
    as pixels. The same figure gives the same text.

    Parameters
    ----------
    vector_bytes
        Size from which on a vector drawing (SVG) is replaced by pixels (PNG).
    dpi
        px an inch of the pixels.
    """
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "nic"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    if drawn.tell() <= vector_bytes:
        return data_uri("image/svg+xml", drawn.getvalue())
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    return data_uri("image/png", drawn.getvalue())


def data_uri(media_type: str, content: bytes) -> str:
    """Return content as ``data:`` URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
