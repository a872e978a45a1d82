"""Suger's API: what its SDKs send and expect, told in the native RPCs; see protos/compat/suger."""

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from compat.suger.v1 import (
    billable_metric_pb2,
    billable_metric_pb2_grpc,
    entitlement_pb2,
    entitlement_pb2_grpc,
    usage_record_group_pb2,
    usage_record_group_pb2_grpc,
    usage_record_report_pb2,
    usage_record_report_pb2_grpc,
)
from metering.v1 import billable_metric_pb2 as metrics
from metering.v1 import entitlement_pb2 as entitlements
from metering.v1 import usage_record_group_pb2 as groups
from metering.v1 import usage_record_report_pb2 as reports
from service.database import Database
from service.domain import checks, quantities
from service.domain.metrics import QUANTITY
from service.domain.record_groups import GROUPS_MAX
from service.errors import FailedPrecondition, InvalidArgument, NotFound, Reason, Violation, invalid
from service.rpc.billable_metrics import BillableMetricService
from service.rpc.compat import (
    answer,
    answer_all,
    chosen_id,
    in_their_words,
    json_of,
    names_of,
    read_array,
    read_choice,
    read_instant,
    read_limit,
    read_object,
)
from service.rpc.entitlements import EntitlementService
from service.rpc.interceptor import Context, check_organization, organization
from service.rpc.record_groups import UsageRecordGroupService
from service.rpc.record_reports import UsageRecordReportService
from service.rpc.wire import in_slices, raise_any, read_date, timestamp
from service.rpc.wire import record_groups as wire
from service.store import metrics as metric_store

PAGE_MAX = 1_000
DIMENSIONS_MAX = 50
HOUR = timedelta(hours=1)
NAME_MIN, NAME_MAX = 4, 50
DESCRIPTION_MAX = 300
METRIC_ID_MAX = 36
# More digits than any amount has: a number of a filter is not written out beyond.
DIGITS_MAX = 400
# The note of a metric that holds Suger's description of it.
DESCRIPTION = "description"

