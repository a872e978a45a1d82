"""What one caller can take from the others, and what a database's own settings can change: nothing that matters."""

import asyncio
import functools
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from conftest import Client, event, running_server, timestamp
from faults import fault_of

import service.ingest
import service.store.events
import service.store.metrics
import service.store.usage
from metering.v1 import billable_metric_pb2, customer_pb2, event_pb2, usage_pb2
from service.database import BadDatabaseUrl, Database
from service.domain.events import TimeLimits
from service.domain.pages import PAGE_SIZE_DEFAULT
from service.store import organizations

START = datetime(2026, 1, 1, tzinfo=UTC)
MIB = 1024 * 1024


async def test_isolation_does_not_depend_on_the_database(database_url: str) -> None:
    """Transactions are READ COMMITTED and writable, whatever the database has as its default."""
    database = Database(database_url)
    name = sa.make_url(database_url).database
    async with database.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        for setting in ("default_transaction_isolation = 'repeatable read'", "default_transaction_read_only = on"):
            await connection.execute(sa.text(f'ALTER DATABASE "{name}" SET {setting}'))
    await database.engine.dispose()
    query = sa.select(
        sa.func.current_setting("transaction_isolation"), sa.func.current_setting("transaction_read_only")
    )
    for run in (functools.partial(database.write, "default"), database.background):
        assert tuple((await run(lambda c: c.execute(query))).one()) == ("read committed", "off")
    await database.close()


async def test_verdicts_arrive_however_bad_the_others_are(client: Client) -> None:
    """One good event among 9,999 with many long faults gets its verdict in a message that a client accepts."""
    bad = event_pb2.UsageEvent(transaction_id="bad", customer_id="acme", event_type="x", timestamp=timestamp(START))
    bad.properties["a property with a name of sixty characters, as it may be ...."] = [float("nan")] * 5
    response = await client.ingest(event("good"), *[bad] * 9_999)
    assert list(response.verdicts) == [event_pb2.VERDICT_ACCEPTED, *[event_pb2.VERDICT_REJECTED] * 9_999]
    assert response.issues
    assert response.ByteSize() < 3.2 * MIB


@pytest.mark.parametrize("filler", [{}, {"k" * 8: None}, [], None, "", 0, False])
async def test_a_bad_event_costs_little(client: Client, filler: Any) -> None:
    """An event of megabytes is refused after a look at its first kilobytes, whatever it is filled with."""
    huge = event("huge")
    huge.properties["p"] = [filler] * 200_000
    request = event_pb2.IngestEventsRequest(events=[huge])
    await client.ingest(event("warm"))
    began = time.monotonic()
    response = await client.events.IngestEvents(request)
    assert list(response.verdicts) == [event_pb2.VERDICT_REJECTED]
    # Decoding takes most of it; what is bounded here is a liveness limit, ten times what is typical.
    assert time.monotonic() - began < 5


async def test_catalog_pages_are_cut_by_size(client: Client) -> None:
    """Customers with very many aliases make short pages, each of about 1 MiB, and none is lost."""
    ids = sorted(str(uuid.uuid4()) for _ in range(20))
    for number, customer_id in enumerate(ids):
        aliases = [f"{number}-{alias}".ljust(128, "x") for alias in range(2_000)]
        await client.create_customer(id=customer_id, ingest_aliases=aliases)
    found: list[str] = []
    request = customer_pb2.ListCustomersRequest()
    while True:
        page = await client.customers.ListCustomers(request)
        assert page.ByteSize() < 1.2 * MIB
        found += [customer.id for customer in page.customers]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert found == ids
    assert len(ids) < PAGE_SIZE_DEFAULT


async def test_metrics_are_limited(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """An organization has a bounded number of metrics, archived ones included; a repeated creation is none more."""
    monkeypatch.setattr(service.store.metrics, "METRICS_MAX", 2)
    first = await client.create_metric(id=str(uuid.uuid4()))
    await client.metrics.ArchiveBillableMetric(billable_metric_pb2.ArchiveBillableMetricRequest(id=first.id))
    second = str(uuid.uuid4())
    await client.create_metric(id=second)
    with pytest.raises(grpc.aio.AioRpcError, match="one metric too many") as refused:
        await client.create_metric()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await client.create_metric(id=second)).id == second


