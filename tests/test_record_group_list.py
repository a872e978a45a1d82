"""Claims about the lists of record groups and reports: what they find, how pages are cut, what they refuse and cost."""

import asyncio
import itertools
import json
import math
import re
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

import grpc
import pytest
import sqlalchemy as sa
from conftest import Client, acting_for, running_server, timestamp
from faults import fault_of
from hypothesis import given, settings
from hypothesis import strategies as st
from marketplace import group, lease, report, reported, roll_up, sell
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

import service.rpc.record_groups
import service.rpc.record_reports
from metering.v1 import entitlement_pb2, usage_record_group_pb2, usage_record_report_pb2
from service.auth import new_api_key
from service.database import Database
from service.domain.partners import DEFAULT_RULES, Partner
from service.domain.record_groups import GroupQuery, GroupStatus, Source
from service.domain.record_reports import LINES_MAX, ReportQuery, ReportStatus
from service.domain.usage import PAGE_BYTES_MAX
from service.postgres import EmbeddedPostgres
from service.store import organizations, record_groups, record_reports
from service.store import roll_up as roll_up_store
from service.store.tables import (
    APPLICATION_ROLE,
    customers,
    usage_record_groups,
    usage_record_report_lines,
    usage_record_reports,
    usage_records,
)

TOKEN_REFUSED = ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID", "page_token")
SOURCES = [
    name.removeprefix("USAGE_RECORD_GROUP_SOURCE_") for name, _ in usage_record_group_pb2.UsageRecordGroupSource.items()
]
STATUSES = [one.value for one in GroupStatus]
DAY = timedelta(days=1)
MICROSECOND = timedelta(microseconds=1)
Meta: Any = usage_record_group_pb2.UsageRecordGroupMetaInfo
Listed = usage_record_group_pb2.ListUsageRecordGroupsRequest
Stored = usage_record_group_pb2.UsageRecordGroup


def clock(monkeypatch: pytest.MonkeyPatch, module: Any) -> Any:
    """Give an rpc module a clock that the test sets."""

    class Clock(datetime):
        """A clock that the test sets."""

        at = datetime(2027, 3, 1, 12, tzinfo=UTC)

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.at

    monkeypatch.setattr(module, "datetime", Clock)
    return Clock


async def page_of(client: Client, **fields: Any) -> Any:
    """One page of groups."""
    return await client.groups.ListUsageRecordGroups(Listed(**fields))


async def walk(client: Client, sizes: Iterable[int], **fields: Any) -> list[list[Stored]]:
    """All pages of a list of groups, each of the next size."""
    pages, token = [], ""
    for size in sizes:
        answer = await page_of(client, page_size=size, page_token=token, **fields)
        assert len(answer.usage_record_groups) <= (size or 1000)
        pages.append(list(answer.usage_record_groups))
        token = answer.next_page_token
        if not token:
            return pages
        assert len(token) < 512
    raise AssertionError("the walk did not end")


def ids_of(pages: Iterable[Iterable[Stored]]) -> list[str]:
    """The ids of all groups on pages."""
    return [one.id for page in pages for one in page]


def key_of(one: Stored) -> tuple[int, int, int]:
    """What groups are listed by."""
    return one.create_time.seconds, one.create_time.nanos, one.serial_id


async def place(database: Database, group_id: str, at: datetime, status: str = "CREATED") -> None:
    """Make a stored group look as if it had been stored at another time, and give it and its records a status."""
    own, columns = usage_record_groups.c, usage_records.c
    async with database.engine.begin() as connection:
        await connection.execute(
            sa.update(usage_record_groups).where(own.id == group_id).values(created_at=at, updated_at=at, status=status)
        )
        await connection.execute(sa.update(usage_records).where(columns.group_id == group_id).values(state=status))


# --- Filters, against a plain list


class Bought(NamedTuple):
    """An entitlement of the tests."""

    entitlement_id: str
    partner: str
    buyer_id: str


# Two of one buyer, two of one partner; the last has no groups.
CATALOG = [
    Bought("aws", "AWS", "b-aws"),
    Bought("aws2", "AWS", "b-gcp"),
    Bought("gcp", "GCP", "b-gcp"),
    Bought("azure", "AZURE", "b-azure"),
    Bought("idle", "GCP", "b-idle"),
]


async def stock(client: Client) -> None:
    """Create the catalog of the tests."""
    for buyer in sorted({one.buyer_id for one in CATALOG}):
        await client.create_customer(buyer_id=buyer)
    for one in CATALOG:
        await sell(client, one.entitlement_id, partner=one.partner, buyer_id=one.buyer_id)


TEXTS = ("inv-1", "inv-2", "a=b", "ü ☃", '"', "\\n \\ud800", "inv-1 ")
AMOUNTS = ("12.50", "12.5", "-3", "0")
TIMES = (datetime(2026, 1, 31, tzinfo=UTC), datetime(2026, 1, 31, 23, 59, 59, 999999, tzinfo=UTC))
SCALARS: dict[str, Sequence[Any]] = {
    **dict.fromkeys(
        (
            "lago_subscription_id",
            "metronome_invoice_id",
            "stripe_invoice_id",
            "stripe_subscription_item_id",
            "stripe_usage_record_summary_id",
            "erp_invoice_id",
        ),
        TEXTS,
    ),
    **dict.fromkeys(
        (
            "lago_amount",
            "metronome_daily_cost_amount",
            "metronome_monthly_invoice_amount",
            "metronome_monthly_invoice_amount_adjusted",
            "metronome_invoice_credit_back_amount",
        ),
        AMOUNTS,
    ),
    **dict.fromkeys(("lago_usage_start_time", "stripe_period_start_time", "stripe_period_end_time"), TIMES),
    "metronome_invoice_credit_back": (True,),
    "stripe_usage_record_summary_total_usage": (1, -7, 2**63 - 1),
}
PROPERTIES: tuple[dict[str, Any], ...] = (
    {},
    {"region": "eu"},
    {"region": "us", "n": [1, 2, [3, "eu"]], "on": True},
    {"region": "eu", "o": {"a": {"b": ["c", 1.5, None]}, "n": 1}, "none": None},
    {"n": [{"deep": [{"x": 0.1}]}, {"deep": []}, "1"], "on": 1},
    {"quantity ": "1", "ü": "☃"},
)
# In a list of the year's first quarter: days that begin and end, and months that do.
NOW = datetime(2027, 3, 1, 12, tzinfo=UTC)
OFFSETS = (0, 1, 2, 15, 29, 30, 31, 32, 60)


class Sent(NamedTuple):
    """A group of the tests: how it is reported, and what it is made to look like then."""

    bought: Bought
    source: int
    meta: dict[str, Any]
    billable: tuple[dict[str, Any], ...]
    skip_validation: bool
    allocated: bool
    created_at: datetime
    status: str
    group_id: str = ""

    def message(self) -> usage_record_group_pb2.NewUsageRecordGroup:
        """As it is reported."""
        meta = Meta(source=self.source, skip_validation=self.skip_validation or bool(self.billable))
        for name, value in self.meta.items():
            if isinstance(value, datetime):
                getattr(meta, name).CopyFrom(timestamp(value))
            else:
                setattr(meta, name, value)
        if self.has_allocations:
            meta.usage_allocations["cpu"].allocations.add(quantity="2.50", tags=[{"key": "team", "value": "a"}])
        fields: dict[str, Any] = {"records": {"cpu": "2.5", "Memory": "0.250"}}
        if self.billable:
            fields = {"billable_records": []}
            for i, properties in enumerate(self.billable):
                record = usage_record_group_pb2.BillableRecord(key=f"k{i}", quantity="1.0")
                record.properties.update(properties)
                fields["billable_records"].append(record)
        return group(self.group_id, self.bought.entitlement_id, meta_info=meta, at=self.used_at(), **fields)

    @staticmethod
    def used_at() -> datetime:
        """When it was used: now, as far as partners are concerned."""
        return datetime.now(UTC).replace(microsecond=0)

    @property
    def has_allocations(self) -> bool:
        """Whether its quantities are divided over tags."""
        return self.allocated and self.bought.partner == "AWS" and not self.billable

    @property
    def source_name(self) -> str:
        """Where it comes from: the API unless told otherwise."""
        return SOURCES[self.source] if self.source else "API"

    def shown(self) -> dict[str, Any]:
        """Its meta_info as JSON, its timestamp apart."""
        shown: dict[str, Any] = {
            name: instant_text(value) if isinstance(value, datetime) else value for name, value in self.meta.items()
        }
        shown["source"] = self.source_name
        if self.skip_validation or self.billable:
            shown["skip_validation"] = True
        if self.has_allocations:
            part = {"quantity": "2.5", "tags": [{"key": "team", "value": "a"}]}
            shown["usage_allocations"] = {"cpu": {"allocations": [part]}}
        if self.billable:
            shown["billable_records"] = [
                {"key": f"k{i}", "properties": properties, "quantity": "1"}
                for i, properties in enumerate(self.billable)
            ]
        else:
            shown["origin_records"] = {"cpu": "2.5", "Memory": "0.25"}
        return shown


def instant_text(at: datetime) -> str:
    """An instant as meta_info has it."""
    return at.isoformat().replace("+00:00", "Z")


