"""What workers print: whole lines, each with the invocation that wrote it, and no more than a rank can bear."""

from __future__ import annotations

import mmap
import os
import re
import select
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from rfaas_mpi import Executor, Kernel, get_include
from rfaas_mpi import messages as msg
from rfaas_mpi.agent.output import Line, Lines, Listening, Writer
from rfaas_mpi.agent.pool import WorkerHandle, ZygoteHandle

SOURCE = r"""
#include <stdio.h>
#include <unistd.h>
#include "rfm_call.h"

static int32_t say(const struct rfm_call *call, FILE *file, const char *end)
{
    double *out = call->outputs[0].ptr;

    fprintf(file, "native %.0f%s", *(const double *)call->inputs[0].ptr, end);
    out[0] = (double)call->invocation;
    return 0;
}

int32_t to_stdout(const struct rfm_call *call) { return say(call, stdout, "\n"); }

int32_t to_stderr(const struct rfm_call *call) { return say(call, stderr, "\n"); }

int32_t without_end(const struct rfm_call *call) { return say(call, stdout, ""); }

int32_t quiet(const struct rfm_call *call)
{
    ((double *)call->outputs[0].ptr)[0] = (double)call->invocation;
    return 0;
}
"""


SPAM = (b"spam" * 50)[:199] + b"\n"
SPAM *= 500


def texts(lines: list[Line]) -> list[str]:
    return [line.text for line in lines]


def mark(invocation: int, connection: int = 0) -> bytes:
    return b"\0\x1erfaas\x1e%016x%08x" % (invocation, connection)


def written(lines: list[Line]) -> list[tuple[int, str]]:
    return [(line.invocation, line.text) for line in lines]


# --- lines ------------------------------------------------------------------------

def test_lines_are_put_together_from_pieces():
    lines = Lines(0.0)
    assert lines.feed(b"on", 0.0) == [] and lines.since == 0.0
    assert texts(lines.feed(b"e\ntwo\nthr", 0.1)) == ["one", "two"]
    assert texts(lines.flush()) == ["thr"] and lines.since is None
    assert texts(lines.feed(b"\n", 0.2)) == [""]


def test_a_line_without_end_is_cut_into_pieces():
    lines = Lines(0.0)
    said = texts(lines.feed(b"x" * 100_000, 0.0))
    assert said and all(len(line) <= 8192 for line in said)
    assert "".join([*said, *texts(lines.flush())]) == "x" * 100_000


def test_a_flood_is_cut_and_says_so_and_keeps_its_end():
    lines = Lines(0.0)
    said: list[str] = []
    for _ in range(1000):
        said += texts(lines.feed(SPAM, 0.0))
    said += texts(lines.feed(b"the end\n", 0.0))
    said += texts(lines.flush())
    assert sum(map(len, said)) < 16 << 20
    assert said[-1] == "the end" and any("left out" in line for line in said)


def test_what_is_left_out_of_a_flood_is_counted():
    lines = Lines(0.0)
    fed = said = 0
    for _ in range(1000):
        fed += 100_000
        said += sum(len(text) + 1 for text in texts(lines.feed(SPAM, 0.0)))
    note, *rest = texts(lines.flush())
    said += sum(len(text) + 1 for text in rest)
    assert re.fullmatch(rf"\({fed - said} bytes of output are left out\)", note)


def test_output_flows_again_after_a_flood():
    lines = Lines(0.0)
    for _ in range(1000):
        lines.feed(SPAM, 0.0)
    lines.flush()
    assert texts(lines.feed(b"news\n", 10.0)) == ["news"]


# --- marks --------------------------------------------------------------------------

def test_what_stands_before_a_mark_is_that_invocations():
    lines = Lines(0.0)
    assert lines.feed(b"one\ntwo\n" + mark(17, 3) + b"three" + mark(0xabc, 0xf0000001) + b"four\nfi", 0.0,
                      Writer(40, 5)) == [
        (17, "one", 3), (17, "two", 3), (0xabc, "three", 0xf0000001), (40, "four", 5)]
    assert lines.feed(b"ve\n", 0.1, Writer(40, 5)) == [(40, "five", 5)]
    assert lines.since is None


