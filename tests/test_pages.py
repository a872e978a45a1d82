"""Claims about pages: a walk gives every row once, and a token fits its own organization, method and query only."""

import base64
import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import grpc
import pytest
import sqlalchemy as sa
from conftest import Client, event, running_server, timestamp
from faults import fault_of, until

import service.rpc.usage
from metering.v1 import billable_metric_pb2, customer_pb2, event_pb2, usage_pb2
from service.auth import new_api_key
from service.database import Database
from service.domain.pages import PAGE_SIZE_MAX
from service.store import organizations
from service.store.tables import page_token_keys

START = datetime(2026, 1, 1, tzinfo=UTC)
END = START + timedelta(hours=4)
REFUSED = ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID", "page_token")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


class Listing(NamedTuple):
    """A paged RPC: how to call it, a second query that a token of the first must not fit, and its rows."""

    service: str
    method: str
    request: Any
    other: Any
    rows: str
    key: Callable[[Any], Any]

    def send(self, client: Client, request: Any, metadata: Any = None) -> Awaitable[Any]:
        """Call it."""
        return getattr(getattr(client, self.service), self.method)(request, metadata=metadata)  # type: ignore[no-any-return]

    def page(self, size: int, token: str, *, other: bool = False) -> Any:
        """The request of one page."""
        request = type(self.request)()
        request.CopyFrom(self.other if other else self.request)
        request.page_size, request.page_token = size, token
        return request


def _usage(**fields: Any) -> usage_pb2.ListUsageRequest:
    return usage_pb2.ListUsageRequest(
        **{
            "window_size": "WINDOW_SIZE_HOUR",
            "starting_on": timestamp(START),
            "ending_before": timestamp(END),
            **fields,
        }
    )


LISTINGS = [
    Listing(
        "customers",
        "ListCustomers",
        customer_pb2.ListCustomersRequest(),
        customer_pb2.ListCustomersRequest(include_archived=True),
        "customers",
        lambda row: row.id,
    ),
    Listing(
        "metrics",
        "ListBillableMetrics",
        billable_metric_pb2.ListBillableMetricsRequest(),
        billable_metric_pb2.ListBillableMetricsRequest(include_archived=True),
        "billable_metrics",
        lambda row: row.id,
    ),
    Listing(
        "events",
        "ListUnmatchedCustomerKeys",
        event_pb2.ListUnmatchedCustomerKeysRequest(),
        None,
        "unmatched_customer_keys",
        lambda row: row.customer_key,
    ),
    Listing(
        "usage",
        "ListUsage",
        _usage(),
        _usage(omit_empty_windows=True),
        "windows",
        lambda row: (row.customer_id, row.billable_metric_id, row.starting_on.seconds),
    ),
]
every_listing = pytest.mark.parametrize("listing", LISTINGS, ids=lambda listing: listing.method)


async def fill(client: Client) -> None:
    """Five of everything: customers, metrics, unmatched keys; usage of two customers with gaps between hours."""
    for i in range(5):
        await client.create_metric(name=f"m{i}")
    for i in range(5):
        await client.create_customer(ingest_aliases=[f"c{i}"])
    hours = [(0, 0), (0, 2), (1, 3)]
    await client.ingest(*(event(f"u{c}{h}", customer_id=f"c{c}", at=START + timedelta(hours=h)) for c, h in hours))
    # Not in order, and in bytes another order than in any language's.
    await client.ingest(*(event(customer_id=key) for key in ("ä", "Z", "a", "~", "\U0001f600")))


@pytest.fixture
async def filled(client: Client) -> Client:
    """A client of a server with a little of everything."""
    await fill(client)
    return client


async def walk(client: Client, listing: Listing, sizes: Iterator[int], **how: Any) -> list[list[Any]]:
    """All pages, each of the next size."""
    pages, token = [], ""
    while True:
        size = next(sizes)
        answer = await listing.send(client, listing.page(size, token, **how))
        rows = list(getattr(answer, listing.rows))
        assert len(rows) <= size
        pages.append(rows)
        token = answer.next_page_token
        if not token:
            return pages
        assert len(token) < 512


def always(size: int) -> Iterator[int]:
    """The same size for ever."""
    while True:
        yield size


# --- Walks


