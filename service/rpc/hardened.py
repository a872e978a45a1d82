"""Owns gRPC's server object, with faults of grpcio put right that any stranger could use.

Seen in grpcio 1.85: tests/test_hostile_input.py sends what provokes them.
"""

import asyncio
import logging
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # has no types


def aio_server(**arguments: Any) -> grpc.aio.Server:
    """Make a server as `grpc.aio.server` does, that no path ends and that logs nothing of what callers send."""
    logger = logging.getLogger("grpc._cython.cygrpc")
    if _is_ours not in logger.filters:
        logger.addFilter(_is_ours)
    original, cygrpc.AioServer = cygrpc.AioServer, _Server
    try:
        return grpc.aio.server(**arguments)
    finally:
        cygrpc.AioServer = original


class _Server(cygrpc.AioServer):  # type: ignore[misc]  # as above
    """Answers calls of methods that are not registered without looking at their paths.

    gRPC decodes them in the loop that takes calls in, so that one path that is no text ends the whole server, before
    any credential is asked for. All methods that there are are registered, and never come this way.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *arguments: Any) -> None:
        super().__init__(loop, *arguments)
        self._refusing_loop = loop
        self._refused: set[asyncio.Task[None]] = set()

    def _make_request_call_future(self, method: bytes | None) -> Any:
        if method is not None:
            return super()._make_request_call_future(method)
        return self._refusing_loop.create_task(self._refuse_unregistered())

    async def _refuse_unregistered(self) -> None:
        loop, nothing = self._refusing_loop, cygrpc._MethodResolver([], {})
        while True:
            call = await self._request_call()
            answer = cygrpc._handle_rpc("", nothing, (), call, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(answer, call, loop, ""))
            self._refused.add(task)
            task.add_done_callback(self._refused.discard)


def _is_ours(record: logging.LogRecord) -> bool:
    """Leave out what gRPC logs of headers that are no text (their values, credentials too) and of callers that left."""
    return not str(record.msg).startswith(("Invalid encoding on", "ExecuteBatchError raised in core"))
