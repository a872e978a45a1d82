"""The way of usage record groups to the marketplace: nothing is lost, told twice, or told otherwise than it was used.

Random plans are run against a server and against a model in plain Python, which holds its own groups, records, reports
and leases; after every step all that the server shows must be what the model says, and the books must balance.
"""

import asyncio
import contextlib
import importlib
import itertools
import os
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import ROUND_DOWN, Decimal
from typing import Any, NamedTuple

import grpc
import pytest
import sqlalchemy as sa
from conftest import Client, running_server, timestamp
from faults import Fault, fault_of, read_fault, until
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from marketplace import complete, group, lease, report, reported, roll_up, sell
from structlog.testing import capture_logs

from metering.v1 import billable_metric_pb2, entitlement_pb2, event_pb2
from metering.v1 import usage_record_group_pb2 as group_pb2
from metering.v1 import usage_record_report_pb2 as report_pb2
from service import reporting
from service.database import Database
from service.domain.partners import with_changes
from service.domain.windows import cell_floor
from service.store import entitlements, record_reports

# More by hand: METERING_LIFECYCLE_EXAMPLES=2000
EXAMPLES = int(os.environ.get("METERING_LIFECYCLE_EXAMPLES", "25"))
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
# Little at once, so that much is carried; and nothing that depends on the day of the month.
MOST = {"AWS": 7, "AZURE": 9}
RULES = with_changes([f"{name}.quantity_max={most}" for name, most in MOST.items()] + ["AWS.month_end_hour=-1"])
ZERO = Decimal(0)
# So begins what is said of the records of a group that was reported in part, and does not validate any more.
NOT_VALID = "not valid any more"

TABLES = (
    *("usage_record_groups", "usage_records", "usage_record_reports", "usage_record_report_lines"),
    *("entitlement_carries", "usage_events", "usage_cells"),
)


@pytest.fixture(autouse=True)
def no_hourly_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers' own hourly jobs are off: tests say when an hour has ended."""

    async def idle(_: reporting.Reporting) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(reporting.Reporting, "run", idle)


# --- Plans


class Amounts(NamedTuple):
    """What a group holds, by dimension; or by region, if it is of the billable metric."""

    quantities: Mapping[str, str]
    billable: bool = False


class Planned(NamedTuple):
    """A group: of which entitlement, so many hours ago (None = now, -1 = ahead of the clock), and what it holds."""

    entitlement: int
    hours: int | None
    minute: int
    amounts: Amounts


class Report(NamedTuple):
    """Report groups, all in one call."""

    groups: tuple[Planned, ...]


class Again(NamedTuple):
    """Report a group again: as it was, or with another quantity."""

    group: int
    changed: bool


class Delete(NamedTuple):
    """Delete a group."""

    group: int


class Retry(NamedTuple):
    """Retry a group."""

    group: int


class RollUp(NamedTuple):
    """Let hours pass, and roll the last one up."""

    hours: int


class Lease(NamedTuple):
    """Lease reports with a token."""

    token: int
    partner: str
    most: int


class Expire(NamedTuple):
    """Let the leases of a token end (None = of all)."""

    token: int | None


class Complete(NamedTuple):
    """Complete a report, as its holder, as a former one, or as nobody; bit by bit says which lines failed."""

    report: int
    who: str
    failed: int


class Change(NamedTuple):
    """Change an entitlement: its dimensions, its end, or its state."""

    entitlement: int
    what: str


class Restart(NamedTuple):
    """Stop the server and start another one."""


class Crash(NamedTuple):
    """Do a step that fails in the middle of its transaction, before or after some work; then do it once more."""

    step: "Step"
    point: int
    after: bool


Step = Report | Again | Delete | Retry | RollUp | Lease | Expire | Complete | Change | Restart | Crash

TOKENS = 4
# Where a transaction can be made to fail, by the step that it belongs to.
POINTS: dict[type, tuple[str, ...]] = {
    Report: ("events.insert_events", "group_intake._insert_records"),
    Again: ("group_intake.report_groups",),
    Delete: ("events.void_events", "record_groups.derive_statuses", "cells.recompute_cells"),
    Retry: ("record_groups.derive_statuses", "record_groups._set_states"),
    RollUp: ("roll_up.carry", "roll_up._put_into", "record_groups.derive_statuses"),
    Lease: ("record_reports._fitting",),
    Complete: ("record_reports.carry", "record_reports._answer", "record_groups.derive_statuses"),
}

wholes = st.sampled_from(("0", "1", "2", "3", "7"))
parts = st.sampled_from(("0.4", "0.6", "0.999999", "1.6", "2.5", "0.000001", "6.7"))
quantities = st.one_of(parts, wholes)
amounts = st.one_of(
    st.builds(
        Amounts,
        st.one_of(
            st.fixed_dictionaries({"cpu": quantities}, optional={"mem": quantities}),
            st.fixed_dictionaries({"cpu": quantities, "mem": quantities}),
            st.fixed_dictionaries({"mem": quantities}),
        ),
        st.just(False),
    ),
    st.builds(Amounts, st.fixed_dictionaries({"eu": quantities}, optional={"us": quantities}), st.just(True)),
)
ENTITLEMENTS = ("AWS", "AWS", "AZURE")
planned = st.builds(
    Planned,
    st.integers(0, len(ENTITLEMENTS) - 1),
    st.sampled_from((None, None, 0, 1, 2, 5, -1)),
    st.sampled_from((0, 1, 59)),
    amounts,
)
indexes = st.integers(0, 30)
reports = st.builds(Report, st.lists(planned, min_size=1, max_size=4).map(tuple))
deletes = st.builds(Delete, indexes)
retries = st.builds(Retry, indexes)
roll_ups = st.builds(RollUp, st.sampled_from((0, 1, 1, 1, 2)))
leases = st.builds(Lease, st.integers(0, TOKENS - 1), st.sampled_from(("", "", "", "AWS", "AZURE")), st.integers(0, 3))
completes = st.builds(
    Complete,
    indexes,
    st.sampled_from(("holder",) * 5 + ("former", "nobody")),
    st.sampled_from((0, 0, 1, 2, 3, 7)),
)
again = st.builds(Again, indexes, st.booleans())
crashes = st.builds(
    Crash,
    st.one_of(reports, deletes, retries, roll_ups, leases, completes, again),
    st.integers(0, 2),
    st.booleans(),
)
changes = st.builds(Change, st.integers(0, 2), st.sampled_from(("dimensions", "dimensions", "end", "status")))
# What usually follows each other, so that plans get somewhere.
delivery = st.tuples(roll_ups, leases, completes, completes)
single = st.one_of(
    reports,
    reports,
    again,
    deletes,
    retries,
    retries,
    roll_ups,
    leases,
    completes,
    st.builds(Expire, st.one_of(st.none(), st.integers(0, TOKENS - 1))),
    changes,
    st.just(Restart()),
    crashes,
    crashes,
)
plans = st.lists(st.one_of(single.map(lambda one: (one,)), delivery), min_size=4, max_size=14).map(
    lambda groups: tuple(itertools.chain.from_iterable(groups))
)


def _planned(entitlement: int, hours: int | None = 0, **records: str) -> Planned:
    return Planned(entitlement, hours, 0, Amounts(records))


def _billable(entitlement: int, hours: int | None = 0, **records: str) -> Planned:
    return Planned(entitlement, hours, 0, Amounts(records, True))


# Every kind of step with something to do, in an order that takes groups all the way, and some of them round again.
WHOLE: tuple[Step, ...] = (
    Report(
        (_planned(0, cpu="1.6", mem="2.5"), _planned(0, 5, cpu="1"), _planned(1, cpu="0.4"), _billable(2, eu="1.6"))
    ),
    Report((_planned(0, cpu="0", mem="0"),)),
    Report((_planned(2, 1, cpu="6.7", mem="0.4"), _planned(2, None, cpu="2.5"), _billable(1, eu="0.6", us="1.6"))),
    *(Again(0, False), Again(0, True), Delete(1), Delete(1), Again(1, False), Retry(0)),
    *(RollUp(6), RollUp(0), Delete(0), Retry(0)),
    *(Lease(0, "AWS", 1), Lease(1, "", 0), Lease(0, "", 3), Lease(2, "", 0)),
    *(Report((_planned(0, cpu="0.6", mem="0.6"), _planned(1, None, cpu="0.4"))), RollUp(1), Lease(3, "", 0)),
    # The later report of the first entitlement is answered first; then some of the earlier one fails.
    *(Complete(3, "holder", 0), Complete(4, "holder", 0), Complete(0, "nobody", 1), Expire(None), Lease(2, "", 0)),
    *(Complete(0, "former", 1), Complete(0, "holder", 1), Complete(0, "holder", 1), Complete(0, "holder", 0)),
    *(Complete(1, "holder", 2), Complete(2, "holder", 3), Restart()),
    *(Retry(0), Retry(0), Delete(0), Retry(3), RollUp(1), Lease(0, "", 0), Lease(1, "", 0), Delete(0), Retry(0)),
    *(Complete(i, "holder", 0) for i in range(8)),
    *(Retry(0), Delete(0)),
    *(Report((_planned(1, cpu="0.4"), _planned(0, None, cpu="7"), _planned(0, None, cpu="6.7"))), RollUp(1)),
    *(Report((_planned(0, None, cpu="1"), _planned(1, 2, mem="1"))), RollUp(1)),
    *(Report((_planned(2, 0, mem="1"), _planned(2, 5, cpu="1"))), Change(2, "dimensions"), RollUp(1), Retry(12)),
    *(Delete(12), Delete(13), Change(2, "dimensions"), Report((_planned(2, 0, mem="3"),)), Change(2, "end"), RollUp(1)),
    *(Report((_planned(1, -1, cpu="1"),)), Change(1, "status"), Report((_planned(1, None, cpu="1"),)), RollUp(1)),
)
# The same way, each step failing before it succeeds, at each place.
FAILING: tuple[Step, ...] = tuple(
    Crash(one, i, after)
    for i, after in itertools.product(range(3), (False, True))
    for one in (
        Report((_planned(0, cpu="1.6", mem="0.4"), _planned(1, cpu="0.4"), _planned(2, None, mem="2.5"))),
        Delete(3 * (2 * i + after) + 1),
        RollUp(5),
        Lease(2 * i + after, "", 0),
        Complete(2 * (2 * i + after), "holder", 1),
        Complete(2 * (2 * i + after) + 1, "holder", 3),
        Retry(3 * (2 * i + after)),
    )
)


