"""The RPCs of BillableMetricService."""

import uuid
from collections.abc import Callable

from metering.v1 import billable_metric_pb2 as pb
from metering.v1 import billable_metric_pb2_grpc
from service.database import Database
from service.domain import pages
from service.rpc.interceptor import Context, organization
from service.rpc.pages import PageTokens, fitting, scope
from service.rpc.wire import billable_metrics as wire
from service.rpc.wire import one_id
from service.store import metrics as store


class BillableMetricService(billable_metric_pb2_grpc.BillableMetricServiceServicer):
    """Keeps billable metrics; see billable_metric.proto."""

    def __init__(self, database: Database, tokens: PageTokens, backfill_wanted: Callable[[], None]) -> None:
        """Call `backfill_wanted` when a metric with a past to count was created."""
        self._database = database
        self._tokens = tokens
        self._backfill_wanted = backfill_wanted

    async def CreateBillableMetric(
        self, request: pb.CreateBillableMetricRequest, context: Context
    ) -> pb.CreateBillableMetricResponse:
        """See billable_metric.proto."""
        metric, org = wire.new_metric(request.billable_metric), organization()
        stored = await self._database.write(org, lambda c: store.create_metric(c, org, metric))
        if stored.backfilled_until is not None:
            self._backfill_wanted()
        return pb.CreateBillableMetricResponse(billable_metric=wire.metric(stored))

    async def GetBillableMetric(
        self, request: pb.GetBillableMetricRequest, context: Context
    ) -> pb.GetBillableMetricResponse:
        """See billable_metric.proto."""
        metric_id, org = one_id("id", request.id), organization()
        found = await self._database.read(
            org, lambda c: store.get_metric(c, org, metric_id), timeout_s=context.time_remaining()
        )
        return pb.GetBillableMetricResponse(billable_metric=wire.metric(found))

    async def ListBillableMetrics(
        self, request: pb.ListBillableMetricsRequest, context: Context
    ) -> pb.ListBillableMetricsResponse:
        """See billable_metric.proto."""
        limit, org = pages.page_size(request.page_size), organization()
        query_scope = scope("ListBillableMetrics", request)
        state = await self._tokens.decode(query_scope, request.page_token)
        rows = await self._database.read(
            org,
            lambda c: store.list_metrics(
                c,
                org,
                include_archived=request.include_archived,
                after=uuid.UUID(state["after"]) if state else None,
                limit=limit + 1,
            ),
            timeout_s=context.time_remaining(),
        )
        page = fitting([wire.metric(row) for row in rows], limit)
        response = pb.ListBillableMetricsResponse(billable_metrics=page)
        if len(rows) > len(page):
            state = {"after": page[-1].id}
            response.next_page_token = await self._tokens.encode(query_scope, state)
        return response

    async def UpdateBillableMetric(
        self, request: pb.UpdateBillableMetricRequest, context: Context
    ) -> pb.UpdateBillableMetricResponse:
        """See billable_metric.proto."""
        metric_id, org = one_id("billable_metric.id", request.billable_metric.id), organization()
        changes = wire.metric_changes(request)
        stored = await self._database.write(org, lambda c: store.update_metric(c, org, metric_id, **changes))
        return pb.UpdateBillableMetricResponse(billable_metric=wire.metric(stored))

    async def ArchiveBillableMetric(
        self, request: pb.ArchiveBillableMetricRequest, context: Context
    ) -> pb.ArchiveBillableMetricResponse:
        """See billable_metric.proto."""
        metric_id, org = one_id("id", request.id), organization()
        stored = await self._database.write(org, lambda c: store.archive_metric(c, org, metric_id))
        return pb.ArchiveBillableMetricResponse(billable_metric=wire.metric(stored))
