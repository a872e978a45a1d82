"""Suger's Python SDK, as it is, against metering behind Envoy: what its calls store, find, refuse and keep apart."""

import asyncio
import itertools
import json
import os
import random
import shutil
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import pytest
import sqlalchemy as sa
from conftest import Client, running_gateway, running_server, timestamp
from marketplace import DIMENSIONS, complete, group, lease, reported, roll_up, sell
from suger_sdk_python import (
    ApiClient,
    BillableMetric,
    Configuration,
    CreateUsageRecordGroupParams,
    EntitlementApi,
    ListUsageRecordGroupsResponse,
    MeteringApi,
    MeteringUsageRecordGroup,
    NewUsageRecordGroup,
    UpdateBillableMetricParams,
)
from suger_sdk_python.exceptions import (
    ApiException,
    BadRequestException,
    ConflictException,
    ForbiddenException,
    NotFoundException,
    UnauthorizedException,
)
from test_examples import Unavailable, build, download, find_python, need, run

from metering.v1 import billable_metric_pb2, customer_pb2, entitlement_pb2, usage_pb2, usage_record_group_pb2
from service.auth import new_api_key
from service.database import Database
from service.domain.roles import Role
from service.domain.windows import cell_floor
from service.store import organizations
from service.store.tables import usage_record_groups

ORG = "org-1"
DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
UNKNOWN = "00000000-0000-4000-8000-00000000dead"


class Suger:
    """Suger's SDK as a program sets it up; its calls block, so each is made in a thread."""

    def __init__(self, base_url: str, key: str | None = "any", prefix: str = "Key", org: str = ORG) -> None:
        auth = {"api_key": {"APIKeyAuth": key}, "api_key_prefix": {"APIKeyAuth": prefix}} if key else {}
        self.base_url, self.org = base_url, org
        self.headers = {"authorization": f"{prefix} {key}"} if key else {}
        self.client = ApiClient(Configuration(host=base_url, **auth))
        self.metering, self.entitlements = MeteringApi(self.client), EntitlementApi(self.client)

    async def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Call an operation of the metering or the entitlement API."""
        method = getattr(self.metering, name, None) or getattr(self.entitlements, name)
        return await asyncio.to_thread(method, self.org, *arguments, **named)

    async def raw(self, method: str, path: str, **named: Any) -> httpx.Response:
        """Send what the SDK would not."""
        async with httpx.AsyncClient(base_url=f"{self.base_url}/org/{self.org}", headers=self.headers) as http:
            return await http.request(method, path, timeout=60, **named)

    async def report(self, entitlement_id: str = "ent", **fields: Any) -> Any:
        """Report one group; its fields go by Suger's names."""
        document = {"organizationID": self.org, "entitlementID": entitlement_id, "records": {}, **fields}
        headers = {"Idempotency-Key": document.pop("key")} if "key" in document else None
        parameters = CreateUsageRecordGroupParams.from_dict(document)
        return await self.call("report_usage_record_group", entitlement_id, parameters, _headers=headers)

    async def page(self, **filters: Any) -> tuple[list[Any], int | None]:
        """One page of groups, and where the next one begins. `productId` is sent past the SDK, which lacks it."""
        if "productId" in filters:
            answer = await self.raw("GET", f"/usageRecordGroup?{urlencode(filters, quote_via=quote)}")
            assert answer.status_code == 200, answer.text
            page = ListUsageRecordGroupsResponse.from_json(answer.text)
        else:
            page = await self.call(
                "list_usage_record_groups", **{PYTHON_NAMES.get(k, k): v for k, v in filters.items()}
            )
        return page.usage_record_groups, page.next_offset

    async def walk(self, limit: int, **filters: Any) -> list[str]:
        """The ids of all groups that pass filters, page by page."""
        found: list[str] = []
        offset: int | None = 0
        while offset is not None:
            page, following = await self.page(limit=limit, offset=offset, **filters)
            assert len(page) <= limit
            assert following in {None, offset + len(page)}
            found += [one.id for one in page]
            offset = following
        return found


PYTHON_NAMES = {
    "buyerId": "buyer_id",
    "entitlementId": "entitlement_id",
    "metaInfo": "meta_info",
    "startDate": "start_date",
    "endDate": "end_date",
}


def new(entitlement_id: str = "ent", **fields: Any) -> NewUsageRecordGroup:
    """A group to validate or to report with others; its fields go by Suger's names."""
    return NewUsageRecordGroup.from_dict({"entitlementID": entitlement_id, "records": {}, **fields})


async def refused(kind: type[ApiException], call: Any) -> str:
    """The message of an error: its body must be a JSON string, which is what Suger's errors are."""
    with pytest.raises(kind) as caught:
        await call
    message = json.loads(caught.value.body)
    assert isinstance(message, str)
    assert message
    return message


async def stored(client: Client) -> list[usage_record_group_pb2.UsageRecordGroup]:
    """All groups that are stored, the oldest first."""
    page = await client.groups.ListUsageRecordGroups(usage_record_group_pb2.ListUsageRecordGroupsRequest())
    return sorted(page.usage_record_groups, key=lambda one: one.serial_id)


async def native(client: Client, group_id: str) -> usage_record_group_pb2.UsageRecordGroup:
    """A group as the service itself shows it."""
    request = usage_record_group_pb2.GetUsageRecordGroupRequest(id=group_id)
    return (await client.groups.GetUsageRecordGroup(request)).group


async def used(client: Client, key: str) -> str | None:
    """The usage of all buyers under the key of a dimension or metric, as the exact decimal it is answered with."""
    request = billable_metric_pb2.ListBillableMetricsRequest()
    metrics = (await client.metrics.ListBillableMetrics(request)).billable_metrics
    ids = [one.id for one in metrics if one.record_key == key]
    if not ids:
        return None
    now = datetime.now(UTC)
    windows = await client.all_usage(
        billable_metrics=[usage_pb2.BillableMetricSelector(id=one) for one in ids],
        window_size=usage_pb2.WINDOW_SIZE_NONE,
        starting_on=timestamp(cell_floor(now - 3 * DAY)),
        ending_before=timestamp(cell_floor(now + DAY)),
    )
    values = [one.value for one in windows if one.HasField("value")]
    assert len(values) <= 1
    return values[0] if values else None


@pytest.fixture
def suger(base_url: str) -> Suger:
    """The SDK against `client`'s server, with whatever key: the server is open."""
    return Suger(base_url)


# --- Lists of groups, against a plain list of what was reported

TODAY = datetime.now(UTC).date()
# Whose: entitlement -> partner, buyer. Its product is p- and its id. The last has no groups.
BOUGHT = {"aws": ("AWS", "b-1"), "aws2": ("AWS", "b-2"), "gcp": ("GCP", "b-2"), "azure": ("AZURE", "b-3")}
# Stored as they are sent: what each group's notes may hold.
NOTES: dict[str, Sequence[Any]] = {
    "lagoAmount": (12.5, 3, 0.1, None),
    "lagoSubscriptionID": ("sub-1", "sub=2", "ü ☃ & +", None),
    "lagoUsageStartTime": ("2026-01-31T00:00:00Z", None),
    "metronomeInvoiceID": ("inv-1", None),
    "metronomeInvoiceCreditBack": (True, None),
    "stripeUsageRecordSummaryTotalUsage": (7, -7, None),
    "erpInvoiceID": ("erp-1", "erp-2", None),
    "source": ("", "API", "INTERNAL", "LAGO", "METRONOME", "ORB", "STRIPE"),
}
FILTERS: dict[str, Callable[[dict[str, Any], Any], bool]] = {
    "partner": lambda one, value: BOUGHT[one["entitlement"]][0] == value,
    "productId": lambda one, value: f"p-{one['entitlement']}" == value,
    "buyerId": lambda one, value: BOUGHT[one["entitlement"]][1] == value,
    "entitlementId": lambda one, value: one["entitlement"] == value,
    "status": lambda one, value: one["status"] == value,
    "source": lambda one, value: one["meta"]["source"] == value,
    "startDate": lambda one, value: one["day"] >= date.fromisoformat(value),
    "endDate": lambda one, value: one["day"] <= date.fromisoformat(value),
    "metaInfo": lambda one, value: holds(one["meta"], value),
}
EXCLUSIVE = ("partner", "productId", "buyerId", "entitlementId")
VALUES: dict[str, Sequence[str]] = {
    "partner": ("AWS", "GCP", "AZURE"),
    "productId": ("p-aws", "p-gcp"),
    "buyerId": ("b-1", "b-2"),
    "entitlementId": ("aws", "aws2", "azure"),
    "status": ("CREATED", "DELETED", "INVALID", "REPORTED", "REPORT_PENDING", "REPORT_FAILED"),
    "source": ("", "API", "INTERNAL", "LAGO", "METRONOME", "ORB", "STRIPE"),
    "startDate": tuple(str(TODAY - n * DAY) for n in (0, 3, 9)),
    "endDate": tuple(str(TODAY - n * DAY) for n in (1, 4, 11)),
    "metaInfo": (
        "lagoAmount=12.5",
        "lagoAmount=3",
        "lagoSubscriptionID=sub-1",
        "lagoSubscriptionID=sub=2",
        "lagoSubscriptionID=ü ☃ & +",
        "lagoUsageStartTime=2026-01-31T00:00:00Z",
        "metronomeInvoiceID=inv-1",
        "metronomeInvoiceCreditBack=true",
        "stripeUsageRecordSummaryTotalUsage=-7",
        "erpInvoiceID=erp-2",
        "source=ORB",
        '{"lagoAmount": 12.5}',
        '{"lagoAmount": 3}',
        '{"lagoAmount": 3.0}',
        '{"lagoAmount": "0.1"}',
        '{"lagoSubscriptionID": "sub-1", "erpInvoiceID": "erp-1"}',
        '{"lagoSubscriptionID": "ü ☃ & +"}',
        '{"stripeUsageRecordSummaryTotalUsage": 7}',
        '{"metronomeInvoiceCreditBack": true, "lagoAmount": 0.1}',
        '{"originRecords": {"cpu": 2}}',
        '{"originRecords": {"cpu": 2.0}, "source": "STRIPE"}',
        '{"originRecords": {"mem": 0.25}}',
        '  {"lagoUsageStartTime": "2026-01-31T00:00:00Z"}',
    ),
}


