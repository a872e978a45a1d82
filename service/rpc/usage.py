"""The RPCs of UsageService."""

import asyncio
import bisect
import functools
import itertools
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from google.protobuf.message import Message

from metering.v1 import usage_pb2 as pb
from metering.v1 import usage_pb2_grpc
from service.database import Database
from service.domain import pages
from service.domain.usage import (
    PAGE_BYTES_MAX,
    PAGE_SIZE_DEFAULT,
    PAGE_SIZE_MAX,
    GroupedPosition,
    GroupedQuery,
    Position,
    UsageQuery,
)
from service.domain.windows import Windows
from service.rpc.interceptor import Context, organization
from service.rpc.pages import PageTokens, scope
from service.rpc.streams import MESSAGE_BYTES, Streams
from service.rpc.wire import in_slices, timestamp
from service.rpc.wire import usage as wire
from service.store import grouped_usage as store_grouped
from service.store import usage as store

# A stream never asks for more rows than can be in what it reads at once.
ROW_BYTES_MIN = 64
# Of a message, for its token and times: mostly it is then no more than a client's flow control lets in at once.
_FIELDS_BYTES = 1_024
# Windows that are written before other calls have a turn.
_WRITTEN_AT_ONCE = 1_000
# A watermark stays right as it grows old, it only gives more than is needed; so it is not asked for with every call.
_WATERMARK_S = 1.0

Place = dict[str, Any]
"""Where a listing goes on, JSON-ready."""


class _Part(NamedTuple):
    """Some rows of a listing, each in bytes as an item of an answer, and where it goes on after the one with an index,
    or after all of them.

    None = these are the last.
    """

    rows: Sequence[bytes]
    after: Callable[[int], Place | None]
    following: Place | None


class _Moment(NamedTuple):
    """What a listing keeps from its first page or message to its last."""

    read_time: datetime
    watermark: datetime


class _Extent(NamedTuple):
    """Which part of a listing to read: where it begins, at most how many rows and about how many bytes; and how."""

    place: Place | None
    limit: int
    size: int
    read_time: datetime
    timeout_s: float | None
    ahead: bool = False


Read = Callable[[_Extent], Awaitable[_Part]]


