"""Every statement about products and entitlements."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.entitlements import (
    STATUS_CHANGES_MAX,
    Dimension,
    Entitlement,
    EntitlementStatus,
    Product,
    StatusChange,
    followers,
    may_follow,
    term_violations,
)
from service.domain.partners import Partner
from service.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Reason, Violation
from service.store.metrics import ensure_record_metrics, metrics_by_key
from service.store.tables import customers, entitlement_carries, entitlements, products, texts

_PRODUCTS = sa.select(*products.c)
_ENTITLEMENTS = sa.select(*entitlements.c, customers.c.buyer_id).join_from(
    entitlements,
    customers,
    sa.and_(
        customers.c.organization_id == entitlements.c.organization_id,
        customers.c.id == entitlements.c.customer_id,
    ),
)


async def create_product(connection: AsyncConnection, organization: str, product: Product) -> Product:
    """Store a product and its record metrics, or return the stored one when it was created with the same content.

    Raises AlreadyExists when the id was created with other content.
    """
    statement = (
        insert(products)
        .values(
            organization_id=organization,
            id=product.id,
            name=product.name,
            partner=product.partner.value,
            dimensions=product.dimensions,
            create_digest=product.digest(),
        )
        .on_conflict_do_nothing()
        .returning(products.c.id)
    )
    if (await connection.execute(statement)).first() is not None:
        await ensure_record_metrics(connection, organization, _keys(product), "product.dimensions")
    else:
        await _was_created(connection, organization, products, product)
    return await get_product(connection, organization, product.id)


async def get_product(connection: AsyncConnection, organization: str, product_id: str) -> Product:
    """Return one product; raises NotFound."""
    return await _find_product(connection, organization, product_id, _PRODUCTS)


async def list_products(
    connection: AsyncConnection, organization: str, *, after: str | None, limit: int
) -> list[Product]:
    """Return products by id, after the one given."""
    query = _PRODUCTS.where(products.c.organization_id == organization).order_by(products.c.id).limit(limit)
    if after is not None:
        query = query.where(products.c.id > after)
    return [_product(row) for row in await connection.execute(query)]


async def update_product(
    connection: AsyncConnection, organization: str, product_id: str, changes: Mapping[str, Any]
) -> Product:
    """Set fields (`name`, `dimensions`) and make the record metrics of new dimensions; raises NotFound."""
    old = await _find_product(connection, organization, product_id, _PRODUCTS.with_for_update(key_share=True))
    new = replace(old, **changes)
    if new == old:
        return old
    await ensure_record_metrics(connection, organization, _keys(new), "product.dimensions")
    statement = (
        sa.update(products)
        .where(*_one(products, organization, product_id))
        .values(name=new.name, dimensions=new.dimensions, updated_at=sa.func.clock_timestamp())
    )
    await connection.execute(statement)
    return await get_product(connection, organization, product_id)


async def create_entitlement(connection: AsyncConnection, organization: str, entitlement: Entitlement) -> Entitlement:
    """Store an entitlement and its record metrics, or return the stored one when it was created with the same content.

    What was left out is the product's. Raises AlreadyExists when the id was created with other content, NotFound for
    the product or the buyer, InvalidArgument for another partner than the product's or unknown billable metric keys.
    """
    try:
        whole = await _completed(connection, organization, entitlement)
    except (NotFound, InvalidArgument):
        # What it names may be called otherwise by now: a creation that is stored is answered by its content alone.
        if not await _was_created(connection, organization, entitlements, entitlement):
            raise
        return await _find_entitlement(connection, organization, entitlement.id, _ENTITLEMENTS)
    statement = (
        insert(entitlements)
        .values(
            organization_id=organization,
            id=whole.id,
            product_id=whole.product_id,
            customer_id=whole.customer_id,
            partner=whole.partner and whole.partner.value,
            starting_on=whole.starting_on,
            create_digest=entitlement.digest(),
            **_changing_columns(whole),
        )
        .on_conflict_do_nothing()
        .returning(entitlements.c.id)
    )
    if (await connection.execute(statement)).first() is not None:
        await ensure_record_metrics(connection, organization, _keys(whole), "entitlement.dimensions")
    else:
        await _was_created(connection, organization, entitlements, entitlement)
    return await _find_entitlement(connection, organization, entitlement.id, _ENTITLEMENTS)


async def get_entitlement(connection: AsyncConnection, organization: str, entitlement_id: str) -> Entitlement:
    """Return one entitlement, with what is carried to its next report; raises NotFound."""
    found = await _find_entitlement(connection, organization, entitlement_id, _ENTITLEMENTS)
    columns = entitlement_carries.c
    query = (
        sa.select(columns.key, columns.carried)
        .where(columns.organization_id == organization, columns.entitlement_id == entitlement_id, columns.carried != 0)
        .order_by(columns.key)
    )
    return replace(found, carried={row.key: row.carried for row in await connection.execute(query)})


async def lock_entitlement(connection: AsyncConnection, organization: str, entitlement_id: str) -> None:
    """Lock an entitlement and what it carries, until this transaction ends."""
    columns = entitlements.c
    query = sa.select(columns.id).where(columns.organization_id == organization, columns.id == entitlement_id)
    # Not against what refers to it: groups are reported meanwhile.
    await connection.execute(query.with_for_update(key_share=True))


async def find_entitlements(
    connection: AsyncConnection, organization: str, ids: Collection[str]
) -> dict[str, Entitlement]:
    """Return those of the entitlements that exist, by id, without what they carry."""
    query = _ENTITLEMENTS.where(
        entitlements.c.organization_id == organization, entitlements.c.id == sa.any_(texts(list(ids)))
    )
    return {row.id: _entitlement(row) for row in await connection.execute(query)}


async def list_entitlements(
    connection: AsyncConnection,
    organization: str,
    *,
    partner: Partner | None,
    product_id: str | None,
    buyer_id: str | None,
    status: EntitlementStatus | None,
    after: str | None,
    skip: int = 0,
    limit: int,
) -> list[Entitlement]:
    """Return entitlements by id, after the one given and `skip` more, without what they carry.

    Every filter given must hold.
    """
    columns = entitlements.c
    query = _ENTITLEMENTS.where(columns.organization_id == organization).order_by(columns.id)
    query = query.offset(skip or None).limit(limit)
    if partner is not None:
        query = query.where(columns.partner == partner.value)
    if product_id is not None:
        query = query.where(columns.product_id == product_id)
    if buyer_id is not None:
        query = query.where(customers.c.buyer_id == buyer_id)
    if status is not None:
        query = query.where(columns.status == status.value)
    if after is not None:
        query = query.where(columns.id > after)
    return [_entitlement(row) for row in await connection.execute(query)]


async def update_entitlement(
    connection: AsyncConnection, organization: str, entitlement_id: str, changes: Mapping[str, Any]
) -> Entitlement:
    """Set fields (`name`, `status`, `ending_before`, `dimensions`, `billable_metric_keys`).

    Raises NotFound; InvalidArgument for an end that is not after the start or unknown billable metric keys;
    FailedPrecondition for a status that cannot follow the present one.
    """
    locked = _ENTITLEMENTS.with_for_update(of=entitlements, key_share=True)
    old = await _find_entitlement(connection, organization, entitlement_id, locked)
    new = replace(old, **changes)
    if new == old:
        return old
    faults = [
        *term_violations("entitlement.ending_before", new.starting_on, new.ending_before),
        *await _metric_key_violations(connection, organization, new.billable_metric_keys),
    ]
    if faults:
        raise InvalidArgument(faults)
    if new.status is not old.status:
        if not may_follow(old.status, new.status):
            raise _cannot_follow(old, new.status)
        new = replace(new, status_changes=await _status_changes(connection, old, new.status))
    await ensure_record_metrics(connection, organization, _keys(new), "entitlement.dimensions")
    statement = (
        sa.update(entitlements)
        .where(*_one(entitlements, organization, entitlement_id))
        .values(**_changing_columns(new), updated_at=sa.func.clock_timestamp())
    )
    await connection.execute(statement)
    return await _find_entitlement(connection, organization, entitlement_id, _ENTITLEMENTS)


def not_found(entitlement_id: str) -> NotFound:
    """Build the error for an entitlement that does not exist."""
    message = f"No entitlement has the id {entitlement_id!r}."
    return NotFound(Reason.ENTITLEMENT_NOT_FOUND, message, metadata={"id": entitlement_id})


async def _completed(connection: AsyncConnection, organization: str, entitlement: Entitlement) -> Entitlement:
    product = await get_product(connection, organization, entitlement.product_id)
    query = sa.select(customers.c.id, sa.func.now().label("now")).where(
        customers.c.organization_id == organization, customers.c.buyer_id == entitlement.buyer_id
    )
    buyer = (await connection.execute(query)).first()
    if buyer is None:
        message = f"No customer has the buyer id {entitlement.buyer_id!r}."
        raise NotFound(Reason.BUYER_NOT_FOUND, message, metadata={"buyer_id": entitlement.buyer_id})
    faults = await _metric_key_violations(connection, organization, entitlement.billable_metric_keys)
    if entitlement.partner not in {None, product.partner}:
        message = f"must be {product.partner.value}, where product {product.id!r} is sold; it may be left out"
        faults = [Violation("entitlement.partner", Reason.FIELD_INVALID, message), *faults]
    if faults:
        raise InvalidArgument(faults)
    return replace(
        entitlement,
        partner=product.partner,
        dimensions=entitlement.dimensions or product.dimensions,
        customer_id=buyer.id,
        status_changes=(StatusChange(entitlement.status, buyer.now),),
    )


async def _metric_key_violations(
    connection: AsyncConnection, organization: str, keys: Sequence[str]
) -> list[Violation]:
    known = await metrics_by_key(connection, organization, keys) if keys else {}
    return [
        Violation(
            f"entitlement.billable_metric_keys[{i}]",
            Reason.BILLABLE_METRIC_KEY_INVALID,
            f"no billable metric has the key {key!r}",
        )
        for i, key in enumerate(keys)
        if key not in known
    ]


async def _status_changes(
    connection: AsyncConnection, old: Entitlement, status: EntitlementStatus
) -> tuple[StatusChange, ...]:
    # Asked for while the row is locked, and never before the latest change: they are in order whatever the clock does.
    now: datetime = (await connection.execute(sa.select(sa.func.clock_timestamp()))).scalar_one()
    since = max(now, old.status_changes[-1].since)
    return (*old.status_changes, StatusChange(status, since))[-STATUS_CHANGES_MAX:]


def _cannot_follow(old: Entitlement, status: EntitlementStatus) -> FailedPrecondition:
    what_may = ", ".join(followers(old.status)) or "nothing"
    return FailedPrecondition(
        Reason.STATUS_TRANSITION,
        f"Entitlement {old.id!r} is {old.status.value}, which may be followed by {what_may}, not by {status.value}.",
        metadata={"id": old.id, "status": old.status.value},
    )


async def _was_created(
    connection: AsyncConnection, organization: str, table: sa.Table, value: Product | Entitlement
) -> bool:
    """Say whether the id is stored, of a creation with this content; raises AlreadyExists if it had another."""
    query = sa.select(table.c.create_digest).where(*_one(table, organization, value.id))
    digest = (await connection.execute(query)).scalar_one_or_none()
    if digest is not None and digest != value.digest():
        noun = type(value).__name__
        raise AlreadyExists(
            Reason.ID_IN_USE,
            f"{noun} {value.id!r} was created with other content; use another id, or Update{noun} to change it.",
            metadata={"id": value.id},
        )
    return digest is not None


async def _find_product(
    connection: AsyncConnection, organization: str, product_id: str, query: "sa.Select[Any]"
) -> Product:
    row = (await connection.execute(query.where(*_one(products, organization, product_id)))).first()
    if row is None:
        message = f"No product has the id {product_id!r}."
        raise NotFound(Reason.PRODUCT_NOT_FOUND, message, metadata={"id": product_id})
    return _product(row)


async def _find_entitlement(
    connection: AsyncConnection, organization: str, entitlement_id: str, query: "sa.Select[Any]"
) -> Entitlement:
    row = (await connection.execute(query.where(*_one(entitlements, organization, entitlement_id)))).first()
    if row is None:
        raise not_found(entitlement_id)
    return _entitlement(row)


def _one(table: sa.Table, organization: str, row_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    return table.c.organization_id == organization, table.c.id == row_id


def _keys(value: Product | Entitlement) -> set[str]:
    keys = {one.key for one in value.dimensions or ()}
    return keys.union(value.billable_metric_keys) if isinstance(value, Entitlement) else keys


def _changing_columns(entitlement: Entitlement) -> dict[str, Any]:
    return {
        "name": entitlement.name,
        "status": entitlement.status.value,
        "status_changes": [[one.status.value, one.since.isoformat()] for one in entitlement.status_changes],
        "ending_before": entitlement.ending_before,
        "dimensions": entitlement.dimensions,
        "billable_metric_keys": list(entitlement.billable_metric_keys),
    }


def _product(row: Any) -> Product:
    return Product(
        id=row.id,
        name=row.name,
        partner=Partner(row.partner),
        dimensions=tuple(Dimension(*one) for one in row.dimensions),
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def _entitlement(row: Any) -> Entitlement:
    return Entitlement(
        id=row.id,
        name=row.name,
        product_id=row.product_id,
        buyer_id=row.buyer_id,
        partner=Partner(row.partner),
        status=EntitlementStatus(row.status),
        starting_on=row.starting_on,
        ending_before=row.ending_before,
        dimensions=tuple(Dimension(*one) for one in row.dimensions),
        billable_metric_keys=tuple(row.billable_metric_keys),
        customer_id=row.customer_id,
        status_changes=tuple(
            StatusChange(EntitlementStatus(status), datetime.fromisoformat(since))
            for status, since in row.status_changes
        ),
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
