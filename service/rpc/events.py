"""The RPCs of EventService."""

from metering.v1 import event_pb2, event_pb2_grpc
from service.database import Database
from service.domain import pages
from service.ingest import Ingest
from service.rpc import wire
from service.rpc.interceptor import Context, organization
from service.rpc.pages import PageTokens
from service.store import events as store


class EventService(event_pb2_grpc.EventServiceServicer):
    """Takes events; see event.proto."""

    def __init__(self, database: Database, tokens: PageTokens, ingest: Ingest) -> None:
        self._database = database
        self._tokens = tokens
        self._ingest = ingest

    async def IngestEvents(
        self, request: event_pb2.IngestEventsRequest, context: Context
    ) -> event_pb2.IngestEventsResponse:
        """See event.proto."""
        return wire.ingest_response(await self._ingest.ingest(organization(), await wire.batch(request)))

    async def ListUnmatchedCustomerKeys(
        self, request: event_pb2.ListUnmatchedCustomerKeysRequest, context: Context
    ) -> event_pb2.ListUnmatchedCustomerKeysResponse:
        """See event.proto."""
        limit = pages.page_size(request.page_size)
        state = await self._tokens.decode("ListUnmatchedCustomerKeys", request, request.page_token)
        after, org = state["after"] if state else "", organization()
        rows, following = await self._database.read(
            lambda c: store.list_unmatched_keys(c, org, after=after, limit=limit), timeout_s=context.time_remaining()
        )
        response = event_pb2.ListUnmatchedCustomerKeysResponse(
            unmatched_customer_keys=[wire.unmatched_key(row) for row in rows]
        )
        if following is not None:
            state = {"after": following}
            response.next_page_token = await self._tokens.encode("ListUnmatchedCustomerKeys", request, state)
        return response