# How fields of bodies and of queries are called.
_NAMES = names_of(
    usage_record_group_pb2.NewUsageRecordGroup,
    usage_record_group_pb2.NewBillableRecord,
    usage_record_group_pb2.NewMetaInfo,
)
_QUERY_NAMES = names_of(
    usage_record_group_pb2.ListUsageRecordGroupsRequest,
    usage_record_report_pb2.ListUsageRecordReportsRequest,
    entitlement_pb2.ListEntitlementsRequest,
) | {"page_size": "limit", "skip": "offset"}
_NATIVE_NAMES = {field.json_name: field.name for field in usage_record_group_pb2.NewMetaInfo.DESCRIPTOR.fields}
_AMOUNTS = (
    "lago_amount",
    "metronome_daily_cost_amount",
    "metronome_monthly_invoice_amount",
    "metronome_monthly_invoice_amount_adjusted",
    "metronome_invoice_credit_back_amount",
)
_TEXTS = (
    "lago_subscription_id",
    "metronome_invoice_id",
    "stripe_invoice_id",
    "stripe_subscription_item_id",
    "stripe_usage_record_summary_id",
    "erp_invoice_id",
)
_TIMES = ("lago_usage_start_time", "stripe_period_start_time", "stripe_period_end_time")
_TOTAL = "stripe_usage_record_summary_total_usage"
_AGGREGATIONS = {"COUNT": "COUNT", "UNIQUE_COUNT": "UNIQUE", "SUM": "SUM", "MAX": "MAX", "LAST": "LATEST"}
_THEIR_AGGREGATIONS = {ours: theirs for theirs, ours in _AGGREGATIONS.items()}
_OPERATIONS = {
    "IS": "in",
    "EQ": "in",
    "NOT_IS": "not_in",
    "NOT_EQ": "not_in",
    "EXISTS": "exists",
    "NOT_EXISTS": "not_exists",
}
_METRICS = uuid.UUID("3c1f9d5e-21a7-5f0e-8d0b-6f4b7f1c9a52")
_REPORT_STATUSES = {
    reports.USAGE_RECORD_REPORT_STATUS_PENDING: "CREATED",
    reports.USAGE_RECORD_REPORT_STATUS_SUCCEEDED: "SUCCESS",
    reports.USAGE_RECORD_REPORT_STATUS_FAILED: "FAILED",
}


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
            partner=_partner(request.partner, faults),
            product_id=request.product_id,
            entitlement_id=request.entitlement_id,
            buyer_id=request.buyer_id,
            status=read_choice("status", request.status, groups.UsageRecordGroupStatus.items(), faults),
            source=source,
            meta_info=_native_filter(request.meta_info),
            start_date=request.start_date,
            end_date=request.end_date,
            page_size=read_limit(request, PAGE_MAX, PAGE_MAX),
            skip=request.offset,
        )
        raise_any(faults)
        with in_their_words(_QUERY_NAMES):
            found = await self._groups.ListUsageRecordGroups(native, context)
        shown = await in_slices(_group, found.usage_record_groups)
        following = request.offset + len(shown) if found.next_page_token else None
        return usage_record_group_pb2.ListUsageRecordGroupsResponse(usage_record_groups=shown, next_offset=following)

    async def BatchValidateUsageRecordGroups(
        self, request: usage_record_group_pb2.BatchValidateUsageRecordGroupsRequest, context: Context
    ) -> usage_record_group_pb2.BatchValidateUsageRecordGroupsResponse:
        """See usage_record_group.proto."""
        check_organization(request.org_id)
        sent = await read_array(request.body, usage_record_group_pb2.NewUsageRecordGroup, GROUPS_MAX)
        natives = [_new_group(i, one, one.id) for i, one in enumerate(sent)]
        with in_their_words(_NAMES, ("groups",)):
            items = await wire.new_groups(wire.Sent(natives, {}), ids_required=False)
            found = await self._groups.validate(items, context)
            raise_any(_numbered(i, fault) for i, faults in enumerate(found) for fault in faults)
        return usage_record_group_pb2.BatchValidateUsageRecordGroupsResponse(body=answer(""))

    async def BatchCreateUsageRecordGroups(
        self, request: usage_record_group_pb2.BatchCreateUsageRecordGroupsRequest, context: Context
    ) -> usage_record_group_pb2.BatchCreateUsageRecordGroupsResponse:
        """See usage_record_group.proto."""
        check_organization(request.org_id)
        sent = await read_array(request.body, usage_record_group_pb2.NewUsageRecordGroup, GROUPS_MAX)
        natives = [_new_group(i, one, one.id or chosen_id(context, "group", i)) for i, one in enumerate(sent)]
        stored = await self._report(natives, context, "groups")
        return usage_record_group_pb2.BatchCreateUsageRecordGroupsResponse(body=await answer_all(stored, _group))

    async def ReportUsageRecordGroup(
        self, request: usage_record_group_pb2.ReportUsageRecordGroupRequest, context: Context
    ) -> usage_record_group_pb2.ReportUsageRecordGroupResponse:
        """See usage_record_group.proto."""
        check_organization(request.org_id)
        sent = await read_object(request.body, usage_record_group_pb2.NewUsageRecordGroup)
        if sent.entitlement_id and sent.entitlement_id != request.entitlement_id:
            text = f"is {sent.entitlement_id[:64]!r}, but the path names {request.entitlement_id[:64]!r}"
            raise invalid("entitlementID", Reason.FIELD_INVALID, text)
        sent.entitlement_id = request.entitlement_id
        native = _new_group(None, sent, sent.id or chosen_id(context, "group", request.entitlement_id))
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


