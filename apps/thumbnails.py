"""NAME
    thumbnails.py: thumbnails of photographs, made on borrowed cores

PURPOSE
    Reads the real photographs that scikit-image ships, shrinks each to several
    sizes with anti-aliasing through Executor.map, and checks every thumbnail
    against one made locally, bit by bit, before it prints a rate.

USAGE
    mpiexec -n 1 python apps/thumbnails.py [--workers 0|1] [--repeat 4] [--save FILE.npz]

    --workers N  cores to borrow; 0: the rank's core alone
    --repeat N   every photograph N times
    --save FILE  write the largest thumbnail of each photograph to FILE

    Ends with status 1, and prints no rate, where a thumbnail is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage
from skimage.io import imread
from skimage.transform import resize

import rfaas_mpi as rf

# What comes with the package itself: nothing is downloaded.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg",
               "motorcycle_left.png", "camera.png", "coins.png", "moon.png")
EDGES = (160, 96, 48)


def photographs() -> dict[str, np.ndarray]:
    """Name → uint8[h, w] or uint8[h, w, 3] of the photographs that are installed."""
    directory = Path(skimage.__file__).parent / "data"
    return {Path(name).stem: imread(directory / name)
            for name in PHOTOGRAPHS if (directory / name).is_file()}


def thumbnail(photograph: np.ndarray, edge: int) -> np.ndarray:
    """The photograph with `edge` pixels on its longer side, uint8."""
    scale = edge / max(photograph.shape[:2])
    shape = tuple(max(1, round(side * scale)) for side in photograph.shape[:2])
    small = resize(photograph, shape, anti_aliasing=True, preserve_range=True)
    return np.clip(np.rint(small), 0, 255).astype(np.uint8)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--save", metavar="FILE")
    args = parser.parse_args(arguments)

    shipped = photographs()
    items = [(photograph, edge) for photograph in shipped.values() for edge in EDGES]
    print(f"config   {len(shipped)} photographs to {len(EDGES)} sizes, {args.repeat} times, "
          f"{args.workers} worker(s)", flush=True)
    begin = time.perf_counter()
    expected = [thumbnail(*item) for item in items]
    local_s = (time.perf_counter() - begin) * args.repeat

    wrong, made, elapsed = 0, expected, local_s
    if args.workers:
        with rf.Executor(workers=(0, args.workers)) as executor:
            # Each worker imports scikit-image once; that is not what is measured.
            list(executor.map(thumbnail, *zip(*items[:args.workers])))
            begin = time.perf_counter()
            made = list(executor.map(thumbnail, *zip(*items * args.repeat)))
            elapsed = time.perf_counter() - begin
        wrong = sum(not np.array_equal(a, b) for a, b in zip(made, expected * args.repeat))
        if len(made) != len(items) * args.repeat:
            wrong += abs(len(made) - len(items) * args.repeat)
    if wrong:
        print(f"verdict  WRONG {wrong} of {len(items) * args.repeat} thumbnails")
        return 1
    print(f"verdict  all {len(items) * args.repeat} thumbnails equal those made locally, bit by bit")
    print(f"rate     {len(items) * args.repeat / elapsed:.0f} thumbnails/s")
    if args.save:
        largest = made[:len(items):len(EDGES)]
        np.savez(args.save, **dict(zip(shipped, largest)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
