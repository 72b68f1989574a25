"""NAME
    thumbnails.py: thumbnails of photographs, in three sizes

PURPOSE
    Reads the real photographs that scikit-image ships and shrinks them: each pixel
    of a thumbnail is the mean of the area that it covers. In each round other
    windows of the photographs, a few pixels smaller than these, are shrunk.

    The photographs are a constant that workers are sent once, and windows are the
    rows of a split. In remote mode they go through Executor.map: a stateless
    function is given a photograph and a window, and its answer, which may come in
    any order, says by the SHA-256 of the window's pixels what it is a thumbnail of.

USAGE
    mpiexec -n 1 python apps/thumbnails.py [--repeat 12] [--kernel native|numpy]
        [--remote map|split] [--save FILE.npz] [--mode local|remote|split|mpi]...
        [--workers 1] [--rounds 9] [--bound] [--json FILE]

    --repeat N    windows of each photograph in a round
    --remote HOW  how remote mode reaches the workers
    --save FILE   write the largest thumbnail of each photograph to FILE

VERDICT
    Means are of whole numbers, and rounded once, so that every right way gives the
    same bits. The rank makes each thumbnail in another way, from running sums over
    photographs that no worker sees; the SHA-256 of what is answered for a window
    must be that of its own. Windows differ in each round, and the photographs are
    mirrored until the middle, so that neither a result nor a constant of earlier
    passes for a new one.

    Ends with status 1, and prints no rate, where a thumbnail is wrong.

SOURCE
    F. C. Crow, Summed-area tables for texture mapping, SIGGRAPH 1984: the verdict's
    way.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import skimage
from skimage.io import imread

import rfaas_mpi as rf

# What comes with the package itself: nothing is downloaded.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg",
               "motorcycle_left.png", "camera.png", "coins.png", "moon.png")
EDGES = (160, 96, 48)                           # of the longer side, in pixels
ROOMS = tuple(3 * edge**2 for edge in EDGES)    # a thumbnail's in its row, in bytes
MARGIN = 16                                     # pixels that a window is smaller: one of 17 times 17
OFFSET, STRIDE, HEIGHT, WIDTH, CHANNELS, JOB = 0, 1, 2, 3, 4, 8


def photographs() -> dict[str, np.ndarray]:
    """Name → uint8[h, w, 1] or uint8[h, w, 3] of the photographs that are installed."""
    directory = Path(skimage.__file__).parent / "data"
    return {Path(name).stem: np.atleast_3d(imread(directory / name))
            for name in PHOTOGRAPHS if (directory / name).is_file()}


def scaled(height: int, width: int, edge: int) -> tuple[int, int]:
    """Height and width with `edge` pixels on the longer side."""
    longer = max(height, width)
    return (max(1, (2 * height * edge + longer) // (2 * longer)), max(1, (2 * width * edge + longer) // (2 * longer)))


def rounded(sums: np.ndarray, area: int) -> np.ndarray:
    """Sums over an area as means, uint8."""
    return ((2 * sums + area) // (2 * area)).astype(np.uint8)


def parts(source: int, target: int) -> np.ndarray:
    """How much each of `target` pixels covers of each of `source`, float64[target, source]: whole numbers."""
    i, j = np.arange(source), np.arange(target)[:, None]
    low, high = np.maximum(i * target, j * source), np.minimum((i + 1) * target, (j + 1) * source)
    return np.maximum(high - low, 0).astype(float)


@rf.kernel
def shrink(pixels: np.ndarray, jobs: np.ndarray, out: np.ndarray) -> None:
    """The thumbnails of windows, each window's in a row. Products of whole numbers, so that BLAS is exact."""
    out.fill(0)
    for job, row in zip(jobs.tolist(), out):
        height, width, channels = job[HEIGHT:CHANNELS + 1]
        window = np.lib.stride_tricks.as_strided(
            pixels[job[OFFSET]:], (height, width * channels), (job[STRIDE], 1)).astype(float)
        begin = 0
        for edge, space in zip(EDGES, ROOMS):
            high, wide = scaled(height, width, edge)
            lines = (parts(height, high) @ window).reshape(high, width, channels)
            small = rounded((parts(width, wide) @ lines).astype(np.int64), height * width)
            row[begin:begin + small.size] = small.ravel()
            begin += space


def digest(pixels: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(pixels)).digest()


