"""Every statement about customers and the keys that name them."""

import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.customers import BillingFrequency, BillingPeriod, Customer
from service.errors import AlreadyExists, NotFound, Reason
from service.store.compiled import Compiled
from service.store.tables import customer_keys, customers, released_keys, violated_constraint

# Claims of a key that others take and give up at the same moment.
CLAIMS_MAX = 10

_ALIASES = (
    sa.select(sa.func.array_agg(aggregate_order_by(customer_keys.c.key, customer_keys.c.key)))
    .where(
        customer_keys.c.organization_id == customers.c.organization_id,
        customer_keys.c.customer_id == customers.c.id,
        customer_keys.c.key != sa.cast(customers.c.id, sa.Text),
    )
    .scalar_subquery()
)
_CUSTOMERS = sa.select(*customers.c, _ALIASES.label("aliases"))

# Asked for by every usage query.
_EXISTING = Compiled(
    sa.select(customers.c.id).where(
        customers.c.organization_id == sa.bindparam("organization", type_=sa.Text),
        customers.c.id == sa.any_(sa.bindparam("ids", type_=ARRAY(sa.Uuid))),
    )
)


async def create_customer(connection: AsyncConnection, organization: str, customer: Customer) -> Customer:
    """Store a customer and its keys, or return the stored one when it was created with the same content.

    Raises AlreadyExists when the id was created with other content, or a key or the buyer id belongs to another
    customer; then nothing changes.
    """
    statement = (
        insert(customers)
        .values(
            organization_id=organization,
            id=customer.id,
            name=customer.name,
            buyer_id=customer.buyer_id,
            custom_fields=dict(customer.custom_fields),
            create_digest=customer.digest(),
            **_billing_columns(customer.billing_period),
        )
        # Any conflict, of the id or of the buyer id: which of the two a concurrent creation shows first is chance.
        .on_conflict_do_nothing()
        .returning(customers.c.id)
    )
    if (await connection.execute(statement)).first() is not None:
        await _claim_keys(connection, organization, customer.id, {str(customer.id), *customer.ingest_aliases})
        return await get_customer(connection, organization, customer.id)
    query = sa.select(customers.c.create_digest).where(*_one(organization, customer.id))
    digest = (await connection.execute(query)).scalar_one_or_none()
    if digest is None:
        raise _buyer_id_in_use(customer.buyer_id)
    if digest != customer.digest():
        raise AlreadyExists(
            Reason.ID_IN_USE,
            f"Customer {customer.id} was created with other content; use another id, or UpdateCustomer to change it.",
            metadata={"id": str(customer.id)},
        )
    return await get_customer(connection, organization, customer.id)


async def get_customer(connection: AsyncConnection, organization: str, customer_id: uuid.UUID) -> Customer:
    """Return one customer; raises NotFound."""
    row = (await connection.execute(_CUSTOMERS.where(*_one(organization, customer_id)))).first()
    if row is None:
        raise not_found([customer_id])
    return _customer(row)


async def list_customers(
    connection: AsyncConnection,
    organization: str,
    *,
    archived: bool | None,
    key: str | None,
    ids: Sequence[uuid.UUID] | None = None,
    after: uuid.UUID | None,
    limit: int,
) -> list[Customer]:
    """Return customers by id, after the one given: those `archived` or not (None = both).

    `key` narrows them to the owner of that key, `ids` to these.
    """
    query = _CUSTOMERS.where(customers.c.organization_id == organization).order_by(customers.c.id).limit(limit)
    if archived is not None:
        query = query.where(customers.c.archived_at.is_not(None) if archived else customers.c.archived_at.is_(None))
    if ids is not None:
        query = query.where(customers.c.id == sa.any_(sa.literal(list(ids), ARRAY(sa.Uuid))))
    if after is not None:
        query = query.where(customers.c.id > after)
    if key is not None:
        owner = sa.select(customer_keys.c.customer_id).where(
            customer_keys.c.organization_id == organization, customer_keys.c.key == key
        )
        query = query.where(customers.c.id == owner.scalar_subquery())
    return [_customer(row) for row in await connection.execute(query)]


async def missing_customers(
    connection: AsyncConnection, organization: str, ids: Sequence[uuid.UUID]
) -> list[uuid.UUID]:
    """Return those of the ids that no customer has, in the order given."""
    rows = await _EXISTING.fetch(connection, organization=organization, ids=list(ids))
    found = {row[0] for row in rows}
    return [one for one in ids if one not in found]


async def count_customers(connection: AsyncConnection, organization: str) -> int:
    """Return how many customers are not archived."""
    query = sa.select(sa.func.count()).where(
        customers.c.organization_id == organization, customers.c.archived_at.is_(None)
    )
    number: int = (await connection.execute(query)).scalar_one()
    return number


async def update_customer(
    connection: AsyncConnection, organization: str, customer_id: uuid.UUID, values: Mapping[str, Any]
) -> Customer:
    """Set columns (`name`, `buyer_id`, `custom_fields`); raises NotFound, AlreadyExists."""
    try:
        await _update(connection, organization, customer_id, values)
    except sa.exc.IntegrityError as error:
        if violated_constraint(error) != "customers_organization_id_buyer_id_key":
            raise
        raise _buyer_id_in_use(values.get("buyer_id")) from error
    return await get_customer(connection, organization, customer_id)


async def set_billing_period(
    connection: AsyncConnection, organization: str, customer_id: uuid.UUID, period: BillingPeriod | None
) -> Customer:
    """Set or remove the billing period; raises NotFound."""
    await _update(connection, organization, customer_id, _billing_columns(period))
    return await get_customer(connection, organization, customer_id)


