"""Owns what streams share: the size of their messages, how far they read ahead, when one stalls, and how they drain."""

import asyncio
import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import grpc

from service.errors import Aborted, Reason, Unavailable

MESSAGE_BYTES = 64 * 1024
# What the open streams together should have read and not sent; each at least a message, and a page at most.
READ_AHEAD_BYTES = 32 * 1024 * 1024
READ_BYTES_MAX = 1024 * 1024


class ClientGone(Exception):
    """The client left while a message was on its way; there is nobody to tell."""


class Streams:
    """The open streams of one server."""

    def __init__(self, stall: timedelta) -> None:
        """End a stream when a message of it was not taken for as long as `stall`."""
        self.draining = asyncio.Event()
        self._stall_s = stall.total_seconds()
        self._reading = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count a stream as one that reads ahead while the block runs."""
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    def read_bytes(self) -> int:
        """Return how much one stream should read at once: the more there are that do, the less."""
        return max(MESSAGE_BYTES, min(READ_BYTES_MAX, READ_AHEAD_BYTES // max(1, self._reading)))

    async def send(self, context: "grpc.aio.ServicerContext[Any, Any]", message: Any) -> None:
        """Send a message, waiting until the client has room for it.

        Raises Aborted when that takes too long, ClientGone when it has left.
        """
        try:
            async with asyncio.timeout(self._stall_s):
                await context.write(message)
        except TimeoutError:
            text = f"A message was not taken for {self._stall_s:g} s; go on from the last one received."
            raise Aborted(Reason.STREAM_STALLED, text) from None
        except grpc.aio.InternalError:
            raise ClientGone from None

    def check(self) -> None:
        """Raise Unavailable once the server drains: to be called where a stream can be gone on with."""
        if self.draining.is_set():
            raise draining()


def draining() -> Unavailable:
    """Build the error that ends a stream because the server shuts down."""
    text = "The server is shutting down; go on from the last message received, with another replica or in a moment."
    return Unavailable(Reason.SERVER_DRAINING, text, retry_after_s=1)
