"""Translates between wire messages and domain values; with the servicers, the only code that knows both.

Reading collects every fault of a request, never only the first, with field paths as the caller wrote them.
"""

import asyncio
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from json.encoder import encode_basestring
from typing import Any, TypeVar

from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from metering.v1 import billable_metric_pb2, customer_pb2, error_reason_pb2, event_pb2, usage_pb2
from service.domain import checks, customers, events, metrics, quantities, usage
from service.domain.windows import FaultKind, WindowFaults, Windows, WindowSize
from service.errors import InvalidArgument, Reason, Violation
from service.ingest import Batch
from service.store.events import UnmatchedKey

T = TypeVar("T")
R = TypeVar("R")

# How long one call may keep the event loop from the others.
_SLICE_S = 0.01
# Characters of an issue's field path; properties may be nested deeply.
_FIELD_MAX = 256
# Clients take answers of 4 MiB unless told otherwise; an issue of each of 10,000 events fits.
_ISSUES_BYTES_MAX = 3 * 1024 * 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_MICROSECOND = timedelta(microseconds=1)
_FAULT_REASONS = {
    FaultKind.MISALIGNED: Reason.WINDOW_MISALIGNED,
    FaultKind.RANGE: Reason.WINDOW_RANGE,
    FaultKind.OUT_OF_RANGE: Reason.WINDOW_RANGE,
    FaultKind.ZONE: Reason.TIME_ZONE_INVALID,
}


# --- What every kind of message shares