# --- The model


@dataclass
class Record:
    """A record by the model."""

    key: str
    quantity: Decimal
    state: str = "CREATED"
    report: "Rolled | None" = None
    failure: str = ""


@dataclass
class Group:
    """A group by the model."""

    message: Any
    entitlement: "Bought"
    at: datetime
    records: list[Record]
    report: "Rolled | None" = None
    ever_invalid: bool = False

    @property
    def waiting(self) -> list[Record]:
        """The records that wait for a report."""
        return [one for one in self.records if one.state == "CREATED"]

    @property
    def status(self) -> str:
        """What follows from the states of the records."""
        states = {one.state for one in self.records}
        order = ("CREATED", "REPORT_PENDING", "REPORT_FAILED", "INVALID", "REPORTED", "DELETED")
        return next(state for state in order if state in states)


@dataclass
class Line:
    """What a report says of a dimension, by the model."""

    key: str
    quantity: Decimal
    used: Decimal
    before: Decimal
    records: list[Record]
    outcome: str = "UNSPECIFIED"
    message: str = ""


@dataclass
class Rolled:
    """A report by the model."""

    entitlement: "Bought"
    hour: datetime
    groups: int
    lines: dict[str, Line]
    id: str = ""
    tokens: list[str] = field(default_factory=list)
    leased: bool = False
    leases: int = 0

    @property
    def status(self) -> str:
        """What follows from the outcomes of the lines."""
        outcomes = {one.outcome for one in self.lines.values()}
        return "PENDING" if "UNSPECIFIED" in outcomes else "FAILED" if "FAILED" in outcomes else "SUCCEEDED"

    @property
    def token(self) -> str:
        """Whose it is now, or was last."""
        return self.tokens[-1] if self.tokens else ""

    @property
    def told(self) -> list[Line]:
        """The lines that tell something, in order."""
        return [self.lines[key] for key in sorted(self.lines) if self.lines[key].quantity]


@dataclass
class Bought:
    """An entitlement by the model."""

    id: str
    partner: str
    customer_id: str
    dimensions: set[str]
    end: datetime | None = None
    cancelled: datetime | None = None

    def fits(self, at: datetime, keys: set[str]) -> bool:
        """Say whether usage of this time and these dimensions is usage under it."""
        in_term = (self.end is None or at < self.end) and (self.cancelled is None or at < self.cancelled)
        return in_term and keys <= {*self.dimensions, "calls"}


class Model:
    """All that was reported, and what became of it."""

    def __init__(self, entitlements: Sequence[Bought]) -> None:
        self.entitlements = entitlements
        self.groups: dict[str, Group] = {}
        self.reports: list[Rolled] = []

    def carried(self, entitlement: Bought, key: str) -> Decimal:
        """Return what is left over: what went into lines that did not fail, minus what they said."""
        lines = [one.lines[key] for one in self.reports if one.entitlement is entitlement and key in one.lines]
        return sum((one.used - one.quantity for one in lines if one.outcome != "FAILED"), ZERO)

    def waiting(self, entitlement: Bought, hour: datetime) -> list[Group]:
        """Return the groups that go into the report of an hour, if they are valid."""
        groups = [one for one in self.groups.values() if one.entitlement is entitlement and one.at < hour + HOUR]
        return [one for one in groups if one.waiting]

    def roll_up(self, hour: datetime, failing: str = "") -> int:
        """Roll an hour up; returns how many reports were made. `failing` says where each transaction fails."""
        made = 0
        for entitlement in self.entitlements:
            if any(one.entitlement is entitlement and one.hour == hour for one in self.reports):
                continue
            valid: list[Group] = []
            invalid: list[Group] = []
            for one in self.waiting(entitlement, hour):
                fits = entitlement.fits(one.at, {record.key for record in one.waiting})
                (valid if fits else invalid).append(one)
            unit = Decimal("0.000001") if entitlement.partner == "AZURE" else Decimal(1)
            in_force = entitlement.cancelled is None and (entitlement.end is None or entitlement.end > hour)
            found: dict[str, list[Record]] = {}
            if valid or in_force:
                # What was carried and is enough to be told is told, whether any of it was used since or not.
                keys = (*entitlement.dimensions, "mem", "calls")
                found = {key: [] for key in keys if self.carried(entitlement, key) >= unit}
            for record in (record for one in valid for record in one.waiting):
                found.setdefault(record.key, []).append(record)
            if failing and (found or (invalid and failing.endswith("derive_statuses"))):
                continue
            for one in invalid:
                in_part = any(record.state == "REPORTED" for record in one.records)
                one.ever_invalid = one.ever_invalid or not in_part
                for record in one.waiting:
                    record.state = "REPORT_FAILED" if in_part else "INVALID"
                    record.failure = NOT_VALID if in_part else ""
            if found:
                made += 1
                self._make(entitlement, hour, valid, found, unit)
        return made

    def _make(
        self,
        entitlement: Bought,
        hour: datetime,
        groups: Sequence[Group],
        found: Mapping[str, list[Record]],
        unit: Decimal,
    ) -> None:
        rolled = Rolled(entitlement, hour, len(groups), {})
        for key, records in found.items():
            used, before = sum((one.quantity for one in records), ZERO), self.carried(entitlement, key)
            most = min(max(used + before, ZERO), Decimal(MOST[entitlement.partner]))
            line = Line(key, most.quantize(unit, ROUND_DOWN), used, before, records)
            line.outcome = "UNSPECIFIED" if line.quantity else "REPORTED"
            rolled.lines[key] = line
        for one in groups:
            one.report = rolled
        for line in rolled.lines.values():
            for record in line.records:
                record.report = rolled
                record.state = "REPORT_PENDING" if line.quantity else "REPORTED"
        self.reports.append(rolled)

    def lease(self, token: str, partner: str, most: int) -> list[Rolled]:
        """Return the reports that a lease gives, and give them."""

        def urgency(one: Rolled) -> tuple[datetime, str]:
            return one.hour, one.id  # both partners take usage for as long

        held = [one for one in self.reports if one.token == token]
        if held:
            for one in held:
                if one.status == "PENDING" and not one.leased:
                    one.leased = True
                    one.leases += 1
            return sorted(held, key=urgency)
        free = [one for one in self.reports if one.status == "PENDING" and not one.leased]
        free = [one for one in free if partner in {"", one.entitlement.partner}]
        given = sorted(free, key=urgency)[: most or 25]
        for one in given:
            one.tokens.append(token)
            one.leased = True
            one.leases += 1
        return given

    def expire(self, token: str | None) -> None:
        """End leases."""
        for one in self.reports:
            if token in {None, one.token}:
                one.leased = False

    def complete(self, rolled: Rolled, outcomes: Mapping[str, tuple[str, str]]) -> None:
        """Take the marketplace's answers."""
        for key, (outcome, message) in outcomes.items():
            line = rolled.lines[key]
            line.outcome, line.message = outcome, message
            for record in line.records:
                if outcome == "REPORTED":
                    record.state = "REPORTED"
                else:
                    record.state, record.failure = "REPORT_FAILED", message


# --- Running plans


@dataclass
class World:
    """A server on a database, which can be stopped and started again."""

    database_url: str
    database: Database
    numbers: Iterator[int] = field(default_factory=itertools.count)
    running: Any = None
    client: Client = field(init=False)
    metric_ids: dict[str, str] = field(default_factory=dict)

    async def start(self) -> None:
        """Start a server."""
        self.running = running_server(self.database_url, partner_rules=RULES)
        self.client = await self.running.__aenter__()

    async def stop(self) -> None:
        """Stop it."""
        await self.running.__aexit__(None, None, None)

    async def execute(self, statement: str, **parameters: Any) -> Any:
        """Run a statement beside the service."""
        async with self.database.engine.begin() as connection:
            result = await connection.execute(sa.text(statement), parameters)
            return result.all() if result.returns_rows else None

    async def bought(self) -> list[Bought]:
        """Forget all usage and make new entitlements."""
        await self.execute(f"TRUNCATE {', '.join(TABLES)}")
        found = []
        for partner in ENTITLEMENTS:
            name = f"{partner}-{next(self.numbers)}"
            customer = await self.client.create_customer(buyer_id=f"b-{name}")
            await sell(self.client, name, partner=partner, buyer_id=f"b-{name}", billable_metric_keys=["calls"])
            found.append(Bought(name, partner, customer.id, {"cpu", "mem"}))
        if not self.metric_ids:
            request = billable_metric_pb2.ListBillableMetricsRequest(page_size=1000)
            metrics = (await self.client.metrics.ListBillableMetrics(request)).billable_metrics
            self.metric_ids = {one.record_key: one.id for one in metrics if one.record_key}
        return sorted(found, key=lambda one: one.id)


@pytest.fixture
async def world(database_url: str, database: Database) -> AsyncIterator[World]:
    """A server with a billable metric for records."""
    found = World(database_url, database)
    await found.start()
    try:
        regions = [{"name": "region", "in_values": ["eu", "us"]}]
        await found.client.create_metric(key="calls", property_filters=regions)
        yield found
    finally:
        await found.stop()


