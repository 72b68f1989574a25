"""NAME
    hydro.py: a blast wave on a mesh that moves with the gas, with borrowed cores

PURPOSE
    The octant of a Sedov blast: hydrodynamics of shocks as in LULESH. The cube
    is cut among ranks, as many along each axis as there can be. A step computes the
    forces of elements, which neighbours exchange, and moves nodes by them. Both
    loops are divided by rows.

USAGE
    mpiexec -n 1 python apps/hydro.py [--n 24] [--steps COUNT] [--kernel native|numpy]
        [--mode local|remote|split|mpi]... [--workers 1] [--rounds 9] [--bound]
        [--json FILE]

    --n COUNT      elements along an edge of the cube (default: 24)
    --steps COUNT  of a round (default: until the shock is about two thirds
                   on its way)
    --kernel K     native: hydro.c, compiled here; numpy: the same in numpy

VERDICT
    - Mass, volume and energy of the whole are what they were, to 1e-12. Energy is
      kinetic and inner; volumes are integrals that no kernel took part in.
    - The shock is where Sedov's solution has it, within 2 elements, along the
      axes, the diagonals of faces and that of the cube.
    - All ranks' energies, densities, places and velocities have the bits that
      the rank gets by itself, from constants that no worker sees.
    The blast differs in each round, the masses from the middle on, so that neither
    a result nor a constant of earlier passes for a new one. However many ranks
    there are, the bits are the same.

    Ends with status 1, and prints no rate, where one of them is wrong.

SOURCE
    E. J. Caramana, D. E. Burton, M. J. Shashkov, P. P. Whalen, The Construction
    of Compatible Hydrodynamics Algorithms Utilizing Conservation of Total
    Energy, J. Comput. Phys. 146 (1998): inner energy changes by what forces do.
    D. P. Flanagan, T. Belytschko, A uniform strain hexahedron and quadrilateral
    with orthogonal hourglass control, Int. J. Numer. Meth. Eng. 17 (1981).
    J. R. Kamm, F. X. Timmes, On Efficient Generation of Numerically Robust Sedov
    Solutions, LA-UR-07-2849 (2007): the energy below.
    I. Karlin et al., LULESH 2.0 Updates and Changes, LLNL-TR-641973 (2013).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

import rfaas_mpi as rf

# Those of hydro.c; see there.
GAMMA = 1.4
QUADRATIC, LINEAR, HOURGLASS = 1.2, 0.5, 0.03
COURANT, SWELLING, STILL, TINY = 0.4, 0.1, 1e-30, 1e-200
FACES = ((4, 6, 7, 5), (0, 1, 3, 2), (2, 3, 7, 6), (0, 4, 5, 1), (1, 5, 7, 3), (0, 2, 6, 4))

ALPHA = 0.851072    # energy of a blast that is at r = 1 at t = 1, where the density is 1 (Kamm and Timmes)
GROWS = 1.1         # a step is at most so many times as long as the one before
EXACT = 1e-12
WITHIN = 2.0        # elements
CORNERS = np.array([[c >> 2, c >> 1 & 1, c & 1] for c in range(8)])
SIGNS = 2.0 * CORNERS - 1.0
MODES = np.stack([SIGNS[:, 0] * SIGNS[:, 1], SIGNS[:, 1] * SIGNS[:, 2], SIGNS[:, 0] * SIGNS[:, 2],
                  SIGNS.prod(axis=1)])


# --- kernels ---------------------------------------------------------------------------

def along_edges(values: list[list[np.ndarray]], i: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What grows along each axis, and what bends in each mode, in component i at the eight corners."""
    v = [corner[i] for corner in values]
    s = [v[c + 1] + v[c] for c in (0, 2, 4, 6)]
    d = [v[c + 1] - v[c] for c in (0, 2, 4, 6)]
    return ([(s[3] - s[1]) + (s[2] - s[0]), (s[3] - s[2]) + (s[1] - s[0]), (d[3] + d[2]) + (d[1] + d[0])],
            [(s[3] - s[2]) - (s[1] - s[0]), (d[3] - d[2]) + (d[1] - d[0]),
             (d[3] + d[2]) - (d[1] + d[0]), (d[3] - d[2]) - (d[1] - d[0])])


