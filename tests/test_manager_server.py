"""The manager's HTTP interface: a real server on a real socket and a real file."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import re
import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from rfaas_mpi import api
from rfaas_mpi.errors import ConfigError, StoreError
from rfaas_mpi.leases.book import LeaseBook
from rfaas_mpi.leases.grants import Admission, AgentKey, GrantBody
from rfaas_mpi.manager import keys as key_files
from rfaas_mpi.manager import server
from rfaas_mpi.manager.cluster import Policy
from rfaas_mpi.manager.keys import Keys
from rfaas_mpi.manager.ledger import Ledger
from rfaas_mpi.manager.server import ManagerServer
from rfaas_mpi.remote import Address

GUARD_S = 60.0
GIB = 1 << 30
ME = os.geteuid()
_ids = itertools.count(1)
_clock = itertools.count(10**12, 10**6)


class Caller:
    """This user, over the socket."""

    def __init__(self, session: aiohttp.ClientSession, manager: ManagerServer) -> None:
        self.session, self.manager = session, manager

    async def __call__(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        async with self.session.request(method, f"http://manager{path}", json=body) as answer:
            text = await answer.text()
            assert answer.status == status, text
            return json.loads(text)

    async def start(self, node: str) -> int:
        return (await self("POST", "/v1/agents", agent(node)))["incarnation"]

    async def report(self, node: str, incarnation: int, *live: dict, cores: int = 4, **more: Any) -> dict:
        return await self("POST", f"/v1/agents/{node}/reports", report(incarnation, *live, cores=cores, **more))

    async def ask(self, workers: int = 1, *, status: int = 200, **more: Any) -> dict:
        return await self("POST", "/v1/leases", {"session": "s", "request_id": next(_ids), "workers_min": workers,
                                                 "workers_max": workers, **more}, status=status)


def agent(node: str, name: str = "") -> dict:
    return {"node": node, "agent": name or f"agent {next(_ids)}", "boot_id": "boot",
            "key": base64.b64encode(bytes(range(32))).decode(), "addresses": [f"tcp://{node}:4711"], "host": node}


def report(incarnation: int, *live: dict, cores: int = 4, **more: Any) -> dict:
    return {"incarnation": incarnation, "clock_ns": next(_clock), "spare": list(range(cores)), "memory_bytes": 8 * GIB,
            "live": [{"lease_id": one["id"], "epoch": one["epoch"], "workers": one["workers"]} for one in live], **more}


def leases_of(answer: dict) -> list[dict]:
    """What may be said twice: a grant is sealed anew each time."""
    return [{key: value for key, value in lease.items() if key not in ("grant", "hard_end_in_s")}
            for lease in answer["leases"]]


@contextlib.asynccontextmanager
async def serving(directory: Path, **options: Any) -> AsyncIterator[Caller]:
    ledger = Ledger(directory / "ledger.db")
    policy = Policy(lenders=frozenset((ME,)), admins=frozenset((ME,)))
    options = {"policy": policy, "keys": Keys.of(directory), **options}
    async with ManagerServer(ledger, **options) as manager:
        await manager.listen_unix(directory / "socket")
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(directory / "socket"))) as session:
            yield Caller(session, manager)


@pytest.fixture
def play(tmp_path) -> Callable[..., None]:
    """Runs a scenario with a caller of a manager of its own."""
    def run(scenario: Callable[[Caller], Awaitable[None]], **options: Any) -> None:
        async def whole() -> None:
            async with asyncio.timeout(GUARD_S), serving(tmp_path, **options) as caller:
                await scenario(caller)
        asyncio.run(whole())
    return run


def test_a_lease_s_whole_life(play):
    async def scenario(call: Caller) -> None:
        number = await call.start("nid1")
        await call.report("nid1", number)
        [lease] = (await call.ask(2))["leases"]
        assert lease["node"] == lease["host"] == "nid1" and len(lease["workers"]) == 2
        assert lease["addresses"] == ["tcp://nid1:4711"] and lease["hard_end_in_s"] is None
        await call.report("nid1", number, lease)
        [now] = (await call("GET", "/v1/leases"))["leases"]
        assert now["state"] == "active" and now["uid"] == ME
        await call("DELETE", f"/v1/leases/{lease['id']}")
        [order] = (await call.report("nid1", number, lease))["stop"]
        assert order["lease_id"] == lease["id"] and order["cause"] == "released"
        await call.report("nid1", number, used=[{
            "number": 1, "lease": lease["id"], "cores": 2, "memory_bytes": GIB, "held_s": 2.0, "cpu_s": 1.0}])
        assert (await call("GET", "/v1/leases"))["leases"] == []
        [row] = (await call("GET", "/v1/usage?by=uid"))["rows"]
        assert (row["uid"], row["core_s"], row["workers"]) == (ME, 4.0, 1)
    play(scenario)


def test_a_request_may_be_repeated_and_a_manager_restarted_in_between(tmp_path):
    body = {"session": "s", "request_id": 7, "workers_min": 1, "workers_max": 2}

    async def whole() -> None:
        async with serving(tmp_path) as call:
            await call.report("nid1", await call.start("nid1"))
            first = await call("POST", "/v1/leases", body)
            assert leases_of(await call("POST", "/v1/leases", body)) == leases_of(first)
        async with serving(tmp_path) as call:
            assert leases_of(await call("POST", "/v1/leases", body)) == leases_of(first)
            assert [one["id"] for one in (await call("GET", "/v1/leases"))["leases"]] == [first["leases"][0]["id"]]
            await call("POST", "/v1/leases", {**body, "workers_max": 1}, status=409)

    asyncio.run(asyncio.wait_for(whole(), GUARD_S))


def test_who_waits_is_answered_when_cores_are_there_and_refused_when_not(play):
    async def scenario(call: Caller) -> None:
        number = await call.start("nid1")
        await call.report("nid1", number, cores=1)
        waiting = asyncio.create_task(call.ask(3, timeout_s=GUARD_S))
        refused = await call.ask(9, timeout_s=0.01, status=409)
        assert "9 workers" in refused["error"] and refused["hint"]
        await call.report("nid1", number, cores=3)
        assert len((await waiting)["leases"][0]["workers"]) == 3
    play(scenario)


def test_orders_travel_on_the_agent_s_channel_at_once(play):
    async def scenario(call: Caller) -> None:
        number = await call.start("nid1")
        async with call.session.ws_connect("http://manager/v1/agents/nid1/channel") as channel:
            await channel.send_json(report(number))
            orders = await channel.receive_json()
            assert orders["stop"] == [] and not orders["superseded"] and not orders["register"]
            [lease] = (await call.ask(1))["leases"]
            await channel.send_json(report(number, lease))
            await channel.receive_json()
            await call("POST", "/v1/drain", {"nodes": ["nid1"], "grace_s": 1.5})
            [order] = (await channel.receive_json())["stop"]
            assert order["lease_id"] == lease["id"] and order["grace_s"] == 1.5
            await channel.send_json({"incarnation": 0})
            assert "incarnation" in (await channel.receive_json())["error"]
        [event] = (await call("GET", "/v1/events"))["events"]
        assert (event["lease_id"], event["cause"]) == (lease["id"], "revoked")
        assert (await call("GET", f"/v1/events?after={event['number']}"))["events"] == []
        assert (await call("GET", "/v1/nodes"))["nodes"][0]["drained"]
        await call("POST", "/v1/undrain", {})
        assert not (await call("GET", "/v1/nodes"))["nodes"][0]["drained"]
    play(scenario)


def test_an_agent_that_was_replaced_is_told(play):
    async def scenario(call: Caller) -> None:
        old, new = await call.start("nid1"), await call.start("nid1")
        await call.report("nid1", new)
        assert (await call.report("nid1", old))["superseded"]
    play(scenario)


def test_an_agent_that_is_replaced_is_told_at_once_and_only_once_its_successor_has_reported(play):
    async def scenario(call: Caller) -> None:
        old = await call.start("nid1")
        async with call.session.ws_connect("http://manager/v1/agents/nid1/channel") as channel:
            await channel.send_json(report(old))
            assert not (await channel.receive_json())["superseded"]
            new = await call.start("nid1")
            await channel.send_json(report(old))
            assert not (await channel.receive_json())["superseded"], "who registers may not get any further"
            await call.report("nid1", new)
            async with asyncio.timeout(GUARD_S):
                assert (await channel.receive_json())["superseded"]
            async with call.session.ws_connect("http://manager/v1/agents/nid1/channel") as other:
                await other.send_json(report(new))
                assert not (await other.receive_json())["superseded"], "nor is it said to the other one"
    play(scenario)


def test_the_end_of_a_session_answers_what_it_waits_for(play):
    async def scenario(call: Caller) -> None:
        await call.report("nid1", await call.start("nid1"))
        waiting = asyncio.create_task(call.ask(9, timeout_s=GUARD_S, status=409))
        await call.ask(1)                      # the other request has arrived by then
        await call("DELETE", "/v1/sessions/s")
        assert "ended" in (await waiting)["error"]
    play(scenario)


# --- grants ---------------------------------------------------------------------

class Agent:
    """What an agent is to the manager: a name, a key, a clock."""

    def __init__(self, call: Caller, node: str = "nid1") -> None:
        self.call, self.node, self.key = call, node, AgentKey()
        self.facts = {**agent(node), "key": base64.b64encode(self.key.public).decode()}
        self.admitted: dict = {}

    async def register(self) -> dict:
        self.admitted = await self.call("POST", "/v1/agents", self.facts)
        return self.admitted

    async def report(self, *live: dict, **more: Any) -> dict:
        return await self.call.report(self.node, self.admitted["incarnation"], *live, clock_ns=time.monotonic_ns(),
                                      **more)

    def admits(self, lease: dict, *keys: str) -> GrantBody:
        """The grant as this agent reads it. GrantRefused if it doesn't believe it."""
        held = [base64.b64decode(key) for key in keys or self.admitted["keys"]]
        admission = Admission(self.admitted["node"], "boot", self.admitted["incarnation"], held)
        body = admission.admit(base64.b64decode(lease["grant"]), time.monotonic_ns(), spare=range(64), in_use=())
        assert self.key.open(body.sealed, body.lease, body.epoch) == base64.b64decode(lease["secret"])
        return body


