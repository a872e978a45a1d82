"""Claims about what a request may hold: every limit can be set, has an effect, and is in docs/limits.md as it is."""

import gzip
import itertools
import json
import math
import os
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from conftest import Client, event, start_server, timestamp
from faults import read_fault
from google.api.httpbody_pb2 import HttpBody
from marketplace import complete, group, lease, report, roll_up, sell

import service.server  # noqa: F401  # brings every limit
from compat.metronome.v1 import billable_metric_pb2 as metronome_metric_pb2
from compat.metronome.v1 import billable_metric_pb2_grpc as metronome_metric_grpc
from compat.metronome.v1 import usage_pb2 as metronome_usage_pb2
from compat.metronome.v1 import usage_pb2_grpc as metronome_usage_grpc
from metering.v1 import (
    billable_metric_pb2,
    customer_pb2,
    entitlement_pb2,
    error_reason_pb2,
    event_pb2,
    usage_pb2,
    usage_record_group_pb2,
    usage_record_report_pb2,
)
from service.database import Database
from service.domain.metrics import Aggregation, BillableMetric, PropertyFilter
from service.limits import PREFIX, Limit, all_limits

ROOT = Path(__file__).parent.parent
LIMITS = {one.name: one for one in all_limits()}
DEFAULTS = {name: one.default for name, one in LIMITS.items()}
# Small ones that leave room for one another: names can be as long as the tests need, pages hold what they make.
LOW = {
    "IDENTIFIER_CHARACTERS": 40,
    "NAME_CHARACTERS": 41,
    "TEXT_BYTES": 24,
    "CUSTOM_FIELDS": 2,
    "EVENTS_PER_CALL": 7,
    "TRANSACTION_IDS_PER_SEARCH": 4,
    "PROPERTIES": 5,
    "PROPERTIES_BYTES": 200,
    "NESTING_LEVELS": 3,
    "ALIASES": 3,
    "DIMENSIONS": 5,
    "METRIC_KEYS": 3,
    "FILTER_VALUES": 8,
    "FILTERS": 2,
    "GROUP_KEYS": 2,
    "GROUP_KEY_PROPERTIES": 3,
    "METRIC_BYTES": 350,
    "METRICS": 30,
    "RECORD_KEYS": 31,
    "PAGE_SIZE": 6,
    "PAGE_SIZE_DEFAULT": 4,
    "SKIP": 5,
    "WINDOWS_PER_QUERY": 26,
    "IDS_PER_QUERY": 3,
    "GROUP_VALUES": 4,
    "USAGE_PAGE_SIZE": 7,
    "USAGE_PAGE_SIZE_DEFAULT": 5,
    "GROUP_FILTER_VALUES": 8,
    "GROUP_FILTER_COMBINATIONS": 9,
    "GROUPS_PER_CALL": 3,
    "RECORDS": 4,
    "ALLOCATIONS": 6,
    "TAGS": 2,
    "GROUP_BYTES": 1_500,
    "META_FILTER_BYTES": 60,
    "REPORTS_PER_LEASE": 3,
    "REPORTS_PER_LEASE_DEFAULT": 2,
    "LEASE_SECONDS": 61,
    "LEASE_SECONDS_DEFAULT": 33,
    "OUTCOME_MESSAGE_CHARACTERS": 15,
    "IDEMPOTENCY_KEY_CHARACTERS": 10,
    "JSON_BODY_BYTES": 901,
    "JSON_GZIP_PARTS": 2,
    "JSON_VALUES": 59,
    "JSON_ITEMS": 6,
    "METRONOME_SEARCHED_IDS": 2,
}
HIGHEST = {name: one.most for name, one in LIMITS.items() if one.most > one.default and one.error}
START = datetime(2026, 1, 1, tzinfo=UTC)
WIDE = "\U0001f4be"


class World(NamedTuple):
    """A server with these limits that holds a customer, a metric by three properties, an entitlement, and a report."""

    client: Client
    database: Database
    limits: Mapping[str, int]
    customer: str
    metric: str


class Answer(NamedTuple):
    """What answers a request that holds too much."""

    error: str
    field: str
    text: str


