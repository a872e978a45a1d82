"""Claims about organizations: whose call it is, and that no call sees, changes, counts or detects another's data."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import grpc
import pytest
import sqlalchemy as sa
from conftest import Client, event, running_server, timestamp
from faults import Fault, fault_of, read_fault, until
from google.protobuf import message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from marketplace import roll_up

from compat.metronome.v1 import billable_metric_pb2 as metronome_billable_metric_pb2
from compat.metronome.v1 import customer_pb2 as metronome_customer_pb2
from compat.metronome.v1 import usage_pb2 as metronome_usage_pb2
from compat.suger.v1 import billable_metric_pb2 as suger_billable_metric_pb2
from compat.suger.v1 import entitlement_pb2 as suger_entitlement_pb2
from compat.suger.v1 import usage_record_group_pb2 as suger_usage_record_group_pb2
from compat.suger.v1 import usage_record_report_pb2 as suger_usage_record_report_pb2
from metering.v1 import (
    billable_metric_pb2,
    customer_pb2,
    entitlement_pb2,
    event_pb2,
    usage_pb2,
    usage_record_group_pb2,
    usage_record_report_pb2,
)
from service.auth import TRUST_S, NewApiKey, new_api_key
from service.config import Config
from service.database import Database
from service.domain.events import TimeLimits
from service.domain.windows import cell_floor
from service.server import COMPAT_SERVICES, SERVICES, CannotServe, serving
from service.store import organizations
from service.store.tables import METADATA, ORGANIZATION_SETTING

START = datetime(2026, 1, 1, tzinfo=UTC)
IDS = [f"00000000-0000-4000-8000-0000000000{i:02}" for i in range(7)]
METRIC, CUSTOMER, BILLED, PRODUCT, ENTITLEMENT, FAILED, WAITING = IDS
UNKNOWN = "00000000-0000-4000-8000-00000000dead"
MISSING = ("UNAUTHENTICATED", "CREDENTIAL_MISSING", None)
REFUSED = ("UNAUTHENTICATED", "CREDENTIAL_INVALID", None)
MISMATCH = ("PERMISSION_DENIED", "ORGANIZATION_MISMATCH", None)
MODULES = (
    event_pb2,
    billable_metric_pb2,
    customer_pb2,
    usage_pb2,
    entitlement_pb2,
    usage_record_group_pb2,
    usage_record_report_pb2,
    metronome_usage_pb2,
    metronome_billable_metric_pb2,
    metronome_customer_pb2,
    suger_usage_record_group_pb2,
    suger_usage_record_report_pb2,
    suger_billable_metric_pb2,
    suger_entitlement_pb2,
)
# By name; those of the compatible services with theirs before it, such as suger.ListEntitlements.
METHODS = {
    ".".join((*module.DESCRIPTOR.package.split(".")[1:-1], method.name)): method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


class Caller(NamedTuple):
    """An organization's way to the server."""

    client: Client
    key: NewApiKey
    database: Database | None = None
    organization: str = ""

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """The headers of its calls."""
        return [("authorization", f"Bearer {self.key.text}")]

    async def call(self, method: str, **fields: Any) -> Any:
        """Call a method by its name, with its request's fields, and its organization where the request names one."""
        if "org_id" in METHODS[method].input_type.fields_by_name:
            fields = {"org_id": self.organization, **fields}
        return await send(self.client, method, self.metadata, **fields)

    async def faulted(self, method: str, **fields: Any) -> Fault:
        """Call a method that must fail, and read why, without what differs between any two calls."""
        fault = await fault_of(self.call(method, **fields))
        return fault._replace(request_id=None)


def send(
    client: Client, method: str, metadata: Sequence[tuple[str, str]] | None = None, **fields: Any
) -> Awaitable[Any]:
    """Call a method by its name."""
    descriptor = METHODS[method]
    request = message_factory.GetMessageClass(descriptor.input_type)(**fields)
    answer = message_factory.GetMessageClass(descriptor.output_type)
    path = f"/{descriptor.containing_service.full_name}/{descriptor.name}"
    coders = path, type(request).SerializeToString, answer.FromString
    if descriptor.client_streaming:
        return _joined(answer(), client.channel.stream_stream(*coders)(iter([request]), metadata=metadata))
    if descriptor.server_streaming:
        return _joined(answer(), client.channel.unary_stream(*coders)(request, metadata=metadata))
    return client.channel.unary_unary(*coders)(request, metadata=metadata)  # type: ignore[no-any-return]


async def _joined(answer: Any, messages: Any) -> Any:
    """All messages of a stream as one."""
    async for message in messages:
        answer.MergeFrom(message)
    return answer


async def new_key(database: Database, organization: str) -> NewApiKey:
    """Make a credential of an organization, and the organization if it is not there."""
    key = new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_organization(connection, organization)
        await organizations.create_api_key(connection, organization, key.id, "test", key.secret_hash)
    return key


@pytest.fixture
async def both(database_url: str, database: Database) -> AsyncIterator[tuple[Caller, Caller]]:
    """Two organizations on one server."""
    keys = [await new_key(database, name) for name in ("one", "two")]
    async with running_server(database_url) as client:
        yield Caller(client, keys[0], database, "one"), Caller(client, keys[1], database, "two")


def usage_of(**fields: Any) -> dict[str, Any]:
    """The fields of a ListUsage of one day."""
    return {
        "window_size": "WINDOW_SIZE_DAY",
        "starting_on": timestamp(START),
        "ending_before": timestamp(START + timedelta(days=1)),
        **fields,
    }


def grouped_of(**fields: Any) -> dict[str, Any]:
    """The fields of a ListUsageWithGroups of one day."""
    return usage_of(**{"customer_id": CUSTOMER, "billable_metric_id": METRIC, **fields})


def body(document: Any) -> dict[str, str | bytes]:
    """The body of a call of a compatible service."""
    return {"content_type": "application/json", "data": json.dumps(document).encode()}


def day_of(**fields: Any) -> dict[str, Any]:
    """A usage query of Metronome's for one day."""
    bounds = {"starting_on": START.isoformat(), "ending_before": (START + timedelta(days=1)).isoformat()}
    return {"body": body({"window_size": "hour", **bounds, **fields})}


