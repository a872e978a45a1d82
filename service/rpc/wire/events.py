"""Events on the wire."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from json.encoder import encode_basestring
from typing import Any

from google.protobuf.struct_pb2 import Struct, Value

from metering.v1 import error_reason_pb2, event_pb2
from service.domain import checks, events, quantities
from service.errors import InvalidArgument, Reason, Violation
from service.ingest import Batch
from service.rpc.wire import in_slices, raise_any, read_instant, timestamp
from service.store.events import UnmatchedKey

# Characters of an issue's field path; properties may be nested deeply.
_FIELD_MAX = 256
# Clients take answers of 4 MiB unless told otherwise; an issue of each of 10,000 events fits.
_ISSUES_BYTES_MAX = 3 * 1024 * 1024

_OUTCOMES = {one: event_pb2.MetricOutcome.Value(f"METRIC_OUTCOME_{one.name}") for one in events.MetricOutcome}
_SOURCES = {one.value: event_pb2.EventSource.Value(f"EVENT_SOURCE_{one.name}") for one in events.EventSource}
VERDICTS = {verdict: event_pb2.Verdict.Value(f"VERDICT_{verdict.name}") for verdict in events.Verdict}


async def batch(sent: Sequence[event_pb2.UsageEvent], *, all_or_nothing: bool = False) -> Batch:
    """Read a batch; a faulty event becomes its violations. Raises InvalidArgument on a bad number of events."""
    if not sent:
        raise InvalidArgument([Violation("events", Reason.FIELD_REQUIRED, f"needs 1..{events.EVENTS_MAX:,} events")])
    if len(sent) > events.EVENTS_MAX:
        message = f"has {len(sent):,} events; at most {events.EVENTS_MAX:,} are allowed: split the batch"
        raise InvalidArgument([Violation("events", Reason.LIMIT_EXCEEDED, message)])
    return Batch(await in_slices(event, sent), all_or_nothing)


def event(message: event_pb2.UsageEvent) -> events.Event | tuple[Violation, ...]:
    """Read one event, or return all its violations with paths relative to it."""
    faults: list[Violation] = []
    transaction_id, customer_id, event_type = message.transaction_id, message.customer_id, message.event_type
    if not (checks.is_plain(transaction_id) and checks.is_plain(customer_id) and checks.is_plain(event_type)):
        for field, text in (
            ("transaction_id", transaction_id),
            ("customer_id", customer_id),
            ("event_type", event_type),
        ):
            if fault := checks.identifier(field, text):
                faults.append(fault)
    if transaction_id.startswith(events.RESERVED_PREFIX):
        message_text = f"must not begin with {events.RESERVED_PREFIX!r}, which is reserved"
        faults.append(Violation("transaction_id", Reason.TRANSACTION_ID_RESERVED, message_text))
    at: datetime | None = None
    if not message.HasField("timestamp"):
        faults.append(Violation("timestamp", Reason.FIELD_REQUIRED, "is required: when the usage happened"))
    else:
        sent_at = message.timestamp
        at = events.instant(sent_at.seconds, sent_at.nanos)
        if at is None:
            limits = "must lie in 0001-01-02T00:00:00Z to 9999-12-30T23:59:59Z, with nanos in 0..999,999,999"
            faults.append(Violation("timestamp", Reason.FIELD_INVALID, limits))
    properties = properties_json(message.properties, faults)
    if faults or at is None:
        return tuple(faults[: events.VIOLATIONS_MAX])
    return events.event(transaction_id, customer_id, event_type, at, properties)


def properties_json(struct: Struct, faults: list[Violation], path: str = "properties") -> str:
    """Return properties as canonical JSON (sorted keys, plain numbers, no blanks), or add what is wrong with them."""
    fields = struct.fields
    if len(fields) > events.PROPERTIES_MAX:
        message = f"has {len(fields)} entries; at most {events.PROPERTIES_MAX} are allowed"
        faults.append(Violation(path, Reason.LIMIT_EXCEEDED, message))
        return "{}"
    if not _good_names.issuperset(fields):
        for name in fields:
            if fault := checks.identifier("key", name):
                faults.append(Violation(path, fault.reason, f"has a key that {fault.message}"))
                return "{}"
        if len(_good_names) > _NAMES_KEPT_MAX:
            _good_names.clear()
        _good_names.update(fields)
    try:
        text = _json_object(fields, path, _Walk(faults, path))
    except _StopWalkError:
        return "{}"
    size = len(text) if text.isascii() else len(text.encode())
    if size > events.PROPERTIES_BYTES_MAX:
        faults.append(_too_large(path))
    return text


class _Names(dict[str, str]):
    """Names of properties as they stand in JSON, with the colon. The same few come again and again."""

    def __missing__(self, name: str) -> str:
        written = f"{encode_basestring(name)}:"
        if len(name) <= checks.IDENTIFIER_MAX:  # longer ones stand inside of objects, and may be megabytes
            if len(self) > _NAMES_KEPT_MAX:
                self.clear()
            self[name] = written
        return written


_NAMES_KEPT_MAX = 4_096
_names = _Names()
# Names that were checked. Apart from those above: of objects inside of objects anything may be a name.
_good_names: set[str] = set()


class _StopWalkError(Exception):
    """Nothing more needs to be known about properties that are refused already."""


class _Walk:
    """The walk through one event's properties: their faults, and how much there was so far."""

    __slots__ = ("depth", "faults", "path", "size")

    def __init__(self, faults: list[Violation], path: str) -> None:
        self.faults = faults
        self.path = path
        self.size = 0
        self.depth = 0

    def descend(self) -> None:
        """Go into an object or list; too many in each other end the walk."""
        self.depth += 1
        if self.depth > events.NESTING_MAX:
            message = f"is nested more than {events.NESTING_MAX} levels deep"
            self.faults.append(Violation(self.path, Reason.LIMIT_EXCEEDED, message))
            raise _StopWalkError

    def fault(self, path: str, reason: Reason, message: str) -> None:
        """Note a fault; enough of them end the walk."""
        self.faults.append(Violation(path, reason, message))
        if len(self.faults) >= events.VIOLATIONS_MAX:
            raise _StopWalkError

    def took(self, size: int) -> None:
        """Count what was written; more than is allowed ends the walk, however much is left."""
        self.size += size
        if self.size > events.PROPERTIES_BYTES_MAX:
            self.faults.append(_too_large(self.path))
            raise _StopWalkError


