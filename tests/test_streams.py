"""Claims about streams of usage: the same windows as the pages, and no stream that is cut, stalled or resumed lies."""

import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Client, Process, event, running_server, start_server, timestamp
from faults import fault_of, until
from streaming import (
    ALONE,
    NARROW,
    Proxy,
    Watched,
    connected,
    idle_transactions,
    random_cut,
    received,
    watched,
)

import service.rpc.streams
import service.rpc.usage
import service.store.grouped_usage
import service.store.usage
from metering.v1 import billable_metric_pb2 as pb
from metering.v1 import customer_pb2, usage_pb2
from service.auth import TRUST_S, new_api_key
from service.database import Database
from service.store import organizations

START = datetime(2026, 1, 1, tzinfo=UTC)
LISTS = {"StreamUsage": "ListUsage", "StreamUsageWithGroups": "ListUsageWithGroups"}
CUSTOMERS = [f"00000000-0000-4000-8000-00000000010{i}" for i in range(2)]
COUNT, SUM = (f"00000000-0000-4000-8000-00000000020{i}" for i in range(2))
DAYS = {"starting_on": timestamp(START), "ending_before": timestamp(START + timedelta(days=1))}
STALLED = ("ABORTED", "STREAM_STALLED", None)
DRAINING = ("UNAVAILABLE", "SERVER_DRAINING", None)
MIB = 1024 * 1024

Query = tuple[str, dict[str, Any]]

ONE = {"customer_id": CUSTOMERS[0], "billable_metric_id": COUNT}
QUERIES: dict[str, Query] = {
    "hours": ("StreamUsage", {"window_size": "WINDOW_SIZE_HOUR", **DAYS}),
    "hours not empty": ("StreamUsage", {"window_size": "WINDOW_SIZE_HOUR", "omit_empty_windows": True, **DAYS}),
    "days of two metrics with groups": (
        "StreamUsage",
        {
            "window_size": "WINDOW_SIZE_DAY",
            "customer_ids": CUSTOMERS[::-1],
            "billable_metrics": [{"id": SUM}, {"id": COUNT, "group_by": {"key": "region"}}],
            "time_zone": "Asia/Kolkata",
            "starting_on": timestamp(START - timedelta(hours=5.5)),
            "ending_before": timestamp(START + timedelta(days=8, hours=18.5)),
        },
    ),
    "changed windows": ("StreamUsage", {"window_size": "WINDOW_SIZE_HOUR", "updated_since": timestamp(START), **DAYS}),
    "groups of hours": (
        "StreamUsageWithGroups",
        {"window_size": "WINDOW_SIZE_HOUR", "group_key": ["zone", "region"], **ONE, **DAYS},
    ),
    "groups of hours that are not empty": (
        "StreamUsageWithGroups",
        {"window_size": "WINDOW_SIZE_HOUR", "group_key": ["region"], "omit_empty_windows": True, **ONE, **DAYS},
    ),
    "combinations": (
        "StreamUsageWithGroups",
        {
            "window_size": "WINDOW_SIZE_DAY",
            "group_key": ["region", "zone"],
            "group_filters": {"region": {"values": ["b", "r1", "r0", ""]}, "zone": {"values": ["z1", "x"]}},
            **ONE,
            **DAYS,
        },
    ),
    "no groups": ("StreamUsageWithGroups", {"window_size": "WINDOW_SIZE_HOUR", **ONE, **DAYS}),
    "the whole range": (
        "StreamUsageWithGroups", {"window_size": "WINDOW_SIZE_NONE", "group_key": ["region"], **ONE, **DAYS},
    ),
}  # fmt: skip


async def stock(client: Client) -> None:
    """Make two customers, two metrics, and events of a day, of which some hours have none."""
    for name, customer_id in zip("ab", CUSTOMERS, strict=True):
        await client.create_customer(id=customer_id, ingest_aliases=[name])
    await client.create_metric(id=COUNT, group_keys=[{"properties": ["region"]}, {"properties": ["region", "zone"]}])
    await client.create_metric(id=SUM, aggregation_type="AGGREGATION_TYPE_SUM", aggregation_key="n")
    generator = random.Random(7)
    events = []
    for number in range(40):
        properties = {"n": number, "region": f"r{generator.randrange(4)}", "zone": f"z{generator.randrange(3)}"}
        for name in ("region", "zone", "n"):
            if generator.random() < 0.2:
                del properties[name]
        at = START + timedelta(hours=generator.randrange(24), minutes=generator.randrange(60))
        events.append(event(customer_id="aab"[number % 3], at=at, properties=properties))
    await client.ingest(*events)


def stream(client: Client, query: Query, token: str = "", **options: Any) -> Any:
    """Begin a stream, or go on with it."""
    method, fields = query
    request = getattr(usage_pb2, f"{method}Request")(**fields, resume_token=token)
    return getattr(client.usage, method)(request, **options)