def test_a_lease_s_agent_believes_its_grant(play):
    async def scenario(call: Caller) -> None:
        agent = Agent(call)
        await agent.register()
        await agent.report(ends_in_s=3600.0)
        [lease] = (await call.ask(2))["leases"]
        body = agent.admits(lease)
        assert (body.lease, body.epoch, body.uid, body.node) == (lease["id"], lease["epoch"], ME, "nid1")
        assert body.not_after_ns - body.seen.ns == 20 * 10**9
        assert 3599 < lease["hard_end_in_s"] <= 3600
        # In the agent's own time, and never later than it meant.
        assert abs(body.hard_end_ns - body.seen.ns - 3600 * 10**9) < 60 * 10**9
    play(scenario)


def test_a_restarted_manager_knows_its_agents_and_makes_the_same_grants(tmp_path):
    body = {"session": "s", "request_id": 7, "workers_min": 1, "workers_max": 1}

    async def whole() -> None:
        async with serving(tmp_path) as call:
            agent = Agent(call)
            first = await agent.register()
            await agent.report(ends_in_s=3600.0)
            [lease] = (await call("POST", "/v1/leases", body))["leases"]
        async with serving(tmp_path) as call:
            agent.call = call
            # What its hard end is in the agent's time, only the agent's next report tells.
            problem = await call("POST", "/v1/leases", body, status=503)
            assert "not heard from nid1" in problem["error"]
            assert await agent.register() == first, "the same agent has the same number, and its leases live on"
            assert not (await agent.report(lease, ends_in_s=3600.0))["register"]
            [again] = (await call("POST", "/v1/leases", body))["leases"]
            assert again["secret"] == lease["secret"] and agent.admits(again).lease == agent.admits(lease).lease
            assert (await call("GET", f"/v1/leases/{lease['id']}"))["state"] == "active"

    asyncio.run(asyncio.wait_for(whole(), GUARD_S))


