"""What a site decides: who lends to whom, who administers, how nodes are chosen, how much one user may have.

    # /etc/rfaas_mpi/manager.toml
    lenders = ["root", "slurm"]        # whose agents lend to everybody
    admins = ["root", 1000]

    [placement]
    policy = "default"                 # see docs/placement.md; the numbers of its score may stand here too
    min_age_s = 2.0

    [quota]
    cores = 256                        # one user's at a time
    users = {alice = 1024}

    [fairness]
    half_life_s = 86400
    weights = {alice = 2.0}

    [credit]                           # for users whose agents are lenders, see docs/placement.md
    weight = 1.0                       # a core-second lent makes up for so many used; 0: lending earns nothing
    half_life_s = 86400
    core_h_max = 1000                  # nobody has more
    extra_cores = 0                    # that it may add to a user's quota
    site = ["root", "slurm"]           # whose agents are the site's: they earn nothing themselves

    [prices]                           # of an hour; see Prices in accounts.py
    core_h = 0.02                      # a core that is held
    gib_h = 0.002                      # a GiB of memory that is held
    compute_h = 0.01                   # CPU time in kernels
    poll_h = 0.01                      # CPU time of workers that look for their next call
"""

from __future__ import annotations

import difflib
import math
import os
import pwd
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rfaas_mpi.config import trusted_text
from rfaas_mpi.errors import ConfigError
from rfaas_mpi.leases.held import HALF_LIFE_S
from rfaas_mpi.manager.accounts import Prices
from rfaas_mpi.manager.credit import Credit
from rfaas_mpi.placement import POLICIES, Settings

__all__ = ["Policy", "load_policy"]


@dataclass(frozen=True)
class Policy:
    """Who may do what, and how much.

    `lenders` are the uids whose agents lend to everybody; any other lends to its own user only. `cores_max` is what one
    user may hold at a time (None: any number), `cores_max_of` the same for some users. `weights`: a user with 2 may
    have twice as much as one with 1 before others come first. Agents of a uid in `site` are the site's, and nobody's
    own.
    """

    lenders: frozenset[int] = frozenset((0,))
    admins: frozenset[int] = frozenset((0,))
    placement: str = "default"
    settings: Settings = Settings()
    cores_max: int | None = None
    cores_max_of: Mapping[int, int] = field(default_factory=dict)
    half_life_s: float = HALF_LIFE_S
    weights: Mapping[int, float] = field(default_factory=dict)
    prices: Prices = Prices()
    credit: Credit = Credit()
    site: frozenset[int] = field(default_factory=lambda: frozenset((0, os.geteuid())))

    def quota(self, uid: int) -> int | None:
        """How many cores the user may hold at a time; None: any number."""
        return self.cores_max_of.get(uid, self.cores_max)


def load_policy(path: Path) -> Policy:
    """The policy in a TOML file. ConfigError that names file and key for what isn't known, or isn't possible."""
    try:
        text = trusted_text(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no policy file {path}", hint="leave it out for a policy of root alone") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the policy file {path} can't be read: {error}") from None
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None
    return _Reader(path).policy(found)


_NUMBERS = {item.name for item in fields(Settings)} - {"survival", "bandwidth"}


