"""`rfaas doctor` where a manager is named: its version, its clock, its certificate, and this node's agent."""

from __future__ import annotations

import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from email.utils import formatdate
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from managed import ME, Managed

from rfaas_mpi import api, skew
from rfaas_mpi._version import __version__
from rfaas_mpi.cli import manager_checks
from rfaas_mpi.cli.checks import Check
from rfaas_mpi.cli.manager_checks import agent_here, certificate, clock, version
from rfaas_mpi.client import Greeting, ManagerAddress
from rfaas_mpi.config import Settings
from rfaas_mpi.leases import NodeView
from rfaas_mpi.manager.callers import Callers

WHERE = ManagerAddress.parse("http://head:4712")
DAY_S = 86_400


def greeting(ahead_s: float = 0.0, took_s: float = 0.0, **changes: object) -> Greeting:
    """Of a manager whose clock is so far ahead, read just when it turned to a new second."""
    return Greeting(WHERE, __version__, formatdate(1_800_000_000 + ahead_s, usegmt=True), 1_800_000_000.0,
                    took_s)._replace(**changes)


# --- clocks -----------------------------------------------------------------------------------------

def test_clocks_that_agree_are_said_to_with_the_bound_that_one_answer_gives():
    check = clock(greeting())
    assert check.ok and check.reason == "no more than 1.0 s from this node's"
    assert check.facts == {"skew_s": 0.5, "bound_s": 0.5}


@pytest.mark.parametrize(("ahead_s", "which"), [(60, "60.5 s ahead of"), (-60, "59.5 s behind")])
def test_clocks_that_are_apart_are_named_with_the_way_out(ahead_s, which):
    check = clock(greeting(ahead_s))
    assert not check.ok and not check.needed
    assert check.reason == f"{which} this node's, give or take 0.5 s"
    assert "NTP" in check.fix and "timedatectl" in check.fix


def test_a_slow_answer_proves_no_skew():
    """It may have read its clock at any time in those 20 s."""
    check = clock(greeting(8, took_s=20.0))
    assert check.ok and check.facts["bound_s"] == 10.5
    assert not clock(greeting(40, took_s=20.0)).ok


@pytest.mark.parametrize("ahead_s", [-3, -1, 0, 1, 3])
@pytest.mark.parametrize("took_s", [0.0, 0.3, 2.0])
def test_the_true_skew_is_within_the_bound(ahead_s, took_s):
    for read_at in (0.0, took_s / 2, took_s):        # when the manager read its clock
        for cut in (0.0, 0.4, 0.999):                # what it left out of the second
            asked_at = 1_800_000_000.0
            theirs = asked_at + read_at + ahead_s + cut
            date = formatdate(int(theirs), usegmt=True)
            found = clock(Greeting(WHERE, __version__, date, asked_at, took_s)).facts
            true_skew = theirs - (asked_at + read_at)
            assert abs(found["skew_s"] - true_skew) <= found["bound_s"] + 0.002


@pytest.mark.parametrize("date", ["", "yesterday", "Mon, 99 Foo 2026 00:00:00 GMT"])
def test_an_answer_without_a_time_is_no_crash(date):
    check = clock(greeting(date=date))
    assert not check.ok and check.fix


# --- versions ---------------------------------------------------------------------------------------

def test_the_manager_s_version_is_told_and_whether_it_works_with_ours():
    assert version(greeting()).reason == f"{__version__}, as here"
    far = version(greeting(version="7.0.0"))
    assert not far.ok and "7.0.0" in far.reason and __version__ in far.reason and "minor" in far.fix
    assert far.facts == {"version": "7.0.0", "here": __version__}
    major, minor, *_ = (int(part) for part in __version__.split("."))
    near = version(greeting(version=f"{major}.{minor + 1}.0"))
    assert near.ok and "works with it" in near.reason
    assert not version(greeting(version="nonsense!")).ok
    assert version(greeting(version="")).ok