def test_an_agent_that_the_manager_does_not_know_registers_again_before_it_lends(play):
    async def scenario(call: Caller) -> None:
        orders = await call.report("nid1", 2**40)
        assert orders["register"] and not orders["superseded"]
        assert "0 available" in (await call.ask(1, status=409))["error"]
        agent = Agent(call)
        assert (await agent.register())["incarnation"] > 2**40, "no number is given out twice"
        assert not (await agent.report())["register"]
        await call.ask(1)
    play(scenario)


def test_a_user_s_nodes_that_nobody_registered_are_not_kept(play):
    async def scenario(call: Caller) -> None:
        for number in range(5):
            orders = await call.report(f"nid{number}", 1)
            assert orders["register"] and not orders.get("clock_ns"), "what it used is said again"
        assert (await call("GET", "/v1/nodes"))["nodes"] == []
        first, second = await call.start("nid1"), await call.start("nid1")
        assert not (await call.report("nid1", second))["register"]
        assert (await call.report("nid1", first))["superseded"], "a node of his is one agent's"
        await call.ask(1)
        assert [node["node"] for node in (await call("GET", "/v1/nodes"))["nodes"]] == [f"nid1/{ME}"]
    play(scenario, policy=Policy(lenders=frozenset((ME + 1,)), admins=frozenset((ME,))))


def test_a_repeated_request_whose_leases_have_ended_says_so(play):
    async def scenario(call: Caller) -> None:
        agent = Agent(call)
        await agent.register()
        await agent.report()
        body = {"session": "s", "request_id": 1, "workers_min": 1, "workers_max": 1}
        [lease] = (await call("POST", "/v1/leases", body))["leases"]
        await agent.report(lease)
        await call("DELETE", f"/v1/leases/{lease['id']}")
        await agent.report()
        assert "has ended" in (await call("POST", "/v1/leases", body, status=409))["error"]
    play(scenario)


def test_keys_rotate_with_the_reports(tmp_path):
    async def whole() -> None:
        keys = Keys.of(tmp_path)
        async with serving(tmp_path, keys=keys) as call:
            agent = Agent(call)
            [old] = (await agent.register())["keys"]
            assert (await agent.report())["keys"] == [old]
            assert (await agent.report())["keys"] == [], "it knows"
            key_files.rotate(tmp_path)
            keys.again()
            agent.admits((await call.ask(1))["leases"][0], old)
            orders = await agent.report()
            new = orders["keys"][1]
            assert orders["keys"] == [old, new]
            agent.admits((await call.ask(1))["leases"][0], old)      # whether it heard isn't known yet
            await agent.report()
            agent.admits((await call.ask(1))["leases"][0], new)
            key_files.retire(tmp_path)
            keys.again()
            assert (await agent.report())["keys"] == [new]
    asyncio.run(asyncio.wait_for(whole(), GUARD_S))


