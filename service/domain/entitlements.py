"""Owns what products and entitlements are, which are valid, and how an entitlement's state may change."""

import enum
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from service.domain import checks
from service.domain.metrics import content_digest
from service.domain.partners import Partner
from service.errors import Reason, Violation
from service.limits import limit

ID_MAX = 36
DIMENSIONS_MAX = limit(
    "DIMENSIONS", 200, most=200, about="dimensions of a product or entitlement", field="product.dimensions"
)
METRIC_KEYS_MAX = limit(
    "METRIC_KEYS",
    200,
    most=200,
    about="billable metric keys of an entitlement",
    field="entitlement.billable_metric_keys",
)
STATUS_CHANGES_MAX = 100


class EntitlementStatus(enum.Enum):
    """State of an entitlement; see the proto enum of the same name."""

    ACTIVE = "ACTIVE"
    CANCELLED = "CANCELLED"
    DELETED = "DELETED"
    PENDING_CANCEL = "PENDING_CANCEL"
    PENDING_START = "PENDING_START"
    SUSPENDED = "SUSPENDED"


# In these usage counts as used under the entitlement.
IN_FORCE = frozenset({EntitlementStatus.ACTIVE, EntitlementStatus.PENDING_CANCEL})

_ENDS = frozenset({EntitlementStatus.CANCELLED, EntitlementStatus.DELETED})
_FOLLOWERS = {
    EntitlementStatus.PENDING_START: {EntitlementStatus.ACTIVE, *_ENDS},
    EntitlementStatus.ACTIVE: {EntitlementStatus.SUSPENDED, EntitlementStatus.PENDING_CANCEL, *_ENDS},
    EntitlementStatus.SUSPENDED: {EntitlementStatus.ACTIVE, EntitlementStatus.PENDING_CANCEL, *_ENDS},
    EntitlementStatus.PENDING_CANCEL: {EntitlementStatus.ACTIVE, EntitlementStatus.SUSPENDED, *_ENDS},
    EntitlementStatus.CANCELLED: {EntitlementStatus.DELETED},
    EntitlementStatus.DELETED: set(),
}


class Dimension(NamedTuple):
    """What may be metered: the marketplace's key, and a name by which records may also call it."""

    key: str
    name: str


class StatusChange(NamedTuple):
    """A state, and when the entitlement came into it."""

    status: EntitlementStatus
    since: datetime


@dataclass(frozen=True, slots=True)
class Product:
    """What is sold on a marketplace."""

    id: str
    name: str
    partner: Partner
    dimensions: tuple[Dimension, ...] = ()
    created_at: datetime | None = None
    updated_at: datetime | None = None

    def digest(self) -> bytes:
        """Tell what this product was created with from any other content."""
        return content_digest({"name": self.name, "partner": self.partner.value, "dimensions": sorted(self.dimensions)})


@dataclass(frozen=True, slots=True)
class Entitlement:
    """What a buyer bought. `customer_id` and `buyer_id` name the same customer; times are aware UTC.

    `partner` None (at creation only) = the product's. `dimensions` None (at creation only) = the product's.
    `carried` is what is left over for the next report, by dimension.
    """

    id: str
    name: str
    product_id: str
    buyer_id: str
    partner: Partner | None
    status: EntitlementStatus
    starting_on: datetime
    ending_before: datetime | None = None
    dimensions: tuple[Dimension, ...] | None = None
    billable_metric_keys: tuple[str, ...] = ()
    customer_id: uuid.UUID | None = None
    status_changes: tuple[StatusChange, ...] = ()
    created_at: datetime | None = None
    updated_at: datetime | None = None
    carried: Mapping[str, Decimal] = field(default_factory=dict)

    def digest(self) -> bytes:
        """Tell what this entitlement was created with from any other content."""
        return content_digest(
            {
                "name": self.name,
                "product_id": self.product_id,
                "buyer_id": self.buyer_id,
                "partner": self.partner and self.partner.value,
                "status": self.status.value,
                "starting_on": self.starting_on.isoformat(),
                "ending_before": self.ending_before and self.ending_before.isoformat(),
                "dimensions": None if self.dimensions is None else sorted(self.dimensions),
                "billable_metric_keys": sorted(self.billable_metric_keys),
            }
        )

    def status_at(self, instant: datetime) -> EntitlementStatus:
        """Return the state at an instant; the first one known holds for all time before it too."""
        found = self.status_changes[0].status if self.status_changes else self.status
        for change in self.status_changes:
            if change.since <= instant:
                found = change.status
        return found


