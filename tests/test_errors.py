"""Claims about errors: every reason at its place on the wire, and no input that breaks or leaks anything."""

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import grpc
import pytest
import sqlalchemy as sa
from conftest import Client, event, running_server, timestamp
from faults import LEAK, Fault, fault_of, read_fault, until, until_waiting
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.struct_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp
from marketplace import sell

from compat.suger.v1 import entitlement_pb2 as suger_entitlement_pb2
from compat.suger.v1 import entitlement_pb2_grpc as suger_entitlement_pb2_grpc
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
from service.auth import new_api_key
from service.backfill import Backfill
from service.config import Load
from service.database import Database
from service.domain.events import NESTING_MAX, TimeLimits
from service.domain.roles import Role
from service.errors import Reason
from service.rpc.status import VIOLATIONS_MAX
from service.store import customers as customer_store
from service.store import organizations
from service.store.tables import usage_events

START, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
UNKNOWN = "00000000-0000-4000-8000-00000000dead"
IA, NF, AE = "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS"
TRAILERS_MAX = 8 * 1024


# --- Calls, by short names


def ingest(*events: event_pb2.UsageEvent, **fields: Any) -> Any:
    """IngestEvents."""
    return lambda c: c.events.IngestEvents(event_pb2.IngestEventsRequest(events=events, **fields))


def unmatched(**fields: Any) -> Any:
    """ListUnmatchedCustomerKeys."""
    return lambda c: c.events.ListUnmatchedCustomerKeys(event_pb2.ListUnmatchedCustomerKeysRequest(**fields))


def metric(**fields: Any) -> Any:
    """CreateBillableMetric, of a COUNT unless told otherwise."""
    fields = {"name": "m", "aggregation_type": "AGGREGATION_TYPE_COUNT", **fields}
    return lambda c: c.metrics.CreateBillableMetric(
        billable_metric_pb2.CreateBillableMetricRequest(billable_metric=billable_metric_pb2.BillableMetric(**fields))
    )


def metric_call(method: str, **fields: Any) -> Any:
    """Any other method of BillableMetricService."""
    request = getattr(billable_metric_pb2, f"{method}Request")(**fields)
    return lambda c: getattr(c.metrics, method)(request)


def customer(**fields: Any) -> Any:
    """CreateCustomer."""
    fields = {"name": "c", **fields}
    return lambda c: c.customers.CreateCustomer(
        customer_pb2.CreateCustomerRequest(customer=customer_pb2.Customer(**fields))
    )


def customer_call(method: str, **fields: Any) -> Any:
    """Any other method of CustomerService."""
    request = getattr(customer_pb2, f"{method}Request")(**fields)
    return lambda c: getattr(c.customers, method)(request)


def usage(**fields: Any) -> Any:
    """ListUsage of a day unless told otherwise; None leaves a field out."""
    fields = {
        "window_size": "WINDOW_SIZE_HOUR",
        "starting_on": timestamp(START),
        "ending_before": timestamp(END),
        **fields,
    }
    request = usage_pb2.ListUsageRequest(**{name: value for name, value in fields.items() if value is not None})
    return lambda c: c.usage.ListUsage(request)


def grouped(**fields: Any) -> Any:
    """ListUsageWithGroups in one window."""
    request = usage_pb2.ListUsageWithGroupsRequest(window_size="WINDOW_SIZE_NONE", **fields)
    return lambda c: c.usage.ListUsageWithGroups(request)


def period(**fields: Any) -> Any:
    """SetBillingPeriod of an unknown customer, with a sound period unless told otherwise."""
    fields = {
        "frequency": "BILLING_FREQUENCY_MONTHLY",
        "anchor_date": "2026-01-31",
        "starting_on": "2026-01-01",
        **fields,
    }
    return customer_call("SetBillingPeriod", id=UNKNOWN, billing_period=customer_pb2.BillingPeriod(**fields))


def sale(method: str, **fields: Any) -> Any:
    """A method of EntitlementService."""
    request = getattr(entitlement_pb2, f"{method}Request")(**fields)
    return lambda c: getattr(c.entitlements, method)(request)


def groups(method: str, **fields: Any) -> Any:
    """A method of UsageRecordGroupService."""
    request = getattr(usage_record_group_pb2, f"{method}Request")(**fields)
    return lambda c: getattr(c.groups, method)(request)


def reports(method: str, **fields: Any) -> Any:
    """A method of UsageRecordReportService."""
    request = getattr(usage_record_report_pb2, f"{method}Request")(**fields)
    return lambda c: getattr(c.reports, method)(request)


async def archive_record_metric(client: Client) -> Any:
    """ArchiveBillableMetric of the record metric of `cpu`."""
    request = billable_metric_pb2.ListBillableMetricsRequest()
    metrics = (await client.metrics.ListBillableMetrics(request)).billable_metrics
    (found,) = (one.id for one in metrics if one.record_key == "cpu")
    return await metric_call("ArchiveBillableMetric", id=found)(client)


def selector(metric_id: str = UNKNOWN, **group_by: Any) -> usage_pb2.BillableMetricSelector:
    """Name a metric, grouped if a key is given."""
    return usage_pb2.BillableMetricSelector(id=metric_id, group_by=usage_pb2.GroupBy(**group_by) if group_by else None)


# --- The vocabulary


def test_reasons_are_those_of_the_proto() -> None:
    """The domain's reasons and the proto enum have the same names."""
    names = [name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()]  # noqa: SIM118
    assert set(names) == {"UNSPECIFIED", *(reason.value for reason in Reason)}
    assert error_reason_pb2.ERROR_REASON_ORGANIZATION_MISMATCH == 42
    assert error_reason_pb2.ERROR_REASON_ROLE_REQUIRED == 43
    assert error_reason_pb2.ERROR_REASON_ORGANIZATION_LIMIT == 56
    assert error_reason_pb2.ERROR_REASON_INGEST_RATE == 57
    assert all(reason.name == reason.value for reason in Reason)


# Reason -> a call that must fail with it on a server that holds `World`. What needs a special server is below.
M, C, C2 = (f"00000000-0000-4000-8000-00000000000{i}" for i in range(3))