def test_a_public_key_that_is_none_is_refused(play):
    async def scenario(call: Caller) -> None:
        nothing = base64.b64encode(bytes(32)).decode()
        problem = await call("POST", "/v1/agents", {**agent("nid1"), "key": nothing}, status=409)
        assert "public key" in problem["error"]
    play(scenario)


def test_usage_is_summed_by_the_batch_job_of_the_session(play):
    async def scenario(call: Caller) -> None:
        agent = Agent(call)
        await agent.register()
        await agent.report()
        leases = [(await call.ask(1, session=session, **job))["leases"][0]
                  for session, job in (("a", {"job": "7"}), ("b", {"job": "7"}), ("c", {}))]
        await agent.report(*leases)
        await agent.report(used=[{"number": number, "lease": lease["id"], "cores": 1, "memory_bytes": 0, "held_s": 2.0,
                                  "cpu_s": 1.0} for number, lease in enumerate(leases, 1)])
        rows = (await call("GET", "/v1/usage?by=job"))["rows"]
        assert [(row["job"], row["core_s"]) for row in rows] == [("", 2.0), ("7", 4.0)]
    play(scenario)


def test_what_is_told_of_late_counts_though_the_book_has_forgotten_its_lease(play, monkeypatch):
    async def scenario(call: Caller) -> None:
        agent = Agent(call)
        await agent.register()
        await agent.report()
        [lease] = (await call.ask(1))["leases"]
        await agent.report(lease)
        # As after two minutes and twenty thousand leases more.
        monkeypatch.setattr(LeaseBook, "lease", lambda _book, _lease: None)
        await agent.report(used=[{"number": number, "lease": number_of, "cores": 1, "memory_bytes": 0, "held_s": 2.0,
                                  "cpu_s": 1.0} for number, number_of in ((1, lease["id"]), (2, lease["id"] + 1))])
        assert [(row["uid"], row["core_s"]) for row in (await call("GET", "/v1/usage"))["rows"]] == [(ME, 2.0)]
    play(scenario)


# --- callers that are gone --------------------------------------------------------

async def until(true: Callable[[], Awaitable[bool]]) -> None:
    while not await true():
        await asyncio.sleep(0.01)


async def metric(call: Caller, name: str) -> float:
    async with call.session.get("http://manager/metrics") as answer:
        for line in (await answer.text()).splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
    raise AssertionError(f"no metric {name}")


def test_a_demand_whose_caller_is_gone_holds_nobody_up(play):
    async def scenario(call: Caller) -> None:
        agent = Agent(call)
        await agent.register()
        await agent.report(cores=2)
        [lease] = (await call.ask(1))["leases"]
        gone = asyncio.create_task(call.ask(2, timeout_s=GUARD_S))
        await until(lambda: waits(1))
        behind = asyncio.create_task(call.ask(1, timeout_s=GUARD_S))
        await until(lambda: waits(2))
        gone.cancel()
        assert len((await behind)["leases"]) == 1, "what is free was kept for somebody who is gone"
        await agent.report(lease)

        assert await metric(call, "rfaas_manager_demands_waiting") == 0

    async def waits(number: int) -> bool:
        return await metric(caller[0], "rfaas_manager_demands_waiting") == number

    caller: list[Caller] = []

    async def remembered(call: Caller) -> None:
        caller.append(call)
        await scenario(call)

    play(remembered)


def test_what_was_granted_to_a_caller_that_is_gone_is_free_again(play, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "WRITE_RETRY_S", 0.01)

    async def scenario(call: Caller) -> None:
        agent = Agent(call)
        await agent.register()
        await agent.report(cores=1)
        # It is granted, and can't be written down: the answer is under way when its caller leaves.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "ledger.db-wal").stat().st_size, hard))
        try:
            gone = asyncio.create_task(call.ask(1))

            async def granted() -> bool:
                return (await call("GET", "/v1/leases"))["leases"] != []
            await until(granted)
            gone.cancel()

            async def stops() -> bool:
                return (await call("GET", "/v1/leases"))["leases"][0]["state"] == "revoking"
            await until(stops)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    play(scenario)


def test_a_manager_that_ends_answers_those_who_wait(tmp_path):
    async def whole() -> None:
        async with serving(tmp_path) as call:
            agent = Agent(call)
            await agent.register()
            await agent.report(cores=1)
            waiting = asyncio.create_task(call.ask(5, timeout_s=GUARD_S, status=503))

            async def waits() -> bool:
                return await metric(call, "rfaas_manager_demands_waiting") == 1
            await until(waits)
            await call.manager.close()
            assert "ending" in (await waiting)["error"]
    asyncio.run(asyncio.wait_for(whole(), GUARD_S))