# Every method, with ids that the caller's organization may or may not have: what is asked of both.
READS: list[tuple[str, dict[str, Any]]] = [
    ("ListUnmatchedCustomerKeys", {}),
    ("GetBillableMetric", {"id": METRIC}),
    ("ListBillableMetrics", {"include_archived": True}),
    ("GetCustomer", {"id": CUSTOMER}),
    ("ListCustomers", {"include_archived": True}),
    ("ListCustomers", {"customer_key": "acme"}),
    ("ListCustomers", {"customer_key": CUSTOMER}),
    ("ListUsage", usage_of()),
    ("ListUsage", usage_of(omit_empty_windows=True)),
    ("ListUsage", usage_of(customer_ids=[CUSTOMER])),
    ("ListUsage", usage_of(billable_metrics=[{"id": METRIC, "group_by": {"key": "region"}}])),
    ("ListUsage", usage_of(customer_ids=[CUSTOMER], billable_metrics=[{"id": METRIC}])),
    # Bounds that cut a cell are answered from the events themselves.
    (
        "ListUsage",
        usage_of(window_size="WINDOW_SIZE_NONE", starting_on=timestamp(START - timedelta(minutes=7, seconds=3))),
    ),
    (
        "ListUsage",
        usage_of(
            window_size="WINDOW_SIZE_NONE",
            ending_before=timestamp(START + timedelta(minutes=7)),
            customer_ids=[CUSTOMER],
            billable_metrics=[{"id": METRIC, "group_by": {"key": "region"}}, {"id": BILLED}],
        ),
    ),
    ("StreamUsage", usage_of()),
    ("StreamUsage", usage_of(updated_since=timestamp(START), billable_metrics=[{"id": BILLED}])),
    ("StreamUsage", usage_of(customer_ids=[CUSTOMER], billable_metrics=[{"id": METRIC}])),
    *(
        (method, grouped_of(**fields))
        for method in ("ListUsageWithGroups", "StreamUsageWithGroups")
        for fields in (
            {},
            {"group_key": ["region"]},
            {"group_key": ["region"], "group_filters": {"region": {"values": ["north", "south"]}}},
            {"billable_metric_id": BILLED, "omit_empty_windows": True},
        )
    ),
    ("SearchEvents", {}),
    ("SearchEvents", {"transaction_ids": [f"e{i}" for i in range(3)]}),
    ("SearchEvents", {"customer_id": CUSTOMER}),
    ("SearchEvents", {"customer_id": "acme", "event_type": "request", "starting_on": timestamp(START)}),
    # The records of groups are usage of today.
    ("ListUsage", usage_of(window_size="WINDOW_SIZE_NONE", ending_before=timestamp(START + timedelta(days=36_500)))),
    ("GetProduct", {"id": PRODUCT}),
    ("ListProducts", {}),
    ("GetEntitlement", {"id": ENTITLEMENT}),
    ("ListEntitlements", {}),
    ("ListEntitlements", {"product_id": PRODUCT, "buyer_id": "b", "partner": "PARTNER_AWS"}),
    (
        "BatchValidateUsageRecordGroups",
        {
            "groups": [
                {"id": FAILED, "entitlement_id": ENTITLEMENT, "records": {"cpu": "1"}},
                {"entitlement_id": ENTITLEMENT, "billable_records": [{"key": "sum", "quantity": "1"}]},
            ]
        },
    ),
    ("GetUsageRecordGroup", {"id": FAILED}),
    ("GetUsageRecordGroup", {"id": WAITING}),
    ("ListUsageRecordGroups", {}),
    ("ListUsageRecordGroups", {"entitlement_id": ENTITLEMENT}),
    ("ListUsageRecordGroups", {"product_id": PRODUCT, "meta_info": "source=API"}),
    ("ListUsageRecordGroups", {"buyer_id": "b", "status": "USAGE_RECORD_GROUP_STATUS_REPORT_FAILED"}),
    ("ListUsageRecordReports", {}),
    ("ListUsageRecordReports", {"entitlement_id": ENTITLEMENT}),
    ("ListUsageRecordReports", {"buyer_id": "b"}),
    # In the last hour of a day the report of the next hour is tomorrow's.
    ("ListUsageRecordReports", {"end_date": f"{datetime.now(UTC) + timedelta(days=1):%Y-%m-%d}"}),
    ("metronome.ListUsage", day_of()),
    (
        "metronome.ListUsage",
        day_of(customer_ids=[CUSTOMER], billable_metrics=[{"id": METRIC, "group_by": {"key": "region"}}]),
    ),
    (
        "metronome.ListUsageWithGroups",
        day_of(customer_id=CUSTOMER, billable_metric_id=METRIC, group_key=["region"]),
    ),
    ("metronome.SearchEvents", {"body": body({"transactionIds": ["e0", "e1", "e2", "nobody"]})}),
    ("metronome.GetBillableMetric", {"billable_metric_id": METRIC}),
    ("metronome.ListBillableMetrics", {"include_archived": True}),
    ("metronome.ListCustomerBillableMetrics", {"customer_id": CUSTOMER}),
    ("metronome.GetCustomer", {"customer_id": CUSTOMER}),
    ("metronome.ListCustomers", {}),
    ("metronome.ListCustomers", {"only_archived": True}),
    ("metronome.ListCustomers", {"ingest_alias": "acme"}),
    ("metronome.ListCustomers", {"customer_ids": [CUSTOMER]}),
    ("suger.ListUsageRecordGroups", {}),
    ("suger.ListUsageRecordGroups", {"entitlement_id": ENTITLEMENT, "meta_info": "source=API"}),
    (
        "suger.BatchValidateUsageRecordGroups",
        {"body": body([{"entitlementID": ENTITLEMENT, "records": {"cpu": 1}}])},
    ),
    ("suger.ListUsageRecordReports", {}),
    ("suger.ListUsageRecordReports", {"entitlement_id": ENTITLEMENT, "buyer_id": "b"}),
    ("suger.ListBillableMetrics", {}),
    ("suger.GetBillableMetric", {"billable_metric_id": METRIC}),
    ("suger.GetBillableMetric", {"billable_metric_id": "sum"}),
    ("suger.GetEntitlement", {"entitlement_id": ENTITLEMENT}),
    ("suger.ListEntitlements", {}),
    ("suger.ListEntitlements", {"product_id": PRODUCT, "buyer_id": "b", "partner": "AWS"}),
]
# They find nothing where others answer NOT_FOUND.
FINDERS = {
    "ListCustomers",
    "SearchEvents",
    "ListEntitlements",
    "BatchValidateUsageRecordGroups",
    "ListUsageRecordGroups",
    "ListUsageRecordReports",
    "metronome.ListCustomers",
    "suger.BatchValidateUsageRecordGroups",
    "suger.ListUsageRecordGroups",
    "suger.ListUsageRecordReports",
    "suger.ListEntitlements",
}
WRITES: list[tuple[str, dict[str, Any]]] = [
    ("UpdateBillableMetric", {"billable_metric": {"id": METRIC, "name": "renamed"}}),
    ("SetIngestAliases", {"id": CUSTOMER, "ingest_aliases": ["other"]}),
    (
        "SetBillingPeriod",
        {
            "id": CUSTOMER,
            "billing_period": {
                "frequency": "BILLING_FREQUENCY_WEEKLY",
                "anchor_date": "2026-01-01",
                "starting_on": "2026-01-01",
            },
        },
    ),
    ("UpdateCustomer", {"customer": {"id": CUSTOMER, "name": "renamed", "buyer_id": "other"}}),
    ("UpdateProduct", {"product": {"id": PRODUCT, "name": "renamed"}}),
    ("UpdateEntitlement", {"entitlement": {"id": ENTITLEMENT, "status": "ENTITLEMENT_STATUS_SUSPENDED"}}),
    ("DeleteUsageRecordGroup", {"id": WAITING}),
    ("RetryUsageRecordGroup", {"id": FAILED}),
    ("ArchiveCustomer", {"id": CUSTOMER}),
    ("ArchiveBillableMetric", {"id": METRIC}),
]
COMPAT_WRITES: list[tuple[str, dict[str, Any]]] = [
    ("metronome.UpdateBillableMetric", {"billable_metric_id": METRIC, "body": body({"name": "renamed"})}),
    ("metronome.SetIngestAliases", {"customer_id": CUSTOMER, "body": body({"ingest_aliases": ["other"]})}),
    ("metronome.SetName", {"customer_id": CUSTOMER, "body": body({"name": "renamed"})}),
    ("suger.UpdateBillableMetric", {"billable_metric_id": METRIC, "body": body({"description": "described"})}),
    ("suger.DeleteUsageRecordGroup", {"usage_record_group_id": WAITING}),
    ("suger.RetryUsageRecordGroup", {"usage_record_group_id": FAILED}),
    ("metronome.ArchiveCustomer", {"body": body({"id": CUSTOMER})}),
    ("metronome.ArchiveBillableMetric", {"body": body({"id": METRIC})}),
    ("suger.UpdateBillableMetric", {"billable_metric_id": BILLED, "body": body({"status": "DELETED"})}),
]
# What makes something new, with the ids that follow from one idempotency key.
COMPAT_CREATES: list[tuple[str, dict[str, Any]]] = [
    ("metronome.CreateCustomer", {"body": body({"name": "New", "ingest_aliases": ["new"]})}),
    ("metronome.CreateBillableMetric", {"body": body({"name": "new", "aggregation_type": "count"})}),
    ("suger.CreateBillableMetric", {"body": body({"name": "newer", "aggregationType": "COUNT"})}),
    (
        "suger.CreateBillableMetric",
        {"body": body({"id": "named", "name": "named", "aggregationType": "COUNT"})},
    ),
    (
        "suger.ReportUsageRecordGroup",
        {"entitlement_id": ENTITLEMENT, "body": body({"records": {"cpu": 1}})},
    ),
    (
        "suger.BatchCreateUsageRecordGroups",
        {"body": body([{"entitlementID": ENTITLEMENT, "records": {"cpu": 2}}])},
    ),
]
CREATES: list[tuple[str, dict[str, Any]]] = [
    (
        "CreateBillableMetric",
        {
            "billable_metric": {
                "id": METRIC,
                "name": "sum",
                "key": "sum",
                "aggregation_type": "AGGREGATION_TYPE_SUM",
                "aggregation_key": "n",
                "group_keys": [{"properties": ["region"]}],
            }
        },
    ),
    (
        "CreateBillableMetric",
        {
            "billable_metric": {
                "id": BILLED,
                "name": "unique",
                "aggregation_type": "AGGREGATION_TYPE_UNIQUE",
                "aggregation_key": "n",
            }
        },
    ),
    ("CreateCustomer", {"customer": {"id": CUSTOMER, "name": "Acme", "buyer_id": "b", "ingest_aliases": ["acme"]}}),
    (
        "CreateProduct",
        {"product": {"id": PRODUCT, "name": "P", "partner": "PARTNER_AWS", "dimensions": [{"key": "cpu"}]}},
    ),
    (
        "CreateEntitlement",
        {
            "entitlement": {
                "id": ENTITLEMENT,
                "product_id": PRODUCT,
                "buyer_id": "b",
                "starting_on": timestamp(START),
                "billable_metric_keys": ["sum"],
            }
        },
    ),
]


