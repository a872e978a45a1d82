"""What each marketplace takes: until when, how much and how precise, as pure rules with golden bounds."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.partners import DEFAULT_RULES, BadRule, Partner, PartnerRules, with_changes

AWS, AZURE, GCP = (DEFAULT_RULES[one] for one in (Partner.AWS, Partner.AZURE, Partner.GCP))
INSTANTS = st.integers(-(60 * 10**15), 250 * 10**15).map(
    lambda micros: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(0, 0, micros)
)
QUANTITIES = st.decimals(Decimal(-10), Decimal(10**20), allow_nan=False, places=18)


def utc(text: str) -> datetime:
    """An instant of UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("rules", "at", "deadline"),
    [
        # In the middle of a month the window alone counts.
        (AWS, "2026-03-15T12:00:00", "2026-03-16T12:00:00"),
        (AWS, "2026-03-30T05:59:59.999999", "2026-03-31T05:59:59.999999"),
        # Usage of the last day: whichever comes first. At 06:00 of the last day both end together.
        (AWS, "2026-03-31T05:59:59.999999", "2026-04-01T05:59:59.999999"),
        (AWS, "2026-03-31T06:00:00", "2026-04-01T06:00:00"),
        (AWS, "2026-03-31T06:00:00.000001", "2026-04-01T06:00:00"),
        (AWS, "2026-03-31T23:59:59.999999", "2026-04-01T06:00:00"),
        # The new month has a deadline of its own.
        (AWS, "2026-04-01T00:00:00", "2026-04-02T00:00:00"),
        # Years and Februaries end as well.
        (AWS, "2026-12-31T23:00:00", "2027-01-01T06:00:00"),
        (AWS, "2026-11-30T23:00:00", "2026-12-01T06:00:00"),
        (AWS, "2027-02-28T23:00:00", "2027-03-01T06:00:00"),
        (AWS, "2028-02-28T23:00:00", "2028-02-29T23:00:00"),
        (AWS, "2028-02-29T23:00:00", "2028-03-01T06:00:00"),
        # The others have no rule of months.
        (AZURE, "2026-03-31T23:00:00", "2026-04-01T23:00:00"),
        (AZURE, "2026-12-31T12:00:00", "2027-01-01T12:00:00"),
        (GCP, "2026-01-31T23:00:00", "2026-03-02T23:00:00"),
        (GCP, "2027-12-15T00:00:00", "2028-01-14T00:00:00"),
    ],
)
def test_deadlines(rules: PartnerRules, at: str, deadline: str) -> None:
    """Usage is late when the window is over, and on AWS from 06:00 UTC of the next month's first day on."""
    assert rules.deadline(utc(at)) == utc(deadline)


@given(st.sampled_from([AWS, AZURE, GCP]), INSTANTS, INSTANTS)
def test_a_deadline_is_never_before_what_it_is_of(rules: PartnerRules, one: datetime, other: datetime) -> None:
    """Usage of any time can be reported at that time, and what is later has no earlier deadline."""
    assert one < rules.deadline(one) <= one + timedelta(hours=rules.window_hours)
    assert (rules.deadline(one) <= rules.deadline(other)) or one > other


@pytest.mark.parametrize(
    ("rules", "quantity", "reported"),
    [
        (AWS, "0", "0"),
        (AWS, "-1.5", "0"),
        (AWS, "0.999999999999999999", "0"),
        (AWS, "1", "1"),
        (AWS, "7.9", "7"),
        (AWS, "1000", "1000"),
        (AWS, "2147483646.999999999999999999", "2147483646"),
        (AWS, "2147483647", "2147483647"),
        (AWS, "2147483647.5", "2147483647"),
        (AWS, "2147483648", "2147483647"),
        (AZURE, "0.0000009", "0"),
        (AZURE, "0.0000019", "0.000001"),
        (AZURE, "12.3456789", "12.345678"),
        (AZURE, "999999998.9999999", "999999998.999999"),
        (AZURE, "999999999.000001", "999999999"),
        (GCP, "9223372036854775806.9", "9223372036854775806"),
        (GCP, "9223372036854775808", "9223372036854775807"),
    ],
)
def test_what_can_be_reported_at_once(rules: PartnerRules, quantity: str, reported: str) -> None:
    """A quantity is cut to the places and the maximum of the marketplace, never rounded up and never below zero."""
    assert rules.reportable(Decimal(quantity)) == Decimal(reported)


@given(st.sampled_from([AWS, AZURE, GCP]), QUANTITIES)
def test_nothing_is_reported_that_was_not_used(rules: PartnerRules, quantity: Decimal) -> None:
    """What is reported and what is left add up; what is left fits no more unless the maximum was reported."""
    reported = rules.reportable(quantity)
    assert 0 <= reported <= max(quantity, Decimal(0))
    assert reported <= rules.quantity_max
    assert -int(reported.as_tuple().exponent) <= rules.reported_places + 1
    assert (
        reported == rules.quantity_max or quantity <= 0 or quantity - reported < Decimal(10) ** -rules.reported_places
    )


@pytest.mark.parametrize("partner", list(Partner))
def test_each_rule_can_be_changed_alone(partner: Partner) -> None:
    """A change sets one rule of one partner, the last of two changes holds, and the defaults stay as they are."""
    before = dict(DEFAULT_RULES)
    changes = {
        "window_hours": 6,
        "month_end_hour": -1,
        "places": 3,
        "reported_places": 2,
        "quantity_max": 10**20 - 1,
        "allocations": 0,
    }
    for name, value in changes.items():
        found = with_changes([f"{partner.value}.{name}={1}", f"{partner.value}.{name}={value}"])
        assert getattr(found[partner], name) == value
        for other in Partner:
            for rule in changes:
                if (other, rule) != (partner, name):
                    assert getattr(found[other], rule) == getattr(DEFAULT_RULES[other], rule)
    assert isinstance(with_changes([f"{partner.value}.quantity_max=5"])[partner].quantity_max, Decimal)
    assert with_changes([]) == before == dict(DEFAULT_RULES)


@pytest.mark.parametrize(
    "change",
    [
        "",
        "AWS",
        "AWS.window_hours",
        "AWS.window_hours=",
        "AWS.window_hours=1.5",
        "AWS.window_hours=1 ",
        "AWS.window_hours=1\n",
        "AWS.window_hours=+1",
        "AWS.window_hours=٣",
        "aws.window_hours=1",
        "ALIBABA.window_hours=1",
        "AWS.deadline=1",
        "AWS.window=1",
        "AWS.window_hours=0",
        "AWS.window_hours=8785",
        "AWS.month_end_hour=24",
        "AWS.month_end_hour=-2",
        "AWS.places=19",
        "AWS.places=-1",
        "AWS.reported_places=19",
        "AWS.quantity_max=0",
        "AWS.quantity_max=100000000000000000000",
        "AWS.quantity_max=999999999999999999999",
        "AWS.allocations=2",
        "AWS.window_hours=1,AZURE.window_hours=1",
    ],
)
def test_what_is_no_change_is_refused(change: str) -> None:
    """A partner, rule or number that is none, or is out of range, is an error and not the default."""
    with pytest.raises(BadRule):
        with_changes(["GCP.places=1", change])