def mapped(kernel: rf.Kernel) -> Callable[..., tuple[bytes, np.ndarray]]:
    """The stateless function that map is given: what a window is known by, and its thumbnails."""

    def run(pixels: np.ndarray, job: np.ndarray) -> tuple[bytes, np.ndarray]:
        out = np.empty((1, sum(ROOMS)), np.uint8)
        kernel(pixels, job[None], out=out)
        offset, stride, height, width, channels = job[:CHANNELS + 1].tolist()
        window = np.lib.stride_tricks.as_strided(pixels[offset:], (height, width * channels), (stride, 1))
        return digest(window), out[0]

    return run


class RunningSums:
    """Thumbnails of a photograph's windows in the verdict's way: from sums over all lines above."""

    def __init__(self, photograph: np.ndarray) -> None:
        self.photograph = photograph
        self.above = np.concatenate([np.zeros((1, *photograph.shape[1:]), np.int64),
                                     photograph.cumsum(axis=0, dtype=np.int64)]).astype(np.int32)

    @staticmethod
    def _between(sums: np.ndarray, values: np.ndarray, target: int) -> np.ndarray:
        """Sums over each of `target` equal parts of the first axis, in units of a part of a pixel."""
        source = len(values)
        whole, rest = np.divmod(np.arange(target + 1) * source, target)
        until = sums[whole] * np.int64(target)
        until += values[np.minimum(whole, source - 1)] * rest.reshape(-1, *[1] * (values.ndim - 1))
        return np.diff(until, axis=0)

    def thumbnail(self, y: int, x: int, height: int, width: int, edge: int) -> np.ndarray:
        """Of the window at y, x: uint8[h, w, channels]."""
        high, wide = scaled(height, width, edge)
        part = (slice(y, y + height), slice(x, x + width))
        lines = self._between(self.above[y:y + height + 1, part[1]], self.photograph[part], high).swapaxes(0, 1)
        left = np.concatenate([np.zeros((1, *lines.shape[1:]), np.int64), lines.cumsum(axis=0)])
        return rounded(self._between(left, lines, wide).swapaxes(0, 1), height * width)


