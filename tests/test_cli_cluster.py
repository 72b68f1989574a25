"""What people ask a cluster's manager on the command line: a real manager, and agents on whose cores nobody runs."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rfaas_manager import RfaasManager, environment, rfaas
from test_manager_daemon import GIB, Agent, ask, client

from rfaas_mpi import api
from rfaas_mpi.cli import output
from rfaas_mpi.client import ManagerClient

ME = pwd.getpwuid(os.geteuid()).pw_name
COMMANDS = [("manager",), ("manager", "key"), ("manager", "key", "rotate"), ("manager", "key", "retire"),
            ("lease", "ls"), ("lease", "show"), ("lease", "revoke"), ("drain",), ("undrain",), ("usage",), ("policy",),
            ("logs",)]
ASKING = [("status",), ("lease", "ls"), ("lease", "show", "5"), ("lease", "revoke", "5"), ("drain", "--all"),
          ("undrain", "--all"), ("usage",), ("policy",), ("logs",)]


@dataclass
class Cluster:
    """A manager and a node of four cores, on two of which a lease has begun."""

    manager: RfaasManager
    asked: ManagerClient
    agent: Agent
    lease: api.LentLease

    def json(self, *arguments: object, status: int = 0) -> dict:
        done = self.manager.rfaas(*arguments, "--json")
        assert done.returncode == status, done.stderr
        return json.loads(done.stdout)

    def text(self, *arguments: object) -> str:
        done = self.manager.rfaas(*arguments)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout


@contextlib.contextmanager
def serving(directory: Path, *options: object) -> Iterator[Cluster]:
    # Where other users may come: pytest's own directories are closed to them.
    with (tempfile.TemporaryDirectory() as place,
          RfaasManager(directory / "state", "--socket", f"{place}/socket", *options) as manager, client(manager) as asked):
        os.chmod(place, 0o755)
        agent = Agent(asked, "nid1", 4)
        agent.report()
        [lease] = ask(asked, 1, 2).leases
        agent.report(lease)
        yield Cluster(manager, asked, agent, lease)


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    with serving(tmp_path) as cluster:
        yield cluster


# --- help and errors --------------------------------------------------------------

@pytest.mark.parametrize("command", [("lease",), *COMMANDS], ids=" ".join)
def test_help_fits_80_columns_and_shows_an_example_and_the_common_options(command):
    done = rfaas(*command, "--help", COLUMNS="200")
    assert done.returncode == output.OK and done.stderr == ""
    assert "Example:" in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert command == ("lease",) or ("--json" in done.stdout and "--debug" in done.stdout)


@pytest.mark.parametrize("command", ASKING[1:], ids=" ".join)
def test_without_a_manager_each_says_how_to_name_one(command):
    done = rfaas(*command)
    assert done.returncode == output.FAILED and done.stdout == ""
    assert "no manager is named" in done.stderr and "RFAAS_MANAGER" in done.stderr


@pytest.mark.parametrize("command", ASKING, ids=" ".join)
def test_a_manager_that_is_not_there_is_an_error_that_names_it(command, tmp_path):
    done = rfaas(*command, "--json", RFAAS_MANAGER=f"unix:{tmp_path}/gone")
    assert done.returncode == output.FAILED and "Traceback" not in done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "ServiceLost" and f"{tmp_path}/gone" in error["message"] and error["hint"]


@pytest.mark.parametrize("arguments", [("drain",), ("undrain",), ("drain", "nid1", "--all"), ("lease", "show", "x"),
                                       ("lease", "revoke", "1", "--grace", "-1"), ("usage", "--by", "password"),
                                       ("logs", "--lease", "0")])
def test_a_wrong_command_line_is_status_2(arguments):
    done = rfaas(*arguments)
    assert done.returncode == output.USAGE and done.stdout == "" and "--help" in done.stderr


# --- leases -----------------------------------------------------------------------

def test_leases_are_listed_shown_and_taken_back(cluster):
    number = cluster.lease.id
    [listed] = cluster.json("lease", "ls")["leases"]
    assert (listed["id"], listed["state"], listed["node"], len(listed["workers"])) == (number, "active", "nid1", 2)
    head, line = cluster.text("lease", "ls").splitlines()
    assert head.split()[:4] == ["LEASE", "NODE", "USER", "STATE"]
    assert line.split()[:5] == [str(number), "nid1", ME, "active", "2"]
    assert cluster.json("lease", "show", number) == {**listed, "hard_end_in_s": None}
    assert f"lease    {number}, epoch {cluster.lease.epoch}, active" in cluster.text("lease", "show", number)

    assert str(number) in cluster.text("lease", "revoke", number, "--grace", 5)
    [order] = cluster.agent.report(cluster.lease).stop
    assert order.lease_id == number and order.cause == "revoked" and 0 < order.grace_s <= 5
    shown = cluster.json("lease", "show", number)
    assert shown["state"] == "revoking" and shown["stopping"] == [0, 1]
    cluster.agent.report()
    assert cluster.text("lease", "ls") == "No leases.\n"
    assert cluster.json("lease", "show", number)["state"] == "released"


@pytest.mark.parametrize("what", ["show", "revoke"])
def test_a_lease_that_is_not_there_is_an_error_with_a_way_out(cluster, what):
    error = cluster.json("lease", what, 5, status=output.FAILED)["error"]
    assert "has no lease 5" in error["message"] and "rfaas lease ls" in error["hint"]


# --- nodes ------------------------------------------------------------------------

def test_a_node_is_drained_and_lent_again(cluster):
    assert "nid1" in cluster.text("drain", "nid1", "--grace", "1.5")
    assert [order.lease_id for order in cluster.agent.report(cluster.lease).stop] == [cluster.lease.id]
    cluster.agent.report()
    [node] = cluster.json("status")["nodes"]
    assert node["drained"] and node["free"] == []
    assert "nid1: 4 cores, 0 lent, 0 free" in cluster.text("status") and "drained" in cluster.text("status")
    cluster.text("undrain", "--all")
    assert cluster.json("status")["nodes"][0]["free"] == [0, 1, 2, 3]


def test_an_unknown_node_is_an_error_and_nothing_is_drained(cluster):
    error = cluster.json("drain", "nid1", "nid9", status=output.FAILED)["error"]
    assert "nid9" in error["message"]
    assert not cluster.json("status")["nodes"][0]["drained"]


def test_status_is_the_manager_s_where_one_is_named(cluster):
    data = cluster.json("status")
    assert data["manager"] == cluster.manager.address and data["running"]
    assert [lease["id"] for lease in data["leases"]] == [cluster.lease.id]
    assert f"manager    {cluster.manager.address}" in cluster.text("status")


# --- accounts, rules, events ----------------------------------------------------------

def test_usage_is_summed_by_user_job_kernel_node_or_lease(cluster):
    assert cluster.text("usage") == "Nothing was used yet.\n"
    cluster.asked.call("report", api.Report(
        cluster.agent.incarnation, 2**61, (0, 1, 2, 3), 8 * GIB, (),
        used=(api.UsedLine(1, cluster.lease.id, 2, GIB, 3600.0, 10.0, 8.0, 1.0, 500),)), node="nid1")
    names = {"user": ME, "job": "-", "node": "nid1", "lease": str(cluster.lease.id)}
    for by, name in names.items():
        head, line = cluster.text("usage", "--by", by).splitlines()
        assert head.split()[:3] == [by.upper(), "WORKERS", "CORE-H"]
        assert line.split() == [name, "1", "2.000", "1.000", "10.0", "8.0", "1.0", "500"]
        [row] = cluster.json("usage", "--by", by)["rows"]
        assert (row["core_s"], row["invocations"], row["cost"]) == (7200.0, 500, 0.0)


def test_usage_of_a_period_is_that_of_its_days(cluster):
    cluster.asked.call("report", api.Report(
        cluster.agent.incarnation, 2**61, (0, 1, 2, 3), 8 * GIB, (),
        used=(api.UsedLine(1, cluster.lease.id, 2, GIB, 3600.0, 10.0, 8.0, 1.0, 500),)), node="nid1")
    for by, name in {"user": ME, "job": "-", "node": "nid1"}.items():
        _, line = cluster.text("usage", "--by", by, "--since", "P1D").splitlines()
        assert line.split() == [name, "1", "2.000", "1.000", "10.0", "8.0", "1.0", "500"]
    assert cluster.text("usage", "--until", "P1D") == "Nothing was used then.\n"
    found = cluster.json("usage", "--since", "2020-02-01", "--until", "2020-03-01")
    assert (found["since"], found["until"], found["rows"]) == ("2020-02-01", "2020-03-01", [])
    done = cluster.manager.rfaas("usage", "--since", "last week")
    assert done.returncode == output.FAILED and "since is 'last week'" in done.stderr and "P7D" in done.stderr


def test_usage_by_kernel_names_them_and_what_is_left_between_them(cluster):
    cluster.asked.call("report", api.Report(
        cluster.agent.incarnation, 2**61, (0, 1, 2, 3), 8 * GIB, (),
        used=(api.UsedLine(1, cluster.lease.id, 2, GIB, 3600.0, 10.0, 1800.0, 1.0, 500,
                           kernels=(api.KernelLine("pkg.price", 1800.0, 500),)),)), node="nid1")
    head, *lines = cluster.text("usage", "--by", "kernel").splitlines()
    assert [line.split() for line in lines] == [
        ["-", "1", "1.000", "0.500", "1.0", "0.0", "1.0", "0"],
        ["pkg.price", "1", "1.000", "0.500", "9.0", "1800.0", "0.0", "500"]]
    assert "COST" not in head


def test_what_was_used_has_its_price_where_the_policy_sets_one(tmp_path):
    prices = {"core_h": 3.0, "gib_h": 0.5, "compute_h": 3600.0, "poll_h": 1800.0}
    policy = tmp_path / "manager.toml"
    policy.write_text("[prices]\n" + "".join(f"{name} = {price}\n" for name, price in prices.items()))
    policy.chmod(0o600)
    with serving(tmp_path, "--policy", policy) as cluster:
        cluster.asked.call("report", api.Report(
            cluster.agent.incarnation, 2**61, (0, 1, 2, 3), 8 * GIB, (),
            used=(api.UsedLine(1, cluster.lease.id, 2, GIB, 3600.0, 10.0, 8.0, 1.0, 500),)), node="nid1")
        found = cluster.json("usage")
        assert found["prices"] == prices
        # 2 core-hours, 1 GiB for an hour, 9 s of computing and 1 s of polling.
        assert found["rows"][0]["cost"] == pytest.approx(2 * 3.0 + 0.5 + 9.0 + 0.5)
        head, line = cluster.text("usage").splitlines()
        assert (head.split()[-1], line.split()[-1]) == ("COST", "16.0000")


def test_the_policy_says_who_lends_and_who_administers(cluster):
    data = cluster.json("policy")
    assert os.geteuid() in data["admins"] and os.geteuid() in data["lenders"]
    assert f"administer    {pwd.getpwuid(0).pw_name}" in cluster.text("policy")


def test_the_log_says_what_became_of_leases_and_goes_on_with_what_comes(cluster):
    assert cluster.text("logs") == "Nothing happened to your leases.\n"
    command = [sys.executable, "-m", "rfaas_mpi.cli", "logs", "-f"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment(RFAAS_MANAGER=cluster.manager.address)) as following:
        try:
            cluster.text("lease", "revoke", cluster.lease.id)
            line = following.stdout.readline()
            assert f"lease {cluster.lease.id} on nid1 ({ME}): 2 workers revoked" in line
        finally:
            following.send_signal(signal.SIGINT)
            _, said = following.communicate(timeout=60)
        assert following.returncode == output.INTERRUPTED and "Traceback" not in said
    [event] = cluster.json("logs")["events"]
    assert (event["lease_id"], event["workers"], event["cause"]) == (cluster.lease.id, [0, 1], "revoked")


@pytest.mark.parametrize("store", ["a file", "a server"])
def test_what_became_of_leases_is_known_after_a_kill_and_found_by_node_lease_and_time(tmp_path, store, request):
    options = [] if store == "a file" else ["--store", request.getfixturevalue("postgres").database()]
    with serving(tmp_path, *options) as cluster:
        other = Agent(cluster.asked, "nid2", 1)
        other.report()
        [elsewhere] = [lease for lease in ask(cluster.asked, 2, 3).leases if lease.node == "nid2"]
        for number in (cluster.lease.id, elsewhere.id):
            cluster.text("lease", "revoke", number)
        before = cluster.json("logs")
        cluster.manager.stop(signal.SIGKILL)
    with (tempfile.TemporaryDirectory() as place,
          RfaasManager(tmp_path / "state", "--socket", f"{place}/socket", *options) as manager):
        def logs(*arguments: object) -> list[int]:
            done = manager.rfaas("logs", *arguments, "--json")
            assert done.returncode == 0, done.stderr
            return [event["lease_id"] for event in json.loads(done.stdout)["events"]]

        assert json.loads(manager.rfaas("logs", "--json").stdout) == before
        both = [cluster.lease.id, elsewhere.id]
        assert logs() == logs("--since", "P1D") == logs("--since", "PT1H") == both
        assert logs("--node", "nid2") == logs("--lease", elsewhere.id) == both[1:]
        assert logs("--node", "nid9") == logs("--node", "nid1", "--lease", elsewhere.id) == []
        assert f"lease {elsewhere.id} on nid2 ({ME}): 1 worker revoked" in manager.rfaas("logs", "--node", "nid2").stdout
        assert manager.rfaas("logs", "--node", "nid9").stdout == "Nothing like that happened to your leases.\n"
        for arguments, said in ((("--since", "last week"), "since is 'last week'"), (("--node", "a b"), "node is 'a b'"),
                                (("--lease", 5), "has no lease 5")):
            done = manager.rfaas("logs", *arguments)
            assert done.returncode == output.FAILED and said in done.stderr and "Traceback" not in done.stderr


# --- keys -------------------------------------------------------------------------

def test_keys_are_shown_rotated_and_retired(cluster):
    state = cluster.manager.directory
    [key] = cluster.json("manager", "key", "--directory", state)["keys"]
    assert key["use"] == "in use" and len(bytes.fromhex(key["public"])) == 32
    old, new = cluster.json("manager", "--directory", state, "key", "rotate")["keys"]
    assert old == key and new["use"] == "next"
    again = cluster.json("manager", "key", "rotate", "--directory", state, status=output.FAILED)
    assert "rfaas manager key retire" in again["error"]["hint"]
    [left] = cluster.json("manager", "key", "retire", "--directory", state)["keys"]
    assert left["public"] == new["public"]
    secret = (state / "grant.key").read_bytes()
    assert secret.hex() not in cluster.text("manager", "key", "--directory", state)


def test_a_directory_without_keys_is_an_error_and_makes_none(tmp_path):
    done = rfaas("manager", "key", "--directory", tmp_path)
    assert done.returncode == output.FAILED and "holds no key of a manager" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- another user -------------------------------------------------------------------

@pytest.mark.skipif(os.geteuid() != 0, reason="only root can call as somebody else")
def test_another_user_sees_nothing_of_it_and_changes_nothing(cluster):
    def other(*arguments: object) -> dict:
        # Imported before: the interpreter may lie where only we can read.
        code = ("import os, pwd, sys, rfaas_mpi.cli.app, rfaas_mpi.cli.cluster, encodings.idna\n"
                "os.setgroups([]); os.setresgid(*[61001] * 3); os.setresuid(*[61001] * 3)\n"
                "from rfaas_mpi.cli import main; sys.exit(main(sys.argv[1:]))")
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments), "--json"], capture_output=True,
                              text=True, timeout=60, env=environment(RFAAS_MANAGER=cluster.manager.address))
        assert "Traceback" not in done.stderr, done.stderr
        return json.loads(done.stdout)

    assert other("lease", "ls")["leases"] == []
    assert "has no lease" in other("lease", "show", cluster.lease.id)["error"]["message"]
    assert "has no lease" in other("lease", "revoke", cluster.lease.id)["error"]["message"]
    assert other("drain", "--all")["error"]["type"] == "AuthError"
    assert other("usage")["rows"] == [] and other("logs")["events"] == []
    assert cluster.json("lease", "show", cluster.lease.id)["state"] == "active"