GOLDEN: dict[str, tuple[Any, str, str | None]] = {
    "FIELD_REQUIRED": (usage(window_size=None), IA, "window_size"),
    "FIELD_INVALID": (usage(customer_ids=["x"]), IA, "customer_ids[0]"),
    "LIMIT_EXCEEDED": (customer(name="x" * 161), IA, "customer.name"),
    "NUMBER_NOT_EXACT": (
        ingest(event(properties={"n": 2.0**53}), all_or_nothing=True), IA, "events[0].properties.n",
    ),
    "TIMESTAMP_TOO_FAR_AHEAD": (
        ingest(event(at=datetime(2999, 1, 1, tzinfo=UTC)), all_or_nothing=True), IA, "events[0].timestamp",
    ),
    "TIMESTAMP_TOO_OLD": (
        ingest(event(at=datetime(1999, 1, 1, tzinfo=UTC)), all_or_nothing=True), IA, "events[0].timestamp",
    ),
    "TRANSACTION_ID_RESERVED": (ingest(event("urg:1:0"), all_or_nothing=True), IA, "events[0].transaction_id"),
    "IDEMPOTENCY_CONFLICT": (
        ingest(event("stored", event_type="other"), all_or_nothing=True), AE, "events[0].transaction_id",
    ),
    "WINDOW_MISALIGNED": (usage(starting_on=timestamp(START + timedelta(minutes=1))), IA, "starting_on"),
    "WINDOW_RANGE": (usage(ending_before=timestamp(START)), IA, "ending_before"),
    "WINDOW_COUNT": (
        usage(
            customer_ids=[C],
            billable_metrics=[selector(M)],
            starting_on=timestamp(datetime(1, 1, 2, tzinfo=UTC)),
            ending_before=timestamp(datetime(9000, 1, 1, tzinfo=UTC)),
        ), IA, "window_size",
    ),
    "TIME_ZONE_INVALID": (usage(window_size="WINDOW_SIZE_DAY", time_zone="Mars/X"), IA, "time_zone"),
    "GROUP_KEY_NOT_DECLARED": (
        usage(billable_metrics=[selector(M, key="other")]), IA, "billable_metrics[0].group_by.key",
    ),
    "DUPLICATE_ITEM": (usage(customer_ids=[C, C]), IA, "customer_ids[1]"),
    "PAGE_TOKEN_INVALID": (unmatched(page_token="x"), IA, "page_token"),
    "CUSTOMER_NOT_FOUND": (customer_call("GetCustomer", id=UNKNOWN), NF, None),
    "BILLABLE_METRIC_NOT_FOUND": (metric_call("GetBillableMetric", id=UNKNOWN), NF, None),
    "ID_IN_USE": (customer(id=C, name="other"), AE, None),
    "CUSTOMER_KEY_IN_USE": (customer(ingest_aliases=["taken"]), AE, None),
    "BUYER_ID_IN_USE": (customer(buyer_id="buyer"), AE, None),
    "METRIC_KEY_IN_USE": (metric(key="requests"), AE, None),
    "NO_BILLING_PERIOD": (
        grouped(customer_id=C, billable_metric_id=M, current_period=True), "FAILED_PRECONDITION", None,
    ),
    "ENTITLEMENT_NOT_FOUND": (sale("GetEntitlement", id="nobody's"), NF, None),
    "PRODUCT_NOT_FOUND": (sale("GetProduct", id="nobody's"), NF, None),
    "BUYER_NOT_FOUND": (
        sale(
            "CreateEntitlement",
            entitlement={"id": "e", "product_id": "p-ent", "buyer_id": "no", "starting_on": timestamp(START)},
        ), NF, None,
    ),
    "USAGE_RECORD_GROUP_NOT_FOUND": (groups("GetUsageRecordGroup", id="nobody's"), NF, None),
    "USAGE_RECORD_REPORT_NOT_FOUND": (
        reports("CompleteUsageRecordReport", id=UNKNOWN, lease_token="t"), NF, None,
    ),
    "STATUS_TRANSITION": (
        sale("UpdateEntitlement", entitlement={"id": "ent", "status": "ENTITLEMENT_STATUS_PENDING_START"}),
        "FAILED_PRECONDITION", None,
    ),
    "RECORD_METRIC": (archive_record_metric, "FAILED_PRECONDITION", None),
}  # fmt: skip
# Faults of groups, which are answers inside OK: see test_record_group_rules.
OF_GROUPS = {
    "ENTITLEMENT_NOT_ACTIVE",
    "TIMESTAMP_OUTSIDE_TERM",
    "RECORDS_EXCLUSIVE",
    "DIMENSION_UNKNOWN",
    "DIMENSION_AMBIGUOUS",
    "BILLABLE_METRIC_KEY_INVALID",
    "PROPERTIES_MISMATCH",
    "QUANTITY_INVALID",
    "QUANTITIES_ZERO",
    "ALLOCATION_INVALID",
    "SKIP_VALIDATION_FORBIDDEN",
    "META_INFO_MISMATCH",
}
# These have tests of their own in this file; those of streams in test_streams and test_stream_events, those of leases
# in test_record_group_lifecycle.
ELSEWHERE = {
    "LEASE_LOST",
    "REPORT_COMPLETED",
    "SERVER_DRAINING",
    "STREAM_STALLED",
    "MALFORMED_REQUEST",
    "METRIC_BACKFILLING",
    "CREDENTIAL_MISSING",
    "CREDENTIAL_INVALID",
    "ORGANIZATION_MISMATCH",
    "ROLE_REQUIRED",
    "OVERLOADED",
    "ORGANIZATION_LIMIT",
    "INGEST_RATE",
    "DATABASE_UNAVAILABLE",
    "DEADLINE_TOO_SHORT",
    "INTERNAL",
}


async def fill(client: Client) -> None:
    """Store what the golden calls collide with: a metric, a customer, an event."""
    await client.create_metric(id=M, key="requests", group_keys=[billable_metric_pb2.GroupKey(properties=["region"])])
    await client.create_customer(id=C, buyer_id="buyer", ingest_aliases=["taken"])
    await client.ingest(event("stored", at=datetime.now(UTC)))
    await sell(client, buyer_id="buyer")


@pytest.fixture
async def filled(client: Client) -> Client:
    """A client of a server that holds what the golden calls collide with."""
    await fill(client)
    return client


async def test_every_reason_is_reached(database_url: str) -> None:
    """Each reason of the enum comes with its code and field path from the call that should bring it."""
    assert set(GOLDEN) | ELSEWHERE | OF_GROUPS == {reason.value for reason in Reason}
    async with running_server(database_url, time_limits=TimeLimits(oldest=timedelta(days=1000))) as client:
        await fill(client)
        for reason, (call, code, field) in GOLDEN.items():
            fault = await fault_of(call(client))
            assert fault.brief == (code, reason, field)
            if field is None:
                assert not {"field", "violations"} & fault.metadata.keys()
            else:
                assert fault.metadata == {"field": field, "violations": "1"}
            assert fault.retry_s is None
            assert fault.request_id


async def test_the_metadata_names_what_collided(filled: Client) -> None:
    """Errors about an id or key name it for programs."""
    expected = {
        "CUSTOMER_NOT_FOUND": {"ids": UNKNOWN},
        "BILLABLE_METRIC_NOT_FOUND": {"ids": UNKNOWN},
        "ID_IN_USE": {"id": C},
        "CUSTOMER_KEY_IN_USE": {"keys": "taken"},
        "BUYER_ID_IN_USE": {"buyer_id": "buyer"},
        "METRIC_KEY_IN_USE": {"key": "requests"},
        "NO_BILLING_PERIOD": {"id": C},
        "ENTITLEMENT_NOT_FOUND": {"id": "nobody's"},
        "PRODUCT_NOT_FOUND": {"id": "nobody's"},
        "BUYER_NOT_FOUND": {"buyer_id": "no"},
        "USAGE_RECORD_GROUP_NOT_FOUND": {"id": "nobody's"},
        "USAGE_RECORD_REPORT_NOT_FOUND": {"id": UNKNOWN},
        "STATUS_TRANSITION": {"id": "ent", "status": "ACTIVE"},
    }
    for reason, metadata in expected.items():
        assert (await fault_of(GOLDEN[reason][0](filled))).metadata == metadata


async def test_a_misaligned_bound_is_told_its_neighbours(filled: Client) -> None:
    """The text of WINDOW_MISALIGNED names the nearest valid bounds."""
    fault = await fault_of(GOLDEN["WINDOW_MISALIGNED"][0](filled))
    assert "2026-01-01T00:00:00Z" in fault.text
    assert "2026-01-01T01:00:00Z" in fault.text


async def test_a_group_key_is_told_the_declared_ones(filled: Client) -> None:
    """The text of GROUP_KEY_NOT_DECLARED lists the declared keys."""
    assert "region" in (await fault_of(GOLDEN["GROUP_KEY_NOT_DECLARED"][0](filled))).text


# --- Reasons that need a special server


