"""Claims about Metronome's Python SDK: as it is, it works against metering behind Envoy, and its numbers are exact."""

import asyncio
import functools
import gzip
import itertools
import json
import os
import random
import re
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal, localcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import sqlalchemy as sa
from conftest import Client, _administer, running_gateway, running_server, timestamp
from faults import LEAK
from hypothesis import given
from hypothesis import strategies as st
from metronome import (
    APIStatusError,
    AsyncMetronome,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    DefaultAioHttpClient,
    Metronome,
    NotFoundError,
    RateLimitError,
)

from metering.v1 import billable_metric_pb2, customer_pb2, event_pb2, usage_pb2
from service.auth import new_api_key
from service.config import Load
from service.database import Database
from service.domain.windows import EARLIEST, LATEST, WindowFaults, Windows, WindowSize, widened
from service.ingest import Ingest
from service.postgres import EmbeddedPostgres
from service.store import metrics as stored_metrics
from service.store import organizations

REPOSITORY = Path(__file__).resolve().parent.parent
CLIENTS = REPOSITORY / "examples" / "clients"
START = datetime(2026, 1, 5, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
END = START + 3 * DAY
UNKNOWN = "00000000-0000-4000-8000-00000000dead"
Json = dict[str, Any]
# Blocking calls of the SDK run in a thread: server and proxy are served by this one.
call = asyncio.to_thread


@contextmanager
def program(base_url: str, **options: Any) -> Iterator[Metronome]:
    """The SDK as a program has it, but checking each answer against Metronome's own types."""
    options = {"bearer_token": "My Bearer Token", **options}
    with Metronome(base_url=base_url, _strict_response_validation=True, **options) as sdk:
        yield sdk


@pytest.fixture
def sdk(base_url: str) -> Iterator[Metronome]:
    """The SDK against `client`'s server."""
    with program(base_url) as sdk:
        yield sdk


@asynccontextmanager
async def fresh_database(postgres: EmbeddedPostgres, template: str) -> AsyncIterator[str]:
    """A database with the schema, for as long as it is needed; the fixture's is one test's."""
    url, name = sa.make_url(postgres.url), "metronome_world"
    await _administer(url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    yield url.set(database=name).render_as_string(hide_password=False)
    await _administer(url, f'DROP DATABASE "{name}" WITH (FORCE)')


@asynccontextmanager
async def raw(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """HTTP as it is, for what the SDK would never send."""
    async with httpx.AsyncClient(base_url=base_url, headers={"content-type": "application/json"}) as http:
        yield http


def iso(at: datetime) -> str:
    """Print a time as most programs do."""
    return at.isoformat().replace("+00:00", "Z")


def sent(transaction_id: str | None = None, **fields: Any) -> Json:
    """An event as the SDK is given it, with usable defaults."""
    defaults = {"customer_id": "acme", "event_type": "request", "timestamp": iso(START), "properties": {}}
    return {"transaction_id": transaction_id or str(uuid.uuid4()), **defaults, **fields}


async def refusal(kind: type[APIStatusError], function: Callable[..., Any], *args: Any, **fields: Any) -> str:
    """Call the SDK for what must fail with just this error of its own; returns the message."""
    with pytest.raises(APIStatusError) as caught:
        await call(function, *args, **fields)
    assert caught.type is kind, caught.value
    body = caught.value.body
    assert isinstance(body, dict)
    assert list(body) == ["message"]
    assert body["message"]
    assert not LEAK.search(str(body["message"]).encode())
    return str(body["message"])


def everything(function: Callable[..., Any], **fields: Any) -> list[Any]:
    """Read all pages as the SDK does by itself."""
    return list(function(**fields))


class Wire(httpx.HTTPTransport):
    """The way to the server: notes what is tried, and loses the first answers."""

    def __init__(self, lost: int = 0) -> None:
        super().__init__()
        self.lost = lost
        self.tries: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Let the server do it, and perhaps tell nobody."""
        self.tries.append(request)
        response = super().handle_request(request)
        if len(self.tries) <= self.lost:
            response.read()
            response.close()
            raise httpx.ReadError("the answer was lost", request=request)
        return response


# --- What usage must be, from the events as they were given to the SDK


class Fact(NamedTuple):
    """An event, with the id of the customer that it is of."""

    customer_id: str
    transaction_id: str
    event_type: str
    at: datetime
    properties: Mapping[str, Any]


class Rule(NamedTuple):
    """A metric: the aggregation and the property it reads, of events of type `request`."""

    id: str
    aggregation: str
    key: str


def text_of(value: Any) -> str | None:
    """The string by which a property is compared."""
    if value is None or isinstance(value, str):
        return value
    return printed(Decimal(repr(value)))


def printed(value: Decimal) -> str:
    """Print a decimal without exponent or trailing zeros."""
    text = format(value, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def aggregate(rule: Rule, facts: Iterable[Fact]) -> Decimal | None:
    """The value of events of one window; None = there is none."""
    found = [fact for fact in facts if fact.event_type == "request"]
    if rule.aggregation == "COUNT":
        return Decimal(len(found)) if found else None
    texts = [(fact.at, fact.transaction_id.encode(), text_of(fact.properties.get(rule.key))) for fact in found]
    if rule.aggregation == "UNIQUE":
        different = {text for _, _, text in texts if text is not None}
        return Decimal(len(different)) if different else None
    numbers = [(*place, Decimal(text)) for *place, text in texts if text and re.fullmatch(r"-?\d+(\.\d+)?", text)]
    if not numbers:
        return None
    with localcontext(prec=100):
        match rule.aggregation:
            case "SUM":
                return sum((one[-1] for one in numbers), Decimal())
            case "MAX":
                return max(one[-1] for one in numbers)
            case _:
                return max(numbers)[-1]


def windows(size: str, start: datetime = START, end: datetime = END) -> list[tuple[datetime, datetime]]:
    """The windows of a range."""
    width = {"HOUR": HOUR, "DAY": DAY, "NONE": end - start}[size]
    return list(pairwise(start + i * width for i in range((end - start) // width + 1)))


def shown(value: Decimal | None) -> tuple[float | None, str | None]:
    """A value as an answer has it: as a double, and exactly beside it."""
    return (None, None) if value is None else (float(value), printed(value))


def shown_in(row: Any) -> tuple[float | None, str | None]:
    """The value of a row as the SDK gives it."""
    return row.value, row.model_extra.get("value_decimal")


Row = tuple[str, str, datetime, datetime, tuple[float | None, str | None]]
GroupRow = tuple[datetime, datetime, dict[str, str], tuple[float | None, str | None]]


class World:
    """Customers, metrics and events made through the SDK, and what their usage is."""

    def __init__(self, sdk: Metronome) -> None:
        self.sdk = sdk
        self.customers = [
            sdk.v1.customers.create(name=name, ingest_aliases=[name, f"{name}@example.com"]).data.id
            for name in ("acme", "globex", "initech", "silent")
        ]
        self.rules: list[Rule] = []
        for aggregation, key in [("COUNT", ""), ("SUM", "n"), ("MAX", "n"), ("LATEST", "n"), ("UNIQUE", "user")]:
            made = sdk.v1.billable_metrics.create(
                name=aggregation.title(),
                aggregation_type=aggregation,
                event_type_filter={"in_values": ["request"]},
                group_keys=[["region"], ["team", "region"]],
                **({"aggregation_key": key} if key else {}),
            )
            self.rules.append(Rule(made.data.id, aggregation, key))
        self.facts: list[Fact] = []
        draw = random.Random(7)
        batch: list[Json] = []
        for i in range(400):
            number = draw.randrange(3)
            customer_id, name = self.customers[number], ("acme", "globex", "initech")[number]
            # Some on the very bounds of windows, and some outside of the range.
            at = START + draw.choice(
                [timedelta(seconds=draw.uniform(-7200, 3 * 86400 + 7200)), draw.randrange(73) * HOUR]
            )
            at = at.replace(microsecond=at.microsecond // 1000 * 1000)
            properties = {
                "n": draw.choice(
                    [f"{draw.randrange(10**9)}.{draw.randrange(1, 10**9):09}", draw.randrange(-50, 50), 0.1]
                )
                if draw.random() < 0.8
                else draw.choice([0, "0.000000000000000001", 10**20 + 1, "no number", None, 1e-7]),
                "user": draw.choice(["ada", "bob", 7, "7", 7.5]),
                **({"region": draw.choice(["eu", "us", ""])} if draw.random() < 0.9 else {}),
                **({"team": draw.choice(["a", "b"])} if draw.random() < 0.9 else {}),
            }
            fact = Fact(customer_id, f"t{i:03}", "request" if draw.random() < 0.9 else "noise", at, properties)
            key = draw.choice([customer_id, customer_id.upper(), name, f"{name}@example.com"])
            self.facts.append(fact)
            batch.append(
                sent(
                    fact.transaction_id,
                    customer_id=key,
                    event_type=fact.event_type,
                    timestamp=iso(at),
                    properties=properties,
                )
            )
        batch.append(sent("noise", customer_id="silent", event_type="noise"))
        for i in range(0, len(batch), 100):
            sdk.v1.usage.ingest(usage=batch[i : i + 100])

    def rule(self, aggregation: str) -> Rule:
        """The metric of an aggregation."""
        return next(rule for rule in self.rules if rule.aggregation == aggregation)

    def within(self, customer_id: str, window: tuple[datetime, datetime]) -> list[Fact]:
        """The events of a customer in a window."""
        return [one for one in self.facts if one.customer_id == customer_id and window[0] <= one.at < window[1]]

    def usage(self, size: str, customers: Sequence[str], start: datetime = START, end: datetime = END) -> list[Row]:
        """All rows of /v1/usage."""
        return [
            (customer_id, rule.id, *window, shown(aggregate(rule, self.within(customer_id, window))))
            for customer_id in sorted(customers)
            for rule in sorted(self.rules)
            for window in windows(size, start, end)
        ]

    def grouped(
        self, customer_id: str, rule: Rule, size: str, key: Sequence[str], filters: Mapping[str, list[str]]
    ) -> list[GroupRow]:
        """All rows of /v1/usage/groups."""
        asked = list(itertools.product(*(sorted(filters[name]) if filters.get(name) else [None] for name in key)))
        rows: list[GroupRow] = []
        for window in windows(size):
            groups: dict[tuple[str | None, ...], list[Fact]] = {}
            for fact in self.within(customer_id, window):
                group = tuple(fact.properties.get(name) for name in key)
                wanted = all(value in filters.get(name, [value]) for name, value in zip(key, group, strict=True))
                if fact.event_type == "request" and wanted:
                    groups.setdefault(group, []).append(fact)
            # What was asked for and is not there is told, and so is a window without anything.
            for one in asked:
                if not any(all(a in {None, b} for a, b in zip(one, group, strict=True)) for group in groups):
                    groups[one] = []
            for group in sorted(
                groups, key=lambda values: [(value is None, (value or "").encode()) for value in values]
            ):
                told = {name: value for name, value in zip(key, group, strict=True) if value is not None}
                rows.append((*window, told, shown(aggregate(rule, groups[group]))))
        return rows


@pytest.fixture(scope="module")
async def world(postgres: EmbeddedPostgres, template: str) -> AsyncIterator[World]:
    """Three days of usage, on a server that the tests which only read share."""
    async with (
        fresh_database(postgres, template) as database_url,
        running_server(database_url) as client,
        running_gateway(client.address) as base_url,
    ):
        with program(base_url) as sdk:
            yield await call(World, sdk)


def row_of(row: Any) -> Row:
    """A row of /v1/usage as the SDK gives it."""
    return row.customer_id, row.billable_metric_id, row.start_timestamp, row.end_timestamp, shown_in(row)


def group_row_of(row: Any) -> GroupRow:
    """A row of /v1/usage/groups as the SDK gives it."""
    return row.starting_on, row.ending_before, row.group or {}, shown_in(row)


def bounds(size: str = "DAY", **fields: Any) -> Json:
    """The arguments of a usage call over the whole range."""
    return {"window_size": size, "starting_on": START, "ending_before": END, **fields}


# --- /v1/usage


async def test_usage_is_what_the_events_say(world: World) -> None:
    """Hours, days and the whole range, of every aggregation, are exactly what the events sent add up to.

    In the order of customer, metric and start. With both lists given every pair has all its windows; with none, those
    pairs that have usage. Paged to the end by the SDK itself: blocking, and in asyncio on both of its HTTP libraries.
    """
    named = {
        "customer_ids": world.customers,
        "billable_metrics": [{"id": rule.id} for rule in world.rules],
    }
    for size in ("HOUR", "DAY", "NONE"):
        expected = world.usage(size, world.customers)
        assert [
            row_of(one) for one in await call(everything, world.sdk.v1.usage.list, **bounds(size, **named))
        ] == expected
        expected = world.usage(size, world.customers[:3])
        for http in (httpx.AsyncClient, DefaultAioHttpClient):
            async with AsyncMetronome(base_url=world.sdk.base_url, bearer_token="any", http_client=http()) as sdk:
                assert [row_of(one) async for one in sdk.v1.usage.list(**bounds(size))] == expected
    names = {
        one.billable_metric_id: one.billable_metric_name
        for one in await call(everything, world.sdk.v1.usage.list, **bounds())
    }
    assert names == {rule.id: rule.aggregation.title() for rule in world.rules}


async def test_usage_pages_go_on_where_they_ended(world: World) -> None:
    """More rows than a page takes come as several, each asked for by the token of the one before; no row twice."""
    first = await call(
        world.sdk.v1.usage.list,
        **bounds("HOUR", customer_ids=world.customers, billable_metrics=[{"id": rule.id} for rule in world.rules]),
    )
    second = await call(first.get_next_page)
    assert first.next_page
    assert not second.has_next_page()
    rows = [row_of(one) for page in (first, second) for one in page.data]
    assert rows == world.usage("HOUR", world.customers)
    # The token belongs to the question: with another one it is an error, and so is one that was made up.
    for fields in ({"customer_ids": world.customers[:1]}, {"next_page": "next_page"}):
        message = await refusal(
            BadRequestError, world.sdk.v1.usage.list, **bounds("HOUR", **{"next_page": first.next_page, **fields})
        )
        assert message.startswith("next_page: ")


async def test_usage_split_by_a_property(world: World) -> None:
    """`groups` has the value per value of the property, all that are there or just those asked for, null without match.

    Exact decimals stand beside them. Metrics that are not split have no `groups`.
    """
    for values in (None, ["us", "", "mars"]):
        split = {"key": "region"} if values is None else {"key": "region", "values": values}
        chosen = [{"id": rule.id, "group_by": split} for rule in world.rules if rule.aggregation != "COUNT"]
        fields = bounds("DAY", billable_metrics=[*chosen, {"id": world.rule("COUNT").id}])
        rules = {rule.id: rule for rule in world.rules}
        rows = await call(everything, world.sdk.v1.usage.list, **fields)
        assert len(rows) == 3 * 5 * 3
        for row in rows:
            rule = rules[row.billable_metric_id]
            if rule.aggregation == "COUNT":
                assert row.groups is None
                assert "groups_decimal" not in row.model_extra
                continue
            facts = world.within(row.customer_id, (row.start_timestamp, row.end_timestamp))
            present = {
                fact.properties["region"]
                for fact in facts
                if fact.event_type == "request" and "region" in fact.properties
            }
            expected = {
                name: shown(aggregate(rule, [fact for fact in facts if fact.properties.get("region") == name]))
                for name in (present if values is None else values)
            }
            exact = row.model_extra["groups_decimal"]
            assert {name: (value, exact.get(name)) for name, value in row.groups.items()} == expected
            assert None not in exact.values()
            if values:
                assert row.groups["mars"] is None


async def test_usage_takes_no_limit(world: World) -> None:
    """A page of /v1/usage is as large as it comes: `limit` is refused, as Metronome does, and the message names it."""
    message = await refusal(BadRequestError, world.sdk.v1.usage.list, **bounds(), extra_query={"limit": 10})
    assert "limit" in message


# --- /v1/usage/groups

ASKED: list[tuple[Json, tuple[str, ...], dict[str, list[str]]]] = [
    ({}, (), {}),
    ({"group_key": ["region"]}, ("region",), {}),
    ({"group_by": {"key": "region"}}, ("region",), {}),
    ({"group_by": {"key": "region", "values": ["us", "mars"]}}, ("region",), {"region": ["us", "mars"]}),
    ({"group_key": ["region"], "group_filters": {"region": ["eu", ""]}}, ("region",), {"region": ["eu", ""]}),
    ({"group_key": ["region"], "group_filters": {"region": []}}, ("region",), {}),
    ({"group_key": ["region", "team"]}, ("region", "team"), {}),
    ({"group_key": ["team", "region"], "group_filters": {"region": ["us"]}}, ("team", "region"), {"region": ["us"]}),
    (
        {"group_key": ["team", "region"], "group_filters": {"region": ["us", "eu"], "team": ["c", "a"]}},
        ("team", "region"),
        {"region": ["us", "eu"], "team": ["c", "a"]},
    ),
]


async def test_grouped_usage_is_what_the_events_say(world: World) -> None:
    """By no, one or two properties, with and without filters, each group's value is exactly that of its events.

    Ordered by window and group, events that lack the property last. `group_key` and `group_value` tell a simple group
    once more and are null of a compound one.
    """
    customer_id = world.customers[0]
    for (fields, key, filters), size, rule in zip(
        ASKED * 2, itertools.cycle(["HOUR", "DAY", "NONE", "DAY"]), itertools.cycle(world.rules)
    ):
        asked = bounds(size, customer_id=customer_id, billable_metric_id=rule.id, **fields)
        rows = await call(everything, world.sdk.v1.usage.list_with_groups, **asked)
        assert [group_row_of(one) for one in rows] == world.grouped(customer_id, rule, size, key, filters), (
            fields,
            size,
        )
        for row in rows:
            assert (row.group is None) == (not key)
            assert row.group_key == (key[0] if len(key) == 1 else None)
            assert row.group_value == (row.group.get(key[0]) if len(key) == 1 else None)


async def test_limits_change_the_pages_and_not_the_rows(world: World) -> None:
    """Pages of 1, 20 or 100 rows put together are the same rows; 50 is the default, 100 with a compound key."""
    rule, customer_id = world.rule("SUM"), world.customers[1]
    asked = bounds("HOUR", customer_id=customer_id, billable_metric_id=rule.id)
    async with AsyncMetronome(base_url=world.sdk.base_url, bearer_token="any") as sdk:
        for key, default in (((), 50), (("region",), 50), (("team", "region"), 100)):
            fields = asked | ({"group_key": key} if key else {})
            expected = world.grouped(customer_id, rule, "HOUR", key, {})
            for limit in (1, 20, 100, None):
                if limit == 1 and key:
                    continue  # so many calls show nothing more
                rows, page = [], await sdk.v1.usage.list_with_groups(**fields, **({"limit": limit} if limit else {}))
                while True:
                    rows += [group_row_of(one) for one in page.data]
                    if not page.has_next_page():
                        break
                    assert len(page.data) == (limit or default)
                    page = await page.get_next_page()
                assert rows == expected
                # Enough for a second page, or nothing was shown.
                assert len(rows) > default
    for limit in (0, -1, 101):
        message = await refusal(BadRequestError, world.sdk.v1.usage.list_with_groups, **asked, limit=limit)
        assert message == f"limit: is {limit} and must be 1..100"


async def test_what_grouped_usage_refuses(world: World) -> None:
    """Keys that are not declared, both ways of grouping at once, wrong filters: a message that names the field."""
    asked = bounds(customer_id=world.customers[0], billable_metric_id=world.rules[0].id)
    for fields, field in [
        ({"group_key": ["team"]}, "group_key"),
        ({"group_by": {"key": "team"}}, "group_by"),
        ({"group_key": ["region"], "group_by": {"key": "region"}}, "group_by"),
        ({"group_key": ["region"], "group_filters": {"team": ["a"]}}, "group_filters"),
        ({"group_key": ["region"], "group_filters": {"region": [1]}}, "group_filters.region"),
        ({"group_key": ["region"], "group_filters": {"region": [str(i) for i in range(201)]}}, "group_filters"),
        ({"group_by": {"key": "region", "values": [str(i) for i in range(201)]}}, "group_by"),
        ({"window_size": "WEEK"}, "window_size"),
        ({"next_page": "next_page"}, "next_page"),
    ]:
        message = await refusal(BadRequestError, world.sdk.v1.usage.list_with_groups, **{**asked, **fields})
        assert message.startswith(field), (fields, message)


# --- Numbers


async def made(sdk: Metronome, aggregation: str = "SUM", **fields: Any) -> tuple[str, str]:
    """Make a customer `acme` and a metric of the property `n`; returns both ids."""
    customer = await call(sdk.v1.customers.create, name="Acme", ingest_aliases=["acme"])
    key = {} if aggregation == "COUNT" else {"aggregation_key": "n"}
    metric = await call(
        sdk.v1.billable_metrics.create, **{"name": "metric", "aggregation_type": aggregation, **key, **fields}
    )
    return customer.data.id, metric.data.id


async def test_null_is_not_zero(sdk: Metronome) -> None:
    """A window without usage has null, one whose sum is zero has 0; both in the total and in the groups."""
    customer_id, metric_id = await made(sdk, group_keys=[["region"]])
    numbers = [("0", "a"), ("1.5", "b"), ("-1.5", "b")]
    await call(sdk.v1.usage.ingest, usage=[sent(properties={"n": n, "region": region}) for n, region in numbers])
    split = {"id": metric_id, "group_by": {"key": "region", "values": ["a", "b", "c"]}}
    fields = bounds("DAY", ending_before=START + 2 * DAY, customer_ids=[customer_id])
    zero, none = (await call(sdk.v1.usage.list, **fields, billable_metrics=[split])).data
    assert shown_in(zero) == (0.0, "0")
    assert zero.groups == {"a": 0, "b": 0, "c": None}
    assert zero.model_extra["groups_decimal"] == {"a": "0", "b": "0"}
    assert shown_in(none) == (None, None)
    assert none.groups == {"a": None, "b": None, "c": None}
    # Null is said, not left out: other clients demand it.
    raw_answer = await call(sdk.v1.usage.with_raw_response.list, **fields, billable_metrics=[{"id": metric_id}])
    document = json.loads(await call(raw_answer.read))
    assert [one["value"] for one in document["data"]] == [0, None]
    assert document["next_page"] is None
    assert "groups" not in document["data"][0]


async def test_numbers_stay_exact(client: Client, base_url: str, sdk: Metronome) -> None:
    """JSON numbers are the decimals that were written: 0.1 a hundred times is 10, and integers keep all their digits.

    What no double holds is stored as the string of its digits, and `value_decimal` is exact where `value` is rounded.
    """
    customer_id, metric_id = await made(sdk)
    day = 0

    async def total(*texts: str) -> Any:
        nonlocal day
        at = START + day * DAY
        day += 1
        events = [json.dumps(sent(f"{day}-{i}", timestamp=iso(at), properties={"n": "?"})) for i in range(len(texts))]
        body = ",".join(one.replace('"?"', text) for one, text in zip(events, texts, strict=True))
        async with raw(base_url) as http:
            assert (await http.post("/v1/ingest", content=f"[{body}]")).status_code == 200
        found = await call(
            sdk.v1.usage.list_with_groups,
            window_size="DAY",
            starting_on=at,
            ending_before=at + DAY,
            customer_id=customer_id,
            billable_metric_id=metric_id,
        )
        found_native = await client.all_usage(
            customer_ids=[customer_id],
            billable_metrics=[usage_pb2.BillableMetricSelector(id=metric_id)],
            window_size="WINDOW_SIZE_DAY",
            starting_on=timestamp(at),
            ending_before=timestamp(at + DAY),
        )
        (row,), (native,) = found.data, found_native
        assert row.model_extra["value_decimal"] == native.value
        return shown_in(row)

    assert await total(*["0.1"] * 100) == (10.0, "10")
    assert await total("12345678901234567890", "1") == (1.2345678901234567e19, "12345678901234567891")
    assert await total("9007199254740993") == (9007199254740992.0, "9007199254740993")
    assert await total("1e3", "1E-3", "-0.0") == (1000.001, "1000.001")
    assert await total("12345678901234567.890123456789012345") == (
        1.2345678901234568e16,
        "12345678901234567.890123456789012345",
    )
    assert await total("0.30000000000000004", "0.1000") == (0.4, "0.40000000000000004")


async def test_any_json_number_is_stored_as_written(client: Client, base_url: str) -> None:
    """A hundred numbers in every notation of JSON are found with just the value that was written, number or string."""
    draw = random.Random(11)
    texts = []
    for _ in range(100):
        whole = str(draw.randrange(10 ** draw.randrange(1, 20)))
        places = draw.choice(["", f".{draw.randrange(10 ** draw.randrange(1, 18))}", f".{10 ** draw.randrange(9)}0"])
        power = draw.choice(["", "", f"{draw.choice('eE')}{draw.choice(['', '+', '-'])}{draw.randrange(12)}"])
        texts.append(f"{draw.choice(['', '-'])}{whole}{places}{power}")
    body = ",".join(
        json.dumps(sent(f"n{i}", properties={"n": "?"})).replace('"?"', text) for i, text in enumerate(texts)
    )
    async with raw(base_url) as http:
        assert (await http.post("/v1/ingest", content=f"[{body}]")).status_code == 200
    request = event_pb2.SearchEventsRequest(transaction_ids=[f"n{i}" for i in range(100)])
    stored = {
        one.event.transaction_id: one.event.properties["n"]
        for one in (await client.events.SearchEvents(request)).events
    }
    assert len(stored) == 100
    kinds = set()
    for i, text in enumerate(texts):
        value = stored[f"n{i}"]
        kinds.add(type(value))
        assert Decimal(value if isinstance(value, str) else repr(value)) == Decimal(text)
        # A number wherever a double is enough: programs that read it back expect one.
        exact = Decimal(repr(float(text))) == Decimal(text) and (abs(float(text)) < 2**53 or float(text) % 1)
        assert isinstance(value, float) == bool(exact), text
    assert kinds == {str, float}


# --- Times and words


SPELLINGS = [("hour", "Hour", "HOUR"), ("day", "Day", "DAY"), ("none", "None", "NONE")]


async def test_any_letter_case(sdk: Metronome) -> None:
    """`day`, `Day` and `DAY` are the same to the server, and so are the names of aggregations."""
    customer = (await call(sdk.v1.customers.create, name="Acme", ingest_aliases=["acme"])).data.id
    metrics = [
        (await call(sdk.v1.billable_metrics.create, name=word, aggregation_type=word, aggregation_key="n")).data.id
        for word in ("sum", "Sum", "SUM")
    ]
    await call(sdk.v1.usage.ingest, usage=[sent(properties={"n": 2})])
    for metric_id, *sizes in zip(metrics, *SPELLINGS, strict=True):
        assert (
            await call(sdk.v1.billable_metrics.retrieve, billable_metric_id=metric_id)
        ).data.aggregation_type == "SUM"
        for size in sizes:
            fields = {"customer_ids": [customer], "billable_metrics": [{"id": metric_id}], **bounds(size)}
            assert sum(one.value or 0 for one in await call(everything, sdk.v1.usage.list, **fields)) == 2
    for word in ("", "WINDOW_SIZE_DAY", "UNSPECIFIED", "WEEK"):
        message = await refusal(BadRequestError, sdk.v1.usage.list, **bounds(word))
        assert message.startswith("window_size: ")
        assert "HOUR, DAY, NONE" in message


async def test_times_without_an_offset_are_utc(client: Client, sdk: Metronome) -> None:
    """Offsets count and so do fractions of a second; a time without an offset is UTC, in events as in bounds."""
    customer_id, metric_id = await made(sdk, "COUNT")
    midnight = START + DAY
    spellings = {
        "2026-01-05T23:59:59.999": midnight - timedelta(milliseconds=1),
        "2026-01-06T00:00:00": midnight,
        "2026-01-06 00:00:00Z": midnight,
        "2026-01-06t00:00:00.000001z": midnight + timedelta(microseconds=1),
        "2026-01-06T01:59:59.999+02:00": midnight - timedelta(milliseconds=1),
        "2026-01-05T19:30:00-04:30": midnight,
    }
    await call(sdk.v1.usage.ingest, usage=[sent(text, timestamp=text) for text in spellings])
    request = event_pb2.SearchEventsRequest(transaction_ids=list(spellings))
    stored = (await client.events.SearchEvents(request)).events
    assert {one.event.transaction_id: one.event.timestamp.ToDatetime(UTC) for one in stored} == spellings
    india = timezone(timedelta(hours=5, minutes=30))
    asked = {"customer_ids": [customer_id], "billable_metrics": [{"id": metric_id}], "window_size": "DAY"}
    for start, end in [
        (datetime(2026, 1, 5), datetime(2026, 1, 7)),  # noqa: DTZ001  # without a zone on purpose
        (START, START + 2 * DAY),
        (START.astimezone(india), (START + 2 * DAY).astimezone(india)),
        ("2026-01-05T00:00:00.000", "2026-01-07T00:00:00.000"),
    ]:
        rows = (await call(sdk.v1.usage.list, **asked, starting_on=start, ending_before=end)).data
        assert [(one.start_timestamp, one.value) for one in rows] == [(START, 2), (midnight, 4)]
    # An end in the middle of a second cuts there.
    part = {"starting_on": midnight, "ending_before": midnight + timedelta(milliseconds=1)}
    assert [one.value for one in (await call(sdk.v1.usage.list, **{**asked, "window_size": "NONE"}, **part)).data] == [
        4
    ]
    for text in ("2026-01-05", "05.01.2026", "2026-13-05T00:00:00Z", "2026-01-05T00:00:00+25:00", "1767571200", "now"):
        message = await refusal(BadRequestError, sdk.v1.usage.list, **asked, starting_on=text, ending_before=END)
        assert message.startswith("starting_on: "), message
        message = await refusal(BadRequestError, sdk.v1.usage.ingest, usage=[sent(), sent(timestamp=text)])
        assert message.startswith("[1].timestamp: "), message


async def test_bounds_inside_of_windows_are_widened(sdk: Metronome) -> None:
    """A bound inside of a window means the whole window; equal ones the window, or UTC day, that holds them."""
    customer_id, metric_id = await made(sdk, "COUNT")
    instant = START + timedelta(hours=14, minutes=30, seconds=5)
    hour = START + timedelta(hours=14)
    await call(
        sdk.v1.usage.ingest,
        usage=[sent(timestamp=iso(hour)), sent(timestamp=iso(START)), sent(timestamp=iso(START + DAY))],
    )
    for size, start, end, expected in [
        ("HOUR", instant, instant, [(hour, hour + HOUR, 1)]),
        ("HOUR", instant, instant + HOUR, [(hour, hour + HOUR, 1), (hour + HOUR, hour + 2 * HOUR, None)]),
        ("HOUR", hour, hour, [(hour, hour + HOUR, 1)]),
        ("DAY", instant, instant, [(START, START + DAY, 2)]),
        ("DAY", START, START, [(START, START + DAY, 2)]),
        ("DAY", instant, START + DAY, [(START, START + DAY, 2)]),
        ("DAY", START, START + DAY + HOUR, [(START, START + DAY, 2), (START + DAY, START + 2 * DAY, 1)]),
        ("NONE", instant, instant, [(START, START + DAY, 2)]),
        ("NONE", START + DAY, START + DAY, [(START + DAY, START + 2 * DAY, 1)]),
        # A range of its own needs no window: it stays as it is.
        ("NONE", instant, START + DAY, [(instant, START + DAY, None)]),
    ]:
        fields = {"window_size": size, "starting_on": start, "ending_before": end}
        listed = (
            await call(sdk.v1.usage.list, **fields, customer_ids=[customer_id], billable_metrics=[{"id": metric_id}])
        ).data
        assert [(one.start_timestamp, one.end_timestamp, one.value) for one in listed] == expected
        grouped = (
            await call(sdk.v1.usage.list_with_groups, **fields, customer_id=customer_id, billable_metric_id=metric_id)
        ).data
        assert [(one.starting_on, one.ending_before, one.value) for one in grouped] == expected
    message = await refusal(BadRequestError, sdk.v1.usage.list, window_size="DAY", starting_on=END, ending_before=START)
    assert message.startswith("ending_before: ")


async def test_a_strict_server_refuses_bounds_inside_of_windows(database_url: str) -> None:
    """With strict windows the same bounds are errors that name the field, and whole windows still work."""
    instant = START + timedelta(hours=14, minutes=30)
    async with (
        running_server(database_url, strict_compat_windows=True) as client,
        running_gateway(client.address) as url,
    ):
        with program(url) as sdk:
            customer_id, metric_id = await made(sdk)
            for size, start, end, field in [
                ("HOUR", instant, START + DAY, "starting_on"),
                ("DAY", START, instant, "ending_before"),
                ("DAY", START + HOUR, START + DAY, "starting_on"),
                ("DAY", START, START, "ending_before"),
                ("NONE", instant, instant, "ending_before"),
            ]:
                fields = {"window_size": size, "starting_on": start, "ending_before": end}
                assert (await refusal(BadRequestError, sdk.v1.usage.list, **fields)).startswith(f"{field}: ")
                grouped = functools.partial(
                    sdk.v1.usage.list_with_groups, customer_id=customer_id, billable_metric_id=metric_id
                )
                assert (await refusal(BadRequestError, grouped, **fields)).startswith(f"{field}: ")
            rows = await call(
                everything,
                sdk.v1.usage.list_with_groups,
                **bounds(),
                customer_id=customer_id,
                billable_metric_id=metric_id,
            )
            assert len(rows) == 3


# Around a leap day, and on the bounds of windows.
INSTANTS = st.timedeltas(timedelta(), 4 * DAY).map(lambda after: datetime(2024, 2, 27, tzinfo=UTC) + after)
INSTANTS |= st.sampled_from([START + i * HOUR + timedelta(microseconds=j) for i in (0, 1, 24) for j in (-1, 0, 1)])


@given(st.sampled_from(WindowSize), INSTANTS, INSTANTS)
def test_widened_bounds_hold_the_range_and_nothing_more(size: WindowSize, start: datetime, end: datetime) -> None:
    """Widened bounds are those of the calendar's windows that hold the range; they are valid, and stay as they are."""
    found = widened(size, start, end)
    if end < start or (size is WindowSize.NONE and start < end):
        assert found == (start, end)
        return
    # By the calendar, window by window, as a person would.
    first = start.replace(hour=start.hour if size is WindowSize.HOUR else 0, minute=0, second=0, microsecond=0)
    last = first + (HOUR if size is WindowSize.HOUR else DAY)
    while last < end:
        last += HOUR if size is WindowSize.HOUR else DAY
    assert found == (first, last)
    assert len(Windows.of(size, *found, None)) >= 1
    assert widened(size, *found) == found


@pytest.mark.parametrize("size", WindowSize)
def test_what_cannot_be_widened_stays(size: WindowSize) -> None:
    """Bounds at the ends of time stay as they are, to be refused where all bounds are; without UTC it is a defect."""
    for start, end in [(EARLIEST, EARLIEST), (LATEST, LATEST), (datetime.min.replace(tzinfo=UTC), START)]:
        assert widened(size, start, end) == (start, end)
    with pytest.raises(WindowFaults):
        Windows.of(size, *widened(size, LATEST, LATEST), None)
    for bad in (START.replace(tzinfo=None), START.astimezone(timezone(HOUR))):
        with pytest.raises(ValueError, match="UTC"):
            widened(size, bad, END)


async def test_the_ends_of_time(sdk: Metronome) -> None:
    """Bounds at the first and last instants there are get an error of the request, never one of the server."""
    for text in (
        "0001-01-01T00:00:00Z",
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59.999Z",
        "9999-12-31T23:59:59-14:00",
    ):
        for size in ("HOUR", "DAY", "NONE"):
            fields = {"window_size": size, "starting_on": text, "ending_before": text}
            assert "starting_on" in await refusal(BadRequestError, sdk.v1.usage.list, **fields)


async def test_the_current_billing_period(client: Client, sdk: Metronome) -> None:
    """`current_period` is the period that holds the present; without one, or with bounds too, it is a 400."""
    customer_id, metric_id = await made(sdk, "COUNT")
    asked = {"customer_id": customer_id, "billable_metric_id": metric_id, "window_size": "none"}
    listed = sdk.v1.usage.list_with_groups
    message = await refusal(BadRequestError, listed, **asked, current_period=True)
    assert "billing period" in message
    # It begins on this weekday, so it is the same however near to midnight this runs.
    now = datetime.now(UTC)
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    period = customer_pb2.BillingPeriod(
        frequency="BILLING_FREQUENCY_WEEKLY",
        anchor_date=str((today - 2 * DAY).date()),
        starting_on=str((today - 100 * DAY).date()),
    )
    await client.customers.SetBillingPeriod(customer_pb2.SetBillingPeriodRequest(id=customer_id, billing_period=period))
    first, last = today - 2 * DAY, today + 5 * DAY
    times = [first - timedelta(milliseconds=1), first, now - timedelta(seconds=1)]
    await call(sdk.v1.usage.ingest, usage=[sent(timestamp=iso(at)) for at in times])
    (row,) = (await call(listed, **asked, current_period=True)).data
    assert (row.starting_on, row.ending_before, row.value) == (first, last, 2)
    days = (await call(listed, **{**asked, "window_size": "Day"}, current_period=True)).data
    assert [one.starting_on for one in days] == [first + i * DAY for i in range(7)]
    for fields in ({"starting_on": START, "ending_before": END}, {"starting_on": START}, {"ending_before": END}):
        assert "current_period" in await refusal(BadRequestError, listed, **asked, current_period=True, **fields)
    # Neither is an error too, and so is one bound alone.
    for fields in ({}, {"current_period": False}, {"starting_on": START}, {"ending_before": END}):
        await refusal(BadRequestError, listed, **asked, **fields)


# --- Errors


async def test_errors_are_of_the_sdks_own_types(sdk: Metronome) -> None:
    """What is unknown is NotFoundError, what is wrong BadRequestError naming the field, each with `message` alone."""
    customer_id, metric_id = await made(sdk)
    v1 = sdk.v1
    for function, fields in [
        (v1.customers.retrieve, {"customer_id": UNKNOWN}),
        (v1.customers.archive, {"id": UNKNOWN}),
        (v1.customers.set_name, {"customer_id": UNKNOWN, "name": "x"}),
        (v1.customers.set_ingest_aliases, {"customer_id": UNKNOWN, "ingest_aliases": ["x"]}),
        (v1.customers.list_billable_metrics, {"customer_id": UNKNOWN}),
        (v1.billable_metrics.retrieve, {"billable_metric_id": UNKNOWN}),
        (v1.billable_metrics.update, {"billable_metric_id": UNKNOWN, "name": "x"}),
        (v1.billable_metrics.archive, {"id": UNKNOWN}),
        (v1.usage.list, bounds(customer_ids=[UNKNOWN])),
        (v1.usage.list, bounds(billable_metrics=[{"id": UNKNOWN}])),
        (v1.usage.list_with_groups, bounds(customer_id=UNKNOWN, billable_metric_id=metric_id)),
        (v1.usage.list_with_groups, bounds(customer_id=customer_id, billable_metric_id=UNKNOWN)),
        # What Metronome has and this has not.
        (v1.contracts.list, {"customer_id": customer_id}),
        (v1.customers.invoices.list, {"customer_id": customer_id}),
    ]:
        await refusal(NotFoundError, function, **fields)
    for function, fields, field in [
        (v1.customers.retrieve, {"customer_id": "acme"}, "customer_id"),
        (v1.customers.create, {"name": ""}, "name"),
        (v1.customers.create, {"name": "x", "ingest_aliases": ["a", "a" * 129]}, "ingest_aliases[1]"),
        (v1.customers.set_name, {"customer_id": customer_id, "name": ""}, "name"),
        (v1.customers.list, {"customer_ids": ["acme"]}, "customer_ids"),
        (v1.customers.list, {"limit": 101}, "limit"),
        (v1.customers.list, {"next_page": "next_page"}, "next_page"),
        (v1.billable_metrics.retrieve, {"billable_metric_id": "x"}, "billable_metric_id"),
        (v1.billable_metrics.create, {"name": "x"}, "aggregation_type"),
        (v1.billable_metrics.create, {"name": "x", "aggregation_type": "SUM"}, "aggregation_key"),
        (v1.billable_metrics.create, {"name": "x", "aggregation_type": "MEDIAN"}, "aggregation_type"),
        (v1.billable_metrics.list, {"limit": 0}, "limit"),
        (v1.usage.list, bounds(customer_ids=["acme"]), "customer_ids[0]"),
        (
            v1.usage.list,
            bounds(billable_metrics=[{"id": metric_id, "group_by": {"key": "x"}}]),
            "billable_metrics[0].group_by",
        ),
        (v1.usage.list, {"window_size": "DAY", "starting_on": "", "ending_before": END}, "starting_on"),
        (v1.usage.search, {"transaction_ids": []}, "transactionIds"),
    ]:
        message = await refusal(BadRequestError, function, **fields)
        assert message.startswith(field), (fields, message)


async def test_a_conflict_for_good_is_not_tried_again(base_url: str) -> None:
    """Where the SDK would try a 409 three times, it is told not to: another customer has the alias and keeps it."""
    wire = Wire()
    with program(base_url, http_client=httpx.Client(transport=wire)) as sdk:
        await call(sdk.v1.customers.create, name="One", ingest_aliases=["taken"])
        two = await call(sdk.v1.customers.create, name="Two")
        for function, fields in [
            (sdk.v1.customers.create, {"name": "Three", "ingest_aliases": ["taken"]}),
            (sdk.v1.customers.create, {"name": "Three", "external_id": "taken"}),
            (sdk.v1.customers.set_ingest_aliases, {"customer_id": two.data.id, "ingest_aliases": ["free", "taken"]}),
        ]:
            wire.tries.clear()
            with pytest.raises(ConflictError) as caught:
                await call(function, **fields)
            assert len(wire.tries) == 1
            assert caught.value.response.headers["x-should-retry"] == "false"
            assert "taken" in caught.value.body["message"]
        listed = await call(everything, sdk.v1.customers.list)
        assert {one.name: one.ingest_aliases for one in listed} == {"One": ["taken"], "Two": []}


async def test_keys(database_url: str, database: Database) -> None:
    """Where there are API keys, a bearer token is one of them: without it AuthenticationError, with it its own data."""
    keys = {name: new_api_key() for name in ("acme", "globex")}
    async with database.engine.begin() as connection:
        for name, key in keys.items():
            await organizations.create_organization(connection, name)
            await organizations.create_api_key(connection, name, key.id, "test", key.secret_hash)
    async with running_server(database_url) as client, running_gateway(client.address) as url:
        wire = Wire()
        with program(url, http_client=httpx.Client(transport=wire)) as sdk:
            for function, fields in [
                (sdk.v1.usage.list, bounds()),
                (sdk.v1.usage.ingest, {"usage": [sent("x")]}),
                (sdk.v1.customers.create, {"name": "x"}),
            ]:
                await refusal(AuthenticationError, function, **fields)
            assert len(wire.tries) == 3
        ids: set[str] = set()
        for name, key in keys.items():
            with program(url, bearer_token=key.text) as sdk:
                # The same ids and aliases as the other's, who cannot be noticed.
                customer_id, metric_id = await made(sdk, "COUNT", extra_headers={"Idempotency-Key": "the same"})
                ids.add(metric_id)
                await call(sdk.v1.usage.ingest, usage=[sent("x"), *([sent("y")] if name == "acme" else [])])
                rows = await call(everything, sdk.v1.usage.list, **bounds("NONE"))
                assert [(row_of(one)[:2], one.value) for one in rows] == [
                    ((customer_id, metric_id), 2 if name == "acme" else 1)
                ]
        assert len(ids) == 2
        with program(url, bearer_token=keys["acme"].text) as sdk:
            await refusal(NotFoundError, sdk.v1.customers.retrieve, customer_id=customer_id)


async def test_a_metric_that_still_counts_its_past_is_waited_for(
    sdk: Metronome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a new metric has counted what came before it, its usage is an error that says when to ask again.

    The SDK does so by itself, and then gets the whole number.
    """
    counting, original = asyncio.Event(), stored_metrics.backfill_chunk

    async def chunk(*args: Any, **fields: Any) -> bool:
        await counting.wait()
        return await original(*args, **fields)

    monkeypatch.setattr(stored_metrics, "backfill_chunk", chunk)
    await call(sdk.v1.usage.ingest, usage=[sent() for _ in range(3)])
    customer_id, metric_id = await made(sdk, "COUNT")
    asked = bounds("NONE", customer_id=customer_id, billable_metric_id=metric_id)
    with pytest.raises(BadRequestError) as caught:
        await call(sdk.with_options(max_retries=0).v1.usage.list_with_groups, **asked)
    assert (caught.value.response.headers["retry-after"], caught.value.response.headers["x-should-retry"]) == (
        "1",
        "true",
    )
    waiting = asyncio.create_task(call(sdk.with_options(max_retries=5).v1.usage.list_with_groups, **asked))
    await asyncio.sleep(0.2)
    counting.set()
    async with asyncio.timeout(30):
        assert [one.value for one in (await waiting).data] == [3]


async def test_a_full_server_asks_to_come_again(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has too much in flight answers 429: a RateLimitError, or after the time it names the answer."""
    begun, room, original = asyncio.Event(), asyncio.Event(), Ingest.ingest

    async def slow(*args: Any, **fields: Any) -> Any:
        begun.set()
        await room.wait()
        return await original(*args, **fields)

    monkeypatch.setattr(Ingest, "ingest", slow)
    settings = {"load": Load(request_bytes_max=500)}
    async with running_server(database_url, **settings) as client, running_gateway(client.address) as url:
        with program(url) as sdk:
            first = asyncio.create_task(call(sdk.v1.usage.ingest, usage=[sent("a", event_type="x" * 100)]))
            await begun.wait()
            # A server takes one call, however large; the next one has to find room.
            batch = [sent(f"b{i}", event_type="x" * 100) for i in range(9)]
            with pytest.raises(RateLimitError) as caught:
                await call(sdk.with_options(max_retries=0).v1.usage.ingest, usage=batch)
            headers = caught.value.response.headers
            assert (headers["retry-after"], headers["x-metronome-rate-limit-type"]) == ("1", "client")
            assert list(caught.value.body) == ["message"]
            second = asyncio.create_task(call(sdk.v1.usage.ingest, usage=batch))
            await asyncio.sleep(0.2)
            room.set()
            async with asyncio.timeout(30):
                await asyncio.gather(first, second)
        assert len(await stored(client, "a", *(one["transaction_id"] for one in batch))) == 10


async def test_what_is_not_known_is_refused_not_ignored(base_url: str, sdk: Metronome) -> None:
    """A field or parameter that does not exist is an error, as a misspelt filter would show too much."""
    customer_id, metric_id = await made(sdk)
    v1 = sdk.v1
    grouped = bounds(customer_id=customer_id, billable_metric_id=metric_id)
    for function, fields, field in [
        (v1.usage.list, bounds(extra_body={"customer_id": "x"}), "customer_id"),
        (v1.usage.list, bounds(billable_metrics=[{"id": metric_id, "groupBy": {"key": "x"}}]), "groupBy"),
        (v1.usage.list_with_groups, {**grouped, "extra_body": {"groupKey": ["x"]}}, "groupKey"),
        (v1.usage.list_with_groups, {**grouped, "extra_query": {"page_size": 5}}, "page_size"),
        (v1.usage.ingest, {"usage": [{**sent(), "value": 3}]}, "value"),
        (v1.usage.search, {"transaction_ids": ["x"], "extra_body": {"customer_id": "x"}}, "customer_id"),
        (v1.customers.create, {"name": "x", "extra_body": {"id": UNKNOWN}}, "id"),
        (v1.customers.create, {"name": "x", "extra_body": {"billing_config": {}}}, "billing_config"),
        (v1.customers.list, {"extra_query": {"alias": "x"}}, "alias"),
        (
            v1.billable_metrics.create,
            {"name": "x", "aggregation_type": "COUNT", "extra_body": {"filter": {}}},
            "filter",
        ),
    ]:
        assert field in await refusal(BadRequestError, function, **fields)
    assert len(await call(everything, v1.customers.list)) == 1
    assert len(await call(everything, v1.billable_metrics.list)) == 1


PATHS = ["/v1/usage", "/v1/usage/groups", "/v1/events/search", "/v1/customers", "/v1/ingest"]
BROKEN = [
    b"",
    b" ",
    b"null",
    b"{",
    b"[]",
    b"5",
    b'"x"',
    b'{"window_size": NaN}',
    b'{"window_size": 5}',
    b'{"window_size": ["DAY"]}',
    b'{"window_size": "DAY", "window_size": "HOUR"}',
    b'{"window_size": "\\ud800"}',
    b'{"window_size": "\xff"}',
    b'{"customer_ids": {"a": 1}}',
    b'{"customer_ids": [null]}',
    b'{"customer_ids": "x"}',
    b'{"customer_ids": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"billable_metrics": [5]}',
    b'{"billable_metrics": {}}',
    b'{"starting_on": {"seconds": 5}}',
    b'{"next_page": "x"}',
]


async def test_broken_bodies(base_url: str) -> None:
    """Whatever is not JSON of the right form is a 400 with a message, on every path."""
    async with raw(base_url) as http:
        for path, body in itertools.product(PATHS, BROKEN):
            answer = await http.post(path, content=body)
            assert (answer.status_code, list(answer.json())) == (400, ["message"]), (path, body[:50], answer.text)
            assert not LEAK.search(answer.content)
            assert answer.headers["content-type"] == "application/json"


async def test_names_of_the_callers_own_are_told_as_they_are(sdk: Metronome) -> None:
    """An error names a property, a note or a group key as the caller wrote it, also if a field of ours is called so."""
    customer_id, metric_id = await made(sdk, group_keys=[["page_size"]])
    grouped = bounds(customer_id=customer_id, billable_metric_id=metric_id, group_key=["page_size"])
    for function, fields, place in [
        (sdk.v1.usage.ingest, {"usage": [sent(properties={"page_size": "\x00"})]}, "[0].properties.page_size: "),
        (
            sdk.v1.usage.ingest,
            {"usage": [sent(properties={"x": {"page_token": "\x00"}})]},
            "[0].properties.x.page_token: ",
        ),
        (sdk.v1.customers.create, {"name": "x", "custom_fields": {"page_size": "\x00"}}, "custom_fields.page_size: "),
        (
            sdk.v1.usage.list_with_groups,
            {**grouped, "group_filters": {"page_size": ["a", "a"]}},
            "group_filters['page_size']",
        ),
    ]:
        message = await refusal(BadRequestError, function, **fields)
        assert message.startswith(place), message


# --- Ingest


async def stored(client: Client, *ids: str) -> dict[str, event_pb2.UsageEvent]:
    """The stored ones among some events, by id."""
    found = await client.events.SearchEvents(event_pb2.SearchEventsRequest(transaction_ids=ids))
    return {one.event.transaction_id: one.event for one in found.events}


async def test_events_count_once(client: Client, sdk: Metronome) -> None:
    """The same events again are an empty 200 and count once; so is other content under a stored id, with a header."""
    customer_id, metric_id = await made(sdk)
    batch = [sent(f"e{i}", properties={"n": i, "m": {"deep": [1, None, "x"]}}) for i in range(10)]
    for number in range(3):
        if number == 2:
            batch[3] = sent("e3", properties={"n": 1000})
            batch[4] = sent("e4", properties={"n": 1000})
        answer = await call(sdk.v1.usage.with_raw_response.ingest, usage=batch)
        assert (answer.http_response.status_code, answer.http_response.content) == (200, b"")
        assert answer.headers.get("x-metering-conflicts") == ("2" if number == 2 else None)
        rows = await call(everything, sdk.v1.usage.list, **bounds("NONE"))
        assert [(row_of(one)[:2], one.value) for one in rows] == [((customer_id, metric_id), 45)]
    assert (await stored(client, "e3"))["e3"].properties["n"] == 3


async def test_one_bad_event_refuses_all(client: Client, sdk: Metronome) -> None:
    """A batch is stored whole or not at all; the message says which event is wrong, and where."""
    soon = datetime.now(UTC) + timedelta(hours=23)
    for bad, field in [
        ({"transaction_id": ""}, "transaction_id"),
        ({"transaction_id": "x" * 129}, "transaction_id"),
        ({"transaction_id": "bad\x00"}, "transaction_id"),
        ({"customer_id": ""}, "customer_id"),
        ({"event_type": ""}, "event_type"),
        ({"timestamp": iso(soon + 2 * HOUR)}, "timestamp"),
        ({"timestamp": ""}, "timestamp"),
        ({"timestamp": None}, "timestamp"),
        ({"properties": {"n": "\x00"}}, "properties.n"),
        ({"properties": {"": 1}}, "properties"),
        ({"properties": [1]}, ""),
        ({"properties": {"n": "x" * 100_000}}, "properties"),
    ]:
        batch = [sent("good"), {**sent("bad"), **bad}]
        message = await refusal(BadRequestError, sdk.v1.usage.ingest, usage=batch)
        assert message.startswith(f"[1].{field}".rstrip(".")), (bad, message)
    assert await stored(client, "good", "bad") == {}
    await call(sdk.v1.usage.ingest, usage=[sent("good"), sent("soon", timestamp=iso(soon))])
    assert set(await stored(client, "good", "soon")) == {"good", "soon"}


async def test_batches_have_1_to_100_events(client: Client, sdk: Metronome) -> None:
    """A hundred events are taken; none, or one more, is an error and stores nothing.

    So is a body of more than 4 MB; one of 1.4 MB is taken.
    """
    batch = [sent(f"e{i:03}") for i in range(101)]
    for wrong in ([], batch):
        assert (await refusal(BadRequestError, sdk.v1.usage.ingest, usage=wrong)).startswith("body: ")
    # Without an argument the SDK sends no body at all.
    assert (await refusal(BadRequestError, sdk.v1.usage.ingest)).startswith("body: ")
    assert await stored(client, "e000") == {}
    await call(sdk.v1.usage.ingest, usage=batch[:100])
    assert len(await stored(client, *(one["transaction_id"] for one in batch))) == 100
    large = [sent(f"l{i}", properties={f"p{j}": "x" * 1000 for j in range(14)}) for i in range(100)]
    await call(sdk.v1.usage.ingest, usage=large)
    # The server finds these in several pages of its own; the SDK's answer has them all.
    found = await call(sdk.v1.usage.search, transaction_ids=[one["transaction_id"] for one in large])
    assert {one.transaction_id: one.properties for one in found} == {
        one["transaction_id"]: one["properties"] for one in large
    }
    with pytest.raises(APIStatusError) as caught:
        await call(sdk.v1.usage.ingest, usage=[{**one, "event_type": "x" * 45_000} for one in large])
    assert (caught.value.status_code, list(caught.value.body)) == (413, ["message"])


async def test_an_answer_that_was_lost(client: Client, base_url: str) -> None:
    """When the server did it and the answer is lost, the SDK sends the same again, and it is done once.

    Of events that is known by their ids, of creations by their `Idempotency-Key`.
    """
    wire = Wire(lost=2)
    with program(base_url, http_client=httpx.Client(transport=wire)) as sdk:
        answer = await call(sdk.v1.usage.with_raw_response.ingest, usage=[sent("a"), sent("b")])
        assert "x-metering-conflicts" not in answer.headers
        assert [one.headers["x-stainless-retry-count"] for one in wire.tries] == ["0", "1", "2"]
    wire = Wire(lost=1)
    with program(base_url, http_client=httpx.Client(transport=wire)) as sdk:
        key = {"Idempotency-Key": "the key"}
        made = await call(sdk.v1.customers.create, name="Acme", ingest_aliases=["acme"], extra_headers=key)
        assert len(wire.tries) == 2
        assert [one.id for one in await call(everything, sdk.v1.customers.list)] == [made.data.id]
    metric = await client.create_metric()
    (window,) = await client.all_usage(
        billable_metrics=[usage_pb2.BillableMetricSelector(id=metric.id)],
        window_size="WINDOW_SIZE_NONE",
        starting_on=timestamp(START),
        ending_before=timestamp(END),
    )
    assert (window.customer_id, window.value) == (made.data.id, "2")


async def test_creations_with_an_idempotency_key(base_url: str) -> None:
    """The same key and content answer with the same thing, other content with a 409 that is not tried again.

    Without a key every call makes something new. A key is one of customers or of metrics, not of both.
    """
    wire = Wire()
    with program(base_url, http_client=httpx.Client(transport=wire)) as sdk:
        ids: list[str] = []
        key = {"extra_headers": {"Idempotency-Key": "the key"}}
        metric = {"name": "Requests", "aggregation_type": "SUM", "aggregation_key": "n", "group_keys": [["region"]]}
        customer = {"name": "Acme", "ingest_aliases": ["acme"], "custom_fields": {"a": "b"}}
        for function, fields, other in [
            (sdk.v1.customers.create, customer, {**customer, "ingest_aliases": ["other"]}),
            (sdk.v1.billable_metrics.create, metric, {**metric, "aggregation_type": "MAX"}),
        ]:
            first = await call(function, **fields, **key)
            second = await call(function, **fields, **key)
            assert first.data == second.data
            ids.append(first.data.id)
            wire.tries.clear()
            await refusal(ConflictError, function, **other, **key)
            assert len(wire.tries) == 1
            fresh = await call(function, **{**other, "name": "New"})
            assert fresh.data.id != first.data.id
            for bad in ("", "x" * 256):
                message = await refusal(BadRequestError, function, **fields, extra_headers={"Idempotency-Key": bad})
                assert message.startswith("Idempotency-Key: ")
        assert len(set(ids)) == 2
        assert [one.name for one in await call(everything, sdk.v1.customers.list)].count("Acme") == 1


async def test_compressed_bodies(client: Client, base_url: str) -> None:
    """Events may come compressed with gzip; what inflates without end is refused, and nothing of it is stored."""
    async with raw(base_url) as http:
        headers = {"content-encoding": "gzip"}
        body = gzip.compress(json.dumps([sent(f"z{i}", properties={"text": "x" * 50}) for i in range(100)]).encode())
        answer = await http.post("/v1/ingest", content=body, headers=headers)
        assert (answer.status_code, answer.content) == (200, b"")
        bomb = gzip.compress(b"[" + b" " * 50_000_000 + json.dumps(sent("bomb")).encode() + b"]")
        answer = await http.post("/v1/ingest", content=bomb, headers=headers)
        assert 400 <= answer.status_code < 500, answer.text
        assert list(answer.json()) == ["message"]
        assert (await http.post("/v1/ingest", content=b"no gzip", headers=headers)).status_code == 400
    assert set(await stored(client, "z0", "z99", "bomb")) == {"z0", "z99"}


async def test_searching_events(sdk: Metronome) -> None:
    """Events are found by their ids, with the customer and the metrics that match now; ids not stored are absent."""
    customer_id, metric_id = await made(
        sdk, "SUM", event_type_filter={"in_values": ["request"]}, group_keys=[["region"]]
    )
    properties = {"n": 1.5, "big": 10**30, "list": [1, "x", None, {"deep": True}]}
    batch = [
        sent("mine", properties=properties, timestamp="2026-01-05T00:00:00.123Z"),
        sent("login", event_type="login"),
        sent("nobody's", customer_id="nobody", timestamp=iso(START + HOUR)),
        sent("by id", customer_id=customer_id.upper(), timestamp=iso(START - HOUR), properties={"n": "1"}),
    ]
    await call(sdk.v1.usage.ingest, usage=batch)
    ids = ["mine", "login", "nobody's", "by id", "unknown"]
    found = await call(sdk.v1.usage.search, transaction_ids=ids)
    # The latest first.
    assert [one.transaction_id for one in found] == ["nobody's", "mine", "login", "by id"]
    event = {one.transaction_id: one for one in found}
    mine = event["mine"]
    assert (mine.id, mine.customer_id, mine.event_type) == ("mine", "acme", "request")
    assert mine.timestamp == START + timedelta(milliseconds=123)
    assert mine.properties == {**properties, "big": str(10**30)}
    assert mine.is_duplicate is False
    assert abs(datetime.now(UTC) - mine.processed_at) < timedelta(minutes=5)
    assert (mine.matched_customer.id, mine.matched_customer.name) == (customer_id, "Acme")
    (metric,) = mine.matched_billable_metrics
    assert (metric.id, metric.aggregation_type, metric.aggregation_key) == (metric_id, "SUM", "n")
    assert (metric.event_type_filter.in_values, metric.group_keys) == (["request"], [["region"]])
    assert event["login"].matched_billable_metrics == []
    assert event["nobody's"].matched_customer is None
    assert (event["by id"].customer_id, event["by id"].matched_customer.id) == (customer_id, customer_id)
    assert [one.id for one in event["by id"].matched_billable_metrics] == [metric_id]
    assert await call(sdk.v1.usage.search, transaction_ids=["unknown"]) == []
    assert len(await call(sdk.v1.usage.search, transaction_ids=[*ids, *map(str, range(95))])) == 4
    message = await refusal(BadRequestError, sdk.v1.usage.search, transaction_ids=[*ids, *map(str, range(96))])
    assert message == "transactionIds: has 101 items; it must have 1..100"


# --- Metrics and customers


async def test_the_life_of_a_metric(client: Client, sdk: Metronome) -> None:
    """A metric is created, read, listed, renamed and archived, twice if need be; what it counts is what was said."""
    metrics = sdk.v1.billable_metrics
    rules = {
        "aggregation_type": "MAX",
        "aggregation_key": "cpu",
        "event_type_filter": {"in_values": ["job", "task"]},
        "property_filters": [
            {"name": "cpu", "exists": True},
            {"name": "region", "in_values": ["eu", "us"]},
            {"name": "debug", "exists": False},
            {"name": "plan", "not_in_values": ["free"]},
        ],
        "group_keys": [["region"], ["region", "team"]],
        "custom_fields": {"owner": "ada"},
    }
    ids = [(await call(metrics.create, name=f"Metric {i}", **rules)).data.id for i in range(3)]
    found = (await call(metrics.retrieve, billable_metric_id=ids[0])).data
    told = {**rules, "name": "Metric 0", "id": ids[0]}
    answered = found.to_dict(exclude_unset=True)
    # Lists that were not given are empty in the answer.
    assert {name: answered[name] for name in told if name not in {"property_filters", "event_type_filter"}} == {
        name: value for name, value in told.items() if name not in {"property_filters", "event_type_filter"}
    }
    filled = {"in_values": [], "not_in_values": []}
    assert answered["event_type_filter"] == filled | rules["event_type_filter"]
    assert answered["property_filters"] == [filled | one for one in rules["property_filters"]]
    assert found.archived_at is None
    native = (
        await client.metrics.GetBillableMetric(billable_metric_pb2.GetBillableMetricRequest(id=ids[0]))
    ).billable_metric
    assert [(one.name, one.HasField("exists"), one.exists) for one in native.property_filters] == [
        ("cpu", True, True),
        ("region", False, False),
        ("debug", True, False),
        ("plan", False, False),
    ]
    for limit in (1, 2, 100, None):
        page = {"limit": limit} if limit else {}
        assert [one.id for one in await call(everything, metrics.list, **page)] == sorted(ids)
    assert len((await call(metrics.list, limit=1)).data) == 1
    assert (await call(metrics.update, billable_metric_id=ids[0], name="New")).data.id == ids[0]
    assert (await call(metrics.retrieve, billable_metric_id=ids[0])).data.name == "New"
    assert (await call(metrics.archive, id=ids[0])).data.id == ids[0]
    archived = (await call(metrics.retrieve, billable_metric_id=ids[0])).data.archived_at
    assert abs(datetime.now(UTC) - archived) < timedelta(minutes=5)
    assert (await call(metrics.archive, id=ids[0])).data.id == ids[0]
    assert (await call(metrics.retrieve, billable_metric_id=ids[0])).data.archived_at == archived
    customer_id = (await call(sdk.v1.customers.create, name="Acme")).data.id
    for function, fields in (
        (metrics.list, {}),
        (sdk.v1.customers.list_billable_metrics, {"customer_id": customer_id}),
    ):
        for page in ({}, {"limit": 1}):
            assert [one.id for one in await call(everything, function, **fields, **page)] == sorted(ids[1:])
            listed = await call(everything, function, **fields, **page, include_archived=True)
            assert [(one.id, one.archived_at) for one in listed] == [
                (one, archived if one == ids[0] else None) for one in sorted(ids)
            ]
    message = await refusal(
        BadRequestError, sdk.v1.customers.list_billable_metrics, customer_id=customer_id, on_current_plan=True
    )
    assert message.startswith("on_current_plan: ")
    message = await refusal(BadRequestError, metrics.create, name="x", sql="SELECT count(*) FROM events")
    assert message.startswith("sql: ")


async def test_the_life_of_a_customer(sdk: Metronome) -> None:
    """A customer is created, read, found, renamed and archived, twice if need be; a long name is cut."""
    customers = sdk.v1.customers
    first = (await call(customers.create, name="N" * 200, external_id="zed", ingest_aliases=["abe", "zed"])).data
    assert first.name == "N" * 160
    assert sorted(first.ingest_aliases) == ["abe", "zed"]
    assert first.external_id == first.ingest_aliases[0]
    ids = [first.id]
    for i in range(4):
        made = (await call(customers.create, name=f"C{i}", custom_fields={"number": str(i)})).data
        assert (made.external_id, made.ingest_aliases, made.custom_fields) == (made.id, [], {"number": str(i)})
        ids.append(made.id)
    found = (await call(customers.retrieve, customer_id=ids[1].upper())).data
    assert (found.id, found.name, found.archived_at) == (ids[1], "C0", None)
    assert found.customer_config.salesforce_account_id is None
    assert abs(datetime.now(UTC) - found.created_at) < timedelta(minutes=5)
    assert (await call(customers.set_name, customer_id=ids[1], name="M" * 161)).data.name == "M" * 160
    renamed = (await call(customers.retrieve, customer_id=ids[1])).data
    assert (renamed.name, renamed.created_at) == ("M" * 160, found.created_at)
    assert renamed.updated_at > found.updated_at
    assert renamed.custom_fields == {"number": "0"}

    async def listed(**fields: Any) -> list[str]:
        return [one.id for one in await call(everything, customers.list, **fields)]

    for limit in (1, 2, 100, None):
        assert await listed(**({"limit": limit} if limit else {})) == sorted(ids)
    assert len((await call(customers.list, limit=2)).data) == 2
    assert await listed(ingest_alias="abe") == [first.id]
    assert await listed(ingest_alias="nobody") == []
    # The SDK joins them by commas; others repeat the parameter.
    assert await listed(customer_ids=[ids[3], ids[1]]) == sorted([ids[1], ids[3]])
    assert await listed(extra_query={"customer_ids": [ids[3], ids[1]]}) == sorted([ids[1], ids[3]])
    assert await listed(customer_ids=[UNKNOWN, ids[2]], limit=1) == [ids[2]]
    assert await listed(salesforce_account_ids=["x"]) == []
    many = [str(uuid.UUID(int=i)) for i in range(101)]
    assert await listed(customer_ids=many[:100]) == []
    assert (await refusal(BadRequestError, customers.list, customer_ids=many)).startswith("customer_ids: ")
    assert (await call(customers.archive, id=ids[2])).data.id == ids[2]
    archived = (await call(customers.retrieve, customer_id=ids[2])).data.archived_at
    assert abs(datetime.now(UTC) - archived) < timedelta(minutes=5)
    assert (await call(customers.archive, id=ids[2])).data.id == ids[2]
    assert (await call(customers.retrieve, customer_id=ids[2])).data.archived_at == archived
    assert await listed() == sorted(set(ids) - {ids[2]})
    assert await listed(only_archived=True) == [ids[2]]


async def test_aliases_move_with_their_history(sdk: Metronome) -> None:
    """Usage sent under an alias is the customer's who has it now, also if it was sent before there was a customer."""
    await call(
        sdk.v1.usage.ingest,
        usage=[sent("a", customer_id="desk"), sent("b", customer_id="desk"), sent("c", customer_id="other")],
    )
    one = (await call(sdk.v1.customers.create, name="One", ingest_aliases=["desk"])).data.id
    two = (await call(sdk.v1.customers.create, name="Two")).data.id
    metric_id = (await call(sdk.v1.billable_metrics.create, name="m", aggregation_type="COUNT")).data.id

    async def usage() -> dict[str, float | None]:
        fields = bounds("NONE", customer_ids=[one, two], billable_metrics=[{"id": metric_id}])
        return {row.customer_id: row.value for row in await call(everything, sdk.v1.usage.list, **fields)}

    # The metric is newer than the events, so it may still be counting; the SDK asks again.
    assert await usage() == {one: 2, two: None}
    assert await call(sdk.v1.customers.set_ingest_aliases, customer_id=one, ingest_aliases=[]) is None
    assert await usage() == {one: None, two: None}
    await call(sdk.v1.customers.set_ingest_aliases, customer_id=two, ingest_aliases=["desk", "other"])
    assert await usage() == {one: None, two: 3}
    (found,) = await call(sdk.v1.usage.search, transaction_ids=["a"])
    assert found.matched_customer.id == two


# --- The example


async def run(*command: str, **environment: str) -> tuple[int | None, str, str]:
    """Run an example as a user would; returns its exit code and what it wrote."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("METERING_", "METRONOME_"))}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        *command,
        env={**inherited, "PYTHONPATH": str(REPOSITORY / "generated"), **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        printed, errors = await process.communicate()
    return process.returncode, printed.decode(), errors.decode()


async def test_the_example(client: Client, base_url: str, sdk: Metronome) -> None:
    """Metronome's printed example runs against what the fixture makes, twice too, and prints the first day's end."""
    fixture, main = str(CLIENTS / "fixture.py"), str(CLIENTS / "metronome_python" / "main.py")
    for _ in range(2):
        code, printed, errors = await run(fixture, METERING_ADDRESS=client.address)
        assert (code, errors) == (0, ""), errors
        assert printed.endswith("6 events\n")
        assert await run(main, METRONOME_BASE_URL=base_url) == (0, "2021-01-02 00:00:00+00:00\n", "")
    rows = await call(
        everything,
        sdk.v1.usage.list_with_groups,
        billable_metric_id="222796fd-d29c-429e-89b2-549fabda4ed6",
        customer_id="04ca7e72-4229-4a6e-ab11-9f7376fccbcb",
        window_size="day",
        starting_on="2021-01-01T00:00:00.000",
        ending_before="2021-01-03T00:00:00.000",
        group_by={"key": "region", "values": ["US-East", "US-West", "EU-Central"]},
    )
    assert [(one.starting_on.day, one.group_value, one.model_extra.get("value_decimal")) for one in rows] == [
        (1, "EU-Central", "7"),
        (1, "US-East", "10.3"),
        (1, "US-West", None),
        (2, "EU-Central", "0"),
        (2, "US-East", "20"),
        (2, "US-West", "3.5"),
    ]


async def test_the_example_with_keys(database_url: str, database: Database) -> None:
    """Fixture and example take an API key from the environment; the fixture says so when it lacks one."""
    key = new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_organization(connection, "acme")
        await organizations.create_api_key(connection, "acme", key.id, "test", key.secret_hash)
    fixture, main = str(CLIENTS / "fixture.py"), str(CLIENTS / "metronome_python" / "main.py")
    async with running_server(database_url) as client, running_gateway(client.address) as url:
        code, printed, errors = await run(fixture, METERING_ADDRESS=client.address)
        assert (code, printed) == (1, "")
        assert re.fullmatch(rf"failed at {client.address}: UNAUTHENTICATED: .*API key.*\n", errors)
        code, printed, _ = await run(fixture, METERING_ADDRESS=client.address, METERING_API_KEY=key.text)
        assert code == 0
        done = await run(main, METRONOME_BASE_URL=url, METRONOME_BEARER_TOKEN=key.text)
        assert done == (0, "2021-01-02 00:00:00+00:00\n", "")
