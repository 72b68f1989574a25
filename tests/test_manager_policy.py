"""The manager's policy file, fairness in the cluster, and what explaining a demand says."""

from __future__ import annotations

import os
import pwd
from itertools import count
from pathlib import Path

import pytest

from rfaas_mpi.errors import ConfigError
from rfaas_mpi.leases import LeaseBook, NodeDrained, NodeReport, NodeSilent, NodeTraits
from rfaas_mpi.manager.cluster import Cluster
from rfaas_mpi.manager.core import Granted, Refused
from rfaas_mpi.manager.policy import Policy, load_policy
from rfaas_mpi.messages import LeaseRequest
from rfaas_mpi.placement import Placer

GIB = 1 << 30
_ids = count(1)
_clocks = count(1)


def written(directory: Path, text: str) -> Path:
    path = directory / "manager.toml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_policy_file_says_who_may_what_and_how_much(tmp_path):
    me = pwd.getpwuid(os.getuid()).pw_name
    policy = load_policy(written(tmp_path, f"""
        lenders = ["root", 990]
        admins = ["{me}", "1000"]
        [placement]
        policy = "two-choices"
        min_age_s = 2
        sample = 16
        bandwidth = [1e10, 5e9]
        [quota]
        cores = 256
        users = {{1001 = 512, "{me}" = 8}}
        [fairness]
        half_life_s = 3600
        weights = {{1001 = 2}}
    """))
    assert policy.lenders == {0, 990} and policy.admins == {os.getuid(), 1000}
    assert policy.placement == "two-choices"
    assert (policy.settings.min_age_s, policy.settings.sample, policy.settings.bandwidth) == (2.0, 16, (1e10, 5e9))
    assert (policy.quota(5), policy.quota(1001), policy.quota(os.getuid())) == (256, 512, 8)
    assert policy.half_life_s == 3600.0 and policy.weights == {1001: 2.0}
    assert load_policy(written(tmp_path, "")) == Policy()


@pytest.mark.parametrize("text, said, hint", [
    ("lender = []", "sets 'lender', and there is no such key", "did you mean 'lenders'"),
    ("[quota]\ncore = 3", "sets quota.'core'", "did you mean 'cores'"),
    ("[placement]\nwhat = 3", "sets placement.'what'", "there are: "),
    ("[placement]\npolicy = 'best'", "placement.policy = 'best'", "one of default"),
    ("[placement]\nsample = 0", "placement.sample = 0", "whole number"),
    ("[placement]\nmin_age_s = -1", "placement.min_age_s = -1", "isn't negative"),
    ("[placement]\nbandwidth = []", "placement.bandwidth", "a list"),
    ("[placement]\nbandwidth = [0]", "placement.bandwidth", "above 0"),
    ("[quota]\ncores = 1.5", "quota.cores = 1.5", "a number of cores"),
    ("[quota]\nusers = {nobody-like-that = 3}", "quota.users = 'nobody-like-that'", "a user of this machine"),
    ("[fairness]\nhalf_life_s = 0", "fairness.half_life_s = 0", "above 0"),
    ("[fairness]\nweights = {1 = true}", "fairness.weights.1", "a number"),
    ("[prices]\ncore_h = -1", "prices.core_h = -1", "isn't negative"),
    ("[prices]\ncore = 1", "sets prices.'core'", "did you mean 'core_h'?"),
    ("lenders = 0", "lenders = 0", "a list of users"), ("admins = [true]", "admins = True", "name or number"),
    ("quota = 3", "quota = 3", "a table"), ("x = ", "is no TOML", "")])
def test_a_policy_that_is_not_possible_is_refused_by_name(tmp_path, text, said, hint):
    with pytest.raises(ConfigError) as caught:
        load_policy(written(tmp_path, text))
    assert said in str(caught.value) and hint in caught.value.hint


def test_a_policy_that_others_could_have_written_is_refused(tmp_path):
    path = written(tmp_path, "")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="other users could have written"):
        load_policy(path)
    with pytest.raises(ConfigError, match="there is no policy file"):
        load_policy(tmp_path / "missing.toml")


# --- in a cluster ---------------------------------------------------------------