def test_a_mark_may_come_in_pieces():
    whole = b"one\n" + mark(17) + b"two\n" + mark(0) + b"three\n"
    for cut in range(1, len(whole)):
        lines = Lines(0.0)
        said = [*lines.feed(whole[:cut], 0.0, None), *lines.feed(whole[cut:], 0.0, Writer()), *lines.flush()]
        assert written(said) == [(17, "one"), (0, "two"), (0, "three")], cut


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_flood_may_end_in_the_midst_of_a_mark(end):
    whole = SPAM.rstrip(b"\n").replace(b"\n", b"\n" if end else b" ") + end + mark(17)
    for cut in range(1, len(mark(17))):
        lines = Lines(0.0)
        for _ in range(100):
            lines.feed(SPAM, 0.0)
        lines.feed(whole[:-cut], 0.0, None)
        said = [*lines.feed(whole[-cut:] + b"two\n" + mark(18), 0.0, None), *lines.flush()]
        assert written(said)[-1] == (18, "two"), cut
        assert not any("rfaas" in line.text or "0001" in line.text for line in said), cut


def test_whose_it_is_may_be_known_later():
    lines = Lines(0.0)
    assert lines.feed(b"one\n", 0.0, None) == [] and lines.since == 0.0
    assert lines.feed(b"two\n" + mark(5, 1), 0.1, None) == [(5, "one", 1), (5, "two", 1)]
    assert lines.feed(b"three\n", 0.2, None) == []
    assert lines.feed(b"", 0.3, Writer(9, 2)) == [(9, "three", 2)]
    assert lines.feed(b"four\n", 0.4, None) == []
    assert written(lines.flush()) == [(0, "four")], "nobody waits for ever"


def test_a_worker_can_tell_how_much_of_its_output_was_read():
    with mmap.mmap(-1, 4096) as page:
        listening = Listening(page)
        words = memoryview(page).cast("Q")
        words[250] = 1                       # it leaves marks
        for taken, heard in ((3, 2), (6, 4)):
            assert listening.read(lambda: (b"abc", False)) == (b"abc", False, Writer())
            assert (words[251], words[248]) == (taken, heard)
        # It may write anything there.
        words[251] = words[248] = (1 << 64) - 1
        listening.read(lambda: (b"abc", False))
        assert (words[251], words[248]) == (2, 0)
        words.release()


@pytest.mark.parametrize("text", [b"\0\x1erfaas\x1ez", b"\0\x1erfaas\x1e" + b"-" * 24, b"\0\x1e", b"\0",
                                  mark(3)[:-1] + b"?"])
def test_what_is_no_mark_is_the_kernels(text):
    lines = Lines(0.0)
    said = [*lines.feed(b"a" + text + b"b" * 30 + b"\n", 0.0, Writer(7)), *lines.flush()]
    assert written(said) == [(7, (b"a" + text + b"b" * 30).decode())]


def test_a_rank_prints_worker_and_invocation():
    assert msg.log_text(msg.Log(1, 2, ("x", "y"), (17, 0))) == (
        "[rfaas worker 2, invocation 17] x\n[rfaas worker 2] y\n")
    assert msg.log_text(msg.Log(1, 2, ("x", "y"))) == "[rfaas worker 2] x\n[rfaas worker 2] y\n"


def test_who_goes_on_printing_into_the_pipe_of_a_worker_that_ended_holds_nobody_up():
    output, end = os.pipe()
    os.set_blocking(output, False)
    agent, worker = socket.socketpair()
    worker.close()
    handle = WorkerHandle(1, 1, cast(ZygoteHandle, None), agent, mmap.mmap(-1, 4096), output, Lines(0.0))
    stranger = subprocess.Popen(["yes", "and on" * 100], stdout=end)
    try:
        os.close(end)
        select.select([output], [], [])
        assert "and on" in handle.hear_last(0.0)[0].text
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
        handle.close()


# --- with workers -------------------------------------------------------------------

@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("printing")
    (place / "printing.c").write_text(SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", f"-I{get_include()}", "-o", str(place / "printing.so"),
                    str(place / "printing.c")], check=True, timeout=60)
    return place / "printing.so"


@pytest.fixture
def executor() -> Iterator[Executor]:
    with Executor(workers=1, fallback=False) as executor:
        yield executor


def said(capfd: pytest.CaptureFixture[str]) -> list[tuple[int, str]]:
    """(invocation, text) of each line that the rank printed; 0 where it says none."""
    found = [re.fullmatch(r"\[rfaas worker \d+(?:, invocation (\d+))?\] (.*)", line)
             for line in capfd.readouterr().err.splitlines()]
    return [(int(each[1] or 0), each[2]) for each in found if each is not None]


def speak(text, end="\n"):
    print(text, end=end)


@pytest.mark.parametrize("end", ["\n", ""])
def test_each_line_of_a_python_kernel_bears_its_invocation(executor, capfd, end):
    for number in range(50):
        executor.submit(speak, f"line {number}", end).result()
        executor.submit(abs, number).result()        # which prints nothing
    executor.shutdown()
    lines = said(capfd)
    assert [text for _, text in lines] == [f"line {number}" for number in range(50)]
    numbers = [number for number, _ in lines]
    assert 0 not in numbers and numbers == sorted(set(numbers)), "each has its own"