async def archive_customer(connection: AsyncConnection, organization: str, customer_id: uuid.UUID) -> Customer:
    """Archive a customer, keeping the time of the first archiving; raises NotFound."""
    statement = (
        sa.update(customers)
        .where(*_one(organization, customer_id), customers.c.archived_at.is_(None))
        .values(archived_at=sa.func.now(), updated_at=sa.func.now())
    )
    await connection.execute(statement)
    return await get_customer(connection, organization, customer_id)


async def set_ingest_aliases(
    connection: AsyncConnection, organization: str, customer_id: uuid.UUID, aliases: Collection[str]
) -> Customer:
    """Replace the whole set of aliases; raises NotFound, AlreadyExists."""
    # The update locks the customer's row: two calls for one customer take turns, so that one whole set wins.
    await _update(connection, organization, customer_id, {})
    keep = {str(customer_id), *aliases}
    given_up = sa.delete(customer_keys).where(
        customer_keys.c.organization_id == organization,
        customer_keys.c.customer_id == customer_id,
        customer_keys.c.key != sa.all_(sa.literal(list(keep), ARRAY(sa.Text))),
    )
    keys = (await connection.execute(given_up.returning(customer_keys.c.key))).scalars().all()
    if keys:
        released = insert(released_keys).values(
            [
                {
                    "organization_id": organization,
                    "customer_id": customer_id,
                    "key": key,
                    "released_at": sa.func.clock_timestamp(),
                }
                for key in keys
            ]
        )
        await connection.execute(
            released.on_conflict_do_update(
                index_elements=list(released_keys.primary_key.columns),
                set_={"released_at": released.excluded.released_at},
            )
        )
    await _claim_keys(connection, organization, customer_id, keep)
    return await get_customer(connection, organization, customer_id)


def buyer_id_of(table: sa.Table) -> sa.Label[str]:
    """Select the buyer id of the customer that a row names; not a join, which the planner might begin with."""
    columns = customers.c
    found = sa.select(columns.buyer_id).where(
        columns.organization_id == table.c.organization_id, columns.id == table.c.customer_id
    )
    return found.scalar_subquery().label("buyer_id")


def with_buyer_id(organization: str, buyer_id: str) -> sa.ScalarSelect[uuid.UUID]:
    """Select the id of the customer that has a buyer id, NULL if none has."""
    columns = customers.c
    found = sa.select(columns.id).where(columns.organization_id == organization, columns.buyer_id == buyer_id)
    return found.scalar_subquery()


def not_found(ids: Sequence[uuid.UUID]) -> NotFound:
    """Build the error for customers that do not exist."""
    named = ", ".join(map(str, ids[:20]))
    return NotFound(Reason.CUSTOMER_NOT_FOUND, f"No customer has the id {named}.", metadata={"ids": named})


async def _claim_keys(
    connection: AsyncConnection, organization: str, customer_id: uuid.UUID, keys: Collection[str]
) -> None:
    # Sorted, so that two customers that claim the same keys wait for each other in one direction only.
    rows = [{"organization_id": organization, "key": key, "customer_id": customer_id} for key in sorted(keys)]
    owners = sa.select(customer_keys.c.key, customer_keys.c.customer_id).where(
        customer_keys.c.organization_id == organization,
        customer_keys.c.key == sa.any_(sa.literal(list(keys), ARRAY(sa.Text))),
    )
    taken: list[str] = []
    for _ in range(CLAIMS_MAX):
        await connection.execute(insert(customer_keys).values(rows).on_conflict_do_nothing())
        found = {row.key: row.customer_id for row in await connection.execute(owners)}
        taken = sorted(key for key, owner in found.items() if owner != customer_id)
        if taken:
            break
        # A key that kept the insert from storing it can be given up before the owners are read: then it is free.
        taken = sorted(set(keys) - set(found))
        if not taken:
            return
    named = ", ".join(taken[:20])
    raise AlreadyExists(
        Reason.CUSTOMER_KEY_IN_USE,
        f"Another customer owns the key {named}; remove it there first (SetIngestAliases).",
        metadata={"keys": named},
    )


async def _update(
    connection: AsyncConnection, organization: str, customer_id: uuid.UUID, values: Mapping[str, Any]
) -> None:
    statement = (
        sa.update(customers)
        .where(*_one(organization, customer_id))
        .values(**values, updated_at=sa.func.now())
        .returning(customers.c.id)
    )
    if (await connection.execute(statement)).first() is None:
        raise not_found([customer_id])


def _buyer_id_in_use(buyer_id: object) -> AlreadyExists:
    message = f"Another customer has the buyer id {buyer_id!r}."
    return AlreadyExists(Reason.BUYER_ID_IN_USE, message, metadata={"buyer_id": str(buyer_id)})


def _one(organization: str, customer_id: uuid.UUID) -> tuple[sa.ColumnElement[bool], ...]:
    return customers.c.organization_id == organization, customers.c.id == customer_id


def _billing_columns(period: BillingPeriod | None) -> dict[str, Any]:
    return {
        "billing_frequency": period and period.frequency.value,
        "billing_anchor_date": period and period.anchor_date,
        "billing_starting_on": period and period.starting_on,
        "billing_ending_before": period and period.ending_before,
    }


def _customer(row: Any) -> Customer:
    period = None
    if row.billing_frequency is not None:
        period = BillingPeriod(
            BillingFrequency(row.billing_frequency),
            row.billing_anchor_date,
            row.billing_starting_on,
            row.billing_ending_before,
        )
    return Customer(
        id=row.id,
        name=row.name,
        buyer_id=row.buyer_id,
        ingest_aliases=tuple(row.aliases or ()),
        billing_period=period,
        custom_fields=row.custom_fields,
        created_at=row.created_at,
        updated_at=row.updated_at,
        archived_at=row.archived_at,
    )
