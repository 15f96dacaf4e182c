"""A report as one HTML file that needs no other file, and as PDF.

A :class:`Document` is plain data: sections of texts, lists, tables, pictures and a flow of
exclusions. :func:`render_html` writes all of it with ``report.html.jinja``, where every text is
escaped. Pictures are part of the file; the file's content security policy forbids everything that
would be loaded from elsewhere, and scripts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from nic_core.pictures import data_uri, figure_uri
from nic_core.types import Pixels

MAX_SVG = 400_000  # bytes; a drawing with more (thousands of points) becomes PNG [choice]
PNG_DPI = 150
LONG_WORD = 32  # letters


class PdfError(RuntimeError):
    """A PDF cannot be written because the library for it is not installed or does not load."""


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    kind: ClassVar[str] = "items"
    items: tuple[str, ...]


@dataclass(frozen=True)
class DataTable:
    """A table.

    Attributes
    ----------
    columns
        Headings.
    rows
        Cells, as many in each row as there are headings.
    texts
        Number of leading columns that contain text, at least one; the others contain numbers and
        are aligned to the right. Their cells are broken at line feeds only.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes
    ----------
    source
        ``data:`` URI (:func:`drawn_figure`, :func:`photograph`).
    alt
        What it shows, for readers who do not see it.
    small
        Show two of them side by side.
    """

    kind: ClassVar[str] = "picture"
    source: str
    alt: str
    caption: str
    small: bool = False


@dataclass(frozen=True)
class Stage:
    """A stage of a flow of exclusions.

    Attributes
    ----------
    left_out
        Why slides of this stage are not in the next one, with their number.
    """

    label: str
    slides: int
    patients: int
    left_out: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Flow:
    """Flow of slides from those that were found to those that are used, as in STARD and CONSORT."""

    kind: ClassVar[str] = "flow"
    stages: tuple[Stage, ...]


Block: TypeAlias = Heading | Text | Items | DataTable | Picture | Flow


@dataclass(frozen=True)
class Section:
    """A section with its heading."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...] = field(default=())


def drawn_figure(figure: Figure) -> str:
    """Return a figure as ``data:`` URI: SVG, or PNG if the SVG would be larger than 400 kB."""
    return figure_uri(figure, vector_bytes=MAX_SVG, dpi=PNG_DPI)


def photograph(pixels: Pixels, *, side: int) -> str:
    """Return pixels uint8 (H, W, 3) as ``data:`` URI, JPEG.

    Parameters
    ----------
    side
        Longest side of the picture, px; a larger one is scaled down.
    """
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return data_uri("image/jpeg", buffer.getvalue())


def stored_png(path: Path) -> str:
    """Return a PNG file as ``data:`` URI."""
    return data_uri("image/png", path.read_bytes())


def render_html(document: Document) -> str:
    """Return the document as HTML, without a reference to another file or address."""
    environment = Environment(
        loader=PackageLoader("nic_core.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["unbroken"] = _has_long_word
    return environment.get_template("report.html.jinja").render(
        document=document, anchors=_anchors(document)
    )


def _has_long_word(text: str) -> bool:
    """Return whether a word is so long, as a hash is, that it may be broken between letters."""
    return any(len(word) > LONG_WORD for word in text.split())


def _anchors(document: Document) -> list[list[str]]:
    """Return the anchor of each section, followed by those of its headings; all are different."""
    used: set[str] = set()

    def anchor(texts: Sequence[str]) -> str:
        words = re.findall(r"[a-z0-9]+", " ".join(texts).lower())
        base = "-".join(words) or "section"  # a text of another script has no such word
        number, name = 1, base
        while name in used:
            number += 1
            name = f"{base}-{number}"
        used.add(name)
        return name

    return [
        [
            anchor([section.title]),
            *(anchor([section.title, b.text]) for b in section.blocks if isinstance(b, Heading)),
        ]
        for section in document.sections
    ]


def pdf_of_html(html: str) -> bytes:
    """Return the report as PDF, A4.

    Raises
    ------
    PdfError
        WeasyPrint or the Pango library that it uses is not installed.
    """
    try:
        from weasyprint import HTML
    except ImportError as error:
        raise PdfError(
            "a PDF needs WeasyPrint: pip install 'nic-pathology[pdf]'; or print the HTML from a "
            "browser"
        ) from error
    except OSError as error:  # how WeasyPrint reports a missing shared library
        raise PdfError(
            f"WeasyPrint cannot load a system library ({str(error).splitlines()[0]}); install "
            "Pango, on Debian libpango-1.0-0 and libpangoft2-1.0-0; or print the HTML from a "
            "browser"
        ) from error
    return bytes(HTML(string=html).write_pdf())