async def pages(client: Client, query: Query) -> list[Any]:
    """Read what the stream should say from the pages of the unary method."""
    method, fields = query
    request = getattr(usage_pb2, f"{LISTS[method]}Request")(**fields)
    windows: list[Any] = []
    while True:
        page = await getattr(client.usage, LISTS[method])(request)
        windows += page.windows
        if not page.next_page_token:
            return windows
        request.page_token = page.next_page_token


async def whole(client: Client, query: Query, token: str = "") -> list[Any]:
    """Read a stream that must come to its end."""
    messages, fault = await received(stream(client, query, token))
    assert fault is None
    check_ends(messages, complete=True)
    return messages


def check_ends(messages: Sequence[Any], *, complete: bool) -> None:
    """Check what holds of every stream: tokens in all messages, and `complete` in the last or nowhere."""
    assert all(message.resume_token for message in messages)
    assert [message.complete for message in messages] == [False] * (len(messages) - 1) + [complete] * bool(messages)
    assert len({message.next_updated_since.ToNanoseconds() for message in messages}) <= 1
    assert all(message.next_updated_since.seconds > 0 for message in messages)


def windows_of(messages: Sequence[Any]) -> list[Any]:
    """The windows of messages, in order."""
    return [window for message in messages for window in message.windows]


def empty_hours(number: int, **more: Any) -> Query:
    """A query with many windows, each of about 110 bytes, that costs no events."""
    return "StreamUsage", {
        "customer_ids": CUSTOMERS[:1],
        "billable_metrics": [{"id": COUNT}],
        "window_size": "WINDOW_SIZE_HOUR",
        "starting_on": timestamp(START),
        "ending_before": timestamp(START + timedelta(hours=number)),
        **more,
    }


def starts(messages: Sequence[Any]) -> list[datetime]:
    """Where the windows of messages start."""
    return [window.starting_on.ToDatetime(UTC) for message in messages for window in message.windows]


def hours(number: int) -> list[datetime]:
    """Where the windows of `empty_hours` start."""
    return [START + timedelta(hours=i) for i in range(number)]


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Watched]:
    """A server that holds the stock."""
    async with watched(database_url) as server:
        await stock(server.client)
        yield server


def small(monkeypatch: pytest.MonkeyPatch, message: int, read: int) -> None:
    """Make messages and what is read at once as small as given, in bytes."""
    monkeypatch.setattr(service.rpc.usage, "MESSAGE_BYTES", message)
    monkeypatch.setattr(service.rpc.usage, "ROW_BYTES_MIN", 1)
    monkeypatch.setattr(service.rpc.streams, "MESSAGE_BYTES", message)
    monkeypatch.setattr(service.rpc.streams, "READ_BYTES_MAX", read)


# --- What a stream says


@pytest.mark.parametrize("name", QUERIES)
async def test_a_stream_says_what_the_pages_say(server: Watched, name: str) -> None:
    """A stream has the windows of all pages, in their order; only the last message is `complete`."""
    query = QUERIES[name]
    expected = await pages(server.client, query)
    messages = await whole(server.client, query)
    assert expected
    assert windows_of(messages) == expected
    assert server.open == 0
    assert server.errors() == []


async def test_messages_are_about_64_kib(server: Watched) -> None:
    """Messages hold about 64 KiB, but for the last of what was read at once; a window too large comes alone."""
    query = empty_hours(60_000)
    messages = await whole(server.client, query)
    assert starts(messages) == hours(60_000)
    sizes = [message.ByteSize() for message in messages]
    assert max(sizes) < 66 * 1024
    full = [size for size in sizes if size > 62 * 1024]
    assert len(full) > 0.85 * len(sizes) - 1
    # A map of 200 groups with names of 1 KiB is 200 KiB.
    values = [f"{number:03}".ljust(1024, "x") for number in range(200)]
    for begin in range(0, 200, 50):
        for customer in "ab":
            await server.client.ingest(
                *(
                    event(customer_id=customer, at=START + timedelta(days=40), properties={"region": value})
                    for value in values[begin : begin + 50]
                )
            )
    query = (
        "StreamUsage",
        {
            "window_size": "WINDOW_SIZE_DAY",
            "billable_metrics": [{"id": COUNT, "group_by": {"key": "region"}}, {"id": SUM}],
            "starting_on": timestamp(START + timedelta(days=38)),
            "ending_before": timestamp(START + timedelta(days=43)),
        },
    )
    messages = await whole(server.client, query)
    large = [message for message in messages if message.ByteSize() > 66 * 1024]
    assert [len(message.windows) for message in large] == [1, 1]
    assert windows_of(messages) == await pages(server.client, query)


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.parametrize(("message", "read"), [(1, 400), (350, 1_200)])
async def test_resume_after_every_message(
    server: Watched, database_url: str, monkeypatch: pytest.MonkeyPatch, name: str, message: int, read: int
) -> None:
    """After every message, at any size of messages and reads, another replica goes on exactly there."""
    small(monkeypatch, message, read)
    query = QUERIES[name]
    expected = await pages(server.client, query)
    messages = await whole(server.client, query)
    assert windows_of(messages) == expected
    if message == 1:
        assert all(len(one.windows) <= 1 for one in messages)
    chosen = {0, len(messages) - 1, *random.sample(range(len(messages)), min(len(messages), 3))}
    async with running_server(database_url) as other:
        for i in chosen:
            rest = await whole(other, query, messages[i].resume_token)
            assert windows_of(rest) == expected[len(windows_of(messages[: i + 1])) :]
            assert rest[0].next_updated_since == messages[0].next_updated_since
        # Who asks again after the end is told that it was the end, and gets nothing twice.
        for _ in range(2):
            (end,) = await whole(other, query, messages[-1].resume_token)
            assert not end.windows
    assert server.errors() == []


