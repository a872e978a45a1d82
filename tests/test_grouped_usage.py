"""The promises of grouped listings, streams and billing periods that plans of random events reach too seldom."""

import itertools
import uuid
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import oracle
import pytest
import test_oracle
from conftest import timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from test_oracle import (
    HISTORY,
    ID_PREFIXES,
    MINUTE,
    Servers,
    Tenant,
    check_stream,
    compare_grouped,
    create,
    grouped_row,
    read_messages,
    read_pages,
    wire,
)

from metering.v1 import customer_pb2
from service.domain.customers import BillingFrequency, BillingPeriod

servers = test_oracle.servers

FREQUENCIES = ("MONTHLY", "QUARTERLY", "ANNUAL", "WEEKLY")
# Where the number of an edge's rows decides what comes: an empty value, one that sorts with a prefix, and none.
VALUES = ("", "a", "a\u0001", "aa", "Z", "\ufb01", "\U0001f600", None)


async def _prepared(tenant: Tenant, definitions: Sequence[oracle.Metric], sent: Sequence[oracle.Event]) -> str:
    client = tenant.clients[0]
    customer = await client.create_customer(ingest_aliases=["acme"])
    for one in definitions:
        await create(client, one)
    for part in range(0, len(sent), 2_000):
        await client.ingest(*map(wire, sent[part : part + 2_000]))
    customer_id: str = customer.id
    return customer_id


def _definition(number: int, aggregation: str, *group_keys: tuple[str, ...]) -> oracle.Metric:
    key = "" if aggregation == "COUNT" else "q"
    return oracle.Metric(str(uuid.UUID(int=number)), aggregation, key, group_keys=group_keys)


def _fields(customer_id: str, metric: oracle.Metric, size: str, **fields: Any) -> dict[str, Any]:
    named = {"customer_id": customer_id, "billable_metric_id": metric.id, "window_size": f"WINDOW_SIZE_{size}"}
    return {**named, **fields}


def _grid() -> list[oracle.Event]:
    """Events of all pairs of values in a few hours, the more the later: some skipped, some late in their hour."""
    return [
        oracle.Event(
            f"{hour} {i}",
            "acme",
            "call",
            HISTORY + hour * oracle.HOUR + (i % 60) * MINUTE,
            {name: one for name, one in (("g", g), ("h", h), ("q", i if i % 5 else "none")) if one is not None},
        )
        for hour in (0, 1, 3)
        for i, (g, h) in enumerate(itertools.product(VALUES, VALUES))
        if hour or i % 7 == 0
    ]


