"""Billable metrics and customers over the wire: creation, rules, changes, aliases, archives and races."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from conftest import Client, event, timestamp
from faults import fault_of, read_fault

from metering.v1 import billable_metric_pb2, customer_pb2, event_pb2
from service.database import Database
from service.errors import AlreadyExists
from service.store import cells, customers, metrics

DAY = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
NONE_DAY = {
    "window_size": "WINDOW_SIZE_NONE",
    "starting_on": timestamp(DAY),
    "ending_before": timestamp(DAY + 24 * HOUR),
}
# In the order of their text.
IDS = [f"{digit}4ca7e72-4229-4a6e-ab11-9f7376fccbcb" for digit in "05af"]


# --- Short forms of the calls


def new_id() -> str:
    """A fresh UUID."""
    return str(uuid.uuid4())


async def create_metric(client: Client, **fields: Any) -> billable_metric_pb2.BillableMetric:
    """CreateBillableMetric with just these fields."""
    request = billable_metric_pb2.CreateBillableMetricRequest(billable_metric=fields)
    return (await client.metrics.CreateBillableMetric(request)).billable_metric


async def get_metric(client: Client, metric_id: str) -> billable_metric_pb2.BillableMetric:
    """GetBillableMetric."""
    request = billable_metric_pb2.GetBillableMetricRequest(id=metric_id)
    return (await client.metrics.GetBillableMetric(request)).billable_metric


async def list_metrics(client: Client, **fields: Any) -> list[str]:
    """The ids of the first page of ListBillableMetrics, record metrics apart."""
    response = await client.metrics.ListBillableMetrics(billable_metric_pb2.ListBillableMetricsRequest(**fields))
    return [metric.id for metric in response.billable_metrics if not metric.record_key]


async def rename_metric(
    client: Client, metric_id: str, name: str, *paths: str, **fields: Any
) -> billable_metric_pb2.BillableMetric:
    """UpdateBillableMetric."""
    request = billable_metric_pb2.UpdateBillableMetricRequest(
        billable_metric={"id": metric_id, "name": name, **fields}, update_mask={"paths": paths} if paths else None
    )
    return (await client.metrics.UpdateBillableMetric(request)).billable_metric


async def archive_metric(client: Client, metric_id: str) -> billable_metric_pb2.BillableMetric:
    """ArchiveBillableMetric."""
    request = billable_metric_pb2.ArchiveBillableMetricRequest(id=metric_id)
    return (await client.metrics.ArchiveBillableMetric(request)).billable_metric


async def create_customer(client: Client, **fields: Any) -> customer_pb2.Customer:
    """CreateCustomer with just these fields."""
    request = customer_pb2.CreateCustomerRequest(customer=fields)
    return (await client.customers.CreateCustomer(request)).customer


async def get_customer(client: Client, customer_id: str) -> customer_pb2.Customer:
    """GetCustomer."""
    return (await client.customers.GetCustomer(customer_pb2.GetCustomerRequest(id=customer_id))).customer


async def list_customers(client: Client, **fields: Any) -> list[str]:
    """The ids of the first page of ListCustomers."""
    response = await client.customers.ListCustomers(customer_pb2.ListCustomersRequest(**fields))
    return [customer.id for customer in response.customers]


async def update_customer(client: Client, customer_id: str, *paths: str, **fields: Any) -> customer_pb2.Customer:
    """UpdateCustomer."""
    request = customer_pb2.UpdateCustomerRequest(
        customer={"id": customer_id, **fields}, update_mask={"paths": paths} if paths else None
    )
    return (await client.customers.UpdateCustomer(request)).customer


async def set_aliases(client: Client, customer_id: str, *aliases: str) -> customer_pb2.Customer:
    """SetIngestAliases."""
    request = customer_pb2.SetIngestAliasesRequest(id=customer_id, ingest_aliases=aliases)
    return (await client.customers.SetIngestAliases(request)).customer


async def set_period(client: Client, customer_id: str, **period: Any) -> customer_pb2.Customer:
    """SetBillingPeriod; without fields it removes the period."""
    request = customer_pb2.SetBillingPeriodRequest(id=customer_id, billing_period=period or None)
    return (await client.customers.SetBillingPeriod(request)).customer


async def archive_customer(client: Client, customer_id: str) -> customer_pb2.Customer:
    """ArchiveCustomer."""
    return (await client.customers.ArchiveCustomer(customer_pb2.ArchiveCustomerRequest(id=customer_id))).customer


async def unmatched(client: Client) -> dict[str, tuple[int, datetime, datetime]]:
    """The keys that no customer owns, with their number of events and the times of the first and the last."""
    response = await client.events.ListUnmatchedCustomerKeys(event_pb2.ListUnmatchedCustomerKeysRequest())
    return {
        one.customer_key: (
            one.event_count,
            one.first_seen_time.ToDatetime(UTC),
            one.last_seen_time.ToDatetime(UTC),
        )
        for one in response.unmatched_customer_keys
    }


async def usage(client: Client, **fields: Any) -> dict[tuple[str, str], str | None]:
    """The values of one window over a day, by customer and metric."""
    windows = await client.all_usage(**{**NONE_DAY, **fields})
    return {(w.customer_id, w.billable_metric_id): w.value if w.HasField("value") else None for w in windows}


async def refusals(cases: dict[str, Awaitable[Any]]) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Make calls that must fail, one after the other; returns (code, reason, fields) of each by its name."""
    found = {}
    for name, call in cases.items():
        try:
            await call
        except grpc.aio.AioRpcError as error:
            fault = read_fault(error)
            found[name] = (fault.code, fault.reason, fault.fields)
        else:
            found[name] = ("OK", "", ())
    return found


def bad(reason: str, *fields: str) -> tuple[str, str, tuple[str, ...]]:
    """An INVALID_ARGUMENT, by its first reason and all its fields."""
    return "INVALID_ARGUMENT", reason, fields


# --- Metrics

WHOLE_METRIC: dict[str, Any] = {
    "name": "Traffic",
    "key": "traffic",
    "aggregation_type": "AGGREGATION_TYPE_SUM",
    "aggregation_key": "bytes",
    "event_type_filter": {"in_values": ["request", "job"], "not_in_values": ["job"]},
    "property_filters": [
        {"name": "region", "exists": True, "in_values": ["eu", "us"]},
        {"name": "test", "exists": False},
        {"name": "plan", "not_in_values": ["free", ""]},
    ],
    "group_keys": [{"properties": ["region"]}, {"properties": ["user", "region"]}],
    "custom_fields": {"owner": "billing", "empty": ""},
}


async def test_a_metric_is_kept_as_it_was_sent(client: Client) -> None:
    """Every field comes back from creation, by id and in the list as it was sent; the server adds only the times."""
    chosen = new_id()
    made = await create_metric(client, id=chosen, **WHOLE_METRIC)
    assert made.HasField("create_time")
    assert not made.HasField("archive_time")
    assert not made.HasField("backfill_progress")
    sent = billable_metric_pb2.BillableMetric(id=chosen, create_time=made.create_time, **WHOLE_METRIC)
    assert made == sent
    assert await get_metric(client, chosen) == sent
    response = await client.metrics.ListBillableMetrics(billable_metric_pb2.ListBillableMetricsRequest())
    # With the key came its record metric.
    by_key = {metric.record_key: metric for metric in response.billable_metrics}
    assert by_key.keys() == {"", WHOLE_METRIC["key"]}
    assert by_key[""] == sent


async def test_a_metric_id_may_be_chosen_or_made(client: Client) -> None:
    """Without an id every creation makes a metric with an id of its own; a chosen one is kept in lower case."""
    fields = {"name": "Requests", "aggregation_type": "AGGREGATION_TYPE_COUNT"}
    made = [(await create_metric(client, **fields)).id for _ in range(2)]
    assert len({uuid.UUID(one) for one in made}) == 2
    assert (await create_metric(client, id=IDS[2].upper(), **fields)).id == IDS[2]
    assert (await get_metric(client, IDS[2].upper())).id == IDS[2]