class _Reader:

    def __init__(self, path: Path) -> None:
        self._path = path

    def policy(self, found: dict[str, Any]) -> Policy:
        self._known("", found, {"lenders", "admins", "placement", "quota", "fairness", "prices", "credit"})
        placement = self._table("placement", found, {"policy", "bandwidth", *_NUMBERS})
        quota = self._table("quota", found, {"cores", "users"})
        fairness = self._table("fairness", found, {"half_life_s", "weights"})
        prices = self._table("prices", found, set(Prices.__struct_fields__))
        credit = self._table("credit", found, {"weight", "half_life_s", "core_h_max", "extra_cores", "site"})
        chosen = placement.pop("policy", "default")
        if chosen not in POLICIES:
            raise self._wrong("placement.policy", chosen, f"one of {', '.join(sorted(POLICIES))}")
        return Policy(
            lenders=self._users("lenders", found, Policy.lenders), admins=self._users("admins", found, Policy.admins),
            placement=chosen, settings=self._settings(placement),
            cores_max=None if "cores" not in quota else self._cores("quota.cores", quota["cores"]),
            cores_max_of=self._by_user("quota.users", quota.get("users", {}), self._cores),
            half_life_s=self._above_0("fairness.half_life_s", fairness.get("half_life_s", HALF_LIFE_S)),
            weights=self._by_user("fairness.weights", fairness.get("weights", {}), self._above_0),
            prices=Prices(**{name: self._number(f"prices.{name}", value) for name, value in prices.items()}),
            credit=Credit(
                weight=self._number("credit.weight", credit.get("weight", Credit.weight)),
                half_life_s=self._above_0("credit.half_life_s", credit.get("half_life_s", Credit.half_life_s)),
                core_s_max=3600 * self._number("credit.core_h_max", credit.get("core_h_max", Credit.core_s_max / 3600)),
                extra_cores=self._cores("credit.extra_cores", credit.get("extra_cores", Credit.extra_cores))),
            **({"site": self._users("credit.site", {"credit.site": credit["site"]}, frozenset())}
               if "site" in credit else {}))

    def _settings(self, found: dict[str, Any]) -> Settings:
        for name, value in found.items():
            if name == "bandwidth":
                if not isinstance(value, list) or not value:
                    raise self._wrong("placement.bandwidth", value, "a list of bytes per second, one for each level")
                for rate in value:
                    self._above_0("placement.bandwidth", rate)
                continue
            number = self._number(f"placement.{name}", value)
            if name in ("exact_to", "sample") and (number != int(number) or number < 1):
                raise self._wrong(f"placement.{name}", value, "a whole number above 0")
        return Settings(**{name: tuple(map(float, value)) if name == "bandwidth"
                           else int(value) if name in ("exact_to", "sample") else float(value)
                           for name, value in found.items()})

    # ---- parts -----------------------------------------------------------------------------------

    def _known(self, where: str, found: dict[str, Any], known: set[str]) -> None:
        for name in found:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ConfigError(f"{self._path} sets {where}{name!r}, and there is no such key",
                                  hint=f"did you mean {near[0]!r}?" if near
                                  else f"there are: {', '.join(sorted(known))}")

    def _table(self, name: str, found: dict[str, Any], known: set[str]) -> dict[str, Any]:
        table = found.get(name, {})
        if not isinstance(table, dict):
            raise self._wrong(name, table, f"a table: [{name}]")
        self._known(f"{name}.", table, known)
        return dict(table)

    def _users(self, name: str, found: dict[str, Any], default: frozenset[int]) -> frozenset[int]:
        if name not in found:
            return default
        users = found[name]
        if not isinstance(users, list):
            raise self._wrong(name, users, 'a list of users, like ["root", 1000]')
        return frozenset(self._uid(name, user) for user in users)

    def _by_user(self, name: str, found: Any, value: Any) -> dict[int, Any]:
        if not isinstance(found, dict):
            raise self._wrong(name, found, "a table: user = number")
        return {self._uid(name, user): value(f"{name}.{user}", given) for user, given in found.items()}

    def _uid(self, name: str, user: Any) -> int:
        if isinstance(user, str) and user.isascii() and user.isdigit():
            user = int(user)
        if isinstance(user, int) and not isinstance(user, bool) and 0 <= user < 1 << 32:
            return user
        if not isinstance(user, str):
            raise self._wrong(name, user, "a user's name or number")
        try:
            return pwd.getpwnam(user).pw_uid
        except KeyError:
            raise self._wrong(name, user, "a user of this machine, or his number") from None

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise self._wrong(name, value, "a number that isn't negative")
        return float(value)

    def _above_0(self, name: str, value: Any) -> float:
        if not self._number(name, value) > 0:
            raise self._wrong(name, value, "a number above 0")
        return float(value)

    def _cores(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(name, value, "a number of cores")
        return value

    def _wrong(self, name: str, value: Any, takes: str) -> ConfigError:
        return ConfigError(f"{name} = {value!r} in {self._path} is not possible", hint=f"it is {takes}")