def timestamp(instant: datetime | None) -> Timestamp | None:
    """Return an aware instant as a Timestamp, exact to the microsecond."""
    if instant is None:
        return None
    seconds, micros = divmod((instant - _EPOCH) // _MICROSECOND, 1_000_000)
    return Timestamp(seconds=seconds, nanos=micros * 1000)


def one_id(field: str, value: str) -> uuid.UUID:
    """Read a required UUID; raises InvalidArgument."""
    found = checks.as_uuid(field, value)
    if isinstance(found, Violation):
        raise InvalidArgument([found])
    return found


async def in_slices(translate: Callable[[T], R], values: Iterable[T]) -> list[R]:
    """Translate many values, letting other calls have the event loop now and then."""
    translated: list[R] = []
    clock = asyncio.get_running_loop().time
    began = clock()
    for value in values:
        if clock() - began > _SLICE_S:
            await asyncio.sleep(0)
            began = clock()
        translated.append(translate(value))
    return translated


def _raise_any(faults: Iterable[Violation | None]) -> None:
    found = [fault for fault in faults if fault]
    if found:
        raise InvalidArgument(found)


def _instant(field: str, message: Timestamp, *, required: bool, faults: list[Violation]) -> datetime | None:
    if not required:
        faults.append(Violation(field, Reason.FIELD_REQUIRED, "is required: a timestamp such as 2026-01-31T00:00:00Z"))
        return None
    found = events.instant(message.seconds, message.nanos)
    if found is None:
        faults.append(Violation(field, Reason.WINDOW_RANGE, "must lie in 0001-01-02T00:00:00Z to 9999-12-30T23:59:59Z"))
    return found


def _enum(field: str, number: Any, names: Mapping[Any, T], faults: list[Violation]) -> T | None:
    found = names.get(number)
    if found is None:
        reason = Reason.FIELD_INVALID if number else Reason.FIELD_REQUIRED
        choices = ", ".join(getattr(name, "name", str(name)) for name in names.values())
        faults.append(Violation(field, reason, f"must be one of {choices}"))
    return found


# --- Events

_VERDICTS = {verdict: event_pb2.Verdict.Value(f"VERDICT_{verdict.name}") for verdict in events.Verdict}


async def batch(request: event_pb2.IngestEventsRequest) -> Batch:
    """Read a batch; a faulty event becomes its violations. Raises InvalidArgument on a bad number of events."""
    number = len(request.events)
    if not number:
        raise InvalidArgument([Violation("events", Reason.FIELD_REQUIRED, "needs 1..10,000 events")])
    if number > events.EVENTS_MAX:
        message = f"has {number:,} events; at most {events.EVENTS_MAX:,} are allowed: split the batch"
        raise InvalidArgument([Violation("events", Reason.LIMIT_EXCEEDED, message)])
    return Batch(await in_slices(event, request.events), request.all_or_nothing)


def event(message: event_pb2.UsageEvent) -> events.Event | tuple[Violation, ...]:
    """Read one event, or return all its violations with paths relative to it."""
    faults: list[Violation] = []
    transaction_id, customer_id, event_type = message.transaction_id, message.customer_id, message.event_type
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
        at = events.instant(message.timestamp.seconds, message.timestamp.nanos)
        if at is None:
            limits = "must lie in 0001-01-02T00:00:00Z to 9999-12-30T23:59:59Z, with nanos in 0..999,999,999"
            faults.append(Violation("timestamp", Reason.FIELD_INVALID, limits))
    properties = _properties(message.properties, faults)
    if faults or at is None:
        return tuple(faults[: events.VIOLATIONS_MAX])
    return events.event(transaction_id, customer_id, event_type, at, properties)


def _properties(struct: Struct, faults: list[Violation]) -> str:
    """Return properties as canonical JSON (sorted keys, plain numbers, no blanks), or add what is wrong with them."""
    fields = struct.fields
    if len(fields) > events.PROPERTIES_MAX:
        message = f"has {len(fields)} entries; at most {events.PROPERTIES_MAX} are allowed"
        faults.append(Violation("properties", Reason.LIMIT_EXCEEDED, message))
        return "{}"
    for name in fields:
        if fault := checks.identifier("properties key", name):
            faults.append(Violation("properties", fault.reason, f"has a key that {fault.message}"))
            return "{}"
    try:
        text = _json_object(fields, "properties", _Walk(faults))
    except _StopWalkError:
        return "{}"
    size = len(text) if text.isascii() else len(text.encode())
    if size > events.PROPERTIES_BYTES_MAX:
        faults.append(_TOO_LARGE)
    return text


class _StopWalkError(Exception):
    """Nothing more needs to be known about properties that are refused already."""


class _Walk:
    """The walk through one event's properties: their faults, and how much there was so far."""

    __slots__ = ("faults", "size")

    def __init__(self, faults: list[Violation]) -> None:
        self.faults = faults
        self.size = 0

    def fault(self, path: str, reason: Reason, message: str) -> None:
        """Note a fault; enough of them end the walk."""
        self.faults.append(Violation(path, reason, message))
        if len(self.faults) >= events.VIOLATIONS_MAX:
            raise _StopWalkError

    def took(self, size: int) -> None:
        """Count what was written; more than is allowed ends the walk, however much is left."""
        self.size += size
        if self.size > events.PROPERTIES_BYTES_MAX:
            self.faults.append(_TOO_LARGE)
            raise _StopWalkError


_TOO_LARGE = Violation(
    "properties", Reason.LIMIT_EXCEEDED, f"takes more than {events.PROPERTIES_BYTES_MAX:,} bytes as JSON"
)


def _json_object(fields: Mapping[str, Value], path: str, walk: _Walk) -> str:
    # Written by hand because no JSON library prints numbers as the plain decimals that are compared and summed.
    members = []
    for name in sorted(fields):
        walk.took(len(name))
        members.append(f"{encode_basestring(name)}:{_json(fields[name], f'{path}.{name}', walk)}")
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
            # Charged before the names are looked at: a great many are refused without having been sorted.
            walk.took(2 + 4 * len(value.struct_value.fields))
            for name in value.struct_value.fields:
                if fault := checks.text(path, name):
                    walk.fault(path, fault.reason, f"has a key that {fault.message}")
            return _json_object(value.struct_value.fields, path, walk)
        case "list_value":
            walk.took(2 + len(value.list_value.values))
            items = [_json(one, f"{path}[{i}]", walk) for i, one in enumerate(value.list_value.values)]
            return "[" + ",".join(items) + "]"
        case _:
            walk.took(4)
            return "null"


def ingest_response(outcomes: Sequence[events.Outcome]) -> event_pb2.IngestEventsResponse:
    """Write the outcomes of a batch: every verdict, and as many issues as fit beside them."""
    response = event_pb2.IngestEventsResponse()
    response.verdicts.extend([_VERDICTS[outcome.verdict] for outcome in outcomes])
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
                return response
            response.issues.append(issue)
    return response


def unmatched_key(key: UnmatchedKey) -> event_pb2.UnmatchedCustomerKey:
    """Write one unmatched key."""
    return event_pb2.UnmatchedCustomerKey(
        customer_key=key.key,
        event_count=key.events,
        first_seen_time=timestamp(key.first),
        last_seen_time=timestamp(key.last),
    )


# --- Billable metrics

_AGGREGATIONS = {
    number: metrics.Aggregation(name.removeprefix("AGGREGATION_TYPE_"))
    for name, number in billable_metric_pb2.AggregationType.items()
    if number
}
_AGGREGATION_NUMBERS = {aggregation: number for number, aggregation in _AGGREGATIONS.items()}


def new_metric(message: billable_metric_pb2.BillableMetric) -> metrics.BillableMetric:
    """Read the metric of a create request, making an id if it has none; raises InvalidArgument."""
    faults: list[Violation] = []
    path = "billable_metric"
    metric_id = _new_id(f"{path}.id", message.id, faults)
    aggregation = _enum(f"{path}.aggregation_type", message.aggregation_type, _AGGREGATIONS, faults)
    metric = metrics.BillableMetric(
        id=metric_id,
        name=message.name,
        key=message.key or None,
        aggregation=aggregation or metrics.Aggregation.COUNT,
        aggregation_key=message.aggregation_key or None,
        event_types=tuple(message.event_type_filter.in_values),
        excluded_event_types=tuple(message.event_type_filter.not_in_values),
        property_filters=tuple(
            metrics.PropertyFilter(
                one.name,
                one.exists if one.HasField("exists") else None,
                tuple(one.in_values),
                tuple(one.not_in_values),
            )
            for one in message.property_filters
        ),
        group_keys=tuple(tuple(key.properties) for key in message.group_keys),
        custom_fields=dict(message.custom_fields),
    )
    found = metrics.violations(metric, path)
    if aggregation is None:
        found = [one for one in found if one.field != f"{path}.aggregation_key"]
    _raise_any([*faults, *found])
    return metric


def new_metric_name(request: billable_metric_pb2.UpdateBillableMetricRequest) -> str:
    """Read the new name of an update request; raises InvalidArgument."""
    _check_mask(request.update_mask.paths, ("name",))
    _raise_any([checks.identifier("billable_metric.name", request.billable_metric.name, most=checks.NAME_MAX)])
    return request.billable_metric.name


def metric(value: metrics.BillableMetric) -> billable_metric_pb2.BillableMetric:
    """Write a metric."""
    type_filter = None
    if value.event_types or value.excluded_event_types:
        type_filter = billable_metric_pb2.EventTypeFilter(
            in_values=value.event_types, not_in_values=value.excluded_event_types
        )
    return billable_metric_pb2.BillableMetric(
        id=str(value.id),
        name=value.name,
        key=value.key or "",
        aggregation_type=_AGGREGATION_NUMBERS[value.aggregation],
        aggregation_key=value.aggregation_key or "",
        event_type_filter=type_filter,
        property_filters=[
            billable_metric_pb2.PropertyFilter(
                name=one.name, exists=one.exists, in_values=one.in_values, not_in_values=one.not_in_values
            )
            for one in value.property_filters
        ],
        group_keys=[billable_metric_pb2.GroupKey(properties=key) for key in value.group_keys],
        custom_fields=value.custom_fields,
        create_time=timestamp(value.created_at),
        archive_time=timestamp(value.archived_at),
        backfill_progress=value.backfill_progress,
    )


# --- Customers

_FREQUENCIES = {
    number: customers.BillingFrequency(name.removeprefix("BILLING_FREQUENCY_"))
    for name, number in customer_pb2.BillingFrequency.items()
    if number
}
_FREQUENCY_NUMBERS = {frequency: number for number, frequency in _FREQUENCIES.items()}


def new_customer(message: customer_pb2.Customer) -> customers.Customer:
    """Read the customer of a create request, making an id if it has none; raises InvalidArgument."""
    faults: list[Violation] = []
    path = "customer"
    customer_id = _new_id(f"{path}.id", message.id, faults)
    customer = customers.Customer(
        id=customer_id,
        name=message.name,
        buyer_id=message.buyer_id or str(customer_id),
        ingest_aliases=_aliases(message.ingest_aliases),
        billing_period=_billing_period(f"{path}.billing_period", message.billing_period, faults)
        if message.HasField("billing_period")
        else None,
        custom_fields=dict(message.custom_fields),
    )
    _raise_any([*faults, *customers.violations(customer, path)])
    return customer


def new_aliases(request: customer_pb2.SetIngestAliasesRequest) -> tuple[str, ...]:
    """Read a new set of aliases; raises InvalidArgument."""
    aliases = _aliases(request.ingest_aliases)
    _raise_any(customers.alias_violations("ingest_aliases", aliases))
    return aliases


def new_billing_period(request: customer_pb2.SetBillingPeriodRequest) -> customers.BillingPeriod | None:
    """Read a new billing period, None = remove; raises InvalidArgument."""
    if not request.HasField("billing_period"):
        return None
    faults: list[Violation] = []
    period = _billing_period("billing_period", request.billing_period, faults)
    _raise_any(faults)
    return period


def customer_changes(request: customer_pb2.UpdateCustomerRequest) -> dict[str, object]:
    """Read which columns an update sets to what; raises InvalidArgument."""
    message = request.customer
    known = ("name", "buyer_id", "custom_fields")
    _check_mask(request.update_mask.paths, known)
    paths = set(request.update_mask.paths) or {name for name in known if getattr(message, name)}
    faults: list[Violation | None] = []
    values: dict[str, object] = {}
    if not paths:
        message_text = f"names nothing to change; set or mask some of {', '.join(known)}"
        faults.append(Violation("update_mask", Reason.FIELD_REQUIRED, message_text))
    if "name" in paths:
        faults.append(checks.identifier("customer.name", message.name, most=checks.NAME_MAX))
        values["name"] = message.name
    if "buyer_id" in paths:
        faults.append(checks.identifier("customer.buyer_id", message.buyer_id, most=customers.BUYER_ID_MAX))
        values["buyer_id"] = message.buyer_id
    if "custom_fields" in paths:
        faults += checks.custom_fields("customer.custom_fields", message.custom_fields)
        values["custom_fields"] = dict(message.custom_fields)
    _raise_any(faults)
    return values


def customer_key_filter(key: str) -> str | None:
    """Read the optional key by which customers are looked up; raises InvalidArgument."""
    if not key:
        return None
    _raise_any([checks.identifier("customer_key", key)])
    return checks.customer_key(key)


def customer(value: customers.Customer) -> customer_pb2.Customer:
    """Write a customer."""
    period = value.billing_period
    return customer_pb2.Customer(
        id=str(value.id),
        name=value.name,
        buyer_id=value.buyer_id,
        ingest_aliases=value.ingest_aliases,
        billing_period=period
        and customer_pb2.BillingPeriod(
            frequency=_FREQUENCY_NUMBERS[period.frequency],  # type: ignore[arg-type]  # the enum's own number
            anchor_date=period.anchor_date.isoformat(),
            starting_on=period.starting_on.isoformat(),
            ending_before=period.ending_before.isoformat() if period.ending_before else None,
        ),
        custom_fields=value.custom_fields,
        create_time=timestamp(value.created_at),
        update_time=timestamp(value.updated_at),
        archive_time=timestamp(value.archived_at),
    )


def _aliases(sent: Iterable[str]) -> tuple[str, ...]:
    return tuple(checks.customer_key(alias) for alias in sent)


def _billing_period(
    path: str, message: customer_pb2.BillingPeriod, faults: list[Violation]
) -> customers.BillingPeriod | None:
    frequency = _enum(f"{path}.frequency", message.frequency, _FREQUENCIES, faults)
    anchor = _date(f"{path}.anchor_date", message.anchor_date, faults)
    start = _date(f"{path}.starting_on", message.starting_on, faults)
    end = None
    if message.HasField("ending_before"):
        end = _date(f"{path}.ending_before", message.ending_before, faults)
        if start and end and end <= start:
            faults.append(Violation(f"{path}.ending_before", Reason.FIELD_INVALID, "must be after starting_on"))
    if frequency is None or anchor is None or start is None:
        return None
    return customers.BillingPeriod(frequency, anchor, start, end)


def _date(path: str, text: str, faults: list[Violation]) -> date | None:
    if not text:
        faults.append(Violation(path, Reason.FIELD_REQUIRED, "is required: a date such as 2026-01-31"))
        return None
    try:
        # fromisoformat alone would also take week dates such as 2026-W01-1.
        found = date.fromisoformat(text) if _DATE.fullmatch(text) else None
    except ValueError:
        found = None
    if found is None or not customers.YEAR_MIN <= found.year <= customers.YEAR_MAX:
        limits = f"must be a date as YYYY-MM-DD, years {customers.YEAR_MIN}..{customers.YEAR_MAX}"
        faults.append(Violation(path, Reason.FIELD_INVALID, limits))
        return None
    return found


# --- Usage

_WINDOW_SIZES = {
    number: WindowSize(name.removeprefix("WINDOW_SIZE_")) for name, number in usage_pb2.WindowSize.items() if number
}


def usage_query(request: usage_pb2.ListUsageRequest) -> usage.UsageQuery:
    """Read a usage query; raises InvalidArgument."""
    faults: list[Violation] = []
    size = _enum("window_size", request.window_size, _WINDOW_SIZES, faults)
    start = _instant("starting_on", request.starting_on, required=request.HasField("starting_on"), faults=faults)
    end = _instant("ending_before", request.ending_before, required=request.HasField("ending_before"), faults=faults)
    windows: Windows | None = None
    if size and start and end:
        try:
            windows = Windows.of(size, start, end, request.time_zone or None)
        except WindowFaults as found:
            faults += [Violation(one.field, _FAULT_REASONS[one.kind], one.message) for one in found.faults]
    customer_ids = _ids("customer_ids", [("", one) for one in request.customer_ids], faults)
    metric_ids = _ids("billable_metrics", [(".id", one.id) for one in request.billable_metrics], faults)
    selectors = []
    for i, (metric_id, one) in enumerate(zip(metric_ids, request.billable_metrics, strict=False)):
        group_by = None
        if one.HasField("group_by"):
            group_by = _group_by(f"billable_metrics[{i}].group_by", one.group_by, faults)
        selectors.append(usage.MetricSelector(metric_id, group_by))
    _raise_any(faults)
    if windows is None:  # a fault was raised then; this tells the type checker
        raise AssertionError
    return usage.UsageQuery(windows, tuple(customer_ids) or None, tuple(selectors) or None, request.omit_empty_windows)


def usage_window(value: usage.UsageWindow, read_time: datetime) -> usage_pb2.UsageWindow:
    """Write a window as it stood at `read_time`."""
    message = usage_pb2.UsageWindow(
        customer_id=str(value.customer_id),
        billable_metric_id=str(value.metric.id),
        billable_metric_name=value.metric.name,
        starting_on=timestamp(value.start),
        ending_before=timestamp(value.end),
        value=value.value,
        groups_truncated=value.groups_truncated,
        incomplete=value.end > read_time,
        skipped_count=value.skipped,
        update_time=timestamp(value.updated_at),
    )
    for name, group in (value.groups or {}).items():
        message.groups[name].CopyFrom(usage_pb2.GroupValue(value=group))
    return message


def _group_by(path: str, message: usage_pb2.GroupBy, faults: list[Violation]) -> usage.GroupBy:
    found: list[Violation | None] = [checks.identifier(f"{path}.key", message.key)]
    if len(message.values) > usage.GROUP_VALUES_MAX:
        text = f"has {len(message.values)} values; at most {usage.GROUP_VALUES_MAX} are allowed"
        found.append(Violation(f"{path}.values", Reason.LIMIT_EXCEEDED, text))
    else:
        seen: set[str] = set()
        for i, value in enumerate(message.values):
            found.append(checks.text(f"{path}.values[{i}]", value))
            if value in seen:
                found.append(Violation(f"{path}.values[{i}]", Reason.DUPLICATE_ITEM, f"{value!r} stands twice"))
            seen.add(value)
    faults += [fault for fault in found if fault]
    return usage.GroupBy(message.key, tuple(message.values))


def _ids(path: str, sent: Sequence[tuple[str, str]], faults: list[Violation]) -> list[uuid.UUID]:
    """Read UUIDs that stand at path[i] + suffix; without any, or with a fault, an empty list."""
    if len(sent) > usage.IDS_MAX:
        text = f"has {len(sent):,} items; at most {usage.IDS_MAX:,} are allowed"
        faults.append(Violation(path, Reason.LIMIT_EXCEEDED, text))
        return []
    found: dict[uuid.UUID, None] = {}
    for i, (suffix, text) in enumerate(sent):
        one = checks.as_uuid(f"{path}[{i}]{suffix}", text)
        if isinstance(one, Violation):
            faults.append(one)
        elif one in found:
            faults.append(Violation(f"{path}[{i}]{suffix}", Reason.DUPLICATE_ITEM, f"{one} stands twice"))
        else:
            found[one] = None
    return list(found) if len(found) == len(sent) else []


def _new_id(path: str, sent: str, faults: list[Violation]) -> uuid.UUID:
    if not sent:
        return uuid.uuid4()
    found = checks.as_uuid(path, sent)
    if isinstance(found, Violation):
        faults.append(found)
        return uuid.uuid4()
    return found


def _check_mask(paths: Iterable[str], known: Sequence[str]) -> None:
    unknown = [path for path in paths if path not in known]
    if unknown:
        text = f"names {', '.join(unknown)}, which cannot change; allowed are {', '.join(known)}"
        raise InvalidArgument([Violation("update_mask", Reason.FIELD_INVALID, text)])
