"""Usage record groups on the wire."""

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from metering.v1 import error_reason_pb2, usage_record_group_pb2
from service.domain import checks, pages, quantities, record_groups
from service.domain.entitlements import ID_MAX
from service.domain.events import NESTING_MAX, Verdict, instant
from service.domain.metrics import QUANTITY
from service.errors import InvalidArgument, Reason, Violation
from service.rpc.wire import enum_value, in_slices, raise_any, read_dates, timestamp
from service.rpc.wire.entitlements import PARTNER_NUMBERS, PARTNERS
from service.rpc.wire.events import VERDICTS, properties_json
from service.store.group_intake import Item, Reported

# Violations shown of one group, characters of a field path, and what an answer may take beside them.
_VIOLATIONS_SHOWN = 50
_FIELD_MAX = 256
ANSWER_BYTES_MAX = 3 * 1024 * 1024

_SOURCES = {
    number: record_groups.Source(name.removeprefix("USAGE_RECORD_GROUP_SOURCE_"))
    for name, number in usage_record_group_pb2.UsageRecordGroupSource.items()
    if number
}
_SOURCE_NUMBERS = {source: number for number, source in _SOURCES.items()}
_STATUSES = {
    number: record_groups.GroupStatus(name.removeprefix("USAGE_RECORD_GROUP_STATUS_"))
    for name, number in usage_record_group_pb2.UsageRecordGroupStatus.items()
    if number
}
_STATUS_NUMBERS = {status: number for number, status in _STATUSES.items()}
_STATE_NUMBERS = {
    record_groups.RecordState(name.removeprefix("USAGE_RECORD_STATE_")): number
    for name, number in usage_record_group_pb2.UsageRecordState.items()
    if number
}

# The fields of meta_info that are stored as they are given, by what they hold.
META_TEXTS = (
    "lago_subscription_id",
    "metronome_invoice_id",
    "stripe_invoice_id",
    "stripe_subscription_item_id",
    "stripe_usage_record_summary_id",
    "erp_invoice_id",
)
META_AMOUNTS = (
    "lago_amount",
    "metronome_daily_cost_amount",
    "metronome_monthly_invoice_amount",
    "metronome_monthly_invoice_amount_adjusted",
    "metronome_invoice_credit_back_amount",
)
META_TIMES = ("lago_usage_start_time", "stripe_period_start_time", "stripe_period_end_time")
_FLAGS = ("metronome_invoice_credit_back",)
_NUMBERS = ("stripe_usage_record_summary_total_usage",)
# Those that a filter can name with `name=value`, and those that only a JSON object can hold.
_SCALARS = ("source", "timestamp", "skip_validation", *META_TEXTS, *META_AMOUNTS, *META_TIMES, *_FLAGS, *_NUMBERS)
_META_FIELDS = (*_SCALARS, "billable_records", "origin_records", "usage_allocations")

_AMOUNT = re.compile(r"-?[0-9]{1,38}(\.[0-9]{1,18})?", re.ASCII)


class Sent(NamedTuple):
    """The groups of a request. Of one that cannot be decoded only its ids are there, and here is where it is broken."""

    groups: Sequence[usage_record_group_pb2.NewUsageRecordGroup]
    unreadable: Mapping[int, str]


def _one_by_one(request: type[Message], raw: bytes) -> Sent:
    """Decode a request; where that fails, group by group, so that one that is too deeply nested sinks no other.

    Raises DecodeError when it is not even a list of groups.
    """
    with contextlib.suppress(DecodeError):
        return Sent(request.FromString(raw).groups, {})  # type: ignore[attr-defined]  # both requests have them
    groups, unreadable = [], {}
    # One more than is allowed tells that there are too many.
    for i, one in enumerate(_LISTED.FromString(raw).items[: record_groups.GROUPS_MAX + 1]):
        try:
            group = usage_record_group_pb2.NewUsageRecordGroup.FromString(one)
        except DecodeError:
            parts = _PARTS.FromString(one)
            group = usage_record_group_pb2.NewUsageRecordGroup(id=parts.id, entitlement_id=parts.entitlement_id)
            unreadable[i] = _broken(parts)
        groups.append(group)
    return Sent(groups, unreadable)


