"""Billable metrics on the wire."""

from typing import Any

from metering.v1 import billable_metric_pb2
from service.domain import checks, metrics
from service.errors import Violation
from service.rpc.wire import check_mask, enum_value, new_id, raise_any, timestamp

_AGGREGATIONS = {
    number: metrics.Aggregation(name.removeprefix("AGGREGATION_TYPE_"))
    for name, number in billable_metric_pb2.AggregationType.items()
    if number
}
_AGGREGATION_NUMBERS = {aggregation: number for number, aggregation in _AGGREGATIONS.items()}


def new_metric(message: billable_metric_pb2.BillableMetric) -> metrics.BillableMetric:
    """Read the metric of a create request, making an id if it has none; raises InvalidArgument."""
    faults: list[Violation] = []
    path = "billable_metric"
    metric_id = new_id(f"{path}.id", message.id, faults)
    aggregation = enum_value(f"{path}.aggregation_type", message.aggregation_type, _AGGREGATIONS, faults)
    metric = metrics.BillableMetric(
        id=metric_id,
        name=message.name,
        key=message.key or None,
        aggregation=aggregation or metrics.Aggregation.COUNT,
        aggregation_key=message.aggregation_key or None,
        event_types=tuple(message.event_type_filter.in_values),
        excluded_event_types=tuple(message.event_type_filter.not_in_values),
        property_filters=tuple(
            metrics.PropertyFilter(
                one.name,
                one.exists if one.HasField("exists") else None,
                tuple(one.in_values),
                tuple(one.not_in_values),
            )
            for one in message.property_filters
        ),
        group_keys=tuple(tuple(key.properties) for key in message.group_keys),
        custom_fields=dict(message.custom_fields),
    )
    found = metrics.violations(metric, path)
    if aggregation is None:
        found = [one for one in found if one.field != f"{path}.aggregation_key"]
    raise_any([*faults, *found])
    return metric


def metric_changes(request: billable_metric_pb2.UpdateBillableMetricRequest) -> dict[str, Any]:
    """Read which fields an update request sets to what; raises InvalidArgument."""
    message, path = request.billable_metric, "billable_metric"
    check_mask(request.update_mask.paths, ("name", "custom_fields"))
    masked = request.update_mask.paths or ("name",)
    faults: list[Violation | None] = []
    changes: dict[str, Any] = {}
    if "name" in masked:
        faults.append(checks.identifier(f"{path}.name", message.name, most=checks.NAME_MAX))
        changes["name"] = message.name
    if "custom_fields" in masked:
        faults += checks.custom_fields(f"{path}.custom_fields", message.custom_fields)
        changes["custom_fields"] = dict(message.custom_fields)
    raise_any(faults)
    return changes


def metric(value: metrics.BillableMetric) -> billable_metric_pb2.BillableMetric:
    """Write a metric."""
    type_filter = None
    if value.event_types or value.excluded_event_types:
        type_filter = billable_metric_pb2.EventTypeFilter(
            in_values=value.event_types, not_in_values=value.excluded_event_types
        )
    return billable_metric_pb2.BillableMetric(
        id=str(value.id),
        name=value.name,
        key=value.key or "",
        aggregation_type=_AGGREGATION_NUMBERS[value.aggregation],
        aggregation_key=value.aggregation_key or "",
        event_type_filter=type_filter,
        property_filters=[
            billable_metric_pb2.PropertyFilter(
                name=one.name, exists=one.exists, in_values=one.in_values, not_in_values=one.not_in_values
            )
            for one in value.property_filters
        ],
        group_keys=[billable_metric_pb2.GroupKey(properties=key) for key in value.group_keys],
        custom_fields=value.custom_fields,
        create_time=timestamp(value.created_at),
        archive_time=timestamp(value.archived_at),
        backfill_progress=value.backfill_progress,
        record_key=value.record_key or "",
    )
