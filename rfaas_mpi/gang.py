"""Ranks that lease together: whether they ask for the same, and who of them gets which workers. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["RANKS_MAX", "allowances", "disagreement", "owners", "ranks_text", "shares"]

RANKS_MAX = 64
"""Ranks that one worker serves."""

_SHOWN = 3


def disagreement(terms: Sequence[Mapping[str, str]]) -> str:
    """In words, the first of the terms in which ranks differ, with who says what; "" if all say the same.

    `terms` has one mapping for each rank, from a term's name to its value.
    """
    for name in dict.fromkeys(name for mine in terms for name in mine):
        said: dict[str, list[int]] = {}
        for rank, mine in enumerate(terms):
            said.setdefault(mine.get(name, "nothing"), []).append(rank)
        if len(said) > 1:
            # Those that differ from most of the others are named first.
            by_number = sorted(said.items(), key=lambda item: (len(item[1]), item[1]))
            texts = [f"{value} on {ranks_text(ranks)}" for value, ranks in by_number[:_SHOWN]]
            more = len(by_number) - _SHOWN
            return f"{name} is " + ", ".join(texts) + (f", and {more} other values" if more > 0 else "")
    return ""


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank {text}" if len(runs) == 1 and runs[0][0] == runs[0][1] else f"ranks {text}"


def shares(ranks: Sequence[str], workers: Sequence[str], most: int = RANKS_MAX) -> list[tuple[int, ...]]:
    """For each rank the numbers of the workers that it uses; ranks and workers are given by their hosts.

    Each rank has as many workers for itself as all can have, those of its own host first.
    What is left is shared by groups of ranks, in which everybody uses the same workers; these
    serve them in rotation and count their time, so that nobody gets more than others who want as much. Groups are
    as small as they can be with as many workers for each rank in all of them, unless a worker
    would have more than `most` ranks: then some ranks get more than others, and the last ones
    nothing where there are more than `most` ranks for each worker.
    """
    given: list[list[int]] = [[] for _ in ranks]
    left: dict[str, deque[int]] = defaultdict(deque)
    for number, host in enumerate(workers):
        left[host].append(number)
    own = len(workers) // len(ranks)
    for _ in range(own):
        for rank, host in enumerate(ranks):
            if left[host]:
                given[rank].append(left[host].popleft())
    others = deque(sorted(number for numbers in left.values() for number in numbers))
    for mine in given:
        while len(mine) < own:
            mine.append(others.popleft())
    if others:
        for rank, group in enumerate(_groups(ranks, [workers[number] for number in others], most)):
            given[rank] += [others[number] for number in group]
    return [tuple(mine) for mine in given]


def owners(shares: Sequence[Sequence[int]], workers: int) -> list[int]:
    """For each of so many workers the one rank of those that use it that may lease another one in its place.

    Each worker has a rank that uses it; no rank owns more than it has to.
    """
    users: list[list[int]] = [[] for _ in range(workers)]
    for rank, mine in enumerate(shares):
        for number in mine:
            users[number].append(rank)
    count = [0] * len(shares)
    found = []
    for ranks in users:
        found.append(min(ranks, key=lambda rank: (count[rank], rank)))
        count[found[-1]] += 1
    return found


def allowances(more: int | None, ranks: int, owners: Iterable[int]) -> list[int | None]:
    """How many workers each rank may lease besides those that are there; all of them `more` (None: any number).

    What can't be divided goes to ranks that own least of what is there.
    """
    if more is None:
        return [None] * ranks
    each, rest = divmod(max(0, more), ranks)
    has = Counter(owners)
    poorest = sorted(range(ranks), key=lambda rank: (has[rank], rank))[:rest]
    return [each + (rank in poorest) for rank in range(ranks)]


def _groups(ranks: Sequence[str], workers: Sequence[str], most: int) -> list[Sequence[int]]:
    """For each rank its group's workers, of which there are fewer than ranks."""
    count = math.gcd(len(ranks), len(workers))
    if len(ranks) // count > most:
        count = len(workers)
    near = sorted(range(len(workers)), key=lambda number: (workers[number], number))
    groups = [near[len(near) * n // count:len(near) * (n + 1) // count] for n in range(count)]
    room = [min(most, len(ranks) // count + (n < len(ranks) % count)) for n in range(count)]
    homes = [{workers[number] for number in group} for group in groups]
    found: list[int | None] = [None] * len(ranks)
    for local in (True, False):
        for rank, host in enumerate(ranks):
            open_to = [n for n in range(count) if room[n] and (not local or host in homes[n])]
            if found[rank] is None and open_to:
                best = max(open_to, key=lambda n: room[n])
                room[best] -= 1
                found[rank] = best
    return [() if group is None else groups[group] for group in found]
