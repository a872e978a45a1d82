"""Owns group commit: concurrent calls of an organization share a transaction, and each gets its own verdicts after it.

It must not know the wire format; it takes checked events and answers with outcomes.
"""

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from service.database import Database
from service.domain.events import MERGED_EVENTS_MAX, Event, Outcome, TimeLimits, Verdict, time_violation
from service.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    Reason,
    ResourceExhausted,
    Unavailable,
    Violation,
)
from service.store import events as event_store
from service.store import metrics as metric_store
from service.store import organizations
from service.store.compiled import ByCatalog
from service.turns import Rate, overloaded

log = structlog.get_logger("metering.ingest")

# Two, so that one batch is being prepared while the other waits for the disk. More only wait for each other's cells.
TRANSACTIONS_MAX = 2
# Fewer wait for the transaction that runs: together they are one soon, and cost one commit instead of many. What is all
# or nothing is never together with others, and does not wait.
SECOND_TRANSACTION_EVENTS = 500
# A transaction waits for calls that are on their way in anyhow: until none came for so many turns of the loop, but not
# for longer than this. An idle loop turns in microseconds.
GATHERING_TURNS = 3
GATHERING_S = 0.02
# What waits of one organization: a few transactions' worth.
QUEUE_EVENTS_MAX = 40_000

ACCEPTED = Outcome(Verdict.ACCEPTED)
DUPLICATE = Outcome(Verdict.DUPLICATE)


class Batch(NamedTuple):
    """The events of one call: `items[i]` is the i-th event, or the violations that reject it.

    With `all_or_nothing` one event that cannot be stored refuses the call; unless `ignores_conflicts`, that is also one
    whose id is taken by other content.
    """

    items: Sequence[Event | tuple[Violation, ...]]
    all_or_nothing: bool = False
    ignores_conflicts: bool = False


@dataclass(slots=True, eq=False)
class _Call:
    batch: Batch
    answer: "asyncio.Future[list[Outcome]]"
    patient: bool


@dataclass(slots=True)
class _Queue:
    calls: deque[_Call] = field(default_factory=deque)
    events: int = 0  # of the calls that wait
    transactions: int = 0