# --- One request for each limit, that holds so many of what it bounds.


async def _metric(world: World, **fields: Any) -> Any:
    fields = {"name": "m", "aggregation_type": "AGGREGATION_TYPE_COUNT", **fields}
    metric = billable_metric_pb2.BillableMetric(**fields)
    request = billable_metric_pb2.CreateBillableMetricRequest(billable_metric=metric)
    await world.client.metrics.CreateBillableMetric(request)


async def _event(world: World, properties: Mapping[str, Any]) -> list[Answer]:
    answer = await world.client.ingest(event(properties=properties))
    assert list(answer.verdicts) == [event_pb2.VERDICT_REJECTED if answer.issues else event_pb2.VERDICT_ACCEPTED]
    return [Answer(f"REJECTED, {_reason(one.reason)}", one.field, one.message) for one in answer.issues]


async def _group(world: World, sent: usage_record_group_pb2.NewUsageRecordGroup) -> list[Answer]:
    (result,) = await report(world.client, sent)
    assert (result.verdict == event_pb2.VERDICT_REJECTED) == bool(result.violations)
    return [Answer(f"REJECTED, {_reason(one.code)}", one.field, one.message) for one in result.violations]


def _reason(number: Any) -> str:
    return error_reason_pb2.ErrorReason.Name(number).removeprefix("ERROR_REASON_")


def _texts(number: int, start: str = "v") -> list[str]:
    return [f"{start}{i}" for i in range(number)]


async def identifier(world: World, n: int) -> Any:
    """An alias as wide as can be, and everything that an event names so."""
    # Random, as Postgres would compress what repeats.
    wide = "".join(chr(0x20000 + int.from_bytes(os.urandom(2)) % 40_000) for _ in range(n))
    await world.client.create_customer(ingest_aliases=[wide])
    issues = (await world.client.ingest(event(wide, customer_id=wide, event_type=wide, properties={wide: 1}))).issues
    assert not issues


async def name(world: World, n: int) -> Any:
    """A name."""
    await world.client.create_customer(name=WIDE * n)