async def test_backfilling(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query that names a metric still counting its past says so, how far it is, and when to ask again."""
    stalled = asyncio.Event()

    async def never(_: Backfill) -> None:
        await stalled.wait()

    monkeypatch.setattr(Backfill, "_count_all", never)
    await client.ingest(event())
    await metric(id=M)(client)
    fault = await fault_of(usage(billable_metrics=[selector(M)])(client))
    assert fault.brief == ("FAILED_PRECONDITION", "METRIC_BACKFILLING", None)
    assert (fault.metadata, fault.retry_s) == ({"ids": M, "progress": "0.00"}, 1)
    # "All metrics" leaves it out.
    assert not (await usage()(client)).windows
    stalled.set()


async def test_credentials(client: Client, database: Database) -> None:
    """With keys configured, no credential and a wrong one have reasons of their own, in this order before any field."""
    key = new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_api_key(connection, "default", key.id, "test", key.secret_hash)
    call = GOLDEN["FIELD_REQUIRED"][0]

    async def closed() -> bool:
        return (await fault_of(call(client))).code != IA

    await until(closed)
    fault = await fault_of(call(client))
    assert (fault.brief, fault.metadata) == (("UNAUTHENTICATED", "CREDENTIAL_MISSING", None), {})
    request = usage_pb2.ListUsageRequest()
    wrong = await fault_of(client.usage.ListUsage(request, metadata=[("authorization", "Bearer x")]))
    assert (wrong.brief, wrong.metadata) == (("UNAUTHENTICATED", "CREDENTIAL_INVALID", None), {})
    right = await fault_of(client.usage.ListUsage(request, metadata=[("authorization", f"Bearer {key.text}")]))
    assert right.code == IA


async def test_another_organization_is_forbidden(database_url: str, database: Database) -> None:
    """A request that names another organization than its credential's is PERMISSION_DENIED, before any other fault."""
    key = new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_api_key(connection, "default", key.id, "test", key.secret_hash)
    metadata = [("authorization", f"Bearer {key.text}")]
    async with running_server(database_url) as client:
        stub = suger_entitlement_pb2_grpc.EntitlementServiceStub(client.channel)
        for named in ("other", "", "Default", "default "):
            request = suger_entitlement_pb2.ListEntitlementsRequest(org_id=named, limit=-1)
            fault = await fault_of(stub.ListEntitlements(request, metadata=metadata))
            assert (fault.brief, fault.metadata) == (("PERMISSION_DENIED", "ORGANIZATION_MISMATCH", None), {})
            assert not named or named not in fault.text
        request = suger_entitlement_pb2.ListEntitlementsRequest(org_id="default", limit=-1)
        assert (await fault_of(stub.ListEntitlements(request, metadata=metadata))).brief == (
            IA,
            "FIELD_INVALID",
            "limit",
        )


async def test_a_role_is_required(database_url: str, database: Database) -> None:
    """A credential without a method's role is PERMISSION_DENIED, told which role and for what, before any field."""
    key = new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_api_key(connection, "default", key.id, "test", key.secret_hash, [Role.READ])
    metadata = [("authorization", f"Bearer {key.text}")]
    async with running_server(database_url) as client:
        fault = await fault_of(client.customers.CreateCustomer(customer_pb2.CreateCustomerRequest(), metadata=metadata))
        assert fault.brief == ("PERMISSION_DENIED", "ROLE_REQUIRED", None)
        assert fault.metadata == {"needed": "admin", "method": "metering.v1.CustomerService/CreateCustomer"}
        assert fault.retry_s is None
        assert fault.text == "The credential has the role read; this call needs admin."
        fault = await fault_of(client.events.IngestEvents(event_pb2.IngestEventsRequest(), metadata=metadata))
        assert fault.metadata == {"needed": "admin,ingest", "method": "metering.v1.EventService/IngestEvents"}
        assert fault.text == "The credential has the role read; this call needs ingest or admin."
        assert not (
            await client.customers.ListCustomers(customer_pb2.ListCustomersRequest(), metadata=metadata)
        ).customers


async def test_an_organization_has_its_limit(database_url: str, database: Database) -> None:
    """Calls and streams over what one organization may have are refused at once, and the server has room for others."""
    keys = {name: new_api_key() for name in ("default", "other")}
    async with database.engine.begin() as connection:
        await organizations.create_organization(connection, "other")
        for name, key in keys.items():
            await organizations.create_api_key(connection, name, key.id, "test", key.secret_hash)
    own, others = ([("authorization", f"Bearer {key.text}")] for key in keys.values())
    load = Load(calls_of_organization_max=1, streams_of_organization_max=1)
    async with running_server(database_url, load=load) as client:
        request = event_pb2.IngestEventsRequest(events=[event()])
        async with database.engine.begin() as connection:
            await organizations.lock_exclusive(connection, "default")
            first = asyncio.ensure_future(client.events.IngestEvents(request, metadata=own))
            await until_waiting(database.engine)
            fault = await fault_of(client.events.IngestEvents(request, metadata=own))
            assert fault.brief == ("RESOURCE_EXHAUSTED", "ORGANIZATION_LIMIT", None)
            assert (fault.metadata, fault.retry_s) == ({}, 1)
            assert list((await client.events.IngestEvents(request, metadata=others)).verdicts) == [
                event_pb2.VERDICT_ACCEPTED
            ]
        assert list((await first).verdicts) == [event_pb2.VERDICT_ACCEPTED]
        stream = client.events.StreamEvents(metadata=own)
        await stream.write(event_pb2.StreamEventsRequest(sequence=1, events=[event()]))
        assert (await stream.read()).sequence == 1
        fault = await fault_of(client.events.StreamEvents(iter([]), metadata=own).read())
        assert (fault.brief, fault.retry_s) == (("RESOURCE_EXHAUSTED", "ORGANIZATION_LIMIT", None), 1)
        assert await client.events.StreamEvents(iter([]), metadata=others).read() is grpc.aio.EOF
        # A place that was given back can be taken.
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await client.events.StreamEvents(iter([]), metadata=own).read() is grpc.aio.EOF
        assert list((await client.events.IngestEvents(request, metadata=own)).verdicts) == [event_pb2.VERDICT_DUPLICATE]


async def test_an_organization_has_its_rate(database_url: str) -> None:
    """What comes faster than an organization may send is refused whole, with the rate and the time to wait."""
    async with running_server(database_url, load=Load(ingest_rate=500)) as client:
        events = [event(f"e{i}") for i in range(2000)]
        for _ in range(20):
            try:
                await client.ingest(*events)
            except grpc.aio.AioRpcError as error:
                fault = read_fault(error)
                break
        assert fault.brief == ("RESOURCE_EXHAUSTED", "INGEST_RATE", None)
        assert fault.metadata == {"events_per_second": "500"}
        assert fault.retry_s is not None
        assert 0 <= fault.retry_s <= 4
        # Reading is not metered, and after the time it was told the call is taken.
        await unmatched()(client)
        await asyncio.sleep(fault.retry_s + 0.05)
        assert set((await client.ingest(*events)).verdicts) == {event_pb2.VERDICT_DUPLICATE}


async def test_overload(database_url: str, database: Database) -> None:
    """Beyond its byte budget the server refuses at once and says when to retry; a single call is never too large."""
    async with running_server(database_url, load=Load(request_bytes_max=1000)) as client:
        large = [event(f"e{i}", properties={"x": "y" * 500}) for i in range(10)]
        async with database.engine.begin() as connection:
            await organizations.lock_exclusive(connection, "default")
            first = asyncio.ensure_future(client.ingest(*large))
            second = None
            async with asyncio.timeout(10):
                while second is None:
                    pending = asyncio.ensure_future(client.ingest(*large))
                    done, _ = await asyncio.wait([pending], timeout=0.2)
                    if done:
                        second = await fault_of(pending)
                    else:
                        first, _ = pending, first.cancel()
        assert second.brief == ("RESOURCE_EXHAUSTED", "OVERLOADED", None)
        assert second.retry_s == 1
        await first
        # What was in flight is done: its bytes are free again.
        assert set((await client.ingest(*large)).verdicts) == {event_pb2.VERDICT_DUPLICATE}


async def interrupted(client: Client, database: Database, how: str) -> Fault:
    """Interrupt a call inside its statement, and read what its caller is told."""
    async with database.engine.begin() as connection:
        await connection.execute(sa.text("LOCK TABLE usage_events"))
        call = asyncio.ensure_future(unmatched()(client))
        interrupt = sa.text(
            f"SELECT count({how}(pid)) FROM pg_stat_activity "  # noqa: S608 - a function's name
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        await until_waiting(database.engine)
        assert (await connection.execute(interrupt)).scalar_one() == 1
        return await fault_of(call)


async def test_the_database_does_not_answer(client: Client, database: Database) -> None:
    """A database that ends its connections is DATABASE_UNAVAILABLE with RetryInfo, and the next call works."""
    fault = await interrupted(client, database, "pg_terminate_backend")
    assert fault.brief == ("UNAVAILABLE", "DATABASE_UNAVAILABLE", None)
    assert fault.retry_s == 1
    assert not (await unmatched()(client)).unmatched_customer_keys


async def test_a_statement_over_its_time(client: Client, database: Database) -> None:
    """A statement that Postgres cancels, as it does at its time limit, is DEADLINE_TOO_SHORT and was undone."""
    fault = await interrupted(client, database, "pg_cancel_backend")
    assert fault.brief == ("DEADLINE_EXCEEDED", "DEADLINE_TOO_SHORT", None)
    assert not (await unmatched()(client)).unmatched_customer_keys


async def test_a_deadline_too_short_to_begin(client: Client, database: Database) -> None:
    """A call whose deadline passes before its work began fails by it, and nothing of it is stored."""
    async with database.engine.begin() as connection:
        await organizations.lock_exclusive(connection, "default")
        # This one is taken, and waits for the lock; the next waits in the queue behind it.
        taken = asyncio.ensure_future(client.ingest(event("taken")))
        await until_waiting(database.engine)
        late = event_pb2.IngestEventsRequest(events=[event("late")])
        fault = await fault_of(client.events.IngestEvents(late, timeout=0.2))
    assert fault.code == "DEADLINE_EXCEEDED"
    await taken
    async with database.engine.connect() as connection:
        assert list((await connection.execute(sa.select(usage_events.c.transaction_id))).scalars()) == ["taken"]


async def test_a_defect_shows_only_where_to_look(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception nobody foresaw is INTERNAL with the request id and not one word of its own."""

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("INSERT INTO secrets VALUES ('hunter2')")

    with monkeypatch.context() as patch:
        patch.setattr(customer_store, "get_customer", broken)
        request = customer_pb2.GetCustomerRequest(id=UNKNOWN)
        fault = await fault_of(client.customers.GetCustomer(request, metadata=[("x-request-id", "find-me:1")]))
    assert (fault.brief, fault.request_id) == (("INTERNAL", "INTERNAL", None), "find-me:1")
    assert fault.metadata == {"request_id": "find-me:1"}
    assert fault.text == "Internal error. The server's log has it under request id find-me:1."
    assert (await fault_of(customer_call("GetCustomer", id=UNKNOWN)(client))).code == NF


async def test_an_inner_cancellation_does_not_hang_the_caller(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CancelledError from inside is answered INTERNAL; left to gRPC the caller would wait for ever."""

    async def cancelled(*_: Any, **__: Any) -> Any:
        raise asyncio.CancelledError

    monkeypatch.setattr(customer_store, "get_customer", cancelled)
    async with asyncio.timeout(10):
        fault = await fault_of(customer_call("GetCustomer", id=UNKNOWN)(client))
    assert fault.brief == ("INTERNAL", "INTERNAL", None)


# --- Request ids


async def test_request_ids_are_echoed(client: Client) -> None:
    """A sound x-request-id comes back in the trailers of successes and errors; another is replaced."""
    for sent, kept in (("a.B-9_:x", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("a b", False)):
        metadata = [("x-request-id", sent)]
        call = client.customers.ListCustomers(customer_pb2.ListCustomersRequest(), metadata=metadata)
        await call
        echoed = [value for key, value in await call.trailing_metadata() if key == "x-request-id"]
        missing = client.customers.GetCustomer(customer_pb2.GetCustomerRequest(id=UNKNOWN), metadata=metadata)
        fault = await fault_of(missing)
        assert len(echoed) == 1
        for found in (echoed[0], fault.request_id):
            assert (found == sent) == kept
            assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", str(found))


async def test_calls_without_a_request_id_get_their_own(client: Client) -> None:
    """Without x-request-id every call is given another one."""
    faults = [await fault_of(customer_call("GetCustomer", id=UNKNOWN)(client)) for _ in range(3)]
    assert len({fault.request_id for fault in faults}) == 3


# --- Sizes of errors

WIDE = "\U0001f600"  # four bytes, twelve on the wire as percent-encoded text


def bad_events(number: int) -> list[event_pb2.UsageEvent]:
    """Events with four faults each."""
    return [event_pb2.UsageEvent() for _ in range(number)]


LARGE: dict[str, tuple[Any, int]] = {
    # call -> how many violations it has
    "10,000 events with four faults": (ingest(*bad_events(10_000), all_or_nothing=True), 40_000),
    "1,000 unknown ids": (usage(customer_ids=[f"x{i}" for i in range(1000)]), 1000),
    "1,000 duplicate ids": (usage(billable_metrics=[selector() for _ in range(1000)]), 999),
    "2,000 aliases with control characters": (customer(ingest_aliases=[f"\n{i}" for i in range(2000)]), 2000),
    "long names of custom fields": (
        customer(custom_fields={WIDE * 1000 + str(i): "\0" for i in range(64)}), 128,
    ),
    "wide names of custom fields": (customer(custom_fields={WIDE * 127 + chr(65 + i): "\0" for i in range(20)}), 20),
    "wide aliases twice": (
        customer(ingest_aliases=[WIDE * 126 + f"{i // 2:02}" for i in range(60)]), 30,
    ),
    "wide group values twice": (
        usage(billable_metrics=[selector(key="k", values=[WIDE * 256] * 200)]), 199,
    ),
    "a wide field mask": (
        customer_call(
            "UpdateCustomer",
            customer=customer_pb2.Customer(id=UNKNOWN),
            update_mask=FieldMask(paths=[WIDE * 1000] * 3),
        ), 1,
    ),
    "a wide zone": (usage(window_size="WINDOW_SIZE_DAY", time_zone=WIDE * 100_000), 1),
    "a wide nested key": (
        ingest(event(properties={WIDE * 128: {WIDE * 256: {WIDE * 256: "\0"}}}), all_or_nothing=True), 1,
    ),
}  # fmt: skip


async def test_error_details_are_bounded(client: Client) -> None:
    """However many or wide the faults: at most 20 violations are listed, all are counted, trailers stay under 8 KiB."""
    wrong = []
    for name, (call, violations) in LARGE.items():
        fault = await fault_of(call(client))
        assert (fault.code, fault.metadata["violations"]) == (IA, str(violations)), name
        assert 1 <= len(fault.fields) <= min(violations, VIOLATIONS_MAX)
        if fault.trailers_size >= TRAILERS_MAX:
            wrong.append((name, fault.trailers_size))
    assert wrong == []
    assert VIOLATIONS_MAX == 20


async def test_errors_that_name_much_are_bounded(client: Client) -> None:
    """NOT_FOUND of 1,000 ids and keys in use of any width keep their trailers under 8 KiB too."""
    ids = [str(uuid.UUID(int=i)) for i in range(1000)]
    aliases = [WIDE * 125 + f"{i:03}" for i in range(1000)]
    await customer(ingest_aliases=aliases)(client)
    for call, code in (
        (usage(customer_ids=ids), NF),
        (usage(billable_metrics=[selector(one) for one in ids]), NF),
        (customer(ingest_aliases=aliases), AE),
    ):
        fault = await fault_of(call(client))
        assert fault.code == code
        assert fault.trailers_size < TRAILERS_MAX


async def test_all_or_nothing_conflicts_are_bounded(client: Client) -> None:
    """10,000 conflicts are one ALREADY_EXISTS that lists 20 of them and counts all."""
    ids = [f"e{i}" for i in range(10_000)]
    await client.ingest(*map(event, ids))
    fault = await fault_of(client.ingest(*(event(one, event_type="other") for one in ids), all_or_nothing=True))
    assert fault.brief == (AE, "IDEMPOTENCY_CONFLICT", "events[0].transaction_id")
    assert (len(fault.fields), fault.metadata["violations"]) == (20, "10000")
    assert fault.trailers_size < TRAILERS_MAX


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([Value(number_value=float("nan"))] * 300_000, id="300,000 NaN"),
        pytest.param([Value(string_value="\0")] * 300_000, id="300,000 NUL"),
    ],
)
async def test_the_answer_about_bad_events_is_bounded(client: Client, values: Sequence[Value]) -> None:
    """A request of faults does not give an answer larger than a client takes: the verdicts must arrive."""
    bad = event("bad")
    bad.properties.fields["list"].list_value.values.extend(values)
    answer = await client.ingest(bad, event("good"))
    assert list(answer.verdicts) == [event_pb2.VERDICT_REJECTED, event_pb2.VERDICT_ACCEPTED]
    assert answer.ByteSize() < 4 * 1024 * 1024


async def test_ten_thousand_bad_events_get_ten_thousand_verdicts(client: Client) -> None:
    """A batch of nothing but faults is answered OK, within what a client takes by default."""
    answer = await client.ingest(*bad_events(10_000))
    assert set(answer.verdicts) == {event_pb2.VERDICT_REJECTED}
    assert len(answer.verdicts) == 10_000
    assert {issue.index for issue in answer.issues} == set(range(10_000))


# --- Bytes


UNDECODABLE = [
    ("no message", b"\xff\xff\xff"),
    ("truncated length", b"\x0a\x7f\x00"),
    ("truncated varint", b"\x0a"),
    ("field number 0", b"\x02\x00"),
    ("invalid UTF-8", b"\x0a\x04\x0a\x02\xff\xfe"),
    ("lone surrogate in UTF-8", b"\x0a\x05\x0a\x03\xed\xa0\x80"),
    ("wrong group", b"\x0b"),
]


async def test_undecodable_bytes(client: Client) -> None:
    """Bytes that are no message of the expected type are INVALID_ARGUMENT, never UNKNOWN."""
    send = client.channel.unary_unary("/metering.v1.EventService/IngestEvents")
    for name, raw in UNDECODABLE:
        fault = await fault_of(send(raw))
        assert fault.brief == (IA, "MALFORMED_REQUEST", "request"), name
        assert fault.request_id


async def test_unknown_fields_are_ignored(client: Client, database: Database) -> None:
    """A newer client's fields change nothing and are not stored."""
    send = client.channel.unary_unary("/metering.v1.EventService/IngestEvents")
    one = event("e").SerializeToString() + b"\xfa\x3f\x05extra"
    request = b"\x0a" + bytes([len(one)]) + one + b"\xfa\x3f\x05extra"
    assert len(one) < 128
    answer = event_pb2.IngestEventsResponse.FromString(await send(request))
    assert list(answer.verdicts) == [event_pb2.VERDICT_ACCEPTED]
    assert list((await client.ingest(event("e"))).verdicts) == [event_pb2.VERDICT_DUPLICATE]


async def test_a_message_over_four_mebibytes(client: Client) -> None:
    """The transport refuses a request over 4 MiB as RESOURCE_EXHAUSTED and serves on."""
    send = client.channel.unary_unary("/metering.v1.EventService/IngestEvents")
    fault = await fault_of(send(bytes(4 * 1024 * 1024 + 1)))
    assert (fault.code, fault.reason) == ("RESOURCE_EXHAUSTED", "")
    assert list((await client.ingest(event())).verdicts) == [event_pb2.VERDICT_ACCEPTED]


async def test_unknown_methods(client: Client) -> None:
    """A method or service that does not exist is UNIMPLEMENTED."""
    for method in ("/metering.v1.EventService/Nothing", "/metering.v1.Nothing/Get", "/x", "/metering.v1.EventService/"):
        assert (await fault_of(client.channel.unary_unary(method)(b""))).code == "UNIMPLEMENTED"


# --- Bad events: a verdict inside OK


class BadEvent(NamedTuple):
    """An event and why it is rejected."""

    event: event_pb2.UsageEvent
    reason: str
    path: str


def nested(depth: int) -> Value:
    """Lists within lists."""
    value = Value(string_value="x")
    for _ in range(depth):
        outer = Value()
        outer.list_value.values.append(value)
        value = outer
    return value


def having(value: Value, name: str = "p") -> event_pb2.UsageEvent:
    """An event with one property."""
    made = event()
    made.properties.fields[name].CopyFrom(value)
    return made


def at(seconds: int, nanos: int = 0) -> event_pb2.UsageEvent:
    """An event at a moment that need not be one."""
    made = event()
    made.timestamp.CopyFrom(Timestamp(seconds=seconds, nanos=nanos))
    return made


def without(field: str) -> event_pb2.UsageEvent:
    """An event that lacks a field."""
    made = event()
    made.ClearField(field)  # type: ignore[arg-type]
    return made


def _bad_events() -> list[BadEvent]:
    required, invalid, limit = "FIELD_REQUIRED", "FIELD_INVALID", "LIMIT_EXCEEDED"
    bad = []
    for field in ("transaction_id", "customer_id", "event_type"):
        bad.append(BadEvent(without(field), required, field))
        for text in ("\0", "a\0b", "a\nb", "\t", "\x7f", "\x1b[31m", "\u0085", " ", "\u2003\u00a0 "):
            made = event()
            setattr(made, field, text)
            bad.append(BadEvent(made, invalid, field))
        for text in ("x" * 129, WIDE * 129, "x" * 1_000_000):
            made = event()
            setattr(made, field, text)
            bad.append(BadEvent(made, limit, field))
    bad += [
        BadEvent(event("urg:"), "TRANSACTION_ID_RESERVED", "transaction_id"),
        BadEvent(event("urg:g:0"), "TRANSACTION_ID_RESERVED", "transaction_id"),
        BadEvent(without("timestamp"), required, "timestamp"),
        BadEvent(having(nested(NESTING_MAX + 1)), "LIMIT_EXCEEDED", "properties"),
    ]
    # Outside years 1..9999, at their edges, and what is no timestamp at all.
    for seconds, nanos in (
        (-62135596801, 0), (-62135596800, 0), (-62135510401, 999_999_999), (253402300800, 0), (253402214400, 0),
        (253402300799, 999_999_999), (2**62, 0), (-(2**63), 0), (2**63 - 1, 0), (0, -1), (0, 10**9), (0, 2**31 - 1),
        (0, -(2**31)),
    ):  # fmt: skip
        bad.append(BadEvent(at(seconds, nanos), invalid, "timestamp"))
    bad.append(BadEvent(at(253402214399), "TIMESTAMP_TOO_FAR_AHEAD", "timestamp"))
    for number in (float("nan"), float("inf"), -float("inf"), 2.0**53, -(2.0**53), 2.0**53 + 2, 1e22, 1e308):
        bad.append(BadEvent(event(properties={"p": number}), "NUMBER_NOT_EXACT", "properties.p"))
    bad += [
        BadEvent(event(properties={"p": [1, {"q": 1e300}]}), "NUMBER_NOT_EXACT", "properties.p[1].q"),
        BadEvent(event(properties={f"p{i}": 1 for i in range(65)}), limit, "properties"),
        BadEvent(event(properties={f"p{i}": 1 for i in range(100_000)}), limit, "properties"),
        BadEvent(event(properties={"p": "x" * 1025}), limit, "properties.p"),
        BadEvent(event(properties={"p": WIDE * 257}), limit, "properties.p"),
        BadEvent(event(properties={"p": "x" * 1_000_000}), limit, "properties.p"),
        BadEvent(event(properties={"p": ["x" * 1025]}), limit, "properties.p[0]"),
        BadEvent(event(properties={f"p{i}": "x" * 1000 for i in range(17)}), limit, "properties"),
        BadEvent(event(properties={"p": ["x"] * 5000}), limit, "properties"),
        BadEvent(event(properties={"p": "a\0b"}), invalid, "properties.p"),
        BadEvent(event(properties={"p": {"q": "\0"}}), invalid, "properties.p.q"),
        BadEvent(event(properties={"p": {"\0": 1}}), invalid, "properties.p"),
        BadEvent(event(properties={"p": {"q" * 1025: 1}}), limit, "properties.p"),
        BadEvent(event(properties={"": 1}), required, "properties"),
        BadEvent(event(properties={" ": 1}), invalid, "properties"),
        BadEvent(event(properties={"a\0": 1}), invalid, "properties"),
        BadEvent(event(properties={"a\n": 1}), invalid, "properties"),
        BadEvent(event(properties={"x" * 129: 1}), limit, "properties"),
        BadEvent(event(properties={"x" * 1_000_000: 1}), limit, "properties"),
    ]
    return bad


BAD_EVENTS = _bad_events()


async def test_bad_events_are_rejected_with_reason_and_path(client: Client) -> None:
    """Each bad event among good ones is REJECTED for its own fault; the good ones are stored."""
    wrong = []
    # In several batches, as some are large.
    for start in range(0, len(BAD_EVENTS), 10):
        bad = BAD_EVENTS[start : start + 10]
        batch = [one for pair in bad for one in (event(), pair.event)]
        answer = await client.ingest(*batch)
        assert list(answer.verdicts) == [event_pb2.VERDICT_ACCEPTED, event_pb2.VERDICT_REJECTED] * len(bad)
        issues: dict[int, list[tuple[str, str]]] = {}
        for issue in answer.issues:
            reason = error_reason_pb2.ErrorReason.Name(issue.reason).removeprefix("ERROR_REASON_")
            issues.setdefault(issue.index, []).append((reason, issue.field))
            assert not LEAK.search(issue.message.encode())
            assert len(issue.message) < 300
        for i, one in enumerate(bad):
            found, expected = issues.pop(2 * i + 1), [(one.reason, f"events[{2 * i + 1}].{one.path}")]
            if found != expected:
                wrong.append((found, expected, str(one.event)[:300]))
        assert issues == {}
    assert wrong == []


async def test_odd_but_sound_events_are_accepted(client: Client, database: Database) -> None:
    """What only looks dangerous is stored as it is: quotes, placeholders, SQL, wide text, edges of every limit."""
    texts = [
        "'", '"', "\\", "%", "%s", "%(x)s", ":x", ":1", "$1", "?", "{}", "{0}", "`", ";", "--", "/*",
        "'; DROP TABLE x;--",
        "a->>'b'", "__proto__", "constructor", "$where", "a.b", "NULL", "null", WIDE, "\u202e", "\u200b", "\ufeff",
        "\\u0000", "x" * 128, WIDE * 128, "é", "e\u0301", " x ", "../../etc/passwd", "\\x00",
        "\ud7ff", "\uffff", "\U0010ffff",
    ]  # fmt: skip
    batch = []
    for text in texts:
        batch.append(event(text, customer_id=text, event_type=text, properties={text: text, "n": {text: [text]}}))
    edges = [
        event("numbers", properties={"a": 2**53 - 1, "b": -(2**53 - 1), "c": 5e-324, "d": -0.0, "e": 0.1, "f": 1.5e-7}),
        event("kinds", properties={"a": None, "b": True, "c": [], "d": {}, "e": ""}),
        event("64 properties", properties={f"p{i}": i for i in range(64)}),
        event("1024 bytes", properties={"p": "x" * 1024, "q": WIDE * 256}),
        event("almost 16 KiB", properties={"p": ["x" * 1000] * 16}),
        at(-62135510400),
        at(-1, 999_999_999),
        at(0),
        having(nested(NESTING_MAX)),
    ]
    answer = await client.ingest(*batch, *edges)
    assert list(answer.verdicts) == [event_pb2.VERDICT_ACCEPTED] * len(answer.verdicts)
    again = await client.ingest(*batch, *edges)
    assert list(again.verdicts) == [event_pb2.VERDICT_DUPLICATE] * len(answer.verdicts)
    columns = usage_events.c
    async with database.engine.connect() as connection:
        query = sa.select(columns.transaction_id, columns.customer_key, columns.event_type, columns.properties)
        rows = {row[0]: row[1:] for row in await connection.execute(query)}
    for text in texts:
        assert rows[text] == (text, text, {text: text, "n": {text: [text]}})
    keys = (await unmatched(page_size=1000)(client)).unmatched_customer_keys
    assert {key.customer_key for key in keys} == {*texts, "acme"}


async def test_deep_nesting_is_refused(client: Client) -> None:
    """A request nested deeper than protobuf reads is INVALID_ARGUMENT, however deep it is."""
    send = client.channel.unary_unary("/metering.v1.EventService/IngestEvents")
    for depth in (100, 1_000, 100_000):
        fault = await fault_of(send(_deep_request(depth)))
        assert fault.brief == (IA, "MALFORMED_REQUEST", "request")
        assert list((await client.ingest(event())).verdicts) == [event_pb2.VERDICT_ACCEPTED]
    # The writer of these bytes is right: at a depth that protobuf reads the server looks into them.
    for depth, more in ((NESTING_MAX, set()), (NESTING_MAX + 1, {"events[0].properties"})):
        answer = event_pb2.IngestEventsResponse.FromString(await send(_deep_request(depth)))
        assert {issue.field for issue in answer.issues} == more | {
            f"events[0].{name}" for name in ("transaction_id", "customer_id", "event_type", "timestamp")
        }


def _deep_request(depth: int) -> bytes:
    # Written by hand from the inside out: the library would refuse to build it.
    parts, length = [], 0
    inner = b"\x1a\x01x"
    length = len(inner)
    for _ in range(depth):
        for tag in (b"\x0a", b"\x32"):
            head = tag + _varint(length)
            parts.append(head)
            length += len(head)
    value = b"".join(reversed(parts)) + inner
    value = b"\x0a\x01p\x12" + _varint(len(value)) + value
    for tag in (b"\x0a", b"\x2a", b"\x0a"):  # an entry in a Struct, in an event, in the request
        value = tag + _varint(len(value)) + value
    return value


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


# --- Bad requests: a status


def _names(path: str, make: Callable[[str], Any], most: int) -> list[tuple[Any, str, str]]:
    """The faults that every required name can have."""
    return [
        (make(""), "FIELD_REQUIRED", path),
        (make("x" * (most + 1)), "LIMIT_EXCEEDED", path),
        (make("x" * 1_000_000), "LIMIT_EXCEEDED", path),
        *((make(text), "FIELD_INVALID", path) for text in ("\0", "a\0b", "a\r\nb", "  ", "\x9b", "\u2028")[:5]),
    ]


def _uuids(path: str, make: Callable[[str], Any]) -> list[tuple[Any, str, str]]:
    """The faults that every UUID can have."""
    texts = (
        "x", "\0", "acme", UNKNOWN.replace("-", ""), f"{{{UNKNOWN}}}", f"urn:uuid:{UNKNOWN}", UNKNOWN + " ",
        UNKNOWN[:-1], UNKNOWN[:-1] + "g", UNKNOWN + "\n", UNKNOWN[:-1] + "\uff10", "' OR 1=1--", "x" * 1_000_000,
    )  # fmt: skip
    return [(make(text), "FIELD_INVALID", path) for text in texts]


def _texts(path: str, make: Callable[[str], Any]) -> list[tuple[Any, str, str]]:
    """The faults that free text can have."""
    return [
        (make("\0"), "FIELD_INVALID", path),
        (make("x" * 1025), "LIMIT_EXCEEDED", path),
        (make(WIDE * 257), "LIMIT_EXCEEDED", path),
    ]


def _bad_requests() -> list[tuple[Any, str, str]]:
    required, invalid, limit, twice = "FIELD_REQUIRED", "FIELD_INVALID", "LIMIT_EXCEEDED", "DUPLICATE_ITEM"
    sum_of = {"aggregation_type": "AGGREGATION_TYPE_SUM"}
    filters, keys = "billable_metric.property_filters", "billable_metric.group_keys"
    type_filter = "billable_metric.event_type_filter"

    def filtered(*, times: int = 1, **fields: Any) -> Any:
        one = billable_metric_pb2.PropertyFilter(**{"name": "p", **fields})
        return metric(property_filters=[one] * times)

    def typed(**fields: Any) -> Any:
        return metric(event_type_filter=billable_metric_pb2.EventTypeFilter(**fields))

    def grouped(*properties: Sequence[str]) -> Any:
        return metric(group_keys=[billable_metric_pb2.GroupKey(properties=one) for one in properties])

    def renamed(**fields: Any) -> Any:
        return metric_call("UpdateBillableMetric", **fields)

    def updated(*paths: str, **fields: Any) -> Any:
        changed = customer_pb2.Customer(**{"id": UNKNOWN, **fields})
        return customer_call("UpdateCustomer", customer=changed, update_mask=FieldMask(paths=paths))

    def metric_of(**fields: Any) -> Any:
        return billable_metric_pb2.BillableMetric(**{"id": UNKNOWN, **fields})

    group_by = "billable_metrics[0].group_by"
    return [
        # Events
        (ingest(), required, "events"),
        (ingest(*[event_pb2.UsageEvent()] * 10_001), limit, "events"),
        (unmatched(page_size=-1), invalid, "page_size"),
        (unmatched(page_size=-(2**31)), invalid, "page_size"),
        # Metrics
        (lambda c: c.metrics.CreateBillableMetric(billable_metric_pb2.CreateBillableMetricRequest()),
         required, "billable_metric.aggregation_type"),
        *_names("billable_metric.name", lambda text: metric(name=text), 160),
        *_names("billable_metric.key", lambda text: metric(key=text), 128)[1:],
        *_names("billable_metric.aggregation_key", lambda text: metric(**sum_of, aggregation_key=text), 128),
        *_uuids("billable_metric.id", lambda text: metric(id=text)),
        (metric(aggregation_type=0), required, "billable_metric.aggregation_type"),
        (metric(aggregation_type=99), invalid, "billable_metric.aggregation_type"),
        (metric(aggregation_type=-1), invalid, "billable_metric.aggregation_type"),
        (metric(aggregation_key="n"), invalid, "billable_metric.aggregation_key"),
        *_texts(f"{type_filter}.in_values[1]", lambda text: typed(in_values=["a", text])),
        *_texts(f"{type_filter}.not_in_values[0]", lambda text: typed(not_in_values=[text])),
        (typed(in_values=["x"] * 1001), limit, f"{type_filter}.in_values"),
        *_names(f"{filters}[0].name", lambda text: filtered(name=text), 128),
        *_texts(f"{filters}[0].in_values[0]", lambda text: filtered(in_values=[text])),
        *_texts(f"{filters}[0].not_in_values[0]", lambda text: filtered(not_in_values=[text])),
        (filtered(in_values=["x"] * 1001), limit, f"{filters}[0].in_values"),
        (filtered(exists=False, in_values=["x"]), invalid, f"{filters}[0].exists"),
        (filtered(times=2), twice, f"{filters}[1].name"),
        (filtered(times=33), limit, filters),
        (grouped([]), required, f"{keys}[0].properties"),
        *_names(f"{keys}[0].properties[1]", lambda text: grouped(["a", text]), 128),
        (grouped([str(i) for i in range(11)]), limit, f"{keys}[0].properties"),
        (grouped(*[[str(i)] for i in range(11)]), limit, keys),
        (grouped(["a", "a"]), twice, f"{keys}[0].properties"),
        (grouped(["a", "b"], ["b", "a"]), twice, f"{keys}[1]"),
        (metric(custom_fields={str(i): "" for i in range(65)}), limit, "billable_metric.custom_fields"),
        *_texts("billable_metric.custom_fields.k", lambda text: metric(custom_fields={"k": text})),
        (metric(custom_fields={"\0": ""}), invalid, "billable_metric.custom_fields key"),
        *_uuids("id", lambda text: metric_call("GetBillableMetric", id=text)),
        *_uuids("id", lambda text: metric_call("ArchiveBillableMetric", id=text)),
        (metric_call("GetBillableMetric"), required, "id"),
        (metric_call("ArchiveBillableMetric"), required, "id"),
        (metric_call("ListBillableMetrics", page_size=-1), invalid, "page_size"),
        (renamed(), required, "billable_metric.id"),
        *_uuids("billable_metric.id", lambda text: renamed(billable_metric=metric_of(id=text, name="x"))),
        *_names("billable_metric.name", lambda text: renamed(billable_metric=metric_of(name=text)), 160),
        (renamed(billable_metric=metric_of(name="x"), update_mask=FieldMask(paths=["key"])), invalid, "update_mask"),
        (renamed(billable_metric=metric_of(name="x"), update_mask=FieldMask(paths=["\0"])), invalid, "update_mask"),
        # Customers
        (lambda c: c.customers.CreateCustomer(customer_pb2.CreateCustomerRequest()), required, "customer.name"),
        *_names("customer.name", lambda text: customer(name=text), 160),
        *_names("customer.buyer_id", lambda text: customer(buyer_id=text), 36)[1:],
        *_uuids("customer.id", lambda text: customer(id=text)),
        *_names("customer.ingest_aliases[1]", lambda text: customer(ingest_aliases=["a", text]), 128),
        (customer(ingest_aliases=["a", "b", "a"]), twice, "customer.ingest_aliases[2]"),
        (customer(ingest_aliases=[UNKNOWN, UNKNOWN.upper()]), twice, "customer.ingest_aliases[1]"),
        (customer(ingest_aliases=[str(i) for i in range(2001)]), limit, "customer.ingest_aliases"),
        (customer(custom_fields={str(i): "" for i in range(65)}), limit, "customer.custom_fields"),
        *_texts("customer.custom_fields.k", lambda text: customer(custom_fields={"k": text})),
        *_names("customer.custom_fields key", lambda text: customer(custom_fields={text: ""}), 128),
        (customer(billing_period={}), required, "customer.billing_period.frequency"),
        *_names("customer_key", lambda text: customer_call("ListCustomers", customer_key=text), 128)[1:],
        (customer_call("ListCustomers", page_size=-5), invalid, "page_size"),
        *(
            fault
            for method in ("GetCustomer", "ArchiveCustomer", "SetIngestAliases", "SetBillingPeriod")
            for fault in (
                *_uuids("id", lambda text, method=method: customer_call(method, id=text)),
                (customer_call(method), required, "id"),
            )
        ),
        *_names(
            "ingest_aliases[0]", lambda text: customer_call("SetIngestAliases", id=UNKNOWN, ingest_aliases=[text]), 128
        ),
        (updated(), required, "update_mask"),
        (updated(id=""), required, "customer.id"),
        *_uuids("customer.id", lambda text: updated(id=text, name="x")),
        (updated("name"), required, "customer.name"),
        (updated("buyer_id"), required, "customer.buyer_id"),
        *_names("customer.name", lambda text: updated(name=text), 160)[1:],
        *_names("customer.buyer_id", lambda text: updated(buyer_id=text), 36)[1:],
        *_texts("customer.custom_fields.k", lambda text: updated(custom_fields={"k": text})),
        (updated("id", name="x"), invalid, "update_mask"),
        (updated("*", name="x"), invalid, "update_mask"),
        (updated("", name="x"), invalid, "update_mask"),
        (updated("ingest_aliases", name="x"), invalid, "update_mask"),
        (period(frequency=0), required, "billing_period.frequency"),
        (period(frequency=9), invalid, "billing_period.frequency"),
        *(
            (period(**{field: text}), reason, f"billing_period.{field}")
            for field in ("anchor_date", "starting_on", "ending_before")
            for text, reason in (
                ("", required), ("x", invalid), ("2026-02-29", invalid), ("2026-1-1", invalid), ("20260101", invalid),
                ("2026-W01-1", invalid), ("1899-12-31", invalid), ("9001-01-01", invalid), ("\0", invalid),
                ("2026-01-01T00:00:00Z", invalid), ("2026-01-0\uff11", invalid), ("x" * 100_000, invalid),
                (" 2026-01-1", invalid), ("2026-01-1 ", invalid), ("2026/01/01", invalid), ("+026-01-01", invalid),
            )
        ),
        (period(ending_before="2026-01-01"), invalid, "billing_period.ending_before"),
        (period(ending_before="2025-01-01"), invalid, "billing_period.ending_before"),
        # Usage
        (lambda c: c.usage.ListUsage(usage_pb2.ListUsageRequest()), required, "window_size"),
        (usage(window_size=9), invalid, "window_size"),
        (usage(window_size=-1), invalid, "window_size"),
        (usage(starting_on=None), required, "starting_on"),
        (usage(ending_before=None), required, "ending_before"),
        *(
            (usage(**{field: Timestamp(seconds=seconds, nanos=nanos)}), "WINDOW_RANGE", field)
            for field in ("starting_on", "ending_before")
            for seconds, nanos in ((2**62, 0), (-(2**62), 0), (253402300800, 0), (-62135596801, 0), (0, -1), (0, 10**9))
        ),
        (usage(ending_before=timestamp(START - timedelta(hours=1))), "WINDOW_RANGE", "ending_before"),
        (usage(ending_before=timestamp(END + timedelta(microseconds=1))), "WINDOW_MISALIGNED", "ending_before"),
        *(
            (usage(window_size=size, time_zone=zone), "TIME_ZONE_INVALID", "time_zone")
            for size, zones in (
                ("WINDOW_SIZE_DAY", (
                    "Mars/X", "../etc/passwd", "/etc/passwd", "..", ".", "/", "Europe/", "Europe", "europe/berlin", " ",
                    "UTC ", "\0", "UTC\0", "tzdata.zi", "__init__.py", "Asia/../UTC", "C:\\x", "x" * 100_000, "+05:30",
                    "UTC+1", "' OR 1=1", WIDE,
                )),
                ("WINDOW_SIZE_NONE", ("Mars/X", "../etc/passwd")),
                ("WINDOW_SIZE_HOUR", ("UTC", "Mars/X", "Asia/Kolkata")),
            )
            for zone in zones
        ),
        *_uuids("customer_ids[1]", lambda text: usage(customer_ids=[UNKNOWN, text])),
        *_uuids("billable_metrics[0].id", lambda text: usage(billable_metrics=[selector(text)])),
        (usage(customer_ids=[""]), required, "customer_ids[0]"),
        (usage(billable_metrics=[selector("")]), required, "billable_metrics[0].id"),
        (usage(customer_ids=[UNKNOWN, UNKNOWN.upper()]), twice, "customer_ids[1]"),
        (usage(customer_ids=[str(uuid.UUID(int=i)) for i in range(1001)]), limit, "customer_ids"),
        (usage(billable_metrics=[selector(str(uuid.UUID(int=i))) for i in range(1001)]), limit, "billable_metrics"),
        (usage(billable_metrics=[selector(values=["x"])]), required, f"{group_by}.key"),
        *_names(f"{group_by}.key", lambda text: usage(billable_metrics=[selector(key=text, values=["x"])]), 128),
        *_texts(f"{group_by}.values[1]", lambda text: usage(billable_metrics=[selector(key="k", values=["", text])])),
        (usage(billable_metrics=[selector(key="k", values=["a", "a"])]), twice, f"{group_by}.values[1]"),
        (usage(billable_metrics=[selector(key="k", values=[str(i) for i in range(201)])]), limit, f"{group_by}.values"),
        (usage(page_size=-1), invalid, "page_size"),
        *(
            (usage(billable_metrics=[selector(M, key=key)]), "GROUP_KEY_NOT_DECLARED", f"{group_by}.key")
            for key in ("x", "'; DROP TABLE x;--", "region'", "region ", "Region", "*", "properties->>'region'", WIDE)
        ),
        *((make(page_token=token), "PAGE_TOKEN_INVALID", "page_token")
          for token in ("x", "\0", "AAAA", "A" * 4096, "=" * 10, WIDE, "x" * 1_000_000, "../", "' OR 1=1--")
          for make in (unmatched, usage, lambda **f: customer_call("ListCustomers", **f),
                       lambda **f: metric_call("ListBillableMetrics", **f))),
    ]  # fmt: skip


async def test_bad_requests_are_refused_with_reason_and_path(filled: Client) -> None:
    """Each bad request is INVALID_ARGUMENT with its reason and path, nothing leaks, and the server serves on."""
    wrong = []
    for number, (call, reason, path) in enumerate(_bad_requests()):
        fault = await fault_of(call(filled))
        if fault.brief != (IA, reason, path):
            wrong.append((number, (reason, path), fault))
        assert fault.trailers_size < TRAILERS_MAX
        assert len(fault.text.encode()) <= 1024
    assert wrong == []
    assert list((await filled.ingest(event())).verdicts) == [event_pb2.VERDICT_ACCEPTED]
    assert len((await customer_call("ListCustomers")(filled)).customers) == 1
    metrics = (await metric_call("ListBillableMetrics")(filled)).billable_metrics
    assert len([one for one in metrics if not one.record_key]) == 1


async def test_all_faults_of_a_request_are_listed(client: Client) -> None:
    """A request is told every fault at once, in the order of its fields."""
    fault = await fault_of(
        usage(
            window_size=9, starting_on=None, ending_before=None, customer_ids=["x"], billable_metrics=[selector("y")]
        )(client)
    )
    assert fault.fields == ("window_size", "starting_on", "ending_before", "customer_ids[0]", "billable_metrics[0].id")
    assert fault.metadata == {"field": "window_size", "violations": "5"}
    assert "(and 4 more)" in fault.text


async def test_sizes_over_the_maximum_are_cut(filled: Client) -> None:
    """A page size above the maximum is the maximum, 0 the default, and neither is an error."""
    for size in (0, 1001, 2**31 - 1):
        assert (await customer_call("ListCustomers", page_size=size)(filled)).customers
        assert (await unmatched(page_size=size)(filled)).unmatched_customer_keys
        await usage(page_size=size)(filled)


HOSTILE = [
    "'; DROP TABLE x;--", '"', "'", "\\", "%", "%s", "%(x)s", "_", ":name", ":1", "$1", "?", "?|", "{a,b}", "a->>'b'",
    "#>", "@>", "__proto__", "$where", "a.b", "a b", "NULL", "{}", "x'::text", "(a+)+$", "é", WIDE, "\u202e", "E'\\n'",
    "a\\u0000",
]  # fmt: skip


async def test_hostile_names_and_values_are_literal(client: Client) -> None:
    """Property names, filter values, group keys and group values are data: they match themselves and nothing else."""
    owner = await client.create_customer(ingest_aliases=["acme"])
    types = [await client.create_metric(event_type_filter={"in_values": HOSTILE}, id=M)]
    for number, text in enumerate(HOSTILE):
        types.append(
            await client.create_metric(
                name=text,
                key=text,
                aggregation_type="AGGREGATION_TYPE_SUM",
                aggregation_key=text,
                property_filters=[
                    {"name": text, "exists": True},
                    {"name": f"{text}2", "in_values": [text], "not_in_values": [f"{text}2"]},
                ],
                group_keys=[{"properties": [f"{text}2"]}],
                custom_fields={text: text},
                id=f"00000000-0000-4000-8000-0000000001{number:02}",
            )
        )
        assert (types[-1].key, types[-1].custom_fields[text]) == (text, text)
    events = [event(event_type=text, properties={text: 7, f"{text}2": text}) for text in HOSTILE]
    decoys = [event(event_type=f"x{text}", properties={f"x{text}": 1, f"{text}2": "other"}) for text in HOSTILE]
    answer = await client.ingest(*events, *decoys)
    assert set(answer.verdicts) == {event_pb2.VERDICT_ACCEPTED}
    for one, text in zip(types[1:], HOSTILE, strict=True):
        request = usage(
            window_size="WINDOW_SIZE_DAY",
            customer_ids=[owner.id],
            billable_metrics=[selector(one.id, key=f"{text}2", values=[text, "other", "x' OR '1'='1"])],
        )
        (window,) = (await request(client)).windows
        assert (window.value, window.skipped_count) == ("7", 0)
        assert {name: group.value if group.HasField("value") else None for name, group in window.groups.items()} == {
            text: "7",
            "other": None,
            "x' OR '1'='1": None,
        }
        (window,) = (
            await usage(window_size="WINDOW_SIZE_DAY", billable_metrics=[selector(one.id, key=f"{text}2")])(client)
        ).windows
        assert dict(window.groups) == {text: usage_pb2.GroupValue(value="7")}
    (window,) = (await usage(window_size="WINDOW_SIZE_DAY", billable_metrics=[selector(M)])(client)).windows
    assert window.value == str(len(HOSTILE))
    # The same when the metrics are counted from what is stored.
    late = await client.create_metric(
        aggregation_type="AGGREGATION_TYPE_SUM",
        aggregation_key=HOSTILE[0],
        property_filters=[{"name": HOSTILE[0], "in_values": ["7"]}],
    )
    (window,) = (await usage(window_size="WINDOW_SIZE_DAY", billable_metrics=[selector(late.id)])(client)).windows
    assert window.value == "7"


async def test_hostile_customers_round_trip(client: Client) -> None:
    """Names, buyer ids, aliases and notes come back as they were sent, and find their customer."""
    for text in HOSTILE:
        sent = {"name": text, "buyer_id": text, "ingest_aliases": [text], "custom_fields": {text: text}}
        made = await client.create_customer(**sent)
        listed = await customer_call("ListCustomers", customer_key=text)(client)
        assert list(listed.customers) == [made]
        assert (made.name, made.buyer_id, list(made.ingest_aliases), dict(made.custom_fields)) == (
            text,
            text,
            [text],
            {text: text},
        )


@contextlib.asynccontextmanager
async def _still_serving(client: Client) -> AsyncIterator[None]:
    yield
    assert list((await client.ingest(event())).verdicts) == [event_pb2.VERDICT_ACCEPTED]


async def test_random_bytes_never_break_the_server(client: Client) -> None:
    """Mutated requests of every method get a documented code, never UNKNOWN or INTERNAL."""
    import random

    generator = random.Random(20261122)
    sound = {
        "EventService/IngestEvents": event_pb2.IngestEventsRequest(
            events=[event("e", properties={"a": [1, {"b": "c"}]})]
        ),
        "UsageService/ListUsage": usage_pb2.ListUsageRequest(
            window_size="WINDOW_SIZE_DAY",
            starting_on=timestamp(START),
            ending_before=timestamp(END),
            time_zone="Asia/Kolkata",
        ),
        "CustomerService/CreateCustomer": customer_pb2.CreateCustomerRequest(
            customer=customer_pb2.Customer(
                name="x", ingest_aliases=["a"], billing_period={"frequency": 1, "anchor_date": "2026-01-01"}
            )
        ),
        "BillableMetricService/CreateBillableMetric": billable_metric_pb2.CreateBillableMetricRequest(
            billable_metric=billable_metric_pb2.BillableMetric(
                name="x", aggregation_type=2, aggregation_key="n", property_filters=[{"name": "p", "in_values": ["v"]}]
            )
        ),
    }
    codes: set[str] = set()

    async def send(method: str, raw: bytes) -> None:
        try:
            await client.channel.unary_unary(f"/metering.v1.{method}")(raw)
        except grpc.aio.AioRpcError as error:
            codes.add(read_fault(error).code)

    for method, message in sound.items():
        whole = message.SerializeToString()
        mutants = []
        for _ in range(250):
            raw = bytearray(whole)
            for _ in range(generator.randint(1, 4)):
                raw[generator.randrange(len(raw))] = generator.randrange(256)
            mutants.append(bytes(raw[: generator.randint(1, len(raw))] if generator.random() < 0.2 else raw))
        async with _still_serving(client):
            await asyncio.gather(*(send(method, raw) for raw in mutants))
    assert codes <= {IA, NF, AE}, codes
    assert IA in codes
