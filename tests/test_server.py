"""`metering serve` and the operator's commands as processes: started, stopped, killed, refused, repaired."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from conftest import FAST, Client, event, running_server, timestamp
from faults import fault_of, until_waiting
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from metering.v1 import event_pb2, usage_record_group_pb2
from service import postgres as supervisor
from service.cli import COMMANDS, main, serve
from service.config import DEFAULT_ADDRESS, DEFAULT_DATA_DIR, Config
from service.database import Database
from service.domain.partners import with_changes
from service.migrations import is_current, upgrade
from service.postgres import EmbeddedPostgres, running_url
from service.server import COMPAT_SERVICES, SERVICES, CannotServe, serving
from service.store import organizations
from service.store.tables import usage_cells, usage_distinct_values

REPOSITORY = Path(__file__).resolve().parent.parent
ACCEPTED, DUPLICATE = event_pb2.VERDICT_ACCEPTED, event_pb2.VERDICT_DUPLICATE
MEMORY = Path("/dev/shm")  # noqa: S108 - copying a cluster on a slow disk is most of the time of a test
USABLE = os.access(MEMORY, os.W_OK) and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
BASE = MEMORY if USABLE and shutil.disk_usage(MEMORY).free > 2**30 else None
DAY = {
    "window_size": "WINDOW_SIZE_NONE",
    "starting_on": timestamp(datetime(2026, 1, 1, tzinfo=UTC)),
    "ending_before": timestamp(datetime(2026, 1, 2, tzinfo=UTC)),
}


# --- Processes


class Server:
    """A `metering serve` that said it is ready."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path, line: str) -> None:
        self.process = process
        self.output = output
        self.line = line
        self.addresses = line.split()[4:]
        self.address = self.addresses[0]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it with a signal; returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(40)

    def log(self) -> str:
        """Whatever it wrote to its standard error."""
        return self.output.read_text()


def environment(**more: str) -> dict[str, str]:
    """Ours without what would configure a server, and with what is asked for."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("METERING_")}
    return {**kept, **more}


def command(*arguments: str | Path) -> list[str]:
    """The command line of a subcommand."""
    return [sys.executable, "-m", "service", *map(str, arguments)]


@contextlib.contextmanager
def started(*arguments: str | Path, listen: str | None = "127.0.0.1:0", **variables: str) -> Iterator[Server]:
    """Run `metering serve` around the block; whatever happens in it, no process is left."""
    place = Path(tempfile.mkdtemp(prefix="metering-server-"))
    options = ["--listen", listen] if listen else []
    with open(place / "out", "wb") as out, open(place / "err", "wb") as err:
        process = subprocess.Popen(
            command("serve", *options, *arguments), cwd=REPOSITORY, env=environment(**variables), stdout=out, stderr=err
        )
    try:
        deadline = time.monotonic() + 60
        while not (line := (place / "out").read_text()).endswith("\n"):
            assert process.poll() is None, (place / "err").read_text()
            assert time.monotonic() < deadline, "not ready in time"
            time.sleep(0.01)
        yield Server(process, place / "err", line)
        assert (place / "out").read_text() == line, "it prints one line and no more"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        sys.stderr.write((place / "err").read_text())  # pytest shows it where a test fails
        shutil.rmtree(place)


def refused(*arguments: str | Path, listen: str = "127.0.0.1:0", **variables: str) -> str:
    """Run a `metering serve` that must not start; returns what it says, after checking that it says it well."""
    return failed("serve", "--listen", listen, *arguments, **variables)


def failed(*arguments: str | Path, **variables: str) -> str:
    """Run a command that must fail by itself, quickly; returns the one line that it says."""
    done = subprocess.run(
        command(*arguments),
        cwd=REPOSITORY,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ready" not in done.stdout
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1, done.stderr
    return said[0]


def metering(*arguments: str | Path, code: int = 0) -> str:
    """Run a command in this process; returns what it printed to its standard output."""
    # In a thread, because the loop of this one is the tests' own.
    with ThreadPoolExecutor(1) as pool:
        result: Result = pool.submit(lambda: CliRunner().invoke(main, list(map(str, arguments)))).result()
    assert result.exit_code == code, result.output
    return result.stdout


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Poll until the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


async def becomes(call: Callable[[], Awaitable[Any]], *expected: Any, seconds: float = 30) -> None:
    """Call until the answer, or the code of the failure, is one of those expected."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                answer = await call()
            except grpc.aio.AioRpcError as error:
                answer = error.code()
            if answer in expected:
                return
            await asyncio.sleep(0.05)


# --- Embedded clusters


def residents(data_dir: Path) -> dict[int, bool]:
    """The living Postgres processes of a data directory."""
    found: dict[int, bool] = {}
    for cluster in data_dir.resolve().glob("pg[0-9]*"):
        found |= supervisor._residents(cluster)
    return found