def test_an_agent_that_does_not_read_holds_up_nobody(play, monkeypatch):
    monkeypatch.setattr(server, "CLOSE_S", 0.1)

    async def scenario(call: Caller) -> None:
        deaf, other = Agent(call), Agent(call, "nid2")
        await deaf.register()
        await other.register()
        async with call.session.ws_connect("http://manager/v1/agents/nid1/channel", autoping=False) as channel:
            await channel.send_json(report(deaf.admitted["incarnation"], cores=1, clock_ns=1))

            async def lent() -> bool:
                return (await call("GET", "/v1/nodes"))["nodes"] != []
            await until(lent)
            [lease] = (await call.ask(1))["leases"]
            # From here on it doesn't read, and the sockets hold little.
            channel._response.connection.transport.pause_reading()
            _, theirs = call.manager._channels["nid1"]
            writer = theirs.socket._writer
            writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            writer.transport.set_write_buffer_limits(0)
            writer._limit = 0                  # of what is sent without looking whether anybody reads
            # Each is an order to stop sooner than the one before.
            grace = itertools.count(4000, -1)
            while len(call.manager._telling) < 10:
                await call("POST", f"/v1/leases/{lease['id']}/revoke", {"grace_s": float(next(grace))})
            await other.report()
            assert (await call.ask(1))["leases"][0]["node"] == "nid2"
            begin = time.monotonic()
            await call.manager.close()
            assert time.monotonic() - begin < GUARD_S / 2, "its end waits for who doesn't read"
            channel._response.connection.transport.abort()
    play(scenario)


# --- figures ------------------------------------------------------------------------

def test_the_metrics_say_what_somebody_would_be_woken_up_for(play):
    async def scenario(call: Caller) -> None:
        agent = Agent(call)
        await agent.register()
        await agent.report()
        [lease] = (await call.ask(1))["leases"]
        await call.ask(99, status=409)
        await agent.report(lease)
        assert await metric(call, 'rfaas_manager_leases{state="active"}') == 1
        assert await metric(call, 'rfaas_manager_agents{condition="heard"}') == 1
        assert await metric(call, "rfaas_manager_leases_granted_total") == 1
        assert await metric(call, "rfaas_manager_demands_refused_total") == 1
        assert await metric(call, "rfaas_manager_ledger_write_seconds_count") >= 3
    play(scenario)


# --- who calls ----------------------------------------------------------------

OTHER = 12345
ASK_AS_OTHER = """
import json, os, socket, sys
os.setresuid(OTHER, OTHER, OTHER)
for method, path, body in json.load(sys.stdin):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(sys.argv[1])
        data = json.dumps(body).encode() if body is not None else b""
        head = f"{method} {path} HTTP/1.1\\r\\nHost: m\\r\\nConnection: close\\r\\nContent-Length: {len(data)}"
        s.sendall(head.encode() + b"\\r\\n\\r\\n" + data)
        answer = b""
        while part := s.recv(65536):
            answer += part
    head, _, rest = answer.partition(b"\\r\\n\\r\\n")
    print(json.dumps([int(head.split()[1]), json.loads(rest)]), flush=True)
""".replace("OTHER", str(OTHER))


