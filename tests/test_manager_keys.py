"""The manager's keys: files that only it reads, grants that an agent believes, and a rotation."""

from __future__ import annotations

import os

import pytest

from rfaas_mpi.errors import ConfigError, ServiceError
from rfaas_mpi.leases import GrantedWorker, Lease
from rfaas_mpi.leases.grants import Admission, AgentKey, GrantRefused
from rfaas_mpi.manager import keys
from rfaas_mpi.manager.directory import Registration
from rfaas_mpi.manager.keys import Keys

SECOND = 10**9
NOW = 1000 * SECOND
LEASE = Lease(id=77, epoch=78, node="nid1", session=1, uid=1234, request_id=1,
              workers=(GrantedWorker(0, (2, 3)), GrantedWorker(1, (4, 5))), memory_per_worker=1 << 20,
              incarnation=9, not_after_ns=NOW + 20 * SECOND)


def agent() -> tuple[AgentKey, Registration]:
    key = AgentKey()
    return key, Registration("nid1", "a", 9, "boot", key.public, ("tcp://nid1:1",), "nid1")


def granted(by: Keys, to: Registration, believed: tuple[bytes, ...] = (), **more: object):
    return by.lent(LEASE, to, **{"seen_ns": NOW, "hard_end_ns": None, "hard_end_in_s": None, "believed": believed,
                                 **more})


def test_an_agent_believes_a_grant_and_opens_its_secret(tmp_path):
    key, registration = agent()
    manager = Keys.of(tmp_path)
    lent = granted(manager, registration, hard_end_ns=NOW + 60 * SECOND, hard_end_in_s=60.0)
    admission = Admission("nid1", "boot", 9, manager.public)
    body = admission.admit(lent.grant, NOW + 1, spare=range(8), in_use=())
    assert key.open(body.sealed, 77, 78) == lent.secret and len(lent.secret) == 32
    assert (body.lease, body.epoch, body.uid, body.cores) == (77, 78, 1234, (2, 3, 4, 5))
    assert body.hard_end_ns == NOW + 60 * SECOND and body.grant_id == 77
    assert (lent.host, lent.addresses, lent.hard_end_in_s) == ("nid1", ("tcp://nid1:1",), 60.0)


def test_a_secret_is_the_same_after_a_restart_and_another_for_each_lease(tmp_path):
    first, second = Keys.of(tmp_path), Keys.of(tmp_path)
    assert first.public == second.public
    assert first.secret(1, 1) == second.secret(1, 1)
    assert len({first.secret(1, 1), first.secret(1, 2), first.secret(2, 1), Keys.fresh().secret(1, 1)}) == 4


def test_keys_are_files_of_the_manager_s_user_alone(tmp_path):
    Keys.of(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grant.key", "secret.key"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["grant.key", "secret.key", "grant.key.next"])
@pytest.mark.parametrize("spoil", [
    lambda path: path.chmod(0o640), lambda path: path.chmod(0o604), lambda path: path.write_bytes(b"short"),
    lambda path: (path.unlink(), path.mkdir())], ids=["group", "world", "short", "directory"])
def test_a_key_that_others_can_read_or_that_is_none_is_refused_by_name(tmp_path, name, spoil):
    Keys.of(tmp_path)
    keys.rotate(tmp_path)
    spoil(tmp_path / name)
    with pytest.raises(ConfigError, match=name) as refused:
        Keys.of(tmp_path)
    assert "manager" in refused.value.hint


def test_keys_rotate_while_agents_believe_grants(tmp_path):
    _, registration = agent()
    manager = Keys.of(tmp_path)
    (old,) = manager.public
    assert keys.rotate(tmp_path) == keys.show(tmp_path) and not manager.public[1:]
    assert manager.again() and not manager.again()
    new = manager.public[1]
    assert manager.public == (old, new)

    def who_believes(grant: bytes, *held: bytes) -> bool:
        try:
            Admission("nid1", "boot", 9, held).peek(grant)
        except GrantRefused:
            return False
        return True

    # Who hasn't heard of the next key gets grants by the old one.
    assert who_believes(granted(manager, registration).grant, old)
    assert who_believes(granted(manager, registration, (old,)).grant, old)
    by_new = granted(manager, registration, (old, new)).grant
    assert who_believes(by_new, old, new) and who_believes(by_new, new) and not who_believes(by_new, old)
    assert keys.retire(tmp_path) == (new,)
    assert manager.again() and manager.public == (new,)
    assert not who_believes(granted(manager, registration, (old, new)).grant, old)
    assert Keys.of(tmp_path).public == (new,)


def test_a_rotation_is_ended_before_the_next_and_never_leaves_no_key(tmp_path):
    with pytest.raises(ConfigError, match="holds no key"):
        keys.rotate(tmp_path)
    Keys.of(tmp_path)
    with pytest.raises(ServiceError, match="one key only"):
        keys.retire(tmp_path)
    keys.rotate(tmp_path)
    with pytest.raises(ServiceError, match="next key already"):
        keys.rotate(tmp_path)
    assert len(keys.show(tmp_path)) == 2


def test_a_manager_keeps_its_keys_where_the_files_are_spoilt_while_it_runs(tmp_path):
    manager = Keys.of(tmp_path)
    before = manager.public
    os.chmod(tmp_path / "grant.key", 0o644)
    with pytest.raises(ConfigError):
        manager.again()
    assert manager.public == before


def test_a_public_key_to_which_nothing_can_be_sealed_is_refused():
    keys.check_agent_key(AgentKey().public)
    with pytest.raises(ConfigError):
        keys.check_agent_key(bytes(32))


def test_keys_are_not_in_what_people_print():
    manager = Keys(b"s" * 32, [b"k" * 32])
    assert "sss" not in repr(manager) and "kkk" not in repr(manager)