def cross(p: list[np.ndarray], q: list[np.ndarray]) -> list[np.ndarray]:
    return [p[(i + 1) % 3] * q[(i + 2) % 3] - p[(i + 2) % 3] * q[(i + 1) % 3] for i in range(3)]


@rf.kernel
def elements(x: np.ndarray, v: np.ndarray, v_before: np.ndarray, mass: np.ndarray, times: np.ndarray,
             sizes: np.ndarray, force_before: np.ndarray, energy_before: np.ndarray, first: int,
             out: tuple[np.ndarray, ...]) -> None:
    """Rows of elements: what hydro.c says of `hydro_elements`. No sums by numpy, whose order would vary."""
    force, energy, density, limit = out
    before, dt = times
    _, ny, nz = sizes
    i, j = np.divmod(first + np.arange(len(limit)), ny + 2)
    for array in (force, energy, density):
        array.fill(0.0)
    limit.fill(np.inf)
    inside = (j > 0) & (j <= ny)
    if not inside.any():
        return
    rows = np.flatnonzero(inside)
    i, j = i[rows], j[rows] - 1

    def corners(nodes: np.ndarray) -> list[list[np.ndarray]]:
        return [[nodes[i + a, j + b, axis, c:c + nz] for axis in range(3)] for a, b, c in CORNERS]

    at, move, moved = corners(x), corners(v), corners(v_before)
    work = np.zeros((len(rows), nz))
    for c in range(8):
        for axis in range(3):
            work += force_before[rows, c * 3 + axis, 1:-1] * (0.5 * (move[c][axis] + moved[c][axis]))
            at[c][axis] = at[c][axis] + 0.5 * dt * move[c][axis]
    at = [[at[c][axis] - at[0][axis] for axis in range(3)] for c in range(8)]
    weight = mass.reshape(-1, nz)[first + rows]
    inner = energy_before[rows] - before * work / weight

    b = [[np.zeros((len(rows), nz)) for _ in range(3)] for _ in range(8)]
    for face in FACES:
        p, q, r, s = (at[c] for c in face)
        e, f, g = ([one + other for one, other in zip(p, q)], [one - other for one, other in zip(r, p)],
                   [one - other for one, other in zip(s, q)])
        for axis, (ef, eg, fg) in enumerate(zip(cross(e, f), cross(e, g), cross(f, g))):
            for c, part in zip(face, (fg + eg, fg - ef, -eg, ef)):
                b[c][axis] += part
    straight, bent = zip(*(along_edges(at, axis) for axis in range(3)))
    _, bending = zip(*(along_edges(move, axis) for axis in range(3)))
    sides = [[straight[axis][side] for axis in range(3)] for side in range(3)]
    section = np.zeros_like(work)
    for side in range(3):
        a = cross(sides[side], sides[(side + 1) % 3])
        section = np.maximum(section, a[0] * a[0] + a[1] * a[1] + a[2] * a[2])
    volume = np.zeros_like(work)
    gradient = [[np.zeros_like(work) for _ in range(3)] for _ in range(3)]
    for c in range(8):
        for axis in range(3):
            volume += b[c][axis] * at[c][axis] * (1.0 / 36.0)
            for of in range(3):
                gradient[axis][of] += b[c][axis] * move[c][of]

    length = 16.0 * volume / np.sqrt(section)
    change = (gradient[0][0] + gradient[1][1] + gradient[2][2]) / (12.0 * volume)
    rho = weight / volume
    warm = np.maximum(inner, 0.0)
    sound = math.sqrt(GAMMA * (GAMMA - 1.0)) * np.sqrt(warm)
    jump = -change * length
    jump[jump <= STILL] = 0.0
    brake = QUADRATIC * jump + LINEAR * sound
    pressure = (GAMMA - 1.0) * rho * warm * (1.0 - 0.5 * dt * (GAMMA - 1.0) * change) + rho * jump * brake
    fast = (sound + 2.0 * brake) / (COURANT * length)
    damping = HOURGLASS * weight * (sound + jump) / length
    most = np.maximum(np.maximum(fast, np.abs(change) * (1.0 / SWELLING)), TINY)

    for of in range(3):
        resisted = [damping * (bending[of][mode] - (bent[0][mode] * gradient[0][of] + bent[1][mode] * gradient[1][of]
                                                    + bent[2][mode] * gradient[2][of]) / (12.0 * volume))
                    for mode in range(4)]
        stress = [(bent[axis][0] * resisted[0] + bent[axis][1] * resisted[1] + bent[axis][2] * resisted[2]
                   + bent[axis][3] * resisted[3]) / (12.0 * volume) for axis in range(3)]
        stress[of] = stress[of] + pressure * (1.0 / 12.0)
        for c in range(8):
            total = b[c][0] * stress[0] + b[c][1] * stress[1] + b[c][2] * stress[2]
            for mode in range(4):
                total -= MODES[mode, c] * resisted[mode]
            force[rows, c * 3 + of, 1:-1] = total
    energy[rows], density[rows], limit[rows] = inner, rho, (1.0 / most).min(axis=1)


