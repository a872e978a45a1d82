"""Owns what a customer and its billing period are, and which are valid."""

import calendar
import enum
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

from service.domain import checks
from service.domain.metrics import content_digest
from service.errors import Reason, Violation
from service.limits import limit

ALIASES_MAX = limit("ALIASES", 2_000, most=2_000, about="ingest aliases of a customer", field="customer.ingest_aliases")
BUYER_ID_MAX = 36
# Billing dates keep clear of the ends of the calendar so that stepping from them never leaves it.
YEAR_MIN, YEAR_MAX = 1900, 9000


class BillingFrequency(enum.Enum):
    """Length of one billing period."""

    MONTHLY = "MONTHLY"
    QUARTERLY = "QUARTERLY"
    ANNUAL = "ANNUAL"
    WEEKLY = "WEEKLY"


_MONTHS = {BillingFrequency.MONTHLY: 1, BillingFrequency.QUARTERLY: 3, BillingFrequency.ANNUAL: 12}


@dataclass(frozen=True, slots=True)
class BillingPeriod:
    """How a customer's time is cut into periods: whole steps from `anchor_date`, from `starting_on` on, until
    `ending_before` if there is one. Dates mean midnights of the zone that a request names.
    """

    frequency: BillingFrequency
    anchor_date: date
    starting_on: date
    ending_before: date | None = None

    def holding(self, day: date) -> tuple[date, date] | None:
        """Return the first day of the period that holds a day, and the day after its last; None if there is none.

        A month that lacks the anchor's day begins its period on its last day. The first and the last period are cut by
        `starting_on` and `ending_before`.
        """
        if day < self.starting_on or (self.ending_before is not None and day >= self.ending_before):
            return None
        if self.frequency is BillingFrequency.WEEKLY:
            start = day - timedelta(days=(day - self.anchor_date).days % 7)
            end = start + timedelta(days=7)
        else:
            months = _MONTHS[self.frequency]
            steps = ((day.year - self.anchor_date.year) * 12 + day.month - self.anchor_date.month) // months
            if _months_after(self.anchor_date, steps * months) > day:
                steps -= 1
            start = _months_after(self.anchor_date, steps * months)
            end = _months_after(self.anchor_date, (steps + 1) * months)
        return max(start, self.starting_on), end if self.ending_before is None else min(end, self.ending_before)


@dataclass(frozen=True, slots=True)
class Customer:
    """Who consumes. `ingest_aliases` are the further keys (beside the id) by which events may name it."""

    id: uuid.UUID
    name: str
    buyer_id: str
    ingest_aliases: tuple[str, ...] = ()
    billing_period: BillingPeriod | None = None
    custom_fields: Mapping[str, str] = field(default_factory=dict)
    created_at: datetime | None = None
    updated_at: datetime | None = None
    archived_at: datetime | None = None

    def digest(self) -> bytes:
        """Tell what this customer was created with from any other content."""
        period = self.billing_period
        return content_digest(
            {
                "name": self.name,
                "buyer_id": self.buyer_id,
                "aliases": sorted(self.ingest_aliases),
                "period": period
                and [period.frequency.value, *map(str, (period.anchor_date, period.starting_on, period.ending_before))],
                "custom_fields": dict(self.custom_fields),
            }
        )


def violations(customer: Customer, path: str) -> list[Violation]:
    """Return every fault of a customer, with field paths below `path`."""
    faults = [
        checks.identifier(f"{path}.name", customer.name, most=checks.NAME_MAX),
        checks.identifier(f"{path}.buyer_id", customer.buyer_id, most=BUYER_ID_MAX),
        *alias_violations(f"{path}.ingest_aliases", customer.ingest_aliases),
        *checks.custom_fields(f"{path}.custom_fields", customer.custom_fields),
    ]
    return [fault for fault in faults if fault]


def alias_violations(path: str, aliases: Sequence[str]) -> list[Violation]:
    """Return every fault of a set of ingest aliases (in stored form)."""
    if len(aliases) > ALIASES_MAX:
        message = f"has {len(aliases)} items; at most {ALIASES_MAX} are allowed"
        return [Violation(path, Reason.LIMIT_EXCEEDED, message)]
    faults = []
    seen: set[str] = set()
    for i, alias in enumerate(aliases):
        if fault := checks.identifier(f"{path}[{i}]", alias):
            faults.append(fault)
        elif alias in seen:
            faults.append(Violation(f"{path}[{i}]", Reason.DUPLICATE_ITEM, f"{alias!r} stands twice"))
        seen.add(alias)
    return faults


def _months_after(day: date, months: int) -> date:
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))
