"""Turns a billable metric into SQL: the one evaluator, used by ingest, backfill, cut cells and recomputation alike.

Everything here takes `events`, anything with the columns transaction_id, customer_key, event_type, timestamp,
properties and source: the stored events, or those that a statement has just inserted.
"""

import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, BYTEA, Insert, aggregate_order_by, array, insert

from service.domain.events import EventSource
from service.domain.metrics import QUANTITY, Aggregation, BillableMetric
from service.domain.windows import CELL
from service.store.tables import INSTANT, NUMERIC, texts, usage_cells

# The columns that `cells` yields and in which usage_cells stores them.
MEASURES = ("counted", "skipped", "sum", "min", "max", "latest_at", "latest_transaction_id", "latest_value")
# Which of them an aggregation fills, beside the first two.
_FILLED: Mapping[Aggregation, Sequence[str]] = {
    Aggregation.COUNT: (),
    Aggregation.UNIQUE: (),
    Aggregation.SUM: ("sum",),
    Aggregation.AVG: ("sum",),
    Aggregation.MIN: ("min",),
    Aggregation.MAX: ("max",),
    Aggregation.LATEST: ("latest_at", "latest_transaction_id", "latest_value"),
}
# What a cell is set to when no event is left in it.
EMPTY_CELL: dict[str, Any] = {
    **dict.fromkeys(MEASURES),
    "counted": 0,
    "skipped": 0,
    "updated_at": sa.func.clock_timestamp(),
}
# What all record metrics have in common: of which of them an event is, its type says (see `cells.of_records`).
RECORDS = BillableMetric(uuid.UUID(int=0), "", Aggregation.SUM, aggregation_key=QUANTITY, record_key="")

CELL_KEY = ("metric_id", "customer_key", "cell_start", "group_digest")
# What the cell of all events has as its group, and as the digest of that.
NO_GROUPS: sa.ColumnClause[Any] = sa.literal_column("'{}'::text[]", ARRAY(sa.Text))
TOTAL: sa.ColumnClause[Any] = sa.literal_column("''::bytea", BYTEA)

# A plain decimal: what `domain.quantities` prints, and what can be summed. Nothing else is ever cast to numeric. The
# numbers of digits are looked at apart: bounds inside of the expression make it five times as slow.
_DECIMAL = r"^-?[0-9]+(\.[0-9]+)?$"
_DIGITS_MAX, _PLACES_MAX = 38, 18
_CELL_ORIGIN = sa.literal_column("TIMESTAMPTZ '0001-01-01 00:00:00+00'", INSTANT)
_CELL_STRIDE: sa.ColumnClause[Any] = sa.literal_column(f"INTERVAL '{int(CELL.total_seconds())} seconds'")

Columns = Any  # the columns of a FROM clause; SQLAlchemy gives them no useful static type