@pytest.fixture(scope="module")
def seed() -> Iterator[Path]:
    """A data directory with a cluster in it, made once; its server settings are the server's own affair."""
    parent = Path(tempfile.mkdtemp(prefix="metering-seed-", dir=BASE))
    parent.chmod(0o755)
    try:
        with EmbeddedPostgres(parent / "data", settings=FAST, sync=False):
            pass
        yield parent / "data"
    finally:
        shutil.rmtree(parent)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with blanks in its name that Postgres' user may enter."""
    parent = Path(tempfile.mkdtemp(prefix="metering server ", dir=BASE))
    parent.chmod(0o755)
    try:
        yield parent
        until(lambda: not residents(parent / "data dir"))
    finally:
        for pid in residents(parent / "data dir"):  # a failed test must not leave one behind either
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(parent, ignore_errors=True)


@pytest.fixture
def data_dir(place: Path, seed: Path) -> Path:
    """A data directory, in a path with blanks, that saves an initdb."""
    subprocess.run(["cp", "-a", seed, place / "data dir"], check=True)
    return place / "data dir"


@contextlib.asynccontextmanager
async def calling(server: Server, address: str | None = None) -> AsyncIterator[Client]:
    """A client of a server in a process."""
    async with grpc.aio.insecure_channel(address or server.address) as channel:
        yield Client(address or server.address, channel)