async def test_creating_a_metric_again_is_a_success(client: Client) -> None:
    """The same id with the same content answers with the stored metric, also after a rename and an archiving."""
    chosen = new_id()
    made = await create_metric(client, id=chosen, **WHOLE_METRIC)
    assert await create_metric(client, id=chosen.upper(), **WHOLE_METRIC) == made
    # Output-only fields are ignored.
    times = {"create_time": timestamp(DAY), "archive_time": timestamp(DAY), "backfill_progress": 0.5}
    assert await create_metric(client, id=chosen, **times, **WHOLE_METRIC) == made
    await rename_metric(client, chosen, "Bytes")
    assert (await create_metric(client, id=chosen, **WHOLE_METRIC)).name == "Bytes"
    archived = await archive_metric(client, chosen)
    assert await create_metric(client, id=chosen, **WHOLE_METRIC) == archived


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Bytes"},
        {"key": ""},
        {"key": "other"},
        {"aggregation_type": "AGGREGATION_TYPE_MAX"},
        {"aggregation_key": "other"},
        {"event_type_filter": None},
        {"property_filters": []},
        {"group_keys": [{"properties": ["region"]}]},
        {"custom_fields": {}},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_a_metric_id_stands_for_one_content(client: Client, change: dict[str, Any]) -> None:
    """The same id with another content is ID_IN_USE, in any field, and changes nothing."""
    chosen = new_id()
    made = await create_metric(client, id=chosen, **WHOLE_METRIC)
    fault = await fault_of(create_metric(client, id=chosen, **{**WHOLE_METRIC, **change}))
    assert (fault.code, fault.reason, fault.metadata) == ("ALREADY_EXISTS", "ID_IN_USE", {"id": chosen})
    assert await get_metric(client, chosen) == made


async def test_a_metric_key_is_unique(client: Client) -> None:
    """A second metric with the key is METRIC_KEY_IN_USE, also when the first is archived; no key is no rival."""
    count = {"name": "Requests", "aggregation_type": "AGGREGATION_TYPE_COUNT"}
    first = await create_metric(client, key="requests", **count)
    for _ in range(2):
        fault = await fault_of(create_metric(client, key="requests", **count))
        assert (fault.code, fault.reason) == ("ALREADY_EXISTS", "METRIC_KEY_IN_USE")
        assert fault.metadata == {"key": "requests"}
        await archive_metric(client, first.id)
    await create_metric(client, key="Requests", **count)
    await create_metric(client, **count)
    await create_metric(client, **count)
    assert len(await list_metrics(client, include_archived=True)) == 4


async def test_metric_rules(client: Client) -> None:
    """Each rule of a definition refuses what breaks it, naming the field; a whole definition of faults names all."""
    good = {"name": "M", "aggregation_type": "AGGREGATION_TYPE_COUNT"}
    total = {"name": "M", "aggregation_type": "AGGREGATION_TYPE_SUM", "aggregation_key": "n"}
    filters = "billable_metric.property_filters"
    groups = "billable_metric.group_keys"
    types = "billable_metric.event_type_filter"
    table: dict[str, tuple[dict[str, Any], tuple[str, str, tuple[str, ...]]]] = {
        "nothing": ({}, bad("FIELD_REQUIRED", "billable_metric.aggregation_type", "billable_metric.name")),
        "bad id": ({**good, "id": "42"}, bad("FIELD_INVALID", "billable_metric.id")),
        "id without dashes": ({**good, "id": IDS[0].replace("-", "")}, bad("FIELD_INVALID", "billable_metric.id")),
        "id in braces": ({**good, "id": "{" + IDS[0] + "}"}, bad("FIELD_INVALID", "billable_metric.id")),
        "no name": ({**good, "name": ""}, bad("FIELD_REQUIRED", "billable_metric.name")),
        "blank name": ({**good, "name": " \u3000"}, bad("FIELD_INVALID", "billable_metric.name")),
        "long name": ({**good, "name": "n" * 161}, bad("LIMIT_EXCEEDED", "billable_metric.name")),
        "name with NUL": ({**good, "name": "a\0b"}, bad("FIELD_INVALID", "billable_metric.name")),
        "name with newline": ({**good, "name": "a\nb"}, bad("FIELD_INVALID", "billable_metric.name")),
        "long key": ({**good, "key": "k" * 129}, bad("LIMIT_EXCEEDED", "billable_metric.key")),
        "blank key": ({**good, "key": " "}, bad("FIELD_INVALID", "billable_metric.key")),
        "no type": ({"name": "M"}, bad("FIELD_REQUIRED", "billable_metric.aggregation_type")),
        "unknown type": (
            {"name": "M", "aggregation_type": 99},
            bad("FIELD_INVALID", "billable_metric.aggregation_type"),
        ),
        "key for COUNT": ({**good, "aggregation_key": "n"}, bad("FIELD_INVALID", "billable_metric.aggregation_key")),
        **{
            f"no key for {name}": (
                {"name": "M", "aggregation_type": f"AGGREGATION_TYPE_{name}"},
                bad("FIELD_REQUIRED", "billable_metric.aggregation_key"),
            )
            for name in ("SUM", "MIN", "MAX", "AVG", "LATEST", "UNIQUE")
        },
        "long aggregation key": (
            {**total, "aggregation_key": "n" * 129},
            bad("LIMIT_EXCEEDED", "billable_metric.aggregation_key"),
        ),
        "1,001 types": (
            {**good, "event_type_filter": {"in_values": [str(i) for i in range(1_001)]}},
            bad("LIMIT_EXCEEDED", f"{types}.in_values"),
        ),
        "1,001 excluded types": (
            {**good, "event_type_filter": {"not_in_values": [str(i) for i in range(1_001)]}},
            bad("LIMIT_EXCEEDED", f"{types}.not_in_values"),
        ),
        "type with NUL": (
            {**good, "event_type_filter": {"in_values": ["a", "\0"]}},
            bad("FIELD_INVALID", f"{types}.in_values[1]"),
        ),
        "33 filters": (
            {**good, "property_filters": [{"name": str(i)} for i in range(33)]},
            bad("LIMIT_EXCEEDED", filters),
        ),
        "filter without name": ({**good, "property_filters": [{}]}, bad("FIELD_REQUIRED", f"{filters}[0].name")),
        "two filters of one name": (
            {**good, "property_filters": [{"name": "a"}, {"name": "b"}, {"name": "a"}]},
            bad("DUPLICATE_ITEM", f"{filters}[2].name"),
        ),
        "absent with values": (
            {**good, "property_filters": [{"name": "a", "exists": False, "in_values": ["x"]}]},
            bad("FIELD_INVALID", f"{filters}[0].exists"),
        ),
        "long filter value": (
            {**good, "property_filters": [{"name": "a", "in_values": ["x", "é" * 513]}]},
            bad("LIMIT_EXCEEDED", f"{filters}[0].in_values[1]"),
        ),
        "1,001 filter values": (
            {**good, "property_filters": [{"name": "a", "not_in_values": [str(i) for i in range(1_001)]}]},
            bad("LIMIT_EXCEEDED", f"{filters}[0].not_in_values"),
        ),
        "11 group keys": (
            {**good, "group_keys": [{"properties": [str(i)]} for i in range(11)]},
            bad("LIMIT_EXCEEDED", groups),
        ),
        "group key of nothing": ({**good, "group_keys": [{}]}, bad("FIELD_REQUIRED", f"{groups}[0].properties")),
        "group key of 11": (
            {**good, "group_keys": [{"properties": [str(i) for i in range(11)]}]},
            bad("LIMIT_EXCEEDED", f"{groups}[0].properties"),
        ),
        "group key with an empty name": (
            {**good, "group_keys": [{"properties": ["a", ""]}]},
            bad("FIELD_REQUIRED", f"{groups}[0].properties[1]"),
        ),
        "group key of one property twice": (
            {**good, "group_keys": [{"properties": ["a", "a"]}]},
            bad("DUPLICATE_ITEM", f"{groups}[0].properties"),
        ),
        "equal group keys": (
            {**good, "group_keys": [{"properties": ["a", "b"]}, {"properties": ["c"]}, {"properties": ["b", "a"]}]},
            bad("DUPLICATE_ITEM", f"{groups}[2]"),
        ),
        "65 custom fields": (
            {**good, "custom_fields": {str(i): "" for i in range(65)}},
            bad("LIMIT_EXCEEDED", "billable_metric.custom_fields"),
        ),
        "long custom field": (
            {**good, "custom_fields": {"a": "x" * 1_025}},
            bad("LIMIT_EXCEEDED", "billable_metric.custom_fields.a"),
        ),
        "custom field without a name": (
            {**good, "custom_fields": {"": "x"}},
            bad("FIELD_REQUIRED", "billable_metric.custom_fields key"),
        ),
        "all at once": (
            {"id": "x", "key": "\0", "group_keys": [{}], "custom_fields": {"a": "\0"}},
            bad(
                "FIELD_INVALID",
                "billable_metric.id",
                "billable_metric.aggregation_type",
                "billable_metric.name",
                "billable_metric.key",
                "billable_metric.group_keys[0].properties",
                "billable_metric.custom_fields.a",
            ),
        ),
    }
    found = await refusals({name: create_metric(client, **fields) for name, (fields, _) in table.items()})
    assert found == {name: expected for name, (_, expected) in table.items()}
    assert await list_metrics(client, include_archived=True) == []