class SugerUsageRecordReports(usage_record_report_pb2_grpc.UsageRecordReportServiceServicer):
    """Suger's hourly reports; see usage_record_report.proto."""

    def __init__(self, report_service: UsageRecordReportService) -> None:
        self._reports = report_service

    async def ListUsageRecordReports(
        self, request: usage_record_report_pb2.ListUsageRecordReportsRequest, context: Context
    ) -> usage_record_report_pb2.ListUsageRecordReportsResponse:
        """See usage_record_report.proto."""
        check_organization(request.org_id)
        faults: list[Violation] = []
        native = reports.ListUsageRecordReportsRequest(
            partner=_partner(request.partner, faults),
            entitlement_id=request.entitlement_id,
            buyer_id=request.buyer_id,
            start_date=request.start_date,
            end_date=request.end_date,
            page_size=read_limit(request, PAGE_MAX, PAGE_MAX),
            skip=request.offset,
        )
        raise_any(faults)
        with in_their_words(_QUERY_NAMES):
            found = await self._reports.ListUsageRecordReports(native, context)
        shown = await in_slices(_report, found.usage_record_reports)
        following = request.offset + len(shown) if found.next_page_token else None
        return usage_record_report_pb2.ListUsageRecordReportsResponse(usage_record_reports=shown, next_offset=following)


class SugerEntitlements(entitlement_pb2_grpc.EntitlementServiceServicer):
    """Suger's entitlements; see entitlement.proto."""

    def __init__(self, entitlement_service: EntitlementService) -> None:
        self._entitlements = entitlement_service

    async def GetEntitlement(
        self, request: entitlement_pb2.GetEntitlementRequest, context: Context
    ) -> entitlement_pb2.GetEntitlementResponse:
        """See entitlement.proto."""
        check_organization(request.org_id)
        with in_their_words({"id": "entitlementId"}):
            found = await self._entitlements.GetEntitlement(
                entitlements.GetEntitlementRequest(id=request.entitlement_id), context
            )
        return entitlement_pb2.GetEntitlementResponse(body=answer(json_of(_entitlement(found.entitlement))))

    async def ListEntitlements(
        self, request: entitlement_pb2.ListEntitlementsRequest, context: Context
    ) -> entitlement_pb2.ListEntitlementsResponse:
        """See entitlement.proto."""
        check_organization(request.org_id)
        faults: list[Violation] = []
        native = entitlements.ListEntitlementsRequest(
            partner=_partner(request.partner, faults),
            product_id=request.product_id,
            buyer_id=request.buyer_id,
            page_size=read_limit(request, PAGE_MAX, PAGE_MAX),
            skip=request.offset,
        )
        raise_any(faults)
        with in_their_words(_QUERY_NAMES):
            found = await self._entitlements.ListEntitlements(native, context)
        return entitlement_pb2.ListEntitlementsResponse(body=await answer_all(found.entitlements, _entitlement))