class Run:
    """A plan on its way: does each step, says what must come of it, and looks whether it did."""

    def __init__(self, world: World, bought: Sequence[Bought]) -> None:
        self.world = world
        self.model = Model(bought)
        self.base = cell_floor(datetime.now(UTC))
        self.hour = self.base - 5 * HOUR
        self.numbers = itertools.count()
        self.contents: dict[str, Any] = {}
        self.times: dict[str, Any] = {}
        self.failing = ""

    async def run(self, plan: Sequence[Step]) -> None:
        """Do all steps."""
        for one in plan:
            await self.step(one)
            await self.check()

    async def step(self, one: Step) -> None:
        """Do a step, failing first if it should."""
        if not isinstance(one, Crash):
            await self.perform(one)
            return
        points = POINTS[type(one.step)]
        point = points[one.point % len(points)]
        repeated = one.step
        with crashing(f"service.store.{point}", one.after) as hits:
            self.failing = point
            failure = None
            try:
                await self.perform(one.step)
            except grpc.aio.AioRpcError as error:
                failure = read_fault(error).code
            assert failure == ("INTERNAL" if hits and not isinstance(one.step, RollUp) else None), one
            self.failing = ""
        await self.check()
        if isinstance(repeated, RollUp):
            repeated = RollUp(0)
        if hits:
            await self.perform(repeated)

    async def perform(self, one: Step) -> None:
        """Do a step and require the answer that the model gives."""
        match one:
            case Report():
                await self._report([self._message(planned) for planned in one.groups])
            case Again():
                if group := self._group(one.group):
                    message = group_pb2.NewUsageRecordGroup()
                    message.CopyFrom(group.message)
                    if one.changed:
                        message.meta_info.erp_invoice_id = "another"
                    await self._report([message])
            case Delete():
                await self._delete(one)
            case Retry():
                await self._retry(one)
            case RollUp():
                await self._roll_up(one)
            case Lease():
                await self._lease(one)
            case Expire():
                token = None if one.token is None else f"t{one.token}"
                await self.world.execute(
                    "UPDATE usage_record_reports SET lease_deadline = now() - interval '1 second'"
                    " WHERE lease_deadline IS NOT NULL AND lease_token = coalesce(:token, lease_token)",
                    token=token,
                )
                self.model.expire(token)
            case Complete():
                await self._complete(one)
            case Change():
                await self._change(one)
            case Restart():
                await self.world.stop()
                await self.world.start()

    def _group(self, number: int) -> Group | None:
        groups = list(self.model.groups.values())
        return groups[number % len(groups)] if groups else None

    def _message(self, one: Planned) -> Any:
        entitlement = self.model.entitlements[one.entitlement]
        at = None
        if one.hours is not None:
            now = datetime.now(UTC)
            at = now + 4 * MINUTE if one.hours < 0 else self.base - one.hours * HOUR + one.minute * MINUTE
            at = min(at, now + 4 * MINUTE)
        records: dict[str, Any] = {"records": one.amounts.quantities}
        if one.amounts.billable:
            of = one.amounts.quantities.items()
            items = [{"key": "calls", "properties": {"region": name}, "quantity": value} for name, value in of]
            records = {"billable_records": items}
        return group(f"g{next(self.numbers)}", entitlement.id, **records, at=at)

    async def _report(self, messages: Sequence[Any]) -> None:
        results = await report(self.world.client, *messages)
        for message, result in zip(messages, results, strict=True):
            entitlement = next(one for one in self.model.entitlements if one.id == message.entitlement_id)
            stored = self.model.groups.get(message.id)
            verdict = event_pb2.Verdict.Name(result.verdict).removeprefix("VERDICT_")
            if stored is not None:
                assert verdict == ("DUPLICATE" if message == stored.message else "CONFLICT")
                continue
            pairs = [(one.key, one.quantity) for one in message.billable_records] or sorted(message.records.items())
            records = [Record(key, Decimal(quantity)) for key, quantity in pairs]
            at = message.timestamp.ToDatetime(tzinfo=UTC) if message.HasField("timestamp") else datetime.now(UTC)
            fits = entitlement.fits(at, {one.key for one in records}) and any(one.quantity for one in records)
            assert verdict == ("ACCEPTED" if fits else "REJECTED"), result
            if fits:
                at = result.group.meta_info.timestamp.ToDatetime(tzinfo=UTC)
                self.model.groups[message.id] = Group(message, entitlement, at, records)

    async def _delete(self, one: Delete) -> None:
        found = self._group(one.group)
        if found is None:
            return
        call = self.world.client.groups.DeleteUsageRecordGroup(
            group_pb2.DeleteUsageRecordGroupRequest(id=found.message.id)
        )
        owed = any(one.report and self.model.carried(found.entitlement, one.key) < 0 for one in found.records)
        reported_in_part = not {record.state for record in found.records} <= {"CREATED", "INVALID"}
        if (reported_in_part or owed) and found.status != "DELETED":
            assert_status_transition(await fault_of(call))
            return
        await call
        for record in found.records:
            record.state, record.failure = "DELETED", ""

    async def _retry(self, one: Retry) -> None:
        found = self._group(one.group)
        if found is None:
            return
        call = self.world.client.groups.RetryUsageRecordGroup(
            group_pb2.RetryUsageRecordGroupRequest(id=found.message.id)
        )
        if found.status not in {"CREATED", "REPORT_FAILED"}:
            assert_status_transition(await fault_of(call))
            return
        await call
        for record in found.records:
            if record.state == "REPORT_FAILED":
                record.state, record.failure = "CREATED", ""

    async def _roll_up(self, one: RollUp) -> None:
        self.hour += one.hours * HOUR
        made = await roll_up(self.world.database, self.hour, RULES)
        assert made == self.model.roll_up(self.hour, self.failing)
        request = report_pb2.ListUsageRecordReportsRequest(**ALWAYS, page_size=1000)
        answer = await self.world.client.reports.ListUsageRecordReports(request)
        ids = {
            (one.entitlement_id, one.marketplace_time.ToDatetime(tzinfo=UTC)): one.id
            for one in answer.usage_record_reports
        }
        for rolled in self.model.reports:
            rolled.id = ids[rolled.entitlement.id, rolled.hour]

    async def _lease(self, one: Lease) -> None:
        partner = f"PARTNER_{one.partner or 'UNSPECIFIED'}"
        found = await lease(self.world.client, f"t{one.token}", partner=partner, max_reports=one.most)
        expected = self.model.lease(f"t{one.token}", one.partner, one.most)
        assert [report.id for report in found] == [report.id for report in expected]

    async def _complete(self, one: Complete) -> None:
        if not self.model.reports:
            return
        rolled = self.model.reports[one.report % len(self.model.reports)]
        former = next((token for token in rolled.tokens if token != rolled.token), "nobody")
        token = {"holder": rolled.token or "nobody", "former": former, "nobody": "nobody"}[one.who]
        outcomes = {
            line.key: ("FAILED", f"refused {one.failed}") if one.failed >> i & 1 else ("REPORTED", "")
            for i, line in enumerate(rolled.told)
        }
        failed = {key: message for key, (outcome, message) in outcomes.items() if outcome == "FAILED"}
        taken = tuple(key for key in outcomes if key not in failed)
        call = complete(self.world.client, rolled.id, token, failed, taken=taken)
        if token != rolled.token:
            fault = await fault_of(call)
            assert (fault.code, fault.reason) == ("FAILED_PRECONDITION", "LEASE_LOST")
        elif rolled.status == "PENDING":
            await call
            self.model.complete(rolled, outcomes)
        elif {line.key: (line.outcome, line.message) for line in rolled.told} == outcomes:
            await call
        else:
            fault = await fault_of(call)
            assert (fault.code, fault.reason) == ("FAILED_PRECONDITION", "REPORT_COMPLETED")

    async def _change(self, one: Change) -> None:
        found = self.model.entitlements[one.entitlement]
        match one.what:
            case "dimensions":
                found.dimensions = {"cpu"} if "mem" in found.dimensions else {"cpu", "mem"}
                dimensions = [{"key": key, "name": key.upper()} for key in sorted(found.dimensions)]
                await change(self.world.client, found.id, "dimensions", dimensions=dimensions)
            case "end":
                found.end = None if found.end else self.base - 2 * HOUR
                fields = {"ending_before": timestamp(found.end)} if found.end else {}
                await change(self.world.client, found.id, "ending_before", **fields)
            case "status" if found.cancelled is None:
                status = "ENTITLEMENT_STATUS_CANCELLED"
                changed = await change(self.world.client, found.id, "status", status=status)
                found.cancelled = changed.status_changes[-1].since.ToDatetime(tzinfo=UTC)

    # What must hold after each step

    async def check(self) -> None:
        """Require that the server shows what the model holds, and that the books balance by what it shows."""
        client = self.world.client
        listed = group_pb2.ListUsageRecordGroupsRequest(**ALWAYS)
        groups = list((await client.groups.ListUsageRecordGroups(listed)).usage_record_groups)
        asked = report_pb2.ListUsageRecordReportsRequest(**ALWAYS, page_size=1000)
        found = list((await client.reports.ListUsageRecordReports(asked)).usage_record_reports)
        self._check_groups(groups)
        self._check_reports(found)
        windows = await client.all_usage(
            window_size="WINDOW_SIZE_NONE",
            starting_on=timestamp(self.base - 40 * HOUR),
            ending_before=timestamp(self.base + 40 * HOUR),
            customer_ids=[one.customer_id for one in self.model.entitlements],
            billable_metrics=[{"id": one} for one in self.world.metric_ids.values()],
        )
        values = {(row.customer_id, row.billable_metric_id): row.value for row in windows}
        for entitlement in self.model.entitlements:
            request = entitlement_pb2.GetEntitlementRequest(id=entitlement.id)
            shown = (await client.entitlements.GetEntitlement(request)).entitlement
            for key, metric_id in self.world.metric_ids.items():
                in_window = Decimal(values[entitlement.customer_id, metric_id] or 0)
                carried = Decimal(shown.carried_quantities.get(key, "0"))
                assert carried == self.model.carried(entitlement, key)
                of = [one for one in groups if one.entitlement_id == entitlement.id]
                rolled = [one for one in found if one.entitlement_id == entitlement.id]
                check_balance(of, rolled, key, in_window, carried)

    def _check_groups(self, groups: Sequence[Any]) -> None:
        shown = {
            one.id: (
                group_pb2.UsageRecordGroupStatus.Name(one.status).removeprefix("USAGE_RECORD_GROUP_STATUS_"),
                one.usage_record_report_id,
                bool(one.invalid_reasons),
                one.HasField("reported_time"),
                [
                    (
                        record.key,
                        Decimal(record.quantity),
                        state_of(record),
                        record.usage_record_report_id,
                        NOT_VALID if record.failure.startswith(NOT_VALID) else record.failure,
                    )
                    for record in one.usage_records
                ],
            )
            for one in groups
        }
        expected = {
            name: (
                one.status,
                one.report.id if one.report else "",
                one.ever_invalid,
                one.status == "REPORTED",
                [
                    (
                        record.key,
                        record.quantity,
                        record.state,
                        record.report.id if record.report else "",
                        record.failure,
                    )
                    for record in one.records
                ],
            )
            for name, one in self.model.groups.items()
        }
        assert shown == expected
        assert len(groups) == len(shown)
        for one in groups:
            times = (
                one.create_time.ToNanoseconds(),
                one.update_time.ToNanoseconds(),
                one.reported_time.ToNanoseconds(),
            )
            before = self.times.get(one.id)
            # Who does not change keeps the times; who does has later ones.
            assert before is None or before[1] == times or before[0] != shown[one.id], one.id
            assert before is None or before[0] == shown[one.id] or before[1][1] < times[1], one.id
            self.times[one.id] = (shown[one.id], times)

    def _check_reports(self, reports: Sequence[Any]) -> None:
        for one in reports:
            content = [
                (line.key, line.quantity, line.used_quantity, line.decimal_parts_before, line.decimal_parts_after)
                for line in one.records
            ]
            counts = [(line.key, line.record_count) for line in one.records]
            times = [one.marketplace_time.seconds, one.report_deadline.seconds, one.create_time.ToNanoseconds()]
            named = (one.entitlement_id, one.buyer_id, one.product_id, one.partner, one.group_count)
            assert self.contents.setdefault(one.id, (content, counts, times, named)) == (content, counts, times, named)
            assert not one.HasField("lease_deadline") or one.status == report_pb2.USAGE_RECORD_REPORT_STATUS_PENDING
            assert one.HasField("complete_time") == (one.status != report_pb2.USAGE_RECORD_REPORT_STATUS_PENDING)
            for line in one.records:
                quantity, before = Decimal(line.quantity), Decimal(line.decimal_parts_before)
                assert Decimal(line.decimal_parts_after) == before + Decimal(line.used_quantity) - quantity
                assert quantity >= 0
                assert one.partner != entitlement_pb2.PARTNER_AWS or quantity % 1 == 0
        assert len({(one.entitlement_id, one.marketplace_time.seconds) for one in reports}) == len(reports)
        assert self.contents.keys() == {one.id for one in reports}
        shown = {
            one.id: (
                one.entitlement_id,
                one.marketplace_time.ToDatetime(tzinfo=UTC),
                report_pb2.UsageRecordReportStatus.Name(one.status).removeprefix("USAGE_RECORD_REPORT_STATUS_"),
                one.group_count,
                one.lease_count,
                {
                    line.key: (
                        Decimal(line.quantity),
                        Decimal(line.used_quantity),
                        Decimal(line.decimal_parts_before),
                        outcome_of(line),
                        line.message,
                        line.record_count,
                    )
                    for line in one.records
                },
            )
            for one in reports
        }
        expected = {
            one.id: (
                one.entitlement.id,
                one.hour,
                one.status,
                one.groups,
                one.leases,
                {
                    key: (line.quantity, line.used, line.before, line.outcome, line.message, len(line.records))
                    for key, line in one.lines.items()
                },
            )
            for one in self.model.reports
        }
        assert shown == expected


