"""Statements that are made once: whose they are, that none is sent without a value, and that they do not pile up."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from service.domain.metrics import Aggregation, BillableMetric, PropertyFilter
from service.domain.usage import GroupBy
from service.store import usage_sql
from service.store.compiled import PER_METRICS_MAX, Compiled, PerMetrics
from service.store.usage_sql import Pair

START = datetime(2026, 1, 1, 0, 30, tzinfo=UTC)
METRIC = BillableMetric(
    uuid.UUID(int=1),
    "name",
    Aggregation.SUM,
    aggregation_key="tokens",
    event_types=("request",),
    group_keys=(("region",),),
)


def test_a_missing_value_is_refused() -> None:
    """A statement is never sent with NULL in place of a value that nobody gave: it would find nothing, silently."""
    statement = Compiled(sa.select(sa.bindparam("a", type_=sa.Integer), sa.bindparam("b", type_=sa.Integer)))
    assert statement.bound(a=1, b=None)[1] == (1, None)
    with pytest.raises(TypeError, match="not given: b"):
        statement.bound(a=1)


def test_a_value_of_its_own_need_not_be_given() -> None:
    """Values that the statement was made with are sent with it."""
    statement = Compiled(sa.select(sa.literal("own"), sa.bindparam("a", type_=sa.Integer)))
    assert set(statement.bound(a=1)[1]) == {"own", 1}


@pytest.mark.parametrize(
    "other",
    [
        replace(METRIC, event_types=("other",)),
        replace(METRIC, excluded_event_types=("request",)),
        replace(METRIC, property_filters=(PropertyFilter("region", in_values=("eu",)),)),
        replace(METRIC, aggregation_key="bytes"),
        replace(METRIC, aggregation=Aggregation.MAX),
        replace(METRIC, group_keys=(("model", "region"),)),
        replace(METRIC, archived_at=START),
        replace(METRIC, id=uuid.UUID(int=2)),
    ],
)
async def test_a_kept_statement_is_of_its_metric(other: BillableMetric) -> None:
    """Where a bound cuts an hour, metrics that differ in any way that counts do not share a statement."""
    bounds = [(START, START + timedelta(hours=2))]
    totals, by_groups = [], []
    for metric in (METRIC, other, METRIC):
        pairs = [Pair(uuid.UUID(int=9), metric.id)]
        for sent, statement in (
            (totals, await usage_sql.totals([metric], pairs, bounds, None)),
            (by_groups, usage_sql.group_totals(metric, GroupBy("region"), 10, pairs, bounds)),
        ):
            sql, values = statement.compiled.bound(organization="one", **statement.values)
            sent.append((statement.compiled, sql, values))
    for sent in (totals, by_groups):
        assert sent[0] == sent[2]
        assert sent[0][0] is not sent[1][0]
    assert by_groups[0][1:] != by_groups[1][1:]
    # All groups together are the same, whatever the groups.
    assert (totals[0][1:] != totals[1][1:]) == (METRIC.group_keys == other.group_keys)


async def test_statements_do_not_pile_up() -> None:
    """Kept statements are of so many metrics in all at most; those used last stay, and large ones are kept too."""
    made: list[int] = []

    def make(metrics: tuple[BillableMetric, ...], name: int) -> Compiled:
        made.append(name)
        return Compiled(sa.select(sa.literal(name)))

    kept = PerMetrics(make)
    first = await kept.get((METRIC,), 0)
    for name in range(1, 2 * PER_METRICS_MAX):
        await kept.get((METRIC,), name)
        assert await kept.get((METRIC,), 0) is first
    assert made == list(range(2 * PER_METRICS_MAX))
    assert sum(len(key[0]) + 1 for key in kept._kept) <= PER_METRICS_MAX
    large = await kept.get((METRIC,) * PER_METRICS_MAX, -1)
    assert await kept.get((METRIC,) * PER_METRICS_MAX, -1) is large
    assert len(kept._kept) == 1
