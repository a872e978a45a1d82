"""Every statement that judges and stores new usage record groups, and makes them usage."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import quantities
from service.domain.entitlements import Entitlement
from service.domain.events import Event, EventSource, Verdict, event
from service.domain.metrics import QUANTITY, RECORD_KEYS_MAX
from service.domain.partners import Rules
from service.domain.record_groups import (
    Circumstances,
    GroupStatus,
    NewGroup,
    Record,
    RecordState,
    StoredGroup,
    allocations_json,
    duplicates,
    instant_text,
    resolved,
    violations,
)
from service.errors import AlreadyExists, InvalidArgument, Reason, Violation
from service.store import entitlements as entitlement_store
from service.store import events as event_store
from service.store import metrics as metric_store
from service.store import organizations
from service.store.record_groups import groups_within, transaction_id
from service.store.tables import INSTANT, NUMERIC, texts, usage_record_groups, usage_records, uuids
from service.store.tables import organizations as organizations_table

# Groups judged before other calls get their turn.
_SLICE = 50
_RECORD_STATEMENTS = event_store.record_statements()

Item = NewGroup | tuple[NewGroup, tuple[Violation, ...]]
"""A group as sent, with the faults of its form if it has any."""


class Result(NamedTuple):
    """What became of one group of a batch; `id` is empty if it has none that is well-formed."""

    id: str
    verdict: Verdict
    violations: Sequence[Violation] = ()


class Reported(NamedTuple):
    """What became of a batch, and the groups stored under its ids."""

    results: Sequence[Result]
    groups: Mapping[str, StoredGroup]


class _Judged(NamedTuple):
    """The faults of groups that are not stored, by index, and the entitlements they name."""

    faults: dict[int, list[Violation]]
    entitlements: Mapping[str, Entitlement]


async def validate_groups(
    connection: AsyncConnection, organization: str, items: Sequence[Item], rules: Rules, *, admin: bool
) -> list[Sequence[Violation]]:
    """Return every fault of each group; one that is stored as it is has none. Writes nothing."""
    groups, _ = _apart(items)
    digests = await _stored_digests(connection, organization, groups)
    now = await _now(connection)
    judged = await _judge(connection, organization, items, digests, rules, now, admin=admin)
    return [
        judged.faults[i] if i in judged.faults else [] if digests[group.id] == group.digest() else [_CONFLICT]
        for i, group in enumerate(groups)
    ]


async def report_groups(
    connection: AsyncConnection,
    organization: str,
    items: Sequence[Item],
    rules: Rules,
    *,
    admin: bool,
    shown_bytes_max: int,
    all_or_nothing: bool = False,
) -> Reported:
    """Store the groups that are new and valid, and their records as usage of the buyers.

    Returns one result per group, and what is stored under their ids, as much of it as takes about `shown_bytes_max`.
    With `all_or_nothing` it raises InvalidArgument if one is rejected, AlreadyExists if one is in conflict.

    A stored id is answered before any rule that time or the catalog could have changed. Locks are taken in one order:
    the organization's, new record metrics, the organization's counter of serial ids, groups, events, cells.
    """
    groups, malformed = _apart(items)
    await organizations.lock_shared(connection, organization)
    digests = await _stored_digests(connection, organization, groups)
    now = await _now(connection)
    judged = await _judge(connection, organization, items, digests, rules, now, admin=admin)
    fresh = {groups[i].id: i for i, faults in judged.faults.items() if not faults}
    stored = await _store(connection, organization, [groups[i] for i in fresh.values()], judged.entitlements, now)
    # What this batch or, meanwhile, another one stored: a statement of its own, so that it sees their commits.
    digests |= await _stored_digests(connection, organization, [groups[i] for i in judged.faults])
    results = []
    for i, group in enumerate(groups):
        if fresh.get(group.id) == i and group.id in stored:
            results.append(Result(group.id, Verdict.ACCEPTED))
        elif malformed[i] or group.id not in digests:
            results.append(Result(group.id, Verdict.REJECTED, judged.faults[i]))
        elif digests[group.id] == group.digest():
            results.append(Result(group.id, Verdict.DUPLICATE))
        else:
            results.append(Result(group.id, Verdict.CONFLICT, [_CONFLICT]))
    if all_or_nothing:
        _require_all(results)
    kept = [one.id for one in results if one.verdict is not Verdict.REJECTED]
    return Reported(results, await groups_within(connection, organization, kept, shown_bytes_max))


def _require_all(results: Sequence[Result]) -> None:
    """Raise, and so roll the transaction back, unless every group is stored."""
    rejected = [
        replace(fault, field=f"groups[{i}].{fault.field}")
        for i, one in enumerate(results)
        if one.verdict is Verdict.REJECTED
        for fault in one.violations
    ]
    if rejected:
        raise InvalidArgument(rejected)
    conflict = next((one for one in results if one.verdict is Verdict.CONFLICT), None)
    if conflict is not None:
        message = (
            f"Usage record group {conflict.id} {conflict.violations[0].message}. No group of this call was stored."
        )
        raise AlreadyExists(Reason.IDEMPOTENCY_CONFLICT, message, metadata={"id": conflict.id})


def _apart(items: Sequence[Item]) -> tuple[list[NewGroup], list[Sequence[Violation]]]:
    """Return groups, and the faults of their form."""
    pairs = [(item, ()) if isinstance(item, NewGroup) else item for item in items]
    return [group for group, _ in pairs], [faults for _, faults in pairs]


async def _now(connection: AsyncConnection) -> datetime:
    """Return the database's time: that by which entitlements changed their states too."""
    now: datetime = (await connection.execute(sa.select(sa.func.clock_timestamp()))).scalar_one()
    return now


