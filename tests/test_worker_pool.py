"""Workers that run as users of a pool: one of them for each user, closed to all others and to what is his own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from cluster import tell, wait_until
from site_of_users import ALICE, BOB, SERVICE, UID_MIN, Site, environment, interpreter

from rfaas_mpi.agent.spawner import Spawner
from rfaas_mpi.agent.users import Pool
from rfaas_mpi.config import Settings, uid_range
from rfaas_mpi.errors import ConfigError, ServiceError

POOL = range(62_000, 62_002)
CAROL = 61_003
GUARD_S = 60

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="an agent of several users is started by root")


# --- who stands for whom -------------------------------------------------------

def test_a_user_is_the_same_one_of_the_pool_for_all_that_runs():
    pool = Pool(POOL)
    uid, clear = pool.take(ALICE, "1")
    assert uid in POOL and clear, "nobody knows who had it before"
    assert pool.take(ALICE, "2") == (uid, False)
    pool.give_back(ALICE, "1")
    assert pool.take(BOB, "3")[0] != uid, "there is something left"


def test_one_of_the_pool_goes_to_another_user_only_when_there_is_no_other_one_and_is_cleared_then():
    pool = Pool(range(62_000, 62_003))
    first = pool.take(ALICE, "1")[0]
    pool.give_back(ALICE, "1")
    others = {pool.take(user, "1")[0] for user in (BOB, CAROL)}
    assert first not in others
    assert pool.take(ALICE, "2") == (first, False), "she has her own again, and what she left"
    pool.give_back(ALICE, "2")
    assert pool.take(4711, "1") == (first, True)


def test_the_one_that_was_not_used_for_longest_goes_first():
    pool = Pool(POOL)
    for user in (ALICE, BOB):
        pool.take(user, "")
    last = pool.take(BOB, "")[0]
    for user in (BOB, ALICE):
        pool.give_back(user, "")
        pool.give_back(user, "")
    assert pool.take(CAROL, "")[0] == last


def test_a_pool_that_is_used_up_says_so():
    pool = Pool(POOL)
    for user in (ALICE, BOB):
        pool.take(user, "")
    with pytest.raises(ServiceError, match="62000-62001"):
        pool.take(CAROL, "")
    pool.give_back(BOB, "")
    assert pool.take(CAROL, "")[1]


@pytest.mark.parametrize("text", ["70000", "5-4", "0-5", "a-b", "1-5,8", f"1-{1 << 31}"])
def test_what_is_no_range_of_uids_is_refused(text):
    with pytest.raises(ConfigError, match="worker_pool"):
        Settings.load({}, worker_pool=text)
    assert uid_range(Settings.load({}, worker_pool=" 7 - 9").worker_pool) == range(7, 10)


# --- what root starts ----------------------------------------------------------

@needs_root
@pytest.mark.parametrize("uid", [ALICE, POOL[0] - 1, POOL[-1] + 1, 0, SERVICE])
def test_with_a_pool_nothing_is_started_as_anybody_else(uid):
    with contextlib.closing(Spawner.start(UID_MIN, SERVICE, POOL)) as spawner, open(os.devnull, "rb") as null:
        with pytest.raises(PermissionError):
            spawner.zygote(uid, *[null.fileno()] * 4)


@needs_root
@pytest.mark.parametrize("changes", [
    {"RFAAS_WORKER_POOL": ""}, {"RFAAS_WORKER_POOL": f"{SERVICE - 1}-{SERVICE + 1}"},
    {"RFAAS_WORKER_POOL": "62000-62001"}, {"RFAAS_WORKER_POOL": "62000-62001", "RFAAS_SERVICE_USER": ""}])
def test_an_agent_without_a_pool_that_can_be_used_does_not_start(tmp_path, changes):
    given = {"RFAAS_WORKER_IDENTITY": "pool", "RFAAS_SERVICE_USER": str(SERVICE), **changes}
    done = subprocess.run(
        [interpreter(), "-m", "rfaas_mpi.cli", "agent", "--manager", f"unix:{tmp_path}/none", "--cores", "0",
         "--directory", tmp_path / "a"], env=environment(**given),
        cwd="/", capture_output=True, text=True, timeout=GUARD_S)
    assert done.returncode != 0 and "pool" in done.stderr and "Traceback" not in done.stderr, done.stderr


# --- a site with one -----------------------------------------------------------

@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site(RFAAS_WORKER_IDENTITY="pool", RFAAS_WORKER_POOL=f"{POOL[0]}-{POOL[-1]}", RFAAS_ZYGOTE_IDLE_S="0",
              RFAAS_METER_S="0.2") as site:
        yield site


WHO = """
    secret = sys.argv[1]
    def who():
        return os.getresuid(), os.getresgid(), os.getgroups()
    def peek(path):
        return Path(path).read_text()
    Path(secret).write_text("mine")
    with Executor(workers=1) as ex:
        say(*ex.submit(who).result()[0])
        say(*ex.submit(who).result()[2])
        x = ex.empty(100_000)
        x[...] = 3
        assert (ex.Invoke(faults.adds_one, x, ex.empty(100_000)) == 4).all()
        x = np.arange(1000.0)
        assert (ex.Invoke(faults.adds_one, x, np.empty_like(x)) == x + 1).all()
        try:
            ex.submit(peek, secret).result()
        except PermissionError:
            say("closed")
