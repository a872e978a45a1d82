"""Events in, usage out: the shortest way through everything."""

from datetime import UTC, datetime

from conftest import Client, event, timestamp


async def test_events_become_usage(client: Client) -> None:
    """What is ingested is at once in the answer."""
    metric = await client.create_metric(aggregation_type="AGGREGATION_TYPE_SUM", aggregation_key="bytes")
    customer = await client.create_customer(ingest_aliases=["acme"])
    response = await client.ingest(*(event(properties={"bytes": n}) for n in (1, 2.5, "39")))
    assert list(response.verdicts) == [1, 1, 1]
    windows = await client.all_usage(
        window_size="WINDOW_SIZE_DAY",
        starting_on=timestamp(datetime(2026, 1, 1, tzinfo=UTC)),
        ending_before=timestamp(datetime(2026, 1, 2, tzinfo=UTC)),
    )
    assert [(w.customer_id, w.billable_metric_id, w.value) for w in windows] == [(customer.id, metric.id, "42.5")]
