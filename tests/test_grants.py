"""Grants that an agent believes, and all the others."""

from __future__ import annotations

import secrets

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rfaas_mpi.errors import AuthError, ConfigError, LeaseDenied
from rfaas_mpi.leases import grants
from rfaas_mpi.leases.grants import (
    LIFE_MAX_NS,
    Admission,
    AgentClock,
    AgentKey,
    GrantBody,
    GrantRefused,
    GrantSigner,
    key_id,
    seal_secret,
)
from rfaas_mpi.leases.types import GrantedWorker
from rfaas_mpi.messages import GRANT_BYTES_MAX

NODE, BOOT, LIFE = "n1", "2b1c7d", 77
NOW = 10**12
SIGNER, OTHER = GrantSigner(bytes(range(32))), GrantSigner(b"\1" * 32)
SPARE = range(8)
AGENT = AgentKey()
SECRET = bytes(range(32, 64))
SEALED = seal_secret(AGENT.public, SECRET, 3, 9)

BODY = GrantBody(grant_id=5, node=NODE, seen=AgentClock(BOOT, LIFE, NOW - 10**9), not_after_ns=NOW + 10**9, lease=3,
                 epoch=9, uid=1000, workers=(GrantedWorker(0, (1, 2)), GrantedWorker(1, (4,))),
                 memory_per_worker=1 << 30, hard_end_ns=NOW + 60 * 10**9, sealed=SEALED)
GRANT = SIGNER.sign(BODY)


def changed(**fields: object) -> bytes:
    return SIGNER.sign(msgspec.structs.replace(BODY, **fields))


@pytest.fixture
def agent() -> Admission:
    return Admission(NODE, BOOT, LIFE, [SIGNER.public])


def test_a_grant_of_the_manager_is_believed_to_the_letter(agent):
    assert agent.admit(GRANT, NOW, SPARE, ()) == BODY
    assert BODY.cores == (1, 2, 4)


def test_it_is_believed_once(agent):
    agent.admit(GRANT, NOW, SPARE, ())
    with pytest.raises(GrantRefused, match="grant 5 was used before"):
        agent.admit(GRANT, NOW + 1, SPARE, ())


def test_used_grants_are_remembered_until_they_are_late_and_no_longer(agent):
    for number in range(1000):
        now = NOW + number * LIFE_MAX_NS
        body = msgspec.structs.replace(BODY, grant_id=number, epoch=number, hard_end_ns=None,
                                       seen=AgentClock(BOOT, LIFE, now), not_after_ns=now + LIFE_MAX_NS // 2)
        agent.admit(SIGNER.sign(body), now, SPARE, ())
        with pytest.raises(GrantRefused, match="used before"):
            agent.admit(SIGNER.sign(body), body.not_after_ns, SPARE, ())
        with pytest.raises(GrantRefused, match="late"):
            agent.admit(SIGNER.sign(body), body.not_after_ns + 1, SPARE, ())
        assert len(agent._seen) == 1


@settings(max_examples=400, deadline=None)
@given(at=st.integers(0, len(GRANT) * 8 - 1))
def test_one_flipped_bit_is_seen(at):
    flipped = bytearray(GRANT)
    flipped[at // 8] ^= 1 << at % 8
    with pytest.raises(GrantRefused):
        Admission(NODE, BOOT, LIFE, [SIGNER.public]).admit(bytes(flipped), NOW, SPARE, ())


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, len(GRANT) - 1), tail=st.binary(max_size=64))
def test_nothing_spliced_is_believed(cut, tail):
    spliced = GRANT[:cut] + tail
    if spliced != GRANT:
        with pytest.raises(GrantRefused):
            Admission(NODE, BOOT, LIFE, [SIGNER.public]).admit(spliced, NOW, SPARE, ())


@given(junk=st.binary(max_size=300))
def test_junk_is_refused(junk):
    with pytest.raises(GrantRefused):
        Admission(NODE, BOOT, LIFE, [SIGNER.public]).admit(junk, NOW, SPARE, ())


