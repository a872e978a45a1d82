"""Owns what every call passes through: request id, credential, role, room, decoding, and errors into statuses."""

import asyncio
import contextlib
import functools
import re
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import grpc
import structlog
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc_status import rpc_status

from service.auth import Auth, Caller
from service.auth.certificates import names_of
from service.auth.permissions import PUBLIC_SERVICES
from service.domain.roles import Role
from service.errors import MeteringError, PermissionDenied, Reason, ResourceExhausted, Unauthenticated, invalid
from service.rpc.status import internal, status
from service.rpc.streams import ClientGone, Streams
from service.turns import Places, overloaded

log = structlog.get_logger("metering.rpc")

# grpcio's classes are generic only for type checkers.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

# What a waiting call takes at least, however small its request: bounds their number too.
_REQUEST_BYTES_MIN = 4096
# Nobody's organization: those that are not known yet.
_STRANGERS = ""
_REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_caller: ContextVar[Caller] = ContextVar("caller")


def organization() -> str:
    """Return the organization of the call being served: that of its credential, never of a header or field."""
    return _caller.get().organization


def is_admin() -> bool:
    """Say whether the call being served comes from an administrator of its organization."""
    return Role.ADMIN in _caller.get().roles


def check_organization(named: str) -> None:
    """Refuse a call that names another organization than its credential's; an open server has no credentials."""
    caller = _caller.get()
    if not caller.is_anyone and named != caller.organization:
        raise PermissionDenied(
            Reason.ORGANIZATION_MISMATCH, "The credential is not of the organization that the request names."
        )


class RequestBytes:
    """How many bytes of requests the server holds, over all calls of a kind, and what happens when it is too much.

    One organization may hold three quarters of them.
    """

    def __init__(self, most: int) -> None:
        """Let requests hold about `most` bytes."""
        self._most = most
        self._held = 0
        self._held_by: Counter[str] = Counter()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._given_back = asyncio.Event()

    @contextlib.contextmanager
    def hold(self, size: int, organization: str) -> Iterator[None]:
        """Hold a request while the block runs; raises ResourceExhausted if there is no room for it."""
        if self._is_full(size):
            raise overloaded()
        if self._is_full_for(size, organization):
            text = "The requests of this organization that are in flight take as much room as one may have"
            raise ResourceExhausted(Reason.ORGANIZATION_LIMIT, f"{text}; nothing was done.", retry_after_s=1)
        self._take(size, organization)
        try:
            yield
        finally:
            self.give_back(size, organization)

    async def take(self, size: int, organization: str) -> None:
        """Hold a request until it is given back, as soon as there is room, after the organization's earlier ones."""
        async with self._turns.setdefault(organization, asyncio.Lock()):
            while self._is_full(size) or self._is_full_for(size, organization):
                self._given_back.clear()
                await self._given_back.wait()
            self._take(size, organization)

    def give_back(self, size: int, organization: str) -> None:
        """Forget a request that was taken."""
        self._held -= size
        self._held_by[organization] -= size
        if not self._held_by[organization]:
            del self._held_by[organization]
        self._given_back.set()

    def _is_full(self, size: int) -> bool:
        # One request has room always, however large.
        return self._held > 0 and self._held + size > self._most

    def _is_full_for(self, size: int, organization: str) -> bool:
        held = self._held_by[organization]
        return held > 0 and held + size > self._most * 3 // 4

    def _take(self, size: int, organization: str) -> None:
        self._held += size
        self._held_by[organization] += size


