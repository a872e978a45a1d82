"""Owns the standard health service: what is well, for anyone who asks, and for those who watch."""

import asyncio
from datetime import timedelta
from typing import TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.rpc.interceptor import Context

# Anyone may watch, so there is a number.
WATCHERS_MAX = 2_000

# The number of a ServingStatus.
Status: TypeAlias = int


class HealthService(health_pb2_grpc.HealthServicer):
    """Tells states by name.

    grpc_health's own holds a lock that changes need while it writes to a watcher: one that does not read keeps
    everybody's states as they are, and the server from shutting down.
    """

    def __init__(self, stall: timedelta) -> None:
        """End watches whose client leaves a message untaken for as long as `stall`."""
        self._stall_s = stall.total_seconds()
        self._states: dict[str, Status] = {}
        self._changed = asyncio.Event()
        self._ended = False
        self._watchers = 0

    def set(self, states: dict[str, Status]) -> None:
        """Tell these states from now on, until the shutdown."""
        if not self._ended and states.items() - self._states.items():
            self._states |= states
            self._changed.set()
            self._changed = asyncio.Event()

    def shut_down(self) -> None:
        """Tell that nothing is served any more; watches end."""
        self.set(dict.fromkeys(self._states, health_pb2.HealthCheckResponse.NOT_SERVING))
        self._ended = True
        self._changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """Tell the state of one service."""
        if request.service not in self._states:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service.")
        return _answer(self._states[request.service])

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Tell the state of one service, and again when it changes."""
        if self._watchers >= WATCHERS_MAX:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many watch already.")
        self._watchers += 1
        try:
            told: Status | None = None
            while not self._ended or told is None:
                changed = self._changed
                state = self._states.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
                if state != told:
                    async with asyncio.timeout(self._stall_s):
                        await context.write(_answer(state))
                    told = state
                else:
                    await changed.wait()
            if told != self._states.get(request.service, told):
                async with asyncio.timeout(self._stall_s):
                    await context.write(_answer(self._states[request.service]))
        except TimeoutError:
            await context.abort(grpc.StatusCode.ABORTED, "A state was not taken; watch again.")
        finally:
            self._watchers -= 1


def _answer(status: Status) -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.ServingStatus.Name(status))