class Site:
    """A cluster whose nodes are chosen by a policy."""

    def __init__(self, policy: Policy = Policy()) -> None:
        self.placer = Placer(policy.placement, policy.settings)
        book = LeaseBook(self.placer, activate_within_s=20.0, epoch=10, quota=policy.quota)
        self.cluster = Cluster(book, 0.0, policy=policy, placer=self.placer)

    def report(self, node: str, cores: int = 4, now: float = 0.0, **more) -> None:
        self.cluster.report(0, NodeReport(node=node, spare=tuple(range(cores)), memory_bytes=8 * GIB, incarnation=1,
                                          clock_ns=next(_clocks), live=(), **more), now)

    def ask(self, workers: int | tuple[int, int] = 1, uid: int = 1000, now: float = 0.0, timeout_s: float = 0.0,
            **more) -> Granted | Refused | None:
        low, high = (workers, workers) if isinstance(workers, int) else workers
        actions = self.cluster.ask(uid, "s", LeaseRequest(next(_ids), low, high, 1, timeout_s=timeout_s, **more), now)
        return next((one for one in actions if isinstance(one, (Granted, Refused))), None)


def test_explaining_a_demand_grants_nothing_and_tells_of_every_node():
    site = Site()
    for name in ("a", "b", "c", "d"):
        site.report(name, hard_end=5.0 if name == "d" else None)
    site.cluster.manager.handle(NodeDrained("b"), 0.0)
    site.cluster.manager.handle(NodeSilent("c"), 0.0)
    found = site.cluster.explain(1000, "s", LeaseRequest(1, 2, 6, 1, least_s=60.0), 0.0)
    assert site.cluster.book.leases == []
    assert found.chosen == {"a": 4} and "4 available" in found.reason
    said = {verdict.node: verdict for verdict in found.nodes}
    assert said["a"].terms is not None and said["a"].workers == 4 and said["a"].terms.queueing_s > 0
    assert any("drained" in reason for reason in said["b"].refused)
    assert any("silent" in reason for reason in said["c"].refused)
    assert said["d"].refused == ("its window ends in 5 s, 60 s wanted",)
    # The same demand, in earnest.
    granted = site.ask((2, 6), least_s=60.0)
    assert isinstance(granted, Granted) and [lease.node for lease in granted.leases] == ["a"]


def test_explaining_shows_nobody_another_users_nodes():
    site = Site()
    site.report("a")
    own = NodeReport(node="x", spare=(0,), memory_bytes=GIB, incarnation=1, clock_ns=1, live=())
    site.cluster.report(1001, own, 0.0)
    assert [one.node for one in site.cluster.explain(1000, "s", LeaseRequest(1, 1, 1, 1), 0.0).nodes] == ["a"]
    assert [one.node for one in site.cluster.explain(1001, "s", LeaseRequest(1, 1, 1, 1), 0.0).nodes] == ["a", "x/1001"]


def test_a_quota_holds_in_a_cluster_and_holds_up_nobody_else():
    site = Site(Policy(cores_max=2))
    site.report("a")
    assert isinstance(site.ask(2), Granted)
    refused = site.ask(1)
    assert isinstance(refused, Refused) and "may hold 2 at a time" in refused.reason
    assert site.ask(1, timeout_s=60.0) is None and site.cluster.manager.waiting == 1
    assert isinstance(site.ask(2, uid=1001), Granted)


def test_what_an_agent_knows_of_its_node_reaches_the_choice():
    site = Site()
    site.report("busy", traits=NodeTraits(busy=tuple(range(4, 32))))
    site.report("quiet", cores=32)
    granted = site.ask(4)
    assert isinstance(granted, Granted) and {lease.node for lease in granted.leases} == {"quiet"}


def test_a_window_is_as_old_as_it_was_first_said_to_be():
    site = Site()
    for now, since in ((100.0, 50.0), (110.0, 50.3), (120.0, 49.8)):
        site.report("a", now=now, traits=NodeTraits(since=since))
        assert site.placer.view().nodes["a"].since == 50.0
    site.report("a", now=200.0, traits=NodeTraits(since=190.0))
    assert site.placer.view().nodes["a"].since == 190.0
    site.report("a", now=210.0)
    assert site.placer.view().nodes["a"].since is None


def test_who_had_more_than_a_share_costs_more_while_others_wait():
    site = Site()
    site.report("a", cores=4)
    assert isinstance(site.ask(3), Granted)
    assert site.ask(4, uid=1001, timeout_s=1e6, now=1.0) is None
    later = 86_400.0
    explained = {uid: site.cluster.explain(uid, "s", LeaseRequest(next(_ids), 1, 1, 1), later).nodes[0].terms
                 for uid in (1000, 1001)}
    assert explained[1001].fairness_s == 0.0
    # One user alone has no share to exceed; the one who waits has had nothing yet.
    assert explained[1000].fairness_s == 0.0
    site.cluster.book.held.add({1001: 1000.0}, later)
    terms = site.cluster.explain(1000, "s", LeaseRequest(next(_ids), 1, 1, 1), later).nodes[0].terms
    assert terms is not None and terms.fairness_s > 0
