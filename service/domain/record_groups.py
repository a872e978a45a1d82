"""Owns what a usage record group is, every rule by which one is valid, and how its state follows from its records'."""

import enum
import functools
import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from service.domain import pages, quantities
from service.domain.entitlements import IN_FORCE, Dimension, Entitlement
from service.domain.events import EVENTS_MAX
from service.domain.metrics import BillableMetric, PropertyFilter, content_digest
from service.domain.partners import SKEW, Partner, PartnerRules, Rules
from service.errors import Reason, Violation
from service.limits import limit

GROUPS_MAX = limit("GROUPS_PER_CALL", 1_000, most=1_000, about="usage record groups of one call", field="groups")
RECORDS_MAX = limit(
    "RECORDS", 200, most=200, about="records of a group", field="groups[0].records", error="REJECTED, LIMIT_EXCEEDED"
)
# Records of a whole batch: as many as events of one.
BATCH_RECORDS_MAX = EVENTS_MAX
ALLOCATIONS_MAX = limit(
    "ALLOCATIONS",
    2_500,
    most=2_500,
    about="allocations of a record",
    field="groups[0].meta_info.usage_allocations.cpu",
    error="REJECTED, LIMIT_EXCEEDED",
)
TAGS_MAX = limit(
    "TAGS",
    5,
    most=5,
    about="tags of an allocation",
    field="groups[0].meta_info.usage_allocations.cpu.allocations[0]",
    error="REJECTED, ALLOCATION_INVALID",
)
GROUP_BYTES_MAX = limit(
    "GROUP_BYTES",
    1024 * 1024,
    most=1024 * 1024,
    about="bytes of a group",
    field="groups[0].records",
    error="REJECTED, LIMIT_EXCEEDED",
)
PAGE_SIZE_MAX = pages.PAGE_SIZE_MAX
META_FILTER_BYTES_MAX = limit(
    "META_FILTER_BYTES",
    4 * 1024,
    most=4 * 1024,
    about="bytes of a filter on meta_info",
    field="meta_info",
    error="INVALID_ARGUMENT, FIELD_INVALID",
)
# How many keys or names an error lists.
_LISTED = 10
# Digits of a quantity, before and after the point together, and after it.
DIGITS_MAX, PLACES_MAX = 38, 18

_TAG = re.compile(r"[A-Za-z0-9 +\-=._:\\/@]+")


class Source(enum.Enum):
    """Where a group comes from; see the proto enum UsageRecordGroupSource. NONE is the documents' empty source."""

    NONE = "NONE"
    API = "API"
    INTERNAL = "INTERNAL"
    LAGO = "LAGO"
    METRONOME = "METRONOME"
    ORB = "ORB"
    STRIPE = "STRIPE"


class GroupStatus(enum.Enum):
    """State of a group; see the proto enum UsageRecordGroupStatus."""

    CREATED = "CREATED"
    DELETED = "DELETED"
    INVALID = "INVALID"
    REPORTED = "REPORTED"
    REPORT_PENDING = "REPORT_PENDING"
    REPORT_FAILED = "REPORT_FAILED"


class RecordState(enum.Enum):
    """State of one record; see the proto enum UsageRecordState."""

    CREATED = "CREATED"
    REPORT_PENDING = "REPORT_PENDING"
    REPORTED = "REPORTED"
    REPORT_FAILED = "REPORT_FAILED"
    DELETED = "DELETED"
    INVALID = "INVALID"


# A group is in the first of these states that any of its records is in. (All are DELETED or INVALID, or none.)
STATUS_ORDER = (
    RecordState.CREATED,
    RecordState.REPORT_PENDING,
    RecordState.REPORT_FAILED,
    RecordState.REPORTED,
    RecordState.INVALID,
    RecordState.DELETED,
)


class BillableRecord(NamedTuple):
    """What was used of one metric (v2). `properties` is canonical JSON. None = a fault of it is known."""

    key: str
    properties: str | None
    quantity: Decimal | None


