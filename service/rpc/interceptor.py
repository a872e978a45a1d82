"""Owns what every call passes through: request id, decoding, credential, load limit, and errors into statuses."""

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc_status import rpc_status

from service.auth import Auth
from service.errors import MeteringError, Reason, ResourceExhausted, invalid
from service.rpc.status import internal, status

log = structlog.get_logger("metering.rpc")

# grpcio's classes are generic only for type checkers.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

# Health answers anyone: orchestrators have no credential.
_PUBLIC = "/grpc.health.v1.Health/"
# What a waiting call takes at least, however small its request: bounds their number too.
_REQUEST_BYTES_MIN = 4096
_REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_organization: ContextVar[str] = ContextVar("organization")


def organization() -> str:
    """Return the organization of the call being served: that of its credential, never of a header or field."""
    return _organization.get()


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of every service; there is no way to a servicer around it."""

    def __init__(self, auth: Auth, request_bytes_max: int) -> None:
        """Refuse calls while those in flight hold more than `request_bytes_max` bytes of requests."""
        self._auth = auth
        self._bytes_max = request_bytes_max
        self._bytes = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Return the method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_PUBLIC):
            return handler
        if not handler.request_streaming and not handler.response_streaming:
            return grpc.unary_unary_rpc_method_handler(
                # Decoded by us, once we know who calls and that there is room. gRPC would do it first, and answer
                # bytes that do not decode with UNKNOWN and the name of a Python class.
                self._unary(method, handler.unary_unary, handler.request_deserializer),
                request_deserializer=None,
                response_serializer=handler.response_serializer,
            )
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(method, handler.stream_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        raise AssertionError(f"{method} is of a kind that nothing here protects")

    def _unary(self, method: str, serve: Any, decode: Any) -> Any:
        async def unary(raw: bytes, context: Context) -> Any:
            request_id = _request_id(context)
            try:
                _organization.set(await self._auth.organization(context.invocation_metadata() or ()))
                with self._room_for(max(len(raw), _REQUEST_BYTES_MIN)):
                    try:
                        request = decode(raw)
                    except DecodeError:
                        message = "is not a message of the expected type"
                        raise invalid("request", Reason.MALFORMED_REQUEST, message) from None
                    return await serve(request, context)
            except (Exception, asyncio.CancelledError) as error:
                await _abort(context, _answer(error, context, method, request_id), request_id)

        return unary

    @contextlib.contextmanager
    def _room_for(self, size: int) -> Iterator[None]:
        if self._bytes and self._bytes + size > self._bytes_max:
            raise ResourceExhausted(
                Reason.OVERLOADED, "The server has too much in flight; nothing was done.", retry_after_s=1
            )
        self._bytes += size
        try:
            yield
        finally:
            self._bytes -= size

    def _stream(self, method: str, serve: Any) -> Any:
        async def stream(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            request_id = _request_id(context)
            try:
                _organization.set(await self._auth.organization(context.invocation_metadata() or ()))
                async for response in serve(requests, context):
                    yield response
            except (Exception, asyncio.CancelledError) as error:
                await _abort(context, _answer(error, context, method, request_id), request_id)

        return stream


def _answer(error: BaseException, context: Context, method: str, request_id: str) -> status_pb2.Status:
    """Return the status that an exception becomes; re-raises what gRPC itself must see."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, asyncio.CancelledError) and context.cancelled():
        raise error
    if isinstance(error, MeteringError):
        return status(error)
    log.error("unexpected error", method=method, request_id=request_id, exc_info=error)
    return internal(request_id)


async def _abort(context: Context, answer: status_pb2.Status, request_id: str) -> None:
    found = rpc_status.to_status(answer)
    trailers = (*found.trailing_metadata, (_REQUEST_ID_KEY, request_id))
    await context.abort(found.code, found.details, trailing_metadata=trailers)


def _request_id(context: Context) -> str:
    sent = next((str(v) for k, v in context.invocation_metadata() or () if k == _REQUEST_ID_KEY), "")
    request_id = sent if _REQUEST_ID.fullmatch(sent) else secrets.token_hex(8)
    context.set_trailing_metadata(((_REQUEST_ID_KEY, request_id),))
    return request_id