def batch(n: int, region: str) -> dict[str, Any]:
    """Events under ids that both organizations use."""
    events = [event(f"e{i}", properties={"n": n + i, "region": region}) for i in range(3)]
    return {"events": [*events, event("nobody", customer_id="nobody", properties={"n": n})]}


async def fill(caller: Caller, n: int, region: str) -> None:
    """Make everything under the shared ids, with numbers of its own."""
    for method, fields in CREATES:
        await caller.call(method, **fields)
    answer = await caller.call("IngestEvents", **batch(n, region))
    assert set(answer.verdicts) == {event_pb2.VERDICT_ACCEPTED}
    # A key that the customer gave up again.
    for aliases in (["acme", "given up"], ["acme"]):
        await caller.call("SetIngestAliases", id=CUSTOMER, ingest_aliases=aliases)
    # A group that the marketplace refused, and one that waits.
    await report_group(caller, FAILED, n)
    assert caller.database is not None
    assert await roll_up(caller.database) == 1
    (report,) = (await caller.call("LeaseUsageRecordReports", lease_token="t")).usage_record_reports
    outcomes = [{"key": "cpu", "outcome": "REPORT_OUTCOME_FAILED", "message": region}]
    await caller.call("CompleteUsageRecordReport", id=report.id, lease_token="t", outcomes=outcomes)
    await report_group(caller, WAITING, n)


