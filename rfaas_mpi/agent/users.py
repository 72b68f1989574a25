"""As whom workers run: as the user who leased them, or as one of a pool of users that stands for him. Pure.

A pool's user stands for one user at a time, and for the same one again if that can be: what somebody left in files is
his own, and nobody else's for as long as there are others.
"""

from __future__ import annotations

from rfaas_mpi.errors import ServiceError

__all__ = ["Pool"]


class Pool:
    """Which of a pool's uids stands for whom."""

    def __init__(self, uids: range) -> None:
        self.uids = uids
        self._taken: dict[int, tuple[int, set[str]]] = {}        # user → what stands for him, and for what
        self._last: dict[int, int] = {}                          # uid → whom it stood for, longest ago first

    def __contains__(self, uid: int) -> bool:
        return uid in self.uids

    def take(self, user: int, what: str) -> tuple[int, bool]:
        """The uid that stands for the user until all that it was taken for is given back, and whether it is to be
        cleared first: this is its first use since another user had it, or since we began.

        ServiceError if all of them stand for others.
        """
        if user in self._taken:
            uid, uses = self._taken[user]
            uses.add(what)
            return uid, False
        uid = self._choose(user)
        clear = self._last.pop(uid, None) != user
        self._taken[user] = uid, {what}
        return uid, clear

    def _choose(self, user: int) -> int:
        busy = {uid for uid, _ in self._taken.values()}
        if (own := next((uid for uid, whose in self._last.items() if whose == user), None)) is not None:
            return own
        free = [uid for uid in self.uids if uid not in busy]
        if not free:
            raise ServiceError(f"each of the {len(self.uids)} users {self.uids[0]}-{self.uids[-1]} as whom workers run "
                               "stands for somebody already",
                               hint="ask for another lease; the administrator can make worker_pool larger")
        # By his number, so that it is the same one after a restart, too.
        first = user % len(self.uids)
        unused = sorted((uid for uid in free if uid not in self._last),
                        key=lambda uid: (self.uids.index(uid) - first) % len(self.uids))
        return unused[0] if unused else next(uid for uid in self._last if uid not in busy)

    def give_back(self, user: int, what: str) -> None:
        """Nothing runs any more of what it was taken for. Safe to call twice."""
        uid, uses = self._taken.get(user, (0, set()))
        uses.discard(what)
        if user in self._taken and not uses:
            del self._taken[user]
            self._last[uid] = user
