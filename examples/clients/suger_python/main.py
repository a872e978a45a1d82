"""Validates usage, reports it and lists it again, with Suger's SDK asking metering in place of Suger.

    pip install . suger-sdk-python                  # in the repository
    metering serve --gateway 127.0.0.1:8080         # in another terminal: JSON is answered at the gateway
    python examples/clients/suger_fixture.py        # makes the buyer, the product, the metric and the entitlement
    python examples/clients/suger_python/main.py    # as often as you like: nothing counts twice

It calls SUGER_BASE_URL (http://127.0.0.1:8080) with SUGER_API_KEY, an API key of the service; a server without keys
takes any. SUGER_ORG_ID is the organization of the key; a server without keys takes any, too.
"""

import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from suger_sdk_python import (
    ApiClient,
    Configuration,
    CreateUsageRecordGroupParams,
    MeteringApi,
    MeteringUsageRecord,
    MeteringUsageRecordGroup,
    MeteringUsageRecordGroupMetaInfo,
    NewUsageRecordGroup,
    UsageRecordGroupSource,
)
from suger_sdk_python.exceptions import ApiException, BadRequestException
from urllib3.exceptions import HTTPError

ORG = os.environ.get("SUGER_ORG_ID", "example-org")
ENTITLEMENT, BUYER, PARTNER = "example-entitlement", "example-buyer", "AWS"
STATUSES = ("CREATED", "DELETED", "INVALID", "REPORTED", "REPORT_PENDING", "REPORT_FAILED")
NOW = datetime.now(UTC).replace(microsecond=0)
TODAY = NOW.date().isoformat()

RECORDS = {"cpu": 1.5, "Memory": 4}  # v1: by a dimension's key or name
CALLS = [MeteringUsageRecord(key="example-calls", properties={"region": "eu"}, quantity=3.25)]  # v2: by metric


def notes(**more: Any) -> MeteringUsageRecordGroupMetaInfo:
    """What is known about a group beside its records: it is kept as it is, and can be found by."""
    return MeteringUsageRecordGroupMetaInfo(
        skip_validation=False,
        lago_amount=12.5,
        lago_subscription_id="example-subscription",
        lago_usage_start_time=datetime(2026, 1, 1, tzinfo=UTC),
        metronome_daily_cost_amount=0.25,
        metronome_monthly_invoice_amount=250,
        metronome_monthly_invoice_amount_adjusted=240.5,
        source=UsageRecordGroupSource.UsageRecordGroupSourceMETRONOME,
        **more,
    )


def validate(metering: MeteringApi) -> None:
    """Ask if groups would be taken: nothing is stored."""
    v1 = NewUsageRecordGroup(
        entitlementID=ENTITLEMENT,
        records=RECORDS,
        timestamp=NOW,
        metaInfo=notes(origin_records=RECORDS, timestamp=NOW),
    )
    v2 = NewUsageRecordGroup(
        entitlementID=ENTITLEMENT,
        records={},  # the SDK wants it; empty is none
        billableRecords=CALLS,
        timestamp=NOW,
        metaInfo=notes(billable_records=CALLS, timestamp=NOW),
    )
    if metering.batch_validate_usage_record_groups(ORG, [v1, v2]) == "":
        print("valid")
    wrong = NewUsageRecordGroup(entitlementID=ENTITLEMENT, records={"gpu": 1})
    try:
        metering.batch_validate_usage_record_groups(ORG, [wrong])
    except BadRequestException as error:
        print(f"not valid: {json.loads(error.body)}")


def report(metering: MeteringApi) -> None:
    """Report the groups. Under their ids a retry, or another run on the same day, counts nothing twice.

    Without a timestamp it is usage of now, whenever that is: it does not make a retry another group.
    """
    groups = [
        CreateUsageRecordGroupParams(
            organizationID=ORG,
            entitlementID=ENTITLEMENT,
            id=f"example-cpu-{TODAY}",
            records=RECORDS,
            metaInfo=notes(origin_records=RECORDS),
        ),
        CreateUsageRecordGroupParams(
            organizationID=ORG,
            entitlementID=ENTITLEMENT,
            id=f"example-calls-{TODAY}",
            records={},
            billableRecords=CALLS,
            metaInfo=notes(billable_records=CALLS),
        ),
    ]
    for one in groups:
        print(f"reported {shown(metering.report_usage_record_group(ORG, ENTITLEMENT, one))}")


def listed(metering: MeteringApi, **whose: str) -> Iterator[MeteringUsageRecordGroup]:
    """List the groups of today, page by page; of partner, buyer_id and entitlement_id there may be one."""
    for status in STATUSES:
        offset: int | None = 0
        while offset is not None:
            page = metering.list_usage_record_groups(
                ORG,
                status=status,
                source="METRONOME",
                meta_info='{"lagoSubscriptionID": "example-subscription", "lagoAmount": 12.5}',
                start_date=TODAY,
                end_date=TODAY,
                limit=1,
                offset=offset,
                **whose,
            )
            yield from page.usage_record_groups
            offset = page.next_offset  # None on the last page


def shown(group: MeteringUsageRecordGroup) -> str:
    """A group in a line."""
    used = dict(group.records) | {one.key: one.quantity for one in group.meta_info.billable_records}
    return f"{group.id}: {' '.join(f'{key}={quantity:g}' for key, quantity in sorted(used.items()))}"


def main(base_url: str) -> None:
    """Validate, report, list."""
    configuration = Configuration(
        host=base_url,
        api_key={"APIKeyAuth": os.environ.get("SUGER_API_KEY", "any")},
        api_key_prefix={"APIKeyAuth": "Key"},
    )
    with ApiClient(configuration) as client:
        metering = MeteringApi(client)
        validate(metering)
        report(metering)
        for name, value in (("partner", PARTNER), ("buyer_id", BUYER), ("entitlement_id", ENTITLEMENT)):
            for group in listed(metering, **{name: value}):
                print(f"of {value}: {shown(group)}")


if __name__ == "__main__":
    address = os.environ.get("SUGER_BASE_URL", "http://127.0.0.1:8080")
    try:
        main(address)
    except ApiException as error:
        sys.exit(f"failed at {address}: {error.status}: {error.body}")
    except HTTPError as error:
        sys.exit(f"failed at {address}: {error}")
