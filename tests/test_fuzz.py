"""No request breaks the server: whatever is sent to any RPC, the answer is documented, what is refused changes
nothing, nothing leaks, and the next call is answered.

Every RPC of every service is fuzzed as its descriptors say, so a new one is too. A minute by default, spread evenly;
`pytest -m fuzz -n 0 --minutes 15` takes its time.
"""

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import asyncpg
import grpc
import pytest
import sqlalchemy as sa
from conftest import Client, running_server
from faults import read_fault, until
from fuzzing import CANARY, NOW_S, Known, Method, Request, methods, requests
from google.api.httpbody_pb2 import HttpBody
from google.protobuf import json_format
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, Phase, given, seed, settings
from marketplace import roll_up
from structlog.testing import capture_logs

import service.rpc.compat.bodies
import service.verify
from metering.v1 import customer_pb2, error_reason_pb2, event_pb2, usage_record_report_pb2
from service.database import Database
from service.server import COMPAT_SERVICES, SERVICES
from service.store.tables import METADATA
from service.verify import Finding, verify_cells

METHODS = methods((*SERVICES, *COMPAT_SERVICES))
EXAMPLES = 25  # between two choices of the RPC
DEADLINE_S = 20.0
RESPONSES_MAX = 40
# A database is used up by rows, or by RPCs that wrote: what is archived or deleted stays so.
ROWS_MAX = 6_000
TURNS_MAX = 30
TRAILERS_MAX = 8 * 1024
CALLS_BETWEEN_CHECKS = 10
# Of a caller who is alone and patient, with a database that answers.
CODES = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "PERMISSION_DENIED"}
# Of these methods it is said that they change nothing.
READS = re.compile(r"Get|List|Search|BatchValidate|StreamUsage")
REASONS = set(error_reason_pb2.ErrorReason.keys())
LEAK = re.compile(rb'sqlalchemy|asyncpg|Traceback|INSERT |SELECT |/usr/|site-packages|File "')


def _at(hours: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOW_S + hours * 3600))


def _id(number: int) -> str:
    return str(uuid.UUID(int=number + 0x4000_8000_0000_0000_0000))


def _event(number: int, **properties: Any) -> dict[str, Any]:
    return {
        "transaction_id": f"tx-{number}",
        "customer_id": "acme" if number % 3 else _id(2),
        "event_type": "call",
        "timestamp": _at(-number * 7),
        "properties": {"q": number, "g": "eu" if number % 2 else "us", "h": "a", "note": CANARY, **properties},
    }


AWS, DAY = {"partner": "PARTNER_AWS"}, {"starting_on": _at(-720), "ending_before": _at(24)}
WINDOWS = {**DAY, "window_size": "WINDOW_SIZE_HOUR"}
GROUPED = {"customer_id": _id(1), "billable_metric_id": _id(12), "group_key": ["g"], **WINDOWS}
WHOLE = {"starting_on": _at(-48)[:10] + "T00:00:00Z", "ending_before": _at(0)[:10] + "T00:00:00Z", "window_size": "DAY"}
RECORDS = {"entitlement_id": "ent-1", "records": {"cpu": "1.5", "mem": "2"}}
SUGER_GROUP = {"entitlementID": "ent-1", "records": {"cpu": 1.5, "mem": "2"}, "timestamp": _at(-1)}
DIMENSIONS = [{"key": "cpu", "name": "CPU"}, {"key": "mem", "name": "Memory"}]
V1 = "metering.v1."
METRONOME, SUGER = "compat.metronome.v1.", "compat.suger.v1."

