"""Owns the background task that counts the past of new metrics, chunk by chunk, until none is left to count."""

import asyncio
import uuid

import structlog

from service.database import Database
from service.errors import MeteringError
from service.store import metrics as store

log = structlog.get_logger("metering.backfill")

# Other replicas' metrics, and those whose server died, are found by looking now and then.
POLL_S = 5.0
# A metric that cannot be counted is tried again, but not in a tight loop.
FAILED_PAUSE_S = 1.0
# Writers of the organization get at least as much time as a chunk took from them.
_PAUSE_SHARE = 1.0


class Backfill:
    """Counts what is left to count, and sleeps; several replicas may do so at once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._wanted = asyncio.Event()

    def wake(self) -> None:
        """Look for work now."""
        self._wanted.set()

    async def run(self) -> None:
        """Work until cancelled; a cancelled chunk is rolled back and counted again by whoever comes next."""
        while True:
            self._wanted.clear()
            try:
                await self._count_all()
            except MeteringError as error:
                log.warning("backfill interrupted; trying again", error=error.message)
            except Exception:
                log.exception("backfill failed; trying again")
            try:
                async with asyncio.timeout(POLL_S):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    async def _count_all(self) -> None:
        # One chunk of each in turn, so that no organization waits for another's whole past.
        while unfinished := await self._database.background(store.backfilling):
            for organization, metric_id in unfinished:
                await self._count_chunk(organization, metric_id)

    async def _count_chunk(self, organization: str, metric_id: uuid.UUID) -> None:
        began = asyncio.get_running_loop().time()
        try:
            await self._database.background(
                lambda c: store.backfill_chunk(c, organization, metric_id), organization=organization
            )
        except MeteringError:
            raise  # the database is away, for every metric alike
        except Exception:
            log.exception("backfill of a metric failed; others go on", organization=organization, metric=str(metric_id))
            await asyncio.sleep(FAILED_PAUSE_S)
        await asyncio.sleep((asyncio.get_running_loop().time() - began) * _PAUSE_SHARE)
