"""What `rfaas doctor` finds about the manager that RFAAS_MANAGER names: who answers, its clock, its certificate."""

from __future__ import annotations

import math
import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from rfaas_mpi import api, client, remote, skew
from rfaas_mpi._version import __version__
from rfaas_mpi.cli.checks import Check
from rfaas_mpi.client import Greeting, ManagerAddress, ManagerClient
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import RFaaSError, VersionMismatch

__all__ = ["Certificate", "agents", "certificate", "clock", "manager_checks", "version"]

SKEW_S = 3.0                     # clocks that NTP sets are a hundredth of a second apart
DAY_S = 86_400.0
RENEW_DAYS = 14
NAMES_MAX = 8                    # in one line

_NTP = ("have NTP set the clocks of both nodes: `timedatectl` or `chronyc tracking` says whether it does. MUNGE and "
        "certificates go by these clocks, and so do accounts' days; leases don't")
_RENEW = "have it renewed: the manager reads the file that --tls-cert names when it starts"
# OpenSSL's numbers for what is wrong with a certificate.
_EARLY, _EXPIRED, _OTHER_NAME, _OTHER_IP = 9, 10, 62, 64


def manager_checks(settings: Settings) -> Iterator[Check]:
    """Nothing where no manager is named. RFaaSError for settings that make no sense."""
    if settings.manager is None:
        return
    wait_s = settings.start_timeout_s
    with ManagerClient(settings) as manager:
        nodes: api.Nodes | None = None
        try:
            nodes = manager.call("nodes", wait_s=wait_s)
        except RFaaSError as error:
            yield Check("manager", False, Exception.__str__(error), error.hint)
        else:
            free = sum(len(view.free) for view in nodes.nodes)
            yield Check("manager", True,
                        f"{manager.address} knows who you are {manager.known_by}; cores that you could have now: "
                        f"{free}, on {len(nodes.nodes)} node{'' if len(nodes.nodes) == 1 else 's'}",
                        facts={"address": str(manager.address), "nodes": len(nodes.nodes), "free_cores": free})
        try:
            greeting = manager.greet(wait_s)
        except RFaaSError as error:
            if nodes is not None:
                yield Check("manager clock", False, f"can't be asked: {Exception.__str__(error)}", error.hint)
        else:
            yield version(greeting)
            yield clock(greeting)
    yield from _certificates(settings)
    if nodes is not None:
        yield agents(nodes)
        yield agent_here(nodes, socket.gethostname())


# --- its version and its clock ----------------------------------------------------------------------

def version(greeting: Greeting) -> Check:
    """Whether it works with ours."""
    theirs = greeting.version
    facts = {"version": theirs, "here": __version__}
    try:
        skew.check(theirs, f"the manager at {greeting.address}", "this node")
    except VersionMismatch as error:
        return Check("manager version", False, Exception.__str__(error), error.hint, facts=facts)
    except ValueError as error:
        return Check("manager version", False, f"what answers at {greeting.address} is no manager: {error}",
                     "correct RFAAS_MANAGER", facts=facts)
    if not theirs:
        return Check("manager version", True, "it doesn't say which", facts=facts)
    same = "as here" if theirs == __version__ else f"{__version__} here, which works with it"
    return Check("manager version", True, f"{theirs}, {same}", facts=facts)


def clock(greeting: Greeting) -> Check:
    """How far apart its clock and ours are, as far as one answer can tell: HTTP's times have whole seconds."""
    name = "manager clock"
    try:
        told = parsedate_to_datetime(greeting.date).timestamp()
    except (TypeError, ValueError, OverflowError):
        return Check(name, False, "the manager's answers don't say what time it is there",
                     "is something between you and the manager that removes the Date of its answers?")
    # It read its clock at some time between our question and its answer, and cut it to the second.
    bound_s = 0.5 + greeting.took_s / 2
    skew_s = told + 0.5 - (greeting.asked_at + greeting.took_s / 2)
    facts = {"skew_s": round(skew_s, 3), "bound_s": round(bound_s, 3)}
    if abs(skew_s) - bound_s > SKEW_S:
        which = "ahead of" if skew_s > 0 else "behind"
        return Check(name, False, f"{abs(skew_s):.1f} s {which} this node's, give or take {bound_s:.1f} s", _NTP,
                     facts=facts)
    return Check(name, True, f"no more than {abs(skew_s) + bound_s:.1f} s from this node's", facts=facts)


# --- its certificate --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Certificate:
    """What it says of itself."""

    names: tuple[str, ...]           # hosts and addresses that it is for
    issuer: str
    expires_at: float                # seconds since 1970

    def __str__(self) -> str:
        until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.expires_at))
        names = ", ".join(self.names[:NAMES_MAX]) or "no name"
        more = f" and {len(self.names) - NAMES_MAX} more" if len(self.names) > NAMES_MAX else ""
        said = f"for {names}{more}, by {self.issuer or 'nobody'}, until {until}"
        # Nobody has vouched yet for what one says that isn't believed, and this is for a terminal.
        return "".join(letter if letter.isprintable() else "?" for letter in said)


def _certificates(settings: Settings) -> Iterator[Check]:
    named = ManagerAddress.parse_all(settings.manager or "")
    for address in named:
        if address.scheme != "https":
            continue
        found = _certificate_at(address, settings, client.connect_s(settings, len(named)))
        if found is not None:
            name = "certificate" if len(named) == 1 else f"certificate of {address.authority}"
            yield certificate(name, *found, now=time.time())