async def test_metric_limits_are_inclusive(client: Client) -> None:
    """What is just within every limit is taken and comes back whole."""
    fields: dict[str, Any] = {
        "name": "é" * 160,
        "key": "k" * 128,
        "aggregation_type": "AGGREGATION_TYPE_UNIQUE",
        "aggregation_key": "n" * 128,
        "event_type_filter": {"in_values": [str(i) for i in range(1_000)]},
        "property_filters": [
            {"name": f"p{i}", "in_values": ["é" * 512, ""] if i else [str(j) for j in range(1_000)]} for i in range(32)
        ],
        "group_keys": [{"properties": [f"g{i}-{j}" for j in range(10)]} for i in range(10)],
        "custom_fields": {f"{i:0128}": "x" * 1_024 for i in range(64)},
    }
    made = await client.counted(await create_metric(client, **fields))
    sent = billable_metric_pb2.BillableMetric(id=made.id, create_time=made.create_time, **fields)
    assert await get_metric(client, made.id) == sent


async def test_a_metric_can_be_renamed(client: Client) -> None:
    """The mask may name `name`; a field that is no name and no note is refused, and named."""
    made = await create_metric(client, **WHOLE_METRIC)
    assert (await rename_metric(client, made.id, "One")).name == "One"
    renamed = await rename_metric(client, made.id.upper(), "Two", "name", key="ignored")
    assert renamed == billable_metric_pb2.BillableMetric(
        **{**WHOLE_METRIC, "name": "Two"}, id=made.id, create_time=made.create_time
    )
    assert await rename_metric(client, made.id, "Two") == renamed
    found = await refusals(
        {
            "key": rename_metric(client, made.id, "Three", "key"),
            "name and key": rename_metric(client, made.id, "Three", "name", "key"),
            "everything": rename_metric(client, made.id, "Three", "*"),
            "unknown": rename_metric(client, made.id, "Three", "nonsense"),
            "no name": rename_metric(client, made.id, ""),
            "long name": rename_metric(client, made.id, "n" * 161, "name"),
            "no id": rename_metric(client, "", "Three"),
            "bad id": rename_metric(client, "x", "Three"),
            "no such metric": rename_metric(client, IDS[0], "Three"),
        }
    )
    assert found == {
        "key": bad("FIELD_INVALID", "update_mask"),
        "name and key": bad("FIELD_INVALID", "update_mask"),
        "everything": bad("FIELD_INVALID", "update_mask"),
        "unknown": bad("FIELD_INVALID", "update_mask"),
        "no name": bad("FIELD_REQUIRED", "billable_metric.name"),
        "long name": bad("LIMIT_EXCEEDED", "billable_metric.name"),
        "no id": bad("FIELD_REQUIRED", "billable_metric.id"),
        "bad id": bad("FIELD_INVALID", "billable_metric.id"),
        "no such metric": ("NOT_FOUND", "BILLABLE_METRIC_NOT_FOUND", ()),
    }
    assert await get_metric(client, made.id) == renamed


async def test_notes_of_a_metric_can_be_replaced(client: Client) -> None:
    """`custom_fields` is replaced as a whole, alone or with the name; whoever names neither renames only."""
    made = await create_metric(client, **WHOLE_METRIC)

    async def noted(*paths: str, **fields: Any) -> billable_metric_pb2.BillableMetric:
        request = billable_metric_pb2.UpdateBillableMetricRequest(
            billable_metric={"id": made.id, **fields}, update_mask={"paths": paths} if paths else None
        )
        return (await client.metrics.UpdateBillableMetric(request)).billable_metric

    expected = billable_metric_pb2.BillableMetric()
    expected.CopyFrom(made)
    expected.custom_fields.clear()
    expected.custom_fields.update({"a": "1", "ä": ""})
    changed = await noted("custom_fields", name="ignored", key="ignored", custom_fields={"a": "1", "ä": ""})
    assert changed == expected == await get_metric(client, made.id)
    expected.name = "Both"
    expected.custom_fields.clear()
    expected.custom_fields["b"] = "2"
    assert await noted("custom_fields", "name", name="Both", custom_fields={"b": "2"}) == expected
    # Without a mask only a name is meant; notes that are given with it are not lost, nor taken.
    found = await noted(name="Alone")
    assert dict(found.custom_fields) == {"b": "2"}
    assert dict((await noted("custom_fields")).custom_fields) == {}
    faults = await refusals(
        {
            "long": noted("custom_fields", custom_fields={"k" * 1000: "v"}),
            "NUL": noted("custom_fields", custom_fields={"k": "\0"}),
            "a part": noted("custom_fields.k", custom_fields={"k": "v"}),
            "with another": noted("custom_fields", "group_keys", custom_fields={"k": "v"}),
        }
    )
    assert {name: fault[0] for name, fault in faults.items()} == dict.fromkeys(faults, "INVALID_ARGUMENT")
    assert [fault[2][0].startswith("billable_metric.custom_fields") for fault in faults.values()] == [
        True,
        True,
        False,
        False,
    ]
    # A retry of the creation is told what became of it.
    assert (await create_metric(client, **WHOLE_METRIC, id=made.id)).name == "Alone"


async def test_windows_carry_the_name_that_the_metric_has_now(client: Client) -> None:
    """A rename shows in the windows of the past."""
    metric = await client.create_metric(name="Before")
    await client.create_customer(ingest_aliases=["acme"])
    await client.ingest(event())
    await rename_metric(client, metric.id, "After")
    assert [w.billable_metric_name for w in await client.all_usage(**NONE_DAY)] == ["After"]


