"""Claims about who may do what: every role and method, API keys from birth to end, and that no secret shows."""

import asyncio
import contextlib
import datetime as dt
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from conftest import Client, event, running_server, timestamp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from faults import Fault, fault_of, read_fault, until
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from streaming import ALONE, NARROW
from structlog.testing import capture_logs

import service.auth
import service.server
from metering.v1 import customer_pb2, event_pb2, usage_pb2
from service.auth import Auth, NewApiKey, new_api_key, permissions
from service.auth.tokens import ALGORITHMS, TokenSettings
from service.cli import main
from service.cli import serve as serve_command
from service.cli.operate import log_to_stderr
from service.config import Config, Tls
from service.database import Database
from service.domain.roles import EVERY_ROLE, Role
from service.server import COMPAT_SERVICES, SERVICES, CannotServe, serving
from service.store import customers as customer_store
from service.store import events as event_store
from service.store import organizations
from service.store.tables import usage_events

REPOSITORY = Path(__file__).resolve().parent.parent
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
MISSING = ("UNAUTHENTICATED", "CREDENTIAL_MISSING", None)
REFUSED = ("UNAUTHENTICATED", "CREDENTIAL_INVALID", None)
FELT_S = 5.0  # a revocation is felt everywhere within this time
START = datetime(2020, 1, 1, tzinfo=UTC)
HOURS = 80_000

# Every method that a server has, by its path; health is public and apart.
METHODS = {
    f"{name}/{method.name}": method
    for name in (*SERVICES, *COMPAT_SERVICES, REFLECTION)
    for method in descriptor_pool.Default().FindServiceByName(name).methods
}
METHOD_NAMES = sorted(METHODS)
# What a method's name says of who should have it; all others change the catalog or what was reported.
READS = re.compile(r"(Get|List|Search|StreamUsage).*")
REPORTS = re.compile(r"(IngestEvents|StreamEvents|ReportUsageRecordGroups?|Batch(Validate|Create)UsageRecordGroups)")


def bearer(key: NewApiKey | str) -> list[tuple[str, str]]:
    """The headers of a call with a credential."""
    return [("authorization", f"Bearer {key if isinstance(key, str) else key.text}")]


async def new_key(
    database: Database, *roles: Role, organization: str = "default", expires_at: datetime | None = None
) -> NewApiKey:
    """Make a credential; an administrator's unless roles are said."""
    key = new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_organization(connection, organization)
        await organizations.create_api_key(
            connection, organization, key.id, "test", key.secret_hash, roles or [Role.ADMIN], expires_at
        )
    return key


async def revoke(database: Database, *keys: NewApiKey) -> None:
    """Revoke keys of the organization `default`."""
    async with database.engine.begin() as connection:
        for key in keys:
            assert await organizations.revoke_api_key(connection, "default", key.id)


async def tried(client: Client, method: str, metadata: Sequence[tuple[str, str]] | None = None) -> Fault | None:
    """Call a method with an empty request (a stream of one), and read to the end; returns why it failed, if it did."""
    descriptor = METHODS[method]
    request = message_factory.GetMessageClass(descriptor.input_type)
    coders = f"/{method}", request.SerializeToString, message_factory.GetMessageClass(descriptor.output_type).FromString
    try:
        if not descriptor.server_streaming:
            await client.channel.unary_unary(*coders)(request(), metadata=metadata)
            return None
        call: Any
        if descriptor.client_streaming:
            call = client.channel.stream_stream(*coders)(iter([request()]), metadata=metadata)
        else:
            call = client.channel.unary_stream(*coders)(request(), metadata=metadata)
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return read_fault(error)
    return None


async def customers(client: Client, credential: NewApiKey | str | None) -> list[str]:
    """The ids of the caller's customers."""
    metadata = None if credential is None else bearer(credential)
    answer = await client.customers.ListCustomers(customer_pb2.ListCustomersRequest(), metadata=metadata)
    return [one.id for one in answer.customers]


async def is_refused(client: Client, credential: NewApiKey) -> bool:
    """Whether a credential does not work now."""
    try:
        await customers(client, credential)
    except grpc.aio.AioRpcError as error:
        return read_fault(error).brief == REFUSED
    return False


def metering(*arguments: str | Path, code: int = 0) -> str:
    """Run a command in this process; returns what it printed, to standard error too if it must fail."""
    # In a thread, because the loop of this one is the tests' own.
    with ThreadPoolExecutor(1) as pool:
        result: Result = pool.submit(lambda: CliRunner().invoke(main, list(map(str, arguments)))).result()
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


# --- The role matrix

HOLDERS = [
    frozenset({Role.INGEST}),
    frozenset({Role.READ}),
    frozenset({Role.ADMIN}),
    frozenset({Role.INGEST, Role.READ}),
]


def may(method: str, roles: Iterable[Role]) -> bool:
    """What the table says of a method, `package.Service/Method`."""
    name, _, one = method.partition("/")
    return bool(permissions.PERMISSIONS[name][one] & set(roles))


def test_the_table_is_what_the_names_say() -> None:
    """Readers read, senders report usage, and every other method changes things and is for administrators."""
    rows = {
        f"{name}/{one}": roles for name, methods in permissions.PERMISSIONS.items() for one, roles in methods.items()
    }
    assert rows.keys() == METHODS.keys()
    assert len(rows) > 60
    for method, roles in rows.items():
        name = method.partition("/")[2]
        expected = {Role.ADMIN}
        if READS.fullmatch(name):
            expected |= {Role.READ}
        elif REPORTS.fullmatch(name):
            expected |= {Role.INGEST}
        if method.startswith(REFLECTION):
            expected = set(EVERY_ROLE)
        assert roles == expected, method