ALWAYS: dict[str, Any] = {"start_date": "2020-01-01", "end_date": "2099-12-31"}


def check_balance(
    groups: Sequence[Any], reports: Sequence[Any], key: str, in_window: Decimal, carried: Decimal
) -> None:
    """Require that what was used of a dimension is reported, carried, pending or failed, by what the server shows."""
    kept = [
        record for one in groups for record in one.usage_records if record.key == key and state_of(record) != "DELETED"
    ]
    lines = [line for one in reports for line in one.records if line.key == key]

    def records(*states: str) -> Decimal:
        return sum((Decimal(one.quantity) for one in kept if state_of(one) in states), ZERO)

    def told(outcome: str) -> Decimal:
        return sum((Decimal(one.quantity) for one in lines if outcome_of(one) == outcome), ZERO)

    used = sum((Decimal(one.quantity) for one in kept), ZERO)
    assert used == in_window
    left = [Decimal(one.used_quantity) - Decimal(one.quantity) for one in lines if outcome_of(one) != "FAILED"]
    assert carried == sum(left, ZERO)
    waiting, failed = records("CREATED", "INVALID"), records("REPORT_FAILED")
    assert used == told("REPORTED") + carried + waiting + told("UNSPECIFIED") + failed
    assert told("REPORTED") <= used


def state_of(record: Any) -> str:
    """The state of a record, by name."""
    return group_pb2.UsageRecordState.Name(record.state).removeprefix("USAGE_RECORD_STATE_")


def outcome_of(line: Any) -> str:
    """The outcome of a line, by name."""
    return report_pb2.ReportOutcome.Name(line.outcome).removeprefix("REPORT_OUTCOME_")


def assert_status_transition(fault: Fault) -> None:
    """Require the answer to a step that the state does not allow."""
    assert (fault.code, fault.reason) == ("FAILED_PRECONDITION", "STATUS_TRANSITION")


async def change(client: Client, entitlement_id: str, path: str, **fields: Any) -> Any:
    """UpdateEntitlement of one field."""
    request = entitlement_pb2.UpdateEntitlementRequest(entitlement=entitlement_pb2.Entitlement(**fields))
    request.entitlement.id = entitlement_id
    request.update_mask.paths.append(path)
    return (await client.entitlements.UpdateEntitlement(request)).entitlement


@contextlib.contextmanager
def crashing(target: str, after: bool) -> Iterator[list[str]]:
    """Let a coroutine of the service fail, before or after its work; yields what fills with every failure."""
    hits: list[str] = []
    module, _, name = target.rpartition(".")
    # The service logs each failure at length.
    with pytest.MonkeyPatch.context() as patch, capture_logs():
        work = getattr(importlib.import_module(module), name)

        async def fail(*arguments: Any, **named: Any) -> None:
            hits.append(target)
            if after:
                await work(*arguments, **named)
            raise ZeroDivisionError

        patch.setattr(target, fail)
        yield hits


@given(plan=plans)
@example(plan=WHOLE)
@example(plan=FAILING)
# Not shrunk: that takes many minutes, and the plan is printed anyway.
@settings(max_examples=EXAMPLES, phases=(Phase.explicit, Phase.reuse, Phase.generate))
async def test_books_balance_after_every_step(world: World, plan: Sequence[Step]) -> None:
    """Whatever is reported, deleted, retried, leased, answered, changed, repeated or interrupted: every group, record
    and report is in the state that plain Python gives it, and what was used is what was reported, is carried, waits or
    failed, exactly.
    """
    await Run(world, await world.bought()).run(plan)


# --- Leases


@pytest.fixture
def hours() -> Iterator[datetime]:
    """The hours from the next one on: all that is used now was used before their ends."""
    start = cell_floor(datetime.now(UTC))
    return (start + i * HOUR for i in itertools.count(1))


async def listed(client: Client, **filters: Any) -> list[Any]:
    """All reports, those of early hours first."""
    request = report_pb2.ListUsageRecordReportsRequest(**ALWAYS, **filters, page_size=1000)
    found = (await client.reports.ListUsageRecordReports(request)).usage_record_reports
    return sorted(found, key=lambda one: one.marketplace_time.seconds)


async def get_group(client: Client, group_id: str) -> Any:
    """GetUsageRecordGroup."""
    return (await client.groups.GetUsageRecordGroup(group_pb2.GetUsageRecordGroupRequest(id=group_id))).group


async def delete(client: Client, group_id: str) -> Any:
    """DeleteUsageRecordGroup."""
    return await client.groups.DeleteUsageRecordGroup(group_pb2.DeleteUsageRecordGroupRequest(id=group_id))


async def retry(client: Client, group_id: str) -> Any:
    """RetryUsageRecordGroup."""
    return await client.groups.RetryUsageRecordGroup(group_pb2.RetryUsageRecordGroupRequest(id=group_id))


async def carried(client: Client, entitlement_id: str = "ent") -> dict[str, str]:
    """What an entitlement carries."""
    request = entitlement_pb2.GetEntitlementRequest(id=entitlement_id)
    return dict((await client.entitlements.GetEntitlement(request)).entitlement.carried_quantities)