async def report_group(caller: Caller, group_id: str, n: int) -> None:
    """Report a group that must be taken."""
    group = {"id": group_id, "entitlement_id": ENTITLEMENT, "records": {"cpu": f"{n}.5"}}
    (result,) = (await caller.call("ReportUsageRecordGroups", groups=[group])).results
    assert result.verdict == event_pb2.VERDICT_ACCEPTED


async def everything(caller: Caller) -> list[Any]:
    """What an organization can see: the answer or fault of every read."""
    seen = []
    for method, fields in READS:
        try:
            answer = await caller.call(method, **fields)
        except grpc.aio.AioRpcError as error:
            seen.append((error.code(), error.details()))
        else:
            # These differ between any two reads.
            for name in {"next_updated_since", "resume_token"} & set(answer.DESCRIPTOR.fields_by_name):
                answer.ClearField(name)
            seen.append(answer)
    return seen


def test_the_walk_is_whole() -> None:
    """Every method of every service is walked: a new one must be added here."""
    walked = {method for method, _ in (*READS, *WRITES, *CREATES, *COMPAT_WRITES, *COMPAT_CREATES)}
    # These are in `fill`, or in tests of their own.
    walked |= {"IngestEvents", "StreamEvents", "metronome.IngestEvents"}
    walked |= {"ReportUsageRecordGroups", "LeaseUsageRecordReports", "CompleteUsageRecordReport"}
    assert walked == set(METHODS)
    assert len(METHODS) == sum(len(one.methods) for module in MODULES for one in services_of(module))
    known = {service.full_name for module in MODULES for service in services_of(module)}
    assert known == {*SERVICES, *COMPAT_SERVICES}


def test_requests_name_organizations_only_where_that_is_checked() -> None:
    """From the descriptors: no native request says whose it is, and the others' do so in `org_id` alone.

    What `org_id` says is proven to be checked in `test_naming_another_organization`.
    """

    def fields_of(message: Any, seen: set[str]) -> Iterator[tuple[str, str]]:
        if message.full_name not in seen:
            seen.add(message.full_name)
            for field in message.fields:
                yield message.full_name, field.name
                if field.message_type is not None:
                    yield from fields_of(field.message_type, seen)

    naming = re.compile("org|tenant", re.IGNORECASE)
    for name, method in METHODS.items():
        found = {field for _, field in fields_of(method.input_type, set()) if naming.search(field)}
        assert found == ({"org_id"} if name.startswith("suger.") else set()), name


def services_of(module: Any) -> list[Any]:
    """The services of a generated module."""
    return list(module.DESCRIPTOR.services_by_name.values())


# --- One organization and the other


async def test_an_empty_organization_stays_empty(both: tuple[Caller, Caller], database: Database) -> None:
    """What one organization stores is in no answer to the other, and every id answers it as if it did not exist."""
    one, two = both
    before = await everything(two)
    await fill(one, 1, "north")
    assert await everything(two) == before
    assert not any("acme" in str(answer).lower() or "north" in str(answer) for answer in before)
    # The other's ids answer exactly like ids that nobody has: code, text, reason and metadata.
    for method, fields in (*READS, *WRITES, *COMPAT_WRITES):
        named = _with(fields, set(IDS), UNKNOWN)
        if named == fields or method in FINDERS:
            continue
        theirs, nobodys = await two.faulted(method, **fields), await two.faulted(method, **named)
        for known in IDS:
            theirs = _renamed(theirs, known)
        assert theirs == _renamed(nobodys, UNKNOWN)
        assert theirs.code == "NOT_FOUND"
    assert await everything(two) == before


def _with(value: Any, ids: set[str], other: str) -> Any:
    """A request with other ids in the same places."""
    if isinstance(value, dict):
        return {key: _with(one, ids, other) for key, one in value.items()}
    if isinstance(value, list):
        # Named twice, an id would be a fault of another kind.
        return [_with(one, ids, other[: -len(str(i))] + str(i) if i else other) for i, one in enumerate(value)]
    if isinstance(value, bytes):
        for known in sorted(ids):
            value = value.replace(known.encode(), other.encode())
        return value
    return other if isinstance(value, str) and value in ids else value


def _renamed(fault: Fault, known: str) -> Fault:
    return fault._replace(
        text=fault.text.replace(known, "ID"),
        metadata={key: value.replace(known, "ID") for key, value in fault.metadata.items()},
    )


# What names things of the catalog, or ids of others, where an answer and not a fault says whether they are there.
NAMING: list[tuple[str, dict[str, Any]]] = [
    ("ReportUsageRecordGroups", {"groups": [{"id": "new", "entitlement_id": ENTITLEMENT, "records": {"cpu": "1"}}]}),
    ("CompleteUsageRecordReport", {"id": FAILED, "lease_token": "t", "outcomes": [{"key": "cpu", "outcome": 1}]}),
    ("CreateEntitlement", {"entitlement": {"id": "new", "product_id": PRODUCT, "buyer_id": "b"}}),
    ("ListUsageRecordReports", {"entitlement_id": ENTITLEMENT}),
    ("suger.ReportUsageRecordGroup", {"entitlement_id": ENTITLEMENT, "body": body({"records": {"cpu": 1}})}),
    (
        "suger.BatchCreateUsageRecordGroups",
        {"body": body([{"entitlementID": ENTITLEMENT, "records": {"cpu": 2}}])},
    ),
]


async def told(caller: Caller, method: str, fields: dict[str, Any]) -> tuple[str, list[str]]:
    """What a call tells, without the id that it named, and the statements that it took."""
    with statements_of(caller.organization) as sent:
        try:
            answer = str(await caller.call(method, **fields))
        except grpc.aio.AioRpcError as error:
            answer = str(read_fault(error)._replace(request_id=None))
    # Besides ids these differ between any two calls.
    answer = re.sub(r"(seconds|nanos): \d+|(read_time|next_updated_since|\w*token\w*).*", "", answer)
    return re.sub(r"[0-9a-f-]{36}", "ID", answer), sent