def contains(whole: Any, part: Any) -> bool:
    """Whether JSON holds a part, as jsonb says it."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and contains(whole[name], part[name]) for name in part)
    if isinstance(part, list):
        return isinstance(whole, list) and all(any(contains(one, wanted) for one in whole) for wanted in part)
    return not isinstance(whole, dict | list) and (isinstance(whole, bool), whole) == (isinstance(part, bool), part)


@st.composite
def sent_groups(draw: st.DrawFn) -> Sent:
    """Any group."""
    names = draw(st.lists(st.sampled_from(sorted(SCALARS)), max_size=4, unique=True))
    day = datetime(NOW.year, NOW.month, NOW.day, tzinfo=UTC) - draw(st.sampled_from(OFFSETS)) * DAY
    return Sent(
        draw(st.sampled_from(CATALOG[:4])),
        draw(st.integers(0, len(SOURCES) - 1)),
        {name: draw(st.sampled_from(SCALARS[name])) for name in names},
        tuple(draw(st.lists(st.sampled_from(PROPERTIES), max_size=2))),
        draw(st.booleans()),
        draw(st.booleans()),
        day + draw(st.sampled_from((timedelta(0), MICROSECOND, timedelta(hours=12), DAY - MICROSECOND))),
        draw(st.sampled_from(STATUSES)),
    )


@st.composite
def parts(draw: st.DrawFn, whole: Any) -> Any:
    """A part of some JSON; or, now and then, something like it."""
    if isinstance(whole, dict):
        if not whole:
            return {}
        names = draw(st.lists(st.sampled_from(sorted(whole)), unique=True, max_size=3))
        return {name: draw(parts(whole[name])) for name in names}
    if isinstance(whole, list):
        return [draw(parts(one)) for one in draw(st.permutations(whole)) if draw(st.booleans())]
    return draw(st.sampled_from((whole, whole, whole, whole, [whole], "other", 1, True, None)))


@st.composite
def questions(draw: st.DrawFn, known: Sequence[Sent]) -> Listed:
    """Any question, mostly one that some of the groups answer."""
    asked = Listed()
    one = draw(st.sampled_from(known)) if known else Sent(CATALOG[0], 0, {}, (), False, False, NOW, "CREATED")
    bought = draw(st.sampled_from((one.bought, one.bought, *CATALOG)))
    match draw(st.sampled_from(("", "partner", "product_id", "entitlement_id", "buyer_id"))):
        case "partner":
            asked.partner = entitlement_pb2.Partner.Value(f"PARTNER_{bought.partner}")
        case "product_id":
            asked.product_id = draw(st.sampled_from((f"p-{bought.entitlement_id}", "nothing")))
        case "entitlement_id":
            asked.entitlement_id = draw(st.sampled_from((bought.entitlement_id, bought.entitlement_id.upper())))
        case "buyer_id":
            asked.buyer_id = draw(st.sampled_from((bought.buyer_id, "nobody")))
    if draw(st.integers(0, 3)) == 0:
        status = draw(st.sampled_from((one.status, *STATUSES)))
        asked.status = usage_record_group_pb2.UsageRecordGroupStatus.Value(f"USAGE_RECORD_GROUP_STATUS_{status}")
    if draw(st.integers(0, 3)) == 0:
        source = draw(st.sampled_from((one.source_name, *SOURCES[1:])))
        asked.source = usage_record_group_pb2.UsageRecordGroupSource.Value(f"USAGE_RECORD_GROUP_SOURCE_{source}")
    match draw(st.sampled_from(("", "", "scalar", "object"))):
        case "scalar":
            scalars = {name: value for name, value in one.shown().items() if not isinstance(value, dict | list)}
            name = draw(st.sampled_from(sorted(scalars)))
            value = draw(st.sampled_from((scalars[name], scalars[name], *map(_shown_scalar, SCALARS.get(name, ())))))
            asked.meta_info = f"{name}={json.dumps(value) if isinstance(value, bool) else value}"
        case "object":
            part = draw(parts(one.shown()))
            ascii_only = draw(st.booleans())
            asked.meta_info = draw(st.sampled_from(("", " \n"))) + json.dumps(part, ensure_ascii=ascii_only)
    today = NOW.date()
    if draw(st.booleans()):
        asked.end_date = str(today - draw(st.sampled_from(OFFSETS)) * DAY)
    if draw(st.booleans()):
        end = date.fromisoformat(asked.end_date) if asked.end_date else today
        asked.start_date = str(end - draw(st.sampled_from(OFFSETS)) * DAY)
    return asked


def _shown_scalar(value: Any) -> Any:
    return instant_text(value) if isinstance(value, datetime) else value


def wanted(asked: Listed, one: Sent) -> bool:
    """Whether a group answers a question."""
    end = date.fromisoformat(asked.end_date) if asked.end_date else NOW.date()
    start = date.fromisoformat(asked.start_date) if asked.start_date else end - 30 * DAY
    part: dict[str, Any] = {}
    if asked.meta_info.lstrip().startswith("{"):
        part = json.loads(asked.meta_info)
    elif asked.meta_info:
        name, _, text = asked.meta_info.partition("=")
        flag = name in ("skip_validation", "metronome_invoice_credit_back")
        number = name == "stripe_usage_record_summary_total_usage"
        part = {name: True if flag else int(text) if number else text}
    return (
        start <= one.created_at.date() <= end
        and asked.partner in (0, entitlement_pb2.Partner.Value(f"PARTNER_{one.bought.partner}"))
        and asked.product_id in ("", f"p-{one.bought.entitlement_id}")
        and asked.entitlement_id in ("", one.bought.entitlement_id)
        and asked.buyer_id in ("", one.bought.buyer_id)
        and asked.status in (0, STATUSES.index(one.status) + 1)
        and (not asked.HasField("source") or SOURCES[asked.source] == one.source_name)
        and contains(one.shown(), part)
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Sent], list[tuple[Listed, int]]]:
    """Groups, and what is asked of them, with page sizes."""
    sent = draw(st.lists(sent_groups(), max_size=10))
    return sent, draw(st.lists(st.tuples(questions(sent), st.sampled_from((0, 1, 2, 5))), min_size=6, max_size=6))


@pytest.fixture
async def stocked(client: Client, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client of a server with a catalog, where it is noon of a first of March."""
    clock(monkeypatch, service.rpc.record_groups).at = NOW
    await stock(client)
    return client


_examples = itertools.count()


@given(case=cases())
@settings(max_examples=30)
async def test_filters_find_what_a_plain_list_would(
    stocked: Client, database: Database, case: tuple[list[Sent], list[tuple[Listed, int]]]
) -> None:
    """For any groups and any filters that may be combined, the list is what plain Python selects and sorts."""
    number = next(_examples)
    known = [one._replace(group_id=f"{number} {i}") for i, one in enumerate(case[0])]
    async with database.engine.begin() as connection:
        await connection.execute(sa.delete(usage_records))
        await connection.execute(sa.delete(usage_record_groups))
    stored = {one.id: one for one in await reported(stocked, *(one.message() for one in known))} if known else {}
    for one in known:
        await place(database, one.group_id, one.created_at, one.status)
    for asked, size in case[1]:
        expected = [one for one in known if wanted(asked, one)]
        expected.sort(key=lambda one: (one.created_at, stored[one.group_id].serial_id), reverse=True)
        fields = {field.name: value for field, value in asked.ListFields()}
        found = await walk(stocked, itertools.repeat(size, 50), **fields)
        assert ids_of(found) == [one.group_id for one in expected], asked
        for row, one in zip(itertools.chain(*found), expected, strict=True):
            assert row.status == STATUSES.index(one.status) + 1
            assert (row.product_id, row.buyer_id) == (f"p-{one.bought.entitlement_id}", one.bought.buyer_id)
            assert row.meta_info == stored[one.group_id].meta_info
            assert row.create_time == timestamp(one.created_at)


