"""Claims about the hourly job: it runs by itself, one at a time, over everything that waits, and mends what failed."""

import asyncio
import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import Client, running_server
from faults import fault_of, until
from marketplace import group, lease, reported, roll_up, sell

from metering.v1 import usage_record_report_pb2
from service import reporting
from service.database import Database
from service.domain.partners import DEFAULT_RULES
from service.domain.windows import cell_floor
from service.errors import Unavailable
from service.reporting import last_hour, roll_up_hour
from service.store import roll_up as store
from service.store.tables import usage_record_reports

HOUR = timedelta(hours=1)


async def reports(client: Client, **fields: Any) -> list[usage_record_report_pb2.UsageRecordReport]:
    """The first page of ListUsageRecordReports."""
    request = usage_record_report_pb2.ListUsageRecordReportsRequest(**fields)
    return list((await client.reports.ListUsageRecordReports(request)).usage_record_reports)


@pytest.mark.hourly_job
async def test_servers_roll_up_by_themselves(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas make one report per entitlement of the hour that ended last; what is newer waits for its hour."""
    monkeypatch.setattr(reporting, "POLL_S", 0.05)
    now = datetime.now(UTC)
    if (left := cell_floor(now) + HOUR - now) < timedelta(seconds=20):  # the hour must not end meanwhile
        await asyncio.sleep(left.total_seconds() + 1)
        now = datetime.now(UTC)
    async with running_server(database_url) as one, running_server(database_url) as two:
        for name in ("a", "b"):
            await sell(one, name)
        ended = cell_floor(now) - timedelta(minutes=1)
        await reported(two, *(group(f"{name}-1", name, at=ended) for name in ("a", "b")))
        await reported(one, *(group(f"{name}-2", name) for name in ("a", "b")))

        async def made() -> bool:
            return len(await reports(one)) == 2

        await until(made, 20)
        await asyncio.sleep(0.3)
        found = await reports(two)
        assert sorted(one.entitlement_id for one in found) == ["a", "b"]
        assert {one.marketplace_time.ToDatetime(UTC) for one in found} <= {last_hour(now), last_hour(now) + HOUR}
        assert {one.records[0].used_quantity for one in found} == {"1"}


async def test_replicas_at_once_make_one_report(client: Client, database: Database, database_url: str) -> None:
    """Eight jobs at once, as many as replicas, make each entitlement's report once and count every record once."""
    names = [f"e{i}" for i in range(12)]
    for name in names:
        await sell(client, name)
    await reported(client, *(group(f"{name}-{i}", name, {"cpu": "2"}) for name in names for i in range(3)))
    hour = cell_floor(datetime.now(UTC))
    made = await asyncio.gather(*(roll_up_hour(database, DEFAULT_RULES, hour, wait=bool(i % 2)) for i in range(8)))
    assert sum(made) == len(names)
    found = await reports(client)
    assert sorted(one.entitlement_id for one in found) == sorted(names)
    assert {one.records[0].quantity for one in found} == {"6"}
    assert {one.group_count for one in found} == {3}


async def test_only_one_leads(database: Database) -> None:
    """While one transaction leads, another that does not wait is told so; afterwards it may."""
    async with database.engine.begin() as first, database.engine.begin() as second:
        assert await store.lead(first, wait=False)
        assert not await store.lead(second, wait=False)
    async with database.engine.begin() as third:
        assert await store.lead(third, wait=False)


async def test_one_that_fails_does_not_stop_the_others(
    client: Client, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entitlement whose report fails leaves nothing behind, the others get theirs, and the next run makes it."""
    for name in ("a", "b", "c"):
        await sell(client, name)
    await reported(client, *(group(name, name) for name in ("a", "b", "c")))
    whole = store.roll_up

    async def broken(connection: Any, organization: str, entitlement_id: str, *rest: Any) -> Any:
        made = await whole(connection, organization, entitlement_id, *rest)
        if entitlement_id == "b":
            raise RuntimeError("just before the commit")
        return made

    monkeypatch.setattr(store, "roll_up", broken)
    assert await roll_up(database) == 2
    assert sorted(one.entitlement_id for one in await reports(client)) == ["a", "c"]
    monkeypatch.setattr(store, "roll_up", whole)
    assert await roll_up(database) == 1
    assert len(await lease(client, "t")) == 3


@pytest.mark.hourly_job
async def test_the_job_outlives_its_failures(
    client: Client, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a run dies of, the next one is tried."""
    monkeypatch.setattr(reporting, "POLL_S", 0.01)
    runs: list[int] = []
    enough = asyncio.Event()

    async def failing(*_: Any, **__: Any) -> int:
        runs.append(1)
        if len(runs) > 5:
            enough.set()
        raise (RuntimeError("x") if len(runs) % 2 else Unavailable("DATABASE_UNAVAILABLE", "away"))  # type: ignore[arg-type]

    monkeypatch.setattr(reporting, "roll_up_hour", failing)
    task = asyncio.create_task(reporting.Reporting(database, DEFAULT_RULES).run())
    async with asyncio.timeout(10):
        await enough.wait()
    task.cancel()


async def test_every_entitlement_is_reached(
    client: Client, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More entitlements than are looked up at once all get their reports, in one run."""
    monkeypatch.setattr(reporting, "_ENTITLEMENTS_AT_ONCE", 2)
    names = [f"e{i}" for i in range(7)]
    for name in names:
        await sell(client, name)
    await reported(client, *(group(name, name) for name in names))
    assert await roll_up(database) == 7
    async with database.engine.connect() as connection:
        number = (await connection.execute(sa.select(sa.func.count()).select_from(usage_record_reports))).scalar_one()
    assert number == 7


async def test_skip_passes_over_reports(client: Client, database: Database) -> None:
    """`skip` leaves out so many reports, from the beginning or from where the token leads; beyond the end is none."""
    names = [f"e{i}" for i in range(5)]
    for name in names:
        await sell(client, name)
    await reported(client, *(group(name, name) for name in names))
    assert await roll_up(database) == 5
    whole = await reports(client)
    assert len(whole) == 5
    for size, skip in itertools.product((1, 2, 5, 6), (0, 1, 4, 5, 1_000_000)):
        request = usage_record_report_pb2.ListUsageRecordReportsRequest(page_size=size, skip=skip)
        answer = await client.reports.ListUsageRecordReports(request)
        assert list(answer.usage_record_reports) == whole[skip : skip + size]
        assert bool(answer.next_page_token) == (skip + size < 5)
        if answer.next_page_token:
            # A token goes on after the page that gave it, whatever was skipped before it.
            for more in (0, 1):
                request.skip, request.page_token = more, answer.next_page_token
                rest = await client.reports.ListUsageRecordReports(request)
                begin = skip + size + more
                assert list(rest.usage_record_reports) == whole[begin : begin + size]
    assert await reports(client, entitlement_id="e1", skip=1) == []
    for skip in (-1, 1_000_001):
        fault = await fault_of(reports(client, skip=skip))
        assert fault.brief == ("INVALID_ARGUMENT", "FIELD_INVALID", "skip")


def test_the_last_hour_is_over() -> None:
    """The hour that ended last is whole: at its very end it is the one before."""
    at = datetime(2026, 1, 1, 10, tzinfo=UTC)
    assert last_hour(at) == at - HOUR
    assert last_hour(at + timedelta(minutes=59, seconds=59)) == at - HOUR
    assert last_hour(at - timedelta(microseconds=1)) == at - 2 * HOUR
