"""Open mutated slides one after another; run in a process of its own by ``test_slide_fuzz``.

Prints the number of the mutation before it, so that a crash of a C library names its input.
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


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut or move a few bytes, mostly in the parts that describe the image."""
    changed = bytearray(data)
    spots = [256, 4096, len(data)]
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        kind = rng.random()
        at = rng.randrange(min(rng.choice(spots), len(changed)))
        if rng.random() < 0.4:  # TIFF directories often stand last
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


def main(sources: list[Path], first: int, count: int) -> None:
    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    data = [(source.suffix, source.read_bytes()) for source in sources]
    opened = slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + count):
            rng = random.Random(number)
            suffix, original = rng.choice(data)
            path = Path(folder) / f"mutated{suffix}"
            path.write_bytes(mutate(original, rng))
            print(number, suffix, end=" ", flush=True)
            start = time.monotonic()
            try:
                with open_slide(path, mpp=rng.choice([None, 0.5])) as slide:
                    opened += 1
                    slide.read(100.5, 100, 64, 64, slide.mpp * 1.7)
                    slide.thumbnail(32)
            except SlideError:
                pass
            slowest = max(slowest, time.monotonic() - start)
    print(f"\nopened {opened:.0f} of {count}, slowest {slowest:.1f} s")


if __name__ == "__main__":
    main([Path(p) for p in sys.argv[3:]], int(sys.argv[1]), int(sys.argv[2]))
