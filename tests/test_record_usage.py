"""Claims about the usage of records: windows of record metrics, at any bounds, are what the groups add up to."""

import random
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from conftest import Client, event, timestamp
from marketplace import group, reported, sell

from metering.v1 import billable_metric_pb2, customer_pb2, usage_pb2, usage_record_group_pb2
from service.domain.windows import cell_floor
from service.store import metrics as metric_store

Records = list[tuple[str, str, datetime, Decimal]]
"""Buyer, key, time, quantity."""


async def reported_records(client: Client, buyers: int, number: int) -> Records:
    """Report groups at random moments of the last four hours; returns their records."""
    chosen = random.Random(buyers * 1000 + number)
    now = datetime.now(UTC).replace(microsecond=0)
    for i in range(buyers):
        await sell(client, f"e{i}")
    records: Records = []
    groups = []
    for i in range(number):
        buyer = f"e{chosen.randrange(buyers)}"
        at = now - timedelta(seconds=chosen.randrange(4 * 3600))
        keys = chosen.sample(["cpu", "mem"], chosen.randint(1, 2))
        quantities = {key: Decimal(chosen.randint(1, 999)) / 8 for key in keys}
        groups.append(group(f"g{i}", buyer, {key: str(one) for key, one in quantities.items()}, at=at))
        records += [(f"b-{buyer}", key, at, one) for key, one in quantities.items()]
    await reported(client, *groups)
    return records


async def names(client: Client) -> tuple[dict[str, str], dict[str, str]]:
    """Buyer ids by customer id, and record keys by metric id."""
    customers = (await client.customers.ListCustomers(customer_pb2.ListCustomersRequest())).customers
    metrics = await client.metrics.ListBillableMetrics(billable_metric_pb2.ListBillableMetricsRequest())
    return (
        {one.id: one.buyer_id for one in customers},
        {one.id: one.record_key for one in metrics.billable_metrics if one.record_key},
    )


def expected(records: Records, start: datetime, end: datetime) -> dict[tuple[str, str], Decimal]:
    """What records of a span add up to, by buyer and key."""
    found: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for buyer, key, at, quantity in records:
        if start <= at < end:
            found[buyer, key] += quantity
    return dict(found)


def spans(now: datetime) -> list[tuple[datetime, datetime]]:
    """Whole hours, hours cut at one end and at both, and a part of one hour."""
    hour = cell_floor(now)
    minutes = timedelta(minutes=1)
    return [
        (hour - timedelta(hours=5), hour + timedelta(hours=1)),
        (hour - 150 * minutes, hour),
        (hour - timedelta(hours=3), hour - 17 * minutes),
        (hour - 133 * minutes, hour - 7 * minutes),
        (hour - 50 * minutes, hour - 20 * minutes),
        (now - timedelta(hours=9), now - timedelta(hours=8)),
    ]


async def test_windows_are_the_records_at_any_bounds(client: Client) -> None:
    """Of all metrics and customers, of those named, and streamed: bounds that cut hours change nothing but the sum."""
    # Plain events of the same type and customers belong to other metrics.
    await client.create_metric(name="plain", event_type_filter={"in_values": ["cpu"]})
    records = await reported_records(client, buyers=3, number=120)
    buyers, keys = await names(client)
    plain = [
        event(customer_id=one, event_type="cpu", at=datetime.now(UTC), properties={"quantity": 5}) for one in buyers
    ]
    await client.ingest(*plain)
    for start, end in spans(datetime.now(UTC)):
        fields: dict[str, Any] = {
            "window_size": "WINDOW_SIZE_NONE", "starting_on": timestamp(start), "ending_before": timestamp(end),
        }  # fmt: skip
        selectors = [{"id": one} for one in sorted(keys)]
        stream = client.usage.StreamUsage(usage_pb2.StreamUsageRequest(**fields))
        readings = [
            await client.all_usage(**fields),
            await client.all_usage(**fields, customer_ids=sorted(buyers), billable_metrics=selectors),
            await client.all_usage(**fields, billable_metrics=selectors[:1]),
            [window async for message in stream for window in message.windows],
        ]
        wanted = expected(records, start, end)
        for number, windows in enumerate(readings):
            found = {
                (buyers[one.customer_id], keys[one.billable_metric_id]): Decimal(one.value)
                for one in windows
                if one.HasField("value") and one.billable_metric_id in keys
            }
            only = {keys[selectors[0]["id"]]} if number == 2 else set(keys.values())
            assert found == {pair: total for pair, total in wanted.items() if pair[1] in only}


async def test_changes_of_records_are_told(client: Client) -> None:
    """Deleting a group is a change of its windows: a sync gets them with what is left, and nothing else."""
    records = await reported_records(client, buyers=2, number=20)
    now = datetime.now(UTC)
    fields: dict[str, Any] = {
        "window_size": "WINDOW_SIZE_NONE",
        "starting_on": timestamp(cell_floor(now) - timedelta(hours=5)),
        "ending_before": timestamp(cell_floor(now) + timedelta(hours=1)),
    }
    before = await client.usage.ListUsage(usage_pb2.ListUsageRequest(**fields))
    since = before.next_updated_since
    await client.groups.DeleteUsageRecordGroup(usage_record_group_pb2.DeleteUsageRecordGroupRequest(id="g0"))
    deleted = await client.groups.GetUsageRecordGroup(usage_record_group_pb2.GetUsageRecordGroupRequest(id="g0"))
    changed = await client.all_usage(**fields, updated_since=since)
    buyers, keys = await names(client)
    buyer = deleted.group.buyer_id
    gone = {(buyer, key): Decimal(quantity) for key, quantity in deleted.group.records.items()}
    span = (cell_floor(now) - timedelta(hours=5), cell_floor(now) + timedelta(hours=1))
    wanted = expected(records, *span)
    found = {(buyers[w.customer_id], keys[w.billable_metric_id]): Decimal(w.value or 0) for w in changed}
    assert found == {pair: wanted[pair] - quantity for pair, quantity in gone.items()}


async def test_record_metrics_without_records_are_not_among_all(client: Client, database: Any) -> None:
    """However many keys there are, a query of all metrics regards those under which something was reported."""
    await sell(client)
    countable = await database.read("default", lambda c: metric_store.countable_metrics(c, "default", None))
    assert countable == []
    await reported(client, group("g"))
    countable = await database.read("default", lambda c: metric_store.countable_metrics(c, "default", None))
    assert [metric.record_key for metric in countable] == ["cpu"]
