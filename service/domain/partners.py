"""Owns what each cloud marketplace takes: how late, how precise, how much, and in which form.

The defaults are what the marketplaces document (AWS BatchMeterUsage, the Azure metered billing API 2018-08-31, Google
Service Control); an operator can change each, since several limits coexist in the wild.
"""

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Any

# A group's time may be so far ahead of the server's clock: clocks differ, marketplaces refuse the future.
SKEW = timedelta(minutes=5)


class Partner(enum.Enum):
    """A cloud marketplace; see the proto enum of the same name."""

    AWS = "AWS"
    AZURE = "AZURE"
    GCP = "GCP"


@dataclass(frozen=True, slots=True)
class PartnerRules:
    """What one marketplace takes.

    `window_hours`: usage this old or older is refused. `month_end_hour`: usage of a month is refused from this hour of
    the next month's first UTC day on; -1 = no such rule. `places`: decimal places that a record may have.
    `reported_places`: decimal places of what is reported; 0 = whole numbers, the rest is carried to the next report.
    `quantity_max`: the largest quantity of a record, and of what is reported at once. `allocations`: whether quantities
    may be divided over tags (1 or 0).
    """

    window_hours: int
    month_end_hour: int
    places: int
    reported_places: int
    quantity_max: Decimal
    allocations: int

    def deadline(self, at: datetime) -> datetime:
        """Return the moment from which on usage of this time is refused."""
        last = at + timedelta(hours=self.window_hours)
        if self.month_end_hour >= 0:
            months = at.year * 12 + at.month  # of the next month, counted from 0
            closes = datetime(months // 12, months % 12 + 1, 1, self.month_end_hour, tzinfo=UTC)
            last = min(last, closes)
        return last

    @property
    def unit(self) -> Decimal:
        """The smallest quantity that can be reported."""
        return Decimal(1).scaleb(-self.reported_places)

    def reportable(self, quantity: Decimal) -> Decimal:
        """Return the most that can be reported of a quantity: not negative, cut to what the marketplace takes."""
        if quantity <= 0:
            return Decimal(0)
        if quantity >= self.quantity_max:
            return self.quantity_max
        whole, _, fraction = format(quantity, "f").partition(".")
        return Decimal(f"{whole}.{fraction[: self.reported_places]}0")


Rules = Mapping[Partner, PartnerRules]

DEFAULT_RULES: Rules = MappingProxyType(
    {
        # BatchMeterUsage: "records aren't accepted 24 hours or more after an event"; the previous month closes at
        # 06:00 UTC on the 1st; Quantity is an int32.
        Partner.AWS: PartnerRules(24, 6, 18, 0, Decimal(2**31 - 1), 1),
        # Past 24 hours only; quantities are doubles, of which 15 digits are exact.
        Partner.AZURE: PartnerRules(24, -1, 6, 6, Decimal(10**9 - 1), 0),
        # No hard limit is documented; outages of up to 30 days are provided for. int64Value.
        Partner.GCP: PartnerRules(30 * 24, -1, 18, 0, Decimal(2**63 - 1), 0),
    }
)

_LIMITS = {
    "window_hours": (1, 24 * 366),
    "month_end_hour": (-1, 23),
    "places": (0, 18),
    "reported_places": (0, 18),
    "quantity_max": (1, 10**20 - 1),
    "allocations": (0, 1),
}
_CHANGE = re.compile(r"([A-Z]+)\.([a-z_]+)=(-?[0-9]{1,20})")


class BadRule(ValueError):
    """A change of a rule that is not one; the text says what would be."""


def with_changes(changes: Iterable[str], rules: Rules = DEFAULT_RULES) -> Rules:
    """Return the rules with changes such as `AWS.window_hours=6`; raises BadRule."""
    found = dict(rules)
    for change in changes:
        match = _CHANGE.fullmatch(change)
        if match is None or match[1] not in Partner.__members__ or match[2] not in _LIMITS:
            names = ", ".join(field.name for field in fields(PartnerRules))
            raise BadRule(f"{change!r} is not PARTNER.rule=number; partners are AWS, AZURE, GCP, rules are {names}.")
        partner, name, value = Partner[match[1]], match[2], int(match[3])
        least, most = _LIMITS[name]
        if not least <= value <= most:
            raise BadRule(f"{partner.value}.{name} must be {least}..{most}.")
        changed: dict[str, Any] = {name: Decimal(value) if name == "quantity_max" else value}
        found[partner] = replace(found[partner], **changed)
    return found