@given(junk=st.binary(max_size=300))
@example(junk=b"\x81\xa4\0\0\0\x80").via("a name that is no text")
@example(junk=b"\x91" * 10_000).via("a list in a list, and so on")
def test_junk_that_the_manager_signed_is_refused_too(junk):
    head = bytes((1,)) + key_id(SIGNER.public)
    signed = head + SIGNER._key.sign(b"rfaas_mpi grant\0" + head + junk) + junk
    with pytest.raises(GrantRefused):
        Admission(NODE, BOOT, LIFE, [SIGNER.public]).admit(signed, NOW, SPARE, ())


def test_another_manager_s_grant_is_refused_and_the_keys_that_are_held_are_named(agent):
    with pytest.raises(GrantRefused, match="doesn't hold.*" + key_id(SIGNER.public).hex()):
        agent.admit(OTHER.sign(BODY), NOW, SPARE, ())


def test_another_key_under_our_key_s_name_is_refused(agent):
    forged = GRANT[:9] + OTHER.sign(BODY)[9:]
    with pytest.raises(GrantRefused, match="signature"):
        agent.admit(forged, NOW, SPARE, ())


@pytest.mark.parametrize("fields, why", [
    ({"node": "n2"}, "for node n2, this is n1"),
    ({"seen": AgentClock("another", LIFE, NOW)}, "earlier life"),
    ({"seen": AgentClock(BOOT, LIFE - 1, NOW)}, "earlier life"),
    ({"seen": AgentClock(BOOT, LIFE, NOW + 1)}, "hasn't had yet"),
    ({"not_after_ns": NOW - 1}, "late"),
    ({"not_after_ns": NOW + LIFE_MAX_NS + 1}, "for more than 600 s"),
    ({"hard_end_ns": NOW}, "hard end"),
    ({"workers": ()}, "no core"),
    ({"workers": (GrantedWorker(0, ()),)}, "no core"),
    ({"workers": (GrantedWorker(0, (1,)), GrantedWorker(1, (1,)))}, "one core twice"),
    ({"workers": (GrantedWorker(0, (8,)),)}, "core 8 of n1 is not spare"),
    ({"workers": (GrantedWorker(0, (-1,)),)}, "core -1 of n1 is not spare"),
    ({"workers": (GrantedWorker(0, (7,)),)}, "core 7 of n1 is still in use"),
])
def test_what_does_not_fit_is_refused_and_changes_nothing(agent, fields, why):
    with pytest.raises(GrantRefused, match=why) as refused:
        agent.admit(changed(**fields), NOW, SPARE, {7})
    assert isinstance(refused.value, LeaseDenied) and isinstance(refused.value, AuthError)
    assert agent.admit(GRANT, NOW, SPARE, {7}) == BODY


def test_epochs_rise_on_each_core(agent):
    agent.admit(GRANT, NOW, SPARE, ())
    one = (GrantedWorker(0, (4,)),)
    for epoch in (8, 9):
        with pytest.raises(GrantRefused, match=f"epoch {epoch} is not above epoch 9 of core 4"):
            agent.admit(changed(grant_id=6, epoch=epoch, workers=one), NOW, SPARE, ())
    # another core never had that epoch
    agent.admit(changed(grant_id=7, epoch=8, workers=(GrantedWorker(0, (5,)),)), NOW, SPARE, ())
    agent.admit(changed(grant_id=8, epoch=10, workers=one), NOW, SPARE, ())


def test_keys_rotate_without_a_gap(agent):
    agent.rotate([SIGNER.public, OTHER.public])
    agent.admit(GRANT, NOW, SPARE, ())
    agent.admit(OTHER.sign(msgspec.structs.replace(BODY, grant_id=6, epoch=10)), NOW, SPARE, ())
    agent.rotate([OTHER.public])
    with pytest.raises(GrantRefused, match="doesn't hold"):
        agent.admit(changed(grant_id=7, epoch=11), NOW, SPARE, ())


