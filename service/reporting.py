"""Owns the hourly job: in one server at a time, it rolls the usage records that wait up into marketplace reports."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from service.database import Database
from service.domain.partners import Rules
from service.domain.windows import cell_floor
from service.errors import MeteringError
from service.store import roll_up as store
from service.store.roll_up import HOUR, Waiting

log = structlog.get_logger("metering.reporting")

# How long after its end an hour may stay unnoticed.
POLL_S = 30.0
_ENTITLEMENTS_AT_ONCE = 200


class Reporting:
    """Rolls up the hour that ended last, again and again; several replicas may try."""

    def __init__(self, database: Database, rules: Rules) -> None:
        self._database = database
        self._rules = rules

    async def run(self) -> None:
        """Work until cancelled; what a cancelled run has not committed is left to whoever comes next."""
        while True:
            try:
                await roll_up_hour(self._database, self._rules, last_hour(datetime.now(UTC)), wait=False)
            except MeteringError as error:
                log.warning("hourly reports interrupted; trying again", error=error.message)
            except Exception:
                log.exception("hourly reports failed; trying again")
            await asyncio.sleep(POLL_S)


def last_hour(now: datetime) -> datetime:
    """Return the start of the hour that ended last."""
    return cell_floor(now) - HOUR


async def roll_up_hour(
    database: Database,
    rules: Rules,
    hour: datetime,
    *,
    wait: bool,
    made: Callable[[Waiting], None] = lambda _: None,
) -> int:
    """Make the reports of an hour that has ended, entitlement by entitlement; returns how many were made.

    Everything that waits and was used before the hour's end goes into them, and what was carried. Safe to repeat and to
    run in many replicas: one at a time works (the others `wait`, or leave it), and there is one report per entitlement
    and hour.
    """
    number = 0
    after: Waiting | None = None
    while True:
        last = after

        async def find(connection: AsyncConnection, last: Waiting | None = last) -> list[Waiting]:
            return await store.waiting_entitlements(connection, hour, rules, last, _ENTITLEMENTS_AT_ONCE)

        found = await database.background(find, snapshot=True)
        for one in found:

            async def work(connection: AsyncConnection, one: Waiting = one) -> bool | None:
                if not await store.lead(connection, wait=wait):
                    return None
                return await store.roll_up(connection, *one, hour, rules) is not None

            try:
                was_made = await database.background(work, organization=one.organization)
            except MeteringError:
                raise  # the database is away, for every entitlement alike
            except Exception:
                log.exception("an entitlement's report failed; others go on", entitlement=one.entitlement_id)
                continue
            if was_made is None:
                return number  # another replica is at it
            if was_made:
                number += 1
                made(one)
        if len(found) < _ENTITLEMENTS_AT_ONCE:
            return number
        after = found[-1]
