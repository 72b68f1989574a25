"""MUNGE credentials, by a munged with a key of its own."""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from munged import Munged

from rfaas_mpi import munge
from rfaas_mpi.errors import AuthError
from rfaas_mpi.munge import MungeError, Refusal

AS_ROOT = os.getuid() == 0


@pytest.fixture(scope="module")
def started() -> Iterator[Callable[[str, bytes], Munged]]:
    made: list[Munged] = []
    with tempfile.TemporaryDirectory(prefix="rfaas-munge-") as top:
        Path(top).chmod(0o755)       # other users come in, too

        def start(name: str, key: bytes) -> Munged:
            made.append(Munged(Path(top) / name, key))
            return made[-1]

        yield start
        for daemon in made:
            daemon.close()


@pytest.fixture(scope="module")
def socket(started, wait_until) -> str:
    daemon = started("a", secrets.token_bytes(128))
    wait_until(daemon.serves, "munged serves")
    return daemon.socket


@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(256)), b"\0" * munge.PAYLOAD_BYTES_MAX])
def test_a_credential_names_its_maker_and_carries_its_payload(socket, payload):
    got = munge.decode(munge.encode(payload, socket=socket), socket=socket)
    assert got == munge.Credential(os.getuid(), os.getgid(), payload)


def test_what_it_carries_can_t_be_read_on_the_way(socket):
    assert b"rosebud" not in munge.encode(b"rosebud", socket=socket)


def test_the_second_time_it_is_a_replay(socket):
    credential = munge.encode(b"once", socket=socket)
    munge.decode(credential, socket=socket)
    with pytest.raises(MungeError, match="[Rr]eplayed") as refused:
        munge.decode(credential, socket=socket)
    assert refused.value.refusal is Refusal.REPLAYED
    assert isinstance(refused.value, AuthError)


def test_one_for_another_reader_is_refused(socket):
    with pytest.raises(MungeError) as refused:
        munge.decode(munge.encode(b"", reader_uid=os.getuid() + 1, socket=socket), socket=socket)
    assert refused.value.refusal is Refusal.UNAUTHORIZED
    assert munge.decode(munge.encode(b"", reader_uid=os.getuid(), socket=socket), socket=socket).uid == os.getuid()


def test_another_site_s_credential_is_refused_and_the_key_is_named(socket, started, wait_until):
    other = started("b", secrets.token_bytes(128))
    wait_until(other.serves, "the other munged serves")
    with pytest.raises(MungeError, match="munge.key") as refused:
        munge.decode(munge.encode(b"", socket=other.socket), socket=socket)
    assert refused.value.refusal is Refusal.INVALID


def test_an_old_one_is_refused_and_the_clocks_are_named(socket, wait_until):
    credential = munge.encode(b"", ttl_s=1, socket=socket)

    def refused() -> bool:
        with pytest.raises(MungeError) as error:
            munge.decode(credential, socket=socket)
        # the first look may find it young; then it is a replay until it is old
        return error.value.refusal is Refusal.EXPIRED and "clocks" in str(error.value)

    munge.decode(credential, socket=socket)
    wait_until(refused, "it is old")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1), letters=st.permutations(b"ABxyz019"))
def test_a_changed_one_is_refused(socket, where, letters):
    credential = bytearray(munge.encode(b"twenty bytes of data", socket=socket))
    first, last = len(b"MUNGE:"), len(credential) - 6      # the last letters may carry nothing
    at = first + int(where * (last - first))
    credential[at] = next(letter for letter in letters if letter != credential[at])
    with pytest.raises(MungeError):
        munge.decode(bytes(credential), socket=socket)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=400))
def test_junk_is_refused(socket, junk):
    with pytest.raises(MungeError):
        munge.decode(junk, socket=socket)


def test_what_is_far_too_long_is_refused_unread(socket):
    with pytest.raises(MungeError, match="no credential"):
        munge.decode(b"M" * (munge.CREDENTIAL_BYTES_MAX + 1), socket=socket)
    with pytest.raises(ValueError, match="65536 bytes, not 65537"):
        munge.encode(b"x" * 65537, socket=socket)


@pytest.mark.parametrize("ttl_s", [-1, 3601])
def test_a_life_out_of_range_is_named(ttl_s):
    with pytest.raises(ValueError, match=f"0 to 3600, not {ttl_s}"):
        munge.encode(ttl_s=ttl_s)


def test_no_munged_is_an_error_that_asks_for_it(tmp_path):
    with pytest.raises(MungeError, match="is munged running here") as refused:
        munge.encode(socket=str(tmp_path / "nobody"))
    assert refused.value.refusal is Refusal.SOCKET


@pytest.mark.skipif(not AS_ROOT, reason="needs to become another user")
def test_another_user_s_credential_has_his_uid(socket):
    made = subprocess.run(["munge", f"--socket={socket}", "--string=his"], user=65534, group=65534, extra_groups=[],
                          cwd="/", capture_output=True, check=True).stdout.strip()
    assert munge.decode(made, socket=socket) == munge.Credential(65534, 65534, b"his")


def test_nothing_is_left_open(socket):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        munge.decode(munge.encode(b"x", socket=socket), socket=socket)
    assert len(os.listdir("/proc/self/fd")) == before
