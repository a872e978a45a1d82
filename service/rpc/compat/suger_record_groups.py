"""Suger's usage record groups: what its SDKs send and expect, told in the native RPCs; see protos/compat/suger."""

import json
import uuid
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from google.protobuf.struct_pb2 import ListValue, Struct, Value

from compat.suger.v1 import (
    usage_record_group_pb2,
    usage_record_group_pb2_grpc,
)
from metering.v1 import usage_record_group_pb2 as groups
from service.domain import quantities
from service.domain.pages import PAGE_SIZE_MAX
from service.domain.record_groups import GROUPS_MAX
from service.errors import NotFound, Reason, Violation, invalid
from service.rpc.compat import (
    chosen_id,
    in_their_words,
    names_of,
    read_choice,
    read_instant,
    read_limit,
)
from service.rpc.compat.bodies import answer, answer_all, json_of, read_array, read_object
from service.rpc.compat.suger import QUERY_NAMES, doubles, if_set, partner_name, read_partner
from service.rpc.interceptor import Context, check_organization, organization
from service.rpc.record_groups import UsageRecordGroupService
from service.rpc.wire import in_slices, raise_any, read_date, timestamp
from service.rpc.wire import record_groups as wire

# More digits than any amount has: a number of a filter is not written out beyond.
DIGITS_MAX = 400
# How fields of bodies and of queries are called.
_NAMES = names_of(
    usage_record_group_pb2.NewUsageRecordGroup,
    usage_record_group_pb2.NewBillableRecord,
    usage_record_group_pb2.NewMetaInfo,
)
_NATIVE_NAMES = {field.json_name: field.name for field in usage_record_group_pb2.NewMetaInfo.DESCRIPTOR.fields}
_TOTAL = "stripe_usage_record_summary_total_usage"