async def use(client: Client, database: Database, hour: datetime, entitlement_id: str = "ent", **records: str) -> str:
    """Report a group and roll the hour up; returns the group's id."""
    group_id = f"{entitlement_id} {hour:%j %H}"
    await reported(client, group(group_id, entitlement_id, records or {"cpu": "1"}))
    await roll_up(database, hour)
    return group_id


async def answer(client: Client, token: str, failed: Mapping[str, str] | None = None, **fields: Any) -> list[Any]:
    """Lease reports and answer them: the dimensions named failed, all others were taken."""
    found = []
    for one in await lease(client, token, **fields):
        told = {line.key for line in one.records if line.quantity != "0"}
        refused = {key: why for key, why in (failed or {}).items() if key in told}
        found.append(await complete(client, one.id, token, refused, taken=tuple(sorted(told - set(refused)))))
    return found


async def end_leases(database: Database, *tokens: str) -> None:
    """Let the leases of these tokens end."""
    statement = sa.text(
        "UPDATE usage_record_reports SET lease_deadline = now() - interval '1 second' WHERE lease_token = ANY(:tokens)"
    )
    async with database.engine.begin() as connection:
        await connection.execute(statement, {"tokens": list(tokens)})


def refusal(fault: Fault) -> tuple[str, str]:
    """Code and reason of a refusal."""
    return fault.code, fault.reason


def line_of(one: Any, key: str = "cpu") -> tuple[str, str, str, str]:
    """Quantity, used, before and after of a report's line."""
    line = next(line for line in one.records if line.key == key)
    return line.quantity, line.used_quantity, line.decimal_parts_before, line.decimal_parts_after


LOST = ("FAILED_PRECONDITION", "LEASE_LOST")


async def test_the_most_urgent_reports_come_first(
    client: Client, database: Database, hours: Iterator[datetime]
) -> None:
    """Reports are handed out by their deadlines, whatever their hours and partners, also one by one.

    Would catch an order by hour, by id, or by time of creation: what is due soonest would be refused for its age.
    """
    for partner in ("GCP", "AWS", "AZURE"):
        await sell(client, partner, partner=partner)
    for hour in itertools.islice(hours, 3):
        for partner in ("GCP", "AWS", "AZURE"):
            await reported(client, group(f"{partner} {hour}", partner))
        await roll_up(database, hour)
    due = sorted(await listed(client), key=lambda one: (one.report_deadline.ToNanoseconds(), one.id))
    assert [one.entitlement_id for one in due[6:]] == ["GCP"] * 3
    first = [one.id for i in range(4) for one in await lease(client, f"one {i}", max_reports=1)]
    rest = [one.id for one in await lease(client, "rest")]
    assert [*first, *rest] == [one.id for one in due]


async def test_a_lease_says_of_which_partner_and_how_many(
    client: Client, database: Database, hours: Iterator[datetime]
) -> None:
    """A lease holds reports of the partner named, at most as many as wanted, by default 25.

    Would catch a filter or limit that is not applied to what is taken.
    """
    await sell(client, "ent")
    await sell(client, "azure", partner="AZURE")
    for hour in itertools.islice(hours, 27):
        await reported(client, group(f"ent {hour}"), group(f"azure {hour}", "azure"))
        await roll_up(database, hour)
    assert len(await lease(client, "two", partner="PARTNER_AZURE", max_reports=2)) == 2
    azure = await lease(client, "azure", partner="PARTNER_AZURE", max_reports=0)
    assert [one.entitlement_id for one in azure] == ["azure"] * 25
    assert await lease(client, "gcp", partner="PARTNER_GCP") == []
    assert await lease(client, "none left", partner="PARTNER_AZURE") == []
    aws = await lease(client, "all", max_reports=1_000)
    assert [one.entitlement_id for one in aws] == ["ent"] * 27
    assert {one.lease_count for one in await listed(client)} == {1}


