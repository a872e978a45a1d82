"""Owns where a benchmark takes place: its Postgres, its server processes, organizations to work in, and how to call."""

import asyncio
import contextlib
import itertools
import os
import platform
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import sqlalchemy as sa

from metering.v1 import billable_metric_pb2 as metric_pb
from metering.v1 import customer_pb2 as customer_pb
from service.auth import new_api_key
from service.bench import WrongAnswer, must_be
from service.config import Config
from service.database import Database
from service.domain.roles import Role
from service.migrations import upgrade
from service.server import open_database
from service.store import organizations

SERVER_STARTS_WITHIN_S = 60
# Calls of a benchmark wait for as long as they like: a deadline would hide how slow an answer is.
CALL_TIMEOUT_S = 600
# What an answer of a page or message can be, and a request with 10,000 events.
_CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 16 * 1024 * 1024), ("grpc.use_local_subchannel_pool", 1))
# Stubs that send bytes: what is measured is the server, so requests are written before.
_METHODS = "/metering.v1.{}"
_SERVE = ("service", "serve")
# For how long a server may believe that it is open though there are keys, and a little more.
_KEYS_KNOWN_AFTER_S = 2.5


@dataclass(frozen=True)
class Tenant:
    """An organization of its own, and the credential for it."""

    organization: str
    key: str

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call of this tenant carries."""
        return (("authorization", f"Bearer {self.key}"),)


class Server:
    """A server process and a connection to it. Without a process it is somebody else's and all that is known."""

    def __init__(self, process: asyncio.subprocess.Process | None, address: str) -> None:
        self._process = process
        self.address = address
        self.pid = None if process is None else process.pid
        self.channel = connect(address)

    def resident_bytes(self) -> int:
        """Return how much memory the process and those it started hold; 0 = unknown."""
        return 0 if self.pid is None else sum(_resident(pid) for pid in tree(self.pid))

    async def stop(self) -> None:
        """End it as an orchestrator would, unless it is somebody else's."""
        await self.channel.close()
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()


