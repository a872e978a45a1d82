"""Usage queries and windows on the wire."""

import functools
import math
from collections.abc import Sequence
from datetime import datetime

from metering.v1 import usage_pb2
from service.domain import checks, metrics, usage
from service.domain.windows import FaultKind, WindowFault, WindowFaults, Windows, WindowSize, zone_fault
from service.errors import Reason, Violation
from service.rpc.wire import enum_value, ids, raise_any, read_instant, timestamp

_FAULT_REASONS = {
    FaultKind.MISALIGNED: Reason.WINDOW_MISALIGNED,
    FaultKind.RANGE: Reason.WINDOW_RANGE,
    FaultKind.OUT_OF_RANGE: Reason.WINDOW_RANGE,
    FaultKind.ZONE: Reason.TIME_ZONE_INVALID,
}

# Characters of a name that was sent, in a field path.
_NAME_SHOWN = 128

_WINDOW_SIZES = {
    number: WindowSize(name.removeprefix("WINDOW_SIZE_")) for name, number in usage_pb2.WindowSize.items() if number
}


def usage_query(request: usage_pb2.ListUsageRequest | usage_pb2.StreamUsageRequest) -> usage.UsageQuery:
    """Read a usage query; raises InvalidArgument."""
    faults: list[Violation] = []
    size = enum_value("window_size", request.window_size, _WINDOW_SIZES, faults)
    windows = _windows(request, size, faults)
    customer_ids = ids("customer_ids", [("", one) for one in request.customer_ids], faults)
    metric_ids = ids("billable_metrics", [(".id", one.id) for one in request.billable_metrics], faults)
    selectors = []
    for i, (metric_id, one) in enumerate(zip(metric_ids, request.billable_metrics, strict=False)):
        group_by = None
        if one.HasField("group_by"):
            group_by = _group_by(f"billable_metrics[{i}].group_by", one.group_by, faults)
        selectors.append(usage.MetricSelector(metric_id, group_by))
    updated_since = read_instant(request, "updated_since", faults)
    raise_any(faults)
    if windows is None:  # a fault was raised then; this tells the type checker
        raise AssertionError
    return usage.UsageQuery(
        windows, tuple(customer_ids) or None, tuple(selectors) or None, request.omit_empty_windows, updated_since
    )


def grouped_query(
    request: usage_pb2.ListUsageWithGroupsRequest | usage_pb2.StreamUsageWithGroupsRequest,
) -> usage.GroupedQuery:
    """Read a grouped usage query; raises InvalidArgument."""
    faults: list[Violation] = []
    both = [checks.as_uuid(field, getattr(request, field)) for field in ("customer_id", "billable_metric_id")]
    faults += [one for one in both if isinstance(one, Violation)]
    size = enum_value("window_size", request.window_size, _WINDOW_SIZES, faults)
    windows = None
    given = [field for field in ("starting_on", "ending_before") if request.HasField(field)]
    if request.current_period:
        for field in given:
            faults.append(Violation(field, Reason.FIELD_INVALID, "must be unset with current_period"))
        if size and (zone := zone_fault(size, request.time_zone or None)):
            faults.append(_violation(zone))
    elif not given:
        text = "is required with ending_before, unless current_period is set"
        faults.append(Violation("starting_on", Reason.FIELD_REQUIRED, text))
    else:
        windows = _windows(request, size, faults)
    group_key = _group_key(request.group_key, faults)
    filters = _filters(request, group_key, faults)
    updated_since = read_instant(request, "updated_since", faults)
    raise_any(faults)
    customer_id, metric_id = both
    if isinstance(customer_id, Violation) or isinstance(metric_id, Violation) or size is None:
        raise AssertionError  # a fault was raised then; this tells the type checker
    return usage.GroupedQuery(
        customer_id=customer_id,
        metric_id=metric_id,
        size=size,
        time_zone=request.time_zone or None,
        windows=windows,
        group_key=group_key,
        filters=filters,
        omit_empty=request.omit_empty_windows,
        updated_since=updated_since,
    )


