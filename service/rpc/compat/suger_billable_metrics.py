"""Suger's billable metrics: what its SDKs send and expect, told in the native RPCs; see protos/compat/suger."""

import json
import uuid
from collections.abc import Sequence

from google.protobuf.struct_pb2 import Value

from compat.suger.v1 import (
    billable_metric_pb2,
    billable_metric_pb2_grpc,
)
from metering.v1 import billable_metric_pb2 as metrics
from service.database import Database
from service.domain import checks, quantities
from service.domain.metrics import QUANTITY
from service.domain.pages import PAGE_SIZE_MAX
from service.errors import FailedPrecondition, InvalidArgument, NotFound, Reason, Violation, invalid
from service.rpc.billable_metrics import BillableMetricService
from service.rpc.compat import (
    chosen_id,
    in_their_words,
)
from service.rpc.compat.bodies import ANSWER_BYTES_MAX, answer, answer_all, json_of, read_object
from service.rpc.interceptor import Context, check_organization, organization
from service.rpc.wire import billable_metrics as wire
from service.rpc.wire import raise_any
from service.store import metrics as metric_store

NAME_MIN, NAME_MAX = 4, 50
DESCRIPTION_MAX = 300
METRIC_ID_MAX = 36
# The note of a metric that holds Suger's description of it.
DESCRIPTION = "description"
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
        status = request.status.upper()
        if status not in {"", "ACTIVE", "DELETED"}:
            raise invalid("status", Reason.FIELD_INVALID, "must be one of ACTIVE, DELETED")
        found: list[metrics.BillableMetric] = []
        token = ""
        while True:
            native = metrics.ListBillableMetricsRequest(
                include_archived=status != "ACTIVE", page_size=PAGE_SIZE_MAX, page_token=token
            )
            page = await self._metrics.ListBillableMetrics(native, context)
            # Record metrics are how records are summed: no caller made them.
            found += [one for one in page.billable_metrics if not one.record_key]
            token = page.next_page_token
            if not token:
                break
        if status == "DELETED":
            found = [one for one in found if one.HasField("archive_time")]
        body = await answer_all(found, lambda one: json_of(_metric(one)))
        if len(body.data) > ANSWER_BYTES_MAX:
            # Suger's list has no pages.
            text = f"finds more than {ANSWER_BYTES_MAX:,} bytes of metrics: list them in pages, with metering.v1"
            raise invalid("status", Reason.LIMIT_EXCEEDED, text)
        return billable_metric_pb2.ListBillableMetricsResponse(body=body)

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
        body = await read_object(context, request.body, billable_metric_pb2.BillableMetric)
        faults: list[Violation | None] = []
        if body.id:
            faults.append(checks.identifier("id", body.id, most=METRIC_ID_MAX))
        aggregation = body.aggregation_type.upper()
        key = body.id or chosen_id(context, "suger metric key")
        metric = metrics.BillableMetric(
            # The same key is the same metric, however often it is created.
            id=chosen_id(context, "suger metric") if not body.id else _metric_uuid(body.id),
            key=key,
            name=body.name,
            aggregation_type=metrics.AggregationType.Value(f"AGGREGATION_TYPE_{_AGGREGATIONS[aggregation]}")
            if aggregation in _AGGREGATIONS
            else metrics.AGGREGATION_TYPE_UNSPECIFIED,
            event_type_filter=metrics.EventTypeFilter(in_values=[key]),
            custom_fields={DESCRIPTION: body.description} if body.description else {},
        )
        if aggregation not in _AGGREGATIONS:
            text = f"must be one of {', '.join(_AGGREGATIONS)}"
            faults.append(Violation("aggregationType", Reason.FIELD_INVALID, text))
        elif aggregation == "UNIQUE_COUNT":
            metric.aggregation_key = body.info.property_unique_on
            if not body.info.property_unique_on:
                text = "is required with UNIQUE_COUNT: the property whose values are counted"
                faults.append(Violation("info.propertyUniqueOn", Reason.FIELD_REQUIRED, text))
        elif aggregation != "COUNT":
            metric.aggregation_key = QUANTITY
        if body.status.upper() not in {"", "ACTIVE"}:
            faults.append(Violation("status", Reason.FIELD_INVALID, "must be ACTIVE, or left out"))
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
        body = await read_object(context, request.body, billable_metric_pb2.UpdateBillableMetricBody)
        name = body.name if body.HasField("name") else None
        description = body.description if body.HasField("description") else None
        faults = _name_faults(name, description)
        status = body.status.upper()
        if body.HasField("status") and status not in {"ACTIVE", "DELETED"}:
            faults.append(Violation("status", Reason.FIELD_INVALID, "must be one of ACTIVE, DELETED"))
        raise_any(faults)
        if body.HasField("status") and status == "ACTIVE" and metric.HasField("archive_time"):
            text = f"Billable metric {request.billable_metric_id} is DELETED, which cannot be undone."
            raise FailedPrecondition(Reason.STATUS_TRANSITION, text, metadata={"id": request.billable_metric_id})
        # Beside notes that others write; all of it or nothing.
        notes = None if description is None else {DESCRIPTION: description}
        metric_id, org, archive = uuid.UUID(metric.id), organization(), status == "DELETED"
        changed = await self._database.write(
            org,
            lambda c: metric_store.update_metric(
                c, org, metric_id, name=name, more_custom_fields=notes, archive=archive
            ),
        )
        return billable_metric_pb2.UpdateBillableMetricResponse(body=answer(json_of(_metric(wire.metric(changed)))))

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
            org, lambda c: metric_store.metrics_by_key(c, org, [wanted]), timeout_s=context.time_remaining()
        )
        metric_id = str(by_key[wanted].id) if wanted in by_key else wanted
        try:
            found = await self._metrics.GetBillableMetric(metrics.GetBillableMetricRequest(id=metric_id), context)
        except InvalidArgument:
            message = f"Billable metric {wanted!r} does not exist."
            raise NotFound(Reason.BILLABLE_METRIC_NOT_FOUND, message, metadata={"ids": wanted}) from None
        return found.billable_metric


