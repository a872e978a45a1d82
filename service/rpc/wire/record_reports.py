"""Usage record reports on the wire."""

import uuid
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from metering.v1 import usage_record_report_pb2
from service.domain import checks, pages, quantities, record_reports
from service.domain.entitlements import ID_MAX
from service.domain.partners import Partner
from service.errors import InvalidArgument, Reason, Violation
from service.rpc.wire import enum_value, raise_any, read_dates, timestamp
from service.rpc.wire.entitlements import PARTNER_NUMBERS, PARTNERS

_STATUSES = {
    number: record_reports.ReportStatus(name.removeprefix("USAGE_RECORD_REPORT_STATUS_"))
    for name, number in usage_record_report_pb2.UsageRecordReportStatus.items()
    if number
}
_STATUS_NUMBERS = {status: number for number, status in _STATUSES.items()}
_OUTCOMES = {
    number: record_reports.ReportOutcome(name.removeprefix("REPORT_OUTCOME_"))
    for name, number in usage_record_report_pb2.ReportOutcome.items()
    if number
}
_OUTCOME_NUMBERS = {outcome: number for number, outcome in _OUTCOMES.items()}


class Lease(NamedTuple):
    """What a reporter asks for."""

    token: str
    partner: Partner | None
    limit: int
    duration: timedelta


class Completion(NamedTuple):
    """What a reporter tells."""

    report_id: uuid.UUID
    token: str
    answers: dict[str, record_reports.Answer]


def report_query(
    request: usage_record_report_pb2.ListUsageRecordReportsRequest, now: datetime
) -> record_reports.ReportQuery:
    """Read what a list asks for; raises InvalidArgument."""
    faults: list[Violation] = []
    partner = enum_value("partner", request.partner, PARTNERS, faults) if request.partner else None
    status = enum_value("status", request.status, _STATUSES, faults) if request.status else None
    faults += [
        fault
        for name in ("entitlement_id", "buyer_id")
        if (sent := getattr(request, name)) and (fault := checks.identifier(name, sent, most=ID_MAX))
    ]
    days = read_dates(request.start_date, request.end_date, faults, today=now.astimezone(UTC).date())
    raise_any([*faults, pages.skip_violation(request.skip)])
    if days is None:  # a fault was raised then; this tells the type checker
        raise AssertionError
    return record_reports.ReportQuery(*days, partner, request.entitlement_id or None, request.buyer_id or None, status)


def lease(request: usage_record_report_pb2.LeaseUsageRecordReportsRequest) -> Lease:
    """Read a lease; raises InvalidArgument."""
    faults: list[Violation] = []
    if fault := checks.identifier("lease_token", request.lease_token):
        faults.append(fault)
    partner = enum_value("partner", request.partner, PARTNERS, faults) if request.partner else None
    if request.max_reports < 0:
        text = f"must not be negative; 0 means {record_reports.LEASED_DEFAULT}, at most {record_reports.LEASED_MAX}"
        faults.append(Violation("max_reports", Reason.FIELD_INVALID, text))
    duration = timedelta(seconds=record_reports.LEASE_S_DEFAULT)
    if request.HasField("lease_duration"):
        sent = request.lease_duration
        nanos = sent.seconds * 10**9 + sent.nanos
        if not 10**9 <= nanos <= record_reports.LEASE_S_MAX * 10**9:
            text = f"must be 1s to {record_reports.LEASE_S_MAX}s"
            faults.append(Violation("lease_duration", Reason.FIELD_INVALID, text))
        else:
            duration = timedelta(microseconds=nanos // 1000)
    raise_any(faults)
    limit = min(request.max_reports or record_reports.LEASED_DEFAULT, record_reports.LEASED_MAX)
    return Lease(request.lease_token, partner, limit, duration)


def completion(request: usage_record_report_pb2.CompleteUsageRecordReportRequest) -> Completion:
    """Read a completion; raises InvalidArgument."""
    faults: list[Violation] = []
    report_id = checks.as_uuid("id", request.id)
    if isinstance(report_id, Violation):
        faults.append(report_id)
        report_id = uuid.UUID(int=0)
    if fault := checks.identifier("lease_token", request.lease_token):
        faults.append(fault)
    answers: dict[str, record_reports.Answer] = {}
    if len(request.outcomes) > record_reports.LINES_MAX:
        text = f"has {len(request.outcomes):,} items; at most {record_reports.LINES_MAX:,} are allowed"
        raise InvalidArgument([Violation("outcomes", Reason.LIMIT_EXCEEDED, text)])
    for i, sent in enumerate(request.outcomes):
        path = f"outcomes[{i}]"
        outcome = enum_value(f"{path}.outcome", sent.outcome, _OUTCOMES, faults)
        if len(sent.message) > record_reports.MESSAGE_MAX:
            text = f"has {len(sent.message)} characters; at most {record_reports.MESSAGE_MAX} are allowed"
            faults.append(Violation(f"{path}.message", Reason.LIMIT_EXCEEDED, text))
        elif fault := checks.text(f"{path}.message", sent.message):
            faults.append(fault)
        elif outcome is record_reports.ReportOutcome.FAILED and not sent.message:
            text = "is required when the record failed: what the marketplace said"
            faults.append(Violation(f"{path}.message", Reason.FIELD_REQUIRED, text))
        if sent.key in answers:
            faults.append(Violation(f"{path}.key", Reason.DUPLICATE_ITEM, f"{sent.key!r} stands twice"))
        if outcome is not None:
            answers[sent.key] = record_reports.Answer(outcome, sent.message)
    raise_any(faults)
    return Completion(report_id, request.lease_token, answers)


def report(value: record_reports.Report, organization: str) -> usage_record_report_pb2.UsageRecordReport:
    """Write a report."""
    return usage_record_report_pb2.UsageRecordReport(
        id=str(value.id),
        organization_id=organization,
        partner=PARTNER_NUMBERS[value.partner],
        product_id=value.product_id,
        entitlement_id=value.entitlement_id,
        buyer_id=value.buyer_id,
        marketplace_time=timestamp(value.marketplace_time),
        report_deadline=timestamp(value.report_deadline),
        status=_STATUS_NUMBERS[value.status],
        records=[
            usage_record_report_pb2.UsageRecordReportRecord(
                key=line.key,
                quantity=quantities.plain(line.quantity),
                used_quantity=quantities.plain(line.used),
                decimal_parts_before=quantities.plain(line.carried_before),
                decimal_parts_after=quantities.plain(line.carried_after),
                outcome=_OUTCOME_NUMBERS[line.outcome]
                if line.outcome
                else usage_record_report_pb2.REPORT_OUTCOME_UNSPECIFIED,
                message=line.message,
                record_count=line.record_count,
            )
            for line in value.lines
        ],
        group_count=value.group_count,
        create_time=timestamp(value.created_at),
        complete_time=timestamp(value.completed_at),
        lease_deadline=timestamp(value.lease_deadline),
        lease_count=value.lease_count,
    )