class UsageService(usage_pb2_grpc.UsageServiceServicer):
    """Answers with usage; see usage.proto.

    Answers are the bytes of the messages: to make messages of many windows takes longer than to write them.
    """

    def __init__(self, database: Database, tokens: PageTokens, streams: Streams) -> None:
        self._database = database
        self._tokens = tokens
        self._streams = streams
        self._watermark: tuple[float, datetime] | None = None
        self._watermark_turn = asyncio.Lock()

    async def ListUsage(  # type: ignore[override]
        self, request: pb.ListUsageRequest, context: Context
    ) -> bytes:
        """See usage.proto."""
        read = functools.partial(_windows, self._database, organization(), wire.usage_query(request))
        return await self._page("ListUsage", request, context, read, pb.ListUsageResponse)

    async def ListUsageWithGroups(  # type: ignore[override]
        self, request: pb.ListUsageWithGroupsRequest, context: Context
    ) -> bytes:
        """See usage.proto."""
        read = functools.partial(_grouped_windows, self._database, organization(), wire.grouped_query(request))
        return await self._page("ListUsageWithGroups", request, context, read, pb.ListUsageWithGroupsResponse)

    def StreamUsage(  # type: ignore[override]
        self, request: pb.StreamUsageRequest, context: Context
    ) -> AsyncIterator[bytes]:
        """See usage.proto."""
        read = functools.partial(_windows, self._database, organization(), wire.usage_query(request))
        return self._messages("StreamUsage", request, context, read, pb.StreamUsageResponse)

    def StreamUsageWithGroups(  # type: ignore[override]
        self, request: pb.StreamUsageWithGroupsRequest, context: Context
    ) -> AsyncIterator[bytes]:
        """See usage.proto."""
        read = functools.partial(_grouped_windows, self._database, organization(), wire.grouped_query(request))
        return self._messages("StreamUsageWithGroups", request, context, read, pb.StreamUsageWithGroupsResponse)

    async def _page(
        self,
        method: str,
        request: pb.ListUsageRequest | pb.ListUsageWithGroupsRequest,
        context: Context,
        read: Read,
        response: Callable[..., Message],
    ) -> bytes:
        limit = pages.page_size(request.page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        query_scope = scope(method, request)
        state = await self._tokens.decode(query_scope, request.page_token)
        moment = await self._moment(state)
        place = state["place"] if state else None
        part = await read(_Extent(place, limit, PAGE_BYTES_MAX, moment.read_time, context.time_remaining()))
        token = ""
        if part.following is not None:
            token = await self._tokens.encode(query_scope, _state(part.following, moment))
        return _answer(response, part.rows, next_page_token=token, next_updated_since=timestamp(moment.watermark))

    async def _messages(
        self,
        method: str,
        request: pb.StreamUsageRequest | pb.StreamUsageWithGroupsRequest,
        context: Context,
        read: Read,
        response: Callable[..., Message],
    ) -> AsyncIterator[bytes]:
        """Yield the messages of a stream. Between them it holds what it has read, and no connection."""
        query_scope = scope(method, request)
        state = await self._tokens.decode(query_scope, request.resume_token, "resume_token")
        moment = await self._moment(state)
        place = state["place"] if state else None
        unsent: deque[bytes] = deque()
        if state and place is None:
            unsent = await self._to_messages(_Part((), _nowhere, None), query_scope, moment, response)
        with self._streams.reading():
            while True:
                if not unsent:
                    size, timeout_s = self._streams.read_bytes(), context.time_remaining()
                    limit = min(PAGE_SIZE_MAX, size // ROW_BYTES_MIN)
                    extent = _Extent(place, limit, size, moment.read_time, timeout_s, ahead=True)
                    part = await read(extent)
                    place = part.following
                    unsent = await self._to_messages(part, query_scope, moment, response)
                    del part  # while the reader takes its time
                last = place is None and len(unsent) == 1
                yield unsent.popleft()
                if last:
                    return
                self._streams.check()

    async def _to_messages(
        self, part: _Part, query_scope: str, moment: _Moment, response: Callable[..., Message]
    ) -> deque[bytes]:
        """Cut a part into messages, each with the place after it; one message without rows if there are none.

        Made at once: rows within a message take a fraction of the memory that they take one by one.
        """
        found: deque[bytes] = deque()
        for rows, place in _cut(part):
            found.append(
                _answer(
                    response,
                    rows,
                    resume_token=await self._tokens.encode(query_scope, _state(place, moment)),
                    complete=place is None,
                    next_updated_since=timestamp(moment.watermark),
                )
            )
        return found

    async def _moment(self, state: dict[str, Any] | None) -> _Moment:
        if state is not None:
            return _Moment(datetime.fromisoformat(state["read_time"]), datetime.fromisoformat(state["watermark"]))
        async with self._watermark_turn:
            now = time.monotonic()
            if self._watermark is None or now - self._watermark[0] > _WATERMARK_S:
                self._watermark = (now, await self._database.look_up(store.watermark))
        return _Moment(datetime.now(UTC), self._watermark[1])


async def _windows(database: Database, org: str, query: UsageQuery, wanted: _Extent) -> _Part:
    place = wanted.place
    begin = Position(uuid.UUID(place["customer"]), uuid.UUID(place["metric"]), place["window"]) if place else None
    read = database.read_ahead if wanted.ahead else database.read
    page = await read(
        org, lambda c: store.usage_page(c, org, query, begin, wanted.limit, wanted.size), timeout_s=wanted.timeout_s
    )

    def place_of(position: Position | None) -> Place | None:
        if position is None:
            return None
        customer_id, metric_id, window = position
        return {"customer": customer_id.hex, "metric": metric_id.hex, "window": window}

    ends = list(itertools.accumulate(map(len, page.runs)))

    def after(i: int) -> Place | None:
        number = bisect.bisect_right(ends, i)
        run = page.runs[number]
        return place_of(query.after(run.customer_id, run.metric.id, run.index(i - ends[number] + len(run))))

    parts = (part for run in page.runs for part in run.parts(_WRITTEN_AT_ONCE))
    written = await in_slices(wire.WindowWriter(wanted.read_time).write, parts)
    return _Part(list(itertools.chain.from_iterable(written)), after, place_of(page.following))


async def _grouped_windows(database: Database, org: str, query: GroupedQuery, wanted: _Extent) -> _Part:
    place = wanted.place
    begin = None
    if place:
        begin = GroupedPosition(place["window"], None if place["group"] is None else tuple(place["group"]))
        # Those of the first page: the billing period that holds the present may be another by now.
        start, end = (datetime.fromisoformat(place[name]) for name in ("start", "end"))
        query = replace(query, windows=Windows(query.size, start, end, query.time_zone or "UTC"))
    read = database.read_ahead if wanted.ahead else database.read
    page = await read(
        org,
        lambda c: store_grouped.grouped_page(c, org, query, begin, wanted.limit, wanted.size, wanted.read_time),
        timeout_s=wanted.timeout_s,
    )
    bounds = {"start": page.windows.start.isoformat(), "end": page.windows.end.isoformat()}

    def after(i: int) -> Place:
        row = page.rows[i]
        return {"window": page.windows.index_of(row.start), "group": row.group, **bounds}

    following = page.following
    return _Part(
        await in_slices(lambda one: wire.grouped_window(one, query.group_key, wanted.read_time), page.rows),
        after,
        following and {"window": following.window, "group": following.group, **bounds},
    )


def _state(place: Place | None, moment: _Moment) -> dict[str, Any]:
    return {
        "place": place,
        "read_time": moment.read_time.isoformat(),
        "watermark": moment.watermark.isoformat(),
    }


def _answer(response: Callable[..., Message], rows: Sequence[bytes], **fields: Any) -> bytes:
    """Write an answer of rows; its other fields come after them."""
    return b"".join([*rows, response(**fields).SerializeToString()])


def _nowhere(_: int) -> Place | None:
    return None


def _cut(part: _Part) -> Iterator[tuple[Sequence[bytes], Place | None]]:
    """Yield the rows of each message and the place after them."""
    first, size = 0, 0
    for i, row in enumerate(part.rows):
        size += len(row)
        if i > first and size > MESSAGE_BYTES - _FIELDS_BYTES:
            yield part.rows[first:i], part.after(i - 1)
            first, size = i, len(row)
    yield part.rows[first:], part.following
