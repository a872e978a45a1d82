"""Owns gRPC's server object, with what grpcio does wrong put right: faults that strangers or mere load bring out.

It reaches into grpcio, whose version is therefore pinned; tests/test_hostile_input.py and tests/test_overload.py send
what it is for.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # has no types

_HEALTH = "/grpc.health.v1.Health/"


def aio_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, int]], calls_max: int
) -> Any:
    """Make a server as `grpc.aio.server` does, that no path ends and that logs nothing of what callers send.

    Beyond `calls_max` calls, also such of which no message has come yet, it refuses all but those that ask for health.
    """
    logger = logging.getLogger("grpc._cython.cygrpc")
    if _is_ours not in logger.filters:
        logger.addFilter(_is_ours)
    original, cygrpc.AioServer = cygrpc.AioServer, _Server
    try:
        server: Any = grpc.aio.server(interceptors=interceptors, options=options)
    finally:
        cygrpc.AioServer = original
    server._server._our_calls_max = calls_max
    return server


class _Server(cygrpc.AioServer):  # type: ignore[misc]  # as above
    """Takes calls in by itself.

    gRPC decodes the paths of methods that do not exist in the loop that takes calls in, so that one path that is no
    text ends the server, before any credential is asked for; here they are answered unseen. It counts calls only from
    their message on, so that those that never send one could be without number; here they count from their headers on.
    And for each call it looks at all methods again.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        thread_pool: Any,
        generic_handlers: Any,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        *rest: Any,
    ) -> None:
        super().__init__(loop, thread_pool, generic_handlers, interceptors, *rest)
        self._our_loop = loop
        self._our_interceptors = tuple(interceptors)
        self._our_handlers: dict[str, Any] = {}
        self._our_tasks: set[asyncio.Task[None]] = set()
        self._our_calls_max = 0

    def add_registered_method_handlers(self, handlers: Mapping[str, Any]) -> None:
        """Keep the handlers, which gRPC's own object does not give away."""
        self._our_handlers.update(handlers)
        super().add_registered_method_handlers(handlers)

    def _make_request_call_future(self, method: bytes | None) -> "asyncio.Task[None]":
        # gRPC waits for it; it ends when the server does.
        return self._our_loop.create_task(self._take_calls(method))

    async def _take_calls(self, method: bytes | None) -> None:
        """Take calls of a method (None = of methods that do not exist) as long as the server runs."""
        name = "" if method is None else method.decode()
        handlers = cygrpc._MethodResolver([], {} if method is None else self._our_handlers)
        interceptors = () if method is None else self._our_interceptors
        while True:
            call = await (self._request_call() if method is None else self._request_registered_call(method))
            full = len(self._our_tasks) >= self._our_calls_max and not name.startswith(_HEALTH)
            answer = cygrpc._handle_rpc(name, handlers, interceptors, call, self._our_loop, full)
            task = self._our_loop.create_task(cygrpc._schedule_rpc_coro(answer, call, self._our_loop, name))
            task.add_done_callback(self._our_tasks.discard)
            self._our_tasks.add(task)


def _is_ours(record: logging.LogRecord) -> bool:
    """Leave out what gRPC logs of headers that are no text (their values, credentials too) and of callers that left."""
    return not str(record.msg).startswith(("Invalid encoding on", "ExecuteBatchError raised in core"))
