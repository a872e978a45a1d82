"""Owns what a billable metric is and which definitions are valid; how it counts is `store.metric_sql`'s."""

import enum
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b

from service.domain import checks
from service.domain.events import EventSource
from service.errors import Reason, Violation
from service.limits import limit

VALUES_MAX = limit(
    "FILTER_VALUES",
    1_000,
    most=1_000,
    about="values of one list of a metric's filters",
    field="billable_metric.property_filters[0].in_values",
)
FILTERS_MAX = limit(
    "FILTERS", 32, most=32, about="property filters of a metric", field="billable_metric.property_filters"
)
GROUP_KEYS_MAX = limit("GROUP_KEYS", 10, most=10, about="group keys of a metric", field="billable_metric.group_keys")
GROUP_KEY_PROPERTIES_MAX = limit(
    "GROUP_KEY_PROPERTIES",
    10,
    most=10,
    about="properties of a group key, and of the filters of a grouped query",
    field="billable_metric.group_keys[0].properties",
)
DEFINITION_BYTES_MAX = limit(
    "METRIC_BYTES",
    128 * 1024,
    most=128 * 1024,
    about="bytes of the definition of a metric, with its custom fields, as JSON",
    field="billable_metric",
)
# Every metric of an organization, archived ones too (not record metrics), is part of the one statement that counts its
# events. Postgres takes 32,767 values in a statement, and every metric costs each batch time.
METRICS_MAX = limit(
    "METRICS",
    500,
    most=500,
    about="metrics of an organization, archived ones included; fewer if they have many filters and group keys",
    field="billable_metric",
)
WEIGHT_MAX = 30_000
# Keys that usage records may have, and with them record metrics. A report has a line for each: see LINES_MAX.
RECORD_KEYS_MAX = limit(
    "RECORD_KEYS",
    5_000,
    most=5_000,
    about="keys that the usage records of an organization have: of its dimensions and metrics",
    field="product.dimensions",
)


class Aggregation(enum.Enum):
    """How the matching events of a window become one value."""

    COUNT = "COUNT"
    SUM = "SUM"
    MIN = "MIN"
    MAX = "MAX"
    AVG = "AVG"
    LATEST = "LATEST"
    UNIQUE = "UNIQUE"


@dataclass(frozen=True, slots=True)
class PropertyFilter:
    """A condition on one property; an empty tuple of values is no condition."""

    name: str
    exists: bool | None = None
    in_values: tuple[str, ...] = ()
    not_in_values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BillableMetric:
    """A metric's definition. Everything but the name is fixed at creation; times are aware UTC.

    `backfilled_until` is the start of the first hour whose past events are not counted yet; None = all are counted.
    `backfill_progress` is the share of the past counted so far, for display; `backfilled_at` is when all of it was.
    A metric with a `record_key` counts the events made from records of that key, and no other metric does.
    """

    id: uuid.UUID
    name: str
    aggregation: Aggregation
    key: str | None = None
    aggregation_key: str | None = None
    event_types: tuple[str, ...] = ()
    excluded_event_types: tuple[str, ...] = ()
    property_filters: tuple[PropertyFilter, ...] = ()
    group_keys: tuple[tuple[str, ...], ...] = ()
    custom_fields: Mapping[str, str] = field(default_factory=dict, hash=False)
    created_at: datetime | None = None
    archived_at: datetime | None = None
    backfilled_until: datetime | None = None
    backfill_progress: float | None = None
    backfilled_at: datetime | None = None
    record_key: str | None = None

    @property
    def source(self) -> EventSource:
        """Which events it counts."""
        return EventSource.EVENT if self.record_key is None else EventSource.GROUP

    @property
    def group_properties(self) -> tuple[str, ...]:
        """Every property of any group key, sorted: the order of `cell_group` in the metric's cells."""
        return tuple(sorted({name for key in self.group_keys for name in key}))

    def definition(self) -> dict[str, object]:
        """Return what the caller defines, as JSON-ready values: what is stored, and what "same content" compares."""
        return {
            "name": self.name,
            "key": self.key,
            "aggregation": self.aggregation.value,
            "aggregation_key": self.aggregation_key,
            "event_types": list(self.event_types),
            "excluded_event_types": list(self.excluded_event_types),
            "property_filters": [
                {"name": f.name, "exists": f.exists, "in": list(f.in_values), "not_in": list(f.not_in_values)}
                for f in self.property_filters
            ],
            "group_keys": [list(key) for key in self.group_keys],
            "custom_fields": dict(self.custom_fields),
        }

    def digest(self) -> bytes:
        """Tell this definition from any other; what is a set is the same in any order."""
        filters = [
            (one.name, one.exists, sorted(one.in_values), sorted(one.not_in_values)) for one in self.property_filters
        ]
        return content_digest(
            {
                **self.definition(),
                "event_types": sorted(self.event_types),
                "excluded_event_types": sorted(self.excluded_event_types),
                "property_filters": sorted(filters, key=lambda one: one[0]),
                "group_keys": sorted(sorted(key) for key in self.group_keys),
            }
        )

    @property
    def weight(self) -> int:
        """How many values its SQL carries, at most; what an organization may have of them is bounded."""
        return 24 + 8 * len(self.property_filters) + 2 * len(self.group_properties)