@contextmanager
def statements_of(organization: str) -> Iterator[list[str]]:
    """Collect the statements of an organization's transactions, whatever the server does beside them."""
    found: list[str] = []
    bound: set[int] = set()

    def note(connection: Any, _: Any, text: str, parameters: Any, *__: Any) -> None:
        if ORGANIZATION_SETTING in tuple(parameters or ()):
            bound.add(id(connection)) if organization in parameters else bound.discard(id(connection))
        if id(connection) in bound:
            found.append(text)

    def end(connection: Any) -> None:
        bound.discard(id(connection))

    listeners = (("before_cursor_execute", note), ("commit", end), ("rollback", end))
    for name, listener in listeners:
        sa.event.listen(sa.Engine, name, listener)
    try:
        yield found
    finally:
        for name, listener in listeners:
            sa.event.remove(sa.Engine, name, listener)


async def test_what_others_have_costs_what_nobody_has(both: tuple[Caller, Caller]) -> None:
    """An id that another organization has takes the very statements that an id of nobody takes, and tells as much."""
    one, two = both
    await fill(one, 100, "south")
    # The caller has a catalog of its own, under other ids.
    await two.call("CreateBillableMetric", billable_metric={"name": "own", "aggregation_type": 1})
    await two.call("CreateCustomer", customer={"name": "own", "buyer_id": "own"})
    walked = 0
    for method, fields in (*READS, *WRITES, *COMPAT_WRITES, *NAMING):
        named = _with(fields, set(IDS), UNKNOWN)
        if named == fields:
            continue
        walked += 1
        await told(two, method, named)  # what is worked out once, is
        theirs, nobodys = await told(two, method, fields), await told(two, method, named)
        assert theirs == nobodys, method
        assert theirs[1] or "MISMATCH" in theirs[0] or "INVALID_ARGUMENT" in theirs[0], method
    assert walked > 50
    # Transaction ids: new here, though they are the other's.
    _, *answers = [await told(two, "IngestEvents", _events_named(prefix)) for prefix in ("w", "e", "x")]
    assert answers[0] == answers[1]
    assert "ACCEPTED" in answers[0][0]


def _events_named(prefix: str) -> dict[str, Any]:
    return {"events": [event(f"{prefix}{i}", properties={"n": 1, "region": "r"}) for i in range(3)]}


async def test_equal_ids_are_other_things(both: tuple[Caller, Caller], database: Database) -> None:
    """Both organizations hold the same ids, each with its own content: creates, verdicts and numbers are their own."""
    one, two = both
    await fill(one, 1, "north")
    await fill(two, 100, "south")
    for caller, total, unique, region in ((one, "6", "3", "north"), (two, "303", "3", "south")):
        request = usage_of(billable_metrics=[{"id": METRIC, "group_by": {"key": "region"}}, {"id": BILLED}])
        windows = (await caller.call("ListUsage", **request)).windows
        assert [(w.billable_metric_id, w.value) for w in windows] == [(METRIC, total), (BILLED, unique)]
        assert {name: group.value for name, group in windows[0].groups.items()} == {region: total}
        (key,) = (await caller.call("ListUnmatchedCustomerKeys")).unmatched_customer_keys
        assert (key.customer_key, key.event_count) == ("nobody", 1)
    # A resend is compared with the caller's own events.
    for caller, n, region in ((one, 1, "north"), (two, 100, "south")):
        for method, fields in (("IngestEvents", {}), ("StreamEvents", {"sequence": 1})):
            answer = await caller.call(method, **batch(n, region), **fields)
            assert set(answer.verdicts) == {event_pb2.VERDICT_DUPLICATE}
    for caller, n, region in ((two, 1, "north"), (one, 100, "south")):
        for method, fields in (("IngestEvents", {}), ("StreamEvents", {"sequence": 1})):
            answer = await caller.call(method, **batch(n, region), **fields)
            assert set(answer.verdicts) == {event_pb2.VERDICT_CONFLICT}
            assert "north" not in str(answer)
            assert "south" not in str(answer)
    # So is what is found and explained.
    for caller, region in ((one, "north"), (two, "south")):
        searches: list[dict[str, Any]] = [{}, {"transaction_ids": ["e0", "e1", "e2"]}, {"customer_id": CUSTOMER}]
        for fields in searches:
            events = (await caller.call("SearchEvents", **fields)).events
            assert {"e0", "e1", "e2"} <= {one.event.transaction_id for one in events}
            assert {one.event.properties["region"] for one in events if "region" in one.event.properties} == {region}


async def test_tokens_are_of_one_organization(both: tuple[Caller, Caller]) -> None:
    """A page or resume token is refused to the other organization, though it sends the same query about its own ids."""
    one, two = both
    for caller, region in ((one, "north"), (two, "south")):
        await fill(caller, 1, region)
    for caller in both:
        await fill_again(caller)
    refused = set()
    long = day_of(ending_before=(START + timedelta(days=30)).isoformat())
    for method, fields in (*READS, ("metronome.ListUsage", long)):
        field, found, size = _paging(method)
        answer = await one.call(method, **{**fields, **({size: 1} if size else {})})
        token = getattr(answer, found, "")
        token = getattr(token, "string_value", token)
        if not token:
            continue
        refused.add(method)
        await one.call(method, **fields, **{field: token})
        fault = await two.faulted(method, **fields, **{field: token})
        assert fault.brief == ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID", field)
        # Nothing tells it from what was never a token.
        assert fault == await two.faulted(method, **fields, **{field: "x" * len(token)}), method
    assert refused == {name for name in METHODS if _paging(name)[0] in METHODS[name].input_type.fields_by_name}


async def fill_again(caller: Caller) -> None:
    """Make a second one of everything that is listed in pages."""
    for method, fields in (
        ("CreateCustomer", {"customer": {"name": "Second", "buyer_id": "c"}}),
        ("CreateProduct", {"product": {"id": "p2", "name": "Q", "partner": "PARTNER_AWS"}}),
        (
            "CreateEntitlement",
            {"entitlement": {"id": "e2", "product_id": PRODUCT, "buyer_id": "b", "starting_on": timestamp(START)}},
        ),
    ):
        await caller.call(method, **fields)
    await caller.call("IngestEvents", events=[event("another", customer_id="another", properties={"n": 1})])
    groups = [{"id": "other", "entitlement_id": "e2", "records": {"cpu": "1"}}]
    await caller.call("ReportUsageRecordGroups", groups=groups)
    assert caller.database is not None
    await roll_up(caller.database, cell_floor(datetime.now(UTC)) + timedelta(hours=1))
    await caller.call("ReportUsageRecordGroups", groups=[{**groups[0], "id": "yet another"}])


