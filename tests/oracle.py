"""What usage must be, worked out the slow and plain way from raw events.

Nothing here knows the service's code, its SQL or its cells: values are integers of 10^-18, local days are found by
looking at the clock of the zone, and every window is made of the events that lie in it.
"""

import functools
import io
import itertools
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from importlib import resources
from itertools import pairwise
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

PLACES = 18
DIGITS = 38
GROUPS_MAX = 200
HOUR = timedelta(hours=1)
MICROSECOND = timedelta(microseconds=1)

Json = Any
Span = tuple[datetime, datetime]


class Event(NamedTuple):
    """A raw event; `properties` as Python values of JSON, every number a JSON double."""

    transaction_id: str
    customer_key: str
    event_type: str
    timestamp: datetime
    properties: Mapping[str, Json]


class Filter(NamedTuple):
    """A condition on one property."""

    name: str
    exists: bool | None = None
    in_values: tuple[str, ...] = ()
    not_in_values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A billable metric as its creator wrote it, and when it was archived."""

    id: str
    aggregation: str
    aggregation_key: str = ""
    event_types: tuple[str, ...] = ()
    excluded_event_types: tuple[str, ...] = ()
    filters: tuple[Filter, ...] = ()
    group_keys: tuple[tuple[str, ...], ...] = ()
    archived_at: datetime | None = None


class GroupBy(NamedTuple):
    """Split by a property; no values = the first 200."""

    key: str
    values: tuple[str, ...] = ()


class Window(NamedTuple):
    """One row of the answer.

    `used` says whether any event matched, which is when update_time is set; None if either may be: there was one, but
    it was taken away, it came under a key that the customer had given up, or it is in an hour that a bound cuts.
    """

    customer_id: str
    metric_id: str
    start: datetime
    end: datetime
    value: str | None
    skipped: int
    groups: dict[str, str | None]
    truncated: bool
    incomplete: bool
    used: bool | None


class GroupedRow(NamedTuple):
    """One row of a grouped answer; `group` as the answer gives it, without the properties that are missing."""

    start: datetime
    end: datetime
    group: dict[str, str]
    value: str | None
    skipped: int
    incomplete: bool
    used: bool | None


class GroupedSelection(NamedTuple):
    """What a grouped query asks for: one customer by all its keys, one metric, and which values of which properties."""

    keys: frozenset[str]
    metric: Metric
    windows: Sequence[Span]
    group_key: tuple[str, ...] = ()
    filters: Mapping[str, Sequence[str]] = {}
    omit_empty: bool = False
    former: frozenset[str] = frozenset()


class Selection(NamedTuple):
    """What a usage query asks for. `named_...` False = the request left that filter out."""

    customers: Mapping[str, frozenset[str]]  # customer id -> every key that names it, its own id included
    metrics: Sequence[tuple[Metric, GroupBy | None]]
    windows: Sequence[Span]
    named_customers: bool = True
    named_metrics: bool = True
    omit_empty: bool = False
    former: Mapping[str, frozenset[str]] = {}  # customer id -> keys that named it once


# --- Values


def plain(number: float) -> str:
    """Print a double as the shortest plain decimal that reads back as it."""
    text = format(Decimal(repr(float(number))), "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def canonical(value: Json) -> str | None:
    """Return the string by which a property's value is compared; None if it counts as absent."""
    if value is None:
        return None
    return value if isinstance(value, str) else json_text(value)