class Allocation(NamedTuple):
    """A part of a quantity and the tags it was used for."""

    quantity: Decimal | None
    tags: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class NewGroup:
    """A group as sent. `records` maps a dimension's key or name to its quantity (None = a fault of it is known).

    `meta` holds the other fields of meta_info that were set, JSON-ready: amounts and times as text. One that is not
    `readable` was too large to be looked into, and is judged no further.
    """

    id: str
    entitlement_id: str
    records: Mapping[str, Decimal | None] = field(default_factory=dict)
    billable_records: tuple[BillableRecord, ...] = ()
    timestamp: datetime | None = None
    source: Source = Source.API
    skip_validation: bool = False
    allocations: Mapping[str, tuple[Allocation, ...]] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    readable: bool = True

    def digest(self) -> bytes:
        """Tell this content from any other; a timestamp that was left out is no part of it, nor is the id.

        Billable records, allocations and tags are the same in any order.
        """
        return content_digest(
            {
                "entitlement_id": self.entitlement_id,
                "records": {key: _plain(quantity) for key, quantity in self.records.items()},
                "billable_records": sorted(
                    (one.key, one.properties or "", _plain(one.quantity) or "") for one in self.billable_records
                ),
                "timestamp": self.timestamp and self.timestamp.isoformat(),
                "source": self.source.value,
                "skip_validation": self.skip_validation,
                "allocations": {
                    key: sorted((sorted(one.tags), _plain(one.quantity) or "") for one in parts)
                    for key, parts in self.allocations.items()
                },
                "meta": dict(self.meta),
            }
        )


class Record(NamedTuple):
    """A record by what it counts for: a dimension, or a billable metric. `properties` (v2) is canonical JSON."""

    key: str
    quantity: Decimal
    properties: str | None = None


class StoredRecord(NamedTuple):
    """A record of a stored group, with its way to the marketplace."""

    key: str
    quantity: Decimal
    properties: Mapping[str, Any] | None
    state: RecordState
    report_id: uuid.UUID | None
    failure: str


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A group as stored. `meta_info` is JSON as shown; `invalid_reasons` say why the hourly job took it out."""

    id: str
    serial_id: int
    partner: Partner
    product_id: str
    entitlement_id: str
    buyer_id: str
    status: GroupStatus
    meta_info: Mapping[str, Any]
    report_id: uuid.UUID | None
    invalid_reasons: tuple[Violation, ...]
    created_at: datetime
    updated_at: datetime
    reported_at: datetime | None
    records: tuple[StoredRecord, ...]


class GroupQuery(NamedTuple):
    """What a list of groups asks for. None = any; `meta_info` is a JSON object that must be contained in a group's.

    `start` and `end` bound the time of creation, half-open.
    """

    start: datetime
    end: datetime
    partner: Partner | None = None
    product_id: str | None = None
    entitlement_id: str | None = None
    buyer_id: str | None = None
    status: GroupStatus | None = None
    source: Source | None = None
    meta_info: str | None = None


class Circumstances(NamedTuple):
    """All that a group is judged by beside itself. `now` None = once more, when it is stored: by the catalog alone."""

    entitlements: Mapping[str, Entitlement]
    metrics: Mapping[str, BillableMetric]
    rules: Rules
    now: datetime | None
    admin: bool = False


def violations(group: NewGroup, circumstances: Circumstances) -> list[Violation]:
    """Return every rule that a well-formed or partly malformed group breaks; paths are relative to the group.

    What is malformed is not said here again: it is left out of what is judged. A group that is stored is judged again
    by what it counts for and the entitlement's term and state, and by nothing that was settled when it was taken.
    """
    if not group.readable:
        return []
    entitlement = circumstances.entitlements.get(group.entitlement_id)
    faults = _exclusive(group)
    if entitlement is None and group.entitlement_id:
        message = f"no entitlement has the id {group.entitlement_id!r}; see ListEntitlements"
        faults.append(Violation("entitlement_id", Reason.ENTITLEMENT_NOT_FOUND, message))
    if group.skip_validation and not circumstances.admin:
        message = "may only be set by administrators; leave it out"
        faults.append(Violation("meta_info.skip_validation", Reason.SKIP_VALIDATION_FORBIDDEN, message))
    skipped = group.skip_validation and circumstances.admin
    faults += _keys(group, entitlement, circumstances, skipped=skipped)
    faults += _tags(group)
    if skipped:
        return faults + _times(group, None, circumstances)
    faults += _times(group, entitlement, circumstances)
    if circumstances.now is None:
        return faults
    faults += _zeros(group)
    partner = circumstances.rules[entitlement.partner] if entitlement and entitlement.partner else None
    if entitlement and partner:
        faults += _amounts(group, entitlement, partner)
    return faults + _allocations(group, entitlement, partner)


def duplicates(groups: Sequence[NewGroup]) -> dict[int, Violation]:
    """Return, by index, the groups of a batch that stand in it before: by their id, or by their content without one."""
    found: dict[int, Violation] = {}
    seen: dict[str | bytes, int] = {}
    for i, group in enumerate(groups):
        first = seen.setdefault(group.id or group.digest(), i)
        if first != i and group.id:
            message = f"is also the id of groups[{first}]; every group of a batch needs its own"
            found[i] = Violation("id", Reason.DUPLICATE_ITEM, message)
        elif first != i:
            message = f"is missing, and groups[{first}] has the same content; tell them apart by their ids"
            found[i] = Violation("id", Reason.DUPLICATE_ITEM, message)
    return found


def resolved(group: NewGroup, entitlement: Entitlement) -> list[Record]:
    """Return a valid group's records by what they count for, in the order of their positions."""
    if group.billable_records:
        return [Record(one.key, _known(one.quantity), one.properties) for one in group.billable_records]
    keys = _keys_by_name(entitlement.dimensions or ())
    return [Record(keys.get(name) or name, _known(quantity)) for name, quantity in sorted(group.records.items())]