"""


@needs_root
def test_a_worker_is_one_of_the_pool_in_everything_and_its_rank_s_arrays_are_there(site):
    place = site.directory / "secret"
    place.mkdir(mode=0o700)
    os.chown(place, ALICE, ALICE)
    said = site.run(ALICE, WHO, place / "secret").split()
    uids, group, closed = said[:3], said[3:-1], said[-1]
    assert len(set(uids)) == 1 and int(uids[0]) in POOL and group == uids[:1] and closed == "closed"


@needs_root
def test_a_strict_worker_of_the_pool_has_a_directory_of_its_own(site):
    body = """
        import tempfile
        def keeps():
            with tempfile.TemporaryFile() as file:
                return file.write(b"123"), os.stat(tempfile.gettempdir()).st_uid == os.getuid()
        with Executor(workers=1, sandbox="strict") as ex:
            say(*ex.submit(keeps).result())
    """
    assert site.run(ALICE, body).split() == ["3", "True"]


HOLDS = """
    def who():
        return os.getuid(), os.getpid()
    with Executor(workers=1) as ex:
        say(*ex.submit(who).result())
        sys.stdin.readline()
        say(*ex.submit(who).result())
"""


@needs_root
def test_what_ends_all_that_a_user_runs_leaves_his_workers_and_others_alone(site):
    with site.running(ALICE, HOLDS) as alice, site.running(BOB, HOLDS) as bob:
        workers = [faults.line(rank).split() for rank in (alice, bob)]
        assert workers[0][0] != workers[1][0], "each has his own"
        # All but the rank, which is on another node.
        own = subprocess.run(["ps", "-o", "pid=,sid=", "-u", str(ALICE)], capture_output=True, text=True,
                             check=True).stdout
        assert not [line for line in own.splitlines() if int(line.split()[1]) != alice.pid], "nothing else is hers"
        for rank in (alice, bob):
            tell(rank, "go on")
        assert [faults.line(rank).split() for rank in (alice, bob)] == workers


@needs_root
def test_more_users_than_the_pool_has_are_served_one_after_another(site):
    with site.running(ALICE, HOLDS) as alice:
        one = int(faults.line(alice).split()[0])
        assert {int(site.run(user, WHO_AM_I)) for user in (BOB, CAROL, BOB)} == {*POOL} - {one}
        tell(alice, "go on")
        assert int(faults.line(alice).split()[0]) == one


@needs_root
def test_what_runs_as_one_of_the_pool_and_is_nobody_s_ends_before_somebody_has_it(site):
    wait_until(lambda: not site_zygotes(), "no user of the pool stands for anybody")
    strays = [subprocess.Popen(["sleep", "600"], user=uid, group=uid, extra_groups=[]) for uid in POOL]
    try:
        uid = int(site.run(4711 + UID_MIN, WHO_AM_I))
        assert strays[POOL.index(uid)].wait(GUARD_S) == -signal.SIGKILL
        assert [stray.poll() for stray in strays].count(None) == 1, "the other one is still nobody's"
    finally:
        for stray in strays:
            stray.kill()
            stray.wait()


WHO_AM_I = """
    with Executor(workers=1) as ex:
        say(ex.submit(os.getuid).result())
"""


def site_zygotes() -> list[str]:
    """Processes of the pool's users."""
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdecimal() and path.stat().st_uid in POOL:
                found.append(path.name)
    return found


@needs_root
def test_a_user_of_the_pool_is_lent_nothing(site):
    said = site.run(POOL[0], """
        try:
            with Executor(workers=1, fallback=False) as ex:
                ex.submit(os.getuid).result()
        except rfaas_mpi.RFaaSError as error:
            say(str(error).replace(chr(10), " "))
    """)
    assert "worker_pool" in said, said