async def text(world: World, n: int) -> Any:
    """A note, of characters of several bytes."""
    await world.client.create_customer(custom_fields={"note": WIDE * (n // 4) + "x" * (n % 4)})


async def custom_fields(world: World, n: int) -> Any:
    """Notes."""
    await world.client.create_customer(custom_fields=dict.fromkeys(_texts(n), "x"))


async def events(world: World, n: int) -> Any:
    """Events."""
    await world.client.ingest(*(event() for _ in range(n)))


async def transaction_ids(world: World, n: int) -> Any:
    """Ids to look up."""
    await world.client.events.SearchEvents(event_pb2.SearchEventsRequest(transaction_ids=_texts(n)))


async def properties(world: World, n: int) -> Any:
    """Properties."""
    return await _event(world, dict.fromkeys(_texts(n), 1))


async def properties_bytes(world: World, n: int) -> Any:
    """Properties that take so many bytes as JSON."""
    values = ["x" * 10] * ((n - 7) // 13)
    values[-1] += "x" * ((n - 7) % 13)
    assert len(json.dumps({"p": values}, separators=(",", ":"))) == n
    return await _event(world, {"p": values})


async def nesting(world: World, n: int) -> Any:
    """Lists in each other."""
    value: list[Any] = []
    for _ in range(n - 1):
        value = [value]
    return await _event(world, {"p": value})


async def aliases(world: World, n: int) -> Any:
    """Aliases."""
    await world.client.create_customer(ingest_aliases=_texts(n, "alias"))


async def dimensions(world: World, n: int) -> Any:
    """Dimensions."""
    product = entitlement_pb2.Product(
        id=str(uuid.uuid4()), name="p", partner="PARTNER_AWS", dimensions=[{"key": one} for one in _records(n)]
    )
    await world.client.entitlements.CreateProduct(entitlement_pb2.CreateProductRequest(product=product))


async def metric_keys(world: World, n: int) -> Any:
    """Keys of metrics, which exist if there may be so many."""
    for key in _texts(n, "key") if n <= world.limits["METRIC_KEYS"] else ():
        await _metric(world, key=key)
    entitlement = entitlement_pb2.Entitlement(
        id=str(uuid.uuid4()),
        product_id="p-ent",
        buyer_id="b-ent",
        starting_on=timestamp(START),
        billable_metric_keys=_texts(n, "key"),
    )
    request = entitlement_pb2.CreateEntitlementRequest(entitlement=entitlement)
    await world.client.entitlements.CreateEntitlement(request)


async def filter_values(world: World, n: int) -> Any:
    """Values of a filter."""
    await _metric(world, property_filters=[{"name": "p", "in_values": _texts(n)}])


async def filters(world: World, n: int) -> Any:
    """Filters."""
    await _metric(world, property_filters=[{"name": one, "exists": True} for one in _texts(n)])


async def group_keys(world: World, n: int) -> Any:
    """Group keys."""
    await _metric(world, group_keys=[{"properties": [one]} for one in _texts(n)])


async def group_key_properties(world: World, n: int) -> Any:
    """Properties of a group key."""
    await _metric(world, group_keys=[{"properties": _texts(n)}])


async def metric_bytes(world: World, n: int) -> Any:
    """A definition of so many bytes."""
    length = world.limits["TEXT_BYTES"] - 4
    for number in itertools.count(1):
        values = [f"{i:03}".ljust(length, "x") for i in range(number)]
        short = n - _definition_bytes(values)
        if short <= 0:
            values[-1] = values[-1][:short] if short else values[-1]
            break
    assert _definition_bytes(values) == n
    await _metric(world, property_filters=[{"name": "p", "in_values": values}])


def _definition_bytes(values: list[str]) -> int:
    metric = BillableMetric(
        uuid.uuid4(), "m", Aggregation.COUNT, property_filters=(PropertyFilter("p", None, (*values,)),)
    )
    return len(json.dumps(metric.definition(), ensure_ascii=False).encode())


async def metrics(world: World, n: int) -> Any:
    """As many metrics of the organization, some of them archived."""
    kept = [one for one in await _all_metrics(world) if not one.record_key]
    for i in range(n - len(kept)):
        if i == 1:
            request = billable_metric_pb2.ArchiveBillableMetricRequest(id=kept[0].id)
            await world.client.metrics.ArchiveBillableMetric(request)
        await _metric(world)


async def record_keys(world: World, n: int) -> Any:
    """As many keys of the organization's records."""
    missing = n - sum(bool(one.record_key) for one in await _all_metrics(world))
    keys = [str(uuid.uuid4()) for _ in range(missing)]
    for start in range(0, missing, world.limits["DIMENSIONS"]):
        dimensions = [{"key": one} for one in keys[start : start + world.limits["DIMENSIONS"]]]
        product = entitlement_pb2.Product(id=str(uuid.uuid4()), name="p", partner="PARTNER_AWS", dimensions=dimensions)
        await world.client.entitlements.CreateProduct(entitlement_pb2.CreateProductRequest(product=product))


async def _all_metrics(world: World) -> list[billable_metric_pb2.BillableMetric]:
    found: list[billable_metric_pb2.BillableMetric] = []
    request = billable_metric_pb2.ListBillableMetricsRequest(include_archived=True, page_size=1000)
    while True:
        page = await world.client.metrics.ListBillableMetrics(request)
        found += page.billable_metrics
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


async def skip(world: World, n: int) -> Any:
    """Groups to pass over."""
    request = usage_record_group_pb2.ListUsageRecordGroupsRequest(skip=n)
    await world.client.groups.ListUsageRecordGroups(request)


async def windows(world: World, n: int) -> Any:
    """Hours of one customer and metric, or of twenty metrics where there is not so much time."""
    kept = [one.id for one in await _all_metrics(world) if not one.record_key]
    chosen = [world.metric] if n <= 80_000_000 else kept[:20]
    start = datetime(2, 1, 1, tzinfo=UTC)
    await _usage(
        world,
        "WINDOW_SIZE_HOUR",
        start,
        start + timedelta(hours=-(-n // len(chosen))),
        customer_ids=[world.customer],
        billable_metrics=[{"id": one} for one in chosen],
    )


async def _usage(world: World, size: Any, start: datetime, end: datetime, **fields: Any) -> Any:
    request = usage_pb2.ListUsageRequest(
        window_size=size, starting_on=timestamp(start), ending_before=timestamp(end), **fields
    )
    return await world.client.usage.ListUsage(request)


async def ids(world: World, n: int) -> Any:
    """Customers to list."""
    sent = [str(uuid.uuid4()) for _ in range(n)]
    await world.client.customers.ListCustomers(customer_pb2.ListCustomersRequest(ids=sent))


async def group_values(world: World, n: int) -> Any:
    """Values to split usage by."""
    await _usage(
        world,
        "WINDOW_SIZE_NONE",
        START,
        START + timedelta(days=1),
        customer_ids=[world.customer],
        billable_metrics=[{"id": world.metric, "group_by": {"key": "a", "values": _texts(n)}}],
    )


async def group_filter_values(world: World, n: int) -> Any:
    """Values to filter groups by."""
    await _grouped(world, 1, group_key=["a", "b", "c"], group_filters={"a": {"values": _texts(n)}})


async def combinations(world: World, n: int) -> Any:
    """So many combinations of values in filters, or a few more where no three numbers make exactly as many."""
    room = world.limits["GROUP_FILTER_VALUES"]
    sizes = range(1, room)
    three = min(
        (one for one in itertools.combinations_with_replacement(sizes, 3) if sum(one) <= room and math.prod(one) >= n),
        key=math.prod,
    )
    filters = {key: {"values": _texts(size)} for key, size in zip("abc", three, strict=True)}
    await _grouped(world, 1, group_key=["a", "b", "c"], group_filters=filters)


async def _grouped(world: World, hours: int, **fields: Any) -> Any:
    request = usage_pb2.ListUsageWithGroupsRequest(
        customer_id=world.customer,
        billable_metric_id=world.metric,
        window_size="WINDOW_SIZE_HOUR",
        starting_on=timestamp(START),
        ending_before=timestamp(START + timedelta(hours=hours)),
        **fields,
    )
    return await world.client.usage.ListUsageWithGroups(request)


def _records(number: int) -> list[str]:
    return ["cpu", *_texts(number - 1, "d")]


async def groups(world: World, n: int) -> Any:
    """Groups."""
    sent = [group(str(i), "broad") for i in range(n)]
    request = usage_record_group_pb2.BatchValidateUsageRecordGroupsRequest(groups=sent)
    await world.client.groups.BatchValidateUsageRecordGroups(request)


async def records(world: World, n: int) -> Any:
    """Records of a group."""
    return await _group(world, group(str(uuid.uuid4()), "broad", dict.fromkeys(_records(n), "1")))


async def allocations(world: World, n: int) -> Any:
    """Allocations of a record."""
    return await _group(world, _allocated([[("tag", str(i))] for i in range(n)]))


async def tags(world: World, n: int) -> Any:
    """Tags of an allocation."""
    return await _group(world, _allocated([[(f"tag{i}", "x") for i in range(n)]]))


def _allocated(parts: list[list[tuple[str, str]]]) -> usage_record_group_pb2.NewUsageRecordGroup:
    sent = group(str(uuid.uuid4()), "broad", {"cpu": str(len(parts))})
    for part in parts:
        tags: Any = [{"key": key, "value": value} for key, value in part]
        sent.meta_info.usage_allocations["cpu"].allocations.add(quantity="1", tags=tags)
    return sent


async def group_bytes(world: World, n: int) -> Any:
    """A group of so many bytes, most of them in a field that nobody knows."""
    known = group(str(uuid.uuid4()), "broad").SerializeToString()
    length = n - len(known) - 2
    head = next(head for k in range(1, 4) if len(head := _varint(length - k)) == k)
    sent = usage_record_group_pb2.NewUsageRecordGroup.FromString(
        known + _varint(100 << 3 | 2) + head + b"x" * (length - len(head))
    )
    assert sent.ByteSize() == n
    return await _group(world, sent)


def _varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80]) + _varint(number >> 7) if number > 0x7F else bytes([number])


async def meta_filter(world: World, n: int) -> Any:
    """A filter of so many bytes."""
    sent = "stripe_invoice_id=".ljust(n, "x")
    request = usage_record_group_pb2.ListUsageRecordGroupsRequest(meta_info=sent)
    await world.client.groups.ListUsageRecordGroups(request)


async def lease_seconds(world: World, n: int) -> Any:
    """A long lease."""
    await lease(world.client, str(uuid.uuid4()), lease_duration=timedelta(seconds=n), max_reports=1)


async def outcome_message(world: World, n: int) -> Any:
    """What a marketplace said of the record of a report."""
    request = usage_record_report_pb2.ListUsageRecordReportsRequest(entitlement_id="ent")
    (found,) = (await world.client.reports.ListUsageRecordReports(request)).usage_record_reports
    await lease(world.client, "outcome", max_reports=1)
    await complete(world.client, found.id, "outcome", {"cpu": "x" * n})


async def idempotency_key(world: World, n: int) -> Any:
    """A key of a call of Metronome's."""
    await _metronome_metric(world, metadata=[("idempotency-key", "x" * n)])


async def json_items(world: World, n: int) -> Any:
    """Items of a list in a body."""
    await _metronome_metric(world, event_type_filter={"in_values": _texts(n)})


async def _metronome_metric(world: World, metadata: Any = None, **fields: Any) -> None:
    body = _json({"name": "m", "aggregation_type": "COUNT", **fields})
    request = metronome_metric_pb2.CreateBillableMetricRequest(body=body)
    stub: Any = metronome_metric_grpc.BillableMetricServiceStub(world.client.channel)
    await stub.CreateBillableMetric(request, metadata=metadata)


def _json(document: Any) -> HttpBody:
    return HttpBody(content_type="application/json", data=json.dumps(document).encode())


async def json_bytes(world: World, n: int) -> Any:
    """A body of so many bytes, packed and, where gRPC takes it, as it is."""
    data = json.dumps(_metronome_events(1)).ljust(n).encode()
    await _metronome_ingest(world, gzip.compress(data), packed=True)
    if n < 1_000_000:
        await _metronome_ingest(world, data)


async def json_parts(world: World, n: int) -> Any:
    """A body packed in so many parts."""
    data = json.dumps(_metronome_events(1)).ljust(n).encode()
    parts = [data[: -(n - 1)], *(bytes([one]) for one in data[-(n - 1) :])]
    await _metronome_ingest(world, b"".join(map(gzip.compress, parts)), packed=True)


async def json_values(world: World, n: int) -> Any:
    """A body with so many marks between values, most of them in strings."""
    most, wide = min(world.limits["PROPERTIES"], 15), min(world.limits["TEXT_BYTES"], 1000)
    sent = _metronome_events(100 if n > 10_000 else 1)
    for one in sent:
        one["properties"] = dict.fromkeys(_texts(most), "")
    missing = n - sum(json.dumps(sent).count(mark) for mark in "[{,")
    for one, key in itertools.product(sent, _texts(most)):
        one["properties"][key] = "," * min(wide, missing)
        missing -= len(one["properties"][key])
    assert missing == 0
    await _metronome_ingest(world, json.dumps(sent).encode())


def _metronome_events(number: int) -> list[dict[str, Any]]:
    return [
        {
            "transaction_id": str(uuid.uuid4()),
            "customer_id": "acme",
            "event_type": "request",
            "timestamp": "2026-01-01T00:00:00Z",
        }
        for _ in range(number)
    ]


async def _metronome_ingest(world: World, data: bytes, *, packed: bool = False) -> None:
    body = HttpBody(content_type="application/json", data=data)
    stub: Any = metronome_usage_grpc.UsageServiceStub(world.client.channel)
    metadata = [("x-body-encoding", "gzip")] if packed else None
    await stub.IngestEvents(metronome_usage_pb2.IngestEventsRequest(body=body), metadata=metadata)


async def searched_ids(world: World, n: int) -> Any:
    """Ids to look up by Metronome's API."""
    request = metronome_usage_pb2.SearchEventsRequest(body=_json({"transactionIds": _texts(n)}))
    stub: Any = metronome_usage_grpc.UsageServiceStub(world.client.channel)
    await stub.SearchEvents(request)


# In an order that leaves room: the last two use up what an organization may have.
REQUESTS: dict[str, Callable[[World, int], Awaitable[list[Answer] | None]]] = {
    "IDENTIFIER_CHARACTERS": identifier,
    "NAME_CHARACTERS": name,
    "TEXT_BYTES": text,
    "CUSTOM_FIELDS": custom_fields,
    "EVENTS_PER_CALL": events,
    "TRANSACTION_IDS_PER_SEARCH": transaction_ids,
    "PROPERTIES": properties,
    "PROPERTIES_BYTES": properties_bytes,
    "NESTING_LEVELS": nesting,
    "ALIASES": aliases,
    "DIMENSIONS": dimensions,
    "METRIC_KEYS": metric_keys,
    "FILTER_VALUES": filter_values,
    "FILTERS": filters,
    "GROUP_KEYS": group_keys,
    "GROUP_KEY_PROPERTIES": group_key_properties,
    "METRIC_BYTES": metric_bytes,
    "SKIP": skip,
    "WINDOWS_PER_QUERY": windows,
    "IDS_PER_QUERY": ids,
    "GROUP_VALUES": group_values,
    "GROUP_FILTER_VALUES": group_filter_values,
    "GROUP_FILTER_COMBINATIONS": combinations,
    "GROUPS_PER_CALL": groups,
    "RECORDS": records,
    "ALLOCATIONS": allocations,
    "TAGS": tags,
    "GROUP_BYTES": group_bytes,
    "META_FILTER_BYTES": meta_filter,
    "OUTCOME_MESSAGE_CHARACTERS": outcome_message,
    "LEASE_SECONDS": lease_seconds,
    "IDEMPOTENCY_KEY_CHARACTERS": idempotency_key,
    "JSON_BODY_BYTES": json_bytes,
    "JSON_GZIP_PARTS": json_parts,
    "JSON_VALUES": json_values,
    "JSON_ITEMS": json_items,
    "METRONOME_SEARCHED_IDS": searched_ids,
    "METRICS": metrics,
    "RECORD_KEYS": record_keys,
}


async def refusal(world: World, limit: Limit, n: int) -> list[Answer]:
    """Ask for so many of what a limit bounds; returns what answers that, nothing if it is taken."""
    try:
        return await REQUESTS[limit.name](world, n) or []
    except grpc.aio.AioRpcError as error:
        fault = read_fault(error)
        return [Answer(f"{fault.code}, {fault.reason}", fault.field or "", fault.text)]


async def check(world: World, names: Iterable[str]) -> None:
    """Check that as many as each limit says are taken, and one more is refused as documented, naming the number."""
    wrong = {}
    for name in REQUESTS:
        if name not in names:
            continue
        limit, most = LIMITS[name], world.limits[name]
        taken = await refusal(world, limit, most)
        refused = await refusal(world, limit, most + 1)
        expected = [(limit.error, limit.field)]
        number = re.compile(rf"(?<![\d,])({most}|{most:,})(?!,?\d)")
        if taken or [one[:2] for one in refused] != expected or not number.search(refused[0].text):
            wrong[name] = (taken, refused, expected)
    assert not wrong


async def world_of(client: Client, database: Database, limits: Mapping[str, int]) -> World:
    """Fill a server."""
    customer = await client.create_customer()
    metric = await client.create_metric(group_keys=[{"properties": list("abc")}, {"properties": ["a"]}])
    await sell(client)
    world = World(client, database, limits, customer.id, metric.id)
    dimensions = [{"key": one} for one in _records(limits["RECORDS"])]
    await sell(client, "broad", dimensions=dimensions)
    await report(client, group("told"))
    assert await roll_up(database) == 1
    return world


@asynccontextmanager
async def serving(limits: Mapping[str, int], database_url: str, database: Database) -> AsyncIterator[World]:
    """Run a server in a process of its own with these limits, and the defaults of all others."""
    environment = {PREFIX + name: str(number) for name, number in limits.items()}
    server = start_server("--database-url", database_url, **environment)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield await world_of(Client(server.address, channel), database, {**DEFAULTS, **limits})
    finally:
        code = server.stop()
    assert code == 0


def test_every_limit_is_tried() -> None:
    """Each limit that refuses something has a request here, and all have a number of their own to be set to."""
    assert set(REQUESTS) == {name for name, one in LIMITS.items() if one.error}
    assert set(LOW) == set(LIMITS)
    assert all(LOW[name] < one.default for name, one in LIMITS.items())


async def test_limits_hold_as_set(database_url: str, database: Database) -> None:
    """With every limit set low, each takes what it says, and refuses one more with its code, reason and field."""
    async with serving(LOW, database_url, database) as world:
        await check(world, REQUESTS)


async def test_limits_hold_by_default(database_url: str, database: Database) -> None:
    """Likewise with the defaults; lists as long as JSON_ITEMS says are refused by limits of their own."""
    async with serving({}, database_url, database) as world:
        await check(world, REQUESTS.keys() - {"JSON_ITEMS"})


async def test_limits_hold_at_their_highest(database_url: str, database: Database) -> None:
    """Likewise with those that can be raised: nothing behind them fails."""
    async with serving(HIGHEST, database_url, database) as world:
        for _ in range(20):
            await world.client.create_metric()
        await check(world, HIGHEST)


@pytest.mark.parametrize("limits", [pytest.param({}, id="default"), pytest.param(LOW, id="low")])
async def test_what_is_cut_is_cut_as_set(limits: dict[str, int], database_url: str, database: Database) -> None:
    """Pages and leases hold as much as is set for those who ask for too much, and for those who do not say."""
    async with serving(limits, database_url, database) as world:
        most = world.limits["PAGE_SIZE"]
        await world.client.ingest(*(event(customer_id=f"c{i}") for i in range(most + 1)))
        for asked, rows in ((0, world.limits["PAGE_SIZE_DEFAULT"]), (most + 1, most)):
            request = event_pb2.ListUnmatchedCustomerKeysRequest(page_size=asked)
            page = await world.client.events.ListUnmatchedCustomerKeys(request)
            assert len(page.unmatched_customer_keys) == rows
        most = world.limits["USAGE_PAGE_SIZE"]
        for asked, rows in ((0, world.limits["USAGE_PAGE_SIZE_DEFAULT"]), (most + 1, most)):
            assert len((await _grouped(world, most + 1, page_size=asked)).windows) == rows


@pytest.mark.parametrize("limits", [pytest.param({}, id="default"), pytest.param(LOW, id="low")])
async def test_leases_are_cut_as_set(limits: dict[str, int], database_url: str, database: Database) -> None:
    """A reporter gets as many reports, for as long, as is set."""
    async with serving(limits, database_url, database) as world:
        most, usual = world.limits["REPORTS_PER_LEASE"], world.limits["REPORTS_PER_LEASE_DEFAULT"]
        for i in range(most + usual):  # one there is already
            await sell(world.client, f"e{i}")
            await report(world.client, group(f"g{i}", f"e{i}"))
        await roll_up(database)
        began = datetime.now(UTC)
        found = await lease(world.client, "usual")
        assert len(found) == usual
        seconds = (found[0].lease_deadline.ToDatetime(UTC) - began).total_seconds()
        assert -1 < seconds - world.limits["LEASE_SECONDS_DEFAULT"] < 20
        assert len(await lease(world.client, "most", max_reports=most + 1)) == most


# --- Setting them


def metering(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line with limits in its environment."""
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "generated:.", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def shown(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run `metering limits`."""
    return metering(sys.executable, "-m", "service", "limits", **environment)


def rows_of(output: str) -> dict[str, tuple[int, int, int]]:
    """Return the numbers in the table that `metering limits` prints, by name."""
    found = re.findall(r"^ +([A-Z_]+) +(\d+) +(\d+) +(\d+) ", output, re.MULTILINE)
    return {name: (int(now), int(default), int(most)) for name, *numbers in found for now, default, most in [numbers]}


def test_the_command_shows_what_is_set() -> None:
    """It lists all limits with what holds, and tells by example how to set one; an empty variable sets nothing."""
    done = shown(METERING_LIMIT_FILTERS="3", METERING_LIMIT_ALIASES="")
    assert (done.returncode, done.stderr) == (0, "")
    expected = {name: (one.default, one.default, one.most) for name, one in LIMITS.items()}
    assert rows_of(done.stdout) == {**expected, "FILTERS": (3, 32, 32)}
    variable = re.search(rf"^ +{PREFIX}(\w+)=\d+ metering serve$", done.stdout, re.MULTILINE)
    assert variable
    assert variable[1] in LIMITS


def test_a_default_follows_what_bounds_it() -> None:
    """Where a page may have fewer rows than it has by default, it has as many as it may."""
    rows = rows_of(shown(METERING_LIMIT_PAGE_SIZE="7").stdout)
    assert rows["PAGE_SIZE_DEFAULT"] == (7, 7, 7)
    wrong = shown(METERING_LIMIT_PAGE_SIZE="7", METERING_LIMIT_PAGE_SIZE_DEFAULT="8")
    assert wrong.stderr == "METERING_LIMIT_PAGE_SIZE_DEFAULT is '8' and must be a whole number, 1 to 7.\n"


def test_bad_numbers_are_told() -> None:
    """What is no number of the range is a fault that says what is wrong and what would be right."""
    over = str(LIMITS["EVENTS_PER_CALL"].most + 1)
    texts = [over, "0", "-1", "1.0", "1e1", "1_0", "1,000", "ten", " 9", "9 ", "+9", "\u0663", "9" * 5_000]
    names = ["EVENTS_PER_CALL", *(name for name in sorted(LIMITS) if name != "EVENTS_PER_CALL" and LIMITS[name].error)]
    wrong = dict(zip(names, texts, strict=False))
    done = shown(**{PREFIX + name: text for name, text in wrong.items()})
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{PREFIX}{name} is {text[:40]!r} and must be a whole number, 1 to {LIMITS[name].most}."
        for name, text in sorted(wrong.items())
    ]
    assert all(now == default for now, default, _ in rows_of(done.stdout).values())


def test_misspelt_names_are_told() -> None:
    """A variable that sets no limit is a fault, which guesses what was meant."""
    done = shown(METERING_LIMIT_EVENT_PER_CALLS="9", METERING_LIMIT_="9", METERING_LIMIT_filters="9")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "METERING_LIMIT_ names no limit. `metering limits` lists them all.",
        "METERING_LIMIT_EVENT_PER_CALLS names no limit. Is METERING_LIMIT_EVENTS_PER_CALL meant? "
        "`metering limits` lists them all.",
        "METERING_LIMIT_filters names no limit. Is METERING_LIMIT_FILTERS meant? `metering limits` lists them all.",
    ]


def test_the_server_knows_every_limit() -> None:
    """No module of the package has a limit that a server would not know of when it looks for faults."""
    code = (
        "import importlib, pkgutil, service, service.server\n"
        "from service.limits import all_limits\n"
        "known = {one.name for one in all_limits()}\n"
        "for one in pkgutil.walk_packages(service.__path__, 'service.'):\n"
        "    if not one.name.startswith(('service.__main__', 'service.migrations.')):\n"
        "        importlib.import_module(one.name)\n"
        "print({one.name for one in all_limits()} - known, len(known))"
    )
    done = metering(sys.executable, "-c", code)
    assert (done.stdout, done.stderr) == (f"set() {len(LIMITS)}\n", "")


# --- The page about them


def test_the_page_is_true() -> None:
    """docs/limits.md has a row for each limit, with what it bounds, its default, range, error and field."""
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "limits.md").read_text().splitlines()
        if line.startswith(f"| `{PREFIX}")
    ]
    assert sorted(rows) == sorted(
        [one.variable, one.about, f"{one.default:,}", f"1..{one.most:,}", one.error or "none", one.field]
        for one in LIMITS.values()
    )