async def test_metrics_are_listed_by_id(client: Client) -> None:
    """In the order of ids, whatever the order of creation; archived ones only when asked for."""
    for one in (IDS[3], IDS[0], IDS[2], IDS[1]):
        await create_metric(client, id=one, name="M", aggregation_type="AGGREGATION_TYPE_COUNT")
    assert await list_metrics(client) == IDS
    await archive_metric(client, IDS[1])
    assert await list_metrics(client) == [IDS[0], *IDS[2:]]
    assert await list_metrics(client, include_archived=True) == IDS
    assert (await get_metric(client, IDS[1])).HasField("archive_time")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (get_metric, "BILLABLE_METRIC_NOT_FOUND"),
        (archive_metric, "BILLABLE_METRIC_NOT_FOUND"),
        (get_customer, "CUSTOMER_NOT_FOUND"),
        (archive_customer, "CUSTOMER_NOT_FOUND"),
        (set_aliases, "CUSTOMER_NOT_FOUND"),
        (set_period, "CUSTOMER_NOT_FOUND"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_ids_are_checked(client: Client, call: Callable[[Client, str], Awaitable[Any]], reason: str) -> None:
    """A missing or malformed id is refused by its path; one that nothing has is NOT_FOUND and named."""
    assert (await fault_of(call(client, ""))).brief == ("INVALID_ARGUMENT", "FIELD_REQUIRED", "id")
    assert (await fault_of(call(client, "acme"))).brief == ("INVALID_ARGUMENT", "FIELD_INVALID", "id")
    fault = await fault_of(call(client, IDS[0]))
    assert (fault.code, fault.reason, fault.metadata) == ("NOT_FOUND", reason, {"ids": IDS[0]})


@pytest.mark.parametrize(
    ("aggregation", "before", "after"),
    [("COUNT", "3", "4"), ("SUM", "6", "16"), ("MAX", "3", "10"), ("AVG", "2", "4"), ("UNIQUE", "3", "4")],
)
async def test_an_archived_metric_counts_by_the_time_of_the_event(
    client: Client, database: Database, aggregation: str, before: str, after: str
) -> None:
    """Events before the archive time count, also those that come late; those after it do not, also those stored."""
    now = datetime.now(UTC)
    await client.create_customer(ingest_aliases=["acme"])
    key = {} if aggregation == "COUNT" else {"aggregation_key": "n"}
    metric = await client.create_metric(aggregation_type=f"AGGREGATION_TYPE_{aggregation}", **key)
    query = {
        "window_size": "WINDOW_SIZE_NONE",
        "starting_on": timestamp(now - 48 * HOUR),
        "ending_before": timestamp(now + 48 * HOUR),
        "billable_metrics": [{"id": metric.id}],
    }
    # Just now, in the hour of the archiving, and long ago; then within the same hour if it is not over, and later.
    await client.ingest(
        event(at=now - timedelta(seconds=5), properties={"n": 1}),
        event(at=now - 2 * HOUR, properties={"n": 2}),
        event(at=now - 30 * HOUR, properties={"n": 3}),
        event(at=now + timedelta(minutes=5), properties={"n": 100}),
        event(at=now + 3 * HOUR, properties={"n": 1_000}),
    )
    archived = await archive_metric(client, metric.id)
    assert now - timedelta(minutes=1) < archived.archive_time.ToDatetime(UTC) < now + timedelta(minutes=4)
    assert [w.value for w in await client.all_usage(**query)] == [before]
    await client.ingest(
        event(at=now - timedelta(hours=3), properties={"n": 10}),
        event(at=now + timedelta(minutes=6), properties={"n": 200}),
        event(at=now + 4 * HOUR, properties={"n": 2_000}),
    )
    assert [w.value for w in await client.all_usage(**query)] == [after]
    # Archiving again keeps the first time, and the numbers.
    assert await archive_metric(client, metric.id) == archived
    assert [w.value for w in await client.all_usage(**query)] == [after]
    (stored,) = await database.read("default", lambda c: metrics.all_metrics(c, "default"))
    far = 3650 * 24 * HOUR
    compared = await database.read(
        "default", lambda c: cells.mismatches(c, "default", stored, DAY - far, DAY + far, limit=10)
    )
    assert compared == []


async def test_all_metrics_leaves_archived_ones_out(client: Client) -> None:
    """ "All metrics" means those that are not archived; an archived one is read by naming it."""
    customer = await client.create_customer(ingest_aliases=["acme"])
    kept, archived = await client.create_metric(), await client.create_metric()
    await client.ingest(event())
    await archive_metric(client, archived.id)
    assert await usage(client) == {(customer.id, kept.id): "1"}
    assert await usage(client, billable_metrics=[{"id": archived.id}]) == {(customer.id, archived.id): "1"}


# --- Customers

WHOLE_CUSTOMER: dict[str, Any] = {
    "name": "Acme",
    "buyer_id": "buyer-1",
    "ingest_aliases": ["Zed", "acme", "team@example.com"],
    "billing_period": {
        "frequency": "BILLING_FREQUENCY_MONTHLY",
        "anchor_date": "2026-01-31",
        "starting_on": "2026-01-15",
        "ending_before": "2027-01-01",
    },
    "custom_fields": {"tier": "gold"},
}


async def test_a_customer_is_kept_as_it_was_sent(client: Client) -> None:
    """Every field comes back as it was sent; the server adds only the times, and defaults the buyer id to the id."""
    made = await create_customer(client, id=IDS[0].upper(), **WHOLE_CUSTOMER)
    sent = customer_pb2.Customer(
        id=IDS[0], create_time=made.create_time, update_time=made.update_time, **WHOLE_CUSTOMER
    )
    assert made == sent
    assert made.HasField("create_time")
    assert made.HasField("update_time")
    assert await get_customer(client, IDS[0]) == sent
    least = await create_customer(client, name="Least")
    assert least.buyer_id == least.id == str(uuid.UUID(least.id))
    assert not least.HasField("billing_period")
    assert (await create_customer(client, name="Least")).id != least.id


async def test_creating_a_customer_again_is_a_success(client: Client) -> None:
    """The same id with the same content answers with the stored customer as it is now, whatever changed since."""
    made = await create_customer(client, id=IDS[0], **WHOLE_CUSTOMER)
    assert await create_customer(client, id=IDS[0], **WHOLE_CUSTOMER) == made
    times = {"create_time": timestamp(DAY), "update_time": timestamp(DAY), "archive_time": timestamp(DAY)}
    shuffled = {**WHOLE_CUSTOMER, "ingest_aliases": WHOLE_CUSTOMER["ingest_aliases"][::-1]}
    assert await create_customer(client, id=IDS[0].upper(), **times, **shuffled) == made
    await update_customer(client, IDS[0], name="Apex", buyer_id="buyer-2")
    changed = await set_aliases(client, IDS[0], "apex")
    assert await create_customer(client, id=IDS[0], **WHOLE_CUSTOMER) == changed
    archived = await archive_customer(client, IDS[0])
    assert await create_customer(client, id=IDS[0], **WHOLE_CUSTOMER) == archived


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Apex"},
        {"buyer_id": "buyer-2"},
        {"buyer_id": ""},
        {"ingest_aliases": ["acme"]},
        {"billing_period": None},
        {"billing_period": {**WHOLE_CUSTOMER["billing_period"], "ending_before": None}},
        {"custom_fields": {}},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_a_customer_id_stands_for_one_content(client: Client, change: dict[str, Any]) -> None:
    """The same id with another content is ID_IN_USE, in any field, and changes nothing."""
    made = await create_customer(client, id=IDS[0], **WHOLE_CUSTOMER)
    fault = await fault_of(create_customer(client, id=IDS[0], **{**WHOLE_CUSTOMER, **change}))
    assert (fault.code, fault.reason, fault.metadata) == ("ALREADY_EXISTS", "ID_IN_USE", {"id": IDS[0]})
    assert await get_customer(client, IDS[0]) == made


def periods(**change: Any) -> dict[str, Any]:
    """A billing period with something else in it."""
    return {**WHOLE_CUSTOMER["billing_period"], **change}


# What a billing period must not hold, and which of its fields is at fault.
BAD_PERIODS: dict[str, tuple[dict[str, Any], tuple[str, str, tuple[str, ...]]]] = {
    "empty period": ({"ending_before": None}, bad("FIELD_REQUIRED", "frequency", "anchor_date", "starting_on")),
    "no frequency": (periods(frequency=0), bad("FIELD_REQUIRED", "frequency")),
    "unknown frequency": (periods(frequency=9), bad("FIELD_INVALID", "frequency")),
    "no anchor": (periods(anchor_date=""), bad("FIELD_REQUIRED", "anchor_date")),
    "no such day": (periods(anchor_date="2026-02-29"), bad("FIELD_INVALID", "anchor_date")),
    "a time": (periods(anchor_date="2026-01-31T00:00:00Z"), bad("FIELD_INVALID", "anchor_date")),
    "a short date": (periods(anchor_date="20260131"), bad("FIELD_INVALID", "anchor_date")),
    "Arabic digits": (periods(anchor_date="٢٠٢٦-01-31"), bad("FIELD_INVALID", "anchor_date")),
    "before 1900": (periods(starting_on="1899-12-31"), bad("FIELD_INVALID", "starting_on")),
    "after 9000": (periods(ending_before="9001-01-01"), bad("FIELD_INVALID", "ending_before")),
    "empty end": (periods(ending_before=""), bad("FIELD_REQUIRED", "ending_before")),
    "end at start": (periods(ending_before="2026-01-15"), bad("FIELD_INVALID", "ending_before")),
    "end before start": (periods(ending_before="2026-01-14"), bad("FIELD_INVALID", "ending_before")),
}


async def test_a_week_date_is_no_date(client: Client) -> None:
    """Billing dates are YYYY-MM-DD and nothing else that stands for a day."""
    fault = await fault_of(create_customer(client, name="C", billing_period=periods(anchor_date="2026-W05-1")))
    assert fault.brief == ("INVALID_ARGUMENT", "FIELD_INVALID", "customer.billing_period.anchor_date")


async def test_customer_rules(client: Client) -> None:
    """Each rule refuses what breaks it, naming the field."""
    aliases = "customer.ingest_aliases"
    table: dict[str, tuple[dict[str, Any], tuple[str, str, tuple[str, ...]]]] = {
        "nothing": ({}, bad("FIELD_REQUIRED", "customer.name")),
        "bad id": ({"name": "C", "id": "acme"}, bad("FIELD_INVALID", "customer.id")),
        "long name": ({"name": "n" * 161}, bad("LIMIT_EXCEEDED", "customer.name")),
        "blank name": ({"name": " "}, bad("FIELD_INVALID", "customer.name")),
        "name with a control character": ({"name": "a\x85b"}, bad("FIELD_INVALID", "customer.name")),
        "long buyer id": ({"name": "C", "buyer_id": "b" * 37}, bad("LIMIT_EXCEEDED", "customer.buyer_id")),
        "blank buyer id": ({"name": "C", "buyer_id": " "}, bad("FIELD_INVALID", "customer.buyer_id")),
        "empty alias": ({"name": "C", "ingest_aliases": ["a", ""]}, bad("FIELD_REQUIRED", f"{aliases}[1]")),
        "long alias": ({"name": "C", "ingest_aliases": ["a" * 129]}, bad("LIMIT_EXCEEDED", f"{aliases}[0]")),
        "alias with a tab": ({"name": "C", "ingest_aliases": ["a\tb"]}, bad("FIELD_INVALID", f"{aliases}[0]")),
        "alias twice": ({"name": "C", "ingest_aliases": ["a", "b", "a"]}, bad("DUPLICATE_ITEM", f"{aliases}[2]")),
        "UUID alias twice": (
            {"name": "C", "ingest_aliases": [IDS[2], IDS[2].upper()]},
            bad("DUPLICATE_ITEM", f"{aliases}[1]"),
        ),
        "2,001 aliases": (
            {"name": "C", "ingest_aliases": [str(i) for i in range(2_001)]},
            bad("LIMIT_EXCEEDED", aliases),
        ),
        "65 custom fields": (
            {"name": "C", "custom_fields": {str(i): "" for i in range(65)}},
            bad("LIMIT_EXCEEDED", "customer.custom_fields"),
        ),
        "custom field with NUL": (
            {"name": "C", "custom_fields": {"a": "\0"}},
            bad("FIELD_INVALID", "customer.custom_fields.a"),
        ),
        "all at once": (
            {"id": "x", "buyer_id": "b" * 37, "ingest_aliases": [""], "billing_period": periods(frequency=0)},
            bad(
                "FIELD_INVALID",
                "customer.id",
                "customer.billing_period.frequency",
                "customer.name",
                "customer.buyer_id",
                f"{aliases}[0]",
            ),
        ),
    }
    for name, (period, (code, reason, fields)) in BAD_PERIODS.items():
        paths = tuple(f"customer.billing_period.{field}" for field in fields)
        table[name] = {"name": "C", "billing_period": period}, (code, reason, paths)
    found = await refusals({name: create_customer(client, **fields) for name, (fields, _) in table.items()})
    assert found == {name: expected for name, (_, expected) in table.items()}
    assert await list_customers(client, include_archived=True) == []


async def test_customers_are_updated_by_mask(client: Client) -> None:
    """Masked fields change, others stay; no mask means the fields that are set; the update time moves."""
    made = await create_customer(client, id=IDS[0], **WHOLE_CUSTOMER)
    renamed = await update_customer(client, IDS[0], "name", name="Apex", buyer_id="ignored")
    assert (renamed.name, renamed.buyer_id, renamed.custom_fields) == ("Apex", "buyer-1", {"tier": "gold"})
    assert renamed.update_time.ToNanoseconds() > made.update_time.ToNanoseconds()
    assert renamed.create_time == made.create_time
    implied = await update_customer(client, IDS[0], buyer_id="buyer-2", custom_fields={"a": "b"})
    assert (implied.name, implied.buyer_id, implied.custom_fields) == ("Apex", "buyer-2", {"a": "b"})
    assert list(implied.ingest_aliases) == WHOLE_CUSTOMER["ingest_aliases"]
    assert implied.billing_period == made.billing_period
    emptied = await update_customer(client, IDS[0], "custom_fields", name="ignored")
    assert (emptied.name, dict(emptied.custom_fields)) == ("Apex", {})
    found = await refusals(
        {
            "aliases": update_customer(client, IDS[0], "ingest_aliases"),
            "period": update_customer(client, IDS[0], "name", "billing_period", name="x"),
            "nothing": update_customer(client, IDS[0]),
            "empty name": update_customer(client, IDS[0], "name"),
            "empty buyer id": update_customer(client, IDS[0], "buyer_id"),
            "long buyer id": update_customer(client, IDS[0], buyer_id="b" * 37),
            "two": update_customer(client, IDS[0], "name", "buyer_id"),
            "bad id": update_customer(client, "acme", name="x"),
            "no such customer": update_customer(client, IDS[1], name="x"),
        }
    )
    assert found == {
        "aliases": bad("FIELD_INVALID", "update_mask"),
        "period": bad("FIELD_INVALID", "update_mask"),
        "nothing": bad("FIELD_REQUIRED", "update_mask"),
        "empty name": bad("FIELD_REQUIRED", "customer.name"),
        "empty buyer id": bad("FIELD_REQUIRED", "customer.buyer_id"),
        "long buyer id": bad("LIMIT_EXCEEDED", "customer.buyer_id"),
        "two": bad("FIELD_REQUIRED", "customer.name", "customer.buyer_id"),
        "bad id": bad("FIELD_INVALID", "customer.id"),
        "no such customer": ("NOT_FOUND", "CUSTOMER_NOT_FOUND", ()),
    }
    assert await get_customer(client, IDS[0]) == emptied


async def test_buyer_ids_are_unique(client: Client) -> None:
    """A buyer id that another customer has, by choice or by default, is refused at creation and update."""
    await create_customer(client, id=IDS[0], name="A", buyer_id="buyer")
    await create_customer(client, id=IDS[1], name="B")
    for taken in ("buyer", IDS[1]):
        calls = {
            "create": create_customer(client, id=IDS[2], name="C", buyer_id=taken, ingest_aliases=["c"]),
            "update": update_customer(client, {"buyer": IDS[1]}.get(taken, IDS[0]), name="changed", buyer_id=taken),
        }
        for call in calls.values():
            fault = await fault_of(call)
            assert (fault.code, fault.reason) == ("ALREADY_EXISTS", "BUYER_ID_IN_USE")
            assert fault.metadata == {"buyer_id": taken}
    assert await list_customers(client) == IDS[:2]
    assert [(await get_customer(client, one)).name for one in IDS[:2]] == ["A", "B"]
    await update_customer(client, IDS[0], buyer_id="buyer")
    # An archived customer keeps its buyer id.
    await archive_customer(client, IDS[0])
    assert (await fault_of(create_customer(client, name="C", buyer_id="buyer"))).reason == "BUYER_ID_IN_USE"


async def test_billing_periods_are_set_and_removed(client: Client) -> None:
    """A period replaces the one before as a whole; none in the request removes it; both may be repeated."""
    customer = await create_customer(client, name="Acme")
    whole = customer_pb2.BillingPeriod(**WHOLE_CUSTOMER["billing_period"])
    for _ in range(2):
        assert (await set_period(client, customer.id, **WHOLE_CUSTOMER["billing_period"])).billing_period == whole
    for frequency in ("MONTHLY", "QUARTERLY", "ANNUAL", "WEEKLY"):
        period = {
            "frequency": f"BILLING_FREQUENCY_{frequency}",
            "anchor_date": "1900-01-01",
            "starting_on": "9000-12-31",
        }
        stored = (await set_period(client, customer.id, **period)).billing_period
        assert stored == customer_pb2.BillingPeriod(**period)
        assert not stored.HasField("ending_before")
    expected = {
        name: (code, reason, tuple(f"billing_period.{field}" for field in fields))
        for name, (_, (code, reason, fields)) in BAD_PERIODS.items()
    }
    found = await refusals(
        {name: set_period(client, customer.id, **one) for name, (one, _) in BAD_PERIODS.items() if any(one.values())}
    )
    assert found == {name: expected[name] for name in found}
    assert (await get_customer(client, customer.id)).billing_period == stored
    for _ in range(2):
        assert not (await set_period(client, customer.id)).HasField("billing_period")


async def test_customers_are_listed_by_id(client: Client) -> None:
    """In the order of ids; archived ones only when asked for; a key narrows the list to its owner."""
    for i in (3, 0, 2, 1):
        await create_customer(client, id=IDS[i], name=f"C{i}", ingest_aliases=[f"alias-{i}", str(uuid.UUID(int=i))])
    assert await list_customers(client) == IDS
    for key in ("alias-2", IDS[2], IDS[2].upper(), str(uuid.UUID(int=2))):
        assert await list_customers(client, customer_key=key) == [IDS[2]]
    assert await list_customers(client, customer_key="alias") == []
    assert await list_customers(client, customer_key="ALIAS-2") == []
    await archive_customer(client, IDS[2])
    assert await list_customers(client) == [IDS[0], IDS[1], IDS[3]]
    assert await list_customers(client, include_archived=True) == IDS
    assert await list_customers(client, customer_key="alias-2") == []
    assert await list_customers(client, customer_key="alias-2", include_archived=True) == [IDS[2]]
    fault = await fault_of(list_customers(client, customer_key="a\0"))
    assert fault.brief == ("INVALID_ARGUMENT", "FIELD_INVALID", "customer_key")


async def test_customers_are_picked_by_id(client: Client) -> None:
    """`ids` narrows a list to those that exist, in the order of ids, together with the other filters and in pages."""
    for i in range(4):
        await create_customer(client, id=IDS[i], name=f"C{i}", ingest_aliases=[f"alias-{i}"])
    nobody = str(uuid.UUID(int=7))
    await archive_customer(client, IDS[1])
    assert await list_customers(client, ids=[IDS[3], IDS[1], IDS[0].upper(), nobody]) == [IDS[0], IDS[3]]
    assert await list_customers(client, ids=[IDS[1], IDS[0]], include_archived=True) == IDS[:2]
    assert await list_customers(client, ids=[nobody]) == []
    assert await list_customers(client, ids=[IDS[0]], customer_key="alias-0") == [IDS[0]]
    assert await list_customers(client, ids=[IDS[0]], customer_key="alias-2") == []
    pages, request = [], customer_pb2.ListCustomersRequest(ids=[IDS[3], IDS[0], IDS[2]], page_size=1)
    while not pages or request.page_token:
        page = await client.customers.ListCustomers(request)
        pages.append([one.id for one in page.customers])
        request.page_token = page.next_page_token
    assert pages == [[IDS[0]], [IDS[2]], [IDS[3]]]
    # A token is of the same ids.
    request = customer_pb2.ListCustomersRequest(ids=[IDS[0], IDS[2]], page_size=1)
    token = (await client.customers.ListCustomers(request)).next_page_token
    assert token
    found = await refusals(
        {
            "not a UUID": list_customers(client, ids=[IDS[0], "x"]),
            "empty": list_customers(client, ids=[""]),
            "twice": list_customers(client, ids=[IDS[0], IDS[0].upper()]),
            "too many": list_customers(client, ids=[str(uuid.UUID(int=i)) for i in range(1001)]),
            "of other ids": list_customers(client, ids=[IDS[0]], page_token=token),
        }
    )
    assert {name: fault[0] for name, fault in found.items()} == dict.fromkeys(found, "INVALID_ARGUMENT")
    assert found["not a UUID"] == bad("FIELD_INVALID", "ids[1]")
    assert found["twice"] == bad("DUPLICATE_ITEM", "ids[1]")
    assert found["too many"][1] == "LIMIT_EXCEEDED"
    assert found["of other ids"][1] == "PAGE_TOKEN_INVALID"
    assert await list_customers(client, ids=[str(uuid.UUID(int=i)) for i in range(8, 1008)]) == []


async def test_archived_customers_can_be_listed_alone(client: Client) -> None:
    """`only_archived` lists those that are archived and no others, whatever `include_archived` says."""
    for i in range(3):
        await create_customer(client, id=IDS[i], name=f"C{i}", ingest_aliases=[f"alias-{i}"])
    assert await list_customers(client, only_archived=True) == []
    await archive_customer(client, IDS[2])
    await archive_customer(client, IDS[0])
    for more in ({}, {"include_archived": True}, {"include_archived": False}):
        assert await list_customers(client, only_archived=True, **more) == [IDS[0], IDS[2]]
    assert await list_customers(client, only_archived=True, ids=[IDS[1], IDS[2]]) == [IDS[2]]
    assert await list_customers(client, only_archived=True, customer_key="alias-0") == [IDS[0]]
    assert await list_customers(client, only_archived=True, customer_key="alias-1") == []


# --- Aliases


async def test_aliases_are_replaced_as_a_set(client: Client) -> None:
    """The set sent is the set kept, in byte order; sending it again, in any order, changes nothing but the time."""
    await create_customer(client, id=IDS[0], name="Acme", ingest_aliases=["old", "kept"])
    for aliases in (["kept", "new", "Ä", "Z"], ["Z", "Ä", "new", "kept"]):
        assert list((await set_aliases(client, IDS[0], *aliases)).ingest_aliases) == ["Z", "kept", "new", "Ä"]
    many = [f"{i:04}" for i in range(2_000)]
    assert list((await set_aliases(client, IDS[0], *reversed(many))).ingest_aliases) == many
    assert list((await set_aliases(client, IDS[0])).ingest_aliases) == []
    found = await refusals(
        {
            "twice": set_aliases(client, IDS[0], "a", "a"),
            "empty": set_aliases(client, IDS[0], ""),
            "2,001": set_aliases(client, IDS[0], *many, "one more"),
        }
    )
    assert found == {
        "twice": bad("DUPLICATE_ITEM", "ingest_aliases[1]"),
        "empty": bad("FIELD_REQUIRED", "ingest_aliases[0]"),
        "2,001": bad("LIMIT_EXCEEDED", "ingest_aliases"),
    }
    # What was given up is free.
    await create_customer(client, id=IDS[1], name="Other", ingest_aliases=["old", "new"])


async def test_an_alias_of_another_customer_changes_nothing(client: Client) -> None:
    """One taken key among many refuses the whole call, names the key, and leaves both customers as they were."""
    first = await create_customer(client, id=IDS[0], name="A", ingest_aliases=["a", "shared", "too"])
    second = await create_customer(client, id=IDS[1], name="B", ingest_aliases=["b"])
    for call, keys in (
        (set_aliases(client, IDS[1], "new", "shared", "too"), "shared, too"),
        (set_aliases(client, IDS[1], IDS[0].upper()), IDS[0]),
        (create_customer(client, id=IDS[2], name="C", ingest_aliases=["c", "a"]), "a"),
        (create_customer(client, name="C", ingest_aliases=[IDS[1]]), IDS[1]),
    ):
        fault = await fault_of(call)
        assert (fault.code, fault.reason, fault.metadata) == ("ALREADY_EXISTS", "CUSTOMER_KEY_IN_USE", {"keys": keys})
    assert await get_customer(client, IDS[0]) == first
    assert await get_customer(client, IDS[1]) == second
    assert await list_customers(client) == IDS[:2]
    assert await list_customers(client, customer_key="new") == []


async def test_an_id_that_is_an_alias_cannot_be_created(client: Client) -> None:
    """A UUID that another customer goes by is no id for a new customer, until the alias is given up."""
    await create_customer(client, id=IDS[0], name="A", ingest_aliases=[IDS[1].upper()])
    fault = await fault_of(create_customer(client, id=IDS[1], name="B"))
    assert (fault.code, fault.reason) == ("ALREADY_EXISTS", "CUSTOMER_KEY_IN_USE")
    assert (await fault_of(get_customer(client, IDS[1]))).code == "NOT_FOUND"
    await set_aliases(client, IDS[0])
    assert (await create_customer(client, id=IDS[1], name="B")).id == IDS[1]


async def test_its_own_id_as_an_alias_is_harmless(client: Client) -> None:
    """A customer that lists its own id among its aliases still has its id as a key when they are replaced."""
    metric = await client.create_metric()
    await create_customer(client, id=IDS[2], name="A", ingest_aliases=[IDS[2].upper(), "a"])
    await client.ingest(event(customer_id=IDS[2]))
    assert list((await set_aliases(client, IDS[2], "b")).ingest_aliases) == ["b"]
    assert await usage(client) == {(IDS[2], metric.id): "1"}


async def test_moving_an_alias_moves_its_history(client: Client) -> None:
    """Usage under an alias is its owner's of today, all of it, whoever owned it when the events came."""
    metric = await client.create_metric(group_keys=[{"properties": ["region"]}])
    unique = await client.create_metric(aggregation_type="AGGREGATION_TYPE_UNIQUE", aggregation_key="user")
    for one in IDS[:2]:
        await create_customer(client, id=one, name="C")
    await client.ingest(
        *(event(customer_id="roaming", properties={"user": user}) for user in "abc"),
        *(event(customer_id=IDS[0], properties={"user": user}) for user in "cd"),
        *(event(customer_id=IDS[1], properties={"user": user}) for user in "d"),
    )
    alone = {
        (IDS[0], metric.id): "2",
        (IDS[0], unique.id): "2",
        (IDS[1], metric.id): "1",
        (IDS[1], unique.id): "1",
    }
    assert await usage(client) == alone
    await set_aliases(client, IDS[0], "roaming")
    assert await usage(client) == alone | {(IDS[0], metric.id): "5", (IDS[0], unique.id): "4"}
    await set_aliases(client, IDS[0])
    await set_aliases(client, IDS[1], "roaming")
    assert await usage(client) == alone | {(IDS[1], metric.id): "4", (IDS[1], unique.id): "4"}
    await set_aliases(client, IDS[1])
    assert await usage(client) == alone


async def test_keys_that_look_like_a_uuid_ignore_case_and_others_do_not(client: Client) -> None:
    """Events may name a customer by its id in any letter case; all other keys are compared byte by byte."""
    metric = await client.create_metric()
    alias = "B" + IDS[3][1:]
    made = await create_customer(client, id=IDS[2], name="A", ingest_aliases=[alias.upper(), "Acme"])
    assert list(made.ingest_aliases) == ["Acme", alias.lower()]
    named = (IDS[2], IDS[2].upper(), alias.upper(), alias.lower(), alias)
    await client.ingest(
        *(event(customer_id=key) for key in named),
        *(event(customer_id=key) for key in ("Acme", "acme", " Acme", "ACME")),
    )
    assert await usage(client) == {(IDS[2], metric.id): "6"}
    assert set(await unmatched(client)) == {"acme", " Acme", "ACME"}


async def test_keys_without_an_owner_are_listed(client: Client) -> None:
    """Each key that no customer owns, with its number of events, the first and the last; fewer as keys are taken."""
    metric = await client.create_metric()
    assert await unmatched(client) == {}
    await client.ingest(
        *(event(customer_id="one", at=DAY + hours * HOUR) for hours in (5, 1, 3)),
        event(customer_id=IDS[2].upper(), at=DAY + 2 * HOUR),
        event(customer_id="Zwei", at=DAY),
    )
    one, other = (3, DAY + HOUR, DAY + 5 * HOUR), (1, DAY + 2 * HOUR, DAY + 2 * HOUR)
    assert await unmatched(client) == {"one": one, "Zwei": (1, DAY, DAY), IDS[2]: other}
    await create_customer(client, id=IDS[0], name="A", ingest_aliases=["one"])
    assert set(await unmatched(client)) == {"Zwei", IDS[2]}
    await create_customer(client, id=IDS[2], name="B", ingest_aliases=["Zwei"])
    assert await unmatched(client) == {}
    assert await usage(client) == {(IDS[0], metric.id): "3", (IDS[2], metric.id): "2"}
    await set_aliases(client, IDS[0])
    await client.ingest(event(customer_id="one", at=DAY + 9 * HOUR), event("repeated", customer_id="one", at=DAY))
    await client.ingest(event("repeated", customer_id="one", at=DAY))
    assert await unmatched(client) == {"one": (5, DAY, DAY + 9 * HOUR)}


async def test_keys_without_an_owner_are_listed_in_byte_order(client: Client) -> None:
    """The list is in byte order of the key, and its pages have each key once."""
    keys = ["one", "Zwei", "ä", *IDS]
    await client.ingest(*(event(customer_id=key) for key in keys))
    assert list(await unmatched(client)) == sorted(keys, key=str.encode)
    paged: list[str] = []
    request = event_pb2.ListUnmatchedCustomerKeysRequest(page_size=2)
    while True:
        page = await client.events.ListUnmatchedCustomerKeys(request)
        paged += [one.customer_key for one in page.unmatched_customer_keys]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert paged == sorted(keys, key=str.encode)


async def test_an_archived_customer_goes_on_under_its_name(client: Client) -> None:
    """It is left out of lists and of "all customers"; by id its events are taken and its usage read; its keys stay."""
    metric = await client.create_metric()
    await create_customer(client, id=IDS[0], name="A", ingest_aliases=["a"])
    await create_customer(client, id=IDS[1], name="B", ingest_aliases=["b"])
    await client.ingest(event(customer_id="a"), event(customer_id="b"))
    archived = await archive_customer(client, IDS[0])
    assert archived.HasField("archive_time")
    assert await archive_customer(client, IDS[0].upper()) == archived
    await client.ingest(event(customer_id="a"), event(customer_id=IDS[0]))
    assert await usage(client) == {(IDS[1], metric.id): "1"}
    assert await usage(client, customer_ids=IDS[:2]) == {(IDS[0], metric.id): "3", (IDS[1], metric.id): "1"}
    assert await unmatched(client) == {}
    assert list((await get_customer(client, IDS[0])).ingest_aliases) == ["a"]
    assert (await fault_of(set_aliases(client, IDS[1], "a", "b"))).reason == "CUSTOMER_KEY_IN_USE"
    # Its aliases can be taken from it, on purpose.
    still = await set_aliases(client, IDS[0])
    assert still.archive_time == archived.archive_time
    await set_aliases(client, IDS[1], "a", "b")
    assert await usage(client, customer_ids=IDS[:2]) == {(IDS[0], metric.id): "1", (IDS[1], metric.id): "3"}


# --- Races


async def outcomes(calls: Sequence[Awaitable[Any]]) -> Counter[str]:
    """Make all calls at once; returns how many ended with each reason, "OK" for success."""
    found: Counter[str] = Counter()
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, grpc.aio.AioRpcError):
            found[read_fault(result).reason] += 1
        elif isinstance(result, BaseException):
            raise result
        else:
            found["OK"] += 1
    return found