@every_listing
async def test_every_page_size_gives_the_same_rows(filled: Client, listing: Listing) -> None:
    """Whatever the page size, pages put together are the whole list, in its order, without an empty page at the end."""
    for other in (False, True) if listing.other is not None else (False,):
        (whole,) = await walk(filled, listing, always(1000), other=other)
        keys = [listing.key(row) for row in whole]
        assert len(keys) >= 3
        assert keys == sorted(set(keys), key=lambda key: key.encode() if isinstance(key, str) else key)
        for size in range(1, len(whole) + 2):
            pages = await walk(filled, listing, always(size), other=other)
            assert [row for page in pages for row in page] == whole
            # No page has fewer than asked for but the last, and that has some: these lists are small.
            assert [len(page) for page in pages[:-1]] == [size] * (len(pages) - 1)
            assert pages[-1]


@every_listing
async def test_the_page_size_may_change(filled: Client, listing: Listing) -> None:
    """Another page size in mid-walk changes nothing but where pages end; 0 is the default."""
    (whole,) = await walk(filled, listing, always(1000))
    for sizes in ([1, 2, 3], [3, 1, 1, 2], [2, 10_000], [1, 1000, 1]):
        pages = await walk(filled, listing, iter([*sizes, *[1000] * 9]))
        assert [row for page in pages for row in page] == whole
    first = await listing.send(filled, listing.page(1, ""))
    rest = await listing.send(filled, listing.page(0, first.next_page_token))
    assert [*getattr(first, listing.rows), *getattr(rest, listing.rows)] == whole


async def test_page_sizes_are_bounded(client: Client) -> None:
    """A catalog page has 100 rows by default and 1,000 at most, a usage page 1,000 and 10,000."""
    await client.ingest(*(event(customer_id=f"k{i:04}") for i in range(PAGE_SIZE_MAX + 1)))
    await client.create_customer(ingest_aliases=["acme"])
    await client.create_metric()
    await client.ingest(event())
    listing = LISTINGS[2]
    for size, expected in ((0, 100), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)):
        answer = await listing.send(client, listing.page(size, ""))
        assert (len(answer.unmatched_customer_keys), bool(answer.next_page_token)) == (expected, True)
    years = _usage(starting_on=timestamp(START - timedelta(days=800)))
    assert len((await client.usage.ListUsage(years)).windows) == 1000
    years.page_size = 10_001
    answer = await client.usage.ListUsage(years)
    # It is cut at about 1 MiB too.
    assert 1000 < len(answer.windows) <= 10_000
    assert answer.ByteSize() < 1.1 * 1024 * 1024


async def test_a_long_walk_loses_no_key(client: Client) -> None:
    """Thousands of unmatched keys, in pages of any size, come once each and in order, whatever the planner does."""
    await client.create_customer(ingest_aliases=["acme"])
    keys = [f"k{i:04}" for i in range(2500)]
    await client.ingest(event(), *(event(customer_id=key) for key in reversed(keys)))
    for size in (100, 999, 1000):
        pages = await walk(client, LISTINGS[2], always(size))
        assert [row.customer_key for page in pages for row in page] == keys


@every_listing
async def test_rows_that_come_between_pages(filled: Client, listing: Listing) -> None:
    """Rows that existed throughout come exactly once, whatever is inserted before and after the reader's place."""
    (whole,) = await walk(filled, listing, always(1000))
    keys = [listing.key(row) for row in whole]
    seen: list[Any] = []
    token = ""
    for number in itertools.count():
        answer = await listing.send(filled, listing.page(1, token))
        seen += [listing.key(row) for row in getattr(answer, listing.rows)]
        token = answer.next_page_token
        if not token:
            break
        # New rows land on both sides of the reader's place: ids are random, keys are chosen so.
        if number < 3:
            alias = f"n{number}"
            await filled.create_customer(ingest_aliases=[alias])
            await filled.create_metric(name=alias)
            await filled.ingest(
                event(customer_id=alias), event(customer_id="!" + alias), event(customer_id="\U0001f601" + alias)
            )
    assert len(seen) == len(set(seen))
    assert [key for key in seen if key in keys] == keys