def _certificate_at(address: ManagerAddress, settings: Settings,
                    wait_s: float) -> tuple[Certificate | None, ssl.SSLCertVerificationError | None] | None:
    """What is shown there, and why it isn't believed; None where nobody shows one."""
    context = client.tls_of(settings, address)
    assert context is not None
    try:
        with remote.connect(remote.Address(address.host, address.port), settings.tcp,
                            time.monotonic() + wait_s) as dialled:
            dialled.settimeout(wait_s)
            with context.wrap_socket(dialled, server_hostname=address.host) as within:
                return _read(within.getpeercert() or {}), None
    except ssl.SSLCertVerificationError as error:
        return _unproved(address, wait_s), error
    except OSError:
        return None                   # the line about the manager says it, or it stands by


def _read(shown: Mapping[str, Any]) -> Certificate:
    """What Python tells of a certificate that is believed."""
    issuer = {name: value for part in shown.get("issuer", ()) for name, value in part}
    return Certificate(tuple(value for _, value in shown.get("subjectAltName", ())),
                       issuer.get("commonName") or issuer.get("organizationName", ""),
                       float(ssl.cert_time_to_seconds(shown["notAfter"])))


def _unproved(address: ManagerAddress, wait_s: float) -> Certificate | None:
    """What a certificate says that isn't believed, to say what is wrong with it; None if it can't be read."""
    try:
        from cryptography import x509
        shown = x509.load_pem_x509_certificate(
            ssl.get_server_certificate((address.host, address.port), timeout=wait_s).encode())
        names = [str(each.value) for extension in shown.extensions
                 if isinstance(extension.value, x509.SubjectAlternativeName) for each in extension.value]
        issuer = [str(each.value) for each in shown.issuer.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
        return Certificate(tuple(names), ", ".join(issuer), shown.not_valid_after_utc.timestamp())
    except (ImportError, OSError, ValueError):
        return None


def certificate(name: str, shown: Certificate | None, problem: ssl.SSLCertVerificationError | None, *,
                now: float) -> Check:
    """Whether callers believe it, and for how much longer."""
    facts: dict[str, object] = {}
    if shown is not None:
        facts = {"names": list(shown.names), "issuer": shown.issuer, "expires_at": shown.expires_at,
                 "days_left": round((shown.expires_at - now) / DAY_S, 2)}
    if problem is not None:
        said = "" if shown is None else f"; it is {shown}"
        match problem.verify_code:
            case code if code == _EXPIRED:
                fix = _RENEW
            case code if code == _EARLY:
                fix = _NTP
            case code if code in (_OTHER_NAME, _OTHER_IP):
                fix = "name the manager in RFAAS_MANAGER as its certificate does, or have one made for that name"
            case _:
                fix = "RFAAS_CA_FILE names who certifies it"
        return Check(name, False, f"not believed: {problem.verify_message.rstrip('.')}{said}", fix, facts=facts)
    assert shown is not None
    days = (shown.expires_at - now) / DAY_S
    left = f"{math.floor(days)} days from now" if days >= 2 else f"{days * 24:.0f} hours from now"
    return Check(name, days >= RENEW_DAYS, f"{shown}, {left}", _RENEW, facts=facts)


# --- agents -----------------------------------------------------------------------------------------

def agents(found: api.Nodes) -> Check:
    """Whether those that lend to the caller can be reached."""
    nodes = found.nodes
    silent = [view.node for view in nodes if view.silent]
    drained = [view.node for view in nodes if view.drained]
    return Check("agents", bool(nodes) and not silent, agents_text(len(nodes), silent, drained),
                 "`systemctl status rfaas-agent` on such a node says why, or its log; nothing is lent there meanwhile"
                 if nodes else "start `rfaas agent` on the nodes that lend",
                 facts={"nodes": len(nodes), "silent": silent, "drained": drained})


def agents_text(nodes: int, silent: Sequence[str], drained: Sequence[str]) -> str:
    """How many report, and the names of the others."""
    if not nodes:
        return "none lends to you"
    said = [f"{nodes - len(silent)} of {nodes} report"]
    for what, which in (("silent", silent), ("drained", drained)):
        if which:
            more = f" and {len(which) - NAMES_MAX} more" if len(which) > NAMES_MAX else ""
            said.append(f"{what}: {', '.join(which[:NAMES_MAX])}{more}")
    return "; ".join(said)


def agent_here(found: api.Nodes, host: str) -> Check:
    """The one of this node, as the manager knows it; it need not have one."""
    name = "agent here"
    view = next((view for view in found.nodes if view.node == host), None)
    if view is None:
        return Check(name, True, f"none of {host} lends to you", facts={"node": host, "lends": False})
    theirs = found.versions.get(host, "")
    facts = {"node": host, "lends": True, "version": theirs, "silent": view.silent, "drained": view.drained,
             "spare": list(view.spare), "lent": list(view.lent)}
    said = [f"lends {_cores(view.spare)}, {_cores(view.lent)} in use"]
    said += ["drained: `rfaas undrain` has it lend again"] if view.drained else []
    said += [f"version {theirs}"] if theirs and theirs != __version__ else []
    if view.silent:
        said.append("silent: nothing is granted there until it reports")
    return Check(name, not view.silent, "; ".join(said),
                 "`systemctl status rfaas-agent` here says why, or its log", facts=facts)


def _cores(which: Iterable[int]) -> str:
    number = len(tuple(which))
    return f"{number} core{'' if number == 1 else 's'}"