@pytest.mark.skipif(ME != 0, reason="only root can call as somebody else")
def test_one_user_s_leases_usage_and_nodes_are_closed_to_another(play, tmp_path):
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == ME and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)

    async def scenario(call: Caller) -> None:
        number = await call.start("nid1")
        await call.report("nid1", number)
        [lease] = (await call.ask(1))["leases"]
        asked = [["GET", "/v1/leases", None], ["DELETE", f"/v1/leases/{lease['id']}", None],
                 ["POST", f"/v1/leases/{lease['id']}/revoke", {}], ["DELETE", "/v1/sessions/s", None],
                 ["GET", "/v1/usage", None], ["POST", "/v1/drain", {}], ["GET", "/v1/events", None],
                 ["POST", "/v1/agents/nid1/reports", report(2**60, cores=128)],
                 ["POST", "/v1/agents", agent("nid1", "fake")]]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ASK_AS_OTHER, str(tmp_path / "socket"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        out, _ = await process.communicate(json.dumps(asked).encode())
        answers = [json.loads(line) for line in out.splitlines()]
        assert [status for status, _ in answers] == [200, 404, 404, 200, 200, 403, 200, 409, 200]
        assert answers[0][1] == {"leases": []} and answers[6][1]["events"] == [] and answers[4][1]["rows"] == []
        assert answers[1][1]["error"] == f"uid {OTHER} has no lease {lease['id']}"
        # Nothing of it touched anything.
        [still] = (await call("GET", "/v1/leases"))["leases"]
        orders = await call.report("nid1", number)
        assert still["state"] == "granted" and orders["stop"] == [] and not orders["superseded"]
    play(scenario)


@pytest.mark.skipif(ME != 0, reason="only root can call as somebody else")
def test_what_became_of_a_lease_is_closed_to_another_user_also_after_a_restart_and_open_to_administrators(tmp_path):
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == ME and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)

    async def as_other(*asked: list) -> list:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ASK_AS_OTHER, str(tmp_path / "socket"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        out, _ = await process.communicate(json.dumps(asked).encode())
        return [json.loads(line) for line in out.splitlines()]

    async def whole() -> None:
        async with serving(tmp_path) as call:
            await call.report("nid1", await call.start("nid1"))
            [mine] = (await call.ask(1))["leases"]
            await call("POST", f"/v1/leases/{mine['id']}/revoke", {})
            [(status, granted)] = await as_other(["POST", "/v1/leases", {
                "session": "s", "request_id": 1, "workers_min": 1, "workers_max": 1}])
            assert status == 200
            theirs = granted["leases"][0]["id"]
            assert (await as_other(["POST", f"/v1/leases/{theirs}/revoke", {}]))[0][0] == 200
        async with serving(tmp_path) as call:
            every = (await call("GET", "/v1/events"))["events"]
            assert [(one["lease_id"], one["uid"]) for one in every] == [(mine["id"], ME), (theirs, OTHER)]
            assert (await call("GET", f"/v1/events?lease={theirs}"))["events"] == every[1:]
            assert (await call("GET", "/v1/events?node=nid1&since=PT1H"))["events"] == every
            answers = await as_other(*(["GET", f"/v1/events{query}", None] for query in (
                "", "?node=nid1", f"?lease={theirs}", "?since=P1D", f"?lease={mine['id']}", "?lease=5")))
            assert [status for status, _ in answers] == [200, 200, 200, 200, 404, 404]
            assert [answer["events"] for _, answer in answers[:4]] == [every[1:]] * 4
            # Nothing tells a lease of somebody else's from none.
            assert [answer["error"] for _, answer in answers[4:]] == [
                f"uid {OTHER} has no lease {mine['id']}", f"uid {OTHER} has no lease 5"]

    asyncio.run(asyncio.wait_for(whole(), GUARD_S))


def test_over_a_network_nobody_is_believed(tmp_path):
    async def whole() -> None:
        async with ManagerServer(Ledger(tmp_path / "ledger.db")) as manager:
            with pytest.raises(ConfigError, match="nobody could prove"):
                await manager.listen_network(Address("127.0.0.1", 0))
            site = aiohttp.web.TCPSite(manager._runner, "127.0.0.1", 0)
            await site.start()
            port = site._server.sockets[0].getsockname()[1]
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/v1/leases") as answer:
                assert answer.status == 401 and "prove who he is" in (await answer.json())["error"]
    asyncio.run(asyncio.wait_for(whole(), GUARD_S))


# --- bad input ------------------------------------------------------------------

GOOD: dict[str, tuple[str, str, dict]] = {
    "start_agent": ("POST", "/v1/agents", agent("nid1", "a")),
    "report": ("POST", "/v1/agents/nid1/reports", {
        "incarnation": 1, "clock_ns": 1, "spare": [0, 1], "memory_bytes": 1, "live": [], "numa": {"0": 0},
        "ends_in_s": 1.0, "grace_s": 0.0, "used": [], "traits": {
            "window_age_s": 1.0, "classes": {"0": "free"}, "physical": {"0": 0}, "busy": [3], "cpu_type": "zen3",
            "partition": "p", "switches": ["s1"], "nic_numa": 0, "network_load": 0.5, "memory_pressure": {"0": 0.5},
            "speed": 1.0}}),
    "ask": ("POST", "/v1/leases", {
        "session": "s", "request_id": 1, "workers_min": 1, "workers_max": 1, "cores_per_worker": 1,
        "memory_per_worker": 1, "timeout_s": 0.0, "duration_s": 60.0, "job": "4711", "least_s": 1.0,
        "place": {"node": "nid7", "numa": 0, "switches": ["s1"], "ranks": 1}, "bytes_per_s": 1.0,
        "others": [{"node": "nid8", "ranks": 2}]}),
    "explain": ("POST", "/v1/explain", {
        "session": "s", "request_id": 1, "workers_min": 1, "workers_max": 1, "duration_s": 60.0}),
    "revoke": ("POST", "/v1/leases/1/revoke", {"grace_s": 0.0}),
    "drain": ("POST", "/v1/drain", {"nodes": ["nid1"], "grace_s": 0.0}),
    "undrain": ("POST", "/v1/undrain", {"nodes": ["nid1"]}),
}
WRONG = (None, True, -1, 2**63, 2**64, 1e308, -0.5, "", "x" * 300, "\x00", "../..", [], [None], [-1], [2**70], {},
         {"a": 1})


def test_there_is_a_good_body_for_every_operation_that_takes_one():
    assert set(GOOD) == {route.name for route in api.ROUTES if route.body}


@pytest.mark.parametrize("name", GOOD)
def test_every_field_missing_unknown_wrong_or_huge_is_a_4xx_that_names_it(play, name):
    method, path, good = GOOD[name]

    async def scenario(call: Caller) -> None:
        required = {field.name for field in msgspec.structs.fields(
            next(route.body for route in api.ROUTES if route.name == name)) if field.required}
        for field in good:
            bodies = [{**good, field: wrong} for wrong in WRONG]
            if field in required:
                bodies.append({key: value for key, value in good.items() if key != field})
            for body in bodies:
                async with call.session.request(method, f"http://manager{path}", json=body) as answer:
                    text = await answer.text()
                    assert answer.status < 500, (body, text)
                    if answer.status == 400 and text.startswith('{"error":"the body is no'):
                        assert f"`$.{field}" in text or f"field `{field}`" in text, (body, text)
        problem = await call(method, path, {**good, "surprise": 1}, status=400)
        assert "surprise" in problem["error"]
        for raw in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"{" * 5000):
            async with call.session.request(method, f"http://manager{path}", data=raw) as answer:
                assert answer.status == 400, raw[:10]
        assert (await call("GET", "/v1/leases"))["leases"] == [], "something was granted"
    play(scenario)