async def test_resume_of_every_single_window(server: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is begun anew for every single message gives every window once, and ends."""
    small(monkeypatch, 1, 1)
    for name in ("days of two metrics with groups", "groups of hours that are not empty"):
        query = QUERIES[name]
        expected = await pages(server.client, query)
        found: list[Any] = []
        token, complete = "", False
        while not complete:
            call = stream(server.client, query, token)
            ((message,), _) = await received(call, 1)
            call.cancel()
            found += message.windows
            token, complete = message.resume_token, message.complete
        assert found == expected
    await until(lambda: server.open == 0)


async def test_resume_after_a_restart(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token outlives the server that gave it."""
    small(monkeypatch, 1_000, 3_000)
    begun: dict[str, Any] = {}
    async with running_server(database_url) as client:
        await stock(client)
        for name, query in QUERIES.items():
            call = stream(client, query)
            messages, _ = await received(call, 3)
            call.cancel()
            begun[name] = messages, await pages(client, query)
    async with running_server(database_url) as client:
        for name, query in QUERIES.items():
            messages, expected = begun[name]
            if not messages[-1].complete:
                messages += await whole(client, query, messages[-1].resume_token)
            assert windows_of(messages) == expected


async def test_the_billing_period_stays_that_of_the_beginning(server: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream over the current period that is resumed after the period changed goes on with the one it began with."""
    small(monkeypatch, 300, 900)

    async def set_period(frequency: str, anchor: str) -> None:
        period = {"frequency": frequency, "anchor_date": anchor, "starting_on": "2020-01-01"}
        request = customer_pb2.SetBillingPeriodRequest(
            id=CUSTOMERS[0],
            billing_period=customer_pb2.BillingPeriod(**period),  # type: ignore[arg-type]
        )
        await server.client.customers.SetBillingPeriod(request)

    await set_period("BILLING_FREQUENCY_MONTHLY", "2020-01-01")
    query = ("StreamUsageWithGroups", {"current_period": True, "window_size": "WINDOW_SIZE_DAY", **ONE})
    messages = await whole(server.client, query)
    assert len(windows_of(messages)) >= 28
    assert len(messages) > 2
    await set_period("BILLING_FREQUENCY_WEEKLY", "2020-01-01")
    rest = await whole(server.client, query, messages[1].resume_token)
    assert starts(rest) == starts(messages[2:])
    assert len(starts(await whole(server.client, query))) == 7


async def test_tokens_are_bound(server: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume token that was changed, or is of another query or method, is refused; a page token is none."""
    small(monkeypatch, 500, 1_000)
    client = server.client
    tokens = {}
    for name in ("hours", "hours not empty", "groups of hours", "no groups"):
        call = stream(client, QUERIES[name])
        ((message,), _) = await received(call, 1)
        tokens[name] = message.resume_token
        call.cancel()
    refused = ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID", "resume_token")

    async def check(query: Query, token: str) -> None:
        messages, fault = await received(stream(client, query, token))
        assert (messages, fault and fault.brief) == ([], refused), token

    generator = random.Random(3)
    for name, token in tokens.items():
        for other in tokens:
            if other != name:
                await check(QUERIES[other], token)
        for i in [0, 5, len(token) - 1, *(generator.randrange(len(token)) for _ in range(10))]:
            changed = "B" if token[i] == "A" else "A"
            await check(QUERIES[name], token[:i] + changed + token[i + 1 :])
        for bad in (token[:-1], token + "A", token + "=", " " + token, "x", "A" * 100, "A" * 70_000, "\0"):
            await check(QUERIES[name], bad)
        method, fields = QUERIES[name]
        await check((method, {**fields, "updated_since": timestamp(START)}), token)
        await check((method, {**fields, "ending_before": timestamp(START + timedelta(days=4))}), token)
    # Tokens of pages and of streams are not each other's, though the query be the same.
    fields = QUERIES["hours"][1]
    page = await client.usage.ListUsage(usage_pb2.ListUsageRequest(**fields, page_size=1))
    await check(QUERIES["hours"], page.next_page_token)
    request = usage_pb2.ListUsageRequest(**fields, page_token=tokens["hours"])
    fault = await fault_of(client.usage.ListUsage(request))
    assert fault.brief == ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID", "page_token")


async def test_streams_fail_as_lists_do(server: Watched) -> None:
    """What is wrong with a request is said before any message, in the words of the unary method."""
    unknown = str(uuid.uuid4())
    too_many = {"starting_on": timestamp(START - timedelta(days=700_000)), "window_size": "WINDOW_SIZE_HOUR"}
    cases: list[Query] = [
        ("StreamUsage", {}),
        ("StreamUsage", {**QUERIES["hours"][1], "customer_ids": ["x", "y"]}),
        ("StreamUsage", {**QUERIES["hours"][1], "customer_ids": [unknown]}),
        ("StreamUsage", {**QUERIES["hours"][1], "billable_metrics": [{"id": COUNT, "group_by": {"key": "zone"}}]}),
        ("StreamUsage", empty_hours(10, **too_many)[1]),
        ("StreamUsageWithGroups", {}),
        ("StreamUsageWithGroups", {**QUERIES["no groups"][1], "group_key": ["zone"]}),
        ("StreamUsageWithGroups", {**QUERIES["no groups"][1], "customer_id": unknown}),
        ("StreamUsageWithGroups", {**QUERIES["no groups"][1], "current_period": True}),
        ("StreamUsageWithGroups", {"current_period": True, "window_size": "WINDOW_SIZE_DAY", **ONE}),
        ("StreamUsageWithGroups", {**QUERIES["no groups"][1], **too_many}),
    ]
    seen = set()
    for method, fields in cases:
        messages, fault = await received(stream(server.client, (method, fields)))
        request = getattr(usage_pb2, f"{LISTS[method]}Request")(**fields)
        told = await fault_of(getattr(server.client.usage, LISTS[method])(request))
        assert fault is not None
        assert messages == []
        assert fault._replace(request_id="") == told._replace(request_id="")
        seen.add(fault.reason)
    assert {"FIELD_REQUIRED", "WINDOW_COUNT", "CUSTOMER_NOT_FOUND", "NO_BILLING_PERIOD"} <= seen
    unary_stream: Any = server.client.channel.unary_stream("/metering.v1.UsageService/StreamUsage")
    messages, fault = await received(unary_stream(b"\xff\xff"))
    assert (messages, fault and fault.brief) == ([], ("INVALID_ARGUMENT", "MALFORMED_REQUEST", "request"))


async def test_progress_through_empty_stretches(server: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is to be told for long, messages without windows say how far it is; each can be resumed from."""
    metrics = [await server.client.create_metric(name=f"m{i}") for i in range(10)]
    await server.client.ingest(event(customer_id="b", at=START + timedelta(days=2), event_type="last"))
    for i in range(30):
        await server.client.ingest(event(customer_id="a", at=START + timedelta(days=9, hours=2 * i)))
    since = timestamp(datetime.now(UTC) + timedelta(seconds=0.05))
    await asyncio.sleep(0.1)
    await server.client.ingest(event(customer_id="a", at=START + timedelta(days=12)))
    for module in (service.store.usage, service.store.grouped_usage):
        monkeypatch.setattr(module, "PAGE_S", -1.0)
        monkeypatch.setattr(module, "SLICE_MAX", 72)
    monkeypatch.setattr(service.store.grouped_usage, "CELLS_MAX", 1)
    every = [{"id": metric.id} for metric in metrics]
    wide = {"starting_on": timestamp(START), "ending_before": timestamp(START + timedelta(days=13))}
    queries: list[Query] = [
        (
            "StreamUsage",
            {
                **QUERIES["hours not empty"][1],
                "customer_ids": CUSTOMERS,
                "billable_metrics": every,
                "starting_on": timestamp(START + timedelta(days=2)),
                "ending_before": timestamp(START + timedelta(days=5)),
            },
        ),
        ("StreamUsageWithGroups", {"window_size": "WINDOW_SIZE_HOUR", "updated_since": since, **ONE, **wide}),
    ]
    for query in queries:
        expected = await pages(server.client, query)
        assert expected
        messages = await whole(server.client, query)
        empty = [message for message in messages if not message.windows]
        assert len(empty) > 5
        assert windows_of(messages) == expected
        first = next(i for i, message in enumerate(messages) if not message.windows)
        for i in {first, len(messages) // 2, len(messages) - 2}:
            rest = await whole(server.client, query, messages[i].resume_token)
            assert windows_of(rest) == windows_of(messages[i + 1 :])


# --- Readers that are slow, stall or leave


async def test_no_connection_while_nobody_reads(server: Watched) -> None:
    """A stream whose reader does not read holds no database connection and no transaction."""
    async with connected(server.client.address, *NARROW) as slow:
        for query in (empty_hours(10_000), ("StreamUsageWithGroups", {**ONE, **empty_groups(20_000)})):
            call = stream(slow, query)
            ((first,), _) = await received(call, 1)
            await server.quiet()
            assert server.open == 1
            for _ in range(10):
                assert server.connections == 0
                assert await idle_transactions(server.database) == 0
                await asyncio.sleep(0.01)
            messages, fault = await received(call)
            assert fault is None
            assert messages[-1].complete
            assert starts([first, *messages])[::1000] == hours(len(starts([first, *messages])))[::1000]
    assert server.errors() == []


def empty_groups(number: int) -> dict[str, Any]:
    """What StreamUsageWithGroups needs for so many rows without usage."""
    return {
        "window_size": "WINDOW_SIZE_HOUR",
        "starting_on": timestamp(START),
        "ending_before": timestamp(START + timedelta(hours=number)),
    }


@pytest.mark.parametrize("taken", [0, 1, 3])
async def test_a_stalled_reader_is_ended(database_url: str, taken: int) -> None:
    """A reader that stops is ended at the limit; reading again it gets what was under way, then why, and the rest."""
    async with watched(database_url, stream_stall=timedelta(seconds=0.5)) as server:
        await stock(server.client)
        async with connected(server.client.address, *NARROW) as slow:
            query = empty_hours(8_000)
            call = stream(slow, query)
            messages, _ = await received(call, taken)
            await until(lambda: server.streams.sent > 0)
            began = time.monotonic()
            await until(lambda: server.open == 0, 5)
            assert 0.3 < time.monotonic() - began < 2.5
            assert (server.held, server.connections) == (0, 0)
            more, fault = await received(call)
            assert fault is not None
            assert fault.brief == STALLED
            messages += more
            check_ends(messages, complete=False)
            assert 0 < len(messages) < 8
            assert starts(messages) == hours(8_000)[: len(starts(messages))]
            messages += await whole(slow, query, messages[-1].resume_token)
            assert starts(messages) == hours(8_000)
        assert server.errors() == []


async def test_the_first_message_can_stall(database_url: str) -> None:
    """Also a first message that is larger than what flow control lets in is ended at the limit, with its reason."""
    async with watched(database_url, stream_stall=timedelta(seconds=0.4)) as server:
        await stock(server.client)
        values = [f"{number:03}".ljust(1024, "x") for number in range(200)]
        for begin in range(0, 200, 50):
            await server.client.ingest(
                *(event(customer_id="a", properties={"region": value}) for value in values[begin : begin + 50])
            )
        query = (
            "StreamUsage",
            {
                **empty_hours(24)[1],
                "window_size": "WINDOW_SIZE_DAY",
                "billable_metrics": [{"id": COUNT, "group_by": {"key": "region"}}],
            },
        )
        expected = await pages(server.client, query)
        assert expected[0].ByteSize() > 200_000
        async with connected(server.client.address, *NARROW) as slow:
            call = stream(slow, query)
            await until(lambda: server.open == 1)
            await until(lambda: server.open == 0, 5)
            # Without a status its reader would wait for ever.
            messages, fault = await asyncio.wait_for(received(call), 5)
            assert fault is not None
            assert fault.brief == STALLED
            token = messages[-1].resume_token if messages else ""
            assert windows_of(messages) + windows_of(await whole(slow, query, token)) == expected
        assert server.errors() == []


async def test_a_slow_reader_is_not_ended(database_url: str) -> None:
    """Who takes a message now and then, in less than the limit, gets all of them however long that takes."""
    async with watched(database_url, stream_stall=timedelta(seconds=0.8)) as server:
        await stock(server.client)
        async with connected(server.client.address, *NARROW) as slow:
            began = time.monotonic()
            messages, fault = await received(stream(slow, empty_hours(5_000)), pause=0.3)
        assert time.monotonic() - began > 2 * 0.8
        assert fault is None
        check_ends(messages, complete=True)
        assert starts(messages) == hours(5_000)


@pytest.mark.parametrize("stalled", [False, True])
@pytest.mark.parametrize("how", ["cancel", "close", "cut"])
async def test_a_client_that_leaves(server: Watched, how: str, stalled: bool) -> None:
    """When clients cancel, hang up or are cut off, everything of their streams is given up, and it is no error."""
    tasks = len(asyncio.all_tasks())
    options = NARROW if stalled else ()
    async with Proxy(server.client.address) as proxy, connected(proxy.address, *options) as client:
        query = empty_hours(60_000)
        calls = [stream(client, query) for _ in range(5)]
        for call in calls:
            await received(call, 1)
        readers: list[asyncio.Future[Any]] = []
        if stalled:
            await server.quiet()
        else:
            readers = [asyncio.ensure_future(received(call, pause=0.01)) for call in calls]
            await asyncio.sleep(0.05)
        assert server.open == 5
        if how == "cancel":
            for call in calls:
                call.cancel()
        elif how == "close":
            await client.channel.close()
        else:
            proxy.cut()
        await until(lambda: server.open == 0, 5)
        await until(lambda: (server.held, server.connections) == (0, 0), 5)
        await asyncio.gather(*readers, return_exceptions=True)
        for call in calls:
            call.cancel()
    await until(lambda: len(asyncio.all_tasks()) <= tasks, 5)
    # An error in the log for each client that hangs up would hide the real ones.
    assert [entry["event"] for entry in server.errors()] == []


async def test_a_deadline_on_a_stream(server: Watched) -> None:
    """A deadline that passes cuts the stream with DEADLINE_EXCEEDED; it can be resumed and nothing is left behind."""
    async with connected(server.client.address, *NARROW) as slow:
        query = empty_hours(8_000)
        messages, fault = await received(stream(slow, query, timeout=0.6), pause=0.15)
        assert fault is not None
        assert fault.code == "DEADLINE_EXCEEDED"
        assert messages
        check_ends(messages, complete=False)
        await until(lambda: (server.open, server.held, server.connections) == (0, 0, 0), 5)
        messages += await whole(slow, query, messages[-1].resume_token)
        assert starts(messages) == hours(8_000)


async def test_a_revoked_key_ends_streams(database_url: str, database: Database) -> None:
    """A stream ends with UNAUTHENTICATED within seconds of its key's revocation, and goes on with another key."""
    keys = [new_api_key(), new_api_key()]
    async with database.engine.begin() as connection:
        for key in keys:
            await organizations.create_api_key(connection, "default", key.id, "test", key.secret_hash)
    async with watched(database_url) as server, connected(server.client.address, *NARROW) as client:
        metadata = [[("authorization", f"Bearer {key.text}")] for key in keys]
        customer = customer_pb2.CreateCustomerRequest(customer=customer_pb2.Customer(id=CUSTOMERS[0], name="x"))
        await client.customers.CreateCustomer(customer, metadata=metadata[0])
        bounds = empty_hours(20_000)[1]
        query = "StreamUsage", {**bounds, "billable_metrics": [{"id": await metric_with(client, metadata[0])}]}
        reading = asyncio.ensure_future(received(stream(client, query, metadata=metadata[0]), pause=0.2))
        await asyncio.sleep(0.5)
        async with database.engine.begin() as connection:
            assert await organizations.revoke_api_key(connection, "default", keys[0].id)
        began = time.monotonic()
        messages, fault = await asyncio.wait_for(reading, 20)
        assert fault is not None
        assert fault.brief == ("UNAUTHENTICATED", "CREDENTIAL_INVALID", None)
        assert time.monotonic() - began < TRUST_S + 2
        check_ends(messages, complete=False)
        token = messages[-1].resume_token
        more, fault = await received(stream(client, query, token, metadata=metadata[1]))
        assert fault is None
        assert starts([*messages, *more]) == hours(20_000)


async def metric_with(client: Client, metadata: list[tuple[str, str]]) -> str:
    """Create a metric with a credential and wait until it is counted; returns its id."""
    metric = pb.BillableMetric(name="m", aggregation_type=pb.AGGREGATION_TYPE_COUNT)
    request = pb.CreateBillableMetricRequest(billable_metric=metric)
    metric = (await client.metrics.CreateBillableMetric(request, metadata=metadata)).billable_metric
    async with asyncio.timeout(20):
        while metric.HasField("backfill_progress"):
            await asyncio.sleep(0.02)
            found = await client.metrics.GetBillableMetric(pb.GetBillableMetricRequest(id=metric.id), metadata=metadata)
            metric = found.billable_metric
    return str(metric.id)


async def test_streams_end_when_the_server_does(database_url: str) -> None:
    """At SIGTERM streams that are read end with SERVER_DRAINING, stalled ones as well once read; the process ends
    with 0 in the time of its drain; another server goes on exactly there.
    """
    number = 12_000
    query = empty_hours(number)
    process = start_server("--database-url", database_url, "--drain", "2")
    try:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connected(process.address, *NARROW)) for _ in range(3)]
            await stock(clients[0])
            calls = [stream(client, query) for client in clients]
            begun = [(await received(call, 1))[0] for call in calls]
            reading = asyncio.ensure_future(received(calls[0], pause=0.1))
            await asyncio.sleep(0.4)
            began = time.monotonic()
            process.process.terminate()
            rest = [await reading]
            assert time.monotonic() - began < 1.5
            await asyncio.sleep(0.2)
            rest.append(await received(calls[1]))
            assert time.monotonic() - began < 2
            # The third never reads: the drain ends without it.
            code = await asyncio.to_thread(process.stop, 30)
            assert (code, time.monotonic() - began < 2 + 3) == (0, True)
            rest.append(await received(calls[2]))
    finally:
        if process.process.poll() is None:
            process.kill()
    found = [[*first, *more] for first, (more, _) in zip(begun, rest, strict=True)]
    told = [fault for _, fault in rest]
    assert [fault and fault.brief for fault in told[:2]] == [DRAINING, DRAINING]
    assert told[0] is not None
    assert told[0].retry_s == 1
    assert told[2] is not None
    assert told[2].code == "UNAVAILABLE"
    async with running_server(database_url) as other:
        for messages in found:
            check_ends(messages, complete=False)
            more = await whole(other, query, messages[-1].resume_token)
            assert starts([*messages, *more]) == hours(number)


@pytest.mark.parametrize("seed", range(6))
async def test_cut_connections(server: Watched, database_url: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Cut at any byte a stream is never taken for a whole one; resumed on two replicas it is exactly the rest."""
    small(monkeypatch, 900, 4_000)
    generator = random.Random(seed)
    names = generator.sample(sorted(QUERIES), 4)
    async with running_server(database_url) as other, Proxy(server.client.address) as proxy:
        for name in names:
            query = QUERIES[name]
            expected = await pages(server.client, query)
            size = sum(window.ByteSize() for window in expected)
            found: list[Any] = []
            token, complete, cuts = "", False, 0
            while not complete:
                proxy.target = generator.choice([server.client.address, other.address])
                proxy.cut_after(generator.choice(["up", "down", "down", "down"]), random_cut(generator, size))
                async with connected(proxy.address) as client:
                    messages, fault = await received(stream(client, query, token))
                found += windows_of(messages)
                token = messages[-1].resume_token if messages else token
                complete = bool(messages) and messages[-1].complete
                if fault is None:
                    assert complete, "an end that is OK was whole"
                else:
                    assert fault.code == "UNAVAILABLE"
                    cuts += 1
                check_ends(messages, complete=complete)
            assert found == expected
    await until(lambda: (server.open, server.connections) == (0, 0), 5)


async def test_many_stalled_readers_are_in_nobodys_way(server: Watched) -> None:
    """While fifty readers stall, unary calls of all kinds work, and no connection to the database is held."""
    query = empty_hours(3_000)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(server.client.address, *NARROW)) for _ in range(5)]
        calls = [stream(clients[i % 5], query) for i in range(50)]
        await asyncio.gather(*(received(call, 1) for call in calls))
        await server.quiet()
        assert server.open == 50
        assert server.connections == 0
        assert await idle_transactions(server.database) == 0
        async with asyncio.timeout(20):
            for _ in range(10):
                await server.client.ingest(event(customer_id="a"))
                assert await pages(server.client, QUERIES["the whole range"])
            await whole(server.client, QUERIES["hours"])
        assert server.open == 50
        ends = await asyncio.gather(*(received(call) for call in calls))
        assert all(fault is None and messages[-1].complete for messages, fault in ends)
    assert server.errors() == []


# --- Measurements: run by hand with -m long -s, on an idle machine


def memory(process: Process, what: str = "VmRSS") -> float:
    """How much memory a server has, in MiB."""
    lines = Path(f"/proc/{process.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def forget_peak(process: Process) -> None:
    """Let VmHWM begin anew."""
    Path(f"/proc/{process.process.pid}/clear_refs").write_text("5")


# Opens streams, reads one message of each, says how many there are, and holds them until its input ends.
HOLD = """
import asyncio, collections, json, sys
import grpc
from metering.v1 import usage_pb2, usage_pb2_grpc

async def main(address, connections, streams, request, options):
    channels = [grpc.aio.insecure_channel(address, options=[*options, ("nr", i)]) for i in range(connections)]
    stubs = [usage_pb2_grpc.UsageServiceStub(channel) for channel in channels]
    room, codes, calls = asyncio.Semaphore(200), collections.Counter(), []
    async def begin(i):
        async with room:
            try:
                call = stubs[i % connections].StreamUsage(request)
                await asyncio.wait_for(call.read(), 300)
                calls.append(call)
            except grpc.aio.AioRpcError as error:
                codes[error.code().name] += 1
            except TimeoutError:
                codes["no message in 300 s"] += 1
    await asyncio.gather(*(begin(i) for i in range(streams)))
    await asyncio.sleep(1)
    codes["open"] = sum(not call.done() for call in calls)
    print(json.dumps(codes), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

address, connections, streams, request, options = sys.argv[1:]
request = usage_pb2.StreamUsageRequest.FromString(bytes.fromhex(request))
asyncio.run(main(address, int(connections), int(streams), request, [tuple(one) for one in json.loads(options)]))
"""


@contextlib.asynccontextmanager
async def stalled_readers(
    address: str, query: Query, streams: int, connections: int, processes: int = 1
) -> AsyncIterator[Counter[str]]:
    """Hold streams open from other processes, each after its first message; gives how many there are."""
    request = usage_pb2.StreamUsageRequest(**query[1]).SerializeToString().hex()
    numbers = [str(connections // processes), str(streams // processes), request, json.dumps([*ALONE, *NARROW])]
    holders = [
        subprocess.Popen(  # noqa: ASYNC220 - once, before anything is measured
            [sys.executable, "-c", HOLD, address, *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": "generated"},
            cwd=Path(__file__).parent.parent,
        )
        for _ in range(processes)
    ]
    try:
        found: Counter[str] = Counter()
        for holder in holders:
            assert holder.stdout is not None
            found.update(json.loads(await asyncio.to_thread(holder.stdout.readline)))
        yield found
    finally:
        for holder in holders:
            await asyncio.to_thread(holder.communicate)


async def latencies(client: Client, number: int) -> list[float]:
    """How long unary calls take, in ms."""
    query: dict[str, Any] = {
        "window_size": "WINDOW_SIZE_DAY",
        **DAYS,
        "customer_ids": CUSTOMERS,
        "billable_metrics": [{"id": COUNT}],
    }
    found = []
    for _ in range(number):
        began = time.perf_counter()
        await client.usage.ListUsage(usage_pb2.ListUsageRequest(**query))
        found.append((time.perf_counter() - began) * 1000)
    return found


def told(times: Sequence[float]) -> str:
    """The median and the 99th percentile of times in ms."""
    return f"p50 {statistics.median(times):.2f} ms, p99 {statistics.quantiles(times, n=100)[98]:.2f} ms"


@pytest.fixture
async def process(database_url: str) -> AsyncIterator[Process]:
    """A server in a process of its own that holds the stock; readers may stall for long."""
    process = start_server("--database-url", database_url, METERING_STREAM_STALL="3600", METERING_DRAIN="1")
    async with connected(process.address) as client:
        await stock(client)
        await whole(client, empty_hours(30_000))
        await latencies(client, 100)
    yield process
    process.kill()


@pytest.mark.long
async def test_measure_200_stalled_readers(process: Process) -> None:
    """200 readers can stall while unary calls go on; prints how long these take, and what each reader costs."""
    alone, beside = [], []
    async with connected(process.address) as client:
        for _ in range(4):
            base = memory(process)
            alone += await latencies(client, 150)
            async with stalled_readers(process.address, empty_hours(30_000), 200, 10) as found:
                await asyncio.sleep(5)  # until all of them have read ahead
                grown = memory(process) - base
                beside += await latencies(client, 150)
            assert found == {"open": 200}
            print(f"\n200 stalled readers: {grown:.0f} MiB more, {grown / 200 * 1024:.0f} KiB each")
            await asyncio.sleep(2)
    print(f"alone: {told(alone)}; beside: {told(beside)}")
    print(f"ratio of p50: {statistics.median(beside) / statistics.median(alone):.2f}")


@pytest.mark.long
@pytest.mark.parametrize("connections", [2, 100])
async def test_measure_10_000_open_streams(process: Process, connections: int) -> None:
    """Ten thousand streams may be open and stalled; unary calls are answered meanwhile."""
    base = memory(process)
    async with connected(process.address) as client:
        alone = await latencies(client, 300)
        began = time.monotonic()
        async with stalled_readers(process.address, empty_hours(30_000), 10_000, connections, 2) as found:
            took = time.monotonic() - began
            beside = await latencies(client, 300)
            grown = memory(process) - base
    print(f"\n{connections} connections: {dict(found)} in {took:.0f} s; {grown:.0f} MiB more, of a peak of")
    print(f"{memory(process, 'VmHWM'):.0f} MiB; {grown / 10_000 * 1024:.0f} KiB each; {told(alone)}; {told(beside)}")
    assert found == {"open": 10_000}


@pytest.mark.long
async def test_measure_100_000_groups(process: Process) -> None:
    """A hundred thousand groups of one metric are read in pages and streamed, in bounded memory."""
    generator = random.Random(1)
    first = START + timedelta(days=50)
    async with connected(process.address) as client:
        for _ in range(20):
            events = [
                event(
                    customer_id="a",
                    at=first + timedelta(seconds=generator.randrange(86_400)),
                    properties={"region": str(uuid.UUID(int=generator.getrandbits(128)))},
                )
                for _ in range(5_000)
            ]
            await client.ingest(*events)
        bounds = {"starting_on": timestamp(first), "ending_before": timestamp(first + timedelta(days=1))}
        for size in ("WINDOW_SIZE_NONE", "WINDOW_SIZE_HOUR"):
            fields: dict[str, Any] = {**ONE, **bounds, "window_size": size, "group_key": ["region"]}
            for page_size in (1_000, 10_000, 0):
                forget_peak(process)
                base, began = memory(process), time.monotonic()
                if page_size:
                    request = usage_pb2.ListUsageWithGroupsRequest(**fields, page_size=page_size)
                    rows = 0
                    while page := await client.usage.ListUsageWithGroups(request):
                        rows += len(page.windows)
                        request.page_token = page.next_page_token
                        if not page.next_page_token:
                            break
                else:
                    rows = len(windows_of(await whole(client, ("StreamUsageWithGroups", fields))))
                took = time.monotonic() - began
                assert rows == 100_000
                how = f"pages of {page_size}" if page_size else "stream"
                peak = memory(process, "VmHWM") - base
                print(f"\n{size}, {how}: {took:.1f} s, {rows / took:.0f} rows/s, {peak:.0f} MiB over {base:.0f}")