def _paging(method: str) -> tuple[str, str, str | None]:
    """The fields of a method's token, in request and answer, and that of the size of a page."""
    fields = METHODS[method].input_type.fields_by_name
    if "page_token" in fields:
        return "page_token", "next_page_token", "page_size"
    if "next_page" in fields:
        return "next_page", "next_page", "limit" if "limit" in fields else None
    return "resume_token", "resume_token", None


async def test_what_is_stored_elsewhere_is_not_stored_here(both: tuple[Caller, Caller], database_url: str) -> None:
    """An event too old to be new is a duplicate for the organization that has it and rejected for the other."""
    one, two = both
    old = [event("old", properties={"n": 1})]
    await one.call("IngestEvents", events=old)
    async with running_server(database_url, time_limits=TimeLimits(oldest=timedelta(hours=1))) as strict:
        answers = [await send(strict, "IngestEvents", caller.metadata, events=old) for caller in (one, two)]
    assert [list(answer.verdicts) for answer in answers] == [
        [event_pb2.VERDICT_DUPLICATE],
        [event_pb2.VERDICT_REJECTED],
    ]


@pytest.mark.parametrize("writes", [WRITES, COMPAT_WRITES], ids=["native", "compatible"])
async def test_changes_touch_only_their_own(
    both: tuple[Caller, Caller], database: Database, writes: list[tuple[str, dict[str, Any]]]
) -> None:
    """Every write of one organization, on ids that both have, leaves all that the other sees as it was."""
    one, two = both
    await fill(one, 1, "north")
    await fill(two, 100, "south")
    rows = await stored(database, "one")
    before = await everything(one)
    for method, fields in writes:
        own = await everything(two)
        await two.call(method, **fields)
        # It did something, and not to the other.
        assert await everything(two) != own, method
        assert await everything(one) == before, method
    more = [event(f"more{i}", customer_id="acme", properties={"n": 7, "region": "south"}) for i in range(5)]
    await two.call("IngestEvents", events=more)
    await two.call("CreateCustomer", customer={"name": "New", "ingest_aliases": ["nobody"]})
    await two.call("CreateBillableMetric", billable_metric={"name": "new", "aggregation_type": 1})
    assert await everything(one) == before
    assert await stored(database, "one") == rows


async def test_equal_keys_make_other_things(both: tuple[Caller, Caller], database: Database) -> None:
    """The same calls with the same idempotency keys make different things for two organizations; retries make none."""
    one, two = both
    await fill(one, 1, "north")
    await fill(two, 1, "north")
    mine, before = await everything(one), await everything(two)
    answers: list[list[Any]] = []
    for caller in (one, one, two):
        answers.append([])
        for i, (method, fields) in enumerate(COMPAT_CREATES):
            metadata = [*caller.metadata, ("idempotency-key", f"the same {i}")]
            named = {"org_id": caller.organization} if method.startswith("suger.") else {}
            answer = await send(caller.client, method, metadata, **named, **fields)
            answers[-1] += [answer.body.data if named else answer.data]
        if caller is one:
            assert await everything(two) == before
    first, again, others = answers
    assert first == again
    assert not [a for a, b in zip(first, others, strict=True) if a == b]
    assert await everything(one) != mine
    assert await everything(two) != before
    # Ids of events follow from nothing; whether one is stored elsewhere is not told.
    events = [{"transaction_id": "e0", "customer_id": "acme", "event_type": "x", "timestamp": "2026-01-01T00:00:00Z"}]
    events.append({**events[0], "transaction_id": "only here"})
    own = (await one.call("metronome.SearchEvents", body=body({"transactionIds": ["e0", "only here"]}))).body.data
    for caller in both:
        request = metronome_usage_pb2.IngestEventsRequest(body=body(events))
        call = caller.client.channel.unary_unary(
            "/compat.metronome.v1.UsageService/IngestEvents",
            request.SerializeToString,
            metronome_usage_pb2.IngestEventsResponse.FromString,
        )(request, metadata=caller.metadata)
        await call
        # `fill` stored e0 with another content, in each.
        assert dict(await call.initial_metadata())["x-metering-conflicts"] == "1"
        if caller is one:
            found = (await two.call("metronome.SearchEvents", body=body({"transactionIds": ["only here"]}))).body.data
            assert found == b"[]"
    assert (await one.call("metronome.SearchEvents", body=body({"transactionIds": ["e0"]}))).body.data in own


async def test_naming_another_organization(both: tuple[Caller, Caller]) -> None:
    """Each method whose request names an organization refuses any but the credential's, whether it exists or not."""
    one, two = both
    await fill(one, 1, "north")
    await fill(two, 1, "north")
    before = await everything(one)
    calls = [call for call in (*READS, *COMPAT_WRITES, *COMPAT_CREATES) if call[0].startswith("suger.")]
    assert {method for method, _ in calls} == {name for name in METHODS if name.startswith("suger.")}
    for method, fields in calls:
        theirs = await two.faulted(method, **fields, org_id="one")
        nobodys = await two.faulted(method, **fields, org_id="nobody")
        assert theirs == nobodys
        assert theirs.brief == MISMATCH
        for named in ("", "ONE", "one/", "one\0"):
            assert (await two.faulted(method, **fields, org_id=named)).brief == MISMATCH
    # So do the organizations in bodies.
    bodies: list[tuple[str, Any]] = [
        ("suger.BatchValidateUsageRecordGroups", [{"organizationID": "one", "entitlementID": ENTITLEMENT}]),
        ("suger.BatchCreateUsageRecordGroups", [{"organizationID": "one", "entitlementID": ENTITLEMENT}]),
        ("suger.CreateBillableMetric", {"organizationId": "one", "name": "name", "aggregationType": "COUNT"}),
    ]
    for method, document in bodies:
        assert (await two.faulted(method, body=body(document))).brief == MISMATCH
    assert await everything(one) == before


async def stored(database: Database, organization: str) -> dict[str, list[Any]]:
    """Every row of an organization, in every table that has organizations."""
    found = {}
    async with database.engine.connect() as connection:
        for table in METADATA.sorted_tables:
            if "organization_id" in table.c and table.name != "api_keys":
                query = sa.select(table).where(table.c.organization_id == organization)
                found[table.name] = sorted(map(str, await connection.execute(query)))
    assert len(found) == 14
    assert all(found.values())
    return found