# --- certificates -----------------------------------------------------------------------------------

def made(where: Path, *, begins: float = -1, ends: float = 30, name: str = "127.0.0.1") -> ssl.SSLContext:
    """A certificate signed by itself in cert.pem, for so many days from now; the manager's side of it."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "the site")])
    now = datetime.now(timezone.utc)
    signed = (x509.CertificateBuilder().subject_name(issuer).issuer_name(issuer).public_key(key.public_key())
              .serial_number(x509.random_serial_number()).not_valid_before(now + timedelta(days=begins))
              .not_valid_after(now + timedelta(days=ends))
              .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(name))]), critical=False)
              .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
              .sign(key, hashes.SHA256()))
    (where / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (where / "key.pem").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(where / "cert.pem", where / "key.pem")
    return context


@contextmanager
def managed(where: Path, tls: ssl.SSLContext | None = None) -> Iterator[dict[str, str]]:
    """A manager on a port, and the environment that names it."""
    with Managed(where, callers=Callers(keys={ME: where / "my.key"}), tls=tls) as manager:
        yield {"RFAAS_MANAGER": manager.network, "RFAAS_MANAGER_KEY_FILE": str(where / "my.key"),
               "RFAAS_AUTH": "key", "RFAAS_CA_FILE": str(where / "cert.pem") if tls else ""}


def found(environment: dict[str, str]) -> dict[str, Check]:
    settings = Settings(manager=environment["RFAAS_MANAGER"], auth="key",
                        manager_key_file=environment["RFAAS_MANAGER_KEY_FILE"],
                        ca_file=environment["RFAAS_CA_FILE"] or None)
    return {check.name: check for check in manager_checks.manager_checks(settings)}


def test_programs_read_the_fields_of_a_manager_s_lines(tmp_path):
    with managed(tmp_path, made(tmp_path)) as environment:
        done = subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", "doctor", "--json"], capture_output=True,
                              text=True, timeout=100, env={**os.environ, **environment,
                                                           "RFAAS_RUNTIME_DIR": str(tmp_path)})
    lines = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert lines["manager"]["ok"] and lines["manager"]["facts"]["nodes"] == 0
    assert lines["manager version"]["facts"] == {"version": __version__, "here": __version__}
    assert lines["manager clock"]["ok"]
    assert abs(lines["manager clock"]["facts"]["skew_s"]) <= lines["manager clock"]["facts"]["bound_s"]
    shown = lines["certificate"]["facts"]
    assert lines["certificate"]["ok"] and shown["names"] == ["127.0.0.1"] and shown["issuer"] == "the site"
    assert 29 < shown["days_left"] <= 30
    assert not lines["agents"]["ok"] and lines["agents"]["fix"]
    assert lines["agent here"]["facts"]["lends"] is False


def test_without_tls_there_is_no_line_about_a_certificate(tmp_path):
    with managed(tmp_path) as environment:
        lines = found(environment)
    assert lines["manager version"].ok and lines["manager clock"].ok
    assert not any("certificate" in name for name in lines)


def test_a_certificate_that_ends_soon_is_a_warning_while_all_else_works(tmp_path):
    with managed(tmp_path, made(tmp_path, ends=13)) as environment:
        lines = found(environment)
    assert lines["manager"].ok
    check = lines["certificate"]
    assert not check.ok and not check.needed
    assert "for 127.0.0.1, by the site, until " in check.reason and "12 days from now" in check.reason
    assert "renewed" in check.fix and "--tls-cert" in check.fix


@pytest.mark.parametrize(("what", "why", "fix"), [
    ({"begins": -3, "ends": -1}, "expired", "renewed"),
    ({"begins": 1}, "not yet valid", "NTP"),
    ({"name": "127.0.0.2"}, "127.0.0.1", "name the manager in RFAAS_MANAGER"),
])
def test_a_certificate_that_is_not_believed_is_shown_with_the_way_out(tmp_path, what, why, fix):
    with managed(tmp_path, made(tmp_path, **what)) as environment:
        lines = found(environment)
    assert not lines["manager"].ok
    check = lines["certificate"]
    assert not check.ok and why in check.reason and fix in check.fix
    assert f"for {what.get('name', '127.0.0.1')}, by the site, until " in check.reason
    assert check.facts["names"] == [what.get("name", "127.0.0.1")]


def test_a_certificate_of_nobody_known_asks_for_who_certifies_it(tmp_path):
    with managed(tmp_path, made(tmp_path)) as environment:
        check = found({**environment, "RFAAS_CA_FILE": ""})["certificate"]
    assert not check.ok and "RFAAS_CA_FILE" in check.fix


@pytest.mark.parametrize(("days", "ok", "left"), [(14.5, True, "14 days"), (13.9, False, "13 days"),
                                                  (0.25, False, "6 hours")])
def test_two_weeks_are_left_to_renew_a_certificate(days, ok, left):
    check = certificate("certificate", manager_checks.Certificate(("head",), "us", 1e9 + days * DAY_S), None, now=1e9)
    assert check.ok is ok and f"{left} from now" in check.reason


def test_what_a_stranger_s_certificate_says_of_itself_is_only_text():
    shown = manager_checks.Certificate(("a\x1b[2Jb", *(f"n{number}" for number in range(20))), "x\ny", 1e9)
    assert str(shown).startswith("for a?[2Jb, n0, n1, ") and "n6 and 13 more, by x?y, until " in str(shown)


# --- managers that are not there, or none -----------------------------------------------------------

def test_a_manager_that_is_not_there_is_one_line(tmp_path):
    with managed(tmp_path) as environment:
        pass
    assert [name for name, check in found(environment).items() if not check.ok] == ["manager"]


class _Else(http.server.BaseHTTPRequestHandler):
    """Something that is no manager, an hour late."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response_only(200)
        self.send_header("Date", formatdate(time.time() - 3600, usegmt=True))
        self.send_header(skew.HEADER, "9.9.9")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        return