class SugerUsageRecordGroups(usage_record_group_pb2_grpc.UsageRecordGroupServiceServicer):
    """Suger's usage record groups; see usage_record_group.proto."""

    def __init__(self, group_service: UsageRecordGroupService) -> None:
        self._groups = group_service

    async def ListUsageRecordGroups(
        self, request: usage_record_group_pb2.ListUsageRecordGroupsRequest, context: Context
    ) -> usage_record_group_pb2.ListUsageRecordGroupsResponse:
        """See usage_record_group.proto."""
        check_organization(request.org_id)
        faults: list[Violation] = []
        source = None
        if request.HasField("source"):
            source = read_choice("source", request.source or "NONE", groups.UsageRecordGroupSource.items(), faults)
        native = groups.ListUsageRecordGroupsRequest(
            partner=read_partner(request.partner, faults),
            product_id=request.product_id,
            entitlement_id=request.entitlement_id,
            buyer_id=request.buyer_id,
            status=read_choice("status", request.status, groups.UsageRecordGroupStatus.items(), faults),
            source=source,
            meta_info=_native_filter(request.meta_info),
            start_date=request.start_date,
            end_date=request.end_date,
            page_size=read_limit(request, PAGE_SIZE_MAX, PAGE_SIZE_MAX),
            skip=request.offset,
        )
        raise_any(faults)
        with in_their_words(QUERY_NAMES):
            found = await self._groups.ListUsageRecordGroups(native, context)
        following = ""
        if found.next_page_token:
            following = f',"nextOffset":{request.offset + len(found.usage_record_groups)}'
        body = await answer_all(
            found.usage_record_groups,
            lambda one: json_of(_group(one)),
            f'{{"usageRecordGroups":[{{}}]{following}}}',
        )
        return usage_record_group_pb2.ListUsageRecordGroupsResponse(body=body)

    async def BatchValidateUsageRecordGroups(
        self, request: usage_record_group_pb2.BatchValidateUsageRecordGroupsRequest, context: Context
    ) -> usage_record_group_pb2.BatchValidateUsageRecordGroupsResponse:
        """See usage_record_group.proto."""
        check_organization(request.org_id)
        sent = await read_array(context, request.body, usage_record_group_pb2.NewUsageRecordGroup, GROUPS_MAX)
        # As they would be stored: each with an id, by which groups of the same content are told apart.
        natives = await in_slices(lambda one: _new_group(*one, one[1].id or str(uuid.uuid4())), enumerate(sent))
        with in_their_words(_NAMES, ("groups",)):
            items = await wire.new_groups(wire.Sent(natives, {}), ids_required=True)
            found = await self._groups.validate(items, context)
            raise_any(_numbered(i, fault) for i, faults in enumerate(found) for fault in faults)
        return usage_record_group_pb2.BatchValidateUsageRecordGroupsResponse(body=answer(""))

    async def BatchCreateUsageRecordGroups(
        self, request: usage_record_group_pb2.BatchCreateUsageRecordGroupsRequest, context: Context
    ) -> usage_record_group_pb2.BatchCreateUsageRecordGroupsResponse:
        """See usage_record_group.proto."""
        check_organization(request.org_id)
        sent = await read_array(context, request.body, usage_record_group_pb2.NewUsageRecordGroup, GROUPS_MAX)
        natives = await in_slices(
            lambda one: _new_group(*one, one[1].id or chosen_id(context, "suger batch", one[0])), enumerate(sent)
        )
        stored = await self._report(natives, context, "groups")
        body = await answer_all(stored, lambda one: json_of(_group(one)))
        return usage_record_group_pb2.BatchCreateUsageRecordGroupsResponse(body=body)

    async def ReportUsageRecordGroup(
        self, request: usage_record_group_pb2.ReportUsageRecordGroupRequest, context: Context
    ) -> usage_record_group_pb2.ReportUsageRecordGroupResponse:
        """See usage_record_group.proto."""
        check_organization(request.org_id)
        sent = await read_object(context, request.body, usage_record_group_pb2.NewUsageRecordGroup)
        if sent.entitlement_id and sent.entitlement_id != request.entitlement_id:
            text = f"is {sent.entitlement_id[:64]!r}, but the path names {request.entitlement_id[:64]!r}"
            raise invalid("entitlementID", Reason.FIELD_INVALID, text)
        sent.entitlement_id = request.entitlement_id
        native = _new_group(None, sent, sent.id or chosen_id(context, "suger group", request.entitlement_id))
        stored = await self._report([native], context, "groups[0].")
        return usage_record_group_pb2.ReportUsageRecordGroupResponse(body=answer(json_of(_group(stored[0]))))

    async def DeleteUsageRecordGroup(
        self, request: usage_record_group_pb2.DeleteUsageRecordGroupRequest, context: Context
    ) -> usage_record_group_pb2.DeleteUsageRecordGroupResponse:
        """See usage_record_group.proto."""
        await self._check_created(request, context)
        native = groups.DeleteUsageRecordGroupRequest(id=request.usage_record_group_id)
        deleted = await self._groups.DeleteUsageRecordGroup(native, context)
        return usage_record_group_pb2.DeleteUsageRecordGroupResponse(body=answer(json_of(_group(deleted.group))))

    async def RetryUsageRecordGroup(
        self, request: usage_record_group_pb2.RetryUsageRecordGroupRequest, context: Context
    ) -> usage_record_group_pb2.RetryUsageRecordGroupResponse:
        """See usage_record_group.proto."""
        await self._check_created(request, context)
        native = groups.RetryUsageRecordGroupRequest(id=request.usage_record_group_id)
        retried = await self._groups.RetryUsageRecordGroup(native, context)
        return usage_record_group_pb2.RetryUsageRecordGroupResponse(body=answer(json_of(_group(retried.group))))

    async def _report(
        self, natives: Sequence[groups.NewUsageRecordGroup], context: Context, prefix: str
    ) -> list[groups.UsageRecordGroup]:
        """Store groups, all or none, and return them as stored, in their order."""
        with in_their_words(_NAMES, (prefix,)):
            items = await wire.new_groups(wire.Sent(natives, {}), ids_required=True)
            reported = await self._groups.report(items, all_or_nothing=True)
        stored = []
        for native in natives:
            kept = reported.groups.get(native.id)
            if kept is not None:
                stored.append(wire.group(kept, organization()))
            else:  # the batch is larger than what is shown at once
                asked = groups.GetUsageRecordGroupRequest(id=native.id)
                stored.append((await self._groups.GetUsageRecordGroup(asked, context)).group)
        return stored

    async def _check_created(
        self,
        request: usage_record_group_pb2.DeleteUsageRecordGroupRequest
        | usage_record_group_pb2.RetryUsageRecordGroupRequest,
        context: Context,
    ) -> None:
        """Check whose the group is said to be, and when it is said to have been created."""
        check_organization(request.org_id)
        if not request.creation_date:
            return
        faults: list[Violation] = []
        day = read_date("creationDate", request.creation_date, faults)
        raise_any(faults)
        asked = groups.GetUsageRecordGroupRequest(id=request.usage_record_group_id)
        group = (await self._groups.GetUsageRecordGroup(asked, context)).group
        if group.create_time.ToDatetime().date() != day:
            raise NotFound(
                Reason.USAGE_RECORD_GROUP_NOT_FOUND,
                f"Usage record group {group.id} was not created on {request.creation_date}.",
                metadata={"id": group.id},
            )