def allocations_json(allocations: Mapping[str, Sequence[Allocation]]) -> dict[str, Any]:
    """Return allocations as they are stored and shown."""
    return {
        key: {
            "allocations": [
                {"quantity": _plain(one.quantity), "tags": [{"key": k, "value": v} for k, v in one.tags]}
                for one in parts
            ]
        }
        for key, parts in allocations.items()
    }


def instant_text(instant: datetime) -> str:
    """Return an instant as it stands in meta_info."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")


def quantity_fault(text: str) -> str | None:
    """Say what is wrong with the text of a quantity; None = nothing."""
    if not text:
        return "is required: a decimal such as 12.5"
    if not _DECIMAL.fullmatch(text):
        return "must be a plain decimal such as 12.5, without sign, exponent or blanks"
    if text.startswith("-") and text.strip("-0."):
        return "must not be negative"
    whole, _, fraction = text.removeprefix("-").partition(".")
    if len(fraction) > PLACES_MAX or len(whole.lstrip("0")) + len(fraction) > DIGITS_MAX:
        return f"must have at most {DIGITS_MAX} digits, {PLACES_MAX} of them after the point"
    return None


_DECIMAL = re.compile(r"-?[0-9]{1,200}(\.[0-9]{1,200})?", re.ASCII)


def _exclusive(group: NewGroup) -> list[Violation]:
    if group.records and group.billable_records:
        message = "and billable_records cannot be given together"
        return [Violation("records", Reason.RECORDS_EXCLUSIVE, message)]
    if not group.records and not group.billable_records:
        message = "or billable_records are required"
        return [Violation("records", Reason.RECORDS_EXCLUSIVE, message)]
    return []


def _keys(
    group: NewGroup, entitlement: Entitlement | None, circumstances: Circumstances, *, skipped: bool
) -> list[Violation]:
    """Check what records count for. With the rules `skipped` keys are taken as they are, but no two for the same."""
    faults = []
    seen: dict[tuple[str, frozenset[Any]], int] = {}
    for i, record in enumerate(group.billable_records):
        if not record.key or record.properties is None:
            continue
        properties = frozenset(item for item in canonical_texts(record.properties).items() if item[1] is not None)
        if (first := seen.setdefault((record.key, properties), i)) != i:
            message = f"has the key and properties of billable_records[{first}]; add them up"
            faults.append(Violation(f"billable_records[{i}]", Reason.DUPLICATE_ITEM, message))
    if entitlement is None:
        return faults
    dimensions = entitlement.dimensions or ()
    keys = _keys_by_name(dimensions)
    counted_for: dict[str, str] = {}
    for name in sorted(group.records):
        path = f"records.{name}"
        key = keys.get(name)
        if key is None and not skipped:
            faults.append(_unresolved(path, name, dimensions))
        other = counted_for.setdefault(key or name, name)
        if other != name:
            message = f"counts for the dimension {key!r}, as {other!r} does; add them up"
            faults.append(Violation(path, Reason.DUPLICATE_ITEM, message))
    if not skipped:
        at = group.timestamp or circumstances.now
        for i, record in enumerate(group.billable_records):
            faults += _billable(f"billable_records[{i}]", record, entitlement, circumstances.metrics, at)
    return faults


@functools.lru_cache(maxsize=256)
def _keys_by_name(dimensions: tuple[Dimension, ...]) -> Mapping[str, str]:
    """Return the key of the dimension that a record names by key or by name, where that is exactly one."""
    named = Counter(one.name for one in dimensions)
    by_name = {one.name: one.key for one in dimensions if named[one.name] == 1}
    return by_name | {one.key: one.key for one in dimensions}


def _unresolved(path: str, name: str, dimensions: Sequence[Dimension]) -> Violation:
    keys = [one.key for one in dimensions if one.name == name]
    if keys:
        message = f"is the name of several dimensions; use one of the keys {_listed(keys)}"
        return Violation(path, Reason.DIMENSION_AMBIGUOUS, message)
    known = f"it has {_listed(one.key for one in dimensions)}" if dimensions else "it has none"
    return Violation(path, Reason.DIMENSION_UNKNOWN, f"is no dimension of the entitlement: {known}")


def _billable(
    path: str,
    record: BillableRecord,
    entitlement: Entitlement,
    metrics: Mapping[str, BillableMetric],
    at: datetime | None,
) -> list[Violation]:
    if not record.key:  # said already
        return []
    metric = metrics.get(record.key)
    if metric is None or record.key not in entitlement.billable_metric_keys:
        allowed = _listed(entitlement.billable_metric_keys) if entitlement.billable_metric_keys else "none"
        message = f"is no billable metric that the entitlement allows; it allows {allowed}"
        return [Violation(f"{path}.key", Reason.BILLABLE_METRIC_KEY_INVALID, message)]
    if metric.archived_at is not None and (at is None or at >= metric.archived_at):
        message = f"is the key of a billable metric that was archived at {_shown(metric.archived_at)}"
        return [Violation(f"{path}.key", Reason.BILLABLE_METRIC_KEY_INVALID, message)]
    if record.properties is None:
        return []
    return [
        Violation(f"{path}.properties.{name}", Reason.PROPERTIES_MISMATCH, message)
        for name, message in _mismatches(metric, canonical_texts(record.properties))
    ]


def _mismatches(metric: BillableMetric, properties: Mapping[str, str | None]) -> Iterable[tuple[str, str]]:
    """Yield the properties that are not what the metric's filters say, each with what would be."""
    filters = {one.name: one for one in metric.property_filters}
    for name, one in filters.items():
        value = properties.get(name)
        if one.in_values and value not in one.in_values:
            yield name, f"must be one of {_listed(one.in_values)}"
        elif one.exists and value is None:
            yield name, "must be present"
        elif _asked_for(one) and value is not None and value in one.not_in_values:
            yield name, f"must not be one of {_listed(one.not_in_values)}"
    for name, value in properties.items():
        if value is not None and (name not in filters or not _asked_for(filters[name])):
            wanted = [one.name for one in metric.property_filters if _asked_for(one)]
            yield name, f"is no filter of the metric; it has {_listed(wanted) if wanted else 'none'}"