def test_the_clock_and_version_of_one_that_cannot_be_used_are_told_all_the_same(tmp_path):
    with managed(tmp_path) as environment:
        pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Else) as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.01,))
        thread.start()
        try:
            lines = found({**environment, "RFAAS_MANAGER": f"http://127.0.0.1:{other.server_port}"})
        finally:
            other.shutdown()
            thread.join()
    assert not lines["manager"].ok and not lines["manager version"].ok
    assert "behind" in lines["manager clock"].reason and not lines["manager clock"].ok


def test_of_several_managers_the_one_that_leads_is_looked_at(tmp_path):
    with managed(tmp_path) as environment:
        away = "http://127.0.0.1:1"
        lines = found({**environment, "RFAAS_MANAGER": f"{away},{environment['RFAAS_MANAGER']}"})
    assert lines["manager"].ok and lines["manager version"].ok and lines["manager clock"].ok


# --- this node's agent ------------------------------------------------------------------------------

def test_the_agent_of_this_node_is_told_as_the_manager_knows_it():
    view = NodeView("nid1", (0, 1, 2), (1,), (0, 2), 1 << 30, 1 << 29)
    lends = agent_here(api.Nodes((view,), {"nid1": "0.0.1"}), "nid1")
    assert lends.ok and lends.reason == "lends 3 cores, 1 core in use; version 0.0.1"
    assert lends.facts["spare"] == [0, 1, 2] and lends.facts["lent"] == [1]
    silent = agent_here(api.Nodes((NodeView("nid1", (0,), (), (), 1, 1, silent=True),)), "nid1")
    assert not silent.ok and silent.fix
    drained = agent_here(api.Nodes((NodeView("nid1", (0,), (), (), 1, 1, drained=True),)), "nid1")
    assert drained.ok and "undrain" in drained.reason
    assert agent_here(api.Nodes((view,)), "login1").facts == {"node": "login1", "lends": False}