@pytest.mark.parametrize(
    ("create", "content"),
    [(create_metric, WHOLE_METRIC), (create_customer, WHOLE_CUSTOMER)],
    ids=["metric", "customer"],
)
async def test_equal_creations_at_once_all_succeed(
    client: Client, create: Callable[..., Awaitable[Any]], content: dict[str, Any]
) -> None:
    """Twenty callers that create the same id with the same content all get the one resource, round after round."""
    await client.ingest(event())  # so that a metric has a past to count
    for number in range(5):
        unique = {"key": f"k{number}"} if create is create_metric else {"buyer_id": f"b{number}"}
        if create is create_customer:
            unique["ingest_aliases"] = [f"{number}-{i}" for i in range(3)]
        chosen = new_id()
        made = await asyncio.gather(*(create(client, **{**content, **unique}, id=chosen) for _ in range(20)))
        assert {(one.id, one.create_time.ToNanoseconds()) for one in made} == {
            (chosen, made[0].create_time.ToNanoseconds())
        }
    assert len(await list_metrics(client)) + len(await list_customers(client)) == 5


@pytest.mark.parametrize(
    ("create", "content"),
    [(create_metric, WHOLE_METRIC), (create_customer, WHOLE_CUSTOMER)],
    ids=["metric", "customer"],
)
async def test_of_different_creations_at_once_one_wins(
    client: Client, create: Callable[..., Awaitable[Any]], content: dict[str, Any]
) -> None:
    """Twenty callers that create one id with as many contents: exactly one succeeds, the others learn ID_IN_USE."""
    clashing = {"key", "buyer_id", "ingest_aliases"}
    content = {name: value for name, value in content.items() if name not in clashing}
    for _ in range(5):
        chosen = new_id()
        calls = [create(client, **{**content, "name": f"name {i}"}, id=chosen) for i in range(20)]
        assert await outcomes(calls) == {"OK": 1, "ID_IN_USE": 19}