def test_what_was_used_stays_used_when_keys_rotate(agent):
    agent.admit(GRANT, NOW, SPARE, ())
    agent.rotate([OTHER.public, SIGNER.public])
    with pytest.raises(GrantRefused, match="used before"):
        agent.admit(GRANT, NOW, SPARE, ())


@pytest.mark.parametrize("keys", [[], [b"k" * 32] * 3, [b"short"]])
def test_an_agent_holds_one_or_two_keys(keys):
    with pytest.raises(ConfigError):
        Admission(NODE, BOOT, LIFE, keys)


def test_a_private_key_of_another_size_is_named():
    with pytest.raises(ConfigError, match="32 bytes, not 31"):
        GrantSigner(secrets.token_bytes(31))


def test_the_agent_s_clock_is_what_it_reports(agent):
    assert agent.clock(NOW) == AgentClock(BOOT, LIFE, NOW)


# --- looking at a grant, and taking a lease back before it began -------------------------------

def test_a_look_at_a_grant_admits_nothing(agent):
    assert agent.peek(GRANT) == agent.peek(GRANT) == BODY
    assert agent.admit(GRANT, NOW, SPARE, ()) == BODY
    assert agent.peek(GRANT) == BODY, "it is the manager's also after it was used"


def test_a_check_says_what_would_be_said_and_admits_nothing(agent):
    assert agent.check(GRANT, NOW, SPARE, ()) == agent.check(GRANT, NOW, SPARE, ()) == BODY
    with pytest.raises(GrantRefused, match="still in use"):
        agent.check(GRANT, NOW, SPARE, {1})
    agent.admit(GRANT, NOW, SPARE, ())
    with pytest.raises(GrantRefused, match="used before"):
        agent.check(GRANT, NOW, SPARE, ())


def test_a_look_tells_what_the_manager_never_signed(agent):
    with pytest.raises(GrantRefused, match="doesn't hold"):
        agent.peek(OTHER.sign(BODY))
    with pytest.raises(GrantRefused, match="signature"):
        agent.peek(GRANT[:-1] + bytes((GRANT[-1] ^ 1,)))


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, len(GRANT) - 1), turn=st.integers(1, 255))
def test_nothing_is_decoded_before_its_signature_was_checked(at, turn):
    changed_somewhere = GRANT[:at] + bytes((GRANT[at] ^ turn,)) + GRANT[at + 1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grants.msgspec.msgpack, "decode", lambda *_, **__: pytest.fail("it was decoded"))
        with pytest.raises(GrantRefused):
            Admission(NODE, BOOT, LIFE, [SIGNER.public]).peek(changed_somewhere)


def test_a_lease_whose_stop_was_faster_than_its_grant_never_begins(agent):
    agent.forbid(3, NOW)
    with pytest.raises(GrantRefused, match="lease 3 was taken back"):
        agent.admit(GRANT, NOW + 1, SPARE, ())
    assert agent.admit(changed(lease=4), NOW + 1, SPARE, ()).lease == 4, "its neighbour does"


def test_what_is_forbidden_is_remembered_until_its_grant_is_late_and_no_longer(agent):
    for lease in range(1000):
        agent.forbid(lease, NOW)
    late = NOW + LIFE_MAX_NS
    body = {"lease": 3, "not_after_ns": late, "hard_end_ns": None}
    with pytest.raises(GrantRefused, match="taken back"):
        agent.admit(changed(**body), late, SPARE, ())
    agent.admit(changed(grant_id=6, lease=1000, not_after_ns=late + 2, hard_end_ns=None), late + 1, SPARE, ())
    assert not agent._forbidden
    with pytest.raises(GrantRefused, match="late"):
        agent.admit(changed(**body), late + 1, SPARE, ())


def test_what_is_over_is_said_until_its_grant_is_late(agent):
    assert agent.over(NOW, ()) == ()
    agent.admit(GRANT, NOW, SPARE, ())
    agent.forbid(7, NOW + 1)
    assert agent.over(NOW + 1, {3}) == (7,), "it lives"
    assert set(agent.over(NOW + 1, ())) == {3, 7}
    assert set(agent.over(BODY.not_after_ns, ())) == {3, 7}
    assert agent.over(BODY.not_after_ns + 1, ()) == (7,)
    assert agent.over(NOW + LIFE_MAX_NS + 2, ()) == ()


