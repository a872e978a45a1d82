"""Customers on the wire."""

import uuid
from collections.abc import Iterable, Sequence

from metering.v1 import customer_pb2
from service.domain import checks, customers
from service.errors import Reason, Violation
from service.rpc.wire import check_mask, enum_value, ids, new_id, raise_any, read_date, timestamp

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
    customer_id = new_id(f"{path}.id", message.id, faults)
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
    raise_any([*faults, *customers.violations(customer, path)])
    return customer


def new_aliases(request: customer_pb2.SetIngestAliasesRequest) -> tuple[str, ...]:
    """Read a new set of aliases; raises InvalidArgument."""
    aliases = _aliases(request.ingest_aliases)
    raise_any(customers.alias_violations("ingest_aliases", aliases))
    return aliases


def new_billing_period(request: customer_pb2.SetBillingPeriodRequest) -> customers.BillingPeriod | None:
    """Read a new billing period, None = remove; raises InvalidArgument."""
    if not request.HasField("billing_period"):
        return None
    faults: list[Violation] = []
    period = _billing_period("billing_period", request.billing_period, faults)
    raise_any(faults)
    return period


def customer_changes(request: customer_pb2.UpdateCustomerRequest) -> dict[str, object]:
    """Read which columns an update sets to what; raises InvalidArgument."""
    message = request.customer
    known = ("name", "buyer_id", "custom_fields")
    check_mask(request.update_mask.paths, known)
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
    raise_any(faults)
    return values


def customer_key_filter(key: str) -> str | None:
    """Read the optional key by which customers are looked up; raises InvalidArgument."""
    if not key:
        return None
    raise_any([checks.identifier("customer_key", key)])
    return checks.customer_key(key)


def customer_ids_filter(sent: Sequence[str]) -> list[uuid.UUID] | None:
    """Read the optional ids of the customers to list; raises InvalidArgument."""
    faults: list[Violation] = []
    found = ids("ids", [("", one) for one in sent], faults)
    raise_any(faults)
    return found or None


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
    frequency = enum_value(f"{path}.frequency", message.frequency, _FREQUENCIES, faults)
    anchor = read_date(f"{path}.anchor_date", message.anchor_date, faults)
    start = read_date(f"{path}.starting_on", message.starting_on, faults)
    end = None
    if message.HasField("ending_before"):
        end = read_date(f"{path}.ending_before", message.ending_before, faults)
        if start and end and end <= start:
            faults.append(Violation(f"{path}.ending_before", Reason.FIELD_INVALID, "must be after starting_on"))
    if frequency is None or anchor is None or start is None:
        return None
    return customers.BillingPeriod(frequency, anchor, start, end)