async def test_of_claims_of_one_unique_name_one_wins(client: Client) -> None:
    """Twenty callers with ids of their own claim one metric key, buyer id or alias: exactly one gets it."""
    for number in range(3):
        count = {"name": "M", "aggregation_type": "AGGREGATION_TYPE_COUNT", "key": f"key-{number}"}
        assert await outcomes([create_metric(client, **count) for _ in range(20)]) == {
            "OK": 1,
            "METRIC_KEY_IN_USE": 19,
        }
        buyers = [create_customer(client, name="C", buyer_id=f"buyer-{number}") for _ in range(20)]
        assert await outcomes(buyers) == {"OK": 1, "BUYER_ID_IN_USE": 19}
        aliases = [create_customer(client, name="C", ingest_aliases=[f"alias-{number}"]) for _ in range(20)]
        assert await outcomes(aliases) == {"OK": 1, "CUSTOMER_KEY_IN_USE": 19}


async def test_of_two_claims_of_the_same_aliases_one_wins(client: Client) -> None:
    """Fifty rounds: two customers claim the same aliases in opposite orders; one gets all, the other is told so."""
    for one in IDS[:2]:
        await create_customer(client, id=one, name="C")
    for number in range(50):
        aliases = [f"{number}-{i}" for i in range(4)]
        calls = [set_aliases(client, IDS[0], *aliases), set_aliases(client, IDS[1], *reversed(aliases))]
        assert await outcomes(calls) == {"OK": 1, "CUSTOMER_KEY_IN_USE": 1}
        owned = [list((await get_customer(client, one)).ingest_aliases) for one in IDS[:2]]
        assert aliases in owned
        assert not set(owned[0]) & set(owned[1])