# What makes the server worth fuzzing: calls that are answered OK, and that requests are made from. A body is JSON.
SEEDS: Sequence[tuple[str, dict[str, Any]]] = (
    *(
        (f"{V1}CustomerService/CreateCustomer", {"customer": {"id": _id(i), "name": f"Customer {i}", **more}})
        for i, more in (
            (1, {"buyer_id": "buyer-1", "ingest_aliases": ["acme", "acme-2"], "custom_fields": {"a": "b"}}),
            (2, {"buyer_id": "buyer-2"}),
            (3, {"billing_period": {"frequency": 1, "anchor_date": "2026-01-31", "starting_on": "2026-01-31"}}),
        )
    ),
    *(
        (
            f"{V1}BillableMetricService/CreateBillableMetric",
            {
                "billable_metric": {
                    "id": _id(10 + i),
                    "name": f"Metric {i}",
                    "key": f"metric-{i}",
                    "aggregation_type": i,
                    "aggregation_key": "" if i == 1 else "q",
                    "group_keys": [{"properties": ["g"]}, {"properties": ["g", "h"]}],
                    **more,
                }
            },
        )
        for i, more in (
            (1, {"event_type_filter": {"in_values": ["call"]}, "custom_fields": {"a": "b"}}),
            (2, {"property_filters": [{"name": "q", "exists": True}, {"name": "h", "in_values": ["a", "b"]}]}),
            (3, {}),
            (4, {}),
            (5, {}),
            (6, {"event_type_filter": {"not_in_values": ["other"]}}),
            (7, {"property_filters": [{"name": "g", "exists": True, "not_in_values": ["us"]}]}),
        )
    ),
    *(
        (
            f"{V1}EntitlementService/CreateProduct",
            {"product": {"id": f"product-{i}", "name": "Product", "partner": i, "dimensions": DIMENSIONS}},
        )
        for i in (1, 2)
    ),
    *(
        (
            f"{V1}EntitlementService/CreateEntitlement",
            {
                "entitlement": {
                    "id": f"ent-{i}",
                    "name": "Entitlement",
                    "product_id": f"product-{i}",
                    "buyer_id": f"buyer-{i}",
                    "starting_on": _at(-720),
                    "dimensions": [*DIMENSIONS, {"key": "gpu", "name": "GPU"}],
                    "billable_metric_keys": ["metric-1", "metric-7"],
                }
            },
        )
        for i in (1, 2)
    ),
    (f"{V1}EventService/IngestEvents", {"events": [_event(i) for i in range(12)]}),
    (
        f"{V1}EventService/IngestEvents",
        {
            "events": [_event(20, q="2.50"), {**_event(21), "customer_id": "nobody"}, _event(22), _event(23)],
            "all_or_nothing": True,
        },
    ),
    (f"{V1}EventService/StreamEvents", {"sequence": 1, "events": [_event(30, q="x"), _event(31, q=None)]}),
    (f"{V1}UsageRecordGroupService/BatchValidateUsageRecordGroups", {"groups": [{"id": "group-0", **RECORDS}]}),
    (
        f"{V1}UsageRecordGroupService/ReportUsageRecordGroups",
        {"groups": [{"id": "group-1", **RECORDS, "timestamp": _at(-1)}, {"id": "group-2", **RECORDS}]},
    ),
    (
        f"{V1}UsageRecordGroupService/ReportUsageRecordGroups",
        {
            "groups": [
                {
                    "id": "group-3",
                    "entitlement_id": "ent-1",
                    "records": {"cpu": "3"},
                    "meta_info": {
                        "source": "USAGE_RECORD_GROUP_SOURCE_LAGO",
                        "lago_amount": "12.50",
                        "origin_records": {"cpu": "3"},
                        "stripe_period_end_time": _at(-5),
                        "usage_allocations": {
                            "cpu": {"allocations": [{"quantity": "3", "tags": [{"key": "team", "value": "a"}]}]}
                        },
                    },
                },
                {
                    "id": "group-4",
                    "entitlement_id": "ent-2",
                    "billable_records": [{"key": "metric-7", "quantity": "2", "properties": {"g": CANARY}}],
                },
            ]
        },
    ),
    # Reports are made here, out of all groups so far.
    (f"{V1}UsageRecordReportService/LeaseUsageRecordReports", {"lease_token": "lease-1", "max_reports": 5}),
    (
        f"{V1}UsageRecordReportService/CompleteUsageRecordReport",
        {"lease_token": "lease-1"},  # a report of ent-1, of whose records each failed
    ),
    (f"{V1}UsageRecordGroupService/ReportUsageRecordGroups", {"groups": [{"id": "group-5", **RECORDS}]}),
    (f"{V1}UsageRecordReportService/ListUsageRecordReports", {**AWS, "entitlement_id": "ent-1"}),
    (f"{V1}EventService/SearchEvents", {"transaction_ids": ["tx-1", "tx-2"]}),
    (f"{V1}EventService/SearchEvents", {"customer_id": _id(1), "event_type": "call", **DAY, "page_size": 2}),
    (f"{V1}EventService/ListUnmatchedCustomerKeys", {"page_size": 1}),
    *((f"{V1}BillableMetricService/GetBillableMetric", {"id": _id(i)}) for i in (11, 12)),
    (f"{V1}BillableMetricService/ListBillableMetrics", {"page_size": 2}),
    (
        f"{V1}BillableMetricService/UpdateBillableMetric",
        {"billable_metric": {"id": _id(13), "name": "Renamed"}, "update_mask": "name"},
    ),
    (f"{V1}BillableMetricService/ArchiveBillableMetric", {"id": _id(14)}),
    (f"{V1}CustomerService/GetCustomer", {"id": _id(1)}),
    (f"{V1}CustomerService/ListCustomers", {"page_size": 2, "include_archived": True}),
    (f"{V1}CustomerService/SetIngestAliases", {"id": _id(2), "ingest_aliases": ["globex"]}),
    (
        f"{V1}CustomerService/SetBillingPeriod",
        {"id": _id(1), "billing_period": {"frequency": 4, "anchor_date": "2026-01-31", "starting_on": "2026-01-31"}},
    ),
    (
        f"{V1}CustomerService/UpdateCustomer",
        {"customer": {"id": _id(2), "name": "Globex", "custom_fields": {"a": "c"}}, "update_mask": "name,customFields"},
    ),
    (f"{V1}CustomerService/ArchiveCustomer", {"id": _id(3)}),
    (f"{V1}EntitlementService/GetProduct", {"id": "product-1"}),
    (f"{V1}EntitlementService/ListProducts", {"page_size": 1}),
    (
        f"{V1}EntitlementService/UpdateProduct",
        {"product": {"id": "product-2", "name": "Other", "dimensions": DIMENSIONS}, "update_mask": "name,dimensions"},
    ),
    (f"{V1}EntitlementService/GetEntitlement", {"id": "ent-1"}),
    (f"{V1}EntitlementService/ListEntitlements", {"page_size": 1, "product_id": "product-1"}),
    (
        f"{V1}EntitlementService/UpdateEntitlement",
        {"entitlement": {"id": "ent-2", "name": "Other", "status": 6}, "update_mask": "name,status"},
    ),
    (f"{V1}UsageService/ListUsage", {**WINDOWS, "page_size": 3, "billable_metrics": [{"id": _id(12)}]}),
    (
        f"{V1}UsageService/ListUsage",
        {
            **WHOLE,
            "window_size": "WINDOW_SIZE_DAY",
            "time_zone": "UTC",
            "customer_ids": [_id(1)],
            "billable_metrics": [{"id": _id(12), "group_by": {"key": "g", "values": ["eu"]}}],
            "updated_since": _at(-1),
        },
    ),
    (f"{V1}UsageService/ListUsageWithGroups", {**GROUPED, "page_size": 2}),
    (
        f"{V1}UsageService/ListUsageWithGroups",
        {**GROUPED, "group_key": ["g", "h"], "group_filters": {"g": {"values": ["eu"]}}, "omit_empty_windows": True},
    ),
    (f"{V1}UsageService/StreamUsage", {**WINDOWS, "omit_empty_windows": True}),
    (f"{V1}UsageService/StreamUsageWithGroups", {**GROUPED, "omit_empty_windows": True}),
    (f"{V1}UsageRecordGroupService/ListUsageRecordGroups", {"page_size": 1, "entitlement_id": "ent-1"}),
    (f"{V1}UsageRecordGroupService/ListUsageRecordGroups", {"meta_info": "source=LAGO", "skip": 1}),
    *((f"{V1}UsageRecordGroupService/GetUsageRecordGroup", {"id": f"group-{i}"}) for i in (1, 3)),
    (f"{V1}UsageRecordGroupService/RetryUsageRecordGroup", {"id": "group-1"}),
    (f"{V1}UsageRecordGroupService/DeleteUsageRecordGroup", {"id": "group-5"}),
    (f"{METRONOME}UsageService/IngestEvents", {"body": [_event(40), _event(41, q=1.5)]}),
    (f"{METRONOME}UsageService/ListUsage", {"body": {**WHOLE, "customer_ids": [_id(1)]}}),
    (
        f"{METRONOME}UsageService/ListUsage",
        {"body": {**WHOLE, "billable_metrics": [{"id": _id(12), "group_by": {"key": "g"}}]}},
    ),
    (
        f"{METRONOME}UsageService/ListUsageWithGroups",
        {
            "limit": 2,
            "body": {
                **WHOLE,
                "customer_id": _id(1),
                "billable_metric_id": _id(12),
                "group_key": ["g"],
                "group_filters": {"g": ["eu"]},
            },
        },
    ),
    (f"{METRONOME}UsageService/SearchEvents", {"body": {"transactionIds": ["tx-1", "tx-30"]}}),
    (
        f"{METRONOME}BillableMetricService/CreateBillableMetric",
        {
            "body": {
                "name": "Theirs",
                "aggregation_type": "SUM",
                "aggregation_key": "q",
                "event_type_filter": {"in_values": ["call"]},
                "property_filters": [{"name": "g", "exists": True, "in_values": ["eu"]}],
                "group_keys": [["g", "h"]],
                "custom_fields": {"a": "b"},
            }
        },
    ),
    (f"{METRONOME}BillableMetricService/GetBillableMetric", {"billable_metric_id": _id(11)}),
    (f"{METRONOME}BillableMetricService/ListBillableMetrics", {"limit": 2}),
    (f"{METRONOME}BillableMetricService/UpdateBillableMetric", {"billable_metric_id": _id(11), "body": {"name": "N"}}),
    (f"{METRONOME}BillableMetricService/ArchiveBillableMetric", {"body": {"id": _id(15)}}),
    (f"{METRONOME}BillableMetricService/ListCustomerBillableMetrics", {"customer_id": _id(1), "limit": 2}),
    (
        f"{METRONOME}CustomerService/CreateCustomer",
        {"body": {"name": "Theirs", "external_id": "theirs", "custom_fields": {"a": "b"}}},
    ),
    (f"{METRONOME}CustomerService/GetCustomer", {"customer_id": _id(1)}),
    (f"{METRONOME}CustomerService/ListCustomers", {"limit": 1, "customer_ids": [f"{_id(1)},{_id(2)}"]}),
    (f"{METRONOME}CustomerService/ListCustomers", {"ingest_alias": "acme"}),
    (f"{METRONOME}CustomerService/SetIngestAliases", {"customer_id": _id(2), "body": {"ingest_aliases": ["g"]}}),
    (f"{METRONOME}CustomerService/SetName", {"customer_id": _id(2), "body": {"name": "Globex"}}),
    (
        f"{SUGER}UsageRecordGroupService/BatchValidateUsageRecordGroups",
        {"org_id": "default", "body": [{"id": "their-0", **SUGER_GROUP}]},
    ),
    (
        f"{SUGER}UsageRecordGroupService/BatchCreateUsageRecordGroups",
        {
            "org_id": "default",
            "body": [
                {"id": "their-1", "organizationID": "default", **SUGER_GROUP},
                {
                    "id": "their-2",
                    "entitlementID": "ent-1",
                    "billableRecords": [{"key": "metric-7", "quantity": 2, "properties": {"g": "eu"}}],
                    "metaInfo": {"source": "LAGO", "lagoAmount": 12.5, "lagoSubscriptionID": "s"},
                },
            ],
        },
    ),
    (
        f"{SUGER}UsageRecordGroupService/ReportUsageRecordGroup",
        {
            "org_id": "default",
            "entitlement_id": "ent-1",
            "body": {
                "id": "their-3",
                "records": {"cpu": 1},
                "usageAllocations": {"cpu": [{"quantity": 1, "tags": [{"key": "team", "value": "a"}]}]},
            },
        },
    ),
    (f"{SUGER}UsageRecordGroupService/ListUsageRecordGroups", {"org_id": "default", "limit": 2, "meta_info": "{}"}),
    (
        f"{SUGER}UsageRecordGroupService/RetryUsageRecordGroup",
        {"org_id": "default", "usage_record_group_id": "group-2"},
    ),
    (
        f"{SUGER}UsageRecordGroupService/DeleteUsageRecordGroup",
        {"org_id": "default", "usage_record_group_id": "their-3"},
    ),
    (f"{SUGER}UsageRecordReportService/ListUsageRecordReports", {"org_id": "default", "limit": 1}),
    (
        f"{SUGER}BillableMetricService/CreateBillableMetric",
        {
            "org_id": "default",
            "body": {
                "id": "their-metric",
                "name": "Their metric",
                "description": "What it is",
                "aggregationType": "UNIQUE_COUNT",
                "info": {
                    "propertyUniqueOn": "q",
                    "groupBys": ["g"],
                    "filterGroups": [{"filters": [{"name": "h", "operation": "IS", "value": {"value": ["a", 1]}}]}],
                },
            },
        },
    ),
    (f"{SUGER}BillableMetricService/ListBillableMetrics", {"org_id": "default", "status": "ACTIVE"}),
    (f"{SUGER}BillableMetricService/GetBillableMetric", {"org_id": "default", "billable_metric_id": "metric-1"}),
    (
        f"{SUGER}BillableMetricService/UpdateBillableMetric",
        {
            "org_id": "default",
            "billable_metric_id": "metric-6",
            "body": {"name": "Changed", "description": "d", "status": "DELETED"},
        },
    ),
    (f"{SUGER}EntitlementService/GetEntitlement", {"org_id": "default", "entitlement_id": "ent-1"}),
    (f"{SUGER}EntitlementService/ListEntitlements", {"org_id": "default", "partner": "AWS", "limit": 1}),
)


