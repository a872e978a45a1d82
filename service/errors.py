"""Owns the errors that callers are told about: what can go wrong, in the domain's words, without status codes.

MeteringError
├── InvalidArgument      the request has faults; each is a Violation
├── NotFound             something named does not exist
├── AlreadyExists        an id, key or transaction id is taken by other content
├── FailedPrecondition   right request, wrong state; may pass later
├── Unauthenticated      no or no valid credential
├── PermissionDenied     the credential is valid, but not for this
├── ResourceExhausted    too much in flight; nothing was done
├── Unavailable          the database does not answer, or the server shuts down; of writes the outcome is unknown
├── Aborted              a stream was ended by the server; it can be gone on with
└── DeadlineExceeded     the time for the work ran out; nothing was done

Only the interceptor that answers calls knows how these become gRPC statuses.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Reason(enum.StrEnum):
    """Stable reasons; the same names as the values of the proto enum ErrorReason, where each is documented."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[str]) -> str:
        return name

    FIELD_REQUIRED = enum.auto()
    FIELD_INVALID = enum.auto()
    LIMIT_EXCEEDED = enum.auto()
    MALFORMED_REQUEST = enum.auto()
    NUMBER_NOT_EXACT = enum.auto()
    TIMESTAMP_TOO_FAR_AHEAD = enum.auto()
    TIMESTAMP_TOO_OLD = enum.auto()
    TRANSACTION_ID_RESERVED = enum.auto()
    IDEMPOTENCY_CONFLICT = enum.auto()
    WINDOW_MISALIGNED = enum.auto()
    WINDOW_RANGE = enum.auto()
    WINDOW_COUNT = enum.auto()
    TIME_ZONE_INVALID = enum.auto()
    GROUP_KEY_NOT_DECLARED = enum.auto()
    DUPLICATE_ITEM = enum.auto()
    PAGE_TOKEN_INVALID = enum.auto()
    CUSTOMER_NOT_FOUND = enum.auto()
    BILLABLE_METRIC_NOT_FOUND = enum.auto()
    ID_IN_USE = enum.auto()
    CUSTOMER_KEY_IN_USE = enum.auto()
    BUYER_ID_IN_USE = enum.auto()
    METRIC_KEY_IN_USE = enum.auto()
    METRIC_BACKFILLING = enum.auto()
    NO_BILLING_PERIOD = enum.auto()
    CREDENTIAL_MISSING = enum.auto()
    CREDENTIAL_INVALID = enum.auto()
    ORGANIZATION_MISMATCH = enum.auto()
    ROLE_REQUIRED = enum.auto()
    OVERLOADED = enum.auto()
    ORGANIZATION_LIMIT = enum.auto()
    INGEST_RATE = enum.auto()
    DATABASE_UNAVAILABLE = enum.auto()
    DEADLINE_TOO_SHORT = enum.auto()
    SERVER_DRAINING = enum.auto()
    STREAM_STALLED = enum.auto()
    INTERNAL = enum.auto()
    ENTITLEMENT_NOT_FOUND = enum.auto()
    PRODUCT_NOT_FOUND = enum.auto()
    BUYER_NOT_FOUND = enum.auto()
    USAGE_RECORD_GROUP_NOT_FOUND = enum.auto()
    USAGE_RECORD_REPORT_NOT_FOUND = enum.auto()
    STATUS_TRANSITION = enum.auto()
    LEASE_LOST = enum.auto()
    REPORT_COMPLETED = enum.auto()
    RECORD_METRIC = enum.auto()
    ENTITLEMENT_NOT_ACTIVE = enum.auto()
    TIMESTAMP_OUTSIDE_TERM = enum.auto()
    RECORDS_EXCLUSIVE = enum.auto()
    DIMENSION_UNKNOWN = enum.auto()
    DIMENSION_AMBIGUOUS = enum.auto()
    BILLABLE_METRIC_KEY_INVALID = enum.auto()
    PROPERTIES_MISMATCH = enum.auto()
    QUANTITY_INVALID = enum.auto()
    QUANTITIES_ZERO = enum.auto()
    ALLOCATION_INVALID = enum.auto()
    SKIP_VALIDATION_FORBIDDEN = enum.auto()
    META_INFO_MISMATCH = enum.auto()


@dataclass(frozen=True, slots=True)
class Violation:
    """One fault of one field: its path as in the request, the stable reason, and a sentence for people."""

    field: str
    reason: Reason
    message: str


class MeteringError(Exception):
    """An answer that is not OK. `message` is for people, `reason` and `metadata` for programs."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s


class InvalidArgument(MeteringError):
    """The request has faults; built from all of them, never only the first."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        first = violations[0]
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        super().__init__(
            first.reason,
            f"{first.field}: {first.message}{more}",
            metadata={"field": first.field, "violations": str(len(violations))},
            violations=violations,
        )


class NotFound(MeteringError):
    """Something the request names does not exist in the caller's organization."""


class AlreadyExists(MeteringError):
    """An id or key belongs to something else; nothing changed."""


class FailedPrecondition(MeteringError):
    """The request is right but the state is not."""


class Unauthenticated(MeteringError):
    """No credential, or one that is not valid."""


class PermissionDenied(MeteringError):
    """The caller is known, and may not do this."""


class ResourceExhausted(MeteringError):
    """The server has too much in flight; nothing was done."""


class Unavailable(MeteringError):
    """The database does not answer, or the server is shutting down."""


class Aborted(MeteringError):
    """The server ended a stream that can be gone on with."""


class DeadlineExceeded(MeteringError):
    """The work could not be done within the caller's deadline or the server's limit; nothing was done."""


def invalid(field: str, reason: Reason, message: str) -> InvalidArgument:
    """Build the error of a request with one fault."""
    return InvalidArgument([Violation(field, reason, message)])