def _numbered(i: int, fault: Violation) -> Violation:
    return Violation(f"groups[{i}].{fault.field}", fault.reason, fault.message)


def _native_filter(sent: str) -> str:
    """Return a filter on metaInfo with the names of meta_info; one that cannot be read stays, to be refused."""
    if not sent.lstrip().startswith("{"):
        name, equals, value = sent.partition("=")
        return f"{_NATIVE_NAMES.get(name, name)}{equals}{value}"
    try:
        wanted = json.loads(sent, parse_float=Decimal, parse_constant=_no_number, object_pairs_hook=_once)
        json.dumps(wanted, ensure_ascii=False, default=str).encode()  # fails for half of a surrogate pair
    except (ValueError, ArithmeticError, RecursionError):
        return sent
    found = {_NATIVE_NAMES.get(name, name): value for name, value in wanted.items()}
    found |= {name: _digits(found[name]) for name in wire.META_AMOUNTS if name in found}
    if isinstance(origin := found.get("origin_records"), dict):
        found["origin_records"] = {key: _digits(one) for key, one in origin.items()}
    if isinstance(records := found.get("billable_records"), list):
        found["billable_records"] = [_with_digits(one) for one in records]
    if isinstance(divided := found.get("usage_allocations"), dict):
        found["usage_allocations"] = {
            key: {"allocations": [_with_digits(one) for one in parts]} if isinstance(parts, list) else parts
            for key, parts in divided.items()
        }
    return json.dumps(found, ensure_ascii=False, default=str) if len(found) == len(wanted) else sent


def _digits(sent: Any) -> Any:
    """Return an amount or quantity of a filter as it is stored: a number as the string of its digits."""
    if isinstance(sent, bool) or not isinstance(sent, int | Decimal):
        return sent
    number = Decimal(sent)
    return quantities.plain(number) if abs(number.adjusted()) <= DIGITS_MAX else str(sent)


def _with_digits(sent: Any) -> Any:
    return {**sent, "quantity": _digits(sent["quantity"])} if isinstance(sent, dict) and "quantity" in sent else sent


