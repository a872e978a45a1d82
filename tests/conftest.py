"""One real Postgres per run, one database per test cloned from a migrated template, and real servers on free ports."""

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, settings
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from metering.v1 import (
    billable_metric_pb2,
    billable_metric_pb2_grpc,
    customer_pb2,
    customer_pb2_grpc,
    entitlement_pb2_grpc,
    event_pb2,
    event_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
    usage_record_group_pb2_grpc,
    usage_record_report_pb2_grpc,
)
from service.config import Config
from service.database import Database
from service.gateway import GatewayError, find_envoy, gateway
from service.migrations import upgrade
from service.postgres import EmbeddedPostgres
from service.reporting import Reporting
from service.server import serving
from service.store.tables import APPLICATION_ROLE, ORGANIZATION_SETTING

# Tests make their databases safe to lose: speed is all that matters to them.
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

settings.register_profile(
    "metering",
    deadline=None,
    # Fixtures are made once per test function and shared by its examples; each example uses ids of its own.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("metering")

_numbers = itertools.count()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the fuzzer run for as long as one likes."""
    parser.addoption("--minutes", type=float, default=1.0, help="how long test_fuzz.py sends requests (default: 1)")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests recorded as their `summary`, in whatever worker they ran."""
    reports = [one for found in terminalreporter.stats.values() for one in found if getattr(one, "when", "") == "call"]
    for name, text in (pair for one in reports for pair in one.user_properties):
        if name == "summary":
            terminalreporter.write_line(str(text))


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """The run's Postgres, in a path with blanks in it."""
    # Not pytest's own directory: it is closed to other users, and as root Postgres must run as one.
    root = Path(tempfile.mkdtemp(prefix="metering tests "))
    root.chmod(0o755)
    try:
        with EmbeddedPostgres(root / "data dir", settings=FAST) as cluster:
            yield cluster
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
async def template(postgres: EmbeddedPostgres) -> str:
    """The name of a database that has the schema and nothing else."""
    url = sa.make_url(postgres.url)
    name = "template_metering"
    await _administer(url, f'CREATE DATABASE "{name}"')
    engine = create_async_engine(url.set(database=name))
    await upgrade(engine)
    await engine.dispose()
    return name


@pytest.fixture
async def database_url(postgres: EmbeddedPostgres, template: str) -> AsyncIterator[str]:
    """The URL of a fresh database with the schema."""
    url = sa.make_url(postgres.url)
    name = f"test_{next(_numbers)}"
    await _administer(url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    yield url.set(database=name).render_as_string(hide_password=False)
    await _administer(url, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The service's own way to the fresh database."""
    database = Database(database_url)
    yield database
    await database.close()


@asynccontextmanager
async def acting_for(database: Database, organization: str | None) -> AsyncIterator[AsyncConnection]:
    """A transaction that Postgres limits to an organization, as it does callers'; it is undone at the end."""
    async with database.engine.connect() as connection:
        await connection.exec_driver_sql(f"SET LOCAL ROLE {APPLICATION_ROLE}")
        if organization is not None:
            await connection.execute(sa.select(sa.func.set_config(ORGANIZATION_SETTING, organization, True)))
        yield connection
        await connection.rollback()


@pytest.fixture(autouse=True)
def hourly_job(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the hourly job of servers in this process from rolling up behind a test's back, unless it is marked so."""

    async def idle(_: Reporting) -> None:
        await asyncio.Event().wait()

    if "hourly_job" not in request.keywords:
        monkeypatch.setattr(Reporting, "run", idle)


@pytest.fixture(autouse=True)
def log_settings() -> None:
    """Log as by default: a command that an earlier test ran in this process has set it otherwise."""
    structlog.reset_defaults()


@dataclass
class Client:
    """The stubs of one server, as one caller."""

    address: str
    channel: grpc.aio.Channel
    events: Any = field(init=False)
    metrics: Any = field(init=False)
    customers: Any = field(init=False)
    usage: Any = field(init=False)
    entitlements: Any = field(init=False)
    groups: Any = field(init=False)
    reports: Any = field(init=False)

    def __post_init__(self) -> None:
        self.events = event_pb2_grpc.EventServiceStub(self.channel)
        self.metrics = billable_metric_pb2_grpc.BillableMetricServiceStub(self.channel)
        self.customers = customer_pb2_grpc.CustomerServiceStub(self.channel)
        self.usage = usage_pb2_grpc.UsageServiceStub(self.channel)
        self.entitlements = entitlement_pb2_grpc.EntitlementServiceStub(self.channel)
        self.groups = usage_record_group_pb2_grpc.UsageRecordGroupServiceStub(self.channel)
        self.reports = usage_record_report_pb2_grpc.UsageRecordReportServiceStub(self.channel)

    async def create_metric(self, **fields: Any) -> billable_metric_pb2.BillableMetric:
        """Create a metric (COUNT of everything unless told otherwise) and wait until its past is counted."""
        fields = {"name": "metric", "aggregation_type": "AGGREGATION_TYPE_COUNT", **fields}
        request = billable_metric_pb2.CreateBillableMetricRequest(
            billable_metric=billable_metric_pb2.BillableMetric(**fields)
        )
        metric = (await self.metrics.CreateBillableMetric(request)).billable_metric
        return await self.counted(metric)

    async def counted(self, metric: billable_metric_pb2.BillableMetric) -> billable_metric_pb2.BillableMetric:
        """Wait until a metric's past is counted."""
        async with asyncio.timeout(60):
            while metric.HasField("backfill_progress"):
                await asyncio.sleep(0.02)
                request = billable_metric_pb2.GetBillableMetricRequest(id=metric.id)
                metric = (await self.metrics.GetBillableMetric(request)).billable_metric
        return metric

    async def create_customer(self, **fields: Any) -> customer_pb2.Customer:
        """Create a customer."""
        request = customer_pb2.CreateCustomerRequest(customer=customer_pb2.Customer(**{"name": "Acme", **fields}))
        return (await self.customers.CreateCustomer(request)).customer

    async def ingest(self, *events: event_pb2.UsageEvent, **fields: Any) -> event_pb2.IngestEventsResponse:
        """Ingest events."""
        return await self.events.IngestEvents(event_pb2.IngestEventsRequest(events=events, **fields))

    async def all_usage(self, **fields: Any) -> list[usage_pb2.UsageWindow]:
        """Read every page of a usage query."""
        windows: list[usage_pb2.UsageWindow] = []
        request = usage_pb2.ListUsageRequest(**fields)
        while True:
            page = await self.usage.ListUsage(request)
            windows += page.windows
            if not page.next_page_token:
                return windows
            request.page_token = page.next_page_token


@asynccontextmanager
async def running_server(database_url: str, **settings: Any) -> AsyncIterator[Client]:
    """Run a server in this process and give a client of it."""
    database = Database(database_url)
    config = Config(**{"listen": ("127.0.0.1:0",), "allow_unsafe_database": True, **settings})
    async with AsyncExitStack() as stack:
        stack.push_async_callback(database.close)
        (address, *_) = await stack.enter_async_context(serving(config, database))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        yield Client(address, channel)


@pytest.fixture
async def client(database_url: str) -> AsyncIterator[Client]:
    """A client of a server in this process, on a fresh database."""
    async with running_server(database_url) as client:
        yield client


@asynccontextmanager
async def running_gateway(address: str) -> AsyncIterator[str]:
    """Run Envoy in front of the server at an address and give its base URL; skips where there is no Envoy."""
    try:
        find_envoy()
    except GatewayError as error:
        pytest.skip(str(error))
    async with gateway("127.0.0.1:0", address, drain_s=1) as running:
        yield f"http://{running.address}"


@pytest.fixture
async def base_url(client: Client) -> AsyncIterator[str]:
    """The base URL of an Envoy in front of `client`'s server. Clients that block must run in a thread."""
    async with running_gateway(client.address) as url:
        yield url


class Process:
    """A server in a process of its own, with its address."""

    def __init__(self, process: subprocess.Popen[str], line: str) -> None:
        self.process = process
        self.ready_line = line
        self.address = line.rsplit(maxsplit=1)[-1]

    def kill(self) -> None:
        """Kill it without warning."""
        self.process.kill()
        self.process.wait()
        self._close()

    def stop(self, timeout_s: float = 30) -> int:
        """End it as an orchestrator would; returns its exit code."""
        self.process.terminate()
        code = self.process.wait(timeout_s)
        self._close()
        return code

    def _close(self) -> None:
        if self.process.stdout:
            self.process.stdout.close()


def start_server(*arguments: str, **environment: str) -> Process:
    """Start `python -m service serve` and wait until it says that it is ready."""
    command = [sys.executable, "-m", "service", "serve", "--listen", "127.0.0.1:0", *arguments]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parent.parent,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([".", "generated", os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "METERING_ALLOW_UNSAFE_DATABASE": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if "ready" not in line:
        process.kill()
        process.wait()
        process.stdout.close()
        raise AssertionError(f"the server did not start: {line!r}")
    return Process(process, line)


def event(transaction_id: str | None = None, **fields: Any) -> event_pb2.UsageEvent:
    """Make an event: `at` is a datetime, `properties` a dict; all else as in the proto, with usable defaults."""
    at = fields.pop("at", datetime(2026, 1, 1, tzinfo=UTC))
    properties = fields.pop("properties", {})
    fields = {"customer_id": "acme", "event_type": "request", **fields}
    message = event_pb2.UsageEvent(transaction_id=transaction_id or str(uuid.uuid4()), **fields)
    message.timestamp.CopyFrom(timestamp(at))
    message.properties.update(properties)
    return message


def timestamp(at: datetime) -> Timestamp:
    """Return a datetime as a Timestamp."""
    message = Timestamp()
    message.FromDatetime(at)
    return message


async def _administer(url: sa.URL, statement: str) -> None:
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(sa.text(statement))
    await engine.dispose()
