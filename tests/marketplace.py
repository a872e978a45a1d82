"""What tests of record groups share: something to sell, somebody who bought it, and groups of records."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from conftest import Client, timestamp

from metering.v1 import entitlement_pb2, usage_record_group_pb2, usage_record_report_pb2
from service.database import Database
from service.domain.partners import DEFAULT_RULES, Rules
from service.domain.windows import cell_floor
from service.reporting import roll_up_hour

DIMENSIONS = ({"key": "cpu", "name": "CPU hours"}, {"key": "mem", "name": "Memory"})


async def sell(
    client: Client, entitlement_id: str = "ent", *, partner: str = "AWS", buyer_id: str = "", **fields: Any
) -> entitlement_pb2.Entitlement:
    """Create a product, a customer and the entitlement that binds them; its product is `p-` and its id.

    The term began 30 days ago; the buyer is `b-` and the id unless it exists already and is named.
    """
    product = entitlement_pb2.Product(
        id=f"p-{entitlement_id}"[:36], name="Product", partner=f"PARTNER_{partner}", dimensions=DIMENSIONS
    )
    await client.entitlements.CreateProduct(entitlement_pb2.CreateProductRequest(product=product))
    if not buyer_id:
        buyer_id = f"b-{entitlement_id}"[:36]
        await client.create_customer(buyer_id=buyer_id)
    start = datetime.now(UTC) - timedelta(days=30)
    fields = {"starting_on": timestamp(start), "product_id": product.id, "buyer_id": buyer_id, **fields}
    entitlement = entitlement_pb2.Entitlement(id=entitlement_id, **fields)
    request = entitlement_pb2.CreateEntitlementRequest(entitlement=entitlement)
    return (await client.entitlements.CreateEntitlement(request)).entitlement  # type: ignore[no-any-return]


def group(
    group_id: str = "", entitlement_id: str = "ent", records: Mapping[str, str] | None = None, **fields: Any
) -> usage_record_group_pb2.NewUsageRecordGroup:
    """Make a group; `at` is a datetime. Without records (v1 or v2) it holds one unit of cpu."""
    at = fields.pop("at", None)
    if records is None and "billable_records" not in fields:
        records = {"cpu": "1"}
    message = usage_record_group_pb2.NewUsageRecordGroup(
        id=group_id, entitlement_id=entitlement_id, records=records or {}, **fields
    )
    if at is not None:
        message.timestamp.CopyFrom(timestamp(at))
    return message


async def validate(
    client: Client, *groups: usage_record_group_pb2.NewUsageRecordGroup
) -> list[usage_record_group_pb2.UsageRecordGroupValidation]:
    """Validate groups."""
    request = usage_record_group_pb2.BatchValidateUsageRecordGroupsRequest(groups=groups)
    return list((await client.groups.BatchValidateUsageRecordGroups(request)).results)


async def report(
    client: Client, *groups: usage_record_group_pb2.NewUsageRecordGroup
) -> list[usage_record_group_pb2.UsageRecordGroupResult]:
    """Report groups."""
    request = usage_record_group_pb2.ReportUsageRecordGroupsRequest(groups=groups)
    return list((await client.groups.ReportUsageRecordGroups(request)).results)


async def reported(
    client: Client, *groups: usage_record_group_pb2.NewUsageRecordGroup
) -> list[usage_record_group_pb2.UsageRecordGroup]:
    """Report groups, all of which must be taken."""
    results = await report(client, *groups)
    assert {one.verdict for one in results} == {1}, results
    return [one.group for one in results]


async def roll_up(database: Database, hour: datetime | None = None, rules: Rules = DEFAULT_RULES) -> int:
    """Roll an hour up, by default the one that is not over yet: everything that waits now."""
    return await roll_up_hour(database, rules, hour or cell_floor(datetime.now(UTC)), wait=True)


async def lease(client: Client, token: str, **fields: Any) -> list[usage_record_report_pb2.UsageRecordReport]:
    """Lease reports."""
    request = usage_record_report_pb2.LeaseUsageRecordReportsRequest(lease_token=token, **fields)
    return list((await client.reports.LeaseUsageRecordReports(request)).usage_record_reports)


async def complete(
    client: Client, report_id: str, token: str, failed: Mapping[str, str] | None = None, *, taken: tuple[str, ...] = ()
) -> usage_record_report_pb2.UsageRecordReport:
    """Complete a report: these dimensions failed, for the reasons given, and these were taken."""
    outcomes = [{"key": key, "outcome": "REPORT_OUTCOME_REPORTED"} for key in taken]
    outcomes += [
        {"key": key, "outcome": "REPORT_OUTCOME_FAILED", "message": why} for key, why in (failed or {}).items()
    ]
    request = usage_record_report_pb2.CompleteUsageRecordReportRequest(
        id=report_id, lease_token=token, outcomes=outcomes
    )
    return (await client.reports.CompleteUsageRecordReport(request)).usage_record_report  # type: ignore[no-any-return]
