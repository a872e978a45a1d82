"""Owns how errors look on the wire: the only place that knows gRPC status codes and google.rpc details."""

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from service.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MeteringError,
    NotFound,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

DOMAIN = "metering"
VIOLATIONS_MAX = 20
# gRPC clients refuse trailers over 8 KiB. The whole status is sent base64-encoded (4/3), and its text once more with
# every byte that is not ASCII as three.
DETAILS_BYTES_MAX = 4096
_TEXT_MAX = 512

_CODES: dict[type[MeteringError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Aborted: grpc.StatusCode.ABORTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def status(error: MeteringError) -> status_pb2.Status:
    """Return the status of an error that callers are told about."""
    code = next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
    return _status(code, error)


def internal(request_id: str) -> status_pb2.Status:
    """Return the status of a defect; it says nothing but where to look."""
    message = f"Internal error. The server's log has it under request id {request_id}."
    return _status(
        grpc.StatusCode.INTERNAL, MeteringError(Reason.INTERNAL, message, metadata={"request_id": request_id})
    )


def _status(code: grpc.StatusCode, error: MeteringError) -> status_pb2.Status:
    metadata = {key: _cut(value, 256) for key, value in error.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=metadata)
    found = status_pb2.Status(code=code.value[0], message=_cut(error.message, _TEXT_MAX), details=[_any(info)])
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        found.details.append(_any(error_details_pb2.RetryInfo(retry_delay=delay)))
    if error.violations:
        left = DETAILS_BYTES_MAX - found.ByteSize() - 128
        bad = error_details_pb2.BadRequest()
        for violation in error.violations[:VIOLATIONS_MAX]:
            one = error_details_pb2.BadRequest.FieldViolation(
                field=_cut(violation.field, 256),
                reason=violation.reason.value,
                description=_cut(violation.message, 256),
            )
            left -= one.ByteSize() + 4
            if left < 0:
                break
            bad.field_violations.append(one)
        found.details.append(_any(bad))
    return found


def _any(
    detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo | error_details_pb2.BadRequest,
) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed


def _cut(text: str, most: int) -> str:
    # Bounded in bytes, as it is bytes that the trailers have no room for.
    raw = text.encode()
    return text if len(raw) <= most else raw[: most - 3].decode(errors="ignore") + "…"
