"""Write slides in vendor formats, with known pixels and um/px.

Each writer takes the levels of a pyramid, level 0 first, and writes only what OpenSlide requires of
the format. JPEG has quality 95 and no chroma subsampling, so pixels hardly change.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import zarr
from PIL import Image

TILE = 128
Levels = Sequence[np.ndarray]


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0, **options)
    return buffer.getvalue()


def tiles(pixels: np.ndarray, side: int = TILE) -> Iterator[np.ndarray]:
    """Yield tiles by row then column; the last ones are padded with white."""
    height, width = pixels.shape[:2]
    for y in range(0, height, side):
        for x in range(0, width, side):
            tile = np.full((side, side, 3), 255, np.uint8)
            part = pixels[y : y + side, x : x + side]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def add_tiled(
    writer: tifffile.TiffWriter, pixels: np.ndarray, mpp: float, **options: object
) -> None:
    """Add a page of JPEG tiles."""
    settings = {
        "tile": (TILE, TILE),
        "photometric": "ycbcr",
        "compression": "jpeg",
        "subsampling": (1, 1),
        "resolution": (10_000 / mpp, 10_000 / mpp),
        "resolutionunit": "CENTIMETER",
        "metadata": None,
    } | options
    encoded = map(jpeg, tiles(pixels))
    writer.write(encoded, shape=pixels.shape, dtype=np.uint8, **settings)


def add_picture(writer: tifffile.TiffWriter, pixels: np.ndarray, description: str) -> None:
    """Add a label, macro or thumbnail: a page of strips."""
    writer.write(pixels, photometric="rgb", rowsperstrip=16, description=description, metadata=None)


def write_svs(
    path: Path,
    levels: Levels,
    mpp: float,
    *,
    codec: str = "jpeg",
    power: int = 40,
    pictures: np.ndarray | None = None,
) -> Path:
    """Write Aperio SVS: pages of tiles; a thumbnail after level 0, label and macro at the end.

    ``codec`` is jpeg, 33003 (JPEG 2000 of YCbCr) or 33005 (JPEG 2000 of RGB).
    """
    height, width = levels[0].shape[:2]
    header = f"Aperio Image Library v11.2.1 \r\n{width}x{height} ({TILE}x{TILE})"
    with tifffile.TiffWriter(path) as writer:
        for number, pixels in enumerate(levels):
            size = f" -> {pixels.shape[1]}x{pixels.shape[0]}" if number else ""
            text = f"{header}{size} RGB|AppMag = {power}|MPP = {mpp}|Left = 1"
            options: dict[str, object] = {"description": text, "subfiletype": 0}
            if codec == "jpeg":
                add_tiled(writer, pixels, mpp, **options)
            else:
                options |= {"photometric": "rgb", "compression": int(codec), "metadata": None}
                encoded = (_jpeg2000(tile, ycbcr=codec == "33003") for tile in tiles(pixels))
                writer.write(
                    encoded,
                    shape=pixels.shape,
                    dtype=np.uint8,
                    tile=(TILE, TILE),
                    **options,
                )
            if number == 0 and pictures is not None:
                add_picture(writer, pictures, f"{header} -> 64x64 - |AppMag = {power}")
        if pictures is not None:
            for name, kind in (("label", 1), ("macro", 9)):
                writer.write(
                    pictures,
                    photometric="rgb",
                    rowsperstrip=16,
                    subfiletype=kind,
                    description=f"Aperio Image Library v11.2.1 \r\n{name} 64x64",
                    metadata=None,
                )
    return path


def _jpeg2000(tile: np.ndarray, *, ycbcr: bool) -> bytes:
    if ycbcr:
        tile = np.asarray(Image.fromarray(tile).convert("YCbCr"))
    return imagecodecs.jpeg2k_encode(
        tile, level=0, reversible=True, codecformat="j2k", mct=not ycbcr
    )


def write_ndpi(
    path: Path, levels: Levels, mpp: float, *, macro: np.ndarray | None = None, power: float = 40.0
) -> Path:
    """Write Hamamatsu NDPI: a level is one JPEG whose restart intervals are the tiles.

    Offsets have 64 bits. Widths must be multiples of 128, heights of 8.
    """
    pages = [(pixels, power / 2**number) for number, pixels in enumerate(levels)]
    pages += [(macro, -1.0)] if macro is not None else []
    with path.open("wb") as file:
        file.write(b"II*\0" + struct.pack("<Q", 0))
        link = 4  # position of the offset to the next directory
        for pixels, lens in pages:
            height, width = pixels.shape[:2]
            data = jpeg(pixels, restart_marker_blocks=TILE // 8)
            start = file.tell()
            file.write(data)
            scan = data.index(b"\xff\xda")
            first = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
            restarts = [first] + [
                at + 2
                for at in range(first, len(data) - 1)
                if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7
            ]
            level_mpp = mpp * levels[0].shape[1] / width
            tags: list[tuple[int, int, object]] = [
                (256, 4, width),
                (257, 4, height),
                (258, 3, (8, 8, 8)),
                (259, 3, 7),
                (262, 3, 6),
                (271, 2, "Hamamatsu"),
                (272, 2, "C13210"),
                (273, 4, start),
                (277, 3, 3),
                (278, 4, height),
                (279, 4, len(data)),
                (282, 5, (round(1e7 / level_mpp), 1000)),
                (283, 5, (round(1e7 / level_mpp), 1000)),
                (296, 3, 3),
                (530, 3, (1, 1)),
                (65420, 3, 1),
                (65421, 11, lens),
                (65422, 9, 0),
                (65423, 9, 0),
                (65424, 9, 0),
                (65426, 4, tuple(restarts)),
            ]
            link = _ndpi_directory(file, tags, link)
    return path


def _ndpi_directory(file: io.BufferedWriter, tags: list[tuple[int, int, object]], link: int) -> int:
    """Write a directory, and its offset at ``link``; return the position of the next offset."""
    forms = {3: "H", 4: "I", 5: "I", 9: "i", 11: "f"}
    entries, high = b"", b""
    for code, kind, value in tags:
        if kind == 2:
            raw = str(value).encode() + b"\0"
            count = len(raw)
        else:
            values = value if isinstance(value, tuple) else (value,)
            raw = struct.pack(f"<{len(values)}{forms[kind]}", *values)
            count = 1 if kind == 5 else len(values)
        # the upper halves of values follow the directory; strings are never stored inside it
        if len(raw) > 4 or kind == 2:
            raw, at = struct.pack("<I", file.tell()), raw
            file.write(at)
        entries += struct.pack("<HHI", code, kind, count) + raw.ljust(4, b"\0")
        high += bytes(4)
    start = file.tell()
    file.write(struct.pack("<H", len(tags)) + entries)
    after = file.tell()
    file.write(bytes(8) + high)
    end = file.tell()
    file.seek(link)
    file.write(struct.pack("<Q", start))
    file.seek(end)
    return after


SCN = """<?xml version="1.0"?>
<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" version="1.0">
<collection name="a" uuid="u" sizeX="{size_x}" sizeY="{size_y}">
<barcode></barcode>{images}</collection></scn>"""
SCN_IMAGE = """<image name="i{number}" uuid="u{number}"><creationDate>2012</creationDate>
<device model="Leica SCN400" version="1"/><pixels sizeX="{width}" sizeY="{height}">{levels}</pixels>
<view sizeX="{view_x}" sizeY="{view_y}" offsetX="{left}" offsetY="{top}" spacingZ="0"/>
<scanSettings><objectiveSettings><objective>{power}</objective></objectiveSettings>
<illuminationSettings><numericalAperture>0.65</numericalAperture>
<illuminationSource>{light}</illuminationSource></illuminationSettings></scanSettings></image>"""


def write_scn(
    path: Path, levels: Levels, mpp: float, *, macro: np.ndarray, light: str = "brightfield"
) -> Path:
    """Write Leica SCN: the scan starts at (128, 64) px; the macro image covers the slide."""
    height, width = levels[0].shape[:2]
    nm = round(mpp * 1000)
    size_x, size_y = (width + 256) * nm, (height + 128) * nm
    scan = "".join(
        f'<dimension ifd="{number}" sizeX="{p.shape[1]}" sizeY="{p.shape[0]}"/>'
        for number, p in enumerate(levels, start=1)
    )
    overview = f'<dimension ifd="0" sizeX="{macro.shape[1]}" sizeY="{macro.shape[0]}"/>'
    images = SCN_IMAGE.format(
        number=0,
        width=macro.shape[1],
        height=macro.shape[0],
        levels=overview,
        view_x=size_x,
        view_y=size_y,
        left=0,
        top=0,
        power="0.6",
        light="brightfield",
    ) + SCN_IMAGE.format(
        number=1,
        width=width,
        height=height,
        levels=scan,
        view_x=width * nm,
        view_y=height * nm,
        left=128 * nm,
        top=64 * nm,
        power=20,
        light=light,
    )
    text = SCN.format(size_x=size_x, size_y=size_y, images=images)
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        add_tiled(writer, macro, 100 * mpp, description=text)
        for number, pixels in enumerate(levels):
            add_tiled(writer, pixels, mpp * 2**number)
    return path


PHILIPS = """<?xml version="1.0" encoding="UTF-8" ?>
<DataObject ObjectType="DPUfsImport">
<Attribute Name="DICOM_MANUFACTURER">PHILIPS</Attribute>
<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array>
<DataObject ObjectType="DPScannedImage">
<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>
<Attribute Name="DICOM_PIXEL_SPACING">{spacing}</Attribute>
<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE">
<Array>{levels}</Array></Attribute></DataObject></Array></Attribute></DataObject>"""
PHILIPS_LEVEL = """<DataObject ObjectType="PixelDataRepresentation">
<Attribute Name="DICOM_PIXEL_SPACING">{spacing}</Attribute>
<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_NUMBER">{number}</Attribute>
</DataObject>"""


def write_philips(path: Path, levels: Levels, mpp: float, *, macro: np.ndarray) -> Path:
    """Write Philips TIFF: levels are padded to whole tiles; um/px is stated in XML only."""

    def spacing(factor: int) -> str:
        return f"&quot;{mpp * factor / 1000:.9f}&quot; &quot;{mpp * factor / 1000:.9f}&quot;"

    parts = "".join(
        PHILIPS_LEVEL.format(spacing=spacing(2**number), number=number)
        for number in range(len(levels))
    )
    text = PHILIPS.format(spacing=spacing(1), levels=parts)
    options = {"software": "Philips DP v1.0", "resolution": (1, 1), "resolutionunit": "NONE"}
    with tifffile.TiffWriter(path) as writer:
        for number, pixels in enumerate(levels):
            height, width = (-(-length // TILE) * TILE for length in pixels.shape[:2])
            filled = np.full((height, width, 3), 255, np.uint8)
            filled[: pixels.shape[0], : pixels.shape[1]] = pixels
            tags = {"description": text} if number == 0 else {"subfiletype": 1}
            add_tiled(writer, filled, mpp, **options, **tags)
        add_picture(writer, macro, "Macro")
    return path


BIF_SCAN = '<iScan Magnification="{power}" ScanRes="{mpp}" UnitNumber="1"/>'
BIF_TILES = """<EncodeInfo Ver="2"><SlideStitchInfo>
<ImageInfo AOIScanned="1" AOIIndex="0" NumRows="{rows}" NumCols="{columns}"
Width="{side}" Height="{side}" Pos-X="0" Pos-Y="0">
{joints}</ImageInfo></SlideStitchInfo>
<AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>"""
BIF_JOINT = (
    '<TileJointInfo FlagJoined="1" Confidence="100" Direction="{direction}" '
    'Tile1="{first}" Tile2="{second}" OverlapX="{x}" OverlapY="{y}"/>'
)
BIF_OVERLAP = 8


def bif_size(columns: int, rows: int) -> tuple[int, int]:
    """Height and width of the image that overlapping tiles form."""
    step = TILE - BIF_OVERLAP
    return (rows - 1) * step + TILE, (columns - 1) * step + TILE


def write_bif(
    path: Path, pixels: np.ndarray, mpp: float, *, macro: np.ndarray, power: int = 20
) -> Path:
    """Write Ventana BIF: tiles overlap by 8 px and are stored whole.

    Level 1 is the stored level 0, reduced by 2. The image must have a size of :func:`bif_size`.
    """
    step = TILE - BIF_OVERLAP
    rows, columns = (1 + (length - TILE) // step for length in pixels.shape[:2])
    stored = np.concatenate(
        [
            np.concatenate(
                [
                    pixels[r * step : r * step + TILE, c * step : c * step + TILE]
                    for c in range(columns)
                ],
                axis=1,
            )
            for r in range(rows)
        ]
    )

    def name(row: int, column: int) -> int:  # numbered from the bottom in a serpentine
        up = rows - 1 - row
        return 1 + up * columns + (columns - 1 - column if up % 2 else column)

    joints = [
        BIF_JOINT.format(
            direction="RIGHT", first=name(r, c), second=name(r, c + 1), x=BIF_OVERLAP, y=0
        )
        for r in range(rows)
        for c in range(columns - 1)
    ] + [
        BIF_JOINT.format(
            direction="UP", first=name(r + 1, c), second=name(r, c), x=0, y=BIF_OVERLAP
        )
        for r in range(rows - 1)
        for c in range(columns)
    ]
    tiled = BIF_TILES.format(rows=rows, columns=columns, side=TILE, joints="\n".join(joints))
    scan = BIF_SCAN.format(power=power, mpp=mpp)
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(
            macro,
            photometric="rgb",
            rowsperstrip=16,
            description="Label_Image",
            software="ScanOutputManager 1.1",
            extratags=[(700, 1, len(scan), scan.encode(), False)],
            metadata=None,
        )
        add_tiled(
            writer,
            stored,
            mpp,
            description=f"level=0 mag={power} quality=95",
            extratags=[(700, 1, len(tiled), tiled.encode(), False)],
        )
        half = stored.reshape(stored.shape[0] // 2, 2, stored.shape[1] // 2, 2, 3).mean(axis=(1, 3))
        halved = np.rint(half).astype(np.uint8)
        add_tiled(writer, halved, mpp, description=f"level=1 mag={power // 2} quality=95")
    return path


def write_mirax(
    path: Path, levels: Levels, mpp: float, *, picture: np.ndarray, missing: Sequence[int] = ()
) -> Path:
    """Write 3DHISTECH MIRAX: a .mrxs file, which is a JPEG, and a folder with index and data.

    Sizes must be multiples of 256. Images of level 0 in ``missing`` are left out.
    """
    folder, identifier = path.with_suffix(""), "0" * 32
    folder.mkdir()
    path.write_bytes(jpeg(picture))
    across, down = (levels[0].shape[axis] // TILE for axis in (1, 0))
    data, entries = bytearray(), []
    for number, pixels in enumerate(levels):
        factor = 2**number
        entries.append([])
        for position, tile in enumerate(tiles(pixels)):
            row, column = divmod(position, across // factor)
            index = row * factor * across + column * factor
            if number == 0 and index in missing:
                continue
            encoded = jpeg(tile)
            entries[-1].append((index, len(data), len(encoded), 0))
            data += encoded
    labels = []
    for _ in range(2):
        labels.append((len(data), len(jpeg(picture)), 0))
        data += jpeg(picture)
    (folder / "Data0000.dat").write_bytes(data)

    head = b"01.02" + identifier.encode()
    index = bytearray(head + bytes(8))

    def put(values: Sequence[int]) -> int:
        at = len(index)
        index.extend(struct.pack(f"<{len(values)}i", *values))
        return at

    pages = [put([len(part), 0, *(v for entry in part for v in entry)]) for part in entries]
    roots = [put([0, page]) for page in pages]
    hierarchical = put(roots)
    others = [put([0, put([1, 0, 0, 0, *label])]) for label in labels]
    struct.pack_into("<2i", index, len(head), hierarchical, put(others))
    (folder / "Index.dat").write_bytes(index)

    layers = "".join(
        f"HIER_0_VAL_{n}=ZoomLevel_{n}\nHIER_0_VAL_{n}_SECTION=LAYER_0_LEVEL_{n}_SECTION\n"
        for n in range(len(levels))
    )
    sections = "".join(
        f"[LAYER_0_LEVEL_{n}_SECTION]\nOVERLAP_X=0\nOVERLAP_Y=0\n"
        f"MICROMETER_PER_PIXEL_X={mpp * 2**n}\nMICROMETER_PER_PIXEL_Y={mpp * 2**n}\n"
        f"IMAGE_FORMAT=JPEG\nIMAGE_FILL_COLOR_BGR=16777215\nDIGITIZER_WIDTH={TILE}\n"
        f"DIGITIZER_HEIGHT={TILE}\nIMAGE_CONCAT_FACTOR={min(n, 1)}\n"
        for n in range(len(levels))
    )
    (folder / "Slidedat.ini").write_text(
        f"[GENERAL]\nSLIDE_VERSION=01.02\nSLIDE_ID={identifier}\nIMAGENUMBER_X={across}\nIMAGENUMBER_Y={down}\n"
        "OBJECTIVE_MAGNIFICATION=20\nCameraImageDivisionsPerSide=1\n"
        "[HIERARCHICAL]\nHIER_COUNT=1\nNONHIER_COUNT=1\nINDEXFILE=Index.dat\n"
        f"HIER_0_NAME=Slide zoom level\nHIER_0_COUNT={len(levels)}\n{layers}"
        "NONHIER_0_NAME=Scan data layer\nNONHIER_0_COUNT=2\n"
        "NONHIER_0_VAL_0=ScanDataLayer_SlideThumbnail\nNONHIER_0_VAL_0_SECTION=LABELS\n"
        "NONHIER_0_VAL_1=ScanDataLayer_SlideBarcode\nNONHIER_0_VAL_1_SECTION=LABELS\n"
        "[LABELS]\nTHUMBNAIL_IMAGE_TYPE=JPEG\nBARCODE_IMAGE_TYPE=JPEG\n"
        f"[DATAFILE]\nFILE_COUNT=1\nFILE_0=Data0000.dat\n{sections}"
    )
    return path


_WSI = "1.2.840.10008.5.1.4.1.1.77.1.6"
_JPEG = "1.2.840.10008.1.2.4.50"


def write_dicom(
    folder: Path, levels: Levels, mpp: float, *, label: np.ndarray, series: str = "1.2.5"
) -> Path:
    """Write DICOM: a file of JPEG frames for each level and one for the label; return level 0."""
    folder.mkdir()
    for number, pixels in enumerate(levels):
        path = folder / f"level{number}.dcm"
        _dicom_file(path, pixels, "VOLUME", mpp * 2**number, number + 1, series)
    _dicom_file(folder / "label.dcm", label, "LABEL", mpp, 99, series)
    return folder / "level0.dcm"


def _dicom_file(
    path: Path, pixels: np.ndarray, flavour: str, mpp: float, number: int, series: str
) -> None:
    height, width = pixels.shape[:2]
    side = (TILE, TILE) if flavour == "VOLUME" else (height, width)
    frames = [jpeg(t) for t in tiles(pixels)] if flavour == "VOLUME" else [jpeg(pixels)]
    frames = [frame + bytes(len(frame) % 2) for frame in frames]
    measures = _dicom_sequence(
        0x0028, 0x9110, _dicom(0x0028, 0x0030, "DS", f"{mpp / 1000:.7f}\\{mpp / 1000:.7f}")
    )
    elements = [
        _dicom(0x0008, 0x0008, "CS", f"ORIGINAL\\PRIMARY\\{flavour}\\NONE"),
        _dicom(0x0008, 0x0016, "UI", _WSI),
        _dicom(0x0008, 0x0018, "UI", f"{series}.3.{number}"),
        _dicom(0x0008, 0x0060, "CS", "SM"),
        _dicom(0x0020, 0x000D, "UI", "1.2.4"),
        _dicom(0x0020, 0x000E, "UI", series),
        _dicom(0x0020, 0x9311, "CS", "TILED_FULL"),
        _dicom(0x0028, 0x0002, "US", 3),
        _dicom(0x0028, 0x0004, "CS", "YBR_FULL_422"),
        _dicom(0x0028, 0x0006, "US", 0),
        _dicom(0x0028, 0x0008, "IS", str(len(frames))),
        _dicom(0x0028, 0x0010, "US", side[0]),
        _dicom(0x0028, 0x0011, "US", side[1]),
        _dicom(0x0028, 0x0100, "US", 8),
        _dicom(0x0028, 0x0101, "US", 8),
        _dicom(0x0028, 0x0102, "US", 7),
        _dicom(0x0028, 0x0103, "US", 0),
        _dicom(0x0048, 0x0006, "UL", width),
        _dicom(0x0048, 0x0007, "UL", height),
        _dicom_sequence(0x0048, 0x0105, _dicom(0x0048, 0x0112, "DS", "20")),
        _dicom(0x0048, 0x0303, "UL", 1),
        _dicom_sequence(0x5200, 0x9229, measures),
    ]
    offsets = np.cumsum([0] + [len(frame) + 8 for frame in frames[:-1]])
    items = [struct.pack(f"<{len(frames)}I", *offsets), *frames]
    stream = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in items)
    meta = b"".join(
        [
            _dicom(0x0002, 0x0001, "OB", b"\0\1"),
            _dicom(0x0002, 0x0002, "UI", _WSI),
            _dicom(0x0002, 0x0003, "UI", f"{series}.3.{number}"),
            _dicom(0x0002, 0x0010, "UI", _JPEG),
            _dicom(0x0002, 0x0012, "UI", "1.2.6"),
        ]
    )
    path.write_bytes(
        bytes(128)
        + b"DICM"
        + _dicom(0x0002, 0x0000, "UL", len(meta))
        + meta
        + b"".join(elements)
        + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
        + stream
        + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    )


def _dicom(group: int, element: int, kind: str, value: str | int | bytes) -> bytes:
    if isinstance(value, int):
        raw = struct.pack("<H" if kind == "US" else "<I", value)
    else:
        raw = value.encode() if isinstance(value, str) else value
        raw += (b"\0" if kind in ("UI", "OB") else b" ") * (len(raw) % 2)
    head = struct.pack("<HH2s", group, element, kind.encode())
    long = kind in ("OB", "SQ")
    return head + (struct.pack("<HI", 0, len(raw)) if long else struct.pack("<H", len(raw))) + raw


def _dicom_sequence(group: int, element: int, item: bytes) -> bytes:
    return _dicom(group, element, "SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item)


def write_vms(path: Path, pixels: np.ndarray) -> Path:
    """Write Hamamatsu VMS: a key file that names a JPEG of the slide, a map and a macro image."""
    height, width = pixels.shape[:2]
    for name in ("image", "map", "macro"):
        (path.parent / f"{path.stem}-{name}.jpg").write_bytes(jpeg(pixels))
    path.write_text(
        f"[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\n"
        f"ImageFile={path.stem}-image.jpg\nMapFile={path.stem}-map.jpg\n"
        f"MacroImage={path.stem}-macro.jpg\nPhysicalWidth={width * 250}\n"
        f"PhysicalHeight={height * 250}\nSourceLens=40\n"
    )
    return path


def write_ome_set(folder: Path, images: Mapping[str, np.ndarray], *, companion: bool) -> list[Path]:
    """Write an OME-TIFF for each image, which together are one set; 0.25 um/px at every image.

    ``companion``: the metadata are in ``set.companion.ome``, and each TIFF only names that file.
    """
    entries = "".join(
        f'<Image ID="Image:{number}" Name="{name}"><Pixels ID="Pixels:{number}" Type="uint8" '
        f'DimensionOrder="XYCZT" SizeX="{pixels.shape[1]}" SizeY="{pixels.shape[0]}" SizeC="3" '
        'SizeZ="1" SizeT="1" PhysicalSizeX="0.25" PhysicalSizeY="0.25">'
        f'<Channel ID="Channel:{number}" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1">'
        f'<UUID FileName="{name}">urn:uuid:{name}</UUID></TiffData></Pixels></Image>'
        for number, (name, pixels) in enumerate(images.items())
    )
    head = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{}">'
    named = '<BinaryOnly MetadataFile="set.companion.ome" UUID="urn:uuid:set"/>'
    for name, pixels in images.items():
        xml = head.format(name) + (named if companion else entries) + "</OME>"
        options = {"tile": (TILE, TILE), "photometric": "rgb", "metadata": None}
        tifffile.imwrite(folder / name, pixels, description=xml, **options)
    if companion:
        (folder / "set.companion.ome").write_text(head.format("set") + entries + "</OME>")
    return sorted(folder.iterdir())


def write_ome_zarr(
    path: Path, levels: Levels, mpp: float, *, axes: str, version: str, unit: str | None, **options
) -> Path:
    """Write OME-Zarr 0.4 or 0.5 with the given order of axes, for example ``tczyx`` or ``yxc``."""
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    datasets = []
    for number, pixels in enumerate(levels):
        kept = [axis for axis in axes if axis in "yxc"]
        array = pixels.transpose(["yxc".index(axis) for axis in kept])
        for position, axis in enumerate(axes):
            if axis not in "yxc":
                array = np.expand_dims(array, position)
        chunks = tuple(
            TILE if axis in "yx" else size for axis, size in zip(axes, array.shape, strict=True)
        )
        layout = {"chunks": chunks, **options}
        # not by `data=`: zarr 3.1.2 then writes parts of a shard at the same time, and loses some
        stored = group.create_array(str(number), shape=array.shape, dtype=array.dtype, **layout)
        stored[...] = array
        scale = [mpp * 2**number if axis in "yx" else 1.0 for axis in axes]
        datasets.append(
            {
                "path": str(number),
                "coordinateTransformations": [{"type": "scale", "scale": scale}],
            }
        )
    kinds = {"t": "time", "c": "channel"}
    described = [
        {"name": axis, "type": kinds.get(axis, "space")}
        | ({"unit": unit} if unit and axis in "yx" else {})
        for axis in axes
    ]
    entry = {"name": path.name, "axes": described, "datasets": datasets}
    if version == "0.4":
        group.attrs["multiscales"] = [{**entry, "version": "0.4"}]
    else:
        group.attrs["ome"] = {"version": version, "multiscales": [entry]}
    return path


def write_czi(path: Path, pixels: np.ndarray, mpp: float) -> Path:
    """Write Zeiss CZI of uncompressed tiles, whose coordinates start away from 0, 0."""
    from pylibCZIrw import czi

    with czi.create_czi(str(path)) as writer:
        for number, tile in enumerate(tiles(pixels)):
            row, column = divmod(number, -(-pixels.shape[1] // TILE))
            part = tile[: pixels.shape[0] - row * TILE, : pixels.shape[1] - column * TILE, ::-1]
            corner = column * TILE - 100, row * TILE + 50
            writer.write(np.ascontiguousarray(part), location=corner, plane={"C": 0})
        writer.write_metadata("slide", scale_x=mpp * 1e-6, scale_y=mpp * 1e-6)
    return path