class SugerBillableMetrics(billable_metric_pb2_grpc.BillableMetricServiceServicer):
    """Suger's billable metrics; see billable_metric.proto."""

    def __init__(self, database: Database, metric_service: BillableMetricService) -> None:
        """Find metrics by their keys in `database`."""
        self._database = database
        self._metrics = metric_service

    async def ListBillableMetrics(
        self, request: billable_metric_pb2.ListBillableMetricsRequest, context: Context
    ) -> billable_metric_pb2.ListBillableMetricsResponse:
        """See billable_metric.proto."""
        check_organization(request.org_id)
        if request.status not in {"", "ACTIVE", "DELETED"}:
            raise invalid("status", Reason.FIELD_INVALID, "must be one of ACTIVE, DELETED")
        found: list[metrics.BillableMetric] = []
        token = ""
        while True:
            native = metrics.ListBillableMetricsRequest(
                include_archived=request.status != "ACTIVE", page_size=PAGE_MAX, page_token=token
            )
            page = await self._metrics.ListBillableMetrics(native, context)
            # Record metrics are how records are summed: no caller made them.
            found += [one for one in page.billable_metrics if not one.record_key]
            token = page.next_page_token
            if not token:
                break
        if request.status == "DELETED":
            found = [one for one in found if one.HasField("archive_time")]
        return billable_metric_pb2.ListBillableMetricsResponse(body=await answer_all(found, _metric))

    async def GetBillableMetric(
        self, request: billable_metric_pb2.GetBillableMetricRequest, context: Context
    ) -> billable_metric_pb2.GetBillableMetricResponse:
        """See billable_metric.proto."""
        metric = await self._find(request, context)
        return billable_metric_pb2.GetBillableMetricResponse(body=answer(json_of(_metric(metric))))

    async def CreateBillableMetric(
        self, request: billable_metric_pb2.CreateBillableMetricRequest, context: Context
    ) -> billable_metric_pb2.CreateBillableMetricResponse:
        """See billable_metric.proto."""
        check_organization(request.org_id)
        body = await read_object(request.body, billable_metric_pb2.BillableMetric)
        faults: list[Violation | None] = []
        if body.id:
            faults.append(checks.identifier("id", body.id, most=METRIC_ID_MAX))
        key = body.id or chosen_id(context, "metric key")
        metric = metrics.BillableMetric(
            # The same key is the same metric, however often it is created.
            id=chosen_id(context, "metric") if not body.id else _metric_uuid(body.id),
            key=key,
            name=body.name,
            aggregation_type=metrics.AggregationType.Value(f"AGGREGATION_TYPE_{_AGGREGATIONS[body.aggregation_type]}")
            if body.aggregation_type in _AGGREGATIONS
            else metrics.AGGREGATION_TYPE_UNSPECIFIED,
            event_type_filter=metrics.EventTypeFilter(in_values=[key]),
            custom_fields={DESCRIPTION: body.description} if body.description else {},
        )
        if body.aggregation_type not in _AGGREGATIONS:
            text = f"must be one of {', '.join(_AGGREGATIONS)}"
            faults.append(Violation("aggregationType", Reason.FIELD_INVALID, text))
        elif body.aggregation_type == "UNIQUE_COUNT":
            metric.aggregation_key = body.info.property_unique_on
            if not body.info.property_unique_on:
                text = "is required with UNIQUE_COUNT: the property whose values are counted"
                faults.append(Violation("info.propertyUniqueOn", Reason.FIELD_REQUIRED, text))
        elif body.aggregation_type != "COUNT":
            metric.aggregation_key = QUANTITY
        faults += _name_faults(body.name, body.description)
        own: list[Violation] = []
        metric.property_filters.extend(_filters(body.info.filter_groups, own))
        if body.info.group_bys:
            metric.group_keys.add(properties=body.info.group_bys)
        if body.organization_id:
            check_organization(body.organization_id)
        raise_any([*faults, *own])
        names = {"aggregation_key": "info.propertyUniqueOn", "group_keys": "info.groupBys", "key": "id"}
        names |= {"property_filters": "info.filterGroups"}
        with in_their_words(names, ("billable_metric.",)):
            created = await self._metrics.CreateBillableMetric(
                metrics.CreateBillableMetricRequest(billable_metric=metric), context
            )
        return billable_metric_pb2.CreateBillableMetricResponse(body=answer(json_of(_metric(created.billable_metric))))

    async def UpdateBillableMetric(
        self, request: billable_metric_pb2.UpdateBillableMetricRequest, context: Context
    ) -> billable_metric_pb2.UpdateBillableMetricResponse:
        """See billable_metric.proto."""
        metric = await self._find(request, context)
        body = await read_object(request.body, billable_metric_pb2.UpdateBillableMetricBody)
        name = body.name if body.HasField("name") else None
        description = body.description if body.HasField("description") else None
        faults = _name_faults(name, description)
        if body.HasField("status") and body.status not in {"ACTIVE", "DELETED"}:
            faults.append(Violation("status", Reason.FIELD_INVALID, "must be one of ACTIVE, DELETED"))
        raise_any(faults)
        if body.HasField("status") and body.status == "ACTIVE" and metric.HasField("archive_time"):
            text = f"Billable metric {request.billable_metric_id} is DELETED, which cannot be undone."
            raise FailedPrecondition(Reason.STATUS_TRANSITION, text, metadata={"id": request.billable_metric_id})
        mask = FieldMask()
        if name is not None:
            metric.name = name
            mask.paths.append("name")
        if description is not None:
            metric.custom_fields[DESCRIPTION] = description
            mask.paths.append("custom_fields")
        if mask.paths:
            native = metrics.UpdateBillableMetricRequest(billable_metric=metric, update_mask=mask)
            with in_their_words({}, ("billable_metric.",)):
                metric = (await self._metrics.UpdateBillableMetric(native, context)).billable_metric
        if body.status == "DELETED":
            archive = metrics.ArchiveBillableMetricRequest(id=metric.id)
            metric = (await self._metrics.ArchiveBillableMetric(archive, context)).billable_metric
        return billable_metric_pb2.UpdateBillableMetricResponse(body=answer(json_of(_metric(metric))))

    async def _find(
        self,
        request: billable_metric_pb2.GetBillableMetricRequest | billable_metric_pb2.UpdateBillableMetricRequest,
        context: Context,
    ) -> metrics.BillableMetric:
        """Return the metric that has this key, or else this UUID."""
        check_organization(request.org_id)
        wanted, org = request.billable_metric_id, organization()
        raise_any([checks.identifier("billableMetricId", wanted)])
        by_key = await self._database.read(
            lambda c: metric_store.metrics_by_key(c, org, [wanted]), timeout_s=context.time_remaining()
        )
        metric_id = str(by_key[wanted].id) if wanted in by_key else wanted
        try:
            found = await self._metrics.GetBillableMetric(metrics.GetBillableMetricRequest(id=metric_id), context)
        except InvalidArgument:
            message = f"Billable metric {wanted!r} does not exist."
            raise NotFound(Reason.BILLABLE_METRIC_NOT_FOUND, message, metadata={"ids": wanted}) from None
        return found.billable_metric