async def test_every_cell_of_the_role_matrix(database_url: str, database: Database) -> None:
    """Each method, for a key of each role: ROLE_REQUIRED just where the table says so, else an answer of its own."""
    keys = {roles: await new_key(database, *roles) for roles in HOLDERS}
    cells = {True: 0, False: 0}
    async with running_server(database_url) as client:
        for method in METHOD_NAMES:
            for roles, key in keys.items():
                fault = await tried(client, method, bearer(key))
                about = (method, set(roles), fault)
                cells[may(method, roles)] += 1
                if not may(method, roles):
                    assert fault is not None, about
                    assert fault.brief == ("PERMISSION_DENIED", "ROLE_REQUIRED", None), about
                    name, _, one = method.partition("/")
                    needed = ",".join(sorted(permissions.PERMISSIONS[name][one]))
                    assert fault.metadata == {"needed": needed, "method": method}, about
                elif fault is not None:
                    assert fault.code in {"INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED"}, about
                    assert fault.reason not in {"ROLE_REQUIRED", ""}, about
    assert min(cells.values()) > 60
    # Nothing came of it.
    async with running_server(database_url) as client:
        assert await customers(client, keys[frozenset({Role.ADMIN})]) == []


async def test_without_a_credential_nothing_but_health_answers(database_url: str, database: Database) -> None:
    """Each method without a credential is CREDENTIAL_MISSING; health answers, and tells nothing but that it is well."""
    await new_key(database)
    async with running_server(database_url) as client:
        for method in METHOD_NAMES:
            fault = await tried(client, method)
            assert fault is not None, method
            assert fault.brief == MISSING, method
            assert fault.metadata == {}, method
            wrong = await tried(client, method, bearer(new_api_key()))
            assert wrong is not None, method
            assert wrong.brief == REFUSED, method
        health = health_pb2_grpc.HealthStub(client.channel)
        for name in ("", *SERVICES, *COMPAT_SERVICES):
            for metadata in (None, bearer("nonsense")):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name), metadata=metadata)
                assert answer == health_pb2.HealthCheckResponse(status="SERVING")
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_open_mode_is_an_administrators(client: Client) -> None:
    """Without any credential configured every method answers every local caller, and none with a fault of access."""
    for method in METHOD_NAMES:
        for metadata in (None, bearer("nonsense")):
            fault = await tried(client, method, metadata)
            assert fault is None or fault.code in {"INVALID_ARGUMENT", "NOT_FOUND"}, (method, fault)