async def _stored_digests(
    connection: AsyncConnection, organization: str, groups: Sequence[NewGroup]
) -> dict[str, bytes]:
    """Return the content digests of those of the groups whose ids are stored, by id."""
    ids = sorted({group.id for group in groups if group.id})
    columns = usage_record_groups.c
    query = sa.select(columns.id, columns.digest).where(
        columns.organization_id == organization, columns.id == sa.any_(texts(ids))
    )
    return {row.id: row.digest for row in await connection.execute(query)} if ids else {}


async def _judge(
    connection: AsyncConnection,
    organization: str,
    items: Sequence[Item],
    digests: Mapping[str, bytes],
    rules: Rules,
    now: datetime,
    *,
    admin: bool,
) -> _Judged:
    """Judge the groups that are malformed or not stored yet."""
    groups, malformed = _apart(items)
    wanted = [i for i, group in enumerate(groups) if malformed[i] or group.id not in digests]
    named = {groups[i].entitlement_id for i in wanted} - {""}
    keys = {record.key for i in wanted for record in groups[i].billable_records} - {""}
    entitlements = await entitlement_store.find_entitlements(connection, organization, sorted(named)) if named else {}
    metrics = await metric_store.metrics_by_key(connection, organization, keys) if keys else {}
    circumstances = Circumstances(entitlements, metrics, rules, now, admin)
    twice = duplicates(groups)
    faults: dict[int, list[Violation]] = {}
    for number, i in enumerate(wanted):
        if number % _SLICE == _SLICE - 1:
            await asyncio.sleep(0)
        faults[i] = [*malformed[i], *violations(groups[i], circumstances)]
        # Of a malformed group without an id nobody knows what it is a copy of.
        if i in twice and (groups[i].id or not malformed[i]):
            faults[i].append(twice[i])
    unchecked = {i: groups[i] for i, found in faults.items() if groups[i].skip_validation and not found}
    for i in await _beyond_keys(connection, organization, unchecked, entitlements) if unchecked else ():
        message = f"would be too many keys of usage records: an organization can have {RECORD_KEYS_MAX:,}"
        faults[i].append(Violation("records", Reason.LIMIT_EXCEEDED, message))
    return _Judged(faults, entitlements)