def _partner(text: str, faults: list[Violation]) -> Any:
    return read_choice("partner", text, entitlements.Partner.items(), faults)


def _numbered(i: int, fault: Violation) -> Violation:
    return Violation(f"groups[{i}].{fault.field}", fault.reason, fault.message)


def _native_filter(sent: str) -> str:
    """Return a filter on metaInfo with the names of meta_info; one that cannot be read stays, to be refused."""
    if not sent.lstrip().startswith("{"):
        name, equals, value = sent.partition("=")
        return f"{_NATIVE_NAMES.get(name, name)}{equals}{value}"
    try:
        wanted = json.loads(sent, parse_float=Decimal, parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, ArithmeticError, RecursionError):
        return sent
    found = {_NATIVE_NAMES.get(name, name): value for name, value in wanted.items()}
    found |= {name: _digits(found[name]) for name in _AMOUNTS if name in found}
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
            unknown = sorted(set(fields) - {"quantity", "tags"})
            tags = fields["tags"].list_value.values if "tags" in fields else ()
            if part.WhichOneof("kind") != "struct_value" or unknown:
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
        given: dict[str, Any] = {name: getattr(meta, name) for name in _TEXTS}
        for name in _AMOUNTS:
            given[name] = _quantity(f"{inside}{_NAMES[name]}", getattr(meta, name), faults)
        for name in _TIMES:
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


def _doubles(decimals: Mapping[str, str]) -> dict[str, float]:
    return {key: float(one) for key, one in decimals.items()}


def _partner_name(partner: Any) -> str | None:
    return entitlements.Partner.Name(partner).removeprefix("PARTNER_") if partner else None


