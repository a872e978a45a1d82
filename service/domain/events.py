"""Owns what an event is once checked, its content digest, and the verdicts an event can get."""

import enum
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import NamedTuple

from service.domain import checks
from service.domain.windows import EARLIEST, LATEST
from service.errors import Reason, Violation
from service.limits import limit

EVENTS_MAX = limit(
    "EVENTS_PER_CALL",
    10_000,
    most=10_000,
    about="events of one IngestEvents call or one batch of StreamEvents, and records of all groups of one call",
    field="events",
)
# What calls that wait together may have in one transaction.
MERGED_EVENTS_MAX = 10_000
IDS_MAX = limit(
    "TRANSACTION_IDS_PER_SEARCH",
    1_000,
    most=1_000,
    about="transaction ids of one SearchEvents call",
    field="transaction_ids",
)
# All properties of a group are looked at in one go, which keeps other calls waiting.
PROPERTIES_MAX = limit(
    "PROPERTIES",
    64,
    most=128,
    about="properties of an event or a billable record",
    field="events[0].properties",
    error="REJECTED, LIMIT_EXCEEDED",
)
# Whoever raises this must look at the size of page tokens, which can hold the values of a group.
PROPERTIES_BYTES_MAX = limit(
    "PROPERTIES_BYTES",
    16 * 1024,
    most=16 * 1024,
    about="bytes of the properties of an event or a billable record, as JSON",
    field="events[0].properties",
    error="REJECTED, LIMIT_EXCEEDED",
)
# Objects and lists in each other. What can be sent must be shown again inside of more messages, and protobuf's readers
# take no more than a hundred, of which an object takes three.
NESTING_MAX = limit(
    "NESTING_LEVELS",
    25,
    most=25,
    about="objects and lists in each other in a property",
    field="events[0].properties",
    error="REJECTED, LIMIT_EXCEEDED",
)
# An event is told this many of its faults.
VIOLATIONS_MAX = 5
# Ids that the service itself gives to events it makes out of usage record groups.
RESERVED_PREFIX = "urg:"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EARLIEST_S = (EARLIEST - _EPOCH) // timedelta(seconds=1)
_LATEST_S = (LATEST - _EPOCH) // timedelta(seconds=1)


class EventSource(enum.IntEnum):
    """Where an event comes from: it was sent as one, or made from a record of a usage record group."""

    EVENT = 0
    GROUP = 1


class Verdict(enum.IntEnum):
    """What became of an event; see the proto enum of the same name."""

    ACCEPTED = 1
    DUPLICATE = 2
    CONFLICT = 3
    REJECTED = 4


class Event(NamedTuple):
    """A well-formed event, ready to store.

    `customer_key` is as sent (UUIDs in lower case), `timestamp` is aware UTC, `properties` is canonical JSON text
    (sorted keys, plain numbers), `digest` tells this content from any other under the same transaction id.
    """

    transaction_id: str
    customer_key: str
    event_type: str
    timestamp: datetime
    properties: str
    digest: bytes
    source: EventSource = EventSource.EVENT


class Outcome(NamedTuple):
    """The verdict of one event; for CONFLICT and REJECTED with the violations that explain it."""

    verdict: Verdict
    violations: tuple[Violation, ...] = ()


class EventQuery(NamedTuple):
    """What SearchEvents asks: transaction ids, or any of the other criteria. Empty or None = any.

    `customer` is a customer's id (then events under all its keys are meant), or a key as sent.
    """

    transaction_ids: tuple[str, ...] = ()
    customer: str = ""
    event_type: str = ""
    start: datetime | None = None
    end: datetime | None = None


class MetricOutcome(enum.Enum):
    """How a metric takes an event; see the proto enum of the same name."""

    COUNTED = 1
    SKIPPED = 2
    NOT_MATCHED = 3
    PENDING = 4


class Explanation(NamedTuple):
    """What one metric made of one event; `rule` is the field of the metric that decided, `message` why."""

    metric_id: uuid.UUID
    metric_name: str
    outcome: MetricOutcome
    rule: str = ""
    message: str = ""


class StoredEvent(NamedTuple):
    """An event as stored, the id of the customer that owns its key now, and what each metric made of it."""

    transaction_id: str
    customer_key: str
    event_type: str
    timestamp: datetime
    properties: Mapping[str, object]
    ingested_at: datetime
    voided_at: datetime | None
    customer_id: uuid.UUID | None
    source: EventSource
    explanations: Sequence[Explanation] = ()


class TimeLimits(NamedTuple):
    """How far from the server's clock a new event's timestamp may lie. `oldest` None = no limit."""

    ahead: timedelta = timedelta(hours=24)
    oldest: timedelta | None = None


def event(
    transaction_id: str,
    customer_id: str,
    event_type: str,
    timestamp: datetime,
    properties: str,
    source: EventSource = EventSource.EVENT,
) -> Event:
    """Build an event from checked fields; `properties` is canonical JSON, `timestamp` of UTC."""
    key = checks.customer_key(customer_id)
    # Lengths keep fields apart: ("ab","c") and ("a","bc") must not meet. The id is not part of its own content.
    # (A time of UTC without its zone is written twice as fast.)
    at = timestamp.replace(tzinfo=None).isoformat()
    head = f"{len(key)}:{key}{len(event_type)}:{event_type}{at}"
    digest = blake2b((head + properties).encode(), digest_size=16).digest()
    return Event(transaction_id, key, event_type, timestamp, properties, digest, source)


def instant(seconds: int, nanos: int) -> datetime | None:
    """Return seconds and nanoseconds since 1970 as an instant cut to microseconds, or None when out of range.

    The range is that of window bounds, so that every event lies in some window.
    """
    if not _EARLIEST_S <= seconds <= _LATEST_S or not 0 <= nanos < 1_000_000_000:
        return None
    return _EPOCH + timedelta(0, seconds, nanos // 1000)


def time_violation(field: str, timestamp: datetime, now: datetime, limits: TimeLimits) -> Violation | None:
    """Check a new event's timestamp against the clock.

    Apart from the other checks because time changes its answer: an event that is already stored never gets here.
    """
    if timestamp - now > limits.ahead:
        message = f"is more than {_hours(limits.ahead)} ahead of the server's clock ({now:%Y-%m-%dT%H:%M:%SZ})"
        return Violation(field, Reason.TIMESTAMP_TOO_FAR_AHEAD, message)
    if limits.oldest is not None and now - timestamp > limits.oldest:
        message = f"is more than {_hours(limits.oldest)} before the server's clock ({now:%Y-%m-%dT%H:%M:%SZ})"
        return Violation(field, Reason.TIMESTAMP_TOO_OLD, message)
    return None


def _hours(limit: timedelta) -> str:
    return f"{limit.total_seconds() / 3600:g} hours"