def json_text(value: Json) -> str:
    """Print JSON as Postgres prints jsonb: blanks after commas and colons, shorter keys first."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return plain(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        names = sorted(value, key=lambda name: (len(name.encode()), name.encode()))
        return "{" + ", ".join(f"{json_text(name)}: {json_text(value[name])}" for name in names) + "}"
    return "[" + ", ".join(json_text(one) for one in value) + "]"


def storable(value: Json) -> bool:
    """Say whether every number within a value is one that a double tells exactly."""
    if isinstance(value, Mapping):
        return all(storable(one) for one in value.values())
    if isinstance(value, list):
        return all(storable(one) for one in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
        return math.isfinite(number) and (number % 1 != 0 or abs(number) < 2**53)
    return True


def same_content(one: Event, other: Event) -> bool:
    """Say whether two events under one transaction id say the same."""
    return one[1:4] == other[1:4] and json_text(one.properties) == json_text(other.properties)


def units(text: str | None) -> int | None:
    """Read a plain decimal as a number of 10^-18; None if it is none, or outside 38 digits with 18 places."""
    found = re.fullmatch(r"(-?)([0-9]+)(?:\.([0-9]+))?", text or "")
    if not found:
        return None
    sign, whole, places = found[1], found[2], found[3] or ""
    if len(places) > PLACES or len(whole) + len(places) > DIGITS:
        return None
    return int(sign + whole + places.ljust(PLACES, "0"))


def printed(number: int) -> str:
    """Print a number of 10^-18 plainly."""
    whole, places = divmod(abs(number), 10**PLACES)
    text = f"{whole}.{places:018d}".rstrip("0").rstrip(".")
    return f"-{text}" if number < 0 else text


# --- Metrics


def matches(metric: Metric, event: Event) -> bool:
    """Say whether a metric counts an event."""
    if metric.event_types and event.event_type not in metric.event_types:
        return False
    if event.event_type in metric.excluded_event_types:
        return False
    if metric.archived_at is not None and event.timestamp >= metric.archived_at:
        return False
    return all(_passes(one, canonical(event.properties.get(one.name))) for one in metric.filters)


def outcome(metric: Metric, event: Event) -> tuple[str, str]:
    """Return what becomes of an event, COUNTED, SKIPPED or NOT_MATCHED, and the field of the metric that decides."""
    value = canonical(event.properties.get(metric.aggregation_key)) if metric.aggregation_key else ""
    if not matches(metric, event):
        return "NOT_MATCHED", _first_failure(metric, event)
    usable = value is not None if metric.aggregation == "UNIQUE" else units(value) is not None
    if metric.aggregation == "COUNT" or usable:
        return "COUNTED", ""
    return "SKIPPED", "aggregation_key"


def _first_failure(metric: Metric, event: Event) -> str:
    if metric.event_types and event.event_type not in metric.event_types:
        return "event_type_filter.in_values"
    if event.event_type in metric.excluded_event_types:
        return "event_type_filter.not_in_values"
    for i, one in enumerate(metric.filters):
        value = canonical(event.properties.get(one.name))
        for name in ("exists", "in_values", "not_in_values"):
            # The filter with this one condition only.
            if not _passes(Filter(one.name)._replace(**{name: getattr(one, name)}), value):
                return f"property_filters[{i}].{name}"
    return "archive_time"


def aggregate(metric: Metric, events: Iterable[Event]) -> tuple[str | None, int]:
    """Return the value of events that all match, and how many of them were skipped."""
    events = list(events)
    if metric.aggregation == "COUNT":
        return (str(len(events)) if events else None), 0
    texts = [(event, canonical(event.properties.get(metric.aggregation_key))) for event in events]
    if metric.aggregation == "UNIQUE":
        present = [text for _, text in texts if text is not None]
        return (str(len(set(present))) if present else None), len(events) - len(present)
    numbers = [(event, number) for event, text in texts if (number := units(text)) is not None]
    skipped = len(events) - len(numbers)
    if not numbers:
        return None, skipped
    values = [number for _, number in numbers]
    evaluate: dict[str, Callable[[], int]] = {
        "SUM": lambda: sum(values),
        "MIN": lambda: min(values),
        "MAX": lambda: max(values),
        "AVG": lambda: round(Fraction(sum(values), len(values))),  # half-even
        "LATEST": lambda: max(numbers, key=lambda one: (one[0].timestamp, one[0].transaction_id.encode()))[1],
    }
    return printed(evaluate[metric.aggregation]()), skipped


def usage(events: Iterable[Event], selection: Selection, now: datetime) -> list[Window]:
    """Return the whole answer of ListUsage, read at `now`."""
    events = list(events)
    starts = [start for start, _ in selection.windows]
    end = selection.windows[-1][1]
    both_named = selection.named_customers and selection.named_metrics
    found = []
    for customer_id, keys in sorted(selection.customers.items()):
        own = [event for event in events if event.customer_key in keys and starts[0] <= event.timestamp < end]
        ever = keys | selection.former.get(customer_id, frozenset())
        once = [event for event in events if event.customer_key in ever]
        for metric, group_by in sorted(selection.metrics, key=lambda one: one[0].id):
            inside: dict[int, list[Event]] = {}
            for event in own:
                if matches(metric, event):
                    inside.setdefault(bisect_right(starts, event.timestamp) - 1, []).append(event)
            if not inside and not both_named:
                continue
            touched = [] if selection.omit_empty else _touched_hours(metric, once)
            for i in sorted(inside) if selection.omit_empty else range(len(starts)):
                row = _window(customer_id, metric, group_by, selection.windows[i], inside.get(i, []), now)
                maybe = not row.used and _touches(touched, selection.windows[i])
                found.append(row._replace(used=None) if maybe else row)
    return found


def grouped_usage(events: Iterable[Event], selection: GroupedSelection, now: datetime) -> list[GroupedRow]:
    """Return the whole answer of ListUsageWithGroups, read at `now`."""
    keys, metric, windows, group_key, filters, omit_empty, former = selection
    events = list(events)
    touched = _touched_hours(metric, [event for event in events if event.customer_key in keys | former])
    named = {name: set(values) for name, values in filters.items() if values}
    inside: dict[int, dict[tuple[str | None, ...], list[Event]]] = {}
    starts = [start for start, _ in windows]
    for event in events:
        if event.customer_key not in keys or not starts[0] <= event.timestamp < windows[-1][1]:
            continue
        values = {name: canonical(event.properties.get(name)) for name in group_key}
        if matches(metric, event) and all(values[name] in wanted for name, wanted in named.items()):
            groups = inside.setdefault(bisect_right(starts, event.timestamp) - 1, {})
            groups.setdefault(tuple(values.values()), []).append(event)
    combinations = list(itertools.product(*(sorted(named[name]) if name in named else [None] for name in group_key)))
    found = []
    for i in sorted(inside) if omit_empty else range(len(windows)):
        groups = dict(inside.get(i, {}))
        if not omit_empty:
            for one in combinations:
                # A combination says nothing of the properties that are not filtered: any group may be of it.
                if not any(_agree(one, group) for group in inside.get(i, {})):
                    groups[one] = []
        start, end = windows[i]
        for group in sorted(groups, key=_group_order):
            value, skipped = aggregate(metric, groups[group])
            told = {name: one for name, one in zip(group_key, group, strict=True) if one is not None}
            used = bool(groups[group]) or (None if not group_key and _touches(touched, windows[i]) else False)
            found.append(GroupedRow(start, end, told, value, skipped, end > now, used))
    return found


def _touched_hours(metric: Metric, events: Iterable[Event]) -> list[datetime]:
    """Return the hours in which the metric counted anything, even if it was archived since."""
    ever = replace(metric, archived_at=None)
    return sorted({hour(event.timestamp) for event in events if matches(ever, event)})


def _touches(hours: Sequence[datetime], span: Span) -> bool:
    """Say whether any of the hours lies in a span, in part at least."""
    i = bisect_right(hours, hour(span[0]) - MICROSECOND)
    return i < len(hours) and hours[i] < span[1]


def settled(found: Sequence[Any], expected: Sequence[Any]) -> list[Any]:
    """Return rows found with `used` None where the row expected in their place has None."""
    places = itertools.zip_longest(found, expected)
    return [
        one._replace(used=None) if other is not None and other.used is None else one
        for one, other in places
        if one is not None
    ]


def _agree(combination: Sequence[str | None], group: Sequence[str | None]) -> bool:
    return all(one is None or one == other for one, other in zip(combination, group, strict=True))


def _group_order(group: Sequence[str | None]) -> list[tuple[bool, bytes]]:
    return [(one is None, (one or "").encode()) for one in group]


def _window(
    customer_id: str, metric: Metric, group_by: GroupBy | None, span: Span, events: list[Event], now: datetime
) -> Window:
    value, skipped = aggregate(metric, events)
    groups: dict[str, str | None] = {}
    truncated = False
    if group_by is not None:
        members: dict[str, list[Event]] = {}
        for event in events:
            name = canonical(event.properties.get(group_by.key))
            if name is not None:
                members.setdefault(name, []).append(event)
        shown = sorted(members, key=str.encode)
        truncated = not group_by.values and len(shown) > GROUPS_MAX
        for name in group_by.values or shown[:GROUPS_MAX]:
            groups[name] = aggregate(metric, members.get(name, []))[0]
    return Window(customer_id, metric.id, *span, value, skipped, groups, truncated, span[1] > now, bool(events))


def _passes(one: Filter, value: str | None) -> bool:
    if one.exists is not None and one.exists != (value is not None):
        return False
    if one.in_values and value not in one.in_values:
        return False
    return value is None or value not in one.not_in_values


# --- Search


class Search(NamedTuple):
    """What a search asks for; empty or None = any. `keys` are those of the customer, or the one key."""

    ids: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    event_type: str = ""
    start: datetime | None = None
    end: datetime | None = None


def search(events: Iterable[Event], asked: Search) -> list[Event]:
    """Return the events found, in the order of the answer."""
    found = [
        event
        for event in events
        if (not asked.ids or event.transaction_id in asked.ids)
        and (not asked.keys or event.customer_key in asked.keys)
        and asked.event_type in {"", event.event_type}
        and (asked.start is None or event.timestamp >= asked.start)
        and (asked.end is None or event.timestamp < asked.end)
    ]
    return sorted(found, key=lambda event: (event.timestamp, event.transaction_id.encode()), reverse=True)


# --- Billing periods


def billing_period(
    frequency: str, anchor: date, starting_on: date, ending_before: date | None, day: date
) -> tuple[date, date] | None:
    """Return the billing period that holds a day, and the day after it, by walking from day to day."""
    if day < starting_on or (ending_before is not None and day >= ending_before):
        return None
    first, end = day, day + timedelta(days=1)
    while first > starting_on and not _begins_period(frequency, anchor, first):
        first -= timedelta(days=1)
    while end != ending_before and not _begins_period(frequency, anchor, end):
        end += timedelta(days=1)
    return first, end


def _begins_period(frequency: str, anchor: date, day: date) -> bool:
    if frequency == "WEEKLY":
        return day.weekday() == anchor.weekday()
    last = (day + timedelta(days=1)).month != day.month
    if day.day != anchor.day and not (last and anchor.day > day.day):
        return False
    every = {"MONTHLY": 1, "QUARTERLY": 3, "ANNUAL": 12}[frequency]
    return (day.month - anchor.month) % every == 0


# --- Windows


def hour(instant: datetime) -> datetime:
    """Return the start of the UTC hour that holds an instant."""
    return instant.replace(minute=0, second=0, microsecond=0)


def hours(start: datetime, number: int) -> list[Span]:
    """Return that many UTC hours from a full one on."""
    return list(pairwise(start + HOUR * i for i in range(number + 1)))


def days(zone: str, first: date, number: int) -> list[Span]:
    """Return the local days of a span of dates; a date that the zone skipped is none."""
    instants = sorted({first_instant(zone, first + timedelta(days=i)) for i in range(number + 1)})
    return list(pairwise(instants))


@functools.cache
def first_instant(zone: str, day: date) -> datetime:
    """Return the first instant at which a clock of the zone shows the date or a later one."""
    info = zone_info(zone)
    step = timedelta(minutes=15)
    low = datetime(day.year, day.month, day.day, tzinfo=UTC) - timedelta(hours=27)
    while (low + step).astimezone(info).date() < day:
        low += step
    high = low + step
    while high - low > MICROSECOND:
        middle = low + (high - low) // 2
        if middle.astimezone(info).date() < day:
            low = middle
        else:
            high = middle
    return high


def clock_changes(zone: str, span: Span) -> list[datetime]:
    """Return the instants within a span at which the zone's clock is moved (to the minute)."""
    info = zone_info(zone)
    minutes = range((span[1] - span[0]) // timedelta(minutes=1))
    instants = [span[0] + timedelta(minutes=i) for i in minutes]
    return [
        later
        for earlier, later in pairwise(instants)
        if earlier.astimezone(info).utcoffset() != later.astimezone(info).utcoffset()
    ]


@functools.cache
def zone_info(zone: str) -> ZoneInfo:
    """Return the zone as the tzdata package has it, whatever the host has."""
    data = resources.files("tzdata").joinpath("zoneinfo", *zone.split("/")).read_bytes()
    return ZoneInfo.from_file(io.BytesIO(data), key=zone)
