"""Claims about the examples: each one, run as a user would, gives exact numbers, also over connections that break."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Client, running_server, timestamp
from structlog.testing import capture_logs

from metering.v1 import event_pb2, usage_pb2
from service.auth import new_api_key
from service.database import Database
from service.store import organizations

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"
LANGUAGES = ("python_async", "python_sync", "go", "node")
STREAMING = ("python_async", "go", "node")
# Where tools that came with this interpreter lie, also when its environment is not activated.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("METERING_")},
    "PATH": PATH,
    "PYTHONPATH": str(REPOSITORY / "generated"),
}

Command = list[str]
Program = Callable[[str], Command]

# What the examples say they send: a download per customer and hour of January 2026.
BYTES = {
    f"2026-01-{day:02}": sum(1000 * day + 10 * hour + number for hour in range(24) for number in (1, 2, 3))
    for day in range(1, 32)
}
TOTALS = [*(f"{day} {total}" for day, total in BYTES.items()), f"total {sum(BYTES.values())}"]
STREAMED = ["stored 2232 of 2232 events", *TOTALS]
CALLED = [
    "no-time: ERROR_REASON_FIELD_REQUIRED events[72].timestamp",
    "download-globex-0: ERROR_REASON_IDEMPOTENCY_CONFLICT events[73].transaction_id",
    "2232 stored, 1 VERDICT_REJECTED, 1 VERDICT_CONFLICT",
    *TOTALS,
    "INVALID_ARGUMENT: window_size: must be one of HOUR, DAY, NONE (and 2 more)",
    "  reason FIELD_REQUIRED",
    "  field window_size: must be one of HOUR, DAY, NONE",
    "  field starting_on: is required: a timestamp such as 2026-01-31T00:00:00Z",
    "  field ending_before: is required: a timestamp such as 2026-01-31T00:00:00Z",
]
PRINTED = {"python_async": STREAMED, "python_sync": CALLED, "go": STREAMED, "node": STREAMED}


class Done(NamedTuple):
    """How a program ended."""

    code: int | None
    printed: list[str]
    errors: str


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """How to run an example, by its folder's name; built once, outside of the repository, or skipped."""
    place = tmp_path_factory.mktemp("examples")
    shutil.copytree(REPOSITORY / "protos", place / "protos")
    outcomes: dict[str, Command | str] = {}

    def find(name: str) -> Command:
        if name not in outcomes:
            # Only what git would have: a copy of the sources as in a fresh clone.
            ignored = shutil.ignore_patterns("node_modules", "gen", "__pycache__")
            folder = shutil.copytree(EXAMPLES / name, place / "examples" / name, ignore=ignored)
            try:
                outcomes[name] = {"go": build_go, "node": build_node}.get(name, find_python)(folder)
            except Unavailable as reason:
                outcomes[name] = f"the example {name} is not tested: {reason}"
        found = outcomes[name]
        if isinstance(found, str):
            pytest.skip(found)
        return found

    return find


class Unavailable(Exception):
    """What an example is built with is not here."""


def find_python(folder: Path) -> Command:
    """Find a Python example, warnings being errors."""
    return [sys.executable, "-W", "error", str(folder / "main.py")]


def build_go(folder: Path) -> Command:
    """Build the Go example as its first lines say."""
    need("go", "buf")
    download(folder, 60, "checksum mismatch|go.sum", "go", "mod", "download")
    assert build(folder, "gofmt", "-l", ".") == ""
    build(folder, "go", "generate")
    build(folder, "go", "vet", ".")
    build(folder, "go", "build", "-o", "example", ".")
    return [str(folder / "example")]


def build_node(folder: Path) -> Command:
    """Install what the Node example needs, as its first lines say."""
    need("node", "npm")
    once = ("--fetch-retries=0", "--fetch-timeout=20000", "--ignore-scripts", "--prefer-offline", "--loglevel=error")
    download(folder, 60, "EUSAGE|EINTEGRITY|ETARGET|EJSONPARSE", "npm", "ci", *once)
    return ["node", str(folder / "main.js")]