def grouped_window(value: usage.GroupedWindow, group_key: Sequence[str], read_time: datetime) -> bytes:
    """Write a row of a grouped listing as it stood at `read_time`, as the item of field 1 of an answer."""
    row = usage_pb2.GroupedUsageWindow(
        starting_on=timestamp(value.start),
        ending_before=timestamp(value.end),
        group={name: one for name, one in zip(group_key, value.group, strict=True) if one is not None},
        value=value.value,
        incomplete=value.end > read_time,
        skipped_count=value.skipped,
        update_time=timestamp(value.updated_at),
    )
    return _item(row.SerializeToString())


class WindowWriter:
    """Writes many windows of one query as they stood at `read_time`, each as the item of field 1 of an answer.

    What windows share is encoded once: who and what they are of, and their bounds.
    """

    def __init__(self, read_time: datetime) -> None:
        self._read_time = read_time
        self._spans: object = None
        self._bounds: list[bytes] = []

    def write(self, run: usage.UsageRun) -> list[bytes]:
        """Return each window of the run in bytes."""
        if run.bounds is not self._spans:
            self._spans, self._bounds = run.bounds, []
        for start, end in run.bounds[len(self._bounds) : run.positions[-1] + 1]:
            self._bounds.append(_bounds(start, end) + (_INCOMPLETE if end > self._read_time else b""))
        head = usage_pb2.UsageWindow(
            customer_id=str(run.customer_id),
            billable_metric_id=str(run.metric.id),
            billable_metric_name=run.metric.name,
        ).SerializeToString()
        bounds = self._bounds
        if len(run.filled) == len(run):
            return [_item(head + bounds[position] + _known(run.filled[position])) for position in run.positions]
        # All from one on to another, most of them empty.
        first = run.positions[0]
        bounds = bounds[first : first + len(run)]
        empty = {size: b"\n" + _varint(len(head) + size) + head for size in set(map(len, bounds))}
        found = [empty[len(one)] + one for one in bounds]
        for position, window in run.filled.items():
            found[position - first] = _item(head + bounds[position - first] + _known(window))
        return found


def _known(window: usage.UsageWindow) -> bytes:
    text, groups, truncated, skipped, updated_at = window
    if text is not None and len(text) < 128 and not (groups or truncated or skipped):  # of one byte's length
        return _VALUE + bytes((len(text),)) + text.encode() + _update_time(updated_at)
    known = usage_pb2.UsageWindow(value=text, groups_truncated=truncated, skipped_count=skipped)
    for name, group in (groups or {}).items():
        known.groups[name].CopyFrom(usage_pb2.GroupValue(value=group))
    return known.SerializeToString() + _update_time(updated_at)


@functools.lru_cache(maxsize=1_000)
def _update_time(updated_at: datetime | None) -> bytes:
    return usage_pb2.UsageWindow(update_time=timestamp(updated_at)).SerializeToString()


def _item(body: bytes) -> bytes:
    size = len(body)
    return (_ITEMS[size] if size < _ITEMS_MAX else b"\n" + _varint(size)) + body


_INCOMPLETE = usage_pb2.UsageWindow(incomplete=True).SerializeToString()
# The tag of the field; what follows is the length, and the text.
_VALUE = usage_pb2.UsageWindow(value="").SerializeToString()[:-1]


@functools.lru_cache(maxsize=20_000)
def _bounds(start: datetime, end: datetime) -> bytes:
    return usage_pb2.UsageWindow(starting_on=timestamp(start), ending_before=timestamp(end)).SerializeToString()


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


# How an item of a size begins: nearly all windows are smaller than this.
_ITEMS_MAX = 1_024
_ITEMS = [b"\n" + _varint(size) for size in range(_ITEMS_MAX)]