async def _beyond_keys(
    connection: AsyncConnection,
    organization: str,
    groups: Mapping[int, NewGroup],
    entitlements: Mapping[str, Entitlement],
) -> list[int]:
    """Return those of valid groups with unchecked keys that bring more new ones than the organization may have."""
    keys = {i: {one.key for one in resolved(group, entitlements[group.entitlement_id])} for i, group in groups.items()}
    known = set(await metric_store.record_metrics(connection, organization, set().union(*keys.values())))
    room = RECORD_KEYS_MAX - await metric_store.count_record_metrics(connection, organization)
    beyond = []
    for i, own in keys.items():
        room -= len(own - known)
        if room < 0:
            beyond.append(i)
            room += len(own - known)
        else:
            known |= own
    return beyond


async def _store(
    connection: AsyncConnection,
    organization: str,
    groups: Sequence[NewGroup],
    entitlements: Mapping[str, Entitlement],
    now: datetime,
) -> set[str]:
    """Store valid groups whose ids are new, with their records and the events made of them; returns these ids."""
    if not groups:
        return set()
    records = {group.id: resolved(group, entitlements[group.entitlement_id]) for group in groups}
    keys = {record.key for found in records.values() for record in found}
    await metric_store.ensure_record_metrics(connection, organization, keys, "groups")
    columns = organizations_table.c
    serials = (
        sa.update(organizations_table)
        .where(columns.id == organization)
        .values(last_group_serial=columns.last_group_serial + len(groups))
        .returning(columns.last_group_serial, sa.func.clock_timestamp())
    )
    last, created_at = (await connection.execute(serials)).one()
    stored = await _insert_groups(
        connection, organization, groups, entitlements, now, created_at, last - len(groups) + 1
    )
    new = [group for group in groups if group.id in stored]
    await _insert_records(connection, organization, new, records, now)
    events = [
        _event(group, position, record, entitlements[group.entitlement_id], now)
        for group in new
        for position, record in enumerate(records[group.id])
    ]
    if events:
        accepted = await event_store.insert_events(connection, organization, _RECORD_STATEMENTS, events)
        if len(accepted) < len(events):
            raise AssertionError("a new group's events were stored before")
    return stored


async def _insert_groups(
    connection: AsyncConnection,
    organization: str,
    groups: Sequence[NewGroup],
    entitlements: Mapping[str, Entitlement],
    now: datetime,
    created_at: datetime,
    first_serial: int,
) -> set[str]:
    bought = [entitlements[group.entitlement_id] for group in groups]
    values: dict[str, sa.ColumnElement[Any]] = {
        "id": texts([group.id for group in groups]),
        "serial_id": sa.literal([first_serial + i for i in range(len(groups))], ARRAY(sa.BigInteger)),
        "partner": texts([one.partner.value if one.partner else "" for one in bought]),
        "product_id": texts([one.product_id for one in bought]),
        "entitlement_id": texts([one.id for one in bought]),
        "customer_id": uuids([one.customer_id for one in bought if one.customer_id]),
        "source": texts([group.source.value for group in groups]),
        "timestamp": sa.literal([group.timestamp or now for group in groups], ARRAY(INSTANT)),
        "meta_info": texts([_meta_info(group, now) for group in groups]),
        "digest": sa.literal([group.digest() for group in groups], ARRAY(usage_record_groups.c.digest.type)),
    }
    sent = sa.func.unnest(*values.values()).table_valued(*values).render_derived("sent")
    columns: dict[str, sa.ColumnElement[Any]] = {name: sent.c[name] for name in values}
    columns["meta_info"] = sa.cast(sent.c.meta_info, JSONB)
    fixed = {
        "organization_id": sa.literal(organization),
        "status": sa.literal(GroupStatus.CREATED.value),
        "created_at": sa.literal(created_at, INSTANT),
        "updated_at": sa.literal(created_at, INSTANT),
    }
    # In order, so that two batches that hold the same groups wait for each other in one direction only.
    rows = sa.select(*columns.values(), *fixed.values()).order_by(sent.c.id.collate("C"))
    statement = (
        insert(usage_record_groups)
        .from_select([*columns, *fixed], rows)
        .on_conflict_do_nothing(index_elements=list(usage_record_groups.primary_key.columns))
        .returning(usage_record_groups.c.id)
    )
    return set((await connection.execute(statement)).scalars())


