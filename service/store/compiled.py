"""Statements that are worked out once and sent many times, for as long as the metrics in them stay what they are."""

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.metrics import BillableMetric

Worked = TypeVar("Worked")

# How many metrics the results kept may be made of; each takes some tens of kilobytes.
METRICS_KEPT_MAX = 5_000
# The same for one kind of usage statement. So few metrics are a statement within milliseconds.
PER_METRICS_MAX = 1_000
_MADE_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class _Kept(Generic[Worked]):
    version: int
    metrics: int
    worked: Worked


class ByCatalog(Generic[Worked]):
    """What was worked out of organizations' metrics, each for one version of the catalog; the least used is dropped."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept[Worked]] = {}

    def find(self, organization: str, version: int) -> Worked | None:
        """Return what was kept for this very version."""
        kept = self._kept.pop(organization, None)
        if kept is None or kept.version != version:
            return None
        self._kept[organization] = kept
        return kept.worked

    def keep(self, organization: str, version: int, metrics: int, worked: Worked) -> Worked:
        """Keep and return what was worked out of a number of metrics."""
        self._kept.pop(organization, None)
        self._kept[organization] = _Kept(version, metrics, worked)
        while len(self._kept) > 1 and sum(one.metrics + 1 for one in self._kept.values()) > METRICS_KEPT_MAX:
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
        self._required = frozenset(name for name, bind in compiled.binds.items() if bind.required)

    def bound(self, **values: Any) -> tuple[str, tuple[Any, ...]]:
        """Return its SQL, and what asyncpg is to be given for the parameters when the named ones have these values."""
        if missing := self._required - values.keys():
            raise TypeError(f"not given: {', '.join(sorted(missing))}")  # it would be NULL, and find nothing
        given = self._fixed | {name: self._processed(name, value) for name, value in values.items()}
        return self._sql, tuple(given[name] for name in self._names)

    async def execute(self, connection: AsyncConnection, **values: Any) -> "sa.CursorResult[Any]":
        """Run it with these values for its named parameters."""
        return await connection.exec_driver_sql(*self.bound(**values))

    async def fetch(self, connection: AsyncConnection, **values: Any) -> Sequence[Any]:
        """Run it with these values and return its rows as asyncpg gives them: SQLAlchemy makes another of each."""
        result = await self.execute(connection, **values)
        cursor: Any = result.cursor
        rows: Sequence[Any] = cursor.fetchall()
        result.close()
        return rows

    def _processed(self, name: str, value: Any) -> Any:
        processor = self._processors.get(name)
        return processor(value) if processor and value is not None else value


class PerMetrics:
    """Keeps the statements that a function makes of metrics and of more; those least used are dropped."""

    def __init__(self, make: Callable[..., Compiled]) -> None:
        self._make = make
        self._kept: dict[tuple[Any, ...], Compiled] = {}

    async def get(self, metrics: tuple[BillableMetric, ...], *more: Hashable) -> Compiled:
        """Return the statement for these."""
        key = (metrics, *more)
        if (kept := self._kept.pop(key, None)) is not None:
            self._kept[key] = kept
            return kept
        if len(metrics) > _MADE_AT_ONCE:
            # Other calls must not wait for it.
            compiled = await asyncio.to_thread(self._make, *key)
        else:
            compiled = self._make(*key)
        self._kept[key] = compiled
        while len(self._kept) > 1 and sum(len(one[0]) + 1 for one in self._kept) > PER_METRICS_MAX:
            del self._kept[next(iter(self._kept))]
        return compiled