def holds(meta: Mapping[str, Any], wanted: str) -> bool:
    """Whether notes hold what a metaInfo filter asks for: numbers as numbers, all else as text."""
    if wanted.lstrip().startswith("{"):
        pairs = json.loads(wanted).items()
    else:
        name, _, value = wanted.partition("=")
        pairs = [(name, value)]
    for name, value in pairs:
        own = meta.get(name)
        if isinstance(value, dict):
            if not all(own.get(key) == number for key, number in value.items()):
                return False
        elif own is None or (own != value and json.dumps(own) != value and str(own) != value):
            return False
    return True


async def stock(client: Client) -> None:
    """Make what the groups of the list are reported for."""
    for buyer in sorted({buyer for _, buyer in BOUGHT.values()}):
        await client.create_customer(buyer_id=buyer)
    for name, (partner, buyer) in BOUGHT.items():
        await sell(client, name, partner=partner, buyer_id=buyer)


async def report_many(suger: Suger, database: Database, count: int) -> list[dict[str, Any]]:
    """Report groups of random kinds through the SDK and spread them over the last days; the latest first."""
    chosen = random.Random(count)
    made = []
    for number in range(count):
        meta = {name: chosen.choice(values) for name, values in NOTES.items()}
        records = {"cpu": chosen.choice([1, 2, 2.5]), "mem": 0.25} if number % 3 else {"cpu": 2}
        # Each status and day often enough to be found, together with whatever else.
        one = {
            "id": f"g{number}",
            "entitlement": list(BOUGHT)[number % 4],
            "meta": meta | {"originRecords": records},
            "status": VALUES["status"][number % 6],
            "day": TODAY - chosen.randrange(12) * DAY,
        }
        sent = {name: value for name, value in meta.items() if value is not None}
        answer = await suger.report(one["entitlement"], id=one["id"], records=records, metaInfo=sent)
        one["serial"] = answer.serial_id
        made.append(one)
    async with database.engine.begin() as connection:
        for one in made:
            moment = datetime.combine(one["day"], datetime.min.time(), UTC) + 5 * HOUR
            change = sa.update(usage_record_groups).where(usage_record_groups.c.id == one["id"])
            await connection.execute(change.values(created_at=moment, updated_at=moment, status=one["status"]))
    return sorted(made, key=lambda one: (one["day"], one["serial"]), reverse=True)


def expected(made: list[dict[str, Any]], filters: Mapping[str, str]) -> list[str]:
    """The ids of groups that pass filters, in the order of the list."""
    return [one["id"] for one in made if all(FILTERS[name](one, value) for name, value in filters.items())]


async def test_the_list_finds_what_every_parameter_asks_for(client: Client, suger: Suger, database: Database) -> None:
    """Each parameter alone, each value of it, and combinations: just the groups that plain Python finds, in order."""
    await stock(client)
    made = await report_many(suger, database, 72)
    assert await suger.walk(1000) == expected(made, {})
    for name, values in VALUES.items():
        for value in values:
            wanted = expected(made, {name: value})
            assert 0 < len(wanted) < len(made), f"{name}={value} narrows nothing"
            assert await suger.walk(1000, **{name: value}) == wanted, f"{name}={value}"
    chosen = random.Random(1)
    for _ in range(60):
        names = chosen.sample([name for name in VALUES if name not in EXCLUSIVE], chosen.randint(1, 3))
        names += chosen.sample(EXCLUSIVE, 1)
        filters = {name: chosen.choice(VALUES[name]) for name in names}
        if filters.get("startDate", "") > filters.get("endDate", "9"):
            del filters["startDate"]
        assert await suger.walk(chosen.choice([3, 1000]), **filters) == expected(made, filters), filters


async def test_pages_follow_each_other_to_the_end(client: Client, suger: Suger) -> None:
    """At any limit `nextOffset` is where the next page begins, and there is none once all groups were shown."""
    await sell(client)
    await reported(client, *(group(f"g{number}") for number in range(13)))
    ids = [f"g{number}" for number in reversed(range(13))]
    for limit in (1, 4, 6, 12, 13, 14, 1000):
        pages, offset = [], 0
        while offset is not None:
            page, following = await suger.page(limit=limit, offset=offset)
            pages.append([one.id for one in page])
            if following is not None:
                assert type(following) is int
                assert following == offset + len(page)
            offset = following
        assert pages == [ids[at : at + limit] for at in range(0, 13, limit)], limit
    assert await suger.page(offset=13) == ([], None)
    assert await suger.page(offset=99) == ([], None)
    page, following = await suger.page(offset=11)
    assert ([one.id for one in page], following) == (["g1", "g0"], None)


async def test_without_dates_the_list_is_of_the_last_30_days(client: Client, suger: Suger, database: Database) -> None:
    """From 30 days before the last day to the last day, both whole, the last being today unless it is given."""
    await sell(client)
    await reported(client, *(group(f"d{age}") for age in (0, 29, 30, 31, 45)))
    async with database.engine.begin() as connection:
        for age in (0, 29, 30, 31, 45):
            moment = datetime.combine(TODAY - age * DAY, datetime.min.time(), UTC)
            change = sa.update(usage_record_groups).where(usage_record_groups.c.id == f"d{age}")
            await connection.execute(change.values(created_at=moment, updated_at=moment))
    assert await suger.walk(10) == ["d0", "d29", "d30"]
    assert await suger.walk(10, endDate=str(TODAY)) == ["d0", "d29", "d30"]
    assert await suger.walk(10, startDate=str(TODAY - 100 * DAY)) == ["d0", "d29", "d30", "d31", "d45"]
    assert await suger.walk(10, endDate=str(TODAY - 15 * DAY)) == ["d29", "d30", "d31", "d45"]
    assert await suger.walk(10, endDate=str(TODAY - 14 * DAY)) == ["d29", "d30", "d31"]


async def test_the_list_refuses_what_it_cannot_mean(client: Client, suger: Suger) -> None:
    """Bad values and more than one of the exclusive parameters are 400 with the parameter as the caller named it."""
    await stock(client)
    for one, other in itertools.combinations(EXCLUSIVE, 2):
        both = {one: VALUES[one][0], other: VALUES[other][0]}
        answer = await suger.raw("GET", "/usageRecordGroup", params=both)
        assert answer.status_code == 400, both
        assert isinstance(answer.json(), str)
    wrong: list[tuple[str, Any]] = [
        ("limit", 0), ("limit", 1001), ("limit", -1), ("offset", -1), ("partner", "ALIBABA"), ("status", "GONE"),
        ("source", "nobody"), ("startDate", "2026-02-30"), ("startDate", "yesterday"), ("endDate", "31.12.2026"),
        ("metaInfo", "nonsense"), ("metaInfo", "customer=1"), ("metaInfo", '{"customer": 1}'), ("metaInfo", "{"),
        ("metaInfo", '{"lagoAmount": 1, "lagoAmount": 2}'),
        ("metaInfo", "SkipValidation=maybe"), ("metaInfo", '{"lagoAmount": NaN}'),
    ]  # fmt: skip
    for name, value in wrong:
        message = await refused(BadRequestException, suger.page(**{name: value}))
        assert message.startswith(f"{name}: "), (value, message)
    # What no group can hold is found in none.
    for nothing in (
        '{"billableRecords": 5}',
        '{"originRecords": [1]}',
        '{"lagoAmount": 1e999999999}',
        '{"lagoAmount": []}',
    ):
        assert await suger.page(metaInfo=nothing) == ([], None)
    await refused(BadRequestException, suger.page(startDate="2026-03-02", endDate="2026-03-01"))
    answer = await suger.raw("GET", "/usageRecordGroup", params={"buyerID": "b-1"})
    assert (answer.status_code, answer.json()) == (400, "buyerID: is not a query parameter of this call")