def _metric_uuid(key: str) -> str:
    """Return the UUID of the metric that is created under a key: the same for the same key."""
    return str(uuid.uuid5(_METRICS, json.dumps([organization(), key])))


def _name_faults(name: str | None, description: str | None) -> list[Violation]:
    faults = []
    if name is not None and not NAME_MIN <= len(name) <= NAME_MAX:
        faults.append(Violation("name", Reason.FIELD_INVALID, f"must have {NAME_MIN}..{NAME_MAX} characters"))
    elif name is not None and (fault := checks.identifier("name", name)):
        faults.append(fault)
    if description is not None and len(description) > DESCRIPTION_MAX:
        text = f"has {len(description)} characters; at most {DESCRIPTION_MAX} are allowed"
        faults.append(Violation("description", Reason.LIMIT_EXCEEDED, text))
    elif description is not None and (fault := checks.text("description", description)):
        faults.append(fault)
    return faults


def _filters(
    filter_groups: Sequence[billable_metric_pb2.FilterGroup], faults: list[Violation]
) -> list[metrics.PropertyFilter]:
    """Translate filters: groups all must pass, of the filters in a group one."""
    found = []
    for i, group in enumerate(filter_groups):
        path = f"info.filterGroups[{i}]"
        names = {one.name for one in group.filters}
        kinds = {_OPERATIONS.get(one.operation.upper()) for one in group.filters}
        if len(group.filters) != 1 and (len(names) != 1 or kinds != {"in"}):
            text = "must have one filter, or only IS or EQ filters of the same property"
            faults.append(Violation(path, Reason.FIELD_INVALID, text))
            continue
        values: list[str] = []
        for j, one in enumerate(group.filters):
            here = f"{path}.filters[{j}]"
            operation = one.operation.upper()
            if operation not in _OPERATIONS:
                text = f"{one.operation!r} is not supported; there are {', '.join(_OPERATIONS)}"
                faults.append(Violation(f"{here}.operation", Reason.FIELD_INVALID, text))
            elif _OPERATIONS[operation] in {"in", "not_in"}:
                values += _filter_values(f"{here}.value", one.value, faults)
            elif one.value.WhichOneof("kind") not in {None, "null_value"}:
                faults.append(Violation(f"{here}.value", Reason.FIELD_INVALID, f"must be left out with {operation}"))
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
    if not values:
        faults.append(Violation(path, Reason.FIELD_INVALID, "must not be empty"))
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