def _too_large(path: str) -> Violation:
    return Violation(path, Reason.LIMIT_EXCEEDED, f"takes more than {events.PROPERTIES_BYTES_MAX:,} bytes as JSON")


def _json_object(fields: Mapping[str, Value], path: str, walk: _Walk) -> str:
    # Written by hand because no JSON library prints numbers as the plain decimals that are compared and summed. Most
    # properties are short texts and numbers without fault: these are written here, all else is looked at closer.
    members = []
    for name in sorted(fields):
        value = fields[name]
        text = value.string_value
        if text and len(text) <= checks.TEXT_BYTES_MAX and text.isascii() and "\0" not in text:
            written = encode_basestring(text)
        elif not (value.WhichOneof("kind") == "number_value" and (written := quantities.short(value.number_value))):
            walk.took(len(name))
            members.append(_names[name] + _json(value, f"{path}.{name}", walk))
            continue
        walk.took(len(name) + len(written))
        members.append(_names[name] + written)
    return "{" + ",".join(members) + "}"


def _json(value: Value, path: str, walk: _Walk) -> str:
    match value.WhichOneof("kind"):
        case "string_value":
            string = value.string_value
            if fault := checks.text(path, string):
                walk.fault(path, fault.reason, fault.message)
                return '""'
            walk.took(len(string) + 2)
            return encode_basestring(string)
        case "number_value":
            try:
                number = quantities.from_double(value.number_value)
            except quantities.NotExact:
                message = "is not a number that JSON tells exactly (an integer beyond ±(2^53-1), NaN or infinite)"
                walk.fault(path, Reason.NUMBER_NOT_EXACT, f"{message}; send a decimal string")
                return "null"
            walk.took(len(number))
            return number
        case "bool_value":
            walk.took(5)
            return "true" if value.bool_value else "false"
        case "struct_value":
            walk.descend()
            # Charged before the names are looked at: a great many are refused without having been sorted.
            walk.took(2 + 4 * len(value.struct_value.fields))
            for name in value.struct_value.fields:
                if fault := checks.text(path, name):
                    walk.fault(path, fault.reason, f"has a key that {fault.message}")
            text = _json_object(value.struct_value.fields, path, walk)
            walk.depth -= 1
            return text
        case "list_value":
            walk.descend()
            walk.took(2 + len(value.list_value.values))
            items = [_json(one, f"{path}[{i}]", walk) for i, one in enumerate(value.list_value.values)]
            walk.depth -= 1
            return "[" + ",".join(items) + "]"
        case _:
            walk.took(4)
            return "null"


