"""Claims about cost: under row level security, what usage, searches and ingest send is answered by indexes."""

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import acting_for, event, running_server, timestamp
from faults import until
from sqlalchemy.ext.asyncio import AsyncConnection
from test_record_group_list import Statement, explain, sent_by
from test_tenancy import Caller, new_key

from service.database import Database
from service.store.tables import APPLICATION_ROLE, usage_cells, usage_distinct_values, usage_events

START = datetime(2026, 1, 1, tzinfo=UTC)
DAYS = 30
NUMBER = 50_000
CUSTOMERS = [f"00000000-0000-4000-8000-0000000001{i:02}" for i in range(20)]
METRIC, UNIQUE = (f"00000000-0000-4000-8000-0000000002{i:02}" for i in range(2))
GROWING = {usage_events.name, usage_cells.name, usage_distinct_values.name}

# Keys of 25 customers, of whom five are not there.
FILL = """
INSERT INTO usage_events (organization_id, transaction_id, customer_key, event_type, timestamp, properties, digest)
SELECT organization, 'e' || i, 'key-' || i % 25, 'type ' || i % 3,
    timestamptz '2026-01-01Z' + interval '1 second' * (i * 51),
    jsonb_build_object('n', i % 7, 'region', 'r' || i % 4), ''
FROM unnest(ARRAY['one', 'two']) AS organization, generate_series(0, $1::int - 1) AS i
"""


@pytest.fixture
async def caller(database_url: str, database: Database) -> AsyncIterator[Caller]:
    """An organization beside another one, each with many events."""
    keys = [await new_key(database, name) for name in ("one", "two")]
    async with running_server(database_url) as client:
        one, two = (Caller(client, key, database, name) for key, name in zip(keys, ("one", "two"), strict=True))
        async with database.engine.begin() as connection:
            await connection.exec_driver_sql(FILL, (NUMBER,))
        group_keys = [{"properties": ["region"]}]
        for each in (one, two):
            for i, customer in enumerate(CUSTOMERS):
                names = {"name": customer, "ingest_aliases": [f"key-{i}"]}
                await each.call("CreateCustomer", customer={"id": customer, **names})
            for metric, aggregation in ((METRIC, "SUM"), (UNIQUE, "UNIQUE")):
                how = {"aggregation_type": f"AGGREGATION_TYPE_{aggregation}", "aggregation_key": "n"}
                definition = {"id": metric, "name": metric, "group_keys": group_keys, **how}
                await each.call("CreateBillableMetric", billable_metric=definition)

        async def counted() -> bool:
            found = [
                (await each.call("GetBillableMetric", id=metric)).billable_metric
                for each in (one, two)
                for metric in (METRIC, UNIQUE)
            ]
            return not any(metric.HasField("backfill_progress") for metric in found)

        await until(counted, 60)
        yield two


def asked(**fields: Any) -> dict[str, Any]:
    """A usage query of a month, by days."""
    end = timestamp(START + timedelta(days=DAYS))
    return {"window_size": "WINDOW_SIZE_DAY", "starting_on": timestamp(START), "ending_before": end, **fields}


