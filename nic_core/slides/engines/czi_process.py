"""The process in which libCZI reads a file for :class:`nic_core.slides.engines.czi.CziEngine`.

It is a script of its own, and imports nothing of this project: ``czi_process.py FILE DESCRIPTOR``.
DESCRIPTOR is the number of an inherited socket. The first message has the structure of the file.
After that each request (x, y, width, height, factor) is answered by the pixels of the region, or by
a text that says why they cannot be read.
"""

import sys
from multiprocessing.connection import Connection

import numpy as np
from pylibCZIrw import czi

CACHE = czi.CacheOptions(
    type=czi.CacheType.Standard, max_memory_usage=64 * 1024 * 1024, max_sub_block_count=1024
)


def main(path: str, connection: Connection) -> None:
    """Answer requests until the other end is closed."""
    with czi.open_czi(path, cache_options=CACHE) as file:
        left, top, width, height = file.total_bounding_rectangle_no_pyramid
        zooms: set[float] = set()

        def note(number: int, block: object) -> bool:
            zooms.add(block.get_zoom())  # type: ignore[attr-defined]
            return True

        file.enumerate_subblocks(note)
        dimensions = file.total_bounding_box_no_pyramid
        connection.send(
            {
                "size": (width, height),
                "zooms": sorted(zooms),
                "channels": dict(file.pixel_types),
                "planes": {name: dimensions.get(name, (0, 1)) for name in "TZ"},
                "xml": file.raw_metadata,
            }
        )
        while True:
            x, y, columns, rows, factor = connection.recv()
            try:
                pixels = file.read(
                    roi=(left + x * factor, top + y * factor, columns * factor, rows * factor),
                    zoom=1 / factor,
                    background_pixel=(1.0, 1.0, 1.0),
                )
            except Exception as error:  # noqa: BLE001 - sent to the caller, who raises it
                connection.send(str(error) or type(error).__name__)
            else:
                connection.send(np.ascontiguousarray(pixels[:rows, :columns, ::-1]))


if __name__ == "__main__":
    with Connection(int(sys.argv[2])) as inherited:
        try:
            main(sys.argv[1], inherited)
        except EOFError:
            pass  # the slide was closed
        except Exception as error:  # noqa: BLE001 - sent to the caller, who raises it
            inherited.send(str(error) or type(error).__name__)