def need(*tools: str) -> None:
    """Look for tools."""
    for tool in tools:
        if shutil.which(tool, path=PATH) is None:
            raise Unavailable(f"{tool} is not installed")


def download(folder: Path, timeout_s: float, defect: str, *command: str) -> None:
    """Run a command that downloads: a failure means that we are offline, unless it matches what is our own fault."""
    try:
        done = execute(folder, timeout_s, *command)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"`{' '.join(command[:3])}` took longer than {timeout_s} s") from None
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        assert not re.search(defect, said), said
        raise Unavailable(f"`{' '.join(command[:3])}` failed: {' '.join(said.split())[:300]}")


def build(folder: Path, *command: str) -> str:
    """Run a command that needs no network; returns what it wrote."""
    done = execute(folder, 300, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def execute(folder: Path, timeout_s: float, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a build command; never with a Go toolchain that would have to be downloaded."""
    environment = {**ENVIRONMENT, "GOTOOLCHAIN": "local", "BUF_CACHE_DIR": str(folder / "buf-cache")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


async def run(command: Command, address: str, **environment: str) -> Done:
    """Run an example against a server."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**ENVIRONMENT, "METERING_ADDRESS": address, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            printed, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Done(process.returncode, printed.decode().splitlines(), errors.decode())


class Proxy:
    """Forwards connections to a server, and breaks them by a plan.

    The plan is a row of (direction, bytes). The first of it that is left breaks whatever connection carried so many
    bytes that way, to the last byte, after the client had a moment to take in what came; then the next one counts.
    """

    def __init__(self, target: str, *plan: tuple[str, int]) -> None:
        self.host, _, self.port = target.rpartition(":")
        self.plan = deque(plan)
        self.connections: set[asyncio.Task[None]] = set()
        self.ends: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Serve on a free port; gives the address."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            await server.wait_closed()
            for end in self.ends:
                end.transport.abort()
            await asyncio.gather(*self.connections)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ends.add(writer)
        self.connections.add(asyncio.create_task(self._forward(reader, writer)))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(self.host, int(self.port))
        self.ends.add(server_writer)
        ways = [
            asyncio.create_task(self._pump("up", reader, server_writer)),
            asyncio.create_task(self._pump("down", server_reader, writer)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        # Never cancelled: that ends the other way too, and a connection left open would keep the server from stopping.
        for end in (writer, server_writer):
            end.transport.abort()
        await asyncio.gather(*ways, return_exceptions=True)
        for end in (writer, server_writer):
            with suppress(OSError):
                await end.wait_closed()

    async def _pump(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        carried = 0
        while data := await reader.read(16_384):
            cut = self.plan[0] if self.plan and self.plan[0][0] == way else None
            if cut and carried + len(data) >= cut[1]:
                data = data[: max(0, cut[1] - carried)]
            writer.write(data)
            await writer.drain()
            carried += len(data)
            if cut and carried >= cut[1]:
                self.plan.popleft()
                await asyncio.sleep(0.3)
                return


async def count_stored(client: Client) -> dict[str, int]:
    """Events stored per customer's name, as a metric counts them that is created only now and knows no example."""
    metric = await client.create_metric(name="all", aggregation_type="AGGREGATION_TYPE_COUNT")
    windows = await client.all_usage(
        billable_metrics=[usage_pb2.BillableMetricSelector(id=metric.id)],
        window_size=usage_pb2.WINDOW_SIZE_NONE,
        starting_on=timestamp(datetime(1970, 1, 1, tzinfo=UTC)),
        ending_before=timestamp(datetime(2100, 1, 1, tzinfo=UTC)),
    )
    unmatched = await client.events.ListUnmatchedCustomerKeys(event_pb2.ListUnmatchedCustomerKeysRequest())
    assert not unmatched.unmatched_customer_keys
    return {window.customer_id[-3:]: int(window.value or 0) for window in windows}


ONCE = {"101": 744, "102": 744, "103": 744}


@pytest.mark.parametrize("name", LANGUAGES)
async def test_a_second_run_counts_nothing_twice(program: Program, client: Client, name: str) -> None:
    """Both runs print the same exact totals and complain about nothing; every event is stored once."""
    command = program(name)
    for _ in range(2):
        assert await run(command, client.address) == Done(0, PRINTED[name], "")
    assert await count_stored(client) == ONCE


async def test_the_examples_send_the_same_events(program: Program, client: Client) -> None:
    """Whichever language comes second finds its events stored, not in conflict: ids and content are the same."""
    tested = 0
    for name in LANGUAGES:
        with suppress(pytest.skip.Exception):
            assert await run(program(name), client.address) == Done(0, PRINTED[name], "")
            tested += 1
    assert tested >= 2
    assert await count_stored(client) == ONCE


@pytest.mark.parametrize("name", STREAMING)
async def test_streams_that_break_are_resumed(program: Program, client: Client, name: str) -> None:
    """Cut once while events go in and twice while usage comes out, an example resends and resumes to the same totals.

    It says how many windows it had when it resumed: had it begun again, it would count them twice. To the server, a
    connection that breaks is no error.
    """
    command = program(name)
    proxy = Proxy(client.address, ("up", 100_000), ("down", 100_000), ("down", 100_000))
    with capture_logs() as logs:
        async with proxy.listening() as address:
            done = await run(command, address)
    assert (done.code, done.printed) == (0, PRINTED[name]), done.errors
    assert not proxy.plan, "not every cut came"
    assert "sending: again" in done.errors
    first, second = map(int, re.findall(r"^resuming after (\d+) windows$", done.errors, re.MULTILINE))
    assert 0 < first < second < 2232
    assert [entry["event"] for entry in logs if entry["log_level"] in {"error", "critical"}] == []
    assert await count_stored(client) == ONCE


async def test_calls_that_break_are_repeated(program: Program, client: Client) -> None:
    """Cut while a batch goes in, and again while usage comes out, the plain calls give the same totals."""
    proxy = Proxy(client.address, ("up", 100_000), ("down", 8_000))
    async with proxy.listening() as address:
        done = await run(program("python_sync"), address)
    assert (done.code, done.printed) == (0, PRINTED["python_sync"]), done.errors
    assert not proxy.plan, "not every cut came"
    assert done.errors.count("again after UNAVAILABLE") >= 2
    assert await count_stored(client) == ONCE


@pytest.mark.parametrize("name", LANGUAGES)
async def test_keys(program: Program, database_url: str, database: Database, name: str) -> None:
    """Against a server with keys an example fails at once, saying why and where, and works with METERING_API_KEY."""
    command, key = program(name), new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_organization(connection, "acme")
        await organizations.create_api_key(connection, "acme", key.id, "test", key.secret_hash)
    async with running_server(database_url) as client:
        refused = await run(command, client.address)
        assert (refused.code, refused.printed) == (1, [])
        for word in (client.address, "UNAUTHENTICATED", "API key"):
            assert word.lower() in refused.errors.lower()
        assert len(refused.errors.splitlines()) <= 2
        assert await run(command, client.address, METERING_API_KEY=key.text) == Done(0, PRINTED[name], "")


async def test_no_server(program: Program) -> None:
    """Without a server every example gives up within a few seconds, with the address and exit code 1."""
    commands = []
    for name in LANGUAGES:
        with suppress(pytest.skip.Exception):
            commands.append(program(name))
    for done in await asyncio.gather(*(run(command, "127.0.0.1:1") for command in commands)):
        assert (done.code, done.printed) == (1, [])
        assert "failed at 127.0.0.1:1: " in done.errors
        assert "Traceback" not in done.errors


def test_the_overview_is_whole() -> None:
    """The overview names every example."""
    overview = (EXAMPLES / "README.md").read_text()
    for name in (*LANGUAGES, "access_log.py"):
        assert f"]({name})" in overview


@pytest.mark.parametrize("name", ["node/package-lock.json", "go/go.sum", "go/go.mod"])
def test_locks_name_no_registry(name: str) -> None:
    """Pinned dependencies are named by version and hash, so that they come from the registry that a user has set."""
    assert "://" not in (EXAMPLES / name).read_text()