def _asked_for(one: PropertyFilter) -> bool:
    return bool(one.in_values) or one.exists is True


def _zeros(group: NewGroup) -> list[Violation]:
    sent = [*group.records.values(), *(one.quantity for one in group.billable_records)]
    if sent and all(quantity is not None and quantity == 0 for quantity in sent):
        path = "records" if group.records else "billable_records"
        return [Violation(path, Reason.QUANTITIES_ZERO, "has only quantities of zero; there is nothing to report")]
    return []


def _times(group: NewGroup, entitlement: Entitlement | None, circumstances: Circumstances) -> list[Violation]:
    now = circumstances.now
    at = group.timestamp or now
    if at is None:
        return []
    faults = []
    ahead = now is not None and at - now > SKEW
    if now is not None and ahead:
        message = f"is more than {SKEW.seconds // 60} minutes ahead of the server's clock ({_shown(now)})"
        faults.append(Violation("timestamp", Reason.TIMESTAMP_TOO_FAR_AHEAD, message))
    if entitlement is None:
        return faults
    start, end = entitlement.starting_on, entitlement.ending_before
    if at < start or (end is not None and at >= end):
        term = f"from {_shown(start)}" + (f" to before {_shown(end)}" if end else " on")
        message = f"is outside the entitlement's term, which is {term}"
        faults.append(Violation("timestamp", Reason.TIMESTAMP_OUTSIDE_TERM, message))
    if (status := entitlement.status_at(at)) not in IN_FORCE:
        message = f"was {status.value} at {_shown(at)}; it must be {' or '.join(sorted(one.value for one in IN_FORCE))}"
        faults.append(Violation("entitlement_id", Reason.ENTITLEMENT_NOT_ACTIVE, message))
    if now is not None and not ahead and entitlement.partner is not None:
        deadline = circumstances.rules[entitlement.partner].deadline(at)
        if now >= deadline:
            message = f"is too old: {entitlement.partner.value} took usage of this time until {_shown(deadline)}"
            faults.append(Violation("timestamp", Reason.TIMESTAMP_TOO_OLD, message))
    return faults


