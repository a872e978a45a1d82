"""The promises of SearchEvents: which events are found, in which order, and that what it says of metrics is so."""

import asyncio
import itertools
import uuid
from typing import Any

import oracle
import pytest
import test_oracle
from conftest import Client, timestamp
from test_oracle import (
    ALIASES,
    CUSTOMERS,
    HISTORY,
    ID_PREFIXES,
    NASTY_VALUES,
    PLAIN_VALUES,
    Servers,
    archive,
    create,
    fetch,
    read_search,
    require_explained,
    wire,
)

from metering.v1 import billable_metric_pb2, event_pb2
from service import backfill

servers = test_oracle.servers


def _metric(number: int, aggregation: str = "COUNT", **fields: Any) -> oracle.Metric:
    key = "" if aggregation == "COUNT" else "q"
    return oracle.Metric(str(uuid.UUID(int=number)), aggregation, key, **fields)


async def test_search_finds_by_every_criterion(servers: Servers) -> None:
    """Each criterion and each two together find what they say, latest first, at every page size, on every server."""
    tenant = await servers.tenant()
    client = tenant.clients[0]
    keys = {CUSTOMERS[1]: {CUSTOMERS[1], *ALIASES[:2]}, CUSTOMERS[2]: {CUSTOMERS[2], ALIASES[2]}}
    for customer_id, owned in keys.items():
        await client.create_customer(id=customer_id, ingest_aliases=owned - {customer_id})
    undashed = CUSTOMERS[1].replace("-", "")
    sent = [
        oracle.Event(f"{prefix}{i}", key, event_type, HISTORY + (i % 3) * oracle.MICROSECOND, {})
        for i, (key, event_type, prefix) in enumerate(
            itertools.product((*ALIASES, *CUSTOMERS[:3], undashed), ("call", "Call"), ID_PREFIXES[:5])
        )
    ]
    await client.ingest(*map(wire, sent))
    turns = itertools.cycle(tenant.clients)
    for key, event_type, (start, end), page_size in itertools.product(
        ("", CUSTOMERS[1], CUSTOMERS[1].upper(), CUSTOMERS[0], ALIASES[0], ALIASES[3], "acm", undashed),
        ("", "Call", "other"),
        ((None, None), (HISTORY + oracle.MICROSECOND, None), (HISTORY, HISTORY + oracle.MICROSECOND)),
        (0, 1, 4),
    ):
        if page_size == 1 and not (key and event_type):
            continue
        request = event_pb2.SearchEventsRequest(customer_id=key, event_type=event_type, page_size=page_size)
        for field_name, bound in (("starting_on", start), ("ending_before", end)):
            if bound:
                getattr(request, field_name).CopyFrom(timestamp(bound))
        stored_key = key.lower() if len(key) == 36 else key
        named = frozenset(keys.get(stored_key, {stored_key} if key else ()))
        expected = oracle.search(sent, oracle.Search(frozenset(), named, event_type, start, end))
        found = await read_search(lambda: next(turns), request)
        assert [one.event.transaction_id for one in found] == [one.transaction_id for one in expected], request
    ids = [one.transaction_id for one in sent[::3]]
    for page_size in (0, 1, 7):
        request = event_pb2.SearchEventsRequest(transaction_ids=["nowhere", *ids], page_size=page_size)
        found = await read_search(lambda: next(turns), request)
        expected = oracle.search(sent, oracle.Search(frozenset(ids)))
        assert [one.event.transaction_id for one in found] == [one.transaction_id for one in expected]