async def test_many_metrics_count_one_event(client: Client) -> None:
    """Two hundred metrics of one organization are all counted, in one statement."""
    for number in range(200):
        await client.create_metric(
            name=f"m{number}",
            aggregation_type="AGGREGATION_TYPE_SUM",
            aggregation_key="n",
            property_filters=[{"name": "k", "in_values": [str(number), "all"]}],
        )
    await client.create_customer(ingest_aliases=["acme"])
    await client.ingest(event(properties={"n": 2, "k": "all"}), event(properties={"n": 1, "k": "7"}))
    bounds = {"starting_on": timestamp(START), "ending_before": timestamp(START + timedelta(days=1))}
    windows = await client.all_usage(window_size="WINDOW_SIZE_NONE", **bounds)
    assert sorted((w.billable_metric_name, w.value) for w in windows) == sorted(
        (f"m{number}", "3" if number == 7 else "2") for number in range(200)
    )


async def test_the_order_of_sets_is_no_content(client: Client) -> None:
    """A metric sent again with its group properties and filter values in another order is the same metric."""
    fields = {"id": str(uuid.uuid4()), "name": "m"}
    for properties, values in ((["a", "b"], ["1", "2"]), (["b", "a"], ["2", "1"])):
        metric = await client.create_metric(
            **fields, group_keys=[{"properties": properties}], event_type_filter={"in_values": values}
        )
    assert metric.id == fields["id"]


@pytest.mark.parametrize("omit", [False, True])
async def test_pages_cut_by_time_are_whole_together(
    client: Client, monkeypatch: pytest.MonkeyPatch, omit: bool
) -> None:
    """When every page is out of time at once, the pages are short and together the same windows."""
    for alias in ("a", "b", "c"):
        await client.create_customer(ingest_aliases=[alias])
        await client.ingest(*(event(customer_id=alias, at=START + timedelta(hours=7 * n)) for n in range(5)))
    await client.create_metric()
    await client.create_metric(aggregation_type="AGGREGATION_TYPE_MAX", aggregation_key="n")
    query = {
        "window_size": "WINDOW_SIZE_HOUR",
        "starting_on": timestamp(START),
        "ending_before": timestamp(START + timedelta(days=2)),
        "omit_empty_windows": omit,
    }
    expected = await client.all_usage(**query)
    monkeypatch.setattr(service.store.usage, "PAGE_S", -1.0)
    monkeypatch.setattr(service.store.usage, "SLICE_MAX", 48)
    request = usage_pb2.ListUsageRequest(**query, page_size=500)
    pages = []
    while True:
        page = await client.usage.ListUsage(request)
        pages.append(list(page.windows))
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert [window for page in pages for window in page] == expected
    assert omit or len(pages) > 1


@pytest.mark.parametrize("changes", [False, True])
async def test_candidates_are_passed_in_bounded_steps(
    client: Client, monkeypatch: pytest.MonkeyPatch, changes: bool
) -> None:
    """Many customers without usage, or without a change, cost short pages and messages, and hide none that has some."""
    for number in range(12):
        await client.create_customer(id=str(uuid.UUID(int=number)), ingest_aliases=[f"c{number}"])
    await client.create_metric()
    await client.ingest(*(event(customer_id=f"c{number}", at=START) for number in (0, 7, 11)))
    query: dict[str, Any] = {
        "window_size": "WINDOW_SIZE_NONE",
        "starting_on": timestamp(START),
        "ending_before": timestamp(START + timedelta(days=2)),
    }
    if changes:
        query["updated_since"] = timestamp(START)
    expected = await client.all_usage(**query)
    assert [uuid.UUID(window.customer_id).int for window in expected] == [0, 7, 11]
    monkeypatch.setattr(service.store.usage, "PAGE_S", -1.0)
    monkeypatch.setattr(service.store.usage, "CHANGES_PROBED" if changes else "PAIRS_PROBED", 2)
    pages = []
    request = usage_pb2.ListUsageRequest(**query)
    while not pages or request.page_token:
        page = await client.usage.ListUsage(request)
        pages.append(list(page.windows))
        request.page_token = page.next_page_token
    assert [window for page in pages for window in page] == expected
    assert [] in pages[:-1], "the server went further than one step"
    messages = [message async for message in client.usage.StreamUsage(usage_pb2.StreamUsageRequest(**query))]
    assert [window for message in messages for window in message.windows] == expected
    assert any(not message.windows for message in messages[:-1])