async def test_what_does_not_exist_is_unimplemented(database_url: str, database: Database) -> None:
    """Methods and services that do not exist are UNIMPLEMENTED, whoever asks and however they are written."""
    key = await new_key(database, Role.READ)
    paths = [
        "/metering.v1.EventService/Nothing", "/metering.v1.Nothing/IngestEvents", "/nothing", "/", "//",
        "/metering.v1.EventService/ingestevents", "/metering.v1.EventService/IngestEvents/", "/a/b/c",
        "/metering.v1.EventService/", "/METERING.V1.EventService/IngestEvents", "//metering.v1.EventService/X",
        "/grpc.channelz.v1.Channelz/GetServers", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.health.v1.Health/List", "/grpc.admin.v1.Admin/X",
    ]  # fmt: skip
    async with running_server(database_url) as client:
        for path in paths:
            for metadata in (None, bearer(key)):
                for call in (client.channel.unary_unary, client.channel.stream_unary):
                    sent = b"" if call == client.channel.unary_unary else iter([b""])
                    fault = await fault_of(call(path)(sent, metadata=metadata))
                    assert (fault.code, fault.reason) == ("UNIMPLEMENTED", ""), path


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("metering.v1.CustomerService", "ListCustomers"),
        ("metering.v1.UsageService", "StreamUsage"),
        ("metering.v1.EventService", "StreamEvents"),
        (REFLECTION, "ServerReflectionInfo"),
    ],
)
async def test_a_method_without_a_row_is_nobodys(
    database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    """What the table does not have is refused to administrators too, and in open mode; all else goes on."""
    without = {one: {**methods} for one, methods in permissions.PERMISSIONS.items()}
    del without[name][method]
    monkeypatch.setattr(permissions, "PERMISSIONS", without)
    async with running_server(database_url) as client:
        for is_open in (True, False):
            key = None if is_open else await new_key(database)
            if key is not None:
                await until(lambda: _is_closed(client))
            metadata = None if key is None else bearer(key)
            fault = await tried(client, f"{name}/{method}", metadata)
            assert fault is not None
            assert fault.brief == ("PERMISSION_DENIED", "ROLE_REQUIRED", None)
            assert fault.metadata == {"needed": "", "method": f"{name}/{method}"}
            assert "no role there is" in fault.text
            get = await tried(client, "metering.v1.CustomerService/GetCustomer", metadata)
            assert get is not None
            assert get.code == "INVALID_ARGUMENT"
        del without[name]
        fault = await tried(client, f"{name}/{method}", metadata)
        assert fault is not None
        assert fault.reason == "ROLE_REQUIRED"


async def _is_closed(client: Client) -> bool:
    fault = await tried(client, "metering.v1.CustomerService/GetCustomer")
    return fault is not None and fault.brief == MISSING


def test_the_check_of_the_table(tmp_path: Path) -> None:
    """`poe check` fails on a method without a row and on a row without a method, and names them."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(REPOSITORY / "service", tmp_path / "service", ignore=ignored)
    (tmp_path / "protos").mkdir()
    shutil.copy(REPOSITORY / "protos" / "check_permissions.py", tmp_path / "protos")
    (tmp_path / "generated").symlink_to(REPOSITORY / "generated")
    table = tmp_path / "service" / "auth" / "permissions.py"
    whole = table.read_text()

    def check() -> tuple[int, list[str]]:
        done = subprocess.run(
            [sys.executable, "protos/check_permissions.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not done.stderr
        return done.returncode, done.stdout.splitlines()

    assert check() == (0, [])
    row = '        "GetCustomer": _READ,\n'
    assert row in whole
    table.write_text(whole.replace(row, "", 1))
    code, (line,) = check()
    assert code == 1
    assert "metering.v1.CustomerService/GetCustomer has no row" in line
    table.write_text(whole.replace(row, row + '        "GetNothing": _READ,\n', 1))
    code, (line,) = check()
    assert code == 1
    assert "metering.v1.CustomerService/GetNothing" in line
    assert "protos/check_permissions.py" in (REPOSITORY / "pyproject.toml").read_text()


def test_the_documentation_has_the_table() -> None:
    """The matrix in docs/security.md is that of the code, row by row."""
    told: dict[str, frozenset[Role]] = {}
    for line in (REPOSITORY / "docs" / "security.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 2 + len(Role) and (name := cells[0].strip("`")) in permissions.PERMISSIONS:
            roles = frozenset(role for role, cell in zip(Role, cells[2:], strict=True) if cell == "yes")
            assert set(cells[2:]) <= {"yes", ""}
            for method in cells[1].replace("`", "").split(", "):
                assert f"{name}/{method}" not in told
                told[f"{name}/{method}"] = roles
    assert told == {f"{name}/{one}": roles for name, of in permissions.PERMISSIONS.items() for one, roles in of.items()}


# --- API keys


def malformed(key: NewApiKey, other: NewApiKey) -> list[list[tuple[str, str]]]:
    """Headers that must be refused, made from good keys."""
    text, (_, key_id, secret) = key.text, key.text.split("_", 2)
    other_secret = other.text.split("_", 2)[2]
    values = [
        "", "Bearer", "Bearer ", "Key", text, f"Basic {text}", f"Bearer{text}", f"Bearer  {text}",
        f"Bearer {text} ", f"Bearer {text}.", f"Bearer {text} {text}", f"Bearer={text}", f"Bearer {text},Bearer {text}",
        f"Bearer {key_id}_{secret}", f"Bearer mtr_{key_id}", f"Bearer mtr_{key_id}_", f"Bearer mtr__{secret}",
        f"Bearer mtr_{key_id}_{other_secret}", f"Bearer mtr_{key_id}_{secret[:-1]}", f"Bearer mtr_{key_id}_{secret}A",
        f"Bearer MTR_{key_id}_{secret}", f"Bearer mtr_{key_id.upper()}x_{secret}", f"Bearer mtr_{'0' * 65}_{secret}",
        f"Bearer mtr_{key_id}__{secret}", f"Bearer {new_api_key().text}", "Bearer a.b.c", "Bearer ..", "\u00e9 x",
        f"Bearer {text}{'x' * 9000}", f"Bearer {'x' * 8192}", f"Bearer mtr_{key_id}_{'x' * 8170}",
    ]  # fmt: skip
    bad = [[("authorization", value)] for value in values if value.isascii()]
    twice = [
        bearer(key) + bearer(key),
        bearer(key) + bearer(other),
        bearer(key) + bearer("x"),
        bearer("x") + bearer(key),
    ]
    return bad + twice


async def test_how_a_key_is_sent(database_url: str, database: Database) -> None:
    """`Bearer` or `Key`, in any casing, one blank and the key; anything else is refused, with one answer for all."""
    key, other = await new_key(database), await new_key(database)
    async with running_server(database_url) as client:
        for scheme in ("Bearer", "bearer", "BEARER", "bEaReR", "Key", "key", "KEY"):
            metadata = [("authorization", f"{scheme} {key.text}")]
            assert await tried(client, "metering.v1.CustomerService/ListCustomers", metadata) is None
        seen = set()
        for metadata in malformed(key, other):
            fault = await tried(client, "metering.v1.CustomerService/ListCustomers", metadata)
            assert fault is not None, metadata
            assert fault.brief == REFUSED, metadata
            seen.add((fault.text, *fault.metadata, fault.retry_s))
        assert len(seen) == 1
        # Elsewhere it is no credential.
        for name in ("x-api-key", "proxy-authorization", "cookie", "x-authorization"):
            fault = await tried(client, "metering.v1.CustomerService/ListCustomers", [(name, f"Bearer {key.text}")])
            assert fault is not None
            assert fault.brief == MISSING
        # More than all headers together may weigh never comes to us.
        large = [("authorization", f"Bearer {'x' * 20_000}")]
        fault = await tried(client, "metering.v1.CustomerService/ListCustomers", large)
        assert fault is not None
        assert fault.code == "RESOURCE_EXHAUSTED"


async def test_bad_keys_are_all_alike(database_url: str, database: Database) -> None:
    """Unknown, revoked, expired and with a wrong secret: code, text, details and trailers are the same to the byte."""
    good, revoked = await new_key(database), await new_key(database)
    expired = await new_key(database, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    await revoke(database, revoked)
    wrong = f"mtr_{good.id}_{new_api_key().text.split('_', 2)[2]}"
    answers = set()
    async with running_server(database_url) as client:
        for credential in (new_api_key().text, revoked.text, expired.text, wrong, f"mtr_{revoked.id}_x", "x"):
            for _ in range(3):  # looked up, and remembered
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await customers(client, credential)
                error = caught.value
                assert read_fault(error).brief == REFUSED
                answers.add(
                    (
                        error.code(),
                        error.details(),
                        tuple(sorted((str(k), v) for k, v in error.trailing_metadata() if k != "x-request-id")),
                        tuple(sorted(str(k) for k, _ in error.trailing_metadata())),
                        tuple(sorted(str(k) for k, _ in error.initial_metadata())),
                    )
                )
        assert len(answers) == 1, answers
        assert await customers(client, good) == []


class Open(NamedTuple):
    """The streams of one key on one server."""

    client: Client
    events: Any
    usage: Sequence[Any]


async def _slow_end(call: Any) -> tuple[float, Fault | None]:
    """Read a stream message by message, slowly; returns when it ended and why."""
    try:
        while True:
            if await call.read() is grpc.aio.EOF:
                break
            await asyncio.sleep(0.4)
    except grpc.aio.AioRpcError as error:
        return time.monotonic(), read_fault(error)
    return time.monotonic(), None


async def long_usage(client: Client, key: NewApiKey) -> dict[str, Any]:
    """Make what has so many windows of usage that a slow reader of them is still busy when the test has ended."""
    metadata = bearer(key)
    request = customer_pb2.CreateCustomerRequest(customer={"name": "Acme", "ingest_aliases": ["acme"]})
    customer = (await client.customers.CreateCustomer(request, metadata=metadata)).customer.id
    coders = "/metering.v1.BillableMetricService/CreateBillableMetric"
    made = message_factory.GetMessageClass(METHODS[coders[1:]].input_type)(
        billable_metric={"name": "m", "aggregation_type": "AGGREGATION_TYPE_COUNT"}
    )
    metric = (await client.metrics.CreateBillableMetric(made, metadata=metadata)).billable_metric
    return {
        "window_size": "WINDOW_SIZE_HOUR",
        "starting_on": timestamp(START),
        "ending_before": timestamp(START + timedelta(hours=HOURS)),
        "customer": customer,
        "metric": metric.id,
    }


async def open_streams(client: Client, metadata: list[tuple[str, str]], usage: dict[str, Any]) -> Open:
    """Open every kind of stream, each begun: a message read, a batch stored."""
    usage = {**usage}
    customer, metric = usage.pop("customer"), usage.pop("metric")
    plain = usage_pb2.StreamUsageRequest(customer_ids=[customer], billable_metrics=[{"id": metric}], **usage)
    grouped = usage_pb2.StreamUsageWithGroupsRequest(customer_id=customer, billable_metric_id=metric, **usage)
    calls = [
        client.usage.StreamUsage(plain, metadata=metadata),
        client.usage.StreamUsageWithGroups(grouped, metadata=metadata),
    ]
    for call in calls:
        assert (await call.read()).windows
    events = client.events.StreamEvents(metadata=metadata)
    await events.write(event_pb2.StreamEventsRequest(sequence=1, events=[event(f"before {client.address}")]))
    assert (await events.read()).sequence == 1
    return Open(client, events, calls)


@contextlib.asynccontextmanager
async def narrow(address: str) -> AsyncIterator[Client]:
    """A client with a connection of its own, which takes little at a time."""
    async with grpc.aio.insecure_channel(address, options=(*ALONE, *NARROW)) as channel:
        yield Client(address, channel)


async def stored_ids(database: Database) -> set[str]:
    """The transaction ids of every event that is stored."""
    async with database.engine.connect() as connection:
        return set((await connection.execute(sa.select(usage_events.c.transaction_id))).scalars())


async def test_a_revoked_key_ends_everywhere(database_url: str, database: Database) -> None:
    """Revoked, a key is refused within 5 s on two servers of one database, its streams of every kind end with
    UNAUTHENTICATED, and nothing of a batch sent after is stored; another key of the organization loses nothing.
    """
    admin, ends, stays = [await new_key(database, *roles) for roles in ((), HOLDERS[3], HOLDERS[3])]
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(running_server(database_url)) for _ in range(2)]
        usage = await long_usage(servers[0], admin)
        await until(lambda: _is_counted(servers[0], admin))
        ending, staying = [], []
        for server in servers:
            for key, streams in ((ends, ending), (stays, staying)):
                client = await stack.enter_async_context(narrow(server.address))
                streams.append(await open_streams(client, bearer(key), usage))
        reading = [
            [asyncio.create_task(_slow_end(call)) for one in all_of for call in one.usage]
            for all_of in (ending, staying)
        ]
        await asyncio.sleep(0.5)
        await revoke(database, ends)
        began = time.monotonic()
        for server in servers:
            await until(lambda server=server: is_refused(server, ends), FELT_S)
        assert time.monotonic() - began < FELT_S
        for streams in ending:
            await streams.events.write(event_pb2.StreamEventsRequest(sequence=2, events=[event("after")]))
            fault = await fault_of(asyncio.wait_for(streams.events.read(), 5))
            assert fault.brief == REFUSED
        for reader in reading[0]:
            ended, why = await asyncio.wait_for(reader, 10)
            assert why is not None
            assert why.brief == REFUSED
            assert ended - began < FELT_S
        # It is for good, and nothing else is lost.
        assert not any(reader.done() for reader in reading[1])
        for streams in staying:
            await streams.events.write(event_pb2.StreamEventsRequest(sequence=2, events=[event("theirs")]))
            assert (await streams.events.read()).sequence == 2
            assert len(await customers(streams.client, stays)) == 1
        for reader in reading[1]:
            reader.cancel()
        for server in servers:
            assert await is_refused(server, ends)
        assert await stored_ids(database) == {*(f"before {server.address}" for server in servers), "theirs"}


async def _is_counted(client: Client, key: NewApiKey) -> bool:
    request = message_factory.GetMessageClass(
        METHODS["metering.v1.BillableMetricService/ListBillableMetrics"].input_type
    )
    listed = await client.metrics.ListBillableMetrics(request(), metadata=bearer(key))
    return not any(one.HasField("backfill_progress") for one in listed.billable_metrics)


async def test_a_key_that_expires_ends_its_streams(database_url: str, database: Database) -> None:
    """From its time on an expiring key is refused, to the second: calls, and streams that it opened before."""
    admin = await new_key(database)
    async with running_server(database_url) as server, narrow(server.address) as client:
        usage = await long_usage(server, admin)
        await until(lambda: _is_counted(server, admin))
        expires = datetime.now(UTC) + timedelta(seconds=5)
        key = await new_key(database, *HOLDERS[3], expires_at=expires)
        streams = await open_streams(client, bearer(key), usage)
        assert len(await customers(client, key)) == 1
        # Looked up a moment before its end, so that it would be trusted for a moment longer.
        await asyncio.sleep((expires - datetime.now(UTC)).total_seconds() - 0.5)
        assert len(await customers(client, key)) == 1
        await asyncio.sleep((expires - datetime.now(UTC)).total_seconds() + 0.05)
        assert await is_refused(client, key)
        await streams.events.write(event_pb2.StreamEventsRequest(sequence=2, events=[event("after")]))
        assert (await fault_of(streams.events.read())).brief == REFUSED
        for call in streams.usage:
            _, why = await asyncio.wait_for(_slow_end(call), 5)
            assert why is not None
            assert why.brief == REFUSED
        assert len(await customers(client, admin)) == 1
        assert await stored_ids(database) == {f"before {server.address}"}


async def test_a_role_taken_away_ends_streams(database_url: str, database: Database) -> None:
    """A stream goes on no longer than its key has the role for it."""
    key = await new_key(database, *HOLDERS[3])
    async with running_server(database_url) as client:
        call = client.events.StreamEvents(metadata=bearer(key))
        await call.write(event_pb2.StreamEventsRequest(sequence=1, events=[event("before")]))
        assert (await call.read()).sequence == 1
        async with database.engine.begin() as connection:
            await connection.execute(sa.text("UPDATE api_keys SET roles = '{read}'"))

        async def felt() -> bool:
            fault = await tried(client, "metering.v1.EventService/IngestEvents", bearer(key))
            return fault is not None and fault.reason == "ROLE_REQUIRED"

        await until(felt, FELT_S)
        await call.write(event_pb2.StreamEventsRequest(sequence=2, events=[event("after")]))
        assert (await fault_of(call.read())).reason == "ROLE_REQUIRED"
        assert await stored_ids(database) == {"before"}


async def test_a_flood_of_made_up_keys(database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of made-up keys, whose look-ups are slow, are all refused, few of them wait at once, and a key that is
    in use is served all the while, many calls at a time, though it is looked up again meanwhile.
    """
    key = await new_key(database)
    made: list[Auth] = []
    find = organizations.find_api_key

    async def slow(connection: Any, key_id: str) -> Any:
        if key_id != key.id:
            await asyncio.sleep(0.002)
        return await find(connection, key_id)

    class Watched(Auth):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(organizations, "find_api_key", slow)
    monkeypatch.setattr(service.server, "Auth", Watched)
    refused: dict[str, int] = {}
    most, stop = 0, asyncio.Event()

    async def stranger(client: Client) -> None:
        fault = await fault_of(customers(client, new_api_key()))
        assert fault.retry_s == (1 if fault.reason == "OVERLOADED" else None)
        refused[fault.reason] = refused.get(fault.reason, 0) + 1

    async def flood(client: Client) -> None:
        nonlocal most
        while not stop.is_set():
            waves = [asyncio.create_task(stranger(client)) for _ in range(300)]
            await asyncio.sleep(0.2)
            most = max(most, made[0]._strangers_waiting)
            await asyncio.gather(*waves)

    async with running_server(database_url) as client, narrow(client.address) as away:
        assert await customers(client, key) == []
        flooding = [asyncio.create_task(flood(away)) for _ in range(2)]
        try:
            await until(lambda: refused.get("OVERLOADED"), 10)
            served, longest, ends = 0, 0.0, time.monotonic() + 3 * service.auth.TRUST_S
            while time.monotonic() < ends:
                began = time.monotonic()
                await asyncio.gather(*(customers(client, key) for _ in range(10)))
                longest = max(longest, time.monotonic() - began)
                served += 10
                await asyncio.sleep(0.02)
        finally:
            stop.set()
            await asyncio.gather(*flooding)
        # Then those made up are what they always are.
        assert (await fault_of(customers(client, new_api_key()))).brief == REFUSED
    assert refused.keys() == {"CREDENTIAL_INVALID", "OVERLOADED"}
    assert sum(refused.values()) > 1000
    assert served > 300
    assert longest < 3
    assert most == service.auth._STRANGERS_MAX


async def test_many_first_calls_with_one_key(
    database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a key that was never seen, more calls at once than strangers may wait are one look-up, and all are served."""
    key = await new_key(database)
    asked: list[str] = []
    find = organizations.find_api_key

    async def slow(connection: Any, key_id: str) -> Any:
        asked.append(key_id)
        await asyncio.sleep(0.5)
        return await find(connection, key_id)

    monkeypatch.setattr(organizations, "find_api_key", slow)
    async with running_server(database_url) as client:
        number = 2 * service.auth._STRANGERS_MAX
        assert await asyncio.gather(*(customers(client, key) for _ in range(number))) == [[]] * number
    assert asked == [key.id]


# --- Secrets


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What the server logs, as its process would write it."""
    text = io.StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    log_to_stderr(0)
    return text.getvalue


async def test_no_secret_is_told(
    database_url: str, database: Database, logged: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials and values of events, through success and every kind of failure: in no log and in no error."""
    password, value = "canary-password-7f1c", "canary-value-93ab"
    admin, reader, revoked = [await new_key(database, *roles) for roles in ((), (Role.READ,), ())]
    expired = await new_key(database, expires_at=datetime.now(UTC) - timedelta(hours=1))
    await revoke(database, revoked)
    wrong = f"mtr_{admin.id}_canary-wrong-secret-5d2e"
    jwt = "eyJhbGciOiJSUzI1NiJ9.Y2FuYXJ5LWp3dA.Y2FuYXJ5LXNpZ25hdHVyZQ"
    secrets = [one.text.split("_", 2)[2] for one in (admin, reader, revoked, expired)]
    secrets += ["canary-wrong-secret-5d2e", jwt.split(".")[1], jwt.split(".")[2], password]
    told: list[str] = []
    url = sa.make_url(database_url).set(password=password).render_as_string(hide_password=False)

    async def ask(call: Awaitable[Any]) -> str:
        fault = await fault_of(call)
        told.append(repr(fault))
        return fault.reason

    def sent(credential: NewApiKey | str) -> dict[str, Any]:
        return {"metadata": bearer(credential)}

    good = event_pb2.IngestEventsRequest(events=[event("good", properties={"p": value})])
    bad = [
        event("bad", properties={"p": {"nested": [value]}, "n": 2.0**60}),
        event("far", at=datetime(2999, 1, 1, tzinfo=UTC), properties={"p": value}),
        event("", customer_id="", properties={value * 40: value}),
        event("good", properties={"p": value + "other"}),
    ]
    async with running_server(url) as client:
        for _ in range(2):
            assert list((await client.events.IngestEvents(good, **sent(admin))).verdicts)
        partly = await client.events.IngestEvents(event_pb2.IngestEventsRequest(events=bad), **sent(admin))
        assert set(partly.verdicts) == {event_pb2.VERDICT_REJECTED, event_pb2.VERDICT_CONFLICT}
        for one in bad:
            whole = event_pb2.IngestEventsRequest(events=[one], all_or_nothing=True)
            await ask(client.events.IngestEvents(whole, **sent(admin)))
        for credential in (reader, revoked, expired, wrong, jwt, new_api_key()):
            await ask(client.events.IngestEvents(good, **sent(credential)))
        for method in METHOD_NAMES:
            fault = await tried(client, method, bearer(admin))
            told.append(repr(fault))
            told.append(repr(await tried(client, method, bearer(wrong))))
        stream = client.events.StreamEvents(**sent(admin))
        await stream.write(event_pb2.StreamEventsRequest(sequence=7, events=[event(properties={"p": value})]))
        assert await ask(stream.read()) == "FIELD_INVALID"
        answered = logged()
        assert "Traceback" not in answered
        assert value not in answered
        assert not [one for one in told if value in one and value * 2 not in one]

        # Our own defects: the value is in the exception's text, and may be in its traceback, for us. No more.
        async def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"broken at {value}")

        monkeypatch.setattr(customer_store, "list_customers", broken)
        monkeypatch.setattr(event_store, "list_unmatched_keys", broken)
        monkeypatch.setattr(event_store, "insert_events", broken)
        before = len(told)
        unmatched = event_pb2.ListUnmatchedCustomerKeysRequest()
        for credential in (admin, reader):
            listing = client.customers.ListCustomers(customer_pb2.ListCustomersRequest(), **sent(credential))
            assert await ask(listing) == "INTERNAL"
            assert await ask(client.events.ListUnmatchedCustomerKeys(unmatched, **sent(credential))) == "INTERNAL"
        fresh = event_pb2.IngestEventsRequest(events=[event("fresh", properties={"p": value})])
        assert await ask(client.events.IngestEvents(fresh, **sent(admin))) == "INTERNAL"
        assert not [one for one in told[before:] if value in one]
        assert logged().count("RuntimeError: broken") >= 5
    for text in (logged(), *told):
        assert not [secret for secret in secrets if secret in text], text


def test_no_secret_is_told_by_a_process(database_url: str, tmp_path: Path) -> None:
    """A server's own output, and the commands', hold neither the database's password nor a key's secret."""
    password = "canary-password-7f1c"  # noqa: S105
    url = sa.make_url(database_url).set(password=password).render_as_string(hide_password=False)
    elsewhere = f"postgresql://canary:{password}@127.0.0.1:1/nothing"
    environment = {
        **{name: text for name, text in os.environ.items() if not name.startswith("METERING_")},
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "generated")]),
        "METERING_ALLOW_UNSAFE_DATABASE": "1",
    }

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "service", *arguments],
            env={**environment, **more}, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    key = run("keys", "create", METERING_DATABASE_URL=url).stdout.strip()
    secret = key.split("_", 2)[2]
    listed = run("keys", "list", "--database-url", url)
    assert key.split("_")[1] in listed.stdout
    outputs = [listed]
    for arguments in (("keys", "list"), ("serve", "--listen", "127.0.0.1:0")):
        wheres = [elsewhere]
        if arguments == ("keys", "list"):
            wheres += [elsewhere.replace("postgresql", "nonsense"), f"postgresql://x:{password}@["]
        for where in wheres:
            outputs.append(run(*arguments, METERING_DATABASE_URL=where))
            assert outputs[-1].returncode == 1
            assert "Error: " in outputs[-1].stderr
    with open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve", "--listen", "127.0.0.1:0"],
            env={**environment, "METERING_DATABASE_URL": url}, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=err,
        )  # fmt: skip
    assert process.stdout is not None
    with process:
        try:
            line = process.stdout.readline()
            channel = grpc.insecure_channel(line.split()[-1])
            for credential in (key, f"mtr_{key.split('_')[1]}_x{secret}", f"Bearer.{secret}.x"):
                call = channel.unary_unary("/metering.v1.EventService/IngestEvents")
                for body in (b"", b"\xff\xff"):
                    with contextlib.suppress(grpc.RpcError):
                        call(body, metadata=[("authorization", f"Bearer {credential}")], timeout=10)
            channel.close()
        finally:
            process.terminate()
            rest = process.stdout.read()
        assert process.wait(30) == 0
    said = (tmp_path / "err").read_text()
    assert "draining" in said
    for text in (said, line, rest, *(one.stdout + one.stderr for one in outputs)):
        assert password not in text
        assert secret not in text


# --- Safe by default


@pytest.mark.parametrize(
    "address", ["0.0.0.0:0", "metering.example.com:0", "[::]:0", ":0", "192.0.2.1:0", "127.0.0.1.evil.example:0"]
)
async def test_a_server_without_credentials_stays_at_home(database: Database, address: str) -> None:
    """It refuses addresses that others reach, for the gateway too, and names each way out."""
    for settings in ({"listen": (address,)}, {"listen": ("127.0.0.1:0", address)}, {"gateway": address}):
        config = Config(**{"listen": ("127.0.0.1:0",), "allow_unsafe_database": True, **settings})
        with pytest.raises(CannotServe) as caught:
            async with serving(config, database):
                pass
        said = str(caught.value)
        assert said.startswith(address)
        ways = (
            "metering keys create",
            "--tls-client-ca",
            "--tls-clients",
            "--jwt-issuer",
            "--jwt-audience",
            "--jwt-keys",
        )
        assert not [way for way in (*ways, "127.0.0.1:", "unix:") if way not in said]


async def test_at_home_it_serves_and_says_so(database: Database, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Loopback and unix sockets are fine without credentials; the log says that everyone is let in, and the socket is
    for its owner and group alone.
    """
    path = tmp_path_factory.mktemp("s") / "s"
    config = Config(listen=("127.0.0.1:0", "localhost:0", "127.8.8.8:0", f"unix:{path}"), allow_unsafe_database=True)
    with capture_logs() as logs:
        async with serving(config, database) as addresses:
            found = path.stat()
            assert (stat.S_ISSOCK(found.st_mode), stat.S_IMODE(found.st_mode)) == (True, 0o660)
            assert found.st_uid == os.geteuid()
            for address in addresses:
                async with grpc.aio.insecure_channel(address) as channel:
                    assert await customers(Client(address, channel), None) == []
    assert len([one for one in logs if one["log_level"] == "warning" and "open mode" in one["event"]]) == 1
    assert not [one for one in logs if "without TLS" in one["event"]]
    await new_key(database)
    with capture_logs() as logs:
        async with serving(Config(listen=("0.0.0.0:0",), allow_unsafe_database=True), database):
            pass
    assert not [one for one in logs if "open mode" in one["event"]]
    assert [one["addresses"] for one in logs if "without TLS" in one["event"]] == [["0.0.0.0:0"]]


def certificate(place: Path) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(dt.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    place.joinpath("cert.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    place.joinpath("key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return place / "cert.pem", place / "key.pem"


async def test_each_way_out_opens_other_addresses(database: Database, tmp_path: Path) -> None:
    """With a key, with tokens, or with known client certificates the server listens anywhere, and is open to nobody."""
    cert, private = certificate(tmp_path)
    clients = tmp_path / "clients.toml"
    clients.write_text('["spiffe://prod.example/sender"]\norganization = "default"\nroles = ["ingest"]\n')
    public = serialization.load_pem_private_key(private.read_bytes(), None).public_key()
    numbers = public.public_numbers()  # type: ignore[union-attr]

    def text(number: int) -> str:
        import base64

        return base64.urlsafe_b64encode(number.to_bytes(32)).rstrip(b"=").decode()

    import json

    keys = tmp_path / "keys.json"
    keys.write_text(
        json.dumps({"keys": [{"kty": "EC", "crv": "P-256", "kid": "1", "x": text(numbers.x), "y": text(numbers.y)}]})
    )
    tls = Tls(cert, private)
    ways: list[dict[str, Any]] = [
        {"tokens": TokenSettings("https://issuer.example", "metering", str(keys))},
        {"tls": Tls(cert, private, cert, clients)},
    ]
    # TLS alone says who the server is, not who calls; nor does a certificate that anybody can be.
    for settings in ({"tls": tls}, {"tls": Tls(cert, private, cert)}):
        with pytest.raises(CannotServe, match="no credentials"):
            async with serving(Config(listen=("0.0.0.0:0",), allow_unsafe_database=True, **settings), database):
                pass
    for settings in ways:
        config = Config(listen=("0.0.0.0:0", f"unix:{tmp_path}/s"), allow_unsafe_database=True, **settings)
        async with serving(config, database) as addresses:
            assert len(addresses) == 2
            async with grpc.aio.insecure_channel(addresses[1]) as channel:
                client = Client(addresses[1], channel)
                assert (await fault_of(customers(client, None))).brief == MISSING
                fault = await tried(client, f"{REFLECTION}/ServerReflectionInfo")
                assert fault is not None
                assert fault.brief == MISSING


async def test_reflection_is_open_only_where_everything_is(database_url: str, database: Database) -> None:
    """Without credentials anyone may read the API; once there is one, whoever has one, of whatever role."""
    async with running_server(database_url) as client:
        reflection = f"{REFLECTION}/ServerReflectionInfo"
        assert await tried(client, reflection) is None
        keys = [await new_key(database, role) for role in Role]
        await until(lambda: _is_closed(client))
        fault = await tried(client, reflection)
        assert fault is not None
        assert fault.brief == MISSING
        for key in keys:
            assert await tried(client, reflection, bearer(key)) is None


# --- The commands


def test_keys_with_roles_and_an_end(database_url: str) -> None:
    """A key is made with roles and an end, and the list shows both; what cannot be meant is explained."""
    where = ("--database-url", database_url)
    metering("keys", "create", "--role", "ingest", "--expires", "2999-12-31", "--name", "a", *where)
    metering("keys", "create", "--role", "read", "--role", "ingest", "--expires", "2999-01-02T03:04:05Z", *where)
    metering("keys", "create", "--role", "ingest", "--role", "ingest", *where)
    metering("keys", "create", *where)
    rows = [line.split("  ") for line in metering("keys", "list", *where).splitlines()]
    assert [row[2:] for row in rows] == [
        ["expires 2999-12-31 00:00Z", "ingest", "a"],
        ["expires 2999-01-02 03:04Z", "ingest,read"],
        ["active", "ingest"],
        ["active", "admin"],
    ]
    for flags, said in (
        (("--role", "root"), "'root' is not one of 'ingest', 'read', 'admin'"),
        (("--role", "Admin"), "is not one of"),
        (("--role", ""), "is not one of"),
        (("--expires", "2020-01-01"), "expired already"),
        (("--expires", "soon"), "'%Y-%m-%d'"),
        (("--expires", "2999-13-01"), "does not match the formats"),
        (("--expires", "2999-01-01T00:00:00+02:00"), "does not match the formats"),
    ):
        assert said in " ".join(metering("keys", "create", *flags, *where, code=2).split())
    assert "There is no organization 'nobody'" in metering("keys", "create", "--org", "nobody", *where, code=1)
    assert len(metering("keys", "list", *where).splitlines()) == 4


async def test_the_list_tells_an_expired_key(database_url: str, database: Database) -> None:
    """What has expired or was revoked is listed as such."""
    keys = [await new_key(database, expires_at=START), await new_key(database, expires_at=START)]
    await revoke(database, keys[1])
    listed = (await asyncio.to_thread(metering, "keys", "list", "--database-url", database_url)).splitlines()
    by_id = {line.split()[0]: line for line in listed}
    assert "  expired 2020-01-01 00:00Z  admin" in by_id[keys[0].id]
    assert "  revoked " in by_id[keys[1].id]


JWT = {"jwt-issuer": "https://i.example", "jwt-audience": "metering", "jwt-keys": "/keys.json"}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What `metering serve` would run with, one for each time; no server starts."""
    found: list[Config] = []

    async def run_server(config: Config, _: Any) -> None:
        found.append(config)

    monkeypatch.setattr(serve_command, "run_server", run_server)
    monkeypatch.setattr(serve_command, "log_to_stderr", lambda _level: None)
    for name in os.environ:
        if name.startswith("METERING_"):
            monkeypatch.delenv(name)
    return found


def flags(settings: dict[str, str]) -> list[str]:
    """Settings as arguments."""
    return [text for name, value in settings.items() for text in (f"--{name}", value)]


def test_the_settings_of_tokens(recorded: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flag sets its field and has its variable, over which the flag wins; without any, no tokens are taken."""
    metering("serve")
    metering("serve", *flags(JWT))
    every = {**JWT, "jwt-org-claim": "tenant", "jwt-roles-claim": "scope", "jwt-algorithm": "PS256"}
    metering("serve", *flags(every), "--jwt-algorithm", "EdDSA")
    plain = TokenSettings("https://i.example", "metering", "/keys.json")
    full = TokenSettings("https://i.example", "metering", "/keys.json", ("PS256", "EdDSA"), "tenant", "scope")
    assert [one.tokens for one in recorded] == [None, plain, full]
    assert (plain.algorithms, plain.organization_claim, plain.roles_claim) == (
        ("RS256", "ES256"),
        "organization",
        "roles",
    )
    variables = {f"METERING_{name.upper().replace('-', '_')}": value for name, value in every.items()}
    for name, value in (variables | {"METERING_JWT_ALGORITHM": "PS256 EdDSA"}).items():
        monkeypatch.setenv(name, value)
    metering("serve")
    assert recorded[-1].tokens == full
    metering("serve", "--jwt-issuer", "https://other.example", "--jwt-algorithm", "RS256")
    assert recorded[-1].tokens == TokenSettings(
        "https://other.example", "metering", "/keys.json", ("RS256",), "tenant", "scope"
    )


def test_settings_of_tokens_that_cannot_be_meant(recorded: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Issuer, audience and keys come together or not at all, and algorithms are those of public keys."""
    for missing in JWT:
        rest = {name: value for name, value in JWT.items() if name != missing}
        for settings in (rest, {**rest, missing: ""}):
            said = metering("serve", *flags(settings), code=2)
            assert "Tokens need all of --jwt-issuer, --jwt-audience and --jwt-keys" in said
        for name, value in rest.items():
            with monkeypatch.context() as patch:
                patch.setenv(f"METERING_{name.upper().replace('-', '_')}", value)
                assert "Tokens need all of" in metering("serve", code=2)
    for algorithm in ("HS256", "none", "ES256K", "rs256", "", "RS256 HS256"):
        assert "is not one of" in metering("serve", *flags({**JWT, "jwt-algorithm": algorithm}), code=2)
    assert not {"HS256", "HS384", "HS512", "none"} & set(ALGORITHMS)
    assert not recorded


def test_the_settings_of_certificates(recorded: list[Config], tmp_path: Path) -> None:
    """Certificate and key come together, and clients are known by certificates only where those are asked for."""
    files = {}
    for name in ("tls-cert", "tls-key", "tls-client-ca", "tls-clients"):
        files[name] = str(tmp_path / name)
        (tmp_path / name).write_text("")
    metering("serve", *flags(files))
    assert recorded.pop().tls == Tls(*(Path(one) for one in files.values()))
    for given, said in (
        (("tls-cert",), "both --tls-cert and --tls-key"),
        (("tls-key",), "both --tls-cert and --tls-key"),
        (("tls-client-ca",), "both --tls-cert and --tls-key"),
        (("tls-clients",), "both --tls-cert and --tls-key"),
        (("tls-cert", "tls-key", "tls-clients"), "--tls-clients needs --tls-client-ca"),
    ):
        assert said in metering("serve", *flags({name: files[name] for name in given}), code=2)
    assert "does not exist" in metering("serve", *flags({**files, "tls-key": str(tmp_path / "no")}), code=2)
    assert not recorded