def _amounts(group: NewGroup, entitlement: Entitlement, rules: PartnerRules) -> list[Violation]:
    name = entitlement.partner.value if entitlement.partner else ""
    sent = [(f"records.{key}", quantity) for key, quantity in sorted(group.records.items())]
    sent += [(f"billable_records[{i}].quantity", one.quantity) for i, one in enumerate(group.billable_records)]
    faults = []
    for path, quantity in sent:
        if quantity is None:
            continue
        if quantity > rules.quantity_max:
            message = f"is more than {name} takes at once, {quantities.plain(rules.quantity_max)}"
            faults.append(Violation(path, Reason.QUANTITY_INVALID, message))
        if len(quantities.plain(quantity).partition(".")[2]) > rules.places:
            message = f"has more decimal places than {name} takes, {rules.places}"
            faults.append(Violation(path, Reason.QUANTITY_INVALID, message))
    return faults


def _allocations(group: NewGroup, entitlement: Entitlement | None, rules: PartnerRules | None) -> list[Violation]:
    path = "meta_info.usage_allocations"
    if not group.allocations:
        return []
    if entitlement and entitlement.partner and rules and not rules.allocations:
        message = f"are not taken by {entitlement.partner.value}; leave them out"
        return [Violation(path, Reason.ALLOCATION_INVALID, message)]
    faults = []
    keys = _keys_by_name(entitlement.dimensions or () if entitlement else ())
    recorded = {keys.get(name, name): quantity for name, quantity in group.records.items()}
    for one in group.billable_records:
        recorded[one.key] = _sum([recorded.get(one.key, Decimal(0)), one.quantity])
    seen: dict[str, str] = {}
    for name, parts in sorted(group.allocations.items()):
        here = f"{path}.{name}"
        key = keys.get(name, name)
        if (other := seen.setdefault(key, name)) != name:
            message = f"is for the dimension {key!r}, as {other!r} is; give one of them"
            faults.append(Violation(here, Reason.ALLOCATION_INVALID, message))
        if key not in recorded and entitlement is None:
            continue  # what the names mean nobody knows
        if key not in recorded:
            faults.append(Violation(here, Reason.ALLOCATION_INVALID, "is of no record of the group"))
            continue
        total, quantity = _sum(one.quantity for one in parts), recorded[key]
        if total is not None and quantity is not None and total != quantity:
            message = f"adds up to {quantities.plain(total)}, and the record says {quantities.plain(quantity)}"
            faults.append(Violation(here, Reason.ALLOCATION_INVALID, message))
    return faults


