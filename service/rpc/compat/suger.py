"""Suger's reports and entitlements, told in the native RPCs, and what all of its API shares.

See protos/compat/suger.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from google.protobuf.message import Message

from compat.suger.v1 import (
    entitlement_pb2,
    entitlement_pb2_grpc,
    usage_record_group_pb2,
    usage_record_report_pb2,
    usage_record_report_pb2_grpc,
)
from metering.v1 import entitlement_pb2 as entitlements
from metering.v1 import usage_record_report_pb2 as reports
from service.domain.pages import PAGE_SIZE_MAX
from service.errors import Violation
from service.rpc.compat import (
    in_their_words,
    names_of,
    read_choice,
    read_limit,
)
from service.rpc.compat.bodies import answer, answer_all, json_of
from service.rpc.entitlements import EntitlementService
from service.rpc.interceptor import Context, check_organization, organization
from service.rpc.record_reports import UsageRecordReportService
from service.rpc.wire import in_slices, raise_any

DIMENSIONS_MAX = 50
HOUR = timedelta(hours=1)
QUERY_NAMES = names_of(
    usage_record_group_pb2.ListUsageRecordGroupsRequest,
    usage_record_report_pb2.ListUsageRecordReportsRequest,
    entitlement_pb2.ListEntitlementsRequest,
) | {"page_size": "limit", "skip": "offset"}
_REPORT_STATUSES = {
    reports.USAGE_RECORD_REPORT_STATUS_PENDING: "CREATED",
    reports.USAGE_RECORD_REPORT_STATUS_SUCCEEDED: "SUCCESS",
    reports.USAGE_RECORD_REPORT_STATUS_FAILED: "FAILED",
}


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
            partner=read_partner(request.partner, faults),
            entitlement_id=request.entitlement_id,
            buyer_id=request.buyer_id,
            start_date=request.start_date,
            end_date=request.end_date,
            page_size=read_limit(request, PAGE_SIZE_MAX, PAGE_SIZE_MAX),
            skip=request.offset,
        )
        raise_any(faults)
        with in_their_words(QUERY_NAMES):
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
            partner=read_partner(request.partner, faults),
            product_id=request.product_id,
            buyer_id=request.buyer_id,
            page_size=read_limit(request, PAGE_SIZE_MAX, PAGE_SIZE_MAX),
            skip=request.offset,
        )
        raise_any(faults)
        with in_their_words(QUERY_NAMES):
            found = await self._entitlements.ListEntitlements(native, context)
        return entitlement_pb2.ListEntitlementsResponse(
            body=await answer_all(found.entitlements, lambda one: json_of(_entitlement(one)))
        )


def read_partner(text: str, faults: list[Violation]) -> Any:
    """Read a partner's name, the native enum's 0 if it is empty; notes what is wrong with it."""
    return read_choice("partner", text, entitlements.Partner.items(), faults)


def doubles(decimals: Mapping[str, str]) -> dict[str, float]:
    """Return decimals as the SDKs take them; the exact ones stand beside them."""
    return {key: float(one) for key, one in decimals.items()}


def partner_name(partner: Any) -> str | None:
    """Write a partner of the native enum; None if there is none."""
    return entitlements.Partner.Name(partner).removeprefix("PARTNER_") if partner else None


def if_set(message: Message, field: str) -> Any:
    """Return a field of a message, None if it is not set."""
    return getattr(message, field) if message.HasField(field) else None


def _report(report: reports.UsageRecordReport) -> usage_record_report_pb2.UsageRecordReport:
    told = {one.key: one.quantity for one in report.records}
    before = {one.key: one.decimal_parts_before for one in report.records}
    after = {one.key: one.decimal_parts_after for one in report.records}
    start = report.marketplace_time.ToDatetime()
    info = usage_record_report_pb2.UsageRecordReportInfo(
        start_time=report.marketplace_time,
        status=_REPORT_STATUSES.get(report.status, ""),
        message="; ".join(f"{one.key}: {one.message}" for one in report.records if one.message),
        reported_records=doubles(told),
        reported_records_decimal=told,
        decimal_parts=doubles(before),
        decimal_parts_decimal=before,
        new_decimal_parts=doubles(after),
        new_decimal_parts_decimal=after,
    )
    info.end_time.FromDatetime(start + HOUR)
    return usage_record_report_pb2.UsageRecordReport(
        id=report.id,
        organization_id=report.organization_id,
        partner=partner_name(report.partner),
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
        partner=partner_name(entitlement.partner),
        product_id=entitlement.product_id,
        buyer_id=entitlement.buyer_id,
        status=entitlements.EntitlementStatus.Name(entitlement.status).removeprefix("ENTITLEMENT_STATUS_"),
        start_time=entitlement.starting_on,
        end_time=if_set(entitlement, "ending_before"),
        creation_time=entitlement.create_time,
        last_update_time=entitlement.update_time,
        info=entitlement_pb2.EntitlementInfo(
            dimensions=[
                entitlement_pb2.MeteringDimension(key=one.key, name=one.name) for one in dimensions[:DIMENSIONS_MAX]
            ],
            dimensions_oversized=len(dimensions) > DIMENSIONS_MAX,
        ),
    )
