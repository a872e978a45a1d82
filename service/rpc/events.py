"""The RPCs of EventService."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import NamedTuple

from metering.v1 import event_pb2 as pb
from metering.v1 import event_pb2_grpc
from service.database import Database
from service.domain import pages
from service.domain.events import MERGED_EVENTS_MAX
from service.errors import Reason, invalid
from service.ingest import Batch, Ingest
from service.rpc.interceptor import Context, RequestBytes, organization
from service.rpc.pages import PageTokens, fitting, scope
from service.rpc.streams import Streams, draining
from service.rpc.wire import events as wire
from service.rpc.wire import in_slices
from service.store import event_search
from service.store import events as store
from service.store.compiled import ByCatalog

# What a stream may have sent without an answer; then the server stops reading it.
UNANSWERED_BATCHES_MAX = 8
UNANSWERED_BYTES_MAX = 8 * 1024 * 1024
# What gRPC lets in; see the server's options.
MESSAGE_BYTES_MAX = 4 * 1024 * 1024


class EventService(event_pb2_grpc.EventServiceServicer):
    """Takes events; see event.proto."""

    def __init__(
        self, database: Database, tokens: PageTokens, ingest: Ingest, streams: Streams, stream_bytes: RequestBytes
    ) -> None:
        self._database = database
        self._tokens = tokens
        self._ingest = ingest
        self._streams = streams
        self._stream_bytes = stream_bytes
        self._explainers: ByCatalog[event_search.Explainer] = ByCatalog()

    async def IngestEvents(self, request: pb.IngestEventsRequest, context: Context) -> pb.IngestEventsResponse:
        """See event.proto."""
        batch = await wire.batch(request.events, all_or_nothing=request.all_or_nothing)
        return pb.IngestEventsResponse(**wire.verdicts(await self._ingest.ingest(organization(), batch)))

    async def StreamEvents(
        self, requests: AsyncIterator[pb.StreamEventsRequest], context: Context
    ) -> AsyncIterator[pb.StreamEventsResponse]:
        """See event.proto."""
        org = organization()
        inbox = _Inbox(self._stream_bytes, org)
        reading = asyncio.create_task(inbox.fill(requests))
        drain = asyncio.create_task(self._streams.draining.wait())
        drain.add_done_callback(lambda _: reading.cancel())
        try:
            while received := await inbox.take():
                # One transaction at a time: of two batches of a stream the first is stored first.
                items = [item for one in received for item in one.batch.items]
                outcomes = iter(await self._ingest.ingest(org, Batch(items), patient=True))
                for one in received:
                    answer = wire.verdicts(list(itertools.islice(outcomes, len(one.batch.items))))
                    yield pb.StreamEventsResponse(sequence=one.sequence, **answer)
                    await inbox.answered(one)
        finally:
            drain.cancel()
            reading.cancel()
            await asyncio.gather(drain, reading, return_exceptions=True)
            inbox.close()

    async def SearchEvents(self, request: pb.SearchEventsRequest, context: Context) -> pb.SearchEventsResponse:
        """See event.proto."""
        query, org = wire.event_query(request), organization()
        limit = pages.page_size(request.page_size)
        query_scope = scope("SearchEvents", request)
        state = await self._tokens.decode(query_scope, request.page_token)
        after = (datetime.fromisoformat(state["timestamp"]), state["transaction_id"]) if state else None
        found = await self._database.read(
            org,
            lambda c: event_search.search_events(c, org, query, after, limit, self._explainers),
            timeout_s=context.time_remaining(),
        )
        messages = await in_slices(wire.stored_event, found.events)
        events, following = fitting(messages, limit), found.following
        if len(events) < len(messages):
            last = found.events[len(events) - 1]
            following = (last.timestamp, last.transaction_id)
        response = pb.SearchEventsResponse(events=events)
        if following is not None:
            state = {"timestamp": following[0].isoformat(), "transaction_id": following[1]}
            response.next_page_token = await self._tokens.encode(query_scope, state)
        return response

    async def ListUnmatchedCustomerKeys(
        self, request: pb.ListUnmatchedCustomerKeysRequest, context: Context
    ) -> pb.ListUnmatchedCustomerKeysResponse:
        """See event.proto."""
        limit = pages.page_size(request.page_size)
        query_scope = scope("ListUnmatchedCustomerKeys", request)
        state = await self._tokens.decode(query_scope, request.page_token)
        after, org = state["after"] if state else "", organization()
        rows, following = await self._database.read(
            org,
            lambda c: store.list_unmatched_keys(c, org, after=after, limit=limit),
            timeout_s=context.time_remaining(),
        )
        response = pb.ListUnmatchedCustomerKeysResponse(
            unmatched_customer_keys=[wire.unmatched_key(row) for row in rows]
        )
        if following is not None:
            state = {"after": following}
            response.next_page_token = await self._tokens.encode(query_scope, state)
        return response


class _Received(NamedTuple):
    sequence: int
    size: int
    batch: Batch


class _Inbox:
    """The batches of one stream between its reading and its answers."""

    def __init__(self, stream_bytes: RequestBytes, organization: str) -> None:
        self._stream_bytes = stream_bytes
        self._organization = organization
        self._waiting: deque[_Received] = deque()
        self._unanswered = 0
        self._size = 0
        self._ended = False
        self._error: BaseException | None = None
        self._changed = asyncio.Condition()

    async def fill(self, requests: AsyncIterator[pb.StreamEventsRequest]) -> None:
        """Read batches, no faster than they are answered, until the client has sent its last."""
        try:
            for sequence in itertools.count(1):
                async with self._changed:
                    await self._changed.wait_for(self._has_room)
                message = await anext(requests, None)
                if message is None:
                    return
                if message.sequence != sequence:
                    text = f"is {message.sequence} and must be {sequence}: 1 for a stream's first batch, then one more"
                    raise invalid("sequence", Reason.FIELD_INVALID, text)
                size = message.ByteSize()
                await self._stream_bytes.take(size, self._organization)
                self._size += size
                self._unanswered += 1
                received = _Received(sequence, size, await wire.batch(message.events))
                async with self._changed:
                    self._waiting.append(received)
                    self._changed.notify_all()
        except asyncio.CancelledError:
            self._error = draining()
            raise
        except Exception as error:
            self._error = error
        finally:
            self._ended = True
            async with self._changed:
                self._changed.notify_all()

    async def take(self) -> Sequence[_Received]:
        """Wait for batches; as many as one transaction takes. Empty at the end; raises what ended the reading early."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting or self._ended)
            taken: list[_Received] = []
            events = 0
            while self._waiting:
                events += len(self._waiting[0].batch.items)
                if taken and events > MERGED_EVENTS_MAX:
                    break
                taken.append(self._waiting.popleft())
        if not taken and self._error is not None:
            raise self._error
        return taken

    async def answered(self, one: _Received) -> None:
        """Make room for another batch."""
        self._stream_bytes.give_back(one.size, self._organization)
        self._size -= one.size
        self._unanswered -= 1
        async with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Give back what was never answered."""
        self._stream_bytes.give_back(self._size, self._organization)

    def _has_room(self) -> bool:
        # For a batch of any size.
        return self._unanswered < UNANSWERED_BATCHES_MAX and self._size + MESSAGE_BYTES_MAX <= UNANSWERED_BYTES_MAX