def _tags(group: NewGroup) -> list[Violation]:
    """Check the form of allocations, which no rule lifts."""
    faults = []
    for name, parts in sorted(group.allocations.items()):
        faults += _tags_of(f"meta_info.usage_allocations.{name}", parts)
    return faults


def _tags_of(path: str, parts: Sequence[Allocation]) -> list[Violation]:
    faults = []
    if not 1 <= len(parts) <= ALLOCATIONS_MAX:
        message = f"has {len(parts)} allocations; 1..{ALLOCATIONS_MAX:,} are allowed"
        faults.append(Violation(path, Reason.ALLOCATION_INVALID, message))
    seen: set[frozenset[tuple[str, str]]] = set()
    for i, part in enumerate(parts):
        here = f"{path}.allocations[{i}]"
        if len(part.tags) > TAGS_MAX:
            message = f"has {len(part.tags)} tags; at most {TAGS_MAX} are allowed"
            faults.append(Violation(here, Reason.ALLOCATION_INVALID, message))
        if len({key for key, _ in part.tags}) < len(part.tags):
            faults.append(Violation(here, Reason.ALLOCATION_INVALID, "names one tag twice"))
        for j, tag in enumerate(part.tags):
            for what, text, most in (("key", tag[0], 100), ("value", tag[1], 256)):
                if not _TAG.fullmatch(text) or len(text) > most:
                    message = f"must be 1..{most} letters, digits, blanks or + - = . _ : \\ / @"
                    faults.append(Violation(f"{here}.tags[{j}].{what}", Reason.ALLOCATION_INVALID, message))
        if frozenset(part.tags) in seen:
            faults.append(Violation(here, Reason.ALLOCATION_INVALID, "has the same tags as one before it"))
        seen.add(frozenset(part.tags))
    return faults


class _Number(str):
    __slots__ = ()


def canonical_texts(properties: str) -> dict[str, str | None]:
    """Return the canonical string of each value of a JSON object, by which values are compared; null is None.

    The same text as Postgres' `->>` gives: a string as it is, a number as it is printed, lists and objects as jsonb.
    """
    values = json.loads(properties, parse_int=_Number, parse_float=_Number)
    return {
        name: None if value is None else str(value) if isinstance(value, str) else _jsonb(value)
        for name, value in values.items()
    }


def _jsonb(value: Any) -> str:
    match value:
        case _Number():
            return str(value)
        case dict():
            # jsonb keeps shorter names first.
            names = sorted(value, key=lambda name: (len(name.encode()), name.encode()))
            return "{" + ", ".join(f"{_jsonb(name)}: {_jsonb(value[name])}" for name in names) + "}"
        case list():
            return "[" + ", ".join(map(_jsonb, value)) + "]"
        case _:
            return json.dumps(value, ensure_ascii=False)


def _sum(values: Iterable[Decimal | None]) -> Decimal | None:
    total: Decimal | None = Decimal(0)
    for value in values:
        total = None if total is None or value is None else quantities.add(total, value)
    return total


def _plain(quantity: Decimal | None) -> str | None:
    return None if quantity is None else quantities.plain(quantity)


def _known(quantity: Decimal | None) -> Decimal:
    if quantity is None:
        raise AssertionError("a group with a faulty quantity was taken for a valid one")
    return quantity


def _listed(names: Iterable[str]) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(repr(name) for name in shown[:_LISTED]) + more


def _shown(instant: datetime) -> str:
    return f"{instant:%Y-%m-%dT%H:%M:%SZ}"