async def test_incomplete_is_judged_by_the_first_page(filled: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages of a walk say `incomplete` as of the first page's time, though the clock goes on."""

    class Clock(datetime):
        """A clock that the test sets."""

        at = START

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return cls.at

    monkeypatch.setattr(service.rpc.usage, "datetime", Clock)
    Clock.at = START + timedelta(hours=2, minutes=30)
    first = await filled.usage.ListUsage(_usage(page_size=1))
    Clock.at = END + timedelta(days=1)
    rest = await filled.usage.ListUsage(_usage(page_token=first.next_page_token))
    per_pair = [False, False, True, True]
    flags = [window.incomplete for window in (*first.windows, *rest.windows)]
    assert flags == per_pair * (len(flags) // 4)
    assert len(flags) == 2 * 5 * 4
    # A walk that begins now finds them all ended.
    assert not any(window.incomplete for window in (await filled.usage.ListUsage(_usage())).windows)


# --- Tokens that must not work


async def token_of(client: Client, listing: Listing, metadata: Any = None, *, other: bool = False) -> str:
    """The token after the first row."""
    answer = await listing.send(client, listing.page(1, "", other=other), metadata)
    assert answer.next_page_token
    return str(answer.next_page_token)


@every_listing
async def test_tampered_tokens(filled: Client, listing: Listing) -> None:
    """Any one character or bit changed, anything cut off or added, garbage of any size: refused alike."""
    token = await token_of(filled, listing)
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    bad = {
        "empty base64": "=",
        "blank": " ",
        "padded": token + "=" * (-len(token) % 4 or 4),
        "zeros": "A" * len(token),
        "four zero bytes": "AAAA",
        "1 MB": "A" * 1_000_000,
        "itself 1,000 times": token * 1000,
        "twice": token * 2,
        "newline": token + "\n",
        "reversed": token[::-1],
        "not ASCII": token[:-1] + "é",
        "wide": token.replace("A", "\uff21") + "\uff21",
        "standard alphabet": base64.b64encode(b"\xfb\xff" + raw[2:]).decode(),
    }
    for i, one in enumerate(token):
        # The next letter differs in the lowest bits, which the last character may not even use.
        bad[f"character {i}"] = token[:i] + ALPHABET[(ALPHABET.index(one) + 1) % 64] + token[i + 1 :]
        if i:
            bad[f"first {i}"] = token[:i]
    for bit in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        bad[f"bit {bit}"] = base64.urlsafe_b64encode(flipped).rstrip(b"=").decode()
    texts = set()
    for name, one in bad.items():
        fault = await fault_of(listing.send(filled, listing.page(1, one)))
        assert fault.brief == REFUSED, name
        texts.add(fault.text)
    assert len(texts) == 1
    # The token itself still works.
    assert getattr(await listing.send(filled, listing.page(1, token)), listing.rows)


async def test_tokens_of_other_methods_and_queries(filled: Client) -> None:
    """A token fits its own method and query only."""
    tokens = {listing.method: await token_of(filled, listing) for listing in LISTINGS}
    for listing in LISTINGS:
        for method, token in tokens.items():
            call = listing.send(filled, listing.page(1, token))
            if method == listing.method:
                assert getattr(await call, listing.rows)
            else:
                assert (await fault_of(call)).brief == REFUSED
        if listing.other is not None:
            fault = await fault_of(listing.send(filled, listing.page(1, tokens[listing.method], other=True)))
            assert fault.brief == REFUSED
    others = [
        _usage(window_size="WINDOW_SIZE_DAY", ending_before=timestamp(START + timedelta(days=1))),
        _usage(window_size="WINDOW_SIZE_NONE"),
        _usage(ending_before=timestamp(END + timedelta(hours=1))),
        _usage(starting_on=timestamp(START - timedelta(hours=1))),
    ]
    customers = (await filled.customers.ListCustomers(customer_pb2.ListCustomersRequest())).customers
    others.append(_usage(customer_ids=[customers[0].id]))
    for other in others:
        other.page_token = tokens["ListUsage"]
        assert (await fault_of(filled.usage.ListUsage(other))).brief == REFUSED
    key = customer_pb2.ListCustomersRequest(customer_key="c0", page_token=tokens["ListCustomers"])
    assert (await fault_of(filled.customers.ListCustomers(key))).brief == REFUSED


async def test_methods_of_equal_shape_are_told_apart(filled: Client) -> None:
    """The method is part of a token's scope, not only the bytes of its query: those of two lists can be equal."""
    customers, metrics = LISTINGS[0], LISTINGS[1]
    # Both requests have no field set but the paging; both states are {"after": UUID}.
    token = await token_of(filled, customers)
    assert (await fault_of(metrics.send(filled, metrics.page(1, token)))).brief == REFUSED
    same = customers.other.SerializeToString(), metrics.other.SerializeToString()
    assert same[0] == same[1]
    token = await token_of(filled, customers, other=True)
    assert (await fault_of(metrics.send(filled, metrics.page(1, token, other=True)))).brief == REFUSED


async def test_tokens_of_another_organization(database_url: str, database: Database) -> None:
    """One organization's token is garbage to another, though query and rows are the same."""
    headers = {}
    async with database.engine.begin() as connection:
        for name in ("one", "two"):
            await organizations.create_organization(connection, name)
            key = new_api_key()
            await organizations.create_api_key(connection, name, key.id, "test", key.secret_hash)
            headers[name] = [("authorization", f"Bearer {key.text}")]
    async with running_server(database_url) as client:
        ids = sorted(str(uuid.uuid4()) for _ in range(3))
        for header in headers.values():
            for one in ids:
                customer = customer_pb2.Customer(id=one, name="x", ingest_aliases=[f"a{one}"])
                metric = billable_metric_pb2.BillableMetric(id=one, name="x", aggregation_type=1)
                create = customer_pb2.CreateCustomerRequest(customer=customer)
                await client.customers.CreateCustomer(create, metadata=header)
                made = billable_metric_pb2.CreateBillableMetricRequest(billable_metric=metric)
                await client.metrics.CreateBillableMetric(made, metadata=header)
            events = [event(one, customer_id=one) for one in ids] + [
                event(f"{one}x", customer_id=f"x{one}") for one in ids
            ]
            await client.events.IngestEvents(event_pb2.IngestEventsRequest(events=events), metadata=header)
        for listing in LISTINGS:
            token = await token_of(client, listing, headers["one"])
            assert getattr(await listing.send(client, listing.page(1, token), headers["one"]), listing.rows)
            fault = await fault_of(listing.send(client, listing.page(1, token), headers["two"]))
            assert fault.brief == REFUSED


# --- Replicas and rotation


@every_listing
async def test_every_replica_reads_a_token(filled: Client, database_url: str, listing: Listing) -> None:
    """A token of one server continues on another with the same database, and tampering is seen there too."""
    (whole,) = await walk(filled, listing, always(1000))
    async with running_server(database_url) as replica:
        token = await token_of(filled, listing)
        rest = await listing.send(replica, listing.page(1000, token))
        assert list(getattr(rest, listing.rows)) == whole[1:]
        for bad in (token[:-1], token[:-2] + "AA", "B" + token[1:]):
            assert (await fault_of(listing.send(replica, listing.page(1, bad)))).brief == REFUSED


@asynccontextmanager
async def rotated(database_url: str, database: Database, new_id: int) -> AsyncIterator[Client]:
    """A fresh server after the signing key was rotated."""
    async with database.engine.begin() as connection:
        await connection.execute(sa.insert(page_token_keys).values(id=new_id, secret=bytes([new_id]) * 32))
    async with running_server(database_url) as client:
        yield client


async def test_rotated_keys(filled: Client, database: Database, database_url: str) -> None:
    """A token outlives one rotation of the signing keys and not two; a running server learns of new keys by itself."""
    listing = LISTINGS[0]
    old = await token_of(filled, listing)
    async with rotated(database_url, database, 2) as client:
        assert (await listing.send(client, listing.page(1, old))).customers
        new = await token_of(client, listing)
        assert new != old
    # This server has not seen the new key yet: a token made with it is the reason to look.
    await until_accepted(filled, listing, new)
    async with rotated(database_url, database, 3) as client:
        assert (await fault_of(listing.send(client, listing.page(1, old)))).brief == REFUSED
        assert (await listing.send(client, listing.page(1, new))).customers


async def until_accepted(client: Client, listing: Listing, token: str) -> None:
    """Call until a token of a key that is new to the server is accepted: it looks at most once a second."""

    async def accepted() -> bool:
        try:
            await listing.send(client, listing.page(1, token))
        except grpc.aio.AioRpcError:
            return False
        return True

    await until(accepted, 5)


async def test_keys_rotate_with_age(filled: Client, database: Database, database_url: str) -> None:
    """A signing key older than 30 days gets a successor, once, however many servers notice; its tokens still work."""
    listing = LISTINGS[0]
    old = await token_of(filled, listing)
    async with database.engine.begin() as connection:
        aged = sa.func.now() - timedelta(days=31)
        await connection.execute(sa.update(page_token_keys).values(created_at=aged))
    async with running_server(database_url) as one, running_server(database_url) as two:
        tokens = [await token_of(client, listing) for client in (one, two)]
        for client in (one, two):
            for token in (old, *tokens):
                assert (await listing.send(client, listing.page(1, token))).customers
    async with database.engine.connect() as connection:
        ids = (await connection.execute(sa.select(page_token_keys.c.id).order_by(page_token_keys.c.id))).scalars()
        assert list(ids) == [1, 2]


async def test_a_token_does_not_carry_its_secrets(filled: Client) -> None:
    """What a token shows is a place in the caller's own list; two servers' and two queries' signatures differ."""
    tokens = {await token_of(filled, listing, other=other) for listing in LISTINGS[:2] for other in (False, True)}
    signatures = {base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))[-16:] for token in tokens}
    assert len(signatures) == 4