@rf.kernel
def nodes(force: np.ndarray, mobility: np.ndarray, times: np.ndarray, sizes: np.ndarray, x: np.ndarray,
          v: np.ndarray, first: int, out: tuple[np.ndarray, ...]) -> None:
    """Rows of nodes: what hydro.c says of `hydro_nodes`."""
    _, ny, nz = sizes
    i, j = np.divmod(first + np.arange(len(x)), ny + 1)
    parts = [force[i + a, j + b, (7 - c) * 3:(8 - c) * 3, k:k + nz + 1] for c, (a, b, k) in enumerate(CORNERS)]
    total = (((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7])))
    after = v + times[1] * mobility.reshape(-1, 3, nz + 1)[first:first + len(x)] * total
    out[0][...] = x + times[1] * (0.5 * (v + after))
    out[1][...] = after


# --- their plain twins -------------------------------------------------------------------

POINTS = SIGNS / math.sqrt(3.0)     # Gauss's: exact for what is of third degree along each axis
SLOPES = np.array([[[SIGNS[c, i] / 8.0 * np.prod([1.0 + SIGNS[c, k] * point[k] for k in range(3) if k != i])
                     for i in range(3)] for c in range(8)] for point in POINTS])


def volumes_ref(x: np.ndarray) -> np.ndarray:
    """Volumes of elements whose corners x are, float64[..., 8, 3], by integration."""
    return np.linalg.det(np.einsum("pcj,...ci->...pij", SLOPES, x)).sum(axis=-1)