async def _insert_records(
    connection: AsyncConnection,
    organization: str,
    groups: Sequence[NewGroup],
    records: Mapping[str, Sequence[Record]],
    now: datetime,
) -> None:
    rows = [(group, position, one) for group in groups for position, one in enumerate(records[group.id])]
    values: dict[str, sa.ColumnElement[Any]] = {
        "group_id": texts([group.id for group, _, _ in rows]),
        "position": sa.literal([position for _, position, _ in rows], ARRAY(sa.Integer)),
        "entitlement_id": texts([group.entitlement_id for group, _, _ in rows]),
        "key": texts([one.key for _, _, one in rows]),
        "quantity": sa.literal([one.quantity for _, _, one in rows], ARRAY(NUMERIC)),
        "properties": sa.literal([one.properties for _, _, one in rows], ARRAY(sa.Text)),
        "timestamp": sa.literal([group.timestamp or now for group, _, _ in rows], ARRAY(INSTANT)),
    }
    sent = sa.func.unnest(*values.values()).table_valued(*values).render_derived("sent")
    columns: dict[str, sa.ColumnElement[Any]] = {name: sent.c[name] for name in values}
    columns["properties"] = sa.cast(sent.c.properties, JSONB)
    fixed = {"organization_id": sa.literal(organization), "state": sa.literal(RecordState.CREATED.value)}
    rows_to_store = sa.select(*columns.values(), *fixed.values())
    await connection.execute(insert(usage_records).from_select([*columns, *fixed], rows_to_store))


def _meta_info(group: NewGroup, now: datetime) -> str:
    """Return what a group's meta_info shows, as JSON text: numbers in properties keep every digit."""
    shown: dict[str, Any] = {
        "source": group.source.value,
        "timestamp": instant_text(group.timestamp or now),
        **group.meta,
    }
    if group.skip_validation:
        shown["skip_validation"] = True
    if group.allocations:
        shown["usage_allocations"] = allocations_json(group.allocations)
    if group.records:
        shown["origin_records"] = {
            name: quantities.plain(quantity) for name, quantity in group.records.items() if quantity is not None
        }
    members = [f"{json.dumps(name)}:{json.dumps(value, ensure_ascii=False)}" for name, value in shown.items()]
    if group.billable_records:
        billable = ",".join(
            f'{{"key":{json.dumps(one.key, ensure_ascii=False)},"properties":{one.properties},'
            f'"quantity":"{quantities.plain(one.quantity)}"}}'
            for one in group.billable_records
            if one.quantity is not None
        )
        members.append(f'"billable_records":[{billable}]')
    return "{" + ",".join(members) + "}"


def _event(group: NewGroup, position: int, record: Record, entitlement: Entitlement, now: datetime) -> Event:
    """Make the event by which a record counts as usage of the buyer."""
    properties = (record.properties or "{}")[1:-1]
    quantity = f'"{QUANTITY}":"{quantities.plain(record.quantity)}"'
    return event(
        transaction_id(group.id, position),
        str(entitlement.customer_id),
        record.key,
        group.timestamp or now,
        "{" + (f"{quantity},{properties}" if properties else quantity) + "}",
        EventSource.GROUP,
    )


_CONFLICT = Violation(
    "id",
    Reason.IDEMPOTENCY_CONFLICT,
    "was stored before with other content; nothing changed. Report another group under another id",
)