@pytest.mark.parametrize("method, path, status", [
    ("DELETE", "/v1/leases/0x10", 400), ("DELETE", "/v1/leases/99999999999999999999999", 400),
    ("DELETE", "/v1/leases/5", 404), ("GET", "/v1/usage?by=password", 400), ("GET", "/v1/events?after=-1", 400),
    ("GET", "/v1/leases/9999999999999999999", 400),
    ("DELETE", "/v1/sessions/%00", 409)])
def test_a_wrong_parameter_is_a_4xx_that_names_it(play, method, path, status):
    async def scenario(call: Caller) -> None:
        assert (await call(method, path, status=status))["error"]
    play(scenario)


@pytest.mark.parametrize("query, field", [
    ("after=", "after"), ("after=x", "after"), ("node=", "node"), ("node=a%20b", "node"), ("node=nid1/", "node"),
    ("node=nid1/x", "node"), ("node=nid1/1/2", "node"), ("node=%00", "node"), ("node=" + "n" * 300, "node"),
    ("lease=", "lease"), ("lease=0", "lease"), ("lease=-1", "lease"), ("lease=0x10", "lease"), ("lease=%D9%A1", "lease"),
    ("lease=9999999999999999999", "lease"), ("since=yesterday", "since"), ("since=P1DT1H", "since"),
    ("since=PT", "since"), ("since=PT9999999H", "since"), ("since=2026-02-30", "since"), ("since=P9999Y", "since")])
def test_what_events_are_looked_for_by_is_right_or_a_400_that_names_the_field(play, query, field):
    async def scenario(call: Caller) -> None:
        problem = await call("GET", f"/v1/events?{query}", status=400)
        assert problem["error"].startswith(f"{field} is ") and len(problem["error"]) < 300
    play(scenario)


def test_after_the_highest_number_of_all_there_is_no_event(play):
    async def scenario(call: Caller) -> None:
        assert (await call("GET", "/v1/events?after=9999999999999999999"))["events"] == []
    play(scenario)


@pytest.mark.parametrize("query, field", [
    ("since=yesterday", "since"), ("since=P", "since"), ("since=PT1H", "since"), ("since=-P1D", "since"),
    ("until=2026-02-30", "until"), ("until=P99999Y", "until"), ("since=P9999Y", "since"), ("since=" + "9" * 5000, "since"),
    ("since=P1D&until=P1D", "until"), ("since=2026-11-02&until=2026-11-01", "until"), ("by=lease&since=P1D", "by")])
def test_a_period_that_is_none_is_a_400_that_names_the_field(play, query, field):
    async def scenario(call: Caller) -> None:
        problem = await call("GET", f"/v1/usage?{query}", status=400)
        assert problem["error"].startswith(f"{field} is ") and len(problem["error"]) < 300
    play(scenario)


def test_a_period_is_answered_with_its_dates(play):
    async def scenario(call: Caller) -> None:
        found = await call("GET", "/v1/usage?since=2026-10-31&until=2026-11-30")
        assert (found["since"], found["until"], found["rows"]) == ("2026-10-31", "2026-11-30", [])
        found = await call("GET", "/v1/usage?since=P1M")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["since"]) and found["until"] == ""
    play(scenario)


def test_a_body_without_end_is_refused(play):
    async def scenario(call: Caller) -> None:
        body = io.BytesIO(b"x" * (server.BODY_BYTES_MAX + 1))
        async with call.session.post("http://manager/v1/drain", data=body) as answer:
            assert answer.status == 413
    play(scenario)


# --- a full disk ----------------------------------------------------------------

