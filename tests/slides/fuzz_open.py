"""Open mutated slides one after another; ``test_slide_fuzz`` runs this script in a new process.

The number of each mutation is printed before the slide is opened, so that the output names the
input on which a C library crashes.
"""

from __future__ import annotations

import faulthandler
import logging
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from nic_core.slides import SlideError, open_slide
from nic_core.slides.files import SlideFiles, files_of_slide

LIMIT = 90  # s to open one file; libCZI gets 60


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change, overwrite or remove a few bytes, mostly in the parts that describe the image."""
    changed = bytearray(data)
    spots = [256, 4096, len(data)]
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not changed:
            break
        kind = rng.random()
        at = rng.randrange(min(rng.choice(spots), len(changed)))
        if rng.random() < 0.4:  # TIFF directories are often at the end
            at = len(changed) - 1 - at
        if kind < 0.4:
            changed[at] = rng.randrange(256)
        elif kind < 0.6:
            changed[at : at + 4] = rng.choice([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff"])
        elif kind < 0.8:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind < 0.9:
            del changed[at : at + rng.randrange(1, 64)]
        else:
            del changed[max(1, at) :]
    return bytes(changed)


def slide_files(source: Path) -> dict[Path, bytes]:
    """Contents of all files of a slide, by path relative to its folder."""
    slide = files_of_slide(source)
    assert isinstance(slide, SlideFiles)
    files = [slide.path, *slide.parts]
    if slide.path.is_dir():  # OME-Zarr: its chunks too
        files = [path for path in slide.path.rglob("*") if path.is_file()]
    return {file.relative_to(source.parent): file.read_bytes() for file in files}


def main(sources: list[Path], first: int, count: int) -> None:
    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    opened = slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        slides = []
        for number, source in enumerate(sources):
            slides.append((Path(name) / str(number), source.name, slide_files(source)))
            for file, data in slides[-1][2].items():
                (slides[-1][0] / file).parent.mkdir(parents=True, exist_ok=True)
                (slides[-1][0] / file).write_bytes(data)
        for number in range(first, first + count):
            rng = random.Random(number)
            folder, slide, files = rng.choice(slides)
            file = rng.choice(sorted(files))
            engine = rng.choice([None, None, None, "openslide", "libvips", "tifffile"])
            (folder / file).write_bytes(mutate(files[file], rng))
            print(f"\n{number} {slide} {file} {engine}", end="", flush=True)
            start = time.monotonic()
            # ends the process with a traceback if a library hangs
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            try:
                with open_slide(
                    folder / slide, mpp=rng.choice([None, 0.5]), engine=engine
                ) as slide_:
                    opened += 1
                    slide_.read(100.5, 100, 64, 64, slide_.mpp * 1.7)
                    slide_.thumbnail(32)
            except SlideError:
                pass
            faulthandler.cancel_dump_traceback_later()
            slowest = max(slowest, time.monotonic() - start)
            (folder / file).write_bytes(files[file])
    print(f"\nopened {opened:.0f} of {count}, slowest {slowest:.1f} s")


if __name__ == "__main__":
    main([Path(p) for p in sys.argv[3:]], int(sys.argv[1]), int(sys.argv[2]))