async def test_a_plus_in_a_query_is_a_blank(client: Client, suger: Suger) -> None:
    """As in the queries that Go's SDK and most HTTP clients write: there `+` is a blank, and `%2B` is a plus."""
    await sell(client)
    await suger.report(id="g", records={"cpu": 1}, metaInfo={"lagoSubscriptionID": "a + b"})
    for query in ("a+%2B+b", "a%20%2B%20b"):
        answer = await suger.raw("GET", f"/usageRecordGroup?metaInfo=lagoSubscriptionID%3D{query}")
        assert [one["id"] for one in answer.json()["usageRecordGroups"]] == ["g"], query


# --- Validation and reports

# Every field of the page on validation, of both versions of a group.
ALL_FIELDS: dict[str, Any] = {
    "records": {"cpu": 1.5, "Memory": 2},
    "timestamp": "2026-01-31T12:00:00Z",
    "metaInfo": {
        "SkipValidation": False,
        "lagoAmount": 12.5,
        "lagoSubscriptionID": "sub",
        "lagoUsageStartTime": "2026-01-01T00:00:00Z",
        "metronomeDailyCostAmount": 0.1,
        "metronomeMonthlyInvoiceAmount": 1000000,
        "metronomeMonthlyInvoiceAmountAdjusted": 999999.99,
        "originRecords": {"cpu": 1.5, "Memory": 2},
        "source": "METRONOME",
        "timestamp": "2026-01-31T12:00:00Z",
    },
}
BILLABLE = [{"key": "calls", "properties": {"region": "eu", "tier": 2}, "quantity": 3.25}]


async def create_calls(suger: Suger) -> Any:
    """Create a billable metric with two filters, as a Suger program would."""
    groups = [
        {"filters": [{"name": "region", "operation": "IS", "value": {"value": "eu"}, "valueType": "STRING"}]},
        {"filters": [{"name": "tier", "operation": "EQ", "value": {"value": 2}, "valueType": "FLOAT"}]},
    ]
    document = {"id": "calls", "name": "Calls", "aggregationType": "SUM", "info": {"filterGroups": groups}}
    return await suger.call("create_billable_metric", BillableMetric.from_dict(document))


def at(moment: datetime) -> str:
    """A time as JSON has it."""
    return moment.isoformat().replace("+00:00", "Z")


async def test_validation_takes_every_field_and_stores_nothing(client: Client, suger: Suger) -> None:
    """Groups with all fields of the page, of records and of billable records, are valid: the answer is ''."""
    await create_calls(suger)
    await sell(client, partner="GCP", billable_metric_keys=["calls"])
    moment = at(datetime.now(UTC).replace(microsecond=0) - HOUR)
    meta = ALL_FIELDS["metaInfo"] | {"timestamp": moment}
    first = new(**ALL_FIELDS | {"metaInfo": meta, "timestamp": moment})
    notes = {"billableRecords": BILLABLE, "source": "", "timestamp": moment}
    second = new(billableRecords=BILLABLE, timestamp=moment, metaInfo=notes)
    third = new(records={"cpu": 1}, metaInfo={"SkipValidation": True, "source": "LAGO"})
    unchecked = new(records={"whatever": 1}, metaInfo={"SkipValidation": True})
    assert await suger.call("batch_validate_usage_record_groups", [first, second, third, unchecked]) == ""
    assert await suger.call("batch_validate_usage_record_groups", [new(records={"cpu": 1})] * 1000) == ""
    assert await stored(client) == []
    assert await used(client, "cpu") is None


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"records": {"gpu": 1}}, "records.gpu: "),
    ({"records": {"cpu": -1}}, "records.cpu: "),
    ({"records": {"cpu": "1,5"}}, "records.cpu: "),
    ({"records": {"cpu": True}}, "records.cpu: must be a number"),
    ({"records": {"cpu": 1e300}}, "records.cpu: "),
    ({"records": {"cpu": 0}}, "records: "),
    ({"records": {}}, "records: "),
    ({"records": {"cpu": 1}, "billableRecords": BILLABLE}, ""),
    ({"billableRecords": [BILLABLE[0] | {"key": "cpu"}]}, "billableRecords[0].key: "),
    ({"billableRecords": [{"key": "calls", "properties": {"region": "eu", "tier": 2}}]},
     "billableRecords[0].quantity: "),
    ({"billableRecords": [BILLABLE[0] | {"properties": {"region": "us", "tier": 2}}]},
     "billableRecords[0].properties.region: "),
    ({"billableRecords": [BILLABLE[0] | {"properties": {"region": "eu"}}]}, "billableRecords[0].properties.tier: "),
    ({"records": {"cpu": 1}, "entitlementID": "nobody"}, "entitlementID: "),
    ({"records": {"cpu": 1}, "entitlementID": ""}, "entitlementID: "),
    ({"records": {"cpu": 1}, "timestamp": "2001-01-31T12:00:00Z"}, "timestamp: "),
    ({"records": {"cpu": 1}, "timestamp": "2101-01-31T12:00:00Z"}, "timestamp: "),
    ({"records": {"cpu": 1}, "timestamp": "noon"}, "timestamp: "),
    ({"records": {"cpu": 1}, "metaInfo": {"source": "nobody"}}, "metaInfo.source: "),
    ({"records": {"cpu": 1}, "metaInfo": {"originRecords": {"cpu": 2}}}, "metaInfo.originRecords"),
    ({"records": {"cpu": 1}, "metaInfo": {"lagoAmount": "much"}}, "metaInfo.lagoAmount: "),
    ({"records": {"cpu": 1}, "metaInfo": {"lagoUsageStartTime": "noon"}}, "metaInfo.lagoUsageStartTime: "),
    ({"records": {"cpu": 1}, "metaInfo": {"lagoSubscriptionId": "sub"}}, "metaInfo.lagoSubscriptionId: "),
    ({"records": {"cpu": 1}, "metainfo": {}}, "metainfo: "),
    ({"records": {"cpu": 1}, "id": "x" * 37}, "id: "),
    ({"records": {"cpu": 1}, "usageAllocations": {"cpu": [{"quantity": 1, "tags": []}]}}, ""),
]  # fmt: skip


