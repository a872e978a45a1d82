"""Owns what a measurement is: sides that do the same work in turns, every answer checked, one set against the other.

Absolute times tell of the machine and of who else is on it; ratios of sides that ran in turns tell of the service.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeVar

Answer = TypeVar("Answer")


# What tells how many seconds of processor each process has taken.
_cpu: ContextVar[Callable[[], Mapping[str, float]]] = ContextVar("cpu", default=dict)


class WrongAnswer(Exception):
    """The service, or a limit, answered something else than it must; no figure is worth anything then."""


class Work(NamedTuple):
    """What one run of a side did: so many items in so many seconds, how long each single call took, and how many
    seconds of processor each process took meanwhile, as far as that is known.
    """

    done: int
    seconds: float
    waits: Sequence[float] = ()
    cpu: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Side:
    """One of those that do the same work. `run` times itself, so that it can prepare and check outside of the time."""

    name: str
    run: Callable[[], Awaitable[Work]]


@dataclass(frozen=True)
class Summary:
    """All runs of a side. Rates are items a second, waits seconds."""

    name: str
    runs: Sequence[Work]

    @property
    def rates(self) -> list[float]:
        """The rate of each run."""
        return [one.done / one.seconds for one in self.runs]

    @property
    def rate(self) -> float:
        """The median rate."""
        return statistics.median(self.rates)

    @property
    def cpu(self) -> Mapping[str, float]:
        """Seconds of processor per item, by process."""
        items = max(1, sum(one.done for one in self.runs))
        processes = dict.fromkeys(process for one in self.runs for process in one.cpu)
        return {process: sum(one.cpu.get(process, 0.0) for one in self.runs) / items for process in processes}

    def wait(self, percent: float) -> float:
        """Return the percentile of the waits of all runs together."""
        waits = sorted(wait for one in self.runs for wait in one.waits)
        return waits[min(len(waits) - 1, int(len(waits) * percent / 100))]

    @property
    def has_waits(self) -> bool:
        """Whether single calls were timed."""
        return any(one.waits for one in self.runs)


@dataclass(frozen=True)
class Target:
    """What was set out to be reached: `value` of the sides, at least or at most `bound`."""

    text: str
    value: Callable[[Mapping[str, Summary]], float]
    bound: float
    at_most: bool = False

    def is_met(self, sides: Mapping[str, Summary]) -> bool:
        """Say whether it was reached."""
        value = self.value(sides)
        return value <= self.bound if self.at_most else value >= self.bound


@dataclass(frozen=True)
class Comparison:
    """Sides that do the same work. `limits` names those that the others are set against."""

    title: str
    unit: str
    sides: Sequence[Side]
    limits: Sequence[str] = ()
    targets: Sequence[Target] = ()
    notes: Sequence[str] = ()
    # Most that a run may be repeated, where one is long; None = as often as asked for.
    rounds_max: int | None = None


@dataclass(frozen=True)
class Result:
    """A comparison that was made."""

    comparison: Comparison
    sides: Mapping[str, Summary]

    def ratio(self, side: str, limit: str) -> float:
        """Return the median over the rounds of the side's rate by the limit's of the same round."""
        return ratio(self.sides, side, limit)


def ratio(sides: Mapping[str, Summary], side: str, limit: str) -> float:
    """Return the median over the rounds of one side's rate by another's of the same round."""
    pairs = zip(sides[side].rates, sides[limit].rates, strict=True)
    return statistics.median(one / other for one, other in pairs)


def at_least(side: str, limit: str, bound: float) -> Target:
    """Build the target that a side reaches a share of a limit's rate."""
    return Target(f"{side} / {limit}", lambda sides: ratio(sides, side, limit), bound)


def best(prefix: str, sides: Mapping[str, Summary]) -> str:
    """Return the fastest of the sides whose names begin so."""
    return max((name for name in sides if name.startswith(prefix)), key=lambda name: sides[name].rate)


def at_least_of_best(side: str, prefix: str, bound: float) -> Target:
    """Build the target that a side reaches a share of the rate of the best of several limits."""
    return Target(f"{side} / best {prefix}", lambda sides: ratio(sides, side, best(prefix, sides)), bound)


async def compare(
    comparison: Comparison,
    rounds: int,
    *,
    cpu: Callable[[], Mapping[str, float]],
    progress: Callable[[str], None],
) -> Result:
    """Run every side once to warm up, then all of them in turns, each time in another order.

    `cpu` tells how much processor each process has taken so far; stopwatches ask it.
    """
    _cpu.set(cpu)
    runs: dict[str, list[Work]] = {side.name: [] for side in comparison.sides}
    for side in comparison.sides:
        progress(f"{comparison.title}: warming up {side.name}")
        await side.run()
    rounds = min(rounds, comparison.rounds_max or rounds)
    for number in range(rounds):
        turn = number % len(comparison.sides)
        for side in (*comparison.sides[turn:], *comparison.sides[:turn]):
            progress(f"{comparison.title}: round {number + 1} of {rounds}, {side.name}")
            runs[side.name].append(await side.run())
    return Result(comparison, {name: Summary(name, of_side) for name, of_side in runs.items()})


class Stopwatch:
    """Seconds from its making, of the clock and of the processors, and of single waits."""

    def __init__(self) -> None:
        self._cpu_before = _cpu.get()()
        self._began = time.perf_counter()
        self.waits: list[float] = []

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._began

    def done(self, number: int) -> Work:
        """Return what was done until now: so many items. What comes later, as checking, is not part of it."""
        seconds, before = self.seconds, self._cpu_before
        # One that was not there at the beginning was not at work for all of it.
        taken = {process: now - before[process] for process, now in _cpu.get()().items() if process in before}
        return Work(number, seconds, self.waits, taken)

    async def timed(self, call: Awaitable[Answer]) -> Answer:
        """Wait for a call and note how long that took."""
        began = time.perf_counter()
        answer = await call
        self.waits.append(time.perf_counter() - began)
        return answer


def must_be(what: str, found: object, expected: object) -> None:
    """Raise WrongAnswer unless they are equal."""
    if found != expected:
        raise WrongAnswer(f"{what} must be {expected!r} and is {found!r}")


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Keep the client's garbage collector, which may have much to look at, out of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
