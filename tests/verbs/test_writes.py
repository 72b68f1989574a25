"""Verbs work between two nodes, by the tools of others and by small programs of our own."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from verbs import support


def output_of(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    return out


def crossed() -> list[int]:
    """Packets that each port of the guest's bridge has received."""
    return [int(Path(f"/sys/class/net/port{node}/statistics/rx_packets").read_text()) for node in (0, 1)]


@pytest.mark.guest
def test_a_ping_pong_between_the_nodes_crosses_the_bridge(nodes, start):
    before = crossed()
    rounds, tcp_port = 100, 18515
    here, there = (["ibv_rc_pingpong", "-d", node.device, "-i", node.port, "-g", node.gid_index, "-n", rounds,
                    "-s", 64, "-p", tcp_port] for node in nodes)
    first = start(*here)
    support.wait_until(lambda: support.listens(tcp_port), "ibv_rc_pingpong listens")
    assert f"{rounds} iters in" in output_of(start(*there, "127.0.0.1"))
    output_of(first)
    # A message and an acknowledgement each way, the acknowledgements not always.
    assert all(after - old >= 2 * rounds for after, old in zip(crossed(), before, strict=True))


def test_write_latency_is_measured_between_the_nodes(nodes, start):
    tcp_port = 18516
    here, there = (["ib_write_lat", "-d", node.device, "-i", node.port, "-x", node.gid_index, "-s", 8, "-n", 100,
                    "-p", tcp_port] for node in nodes)
    first = start(*here)
    support.wait_until(lambda: support.listens(tcp_port), "ib_write_lat listens")
    answer = output_of(start(*there, "127.0.0.1"))
    output_of(first)
    (typical_us,) = re.findall(r"^ *8 +100 +[\d.]+ +[\d.]+ +([\d.]+)", answer, re.M)
    assert float(typical_us) > 0


@pytest.mark.parametrize("asked", [16, 64])
def test_inline_writes_with_immediate_arrive_whole_up_to_what_the_queue_pair_grants(nodes, program, start, asked):
    here, there = nodes
    printed = output_of(start(program("write_imm"), here.device, here.gid_index, there.device, there.gid_index,
                              asked, 50))
    granted, rounds = re.fullmatch(r"inline (\d+)\nrounds (\d+)\n", printed).groups()
    assert (int(granted) >= asked, rounds) == (True, "50")


def test_pyverbs_writes_with_immediate_between_two_processes(nodes, tmp_path):
    python, environment = support.pyverbs(tmp_path)
    texts = ("from the first", "and from the second")
    peers = [subprocess.Popen(
        [python, Path(__file__).with_name("pyverbs_peer.py"), node.device, str(node.gid_index), text, str(number)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for number, (node, text) in enumerate(zip(nodes, texts, strict=True))]
    try:
        def exchange() -> list[str]:
            """A line from each, passed on to the other."""
            lines = [peer.stdout.readline() for peer in peers]
            for peer, line in zip(peers, reversed(lines), strict=True):
                peer.stdin.write(line)
                peer.stdin.flush()
            return lines

        exchange()
        assert exchange() == ["ready\n", "ready\n"]
        assert [json.loads(line) for line in exchange()] == [
            {"text": texts[1], "immediate": 1}, {"text": texts[0], "immediate": 0}]
        assert [peer.wait(60) for peer in peers] == [0, 0]
    finally:
        for peer in peers:
            with peer:
                peer.kill()