async def test_days_are_whole_and_inclusive(
    client: Client, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both dates are UTC days with all they hold; the end is today by default, the start 30 days before the end."""
    at = clock(monkeypatch, service.rpc.record_groups)
    await sell(client)
    days = [datetime(2027, 1, 25, tzinfo=UTC) + i * DAY for i in range(40)]
    stored = {}
    for day in days:
        for name, instant in (("first", day), ("last", day + DAY - MICROSECOND)):
            stored[f"{day:%m-%d} {name}"] = instant
    await reported(client, *map(group, stored))
    for group_id, instant in stored.items():
        await place(database, group_id, instant)

    async def found(**fields: str) -> tuple[str, str, int]:
        ids = ids_of(await walk(client, itertools.repeat(0), **fields))
        return ids[-1], ids[0], len(ids)

    for at.at in (datetime(2027, 3, 1, tzinfo=UTC), datetime(2027, 3, 2, tzinfo=UTC) - MICROSECOND):
        assert await found() == ("01-30 first", "03-01 last", 62)
        assert await found(start_date="2027-02-28") == ("02-28 first", "03-01 last", 4)
        assert await found(end_date="2027-02-27") == ("01-28 first", "02-27 last", 62)
        assert await found(end_date="2027-03-03") == ("02-01 first", "03-03 last", 62)
        assert await found(start_date="2027-02-28", end_date="2027-02-28") == ("02-28 first", "02-28 last", 2)
        assert await found(start_date="1900-01-01", end_date="9000-12-31") == ("01-25 first", "03-05 last", 80)
    for dates in ({"end_date": "1900-01-01"}, {"start_date": "9000-12-31", "end_date": "9000-12-31"}):
        assert not ids_of(await walk(client, [0], **dates))


async def test_deleted_groups_are_listed(client: Client) -> None:
    """A deleted group stays on the list, as DELETED, unless another status is asked for."""
    await sell(client)
    await reported(client, group("kept"), group("gone"))
    await client.groups.DeleteUsageRecordGroup(usage_record_group_pb2.DeleteUsageRecordGroupRequest(id="gone"))
    answer = await page_of(client)
    assert [(one.id, one.status) for one in answer.usage_record_groups] == [("gone", 2), ("kept", 1)]
    for status, ids in ((1, ["kept"]), (2, ["gone"]), (4, [])):
        assert ids_of(await walk(client, [0], status=status)) == ids


async def test_the_list_shows_what_a_get_does(client: Client) -> None:
    """A group on a page, v1 or v2, deleted or not, is the group that Get returns, field by field."""
    await sell(client)
    record = usage_record_group_pb2.BillableRecord(key="k", quantity="2")
    record.properties.update(PROPERTIES[3])
    meta = Meta(skip_validation=True, source=7, stripe_invoice_id="x")
    await reported(
        client, group("v1", meta_info=Meta(source=1)), group("v2", billable_records=[record], meta_info=meta)
    )
    await client.groups.DeleteUsageRecordGroup(usage_record_group_pb2.DeleteUsageRecordGroupRequest(id="v1"))
    rows = (await page_of(client)).usage_record_groups
    assert [one.id for one in rows] == ["v2", "v1"]
    for one in rows:
        request = usage_record_group_pb2.GetUsageRecordGroupRequest(id=one.id)
        assert (await client.groups.GetUsageRecordGroup(request)).group == one


# --- Pages


@pytest.fixture
async def shelf(client: Client, database: Database) -> Client:
    """Eleven groups; some were stored at the same time, and not in the order of their times."""
    await sell(client)
    await reported(client, *(group(f"g{i}", meta_info=Meta(erp_invoice_id=f"e{i % 2}")) for i in range(11)))
    now = datetime.now(UTC) - timedelta(minutes=5)
    for i, minutes in enumerate((3, 3, 1, 5, 1, 1, 9, 9, 2, 0, 9)):
        await place(database, f"g{i}", now - timedelta(minutes=minutes))
    return client


async def test_every_page_size_gives_the_same_groups(shelf: Client) -> None:
    """Whatever the page size, and however it changes, pages put together are the whole list, newest first."""
    for fields, number in (({}, 11), ({"meta_info": "erp_invoice_id=e0"}, 6), ({"buyer_id": "b-ent"}, 11)):
        (whole,) = await walk(shelf, [1000], **fields)
        assert len(whole) == number
        assert [key_of(one) for one in whole] == sorted(map(key_of, whole), reverse=True)
        for size in range(1, number + 2):
            pages = await walk(shelf, itertools.repeat(size, 20), **fields)
            assert list(itertools.chain(*pages)) == whole
            assert [len(page) for page in pages[:-1]] == [size] * (len(pages) - 1)
            assert pages[-1]
        for sizes in ([1, 2, 3], [3, 1, 1, 2], [2, 10_000], [1, 1000], [4, 0]):
            pages = await walk(shelf, [*sizes, 1000], **fields)
            assert list(itertools.chain(*pages)) == whole


async def test_skip_passes_over_groups(shelf: Client) -> None:
    """`skip` leaves out so many groups, from the beginning or from where the token leads; beyond the end is nothing."""
    (whole,) = await walk(shelf, [1000])
    for size, skip in itertools.product((1, 2, 5, 11, 12), (0, 1, 3, 10, 11, 12, 1_000_000)):
        answer = await page_of(shelf, page_size=size, skip=skip)
        assert list(answer.usage_record_groups) == whole[skip : skip + size]
        assert bool(answer.next_page_token) == (skip + size < 11)
        if not answer.next_page_token:
            continue
        # A token goes on after the page that gave it, whatever was skipped before it, and is not bound to a skip.
        for more in (0, 1, 4, 11):
            rest = await page_of(shelf, page_size=3, skip=more, page_token=answer.next_page_token)
            begin = skip + size + more
            assert list(rest.usage_record_groups) == whole[begin : begin + 3]
            assert bool(rest.next_page_token) == (begin + 3 < 11)


async def test_page_sizes_are_bounded(client: Client) -> None:
    """A page holds 1,000 groups by default and at most."""
    await sell(client)
    await reported(client, *(group(f"a{i}") for i in range(1000)))
    await reported(client, *(group(f"b{i}") for i in range(3)))
    for size, expected in ((0, 1000), (999, 999), (1000, 1000), (1001, 1000), (5000, 1000), (2**31 - 1, 1000)):
        answer = await page_of(client, page_size=size)
        assert (len(answer.usage_record_groups), bool(answer.next_page_token)) == (expected, True)
    pages = await walk(client, itertools.repeat(0, 3))
    assert list(map(len, pages)) == [1000, 3]
    assert [one.serial_id for one in itertools.chain(*pages)] == list(range(1003, 0, -1))


def big(group_id: str, records: int, size: int, depth: int = 1) -> usage_record_group_pb2.NewUsageRecordGroup:
    """A group of so many records, each with a property of about so many bytes."""
    value: Any = ["x" * 1000] * (size // 1000)
    for _ in range(depth - 1):
        value = [value]
    billable = []
    for i in range(records):
        record = usage_record_group_pb2.BillableRecord(key=f"k{i}", quantity="1")
        record.properties["p"] = value
        billable.append(record)
    return group(group_id, billable_records=billable, meta_info=Meta(skip_validation=True))


async def test_pages_are_cut_at_a_mebibyte(client: Client) -> None:
    """A page of big groups ends at about 1 MiB, with a token that goes on behind it; one group too large is a page."""
    await sell(client)
    sizes = [
        (1, 1000),
        (20, 4000),
        (60, 4000),
        (1, 1000),
        (90, 10_000),
        (2, 1000),
        (100, 2000),
        (30, 14_000),
        (1, 1000),
    ]
    for i, (records, size) in enumerate(sizes):
        await reported(client, big(f"g{i}", records, size))
    shared = {"key": "team", "value": "v" * 256}
    allocations = [{"quantity": "1", "tags": [shared, {"key": "part", "value": str(i)}]} for i in range(2500)]
    meta = Meta(usage_allocations={"cpu": {"allocations": allocations}})
    await reported(client, group("allocated", records={"cpu": "2500"}, meta_info=meta), group("small"))
    expected = ["small", "allocated", *(f"g{i}" for i in reversed(range(len(sizes))))]
    for size in (1000, 3, 1):
        pages = await walk(client, itertools.repeat(size, 20))
        assert ids_of(pages) == expected
        weights = [sum(one.ByteSize() for one in page) for page in pages]
        for page, weight, following in zip(pages, weights, [*pages[1:], []], strict=True):
            assert weight <= PAGE_BYTES_MAX or len(page) == 1
            # It is not cut without need either.
            if following and len(page) < size:
                assert weight + following[0].ByteSize() > PAGE_BYTES_MAX / 2
        assert max(weights) > PAGE_BYTES_MAX
    # Skipping counts groups, not pages.
    assert ids_of(await walk(client, itertools.repeat(1000, 20), skip=2))[:1] == ["g8"]


async def test_pages_of_failed_groups_are_cut_too(client: Client, database: Database) -> None:
    """Pages keep to 1 MiB when what makes groups large came after they were reported: what marketplaces said."""
    await sell(client)
    await reported(client, *(big(f"g{i}", 200, 0) for i in range(30)))
    columns = usage_records.c
    async with database.engine.begin() as connection:
        failed = {"state": "REPORT_FAILED", "report_id": uuid.uuid4(), "failure": "x" * 256}
        await connection.execute(sa.update(usage_records).where(columns.group_id != "g7").values(**failed))
    pages = await walk(client, itertools.repeat(1000, 30))
    assert ids_of(pages) == [f"g{i}" for i in reversed(range(30))]
    assert all(sum(one.ByteSize() for one in page) <= PAGE_BYTES_MAX for page in pages)
    assert sum(one.ByteSize() for page in pages for one in page) > 1.5 * PAGE_BYTES_MAX


class _As(grpc.aio.UnaryUnaryClientInterceptor):
    """Sends every call with an API key."""

    def __init__(self, text: str) -> None:
        self._header = ("authorization", f"Bearer {text}")

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(details._replace(metadata=grpc.aio.Metadata(self._header)), request)


@pytest.fixture
async def two(database_url: str, database: Database) -> AsyncIterator[tuple[Client, Client]]:
    """Clients of one server for two organizations, each with the same catalog."""
    keys = []
    async with database.engine.begin() as connection:
        for name in ("one", "two"):
            await organizations.create_organization(connection, name)
            keys.append(new_api_key())
            await organizations.create_api_key(connection, name, keys[-1].id, "test", keys[-1].secret_hash)
    async with (
        running_server(database_url) as client,
        grpc.aio.insecure_channel(client.address, interceptors=[_As(keys[0].text)]) as first,
        grpc.aio.insecure_channel(client.address, interceptors=[_As(keys[1].text)]) as second,
    ):
        clients = Client(client.address, first), Client(client.address, second)
        for one in clients:
            await stock(one)
        yield clients


async def test_organizations_have_their_own_lists_and_serials(two: tuple[Client, Client]) -> None:
    """What one organization reports is on no other's list, whatever is asked, and serial ids count for each alone."""
    await reported(two[0], *(group(f"g{i}", "aws") for i in range(3)))
    (other,) = await reported(two[1], group("g0", "aws"))
    await reported(two[0], group("g3", "gcp"))
    assert other.serial_id == 1
    for client, serials in ((two[0], [4, 3, 2, 1]), (two[1], [1])):
        for fields in ({}, {"buyer_id": "b-aws"}, {"entitlement_id": "aws"}, {"meta_info": "source=API"}):
            (rows,) = await walk(client, [0], **fields)
            wanted_serials = [one for one in serials if one < 4 or not {"buyer_id", "entitlement_id"} & set(fields)]
            assert [one.serial_id for one in rows] == wanted_serials
    assert {one.organization_id for one in (await page_of(two[1])).usage_record_groups} == {"two"}


async def test_tokens_fit_their_own_list_only(two: tuple[Client, Client]) -> None:
    """A token of another organization, method or query is refused; page size and skip may change."""
    for client in two:
        await reported(client, *(group(f"g{i}", one.entitlement_id) for i, one in enumerate([*CATALOG, CATALOG[0]])))
    asked: list[dict[str, Any]] = [
        {},
        {"partner": 1},
        {"product_id": "p-aws"},
        {"entitlement_id": "aws"},
        {"buyer_id": "b-aws"},
        {"status": 1},
        {"source": 2},
        {"meta_info": "source=API"},
        {"meta_info": '{"source":"API"}'},
        {"start_date": str(datetime.now(UTC).date() - DAY)},
        {"end_date": str(datetime.now(UTC).date() + DAY)},
    ]
    tokens = [(await page_of(two[0], page_size=1, **fields)).next_page_token for fields in asked]
    assert all(tokens)
    for (i, fields), (j, token) in itertools.product(enumerate(asked), enumerate(tokens)):
        call = page_of(two[0], page_size=2, skip=0, page_token=token, **fields)
        if i == j:
            assert (await call).usage_record_groups
        else:
            assert (await fault_of(call)).brief == TOKEN_REFUSED, (fields, asked[j])
        assert (await fault_of(page_of(two[1], page_token=token, **fields))).brief == TOKEN_REFUSED
    reports = usage_record_report_pb2.ListUsageRecordReportsRequest(page_token=tokens[0])
    assert (await fault_of(two[0].reports.ListUsageRecordReports(reports))).brief == TOKEN_REFUSED
    for bad in ("x", tokens[0][:-1], tokens[0] + "A", tokens[0][::-1], "é", "A" * 100_000):
        assert (await fault_of(page_of(two[0], page_token=bad))).brief == TOKEN_REFUSED


async def test_a_token_keeps_the_first_pages_today(
    client: Client, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The days that a walk covers by default are those of its first page, though midnight passes in mid-walk."""
    at = clock(monkeypatch, service.rpc.record_groups)
    await sell(client)
    await reported(client, *(group(f"g{i}") for i in range(4)))
    for i, instant in enumerate(("2027-01-30T00:00", "2027-02-01T00:00", "2027-03-01T23:00", "2027-03-02T00:00")):
        await place(database, f"g{i}", datetime.fromisoformat(instant + "+00:00"))
    at.at = datetime(2027, 3, 1, 23, 59, 59, 999999, tzinfo=UTC)
    answer = await page_of(client, page_size=1)
    assert ids_of([answer.usage_record_groups]) == ["g2"]
    at.at = datetime(2027, 3, 4, tzinfo=UTC)
    seen = []
    while answer.next_page_token:
        answer = await page_of(client, page_size=1, page_token=answer.next_page_token)
        seen += [one.id for one in answer.usage_record_groups]
    assert seen == ["g1", "g0"]
    assert ids_of(await walk(client, [0])) == ["g3", "g2"]


async def test_walks_while_groups_come_and_go(client: Client) -> None:
    """While groups come and go, a walk gives every group that was there at its first page once, and no other."""
    await stock(client)
    await reported(client, *(group(f"old{i}", CATALOG[i % 4].entitlement_id) for i in range(60)))
    written = 0
    done = asyncio.Event()

    async def write() -> None:
        nonlocal written
        while not done.is_set():
            number, written = written, written + 1
            await reported(client, *(group(f"new{number} {i}", CATALOG[i].entitlement_id) for i in range(4)))
            gone = f"old{number % 60}" if number % 2 else f"new{number} 0"
            await client.groups.DeleteUsageRecordGroup(usage_record_group_pb2.DeleteUsageRecordGroupRequest(id=gone))

    async def read(size: int, **fields: Any) -> None:
        first = await page_of(client, page_size=size, **fields)
        seen = list(first.usage_record_groups)
        # What there is now: the newest that the first page shows, and all before it.
        (before,) = await walk(client, [1000], **fields)
        expected = [one.id for one in before if one.serial_id <= seen[0].serial_id]
        token = first.next_page_token
        while token:
            answer = await page_of(client, page_size=size, page_token=token, **fields)
            seen += answer.usage_record_groups
            token = answer.next_page_token
            await asyncio.sleep(0)
        assert [one.id for one in seen] == expected
        assert [key_of(one) for one in seen] == sorted(map(key_of, seen), reverse=True)
        assert len({one.id for one in seen} & {f"old{i}" for i in range(60)}) >= 15

    writers = [asyncio.create_task(write())]
    try:
        # However slow the machine is, some walks are beside many changes.
        for walks in itertools.count(1):
            await asyncio.gather(
                read(3), read(7, source=2), read(1, buyer_id="b-aws"), read(4, partner=1), read(2, product_id="p-gcp")
            )
            if walks > 1 and (written > 5 or walks == 10):
                break
    finally:
        done.set()
        await asyncio.gather(*writers)
    assert written > 5


async def test_serials_ascend_in_the_order_of_commits(client: Client, database_url: str) -> None:
    """Whoever looks again finds only greater serial ids among the new groups, and none stored before the others."""
    await sell(client)
    done = asyncio.Event()

    async def write(writer: int, server: Client) -> None:
        for i in range(12):
            rows = await reported(server, *(group(f"{writer} {i} {j}") for j in range(1 + (writer + i) % 5)))
            serials = [one.serial_id for one in rows]
            assert serials == list(range(serials[0], serials[0] + len(rows)))
            assert len({(one.create_time.seconds, one.create_time.nanos) for one in rows}) == 1

    async def look() -> list[tuple[int, int, int]]:
        known: list[tuple[int, int, int]] = []
        while True:
            last = done.is_set()
            (rows,) = await walk(client, [1000])
            keys = sorted(map(key_of, rows))
            # What is new comes behind all that was known, by time and by serial id alike.
            assert keys[: len(known)] == known
            known = keys
            if last:
                return known

    looking = [asyncio.create_task(look()) for _ in range(2)]
    async with running_server(database_url) as second, running_server(database_url) as third:
        await asyncio.gather(*(write(i, (client, second, third)[i % 3]) for i in range(5)))
    done.set()
    for known in await asyncio.gather(*looking):
        assert len(known) == sum(1 + (writer + i) % 5 for writer in range(5) for i in range(12))
        serials = [serial for *_, serial in known]
        assert serials == sorted(set(serials))


# --- Bad input

INVALID = ("INVALID_ARGUMENT", "FIELD_INVALID")
TOO_LONG = ("INVALID_ARGUMENT", "LIMIT_EXCEEDED")
BAD_DATES = (
    "2026-02-30",
    "2026-W01-1",
    "1899-12-31",
    "9001-01-01",
    " ",
    "2026-1-1",
    "20260101",
    "2026-01-01 ",
    "today",
)
# The four of which one may be given, in the order in which a second one is named.
EXCLUSIVE: dict[str, Any] = {"partner": 1, "product_id": "p", "entitlement_id": "e", "buyer_id": "b"}
BAD_GROUP_LISTS: list[tuple[dict[str, Any], tuple[str, str], str]] = [
    ({"partner": 99}, INVALID, "partner"),
    ({"partner": -1}, INVALID, "partner"),
    ({"status": 99}, INVALID, "status"),
    ({"status": -(2**31)}, INVALID, "status"),
    ({"source": 99}, INVALID, "source"),
    ({"source": 0}, ("INVALID_ARGUMENT", "FIELD_REQUIRED"), "source"),
    *(({"start_date": one}, INVALID, "start_date") for one in BAD_DATES),
    *(({"end_date": one}, INVALID, "end_date") for one in BAD_DATES),
    ({"start_date": "2026-02-02", "end_date": "2026-02-01"}, ("INVALID_ARGUMENT", "WINDOW_RANGE"), "start_date"),
    ({"start_date": "9000-12-31"}, ("INVALID_ARGUMENT", "WINDOW_RANGE"), "start_date"),
    *(
        ({one: EXCLUSIVE[one], other: EXCLUSIVE[other]}, INVALID, other)
        for one, other in itertools.combinations(EXCLUSIVE, 2)
    ),
    ({"page_size": -1}, INVALID, "page_size"),
    ({"page_size": -(2**31)}, INVALID, "page_size"),
    ({"skip": -1}, INVALID, "skip"),
    ({"skip": 1_000_001}, INVALID, "skip"),
    ({"skip": 2**31 - 1}, INVALID, "skip"),
    *(({name: "x" * 37}, TOO_LONG, name) for name in ("product_id", "entitlement_id", "buyer_id")),
    *(({name: " "}, INVALID, name) for name in ("product_id", "entitlement_id", "buyer_id")),
    *(({name: "a\0b"}, INVALID, name) for name in ("product_id", "entitlement_id", "buyer_id")),
]
BAD_META = [
    "erp_invoice_id",
    "=x",
    "=",
    " ",
    "unknown=1",
    "billable_records=x",
    "origin_records=1",
    "usage_allocations={}",
    " erp_invoice_id=x",
    "erpInvoiceId=x",
    "erp_invoice_id =x",
    "erp_invoice_id=\0",
    "skip_validation=false",
    "skip_validation=True",
    "skip_validation=",
    "metronome_invoice_credit_back=false",
    "stripe_usage_record_summary_total_usage=1.5",
    "stripe_usage_record_summary_total_usage=",
    "stripe_usage_record_summary_total_usage=1e3",
    "stripe_usage_record_summary_total_usage=\u0663",
    "stripe_usage_record_summary_total_usage=" + "9" * 20,
    "erp_invoice_id=" + "x" * 4096,
    "erp_invoice_id=" + "ü" * 2041,
    '["source"]',
    "[]",
    "1",
    "null",
    '"source"',
    "{",
    "{}}",
    "{'source':'API'}",
    '{"source":}',
    '{"source":"API"',
    '{"source":"API",}',
    '{"source":"A\nPI"}',
    '{"source":"\\x41"}',
    '{"unknown":1}',
    '{"":1}',
    '{"erpInvoiceId":"x"}',
    '{"source":"API","unknown":{}}',
    '{"erp_invoice_id":"\\u0000"}',
    '{"erp_invoice_id":"a\\u0000b"}',
    '{"erp_invoice_id":"\0"}',
    '{"billable_records":[{"properties":{"\\u0000":1}}]}',
    '{"erp_invoice_id":"\\ud800"}',
    '{"erp_invoice_id":"\\udc00\\ud800"}',
    '{"billable_records":[{"properties":{"\\udfff":1}}]}',
    '{"stripe_usage_record_summary_total_usage":1e400}',
    '{"stripe_usage_record_summary_total_usage":1E2}',
    '{"stripe_usage_record_summary_total_usage":NaN}',
    '{"stripe_usage_record_summary_total_usage":Infinity}',
    '{"stripe_usage_record_summary_total_usage":-Infinity}',
    '{"stripe_usage_record_summary_total_usage":' + "9" * 65 + "}",
    '{"stripe_usage_record_summary_total_usage":01}',
    '{"stripe_usage_record_summary_total_usage":1.}',
    '{"stripe_usage_record_summary_total_usage":+1}',
    '{"erp_invoice_id":"' + "x" * 4096 + '"}',
    '{"billable_records":' + "[" * 2000 + "]" * 1999 + "}",
    '{"origin_records":' + '{"a":' * 600 + "1}",
    "\ufeff{}",
    "\u00a0{}",
]


async def test_bad_lists_of_groups_are_refused(client: Client) -> None:
    """What a list cannot be asked is INVALID_ARGUMENT, with the field and the reason, and never an internal error."""
    for fields, (code, reason), field in BAD_GROUP_LISTS:
        fault = await fault_of(page_of(client, **fields))
        assert (*fault.brief, len(fault.fields)) == (code, reason, field, 1), fields
    for meta_info in BAD_META:
        fault = await fault_of(page_of(client, meta_info=meta_info))
        assert (*fault.brief, len(fault.fields)) == (*INVALID, "meta_info", 1), meta_info[:200]
    every = {
        "partner": 99,
        "status": 99,
        "source": 99,
        "meta_info": "x",
        "start_date": "x",
        "end_date": "x",
        "skip": -1,
    }
    assert set((await fault_of(page_of(client, **every))).fields) == set(every)
    assert (await fault_of(page_of(client, **EXCLUSIVE))).field == "product_id"


async def test_odd_lists_of_groups_are_answered(client: Client) -> None:
    """What looks odd and is not wrong is answered: the limits themselves, deep nesting, empty values, long numbers."""
    await sell(client)
    await reported(client, group("g", meta_info=Meta(erp_invoice_id="x" * 1000 + "=", lago_amount="1.50")))
    asked: list[tuple[dict[str, Any], int]] = [
        ({"skip": 1_000_000}, 0),
        ({"start_date": "1900-01-01", "end_date": "9000-12-31"}, 1),
        ({"buyer_id": "x" * 36}, 0),
        ({"buyer_id": "b-ent"}, 1),
        ({"source": 1}, 0),
        ({"meta_info": "erp_invoice_id=" + "x" * 1000 + "="}, 1),
        ({"meta_info": "erp_invoice_id=" + "x" * 4081}, 0),
        ({"meta_info": "erp_invoice_id="}, 0),
        ({"meta_info": "lago_amount=1.50"}, 1),
        ({"meta_info": "lago_amount=1.5"}, 0),
        ({"meta_info": "stripe_usage_record_summary_total_usage=" + "9" * 19}, 0),
        ({"meta_info": "{}"}, 1),
        ({"meta_info": " \r\n\t{ }  "}, 1),
        ({"meta_info": '{"origin_records":{}}'}, 1),
        ({"meta_info": '{"origin_records":{"cpu":"1"}}'}, 1),
        ({"meta_info": '{"origin_records":{"cpu":1}}'}, 0),
        ({"meta_info": '{"origin_records":[]}'}, 0),
        ({"meta_info": '{"source":null}'}, 0),
        ({"meta_info": '{"s\\u006furce":"\\u0041PI"}'}, 1),
        ({"meta_info": '{"erp_invoice_id":"\\ud83d\\ude00"}'}, 0),
        ({"meta_info": '{"stripe_usage_record_summary_total_usage":' + "9" * 64 + "}"}, 0),
        ({"meta_info": '{"stripe_usage_record_summary_total_usage":-0.' + "0" * 61 + "}"}, 0),
        ({"meta_info": '{"erp_invoice_id":"' + "x" * (4096 - 21) + '"}'}, 0),
        ({"meta_info": '{"billable_records":' + "[" * 300 + "]" * 300 + "}"}, 0),
        ({"meta_info": '{"origin_records":' + '{"a":' * 300 + "1" + "}" * 301}, 0),
    ]
    for fields, number in asked:
        assert len((await page_of(client, **fields)).usage_record_groups) == number, fields
    # Whatever can be read by the limit of length: answered or refused, but not an internal error.
    for depth in (900, 1000, 1500, 2030):
        call = client.groups.ListUsageRecordGroups(
            Listed(meta_info='{"billable_records":' + "[" * depth + "]" * depth + "}")
        )
        assert await call.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)


@pytest.mark.parametrize("hidden", ['"\\u0000"', '"\\ud800"', '{"\\u0000":1}', '["\\udc00"]'])
async def test_a_name_that_stands_twice_hides_nothing(client: Client, hidden: str) -> None:
    """What a JSON filter says twice is checked both times: text that Postgres refuses is INVALID_ARGUMENT there too."""
    asked = f'{{"erp_invoice_id":{hidden},"erp_invoice_id":"x"}}'
    assert (await fault_of(page_of(client, meta_info=asked))).brief == (*INVALID, "meta_info")


async def test_a_backslash_before_u0000_is_text(client: Client) -> None:
    r"""The six characters \u0000, written as "\\u0000" in JSON, are text like any other, and are found."""
    await sell(client)
    await reported(client, group("g", meta_info=Meta(erp_invoice_id="\\u0000")))
    for meta_info in ("erp_invoice_id=\\u0000", '{"erp_invoice_id":"\\\\u0000"}'):
        assert len((await page_of(client, meta_info=meta_info)).usage_record_groups) == 1, meta_info


# --- Every parameter of the documents' list


async def test_every_parameter_is_taken(client: Client) -> None:
    """Each parameter of the documents' list has a field that filters, alone and with others; no field is left out."""
    await stock(client)
    meta = Meta(source=4, lago_subscription_id="sub")
    await reported(client, group("other", "azure"), group("hit", "gcp", meta_info=meta), group("near", "aws"))
    today = datetime.now(UTC).date()
    alone: list[tuple[dict[str, Any], list[str]]] = [
        ({"partner": "PARTNER_GCP"}, ["hit"]),
        ({"product_id": "p-gcp"}, ["hit"]),
        ({"entitlement_id": "gcp"}, ["hit"]),
        ({"buyer_id": "b-gcp"}, ["hit"]),
        ({"status": "USAGE_RECORD_GROUP_STATUS_CREATED"}, ["near", "hit", "other"]),
        ({"status": "USAGE_RECORD_GROUP_STATUS_REPORTED"}, []),
        ({"source": "USAGE_RECORD_GROUP_SOURCE_LAGO"}, ["hit"]),
        ({"meta_info": "lago_subscription_id=sub"}, ["hit"]),
        ({"start_date": str(today + DAY), "end_date": str(today + DAY)}, []),
        ({"start_date": str(today - DAY)}, ["near", "hit", "other"]),
        ({"end_date": str(today - DAY)}, []),
        ({"page_size": 2}, ["near", "hit"]),
        ({"skip": 1}, ["hit", "other"]),
        ({"skip": 1, "page_size": 1}, ["hit"]),
    ]
    first = await page_of(client, page_size=1)
    alone.append(({"page_token": first.next_page_token}, ["hit", "other"]))
    common = {
        "status": "USAGE_RECORD_GROUP_STATUS_CREATED",
        "source": "USAGE_RECORD_GROUP_SOURCE_LAGO",
        "meta_info": '{"lago_subscription_id":"sub"}',
        "start_date": str(today - 30 * DAY),
        "end_date": str(today + DAY),
        "page_size": 1000,
        "skip": 0,
    }
    exclusive = [fields for fields, _ in alone[:4]]
    together = [({**common, **one}, ["hit"]) for one in ({}, *exclusive)]
    together += [({**common, **one, "skip": 1}, []) for one in exclusive]
    used: set[str] = set()
    for fields, expected in [*alone, *together]:
        request = Listed(**fields)
        used |= {field.name for field, _ in request.ListFields()}
        assert ids_of([(await client.groups.ListUsageRecordGroups(request)).usage_record_groups]) == expected, fields
    assert used == set(Listed.DESCRIPTOR.fields_by_name)


# --- Reports

Reports: Any = usage_record_report_pb2.ListUsageRecordReportsRequest
REPORT_STATUSES = [one.value for one in ReportStatus]


class Told(NamedTuple):
    """A report of the tests."""

    bought: Bought
    marketplace_time: datetime
    status: str
    lines: int = 1
    report_id: str = ""


async def tell(database: Database, *told: Told) -> None:
    """Store reports as the hourly job would leave them."""
    async with database.engine.begin() as connection:
        for one in told:
            buyer = sa.select(customers.c.id).where(customers.c.buyer_id == one.bought.buyer_id).scalar_subquery()
            named = {"organization_id": "default", "id": uuid.UUID(one.report_id)}
            await connection.execute(
                sa.insert(usage_record_reports).values(
                    **named,
                    partner=one.bought.partner,
                    product_id=f"p-{one.bought.entitlement_id}",
                    entitlement_id=one.bought.entitlement_id,
                    customer_id=buyer,
                    marketplace_time=one.marketplace_time,
                    report_deadline=one.marketplace_time + DAY,
                    group_count=1,
                    created_at=one.marketplace_time,
                    status=one.status,
                )
            )
            lines = [
                {
                    "organization_id": "default",
                    "report_id": named["id"],
                    "key": f"k{i:04}",
                    "quantity": 1,
                    "used": 1,
                    "carried_before": 0,
                    "record_count": 1,
                }
                for i in range(one.lines)
            ]
            await connection.execute(sa.insert(usage_record_report_lines), lines)


async def walk_reports(client: Client, sizes: Iterable[int], **fields: Any) -> list[list[Any]]:
    """All pages of a list of reports, each of the next size."""
    pages, token = [], ""
    for size in sizes:
        request = Reports(page_size=size, page_token=token, **fields)
        answer = await client.reports.ListUsageRecordReports(request)
        assert len(answer.usage_record_reports) <= (size or 100)
        pages.append(list(answer.usage_record_reports))
        token = answer.next_page_token
        if not token:
            return pages
    raise AssertionError("the walk did not end")


def _hours(day: int, hour: int) -> datetime:
    return datetime(NOW.year, NOW.month, NOW.day, hour, tzinfo=UTC) - day * DAY


HOURS = [_hours(day, hour) for day in OFFSETS for hour in (0, 23)]


@st.composite
def report_cases(draw: st.DrawFn) -> tuple[list[Told], list[tuple[dict[str, Any], int]]]:
    """Reports, at most one per entitlement and hour, and what is asked of them."""
    taken = draw(st.lists(st.tuples(st.sampled_from(CATALOG), st.sampled_from(HOURS)), unique=True, max_size=12))
    told = [
        Told(
            bought, at, draw(st.sampled_from(REPORT_STATUSES)), 1, str(uuid.UUID(int=draw(st.integers(0, 2**128 - 1))))
        )
        for bought, at in taken
    ]
    asked = []
    for _ in range(6):
        fields: dict[str, Any] = {}
        one = draw(st.sampled_from(CATALOG))
        if draw(st.integers(0, 2)) == 0:
            fields["partner"] = f"PARTNER_{one.partner}"
        if draw(st.integers(0, 2)) == 0:
            fields["entitlement_id"] = one.entitlement_id
        if draw(st.integers(0, 2)) == 0:
            fields["buyer_id"] = draw(st.sampled_from((one.buyer_id, "nobody")))
        if draw(st.integers(0, 2)) == 0:
            fields["status"] = draw(st.integers(1, len(REPORT_STATUSES)))
        end = NOW.date()
        if draw(st.booleans()):
            end -= draw(st.sampled_from(OFFSETS)) * DAY
            fields["end_date"] = str(end)
        if draw(st.booleans()):
            fields["start_date"] = str(end - draw(st.sampled_from(OFFSETS)) * DAY)
        asked.append((fields, draw(st.sampled_from((0, 1, 2, 5)))))
    return told, asked


@given(case=report_cases())
@settings(max_examples=25)
async def test_reports_are_found_by_every_filter(
    stocked: Client, database: Database, monkeypatch: pytest.MonkeyPatch, case: Any
) -> None:
    """For any reports and any filters, the list is what plain Python selects, the latest hour first, then by id."""
    clock(monkeypatch, service.rpc.record_reports).at = NOW
    told: list[Told] = list({one.report_id: one for one in case[0]}.values())
    async with database.engine.begin() as connection:
        await connection.execute(sa.delete(usage_record_report_lines))
        await connection.execute(sa.delete(usage_record_reports))
    await tell(database, *told)
    for fields, size in case[1]:
        end = date.fromisoformat(fields.get("end_date", str(NOW.date())))
        start = date.fromisoformat(fields["start_date"]) if "start_date" in fields else end - 30 * DAY
        expected = [
            one
            for one in told
            if fields.get("partner", f"PARTNER_{one.bought.partner}") == f"PARTNER_{one.bought.partner}"
            and fields.get("entitlement_id", one.bought.entitlement_id) == one.bought.entitlement_id
            and fields.get("buyer_id", one.bought.buyer_id) == one.bought.buyer_id
            and fields.get("status", REPORT_STATUSES.index(one.status) + 1) == REPORT_STATUSES.index(one.status) + 1
            and start <= one.marketplace_time.date() <= end
        ]
        expected.sort(key=lambda one: (one.marketplace_time, one.report_id), reverse=True)
        found = await walk_reports(stocked, itertools.repeat(size, 20), **fields)
        rows = list(itertools.chain(*found))
        assert [one.id for one in rows] == [one.report_id for one in expected], fields
        for row, one in zip(rows, expected, strict=True):
            assert (row.entitlement_id, row.buyer_id) == (one.bought.entitlement_id, one.bought.buyer_id)
            assert row.marketplace_time == timestamp(one.marketplace_time)


async def test_pages_of_reports(client: Client, database: Database) -> None:
    """Every page size gives the same reports, 100 by default and 1,000 at most; a page holds at most 5,000 records."""
    await stock(client)
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    told = [
        Told(CATALOG[i % 4], hour - timedelta(hours=i // 4), "SUCCEEDED", 1, str(uuid.uuid4())) for i in range(1003)
    ]
    end = str(hour.date() + DAY)
    await tell(database, *told[:9])
    (whole,) = await walk_reports(client, [1000], end_date=end)
    assert len(whole) == 9
    for size in range(1, 11):
        pages = await walk_reports(client, itertools.repeat(size, 20), end_date=end)
        assert list(itertools.chain(*pages)) == whole
        assert [len(page) for page in pages[:-1]] == [size] * (len(pages) - 1)
        assert pages[-1]
    for sizes in ([1, 2, 3, 1000], [3, 1, 1, 2, 9], [2, 0]):
        assert list(itertools.chain(*await walk_reports(client, sizes, end_date=end))) == whole
    await tell(database, *told[9:])
    for size, expected in ((0, 100), (999, 999), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)):
        answer = await client.reports.ListUsageRecordReports(Reports(page_size=size, end_date=end))
        assert (len(answer.usage_record_reports), bool(answer.next_page_token)) == (expected, True)
    large = [
        Told(CATALOG[4], hour - timedelta(hours=i), "PENDING", LINES_MAX // 4 + i % 2, str(uuid.uuid4()))
        for i in range(6)
    ]
    await tell(database, *large)
    pages = await walk_reports(client, itertools.repeat(0, 9), entitlement_id="idle", end_date=end)
    # 1,250 and 1,251 records in turn: the fourth would be one too many.
    assert [[one.id for one in page] for page in pages] == [
        [one.report_id for one in large[:3]],
        [one.report_id for one in large[3:]],
    ]
    assert [sum(len(one.records) for one in page) for page in pages] == [3751, 3752]


async def test_real_reports_are_listed(client: Client, database: Database) -> None:
    """A report that the hourly job made is listed as it is leased, and the list keeps up with its state."""
    await sell(client)
    await reported(client, group("g"))
    await roll_up(database)
    ((listed,),) = await walk_reports(client, [0])
    assert (listed.status, listed.group_count, listed.entitlement_id) == (1, 1, "ent")
    (leased,) = await lease(client, "token")
    ((listed,),) = await walk_reports(client, [0], status=1)
    assert listed == leased
    assert await walk_reports(client, [0], status=2) == [[]]


async def test_bad_lists_of_reports_are_refused(client: Client, database: Database) -> None:
    """What a list of reports cannot be asked is INVALID_ARGUMENT, with the field and the reason."""
    bad: list[tuple[dict[str, Any], tuple[str, str], str]] = [
        (fields, fault, field)
        for fields, fault, field in BAD_GROUP_LISTS
        if set(fields) <= set(Reports.DESCRIPTOR.fields_by_name)
    ]
    bad = [one for one in bad if len(set(one[0]) & set(EXCLUSIVE)) < 2]
    assert len(bad) > 25
    for fields, (code, reason), field in bad:
        fault = await fault_of(client.reports.ListUsageRecordReports(Reports(**fields)))
        assert (*fault.brief, len(fault.fields)) == (code, reason, field, 1), fields
    await stock(client)
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    ids = [str(uuid.uuid4()) for _ in range(3)]
    await tell(database, *(Told(CATALOG[i], hour, "PENDING", 1, one) for i, one in enumerate(ids)))
    token = (await client.reports.ListUsageRecordReports(Reports(page_size=1))).next_page_token
    for fields in (
        {"partner": 1},
        {"entitlement_id": "aws"},
        {"buyer_id": "b-aws"},
        {"status": 1},
        {"start_date": str(hour.date() - DAY)},
        {"end_date": str(hour.date() + DAY)},
    ):
        request = Reports(page_token=token, **fields)
        assert (await fault_of(client.reports.ListUsageRecordReports(request))).brief == TOKEN_REFUSED, fields
    assert (await fault_of(page_of(client, page_token=token))).brief == TOKEN_REFUSED
    # A filter by two that never go together finds nothing; each of them alone is no fault.
    answer = await client.reports.ListUsageRecordReports(Reports(partner=1, buyer_id="b-azure"))
    assert not answer.usage_record_reports


# --- What lists cost

# Groups of an organization that uses a few entitlements much and most of them little, over 90 days; the oldest fifth
# came from one system. Batches of a hundred were stored at once. The last entitlement has three groups.
FILL_GROUPS = """
INSERT INTO usage_record_groups
SELECT 'default', 'g' || i, i,
  CASE WHEN product >= (ents - 1) / 10 THEN 'GCP' WHEN product % 10 = 5 THEN 'AZURE' ELSE 'AWS' END,
  'p-' || product, 'e-' || e, ('00000000-0000-4000-8000-' || lpad((e / 2)::text, 12, '0'))::uuid, status, source,
  created_at - interval '3 hours',
  jsonb_build_object('source', source, 'timestamp', to_char(created_at, 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
      'erp_invoice_id', 'erp-' || i / 10, 'origin_records', jsonb_build_object('mem', (i % 977)::text))
    || CASE WHEN i <= n / 5 THEN '{{"lago_subscription_id": "old"}}'::jsonb ELSE '{{}}' END
    || CASE WHEN i % 100 = 0 THEN '{{"stripe_invoice_id": "one in a hundred"}}'::jsonb ELSE '{{}}' END
    || CASE WHEN i % 20 = 3 THEN jsonb_build_object('billable_records', jsonb_build_array(jsonb_build_object(
         'key', 'calls', 'properties', jsonb_build_object('region', 'r' || i % 7, 'deep', jsonb_build_array(i % 1000)),
         'quantity', '1'))) ELSE '{{}}' END,
  decode(md5(i::text), 'hex'), NULL, NULL, created_at, created_at,
  CASE WHEN status = 'REPORTED' THEN created_at + interval '2 hours' END
FROM (
  SELECT *, e / 10 AS product,
    CASE WHEN i % (n / 5) = 1 THEN 'INVALID' WHEN i > n - n / 1000 THEN 'CREATED' WHEN i > n - n / 300
         THEN 'REPORT_PENDING' WHEN h < 900 THEN 'REPORTED' WHEN h < 950 THEN 'REPORT_FAILED' ELSE 'DELETED'
         END AS status,
    CASE WHEN i % (n / 20) = 2 THEN 'INTERNAL' WHEN i <= n / 5 THEN 'LAGO' WHEN h % 20 = 0 THEN 'STRIPE' ELSE 'API'
         END AS source,
    now() - interval '90 days' * (n - i / 100 * 100)::float / n - interval '1 minute' AS created_at
  FROM (
    SELECT i, n, n / 500 AS ents, i * 104729 % 10007 % 1000 AS h,
      CASE WHEN i % (n / 3) = 5 THEN n / 500 ELSE floor(n / 500 * power(i * 7919 % 100003 / 100003.0, 3))::int END AS e
    FROM (SELECT {n} AS n) AS size, generate_series(1::bigint, n) AS i
  ) AS drawn
) AS made
"""
FILL = (
    "SET LOCAL session_replication_role = replica",
    "INSERT INTO organizations (id) VALUES ('default') ON CONFLICT DO NOTHING",
    "INSERT INTO customers (organization_id, id, name, buyer_id, custom_fields, create_digest)"
    " SELECT 'default', ('00000000-0000-4000-8000-' || lpad(i::text, 12, '0'))::uuid, 'C', 'b-' || i, '{{}}', ''"
    " FROM generate_series(0, {n} / 1000 + 1) AS i",
    "INSERT INTO entitlements SELECT 'default', 'e-' || i, 'E', 'p-' || i / 10,"
    " ('00000000-0000-4000-8000-' || lpad((i / 2)::text, 12, '0'))::uuid, 'AWS', 'ACTIVE',"
    """ '[["ACTIVE", "2020-01-01T00:00:00+00:00"]]', '2020-01-01', NULL,"""
    """ '[["cpu", "CPU"]]', '{{}}', ''"""
    " FROM generate_series(0, {n} / 500 + 1) AS i",
    FILL_GROUPS,
    "INSERT INTO usage_records"
    " SELECT organization_id, id, 0, entitlement_id, 'cpu', 1, NULL, timestamp, status, NULL, NULL"
    " FROM usage_record_groups",
    # One report in a thousand is not answered yet; the others keep the token they were leased with.
    "INSERT INTO usage_record_reports SELECT 'default', gen_random_uuid(), 'AWS', 'p-' || e / 10, 'e-' || e,"
    " ('00000000-0000-4000-8000-' || lpad((e / 2)::text, 12, '0'))::uuid, hour, hour + interval '1 day', 1, hour,"
    " CASE WHEN i % 1000 = 0 THEN 'PENDING' ELSE 'SUCCEEDED' END, hour,"
    " CASE WHEN i % 1000 <> 0 THEN 't' || i / 25 END, CASE WHEN i % 1000 <> 0 THEN hour END, 1"
    " FROM (SELECT i, i % ({n} / 500) AS e,"
    " date_trunc('hour', now()) - interval '1 hour' * (1 + i / ({n} / 500)) AS hour"
    " FROM generate_series(0, {n} / 10 - 1) AS i) AS made",
    "INSERT INTO usage_record_report_lines"
    " SELECT organization_id, id, 'cpu', 1, 1, 0, 1, NULL, '' FROM usage_record_reports",
)


async def fill(database: Database, number: int) -> None:
    """Store so many groups, and what belongs to them, quickly: indexes are made last."""
    async with database.engine.begin() as connection:
        await connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        query = sa.text(
            "SELECT indexname, indexdef FROM pg_indexes WHERE tablename LIKE 'usage_record%' AND indexname LIKE '%_idx'"
        )
        indexes = (await connection.execute(query)).all()
        for index in indexes:
            await connection.exec_driver_sql(f"DROP INDEX {index.indexname}")
        for statement in FILL:
            await connection.exec_driver_sql(statement.format(n=number))
        for index in indexes:
            await connection.exec_driver_sql(index.indexdef)
    async with database.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.exec_driver_sql("SET statement_timeout = 0")
        await connection.exec_driver_sql("VACUUM ANALYZE")
        await connection.exec_driver_sql("RESET statement_timeout")


class Statement(NamedTuple):
    """A statement as it was sent."""

    text: str
    parameters: tuple[Any, ...]


class Node(NamedTuple):
    """A node of a plan that reads a table: which, by which index, and how many rows it looked at."""

    kind: str
    table: str
    by: str
    rows: int


async def sent_by(
    connection: AsyncConnection, work: Callable[[AsyncConnection], Awaitable[Any]]
) -> tuple[Any, list[Statement]]:
    """Run some work, and return its answer with the statements it sent that have a plan."""
    found: list[Statement] = []

    def note(_: Any, __: Any, text: str, parameters: Any, *___: Any) -> None:
        if re.match(r"\s*(SELECT (?!set_config)|INSERT|UPDATE|DELETE|WITH)", text):
            found.extend(
                Statement(text, tuple(one)) for one in (parameters if isinstance(parameters, list) else [parameters])
            )

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        answer = await work(connection)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    return answer, found


async def explain(connection: AsyncConnection, statement: Statement, *, analyze: bool = True) -> list[Node]:
    """How Postgres answers a statement with its parameters: what it reads."""
    how = "ANALYZE, BUFFERS, " if analyze else ""
    async with _inside(connection, statement) as inside:
        answer = await connection.exec_driver_sql(f"EXPLAIN ({how}FORMAT JSON) {statement.text}", statement.parameters)
    return [*_nodes(_plan(answer.scalar_one())), *inside]


async def explain_habit(connection: AsyncConnection, habit: Statement, statement: Statement) -> list[Node]:
    """How Postgres answers a prepared statement after it was sent often, with some parameters or others."""
    await connection.exec_driver_sql(f"PREPARE often AS {habit.text}")
    for _ in range(6):
        await connection.exec_driver_sql(f"EXECUTE often ({_literals(habit)})")
    async with _inside(connection, statement) as inside:
        answer = await connection.exec_driver_sql(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE often ({_literals(statement)})"
        )
    await connection.exec_driver_sql("DEALLOCATE often")
    return [*_nodes(_plan(answer.scalar_one())), *inside]


@asynccontextmanager
async def _inside(connection: AsyncConnection, statement: Statement) -> AsyncIterator[list[Node]]:
    """Collect what a function that a statement calls reads, which the plan of the statement does not show."""
    found: list[Node] = []
    if CONTAINING not in statement.text:
        yield found
        return
    logged: list[str] = []
    driver = (await connection.get_raw_connection()).driver_connection

    def note(_: Any, message: Any) -> None:
        logged.append(message.message)

    # As the superuser that logged in; then in the role again.
    role = (await connection.exec_driver_sql("SELECT current_user")).scalar_one()
    await connection.exec_driver_sql("RESET ROLE")
    await connection.exec_driver_sql("LOAD 'auto_explain'")
    settings = {"log_min_duration": 0, "log_analyze": "on", "log_nested_statements": "on"}
    for name, value in {**settings, "log_format": "json", "log_level": "notice"}.items():
        await connection.exec_driver_sql(f"SET LOCAL auto_explain.{name} = {value}")
    await connection.exec_driver_sql(f"SET LOCAL ROLE {role}")
    assert driver is not None
    driver.add_log_listener(note)
    yield found
    await asyncio.sleep(0)  # listeners are called by the loop
    driver.remove_log_listener(note)
    # Setting it needs the superuser; -1 logs nothing.
    await connection.exec_driver_sql("RESET ROLE")
    await connection.exec_driver_sql("SET LOCAL auto_explain.log_min_duration = -1")
    await connection.exec_driver_sql(f"SET LOCAL ROLE {role}")
    plans = [json.loads(one.partition("plan:")[2]) for one in logged if "plan:" in one]
    (own,) = [one for one in plans if one["Query Text"].startswith("SELECT id, created_at, serial_id")]
    found += _nodes(own["Plan"])


def _literals(statement: Statement) -> str:
    return ", ".join("'" + str(one).replace("'", "''") + "'" for one in statement.parameters)


def _plan(answer: Any) -> dict[str, Any]:
    (found,) = json.loads(answer) if isinstance(answer, str) else answer
    return found["Plan"]  # type: ignore[no-any-return]


def _nodes(plan: Mapping[str, Any]) -> Iterator[Node]:
    if "Relation Name" in plan and plan["Node Type"] != "ModifyTable":
        removed = plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Index Recheck", 0)
        rows = (plan.get("Actual Rows", 0) + removed) * plan.get("Actual Loops", 1)
        index = plan.get("Index Name", "") or ", ".join(_bitmaps(plan))
        yield Node(plan["Node Type"], plan["Relation Name"], index, round(rows))
    for one in plan.get("Plans", ()):
        yield from _nodes(one)


def _bitmaps(plan: Mapping[str, Any]) -> Iterator[str]:
    for one in plan.get("Plans", ()):
        if one["Node Type"] == "Bitmap Index Scan":
            yield one["Index Name"]
        yield from _bitmaps(one)


def scanned(nodes: Sequence[Node]) -> list[Node]:
    """Where a table that grows without end is read from one end to the other."""
    return [node for node in nodes if node.kind == "Seq Scan" and node.table.startswith("usage_record")]


def rows_read(nodes: Sequence[Node]) -> int:
    """How many groups were looked at."""
    return sum(node.rows for node in nodes if node.table == "usage_record_groups")


class Asked(NamedTuple):
    """A list of groups whose cost is bounded; `by` is the index by which it must be read, empty = any."""

    label: str
    filters: dict[str, Any]
    by: str = ""


def _by(column: str) -> str:
    return f"usage_record_groups_by_{column}_idx"


def lists(n: int) -> tuple[list[Asked], list[Asked], list[Asked]]:
    """What is asked of a million groups: one filter, several, and parts of meta_info."""
    single = [
        Asked("no filter", {}, _by("time")),
        # What is true of most is found among all as well.
        Asked("partner, most", {"partner": Partner.AWS}),
        *(Asked(f"partner {one.value}", {"partner": one}, _by("partner")) for one in (Partner.AZURE, Partner.GCP)),
        Asked("product, most", {"product_id": "p-0"}, _by("product_id")),
        Asked("product, few", {"product_id": f"p-{n // 5000 - 2}"}, _by("product_id")),
        Asked("product, none", {"product_id": "x"}, _by("product_id")),
        Asked("entitlement, most", {"entitlement_id": "e-0"}, _by("entitlement_id")),
        Asked("entitlement, three", {"entitlement_id": f"e-{n // 500}"}, _by("entitlement_id")),
        Asked("entitlement, none", {"entitlement_id": "x"}, _by("entitlement_id")),
        Asked("buyer, most", {"buyer_id": "b-0"}, _by("customer_id")),
        Asked("buyer, three", {"buyer_id": f"b-{n // 1000}"}, _by("customer_id")),
        Asked("buyer, none", {"buyer_id": "x"}, _by("customer_id")),
        *(
            Asked(f"status {one.value}", {"status": one}, "" if one is GroupStatus.REPORTED else _by("status"))
            for one in GroupStatus
        ),
        *(Asked(f"source {one.value}", {"source": one}, "" if one is Source.API else _by("source")) for one in Source),
    ]
    failed, invalid, created = GroupStatus.REPORT_FAILED, GroupStatus.INVALID, GroupStatus.CREATED
    several = [
        Asked("partner, status", {"partner": Partner.AWS, "status": failed}),
        Asked("partner, rare status", {"partner": Partner.AWS, "status": invalid}, _by("status")),
        Asked("rare partner, rare status", {"partner": Partner.GCP, "status": invalid}, _by("status")),
        Asked("partner, source", {"partner": Partner.AWS, "source": Source.LAGO}),
        Asked("product, source", {"product_id": "p-0", "source": Source.STRIPE}),
        Asked("entitlement, status", {"entitlement_id": "e-0", "status": failed}),
        Asked("entitlement, rare status", {"entitlement_id": "e-0", "status": created}, _by("status")),
        Asked("rare entitlement, status", {"entitlement_id": f"e-{n // 500}", "status": failed}),
        Asked("buyer, source", {"buyer_id": "b-0", "source": Source.STRIPE}),
        Asked("status, source", {"status": failed, "source": Source.STRIPE}),
        Asked("product, status, source", {"product_id": "p-0", "status": failed, "source": Source.STRIPE}),
    ]
    meta = [
        Asked("meta, ten", {"meta_info": f'{{"erp_invoice_id":"erp-{n // 20}"}}'}, _by("meta_info")),
        Asked("meta, none", {"meta_info": '{"erp_invoice_id":"nowhere"}'}, _by("meta_info")),
        Asked("meta, most", {"meta_info": '{"source":"API"}'}, _by("time")),
        Asked("meta, all", {"meta_info": "{}"}, _by("time")),
        Asked("meta, one in twenty", {"meta_info": '{"billable_records":[{"key":"calls"}]}'}),
        Asked("meta, one in a hundred", {"meta_info": '{"stripe_invoice_id":"one in a hundred"}'}),
        Asked("meta, nested", {"meta_info": '{"billable_records":[{"properties":{"deep":[3]}}]}'}),
        Asked("meta, none, partner", {"meta_info": '{"erp_invoice_id":"nowhere"}', "partner": Partner.AWS}),
        Asked("meta, none, status", {"meta_info": '{"erp_invoice_id":"nowhere"}', "status": created}),
        Asked("meta, ten, entitlement", {"meta_info": '{"erp_invoice_id":"erp-7"}', "entitlement_id": "e-0"}),
    ]
    return single, several, meta


# Matches in the oldest fifth only: the newest groups say nothing of them.
CLUSTERED = Asked("meta, the oldest fifth", {"meta_info": '{"lago_subscription_id":"old"}'})


# The function that finds groups by their meta_info.
CONTAINING = "metering_groups_containing"
# Groups that are read faster than a plan can be thought over.
IN_PASSING = 20_000


class Shelf(NamedTuple):
    """A database with many groups."""

    database: Database
    number: int
    days: dict[str, tuple[datetime, datetime]]
    deep: tuple[datetime, int]
    counts: dict[GroupQuery, int]

    @classmethod
    async def of(cls, database: Database, number: int) -> "Shelf":
        """Make one."""
        await fill(database, number)
        midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        days = {
            "all": (midnight - 100 * DAY, midnight + 2 * DAY),
            "30 days": (midnight - 29 * DAY, midnight + 2 * DAY),
            "one day": (midnight - 45 * DAY, midnight - 44 * DAY),
        }
        columns = usage_record_groups.c
        query = sa.select(columns.created_at, columns.serial_id).where(columns.serial_id == number * 8 // 10)
        async with database.engine.connect() as connection:
            deep = (await connection.execute(query)).one()
        return cls(database, number, days, (deep[0], deep[1]), {})

    def pages(self) -> list[tuple[str, tuple[datetime, int] | None]]:
        """Ranges of days, and places within them."""
        return [(name, None) for name in self.days] + [("all", self.deep)]

    def query(self, asked: Asked, days: str) -> GroupQuery:
        """The query of a list."""
        return GroupQuery(*self.days[days], **asked.filters)

    async def sent(
        self, connection: AsyncConnection, query: GroupQuery, after: tuple[datetime, int] | None, limit: int
    ) -> list[Statement]:
        """The statements that a page sends."""

        async def work(one: AsyncConnection) -> Any:
            return await record_groups.list_groups(one, "default", query, after, 0, limit)

        return (await sent_by(connection, work))[1]

    async def bound(self, query: GroupQuery, limit: int) -> int:
        """How many groups a page may look at: about all that the best filter finds, or those down to the page's last.

        Whichever is less, ten times over for a guess that was wrong; reading a few in passing is no fault either.
        """
        every = {name: value for name, value in query._asdict().items() if value is not None}
        days = {name: every.pop(name) for name in ("start", "end")}
        whole = await self._count(GroupQuery(**days))
        best = min([await self._count(GroupQuery(**days, **{name: every[name]})) for name in every] or [whole])
        found = await self._count(query)
        walk = math.ceil(1.2 * (limit + 1) * whole / found) if found > limit else best
        return max(10 * min(best, walk), min(max(best, walk), IN_PASSING))

    async def _count(self, query: GroupQuery) -> int:
        if query not in self.counts:
            columns = usage_record_groups.c
            where = [columns.organization_id == "default", *record_groups._conditions("default", query, None, columns)]
            if query.meta_info is not None:
                wanted = sa.cast(sa.literal(query.meta_info, sa.Text), JSONB)
                scoped = sa.func.metering_scoped(columns.organization_id, columns.meta_info, type_=JSONB)
                where.append(scoped.contains(sa.func.metering_scoped("default", wanted, type_=JSONB)))
            counted = sa.select(sa.func.count()).select_from(usage_record_groups).where(*where)
            # As the owner of the tables, who needs not be kept from anything.
            async with self.database.engine.connect() as connection:
                self.counts[query] = (await connection.execute(counted)).scalar_one()
        return self.counts[query]


async def require_cheap(shelf: Shelf, limits: Sequence[int]) -> None:
    """Fail if a page of any list reads more than it must."""
    single, several, meta = lists(shelf.number)
    faults = []
    for asked, (days, after), limit in itertools.product([*single, *several, *meta], shelf.pages(), limits):
        async with acting_for(shelf.database, "default") as connection:
            query = shelf.query(asked, days)
            statements = await shelf.sent(connection, query, after, limit)
            assert any("LIMIT" in one.text for one in statements)
            nodes = [node for one in statements for node in await explain(connection, one)]
            own = [node for node in nodes if node.table == "usage_record_groups"]
            # A day is so little that its groups may be read whole.
            exact = asked.by and days != "one day"
            misled = bool(exact) and not any(asked.by in node.by for node in own)
            read = sum(node.rows for node in own)
            # Each row of the page, and the one behind it, is found, weighed and read.
            page = 3 * (limit + 1) + 1
            # Whether a part of meta_info is frequent shows when the newest groups are looked at.
            page += IN_PASSING if "meta_info" in asked.filters else 0
            bound = 0 if exact and asked in single else await shelf.bound(query, limit)
            if misled or scanned(nodes) or read > bound + page:
                faults.append((asked.label, days, after is not None, limit, read, bound, own))
    assert not faults, "\n".join(map(str, faults))


async def test_each_filter_has_an_index(database: Database) -> None:
    """With 30,000 groups, no page of any list reads them all, nor more than the best of its filters finds."""
    await require_cheap(await Shelf.of(database, 30_000), (100,))


@pytest.fixture(scope="module")
async def million(postgres: EmbeddedPostgres, template: str) -> AsyncIterator[Shelf]:
    """A database with a million groups, and a hundred thousand reports."""
    url = sa.make_url(postgres.url)
    administration = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with administration.connect() as connection:
        await connection.exec_driver_sql(f'CREATE DATABASE "million" TEMPLATE "{template}"')
    database = Database(url.set(database="million").render_as_string(hide_password=False))
    yield await Shelf.of(database, 1_000_000)
    await database.close()
    async with administration.connect() as connection:
        await connection.exec_driver_sql('DROP DATABASE "million" WITH (FORCE)')
    await administration.dispose()


@pytest.mark.long
async def test_each_filter_has_an_index_on_a_million_groups(million: Shelf) -> None:
    """With a million groups, no page of any list reads them all, nor more than the best of its filters finds."""
    await require_cheap(million, (100, 1000))


@pytest.mark.long
async def test_pages_of_a_million_groups_are_quick(million: Shelf) -> None:
    """A page of any list of a million groups, the first or one deep inside, comes in seconds; prints them."""

    async def page(query: GroupQuery, after: tuple[datetime, int] | None, limit: int, one: AsyncConnection) -> Any:
        return await record_groups.list_groups(one, "default", query, after, 0, limit)

    single, several, meta = lists(million.number)
    for asked in [*single, *several, *meta, CLUSTERED]:
        shown = [f"{asked.label:26}"]
        for limit, after in itertools.product((100, 1000), (None, million.deep)):
            times = []
            for _ in range(5):
                began = time.perf_counter()
                await million.database.read("default", partial(page, million.query(asked, "all"), after, limit))
                times.append((time.perf_counter() - began) * 1000)
            shown.append(f"{statistics.median(times):7.1f}")
            # Nobody waits for ever, whatever else the machine does.
            assert statistics.median(times) < 10_000, (asked.label, limit, times)
        print(*shown)  # median ms: 100 rows of the first page and deep inside, then 1,000


@pytest.mark.long
async def test_a_list_asked_often_stays_cheap(million: Shelf) -> None:
    """What a connection was asked before, often and with any values, does not make a page read more than it must."""
    single, several, meta = lists(million.number)
    asked = [*single, *several, *meta]
    faults = []
    async with acting_for(million.database, "default") as connection:
        sent = {}
        for one in asked:
            statements = await million.sent(connection, million.query(one, "all"), None, 100)
            (sent[one.label],) = [statement for statement in statements if "LIMIT" in statement.text][-1:]
        for habit, one in itertools.product(asked, repeat=2):
            if sent[habit.label].text != sent[one.label].text:
                continue
            bound = await million.bound(million.query(one, "all"), 100)
            nodes = await explain_habit(connection, sent[habit.label], sent[one.label])
            if scanned(nodes) or rows_read(nodes) > bound + IN_PASSING:
                faults.append((habit.label, one.label, rows_read(nodes), bound, nodes))
    assert not faults, "\n".join(map(str, faults))


@pytest.mark.long
async def test_a_clustered_filter_reads_what_it_finds(million: Shelf) -> None:
    """A part of meta_info that only old groups have is found without reading all the newer ones."""
    for days, after in million.pages():
        async with acting_for(million.database, "default") as connection:
            query = million.query(CLUSTERED, days)
            nodes = [
                node
                for one in await million.sent(connection, query, after, 100)
                for node in await explain(connection, one)
            ]
            # All that there are, twice, and what is read in passing.
            assert rows_read(nodes) <= 2 * million.number // 5 + IN_PASSING + 202, nodes


@pytest.mark.long
async def test_meta_info_is_found_by_its_index_without_statistics(million: Shelf) -> None:
    """Where nothing is known about meta_info (wide, or never analyzed), rare parts of it are found by the index too."""
    for text in ('{"erp_invoice_id":"nowhere"}', '{"erp_invoice_id":"erp-7"}'):
        async with acting_for(million.database, "default") as connection:
            await connection.exec_driver_sql("RESET ROLE")
            forget = (
                "DELETE FROM pg_statistic USING pg_attribute WHERE starelid = attrelid AND staattnum = attnum"
                " AND attrelid = 'usage_record_groups'::regclass AND attname = 'meta_info'"
            )
            await connection.exec_driver_sql(forget)
            await connection.exec_driver_sql(f"SET LOCAL ROLE {APPLICATION_ROLE}")
            query = million.query(Asked("", {"meta_info": text}), "all")
            statements = await million.sent(connection, query, None, 100)
            nodes = [node for one in statements for node in await explain(connection, one)]
            await connection.rollback()
            assert rows_read(nodes) <= IN_PASSING + 202, nodes


async def require_indexes_elsewhere(shelf: Shelf) -> None:
    """Fail if reading, storing, rolling up or leasing reads a table that grows from one end to the other."""
    n, database = shelf.number, shelf.database
    now = datetime.now(UTC)
    hour = now.replace(minute=0, second=0, microsecond=0)
    ids = [f"g{i}" for i in range(1, n, n // 500)]
    works: dict[str, Callable[[AsyncConnection], Awaitable[Any]]] = {
        "get": lambda c: record_groups.get_group(c, "default", f"g{n // 2}"),
        "get, none": lambda c: record_groups.get_groups(c, "default", ["nothing"]),
        "get many": lambda c: record_groups.get_groups(c, "default", ids),
        "within": lambda c: record_groups.groups_within(c, "default", ids, 100_000),
        "waiting": lambda c: roll_up_store.waiting_entitlements(c, hour, DEFAULT_RULES, None, 200),
        "waiting, next": lambda c: roll_up_store.waiting_entitlements(
            c, hour, DEFAULT_RULES, roll_up_store.Waiting("default", "e-11"), 200
        ),
        "waiting, reported": lambda c: roll_up_store.waiting_entitlements(
            c, hour - timedelta(hours=1), DEFAULT_RULES, None, 200
        ),
        "lock waiting": lambda c: roll_up_store._lock_waiting(c, "default", "e-0", hour + timedelta(hours=1)),
        "lock waiting, none": lambda c: roll_up_store._lock_waiting(c, "default", "e-1", hour - 80 * DAY),
        "lease": lambda c: record_reports.lease_reports(c, "default", "new", None, 25, timedelta(minutes=5)),
        "lease, partner": lambda c: record_reports.lease_reports(
            c, "default", "azure", Partner.AZURE, 100, timedelta(minutes=5)
        ),
        "lease, held": lambda c: record_reports.lease_reports(c, "default", "t7", None, 100, timedelta(minutes=5)),
    }
    for label, work in works.items():
        # What waits is looked for over all organizations.
        everybodys = label.startswith("waiting")
        async with database.engine.connect() if everybodys else acting_for(database, "default") as connection:
            began = time.perf_counter()
            _, statements = await sent_by(connection, work)
            took = (time.perf_counter() - began) * 1000
            assert statements
            nodes = [node for one in statements for node in await explain(connection, one)]
            await connection.rollback()
        assert not scanned(nodes), (label, nodes)
        # What is looked at is what is found, or waits: of each entitlement, of all reports at once.
        most = 4000 if label.startswith(("waiting", "lock")) else 2500
        read = sum(node.rows for node in nodes if node.table.startswith("usage_record"))
        print(f"{label:26} {took:7.1f} ms {read:7} rows")
        assert read <= most, (label, read, nodes)
    # All that a batch of new and of known groups sends, judged without being run again.
    async with running_server(database.engine.url.render_as_string(hide_password=False)) as client:
        batch = [group(f"{name}{i}", "e-0") for name in ("new", "g") for i in range(1, 21)]
        async with acting_for(database, "default") as connection:
            results, statements = await sent_by(connection, lambda _: report(client, *batch))
            assert [one.verdict for one in results] == [1] * 20 + [3] * 20, results[0]
            assert any(one.text.startswith("INSERT INTO usage_record_groups") for one in statements)
            for one in statements:
                if "api_keys" in one.text:
                    continue
                nodes = await explain(connection, one, analyze=False)
                assert not scanned(nodes), (one.text, nodes)


async def test_other_statements_have_indexes(database: Database) -> None:
    """With 30,000 groups and 3,000 reports, what reads, stores, rolls up and leases reads no table from end to end."""
    await require_indexes_elsewhere(await Shelf.of(database, 30_000))


@pytest.mark.long
async def test_other_statements_have_indexes_on_a_million_groups(million: Shelf) -> None:
    """With a million groups, what reads, stores, rolls up and leases reads no table from end to end."""
    await require_indexes_elsewhere(million)


@pytest.mark.long
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"partner": Partner.AWS},
        {"entitlement_id": "e-3"},
        {"buyer_id": "b-3"},
        {"status": ReportStatus.PENDING},
    ],
    ids=str,
)
async def test_lists_of_reports_have_indexes(million: Shelf, filters: dict[str, Any]) -> None:
    """With 100,000 reports, no page of their list reads them from end to end, whatever it is filtered by."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    query = ReportQuery(hour - 90 * DAY, hour + DAY, **filters)
    for after in (None, (hour - timedelta(hours=20), uuid.UUID(int=0))):

        async def work(connection: AsyncConnection, after: Any = after) -> Any:
            return await record_reports.list_reports(connection, "default", query, after, 100)

        async with acting_for(million.database, "default") as connection:
            _, statements = await sent_by(connection, work)
            nodes = [node for one in statements for node in await explain(connection, one)]
            assert not scanned(nodes), nodes


async def test_a_new_database_looks_at_nothing_once_per_group(client: Client, database: Database) -> None:
    """Without any statistics, reading and locking groups looks at every row twice at most, however many there are.

    Would catch a first hour of a new database that is joined record by group.
    """
    await sell(client)
    names = [f"g{i}" for i in range(2_000)]
    for batch in (names[:1_000], names[1_000:]):
        await report(client, *(group(name, records={"cpu": "1", "mem": "2"}) for name in batch))

    async def get(connection: AsyncConnection) -> Any:
        return await record_groups.get_groups(connection, "default", names[:100])

    async def lock(connection: AsyncConnection) -> Any:
        return await roll_up_store._lock_waiting(connection, "default", "ent", datetime.now(UTC) + DAY)

    async def sizes(connection: AsyncConnection) -> Any:
        return await record_groups.groups_within(connection, "default", names[:100], 10**9)

    for work in (get, sizes, lock):
        async with acting_for(database, "default") as connection:
            await connection.exec_driver_sql("RESET ROLE")
            await connection.exec_driver_sql("DELETE FROM pg_statistic")
            await connection.exec_driver_sql(f"SET LOCAL ROLE {APPLICATION_ROLE}")
            found, statements = await sent_by(connection, work)
            assert found
            nodes = [node for one in statements for node in await explain(connection, one)]
            read = sum(node.rows for node in nodes if node.table in {"usage_record_groups", "usage_records"})
            assert read <= 2 * (2_000 + 4_000), (work.__name__, nodes)
            await connection.rollback()