async def test_reports_are_handed_to_their_own_reporters(both: tuple[Caller, Caller]) -> None:
    """A lease hands out only the caller's reports, whatever token others hold; another's report answers NOT_FOUND."""
    one, two = both
    await fill(one, 1, "north")
    await fill(two, 100, "south")
    for caller in both:
        await caller.call("RetryUsageRecordGroup", id=FAILED)
    # The group before went into the report of this hour.
    assert one.database is not None
    assert await roll_up(one.database, cell_floor(datetime.now(UTC)) + timedelta(hours=1)) == 2
    leased = {}
    for caller, quantity in ((one, "3"), (two, "201")):
        answer = await caller.call("LeaseUsageRecordReports", lease_token="both", max_reports=100)
        (leased[caller.key.id],) = answer.usage_record_reports
        assert leased[caller.key.id].records[0].quantity == quantity
    outcomes = [{"key": "cpu", "outcome": "REPORT_OUTCOME_REPORTED"}]
    for caller, other in ((one, two), (two, one)):
        call: dict[str, Any] = {"lease_token": "both", "outcomes": outcomes}
        theirs = await caller.faulted("CompleteUsageRecordReport", id=leased[other.key.id].id, **call)
        nobodys = await caller.faulted("CompleteUsageRecordReport", id=UNKNOWN, **call)
        assert _renamed(theirs, leased[other.key.id].id) == _renamed(nobodys, UNKNOWN)
        assert theirs.code == "NOT_FOUND"
    for caller in both:
        answer = await caller.call("CompleteUsageRecordReport", id=leased[caller.key.id].id, **call)
        assert answer.usage_record_report.id == leased[caller.key.id].id
        serials = [one.serial_id for one in (await caller.call("ListUsageRecordGroups")).usage_record_groups]
        assert serials == [2, 1]


async def test_what_one_has_does_not_take_names_from_the_other(both: tuple[Caller, Caller]) -> None:
    """Ids, keys, aliases and buyer ids in use elsewhere are free here; in use here they are not."""
    one, two = both
    await fill(one, 1, "north")
    customer = {"name": "Other", "buyer_id": "b", "ingest_aliases": ["acme", CUSTOMER.replace("8000", "9000")]}
    await two.call("CreateCustomer", customer=customer)
    metric = {"name": "other", "key": "sum", "aggregation_type": "AGGREGATION_TYPE_COUNT"}
    await two.call("CreateBillableMetric", billable_metric=metric)
    assert (await one.faulted("CreateCustomer", customer={"name": "x", "buyer_id": "b"})).reason == "BUYER_ID_IN_USE"
    taken = {"name": "x", "ingest_aliases": ["acme"]}
    assert (await one.faulted("CreateCustomer", customer=taken)).reason == "CUSTOMER_KEY_IN_USE"
    assert (await one.faulted("CreateBillableMetric", billable_metric=metric)).reason == "METRIC_KEY_IN_USE"


async def test_calls_at_once_do_not_mix(both: tuple[Caller, Caller]) -> None:
    """Concurrent batches of both organizations, with equal ids, never share a transaction or a verdict."""
    for caller in both:
        for method, fields in CREATES:
            await caller.call(method, **fields)
    numbers = range(60)
    answers = await asyncio.gather(
        *(
            caller.call("IngestEvents", events=[event(f"x{i}", properties={"n": n, "region": "r"})])
            for i in numbers
            for caller, n in zip(both, (1, 100), strict=True)
        )
    )
    assert {tuple(answer.verdicts) for answer in answers} == {(event_pb2.VERDICT_ACCEPTED,)}
    for caller, n in zip(both, (1, 100), strict=True):
        (window,) = (await caller.call("ListUsage", **usage_of(billable_metrics=[{"id": METRIC}]))).windows
        assert window.value == str(n * len(numbers))


async def test_the_organization_comes_from_nothing_else(both: tuple[Caller, Caller]) -> None:
    """Headers that name an organization are ignored."""
    one, two = both
    await fill(one, 1, "north")
    for name in ("x-org-id", "x-organization", "organization", "organization-id", "x-forwarded-user", "x-api-key"):
        metadata = [*two.metadata, (name, "one")]
        listed = await send(one.client, "ListCustomers", metadata)
        assert not listed.customers
        assert (await fault_of(send(one.client, "GetCustomer", metadata, id=CUSTOMER))).code == "NOT_FOUND"


# --- Credentials


def bad_credentials(key: NewApiKey, other: NewApiKey) -> list[list[tuple[str, str]]]:
    """Headers that must be refused, made from a good key."""
    text, (_, key_id, secret) = key.text, key.text.split("_", 2)
    other_secret = other.text.split("_", 2)[2]
    keys = [
        "x", "mtr", "mtr_", "mtr__", f"mtr_{key_id}", f"mtr_{key_id}_", f"{key_id}_{secret}", new_api_key().text,
        f"MTR_{key_id}_{secret}", f"mtr_{key_id}_{secret}x", f"mtr_{key_id}_{secret[:-1]}", f"mtr_{key_id}_{secret}=",
        f"mtr_{key_id}_{other_secret}", f"mtr_{key_id}x_{secret}", f"mtr_{'f' * 4000}_{secret}", f"mtr_%_{secret}",
        f"mtr_'--_{secret}", f"mtr_{key_id}_{secret.swapcase()}", f"{text} x", f" {text}",
    ]  # fmt: skip
    values = ["", " ", "Bearer", "Bearer ", text, f"Basic {text}", *(f"Bearer {one}" for one in keys)]
    bad = [[("authorization", value)] for value in values]
    bad.append([("authorization", f"Bearer {text}"), ("authorization", f"Bearer {text}")])
    bad.append([("authorization", f"Bearer {text}"), ("authorization", f"Bearer {other.text}")])
    return bad


async def test_every_method_needs_a_credential(both: tuple[Caller, Caller]) -> None:
    """From the descriptors: each method without, with a malformed and with an unknown key is UNAUTHENTICATED."""
    one, _ = both
    assert len(METHODS) >= 60
    for method in METHODS:
        assert (await fault_of(send(one.client, method))).brief == MISSING, method
        for metadata in ([("authorization", "Bearer x")], [("authorization", f"Bearer {new_api_key().text}")]):
            assert (await fault_of(send(one.client, method, metadata))).brief == REFUSED, method
        # A credential in another header is none.
        fault = await fault_of(send(one.client, method, [("x-api-key", one.key.text)]))
        assert fault.brief == MISSING


