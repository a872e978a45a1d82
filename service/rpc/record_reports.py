"""The RPCs of UsageRecordReportService."""

import uuid
from datetime import UTC, datetime

from metering.v1 import usage_record_report_pb2 as pb
from metering.v1 import usage_record_report_pb2_grpc
from service.database import Database
from service.domain import pages
from service.rpc.interceptor import Context, organization
from service.rpc.pages import PageTokens, fitting, scope
from service.rpc.wire import record_reports as wire
from service.store import record_reports as store

_COMPLETION_S = 600.0


class UsageRecordReportService(usage_record_report_pb2_grpc.UsageRecordReportServiceServicer):
    """Hands hourly reports to marketplace reporters; see usage_record_report.proto."""

    def __init__(self, database: Database, tokens: PageTokens) -> None:
        self._database = database
        self._tokens = tokens

    async def ListUsageRecordReports(
        self, request: pb.ListUsageRecordReportsRequest, context: Context
    ) -> pb.ListUsageRecordReportsResponse:
        """See usage_record_report.proto."""
        limit, org = pages.page_size(request.page_size), organization()
        query_scope = scope("ListUsageRecordReports", request)
        state = await self._tokens.decode(query_scope, request.page_token)
        # What "today" means is settled by the first page.
        asked_at = datetime.fromisoformat(state["asked_at"]) if state else datetime.now(UTC)
        query = wire.report_query(request, asked_at)
        after = (datetime.fromisoformat(state["marketplace_time"]), uuid.UUID(state["id"])) if state else None
        found = await self._database.read(
            org,
            lambda c: store.list_reports(c, org, query, after, request.skip, limit),
            timeout_s=context.time_remaining(),
        )
        messages = [wire.report(one, org) for one in found.reports]
        page = fitting(messages, limit)
        response = pb.ListUsageRecordReportsResponse(usage_record_reports=page)
        if found.more or len(page) < len(messages):
            last = found.reports[len(page) - 1]
            state = {
                "asked_at": asked_at.isoformat(),
                "marketplace_time": last.marketplace_time.isoformat(),
                "id": str(last.id),
            }
            response.next_page_token = await self._tokens.encode(query_scope, state)
        return response

    async def LeaseUsageRecordReports(
        self, request: pb.LeaseUsageRecordReportsRequest, context: Context
    ) -> pb.LeaseUsageRecordReportsResponse:
        """See usage_record_report.proto."""
        asked, org = wire.lease(request), organization()
        leased = await self._database.write(
            org, lambda c: store.lease_reports(c, org, asked.token, asked.partner, asked.limit, asked.duration)
        )
        return pb.LeaseUsageRecordReportsResponse(usage_record_reports=[wire.report(one, org) for one in leased])

    async def CompleteUsageRecordReport(
        self, request: pb.CompleteUsageRecordReportRequest, context: Context
    ) -> pb.CompleteUsageRecordReportResponse:
        """See usage_record_report.proto."""
        told, org = wire.completion(request), organization()
        report = await self._database.write(
            org,
            lambda c: store.complete_report(c, org, told.report_id, told.token, told.answers),
            # However many groups are in it: the marketplace has taken the report, and that must be stored.
            limit_s=_COMPLETION_S,
        )
        return pb.CompleteUsageRecordReportResponse(usage_record_report=wire.report(report, org))