def _windows(
    request: usage_pb2.ListUsageRequest
    | usage_pb2.StreamUsageRequest
    | usage_pb2.ListUsageWithGroupsRequest
    | usage_pb2.StreamUsageWithGroupsRequest,
    size: WindowSize | None,
    faults: list[Violation],
) -> Windows | None:
    start = read_instant(request, "starting_on", faults, required=True)
    end = read_instant(request, "ending_before", faults, required=True)
    if not (size and start and end):
        return None
    try:
        return Windows.of(size, start, end, request.time_zone or None)
    except WindowFaults as found:
        faults += map(_violation, found.faults)
        return None


def _violation(fault: WindowFault) -> Violation:
    return Violation(fault.field, _FAULT_REASONS[fault.kind], fault.message)


def _group_key(sent: Sequence[str], faults: list[Violation]) -> tuple[str, ...]:
    if len(sent) > metrics.GROUP_KEY_PROPERTIES_MAX:
        text = f"has {len(sent)} items; at most {metrics.GROUP_KEY_PROPERTIES_MAX} are allowed"
        faults.append(Violation("group_key", Reason.LIMIT_EXCEEDED, text))
        return ()
    for i, name in enumerate(sent):
        if fault := checks.identifier(f"group_key[{i}]", name):
            faults.append(fault)
        elif name in sent[:i]:
            faults.append(Violation(f"group_key[{i}]", Reason.DUPLICATE_ITEM, f"{name!r} stands twice"))
    return tuple(sent)


def _filters(
    request: usage_pb2.ListUsageWithGroupsRequest | usage_pb2.StreamUsageWithGroupsRequest,
    group_key: tuple[str, ...],
    faults: list[Violation],
) -> dict[str, tuple[str, ...]]:
    sent = request.group_filters
    number = sum(len(one.values) for one in sent.values())
    if len(sent) > metrics.GROUP_KEY_PROPERTIES_MAX or number > usage.FILTER_VALUES_MAX:
        limits = f"{metrics.GROUP_KEY_PROPERTIES_MAX} properties and {usage.FILTER_VALUES_MAX} values"
        text = f"has {len(sent)} properties and {number} values; at most {limits} are allowed in all"
        faults.append(Violation("group_filters", Reason.LIMIT_EXCEEDED, text))
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for name, one in sorted(sent.items()):
        path = f"group_filters[{name[:_NAME_SHOWN]!r}]"
        if name not in group_key:
            text = "names a property that is not in group_key"
            faults.append(Violation(path, Reason.FIELD_INVALID, text))
        faults += _values(f"{path}.values", one.values)
        if one.values:
            found[name] = tuple(sorted(one.values))
    combinations = math.prod(map(len, found.values()))
    if combinations > usage.COMBINATIONS_MAX:
        text = f"names {combinations:,} combinations of values; at most {usage.COMBINATIONS_MAX:,} are allowed"
        faults.append(Violation("group_filters", Reason.LIMIT_EXCEEDED, text))
    return found


def _values(path: str, values: Sequence[str]) -> list[Violation]:
    found: list[Violation | None] = []
    seen: set[str] = set()
    for i, value in enumerate(values):
        found.append(checks.text(f"{path}[{i}]", value))
        if value in seen:
            found.append(Violation(f"{path}[{i}]", Reason.DUPLICATE_ITEM, f"{value!r} stands twice"))
        seen.add(value)
    return [fault for fault in found if fault]


def _group_by(path: str, message: usage_pb2.GroupBy, faults: list[Violation]) -> usage.GroupBy:
    if fault := checks.identifier(f"{path}.key", message.key):
        faults.append(fault)
    if len(message.values) > usage.GROUP_VALUES_MAX:
        text = f"has {len(message.values)} values; at most {usage.GROUP_VALUES_MAX} are allowed"
        faults.append(Violation(f"{path}.values", Reason.LIMIT_EXCEEDED, text))
    else:
        faults += _values(f"{path}.values", message.values)
    return usage.GroupBy(message.key, tuple(message.values))
