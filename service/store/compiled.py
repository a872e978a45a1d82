"""Statements that are worked out once and sent many times, for as long as the metrics in them stay what they are."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection

Worked = TypeVar("Worked")

# Of how many organizations the results are kept: one with many metrics takes some megabytes.
ORGANIZATIONS_MAX = 256


class ByCatalog(Generic[Worked]):
    """What was worked out of organizations' metrics, each for one version of the catalog; the least used is dropped."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[int, Worked]] = {}

    def find(self, organization: str, version: int) -> Worked | None:
        """Return what was kept for this very version."""
        kept = self._kept.pop(organization, None)
        if kept is None or kept[0] != version:
            return None
        self._kept[organization] = kept
        return kept[1]

    def keep(self, organization: str, version: int, worked: Worked) -> Worked:
        """Keep and return what was worked out for a version."""
        self._kept.pop(organization, None)
        self._kept[organization] = (version, worked)
        if len(self._kept) > ORGANIZATIONS_MAX:
            del self._kept[next(iter(self._kept))]
        return worked


class Compiled:
    """A statement as the SQL that SQLAlchemy made of it, to be sent as it is: with many metrics it is large, and
    working it out again for every batch would cost more than the batch.
    """

    def __init__(self, statement: sa.Select[Any] | sa.Insert) -> None:
        compiled: Any = statement.compile(dialect=asyncpg.dialect())  # type: ignore[no-untyped-call]
        self._sql = str(compiled)
        self._names: Sequence[str] = compiled.positiontup or ()
        self._processors: Mapping[str, Any] = compiled._bind_processors
        self._fixed = {name: self._processed(name, value) for name, value in compiled.params.items()}

    async def execute(self, connection: AsyncConnection, **values: Any) -> "sa.CursorResult[Any]":
        """Run it with these values for its named parameters."""
        given = self._fixed | {name: self._processed(name, value) for name, value in values.items()}
        return await connection.exec_driver_sql(self._sql, tuple(given[name] for name in self._names))

    def _processed(self, name: str, value: Any) -> Any:
        processor = self._processors.get(name)
        return processor(value) if processor and value is not None else value