def _if_set(message: Message, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _group(group: groups.UsageRecordGroup) -> usage_record_group_pb2.UsageRecordGroup:
    return usage_record_group_pb2.UsageRecordGroup(
        id=group.id,
        organization_id=group.organization_id,
        partner=_partner_name(group.partner),
        buyer_id=group.buyer_id,
        entitlement_id=group.entitlement_id,
        records=_doubles(group.records),
        records_decimal=group.records,
        meta_info=_meta_info(group.meta_info),
        status=groups.UsageRecordGroupStatus.Name(group.status).removeprefix("USAGE_RECORD_GROUP_STATUS_"),
        serial_id=group.serial_id,
        usage_record_report_id=group.usage_record_report_id,
        creation_time=group.create_time,
        last_update_time=group.update_time,
        reported_time=_if_set(group, "reported_time"),
        invalid_reasons=[f"{one.field}: {one.message}" for one in group.invalid_reasons],
    )


def _meta_info(meta: groups.UsageRecordGroupMetaInfo) -> usage_record_group_pb2.MetaInfo:
    allocations = None
    if meta.usage_allocations:
        allocations = Struct()
        for key, parts in meta.usage_allocations.items():
            allocations[key] = [
                {"quantity": float(one.quantity), "tags": [{"key": tag.key, "value": tag.value} for tag in one.tags]}
                for one in parts.allocations
            ]
    amounts = {name: str(getattr(meta, name)) for name in _AMOUNTS if getattr(meta, name)}
    given: dict[str, Any] = {name: getattr(meta, name) for name in _TEXTS}
    given |= {name: float(amount) for name, amount in amounts.items()}
    given |= {name: _if_set(meta, name) for name in _TIMES}
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
        origin_records=_doubles(meta.origin_records),
        origin_records_decimal=meta.origin_records,
        source="" if source == "NONE" else source,
        timestamp=_if_set(meta, "timestamp"),
        metronome_invoice_credit_back=meta.metronome_invoice_credit_back or None,
        stripe_usage_record_summary_total_usage=getattr(meta, _TOTAL) or None,
        usage_allocations=allocations,
        amounts_decimal={_NAMES[name]: amount for name, amount in amounts.items()},
        **given,
    )


def _report(report: reports.UsageRecordReport) -> usage_record_report_pb2.UsageRecordReport:
    told = {one.key: one.quantity for one in report.records}
    before = {one.key: one.decimal_parts_before for one in report.records}
    after = {one.key: one.decimal_parts_after for one in report.records}
    start = report.marketplace_time.ToDatetime()
    info = usage_record_report_pb2.UsageRecordReportInfo(
        start_time=report.marketplace_time,
        status=_REPORT_STATUSES.get(report.status, ""),
        message="; ".join(f"{one.key}: {one.message}" for one in report.records if one.message),
        reported_records=_doubles(told),
        reported_records_decimal=told,
        decimal_parts=_doubles(before),
        decimal_parts_decimal=before,
        new_decimal_parts=_doubles(after),
        new_decimal_parts_decimal=after,
    )
    info.end_time.FromDatetime(start + HOUR)
    return usage_record_report_pb2.UsageRecordReport(
        id=report.id,
        organization_id=report.organization_id,
        partner=_partner_name(report.partner),
        product_id=report.product_id,
        entitlement_id=report.entitlement_id,
        buyer_id=report.buyer_id,
        creation_time=report.create_time,
        info=info,
    )


def _entitlement(entitlement: entitlements.Entitlement) -> entitlement_pb2.Entitlement:
    dimensions = entitlement.dimensions
    return entitlement_pb2.Entitlement(
        id=entitlement.id,
        name=entitlement.name,
        organization_id=organization(),
        partner=_partner_name(entitlement.partner),
        product_id=entitlement.product_id,
        buyer_id=entitlement.buyer_id,
        status=entitlements.EntitlementStatus.Name(entitlement.status).removeprefix("ENTITLEMENT_STATUS_"),
        start_time=entitlement.starting_on,
        end_time=_if_set(entitlement, "ending_before"),
        creation_time=entitlement.create_time,
        last_update_time=entitlement.update_time,
        info=entitlement_pb2.EntitlementInfo(
            dimensions=[
                entitlement_pb2.MeteringDimension(key=one.key, name=one.name) for one in dimensions[:DIMENSIONS_MAX]
            ],
            dimensions_oversized=len(dimensions) > DIMENSIONS_MAX,
        ),
    )


def _metric_uuid(key: str) -> str:
    """Return the UUID of the metric that is created under a key: the same for the same key."""
    return str(uuid.uuid5(_METRICS, json.dumps([organization(), key])))


def _name_faults(name: str | None, description: str | None) -> list[Violation]:
    faults = []
    if name is not None and not NAME_MIN <= len(name) <= NAME_MAX:
        faults.append(Violation("name", Reason.FIELD_INVALID, f"must have {NAME_MIN}..{NAME_MAX} characters"))
    if description is not None and len(description) > DESCRIPTION_MAX:
        text = f"has {len(description)} characters; at most {DESCRIPTION_MAX} are allowed"
        faults.append(Violation("description", Reason.LIMIT_EXCEEDED, text))
    return faults


