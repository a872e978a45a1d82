"""Owns who goes next where only so many can go at once: fairly by organization, and not after waiting too long.

Raises ResourceExhausted where waiting has no point; whoever is refused here has had nothing done.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from service.errors import Reason, ResourceExhausted

# How long one may wait for a turn.
WAIT_S = 10.0
# A queue that was never empty for STANDING_S, and whose first has waited for STANDING_WAIT_S, stands: more comes than
# goes. To go on in the order of coming would make everyone late. So whoever has waited for so long is refused, and the
# last that came goes first. (Controlled delay and adaptive LIFO.)
STANDING_S = 1.0
STANDING_WAIT_S = 1.0


class _Waiting(NamedTuple):
    turn: "asyncio.Future[None]"
    since: float


class Turns:
    """So many at once; those who wait are let in one organization after the other, of each the first that came.

    When there are too many, see STANDING_S; or they wait for WAIT_S, where there are never many for long.
    """

    def __init__(self, at_once: int, *, sheds: bool = False) -> None:
        """Let `at_once` go at the same time; a queue that stands is cut if it `sheds`."""
        self._free = at_once
        self._sheds = sheds
        # The organizations in the order of their turns.
        self._waiting: dict[str, deque[_Waiting]] = {}
        self._waiting_since = 0.0

    async def take(self, organization: str, *, patient: bool = False) -> None:
        """Wait for a turn, which must be given back; raises ResourceExhausted.

        Who is patient waits for ever, where nothing is shed: some other rule keeps them few.
        """
        if self._free and not self._waiting:
            self._free -= 1
            return
        loop = asyncio.get_running_loop()
        if not self._waiting:
            self._waiting_since = loop.time()
        one = _Waiting(loop.create_future(), loop.time())
        self._waiting.setdefault(organization, deque()).append(one)
        too_late = None if patient else loop.call_later(WAIT_S, self._refuse, organization, one)
        try:
            await one.turn
        except asyncio.CancelledError:
            if one.turn.done() and not one.turn.cancelled() and one.turn.exception() is None:
                self.give_back()  # it left just as it was let in
            else:
                self._forget(organization, one)
            raise
        finally:
            if too_late is not None:
                too_late.cancel()

    def give_back(self) -> None:
        """End a turn; whoever is next goes."""
        now = asyncio.get_running_loop().time()
        while self._waiting:
            organization = next(iter(self._waiting))
            queue = self._waiting.pop(organization)
            stood = now - self._waiting_since > STANDING_S and now - queue[0].since > STANDING_WAIT_S
            standing = self._sheds and stood
            if standing:
                _refuse_late(queue, now)
            if not queue:
                continue
            one = queue.pop() if standing else queue.popleft()
            if queue:
                self._waiting[organization] = queue  # behind the others
            if not one.turn.done():
                one.turn.set_result(None)
                return
        self._free += 1

    def _refuse(self, organization: str, one: _Waiting) -> None:
        if not one.turn.done():
            self._forget(organization, one)
            one.turn.set_exception(overloaded())

    def _forget(self, organization: str, one: _Waiting) -> None:
        queue = self._waiting.get(organization, deque())
        if one in queue:
            queue.remove(one)
            if not queue:
                del self._waiting[organization]


def _refuse_late(queue: deque[_Waiting], now: float) -> None:
    while queue and now - queue[0].since > STANDING_WAIT_S:
        late = queue.popleft()
        if not late.turn.done():
            late.turn.set_exception(overloaded())


class Places:
    """So many at once, and of one organization so many; one more is refused, not kept waiting."""

    def __init__(self, what: str, most: int, most_of_one: int) -> None:
        """Have places for `what`."""
        self._what = what
        self._most = most
        self._most_of_one = most_of_one
        self._taken = 0
        self._taken_by: dict[str, int] = {}

    @contextmanager
    def held(self, organization: str) -> Iterator[None]:
        """Hold a place while the block runs; raises ResourceExhausted."""
        own = self._taken_by.get(organization, 0)
        if self._taken >= self._most:
            raise overloaded(f"The server has {self._most:,} {self._what}, which is all it takes")
        if own >= self._most_of_one:
            text = f"This organization has {own:,} {self._what}, which is all that one may have"
            raise ResourceExhausted(Reason.ORGANIZATION_LIMIT, f"{text}; nothing was done.", retry_after_s=1)
        self._taken += 1
        self._taken_by[organization] = own + 1
        try:
            yield
        finally:
            self._taken -= 1
            self._taken_by[organization] -= 1
            if not self._taken_by[organization]:
                del self._taken_by[organization]


class Rate:
    """So many a second of each organization; after a pause at once as many as a second's, or as one call can bring, and
    the call after that on credit.
    """

    def __init__(self, per_second: float, at_once: float) -> None:
        """Let `per_second` pass, and `at_once` after a pause."""
        self._per_second = per_second
        self._at_once = max(per_second, at_once)
        # When what an organization brought will have been worked off; one that is not in debt is not in here for long.
        self._paid_off: dict[str, float] = {}

    async def wait(self, organization: str) -> None:
        """Wait until the organization may bring its next, for who can wait instead of being refused."""
        # What others of the organization bring meanwhile makes it longer.
        for wait_s in iter(lambda: self._wait_s(organization), 0.0):
            await asyncio.sleep(wait_s)

    def _wait_s(self, organization: str) -> float:
        now = asyncio.get_running_loop().time()
        return max(0.0, self._paid_off.get(organization, now) - now - self._at_once / self._per_second)

    def take(self, organization: str, number: int) -> None:
        """Count what the organization brings; raises ResourceExhausted, and counts nothing, if it has to wait."""
        if wait_s := self._wait_s(organization):
            raise ResourceExhausted(
                Reason.INGEST_RATE,
                f"This organization sends more than {self._per_second:g} events a second; nothing was stored.",
                retry_after_s=wait_s,
                metadata={"events_per_second": f"{self._per_second:g}"},
            )
        now = asyncio.get_running_loop().time()
        if len(self._paid_off) > 10_000:
            self._paid_off = {name: at for name, at in self._paid_off.items() if at > now}
        self._paid_off[organization] = max(now, self._paid_off.get(organization, now)) + number / self._per_second


def overloaded(text: str = "The server has too much in flight") -> ResourceExhausted:
    """Return the error of a call that there is no room for."""
    return ResourceExhausted(Reason.OVERLOADED, f"{text}; nothing was done.", retry_after_s=1)