async def test_a_large_filter_costs_little(client: Client) -> None:
    """Group keys and filters by the thousand are refused at once, with a few words."""
    request = usage_pb2.ListUsageWithGroupsRequest(
        customer_id=str(uuid.uuid4()),
        billable_metric_id=str(uuid.uuid4()),
        window_size="WINDOW_SIZE_NONE",
        starting_on=timestamp(START),
        ending_before=timestamp(START + timedelta(days=1)),
        group_key=[f"k{number}" for number in range(40_000)],
        group_filters={f"f{number}": usage_pb2.GroupFilter() for number in range(40_000)},
    )
    began = time.monotonic()
    fault = await fault_of(client.usage.ListUsageWithGroups(request))
    assert fault.brief == ("INVALID_ARGUMENT", "LIMIT_EXCEEDED", "group_key")
    assert fault.fields == ("group_key", "group_filters")
    # Typically 0.1 s; looked up one in the other, they took minutes.
    assert time.monotonic() - began < 10


async def test_groups_of_a_window_are_cut_by_size(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group values that would make a window larger than clients take are left out, and it says so."""
    metric = await client.create_metric(group_keys=[{"properties": ["g"]}])
    await client.create_customer(ingest_aliases=["acme"])
    await client.ingest(*(event(properties={"g": f"{number:02}" + "x" * 998}) for number in range(10)))
    query = {
        "billable_metrics": [{"id": metric.id, "group_by": {"key": "g"}}],
        "window_size": "WINDOW_SIZE_NONE",
        "starting_on": timestamp(START),
        "ending_before": timestamp(START + timedelta(days=1)),
    }
    (whole,) = await client.all_usage(**query)
    assert (len(whole.groups), whole.groups_truncated) == (10, False)
    monkeypatch.setattr(service.store.usage, "GROUPS_BYTES_MAX", 4_500)
    (cut,) = await client.all_usage(**query)
    assert sorted(cut.groups) == sorted(whole.groups)[:4]
    assert (cut.groups_truncated, cut.value) == (True, "10")


async def test_a_caller_that_left_leaves_no_events_behind(database: Database, client: Client) -> None:
    """Batches whose callers gave up are out of the queue, and of memory, at once."""
    ingest = service.ingest.Ingest(database, TimeLimits())
    async with database.engine.begin() as connection:
        await organizations.lock_exclusive(connection, "default")
        taken = [asyncio.create_task(ingest.ingest("default", service.ingest.Batch([]))) for _ in range(2)]
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(ingest.ingest("default", service.ingest.Batch([]))) for _ in range(20)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        queue = ingest._queues.get("default")
        assert queue is None or not queue.calls
    await asyncio.gather(*taken)
    await ingest.close()


async def test_one_broken_metric_does_not_stop_the_others(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric whose backfill fails is left for later; those of other callers are counted."""
    broken = str(uuid.uuid4())
    chunk = service.store.metrics.backfill_chunk

    async def fail_one(connection: Any, organization: str, metric_id: uuid.UUID) -> bool:
        if str(metric_id) == broken:
            raise RuntimeError("broken")
        return await chunk(connection, organization, metric_id)

    monkeypatch.setattr(service.store.metrics, "backfill_chunk", fail_one)
    async with running_server(database_url) as client:
        await client.ingest(event())
        request = billable_metric_pb2.CreateBillableMetricRequest(
            billable_metric=billable_metric_pb2.BillableMetric(
                id=broken, name="broken", aggregation_type=billable_metric_pb2.AGGREGATION_TYPE_COUNT
            )
        )
        await client.metrics.CreateBillableMetric(request)
        assert not (await client.create_metric()).HasField("backfill_progress")


async def test_unmatched_keys_are_walked_in_bounded_steps(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call walks over a bounded number of keys and gives a token to go on; together the pages are all keys."""
    monkeypatch.setattr(service.store.events, "KEYS_WALKED", 3)
    monkeypatch.setattr(service.store.events, "WALKS_MAX", 2)
    await client.create_customer(ingest_aliases=[f"owned{n:02}" for n in range(20)])
    await client.ingest(*(event(customer_id=f"owned{n:02}") for n in range(20)), event(customer_id="zwei"))
    request = event_pb2.ListUnmatchedCustomerKeysRequest()
    found, pages = [], 0
    while True:
        page = await client.events.ListUnmatchedCustomerKeys(request)
        pages += 1
        found += [key.customer_key for key in page.unmatched_customer_keys]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert (found, pages) == (["zwei"], 4)


def test_database_urls_are_read_as_libpq_users_write_them() -> None:
    """`sslmode` is understood; what is not is refused without repeating the URL and its password."""
    Database("postgresql://me:secret@db.example/metering?sslmode=require")
    for url in ("postgresql://me:secret@db/metering?target_session_attrs=any", "secret"):
        with pytest.raises(BadDatabaseUrl) as refused:
            Database(url)
        assert "secret" not in str(refused.value)