class Ingest:
    """Takes batches of events and stores each event exactly once."""

    def __init__(
        self,
        database: Database,
        limits: TimeLimits,
        rate: Rate | None = None,
        *,
        queue_events_max: int = QUEUE_EVENTS_MAX,
    ) -> None:
        """Use `limits` for the timestamps of events that are not stored yet.

        An organization may bring events at this `rate` (None = any), and have about so many waiting.
        """
        self._database = database
        self._limits = limits
        self._rate = rate
        self._queue_events_max = queue_events_max
        self._queues: dict[str, _Queue] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # The version is looked up in every transaction, under the lock that keeps it from moving; so this is only ever
        # an optimization.
        self._statements: ByCatalog[event_store.IngestStatements] = ByCatalog()

    async def ingest(self, organization: str, batch: Batch, *, patient: bool = False) -> list[Outcome]:
        """Store the batch's events and return one outcome per event once they are committed.

        The caller's cancellation withdraws a batch that still waits; one that was taken is stored all the same.
        Raises InvalidArgument or AlreadyExists when `all_or_nothing` fails (nothing is stored then), ResourceExhausted
        when there is no room for it (nor is anything stored then; who is `patient` waits instead), Unavailable when the
        database does not answer (the outcome is then unknown).
        """
        if patient and self._rate is not None:
            await self._rate.wait(organization)
        waiting = self._queues[organization].events if organization in self._queues else 0
        if not patient and waiting and waiting + len(batch.items) > self._queue_events_max:
            raise overloaded(f"{waiting:,} events of this organization wait to be stored")
        if self._rate is not None:
            self._rate.take(organization, len(batch.items))
        queue = self._queues.setdefault(organization, _Queue())
        call = _Call(batch, asyncio.get_running_loop().create_future(), patient)
        queue.calls.append(call)
        queue.events += len(batch.items)
        is_due = batch.all_or_nothing or queue.events >= SECOND_TRANSACTION_EVENTS
        if not queue.transactions or (queue.transactions < TRANSACTIONS_MAX and is_due):
            queue.transactions += 1
            task = asyncio.create_task(self._drain(organization, queue))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            return await call.answer
        except asyncio.CancelledError:
            # One that still waits is given up at once, with the memory that it holds.
            with contextlib.suppress(ValueError):
                queue.calls.remove(call)
                queue.events -= len(batch.items)
            raise

    async def close(self) -> None:
        """Wait until every batch that was taken is answered."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _drain(self, organization: str, queue: _Queue) -> None:
        try:
            while queue.calls:
                await _gather(queue)
                if calls := _take(queue):
                    await self._answer(organization, calls)
        finally:
            queue.transactions -= 1
            if not queue.calls and not queue.transactions:
                self._queues.pop(organization, None)

    async def _answer(self, organization: str, calls: Sequence[_Call]) -> None:
        try:
            answers = await self._commit(
                organization, [call.batch for call in calls], patient=any(call.patient for call in calls)
            )
        except Exception as error:
            if len(calls) > 1 and isinstance(error, DeadlineExceeded):
                # Too much for the time that a statement has, when it is done together.
                half = len(calls) // 2
                for part in (calls[:half], calls[half:]):
                    if left := [call for call in part if not call.answer.done()]:
                        await self._answer(organization, left)
                return
            if len(calls) > 1 and not isinstance(error, Unavailable | ResourceExhausted):
                # One caller's events must not fail the others'. (When the database is away, or too much is in flight,
                # trying alone cannot help and the callers are told so.)
                log.warning("shared transaction failed; retrying each call alone", calls=len(calls), error=repr(error))
                for call in calls:
                    if not call.answer.done():
                        await self._answer(organization, [call])
                return
            for call in calls:
                if not call.answer.done():
                    call.answer.set_exception(error)
            return
        for call, outcomes in zip(calls, answers, strict=True):
            if not call.answer.done():
                call.answer.set_result(outcomes)

    async def _commit(self, organization: str, batches: Sequence[Batch], *, patient: bool) -> list[list[Outcome]]:
        items = [item for batch in batches for item in batch.items]
        # A batch that is all or nothing is never together with others.
        refused = _refused(batches[0])
        outcomes = await self._database.write(
            organization, lambda c: self._store(c, organization, items, refused), patient=patient
        )
        ends = [0]
        for batch in batches:
            ends.append(ends[-1] + len(batch.items))
        return [outcomes[start:end] for start, end in itertools.pairwise(ends)]

    async def _store(
        self,
        connection: AsyncConnection,
        organization: str,
        items: Sequence[Event | tuple[Violation, ...]],
        refused: Sequence[Verdict],
    ) -> list[Outcome]:
        """Decide every item inside one transaction. The first of equal ids in `items` speaks for the id.

        Any of the `refused` verdicts rolls it back.
        """
        sorted_out = _sort_out(items, datetime.now(UTC), self._limits)
        outcomes, fresh, late = sorted_out.outcomes, sorted_out.fresh, sorted_out.late
        accepted: set[str] = set()
        if fresh:
            statements = await self._current_statements(connection, organization)
            accepted = await event_store.insert_events(connection, organization, statements, list(fresh.values()))
            for transaction_id in accepted:
                outcomes[sorted_out.first[transaction_id]] = ACCEPTED
        undecided = [i for i, outcome in enumerate(outcomes) if outcome is None]
        events = {i: item for i in undecided if isinstance(item := items[i], Event)}
        for i, differing in (await _compare(connection, organization, events)).items():
            outcomes[i] = _stored_outcome(differing)
        for i, violation in late.items():
            # Stored before, it is answered as stored; if its id was stored just now, that was by another event.
            if outcomes[i] is None or events[i].transaction_id in accepted:
                outcomes[i] = Outcome(Verdict.REJECTED, (violation,))
        decided = [outcome for outcome in outcomes if outcome is not None]
        if len(decided) < len(items):
            raise AssertionError("an event was neither stored by this transaction nor found to be stored")
        _refuse(decided, refused)
        return decided

    async def _current_statements(self, connection: AsyncConnection, organization: str) -> event_store.IngestStatements:
        await organizations.lock_shared(connection, organization)
        version = await organizations.catalog_version(connection, organization)
        known = self._statements.find(organization, version)
        if known is None:
            metrics = await metric_store.event_metrics(connection, organization)
            # In a thread: an organization with many metrics must not keep the others' calls from the loop.
            compiled = await asyncio.to_thread(event_store.ingest_statements, metrics)
            known = self._statements.keep(organization, version, len(metrics), compiled)
        return known


async def _gather(queue: _Queue) -> None:
    """Wait as long as calls with few events keep coming: together they are one transaction."""
    clock = asyncio.get_running_loop().time
    ends, known, quiet = clock() + GATHERING_S, queue.events, 0
    while quiet < GATHERING_TURNS and known < SECOND_TRANSACTION_EVENTS and clock() < ends:
        await asyncio.sleep(0)
        quiet = quiet + 1 if queue.events == known else 0
        known = queue.events


def _take(queue: _Queue) -> list[_Call]:
    """Remove from the queue what one transaction takes: up to 10,000 events, or one all-or-nothing call alone."""
    taken: list[_Call] = []
    events = 0
    while queue.calls:
        call = queue.calls[0]
        left = call.answer.done()  # its caller did
        if not left and taken and (call.batch.all_or_nothing or events + len(call.batch.items) > MERGED_EVENTS_MAX):
            break
        queue.calls.popleft()
        queue.events -= len(call.batch.items)
        if left:
            continue
        taken.append(call)
        events += len(call.batch.items)
        if call.batch.all_or_nothing:
            break
    return taken


class _SortedOut(NamedTuple):
    """Items by what is to be done: `outcomes` known already, else None; events to insert, with the index of the item
    that speaks for each id; and those whose time is refused unless they are stored.
    """

    outcomes: list[Outcome | None]
    fresh: dict[str, Event]
    first: dict[str, int]
    late: dict[int, Violation]


def _sort_out(items: Sequence[Event | tuple[Violation, ...]], now: datetime, limits: TimeLimits) -> _SortedOut:
    found = _SortedOut([None] * len(items), {}, {}, {})
    for i, item in enumerate(items):
        if not isinstance(item, Event):
            found.outcomes[i] = Outcome(Verdict.REJECTED, item)
        elif violation := time_violation("timestamp", item.timestamp, now, limits):
            found.late[i] = violation
        elif item.transaction_id not in found.fresh:
            found.fresh[item.transaction_id] = item
            found.first[item.transaction_id] = i
    return found


async def _compare(connection: AsyncConnection, organization: str, events: dict[int, Event]) -> dict[int, list[str]]:
    """Return, for each event whose id is stored, the fields in which it differs; none = the same content."""
    if not events:
        return {}
    ids = sorted({event.transaction_id for event in events.values()})
    digests = await event_store.stored_digests(connection, organization, ids)
    same: dict[int, list[str]] = {
        i: [] for i, event in events.items() if digests.get(event.transaction_id) == event.digest
    }
    other = {i: event for i, event in events.items() if i not in same and event.transaction_id in digests}
    return same | (await event_store.differing_fields(connection, organization, other) if other else {})


def _stored_outcome(differing: Sequence[str]) -> Outcome:
    if not differing:
        return DUPLICATE
    message = (
        f"was stored before with other content ({', '.join(differing)}); nothing changed. "
        "Send another fact under another id"
    )
    return Outcome(Verdict.CONFLICT, (Violation("transaction_id", Reason.IDEMPOTENCY_CONFLICT, message),))


def _refused(batch: Batch) -> Sequence[Verdict]:
    """Return the verdicts that no event of a batch may get."""
    if not batch.all_or_nothing:
        return ()
    return (Verdict.REJECTED,) if batch.ignores_conflicts else (Verdict.REJECTED, Verdict.CONFLICT)


def _refuse(outcomes: Sequence[Outcome], verdicts: Sequence[Verdict]) -> None:
    """Raise, and so roll the transaction back, if an event got one of the verdicts."""
    for verdict in verdicts:
        violations = [
            Violation(f"events[{i}].{violation.field}", violation.reason, violation.message)
            for i, outcome in enumerate(outcomes)
            if outcome.verdict is verdict
            for violation in outcome.violations
        ]
        if violations and verdict is Verdict.REJECTED:
            raise InvalidArgument(violations)
        if violations:
            first = violations[0]
            raise AlreadyExists(
                first.reason,
                f"{first.field} {first.message}. No event of this call was stored.",
                metadata={"field": first.field, "violations": str(len(violations))},
                violations=violations,
            )