async def test_bad_credentials(both: tuple[Caller, Caller]) -> None:
    """Whatever is wrong with a credential, the answer is the same and tells nothing of it."""
    one, two = both
    texts = set()
    for metadata in bad_credentials(one.key, two.key):
        fault = await fault_of(send(one.client, "ListCustomers", metadata))
        assert fault.brief == REFUSED, metadata
        texts.add((fault.text, *fault.metadata))
    assert len(texts) == 1
    for scheme in ("Bearer", "bearer", "BEARER", "Key"):
        await send(one.client, "ListCustomers", [("authorization", f"{scheme} {one.key.text}")])


async def test_a_bad_credential_comes_before_a_bad_request(both: tuple[Caller, Caller]) -> None:
    """Without a credential nobody learns whether a request is right or an id is taken."""
    one, _ = both
    await fill(one, 1, "north")
    writes = (*WRITES, *CREATES, *COMPAT_WRITES, *COMPAT_CREATES, ("IngestEvents", batch(1, "north")))
    for method, fields in (*READS, *writes):
        fault = await fault_of(send(one.client, method, **fields))
        assert fault.brief == MISSING


async def test_health_is_public_and_reflection_is_not(both: tuple[Caller, Caller]) -> None:
    """Orchestrators need no key; whoever wants to read the API does."""
    one, _ = both
    health = health_pb2_grpc.HealthStub(one.client.channel)
    request = health_pb2.HealthCheckRequest(service="metering.v1.EventService")
    assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
    async for answer in health.Watch(request):
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        break
    stub = reflection_pb2_grpc.ServerReflectionStub(one.client.channel)

    async def services(metadata: Any = None) -> list[str]:
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answers = [a async for a in stub.ServerReflectionInfo(requests, metadata=metadata)]
        return [service.name for answer in answers for service in answer.list_services_response.service]

    assert (await fault_of(services())).brief == MISSING
    assert (await fault_of(services([("authorization", "Bearer x")]))).brief == REFUSED
    expected = {method.containing_service.full_name for method in METHODS.values()}
    assert set(await services(one.metadata)) == expected | {"grpc.health.v1.Health", reflection.SERVICE_NAME}


async def test_a_revoked_key_is_refused(both: tuple[Caller, Caller], database: Database) -> None:
    """Revocation is felt within TRUST_S and for good; other keys, of the same organization too, go on."""
    one, two = both
    second = Caller(one.client, await new_key(database, "one"))
    await asyncio.gather(*(caller.call("ListCustomers") for caller in (one, two, second)))
    async with database.engine.begin() as connection:
        # Another organization cannot revoke it.
        assert not await organizations.revoke_api_key(connection, "two", one.key.id)
        assert await organizations.revoke_api_key(connection, "one", one.key.id)
    began = asyncio.get_running_loop().time()
    await until(lambda: refused(one), TRUST_S + 3)
    assert asyncio.get_running_loop().time() - began < TRUST_S + 1
    for _ in range(3):
        assert (await one.faulted("ListCustomers")).brief == REFUSED
    await two.call("ListCustomers")
    await second.call("ListCustomers")
    # Though every key were revoked the server does not open again.
    async with database.engine.begin() as connection:
        await organizations.revoke_api_key(connection, "one", second.key.id)
        await organizations.revoke_api_key(connection, "two", two.key.id)
    await until(lambda: refused(two), TRUST_S + 3)
    assert (await fault_of(send(one.client, "ListCustomers"))).brief == MISSING


async def refused(caller: Caller) -> bool:
    """Say whether a caller's credential does not work now."""
    try:
        await caller.call("ListCustomers")
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False


async def test_a_trusted_key_costs_no_query(both: tuple[Caller, Caller], monkeypatch: pytest.MonkeyPatch) -> None:
    """A credential checked a moment ago is trusted without asking the database again."""
    one, _ = both
    asked: list[str] = []
    for name in ("any_api_key", "find_api_key"):
        monkeypatch.setattr(organizations, name, _spied(getattr(organizations, name), asked, name))
    for _ in range(10):
        await one.call("ListCustomers")
    assert len(asked) <= 4


def _spied(function: Callable[..., Any], asked: list[str], name: str) -> Callable[..., Any]:
    def spied(*arguments: Any) -> Any:
        asked.append(name)
        return function(*arguments)

    return spied


# --- Open mode


async def test_open_mode_and_its_end(client: Client, database: Database) -> None:
    """Without keys every caller is `default`, whatever it presents; the first key ends that within a few seconds."""
    await client.create_customer(id=CUSTOMER)
    for metadata in bad_credentials(new_api_key(), new_api_key()):
        answer = await send(client, "ListCustomers", metadata)
        assert [one.id for one in answer.customers] == [CUSTOMER]
    key = Caller(client, await new_key(database, "one"))
    began = asyncio.get_running_loop().time()

    async def closed() -> bool:
        try:
            await send(client, "ListCustomers")
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED
        return False

    await until(closed, TRUST_S + 3)
    assert asyncio.get_running_loop().time() - began < TRUST_S + 1
    # The new organization has nothing; what was stored in open mode belongs to `default`.
    assert not (await key.call("ListCustomers")).customers
    default = Caller(client, await new_key(database, "default"))
    assert [one.id for one in (await default.call("ListCustomers")).customers] == [CUSTOMER]


async def test_open_mode_listens_to_this_machine_only(
    database_url: str, database: Database, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without keys only loopback and unix sockets may be listened on; with keys any address."""

    async def start(*addresses: str) -> None:
        config = Config(listen=addresses, allow_unsafe_database=True)
        async with serving(config, database) as bound:
            assert len(bound) == len(addresses)

    outside = ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.com:0", "metering:0", ":0"]
    socket = f"unix:{tmp_path_factory.mktemp('s')}/s"
    for address in outside:
        with pytest.raises(CannotServe, match="keys create"):
            await start(address)
        # One open door is enough to refuse.
        with pytest.raises(CannotServe, match="keys create"):
            await start("127.0.0.1:0", socket, address)
    await start("127.0.0.1:0", "localhost:0", "127.0.0.2:0", socket)
    await new_key(database, "one")
    await start("0.0.0.0:0", "127.0.0.1:0", socket)