def test_on_a_full_disk_nothing_is_granted_and_it_goes_on_by_itself(play, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "WRITE_RETRY_S", 0.01)

    async def scenario(call: Caller) -> None:
        await call.report("nid1", await call.start("nid1"), cores=64)
        monkeypatch.setattr(server, "WRITE_WAIT_S", 0.05)
        body = {"session": "s", "request_id": 1, "workers_min": 1, "workers_max": 1}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "ledger.db-wal").stat().st_size, hard))
        try:
            problem = await call("POST", "/v1/leases", body, status=503)
            assert "can't write to its disk" in problem["error"]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.setattr(server, "WRITE_WAIT_S", GUARD_S)
        granted = await call("POST", "/v1/leases", body)
        assert [one["id"] for one in (await call("GET", "/v1/leases"))["leases"]] == [granted["leases"][0]["id"]]
    play(scenario)


def test_who_waits_for_cores_is_answered_though_the_disk_is_full_when_there_are_some(play, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "WRITE_RETRY_S", 0.01)

    async def scenario(call: Caller) -> None:
        number = await call.start("nid1")
        await call.report("nid1", number, cores=1)
        monkeypatch.setattr(server, "WRITE_WAIT_S", 0.05)
        body = {"session": "s", "request_id": 1, "workers_min": 2, "workers_max": 2, "timeout_s": 4.0}
        waiting = asyncio.create_task(call("POST", "/v1/leases", body, status=503))

        async def waits() -> bool:
            return await metric(call, "rfaas_manager_demands_waiting") == 1
        await until(waits)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "ledger.db-wal").stat().st_size, hard))
        try:
            await call("POST", "/v1/agents/nid1/reports", report(number, cores=2), status=503)
            assert "can't write to its disk" in (await waiting)["error"]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.setattr(server, "WRITE_WAIT_S", GUARD_S)
        [lease] = (await call("POST", "/v1/leases", body))["leases"]
        assert [one["id"] for one in (await call("GET", "/v1/leases"))["leases"]] == [lease["id"]]
    play(scenario)


def test_a_manager_whose_store_is_away_for_long_ends_so_that_another_one_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "CUT_OFF_S", 0.05)

    def away() -> None:
        raise StoreError("the store is away")

    async def whole() -> None:
        ledger = Ledger(tmp_path / "ledger.db")
        monkeypatch.setattr(ledger._db, "keep_s", 0.01)
        monkeypatch.setattr(ledger._db, "keep", away)
        async with ManagerServer(ledger) as manager:
            with pytest.raises(StoreError, match="is away"):
                await manager.wait()
    asyncio.run(asyncio.wait_for(whole(), GUARD_S))


# --- the page ---------------------------------------------------------------------

def test_the_openapi_page_tells_of_every_operation_and_type(play):
    async def scenario(call: Caller) -> None:
        page = await call("GET", "/openapi.json")
        assert page["openapi"].startswith("3.1")
        told = {(method.upper(), path) for path, operations in page["paths"].items() for method in operations}
        assert told == {(route.method, route.path) for route in api.ROUTES}
        names = set(page["components"]["schemas"])
        text = json.dumps(page)
        assert {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]} == names
        assert page["components"]["schemas"]["AskLease"]["properties"]["workers_max"]["maximum"] == api.WORKERS_MAX
    play(scenario)


def test_nodes_of_a_partition_whose_windows_were_short_are_chosen_last(play):
    async def scenario(call: Caller) -> None:
        numbers = {node: await call.start(node) for node in ("nid1", "nid2")}

        async def tell(node: str, partition: str, age_s: float | None) -> None:
            await call.report(node, numbers[node], cores=4 if age_s is not None else 0,
                              traits={"partition": partition, "window_age_s": age_s})

        async def explained() -> tuple[list[str], dict[str, float]]:
            found = await call("POST", "/v1/explain", {"session": "s", "request_id": next(_ids), "workers_min": 1,
                                                       "workers_max": 1, "duration_s": 60.0})
            return ([one["node"] for one in found["nodes"] if one["chosen"]],
                    {one["node"]: one["terms"]["eviction_s"] for one in found["nodes"]})

        await tell("nid1", "short", 30.0)
        await tell("nid2", "long", 30.0)
        chosen, risk_s = await explained()
        assert chosen == ["nid1"] and risk_s["nid1"] == pytest.approx(risk_s["nid2"], rel=0.2)
        for _ in range(20):
            # Owners come after half a minute, again and again.
            await tell("nid1", "short", None)
            await tell("nid1", "short", 30.0)
        while chosen == ["nid1"]:
            # What was seen counts after some seconds.
            await call.report("nid2", numbers["nid2"], traits={"partition": "long", "window_age_s": 30.0})
            chosen, risk_s = await explained()
        assert chosen == ["nid2"] and risk_s["nid1"] > 1.5 * risk_s["nid2"]
        assert (await call.ask())["leases"][0]["node"] == "nid2"

    play(scenario)