async def test_an_answer_holds_few_lines(
    client: Client, database: Database, hours: Iterator[datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease takes no more reports than fit into one answer, at least one, and the others stay free.

    Would catch reports that are leased and not told of.
    """
    await sell(client)
    for hour in itertools.islice(hours, 4):
        await use(client, database, hour, cpu="1", mem="1")
    for token, most, leased in (("a", 5, 2), ("b", 1, 1)):
        with monkeypatch.context() as patch:
            patch.setattr("service.store.record_reports.LINES_MAX", most)
            assert len(await lease(client, token)) == leased
    assert [one.lease_count for one in await listed(client)] == [1, 1, 1, 0]


async def test_a_lease_is_told_again(
    client: Client, database: Database, hours: Iterator[datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same token the same reports come, whatever else is asked for, and no others, also many at once.

    Would catch a reporter whose answer got lost and whose retry takes more, or gets nothing.
    """
    await sell(client)
    for hour in itertools.islice(hours, 3):
        await use(client, database, hour)
    original = record_reports._fitting

    async def slowly(*arguments: Any) -> Any:
        await asyncio.sleep(0.2)  # the others are there before the first has committed
        return await original(*arguments)

    monkeypatch.setattr(record_reports, "_fitting", slowly)
    answers = await asyncio.gather(*(lease(client, "mine", max_reports=1 + i % 3) for i in range(4)))
    assert len({tuple(one.id for one in found) for found in answers}) == 1
    (first, *_) = answers
    assert first
    await use(client, database, next(hours))
    assert await lease(client, "mine", max_reports=100, partner="PARTNER_GCP") == first
    assert {one.lease_count for one in first} == {1}
    # Also when the lease has ended: they are still this token's, for as long again.
    await end_leases(database, "mine")
    renewed = await lease(client, "mine")
    assert [(one.id, one.lease_count) for one in renewed] == [(one.id, 2) for one in first]
    assert all(one.lease_deadline.ToDatetime(tzinfo=UTC) > datetime.now(UTC) for one in renewed)
    others = await lease(client, "other", max_reports=100)
    assert {one.id for one in others} == {one.id for one in await listed(client)} - {one.id for one in first}


async def test_a_lease_lasts_as_long_as_it_was_asked_for(
    client: Client, database: Database, hours: Iterator[datetime]
) -> None:
    """Until its deadline a report is nobody else's, then it is handed out again and counted.

    Would catch a deadline that is not looked at, or a duration that is ignored.
    """
    await sell(client)
    await use(client, database, next(hours))
    before = datetime.now(UTC)
    (long,) = await lease(client, "a")
    assert long.lease_deadline.ToDatetime(tzinfo=UTC) - before >= timedelta(minutes=5)
    assert long.lease_deadline.ToDatetime(tzinfo=UTC) - datetime.now(UTC) <= timedelta(minutes=5)
    await end_leases(database, "a")
    (short,) = await lease(client, "b", lease_duration=timedelta(seconds=1))
    assert await lease(client, "c") == []
    deadline = short.lease_deadline.ToDatetime(tzinfo=UTC)
    while not (found := await lease(client, "c")):
        assert datetime.now(UTC) < deadline + timedelta(seconds=20)
        await asyncio.sleep(0.05)
    assert datetime.now(UTC) >= deadline
    assert [(one.id, one.lease_count) for one in found] == [(long.id, 3)]


async def test_who_lost_a_lease_cannot_complete(client: Client, database: Database, hours: Iterator[datetime]) -> None:
    """Once a report was handed to another, the first holder's completion is LEASE_LOST, before and after the other's.

    Would catch two reporters who both tell the marketplace and are both believed.
    """
    await sell(client)
    name = await use(client, database, next(hours))
    (mine,) = await lease(client, "mine")
    await end_leases(database, "mine")
    (theirs,) = await lease(client, "theirs")
    assert theirs.id == mine.id
    assert refusal(await fault_of(complete(client, mine.id, "mine", taken=("cpu",)))) == LOST
    assert (await get_group(client, name)).status == group_pb2.USAGE_RECORD_GROUP_STATUS_REPORT_PENDING
    await complete(client, mine.id, "theirs", {"cpu": "no"})
    assert refusal(await fault_of(complete(client, mine.id, "mine", {"cpu": "no"}))) == LOST
    assert refusal(await fault_of(complete(client, mine.id, "nobody", {"cpu": "no"}))) == LOST
    assert await lease(client, "mine") == []


async def test_completion_after_the_deadline_is_taken(
    client: Client, database: Database, hours: Iterator[datetime]
) -> None:
    """What the marketplace said counts, though late, as long as nobody else was given the report.

    Would catch an answer that is thrown away, so that the same usage is told twice.
    """
    await sell(client)
    name = await use(client, database, next(hours))
    (one,) = await lease(client, "mine")
    await end_leases(database, "mine")
    done = await complete(client, one.id, "mine", taken=("cpu",))
    assert done.status == report_pb2.USAGE_RECORD_REPORT_STATUS_SUCCEEDED
    assert await lease(client, "other") == []
    found = await get_group(client, name)
    assert found.status == group_pb2.USAGE_RECORD_GROUP_STATUS_REPORTED
    assert found.HasField("reported_time")


async def test_what_is_completed_is_never_handed_out_again(
    client: Client, database: Database, hours: Iterator[datetime]
) -> None:
    """A completed report, taken or refused, is free for nobody once its lease has ended.

    Would catch a lease that looks at the deadline only.
    """
    await sell(client)
    for hour in itertools.islice(hours, 2):
        await use(client, database, hour)
    first, second = await lease(client, "mine")
    await complete(client, first.id, "mine", taken=("cpu",))
    await complete(client, second.id, "mine", {"cpu": "no"})
    await end_leases(database, "mine")
    assert await lease(client, "other") == []


async def test_a_completion_is_idempotent(
    client: Client, database: Database, hours: Iterator[datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same outcomes again, also many at once, answer with the report as it is; others are REPORT_COMPLETED.

    Would catch a failure whose rest is taken from the carry twice, and an outcome that is overwritten.
    """
    await sell(client)
    name = await use(client, database, next(hours), cpu="1.6", mem="2.5")
    (one,) = await lease(client, "mine")
    original = entitlements.lock_entitlement

    async def slowly(*arguments: Any) -> None:
        await asyncio.sleep(0.2)  # the others are there before the first has committed
        await original(*arguments)

    monkeypatch.setattr(entitlements, "lock_entitlement", slowly)
    same = [complete(client, one.id, "mine", {"cpu": "no"}, taken=("mem",)) for _ in range(4)]
    first, *rest = await asyncio.gather(*same)
    assert all(again == first for again in rest)
    assert await carried(client) == {"mem": "0.5"}
    found = await get_group(client, name)
    for failed, taken in (({}, ("cpu", "mem")), ({"cpu": "other words"}, ("mem",)), ({"cpu": "no", "mem": "no"}, ())):
        fault = await fault_of(complete(client, one.id, "mine", failed, taken=taken))
        assert refusal(fault) == ("FAILED_PRECONDITION", "REPORT_COMPLETED")
    assert await listed(client) == [first]
    assert await get_group(client, name) == found
    # Retried and waiting, its records are no business of the first report any more.
    await retry(client, name)
    assert await complete(client, one.id, "mine", {"cpu": "no"}, taken=("mem",)) == first
    assert [state_of(one) for one in (await get_group(client, name)).usage_records] == ["CREATED", "REPORTED"]


async def test_faulty_completions(client: Client, database: Database, hours: Iterator[datetime]) -> None:
    """Outcomes that are missing, unknown, twice, of no value or without a reason are named, and nothing changes.

    Would catch records that stay in a report for ever because their outcome was never asked for.
    """
    await sell(client)
    await use(client, database, next(hours), cpu="1", mem="0.4")
    (one,) = await lease(client, "mine")
    taken = {"key": "cpu", "outcome": "REPORT_OUTCOME_REPORTED"}
    failed = {"key": "cpu", "outcome": "REPORT_OUTCOME_FAILED"}
    cases: dict[str, tuple[list[Any], tuple[str, ...]]] = {
        "missing": ([], ("outcomes",)),
        "unknown": ([taken, {**taken, "key": "disk"}], ("outcomes[1].key",)),
        "nothing to tell": ([taken, {**taken, "key": "mem"}], ("outcomes[1].key",)),
        "missing and unknown": ([{**taken, "key": "disk"}], ("outcomes[0].key", "outcomes")),
        "twice": ([taken, taken], ("outcomes[1].key",)),
        "no outcome": ([{"key": "cpu"}], ("outcomes[0].outcome",)),
        "no reason": ([failed], ("outcomes[0].message",)),
        "long reason": ([{**failed, "message": "x" * 257}], ("outcomes[0].message",)),
    }
    for name, (outcomes, fields) in cases.items():
        request = report_pb2.CompleteUsageRecordReportRequest(id=one.id, lease_token="mine", outcomes=outcomes)
        fault = await fault_of(client.reports.CompleteUsageRecordReport(request))
        assert (fault.code, fault.fields) == ("INVALID_ARGUMENT", fields), name
        assert await listed(client) == [one], name
    await complete(client, one.id, "mine", {"cpu": "x" * 256})


async def test_unknown_reports(client: Client) -> None:
    """A report that nobody made is NOT_FOUND; what is no id is INVALID_ARGUMENT."""
    fault = await fault_of(complete(client, str(uuid.uuid4()), "mine"))
    assert refusal(fault) == ("NOT_FOUND", "USAGE_RECORD_REPORT_NOT_FOUND")
    fault = await fault_of(complete(client, "x", "mine"))
    assert (fault.code, fault.fields) == ("INVALID_ARGUMENT", ("id",))
    fault = await fault_of(complete(client, str(uuid.uuid4()), ""))
    assert (fault.code, fault.fields) == ("INVALID_ARGUMENT", ("lease_token",))


async def test_faulty_leases(client: Client) -> None:
    """Every bad field of a lease is named at once; the limits themselves are taken."""
    bad = {"partner": 9, "max_reports": -1, "lease_duration": timedelta(milliseconds=999)}
    fault = await fault_of(lease(client, "", **bad))
    assert fault.fields == ("lease_token", "partner", "max_reports", "lease_duration")
    for fields in ({"lease_duration": timedelta(seconds=3600, microseconds=1)}, {"lease_duration": timedelta(0)}):
        assert (await fault_of(lease(client, "x", **fields))).fields == ("lease_duration",)
    assert (await fault_of(lease(client, "x" * 129))).fields == ("lease_token",)
    assert await lease(client, "x" * 128, lease_duration=timedelta(hours=1)) == []
    assert await lease(client, "y", lease_duration=timedelta(seconds=1)) == []


async def test_nobody_waits_for_another_reporter(client: Client, database: Database, hours: Iterator[datetime]) -> None:
    """While one reporter's lease or completion has not committed, another is given the next report at once.

    Would catch a lease that queues behind the rows that others have locked.
    """
    await sell(client)
    for hour in itertools.islice(hours, 2):
        await use(client, database, hour)
    first, second = await listed(client)
    async with database.engine.begin() as connection:
        held = sa.text("SELECT 1 FROM usage_record_reports WHERE id = CAST(:id AS uuid) FOR UPDATE")
        await connection.execute(held, {"id": first.id})
        async with asyncio.timeout(10):
            assert [one.id for one in await lease(client, "other")] == [second.id]
    assert [one.id for one in await lease(client, "mine")] == [first.id]


async def test_with_nothing_to_tell_a_report_is_done(
    client: Client, database: Database, hours: Iterator[datetime]
) -> None:
    """A report of zero quantities only has SUCCEEDED when it is made: nobody leases or completes it.

    Would catch reports that wait for ever for an answer that nobody can give.
    """
    await sell(client)
    name = await use(client, database, next(hours), cpu="0.4", mem="0.999")
    (one,) = await listed(client)
    assert one.status == report_pb2.USAGE_RECORD_REPORT_STATUS_SUCCEEDED
    assert one.HasField("complete_time")
    assert [outcome_of(line) for line in one.records] == ["REPORTED"] * 2
    assert await lease(client, "mine") == []
    assert refusal(await fault_of(complete(client, one.id, "mine"))) == LOST
    found = await get_group(client, name)
    assert found.status == group_pb2.USAGE_RECORD_GROUP_STATUS_REPORTED
    assert found.HasField("reported_time")
    assert await carried(client) == {"cpu": "0.4", "mem": "0.999"}


# --- The ledger


async def test_parts_add_up_over_hours(client: Client, database: Database, hours: Iterator[datetime]) -> None:
    """AWS takes whole numbers: of 0.4 an hour it is told 0, 0 and 1, and the rest is carried from hour to hour.

    Would catch a rest that is dropped, rounded up, or told twice.
    """
    await sell(client)
    for _ in range(3):
        await use(client, database, next(hours), cpu="0.4")
        await answer(client, f"{await carried(client)}")
    assert [line_of(one) for one in await listed(client)] == [
        ("0", "0.4", "0", "0.4"),
        ("0", "0.4", "0.4", "0.8"),
        ("1", "0.4", "0.8", "0.2"),
    ]
    assert await carried(client) == {"cpu": "0.2"}
    await use(client, database, next(hours), cpu="0.8")
    assert line_of((await listed(client))[-1]) == ("1", "0.8", "0.2", "0")
    assert await carried(client) == {}


async def test_decimals_are_told_where_they_are_taken(
    client: Client, database: Database, hours: Iterator[datetime]
) -> None:
    """Azure is told what was used, to the last of six places, and nothing is carried.

    Would catch the whole numbers of one partner applied to another.
    """
    await sell(client, partner="AZURE")
    await use(client, database, next(hours), cpu="0.4", mem="2.000001")
    (one,) = await listed(client)
    assert line_of(one) == ("0.4", "0.4", "0", "0")
    assert line_of(one, "mem") == ("2.000001", "2.000001", "0", "0")
    assert await carried(client) == {}


async def test_what_is_too_much_at_once_is_carried(
    client: Client, database: Database, hours: Iterator[datetime]
) -> None:
    """At most `quantity_max` is told in a report; the rest is carried, and comes back if the report fails.

    Would catch a report that the marketplace refuses whole, and a rest that is told though its records failed.
    """
    rules = with_changes(["AWS.quantity_max=3"])
    await sell(client)
    await reported(client, *(group(f"g{i}", records={"cpu": "2.5"}) for i in range(3)))
    await roll_up(database, next(hours), rules)
    (one,) = await listed(client)
    assert line_of(one) == ("3", "7.5", "0", "4.5")
    await answer(client, "a")
    await reported(client, group("next", records={"cpu": "1"}))
    await roll_up(database, next(hours), rules)
    assert line_of((await listed(client))[-1]) == ("3", "1", "4.5", "2.5")
    await answer(client, "b", {"cpu": "refused"})
    assert await carried(client) == {"cpu": "4.5"}
    await retry(client, "next")
    await roll_up(database, next(hours), rules)
    assert line_of((await listed(client))[-1]) == ("3", "1", "4.5", "2.5")
    # The rest is told though nothing more is used, and then there is nothing to tell.
    assert await roll_up(database, next(hours), rules) == 1
    (*_, last) = await listed(client)
    assert (line_of(last), last.group_count, last.records[0].record_count) == (("2", "0", "2.5", "0.5"), 0, 0)
    assert await roll_up(database, next(hours), rules) == 0


async def test_an_earlier_report_fails_after_a_later_one_used_its_rest(
    client: Client, database: Database, hours: Iterator[datetime]
) -> None:
    """The rest that was told already is missing from then on: the carry is negative, and nothing is told below zero.

    Would catch usage told twice, once as a rest and once with its failed record, and negative quantities.
    """
    await sell(client)
    failing = await use(client, database, next(hours), cpu="1.6")
    await use(client, database, next(hours), cpu="0.6")
    assert [line_of(one) for one in await listed(client)] == [("1", "1.6", "0", "0.6"), ("1", "0.6", "0.6", "0.2")]
    first, second = await lease(client, "mine")
    await complete(client, second.id, "mine", taken=("cpu",))
    await complete(client, first.id, "mine", {"cpu": "no"})
    assert await carried(client) == {"cpu": "-0.4"}
    # What is used next pays it back, without anything to tell.
    await use(client, database, next(hours), cpu="0.3")
    assert line_of((await listed(client))[-1]) == ("0", "0.3", "-0.4", "-0.1")
    assert await carried(client) == {"cpu": "-0.1"}
    await retry(client, failing)
    await roll_up(database, next(hours))
    assert line_of((await listed(client))[-1]) == ("1", "1.6", "-0.1", "0.5")
    await answer(client, "last")
    assert await carried(client) == {"cpu": "0.5"}
    told = sum(Decimal(line.quantity) for one in await listed(client) for line in one.records if line.outcome == 1)
    assert told + Decimal("0.5") == Decimal("1.6") + Decimal("0.6") + Decimal("0.3")


async def test_late_and_retried_records_go_to_a_later_hour(
    client: Client, database: Database, hours: Iterator[datetime]
) -> None:
    """A report is never changed: what comes late for its hour, or failed in it, is told in that of a later one.

    Would catch a second quantity for one hour, which AWS and Azure refuse, and a record that stays behind.
    """
    await sell(client)
    hour = next(hours)
    first = await use(client, database, hour, cpu="2", mem="3")
    (made,) = await listed(client)
    await reported(client, group("late", records={"cpu": "5"}))
    assert await roll_up(database, hour) == 0
    assert await listed(client) == [made]
    await answer(client, "a", {"mem": "no"})
    await retry(client, first)
    assert await roll_up(database, hour) == 0
    assert await roll_up(database, next(hours)) == 1
    found = await listed(client)
    assert [line_of(one) for one in found] == [("2", "2", "0", "0"), ("5", "5", "0", "0")]
    assert line_of(found[1], "mem") == ("3", "3", "0", "0")
    states = (await get_group(client, first)).usage_records
    assert [(state_of(one), one.usage_record_report_id) for one in states] == [
        ("REPORTED", found[0].id),
        ("REPORT_PENDING", found[1].id),
    ]


async def test_what_was_used_after_an_hour_is_not_in_its_report(client: Client, database: Database) -> None:
    """A report holds what was used before its hour's end, and leaves what came after for the next.

    Would catch usage told for a time before it happened, and an end that counts as inside.
    """
    await sell(client)
    end = cell_floor(datetime.now(UTC))
    inside, outside = end - timedelta(microseconds=1), end
    await reported(client, group("inside", at=inside), group("outside", at=outside, records={"cpu": "5"}))
    assert await roll_up(database, end - HOUR) == 1
    (one,) = await listed(client)
    assert (one.group_count, line_of(one)) == (1, ("1", "1", "0", "0"))
    assert one.marketplace_time.ToDatetime(tzinfo=UTC) == end - HOUR
    assert (await get_group(client, "outside")).status == group_pb2.USAGE_RECORD_GROUP_STATUS_CREATED
    assert await roll_up(database, end) == 1


async def test_the_leftover_of_an_ended_entitlement_is_shown(
    client: Client, database: Database, hours: Iterator[datetime]
) -> None:
    """What was never billed is shown after the end, and what was used before it is still told.

    Would catch a carry that is forgotten with its entitlement.
    """
    await sell(client)
    await use(client, database, next(hours), cpu="0.4", mem="1.7")
    await reported(client, group("before the end", records={"cpu": "0.9"}))
    for status in ("CANCELLED", "DELETED"):
        await change(client, "ent", "status", status=f"ENTITLEMENT_STATUS_{status}")
        assert await carried(client) == {"cpu": "0.4", "mem": "0.7"}
    await roll_up(database, next(hours))
    assert line_of((await listed(client))[-1]) == ("1", "0.9", "0.4", "0.3")
    await answer(client, "a")
    assert await carried(client) == {"cpu": "0.3", "mem": "0.7"}


# --- What must not be undone


@pytest.mark.parametrize("mem", ["1", "0.4"])
async def test_what_was_reported_stays_reported_when_the_rest_is_not_valid_any_more(
    client: Client, database: Database, hours: Iterator[datetime], mem: str
) -> None:
    """Of a group that is retried in part and then does not validate, what was taken, or is carried, stays as it is; the
    rest fails, and is told once it is valid again.

    Would catch usage that was told to the marketplace and can be deleted then.
    """
    await sell(client)
    name = await use(client, database, next(hours), cpu="1", mem=mem)
    await answer(client, "a", {"cpu": "no"})
    await retry(client, name)
    await change(client, "ent", "dimensions", dimensions=[{"key": "mem", "name": "Memory"}])
    assert await roll_up(database, next(hours)) == 0
    found = await get_group(client, name)
    assert [state_of(one) for one in found.usage_records] == ["REPORT_FAILED", "REPORTED"]
    assert found.usage_records[0].failure.startswith(NOT_VALID)
    assert_status_transition(await fault_of(delete(client, name)))
    await retry(client, name)
    assert_status_transition(await fault_of(delete(client, name)))
    # What was reported already does not have to be valid any more.
    await change(client, "ent", "dimensions", dimensions=[{"key": "cpu", "name": "CPU"}])
    assert await roll_up(database, next(hours)) == 1
    assert line_of((await listed(client))[-1]) == ("1", "1", "0", "0")


async def test_never_more_is_told_than_was_used(client: Client, database: Database, hours: Iterator[datetime]) -> None:
    """A failed group whose rest was told by a later report cannot be deleted: that rest was billed.

    Would catch a buyer who is billed for usage that is gone.
    """
    await sell(client)
    failing = await use(client, database, next(hours), cpu="1.6")
    await use(client, database, next(hours), cpu="0.6")
    first, second = await lease(client, "mine")
    await complete(client, second.id, "mine", taken=("cpu",))
    await complete(client, first.id, "mine", {"cpu": "no"})
    await retry(client, failing)
    fault = await fault_of(delete(client, failing))
    assert_status_transition(fault)
    assert "cpu" in fault.text
    request = group_pb2.ListUsageRecordGroupsRequest(**ALWAYS)
    groups = (await client.groups.ListUsageRecordGroups(request)).usage_record_groups
    used = sum(Decimal(one.records["cpu"]) for one in groups if state_of(one.usage_records[0]) != "DELETED")
    assert used >= 1


# --- Many at once


async def test_an_hour_is_rolled_up_once(database_url: str, client: Client, hours: Iterator[datetime]) -> None:
    """However many replicas roll an hour up at once, there is one report per entitlement, and each record in it once.

    Would catch two reports of one hour, and reports that hold each other's groups.
    """
    names = ("a", "b", "c")
    for name in names:
        await sell(client, name)
    await reported(client, *(group(f"{name} {i}", name) for name in names for i in range(7)))
    databases = [Database(database_url) for _ in range(4)]
    try:
        hour = next(hours)
        made = await asyncio.gather(*(roll_up(databases[i % 4], hour) for i in range(8)))
    finally:
        for database in databases:
            await database.close()
    assert sum(made) == len(names)
    found = await listed(client)
    assert sorted((one.entitlement_id, one.group_count, line_of(one)[1]) for one in found) == [
        (name, 7, "7") for name in names
    ]


class Brake:
    """Lets whoever comes by stand still before some work until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
        module, _, name = target.rpartition(".")
        work = getattr(importlib.import_module(module), name)
        self.reached, self.released = asyncio.Event(), asyncio.Event()

        async def wait(*arguments: Any, **named: Any) -> Any:
            self.reached.set()
            await self.released.wait()
            return await work(*arguments, **named)

        monkeypatch.setattr(target, wait)


async def waits(database: Database) -> bool:
    """Say whether any transaction waits for another's."""
    async with database.engine.connect() as connection:
        query = sa.text("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
        return bool((await connection.execute(query)).scalar_one())


async def test_a_group_is_not_deleted_while_it_is_rolled_up(
    client: Client, database: Database, hours: Iterator[datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion that comes while the hourly job adds the group up waits, and is then refused.

    Would catch a deleted group in a report: usage that is billed and gone.
    """
    await sell(client)
    await reported(client, group("a"), group("b", records={"cpu": "2"}))
    brake = Brake(monkeypatch, "service.store.roll_up._put_into")
    job = asyncio.create_task(roll_up(database, next(hours)))
    await asyncio.wait_for(brake.reached.wait(), 20)
    deletion = asyncio.create_task(fault_of(delete(client, "a")))
    await until(lambda: waits(database))
    assert not deletion.done()
    brake.released.set()
    assert await job == 1
    assert_status_transition(await deletion)
    assert line_of((await listed(client))[0]) == ("3", "3", "0", "0")


async def test_a_group_is_not_rolled_up_while_it_is_deleted(
    client: Client, database: Database, hours: Iterator[datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hourly job that finds a group being deleted waits for it, and makes its report without the group.

    Would catch the same in the other order: a group that waited when the job looked, and does not any more.
    """
    await sell(client)
    await reported(client, group("a"), group("b", records={"cpu": "2"}))
    brake = Brake(monkeypatch, "service.store.record_groups._set_states")
    deletion = asyncio.create_task(delete(client, "a"))
    await asyncio.wait_for(brake.reached.wait(), 20)
    job = asyncio.create_task(roll_up(database, next(hours)))
    await until(lambda: waits(database))
    assert not job.done()
    brake.released.set()
    await deletion
    assert await job == 1
    (one,) = await listed(client)
    assert (one.group_count, line_of(one)) == (1, ("2", "2", "0", "0"))
    assert (await get_group(client, "a")).status == group_pb2.USAGE_RECORD_GROUP_STATUS_DELETED


async def test_the_ledger_has_one_writer(
    client: Client, database: Database, hours: Iterator[datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that fails while the next one of its entitlement is made changes what is carried before or after it.

    Would catch a carry read before the failure and written after it: a rest that is told twice, or lost.
    """
    await sell(client)
    await use(client, database, next(hours), cpu="1.6")
    (one,) = await lease(client, "mine")
    await reported(client, group("next", records={"cpu": "0.6"}))
    brake = Brake(monkeypatch, "service.store.roll_up._put_into")
    job = asyncio.create_task(roll_up(database, next(hours)))
    await asyncio.wait_for(brake.reached.wait(), 20)
    completion = asyncio.create_task(complete(client, one.id, "mine", {"cpu": "no"}))
    await until(lambda: waits(database))
    brake.released.set()
    await asyncio.gather(job, completion)
    assert line_of((await listed(client))[-1]) == ("1", "0.6", "0.6", "0.2")
    assert await carried(client) == {"cpu": "-0.4"}


AUDIT = (
    "CREATE TABLE audit_leases (report_id uuid, previous timestamptz, token text, at timestamptz)",
    "CREATE TABLE audit_records (group_id text, position integer, report_id uuid)",
    """CREATE FUNCTION audit_lease() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$BEGIN
    INSERT INTO audit_leases VALUES (NEW.id, OLD.lease_deadline, NEW.lease_token, clock_timestamp());
    RETURN NEW; END$$""",
    """CREATE FUNCTION audit_record() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$BEGIN
    INSERT INTO audit_records VALUES (NEW.group_id, NEW.position, NEW.report_id); RETURN NEW; END$$""",
    """CREATE TRIGGER audit AFTER UPDATE ON usage_record_reports FOR EACH ROW
    WHEN (NEW.lease_count IS DISTINCT FROM OLD.lease_count) EXECUTE FUNCTION audit_lease()""",
    """CREATE TRIGGER audit AFTER UPDATE ON usage_records FOR EACH ROW
    WHEN (NEW.report_id IS NOT NULL AND OLD.state = 'CREATED' AND NEW.state LIKE 'REPORT%')
    EXECUTE FUNCTION audit_record()""",
)


class Traffic:
    """Two replicas, their hourly jobs, those who report groups, and reporters of whom some die."""

    def __init__(self, clients: Sequence[Client], databases: Sequence[Database], seed: int) -> None:
        self.clients = clients
        self.databases = databases
        self.draw = random.Random(seed)
        self.names = ("aws", "aws-2", "azure")
        self.groups: list[str] = []
        self.held: dict[str, str] = {}
        self.busy = True
        self.failing = True
        self.numbers = itertools.count()

    async def report(self, number: int) -> None:
        """Report groups, delete some of them, and retry what failed."""
        for i in range(12):
            client, draw = self.draw.choice(self.clients), self.draw
            made = [
                group(
                    f"g{number} {i} {j}",
                    draw.choice(self.names),
                    {"cpu": draw.choice(("0.4", "1", "1.6")), "mem": draw.choice(("0", "0.7", "2"))},
                )
                for j in range(draw.choice((1, 2, 5)))
            ]
            await reported(client, *made)
            self.groups += [one.id for one in made]
            with contextlib.suppress(grpc.aio.AioRpcError):
                await (delete if draw.random() < 0.5 else retry)(client, draw.choice(self.groups))

    async def roll(self, replica: int, hours: Sequence[datetime]) -> None:
        """Roll hours up, each as the servers do it."""
        for hour in hours:
            await reporting.roll_up_hour(self.databases[replica], RULES, hour, wait=self.draw.random() < 0.5)
            await asyncio.sleep(self.draw.random() / 10)

    async def deliver(self) -> None:
        """Lease reports and answer them, or die."""
        while self.busy:
            client, token = self.draw.choice(self.clients), f"token {next(self.numbers)}"
            found = await lease(client, token, max_reports=self.draw.choice((1, 2, 5)))
            for one in found:
                assert one.id not in self.held, "is held by another who lives"
                self.held[one.id] = token
            await asyncio.sleep(self.draw.random() / 50)
            if self.failing and self.draw.random() < 0.3:
                for one in found:
                    del self.held[one.id]
                await end_leases(self.databases[0], token)
                continue
            for one in found:
                told = [line.key for line in one.records if line.quantity != "0"]
                failed = {key: "no" for key in told if self.failing and self.draw.random() < 0.3}
                done = await complete(client, one.id, token, failed, taken=tuple(set(told) - set(failed)))
                assert done.status != report_pb2.USAGE_RECORD_REPORT_STATUS_PENDING
                del self.held[one.id]


@pytest.mark.parametrize("seed", range(2))
async def test_reporters_and_replicas_at_once(database_url: str, database: Database, seed: int) -> None:
    """While groups come, two replicas roll up hour after hour, and ten reporters, some of whom die, lease and answer:
    no report is anybody's before the lease of another has ended, no record is in two reports unless the first one
    failed, and in the end every record was told once and the books balance.

    Would catch a lease given twice, a group in two reports, and a record that no report ever took.
    """
    async with AsyncExitStack() as stack:
        async with database.engine.begin() as connection:
            for statement in AUDIT:
                await connection.execute(sa.text(statement))
        clients = [await stack.enter_async_context(running_server(database_url, partner_rules=RULES)) for _ in range(2)]
        other = Database(database_url)
        stack.push_async_callback(other.close)
        traffic = Traffic(clients, (database, other), seed)
        for name in traffic.names:
            await sell(clients[0], name, partner=name.partition("-")[0].upper())
        start = cell_floor(datetime.now(UTC)) + HOUR
        hours = [start + i * HOUR for i in range(12)]
        async with asyncio.timeout(100):
            reporters = [asyncio.create_task(traffic.deliver()) for _ in range(10)]
            try:
                await asyncio.gather(*map(traffic.report, range(4)), *(traffic.roll(i, hours) for i in range(2)))
                # Then everybody gets through: what failed is retried and told in later hours.
                traffic.failing = False
                for i in itertools.count(12):
                    await settled(clients[0], reporters)
                    again = [one for one in await all_groups(clients[0]) if one.status in UNTOLD]
                    if not again:
                        break
                    for one in again:
                        await retry(clients[i % 2], one.id)
                    await roll_up(traffic.databases[i % 2], start + i * HOUR, RULES)
            finally:
                traffic.busy = False
                await asyncio.gather(*reporters)
        await require_told_once(clients[0], database, traffic.names)


UNTOLD = {
    group_pb2.USAGE_RECORD_GROUP_STATUS_CREATED,
    group_pb2.USAGE_RECORD_GROUP_STATUS_REPORT_FAILED,
}


async def all_groups(client: Client) -> list[Any]:
    """All groups."""
    request = group_pb2.ListUsageRecordGroupsRequest(**ALWAYS)
    return list((await client.groups.ListUsageRecordGroups(request)).usage_record_groups)


async def settled(client: Client, reporters: Sequence["asyncio.Task[None]"]) -> None:
    """Wait until every report is answered."""
    pending = "USAGE_RECORD_REPORT_STATUS_PENDING"
    while await listed(client, status=pending):
        for one in reporters:
            if one.done():
                await one
        await asyncio.sleep(0.02)


async def require_told_once(client: Client, database: Database, names: Sequence[str]) -> None:
    """Require what the test of reporters and replicas claims, of all that is stored and was noted."""
    async with database.engine.connect() as connection:
        leases = (await connection.execute(sa.text("SELECT * FROM audit_leases"))).all()
        taken = (await connection.execute(sa.text("SELECT * FROM audit_records"))).all()
        failed = {
            (row.report_id, row.key)
            for row in await connection.execute(
                sa.text("SELECT report_id, key FROM usage_record_report_lines WHERE outcome = 'FAILED'")
            )
        }
        keys = {
            (row.group_id, row.position): (row.key, row.state)
            for row in await connection.execute(sa.text("SELECT group_id, position, key, state FROM usage_records"))
        }
    assert leases
    assert failed
    assert [row for row in leases if row.previous is not None and row.previous > row.at] == []
    assert any(row.previous is not None for row in leases), "nobody died"
    told: Counter[tuple[str, int]] = Counter()
    for row in taken:
        key, _ = keys[row.group_id, row.position]
        told[row.group_id, row.position] += (row.report_id, key) not in failed
    for record, (_, state) in keys.items():
        assert (state, told[record]) in {("REPORTED", 1), ("DELETED", 0)}, record
    groups, reports = await all_groups(client), await listed(client)
    for name in names:
        left = await carried(client, name)
        for key in ("cpu", "mem"):
            of = [one for one in groups if one.entitlement_id == name]
            rolled = [one for one in reports if one.entitlement_id == name]
            gone = [one for one in of if one.status == group_pb2.USAGE_RECORD_GROUP_STATUS_DELETED]
            kept = [record for one in of if one not in gone for record in one.usage_records if record.key == key]
            used = sum((Decimal(one.quantity) for one in kept), ZERO)
            check_balance(of, rolled, key, used, Decimal(left.get(key, "0")))
            lines = [line for one in rolled for line in one.records if line.key == key and outcome_of(line) != "FAILED"]
            assert sum(line.record_count for line in lines) == len(kept)