GROUPED = {"customer_id": CUSTOMERS[3], "billable_metric_id": METRIC, "group_key": ["region"]}
# Bounds that cut hours on both sides.
CUT = {
    "window_size": "WINDOW_SIZE_NONE",
    "starting_on": timestamp(START + timedelta(minutes=7)),
    "ending_before": timestamp(START + timedelta(days=9, minutes=7)),
}
MONTH = {"starting_on": timestamp(START), "ending_before": timestamp(START + timedelta(days=DAYS))}
# With the most rows of events and cells that each may look at.
CALLS: list[tuple[str, dict[str, Any], int]] = [
    ("ListUsage", asked(), 150_000),
    ("ListUsage", asked(customer_ids=CUSTOMERS[:1]), 10_000),
    # A cell an hour, however many groups there are.
    ("ListUsage", asked(customer_ids=CUSTOMERS[:1], billable_metrics=[{"id": METRIC}]), 24 * DAYS),
    ("ListUsage", asked(**CUT), 60_000),
    ("ListUsage", asked(**CUT, customer_ids=CUSTOMERS[:1]), 20_000),
    ("ListUsage", asked(billable_metrics=[{"id": METRIC, "group_by": {"key": "region"}}]), 90_000),
    ("ListUsage", asked(billable_metrics=[{"id": UNIQUE}]), 130_000),
    ("ListUsageWithGroups", asked(**GROUPED), 5_000),
    ("ListUsageWithGroups", asked(**GROUPED, **CUT), 5_000),
    ("SearchEvents", {"transaction_ids": [f"e{i}" for i in range(50)]}, 200),
    ("SearchEvents", {"transaction_ids": ["nowhere"]}, 0),
    ("SearchEvents", {"customer_id": "key-3"}, 1_000),
    ("SearchEvents", {"customer_id": CUSTOMERS[3], "event_type": "type 1", **MONTH}, 3_000),
    ("SearchEvents", {**MONTH}, 3_000),
    ("ListUnmatchedCustomerKeys", {}, NUMBER // 5 + 1_000),
    ("IngestEvents", {"events": [event(f"e{i}", properties={"n": 1}) for i in range(30)]}, 100),
    ("IngestEvents", {"events": [event(f"n{i}", properties={"n": 1, "region": "r"}) for i in range(30)]}, 100),
]


async def read_by(connection: AsyncConnection, statement: Statement) -> tuple[int, list[Any]]:
    """How many rows of the tables that grow a statement looks at, and where it reads one of them whole."""
    runs = not re.search(r"\b(INSERT|UPDATE|DELETE)\b", statement.text)
    nodes = await explain(connection, statement, analyze=runs)
    # What was run and has no row was not needed.
    nodes = [node for node in nodes if node.table in GROWING and (node.rows or not runs)]
    return sum(node.rows for node in nodes), [node for node in nodes if node.kind == "Seq Scan" or not node.by]


async def test_calls_read_by_index(caller: Caller, database: Database) -> None:
    """In callers' role, with 10^5 events of two organizations, no call reads a table from end to end, nor much more
    than its answer is made of.
    """
    await know(database, analyzed=True)
    for method, fields, most in CALLS:
        async with acting_for(database, caller.organization) as connection:
            _, statements = await sent_by(connection, lambda _, one=(method, fields): caller.call(one[0], **one[1]))
            of_events = [one for one in statements if re.search("|".join(GROWING), one.text)]
            assert of_events, method
            total = 0
            for one in of_events:
                rows, whole = await read_by(connection, one)
                assert not whole, (method, fields, one.text, whole)
                total += rows
            print(f"{method:28} {total:7} of {most:7}")
            assert total <= most, (method, fields, total)


async def know(database: Database, *, analyzed: bool) -> None:
    """Give Postgres its statistics, or take them away."""
    async with database.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.exec_driver_sql("VACUUM ANALYZE" if analyzed else "DELETE FROM pg_statistic")


@pytest.mark.parametrize("analyzed", [True, False], ids=["analyzed", "new"])
async def test_policies_cost_no_rows(caller: Caller, database: Database, *, analyzed: bool) -> None:
    """The same statements, sent by the owner whom no policy binds, look at as many rows as in callers' role."""
    await know(database, analyzed=analyzed)
    for method, fields, _ in CALLS:
        if method == "IngestEvents":
            continue
        async with acting_for(database, caller.organization) as connection:
            _, statements = await sent_by(connection, lambda _, one=(method, fields): caller.call(one[0], **one[1]))
            numbers = []
            for role in (APPLICATION_ROLE, "none"):
                await connection.exec_driver_sql(f"SET LOCAL ROLE {role}")
                numbers.append([(await read_by(connection, one))[0] for one in statements if "usage_" in one.text])
        print(f"{method:28} {sum(numbers[0]):7} {sum(numbers[1]):7}")
        assert sum(numbers[0]) <= 1.1 * sum(numbers[1]) + 10, (method, fields, numbers)