class Ground:
    """One database and the servers on it."""

    def __init__(self, database: Database, url: str, postgres: int | None, address: str | None = None) -> None:
        """Take a database, the process of its Postgres if it is ours, and the address of a server that runs already."""
        self.database = database
        self._address = address
        self._url = url
        self._postgres = postgres
        self._numbers = itertools.count()
        self._run = secrets.token_hex(3)
        self._servers: list[Server] = []

    @contextlib.asynccontextmanager
    async def server(self, *arguments: str, module: tuple[str, ...] = _SERVE) -> AsyncIterator[Server]:
        """Run `metering serve` (or another module that says its address when it is ready) while the block runs.

        Without arguments it is the server that runs already, if there is one.
        """
        if self._address is not None and module == _SERVE and not arguments:
            given = Server(None, self._address)
            try:
                yield given
            finally:
                await given.stop()
            return
        command = [sys.executable, "-P", "-m", *module, "--listen", "127.0.0.1:0", *arguments]
        package = Path(__file__).parent.parent.parent
        paths = [str(package), str(package / "generated"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("METERING_")},
            "METERING_DATABASE_URL": self._url,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
        try:
            if process.stdout is None:
                raise AssertionError("it was asked for")
            async with asyncio.timeout(SERVER_STARTS_WITHIN_S):
                line = (await process.stdout.readline()).decode()
            if "ready" not in line:
                raise WrongAnswer(f"a server did not start: {' '.join(command)}")
            server = Server(process, line.split()[-1])
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        self._servers.append(server)
        try:
            yield server
        finally:
            self._servers.remove(server)
            await server.stop()

    async def tenant(self) -> Tenant:
        """Make an organization with a key of every role."""
        organization, key = f"bench-{self._run}-{next(self._numbers)}", new_api_key()

        async def make(connection: Any) -> None:
            await organizations.create_organization(connection, organization)
            await organizations.create_api_key(connection, organization, key.id, "bench", key.secret_hash, tuple(Role))

        await self.database.background(make)
        return Tenant(organization, key.text)

    async def bare(self) -> "asyncpg.Connection[Any]":
        """Open a connection as a user would who has only asyncpg and SQL, with the settings of the service's own."""
        settings = {"synchronous_commit": "on", "timezone": "UTC", "jit": "off"}
        url = sa.make_url(self._url).set(drivername="postgresql").render_as_string(hide_password=False)
        return await asyncpg.connect(url, server_settings=settings)

    async def settle(self) -> None:
        """Bring statistics up to date and write what is dirty, so that no side pays for what another left."""
        connection = await self.bare()
        try:
            await connection.execute("VACUUM (ANALYZE)")
            # In somebody else's database not everybody may.
            with contextlib.suppress(asyncpg.InsufficientPrivilegeError):
                await connection.execute("CHECKPOINT")
        finally:
            await connection.close()

    def cpu(self) -> Mapping[str, float]:
        """Return the seconds of processor that client, servers and Postgres have taken so far."""
        taken = {"client": sum(os.times()[:2])}
        if self._servers:
            taken["server"] = sum(_processor_s(pid) for one in self._servers if one.pid for pid in tree(one.pid))
        if self._postgres is not None:
            taken["Postgres"] = _processor_s(self._postgres, reaped=True) + sum(
                _processor_s(pid) for pid in tree(self._postgres)[1:]
            )
        return taken


@contextlib.asynccontextmanager
async def ground(
    database_url: str | None, pg_bin: str | None = None, address: str | None = None
) -> AsyncIterator[Ground]:
    """Give a database with the schema: the one named, or an embedded Postgres that is thrown away.

    With the `address` of a server that runs on the database named, that one is measured. Raises PostgresError,
    BadDatabaseUrl, UnsafeDatabase if it could lose what was acknowledged, WrongAnswer if the server is another's.
    """
    with tempfile.TemporaryDirectory(prefix="metering-bench-", ignore_cleanup_errors=True) as directory:
        # Postgres does not run as root; the user it runs as instead must get to its data.
        os.chmod(directory, 0o755)  # noqa: S103 - what it holds is closed by itself
        config = Config(database_url=database_url, data_dir=Path(directory) / "data", pg_bin=pg_bin)
        async with open_database(config) as (database, postgres):
            await database.check()
            await upgrade(database.engine)
            url = database_url if postgres is None else postgres.url
            async with database.engine.connect() as connection:
                query = sa.text("SELECT pg_backend_pid()")
                backend = (await connection.execute(query)).scalar_one()
            found = Ground(database, str(url), None if postgres is None else _parent(backend), address)
            # Before any server starts: with the first key servers ask for one.
            await found.tenant()
            if address is not None:
                await asyncio.sleep(_KEYS_KNOWN_AFTER_S)
                await _require_same_database(found)
            yield found


def connect(address: str) -> grpc.aio.Channel:
    """Open a connection of its own."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


def unary(channel: grpc.aio.Channel, method: str, answer: Any) -> Any:
    """Return a call of a method (`EventService/IngestEvents`) that takes a request's bytes."""
    return channel.unary_unary(_METHODS.format(method), response_deserializer=answer.FromString)


async def create_metrics(
    server: Server, tenant: Tenant, metrics: Sequence[metric_pb.BillableMetric]
) -> list[metric_pb.BillableMetric]:
    """Create metrics and wait until they count; returned in this order."""
    create = unary(server.channel, "BillableMetricService/CreateBillableMetric", metric_pb.CreateBillableMetricResponse)
    made = []
    for metric in metrics:
        request = metric_pb.CreateBillableMetricRequest(billable_metric=metric).SerializeToString()
        made.append((await create(request, metadata=tenant.metadata, timeout=CALL_TIMEOUT_S)).billable_metric)
    get = unary(server.channel, "BillableMetricService/GetBillableMetric", metric_pb.GetBillableMetricResponse)
    for metric in made:
        request, counting = metric_pb.GetBillableMetricRequest(id=metric.id).SerializeToString(), True
        while counting:  # its past
            answer = await get(request, metadata=tenant.metadata, timeout=CALL_TIMEOUT_S)
            counting = answer.billable_metric.HasField("backfill_progress")
            await asyncio.sleep(0.05 if counting else 0)
    return made


async def create_customers(server: Server, tenant: Tenant, keys: Sequence[str]) -> list[str]:
    """Create a customer for every key, and return their ids in the order of the keys."""
    create = unary(server.channel, "CustomerService/CreateCustomer", customer_pb.CreateCustomerResponse)

    async def made(key: str) -> str:
        request = customer_pb.CreateCustomerRequest(customer=customer_pb.Customer(name=key, ingest_aliases=[key]))
        answer = await create(request.SerializeToString(), metadata=tenant.metadata, timeout=CALL_TIMEOUT_S)
        return str(answer.customer.id)

    return await asyncio.gather(*map(made, keys))


async def machine(ground: Ground) -> dict[str, str]:
    """Describe what the figures were taken on."""
    connection = await ground.bare()
    try:
        names = ("server_version", "fsync", "synchronous_commit", "shared_buffers", "max_wal_size")
        found = {f"postgres.{name}": str(await connection.fetchval(f"SHOW {name}")) for name in names}
    finally:
        await connection.close()
    versions = {"python": platform.python_version(), "grpcio": grpc.__version__, "asyncpg": asyncpg.__version__}
    return {"cpu": _cpu_name(), "cores": str(os.cpu_count()), "system": platform.platform()} | versions | found


async def _require_same_database(ground: Ground) -> None:
    """Raise WrongAnswer unless what the server that runs already stores is in the ground's database."""
    tenant, metric = await ground.tenant(), metric_pb.BillableMetric(name="bench")
    metric.aggregation_type = metric_pb.AGGREGATION_TYPE_COUNT
    async with ground.server() as server:
        what = f"the server at {server.address} on the database of --database-url"
        try:
            async with asyncio.timeout(SERVER_STARTS_WITHIN_S):
                await create_metrics(server, tenant, [metric])
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            details = error.details() if isinstance(error, grpc.aio.AioRpcError) else "no answer"
            raise WrongAnswer(f"{what} does not take a key of that database: {details}") from error
    connection = await ground.bare()
    try:
        query = "SELECT count(*) FROM billable_metrics WHERE organization_id = $1"
        must_be(f"metrics made by {what}", await connection.fetchval(query, tenant.organization), 1)
    finally:
        await connection.close()


def tree(pid: int) -> list[int]:
    """Return a process and all that it started, on Linux; elsewhere only itself."""
    found = [pid]
    for one in found:
        try:
            text = Path(f"/proc/{one}/task/{one}/children").read_text()
        except OSError:
            continue
        found += [int(child) for child in text.split()]
    return found


def _processor_s(pid: int, *, reaped: bool = False) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(one) for one in fields[11 : 15 if reaped else 13]) / os.sysconf("SC_CLK_TCK")


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