def _filters(
    filter_groups: Sequence[billable_metric_pb2.FilterGroup], faults: list[Violation]
) -> list[metrics.PropertyFilter]:
    """Translate filters: groups all must pass, of the filters in a group one."""
    found = []
    for i, group in enumerate(filter_groups):
        path = f"info.filterGroups[{i}]"
        names = {one.name for one in group.filters}
        kinds = {_OPERATIONS.get(one.operation) for one in group.filters}
        if len(group.filters) != 1 and (len(names) != 1 or kinds != {"in"}):
            text = "must have one filter, or only IS or EQ filters of the same property"
            faults.append(Violation(path, Reason.FIELD_INVALID, text))
            continue
        values: list[str] = []
        for j, one in enumerate(group.filters):
            here = f"{path}.filters[{j}]"
            if one.operation not in _OPERATIONS:
                text = f"{one.operation!r} is not supported; there are {', '.join(_OPERATIONS)}"
                faults.append(Violation(f"{here}.operation", Reason.FIELD_INVALID, text))
            elif _OPERATIONS[one.operation] in {"in", "not_in"}:
                values += _filter_values(f"{here}.value", one.value, faults)
        name = group.filters[0].name
        if kinds == {"in"}:
            found.append(metrics.PropertyFilter(name=name, in_values=values))
        elif kinds == {"not_in"}:
            found.append(metrics.PropertyFilter(name=name, not_in_values=values))
        else:
            found.append(metrics.PropertyFilter(name=name, exists=kinds == {"exists"}))
    return found


def _filter_values(path: str, sent: Value, faults: list[Violation]) -> list[str]:
    """Read the value of a filter, or those of a list, as the text by which properties are compared."""
    kind = sent.WhichOneof("kind")
    if kind == "struct_value" and set(sent.struct_value.fields) == {"value"}:
        return _filter_values(f"{path}.value", sent.struct_value.fields["value"], faults)
    values = sent.list_value.values if kind == "list_value" else [sent]
    texts = []
    for one in values:
        match one.WhichOneof("kind"):
            case "string_value":
                texts.append(one.string_value)
            case "number_value":
                texts.append(quantities.from_double(one.number_value))
            case "bool_value":
                texts.append("true" if one.bool_value else "false")
            case _:
                text = 'must be a string, number or boolean, a list of them, or {"value": …} around one of these'
                faults.append(Violation(path, Reason.FIELD_INVALID, text))
    return texts


def _metric(metric: metrics.BillableMetric) -> billable_metric_pb2.BillableMetric:
    aggregation = metrics.AggregationType.Name(metric.aggregation_type).removeprefix("AGGREGATION_TYPE_")
    archived = metric.HasField("archive_time")
    filters = []
    for one in metric.property_filters:
        for operation, values in (("IS", one.in_values), ("NOT_IS", one.not_in_values)):
            if values:
                value = Value()
                value.struct_value.update({"value": values[0] if len(values) == 1 else list(values)})
                filters.append(
                    billable_metric_pb2.Filter(name=one.name, operation=operation, value=value, value_type="STRING")
                )
        if one.HasField("exists"):
            filters.append(
                billable_metric_pb2.Filter(name=one.name, operation="EXISTS" if one.exists else "NOT_EXISTS")
            )
    return billable_metric_pb2.BillableMetric(
        id=metric.key or metric.id,
        name=metric.name,
        description=metric.custom_fields.get(DESCRIPTION, ""),
        aggregation_type=_THEIR_AGGREGATIONS.get(aggregation, aggregation),
        info=billable_metric_pb2.BillableMetricInfo(
            filter_groups=[billable_metric_pb2.FilterGroup(filters=[one]) for one in filters],
            group_bys=[name for key in metric.group_keys for name in key.properties],
            property_unique_on=metric.aggregation_key if aggregation == "UNIQUE" else "",
        ),
        status="DELETED" if archived else "ACTIVE",
        organization_id=organization(),
        creation_time=metric.create_time,
        last_update_time=metric.archive_time if archived else metric.create_time,
    )
