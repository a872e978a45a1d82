"""A server on a real socket that plays what a test says: for streams, where transport, threads and time matter."""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from click.testing import CliRunner, Result
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import status_pb2

from metering.v1 import event_pb2, usage_pb2
from service.cli import main

# Plays one call: gets the requests as they come, gives the responses, ends it with OK by returning.
Play = Callable[[Iterator[Any], grpc.ServicerContext], Iterator[Message]]


STREAMS: list[tuple[str, str, Any]] = [
    ("metering.v1.EventService", "StreamEvents", event_pb2.StreamEventsRequest),
    ("metering.v1.UsageService", "StreamUsage", usage_pb2.StreamUsageRequest),
    ("metering.v1.UsageService", "StreamUsageWithGroups", usage_pb2.StreamUsageWithGroupsRequest),
]


@dataclass
class Refusal:
    """An error status, with google.rpc details."""

    code: grpc.StatusCode
    message: str = "refused"
    details: tuple[Message, ...] = ()

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """The details as gRPC carries them."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        return (("grpc-status-details-bin", status.SerializeToString()),)

    def raise_in(self, context: grpc.ServicerContext) -> None:
        """Ends a call with it."""
        context.set_trailing_metadata(self.trailing_metadata())
        context.abort(self.code, self.message)


@dataclass
class Call:
    """What came in with one call."""

    metadata: dict[str, str | bytes]
    time_remaining: float | None
    requests: list[Any] = field(default_factory=list)


class ScriptedServer:
    """Plays its calls one after another, and keeps what came in."""

    def __init__(self, directory: Path) -> None:
        self.address = f"unix:{directory}/scripted.sock"
        self.calls: list[Call] = []
        self._plays: Iterator[Play] = iter(())

    def __enter__(self) -> "ScriptedServer":
        self._server = grpc.server(ThreadPoolExecutor(8))
        for service, method, request in STREAMS:
            # The same for all: to a server a unary request is a stream of one.
            handler = grpc.stream_stream_rpc_method_handler(
                self._play,
                request_deserializer=request.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self._server.add_insecure_port(self.address)
        self._server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stop(None).wait()

    def play(self, *plays: Play) -> None:
        """Sets the plays of the calls to come; a call too many is refused rather than left to hang."""
        self._plays = itertools.chain(plays, itertools.repeat(one_call_too_many))

    def run(self, command: list[str], *plays: Play, stdin: Any = "") -> Result:
        """The result of a command against these plays."""
        self.play(*plays)
        return CliRunner().invoke(main, [*command, "--address", self.address], input=stdin)

    def _play(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Message]:
        call = Call(dict(context.invocation_metadata()), context.time_remaining())
        self.calls.append(call)

        def kept() -> Iterator[Any]:
            for request in requests:
                call.requests.append(request)
                yield request

        yield from next(self._plays)(kept(), context)


def one_call_too_many(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Message]:
    """Refuses a call that the test did not expect."""
    context.abort(grpc.StatusCode.UNIMPLEMENTED, "one call too many")
    yield from ()


def refused(refusal: Refusal) -> Play:
    """A call that is refused at once."""

    def play(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Message]:
        refusal.raise_in(context)
        yield from ()

    return play


def messages(*sent: Message, then: Refusal | None = None) -> Play:
    """A server's stream of these messages, which ends with OK or as told; every request is taken first."""

    def play(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Message]:
        next(requests)
        yield from sent
        if then is not None:
            then.raise_in(context)

    return play


def silent(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Message]:
    """Takes everything and never says a word."""
    for _ in requests:
        pass
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait(30)
    yield from ()
