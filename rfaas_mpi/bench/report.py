"""The JSON of a benchmark as lines for people."""

from __future__ import annotations

from collections.abc import Iterator

NAMES = ("latency", "throughput", "payload", "cold")


def as_text(data: dict) -> list[str]:
    """Lines of at most 80 columns."""
    lines = list(_environment(data))
    for name in NAMES if data["bench"] == "all" else (data["bench"],):
        part = data[name] if data["bench"] == "all" else data
        lines += ["", name, *(_faults(part) if name == "faults" else
                              _payload(part) if "rows" in part else _figures(part))]
        if name == "control":
            lines += _control(part)
        if name == "crossover":
            lines += _crossover(part)
    return lines


def _environment(data: dict) -> Iterator[str]:
    where = data["environment"]
    yield f"rfaas {data['version']}, {where['when']}, load {where['load_average'][0]:.2f} before"
    yield f"{where['cpu']}, {where['cores_online']} cores{', virtual' if where['virtual'] else ''}"
    yield f"Linux {where['kernel']}, Python {where['python']}, numpy {where['versions']['numpy']}"


def _number(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:.2f} M"
    if abs(value) >= 1e4:
        return f"{value:.0f}"
    return f"{value:.4g}"


def _figures(part: dict) -> Iterator[str]:
    yield f"  {'':32}{'p50':>11}{'p99':>11}{'A/A':>11}{'count':>9}"
    for name, value in part["figures"].items():
        aa = _number(value["aa"]["p50"]) if "aa" in value else ""
        yield f"  {name:32}{_number(value['p50']):>11}{_number(value['p99']):>11}{aa:>11}{value['count']:>9}"


def _control(part: dict) -> Iterator[str]:
    for level in part.get("http_levels", ()):
        yield (f"  {level['offered_per_s']:g} leases/s asked for: {level['leases_per_s']:g} given, "
               f"p50 {level['p50_ms']:g}, p99 {level['p99_ms']:g} ms")
    if "nodes" in part:
        yield f"  with {part['http_agents']} agents; enough for {part['nodes']} nodes with a lease a minute each"
    if "restart_s" in part:
        yield (f"  from start to answer: {part['restart_s']:g} s with the records of {part['restart_records']} "
               f"leases, {part['start_s']:g} s with none")


def _crossover(part: dict) -> Iterator[str]:
    yield f"  {part['right']} of {part['of']} decisions of Split are those of the best way"
    yield (f"  {'KiB':>6}{'work, µs':>9}" + "".join(f"{way:>9}" for way in ("here", "half", "there", "Split"))
           + f"{'lost':>7}{'A/A':>7}{'Offload':>9}  best")
    for point in part["points"]:
        middle, split = point["median_s"], point["split"]
        yield (f"  {point['bytes'] >> 10:>6}{point['work_s'] * 1e6:>9.0f}"
               + "".join(f"{_number(middle[way] * 1e6):>9}" for way in ("here", "half", "there", "split"))
               + f"{100 * split['regret']:>6.1f}%{100 * (split['aa'] - 1):>6.1f}%"
               f"{100 * point['offload']['regret']:>8.1f}%  {split['best']}"
               + ("" if split["right"] else ", and not chosen"))


def _faults(part: dict) -> Iterator[str]:
    yield f"  {'':24}{'faults':>7}{'rounds':>8}{'undisturbed':>13}{'lost, s':>9}{'A/A':>7}  answer"
    for app, found in part["apps"].items():
        for kind, one in found["faults"].items():
            answer = "right" if one["right"] else "WRONG"
            yield (f"  {app + ', ' + kind:24}{one['faults']:>7}{one['rounds']:>8}{one['undisturbed_s']:>11.2f} s"
                   f"{one['lost_s']:>9.2f}{one['lost_s_aa']:>7.2f}  {answer}{', same bits' * bool(one['same_bits'])}")
            yield from (f"    {line}" for line in one["wrong"][:3])


def _payload(part: dict) -> Iterator[str]:
    ways = ("local", "bound", "registered", "plain")
    for kind, title in (("", "untouched, p50 µs"), ("_touched", "touched, p50 µs")):
        yield f"  {title:17}" + "".join(f"{way:>12}" for way in ways) + f"{'/bound':>7}{'A/A':>6}"
        for row in part["rows"]:
            size, ratio = row["size_bytes"], row["figures"][f"registered{kind}_over_bound"]
            text = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
            yield (f"  {text:17}" + "".join(f"{_number(row[f'{way}{kind}_us']):>12}" for way in ways)
                   + f"{ratio['p50']:>7.2f}{ratio['aa']['p50']:>6.2f}")
