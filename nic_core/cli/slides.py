"""``nic inspect`` and ``nic tissue``: metadata and tissue mask of one slide."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nic_core.cli.shared import (
    ImageNumber,
    Mpp,
    Out,
    SlideArgument,
    advice_names_mpp_option,
    console,
    facts,
    given_slide,
    one_line,
    save_picture,
)
from nic_core.object_stores import RemoteError
from nic_core.types import Origin

MaskPath = Annotated[
    Path | None, typer.Option(help="existing tissue mask: image, GeoJSON or ASAP XML")
]
MaskOrigin = Annotated[
    Origin | None, typer.Option(help="what the coordinates of a GeoJSON mask count from")
]


def inspect(slide: SlideArgument, mpp: Mpp = None, image: ImageNumber = None) -> None:
    """Print a slide's metadata: reading library, image, size, um/px, levels, identity."""
    from nic_core.slides import SlideError, content_identity, open_slide

    with (
        one_line(SlideError, RemoteError),
        advice_names_mpp_option(),
        open_slide(given_slide(slide), mpp=mpp, image=image) as opened,
    ):
        table = facts()
        table.add_row("slide", slide)
        table.add_row("read by", f"{opened.engine} ({opened.engine_reason})")
        table.add_row("size", f"{opened.width} x {opened.height} px")
        table.add_row("scale", f"{opened.mpp:.4g} um/px ({opened.mpp_source})")
        if opened.objective_power:
            table.add_row("objective", f"{opened.objective_power:g}x")
        x, y, width, height = opened.bounds
        table.add_row("scanned", f"{width} x {height} px at {x}, {y}")
        table.add_row("area", f"{opened.width * opened.height * opened.mpp**2 / 1e6:.3g} mm2")
        for number, level in enumerate(opened.levels):
            size = f"{level.width} x {level.height} px, 1/{level.downsample:g}"
            scale = f"{opened.mpp * level.downsample:.4g} um/px"
            tiles = ", tiles of {} x {}".format(*level.tile) if level.tile else ""
            table.add_row(f"level {number}", f"{size}, {scale}{tiles}")
        if opened.images:
            rule = "the largest brightfield scan" if image is None else "named by --image"
            rule = rule if len(opened.images) > 1 else "the only one"
            table.add_row("image", f"{opened.image} ({rule})")
            left = [str(other) for other in opened.images if other.number != opened.image]
        else:
            left = list(opened.associated)
        table.add_row("images left", "\n".join(left) or "none")
        profile = opened.icc_profile
        table.add_row(
            "ICC profile", f"{profile.description} ({profile.sha256[:12]})" if profile else "none"
        )
        table.add_row("scanner", opened.scanner or "not stated")
        table.add_row("identity", content_identity(opened.path))
        console.print(table)


def tissue(
    slide: SlideArgument,
    out: Out,
    mpp: Mpp = None,
    image: ImageNumber = None,
    mask: MaskPath = None,
    origin: MaskOrigin = None,
) -> None:
    """Draw the outline of the tissue mask on a thumbnail."""
    from nic_core.slides import SlideError, open_slide
    from nic_core.tiling.mask_files import read_mask
    from nic_core.tiling.tissue import tissue_mask, tissue_outline

    with (
        one_line(SlideError, RemoteError),
        advice_names_mpp_option(),
        open_slide(given_slide(slide), mpp=mpp, image=image) as opened,
    ):
        found = read_mask(mask, opened, origin=origin) if mask else tissue_mask(opened)
        save_picture(out, tissue_outline(opened, found, side=1600))
        area = found.array.sum() * found.mpp**2 / 1e6
        console.print(f"{found.array.mean():.1%} of the slide is tissue ({area:.3g} mm2): {out}")