def forces_ref(x: np.ndarray, v: np.ndarray, mass: np.ndarray, energy: np.ndarray,
               dt: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forces float64[..., 8, 3], density and longest next step of elements, from what their corners are now."""
    x = x + 0.5 * dt * v
    jacobian = np.einsum("pcj,...ci->...pij", SLOPES, x)
    volume = np.linalg.det(jacobian).sum(axis=-1)
    slopes = np.einsum("pcj,...pji,...p->...ci", SLOPES, np.linalg.inv(jacobian), np.linalg.det(jacobian))
    gradient = np.einsum("...ci,...cj->...ij", slopes, v) / volume[..., None, None]
    sides = np.einsum("ci,...cj->...ij", SIGNS / 4.0, x)
    sections = [np.linalg.norm(np.cross(sides[..., i, :], sides[..., (i + 1) % 3, :]), axis=-1) for i in range(3)]
    length = volume / np.maximum.reduce(sections)
    change = np.trace(gradient, axis1=-2, axis2=-1)
    sound = np.sqrt(GAMMA * (GAMMA - 1.0) * np.maximum(energy, 0.0))
    jump = np.maximum(0.0, -change) * length
    brake = QUADRATIC * jump + LINEAR * sound
    pressure = mass / volume * ((GAMMA - 1.0) * np.maximum(energy, 0.0) * (1 - dt / 2 * (GAMMA - 1) * change)
                                + jump * brake)
    # Motion, less what is linear in x, seen through the modes.
    modes = MODES - np.einsum("mc,...ci,...di->...md", MODES, x, slopes) / volume[..., None, None]
    resisted = np.einsum("...md,...dj->...mj", modes, v)
    damping = HOURGLASS * mass * (sound + jump) / length
    force = (pressure[..., None, None] * slopes
             - damping[..., None, None] * np.einsum("...md,...mj->...dj", modes, resisted))
    with np.errstate(divide="ignore"):
        limit = 1.0 / np.maximum((sound + 2.0 * brake) / (COURANT * length), np.abs(change) / SWELLING)
    return force, mass / volume, limit


# --- the mesh --------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Place:
    """Which elements of the cube a rank has: from `low` up to `high` along each axis, of n."""

    n: int
    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(high - low for low, high in zip(self.low, self.high))


def divided(n: int, dims: tuple[int, ...], coords: tuple[int, ...]) -> Place:
    return Place(n, tuple(n * at // of for at, of in zip(coords, dims)),
                 tuple(n * (at + 1) // of for at, of in zip(coords, dims)))


def start(place: Place) -> np.ndarray:
    """Where nodes are at first, float64[nx + 1][ny + 1][3][nz + 1]: a cube from 0 to 1."""
    edges = [np.arange(low, high + 1) / place.n for low, high in zip(place.low, place.high)]
    x, y, z = np.meshgrid(*edges, indexing="ij")
    return np.ascontiguousarray(np.stack([x, y, z], axis=2))


def masses(place: Place, density: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of elements, float64[nx][ny + 2][nz]; of nodes, [nx + 1][ny + 1][nz + 1]; and their mobility, see hydro.c."""
    nx, ny, nz = place.shape
    one = density / place.n**3
    elements = np.zeros((nx, ny + 2, nz))
    elements[:, 1:-1] = one
    # How many elements a node has along each axis.
    x, y, z = (np.where((at := np.arange(low, high + 1)) % place.n == 0, 1, 2)
               for low, high in zip(place.low, place.high))
    of_nodes = one / 8.0 * (x[:, None, None] * y[None, :, None] * z)
    mobility = np.repeat(1.0 / of_nodes[:, :, None, :], 3, axis=2)
    mobility[x == 1, :, 0] = 0.0
    mobility[:, y == 1, 1] = 0.0
    mobility[:, :, 2, z == 1] = 0.0
    return elements, of_nodes, mobility


def corners_of(nodes: np.ndarray) -> np.ndarray:
    """float64[nx][ny][nz][8][3] of what nodes have."""
    nx, ny, _, nz = (size - 1 for size in nodes.shape)
    return np.stack([np.moveaxis(nodes[a:a + nx, b:b + ny, :, c:c + nz], 2, 3) for a, b, c in CORNERS], axis=3)


class Gas:
    """A rank's elements and nodes, twice, since a step reads one of both and writes the other."""

    def __init__(self, place: Place, empty: Callable[..., np.ndarray]) -> None:
        nx, ny, nz = place.shape
        self.place = place
        nodes, rows = ((nx + 1) * (ny + 1), 3, nz + 1), nx * (ny + 2)
        self.x, self.v = [empty(nodes) for _ in range(2)], [empty(nodes) for _ in range(2)]
        # With what neighbours send, all around; nothing comes from beyond a wall.
        self.force = [empty((nx + 2, ny + 2, 24, nz + 2)) for _ in range(2)]
        self.energy, self.density = [empty((rows, nz)) for _ in range(2)], empty((rows, nz))
        self.limit = empty(rows)
        self.times = empty(2)
        self.sizes = empty(3, np.int64)
        self.sizes[...] = place.shape
        self.start = start(place).reshape(nodes)

    def begin(self, blast: float, mass: float) -> float:
        """Everything at rest, with this energy in the cube's first element, of this mass; the first step's length."""
        for arrays in (self.v, self.force, self.energy):
            for array in arrays:
                array.fill(0.0)
        for x in self.x:
            x[...] = self.start
        self.density.fill(np.nan)
        self.limit.fill(np.nan)
        if not any(self.place.low):
            # The row behind the one that is nobody's; read by the first step, as the one before it.
            self.energy[1][1, 0] = blast / mass
        return 0.1 * COURANT / self.place.n / math.sqrt(GAMMA * (GAMMA - 1.0) * blast / mass)

    def of_elements(self, now: int, mass: Any) -> tuple[tuple[Any, ...], tuple[np.ndarray, ...]]:
        """What `hydro_elements` reads and writes in a step, the former without its last input."""
        before, rows = 1 - now, len(self.limit)
        forces = [force[1:-1].reshape(rows, 24, -1) for force in self.force]
        return ((self.shaped(self.x[now]), self.shaped(self.v[now]), self.shaped(self.v[before]), mass, self.times,
                 self.sizes, forces[before], self.energy[before]),
                (forces[now], self.energy[now], self.density, self.limit))

    def of_nodes(self, now: int, mobility: Any) -> tuple[tuple[Any, ...], tuple[np.ndarray, ...]]:
        """What `hydro_nodes` does."""
        after = 1 - now
        return ((self.force[now], mobility, self.times, self.sizes, self.x[now], self.v[now]),
                (self.x[after], self.v[after]))

    def shaped(self, nodes: np.ndarray) -> np.ndarray:
        nx, ny, nz = self.place.shape
        return nodes.reshape(nx + 1, ny + 1, 3, nz + 1)

    def inner(self, rows: np.ndarray) -> np.ndarray:
        """Elements' values without the rows that are nobody's, [nx][ny][nz]."""
        nx, ny, nz = self.place.shape
        return rows.reshape(nx, ny + 2, nz)[:, 1:-1]


class Neighbours:
    """The ranks around; alone, without MPI."""

    def __init__(self, n: int, rank: int, ranks: int) -> None:
        self.comm: Any = None
        dims, coords = (1, 1, 1), (0, 0, 0)
        if ranks > 1:
            from mpi4py import MPI

            dims = tuple(MPI.Compute_dims(ranks, 3))
            self.comm = MPI.COMM_WORLD.Create_cart(dims)
            coords = tuple(self.comm.coords)
        if max(dims) > n:
            raise SystemExit(f"hydro: {ranks} ranks need --n {max(dims)} or more")
        self.places = [divided(n, dims, tuple(map(int, np.unravel_index(one, dims)))) for one in range(ranks)]
        self.place = divided(n, dims, coords)

    def exchange(self, force: np.ndarray) -> None:
        """Axis after axis, so that corners come around: the outermost elements' forces, beyond those of neighbours."""
        if self.comm is None:
            return
        for direction, axis in enumerate((0, 1, 3)):
            lower, upper = self.comm.Shift(direction, 1)
            at = np.moveaxis(force, axis, 0)
            for mine, theirs, to, source in ((1, -1, lower, upper), (-2, 0, upper, lower)):
                got = np.zeros_like(at[0])
                self.comm.Sendrecv(np.ascontiguousarray(at[mine]), to, recvbuf=got, source=source)
                at[theirs] = got

    def least(self, value: float) -> float:
        if self.comm is None:
            return value
        from mpi4py import MPI

        return self.comm.allreduce(value, MPI.MIN)

    def gather(self, mine: np.ndarray) -> np.ndarray | None:
        """All ranks' values, [n][n][n], at the first one."""
        if self.comm is None:
            return mine
        parts = self.comm.gather(np.ascontiguousarray(mine))
        if parts is None:
            return None
        n = self.place.n
        whole = np.empty((n, n, n, *mine.shape[3:]))
        for place, part in zip(self.places, parts):
            whole[tuple(slice(*ends) for ends in zip(place.low, place.high))] = part
        return whole


def run(gas: Gas, steps: int, dt: float, neighbours: Neighbours, elements: Callable[[int], object],
        nodes: Callable[[int], object]) -> float:
    """So many steps, the first one of length dt; how long they are in all. The result is in gas.x[steps % 2] etc."""
    gone = before = 0.0
    for step in range(steps):
        now = step % 2
        gas.times[...] = before, dt
        elements(now)
        neighbours.exchange(gas.force[now])
        nodes(now)
        gone, before = gone + dt, dt
        dt = min(neighbours.least(float(gas.limit.min())), GROWS * dt)
    # What the last step's forces did to the inner energy, and the density that there is now.
    gas.times[...] = before, 0.0
    elements(steps % 2)
    return gone


# --- where the shock is -----------------------------------------------------------------------

def radius_of(blast: float, density: float, time: float) -> float:
    """Sedov's, of a blast of so much energy in an octant."""
    return (8.0 * blast * time**2 / (ALPHA * density))**0.2


def fronts(pressure: np.ndarray, places: np.ndarray) -> list[float]:
    """How far the shock is from the centre along seven lines of elements: float64[n][n][n] and [n][n][n][3].

    From outside, where the pressure first rises to a quarter of the most it has on the line: behind
    the shock it never falls that low.
    """
    n = len(pressure)
    every, none = np.arange(n), np.zeros(n, int)
    found = []
    for line in ((every, none, none), (none, every, none), (none, none, every), (every, every, none),
                 (every, none, every), (none, every, every), (every, every, every)):
        p, r = pressure[line], np.linalg.norm(places[line], axis=1)
        level = 0.25 * p.max()
        last = int(np.flatnonzero(p >= level)[-1]) if level > 0.0 else n - 1
        if last == n - 1:
            found.append(math.inf)
            continue
        part = (p[last] - level) / (p[last] - p[last + 1])
        found.append(float(r[last] + part * (r[last + 1] - r[last])))
    return found


# --- the app --------------------------------------------------------------------------------------

DENSITIES = (1.0, 1.5)
ENERGY, DENSITY, MOTION, VOLUME, WHERE = 0, 1, 2, 3, slice(4, 7)


@functools.cache
def native() -> list[rf.Kernel]:
    return common.compiled_all(Path(__file__).with_name("hydro.c"), "hydro_elements", "hydro_nodes")


class Hydro(common.App):
    name = "hydro"
    small = ("--n", "10")
    figures = ("--n", "48", "--steps", "24")

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--n", type=common.at_least(1), default=24,
                            help="elements along an edge of the cube (default: 24)")
        parser.add_argument("--steps", type=common.at_least(1),
                            help="of a round (default: two thirds of the shock's way)")
        parser.add_argument("--kernel", choices=["native", "numpy"], default="native")

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int, executor: rf.Executor) -> None:
        self.n = args.n
        # A shock crosses fewer elements in a step the farther it is: seen, not derived.
        self.steps = args.steps or round(4.8 * args.n**1.2)
        if self.n < 4 or self.steps < 1:
            raise SystemExit("hydro: 4 <= --n and 1 <= --steps")
        self.seed, self.middle = args.seed, args.rounds // 2
        self.neighbours = Neighbours(self.n, rank, ranks)
        self.kernels = list(native()) if args.kernel == "native" else [elements, nodes]
        # The checks', which must not be those that the steps are made with.
        self.local = list(self.kernels)
        place = self.neighbours.place
        self.own = [masses(place, density) for density in DENSITIES]
        self.executor = executor
        self.constants = [(executor.put(mass), executor.put(mobility)) for mass, _, mobility in self.own]
        self.gas = Gas(place, executor.empty)
        self.checked = Gas(place, np.empty)
        for gas in (self.gas, self.checked):
            for force in gas.force:
                force.fill(0.0)
        self.time = 0.0
        # Which round `checked` is of, and how long its steps are in all.
        self.expected: tuple[int, float] | None = None
        self.states: dict[int, bytes] = {}
        self.found: dict[int, tuple[float, float, float]] = {}

    def now(self, turn: int) -> int:
        """Which masses a round has."""
        return int(turn > self.middle)

    def blast(self, turn: int) -> float:
        """The energy of a round."""
        return ALPHA / 8.0 * (1.0 + np.random.default_rng([self.seed, turn]).random())

    def begin(self, gas: Gas, turn: int) -> float:
        return gas.begin(self.blast(turn), DENSITIES[self.now(turn)] / self.n**3)

    def prepare(self, turn: int) -> None:
        self.turn = turn
        self.time = math.nan
        self.first = self.begin(self.gas, turn)

    def split(self, where: str) -> Any:
        def made(now: int, mass: Any, mobility: Any) -> tuple[Any, Any]:
            read, written = self.gas.of_elements(now, mass)
            of_nodes = self.gas.of_nodes(now, mobility)
            # Elements take long, in rows of 8 already. Nodes are soon done: two parts each, for the rank and a worker.
            return (self.executor.Split_init(self.kernels[0], read, written, whole=(0, 1, 2, 4, 5), index=True,
                                             grain=8, where=where),
                    self.executor.Split_init(self.kernels[1], of_nodes[0], of_nodes[1], whole=(0, 2, 3), index=True,
                                             grain=max(64, len(self.gas.start) // 4), where=where))

        return Blasts(self, [[made(now, *constants) for now in (0, 1)] for constants in self.constants])

    def part(self, index: int, of: int) -> Callable[[], object]:
        def rows(first: int, last: int) -> slice:
            count = last - first
            return slice(first + count * index // of, first + count * (index + 1) // of)

        def bound(kernel: rf.Kernel, read: Any, written: Any, divided: int) -> Callable[[], object]:
            """A part of the rows; of inputs the last ones are divided."""
            mine = rows(0, len(written[-1]))
            return kernel.bind((*read[:-divided], *(array[mine] for array in read[-divided:]), np.array(mine.start)),
                               [array[mine] for array in written])

        runs = [[(bound(self.kernels[0], *self.gas.of_elements(now, mass.array), 2),
                  bound(self.kernels[1], *self.gas.of_nodes(now, mobility.array), 2)) for now in (0, 1)]
                for mass, mobility in self.constants]

        def run_part() -> None:
            # Without communication nothing may move: all steps are the first one, and take no time.
            self.gas.times.fill(0.0)
            both = runs[self.now(self.turn)]
            for step in range(self.steps):
                both[step % 2][0]()
                both[step % 2][1]()
            both[self.steps % 2][0]()

        return run_part

    def expect(self, turn: int) -> float:
        """Has `checked` hold what the round has to end with, by the rank alone; how long the steps are in all."""
        if self.expected is None or self.expected[0] != turn:
            gas = self.checked
            mass, _, mobility = self.own[self.now(turn)]
            zero = np.array(0)
            calls = []
            for now in (0, 1):
                for kernel, (read, written) in zip(self.local, (gas.of_elements(now, mass),
                                                                gas.of_nodes(now, mobility))):
                    calls.append(kernel.bind((*read, zero), written))
            time = run(gas, self.steps, self.begin(gas, turn), self.neighbours,
                       lambda now: calls[2 * now](), lambda now: calls[2 * now + 1]())
            self.expected = turn, time
        return self.expected[1]

    def check(self, turn: int) -> str:
        # All ranks take part in both, whatever one of them finds.
        time = self.expect(turn)
        whole = self.judged(turn)
        if self.time.hex() != time.hex():
            return f"the steps are {self.time} long in all, and the rank's own {time}"
        last = self.steps % 2
        gas, own = self.gas, self.checked
        for what, got, expected in (("energies", gas.energy[last], own.energy[last]),
                                    ("densities", gas.density, own.density),
                                    ("places", gas.x[last], own.x[last]), ("velocities", gas.v[last], own.v[last])):
            bad = got.view(np.uint64) != expected.view(np.uint64)
            if bad.any():
                return f"{bad.sum()} of {bad.size} {what} are not the rank's own, the first at {int(bad.argmax())}"
        return whole

    @np.errstate(all="ignore")
    def judged(self, turn: int) -> str:
        """What is wrong with the whole, as the first rank sees it."""
        gas, last = self.gas, self.steps % 2
        x, v = corners_of(gas.shaped(gas.x[last])), corners_of(gas.shaped(gas.v[last]))
        mine = np.stack([gas.inner(gas.energy[last]), gas.inner(gas.density), (v * v).sum(axis=(3, 4)) / 16.0,
                         volumes_ref(x), *np.moveaxis(x.mean(axis=3), -1, 0)], axis=-1)
        state = self.neighbours.gather(mine)
        if state is None:
            return ""
        self.states[turn] = hashlib.sha256(state.tobytes()).digest()
        blast, density = self.blast(turn), DENSITIES[self.now(turn)]
        total = density / self.n**3 * (state[..., ENERGY] + state[..., MOTION]).sum()
        for what, value, was in (("energy", total, blast),
                                 ("mass", (state[..., DENSITY] * state[..., VOLUME]).sum(), density),
                                 ("volume", state[..., VOLUME].sum(), 1.0)):
            if not abs(value - was) <= EXACT * was:
                return f"{what} was {was:.17g} and is {value:.17g}"
        radius = radius_of(blast, density, self.time) * self.n
        seen = [front * self.n for front in fronts(state[..., DENSITY] * state[..., ENERGY], state[..., WHERE])]
        off = max(abs(front - radius) for front in seen)
        self.found[turn] = radius, off, abs(total / blast - 1.0)
        if not off <= WITHIN:
            return (f"the shock is {min(seen):.2f} to {max(seen):.2f} elements from the centre, "
                    f"and Sedov's is {radius:.2f} after {self.steps} steps")
        return ""

    def work(self) -> tuple[float, str]:
        return 1e-6 * self.n**3 * self.steps, "million elements"

    def told(self) -> str:
        if not self.found:
            return "by the first rank"
        radius, off, energy = (max(column) for column in zip(*self.found.values()))
        states = hashlib.sha256(b"".join(self.states[turn] for turn in sorted(self.states))).hexdigest()[:16]
        return (f"the bits are the rank's own ({states}), mass, volume and energy are kept (energy to {energy:.1g}), "
                f"and the shock is within {off:.2f} elements of Sedov's, {radius:.1f} from the centre")


@dataclasses.dataclass(frozen=True)
class Foreseen:
    """What is known beforehand of both loops, together."""

    predicted_s: float | None
    plans: tuple[Any, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.plans))


class Blasts:
    """Steps of a round: for each set of masses and every other step, a split over elements and one over nodes."""

    def __init__(self, app: Hydro, splits: list[list[tuple[Any, Any]]]) -> None:
        self.app = app
        self.splits = splits

    def Run(self) -> None:
        app = self.app
        both = self.splits[app.now(app.turn)]
        app.time = run(app.gas, app.steps, app.first, app.neighbours,
                       lambda now: both[now][0].Run(), lambda now: both[now][1].Run())

    def predict(self) -> Foreseen:
        plans = tuple([split.predict() for split in self.splits[self.app.now(self.app.turn)][0]])
        parts = [plan.predicted_s for plan in plans]
        return Foreseen(None if None in parts else self.app.steps * sum(parts) + parts[0], plans)

    def Free(self) -> None:
        for pairs in self.splits:
            for pair in pairs:
                for split in pair:
                    split.Free()


if __name__ == "__main__":
    sys.exit(common.main(Hydro, __doc__))