def cell_start(timestamp: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """Return the start of the cell that holds an instant."""
    return sa.func.date_bin(_CELL_STRIDE, timestamp, _CELL_ORIGIN, type_=INSTANT)


def digest(text: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """Return 16 bytes of SHA-256 of a text: short enough for any index, and no two texts meet."""
    return sa.func.substring(sa.func.sha256(sa.func.convert_to(text, "UTF8")), 1, 16, type_=BYTEA)


class Rule(NamedTuple):
    """One condition that a metric sets: the field of the metric that holds it, and what an event that fails it is."""

    path: str
    failure: str
    condition: sa.ColumnElement[bool]


def rules(metric: BillableMetric, events: sa.FromClause) -> list[Rule]:
    """Return every condition under which the metric counts an event.

    Values compare by canonical string: `->>` prints a JSON string as it is and a number as it was stored, which is its
    canonical form; JSON null and an absent property are both NULL.
    """
    columns: Columns = events.c
    made = "not made" if metric.source is EventSource.GROUP else "made"
    source = columns.source == sa.literal_column(str(int(metric.source)))
    found = [Rule("record_key", f"event was {made} from a usage record group", source)]
    if metric.event_types:
        allowed = columns.event_type == sa.any_(texts(metric.event_types))
        found.append(Rule("event_type_filter.in_values", "event_type is none of the values allowed", allowed))
    if metric.excluded_event_types:
        allowed = columns.event_type != sa.all_(texts(metric.excluded_event_types))
        found.append(Rule("event_type_filter.not_in_values", "event_type is one of the values excluded", allowed))
    for i, one in enumerate(metric.property_filters):
        path, value = f"property_filters[{i}]", _property(columns, one.name)
        if one.exists is not None:
            failure = f'property "{one.name}" is {"missing" if one.exists else "present"}'
            found.append(Rule(f"{path}.exists", failure, value.is_not(None) if one.exists else value.is_(None)))
        if one.in_values:
            failure = f'property "{one.name}" is missing or none of the values allowed'
            found.append(Rule(f"{path}.in_values", failure, value == sa.any_(texts(one.in_values))))
        if one.not_in_values:
            # NULL (absent) passes: there is no value that is excluded.
            passes = sa.func.coalesce(value != sa.all_(texts(one.not_in_values)), sa.true())
            failure = f'property "{one.name}" is one of the values excluded'
            found.append(Rule(f"{path}.not_in_values", failure, passes))
    if metric.archived_at is not None:
        before = columns.timestamp < sa.literal(metric.archived_at, INSTANT)
        found.append(Rule("archive_time", "timestamp is not before the metric was archived", before))
    return found


def matches(metric: BillableMetric, events: sa.FromClause) -> sa.ColumnElement[bool]:
    """Return the condition under which the metric counts an event: all its rules."""
    return sa.and_(sa.true(), *(rule.condition for rule in rules(metric, events)))


# What `outcome` says of an event that matches; one that does not has the position of the rule that it fails.
COUNTED, MISSING, NOT_DECIMAL, PENDING = -1, -2, -3, -4


def outcome(metric: BillableMetric, events: sa.FromClause) -> sa.ColumnElement[int]:
    """Return what the metric makes of an event: the position of the first of `rules` it fails, or a constant above."""
    columns: Columns = events.c
    whens: list[tuple[sa.ColumnElement[bool], Any]] = [
        (rule.condition.is_not(sa.true()), sa.literal_column(str(i))) for i, rule in enumerate(rules(metric, events))
    ]
    if metric.backfilled_until is not None:
        pending = columns.timestamp >= sa.literal(metric.backfilled_until, INSTANT)
        whens.append((pending, sa.literal_column(str(PENDING))))
    if metric.aggregation_key is not None:
        value = _property(columns, metric.aggregation_key)
        whens.append((value.is_(None), sa.literal_column(str(MISSING))))
        if metric.aggregation is not Aggregation.UNIQUE:
            whens.append((sa.not_(_is_decimal(value)), sa.literal_column(str(NOT_DECIMAL))))
    if not whens:
        return sa.literal_column(str(COUNTED), sa.Integer)
    return sa.case(*whens, else_=sa.literal_column(str(COUNTED)))


def cells(
    metric: BillableMetric,
    events: sa.FromClause,
    bucket: sa.ColumnElement[Any],
    *where: sa.ColumnElement[bool],
    with_total: bool = False,
) -> sa.Select[Any]:
    """Aggregate the events that match the metric (and `where`) into cells.

    Of RECORDS, the metric is what the column `metric_id` of `events` says. `bucket` is what tells one cell of time from
    another. Yields metric_id, customer_key, cell_start (the bucket), group_digest, cell_group and the MEASURES; one
    row per customer key, bucket and values of the group properties, and with `with_total` one more for all of these
    values together, as usage_cells has it.
    """
    matched = _matched(metric, events, bucket, *where)
    columns: Columns = matched.c
    value = columns.number if "number" in columns else sa.null()
    counts = sa.func.count(columns.value if metric.aggregation is Aggregation.UNIQUE else value)
    if metric.aggregation is Aggregation.COUNT:
        counts = sa.func.count()
    measures: dict[str, sa.ColumnElement[Any]] = {
        "counted": counts,
        "skipped": sa.func.count() - counts,
        "sum": sa.null().cast(NUMERIC),
        "min": sa.null().cast(NUMERIC),
        "max": sa.null().cast(NUMERIC),
        "latest_at": sa.null().cast(INSTANT),
        "latest_transaction_id": sa.null().cast(sa.Text),
        "latest_value": sa.null().cast(NUMERIC),
    }
    match metric.aggregation:
        case Aggregation.COUNT | Aggregation.UNIQUE:
            pass
        case Aggregation.SUM | Aggregation.AVG:
            measures["sum"] = sa.func.sum(value)
        case Aggregation.MIN:
            measures["min"] = sa.func.min(value)
        case Aggregation.MAX:
            measures["max"] = sa.func.max(value)
        case Aggregation.LATEST:
            for name, column in (
                ("latest_at", columns.timestamp),
                ("latest_transaction_id", columns.transaction_id),
                ("latest_value", value),
            ):
                measures[name] = latest(column, columns.timestamp, columns.transaction_id, value.is_not(None))
    of_metric = [columns.metric_id] if metric is RECORDS else []
    cell_group, group_digest = columns.cell_group, _group_digest(metric, columns.cell_group)
    by: sa.ColumnElement[Any] = cell_group
    if with_total and metric.group_properties:
        # Of the row for all of them together the values are NULL, which they are in no other.
        by = sa.func.rollup(cell_group)
        cell_group = sa.func.coalesce(cell_group, NO_GROUPS).label("cell_group")
        group_digest = sa.func.coalesce(group_digest, TOTAL)
    return sa.select(
        *(of_metric or [sa.literal(metric.id, sa.Uuid).label("metric_id")]),
        columns.customer_key,
        columns.cell_start,
        group_digest.label("group_digest"),
        cell_group,
        *(expression.label(name) for name, expression in measures.items()),
    ).group_by(*of_metric, columns.customer_key, columns.cell_start, by)


def distinct_values(
    metric: BillableMetric, events: sa.FromClause, bucket: sa.ColumnElement[Any], *where: sa.ColumnElement[bool]
) -> sa.Select[Any]:
    """Yield the different values of a UNIQUE metric: metric_id, customer_key, cell_start, group_digest, cell_group
    and value_digest.
    """
    columns: Columns = _matched(metric, events, bucket, *where).c
    return (
        sa.select(
            sa.literal(metric.id, sa.Uuid).label("metric_id"),
            columns.customer_key,
            columns.cell_start,
            _group_digest(metric, columns.cell_group).label("group_digest"),
            columns.cell_group,
            digest(columns.value).label("value_digest"),
        )
        .where(columns.value.is_not(None))
        .distinct()
    )


def latest(
    column: sa.ColumnElement[Any],
    at: sa.ColumnElement[Any],
    transaction_id: sa.ColumnElement[Any],
    present: sa.ColumnElement[bool],
) -> sa.ColumnElement[Any]:
    """Aggregate to the column's value at the greatest (at, transaction id in byte order) among rows `present`."""
    order = aggregate_order_by(column, at.desc(), transaction_id.collate("C").desc())
    ordered = sa.func.array_agg(order, type_=ARRAY(column.type)).filter(present)
    return sa.type_coerce(ordered, ARRAY(column.type))[1]


def in_order(rows: sa.FromClause) -> list[sa.ColumnElement[Any]]:
    """Return what orders cells as all who write them take them, so that they cannot deadlock.

    Those of all groups come first: stored next to each other, they are read without what lies between them.
    """
    return [rows.c.group_digest > TOTAL, *(rows.c[name] for name in CELL_KEY)]


def merge_into_cells(rows: sa.Select[Any], aggregations: Collection[Aggregation]) -> Insert:
    """Return the statement that adds cell rows (as `cells` yields, of metrics that aggregate so) to the stored cells.

    Rows are taken in order: two transactions that touch the same cells lock them in the same order and cannot deadlock.
    """
    # What no metric fills stays as it is, which is NULL: to work it out for every row took a fifth of the statement.
    filled = [name for name in MEASURES[2:] if any(name in _FILLED[one] for one in aggregations)]
    statement = _insert_cells(rows, (*MEASURES[:2], *filled))
    old, new = usage_cells.c, statement.excluded
    newer = sa.and_(
        new.latest_at.is_not(None),
        sa.or_(
            old.latest_at.is_(None),
            sa.tuple_(new.latest_at, new.latest_transaction_id) > sa.tuple_(old.latest_at, old.latest_transaction_id),
        ),
    )
    # NULL is "nothing yet", so the other side stands; LEAST and GREATEST do so by themselves.
    merged = {
        "sum": sa.func.coalesce(old.sum + new.sum, old.sum, new.sum),
        "min": sa.func.least(old.min, new.min),
        "max": sa.func.greatest(old.max, new.max),
        **{name: sa.case((newer, new[name]), else_=old[name]) for name in _FILLED[Aggregation.LATEST]},
    }
    return statement.on_conflict_do_update(
        index_elements=list(usage_cells.primary_key.columns),
        set_={
            "counted": old.counted + new.counted,
            "skipped": old.skipped + new.skipped,
            **{name: merged[name] for name in filled},
            "updated_at": sa.func.greatest(old.updated_at, new.updated_at),
        },
    )


def replace_cells(rows: sa.Select[Any]) -> Insert:
    """Return the statement that stores cell rows in place of what is there."""
    statement = _insert_cells(rows, MEASURES)
    return statement.on_conflict_do_update(
        index_elements=list(usage_cells.primary_key.columns),
        set_={name: statement.excluded[name] for name in (*MEASURES, "updated_at")},
    )


def _insert_cells(rows: sa.Select[Any], measures: Sequence[str]) -> Insert:
    source = rows.subquery()
    names = [*CELL_KEY, "cell_group", *measures]
    organization = sa.bindparam("organization", type_=usage_cells.c.organization_id.type)
    select = sa.select(organization, *(source.c[name] for name in names), sa.func.clock_timestamp())
    select = select.order_by(*in_order(source))
    return insert(usage_cells).from_select(["organization_id", *names, "updated_at"], select)


def _matched(
    metric: BillableMetric, events: sa.FromClause, bucket: sa.ColumnElement[Any], *where: sa.ColumnElement[bool]
) -> sa.Subquery:
    columns: Columns = events.c
    selected = [
        columns.transaction_id,
        columns.customer_key,
        columns.timestamp,
        bucket.label("cell_start"),
        _cell_group(metric, columns).label("cell_group"),
        *([columns.metric_id] if metric is RECORDS else []),
    ]
    if metric.aggregation_key is not None:
        value = _property(columns, metric.aggregation_key)
        if metric.aggregation is Aggregation.UNIQUE:
            selected.append(value.label("value"))
        else:
            # CASE, because a condition beside the cast would not keep it from running on other text.
            selected.append(sa.case((_is_decimal(value), value.cast(NUMERIC))).label("number"))
    return sa.select(*selected).where(matches(metric, events), *where).subquery()


def _is_decimal(value: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    return sa.and_(
        value.regexp_match(_DECIMAL),
        sa.func.length(sa.func.translate(value, "-.", "")) <= _DIGITS_MAX,
        sa.func.length(sa.func.split_part(value, ".", 2)) <= _PLACES_MAX,
    )


def _property(columns: Columns, name: str) -> sa.ColumnElement[Any]:
    return sa.type_coerce(columns.properties.op("->>")(sa.literal(name, sa.Text)), sa.Text)


def _cell_group(metric: BillableMetric, columns: Columns) -> sa.ColumnElement[Any]:
    if not metric.group_properties:
        return NO_GROUPS
    return array([_property(columns, name) for name in metric.group_properties], type_=sa.Text)


def _group_digest(metric: BillableMetric, cell_group: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    if not metric.group_properties:
        return TOTAL
    # The text form of an array quotes its values, so it tells NULL from 'NULL' and ('a','b,c') from ('a,b','c').
    return digest(cell_group.cast(sa.Text))
