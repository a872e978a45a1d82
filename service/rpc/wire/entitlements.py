"""Products and entitlements on the wire."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from google.protobuf.message import Message

from metering.v1 import entitlement_pb2
from service.domain import checks, entitlements, pages, quantities
from service.domain.entitlements import Dimension, EntitlementStatus
from service.domain.partners import Partner
from service.errors import Reason, Violation
from service.rpc.wire import check_mask, enum_value, raise_any, read_instant, timestamp

T = TypeVar("T")

PARTNERS = {
    number: Partner(name.removeprefix("PARTNER_")) for name, number in entitlement_pb2.Partner.items() if number
}
PARTNER_NUMBERS = {partner: number for number, partner in PARTNERS.items()}

_STATUSES = {
    number: EntitlementStatus(name.removeprefix("ENTITLEMENT_STATUS_"))
    for name, number in entitlement_pb2.EntitlementStatus.items()
    if number
}
_STATUS_NUMBERS = {status: number for number, status in _STATUSES.items()}
# Stands for a start that could not be read: no end lies before it.
_EARLIEST = datetime(1, 1, 1, tzinfo=UTC)


class EntitlementFilters(NamedTuple):
    """Which entitlements to list; None = any."""

    partner: Partner | None
    product_id: str | None
    buyer_id: str | None
    status: EntitlementStatus | None


def stored_id(field: str, value: str) -> str:
    """Read the required id of a product or an entitlement; raises InvalidArgument."""
    raise_any([checks.identifier(field, value, most=entitlements.ID_MAX)])
    return value


def new_product(message: entitlement_pb2.Product) -> entitlements.Product:
    """Read the product of a create request; raises InvalidArgument."""
    faults: list[Violation] = []
    path = "product"
    product = entitlements.Product(
        id=message.id,
        name=message.name,
        partner=enum_value(f"{path}.partner", message.partner, PARTNERS, faults) or Partner.AWS,
        dimensions=_dimensions(message.dimensions),
    )
    raise_any([*faults, *entitlements.product_violations(product, path)])
    return product


def product_changes(request: entitlement_pb2.UpdateProductRequest) -> dict[str, object]:
    """Read which fields an update of a product sets to what; raises InvalidArgument."""
    message, path = request.product, "product"
    known = ("name", "dimensions")
    check_mask(request.update_mask.paths, known)
    masked = set(request.update_mask.paths) or {name for name in known if getattr(message, name)}
    faults: list[Violation | None] = [
        checks.identifier(f"{path}.id", message.id, most=entitlements.ID_MAX),
        _nothing_masked(masked, known),
    ]
    changes: dict[str, object] = {}
    if "name" in masked:
        faults.append(checks.identifier(f"{path}.name", message.name, most=checks.NAME_MAX))
        changes["name"] = message.name
    if "dimensions" in masked:
        dimensions = _dimensions(message.dimensions)
        faults += entitlements.dimension_violations(f"{path}.dimensions", dimensions)
        changes["dimensions"] = dimensions
    raise_any(faults)
    return changes


def new_entitlement(message: entitlement_pb2.Entitlement) -> entitlements.Entitlement:
    """Read the entitlement of a create request; raises InvalidArgument."""
    faults: list[Violation] = []
    path = "entitlement"
    entitlement = entitlements.Entitlement(
        id=message.id,
        name=message.name,
        product_id=message.product_id,
        buyer_id=message.buyer_id,
        partner=_optional(f"{path}.partner", message.partner, PARTNERS, faults),
        status=_optional(f"{path}.status", message.status, _STATUSES, faults) or EntitlementStatus.ACTIVE,
        starting_on=_instant(path, message, "starting_on", faults, required=True) or _EARLIEST,
        ending_before=_instant(path, message, "ending_before", faults),
        dimensions=_dimensions(message.dimensions) or None,
        billable_metric_keys=tuple(message.billable_metric_keys),
    )
    raise_any([*faults, *entitlements.entitlement_violations(entitlement, path)])
    return entitlement


def entitlement_changes(request: entitlement_pb2.UpdateEntitlementRequest) -> dict[str, object]:
    """Read which fields an update of an entitlement sets to what; raises InvalidArgument."""
    message, path = request.entitlement, "entitlement"
    known = ("name", "status", "ending_before", "dimensions", "billable_metric_keys")
    check_mask(request.update_mask.paths, known)
    masked = set(request.update_mask.paths) or {field.name for field, _ in message.ListFields()} & set(known)
    found: list[Violation] = []
    faults: list[Violation | None] = [
        checks.identifier(f"{path}.id", message.id, most=entitlements.ID_MAX),
        _nothing_masked(masked, known),
    ]
    changes: dict[str, object] = {}
    if "name" in masked:
        faults += entitlements.name_violations(f"{path}.name", message.name)
        changes["name"] = message.name
    if "status" in masked:
        changes["status"] = enum_value(f"{path}.status", message.status, _STATUSES, found)
    if "ending_before" in masked:
        changes["ending_before"] = _instant(path, message, "ending_before", found)
    if "dimensions" in masked:
        dimensions = _dimensions(message.dimensions)
        faults += entitlements.dimension_violations(f"{path}.dimensions", dimensions)
        changes["dimensions"] = dimensions
    if "billable_metric_keys" in masked:
        keys = tuple(message.billable_metric_keys)
        faults += entitlements.metric_key_violations(f"{path}.billable_metric_keys", keys)
        changes["billable_metric_keys"] = keys
    raise_any([*faults, *found])
    return changes


def entitlement_filters(request: entitlement_pb2.ListEntitlementsRequest) -> EntitlementFilters:
    """Read which entitlements are wanted; raises InvalidArgument."""
    faults: list[Violation] = []
    filters = EntitlementFilters(
        partner=_optional("partner", request.partner, PARTNERS, faults),
        product_id=request.product_id or None,
        buyer_id=request.buyer_id or None,
        status=_optional("status", request.status, _STATUSES, faults),
    )
    ids = [
        checks.identifier(field, value, most=entitlements.ID_MAX)
        for field, value in (("product_id", request.product_id), ("buyer_id", request.buyer_id))
        if value
    ]
    raise_any([*faults, *ids, pages.skip_violation(request.skip)])
    return filters


def product(value: entitlements.Product) -> entitlement_pb2.Product:
    """Write a product."""
    return entitlement_pb2.Product(
        id=value.id,
        name=value.name,
        partner=PARTNER_NUMBERS[value.partner],
        dimensions=_dimension_messages(value.dimensions),
        create_time=timestamp(value.created_at),
        update_time=timestamp(value.updated_at),
    )


def entitlement(value: entitlements.Entitlement) -> entitlement_pb2.Entitlement:
    """Write an entitlement."""
    return entitlement_pb2.Entitlement(
        id=value.id,
        name=value.name,
        product_id=value.product_id,
        buyer_id=value.buyer_id,
        partner=PARTNER_NUMBERS[value.partner] if value.partner else entitlement_pb2.PARTNER_UNSPECIFIED,
        status=_STATUS_NUMBERS[value.status],
        starting_on=timestamp(value.starting_on),
        ending_before=timestamp(value.ending_before),
        dimensions=_dimension_messages(value.dimensions or ()),
        billable_metric_keys=value.billable_metric_keys,
        create_time=timestamp(value.created_at),
        update_time=timestamp(value.updated_at),
        status_changes=[
            entitlement_pb2.EntitlementStatusChange(
                status=_STATUS_NUMBERS[change.status], since=timestamp(change.since)
            )
            for change in value.status_changes
        ],
        carried_quantities={key: quantities.plain(carried) for key, carried in value.carried.items()},
    )


def _dimensions(sent: Iterable[entitlement_pb2.Dimension]) -> tuple[Dimension, ...]:
    return tuple(Dimension(one.key, one.name or one.key) for one in sent)


def _dimension_messages(dimensions: Iterable[Dimension]) -> list[entitlement_pb2.Dimension]:
    return [entitlement_pb2.Dimension(key=one.key, name=one.name) for one in dimensions]


def _optional(field: str, number: Any, names: Mapping[Any, T], faults: list[Violation]) -> T | None:
    return enum_value(field, number, names, faults) if number else None


def _instant(
    path: str, message: Message, field: str, faults: list[Violation], *, required: bool = False
) -> datetime | None:
    found: list[Violation] = []
    read = read_instant(message, field, found, required=required)
    faults += [replace(fault, field=f"{path}.{fault.field}") for fault in found]
    return read


def _nothing_masked(masked: set[str], known: Sequence[str]) -> Violation | None:
    if masked:
        return None
    text = f"names nothing to change; set or mask some of {', '.join(known)}"
    return Violation("update_mask", Reason.FIELD_REQUIRED, text)
