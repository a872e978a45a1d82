"""Owns which role may call what: the one table, a row for every method of every service.

A method without a row is refused to everyone, and fails the check command.
"""

from collections.abc import Mapping

from service.domain.roles import EVERY_ROLE, Role

_ADMIN = frozenset({Role.ADMIN})
# Administrators may do everything.
_INGEST = _ADMIN | {Role.INGEST}
_READ = _ADMIN | {Role.READ}

# Health answers anyone: orchestrators have no credential.
PUBLIC_SERVICES = frozenset({"grpc.health.v1.Health"})

PERMISSIONS: Mapping[str, Mapping[str, frozenset[Role]]] = {
    "metering.v1.EventService": {
        "IngestEvents": _INGEST,
        "StreamEvents": _INGEST,
        "SearchEvents": _READ,
        "ListUnmatchedCustomerKeys": _READ,
    },
    "metering.v1.BillableMetricService": {
        "CreateBillableMetric": _ADMIN,
        "GetBillableMetric": _READ,
        "ListBillableMetrics": _READ,
        "UpdateBillableMetric": _ADMIN,
        "ArchiveBillableMetric": _ADMIN,
    },
    "metering.v1.CustomerService": {
        "CreateCustomer": _ADMIN,
        "GetCustomer": _READ,
        "ListCustomers": _READ,
        "SetIngestAliases": _ADMIN,
        "SetBillingPeriod": _ADMIN,
        "UpdateCustomer": _ADMIN,
        "ArchiveCustomer": _ADMIN,
    },
    "metering.v1.UsageService": {
        "ListUsage": _READ,
        "ListUsageWithGroups": _READ,
        "StreamUsage": _READ,
        "StreamUsageWithGroups": _READ,
    },
    "metering.v1.EntitlementService": {
        "CreateProduct": _ADMIN,
        "GetProduct": _READ,
        "ListProducts": _READ,
        "UpdateProduct": _ADMIN,
        "CreateEntitlement": _ADMIN,
        "GetEntitlement": _READ,
        "ListEntitlements": _READ,
        "UpdateEntitlement": _ADMIN,
    },
    "metering.v1.UsageRecordGroupService": {
        # A rehearsal of reporting, so it is for those who report.
        "BatchValidateUsageRecordGroups": _INGEST,
        "ReportUsageRecordGroups": _INGEST,
        "ListUsageRecordGroups": _READ,
        "GetUsageRecordGroup": _READ,
        # These change what was reported already.
        "DeleteUsageRecordGroup": _ADMIN,
        "RetryUsageRecordGroup": _ADMIN,
    },
    "metering.v1.UsageRecordReportService": {
        "ListUsageRecordReports": _READ,
        # The marketplace reporter's: what it says becomes the state of billing.
        "LeaseUsageRecordReports": _ADMIN,
        "CompleteUsageRecordReport": _ADMIN,
    },
    "compat.metronome.v1.UsageService": {
        "IngestEvents": _INGEST,
        "ListUsage": _READ,
        "ListUsageWithGroups": _READ,
        "SearchEvents": _READ,
    },
    "compat.metronome.v1.BillableMetricService": {
        "CreateBillableMetric": _ADMIN,
        "GetBillableMetric": _READ,
        "ListBillableMetrics": _READ,
        "UpdateBillableMetric": _ADMIN,
        "ArchiveBillableMetric": _ADMIN,
        "ListCustomerBillableMetrics": _READ,
    },
    "compat.metronome.v1.CustomerService": {
        "CreateCustomer": _ADMIN,
        "GetCustomer": _READ,
        "ListCustomers": _READ,
        "ArchiveCustomer": _ADMIN,
        "SetIngestAliases": _ADMIN,
        "SetName": _ADMIN,
    },
    "compat.suger.v1.UsageRecordGroupService": {
        "ListUsageRecordGroups": _READ,
        "BatchValidateUsageRecordGroups": _INGEST,
        "BatchCreateUsageRecordGroups": _INGEST,
        "ReportUsageRecordGroup": _INGEST,
        "DeleteUsageRecordGroup": _ADMIN,
        "RetryUsageRecordGroup": _ADMIN,
    },
    "compat.suger.v1.UsageRecordReportService": {"ListUsageRecordReports": _READ},
    "compat.suger.v1.BillableMetricService": {
        "ListBillableMetrics": _READ,
        "GetBillableMetric": _READ,
        "CreateBillableMetric": _ADMIN,
        "UpdateBillableMetric": _ADMIN,
    },
    "compat.suger.v1.EntitlementService": {"GetEntitlement": _READ, "ListEntitlements": _READ},
    # The shape of the API is no secret, but only for those who may use it.
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": EVERY_ROLE},
}


def permitted(method: str) -> frozenset[Role]:
    """Return the roles of which a caller needs one for a method, `/package.Service/Method`; none = nobody may."""
    _, service, name = method.split("/")
    return PERMISSIONS.get(service, {}).get(name, frozenset())