async def test_validation_names_the_first_fault(client: Client, suger: Suger) -> None:
    """Each fault is 400 with a JSON string that begins with the group and the field in Suger's words.

    The same fault keeps a report of the group from being stored, alone and among others.
    """
    await create_calls(suger)
    await sell(client, partner="GCP", billable_metric_keys=["calls"])
    good = {"entitlementID": "ent", "records": {"cpu": 1}}
    for fields, start in FAULTS:
        faulty = {"entitlementID": "ent", "records": {}} | fields
        for path, documents in (
            ("/batchValidateUsageRecordGroups", [good, faulty, {"entitlementID": "ent", "records": {"nope": 1}}]),
            ("/batchCreateUsageRecordGroups", [good, faulty]),
        ):
            answer = await suger.raw("POST", path, json=documents)
            assert answer.status_code == 400, (fields, answer.text)
            assert answer.json().startswith(f"[1].{start}"), (path, fields, answer.text)
        if fields.get("entitlementID") is None:
            answer = await suger.raw("POST", "/entitlement/ent/usageRecordGroup", json=faulty)
            assert answer.status_code == 400, (fields, answer.text)
            assert answer.json().startswith(start), (fields, answer.text)
    bodies = ([], {}, "", None, [1], [good] * 1001, [[good]])
    for path in ("/batchValidateUsageRecordGroups", "/batchCreateUsageRecordGroups"):
        for body in bodies:
            answer = await suger.raw("POST", path, json=body)
            assert answer.status_code == 400, (body, answer.text)
            assert isinstance(answer.json(), str)
        for content in (b"", b"[", b'[{"records": {"cpu": NaN}}]', b"\xff", b'[{"id": "a", "id": "b"}]'):
            answer = await suger.raw("POST", path, content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (content, answer.text)
            assert isinstance(answer.json(), str)
    assert await stored(client) == []
    message = await refused(
        BadRequestException, suger.call("batch_validate_usage_record_groups", [new(records={"gpu": 1})])
    )
    assert message.startswith("[0].records.gpu: ")


async def test_an_id_makes_a_report_safe_to_repeat(client: Client, suger: Suger) -> None:
    """The same content under the same id is the same group, counted once; other content is a conflict."""
    await sell(client)
    made = [await suger.report(id="mine", records={"cpu": 2.5}, metaInfo={"erpInvoiceID": "1"}) for _ in range(3)]
    assert made[0] == made[1] == made[2]
    assert (made[0].id, made[0].status, made[0].entitlement_id) == ("mine", "CREATED", "ent")
    assert (made[0].organization_id, made[0].buyer_id, made[0].partner) == ("default", "b-ent", "AWS")
    for other in ({"records": {"cpu": 2}}, {"records": {"cpu": 2.5}, "metaInfo": {"erpInvoiceID": "2"}}):
        await refused(ConflictException, suger.report(id="mine", **other))
    assert [one.id for one in await stored(client)] == ["mine"]
    assert await used(client, "cpu") == "2.5"
    # By name is by key: what was sent is kept beside what it counts for.
    named = await suger.report(records={"CPU hours": 1})
    assert (named.records, named.meta_info.origin_records) == ({"cpu": 1}, {"CPU hours": 1})


async def test_without_an_id_every_report_is_a_new_group_unless_it_has_a_key(client: Client, suger: Suger) -> None:
    """Each call stores another group; with an Idempotency-Key a repeated one answers with the group of the first."""
    await sell(client)
    await sell(client, "ent2")
    ids = [(await suger.report(records={"cpu": 1})).id for _ in range(3)]
    assert len(set(ids)) == 3
    assert all(str(uuid.UUID(one)) == one for one in ids)
    first = await suger.report(records={"cpu": 10}, key="once")
    assert await suger.report(records={"cpu": 10}, key="once") == first
    assert first.id not in ids
    assert (await suger.report(records={"cpu": 10}, key="twice")).id != first.id
    # A key is of one operation on one entitlement; under it, other content is a conflict.
    assert (await suger.report("ent2", records={"cpu": 10}, key="once")).id != first.id
    await refused(ConflictException, suger.report(records={"cpu": 11}, key="once"))
    # An id of the caller's own comes before the key.
    assert (await suger.report(records={"cpu": 10}, id="own", key="once")).id == "own"
    for key in (" ", "x" * 256):
        await refused(BadRequestException, suger.report(records={"cpu": 1}, key=key))
    assert sorted(Decimal(one.records["cpu"]) for one in await stored(client)) == [1, 1, 1, 10, 10, 10, 10]


async def test_a_batch_is_stored_whole_or_not_at_all(client: Client, suger: Suger) -> None:
    """Groups are answered in the order sent, each with a new id; a key makes the batch safe to repeat."""
    await sell(client)
    sent = [new(records={"cpu": number}) for number in (5, 3, 9, 1)]
    made = await suger.call("batch_report_usage_record_groups", sent)
    assert [one.records for one in made] == [one.records for one in sent]
    assert [one.id for one in await stored(client)] == [one.id for one in made]
    assert len({one.id for one in made}) == 4
    assert sorted(one.serial_id for one in made) == [one.serial_id for one in made]
    # One that is not valid keeps all from being stored.
    message = await refused(
        BadRequestException, suger.call("batch_report_usage_record_groups", [*sent, new(records={"gpu": 1})])
    )
    assert message.startswith("[4].records.gpu: ")
    assert len(await stored(client)) == 4
    keyed = {"_headers": {"Idempotency-Key": "batch"}}
    first = await suger.call("batch_report_usage_record_groups", sent, **keyed)
    assert await suger.call("batch_report_usage_record_groups", sent, **keyed) == first
    assert not {one.id for one in first} & {one.id for one in made}
    # A repeated key with another batch stores nothing of it.
    await refused(
        ConflictException,
        suger.call("batch_report_usage_record_groups", [new(records={"cpu": 6}), *sent], **keyed),
    )
    assert len(await stored(client)) == 8
    assert await used(client, "cpu") == "36"


async def test_numbers_stay_exact(client: Client, suger: Suger) -> None:
    """A quantity that no double holds counts to its last digit, sent as a JSON number or as a string of it.

    Answers have numbers that the SDK takes, whole ones without a point, and the exact decimals beside them.
    """
    await sell(client, partner="GCP")
    sent = {
        "123456789012345678": ("123456789012345678", 123456789012345680),
        "0.123456789012345678": ("0.123456789012345678", 0.12345678901234568),
        '"1234567.000000000000000001"': ("1234567.000000000000000001", 1234567),
        "3": ("3", 3),
        "4.0": ("4", 4),
        "25e-1": ("2.5", 2.5),
        '"0.10"': ("0.1", 0.1),
        "0.1": ("0.1", 0.1),
        "9007199254740993": ("9007199254740993", 9007199254740992),
    }
    for number, (text, (exact, rounded)) in enumerate(sent.items()):
        body = f'{{"id": "g{number}", "entitlementID": "ent", "records": {{"cpu": {text}}}}}'
        headers = {"content-type": "application/json"}
        answer = await suger.raw("POST", "/entitlement/ent/usageRecordGroup", content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        listed = (await suger.raw("GET", "/usageRecordGroup?limit=1")).json()["usageRecordGroups"][0]
        for document in (answer.json(), listed):
            assert document["recordsDecimal"] == {"cpu": exact}
            assert document["metaInfo"]["originRecordsDecimal"] == {"cpu": exact}
            for records in (document["records"], document["metaInfo"]["originRecords"]):
                assert records == {"cpu": rounded}
                if float(exact).is_integer() and float(exact) < 2**53:
                    assert type(records["cpu"]) is int, text
            assert type(document["serialID"]) is int
            assert MeteringUsageRecordGroup.from_dict(document).records == {"cpu": rounded}
    with localcontext(prec=60):
        total = sum(Decimal(exact) for exact, _ in sent.values())
    assert await used(client, "cpu") == str(total)
    assert [one.records["cpu"] for one in await stored(client)] == [exact for exact, _ in sent.values()]


async def test_billable_records_of_a_metric_made_here(client: Client, suger: Suger) -> None:
    """A metric's id is the key of v2 records; what they hold comes back as it was sent, and counts exactly."""
    metric = await create_calls(suger)
    assert (metric.id, metric.status, metric.aggregation_type) == ("calls", "ACTIVE", "SUM")
    await sell(client, partner="GCP", billable_metric_keys=["calls"])
    answer = await suger.report(id="v2", billableRecords=BILLABLE)
    for one in (answer, (await suger.page())[0][0]):
        assert one.records == {}
        assert [record.to_dict() for record in one.meta_info.billable_records] == BILLABLE
        assert one.meta_info.source == "API"
    document = {"entitlementID": "ent", "billableRecords": [BILLABLE[0] | {"quantity": "0.000000000000000001"}]}
    shown = (await suger.raw("POST", "/entitlement/ent/usageRecordGroup", json=document)).json()
    (record,) = shown["metaInfo"]["billableRecords"]
    assert record["quantityDecimal"] == "0.000000000000000001"
    assert record["properties"] == {"region": "eu", "tier": 2}
    assert await used(client, "calls") == "3.250000000000000001"


async def test_notes_come_back_as_they_were_sent(client: Client, suger: Suger) -> None:
    """Every field of metaInfo, in the answer and in the list: times are the same instants, amounts also exact."""
    await sell(client)
    moment = datetime.now(UTC).replace(microsecond=123000) - HOUR
    allocations = [{"quantity": 1, "tags": [{"key": "team", "value": "a b"}]}, {"quantity": 0.5, "tags": []}]
    meta = {
        "SkipValidation": True,
        "originRecords": {"cpu": 1.5},
        "source": "STRIPE",
        "timestamp": at(moment),
        "lagoAmount": 12.5,
        "lagoSubscriptionID": "ü sub",
        "lagoUsageStartTime": "2026-01-01T00:00:00Z",
        "metronomeDailyCostAmount": -3,
        "metronomeInvoiceID": "inv",
        "metronomeMonthlyInvoiceAmount": 1e6,
        "metronomeMonthlyInvoiceAmountAdjusted": 999999.99,
        "metronomeInvoiceCreditBack": True,
        "metronomeInvoiceCreditBackAmount": 0.01,
        "stripeInvoiceID": "in_1",
        "stripePeriodStartTime": "2026-01-01T00:00:00Z",
        "stripePeriodEndTime": "2026-01-31T23:59:59.999Z",
        "stripeSubscriptionItemID": "si_1",
        "stripeUsageRecordSummaryID": "sis_1",
        "stripeUsageRecordSummaryTotalUsage": 2**31,
        "erpInvoiceID": "erp",
        "usageAllocations": {"cpu": allocations},
    }
    sent = CreateUsageRecordGroupParams.from_dict({"organizationID": ORG, "entitlementID": "ent",
        "records": {"cpu": 1.5}, "metaInfo": meta, "id": "g"})  # fmt: skip
    answer = await suger.call("report_usage_record_group", "ent", sent)
    (listed,), _ = await suger.page()
    wanted = sent.meta_info.to_dict()
    for one in (answer, listed):
        found = one.meta_info.to_dict()
        assert found.pop("billableRecords", []) == []
        assert found == wanted
    shown = (await suger.raw("GET", "/usageRecordGroup")).json()["usageRecordGroups"][0]
    assert shown["metaInfo"]["amountsDecimal"] == {
        "lagoAmount": "12.5",
        "metronomeDailyCostAmount": "-3",
        "metronomeMonthlyInvoiceAmount": "1000000",
        "metronomeMonthlyInvoiceAmountAdjusted": "999999.99",
        "metronomeInvoiceCreditBackAmount": "0.01",
    }
    kept = (await native(client, "g")).meta_info
    assert kept.usage_allocations["cpu"].allocations[1].quantity == "0.5"
    assert kept.timestamp.ToDatetime(UTC) == moment
    # The other place for allocations is the group itself; both may say the same, but not something else.
    twice = {"records": {"cpu": 1.5}, "usageAllocations": {"cpu": allocations}}
    one = await suger.report(**twice, metaInfo={"usageAllocations": {"cpu": allocations}})
    assert [part.to_dict() for part in one.meta_info.usage_allocations["cpu"]] == allocations
    other = {"usageAllocations": {"cpu": [{"quantity": 1.5, "tags": []}]}}
    assert "usageAllocations" in await refused(BadRequestException, suger.report(**twice, metaInfo=other))
    # The parts are found by their tags, and by their quantities as numbers.
    for part in ({"tags": [{"key": "team"}]}, {"quantity": 0.5}, {"quantity": 1.0, "tags": [{"value": "a b"}]}):
        text = json.dumps({"usageAllocations": {"cpu": [part]}})
        assert len((await suger.page(metaInfo=text))[0]) == 2, text
    assert await suger.page(metaInfo='{"usageAllocations": {"cpu": [{"quantity": 2}]}}') == ([], None)
    # What was not given is not there.
    document = {"entitlementID": "ent", "records": {"cpu": 1}}
    answer = await suger.raw("POST", "/entitlement/ent/usageRecordGroup", json=document)
    for shown in (answer.json(), (await suger.raw("GET", "/usageRecordGroup")).json()["usageRecordGroups"][0]):
        plain = shown["metaInfo"]
        assert plain.pop("timestamp")
        assert {name: value for name, value in plain.items() if value not in ("", [], {})} == {
            "originRecords": {"cpu": 1}, "originRecordsDecimal": {"cpu": "1"}, "source": "API",
        }  # fmt: skip
        assert "usageAllocations" not in plain
        assert "lagoAmount" not in plain


async def test_whose_and_when(client: Client, suger: Suger) -> None:
    """Times are those of the service itself, the report's id and time come when there is one, statuses as they are."""
    await sell(client)
    before = datetime.now(UTC)
    answer = await suger.report(id="g", records={"cpu": 1})
    one = await native(client, "g")
    assert answer.creation_time == one.create_time.ToDatetime(UTC)
    assert before <= answer.creation_time <= datetime.now(UTC)
    assert answer.meta_info.timestamp == one.meta_info.timestamp.ToDatetime(UTC)
    assert (answer.reported_time, answer.usage_record_report_id, answer.status) == (None, "", "CREATED")
    assert answer.serial_id == one.serial_id
    # Without an offset a time is UTC.
    moment = (datetime.now(UTC) - timedelta(minutes=5)).replace(microsecond=0)
    for text in (at(moment), moment.strftime("%Y-%m-%dT%H:%M:%S"), (moment + HOUR).isoformat()[:19] + "+01:00"):
        document = {"entitlementID": "ent", "records": {"cpu": 1}, "timestamp": text}
        shown = (await suger.raw("POST", "/entitlement/ent/usageRecordGroup", json=document)).json()
        assert MeteringUsageRecordGroup.from_dict(shown).meta_info.timestamp == moment, text


async def test_the_path_and_the_body_must_agree(client: Client, suger: Suger) -> None:
    """Another entitlement in the body than in the path is refused; none in the body is that of the path."""
    await sell(client)
    await sell(client, "ent2")
    document = {"entitlementID": "ent2", "records": {"cpu": 1}}
    answer = await suger.raw("POST", "/entitlement/ent/usageRecordGroup", json=document)
    assert answer.status_code == 400
    assert answer.json().startswith("entitlementID: ")
    answer = await suger.raw("POST", "/entitlement/ent/usageRecordGroup", json={"records": {"cpu": 1}})
    assert answer.json()["entitlementID"] == "ent"
    assert len(await stored(client)) == 1


# --- The life of a group


async def reports_of(suger: Suger, **filters: Any) -> list[Any]:
    """All reports that pass filters."""
    page = await suger.call("list_usage_record_reports", **filters)
    assert page.next_offset is None
    return page.usage_record_reports


async def test_a_group_is_deleted_once_and_for_all(client: Client, suger: Suger, database: Database) -> None:
    """It counts no more, repeating says the same, and a wrong day finds nothing; what was reported cannot go."""
    await sell(client)
    for name in ("a", "b", "c"):
        await suger.report(id=name, records={"cpu": 1})
    day = (await native(client, "a")).create_time.ToDatetime().date()
    message = await refused(NotFoundException, suger.call("delete_usage_record_group", "a", str(day - DAY)))
    assert "a was not created" in message
    assert (await refused(BadRequestException, suger.call("delete_usage_record_group", "a", "today"))).startswith(
        "creationDate: "
    )
    await refused(NotFoundException, suger.call("delete_usage_record_group", "unknown"))
    assert await used(client, "cpu") == "3"
    first = await suger.call("delete_usage_record_group", "a", str(day))
    assert (first.id, first.status, first.records) == ("a", "DELETED", {"cpu": 1})
    assert await suger.call("delete_usage_record_group", "a") == first
    assert (await suger.call("delete_usage_record_group", "b")).status == "DELETED"
    assert await used(client, "cpu") == "1"
    await roll_up(database)
    for kind in ("delete", "retry"):
        await refused(BadRequestException, suger.call(f"{kind}_usage_record_group", "c"))
    await refused(BadRequestException, suger.call("retry_usage_record_group", "a"))
    await refused(ConflictException, suger.report(id="a", records={"cpu": 2}))


async def test_a_group_that_failed_is_retried(client: Client, suger: Suger, database: Database) -> None:
    """Statuses follow the marketplace's answers; a retried group is told by the next report."""
    await sell(client)
    await suger.report(id="g", records={"cpu": 2})
    hour = cell_floor(datetime.now(UTC))

    async def status() -> tuple[str, bool, bool]:
        (one,), _ = await suger.page()
        return one.status, bool(one.usage_record_report_id), one.reported_time is not None

    assert await status() == ("CREATED", False, False)
    await roll_up(database, hour)
    assert await status() == ("REPORT_PENDING", True, False)
    (report,) = await reports_of(suger)
    assert report.info.status == "CREATED"
    await lease(client, "t1")
    await complete(client, report.id, "t1", {"cpu": "CustomerNotSubscribed"})
    assert await status() == ("REPORT_FAILED", True, False)
    (report,) = await reports_of(suger)
    assert (report.info.status, report.info.message) == ("FAILED", "cpu: CustomerNotSubscribed")
    day = (await native(client, "g")).create_time.ToDatetime().date()
    await refused(NotFoundException, suger.call("retry_usage_record_group", "g", str(day + DAY)))
    await refused(NotFoundException, suger.call("retry_usage_record_group", "unknown", str(day)))
    await refused(BadRequestException, suger.call("delete_usage_record_group", "g"))
    retried = await suger.call("retry_usage_record_group", "g", str(day))
    assert retried.status == "CREATED"
    assert await suger.call("retry_usage_record_group", "g") == retried
    await roll_up(database, hour + HOUR)
    (leased,) = await lease(client, "t2")
    await complete(client, leased.id, "t2", taken=("cpu",))
    assert await status() == ("REPORTED", True, True)
    (listed,), _ = await suger.page(status="REPORTED")
    assert listed.usage_record_report_id == leased.id
    assert listed.reported_time == (await native(client, "g")).reported_time.ToDatetime(UTC)
    assert sorted(one.info.status for one in await reports_of(suger)) == ["FAILED", "SUCCESS"]


async def test_reports_tell_what_was_used_and_carry_the_rest(client: Client, suger: Suger, database: Database) -> None:
    """Hour by hour, reported is the whole part of what was carried and used, and the rest is carried on, exactly."""
    await sell(client, partner="GCP")
    chosen = random.Random(7)
    first = cell_floor(datetime.now(UTC)) - 6 * HOUR
    told, carried = [], Decimal(0)
    for number in range(5):
        hour = first + number * HOUR
        parts = [Decimal(chosen.randint(1, 9999)) / 1000 for _ in range(3)]
        for part in parts:
            moment = at(hour + timedelta(minutes=chosen.randrange(60)))
            await suger.report(records={"cpu": float(part)}, timestamp=moment)
        await roll_up(database, hour)
        total = carried + sum(parts)
        told.append((hour, carried, int(total), total - int(total)))
        carried = total - int(total)
    found = await reports_of(suger)
    assert [one.info.start_time for one in found] == [hour for hour, *_ in reversed(told)]
    shown = (await suger.raw("GET", "/usageRecordReport")).json()["usageRecordReports"]
    for one, document, (hour, before, whole, after) in zip(found, shown, reversed(told), strict=True):
        assert one.info.end_time == hour + HOUR
        assert (one.organization_id, one.partner, one.product_id) == ("default", "GCP", "p-ent")
        assert (one.entitlement_id, one.buyer_id) == ("ent", "b-ent")
        assert one.info.reported_records == {"cpu": whole}
        assert type(document["info"]["reportedRecords"]["cpu"]) is int
        assert one.info.decimal_parts == {"cpu": float(before)}
        assert one.info.new_decimal_parts == {"cpu": float(after)}
        exact = [
            document["info"][f"{name}Decimal"]["cpu"] for name in ("reportedRecords", "decimalParts", "newDecimalParts")
        ]
        assert [Decimal(text) for text in exact] == [whole, before, after]
    ids = {one.id for one in found}
    assert {one.usage_record_report_id for one in (await suger.page())[0]} == ids


async def test_the_list_of_reports_finds_what_every_parameter_asks_for(
    client: Client, suger: Suger, database: Database
) -> None:
    """Each parameter and pairs of them, paged by offset to the end: just the reports that plain Python finds."""
    for buyer in ("b-1", "b-2"):
        await client.create_customer(buyer_id=buyer)
    bought = {"x": ("GCP", "b-1"), "y": ("GCP", "b-2"), "z": ("AWS", "b-2")}
    for name, (partner, buyer) in bought.items():
        await sell(client, name, partner=partner, buyer_id=buyer)
    now = cell_floor(datetime.now(UTC))
    made = []
    for number, age in enumerate((9, 5, 2, 0)):
        hour = now - age * DAY - (HOUR if age else timedelta())
        for name in ("x", "y") if age else bought:
            moment = {"timestamp": at(hour + timedelta(minutes=1))} if age else {}
            await suger.report(name, records={"cpu": number + 1}, **moment)
            made.append((hour, name))
        await roll_up(database, hour)

    async def found(limit: int, **filters: Any) -> list[tuple[datetime, str]]:
        rows, offset = [], 0
        while offset is not None:
            page = await suger.call("list_usage_record_reports", limit=limit, offset=offset, **filters)
            assert len(page.usage_record_reports) <= limit
            rows += [(one.info.start_time, one.entitlement_id) for one in page.usage_record_reports]
            assert page.next_offset in {None, len(rows)}
            offset = page.next_offset
        assert [hour for hour, _ in rows] == sorted((hour for hour, _ in rows), reverse=True)
        return sorted(rows)

    tests: dict[str, Callable[[tuple[datetime, str], str], bool]] = {
        "partner": lambda row, value: bought[row[1]][0] == value,
        "buyer_id": lambda row, value: bought[row[1]][1] == value,
        "entitlement_id": lambda row, value: row[1] == value,
        "start_date": lambda row, value: str(row[0].date()) >= value,
        "end_date": lambda row, value: str(row[0].date()) <= value,
    }
    days = sorted({str(hour.date()) for hour, _ in made})
    choices = {
        "partner": ["GCP", "AWS"],
        "buyer_id": ["b-1", "b-2"],
        "entitlement_id": ["x", "y", "z"],
        "start_date": days[1:],
        "end_date": days[:-1],
    }
    assert await found(2) == await found(1000) == sorted(made)
    single = [{name: value} for name, values in choices.items() for value in values]
    pairs = [one | other for one, other in itertools.combinations(single, 2) if one.keys() != other.keys()]
    for filters in single + pairs:
        if filters.get("start_date", "") > filters.get("end_date", "9"):
            continue
        wanted = sorted(row for row in made if all(tests[name](row, value) for name, value in filters.items()))
        assert len(wanted) < len(made)
        assert await found(2, **filters) == wanted, filters
    assert [row for row in made if row[1] == "z"] == await found(1, partner="AWS")
    for wrong in ({"limit": 0}, {"limit": 1001}, {"partner": "NONE"}, {"start_date": "x"}, {"offset": -1}):
        await refused(BadRequestException, suger.call("list_usage_record_reports", **wrong))


# --- The catalog


async def test_billable_metrics_are_made_found_and_changed(client: Client, suger: Suger) -> None:
    """Create, get, list by status, patch; what was deleted stays so. A retry with the same id changes nothing."""
    made = await create_calls(suger)
    assert await create_calls(suger) == made
    assert (made.name, made.description, made.organization_id) == ("Calls", "", "default")
    found = await suger.call("get_billable_metric", "calls")
    assert found == made
    values = [one.filters[0].value for one in found.info.filter_groups]
    assert values == [{"value": "eu"}, {"value": "2"}]
    document = {"id": "calls", "name": "Others", "aggregationType": "SUM"}
    await refused(ConflictException, suger.call("create_billable_metric", BillableMetric.from_dict(document)))
    kinds = {"COUNT": {}, "UNIQUE_COUNT": {"propertyUniqueOn": "user"}, "MAX": {}, "LAST": {"groupBys": ["a", "b"]}}
    for kind, info in kinds.items():
        document = {"name": f"The {kind}", "aggregationType": kind, "description": "über", "info": info}
        one = await suger.call("create_billable_metric", BillableMetric.from_dict(document))
        assert (one.aggregation_type, one.description, one.status) == (kind, "über", "ACTIVE")
        assert one.info.property_unique_on == info.get("propertyUniqueOn", "")
        assert one.info.group_bys == info.get("groupBys", [])
        assert await suger.call("get_billable_metric", one.id) == one
    names = {"Calls", *(f"The {kind}" for kind in kinds)}
    # A metric of the records' own is nobody's: it is in no list.
    await sell(client)
    await suger.report(records={"cpu": 1})

    async def listed(*status: str) -> set[str]:
        return {one.name for one in await suger.call("list_billable_metrics", *status)}

    async def patch(metric_id: str, **fields: str) -> Any:
        return await suger.call("update_billable_metric", metric_id, UpdateBillableMetricParams.from_dict(fields))

    assert await listed() == await listed("ACTIVE") == names
    assert await listed("DELETED") == set()
    changed = await patch("calls", name="Renamed", description="new")
    assert (changed.name, changed.description, changed.info) == ("Renamed", "new", made.info)
    assert (await patch("calls", description="")).name == "Renamed"
    assert (await suger.call("get_billable_metric", "calls")).description == ""
    assert (await patch("calls", status="ACTIVE")).status == "ACTIVE"
    gone = await patch("calls", status="DELETED")
    assert gone.status == "DELETED"
    assert gone.last_update_time > made.creation_time
    assert (await patch("calls", status="DELETED")).status == "DELETED"
    assert "cannot be undone" in await refused(BadRequestException, patch("calls", status="ACTIVE"))
    assert await listed("DELETED") == {"Renamed"}
    assert await listed("ACTIVE") == names - {"Calls"}
    assert await listed() == (names - {"Calls"}) | {"Renamed"}
    # Natively it is a metric like any other, by its key.
    request = billable_metric_pb2.ListBillableMetricsRequest(include_archived=True)
    (own,) = [one for one in (await client.metrics.ListBillableMetrics(request)).billable_metrics if one.key == "calls"]
    assert own.HasField("archive_time")
    assert (await suger.call("get_billable_metric", own.id)).id == "calls"
    for metric_id in ("nothing", UNKNOWN):
        await refused(NotFoundException, suger.call("get_billable_metric", metric_id))
        await refused(NotFoundException, patch(metric_id, name="Another"))
    answer = await suger.raw("GET", "/billableMetric?status=GONE")
    assert (answer.status_code, answer.json()[:8]) == (400, "status: ")
    for fields in (
        {"name": "abc"},
        {"name": "x" * 51},
        {"description": "x" * 301},
        {"status": "GONE"},
        {"names": "abcd"},
    ):
        answer = await suger.raw("PATCH", "/billableMetric/calls", json=fields)
        assert answer.status_code == 400, fields
        assert answer.json().startswith(next(iter(fields)))


FILTER_CASES: list[tuple[list[dict[str, Any]], dict[str, Any] | None]] = [
    ([{"operation": "IS", "value": {"value": "a"}}], {"in_values": ["a"]}),
    ([{"operation": "EQ", "value": {"value": 2.5}}], {"in_values": ["2.5"]}),
    ([{"operation": "EQ", "value": {"value": True}}], {"in_values": ["true"]}),
    ([{"operation": "IS", "value": {"value": ["a", 1]}}], {"in_values": ["a", "1"]}),
    ([{"operation": "IS", "value": {"value": "a"}}, {"operation": "EQ", "value": {"value": 3}}],
     {"in_values": ["a", "3"]}),
    ([{"operation": "NOT_IS", "value": {"value": "a"}}], {"not_in_values": ["a"]}),
    ([{"operation": "NOT_EQ", "value": {"value": 0}}], {"not_in_values": ["0"]}),
    ([{"operation": "EXISTS"}], {"exists": True}),
    ([{"operation": "NOT_EXISTS"}], {"exists": False}),
    *(
        ([{"operation": one, "value": {"value": 1}}], None)
        for one in ("CONTAINS", "NOT_CONTAINS", "GT", "GTE", "LT", "LTE")
    ),
    ([{"operation": "NOT_IS", "value": {"value": "a"}}, {"operation": "NOT_IS", "value": {"value": "b"}}], None),
    ([{"operation": "IS", "value": {"value": "a"}}, {"operation": "IS", "name": "q", "value": {"value": "b"}}], None),
    ([{"operation": "IS", "value": {"values": ["a"]}}], None),
    ([{"operation": "IS"}], None),
    ([], None),
]  # fmt: skip


async def test_filters_say_what_they_said(client: Client, suger: Suger) -> None:
    """Each operation becomes the service's own filter and reads back as a value that the SDK takes, or is 400."""
    for number, (filters, wanted) in enumerate(FILTER_CASES):
        group_ = {"filters": [{"name": "p", **one} for one in filters]}
        document = {
            "id": f"m{number}",
            "name": "Metric",
            "aggregationType": "COUNT",
            "info": {"filterGroups": [group_]},
        }
        sent = BillableMetric.from_dict(document)
        if wanted is None:
            message = await refused(BadRequestException, suger.call("create_billable_metric", sent))
            assert message.startswith("info.filterGroups[0]"), (filters, message)
            continue
        made = await suger.call("create_billable_metric", sent)
        assert made == await suger.call("get_billable_metric", f"m{number}")
        request = billable_metric_pb2.ListBillableMetricsRequest(page_size=1000)
        metrics = (await client.metrics.ListBillableMetrics(request)).billable_metrics
        (own,) = [one for one in metrics if one.key == f"m{number}"]
        assert own.property_filters[:] == [billable_metric_pb2.PropertyFilter(name="p", **wanted)], filters
        (shown,) = made.info.filter_groups
        values = wanted.get("in_values") or wanted.get("not_in_values")
        if values:
            assert shown.filters[0].value == {"value": values[0] if len(values) == 1 else values}
        assert shown.filters[0].operation.value in {"IS", "NOT_IS", "EXISTS", "NOT_EXISTS"}
        # What was answered can be sent again: it is the same metric.
        again = BillableMetric.from_dict(document | {"info": made.info.to_dict()})
        assert await suger.call("create_billable_metric", again) == made
    for wrong, field in (
        ({"aggregationType": "AVG"}, "aggregationType"),
        ({"aggregationType": "UNIQUE_COUNT"}, "info.propertyUniqueOn"),
        ({"name": "abc"}, "name"),
        ({"id": "x" * 37}, "id"),
        ({"description": "x" * 301}, "description"),
        ({"customFields": {}}, "customFields"),
    ):
        answer = await suger.raw("POST", "/billableMetric", json={"name": "Metric", "aggregationType": "COUNT"} | wrong)
        assert answer.status_code == 400, wrong
        assert answer.json().startswith(f"{field}: "), answer.text


async def test_a_metric_without_an_id_is_made_once_per_key(client: Client, suger: Suger) -> None:
    """Without an id each call makes a metric; with an Idempotency-Key a repeated call answers with the first."""
    sent = BillableMetric.from_dict({"name": "Metric", "aggregationType": "COUNT"})
    ids = [(await suger.call("create_billable_metric", sent)).id for _ in range(2)]
    keyed = {"_headers": {"Idempotency-Key": "once"}}
    first = await suger.call("create_billable_metric", sent, **keyed)
    assert await suger.call("create_billable_metric", sent, **keyed) == first
    assert len({*ids, first.id}) == 3
    assert all(str(uuid.UUID(one)) == one for one in (*ids, first.id))


async def test_entitlements_are_read(client: Client, suger: Suger) -> None:
    """One by id, and lists by partner, product and buyer with limit and offset; what is unknown is 404."""
    for buyer in ("b-1", "b-2"):
        await client.create_customer(buyer_id=buyer)
    bought = {"e1": ("AWS", "b-1"), "e2": ("AWS", "b-2"), "e3": ("GCP", "b-2"), "e4": ("AZURE", "b-2")}
    for name, (partner, buyer) in bought.items():
        await sell(client, name, partner=partner, buyer_id=buyer, name=f"Deal {name}")
    one = await suger.call("get_entitlement", "e1")
    request = entitlement_pb2.GetEntitlementRequest(id="e1")
    own = (await client.entitlements.GetEntitlement(request)).entitlement
    assert (one.id, one.name, one.organization_id, one.partner) == ("e1", "Deal e1", "default", "AWS")
    assert (one.product_id, one.buyer_id, one.status, one.end_time) == ("p-e1", "b-1", "ACTIVE", None)
    assert (one.start_time, one.creation_time) == (
        own.starting_on.ToDatetime(UTC), own.create_time.ToDatetime(UTC),
    )  # fmt: skip
    assert [(part.key, part.name) for part in one.info.dimensions] == [(d["key"], d["name"]) for d in DIMENSIONS]
    await refused(NotFoundException, suger.call("get_entitlement", "e9"))

    async def ids(**filters: Any) -> list[str]:
        return [one.id for one in await suger.call("list_entitlements", **filters)]

    assert await ids() == list(bought)
    assert await ids(partner="AWS") == ["e1", "e2"]
    assert await ids(buyer_id="b-2") == ["e2", "e3", "e4"]
    assert await ids(product_id="p-e3") == ["e3"]
    assert await ids(partner="AWS", buyer_id="b-2") == ["e2"]
    assert await ids(limit=2) == ["e1", "e2"]
    assert await ids(limit=2, offset=3) == ["e4"]
    assert await ids(offset=4) == []
    for wrong in ({"limit": 0}, {"limit": 1001}, {"partner": "NONE"}, {"offset": -1}, {"offer_id": "o"}):
        await refused(BadRequestException, suger.call("list_entitlements", **wrong))


# --- Whose call it is


@asynccontextmanager
async def closed(
    database_url: str, database: Database, *names: str
) -> AsyncIterator[tuple[str, Client, dict[str, Suger]]]:
    """A server with an API key per organization, behind Envoy: its URL, a native client, and an SDK for each."""
    keys = {name: new_api_key() for name in names}
    async with database.engine.begin() as connection:
        for name, key in keys.items():
            await organizations.create_organization(connection, name)
            await organizations.create_api_key(connection, name, key.id, "test", key.secret_hash)
    async with running_server(database_url) as client, running_gateway(client.address) as url:
        yield url, client, {name: Suger(url, key.text, org=name) for name, key in keys.items()}


async def prepare(client: Client, suger: Suger) -> None:
    """Make a buyer, a product and an entitlement for an organization; ids are the same in each."""
    metadata = [("authorization", suger.headers["authorization"].replace("Key", "Bearer"))]
    buyer = customer_pb2.Customer(name="Buyer", buyer_id="b-ent")
    await client.customers.CreateCustomer(customer_pb2.CreateCustomerRequest(customer=buyer), metadata=metadata)
    product = entitlement_pb2.Product(id="p-ent", name="Product", partner="PARTNER_AWS", dimensions=DIMENSIONS)
    await client.entitlements.CreateProduct(entitlement_pb2.CreateProductRequest(product=product), metadata=metadata)
    entitlement = entitlement_pb2.Entitlement(
        id="ent", name=suger.org, product_id="p-ent", buyer_id="b-ent", billable_metric_keys=["calls"],
        starting_on=timestamp(datetime.now(UTC) - DAY),
    )  # fmt: skip
    request = entitlement_pb2.CreateEntitlementRequest(entitlement=entitlement)
    await client.entitlements.CreateEntitlement(request, metadata=metadata)


def every_call(suger: Suger) -> dict[str, Any]:
    """Every operation, in its simplest form."""
    metric = BillableMetric.from_dict({"id": "own", "name": "Metric", "aggregationType": "COUNT"})
    return {
        "list": suger.page,
        "reports": lambda: suger.call("list_usage_record_reports"),
        "validate": lambda: suger.call("batch_validate_usage_record_groups", [new(records={"cpu": 1})]),
        "batch": lambda: suger.call("batch_report_usage_record_groups", [new(records={"cpu": 1})]),
        "report": lambda: suger.report(records={"cpu": 1}),
        "delete": lambda: suger.call("delete_usage_record_group", "g"),
        "retry": lambda: suger.call("retry_usage_record_group", "g"),
        "metrics": lambda: suger.call("list_billable_metrics"),
        "metric": lambda: suger.call("get_billable_metric", "calls"),
        "create": lambda: suger.call("create_billable_metric", metric),
        "update": lambda: suger.call(
            "update_billable_metric", "calls", UpdateBillableMetricParams.from_dict({"name": "Other"})
        ),
        "entitlement": lambda: suger.call("get_entitlement", "ent"),
        "entitlements": lambda: suger.call("list_entitlements"),
    }


async def test_credentials_say_whose_call_it_is(database_url: str, database: Database) -> None:
    """`Key` and `Bearer` are the same; none or a wrong one is 401, another's organization 403, in every operation."""
    async with closed(database_url, database, "one", "two") as (url, client, sdks):
        one = sdks["one"]
        await create_calls(one)
        await prepare(client, one)
        await one.report(id="g", records={"cpu": 1})
        key = one.headers["authorization"].removeprefix("Key ")
        for good in (one, Suger(url, key, "Bearer", org="one"), Suger(url, key, "key", org="one")):
            assert [group_.id for group_ in (await good.page())[0]] == ["g"]
        wrong = [Suger(url, None, org="one"), Suger(url, "wrong", org="one"), Suger(url, key[:-1] + "!", org="one")]
        for bad in wrong:
            for call in every_call(bad).values():
                await refused(UnauthorizedException, call())
        strange = Suger(url, key, org="two")
        for call in every_call(strange).values():
            assert "organization" in await refused(ForbiddenException, call())
        # The body may not name another organization either.
        document = {"organizationID": "two", "entitlementID": "ent", "records": {"cpu": 1}}
        for path, body in (
            ("/entitlement/ent/usageRecordGroup", document),
            ("/batchCreateUsageRecordGroups", [document]),
        ):
            answer = await one.raw("POST", path, json=body)
            assert (answer.status_code, "organization" in answer.json()) == (403, True)
        assert [group_.id for group_ in (await one.page())[0]] == ["g"]
        assert len(await one.call("list_billable_metrics")) == 1


async def test_only_administrators_skip_validation(database_url: str, database: Database) -> None:
    """A key that is no administrator's cannot report what no rule takes; an administrator's can."""
    async with closed(database_url, database, "one") as (url, client, sdks):
        key = new_api_key()
        async with database.engine.begin() as connection:
            await organizations.create_api_key(
                connection, "one", key.id, "low", key.secret_hash, {Role.INGEST, Role.READ}
            )
        await create_calls(sdks["one"])
        await prepare(client, sdks["one"])
        low = Suger(url, key.text, org="one")
        unruly = {"records": {"whatever": 1}, "metaInfo": {"SkipValidation": True}}
        assert (await refused(BadRequestException, low.report(**unruly))).startswith("metaInfo.SkipValidation: ")
        taken = await sdks["one"].report(**unruly)
        assert (taken.records, taken.meta_info.skip_validation) == ({"whatever": 1}, True)


async def test_an_open_server_takes_any_organization(client: Client, suger: Suger) -> None:
    """Without credentials in the service, whatever a program names its organization and key, it is the one there is."""
    await sell(client)
    await suger.report(id="g", records={"cpu": 1})
    for other in (Suger(suger.base_url, None, org="x"), Suger(suger.base_url, "k", "Bearer", org="ü/ %")):
        (found,), _ = await other.page()
        assert (found.id, found.organization_id) == ("g", "default")


async def test_organizations_see_only_their_own(database_url: str, database: Database) -> None:
    """Two with the same ids and keys have groups, reports, metrics and entitlements of their own in every operation."""
    async with closed(database_url, database, "one", "two") as (_, client, sdks):
        one, two = sdks.values()
        for number, suger in enumerate(sdks.values(), start=1):
            await create_calls(suger)
            await prepare(client, suger)
            await suger.report(id="g", records={"cpu": number})
            await suger.report(id=f"only-{suger.org}", records={"mem": number})
        assert {group_.id: group_.records for group_ in (await one.page())[0]} == {
            "g": {"cpu": 1}, "only-one": {"mem": 1},
        }  # fmt: skip
        for suger in (one, two):
            groups, _ = await suger.page()
            assert {group_.organization_id for group_ in groups} == {suger.org}
            assert {group_.id for group_ in groups} == {"g", f"only-{suger.org}"}
            assert (await suger.call("get_entitlement", "ent")).name == suger.org
            assert [found.name for found in await suger.call("list_entitlements")] == [suger.org]
        # The same Idempotency-Key is another group for another organization.
        keyed = [await suger.report(records={"cpu": 5}, key="k") for suger in (one, two)]
        assert keyed[0].id != keyed[1].id
        metric = BillableMetric.from_dict({"name": "Metric", "aggregationType": "COUNT"})
        headers = {"Idempotency-Key": "k"}
        made = [await suger.call("create_billable_metric", metric, _headers=headers) for suger in (one, two)]
        assert made[0].id != made[1].id
        await refused(NotFoundException, one.call("get_billable_metric", made[1].id))
        # Nothing that one does is done to the other.
        for kind in ("delete", "retry"):
            await refused(NotFoundException, one.call(f"{kind}_usage_record_group", "only-two"))
        assert (await one.call("delete_usage_record_group", "g")).status == "DELETED"
        await one.call("update_billable_metric", "calls", UpdateBillableMetricParams.from_dict({"status": "DELETED"}))
        assert (await two.call("get_billable_metric", "calls")).status == "ACTIVE"
        assert {found.id for found in await two.call("list_billable_metrics", "ACTIVE")} == {"calls", made[1].id}
        assert {group_.status for group_ in (await two.page())[0]} == {"CREATED"}
        await roll_up(database)
        for number, suger in enumerate((one, two), start=1):
            (report,) = await reports_of(suger)
            assert report.organization_id == suger.org
            cpu = 5 if number == 1 else 2 + 5
            assert report.info.reported_records == {"cpu": cpu, "mem": number}


# --- The examples

CLIENTS = Path(__file__).resolve().parent.parent / "examples" / "clients"
FIXTURE = [sys.executable, "-W", "error", str(CLIENTS / "suger_fixture.py")]
GO_MODULE = "github.com/sugerio/suger-sdk-go"


def printed(today: str) -> list[str]:
    """What both examples print."""
    # What was reported by a dimension's name is shown by its key.
    groups = [f"example-cpu-{today}: cpu=1.5 mem=4", f"example-calls-{today}: example-calls=3.25"]
    return [
        "valid",
        "not valid: [0].records.gpu: ",
        *(f"reported {one}" for one in groups),
        *(f"of {whose}: {one}" for whose in ("AWS", "example-buyer", "example-entitlement") for one in groups[::-1]),
    ]


async def run_twice(command: list[str], client: Client, base_url: str) -> None:
    """Make what an example names and run it, both twice: it prints the same, and counts once."""
    for _ in range(2):
        made = await run(FIXTURE, client.address)
        assert (made.code, made.errors) == (0, "")
        done = await run(command, client.address, SUGER_BASE_URL=base_url)
        assert (done.code, done.errors) == (0, "")
        wanted = printed(str(datetime.now(UTC).date()))
        assert [line[: len(start)] for line, start in zip(done.printed, wanted, strict=True)] == wanted
    assert (await used(client, "cpu"), await used(client, "mem")) == ("1.5", "4")
    assert await used(client, "example-calls") == "3.25"


async def test_the_python_example(client: Client, base_url: str) -> None:
    """It validates, reports and lists by every parameter of the page; a second run counts nothing twice.

    Without the gateway it says so in one line.
    """
    command = find_python(CLIENTS / "suger_python")
    await run_twice(command, client, base_url)
    done = await run(command, client.address, SUGER_BASE_URL="http://127.0.0.1:1")
    assert (done.code, done.printed, done.errors.count("\n")) == (1, [], 1)
    assert done.errors.startswith("failed at http://127.0.0.1:1: ")


def build_go(folder: Path) -> list[str]:
    """Build the Go example with the SDK of a checkout in SUGER_SDK_GO, or else with the one that can be downloaded."""
    need("go")
    if checkout := os.environ.get("SUGER_SDK_GO"):
        build(folder, "go", "mod", "edit", f"-replace={GO_MODULE}={checkout}")
    else:
        try:
            download(folder, 60, "checksum mismatch|go.sum", "go", "mod", "download")
        except Unavailable as reason:
            raise Unavailable(f"{reason}; SUGER_SDK_GO can name a checkout of {GO_MODULE}") from None
    assert build(folder, "gofmt", "-l", ".") == ""
    build(folder, "go", "vet", ".")
    build(folder, "go", "build", "-o", "example", ".")
    return [str(folder / "example")]


@pytest.fixture(scope="session")
def go_example(tmp_path_factory: pytest.TempPathFactory) -> list[str] | str:
    """The Go example, built once and outside of the repository; or else why it cannot be."""
    try:
        return build_go(shutil.copytree(CLIENTS / "suger_go", tmp_path_factory.mktemp("suger") / "suger_go"))
    except Unavailable as reason:
        return f"the example suger_go is not tested: {reason}"


async def test_the_go_example(client: Client, base_url: str, go_example: list[str] | str) -> None:
    """It prints what the Python example prints; to that one, its groups are the ones that are there already."""
    if isinstance(go_example, str):
        pytest.skip(go_example)
    command = go_example
    await run_twice(command, client, base_url)
    await run_twice(find_python(CLIENTS / "suger_python"), client, base_url)
    done = await run(command, client.address, SUGER_BASE_URL="http://127.0.0.1:1")
    assert (done.code, done.printed, done.errors.count("\n")) == (1, [], 1)


@pytest.mark.parametrize("language", ["python", "go"])
async def test_the_examples_take_a_key(
    database_url: str, database: Database, go_example: list[str] | str, language: str
) -> None:
    """Against a server with keys they work with SUGER_API_KEY, and say what is wrong without it."""
    command = find_python(CLIENTS / "suger_python") if language == "python" else go_example
    if isinstance(command, str):
        pytest.skip(command)
    async with closed(database_url, database, "one") as (url, client, sdks):
        key = sdks["one"].headers["authorization"].removeprefix("Key ")
        done = await run(command, client.address, SUGER_BASE_URL=url, SUGER_ORG_ID="one")
        assert (done.code, done.printed, done.errors.count("\n")) == (1, [], 1)
        assert "credential" in done.errors
        made = await run(FIXTURE, client.address, METERING_API_KEY=key)
        assert (made.code, made.errors) == (0, "")
        done = await run(command, client.address, SUGER_BASE_URL=url, SUGER_ORG_ID="one", SUGER_API_KEY=key)
        assert (done.code, len(done.printed), done.errors) == (0, 10, "")