def verdicts(outcomes: Sequence[events.Outcome]) -> dict[str, Any]:
    """Write the outcomes of a batch, as fields of its answer: every verdict, and as many issues as fit beside them."""
    issues: list[event_pb2.EventIssue] = []
    left = _ISSUES_BYTES_MAX
    for i, outcome in enumerate(outcomes):
        for violation in outcome.violations:
            issue = event_pb2.EventIssue(
                index=i,
                reason=error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{violation.reason.value}"),
                field=f"events[{i}].{violation.field}"[:_FIELD_MAX],
                message=violation.message,
            )
            left -= issue.ByteSize() + 4
            if left < 0:
                break
            issues.append(issue)
    return {"verdicts": [VERDICTS[outcome.verdict] for outcome in outcomes], "issues": issues}


def event_query(request: event_pb2.SearchEventsRequest) -> events.EventQuery:
    """Read a search; raises InvalidArgument."""
    faults: list[Violation] = []
    ids = request.transaction_ids
    start = read_instant(request, "starting_on", faults)
    end = read_instant(request, "ending_before", faults)
    if len(ids) > events.IDS_MAX:
        text = f"has {len(ids):,} items; at most {events.IDS_MAX:,} are allowed"
        faults.append(Violation("transaction_ids", Reason.LIMIT_EXCEEDED, text))
    else:
        seen: set[str] = set()
        for i, one in enumerate(ids):
            if fault := checks.identifier(f"transaction_ids[{i}]", one):
                faults.append(fault)
            elif one in seen:
                faults.append(Violation(f"transaction_ids[{i}]", Reason.DUPLICATE_ITEM, f"{one!r} stands twice"))
            seen.add(one)
    for field in ("customer_id", "event_type"):
        if (sent := getattr(request, field)) and (fault := checks.identifier(field, sent)):
            faults.append(fault)
    others = [
        field
        for field, given in (
            ("customer_id", request.customer_id),
            ("event_type", request.event_type),
            ("starting_on", request.HasField("starting_on")),
            ("ending_before", request.HasField("ending_before")),
        )
        if given
    ]
    if ids and others:
        text = f"cannot be searched together with {', '.join(others)}"
        faults.append(Violation("transaction_ids", Reason.FIELD_INVALID, text))
    if start and end and end <= start:
        faults.append(Violation("ending_before", Reason.WINDOW_RANGE, "must be later than starting_on"))
    raise_any(faults)
    customer = checks.customer_key(request.customer_id) if request.customer_id else ""
    return events.EventQuery(tuple(ids), customer, request.event_type, start, end)


def stored_event(value: events.StoredEvent) -> event_pb2.StoredEvent:
    """Write a stored event with its explanations."""
    sent = event_pb2.UsageEvent(
        transaction_id=value.transaction_id,
        customer_id=value.customer_key,
        event_type=value.event_type,
        timestamp=timestamp(value.timestamp),
    )
    sent.properties.update(value.properties)  # type: ignore[arg-type]  # what JSON can hold, a Struct can
    return event_pb2.StoredEvent(
        event=sent,
        matched_customer_id=str(value.customer_id or ""),
        ingest_time=timestamp(value.ingested_at),
        void_time=timestamp(value.voided_at),
        source=_SOURCES[value.source],
        metrics=[
            event_pb2.MetricExplanation(
                billable_metric_id=str(one.metric_id),
                billable_metric_name=one.metric_name,
                outcome=_OUTCOMES[one.outcome],
                rule=one.rule,
                message=one.message,
            )
            for one in value.explanations
        ],
    )


def unmatched_key(key: UnmatchedKey) -> event_pb2.UnmatchedCustomerKey:
    """Write one unmatched key."""
    return event_pb2.UnmatchedCustomerKey(
        customer_key=key.key,
        event_count=key.events,
        first_seen_time=timestamp(key.first),
        last_seen_time=timestamp(key.last),
    )