@contextlib.asynccontextmanager
async def engine_of(url: str | None, **options: Any) -> AsyncIterator[AsyncEngine]:
    """A way to a database beside the server's, closed whatever happens."""
    assert url is not None
    engine = create_async_engine(url, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


async def prepared(client: Client, **metric: Any) -> None:
    """Make a customer and a metric."""
    await client.create_customer(ingest_aliases=["acme"])
    await client.create_metric(**metric)


async def total(client: Client) -> list[str]:
    """The values of the day's windows."""
    return [window.value for window in await client.all_usage(**DAY)]


async def test_it_runs_on_nothing_but_a_directory(place: Path) -> None:
    """A data directory that does not exist becomes a Postgres of its own, and what is stored is there the next time."""
    data_dir = place / "data dir"
    with started("--data-dir", data_dir) as server:
        assert re.fullmatch(r"metering is ready on 127\.0\.0\.1:\d+\n", server.line)
        async with calling(server) as client:
            await prepared(client)
            assert list((await client.ingest(event("kept"))).verdicts) == [ACCEPTED]
        assert residents(data_dir)
        assert server.stop() == 0
        assert not residents(data_dir)
    with started(METERING_DATA_DIR=str(data_dir)) as server:
        async with calling(server) as client:
            assert await total(client) == ["1"]
            assert list((await client.ingest(event("kept"), event("new"))).verdicts) == [DUPLICATE, ACCEPTED]
            assert await total(client) == ["2"]
        assert server.stop(signal.SIGINT) == 0
        assert not residents(data_dir)
        assert "Traceback" not in server.log()


async def test_sigterm_lets_calls_in_flight_end(data_dir: Path) -> None:
    """A call that runs at SIGTERM gets its answer; a new one gets UNAVAILABLE; then the process ends with 0."""
    # Far more time than a busy machine needs for the steps below: the end of the drain would end the call.
    with started("--data-dir", data_dir, "--drain", "120") as server:
        async with calling(server) as client, engine_of(running_url(data_dir)) as engine:
            await prepared(client)
            async with engine.begin() as connection:
                await organizations.lock_exclusive(connection, "default")
                call = asyncio.ensure_future(client.ingest(event("in flight")))
                await until_waiting(engine)
                server.process.terminate()
                health = health_pb2_grpc.HealthStub(client.channel)
                request = health_pb2.HealthCheckRequest()
                await becomes(lambda: health.Check(request), grpc.StatusCode.UNAVAILABLE)
                async with calling(server) as newcomer:
                    fault = await fault_of(newcomer.ingest(event("too late")))
                assert fault.code == "UNAVAILABLE"
                assert server.process.poll() is None
                assert not call.done()
            assert list((await call).verdicts) == [ACCEPTED]
        assert await asyncio.to_thread(server.process.wait, 30) == 0
        assert not residents(data_dir)


async def test_the_drain_is_bounded(data_dir: Path) -> None:
    """A call that does not end within --drain does not keep the process: it ends, with 0, and so does Postgres."""
    with started("--data-dir", data_dir, "--drain", "0.2") as server:
        async with calling(server) as client, engine_of(running_url(data_dir)) as engine:
            await prepared(client)
            async with engine.begin() as connection:
                await organizations.lock_exclusive(connection, "default")
                call = asyncio.ensure_future(client.ingest(event("stuck")))
                await until_waiting(engine)
                server.process.terminate()
                fault = await asyncio.wait_for(fault_of(call), 10)
                assert fault.code in {"UNAVAILABLE", "CANCELLED"}
        assert await asyncio.to_thread(server.process.wait, 40) == 0
        assert not residents(data_dir)


async def test_a_killed_server_leaves_nothing_and_loses_nothing(data_dir: Path) -> None:
    """After kill -9 under load Postgres goes too; the next server on the data has every acknowledged event, once."""
    acknowledged: set[str] = set()
    sent: set[str] = set()

    async def write(client: Client, worker: int) -> None:
        for number in range(10_000):
            name = f"{worker}-{number}"
            sent.add(name)
            try:
                response = await client.ingest(event(name))
            except grpc.aio.AioRpcError:
                return
            assert list(response.verdicts) == [ACCEPTED]
            acknowledged.add(name)

    with started("--data-dir", data_dir) as server:
        async with calling(server) as client:
            await prepared(client)
            writers = [asyncio.create_task(write(client, worker)) for worker in range(8)]
            async with asyncio.timeout(60):
                while len(acknowledged) < 200:  # noqa: ASYNC110 - what it waits for are writers
                    await asyncio.sleep(0.01)
            server.process.kill()
            await asyncio.gather(*writers)
        server.process.wait()
        until(lambda: not residents(data_dir), 15)
    with started("--data-dir", data_dir) as server:
        async with calling(server) as client:
            known = await client.ingest(*(event(name) for name in sorted(acknowledged)))
            assert set(known.verdicts) == {DUPLICATE}
            assert set((await client.ingest(*(event(name) for name in sorted(sent)))).verdicts) <= {ACCEPTED, DUPLICATE}
            assert await total(client) == [str(len(sent))]
        assert server.stop() == 0


async def test_a_killed_postgres_comes_back_under_the_server(data_dir: Path) -> None:
    """When its Postgres is killed the server says UNAVAILABLE at most, starts it again, and has lost nothing."""
    with started("--data-dir", data_dir) as server:
        async with calling(server) as client:
            await prepared(client)
            await client.ingest(event("before"))
            (postmaster,) = [pid for pid, is_child in residents(data_dir).items() if not is_child]
            os.kill(postmaster, signal.SIGKILL)

            codes: set[Any] = set()

            async def retried(call: Callable[[], Awaitable[Any]]) -> Any:
                # Any of the server's old connections may still have to be found dead.
                async with asyncio.timeout(60):
                    while True:
                        try:
                            return await call()
                        except grpc.aio.AioRpcError as error:
                            codes.add(error.code())
                            await asyncio.sleep(0.05)

            response = await retried(lambda: client.ingest(event("after")))
            assert set(response.verdicts) <= {ACCEPTED, DUPLICATE}
            response = await retried(lambda: client.ingest(event("before"), event("after")))
            assert list(response.verdicts) == [DUPLICATE] * 2
            assert await retried(lambda: total(client)) == ["2"]
            assert codes <= {grpc.StatusCode.UNAVAILABLE}
            health = health_pb2_grpc.HealthStub(client.channel)
            request = health_pb2.HealthCheckRequest(service=SERVICES[0])
            serving_ = health_pb2.HealthCheckResponse(status="SERVING")
            await becomes(lambda: health.Check(request), serving_)
        assert server.stop() == 0
        assert "unexpected error" not in server.log()


async def test_keys_are_made_beside_a_running_server(data_dir: Path) -> None:
    """`keys create` finds the running server's Postgres by the data directory, and ends open mode within seconds."""
    with started("--data-dir", data_dir) as server:
        async with calling(server) as client:
            await prepared(client)
            done = await asyncio.to_thread(
                subprocess.run,
                command("keys", "create", "--name", "first", "--data-dir", data_dir),
                cwd=REPOSITORY,
                env=environment(),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            key = done.stdout.strip()
            assert re.fullmatch(r"mtr_[0-9a-f]{16}_\S{43}", key)
            request = event_pb2.IngestEventsRequest(events=[event()])
            await becomes(lambda: client.events.IngestEvents(request), grpc.StatusCode.UNAUTHENTICATED, seconds=10)
            credential = (("authorization", f"Bearer {key}"),)
            await client.events.IngestEvents(request, metadata=credential)
            assert (await asyncio.to_thread(metering, "orgs", "list", "--data-dir", data_dir)) == "default\n"
            await asyncio.to_thread(metering, "keys", "revoke", key.split("_")[1], "--data-dir", data_dir)
            await becomes(
                lambda: client.events.IngestEvents(request, metadata=credential),
                grpc.StatusCode.UNAUTHENTICATED,
                seconds=10,
            )
        # A second server on the same data is told who is there, and harms nobody.
        said = await asyncio.to_thread(refused, "--data-dir", data_dir)
        assert f"{data_dir} is in use by process {server.process.pid}" in said
        assert "--data-dir" in said
        assert "--database-url" in said
        assert server.process.poll() is None
        assert server.stop() == 0


# --- Databases that are not embedded


@pytest.fixture
async def empty_url(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """The URL of a database without the schema."""
    url = sa.make_url(postgres.url)
    async with engine_of(postgres.url, isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
        await connection.execute(sa.text("CREATE DATABASE unmigrated"))
        yield url.set(database="unmigrated").render_as_string(hide_password=False)
        await connection.execute(sa.text("DROP DATABASE unmigrated WITH (FORCE)"))


UNSAFE = {"METERING_ALLOW_UNSAFE_DATABASE": "1"}


def test_a_database_without_the_tables_is_refused(empty_url: str) -> None:
    """The refusal names the command that makes them; after that command the server starts."""
    assert "metering migrate" in refused("--database-url", empty_url, **UNSAFE)
    assert metering("migrate", "--database-url", empty_url) == "The database is up to date.\n"
    assert metering("migrate", "--database-url", empty_url) == "The database is up to date.\n"
    with started("--database-url", empty_url, **UNSAFE) as server:
        assert server.stop() == 0


async def test_migrations_may_run_at_once(empty_url: str) -> None:
    """Three migrations and a `serve --migrate` that start together all succeed, and the schema is there once."""

    def migrate() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command("migrate"),
            cwd=REPOSITORY,
            env=environment(METERING_DATABASE_URL=empty_url),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def serve() -> int:
        with started(METERING_DATABASE_URL=empty_url, METERING_MIGRATE="1", **UNSAFE) as server:
            return server.stop()

    *done, code = await asyncio.gather(*(asyncio.to_thread(migrate) for _ in range(3)), asyncio.to_thread(serve))
    assert [(one.returncode, one.stdout) for one in done] == [(0, "The database is up to date.\n")] * 3, done
    assert code == 0
    async with engine_of(empty_url) as engine:
        assert await is_current(engine)
        await asyncio.gather(*(upgrade(engine) for _ in range(3)))
        async with engine.connect() as connection:
            assert (await connection.scalar(sa.text("SELECT count(*) FROM organizations"))) == 1


def test_an_unsafe_database_is_refused(database_url: str) -> None:
    """A database that could lose acknowledged events is refused, with what is off and how to go on all the same."""
    said = refused("--database-url", database_url)
    for word in ("fsync is off", "full_page_writes is off", "METERING_ALLOW_UNSAFE_DATABASE"):
        assert word in said
    with started("--database-url", database_url, "--allow-unsafe-database") as server:
        assert server.stop() == 0


def test_a_database_that_is_not_there_is_told(place: Path, postgres: EmbeddedPostgres) -> None:
    """No server at the URL, or no such database: one line and a non-zero exit, for serve and the other commands."""
    missing = sa.make_url(postgres.url).set(database="missing").render_as_string(hide_password=False)
    assert "missing" in refused("--database-url", missing)
    nobody = f"postgresql://metering@/metering?host={place}"
    for arguments in (("migrate",), ("orgs", "list"), ("verify",)):
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(CliRunner().invoke, main, [*arguments, "--database-url", nobody])
        assert call.result().exit_code == 1
        assert call.result().stderr.startswith("Error: ")


# --- Addresses


def test_a_port_has_one_server(database_url: str) -> None:
    """A second server on a TCP port is refused by name, and the first goes on."""
    with started("--database-url", database_url, **UNSAFE) as server:
        assert f"Cannot listen on {server.address}" in refused(
            "--database-url", database_url, listen=server.address, **UNSAFE
        )
        with grpc.insecure_channel(server.address) as channel:
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1
        assert server.stop() == 0


async def test_a_socket_has_one_server_at_a_time(database_url: str, place: Path) -> None:
    """Reachable beside TCP, closed to other users, refused while it lives, taken over once it was killed."""
    path = place / "m.sock"
    address = f"unix:{path}"
    with started("--database-url", database_url, "--listen", "127.0.0.1:0", listen=address, **UNSAFE) as server:
        # The path has blanks, so the line is not split.
        tcp = server.line.split()[-1]
        assert server.line.startswith(f"metering is ready on {address} 127.0.0.1:")
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        for one in (address, tcp):
            async with calling(server, one) as client:
                await client.ingest(event(one))
        said = await asyncio.to_thread(refused, "--database-url", database_url, listen=address, **UNSAFE)
        assert f"Cannot listen on {address}: another server is running there" in said
        async with calling(server, address) as client:
            assert list((await client.ingest(event(address))).verdicts) == [DUPLICATE]
        server.process.kill()
        server.process.wait()
    assert path.exists()
    with started("--database-url", database_url, listen=address, **UNSAFE) as server:
        async with calling(server, address) as client:
            assert list((await client.ingest(event(tcp))).verdicts) == [DUPLICATE]
        assert server.stop() == 0


@pytest.fixture
async def database_of(database_url: str) -> AsyncIterator[Database]:
    """A database to serve in this process."""
    database = Database(database_url)
    yield database
    await database.close()


async def test_bad_addresses_are_refused(database_of: Database, place: Path) -> None:
    """Each address that cannot be had is refused in plain words, and files that are not ours are left alone."""
    (place / "file").write_text("precious")
    taken = {
        f"unix:{place}/file": "not a socket",
        f"unix:{place}/missing/m.sock": "No such file",
        f"unix:{place}/{'x' * 120}": "Cannot listen",
        "192.0.2.1:0": "without|no credentials",
        "0.0.0.0:0": "no credentials",
        "[::]:0": "no credentials",
        "metering.invalid:0": "no credentials",
    }
    for address, said in taken.items():
        config = Config(listen=(address,), allow_unsafe_database=True)
        with pytest.raises(CannotServe, match=said) as caught:
            async with serving(config, database_of):
                pass
        assert address in str(caught.value) or said != "Cannot listen"
    assert (place / "file").read_text() == "precious"


async def test_open_mode_ends_with_the_first_key(database_of: Database, database_url: str) -> None:
    """Any address may be listened on once there is an API key, and stays allowed when that is revoked."""
    config = Config(listen=("0.0.0.0:0",), allow_unsafe_database=True)
    with pytest.raises(CannotServe, match="metering keys create"):
        async with serving(config, database_of):
            pass
    key = (await asyncio.to_thread(metering, "keys", "create", "--database-url", database_url)).strip()
    await asyncio.to_thread(metering, "keys", "revoke", key.split("_")[1], "--database-url", database_url)
    async with serving(config, database_of) as (address,):
        port = address.rpartition(":")[2]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert (await fault_of(Client(address, channel).ingest(event()))).reason == "CREDENTIAL_MISSING"


# --- Health and reflection


async def test_reflection_lists_every_service(client: Client) -> None:
    """A tool that knows nothing but the address finds the services, and the messages of each."""
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)

    async def ask(**request: Any) -> Any:
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**request)]))
        return await anext(aiter(call))

    answer = await ask(list_services="")
    names = {one.name for one in answer.list_services_response.service}
    ours = {*SERVICES, *COMPAT_SERVICES}
    assert names == {*ours, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    for name in ours:
        found = await ask(file_containing_symbol=name)
        assert found.file_descriptor_response.file_descriptor_proto


@contextlib.asynccontextmanager
async def closed_database(database_url: str, postgres: EmbeddedPostgres) -> AsyncIterator[None]:
    """Let nobody connect to a database while the block runs."""
    name = sa.make_url(database_url).database
    terminate = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
    async with engine_of(postgres.url, isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
        await connection.execute(sa.text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'))
        await connection.execute(terminate, {"name": name})
        yield
        await connection.execute(sa.text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'))


async def test_connections_that_died_in_the_pool_cost_no_call(database_url: str, postgres: EmbeddedPostgres) -> None:
    """When Postgres ended every pooled connection, as a restart does, the next calls of every kind succeed."""
    name = sa.make_url(database_url).database
    ended = sa.text("SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE datname = :name")
    database = Database(database_url)

    async def number(connection: Any) -> int:
        await asyncio.sleep(0.05)  # so that those at once are on connections of their own
        found: int = (await connection.execute(sa.text("SELECT 1"))).scalar_one()
        return found

    def calls() -> list[Any]:
        return [
            *(database.write("default", number) for _ in range(4)),
            *(database.read("default", number) for _ in range(4)),
            *(database.read_ahead("default", number) for _ in range(2)),
            *(database.look_up(number) for _ in range(2)),
            *(database.background(number) for _ in range(1)),
            *(database.background(number, snapshot=True) for _ in range(1)),
        ]

    try:
        async with engine_of(postgres.url, isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
            assert await asyncio.gather(*calls()) == [1] * 14
            for _ in range(3):
                assert (await connection.execute(ended, {"name": name})).scalar_one() >= 10
                assert await asyncio.gather(*calls()) == [1] * 14
            assert (await connection.execute(ended, {"name": name})).scalar_one() >= 10
            assert await database.ping()
    finally:
        await database.close()


async def test_health_tells_the_process_from_its_database(
    database_url: str, postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The empty name is SERVING while the process lives; a service only while its database answers."""
    monkeypatch.setattr("service.server.HEALTH_PERIOD_S", 0.05)
    up, down = (health_pb2.HealthCheckResponse(status=name) for name in ("SERVING", "NOT_SERVING"))
    async with running_server(database_url) as client:
        health = health_pb2_grpc.HealthStub(client.channel)

        async def check(service: str) -> Any:
            return await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)

        for service in ("", *SERVICES, *COMPAT_SERVICES):
            assert await check(service) == up
        assert (await fault_of(check("metering.v1.Nonsense"))).code == "NOT_FOUND"
        async with closed_database(database_url, postgres):
            for service in (*SERVICES, *COMPAT_SERVICES):
                await becomes(lambda service=service: check(service), down)
            assert await check("") == up
        for service in (*SERVICES, *COMPAT_SERVICES):
            await becomes(lambda service=service: check(service), up)
        assert list((await client.ingest(event())).verdicts) == [ACCEPTED]


async def test_a_database_that_refuses_connections_is_unavailable(
    database_url: str, postgres: EmbeddedPostgres
) -> None:
    """Whatever keeps the server from connecting to its database, callers are told to retry."""
    async with running_server(database_url) as client:
        await client.ingest(event())
        async with closed_database(database_url, postgres):
            for _ in range(2):  # the first may meet a connection that was cut
                fault = await fault_of(client.ingest(event()))
                assert (fault.code, fault.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")


# --- Settings


class Recorded:
    """What `metering serve` would run with."""

    config: Config | None = None
    loop: type | None = None


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Let `metering serve` end where the server would start, and say what it was told."""
    found = Recorded()

    async def run_server(config: Config, _ready: Callable[[list[str], str | None], None]) -> None:
        found.config, found.loop = config, type(asyncio.get_running_loop())

    monkeypatch.setattr(serve, "run_server", run_server)
    monkeypatch.setattr(serve, "run_workers", run_server)
    monkeypatch.setattr(serve, "log_to_stderr", lambda _level: None)
    for name in os.environ:
        if name.startswith("METERING_"):
            monkeypatch.delenv(name)
    return found


SETTINGS: list[tuple[str, str, str, Any]] = [
    ("listen", "127.0.0.1:1234 unix:/tmp/x", "", ("127.0.0.1:1234", "unix:/tmp/x")),
    ("gateway", "127.0.0.1:8080", "127.0.0.1:1", "127.0.0.1:8080"),
    ("workers", "3", "2", 3),
    ("database-url", "postgresql://a@b/c", "postgresql://d@e/f", "postgresql://a@b/c"),
    ("data-dir", "/a b", "/c", Path("/a b")),
    ("pg-bin", "/opt/pg/bin", "/else", "/opt/pg/bin"),
    ("migrate", "1", "", True),
    ("allow-unsafe-database", "true", "", True),
    ("drain", "2.5", "7", timedelta(seconds=2.5)),
    ("stream-stall", "2.5", "7", timedelta(seconds=2.5)),
    ("max-event-age", "48", "1", timedelta(hours=48)),
    ("max-event-lead", "0.5", "1", timedelta(minutes=30)),
    ("strict-compat-windows", "1", "", True),
    ("max-calls", "7", "8", 7),
    ("max-calls-per-org", "7", "8", 7),
    ("max-streams", "7", "8", 7),
    ("max-streams-per-org", "7", "8", 7),
    ("max-connections", "7", "8", 7),
    ("max-request-bytes", "5000", "6000", 5000),
    ("max-message-bytes", "5000", "6000", 5000),
    ("ingest-rate", "0.5", "8", 0.5),
    ("ingest-queue", "7", "8", 7),
    ("statement-timeout", "7", "8", timedelta(seconds=7)),
    ("connection-age", "0", "8", None),
    ("keepalive", "0.5", "8", timedelta(seconds=0.5)),
    ("keepalive-timeout", "0.5", "8", timedelta(seconds=0.5)),
    ("ping-interval", "0.5", "8", timedelta(seconds=0.5)),
    ("partner-rule", "AWS.window_hours=6", "GCP.places=2", with_changes(["AWS.window_hours=6"])),
]


LOAD = {flag: field for flag, field, *_ in serve._LOAD}
# These make sense together only, and have a test of their own.
TOGETHER = {
    *("tls-cert", "tls-key", "tls-client-ca", "tls-clients"),
    *("jwt-issuer", "jwt-audience", "jwt-keys", "jwt-algorithm", "jwt-org-claim", "jwt-roles-claim"),
}


def setting(config: Config | None, flag: str) -> Any:
    """The value in the configuration that a flag sets."""
    assert config is not None
    if flag == "partner-rule":
        return config.partner_rules
    if flag.startswith("max-event"):
        return config.time_limits.ahead if flag == "max-event-lead" else config.time_limits.oldest
    if flag in LOAD:
        return getattr(config.load, LOAD[flag])
    return getattr(config, flag.replace("-", "_"))


@pytest.mark.parametrize(("flag", "value", "other", "expected"), SETTINGS, ids=[one[0] for one in SETTINGS])
def test_every_flag_has_its_variable(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, flag: str, value: str, other: str, expected: Any
) -> None:
    """METERING_<FLAG> sets what the flag sets, and the flag wins over it."""
    variable = f"METERING_{flag.upper().replace('-', '_')}"
    metering("serve")
    assert setting(recorded.config, flag) != expected
    monkeypatch.setenv(variable, value)
    metering("serve")
    assert setting(recorded.config, flag) == expected
    monkeypatch.setenv(variable, other)
    values = value.split() if flag == "listen" else [value]
    switch = isinstance(expected, bool)
    metering("serve", *(word for one in values for word in ([f"--{flag}"] if switch else [f"--{flag}", one])))
    assert setting(recorded.config, flag) == expected


def test_no_flag_is_without_a_test() -> None:
    """The table above has every option of `metering serve`, and each names its variable in the help."""
    found = serve.serve.params
    assert {one.opts[0].removeprefix("--") for one in found} == {flag for flag, *_ in SETTINGS} | TOGETHER
    for one in found:
        assert one.envvar == f"METERING_{one.opts[0].removeprefix('--').upper().replace('-', '_')}"  # type: ignore[union-attr]


def test_defaults(recorded: Recorded) -> None:
    """Without flags: loopback, no gateway, an embedded Postgres in the home directory, durable, a day ahead."""
    metering("serve")
    assert recorded.config == Config(
        listen=(DEFAULT_ADDRESS,),
        gateway=None,
        database_url=None,
        data_dir=DEFAULT_DATA_DIR,
        migrate=False,
        allow_unsafe_database=False,
        drain=timedelta(seconds=20),
        strict_compat_windows=False,
    )
    assert recorded.config.time_limits == (timedelta(hours=24), None)


@pytest.mark.parametrize(
    "arguments", [("--drain", "-1"), ("--drain", "soon"), ("--max-event-age", "-1"), ("--nonsense",), ("extra",)]
)
def test_bad_settings_are_usage_errors(recorded: Recorded, arguments: tuple[str, ...]) -> None:
    """What cannot be meant is refused with exit code 2, before anything starts."""
    metering("serve", *arguments, code=2)
    assert recorded.config is None


def test_uvloop_is_used_when_installed(recorded: Recorded) -> None:
    """The server runs on uvloop, and without it on asyncio's own loop."""
    metering("serve")
    assert recorded.loop is not None
    assert recorded.loop.__module__ == "uvloop"


def test_a_missing_uvloop_is_no_error(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where uvloop is not installed the server runs on asyncio's own loop."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    metering("serve")
    assert recorded.loop is not None
    assert recorded.loop.__module__.startswith("asyncio")


def test_it_runs_as_a_module() -> None:
    """`python -m service --help` lists every command and ends with 0."""
    done = subprocess.run(
        command("--help"), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert re.search(rf"^ +{name} ", done.stdout, re.MULTILINE), name


def test_programs_that_are_not_there_are_told(place: Path) -> None:
    """A METERING_PG_BIN without Postgres in it is refused by name."""
    assert str(place) in refused("--data-dir", place / "data dir", METERING_PG_BIN=str(place))


# --- Organizations and keys


def test_organizations_and_keys(database_url: str) -> None:
    """Create, list and revoke, each with the exit code that a script can rely on; repeating is safe."""
    where = ("--database-url", database_url)
    assert metering("orgs", "create", "acme", *where) == "Organization acme created.\n"
    assert metering("orgs", "create", "acme", *where) == "Organization acme exists already.\n"
    for name in ("Acme", "", "1a", "-a", "a_b", "ä", "a" * 64, "a b"):
        metering("orgs", "create", *where, "--", name, code=2)
    metering("orgs", "create", "a" * 63, *where)
    assert metering("orgs", "list", *where).split() == ["a" * 63, "acme", "default"]
    keys = [metering("keys", "create", "--org", "acme", "--name", name, *where).strip() for name in ("one", "two")]
    ids = [key.split("_")[1] for key in keys]
    listed = metering("keys", "list", "--org", "acme", *where).splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in listed] == list(zip(ids, ("one", "two"), strict=True))
    assert all(" active " in line for line in listed)
    assert not any(key.split("_", 2)[2] in "\n".join(listed) for key in keys)
    assert metering("keys", "list", *where) == ""
    metering("keys", "create", "--org", "nobody", *where, code=1)
    metering("keys", "revoke", ids[0], *where, code=1)  # it is not of the default organization
    metering("keys", "revoke", "nonsense", "--org", "acme", *where, code=1)
    for _ in range(2):
        assert metering("keys", "revoke", ids[0], "--org", "acme", *where) == f"Key {ids[0]} is revoked.\n"
    listed = metering("keys", "list", "--org", "acme", *where).splitlines()
    assert [" revoked " in line for line in listed] == [True, False]


async def test_a_key_need_not_be_an_administrators(database_url: str) -> None:
    """With other roles its calls may not skip validation, and the list says so; without any said they may."""
    where = ("--database-url", database_url)
    made = [
        (await asyncio.to_thread(metering, "keys", "create", *flags, *where)).strip()
        for flags in ((), ("--role", "read", "--role", "ingest"))
    ]
    listed = (await asyncio.to_thread(metering, "keys", "list", *where)).splitlines()
    assert [line.split("  ")[3] for line in listed] == ["admin", "ingest,read"]
    request = usage_record_group_pb2.BatchValidateUsageRecordGroupsRequest(
        groups=[{"entitlement_id": "e", "records": {"cpu": "1"}, "meta_info": {"skip_validation": True}}]
    )
    forbidden = []
    async with running_server(database_url) as client:
        for key in made:
            metadata = [("authorization", f"Bearer {key}")]
            (result,) = (await client.groups.BatchValidateUsageRecordGroups(request, metadata=metadata)).results
            forbidden.append("groups[0].meta_info.skip_validation" in {one.field for one in result.violations})
    assert forbidden == [False, True]


# --- Verification

TAMPERED: dict[str, tuple[sa.Update | sa.Delete, str]] = {
    "a sum": (sa.update(usage_cells).values(sum=usage_cells.c.sum + 1).where(usage_cells.c.sum.is_not(None)), "sum is"),
    "a count": (sa.update(usage_cells).values(counted=usage_cells.c.counted - 1), "counted is"),
    "skipped": (sa.update(usage_cells).values(skipped=7), "skipped is"),
    "all groups": (sa.update(usage_cells).values(skipped=7).where(usage_cells.c.group_digest == b""), "[]: skipped is"),
    "a group": (sa.update(usage_cells).values(skipped=7).where(usage_cells.c.group_digest > b""), "['eu']: skipped is"),
    "a cell lost": (sa.delete(usage_cells), "counted is None"),
    "a cell in another hour": (
        sa.update(usage_cells).values(cell_start=usage_cells.c.cell_start + timedelta(days=30)),
        "2026-01-31",
    ),
    "a distinct value lost": (sa.delete(usage_distinct_values), "distinct values"),
    "a distinct value changed": (
        sa.update(usage_distinct_values).values(value_digest=sa.func.sha256(usage_distinct_values.c.value_digest)),
        "distinct values",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
async def test_verify_finds_and_mends(client: Client, database: Database, database_url: str, name: str) -> None:
    """Changed aggregates are told cell by cell with exit code 1, stay until --repair, and are exact then."""
    statement, told = TAMPERED[name]
    await client.create_customer(ingest_aliases=["acme"])
    for aggregation in ("SUM", "UNIQUE"):
        await client.create_metric(
            aggregation_type=f"AGGREGATION_TYPE_{aggregation}", aggregation_key="n", group_keys=[{"properties": ["g"]}]
        )
    await client.ingest(*(event(properties={"n": n, "g": "eu"}) for n in (1, 2, 2)))
    right = await total(client)
    assert sorted(right) == ["2", "5"]

    async def verify(*options: str, code: int = 0) -> list[str]:
        text = await asyncio.to_thread(metering, "verify", "--database-url", database_url, *options, code=code)
        return text.splitlines()

    assert await verify() == ["2 metrics checked: every stored aggregate is what its events say."]
    async with database.engine.begin() as connection:
        assert (await connection.execute(statement)).rowcount
    for _ in range(2):
        *found, summary = await verify(code=1)
        assert found
        assert all(line.startswith("default ") and "'acme'" in line for line in found)
        assert told in "\n".join(found)
        assert summary == f"2 metrics checked: {len(found)} cells are wrong. Run again with --repair."
    # A verification of another time or organization does not see it.
    assert len(await verify("--from", "2025-01-01", "--to", "2025-02-01")) == 1
    *mended, summary = await verify("--repair")
    assert mended == found
    assert summary == f"2 metrics checked: {len(found)} cells were wrong and are repaired."
    assert len(await verify()) == 1
    assert await total(client) == right


async def test_a_command_refuses_tables_of_another_version(database: Database, database_url: str) -> None:
    """What works on the tables says that they must be migrated first, and does nothing to them.

    Would catch a `verify --repair` that takes what an older version stored for wrong, and writes what it reads wrongly.
    """
    async with database.engine.begin() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '0003'"))
    for command in (("verify", "--repair"), ("orgs", "create", "new"), ("keys", "list")):
        arguments = [*command, "--database-url", database_url]
        result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
        assert result.exit_code == 1
        assert "another schema than this version needs. Run `metering migrate` first." in result.output
    async with database.engine.connect() as connection:
        found = await connection.execute(sa.text("SELECT id FROM organizations"))
        assert list(found.scalars()) == ["default"]


async def test_verify_can_be_narrowed(client: Client, database: Database, database_url: str) -> None:
    """To one metric, one organization and a time; what is outside is neither told nor repaired."""
    await client.create_customer(ingest_aliases=["acme"])
    one, other = [await client.create_metric() for _ in range(2)]
    await client.ingest(event(), event(at=datetime(2026, 1, 1, 12, tzinfo=UTC)))
    async with database.engine.begin() as connection:
        await connection.execute(sa.update(usage_cells).values(counted=10))

    async def wrong(*options: str, code: int = 1) -> int:
        where = ("--database-url", database_url)
        return len((await asyncio.to_thread(metering, "verify", *where, *options, code=code)).splitlines()) - 1

    assert await wrong() == 4
    assert await wrong("--metric", one.id) == 2
    assert await wrong("--metric", one.id, "--to", "2026-01-01T12:00:00") == 1
    assert await wrong("--from", "2026-01-01T12:00:00", "--to", "2026-01-01T13:00:00", "--repair", code=0) == 2
    assert await wrong() == 2
    assert await wrong("--org", "default", "--metric", other.id) == 1
    assert await wrong("--metric", "04ca7e72-4229-4a6e-ab11-9f7376fccbcb") == -1