def _broken(parts: Any) -> str:
    """Return the path of the first part of a group that cannot be decoded; what is no part is the records."""
    found: list[tuple[str, bytes, type[Message]]] = []
    found += [
        (f"billable_records[{i}]", raw, usage_record_group_pb2.BillableRecord) for i, raw in enumerate(parts.items)
    ]
    found += [("timestamp", raw, Timestamp) for raw in parts.timestamps]
    found += [("meta_info", raw, usage_record_group_pb2.UsageRecordGroupMetaInfo) for raw in parts.meta_infos]
    return next((path for path, raw, kind in found if not _is_message(raw, kind)), "records")


def _is_message(raw: bytes, kind: type[Message]) -> bool:
    try:
        kind.FromString(raw)
    except DecodeError:
        return False
    return True


def _shallow(name: str, **fields: tuple[int, int]) -> Any:
    """Make a message type that has some of another one's fields: its own messages as bytes, not looked into."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", syntax="proto3")
    message = file.message_type.add(name=name)
    for field, (number, kind) in fields.items():
        label = kinds.LABEL_REPEATED if kind == kinds.TYPE_BYTES else kinds.LABEL_OPTIONAL
        message.field.add(name=field, number=number, type=kind, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


_TEXT, _BYTES = descriptor_pb2.FieldDescriptorProto.TYPE_STRING, descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
_LISTED = _shallow("Listed", items=(1, _BYTES))
_PARTS = _shallow(
    "Parts",
    id=(1, _TEXT),
    entitlement_id=(2, _TEXT),
    items=(4, _BYTES),
    timestamps=(5, _BYTES),
    meta_infos=(6, _BYTES),
)

# How the requests of methods are decoded, where not as gRPC does.
DECODERS: Mapping[str, Callable[[bytes], Sent]] = {
    f"/metering.v1.UsageRecordGroupService/{name}": functools.partial(
        _one_by_one, getattr(usage_record_group_pb2, f"{name}Request")
    )
    for name in ("BatchValidateUsageRecordGroups", "ReportUsageRecordGroups")
}


async def new_groups(request: Sent, *, ids_required: bool) -> list[Item]:
    """Read a batch; each group comes with the faults of its form. Raises InvalidArgument on a bad number of groups."""
    sent = request.groups
    most = record_groups.GROUPS_MAX
    if not sent:
        raise InvalidArgument([Violation("groups", Reason.FIELD_REQUIRED, f"needs 1..{most:,} groups")])
    if len(sent) > most:
        message = f"has {len(sent):,} groups; at most {most:,} are allowed: split the batch"
        raise InvalidArgument([Violation("groups", Reason.LIMIT_EXCEEDED, message)])
    records = sum(
        len(one.records) + max(len(one.billable_records), len(one.meta_info.billable_records)) for one in sent
    )
    if records > (most := record_groups.BATCH_RECORDS_MAX):
        message = f"have {records:,} records together; at most {most:,} are allowed: split the batch"
        raise InvalidArgument([Violation("groups", Reason.LIMIT_EXCEEDED, message)])
    return await in_slices(
        lambda one: _new_group(one[1], request.unreadable.get(one[0]), ids_required=ids_required), enumerate(sent)
    )


def _new_group(
    message: usage_record_group_pb2.NewUsageRecordGroup, unreadable: str | None, *, ids_required: bool
) -> Item:
    faults: list[Violation] = []
    meta = message.meta_info
    group_id = _identifier("id", message.id, faults, required=ids_required)
    entitlement_id = _identifier("entitlement_id", message.entitlement_id, faults)
    fault = _too_large(message)
    if unreadable:
        text = f"cannot be read: it is no message of its type, or nested more than {NESTING_MAX} levels deep"
        fault = Violation(unreadable, Reason.MALFORMED_REQUEST, text)
    if fault:
        return record_groups.NewGroup(group_id, entitlement_id, readable=False), (*faults, fault)
    records = _records(message.records, faults)
    billable = _billable_records("billable_records", message.billable_records, faults)
    if meta.billable_records:
        inside = _billable_records("meta_info.billable_records", meta.billable_records, faults)
        if billable and inside != billable:
            faults.append(_differs("billable_records"))
        billable = billable or inside
    if meta.origin_records:
        origin = {
            name: _quantity(f"meta_info.origin_records.{name}", sent, faults)
            for name, sent in meta.origin_records.items()
        }
        if origin != records:
            faults.append(_differs("origin_records", "records"))
    at = _instant("timestamp", message, faults)
    inside_at = _instant("timestamp", meta, faults, "meta_info.timestamp")
    if at is not None and inside_at is not None and at != inside_at:
        faults.append(_differs("timestamp"))
    source = record_groups.Source.API
    if meta.source:
        source = enum_value("meta_info.source", meta.source, _SOURCES, faults) or source
    group = record_groups.NewGroup(
        id=group_id,
        entitlement_id=entitlement_id,
        records=records,
        billable_records=billable,
        timestamp=at or inside_at,
        source=source,
        skip_validation=meta.skip_validation,
        allocations=_allocations(meta.usage_allocations, faults),
        meta=_meta(meta, faults),
    )
    return (group, tuple(faults)) if faults else group


def _too_large(message: usage_record_group_pb2.NewUsageRecordGroup) -> Violation | None:
    """Return the fault of a group that is too large to be looked into: what is in it would keep others waiting."""
    meta = message.meta_info
    if (size := message.ByteSize()) > (most := record_groups.GROUP_BYTES_MAX):
        return Violation(
            "records", Reason.LIMIT_EXCEEDED, f"and the rest take {size:,} bytes; at most {most:,} are allowed"
        )
    allocations = meta.usage_allocations
    for path, number, most in (
        ("records", len(message.records), record_groups.RECORDS_MAX),
        ("billable_records", len(message.billable_records), record_groups.RECORDS_MAX),
        ("meta_info.billable_records", len(meta.billable_records), record_groups.RECORDS_MAX),
        ("meta_info.origin_records", len(meta.origin_records), record_groups.RECORDS_MAX),
        ("meta_info.usage_allocations", len(allocations), record_groups.RECORDS_MAX),
        *(
            (f"meta_info.usage_allocations.{name}", len(parts.allocations), record_groups.ALLOCATIONS_MAX)
            for name, parts in itertools.islice(allocations.items(), record_groups.RECORDS_MAX)
        ),
    ):
        if number > most:
            text = f"has {number:,} entries; at most {most:,} are allowed"
            return Violation(path, Reason.LIMIT_EXCEEDED, text)
    return None


def _identifier(path: str, sent: str, faults: list[Violation], *, required: bool = True) -> str:
    """Read an id of 1..36 characters; a faulty one is as if it had not been sent."""
    if not sent and not required:
        return ""
    if fault := checks.identifier(path, sent, most=ID_MAX):
        faults.append(fault)
        return ""
    return sent


def _records(sent: Mapping[str, str], faults: list[Violation]) -> dict[str, Decimal | None]:
    found = {}
    for name in sorted(sent):
        if fault := checks.identifier("key", name):
            faults.append(Violation("records", fault.reason, f"has a key that {fault.message}"))
        found[name] = _quantity(f"records.{name}", sent[name], faults)
    return found


def _billable_records(
    path: str, sent: Sequence[usage_record_group_pb2.BillableRecord], faults: list[Violation]
) -> tuple[record_groups.BillableRecord, ...]:
    found = []
    for i, one in enumerate(sent):
        here = f"{path}[{i}]"
        fault = checks.identifier(f"{here}.key", one.key)
        own: list[Violation] = [fault] if fault else []
        of_properties: list[Violation] = []
        properties = properties_json(one.properties, of_properties, f"{here}.properties")
        if QUANTITY in one.properties.fields:
            text = "is the name under which the quantity is stored; call the property something else"
            of_properties.append(Violation(f"{here}.properties.{QUANTITY}", Reason.FIELD_INVALID, text))
        own += of_properties
        quantity = _quantity(f"{here}.quantity", one.quantity, own)
        record = record_groups.BillableRecord("" if fault else one.key, None if of_properties else properties, quantity)
        found.append(record)
        faults += own
    return tuple(found)


def _quantity(path: str, sent: str, faults: list[Violation]) -> Decimal | None:
    if fault := record_groups.quantity_fault(sent):
        faults.append(Violation(path, Reason.QUANTITY_INVALID if sent else Reason.FIELD_REQUIRED, fault))
        return None
    return Decimal(sent.removeprefix("-"))  # a minus was that of a zero


def _allocations(
    sent: Mapping[str, usage_record_group_pb2.UsageAllocations], faults: list[Violation]
) -> dict[str, tuple[record_groups.Allocation, ...]]:
    path = "meta_info.usage_allocations"
    found = {}
    for name in sorted(sent):
        if fault := checks.identifier("key", name):
            faults.append(Violation(path, fault.reason, f"has a key that {fault.message}"))
        found[name] = tuple(
            record_groups.Allocation(
                _quantity(f"{path}.{name}.allocations[{i}].quantity", one.quantity, faults),
                # One more than is allowed tells that there are too many.
                tuple((tag.key, tag.value) for tag in one.tags[: record_groups.TAGS_MAX + 1]),
            )
            for i, one in enumerate(sent[name].allocations)
        )
    return found


def _meta(message: usage_record_group_pb2.UsageRecordGroupMetaInfo, faults: list[Violation]) -> dict[str, Any]:
    """Read the fields that are stored as they are given, those that are set."""
    found: dict[str, Any] = {}
    for name in META_TEXTS:
        if sent := getattr(message, name):
            if fault := checks.text(f"meta_info.{name}", sent):
                faults.append(fault)
            found[name] = sent
    for name in META_AMOUNTS:
        if sent := getattr(message, name):
            if not _is_amount(sent):
                text = "must be a plain decimal such as 12.50, of at most 38 digits, 18 of them after the point"
                faults.append(Violation(f"meta_info.{name}", Reason.FIELD_INVALID, text))
            found[name] = sent
    for name in META_TIMES:
        if at := _instant(name, message, faults, f"meta_info.{name}"):
            found[name] = record_groups.instant_text(at)
    found |= {name: sent for name in (*_FLAGS, *_NUMBERS) if (sent := getattr(message, name))}
    return found


def _is_amount(text: str) -> bool:
    return bool(_AMOUNT.fullmatch(text)) and len(text.strip("-").replace(".", "")) <= record_groups.DIGITS_MAX


def _instant(field: str, message: Any, faults: list[Violation], path: str = "") -> datetime | None:
    if not message.HasField(field):
        return None
    sent = getattr(message, field)
    found = instant(sent.seconds, sent.nanos)
    if found is None:
        text = "must lie in 0001-01-02T00:00:00Z to 9999-12-30T23:59:59Z, with nanos in 0..999,999,999"
        faults.append(Violation(path or field, Reason.FIELD_INVALID, text))
    return found


def _differs(field: str, other: str = "") -> Violation:
    text = f"differs from {other or field} of the group; give one of them, or both the same"
    return Violation(f"meta_info.{field}", Reason.META_INFO_MISMATCH, text)


def group_id(sent: str) -> str:
    """Read the required id of a group; raises InvalidArgument."""
    raise_any([checks.identifier("id", sent, most=ID_MAX)])
    return sent


def group_query(
    request: usage_record_group_pb2.ListUsageRecordGroupsRequest, now: datetime
) -> tuple[record_groups.GroupQuery, int]:
    """Read what a list asks for, and how many groups it skips; raises InvalidArgument."""
    faults: list[Violation] = []
    given = [name for name in ("partner", "product_id", "entitlement_id", "buyer_id") if getattr(request, name)]
    if len(given) > 1:
        text = f"cannot be given together with {given[0]}: at most one of partner, product, entitlement and buyer"
        faults.append(Violation(given[1], Reason.FIELD_INVALID, text))
    partner = enum_value("partner", request.partner, PARTNERS, faults) if request.partner else None
    status = enum_value("status", request.status, _STATUSES, faults) if request.status else None
    source = enum_value("source", request.source, _SOURCES, faults) if request.HasField("source") else None
    faults += [
        fault
        for name in ("product_id", "entitlement_id", "buyer_id")
        if (sent := getattr(request, name)) and (fault := checks.identifier(name, sent, most=ID_MAX))
    ]
    meta_info = _meta_filter(request.meta_info, faults) if request.meta_info else None
    days = read_dates(request.start_date, request.end_date, faults, today=now.astimezone(UTC).date())
    raise_any([*faults, pages.skip_violation(request.skip)])
    if days is None:  # a fault was raised then; this tells the type checker
        raise AssertionError
    query = record_groups.GroupQuery(
        *days,
        partner,
        request.product_id or None,
        request.entitlement_id or None,
        request.buyer_id or None,
        status,
        source,
        meta_info,
    )
    return query, request.skip


def _meta_filter(sent: str, faults: list[Violation]) -> str | None:
    """Read a filter on meta_info as the JSON object that must be contained in it."""
    problem, found = None, None
    if len(sent.encode()) > record_groups.META_FILTER_BYTES_MAX:
        problem = f"is longer than {record_groups.META_FILTER_BYTES_MAX:,} bytes"
    elif sent.lstrip().startswith("{"):
        problem, found = _object_filter(sent)
    else:
        problem, found = _scalar_filter(sent)
    if problem:
        faults.append(Violation("meta_info", Reason.FIELD_INVALID, problem))
    return found


def _object_filter(sent: str) -> tuple[str | None, str | None]:
    def number(text: str) -> int:
        if len(text) > 64 or "e" in text.lower():
            raise ValueError("has a number that is no plain decimal")
        return 0

    def constant(text: str) -> None:
        raise ValueError(f"has {text}, which is not JSON")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Postgres would look at all of them, whatever is wrong with any.
        if len(dict(pairs)) < len(pairs):
            raise ValueError("has one name twice in an object")
        return dict(pairs)

    try:
        wanted = json.loads(
            sent, parse_int=number, parse_float=number, parse_constant=constant, object_pairs_hook=members
        )
        # Postgres takes neither NUL nor half a character.
        text = json.dumps(wanted, ensure_ascii=False)
        text.encode()
        if "\0" in sent or "\\u0000" in text.replace("\\\\", ""):
            raise ValueError("has a NUL character")
    except (ValueError, RecursionError) as error:
        cause = str(error) if not isinstance(error, json.JSONDecodeError | RecursionError | UnicodeError) else ""
        return cause or "is neither name=value nor a JSON object", None
    unknown = sorted(set(wanted) - set(_META_FIELDS))
    if unknown:
        return f"names {unknown[0][:64]!r}, which meta_info does not have; it has {', '.join(_META_FIELDS)}", None
    return None, sent


def _scalar_filter(sent: str) -> tuple[str | None, str | None]:
    name, equals, text = sent.partition("=")
    if not equals or name not in _SCALARS:
        return f"must be a JSON object, or name=value with one of {', '.join(_SCALARS)}", None
    if "\0" in text:
        return "has a NUL character", None
    value: Any = text
    if name in (*_FLAGS, "skip_validation"):
        if text != "true":
            return f"must be {name}=true: only what is set can be found", None
        value = True
    if name in _NUMBERS:
        if not re.fullmatch(r"-?[0-9]{1,19}", text, re.ASCII):
            return f"must be {name}= and a whole number", None
        value = int(text)
    return None, json.dumps({name: value})


def validations(
    items: Sequence[Item], found: Sequence[Sequence[Violation]]
) -> Iterable[usage_record_group_pb2.UsageRecordGroupValidation]:
    """Write what validation found of each group."""
    left = ANSWER_BYTES_MAX
    for i, (item, faults) in enumerate(zip(items, found, strict=True)):
        sent = item if isinstance(item, record_groups.NewGroup) else item[0]
        result = usage_record_group_pb2.UsageRecordGroupValidation(
            index=i, id=sent.id, violation_count=len(faults), violations=_shown(i, faults, left)
        )
        left -= result.ByteSize()
        yield result


def results(found: Reported, organization: str) -> Iterable[usage_record_group_pb2.UsageRecordGroupResult]:
    """Write what became of each group: why it was not stored, and, as far as there is room, what is stored."""
    left = ANSWER_BYTES_MAX
    for i, one in enumerate(found.results):
        result = usage_record_group_pb2.UsageRecordGroupResult(
            index=i,
            id=one.id,
            verdict=VERDICTS[one.verdict],
            violation_count=len(one.violations),
            violations=_shown(i, one.violations, left),
        )
        if one.verdict is not Verdict.REJECTED and (kept := found.groups.get(one.id)) is not None:
            shown = group(kept, organization)
            if shown.ByteSize() <= left:
                result.group.CopyFrom(shown)
        left -= result.ByteSize()
        yield result


def _shown(i: int, faults: Sequence[Violation], left: int) -> list[usage_record_group_pb2.GroupViolation]:
    shown = []
    for fault in faults[:_VIOLATIONS_SHOWN]:
        one = violation(fault, f"groups[{i}].")
        left -= one.ByteSize() + 4
        if left < 0:
            break
        shown.append(one)
    return shown


def violation(fault: Violation, prefix: str = "") -> usage_record_group_pb2.GroupViolation:
    """Write a fault of a group."""
    return usage_record_group_pb2.GroupViolation(
        code=error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{fault.reason.value}"),
        field=f"{prefix}{fault.field}"[:_FIELD_MAX],
        message=fault.message,
    )


def group(value: record_groups.StoredGroup, organization: str) -> usage_record_group_pb2.UsageRecordGroup:
    """Write a group."""
    is_v2 = "billable_records" in value.meta_info
    return usage_record_group_pb2.UsageRecordGroup(
        id=value.id,
        organization_id=organization,
        partner=PARTNER_NUMBERS[value.partner],
        product_id=value.product_id,
        buyer_id=value.buyer_id,
        entitlement_id=value.entitlement_id,
        records={} if is_v2 else {one.key: quantities.plain(one.quantity) for one in value.records},
        meta_info=_meta_info(value.meta_info),
        status=_STATUS_NUMBERS[value.status],
        serial_id=value.serial_id,
        usage_record_report_id=str(value.report_id or ""),
        create_time=timestamp(value.created_at),
        update_time=timestamp(value.updated_at),
        reported_time=timestamp(value.reported_at),
        invalid_reasons=[violation(one) for one in value.invalid_reasons],
        usage_records=[_record(one) for one in value.records],
    )


def _record(value: record_groups.StoredRecord) -> usage_record_group_pb2.UsageRecord:
    record = usage_record_group_pb2.UsageRecord(
        key=value.key,
        quantity=quantities.plain(value.quantity),
        state=_STATE_NUMBERS[value.state],
        usage_record_report_id=str(value.report_id or ""),
        failure=value.failure,
    )
    if value.properties is not None:
        record.properties.update(value.properties)
    return record


def _meta_info(stored: Mapping[str, Any]) -> usage_record_group_pb2.UsageRecordGroupMetaInfo:
    meta = usage_record_group_pb2.UsageRecordGroupMetaInfo(
        source=_SOURCE_NUMBERS[record_groups.Source(stored["source"])],
        timestamp=_time(stored["timestamp"]),
        skip_validation=stored.get("skip_validation", False),
        origin_records=stored.get("origin_records", {}),
        **{name: stored[name] for name in (*META_TEXTS, *META_AMOUNTS, *_FLAGS, *_NUMBERS) if name in stored},
        **{name: _time(stored[name]) for name in META_TIMES if name in stored},
    )
    for one in stored.get("billable_records", ()):
        record = meta.billable_records.add(key=one["key"], quantity=one["quantity"])
        record.properties.update(one["properties"])
    for name, parts in stored.get("usage_allocations", {}).items():
        for part in parts["allocations"]:
            allocation = meta.usage_allocations[name].allocations.add(quantity=part["quantity"])
            for tag in part["tags"]:
                allocation.tags.add(key=tag["key"], value=tag["value"])
    return meta


def _time(text: str) -> Any:
    return timestamp(datetime.fromisoformat(text))