class Thumbnails(common.App):
    name = "thumbnails"
    small = ("--repeat", "1")

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--repeat", type=common.at_least(1), default=12,
                            help="windows of each photograph (default: 12)")
        parser.add_argument("--kernel", choices=["native", "numpy"], default="native")
        parser.add_argument("--remote", choices=["map", "split"], default="map",
                            help="how remote mode reaches the workers (default: map)")
        parser.add_argument("--save", metavar="FILE", help="write the largest thumbnail of each photograph to FILE")

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int, executor: rf.Executor) -> None:
        shipped = photographs()
        # More would be the same windows again, which nobody could tell apart.
        if not shipped or not 1 <= args.repeat <= (MARGIN + 1)**2 or (args.save and ranks > 1):
            raise SystemExit(f"thumbnails: scikit-image's photographs, 1 <= --repeat <= {(MARGIN + 1)**2}, and one rank "
                             "for --save")
        self.args = args
        self.names = list(shipped)
        self.middle = args.rounds // 2
        self.kernel = (common.compiled(Path(__file__).with_name("thumbnails.c"), "thumbnails_shrink")
                       if args.kernel == "native" else shrink)
        # Mirrored, and as they are: what workers are sent, and the verdict's own.
        self.own = [[np.ascontiguousarray(one[:, ::-1]) for one in shipped.values()], list(shipped.values())]
        self.sums = [[RunningSums(one) for one in whole] for whole in self.own]
        self.starts = np.cumsum([0, *(one.size for one in self.own[0])]).tolist()
        self.executor = executor
        self.constants = [executor.put(np.concatenate([one.ravel() for one in whole])) for whole in self.own]
        # (which window, photograph) of each row: mixed, so that all parts take about as long.
        rows = [(k, p) for k in range(args.repeat) for p in range(len(shipped))]
        mixed = np.random.default_rng(args.seed).permutation(len(rows)).tolist()
        self.rows = [rows[i] for i in mixed[len(rows) * rank // ranks:len(rows) * (rank + 1) // ranks]]
        self.count = len(rows)
        self.jobs = executor.zeros((len(self.rows), JOB), np.int64)
        self.out = executor.empty((len(self.rows), sum(ROOMS)), np.uint8)
        # Windows' digests → rows, where answers come in any order, and what came for nobody.
        self.keyed = False
        self.waiting: dict[bytes, int] = {}
        self.strays = 0
        # The digests of the rank's own, of the round that is checked now.
        self.expected: tuple[int, list[bytes]] | None = None

    def now(self, turn: int) -> int:
        """Which photographs a round has."""
        return int(turn > self.middle)

    def window(self, turn: int, row: int) -> tuple[int, int, int, int, int]:
        """Of which photograph, from which line and column, how high and wide."""
        k, p = self.rows[row]
        y, x = divmod((turn * self.args.repeat + k) % (MARGIN + 1)**2, MARGIN + 1)
        height, width, _ = self.own[0][p].shape
        return p, y, x, height - MARGIN, width - MARGIN

    def prepare(self, turn: int) -> None:
        self.turn = turn
        for row in range(len(self.rows)):
            p, y, x, height, width = self.window(turn, row)
            _, line, channels = self.own[0][p].shape
            self.jobs[row, :CHANNELS + 1] = (self.starts[p] + (y * line + x) * channels, line * channels, height,
                                             width, channels)
        self.out.fill(255)
        if self.keyed:
            self.waiting = {digest(self.pixels(turn, row)): row for row in range(len(self.rows))}
        self.strays = 0

    def pixels(self, turn: int, row: int) -> np.ndarray:
        p, y, x, height, width = self.window(turn, row)
        return self.own[self.now(turn)][p][y:y + height, x:x + width]

    def split(self, where: str) -> Any:
        if where == "workers" and self.args.remote == "map":
            self.keyed = True
            return common.Mapped(self.executor, mapped(self.kernel), self.items, self.take)
        return common.Turns([
            self.executor.Split_init(self.kernel, (constant, self.jobs), self.out, grain=1, where=where)
            for constant in self.constants], lambda: self.now(self.turn))

    def items(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        whole = self.constants[self.now(self.turn)].array
        for (_, p), job in zip(self.rows, self.jobs):
            # Its photograph alone: over a network it travels with the job.
            own = job.copy()
            own[OFFSET] -= self.starts[p]
            yield whole[self.starts[p]:self.starts[p + 1]], own

    def take(self, answer: tuple[bytes, np.ndarray]) -> None:
        row = self.waiting.pop(answer[0], None)
        if row is None:
            self.strays += 1
        else:
            self.out[row] = answer[1]

    def part(self, index: int, of: int) -> Callable[[], object]:
        mine = slice(len(self.jobs) * index // of, len(self.jobs) * (index + 1) // of)
        runs = [self.kernel.bind((constant.array, self.jobs[mine]), (self.out[mine],)) for constant in self.constants]
        return lambda: runs[self.now(self.turn)]()

    def expect(self, turn: int, row: int) -> np.ndarray:
        """What a window's thumbnails have to be, uint8[sum(ROOMS)]."""
        p, *window = self.window(turn, row)
        whole = np.zeros(sum(ROOMS), np.uint8)
        begin = 0
        for edge, space in zip(EDGES, ROOMS):
            small = self.sums[self.now(turn)][p].thumbnail(*window, edge)
            whole[begin:begin + small.size] = small.ravel()
            begin += space
        return whole

    def check(self, turn: int) -> str:
        if self.strays:
            return f"{self.strays} answers are for no window, or for one that was answered already"
        if self.expected is None or self.expected[0] != turn:
            self.expected = turn, [digest(self.expect(turn, row)) for row in range(len(self.rows))]
        bad = [row for row, right in enumerate(self.expected[1]) if digest(self.out[row]) != right]
        if bad:
            k, p = self.rows[bad[0]]
            return f"{len(bad)} of {len(self.rows)} windows' thumbnails are wrong, first {self.names[p]}'s window {k}"
        if self.args.save and turn == self.args.rounds:
            self.save()
        return ""

    def save(self) -> None:
        largest = {}
        for row, (k, p) in enumerate(self.rows):
            if k == 0:
                height, width, channels = self.jobs[row, HEIGHT:CHANNELS + 1].tolist()
                high, wide = scaled(height, width, EDGES[0])
                largest[p] = self.out[row, :high * wide * channels].reshape(high, wide, channels).squeeze()
        np.savez(self.args.save, **{self.names[p]: largest[p] for p in sorted(largest)})

    def work(self) -> tuple[float, str]:
        return self.count * len(EDGES), "thumbnails"

    def told(self) -> str:
        return (f"{self.count * len(EDGES)} thumbnails have the digests of those from running sums, of the windows "
                "that they are of")


if __name__ == "__main__":
    sys.exit(common.main(Thumbnails, __doc__))