def test_no_report_is_filled_with_what_is_over(agent):
    for lease in range(10_000):
        agent.forbid(lease, NOW)
    assert agent.over(NOW, ()) == tuple(range(9999, 9999 - 4096, -1)), "the latest are said"


def test_no_grant_is_longer_than_an_agent_reads():
    workers = tuple(GrantedWorker(number, (number,)) for number in range(4096))
    with pytest.raises(ConfigError, match=f"4096 workers has .* bytes, and {GRANT_BYTES_MAX}"):
        changed(workers=workers)
    one = (GrantedWorker(0, tuple(range(4096))),)
    assert len(changed(workers=one)) <= GRANT_BYTES_MAX
    with pytest.raises(GrantRefused, match="is none"):
        Admission(NODE, BOOT, LIFE, [SIGNER.public]).peek(bytes(GRANT_BYTES_MAX + 1))


# --- the lease's secret ---------------------------------------------------------------------------

def test_the_agent_reads_the_secret_that_was_sealed_for_it(agent):
    body = agent.admit(GRANT, NOW, SPARE, ())
    assert AGENT.open(body.sealed, body.lease, body.epoch) == SECRET
    assert SECRET not in GRANT


def test_the_same_secret_never_looks_the_same():
    assert len({seal_secret(AGENT.public, SECRET, 3, 9) for _ in range(100)}) == 100


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(SEALED) * 8 - 1))
def test_one_flipped_bit_of_a_sealed_secret_is_seen(at):
    # Also that one of a point which X25519 does not look at: the key is made of all of them.
    flipped = bytearray(SEALED)
    flipped[at // 8] ^= 1 << at % 8
    with pytest.raises(GrantRefused, match="sealed for another agent"):
        AGENT.open(bytes(flipped), 3, 9)


@given(junk=st.binary(max_size=200))
def test_junk_is_no_sealed_secret(junk):
    with pytest.raises(GrantRefused):
        AGENT.open(junk, 3, 9)


@given(lease=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**64 - 1))
@example(lease=3, epoch=8)
@example(lease=4, epoch=9)
def test_a_secret_is_good_for_its_lease_and_epoch_only(lease, epoch):
    if (lease, epoch) != (3, 9):
        with pytest.raises(GrantRefused, match=f"secret of lease {lease}"):
            AGENT.open(SEALED, lease, epoch)


def test_a_secret_is_good_for_one_life_of_one_agent():
    with pytest.raises(GrantRefused, match="another life"):
        AgentKey().open(SEALED, 3, 9)


def test_two_halves_of_sealed_secrets_are_none():
    other = seal_secret(AGENT.public, SECRET, 3, 9)
    with pytest.raises(GrantRefused):
        AGENT.open(SEALED[:32] + other[32:], 3, 9)


LOW_ORDER = [bytes(32), b"\1" + bytes(31), bytes.fromhex(
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"), b"\xec" + b"\xff" * 30 + b"\x7f"]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_key_with_which_everybody_could_read_the_secret_is_refused(point):
    with pytest.raises(ConfigError, match="is none"):
        seal_secret(point, SECRET, 3, 9)
    with pytest.raises(GrantRefused):
        AGENT.open(point + SEALED[32:], 3, 9)


@pytest.mark.parametrize("public, secret", [(b"", SECRET), (bytes(31), SECRET), (AGENT.public, b""),
                                            (AGENT.public, SECRET + b"x")])
def test_keys_and_secrets_of_another_size_are_refused(public, secret):
    with pytest.raises(ConfigError, match="32 bytes"):
        seal_secret(public, secret, 3, 9)


@pytest.mark.parametrize("field", ["lease", "epoch"])
def test_a_number_below_zero_is_no_lease_even_if_the_manager_says_so(agent, field):
    with pytest.raises(GrantRefused, match="no grant"):
        agent.admit(changed(**{field: -1}), NOW, SPARE, ())