async def test_every_rule_is_named(servers: Servers) -> None:
    """For every value, and every rule that can fail, the outcome and the first failing rule are what the rules say."""
    tenant = await servers.tenant()
    client = tenant.clients[0]
    both = (
        oracle.Filter("q", None, ("60", "1.5", "text", "[1, 2.5]")),
        oracle.Filter("g", True, ("x", "y"), ("y",)),
    )
    metrics = [
        _metric(1),
        _metric(2, "UNIQUE", filters=(oracle.Filter("g", exists=False),)),
        _metric(3, "SUM", filters=both),
        _metric(4, "LATEST", event_types=("call", "other"), excluded_event_types=("other",)),
        _metric(5, "MAX", filters=(oracle.Filter("q", True, (), ("60", "true")), both[1])),
    ]
    for one in metrics[:3]:
        await create(client, one)
    metrics[0] = await archive(client, metrics[0])
    assert metrics[0].archived_at is not None
    sent = [
        oracle.Event(f"{i} {j}", "acme", event_type, HISTORY + i * oracle.MICROSECOND, {"q": value, **more})
        for i, value in enumerate((*PLAIN_VALUES, *NASTY_VALUES))
        for j, (event_type, more) in enumerate((("call", {"g": "x"}), ("other", {"g": "y"}), ("third", {})))
    ]
    sent += [
        oracle.Event(f"late {i}", "acme", "call", metrics[0].archived_at + i * oracle.MICROSECOND, {}) for i in (-1, 0)
    ]
    await client.ingest(*map(wire, sent))
    for one in metrics[3:]:
        await create(client, one)
    for one in metrics:
        await client.counted(await fetch(client, one.id))
    stored = {one.transaction_id: one for one in sent}
    turns = itertools.cycle(tenant.clients)
    found = await read_search(lambda: next(turns), event_pb2.SearchEventsRequest(page_size=1_000))
    assert {one.event.transaction_id for one in found} == set(stored)
    for event in found:
        require_explained(event, stored[event.event.transaction_id], metrics)
    paths = {explanation.rule for event in found for explanation in event.metrics}
    assert paths >= {
        "aggregation_key",
        "archive_time",
        "event_type_filter.in_values",
        "event_type_filter.not_in_values",
        "property_filters[0].exists",
        "property_filters[0].in_values",
        "property_filters[0].not_in_values",
        "property_filters[1].exists",
        "property_filters[1].not_in_values",
    }


async def test_pending_until_the_past_is_counted(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a metric counts its past, what it has not counted yet is PENDING, and what it has is COUNTED."""
    opened = asyncio.Event()
    original = backfill.Backfill._count_chunk

    async def count_chunk(self: backfill.Backfill, organization: str, metric_id: uuid.UUID) -> None:
        await opened.wait()
        await original(self, organization, metric_id)

    monkeypatch.setattr(backfill.Backfill, "_count_chunk", count_chunk)
    metric = _metric(1, "SUM")
    past = [
        oracle.Event("number", "acme", "call", HISTORY, {"q": 1}),
        oracle.Event("text", "acme", "call", HISTORY, {"q": "text"}),
    ]
    await client.ingest(*map(wire, past))
    await create(client, metric)
    # Before all that there was when the metric was made: counted at once.
    early = oracle.Event("early", "acme", "call", HISTORY - oracle.HOUR, {"q": 2})
    late = oracle.Event("late", "acme", "call", HISTORY + oracle.HOUR, {"q": 3})
    await client.ingest(wire(early), wire(late))

    async def outcomes() -> dict[str, str]:
        found = await read_search(lambda: client, event_pb2.SearchEventsRequest())
        return {
            one.event.transaction_id: event_pb2.MetricOutcome.Name(one.metrics[0].outcome).removeprefix(
                "METRIC_OUTCOME_"
            )
            for one in found
        }

    assert await outcomes() == {"early": "COUNTED", "number": "PENDING", "text": "PENDING", "late": "PENDING"}
    opened.set()
    await client.counted(await fetch(client, metric.id))
    assert await outcomes() == {"early": "COUNTED", "number": "COUNTED", "text": "SKIPPED", "late": "COUNTED"}


async def test_explanations_have_the_name_of_now(client: Client) -> None:
    """A metric that was renamed is called by its new name."""
    metric = await client.create_metric(name="old")
    await client.ingest(wire(oracle.Event("t", "acme", "call", HISTORY, {})))
    for name in ("old", "new"):
        changed = billable_metric_pb2.BillableMetric(id=metric.id, name=name)
        request = billable_metric_pb2.UpdateBillableMetricRequest(billable_metric=changed)
        request.update_mask.paths.append("name")
        await client.metrics.UpdateBillableMetric(request)
        [found] = await read_search(lambda: client, event_pb2.SearchEventsRequest())
        assert found.metrics[0].billable_metric_name == name