def test_of_those_who_share_a_worker_only_who_called_sees_what_was_printed(executor, capfd):
    with Executor._join(executor._grant) as other:
        [lease] = executor._grant.leases
        other._crew.lending.session.hold(lease)
        for number in range(20):
            executor.submit(speak, f"one {number}").result()
            other.submit(speak, f"two {number}").result()
        other._crew.lending.session.release(lease)
    executor.shutdown()
    assert sorted(text for _, text in said(capfd)) == sorted(f"{who} {n}" for who in ("one", "two") for n in range(20))


def test_many_calls_in_flight_keep_their_lines_apart(executor, capfd):
    calls = [executor.submit(lambda n: print(f"{n} a\n{n} b"), n) for n in range(300)]
    for call in calls:
        call.result()
    executor.shutdown()
    lines = said(capfd)
    owners: dict[str, set[int]] = {}
    for number, text in lines:
        owners.setdefault(text.split()[0], set()).add(number)
    assert len(lines) == 600 and all(len(found) == 1 and 0 not in found for found in owners.values())
    assert len(set.union(*owners.values())) == 300


@pytest.mark.parametrize("name", ["to_stdout", "to_stderr", "without_end"])
def test_a_native_kernels_lines_bear_the_number_that_it_is_told(executor, library, capfd, name):
    kernel, quiet = Kernel.from_library(library, name), Kernel.from_library(library, "quiet")
    told = {}
    for number in range(20):
        told[f"native {number}"] = int(executor.Invoke(kernel, np.array([float(number)]), np.empty(1))[0])
        executor.Invoke(quiet, np.array([0.0]), np.empty(1))
        executor.submit(abs, 1).result()
    executor.shutdown()
    lines = said(capfd)
    text = "".join(text for _, text in lines)
    assert all(line in text for line in told), "nothing is lost"
    # Of calls too short to be looked at some may not be known; no line bears a wrong number.
    assert all(number in (0, told[text]) for number, text in lines if text in told)
    assert sum(number != 0 for number, _ in lines) >= 10


def test_a_line_of_a_running_call_is_not_held_back(executor, capfd, tmp_path, wait_until):
    def talk(path):
        import os
        import time
        print("begun")
        while not os.path.exists(path):
            time.sleep(0.001)
        print("ended")

    executor.submit(speak, "before").result()
    call = executor.submit(talk, str(tmp_path / "go"))
    seen: list[tuple[int, str]] = []

    def begun() -> bool:
        seen.extend(said(capfd))
        return any(text == "begun" for _, text in seen)

    wait_until(begun, "the line of a call that runs")
    (tmp_path / "go").touch()
    call.result()
    executor.shutdown()
    seen.extend(said(capfd))
    numbers = {text: number for number, text in seen}
    assert 0 < numbers["before"] < numbers["begun"] == numbers["ended"]


def test_the_last_lines_of_a_worker_that_dies_bear_its_invocation(executor, capfd):
    def fall():
        import os
        print("falls")
        os.abort()

    executor.submit(speak, "stands").result()
    with pytest.raises(Exception, match="SIGABRT|signal 6"):
        executor.submit(fall).result()
    executor.shutdown()
    numbers = {text: number for number, text in said(capfd)}
    assert 0 < numbers["stands"] < numbers["falls"]


def test_what_is_printed_past_python_is_never_another_calls(executor, capfd):
    def write(text):
        import os
        os.write(1, text.encode())

    def both(text):
        import os
        os.write(2, text.encode())
        print(text, end="")

    for number in range(100):
        executor.submit(both, f"both {number}\n").result()
        executor.submit(write, f"one {number}\n").result()
    executor.shutdown()
    owners: dict[str, set[int]] = {}
    for number, text in said(capfd):
        owners.setdefault(text, set()).add(number)
    assert all(len(found) == 1 for found in owners.values())
    known = [found for found in owners.values() if 0 not in found]
    assert len(set.union(*known)) == len(known) >= 100


def test_a_kernel_that_closes_everything_harms_nobodys_files(executor, tmp_path):
    def vandal(path):
        import os
        os.closerange(0, 3)
        os.closerange(5, 4096)
        return [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(200)][0]

    path = tmp_path / "file"
    try:
        executor.submit(vandal, str(path)).result()
        executor.submit(speak, "into the file, for what I know").result()
    except Exception:                                # its end may be the worker's: what is in the file is asked
        pass
    executor.shutdown()
    assert b"\x1erfaas\x1e" not in path.read_bytes()
