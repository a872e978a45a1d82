"""Every statement about organizations, their locks, API keys, and the secrets that sign page tokens."""

import secrets
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.roles import Role
from service.store.compiled import Compiled
from service.store.tables import api_keys, organizations, page_token_keys

DEFAULT_ORGANIZATION = "default"
PAGE_TOKEN_KEY_AGE_MAX = timedelta(days=30)

# Advisory locks are numbers; this seed keeps organizations' locks apart from any other use of the same text.
_LOCK_SEED = 7_301_211


class ApiKey(NamedTuple):
    """A stored credential. `secret_hash` is the SHA-256 of the secret part."""

    id: str
    organization: str
    name: str
    secret_hash: bytes
    created_at: datetime
    revoked_at: datetime | None
    expires_at: datetime | None
    roles: frozenset[Role]


class PageTokenKey(NamedTuple):
    """A secret that signs page tokens."""

    id: int
    secret: bytes


async def lock_shared(connection: AsyncConnection, organization: str) -> None:
    """Hold off changes of the organization's metrics until this transaction ends. Writers of events take it first."""
    await _LOCK_SHARED.execute(connection, organization=organization)


async def lock_exclusive(connection: AsyncConnection, organization: str) -> None:
    """Hold off every writer of events until this transaction ends. Changes of metrics and backfills take it first."""
    await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_lock(organization))))


async def catalog_version(connection: AsyncConnection, organization: str) -> int:
    """Return the version of the organization's metrics.

    To be trusted it must be read under the lock, in a statement after the one that took it: a statement sees the
    commits made before it began, and the lock may have waited for one.
    """
    version: int = (await _CATALOG_VERSION.execute(connection, organization=organization)).scalar_one()
    return version


async def bump_catalog_version(connection: AsyncConnection, organization: str) -> None:
    """Tell every replica that the organization's metrics changed. The exclusive lock must be held."""
    await connection.execute(
        sa.update(organizations)
        .where(organizations.c.id == organization)
        .values(catalog_version=organizations.c.catalog_version + 1)
    )


async def create_organization(connection: AsyncConnection, organization: str) -> bool:
    """Create an organization; False if it exists already."""
    statement = insert(organizations).values(id=organization).on_conflict_do_nothing().returning(organizations.c.id)
    return (await connection.execute(statement)).first() is not None


async def organization_exists(connection: AsyncConnection, organization: str) -> bool:
    """Say whether there is an organization of this name."""
    query = sa.select(sa.exists().where(organizations.c.id == organization))
    return bool((await connection.execute(query)).scalar_one())


async def list_organizations(connection: AsyncConnection) -> list[str]:
    """Return every organization, in byte order."""
    return list((await connection.execute(sa.select(organizations.c.id).order_by(organizations.c.id))).scalars())


async def create_api_key(
    connection: AsyncConnection,
    organization: str,
    key_id: str,
    name: str,
    secret_hash: bytes,
    roles: Collection[Role] = (Role.ADMIN,),
    expires_at: datetime | None = None,
) -> None:
    """Store a credential; raises IntegrityError when the organization does not exist."""
    row = {"id": key_id, "organization_id": organization, "name": name, "secret_hash": secret_hash}
    await connection.execute(sa.insert(api_keys).values(**row, roles=sorted(roles), expires_at=expires_at))


async def find_api_key(connection: AsyncConnection, key_id: str) -> ApiKey | None:
    """Return the credential with this public id, revoked or not."""
    row = (await connection.execute(_API_KEYS.where(api_keys.c.id == key_id))).first()
    return _api_key(row) if row else None


async def list_api_keys(connection: AsyncConnection, organization: str) -> list[ApiKey]:
    """Return an organization's credentials, oldest first."""
    query = _API_KEYS.where(api_keys.c.organization_id == organization).order_by(api_keys.c.created_at, api_keys.c.id)
    return [_api_key(row) for row in await connection.execute(query)]


async def any_api_key(connection: AsyncConnection) -> bool:
    """Say whether a credential was ever made, revoked ones included: if so, every call needs one."""
    return bool((await connection.execute(sa.select(sa.exists().select_from(api_keys)))).scalar_one())


async def revoke_api_key(connection: AsyncConnection, organization: str, key_id: str) -> bool:
    """Revoke a credential, keeping the time of the first revocation; False if the organization has none of this id."""
    statement = (
        sa.update(api_keys)
        .where(api_keys.c.id == key_id, api_keys.c.organization_id == organization)
        .values(revoked_at=sa.func.coalesce(api_keys.c.revoked_at, sa.func.now()))
        .returning(api_keys.c.id)
    )
    return (await connection.execute(statement)).first() is not None


async def current_page_token_keys(connection: AsyncConnection) -> list[PageTokenKey]:
    """Return the two newest signing secrets, newest first, after making one if there is none or it is too old.

    Safe to run in many replicas at once: the id of the next secret is fixed by the last, and the first to store it
    wins.
    """
    rows = await _page_token_keys(connection)
    if not rows or rows[0].age > PAGE_TOKEN_KEY_AGE_MAX:
        new = {"id": rows[0].id + 1 if rows else 1, "secret": secrets.token_bytes(32)}
        await connection.execute(insert(page_token_keys).values(new).on_conflict_do_nothing())
        rows = await _page_token_keys(connection)
    return [PageTokenKey(row.id, row.secret) for row in rows]


async def _page_token_keys(connection: AsyncConnection) -> "list[sa.Row[tuple[int, bytes, timedelta]]]":
    columns = page_token_keys.c
    age = sa.func.now() - columns.created_at
    query = sa.select(columns.id, columns.secret, age.label("age")).order_by(columns.id.desc()).limit(2)
    return list((await connection.execute(query)).all())


def _lock(organization: str | sa.BindParameter[str]) -> sa.ColumnElement[int]:
    return sa.func.hashtextextended(sa.cast(organization, sa.Text), _LOCK_SEED)


_ORGANIZATION = sa.bindparam("organization", type_=sa.Text)
# Every batch of events sends these.
_LOCK_SHARED = Compiled(sa.select(sa.func.pg_advisory_xact_lock_shared(_lock(_ORGANIZATION))))
_CATALOG_VERSION = Compiled(sa.select(organizations.c.catalog_version).where(organizations.c.id == _ORGANIZATION))

_API_KEYS = sa.select(
    api_keys.c.id,
    api_keys.c.organization_id,
    api_keys.c.name,
    api_keys.c.secret_hash,
    api_keys.c.created_at,
    api_keys.c.revoked_at,
    api_keys.c.expires_at,
    api_keys.c.roles,
)


def _api_key(row: Any) -> ApiKey:
    found = ApiKey(*row)
    return found._replace(roles=frozenset(map(Role, found.roles)))
