"""The RPCs of UsageService."""

import uuid
from datetime import UTC, datetime
from typing import Any

from metering.v1 import usage_pb2, usage_pb2_grpc
from service.database import Database
from service.domain import pages
from service.domain.usage import PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX, Position
from service.rpc import wire
from service.rpc.interceptor import Context, organization
from service.rpc.pages import PageTokens
from service.store import usage as store


class UsageService(usage_pb2_grpc.UsageServiceServicer):
    """Answers with usage; see usage.proto."""

    def __init__(self, database: Database, tokens: PageTokens) -> None:
        self._database = database
        self._tokens = tokens

    async def ListUsage(self, request: usage_pb2.ListUsageRequest, context: Context) -> usage_pb2.ListUsageResponse:
        """See usage.proto."""
        query, org = wire.usage_query(request), organization()
        limit = pages.page_size(request.page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        state = await self._tokens.decode("ListUsage", request, request.page_token)
        read_time = datetime.fromisoformat(state["read_time"]) if state else datetime.now(UTC)
        begin = _position(state) if state else None
        page = await self._database.read(
            lambda c: store.usage_page(c, org, query, begin, limit), timeout_s=context.time_remaining()
        )
        windows = await wire.in_slices(lambda one: wire.usage_window(one, read_time), page.windows)
        response = usage_pb2.ListUsageResponse(windows=windows)
        if page.following is not None:
            state = _state(page.following, read_time)
            response.next_page_token = await self._tokens.encode("ListUsage", request, state)
        return response


def _position(state: dict[str, Any]) -> Position:
    return Position(uuid.UUID(state["customer"]), uuid.UUID(state["metric"]), state["window"])


def _state(position: Position, read_time: datetime) -> dict[str, Any]:
    return {
        "customer": position.customer_id.hex,
        "metric": position.metric_id.hex,
        "window": position.window,
        "read_time": read_time.isoformat(),
    }
