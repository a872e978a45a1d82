"""Metronome's API: what its SDKs send and expect, told in the native RPCs; see protos/compat/metronome."""

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.struct_pb2 import ListValue, Struct

from compat.metronome.v1 import (
    billable_metric_pb2,
    billable_metric_pb2_grpc,
    customer_pb2,
    customer_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from metering.v1 import billable_metric_pb2 as metrics
from metering.v1 import customer_pb2 as customers
from metering.v1 import event_pb2 as events
from metering.v1 import usage_pb2 as usage
from service.domain.checks import NAME_MAX
from service.domain.events import Verdict
from service.domain.windows import WindowSize, widened
from service.errors import Reason, Violation, invalid
from service.ingest import Batch, Ingest
from service.limits import limit
from service.rpc.billable_metrics import BillableMetricService
from service.rpc.compat import (
    chosen_id,
    in_their_words,
    number_or_null,
    read_choice,
    read_instant,
    read_limit,
    read_texts,
    text_or_null,
)
from service.rpc.compat.bodies import answer, answer_all, json_of, read_array, read_object
from service.rpc.customers import CustomerService
from service.rpc.events import EventService
from service.rpc.interceptor import Context, organization
from service.rpc.usage import UsageService
from service.rpc.wire import events as wire_events
from service.rpc.wire import raise_any, timestamp

EVENTS_MAX = 100
LIMIT_DEFAULT = 50
LIMIT_MAX = 100
IDS_MAX = 100
SEARCHED_MAX = limit(
    "METRONOME_SEARCHED_IDS",
    100,
    most=100,
    about="transaction ids of one search by Metronome's API",
    field="transactionIds",
)
# Of what is found: metrics as JSON, and events, which can be larger as JSON but are small. Envoy passes 32 MiB on.
ANSWER_BYTES_MAX = 8 * 1024 * 1024
# What a JSON number of 32 bits can tell; more is a lot as well.
SKIPPED_MAX = 2**32 - 1
CONFLICTS_HEADER = "x-metering-conflicts"

_NAMES = {
    "page_token": "next_page",
    "page_size": "limit",
    "next_page_token": "next_page",
    "transaction_ids": "transactionIds",
}
_PREFIXES = ("billable_metric.", "customer.", "events")


class MetronomeUsage(usage_pb2_grpc.UsageServiceServicer):
    """Metronome's usage operations; see usage.proto."""

    def __init__(
        self,
        ingest: Ingest,
        events_service: EventService,
        usage_service: UsageService,
        customer_service: CustomerService,
        metric_service: BillableMetricService,
        *,
        strict_windows: bool,
    ) -> None:
        """Refuse bounds inside of windows if `strict_windows`, else widen them to the windows that hold them."""
        self._ingest = ingest
        self._events = events_service
        self._usage = usage_service
        self._customers = customer_service
        self._metrics = metric_service
        self._strict_windows = strict_windows

    async def IngestEvents(
        self, request: usage_pb2.IngestEventsRequest, context: Context
    ) -> usage_pb2.IngestEventsResponse:
        """See usage.proto."""
        sent = await read_array(context, request.body, usage_pb2.Event, EVENTS_MAX)
        faults: list[Violation] = []
        messages = []
        for i, one in enumerate(sent):
            at = read_instant(f"[{i}].timestamp", one.timestamp, faults)
            messages.append(
                events.UsageEvent(
                    transaction_id=one.transaction_id,
                    customer_id=one.customer_id,
                    event_type=one.event_type,
                    timestamp=timestamp(at),
                    properties=one.properties,
                )
            )
        raise_any(faults)
        batch = await wire_events.batch(messages, all_or_nothing=True)
        with in_their_words(_NAMES, _PREFIXES):
            outcomes = await self._ingest.ingest(organization(), Batch(batch.items, True, ignores_conflicts=True))
        conflicts = sum(outcome.verdict is Verdict.CONFLICT for outcome in outcomes)
        if conflicts:
            await context.send_initial_metadata(((CONFLICTS_HEADER, str(conflicts)),))
        return usage_pb2.IngestEventsResponse()

    async def ListUsage(self, request: usage_pb2.ListUsageRequest, context: Context) -> usage_pb2.ListUsageResponse:
        """See usage.proto."""
        body = await read_object(context, request.body, usage_pb2.ListUsageBody)
        faults: list[Violation] = []
        native = usage.ListUsageRequest(
            customer_ids=body.customer_ids,
            billable_metrics=[
                usage.BillableMetricSelector(
                    id=one.id,
                    group_by=usage.GroupBy(key=one.group_by.key, values=one.group_by.values)
                    if one.HasField("group_by")
                    else None,
                )
                for one in body.billable_metrics
            ],
            page_token=request.next_page,
        )
        self._read_windows(body, native, faults)
        raise_any(faults)
        with in_their_words(_NAMES):
            found = usage.ListUsageResponse.FromString(await self._usage.ListUsage(native, context))
        return usage_pb2.ListUsageResponse(
            data=[_aggregate(one, native) for one in found.windows], next_page=text_or_null(found.next_page_token)
        )

    async def ListUsageWithGroups(
        self, request: usage_pb2.ListUsageWithGroupsRequest, context: Context
    ) -> usage_pb2.ListUsageWithGroupsResponse:
        """See usage.proto."""
        body = await read_object(context, request.body, usage_pb2.ListUsageWithGroupsBody)
        faults: list[Violation] = []
        key, filters = list(body.group_key), {}
        for name, values in body.group_filters.items():
            if texts := read_texts(f"group_filters.{name}", values, faults):
                filters[name] = texts
        if body.HasField("group_by"):
            if key:
                faults.append(Violation("group_by", Reason.FIELD_INVALID, "cannot be used together with group_key"))
            if body.group_by.key in body.group_filters:
                faults.append(Violation("group_filters", Reason.FIELD_INVALID, "names the key of group_by too"))
            key = [body.group_by.key]
            if body.group_by.values:
                filters[body.group_by.key] = list(body.group_by.values)
        native = usage.ListUsageWithGroupsRequest(
            customer_id=body.customer_id,
            billable_metric_id=body.billable_metric_id,
            current_period=body.current_period,
            group_key=key,
            group_filters={name: usage.GroupFilter(values=values) for name, values in filters.items()},
            page_size=read_limit(request, LIMIT_MAX if len(key) > 1 else LIMIT_DEFAULT, LIMIT_MAX),
            page_token=request.next_page,
        )
        self._read_windows(body, native, faults)
        raise_any(faults)
        names = _NAMES | (
            {"group_key": "group_by.key", "group_filters": "group_by"} if body.HasField("group_by") else {}
        )
        with in_their_words(names):
            answer = await self._usage.ListUsageWithGroups(native, context)
        found = usage.ListUsageWithGroupsResponse.FromString(answer)
        return usage_pb2.ListUsageWithGroupsResponse(
            data=[_grouped_aggregate(one, key) for one in found.windows],
            next_page=text_or_null(found.next_page_token),
        )

    async def SearchEvents(
        self, request: usage_pb2.SearchEventsRequest, context: Context
    ) -> usage_pb2.SearchEventsResponse:
        """See usage.proto."""
        body = await read_object(context, request.body, usage_pb2.SearchEventsBody)
        ids = body.transaction_ids
        if not 1 <= len(ids) <= SEARCHED_MAX:
            text = f"has {len(ids)} items; it must have 1..{SEARCHED_MAX}"
            raise invalid("transactionIds", Reason.FIELD_REQUIRED if not ids else Reason.LIMIT_EXCEEDED, text)
        stored: list[events.StoredEvent] = []
        token = ""
        with in_their_words(_NAMES):
            while True:
                page = await self._events.SearchEvents(
                    events.SearchEventsRequest(transaction_ids=ids, page_token=token), context
                )
                stored += page.events
                token = page.next_page_token
                if not token:
                    break
        names: dict[str, str] = {}
        definitions: dict[str, dict[str, Any]] = {}
        sizes: dict[str, int] = {}
        size = 0
        for one in stored:
            if one.matched_customer_id and one.matched_customer_id not in names:
                asked = customers.GetCustomerRequest(id=one.matched_customer_id)
                names[one.matched_customer_id] = (await self._customers.GetCustomer(asked, context)).customer.name
            for metric_id in _matched(one):
                if metric_id not in definitions:
                    wanted = metrics.GetBillableMetricRequest(id=metric_id)
                    metric = (await self._metrics.GetBillableMetric(wanted, context)).billable_metric
                    definitions[metric_id] = json_of(_metric(metric))
                    sizes[metric_id] = len(answer(definitions[metric_id]).data)
                size += sizes[metric_id]
            size += one.event.ByteSize()
            if size > ANSWER_BYTES_MAX:
                text = f"find more than {ANSWER_BYTES_MAX:,} bytes, with the metrics of each event: ask for fewer"
                raise invalid("transactionIds", Reason.LIMIT_EXCEEDED, text)
        body = await answer_all(stored, lambda one: _found_event(one, names, definitions))
        return usage_pb2.SearchEventsResponse(body=body)

    def _read_windows(
        self,
        body: usage_pb2.ListUsageBody | usage_pb2.ListUsageWithGroupsBody,
        native: usage.ListUsageRequest | usage.ListUsageWithGroupsRequest,
        faults: list[Violation],
    ) -> None:
        """Read window size and bounds into the native request; what is missing is said there."""
        size = read_choice("window_size", body.window_size, usage.WindowSize.items(), faults)
        native.window_size = size
        start = read_instant("starting_on", body.starting_on, faults)
        end = read_instant("ending_before", body.ending_before, faults)
        if size and start is not None and end is not None and not self._strict_windows:
            start, end = widened(WindowSize(body.window_size.upper()), start, end)
        for field, bound in (("starting_on", start), ("ending_before", end)):
            if bound is not None:
                getattr(native, field).CopyFrom(timestamp(bound))


class MetronomeBillableMetrics(billable_metric_pb2_grpc.BillableMetricServiceServicer):
    """Metronome's billable metrics; see billable_metric.proto."""

    def __init__(self, metric_service: BillableMetricService, customer_service: CustomerService) -> None:
        self._metrics = metric_service
        self._customers = customer_service

    async def CreateBillableMetric(
        self, request: billable_metric_pb2.CreateBillableMetricRequest, context: Context
    ) -> billable_metric_pb2.CreateBillableMetricResponse:
        """See billable_metric.proto."""
        body = await read_object(context, request.body, billable_metric_pb2.CreateBillableMetricBody)
        faults: list[Violation] = []
        if body.sql:
            faults.append(Violation("sql", Reason.FIELD_INVALID, "is not supported: give an aggregation_type instead"))
        aggregation = read_choice("aggregation_type", body.aggregation_type, metrics.AggregationType.items(), faults)
        group_keys = [
            metrics.GroupKey(properties=read_texts(f"group_keys[{i}]", key, faults))
            for i, key in enumerate(body.group_keys)
        ]
        raise_any(faults)
        metric = metrics.BillableMetric(
            id=chosen_id(context, "metronome metric"),
            name=body.name,
            aggregation_type=aggregation,
            aggregation_key=body.aggregation_key,
            event_type_filter=metrics.EventTypeFilter(
                in_values=body.event_type_filter.in_values, not_in_values=body.event_type_filter.not_in_values
            ),
            property_filters=[
                metrics.PropertyFilter(
                    name=one.name,
                    exists=one.exists if one.HasField("exists") else None,
                    in_values=one.in_values,
                    not_in_values=one.not_in_values,
                )
                for one in body.property_filters
            ],
            group_keys=group_keys,
            custom_fields=body.custom_fields,
        )
        with in_their_words(_NAMES, _PREFIXES):
            created = await self._metrics.CreateBillableMetric(
                metrics.CreateBillableMetricRequest(billable_metric=metric), context
            )
        return billable_metric_pb2.CreateBillableMetricResponse(
            data=billable_metric_pb2.Id(id=created.billable_metric.id)
        )

    async def GetBillableMetric(
        self, request: billable_metric_pb2.GetBillableMetricRequest, context: Context
    ) -> billable_metric_pb2.GetBillableMetricResponse:
        """See billable_metric.proto."""
        with in_their_words({"id": "billable_metric_id"}):
            found = await self._metrics.GetBillableMetric(
                metrics.GetBillableMetricRequest(id=request.billable_metric_id), context
            )
        return billable_metric_pb2.GetBillableMetricResponse(data=_metric(found.billable_metric))

    async def ListBillableMetrics(
        self, request: billable_metric_pb2.ListBillableMetricsRequest, context: Context
    ) -> billable_metric_pb2.ListBillableMetricsResponse:
        """See billable_metric.proto."""
        data, following = await self._page(request, context)
        return billable_metric_pb2.ListBillableMetricsResponse(data=data, next_page=text_or_null(following))

    async def UpdateBillableMetric(
        self, request: billable_metric_pb2.UpdateBillableMetricRequest, context: Context
    ) -> billable_metric_pb2.UpdateBillableMetricResponse:
        """See billable_metric.proto."""
        body = await read_object(context, request.body, billable_metric_pb2.NameBody)
        metric = metrics.BillableMetric(id=request.billable_metric_id, name=body.name)
        with in_their_words({"id": "billable_metric_id"}, _PREFIXES):
            await self._metrics.UpdateBillableMetric(
                metrics.UpdateBillableMetricRequest(billable_metric=metric, update_mask=FieldMask(paths=["name"])),
                context,
            )
        return billable_metric_pb2.UpdateBillableMetricResponse(data=billable_metric_pb2.Id(id=metric.id))

    async def ArchiveBillableMetric(
        self, request: billable_metric_pb2.ArchiveBillableMetricRequest, context: Context
    ) -> billable_metric_pb2.ArchiveBillableMetricResponse:
        """See billable_metric.proto."""
        body = await read_object(context, request.body, billable_metric_pb2.Id)
        await self._metrics.ArchiveBillableMetric(metrics.ArchiveBillableMetricRequest(id=body.id), context)
        return billable_metric_pb2.ArchiveBillableMetricResponse(data=body)

    async def ListCustomerBillableMetrics(
        self, request: billable_metric_pb2.ListCustomerBillableMetricsRequest, context: Context
    ) -> billable_metric_pb2.ListCustomerBillableMetricsResponse:
        """See billable_metric.proto."""
        if request.on_current_plan:
            raise invalid("on_current_plan", Reason.FIELD_INVALID, "is not supported: customers have no plans here")
        with in_their_words({"id": "customer_id"}):
            await self._customers.GetCustomer(customers.GetCustomerRequest(id=request.customer_id), context)
        data, following = await self._page(request, context)
        return billable_metric_pb2.ListCustomerBillableMetricsResponse(data=data, next_page=text_or_null(following))

    async def _page(
        self,
        request: billable_metric_pb2.ListBillableMetricsRequest
        | billable_metric_pb2.ListCustomerBillableMetricsRequest,
        context: Context,
    ) -> tuple[Sequence[billable_metric_pb2.BillableMetric], str]:
        native = metrics.ListBillableMetricsRequest(
            include_archived=request.include_archived,
            page_size=read_limit(request, LIMIT_DEFAULT, LIMIT_MAX),
            page_token=request.next_page,
        )
        with in_their_words(_NAMES):
            found = await self._metrics.ListBillableMetrics(native, context)
        return [_metric(one) for one in found.billable_metrics], found.next_page_token


class MetronomeCustomers(customer_pb2_grpc.CustomerServiceServicer):
    """Metronome's customers; see customer.proto."""

    def __init__(self, customer_service: CustomerService) -> None:
        self._customers = customer_service

    async def CreateCustomer(
        self, request: customer_pb2.CreateCustomerRequest, context: Context
    ) -> customer_pb2.CreateCustomerResponse:
        """See customer.proto."""
        body = await read_object(context, request.body, customer_pb2.CreateCustomerBody)
        aliases = list(body.ingest_aliases)
        if body.external_id and body.external_id not in aliases:
            aliases.append(body.external_id)
        customer = customers.Customer(
            id=chosen_id(context, "metronome customer"),
            name=body.name[:NAME_MAX],
            ingest_aliases=aliases,
            custom_fields=body.custom_fields,
        )
        with in_their_words(_NAMES, _PREFIXES):
            created = await self._customers.CreateCustomer(customers.CreateCustomerRequest(customer=customer), context)
        return customer_pb2.CreateCustomerResponse(data=_customer(created.customer))

    async def GetCustomer(
        self, request: customer_pb2.GetCustomerRequest, context: Context
    ) -> customer_pb2.GetCustomerResponse:
        """See customer.proto."""
        with in_their_words({"id": "customer_id"}):
            found = await self._customers.GetCustomer(customers.GetCustomerRequest(id=request.customer_id), context)
        return customer_pb2.GetCustomerResponse(data=_customer_detail(found.customer))

    async def ListCustomers(
        self, request: customer_pb2.ListCustomersRequest, context: Context
    ) -> customer_pb2.ListCustomersResponse:
        """See customer.proto."""
        ids = [one.strip() for sent in request.customer_ids for one in sent.split(",")]
        if len(ids) > IDS_MAX:
            text = f"has {len(ids)} items; at most {IDS_MAX} are allowed"
            raise invalid("customer_ids", Reason.LIMIT_EXCEEDED, text)
        limit = read_limit(request, LIMIT_DEFAULT, LIMIT_MAX)
        if request.salesforce_account_ids:
            return customer_pb2.ListCustomersResponse(next_page=text_or_null(None))
        native = customers.ListCustomersRequest(
            customer_key=request.ingest_alias,
            ids=ids,
            only_archived=request.only_archived,
            page_size=limit,
            page_token=request.next_page,
        )
        with in_their_words(_NAMES | {"customer_key": "ingest_alias", "ids": "customer_ids"}):
            found = await self._customers.ListCustomers(native, context)
        return customer_pb2.ListCustomersResponse(
            data=[_customer_detail(one) for one in found.customers], next_page=text_or_null(found.next_page_token)
        )

    async def ArchiveCustomer(
        self, request: customer_pb2.ArchiveCustomerRequest, context: Context
    ) -> customer_pb2.ArchiveCustomerResponse:
        """See customer.proto."""
        body = await read_object(context, request.body, billable_metric_pb2.Id)
        await self._customers.ArchiveCustomer(customers.ArchiveCustomerRequest(id=body.id), context)
        return customer_pb2.ArchiveCustomerResponse(data=body)

    async def SetIngestAliases(
        self, request: customer_pb2.SetIngestAliasesRequest, context: Context
    ) -> customer_pb2.SetIngestAliasesResponse:
        """See customer.proto."""
        body = await read_object(context, request.body, customer_pb2.IngestAliasesBody, required=("ingest_aliases",))
        native = customers.SetIngestAliasesRequest(id=request.customer_id, ingest_aliases=body.ingest_aliases)
        with in_their_words({"id": "customer_id"}):
            await self._customers.SetIngestAliases(native, context)
        return customer_pb2.SetIngestAliasesResponse()

    async def SetName(self, request: customer_pb2.SetNameRequest, context: Context) -> customer_pb2.SetNameResponse:
        """See customer.proto."""
        body = await read_object(context, request.body, billable_metric_pb2.NameBody)
        customer = customers.Customer(id=request.customer_id, name=body.name[:NAME_MAX])
        with in_their_words({"id": "customer_id"}, _PREFIXES):
            changed = await self._customers.UpdateCustomer(
                customers.UpdateCustomerRequest(customer=customer, update_mask=FieldMask(paths=["name"])), context
            )
        return customer_pb2.SetNameResponse(data=_customer(changed.customer))


def _aggregate(window: usage.UsageWindow, request: usage.ListUsageRequest) -> usage_pb2.UsageAggregate:
    groups = groups_decimal = None
    selected = window.billable_metric_id
    if any(one.id.lower() == selected and one.HasField("group_by") for one in request.billable_metrics):
        values = {name: group.value if group.HasField("value") else None for name, group in window.groups.items()}
        groups = Struct(fields={name: number_or_null(one) for name, one in values.items()})
        groups_decimal = Struct(fields={name: text_or_null(one) for name, one in values.items() if one is not None})
    value = window.value if window.HasField("value") else None
    return usage_pb2.UsageAggregate(
        customer_id=window.customer_id,
        billable_metric_id=window.billable_metric_id,
        billable_metric_name=window.billable_metric_name,
        start_timestamp=window.starting_on,
        end_timestamp=window.ending_before,
        value=number_or_null(value),
        groups=groups,
        value_decimal=value,
        groups_decimal=groups_decimal,
        skipped_count=min(window.skipped_count, SKIPPED_MAX),
    )


def _grouped_aggregate(window: usage.GroupedUsageWindow, key: Sequence[str]) -> usage_pb2.GroupedUsageAggregate:
    value = window.value if window.HasField("value") else None
    simple = key[0] if len(key) == 1 else None
    group = Struct() if key else None
    if group is not None:
        group.update(dict(window.group))
    found = usage_pb2.GroupedUsageAggregate(
        starting_on=window.starting_on,
        ending_before=window.ending_before,
        group_key=text_or_null(simple),
        group_value=text_or_null(None),
        value=number_or_null(value),
        group=group,
        value_decimal=value,
        skipped_count=min(window.skipped_count, SKIPPED_MAX),
    )
    if simple is not None and simple in window.group:
        # Not text_or_null: an empty value is a group of its own.
        found.group_value.string_value = window.group[simple]
    return found


def _matched(event: events.StoredEvent) -> list[str]:
    """Return the ids of the metrics that count an event, or will."""
    counted = {events.METRIC_OUTCOME_COUNTED, events.METRIC_OUTCOME_PENDING}
    return [one.billable_metric_id for one in event.metrics if one.outcome in counted]


def _found_event(
    stored: events.StoredEvent, names: Mapping[str, str], definitions: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    event, customer_id = stored.event, stored.matched_customer_id
    found = usage_pb2.FoundEvent(
        id=event.transaction_id,
        transaction_id=event.transaction_id,
        customer_id=event.customer_id,
        event_type=event.event_type,
        timestamp=event.timestamp,
        properties=event.properties,
        processed_at=stored.ingest_time,
        matched_customer=usage_pb2.MatchedCustomer(id=customer_id, name=names[customer_id]) if customer_id else None,
    )
    # Written once and shown with each event: definitions can be large.
    return json_of(found) | {"matched_billable_metrics": [definitions[one] for one in _matched(stored)]}


def _metric(metric: metrics.BillableMetric) -> billable_metric_pb2.BillableMetric:
    type_filter = None
    if metric.HasField("event_type_filter"):
        type_filter = billable_metric_pb2.EventTypeFilter(
            in_values=metric.event_type_filter.in_values, not_in_values=metric.event_type_filter.not_in_values
        )
    found = billable_metric_pb2.BillableMetric(
        id=metric.id,
        name=metric.name,
        aggregation_type=metrics.AggregationType.Name(metric.aggregation_type).removeprefix("AGGREGATION_TYPE_"),
        aggregation_key=metric.aggregation_key or None,
        event_type_filter=type_filter,
        property_filters=[
            billable_metric_pb2.PropertyFilter(
                name=one.name,
                exists=one.exists if one.HasField("exists") else None,
                in_values=one.in_values,
                not_in_values=one.not_in_values,
            )
            for one in metric.property_filters
        ],
        custom_fields=metric.custom_fields,
        archived_at=metric.archive_time if metric.HasField("archive_time") else None,
    )
    for key in metric.group_keys:
        found.group_keys.append(ListValue(values=[text_or_null(name) for name in key.properties]))
    return found


def _customer(customer: customers.Customer) -> customer_pb2.Customer:
    return customer_pb2.Customer(
        id=customer.id,
        external_id=customer.ingest_aliases[0] if customer.ingest_aliases else customer.id,
        ingest_aliases=customer.ingest_aliases,
        name=customer.name,
        custom_fields=customer.custom_fields,
    )


def _customer_detail(customer: customers.Customer) -> customer_pb2.CustomerDetail:
    return customer_pb2.CustomerDetail(
        id=customer.id,
        external_id=customer.ingest_aliases[0] if customer.ingest_aliases else customer.id,
        ingest_aliases=customer.ingest_aliases,
        name=customer.name,
        custom_fields=customer.custom_fields,
        created_at=customer.create_time,
        updated_at=customer.update_time,
        archived_at=customer.archive_time if customer.HasField("archive_time") else None,
        customer_config=customer_pb2.CustomerConfig(salesforce_account_id=text_or_null(None)),
    )
