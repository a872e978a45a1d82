"""Owns the way from any older schema to this version's: Alembic, run under a lock so that replicas may all try."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import AsyncEngine

# Any number will do, as long as it is always the same.
_LOCK = 5_020_113


async def upgrade(engine: AsyncEngine) -> None:
    """Bring the schema up to this version in one transaction; does nothing when it is."""
    async with engine.begin() as connection:
        await connection.execute(sa.func.set_config("statement_timeout", "0", True).select())
        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        await connection.run_sync(_upgrade)


async def is_current(engine: AsyncEngine) -> bool:
    """Say whether the schema is exactly this version's."""
    async with engine.connect() as connection:
        return await connection.run_sync(_is_current)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def _upgrade(connection: sa.Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _is_current(connection: sa.Connection) -> bool:
    heads = set(ScriptDirectory.from_config(_config()).get_heads())
    return set(MigrationContext.configure(connection).get_current_heads()) == heads
