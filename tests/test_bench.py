"""The benchmarks measure what they say, beside two bare processes; no test here judges a time."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array

import pytest

from rfaas_mpi.bench import measure, raw
from rfaas_mpi.errors import ClosedError

TWO_CORES = len(os.sched_getaffinity(0)) >= 2


@pytest.fixture
def partner():
    with raw.Partner(data_bytes=8192) as partner:
        yield partner


# --- arithmetic ------------------------------------------------------------------

def run_of(**blocks: list[float]) -> measure.Run:
    return measure.Run({name: list(values) for name, values in blocks.items()}, {name: [] for name in blocks})


def test_a_percentile_is_a_value_that_was_measured():
    values = [float(n) for n in range(1, 101)]
    assert measure.percentile(values, 50) == 50.0
    assert measure.percentile(values, 99) == 99.0
    assert measure.percentile([7.0], 99) == 7.0


def test_no_value_is_an_error_and_no_zero():
    with pytest.raises(ValueError, match="no value was measured"):
        measure.percentile([], 50)


def test_over_raw_pairs_the_blocks_of_one_cycle():
    # The machine slows down by 1000 in the middle; both subjects meet it.
    drifting = run_of(raw=[100.0, 1100.0, 100.0], native=[150.0, 1150.0, 150.0], raw_again=[100.0, 1100.0, 100.0])
    result = measure.over([drifting], "native", "raw", "raw_again")
    assert result["p50"] == 50.0
    assert result["p99"] == 50.0
    assert result["count"] == 3
    assert result["aa"]["p50"] == 0.0


def test_over_raw_is_the_best_of_the_runs_and_tells_all():
    runs = [run_of(raw=[100.0] * 3, native=[100.0 + more] * 3, raw_again=[101.0] * 3) for more in (70.0, 40.0, 55.0)]
    result = measure.over(runs, "native", "raw", "raw_again")
    assert result["p50"] == 40.0
    assert result["runs"] == [70.0, 40.0, 55.0]
    assert result["aa"]["p50"] == 1.0


def test_a_ratio_is_taken_block_by_block():
    result = measure.ratio([run_of(futex=[10.0, 20.0], warm=[15.0, 30.0], futex_again=[10.0, 20.0])],
                           "warm", "futex", "futex_again")
    assert result["p50"] == 1.5
    assert result["aa"]["p50"] == 1.0


def test_a_run_with_a_disturbed_base_does_not_make_a_ratio_good():
    runs = [run_of(bound=[base], registered=[12.0], bound_again=[base]) for base in (10.0, 40.0, 10.0)]
    result = measure.ratio(runs, "registered", "bound", "bound_again")
    assert result["p50"] == 1.2
    assert result["runs"] == [1.2, 0.3, 1.2]


def test_the_p99_of_a_rate_is_what_99_percent_of_the_blocks_reach():
    runs = [run_of(native=[1000.0] * 99 + [2000.0])]
    result = measure.rate_figure(runs, "native")
    assert result["p50"] == 1_000_000
    assert result["p99"] == 1_000_000
    assert result["count"] == 100
    slow = measure.rate_figure([run_of(native=[1000.0] * 50 + [2000.0] * 50)], "native")
    assert slow["p99"] == 500_000


def test_a_figure_is_a_plain_number_under_its_name_and_whole_beside_it():
    figure = {"p50": 1.5, "p99": 2.5, "count": 7, "unit": "us", "aa": {"p50": 0.1}}
    assert measure.flat({"warm_us": figure}) == {
        "warm_us": 1.5, "warm_us_p99": 2.5, "warm_us_count": 7, "figures": {"warm_us": figure}}


def test_subjects_alternate_in_blocks_and_rest_between():
    log: list[str] = []

    def subject(name: str) -> measure.Subject:
        def block(count: int) -> int:
            log.append(f"{name}{count}")
            return 10 * count

        return measure.Subject(name, block)

    run = measure.interleave([subject("a"), subject("b")], cycles=2, block=5, between=lambda: log.append("rest"))
    assert log == ["rest", "a5", "rest", "b5"] * 2
    assert run.blocks == {"a": [10.0, 10.0], "b": [10.0, 10.0]}


def test_single_invocations_are_counted_one_by_one():
    one = measure.Subject("one", lambda n: 10 * n, lambda n: [12] * n)
    run = measure.interleave([one], cycles=3, block=4)
    figure = measure.latency_figure([run], "one")
    assert figure == {"p50": 12.0, "p99": 12.0, "count": 12, "unit": "ns", "in_blocks": 10.0}


def test_where_only_single_invocations_are_timed_their_median_is_the_block():
    run = measure.interleave([measure.Subject("one", singles=lambda n: [10] * (n - 1) + [50])], cycles=2, block=4)
    assert run.blocks["one"] == [10.0, 10.0]
    assert run.singles["one"] == [10, 10, 10, 50] * 2


def test_what_is_prepared_is_as_much_as_what_is_measured():
    prepared: list[int] = []
    subject = measure.Subject("one", lambda n: n, lambda n: [1] * n, prepared.append)
    measure.interleave([subject], cycles=2, block=7)
    assert prepared == [7, 7, 7, 7]


# --- the bare processes ------------------------------------------------------------

@pytest.mark.parametrize("mode", [raw.MAILBOX, raw.DOUBLE, raw.FUTEX])
def test_a_bare_partner_answers_every_armed_call(partner, mode):
    for _ in range(3):
        partner.arm(mode, 20, 64)
        assert partner.calls(10) > 0
        samples = partner.samples(9)
        assert len(samples) == 9 and min(samples) > 0
        assert partner.call() > 0


def test_a_bare_partner_doubles_the_shared_values(partner):
    x, y = (view.cast("d") for view in partner.buffers(4096))
    for index in range(len(x)):
        x[index] = float(index)
    partner.arm(raw.DOUBLE, 1, 4096)
    partner.call()
    assert list(y) == [2.0 * index for index in range(512)]
    del x, y
    # What lies behind y was not touched.
    _, room = (view.cast("d") for view in partner.buffers(8192))
    assert set(room[512:]) == {0.0}
    del room


def test_a_call_with_copies_takes_x_from_the_caller_and_brings_y_back(partner):
    x, y = array("d", [1.5, -2.0, 0.25]), array("d", [0.0] * 4)
    partner.arm(raw.DOUBLE, 2, 24)
    times = partner.copied(x.buffer_info()[0], y.buffer_info()[0], 2)
    assert len(times) == 2 and min(times) > 0
    assert list(y) == [3.0, -4.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="out of range"):
        partner.copied(x.buffer_info()[0], y.buffer_info()[0])


def test_a_call_that_was_not_armed_is_refused_not_waited_for(partner):
    with pytest.raises(ValueError, match="out of range"):
        partner.call()
    partner.arm(raw.MAILBOX, 1)
    with pytest.raises(ValueError, match="out of range"):
        partner.arm(raw.MAILBOX, 1)
    partner.call()


def test_more_bytes_than_are_shared_are_refused(partner):
    with pytest.raises(ValueError, match="out of range"):
        partner.arm(raw.DOUBLE, 1, 16384)
    with pytest.raises(ValueError, match="room for 8192"):
        partner.buffers(16384)


def test_a_killed_partner_is_an_error_not_a_hang(partner):
    os.kill(partner.pid, 9)
    with pytest.raises(raw.BenchError, match="has ended"):
        partner.arm(raw.MAILBOX, 1)


def test_a_closed_partner_is_gone_and_says_so():
    partner = raw.Partner()
    pid = partner.pid
    partner.close()
    partner.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ClosedError):
        partner.arm(raw.MAILBOX, 1)


@pytest.mark.skipif(not TWO_CORES, reason="a partner on a core of its own needs two cores")
def test_a_partner_runs_on_the_core_it_was_given():
    core = max(os.sched_getaffinity(0))
    with raw.Partner(cpu=core) as partner:
        assert os.sched_getaffinity(partner.pid) == {core}


def test_a_partner_ends_with_its_caller(wait_until):
    code = ("import os, sys\n"
            "from rfaas_mpi.bench import raw\n"
            "print(raw.Partner().pid, flush=True)\n"
            "os.kill(os.getpid(), 9)\n")
    # communicate() returns only once nobody holds the pipe: the partner must not.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)

    def gone() -> bool:
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
                return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_until(gone, f"the partner {pid} outlives its caller")


def test_the_local_kernel_is_the_one_the_partner_runs(partner):
    x, y = array("d", [1.5, -2.0, 0.25]), array("d", [0.0] * 3)
    raw.library().rfm_bench_local(x.buffer_info()[0], y.buffer_info()[0], 3)
    assert list(y) == [3.0, -4.0, 0.5]


# --- what is made of the figures -----------------------------------------------------

def fig(p50: float, **more: object) -> dict:
    return {"p50": p50, "p99": 2 * p50, "count": 600, "unit": "?", **more}


def everything() -> dict:
    """What `rfaas bench all` prints, with made-up figures that reach every target but one."""
    aa = {"aa": fig(1.0)}
    pinning = {"rank_core": 0, "worker_cores": [1], "spin_us": 1000.0}
    rows = []
    for size in (1 << 10, 1 << 20, 64 << 20):
        figures: dict[str, dict] = {"registered_over_bound": fig(1.05, **aa),
                                    "registered_touched_over_bound": fig(1.2, **aa),
                                    "plain_over_bound": fig(0.9, **aa), "plain_touched_over_bound": fig(1.0, **aa)}
        for way, rate in (("local", 1e3), ("bound", 1e3), ("registered", 1e3), ("bound_plain", 0.9e3),
                          ("plain", 0.9e3), ("copies", 8e3)):
            figures |= {f"{way}_us": fig(size / rate), f"{way}_touched_us": fig(2 * size / rate)}
        rows.append({"size_bytes": size, "block": 200, **measure.flat(figures)})
    return {
        "bench": "all", "version": "0.1.0", "command": ["rfaas", "bench", "all"], "settings": {}, "seconds": 99.0,
        "environment": {"when": "2024-01-01T00:00:00+00:00", "cpu": "A Processor", "cores_online": 2, "virtual": True,
                        "kernel": "6.1", "libc": "glibc 2.36", "python": "3.11.2", "versions": {"numpy": "2.0"},
                        "clock_ns": 25, "load_average": [0.1, 0.1, 0.1]},
        "latency": {**measure.flat({"raw_ns": fig(400.0, in_blocks=380.0), "native_ns": fig(500.0, in_blocks=480.0),
                    "native_call_ns": fig(700.0), "native_over_raw_ns": fig(100.0, **aa),
                    "native_call_over_raw_ns": fig(320.0, **aa), "local_ns": fig(300.0), "python_ns": fig(1500.0),
                    "python_over_local_ns": fig(1200.0, **aa), "object_us": fig(10.0), "object_array_us": fig(20.0),
                    "warm_us": fig(18.0), "futex_us": fig(15.0), "warm_over_futex": fig(1.2, **aa)}),
                    "pinning": pinning},
        "throughput": {**measure.flat({"native_c_per_s": fig(4e6, **aa), "native_per_s": fig(1.5e6, **aa),
                       "python_per_s": fig(4e5, **aa), "object_per_s": fig(5e4, **aa)}),
                       "pinning": pinning},
        "payload": {"rows": rows, "pinning": pinning},
        "cold": {**measure.flat({"service_start_ms": fig(200.0), "first_lease_to_first_result_ms": fig(300.0),
                                 "lease_to_first_result_ms": fig(5.0), "step_grant_ms": fig(1.0),
                                 "step_dial_ms": fig(4.0), "executor_to_first_result_ms": fig(6.0),
                                 "waiting_worker_percent": fig(0.01)}),
                 "pinning": {"rank_core": 0}},
    }


@pytest.fixture(scope="module")
def page():
    """benchmarks/report.py, which is a script beside the package."""
    import importlib.util
    from pathlib import Path
    spec = importlib.util.spec_from_file_location("report", Path(__file__).parents[1] / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["report"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["report"]


def test_a_terminal_of_80_columns_shows_every_figure():
    from rfaas_mpi.bench import report
    lines = report.as_text(everything())
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for name in ("native_over_raw_ns", "warm_us", "object_per_s", "64 MiB", "step_grant_ms", "waiting_worker_percent"):
        assert name in text


def test_the_page_says_what_was_reached_and_what_was_not(page):
    text = page.render(everything(), "here.json")
    assert text.startswith(page.BEGIN) and text.endswith(page.END)
    missed = [line for line in text.splitlines() if "**missed**" in line]
    assert len(missed) == 1 and "registered arrays over bound, touched" in missed[0]
    assert sum("| reached |" in line for line in text.splitlines()) == 19


def test_a_rate_below_its_target_is_missed(page):
    data = everything()
    data["throughput"]["native_per_s"] = 0.9e6
    missed = [target.what for target in page.targets(data) if not target.met]
    assert "invocations per second, native, from Python" in missed


def test_only_the_figures_of_the_page_are_replaced(page):
    before = f"words\n{page.BEGIN}\nyesterday\n{page.END}\nmore words\n"
    after = page.insert(before, page.render(everything(), "here.json"))
    assert after.startswith("words\n") and after.endswith("\nmore words\n")
    assert "yesterday" not in after
    with pytest.raises(ValueError, match="figures: begin"):
        page.insert("no marks", "part")


def test_the_docs_have_the_marks(page):
    from pathlib import Path
    text = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert text.count(page.BEGIN) == text.count(page.END) == 1


def test_the_picture_of_the_payloads_is_drawn(page, tmp_path):
    pytest.importorskip("matplotlib")
    page.draw(everything(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_kept_whole_or_not_at_all(tmp_path):
    import json

    from rfaas_mpi.bench import suite
    from rfaas_mpi.errors import ConfigError
    file = tmp_path / "kept.json"
    suite.check_writable(file)
    suite.keep(everything(), file)
    assert json.loads(file.read_text())["bench"] == "all"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    with pytest.raises(ConfigError, match="no directory"):
        suite.check_writable(tmp_path / "nowhere" / "kept.json")


# --- the real thing --------------------------------------------------------------------

def check_figure(part: dict, name: str) -> None:
    """Plain numbers under the name, and the same with all else in `figures`."""
    for key in (name, f"{name}_p99", f"{name}_count"):
        assert type(part[key]) in (int, float), key
    assert part[f"{name}_count"] > 0, name
    figure = part["figures"][name]
    assert [figure[key] for key in ("p50", "p99", "count")] == [
        part[key] for key in (name, f"{name}_p99", f"{name}_count")], name
    assert figure["unit"], name


@pytest.fixture(scope="module")
def measured():
    """measured(what): the object that `rfaas bench WHAT --json` prints, made quickly."""
    if not TWO_CORES:
        pytest.skip("a benchmark needs a core for the rank and one to borrow")
    import json

    def run(what: str) -> dict:
        done = subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", "bench", what, "--json", "--quick", "--runs", "1"],
                              capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        data = json.loads(done.stdout)
        assert data["bench"] == what
        assert data["environment"]["cpu"] and data["environment"]["kernel"]
        return data

    return run


def test_latency_has_every_figure_and_an_a_a_beside_what_is_compared(measured):
    data = measured("latency")
    single = {"raw_ns", "native_ns", "native_call_ns", "local_ns", "python_ns", "object_us", "object_array_us",
             "warm_us", "futex_us"}
    compared = {"native_over_raw_ns", "native_call_over_raw_ns", "python_over_local_ns", "warm_over_futex"}
    assert data["figures"].keys() == single | compared
    for name in single | compared:
        check_figure(data, name)
        assert data[name] <= data[f"{name}_p99"], name
    for name in compared:
        figure = data["figures"][name]
        assert figure["aa"]["count"] > 0, name
        assert figure["runs"] == [data[name]], "of one run the best is that one"
    assert data["pinning"]["rank_core"] not in data["pinning"]["worker_cores"]


def test_throughput_has_every_rate(measured):
    data = measured("throughput")
    for name in ("native_c_per_s", "native_per_s", "python_per_s", "object_per_s"):
        check_figure(data, name)
        assert data[f"{name}_p99"] <= data[name], "p99 is the rate that nearly all blocks reach"
        assert data["figures"][name]["aa"]["count"] > 0


def test_payload_has_a_row_for_each_size(measured):
    data = measured("payload")
    assert [row["size_bytes"] for row in data["rows"]] == [1 << shift for shift in range(10, 27, 2)]
    for row in data["rows"]:
        for kind in ("", "_touched"):
            for way in ("local", "bound", "registered", "bound_plain", "plain", "copies"):
                check_figure(row, f"{way}{kind}_us")
            for way in ("registered", "plain"):
                check_figure(row, f"{way}{kind}_over_bound")
                assert row["figures"][f"{way}{kind}_over_bound"]["aa"]["count"] > 0


def test_cold_has_the_steps_of_a_lease(measured):
    data = measured("cold")
    steps = ("step_grant_ms", "step_dial_ms", "step_attach_ms", "step_first_call_ms")
    for name in ("service_start_ms", "first_lease_to_first_result_ms", "lease_to_first_result_ms", *steps,
                 "executor_to_first_result_ms", "waiting_worker_percent"):
        check_figure(data, name)


@pytest.mark.parametrize("what", ["latency", "cold"])
def test_without_a_core_to_lend_there_is_an_error_and_no_figure(what):
    import json
    # As many ranks here as cores: each may use any of them, and none is spare.
    env = {**os.environ, "MPI_LOCALNRANKS": str(len(os.sched_getaffinity(0))), "RFAAS_LEASE_TIMEOUT_S": "0.5"}
    done = subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", "bench", what, "--json", "--quick", "--runs", "1"],
                          capture_output=True, text=True, timeout=110, env=env)
    answer = json.loads(done.stdout)
    assert done.returncode == 1, done.stderr
    assert answer["ok"] is False and "core" in answer["error"]["message"] and answer["error"]["hint"]
    assert "Traceback" not in done.stderr


def test_ctrl_c_in_mid_run_ends_a_benchmark_quietly_and_leaves_nothing(measured):
    import signal
    with subprocess.Popen([sys.executable, "-m", "rfaas_mpi.cli", "bench", "latency", "--json"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        told = ""
        while "run 1 of" not in told:
            line = process.stderr.readline()
            assert line, f"the benchmark ended by itself: {told}"
            told += line
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest and "interrupted" in rest
    import json
    assert json.loads(out)["ok"] is False