class Answer:
    """How one call ended."""

    def __init__(self, messages: Sequence[bytes], error: Any) -> None:
        self.messages = messages
        self.error = error

    @property
    def code(self) -> str:
        """The status code."""
        return str(self.error.code().name) if self.error else "OK"


class Records(logging.Handler):
    """What was logged by others than the service, whose own log is `structlog`'s."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line as it would be written."""
        self.entries.append((record.levelno, self.format(record)))


class World:
    """A server that is fuzzed, and what must hold of it. Each database is a copy of one with some of everything."""

    def __init__(self, seeded_url: str, logs: list[MutableMapping[str, Any]], records: Records) -> None:
        self._seeded = sa.make_url(seeded_url)
        self._logs = logs
        self._records = records
        self._stack = AsyncExitStack()
        self._url: sa.URL | None = None
        self._client: Client
        self._tables: asyncpg.Connection
        self._fingerprint: tuple[int, Any] = (-1, None)
        self._channels: dict[bool, grpc.aio.Channel] = {}
        self.is_worn = True
        self.has_failed = False
        self.codes: dict[str, Counter[str]] = {one.path: Counter() for one in METHODS}
        self.reasons: Counter[str] = Counter()
        self.spent = dict.fromkeys(self.codes, 0.0)
        self.databases = 0

    async def renew(self) -> None:
        """Begin with a new copy, unless the last is as good."""
        if not self.is_worn:
            return
        await self.close()
        name = f"fuzz_{self.databases}"
        self.databases += 1
        async with _connected(self._seeded.set(database="postgres")) as connection:
            await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{self._seeded.database}"')
        self._url = self._seeded.set(database=name)
        self._client = await self._stack.enter_async_context(running_server(self._text(self._url)))
        self._tables = await self._stack.enter_async_context(_connected(self._url))
        # Theirs may be larger, as a gateway takes them.
        for is_compat in (False, True):
            options = [("grpc.max_receive_message_length", 64 * 1024 * 1024)] if is_compat else []
            channel = grpc.aio.insecure_channel(self._client.address, options=options)
            self._channels[is_compat] = await self._stack.enter_async_context(channel)
        self._fingerprint = (-1, None)
        self._fingerprint = await self._look()
        self.is_worn = False

    async def close(self) -> None:
        """Check what was stored, and leave nothing behind."""
        if self._url is None:
            return
        wrong: list[Finding] = []
        database = Database(self._text(self._url))
        try:
            if not self.has_failed:
                await verify_cells(database, wrong.append)
        finally:
            await database.close()
            await self._stack.aclose()
            self._stack = AsyncExitStack()
            async with _connected(self._seeded.set(database="postgres")) as connection:
                await connection.execute(f'DROP DATABASE "{self._url.database}" WITH (FORCE)')
            self._url = None
        assert not wrong, [str(one) for one in wrong]

    def told(self) -> str:
        """Say how many calls there were, and how they were answered."""
        total = sum(self.codes.values(), Counter())
        calls = f"fuzzed {len(METHODS)} RPCs by {total.total():,} calls on {self.databases} databases"
        each = (f"{path}: {dict(codes)}" for path, codes in self.codes.items())
        return "\n  ".join((f"{calls}: {dict(total)}", f"{len(self.reasons)} reasons: {dict(self.reasons)}", *each))

    async def check(self, method: Method, request: Request) -> Answer:
        """Make a call; fails if anything about it is not as promised."""
        await self.renew()
        self._logs.clear()
        self._records.entries.clear()
        calls = sum(self.codes[method.path].values())
        try:
            answer = await _call(self._client.address, self._channels[method.is_compat], method, request)
            self.codes[method.path][answer.code] += 1
            self._check_answer(method, answer)
            await self._check_tables(method, answer)
            if calls % CALLS_BETWEEN_CHECKS == 0 or answer.code not in CODES:
                await self._check_life()
            self._check_logs()
        except BaseException:
            self.is_worn = self.has_failed = True
            raise
        return answer

    def _check_answer(self, method: Method, answer: Answer) -> None:
        assert answer.code in CODES, f"{answer.code}: {answer.error.details() if answer.error else ''}"
        for raw in answer.messages:
            assert not LEAK.search(raw)
            message = method.response.FromString(raw)
            body = message if isinstance(message, HttpBody) else getattr(message, "body", None)
            if isinstance(body, HttpBody) and body.data:
                json.loads(body.data, parse_constant=_refuse)
        if answer.error is None:
            return
        fault = read_fault(answer.error)
        assert f"ERROR_REASON_{fault.reason}" in REASONS, fault
        self.reasons[fault.reason] += 1
        assert fault.fields or answer.code != "INVALID_ARGUMENT", fault
        assert fault.trailers_size < TRAILERS_MAX, fault
        for key, value in answer.error.trailing_metadata():
            assert not LEAK.search(value if isinstance(value, bytes) else str(value).encode()), key

    async def _check_tables(self, method: Method, answer: Answer) -> None:
        before = self._fingerprint
        if answer.code == "OK" and not READS.match(method.name):
            await _all_counted(self._tables)
        self._fingerprint = await self._look()
        if self._fingerprint[1] != before[1]:
            rows = sum(one[1] for one in self._fingerprint[1])
            # What failed once is made small and tried again, each time with what was there at first.
            self.is_worn = self.is_worn or self.has_failed or rows > ROWS_MAX
            changed = [one[0] for one, old in zip(self._fingerprint[1], before[1], strict=True) if one != old]
            assert _may_change(method, answer), f"{answer.code}, and yet there is something else in {changed}"

    async def _look(self) -> tuple[int, Any]:
        """Return what tells the contents of all tables from any other."""
        last = await self._tables.fetchval("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
        if last == self._fingerprint[0]:
            return self._fingerprint  # no transaction wrote anything since
        each = (
            f"SELECT '{table}', count(*), coalesce(sum(hashtextextended(one::text, 0)), 0) FROM {table} AS one"  # noqa: S608
            for table in sorted(METADATA.tables)
            if not METADATA.tables[table].info.get("temporary") and "incoming" not in table
        )
        return last, [tuple(row) for row in await self._tables.fetch(" UNION ALL ".join(each))]

    async def _check_life(self) -> None:
        health = health_pb2_grpc.HealthStub(self._client.channel)
        found = await health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
        assert found.status == health_pb2.HealthCheckResponse.SERVING
        await self._client.customers.ListCustomers(customer_pb2.ListCustomersRequest(page_size=1), timeout=DEADLINE_S)

    def _check_logs(self) -> None:
        errors = [one for one in self._logs if one["log_level"] in {"error", "critical"}]
        errors += [text for level, text in self._records.entries if level >= logging.ERROR]  # type: ignore[misc]
        assert not errors, errors
        assert CANARY not in f"{self._logs}{self._records.entries}"

    def _text(self, url: sa.URL) -> str:
        return url.render_as_string(hide_password=False)


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _may_change(method: Method, answer: Answer) -> bool:
    """Whether a call that was answered so may have changed what is stored."""
    if READS.match(method.name):
        return False
    if answer.error is not None:
        return bool(answer.messages)  # a stream acknowledged what came before
    # An answer in verdicts says itself whether anything was taken.
    verdicts = [one for raw in answer.messages for one in _verdicts(method.response.FromString(raw))]
    return not verdicts or event_pb2.VERDICT_ACCEPTED in verdicts


def _verdicts(message: Message) -> Iterator[int]:
    yield from getattr(message, "verdicts", ())
    for one in getattr(message, "results", ()):
        if hasattr(one, "verdict"):
            yield one.verdict


async def _call(address: str, channel: grpc.aio.Channel, method: Method, request: Request) -> Answer:
    """Send bytes as they are."""
    options = {"timeout": DEADLINE_S, "metadata": request.metadata}
    messages: list[bytes] = []
    if method.many_requests:
        # grpc.aio's client tells of a stream that the server ended early as INTERNAL, now and then: grpc/grpc#36066.
        return await asyncio.to_thread(_converse, address, method, request, options)
    try:
        if not method.many_responses:
            return Answer([await channel.unary_unary(method.path)(request.messages[0], **options)], None)
        call = channel.unary_stream(method.path)(request.messages[0], **options)
        async for message in call:
            messages.append(message)
            if len(messages) == RESPONSES_MAX:
                call.cancel()
                break
    except grpc.aio.AioRpcError as error:
        return Answer(messages, error)
    return Answer(messages, None)


def _converse(address: str, method: Method, request: Request, options: dict[str, Any]) -> Answer:
    messages: list[bytes] = []
    with grpc.insecure_channel(address) as channel:
        try:
            messages.extend(channel.stream_stream(method.path)(iter(request.messages), **options))
        except grpc.RpcError as error:
            return Answer(messages, error)
    return Answer(messages, None)


async def _all_counted(tables: Any) -> None:
    """Wait until the past of new metrics is counted, which is done behind the calls that make them."""
    await until(
        lambda: tables.fetchval("SELECT NOT EXISTS (SELECT FROM billable_metrics WHERE backfilled_until IS NOT NULL)"),
        DEADLINE_S,
    )


@contextlib.asynccontextmanager
async def _connected(url: sa.URL) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        yield connection
    finally:
        await connection.close()


async def _seed(url: str, known: Known) -> None:
    """Fill a database by calls that must be answered OK, and learn from them."""
    by_name = {one.path.removeprefix("/"): one for one in METHODS}
    reported, database = False, Database(url)
    leased = usage_record_report_pb2.LeaseUsageRecordReportsResponse()
    async with running_server(url) as client:
        for name, fields in SEEDS:
            method = by_name[name]
            if "Lease" in name and not reported:
                reported = bool(await roll_up(database))
            if name.endswith("CompleteUsageRecordReport"):
                first = next(one for one in leased.usage_record_reports if one.entitlement_id == "ent-1")
                outcomes = [{"key": one.key, "outcome": 2, "message": "?"} for one in first.records]
                fields = {**fields, "id": first.id, "outcomes": outcomes}  # noqa: PLW2901
            body = fields.get("body")
            others = {key: one for key, one in fields.items() if key != "body"}
            message = json_format.ParseDict(others, method.request())
            if body is not None:
                message.body.content_type, message.body.data = "application/json", json.dumps(body).encode()
            request = Request((message.SerializeToString(),))
            answer = await _call(client.address, client.channel, method, request)
            assert answer.error is None, (name, fields, answer.error)
            known.learn(message)
            known.answered(method.path, request)
            for raw in answer.messages:
                found = method.response.FromString(raw)
                assert set(_verdicts(found)) <= {event_pb2.VERDICT_ACCEPTED}, f"{name}: {found}"
                known.learn(found)
                if isinstance(found, usage_record_report_pb2.LeaseUsageRecordReportsResponse):
                    leased = found
        await _learn_bodies(client, known)
        async with _connected(sa.make_url(url)) as tables:
            await _all_counted(tables)
    await database.close()


async def _learn_bodies(client: Client, known: Known) -> None:
    """Find out what the server reads from each body: it is JSON, of which no descriptor tells."""
    read = service.rpc.compat.bodies._message
    found: set[tuple[Any, bool]] = set()

    def watch(document: Any, kind: Any, path: str) -> Any:
        found.add((kind.DESCRIPTOR, path != ""))
        return read(document, kind, path)

    for method in METHODS:
        field = method.request.DESCRIPTOR.fields_by_name.get("body")
        if field is None or field.message_type is not HttpBody.DESCRIPTOR:
            continue
        found.clear()
        file = method.request.DESCRIPTOR.file
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.rpc.compat.bodies, "_message", watch)
            for data in (b"{}", b"[{}]"):
                request = method.request()
                request.body.content_type, request.body.data = "application/json", data  # type: ignore[attr-defined]
                if "org_id" in method.request.DESCRIPTOR.fields_by_name:
                    request.org_id = "default"  # type: ignore[attr-defined]
                await _call(client.address, client.channel, method, Request((request.SerializeToString(),)))
        known.bodies[method.path] = set(found) or {
            (kind, False) for name, kind in file.message_types_by_name.items() if not name.endswith("Response")
        }