def _no_number(text: str) -> Any:
    raise ValueError(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("one name twice")
    return dict(pairs)


def _quantity(path: str, sent: Value, faults: list[Violation]) -> str:
    """Read a number, or a string of its digits; null, like none at all, as nothing."""
    match sent.WhichOneof("kind"):
        case "number_value":
            return quantities.from_double(sent.number_value)
        case "string_value":
            return sent.string_value
        case "null_value" | None:
            return ""
        case _:
            faults.append(Violation(path, Reason.QUANTITY_INVALID, "must be a number"))
            return ""


def _quantities(path: str, sent: Mapping[str, Value], faults: list[Violation]) -> dict[str, str]:
    return {key: _quantity(f"{path}.{key}", one, faults) for key, one in sent.items()}


def _billable_records(
    path: str, sent: Sequence[usage_record_group_pb2.NewBillableRecord], faults: list[Violation]
) -> list[groups.BillableRecord]:
    return [
        groups.BillableRecord(
            key=one.key,
            properties=one.properties,
            quantity=_quantity(f"{path}[{i}].quantity", one.quantity, faults),
        )
        for i, one in enumerate(sent)
    ]


def _allocations(
    path: str, sent: Mapping[str, ListValue], faults: list[Violation]
) -> dict[str, groups.UsageAllocations]:
    found = {}
    for key, parts in sent.items():
        own = found[key] = groups.UsageAllocations()
        for i, part in enumerate(parts.values):
            fields = part.struct_value.fields
            allocation = own.allocations.add(
                quantity=_quantity(f"{path}.{key}[{i}].quantity", fields.get("quantity") or Value(), faults)
            )
            sent_tags = fields.get("tags", Value(null_value=0))  # type: ignore[arg-type]
            tags = sent_tags.list_value.values
            is_object = part.WhichOneof("kind") == "struct_value" and set(fields) <= {"quantity", "tags"}
            if not is_object or sent_tags.WhichOneof("kind") not in {"list_value", "null_value"}:
                text = "must be an object with quantity and tags, and nothing else"
                faults.append(Violation(f"{path}.{key}[{i}]", Reason.FIELD_INVALID, text))
            for j, tag in enumerate(tags):
                texts = {name: value.string_value for name, value in tag.struct_value.fields.items()}
                if set(texts) != {"key", "value"}:
                    text = "must be an object with key and value, both strings"
                    faults.append(Violation(f"{path}.{key}[{i}].tags[{j}]", Reason.FIELD_INVALID, text))
                allocation.tags.add(key=texts.get("key", ""), value=texts.get("value", ""))
    return found


def _new_group(
    index: int | None, sent: usage_record_group_pb2.NewUsageRecordGroup, group_id: str
) -> groups.NewUsageRecordGroup:
    """Translate a group to validate or report; raises InvalidArgument for what the native message cannot even hold."""
    at = "" if index is None else f"[{index}]."
    faults: list[Violation] = []
    if sent.organization_id:
        check_organization(sent.organization_id)
    allocations = _allocations(f"{at}usageAllocations", sent.usage_allocations, faults)
    native = groups.NewUsageRecordGroup(
        id=group_id,
        entitlement_id=sent.entitlement_id,
        records=_quantities(f"{at}records", sent.records, faults),
        billable_records=_billable_records(f"{at}billableRecords", sent.billable_records, faults),
        timestamp=timestamp(read_instant(f"{at}timestamp", sent.timestamp, faults)),
    )
    meta, inside = sent.meta_info, f"{at}metaInfo."
    if sent.HasField("meta_info"):
        own = _allocations(f"{inside}usageAllocations", meta.usage_allocations, faults)
        if own and allocations and own != allocations:
            text = "differ from those of the group"
            faults.append(Violation(f"{inside}usageAllocations", Reason.META_INFO_MISMATCH, text))
        allocations = allocations or own
        source: Any = 0
        if meta.HasField("source"):
            source = read_choice(
                f"{inside}source",
                meta.source or "NONE",
                groups.UsageRecordGroupSource.items(),
                faults,
            )
        if abs(meta.stripe_usage_record_summary_total_usage) > quantities.INTEGER_MAX:
            text = f"must be a whole number of at most {quantities.INTEGER_MAX}"
            faults.append(Violation(f"{inside}{_NAMES[_TOTAL]}", Reason.FIELD_INVALID, text))
        given: dict[str, Any] = {name: getattr(meta, name) for name in wire.META_TEXTS}
        for name in wire.META_AMOUNTS:
            given[name] = _quantity(f"{inside}{_NAMES[name]}", getattr(meta, name), faults)
        for name in wire.META_TIMES:
            given[name] = timestamp(read_instant(f"{inside}{_NAMES[name]}", getattr(meta, name), faults))
        native.meta_info.CopyFrom(
            groups.UsageRecordGroupMetaInfo(
                source=source,
                timestamp=timestamp(read_instant(f"{inside}timestamp", meta.timestamp, faults)),
                skip_validation=meta.skip_validation,
                billable_records=_billable_records(f"{inside}billableRecords", meta.billable_records, faults),
                origin_records=_quantities(f"{inside}originRecords", meta.origin_records, faults),
                metronome_invoice_credit_back=meta.metronome_invoice_credit_back,
                stripe_usage_record_summary_total_usage=meta.stripe_usage_record_summary_total_usage,
                **given,
            )
        )
    for key, parts in allocations.items():
        native.meta_info.usage_allocations[key].CopyFrom(parts)
    raise_any(faults)
    return native


def _group(group: groups.UsageRecordGroup) -> usage_record_group_pb2.UsageRecordGroup:
    return usage_record_group_pb2.UsageRecordGroup(
        id=group.id,
        organization_id=group.organization_id,
        partner=partner_name(group.partner),
        buyer_id=group.buyer_id,
        entitlement_id=group.entitlement_id,
        records=doubles(group.records),
        records_decimal=group.records,
        meta_info=_meta_info(group.meta_info),
        status=groups.UsageRecordGroupStatus.Name(group.status).removeprefix("USAGE_RECORD_GROUP_STATUS_"),
        serial_id=group.serial_id,
        usage_record_report_id=group.usage_record_report_id,
        creation_time=group.create_time,
        last_update_time=group.update_time,
        reported_time=if_set(group, "reported_time"),
        invalid_reasons=[f"{one.field}: {one.message}" for one in group.invalid_reasons],
    )


def _meta_info(meta: groups.UsageRecordGroupMetaInfo) -> usage_record_group_pb2.MetaInfo:
    allocations = None
    if meta.usage_allocations:
        allocations = Struct()
        for key, parts in meta.usage_allocations.items():
            allocations[key] = [
                {
                    "quantity": float(one.quantity),
                    "quantityDecimal": one.quantity,
                    "tags": [{"key": tag.key, "value": tag.value} for tag in one.tags],
                }
                for one in parts.allocations
            ]
    amounts = {name: str(getattr(meta, name)) for name in wire.META_AMOUNTS if getattr(meta, name)}
    given: dict[str, Any] = {name: getattr(meta, name) for name in wire.META_TEXTS}
    given |= {name: float(amount) for name, amount in amounts.items()}
    given |= {name: if_set(meta, name) for name in wire.META_TIMES}
    source = groups.UsageRecordGroupSource.Name(meta.source).removeprefix("USAGE_RECORD_GROUP_SOURCE_")
    return usage_record_group_pb2.MetaInfo(
        skip_validation=meta.skip_validation or None,
        billable_records=[
            usage_record_group_pb2.BillableRecord(
                key=one.key,
                properties=one.properties,
                quantity=float(one.quantity),
                quantity_decimal=one.quantity,
            )
            for one in meta.billable_records
        ],
        origin_records=doubles(meta.origin_records),
        origin_records_decimal=meta.origin_records,
        source="" if source == "NONE" else source,
        timestamp=if_set(meta, "timestamp"),
        metronome_invoice_credit_back=meta.metronome_invoice_credit_back or None,
        stripe_usage_record_summary_total_usage=getattr(meta, _TOTAL) or None,
        usage_allocations=allocations,
        amounts_decimal={_NAMES[name]: amount for name, amount in amounts.items()},
        **given,
    )