def may_follow(old: EntitlementStatus, new: EntitlementStatus) -> bool:
    """Say whether an entitlement in one state may come into another."""
    return new in _FOLLOWERS[old]


def followers(status: EntitlementStatus) -> Sequence[str]:
    """Return the names of the states that may follow one."""
    return sorted(one.value for one in _FOLLOWERS[status])


def product_violations(product: Product, path: str) -> list[Violation]:
    """Return every fault of a product, with field paths below `path`."""
    faults = [
        checks.identifier(f"{path}.id", product.id, most=ID_MAX),
        checks.identifier(f"{path}.name", product.name, most=checks.NAME_MAX),
        *dimension_violations(f"{path}.dimensions", product.dimensions),
    ]
    return [fault for fault in faults if fault]


def entitlement_violations(entitlement: Entitlement, path: str) -> list[Violation]:
    """Return every fault of an entitlement, with field paths below `path`."""
    faults = [
        checks.identifier(f"{path}.id", entitlement.id, most=ID_MAX),
        *name_violations(f"{path}.name", entitlement.name),
        checks.identifier(f"{path}.product_id", entitlement.product_id, most=ID_MAX),
        checks.identifier(f"{path}.buyer_id", entitlement.buyer_id, most=ID_MAX),
        *dimension_violations(f"{path}.dimensions", entitlement.dimensions or ()),
        *metric_key_violations(f"{path}.billable_metric_keys", entitlement.billable_metric_keys),
        *term_violations(f"{path}.ending_before", entitlement.starting_on, entitlement.ending_before),
    ]
    return [fault for fault in faults if fault]


def name_violations(path: str, name: str) -> list[Violation]:
    """Return the faults of an optional name."""
    fault = checks.identifier(path, name, most=checks.NAME_MAX) if name else None
    return [fault] if fault else []


def term_violations(path: str, start: datetime, end: datetime | None) -> list[Violation]:
    """Return the fault of a term that ends before it starts."""
    if end is not None and end <= start:
        return [Violation(path, Reason.FIELD_INVALID, "must be later than starting_on")]
    return []


def dimension_violations(path: str, dimensions: Sequence[Dimension]) -> list[Violation]:
    """Return every fault of a list of dimensions."""
    if len(dimensions) > DIMENSIONS_MAX:
        message = f"has {len(dimensions)} items; at most {DIMENSIONS_MAX} are allowed"
        return [Violation(path, Reason.LIMIT_EXCEEDED, message)]
    faults: list[Violation | None] = []
    seen: set[str] = set()
    for i, one in enumerate(dimensions):
        faults.append(checks.identifier(f"{path}[{i}].key", one.key))
        if one.name != one.key:
            faults.append(checks.identifier(f"{path}[{i}].name", one.name))
        if one.key in seen:
            faults.append(Violation(f"{path}[{i}].key", Reason.DUPLICATE_ITEM, f"{one.key!r} stands twice"))
        seen.add(one.key)
    return [fault for fault in faults if fault]


def metric_key_violations(path: str, keys: Sequence[str]) -> list[Violation]:
    """Return every fault of a list of billable metric keys."""
    if len(keys) > METRIC_KEYS_MAX:
        message = f"has {len(keys)} items; at most {METRIC_KEYS_MAX} are allowed"
        return [Violation(path, Reason.LIMIT_EXCEEDED, message)]
    faults: list[Violation | None] = []
    for i, key in enumerate(keys):
        faults.append(checks.identifier(f"{path}[{i}]", key))
        if key in keys[:i]:
            faults.append(Violation(f"{path}[{i}]", Reason.DUPLICATE_ITEM, f"{key!r} stands twice"))
    return [fault for fault in faults if fault]
