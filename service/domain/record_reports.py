"""Owns what an hourly report says: how much of what was used is told to the marketplace, and what is carried on."""

import enum
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from service.domain import quantities
from service.domain.partners import Partner, PartnerRules
from service.limits import limit

LEASED_MAX = limit(
    "REPORTS_PER_LEASE",
    100,
    most=100,
    about="reports leased at once; who asks for more gets as many",
    field="max_reports",
    error="",
)
LEASED_DEFAULT = limit(
    "REPORTS_PER_LEASE_DEFAULT",
    min(25, LEASED_MAX),
    most=LEASED_MAX,
    about="reports leased at once if the call does not say",
    field="max_reports",
    error="",
)
LEASE_S_MAX = limit(
    "LEASE_SECONDS",
    3_600,
    most=3_600,
    about="seconds of a lease",
    field="lease_duration",
    error="INVALID_ARGUMENT, FIELD_INVALID",
)
LEASE_S_DEFAULT = limit(
    "LEASE_SECONDS_DEFAULT",
    min(300, LEASE_S_MAX),
    most=LEASE_S_MAX,
    about="seconds of a lease if the call does not say",
    field="lease_duration",
    error="",
)
MESSAGE_MAX = limit(
    "OUTCOME_MESSAGE_CHARACTERS",
    256,
    most=256,
    about="characters of what a marketplace said of a record",
    field="outcomes[0].message",
)
# Lines of all reports of one answer, so that no client finds it too large. One report has no more: see RECORD_KEYS_MAX.
LINES_MAX = 5_000


class ReportStatus(enum.Enum):
    """State of a report; see the proto enum UsageRecordReportStatus."""

    PENDING = "PENDING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


class ReportOutcome(enum.Enum):
    """What became of a line of a report; see the proto enum of the same name."""

    REPORTED = "REPORTED"
    FAILED = "FAILED"


class Answer(NamedTuple):
    """What the marketplace said of a line."""

    outcome: ReportOutcome
    message: str


class Line(NamedTuple):
    """What a report says of one dimension: of `carried_before + used`, `quantity` is reported, the rest carried on."""

    key: str
    quantity: Decimal
    used: Decimal
    carried_before: Decimal
    record_count: int
    outcome: ReportOutcome | None = None
    message: str = ""

    @property
    def left(self) -> Decimal:
        """How much of what was used is not in `quantity`; negative when more than that was carried before."""
        return quantities.subtract(self.used, self.quantity)

    @property
    def carried_after(self) -> Decimal:
        """What is carried to the next report."""
        return quantities.add(self.carried_before, self.left)


@dataclass(frozen=True, slots=True)
class Report:
    """One entitlement's roll-up of one hour, and its way to the marketplace."""

    id: uuid.UUID
    partner: Partner
    product_id: str
    entitlement_id: str
    buyer_id: str
    marketplace_time: datetime
    report_deadline: datetime
    group_count: int
    status: ReportStatus
    created_at: datetime
    completed_at: datetime | None
    lease_deadline: datetime | None
    lease_count: int
    lines: tuple[Line, ...]


class ReportQuery(NamedTuple):
    """What a list of reports asks for; None = any. `start` and `end` bound the marketplace time, half-open."""

    start: datetime
    end: datetime
    partner: Partner | None = None
    entitlement_id: str | None = None
    buyer_id: str | None = None
    status: ReportStatus | None = None


class Used(NamedTuple):
    """What the records of one dimension add up to, and how many they are."""

    quantity: Decimal
    records: int


def lines(used: Mapping[str, Used], carried: Mapping[str, Decimal], rules: PartnerRules) -> list[Line]:
    """Return what a report says of each dimension: of those used, and of those that carried enough to be told.

    What has nothing to tell is settled by that.
    """
    nothing = Used(Decimal(0), 0)
    due = {key for key, quantity in carried.items() if rules.reportable(quantity)}
    found = []
    for key in sorted(due | set(used), key=str.encode):
        sum_, before = used.get(key, nothing), carried.get(key, Decimal(0))
        quantity = rules.reportable(quantities.add(before, sum_.quantity))
        outcome = None if quantity else ReportOutcome.REPORTED
        found.append(Line(key, quantity, sum_.quantity, before, sum_.records, outcome))
    return found