@pytest.mark.parametrize("aggregation", ["UNIQUE", "LATEST"])
async def test_rows_are_in_order_at_every_page_size(servers: Servers, aggregation: str) -> None:
    """Rows come in byte order of the values in the order of the request, missing ones last, however they are paged."""
    tenant = await servers.tenant()
    metric = _definition(1, aggregation, ("g", "h"), ("g",))
    sent = _grid()
    customer_id = await _prepared(tenant, [metric], sent)
    cases: list[tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = [
        (("g", "h"), {}),
        (("h", "g"), {"g": ("", "aa", "nowhere")}),
        (("h", "g"), {"g": ("Z", "a"), "h": ("\U0001f600", "", "nowhere")}),
        (("g",), {"g": ()}),
        ((), {}),
    ]
    for number, (key, filters) in enumerate(cases):
        for omitted, size in itertools.product((False, True), ("HOUR", "NONE")):
            windows = oracle.hours(HISTORY - 2 * oracle.HOUR, 7)
            if size == "NONE":
                # With most groups of the hours that its bounds cut, and with few.
                minutes = (61, 63) if number % 2 else (10, 190)
                windows = [(HISTORY + minutes[0] * MINUTE, HISTORY + minutes[1] * MINUTE)]
            selection = oracle.GroupedSelection(frozenset({"acme"}), metric, windows, key, filters, omit_empty=omitted)
            named = {name: {"values": values} for name, values in filters.items()}
            fields = _fields(customer_id, metric, size, group_key=key, group_filters=named, omit_empty_windows=omitted)
            # One row a page is slow: only where there are few.
            pages = (0, 3, 5, 1_000_000, 1_000_000)[number]
            await compare_grouped(tenant, sent, fields, selection, pages)


async def test_streams_go_on_after_every_message(servers: Servers) -> None:
    """A stream cut after any of its messages goes on exactly there, on any server; both kinds, empty rows included."""
    tenant = await servers.tenant()
    metric = _definition(1, "LATEST", ("g", "h"))
    sent = _grid()
    customer_id = await _prepared(tenant, [metric], sent)
    windows = oracle.hours(HISTORY - oracle.HOUR, 25)
    bounds = {"starting_on": timestamp(windows[0][0]), "ending_before": timestamp(windows[-1][1])}
    for omitted in (False, True):
        fields = _fields(customer_id, metric, "HOUR", group_key=["h", "g"], omit_empty_windows=omitted) | bounds
        rows = (await read_pages(tenant.clients, "ListUsageWithGroups", fields, 0)).rows
        number = await check_stream(
            tenant, "StreamUsageWithGroups", fields, [_Same(one) for one in rows], _Same, resumed=1_000
        )
        assert number > 10
    metrics = [{"id": metric.id}]
    fields = {"window_size": "WINDOW_SIZE_HOUR", "customer_ids": [customer_id], "billable_metrics": metrics} | bounds
    rows = (await read_pages(tenant.clients, "ListUsage", fields, 0)).rows
    assert await check_stream(tenant, "StreamUsage", fields, [_Same(one) for one in rows], _Same, resumed=1_000) > 5


class _Same:
    """A row as it came; stands for itself where rows are compared."""

    used = True

    def __init__(self, row: Any) -> None:
        self.row = row

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.row == other.row

    __hash__ = None  # type: ignore[assignment]


async def test_groups_by_the_thousand(servers: Servers) -> None:
    """Thousands of groups in one window, and more than a page or message holds, come once each and in order."""
    tenant = await servers.tenant()
    metric = _definition(1, "UNIQUE", ("g",))
    names = [f"{prefix}{i}" + "x" * (i % 7) * 100 for i, prefix in zip(range(3_000), itertools.cycle(ID_PREFIXES))]
    sent = [
        oracle.Event(f"{hour} {i}", "acme", "call", HISTORY + hour * oracle.HOUR, {"g": name, "q": i % 3})
        for hour in range(2)
        for i, name in enumerate(names[hour * 1_000 :])
    ]
    customer_id = await _prepared(tenant, [metric], sent)
    for size, windows in (("NONE", [(HISTORY, HISTORY + 5 * oracle.HOUR)]), ("HOUR", oracle.hours(HISTORY, 5))):
        selection = oracle.GroupedSelection(frozenset({"acme"}), metric, windows, ("g",))
        for pages in (0, 7):
            await compare_grouped(tenant, sent, _fields(customer_id, metric, size, group_key=["g"]), selection, pages)
        bounds = {"starting_on": timestamp(windows[0][0]), "ending_before": timestamp(windows[-1][1])}
        fields = _fields(customer_id, metric, size, group_key=["g"]) | bounds
        pages_read = await read_pages(tenant.clients, "ListUsageWithGroups", fields, 10_000)
        messages = await read_messages(tenant.clients[0], "StreamUsageWithGroups", fields)
        assert [row for one in messages for row in one.windows] == pages_read.rows


# --- Billing periods

dates = st.dates(date(1999, 1, 1), date(2033, 12, 31))
awkward = st.builds(
    lambda year, month, day: min(date(year, month, 28) + timedelta(days=day), _last(year, month)),
    st.sampled_from((1900, 2000, 2023, 2024, 2100)),
    st.integers(1, 12),
    st.integers(0, 3),
)


def _last(year: int, month: int) -> date:
    return date(year + month // 12, month % 12 + 1, 1) - timedelta(days=1)


@given(
    frequency=st.sampled_from(FREQUENCIES),
    anchor=st.one_of(dates, awkward, awkward),
    start=st.one_of(dates, awkward),
    length=st.one_of(st.none(), st.integers(1, 1_000)),
    offset=st.integers(-2, 1_100),
)
@settings(max_examples=300)
def test_billing_periods(frequency: str, anchor: date, start: date, length: int | None, offset: int) -> None:
    """The period that holds a day is the one that walking from day to day finds."""
    end = None if length is None else start + timedelta(days=length)
    day = start + timedelta(days=offset)
    found = BillingPeriod(BillingFrequency(frequency), anchor, start, end).holding(day)
    assert found == oracle.billing_period(frequency, anchor, start, end, day)


@pytest.mark.parametrize("anchor", [date(2024, 1, 31), date(2024, 2, 29), date(2023, 2, 28), date(2024, 11, 30)])
@pytest.mark.parametrize("frequency", FREQUENCIES)
def test_billing_periods_follow_each_other(frequency: str, anchor: date) -> None:
    """Over leap and other years every day is in one period, and a period is the same from each of its days."""
    period = BillingPeriod(BillingFrequency(frequency), anchor, date(2018, 1, 1))
    day = date(2023, 1, 1)
    while day < date(2025, 6, 1):
        found = period.holding(day)
        assert found == oracle.billing_period(frequency, anchor, date(2018, 1, 1), None, day)
        assert found is not None
        assert all(period.holding(found[0] + timedelta(days=i)) == found for i in range((found[1] - found[0]).days))
        day = found[1]


@pytest.mark.parametrize("zone", ["", "Asia/Kolkata", "Pacific/Kiritimati", "Etc/GMT+12"])
async def test_current_period(servers: Servers, zone: str) -> None:
    """`current_period` lists the windows of the period that holds the present, in the days of the zone asked for."""
    tenant = await servers.tenant()
    now = datetime.now(UTC)
    today = now.astimezone(oracle.zone_info(zone or "UTC")).date()
    if (now + MINUTE).astimezone(oracle.zone_info(zone or "UTC")).date() != today:
        pytest.skip("the day is about to end")
    metric = _definition(1, "COUNT", ("g",))
    sent = [
        oracle.Event(f"{i}", "acme", "call", now - timedelta(days=400) + i * timedelta(hours=9), {"g": "x"})
        for i in range(1_069)
    ]
    customer_id = await _prepared(tenant, [metric], sent)
    for number, frequency in enumerate(FREQUENCIES):
        for i, (anchor, start, end) in enumerate(_around(today)):
            await _set_billing_period(tenant, customer_id, (frequency, anchor, start, end))
            found = oracle.billing_period(frequency, anchor, start, end, today)
            assert found is not None
            days = oracle.days(zone or "UTC", found[0], (found[1] - found[0]).days)
            size = ("DAY", "NONE")[(number + i) % 2]
            windows = days if size == "DAY" else [(days[0][0], days[-1][1])]
            fields = _fields(customer_id, metric, size, group_key=["g"], time_zone=zone, current_period=True)
            expected = oracle.grouped_usage(
                sent, oracle.GroupedSelection(frozenset({"acme"}), metric, windows, ("g",)), now
            )
            rows = (await read_pages(tenant.clients, "ListUsageWithGroups", fields, 50)).rows
            assert [grouped_row(one) for one in rows] == expected
            assert tenant.narrow is not None
            messages = await read_messages(tenant.narrow, "StreamUsageWithGroups", fields)
            assert [row for one in messages for row in one.windows] == rows
            # The period of a stream is that in which it began, even if the customer has none now.
            await _set_billing_period(tenant, customer_id, None)
            fields["resume_token"] = messages[0].resume_token
            rest = await read_messages(tenant.clients[1], "StreamUsageWithGroups", fields)
            assert [row for one in rest for row in one.windows] == rows[len(messages[0].windows) :]


Billing = tuple[str, date, date, date | None]


def _around(today: date) -> list[tuple[date, date, date | None]]:
    """Periods that begin or end about today: anchor, first day, and the day after the last."""
    day = timedelta(days=1)
    return [
        (today, today - 500 * day, None),
        (today + day, today - 500 * day, None),
        (date(2024, 1, 31), today, today + day),
        (date(2024, 2, 29), today - day, None),
        (date(2023, 12, 31), today - 100 * day, today + day),
    ]


async def _set_billing_period(tenant: Tenant, customer_id: str, billing: Billing | None) -> None:
    request = customer_pb2.SetBillingPeriodRequest(id=customer_id)
    if billing is not None:
        frequency, anchor, start, end = billing
        period = request.billing_period
        period.frequency = customer_pb2.BillingFrequency.Value(f"BILLING_FREQUENCY_{frequency}")
        period.anchor_date, period.starting_on = str(anchor), str(start)
        if end is not None:
            period.ending_before = str(end)
    await tenant.clients[0].customers.SetBillingPeriod(request)