class Room(NamedTuple):
    """What calls and streams in flight may hold together. Streams have room of their own: they hold it for long.

    A call with a credential that was not seen lately holds its bytes as `arriving` until it is known whose it is:
    strangers take no room from those who are known.
    """

    calls: Places
    streams: Places
    arriving_bytes: RequestBytes
    call_bytes: RequestBytes
    stream_bytes: RequestBytes
    # Of bidirectional streams, by the message.
    batch_bytes: RequestBytes


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of every service; there is no way to a servicer around it."""

    def __init__(
        self,
        auth: Auth,
        room: Room,
        streams: Streams,
        decoders: Mapping[str, Callable[[bytes], Any]] = MappingProxyType({}),
    ) -> None:
        """Refuse calls that there is no room for. `decoders` take the place of gRPC's for the methods they name."""
        self._decoders = decoders
        self._auth = auth
        self._room = room
        self._streams = streams
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Return the method's handler, wrapped."""
        method = handler_call_details.method
        if (wrapped := self._wrapped.get(method)) is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is None or method.split("/")[1] in PUBLIC_SERVICES:
            return handler
        # There are as many methods as we have; paths that are none never come here.
        self._wrapped[method] = self._wrap(method, handler)
        return self._wrapped[method]

    def _wrap(self, method: str, handler: "Handler") -> "Handler":
        # Requests are decoded by us, once we know who calls and that there is room. gRPC would do it first, and answer
        # bytes that do not decode with UNKNOWN and the name of a Python class.
        decode = self._decoders.get(method, handler.request_deserializer)
        encode = functools.partial(_encoded, handler.response_serializer)
        if handler.request_streaming and handler.response_streaming:
            both = self._both_stream(method, handler.stream_stream, decode)
            return grpc.stream_stream_rpc_method_handler(both, request_deserializer=None, response_serializer=encode)
        if handler.response_streaming:
            stream = self._stream(method, handler.unary_stream, decode)
            return grpc.unary_stream_rpc_method_handler(stream, request_deserializer=None, response_serializer=encode)
        if handler.request_streaming:
            raise AssertionError(f"{method} is of a kind that nothing here protects")
        unary = self._unary(method, handler.unary_unary, decode)
        return grpc.unary_unary_rpc_method_handler(unary, request_deserializer=None, response_serializer=encode)

    def _unary(self, method: str, serve: Any, decode: Any) -> Any:
        async def unary(raw: bytes, context: Context) -> Any:
            size = max(len(raw), _REQUEST_BYTES_MIN)
            async with self._answered(method, context):
                caller = await self._identify_newcomer(method, context, size)
                org = caller.organization
                with self._room.calls.held(org), self._room.call_bytes.hold(size, org):
                    return await serve(_decoded(decode, raw), context)

        return unary

    def _stream(self, method: str, serve: Any, decode: Any) -> Any:
        async def stream(raw: bytes, context: Context) -> None:
            async with self._answered(method, context):
                caller = await self._identify_newcomer(method, context, len(raw))
                org = caller.organization
                with self._room.streams.held(org), self._room.stream_bytes.hold(len(raw), org):
                    await self._send_all(method, serve(_decoded(decode, raw), context), context)

        return stream

    def _both_stream(self, method: str, serve: Any, decode: Any) -> Any:
        async def both(requests: AsyncIterator[bytes], context: Context) -> None:
            async def received() -> AsyncIterator[Any]:
                async for raw in requests:
                    await self._identify_again(method, context)
                    yield _decoded(decode, raw)

            async with self._answered(method, context):
                caller = await self._identify(method, context)
                with self._room.streams.held(caller.organization):
                    await self._send_all(method, serve(received(), context), context)

        return both

    @contextlib.asynccontextmanager
    async def _answered(self, method: str, context: Context) -> AsyncIterator[None]:
        """Let the block serve a call; what it raises is answered as a status."""
        request_id = _request_id(context)
        try:
            yield
        except ClientGone:
            raise asyncio.CancelledError from None  # what gRPC itself makes of a client that left
        except (Exception, asyncio.CancelledError) as error:
            await _abort(context, _answer(error, context, method, request_id), request_id)

    async def _send_all(self, method: str, responses: AsyncIterator[Any], context: Context) -> None:
        begun = False
        try:
            async for response in responses:
                await self._identify_again(method, context)
                if not begun:
                    # Apart from the first message: should that one stall, gRPC would send them again with the status,
                    # and fail.
                    await context.send_initial_metadata(())
                    begun = True
                await self._streams.send(context, response)
        finally:
            if isinstance(responses, AsyncGenerator):
                await responses.aclose()

    async def _identify_newcomer(self, method: str, context: Context, size: int) -> Caller:
        """Find out whose call it is that brought so many bytes, and that it may be made."""
        if self._auth.recalls(context.invocation_metadata() or ()):
            return await self._identify(method, context)
        with self._room.arriving_bytes.hold(size, _STRANGERS):
            return await self._identify(method, context)

    async def _identify(self, method: str, context: Context) -> Caller:
        """Find out whose call it is, and that it may be made."""
        names = _certificate_names(context) if self._auth.reads_certificates else ()
        caller = await self._auth.caller(context.invocation_metadata() or (), names)
        caller.require(method)
        _caller.set(caller)
        return caller

    async def _identify_again(self, method: str, context: Context) -> None:
        """Ask again, as often as a stream moves: a stream must not outlive its credential, nor what that may do."""
        before = organization()
        if (await self._identify(method, context)).organization != before:
            raise Unauthenticated(Reason.CREDENTIAL_INVALID, "The credential is not of the same organization any more.")


def _certificate_names(context: Context) -> tuple[str, ...]:
    """Return the names of the client's certificate."""
    found = next(iter((context.auth_context() or {}).get("x509_pem_cert", ())), None)
    return () if found is None else names_of(found.decode())


def _decoded(decode: Any, raw: bytes) -> Any:
    try:
        return decode(raw)
    except DecodeError:
        raise invalid("request", Reason.MALFORMED_REQUEST, "is not a message of the expected type") from None


def _encoded(encode: Any, answer: Any) -> bytes:
    # Where it pays, a servicer writes its answers itself.
    return answer if isinstance(answer, bytes) else encode(answer)


def _answer(error: BaseException, context: Context, method: str, request_id: str) -> status_pb2.Status:
    """Return the status that an exception becomes; re-raises what gRPC itself must see."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and (context.cancelled() or (task and task.cancelling())):
        raise error
    if isinstance(error, MeteringError):
        return status(error)
    log.error("unexpected error", method=method, request_id=request_id, exc_info=error)
    return internal(request_id)


async def _abort(context: Context, answer: status_pb2.Status, request_id: str) -> None:
    found = rpc_status.to_status(answer)
    trailers = (*found.trailing_metadata, (_REQUEST_ID_KEY, request_id))
    try:
        await context.abort(found.code, found.details, trailing_metadata=trailers)
    except grpc.aio.InternalError:
        # The client left before it took its status. gRPC must not see that as an error of ours.
        raise asyncio.CancelledError from None


def _request_id(context: Context) -> str:
    sent = next((str(v) for k, v in context.invocation_metadata() or () if k == _REQUEST_ID_KEY), "")
    request_id = sent if _REQUEST_ID.fullmatch(sent) else secrets.token_hex(8)
    context.set_trailing_metadata(((_REQUEST_ID_KEY, request_id),))
    return request_id