# The property of an event made from a record that holds how much was used.
QUANTITY = "quantity"


def record_metric(key: str) -> BillableMetric:
    """Make the record metric of a key: the sum of what is reported under it."""
    return BillableMetric(
        id=uuid.uuid4(),
        name=f"Records of {key}",
        aggregation=Aggregation.SUM,
        aggregation_key=QUANTITY,
        event_types=(key,),
        record_key=key,
    )


def content_digest(content: Mapping[str, object]) -> bytes:
    """Return a 16-byte digest of JSON-ready content, independent of the order of keys."""
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()


def violations(metric: BillableMetric, path: str) -> list[Violation]:
    """Return every fault of a definition, with field paths below `path`."""
    faults: list[Violation | None] = [checks.identifier(f"{path}.name", metric.name, most=checks.NAME_MAX)]
    if metric.key is not None:
        faults.append(checks.identifier(f"{path}.key", metric.key))
    if metric.aggregation is Aggregation.COUNT:
        if metric.aggregation_key is not None:
            message = "must be empty for COUNT, which counts events"
            faults.append(Violation(f"{path}.aggregation_key", Reason.FIELD_INVALID, message))
    else:
        faults.append(checks.identifier(f"{path}.aggregation_key", metric.aggregation_key or ""))
    faults += _values(f"{path}.event_type_filter.in_values", metric.event_types)
    faults += _values(f"{path}.event_type_filter.not_in_values", metric.excluded_event_types)
    faults += _filters(f"{path}.property_filters", metric.property_filters)
    faults += _group_keys(f"{path}.group_keys", metric.group_keys)
    faults += checks.custom_fields(f"{path}.custom_fields", metric.custom_fields)
    if not any(faults):
        faults.append(size_violation(metric, path))
    return [fault for fault in faults if fault]


def size_violation(metric: BillableMetric, path: str) -> Violation | None:
    """Check that a definition, with its custom fields, is not too large to be shown and counted with."""
    size = len(json.dumps(metric.definition(), ensure_ascii=False).encode())
    if size <= DEFINITION_BYTES_MAX:
        return None
    message = f"takes {size:,} bytes as JSON; at most {DEFINITION_BYTES_MAX:,} are allowed"
    return Violation(path, Reason.LIMIT_EXCEEDED, message)


def _values(path: str, values: Sequence[str]) -> list[Violation | None]:
    if len(values) > VALUES_MAX:
        return [_too_many(path, len(values), VALUES_MAX)]
    return [checks.text(f"{path}[{i}]", value) for i, value in enumerate(values)]


def _filters(path: str, filters: Sequence[PropertyFilter]) -> list[Violation | None]:
    if len(filters) > FILTERS_MAX:
        return [_too_many(path, len(filters), FILTERS_MAX)]
    faults: list[Violation | None] = []
    names: set[str] = set()
    for i, one in enumerate(filters):
        faults.append(checks.identifier(f"{path}[{i}].name", one.name))
        if one.name in names:
            message = f"{one.name!r} has a filter already; put all its conditions into one"
            faults.append(Violation(f"{path}[{i}].name", Reason.DUPLICATE_ITEM, message))
        names.add(one.name)
        if one.exists is False and one.in_values:
            message = "cannot be false together with in_values, which need the property"
            faults.append(Violation(f"{path}[{i}].exists", Reason.FIELD_INVALID, message))
        faults += _values(f"{path}[{i}].in_values", one.in_values)
        faults += _values(f"{path}[{i}].not_in_values", one.not_in_values)
    return faults


def _group_keys(path: str, keys: Sequence[Sequence[str]]) -> list[Violation | None]:
    if len(keys) > GROUP_KEYS_MAX:
        return [_too_many(path, len(keys), GROUP_KEYS_MAX)]
    faults: list[Violation | None] = []
    seen: set[frozenset[str]] = set()
    for i, key in enumerate(keys):
        if not key:
            faults.append(Violation(f"{path}[{i}].properties", Reason.FIELD_REQUIRED, "needs at least one property"))
        if len(key) > GROUP_KEY_PROPERTIES_MAX:
            faults.append(_too_many(f"{path}[{i}].properties", len(key), GROUP_KEY_PROPERTIES_MAX))
            continue
        faults += [checks.identifier(f"{path}[{i}].properties[{j}]", name) for j, name in enumerate(key)]
        if len(set(key)) < len(key):
            message = "names one property twice"
            faults.append(Violation(f"{path}[{i}].properties", Reason.DUPLICATE_ITEM, message))
        if frozenset(key) in seen:
            message = "is declared already; the order of properties does not matter"
            faults.append(Violation(f"{path}[{i}]", Reason.DUPLICATE_ITEM, message))
        seen.add(frozenset(key))
    return faults


def _too_many(path: str, number: int, most: int) -> Violation:
    return Violation(path, Reason.LIMIT_EXCEEDED, f"has {number} items; at most {most} are allowed")