@pytest.fixture
async def world(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[World, Known, Callable[[Awaitable[Any]], Any]]]:
    """A world to fuzz, what is known of it, and how to wait in a test that is not asynchronous itself."""
    known = Known(METHODS)
    await _seed(database_url, known)
    # Events lie between year 1 and tomorrow, few of them.
    monkeypatch.setattr(service.verify, "STRETCH", timedelta(days=1_000_000))
    records = Records()
    with capture_logs() as logs:
        logging.getLogger().addHandler(records)
        made = World(database_url, logs, records)
        try:
            yield made, known, asyncio.get_running_loop().run_until_complete
        finally:
            logging.getLogger().removeHandler(records)
            await made.close()


@pytest.mark.fuzz
def test_no_request_breaks_the_server(
    world: tuple[World, Known, Callable[[Awaitable[Any]], Any]],
    pytestconfig: pytest.Config,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Requests of every RPC, sound, at the edges and broken, keep every promise about answers, tables and logs."""
    fuzzed, known, wait = world
    end = time.monotonic() + 60 * pytestconfig.getoption("minutes")
    chance, turns = Random(), 0
    try:
        while time.monotonic() < end or not all(fuzzed.codes.values()):
            method = min(METHODS, key=lambda one: (fuzzed.spent[one.path], chance.random()))
            began, number = time.monotonic(), chance.randrange(2**32)
            wait(fuzzed.renew())
            _fuzz(fuzzed, known, wait, method, number, tmp_path)
            turns += not READS.match(method.name)
            fuzzed.is_worn = fuzzed.is_worn or turns % TURNS_MAX == 0
            fuzzed.spent[method.path] += time.monotonic() - began
        wait(fuzzed.close())
    finally:
        record_property("summary", fuzzed.told())


def _fuzz(
    fuzzed: World, known: Known, wait: Callable[[Awaitable[Any]], Any], method: Method, number: int, place: Path
) -> None:
    """Send some requests of one RPC; what fails is made small, written to files, and told."""
    answered: list[Request] = []

    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(requests(method, known))
    def attempt(request: Request) -> None:
        if not request.messages and not method.many_requests:
            return
        try:
            answer = wait(fuzzed.check(method, request))
        except Exception as error:
            for i, raw in enumerate(request.messages):
                (place / f"message-{i}").write_bytes(raw)
            text = " ".join(raw.hex() if len(raw) < 2_000 else f"{raw[:500].hex()}…" for raw in request.messages)
            raise AssertionError(
                f"{method.path} seed {number} metadata {dict(request.metadata)}: {error!r}\n"
                f"messages (whole in {place}): {text}"
            ) from error
        if answer.error is None:
            answered.append(request)

    attempt()
    # Not while hypothesis draws: the same choices must give the same request.
    for one in answered[-2:]:
        known.answered(method.path, one)