async def test_customers_that_swap_their_aliases_at_once_are_both_refused(client: Client) -> None:
    """Each wants what the other still has: a deadlock inside, a plain refusal outside, and nothing changed."""
    for one, alias in zip(IDS, "ab", strict=False):
        await create_customer(client, id=one, name="C", ingest_aliases=[alias])
    for _ in range(3):
        calls = [set_aliases(client, IDS[0], "b"), set_aliases(client, IDS[1], "a")]
        assert await outcomes(calls) == {"CUSTOMER_KEY_IN_USE": 2}
        assert [list((await get_customer(client, one)).ingest_aliases) for one in IDS[:2]] == [["a"], ["b"]]


async def test_two_sets_for_one_customer_at_once_are_not_mixed(client: Client) -> None:
    """Of several sets sent for one customer at the same time, one is kept as a whole."""
    await create_customer(client, id=IDS[0], name="C")
    sets = [[*sorted(f"{i}-{j}" for j in range(5)), "common"] for i in range(8)]
    for _ in range(5):
        assert await outcomes([set_aliases(client, IDS[0], *one) for one in sets]) == {"OK": len(sets)}
        assert list((await get_customer(client, IDS[0])).ingest_aliases) in sets


class _Interposed:
    """A connection that lets something else happen after its first insert of customer keys."""

    def __init__(self, connection: Any, between: Callable[[], Awaitable[Any]]) -> None:
        self._connection = connection
        self._between: Callable[[], Awaitable[Any]] | None = between

    async def execute(self, statement: Any, *arguments: Any) -> Any:
        """Execute; after the insert, the other thing once."""
        result = await self._connection.execute(statement, *arguments)
        if self._between and str(statement).startswith("INSERT INTO customer_keys"):
            between, self._between = self._between, None
            await between()
        return result


async def test_an_alias_given_up_during_a_claim_is_owned_or_refused(client: Client, database: Database) -> None:
    """A claim that answers OK owns the alias, also if its former owner gives it up in the middle of the claim."""
    await create_customer(client, id=IDS[0], name="A", ingest_aliases=["moving"])
    await create_customer(client, id=IDS[1], name="B")

    async def claim(connection: Any) -> list[str]:
        between = _Interposed(connection, lambda: set_aliases(client, IDS[0]))
        stored = await customers.set_ingest_aliases(between, "default", uuid.UUID(IDS[1]), ["moving"])  # type: ignore[arg-type]
        return list(stored.ingest_aliases)

    try:
        answered = await database.write("default", claim)
    except AlreadyExists:
        return
    assert answered == ["moving"]
    assert list((await get_customer(client, IDS[1])).ingest_aliases) == ["moving"]
