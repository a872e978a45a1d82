"""`metering serve --workers`: several processes on one port; which of them answer, who may not, and who is left."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import sqlalchemy as sa
import test_gateway
import test_server
from conftest import Client, event
from faults import fault_of, until_waiting
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_server import (
    ACCEPTED,
    DUPLICATE,
    UNSAFE,
    Server,
    becomes,
    engine_of,
    prepared,
    refused,
    residents,
    started,
    total,
    until,
)
from test_tls import Files
from test_tokens import AUDIENCE, ISSUER, KEYS, bearer, signed

from metering.v1 import customer_pb2
from service.config import Config, Tls
from service.database import POOL_SIZE, Database
from service.postgres import running_url
from service.server import CannotServe, serving
from service.store import organizations
from service.workers import ENDS_MAX, _held, serve

place = test_server.place

# Each channel has a connection of its own, and looks for a new one at once.
OWN = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 100)]


def workers(server: Server) -> list[int]:
    """The living workers of a server."""
    found = []
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    for pid in map(int, children.split()):
        with contextlib.suppress(OSError):
            if b"metering worker" in Path(f"/proc/{pid}/cmdline").read_bytes() and is_alive(pid):
                found.append(pid)
    return found


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def connections(pid: int, address: str) -> int:
    """How many connections to the address a process has taken."""
    port = int(address.rpartition(":")[2])
    inodes = set()
    for one in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{one}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "01" and int(local.rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{inode}]")
    found = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += os.readlink(descriptor) in inodes
    return found


@contextlib.asynccontextmanager
async def clients(address: str, number: int) -> AsyncIterator[list[Client]]:
    """Clients with a connection each, all of them made."""
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for _ in range(number):
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=OWN))
            made.append(Client(address, channel))
        await asyncio.gather(*map(is_well, made))
        yield made


async def is_well(client: Client, *, waits: bool = True) -> int:
    """Ask for the health of whoever answers."""
    stub = health_pb2_grpc.HealthStub(client.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=waits)
    return int(answer.status)


@pytest.fixture
def server(database_url: str) -> Iterator[Server]:
    """Two workers on a fresh database."""
    with started("--workers", "2", "--database-url", database_url, "--drain", "60", **UNSAFE) as server:
        yield server


async def test_connections_are_spread_and_events_count_once(server: Server) -> None:
    """Each worker answers some connections; an id that comes through all at once counts once; Ctrl-C ends them well."""
    assert server.line.startswith("metering is ready on 127.0.0.1:")
    assert len(workers(server)) == 2
    async with clients(server.address, 24) as made:
        taken = [connections(pid, server.address) for pid in workers(server)]
        assert sum(taken) == 24
        assert min(taken) > 0, taken
        await prepared(made[0])
        answers = await asyncio.gather(*(one.ingest(*(event(f"id-{n}") for n in range(300))) for one in made))
        verdicts = [list(answer.verdicts) for answer in answers]
        for of_one_id in zip(*verdicts, strict=True):
            assert sorted(of_one_id) == sorted([ACCEPTED] + [DUPLICATE] * 23)
        assert {tuple(await total(one)) for one in made} == {("300",)}
        # What one worker has changed, the others know.
        assert len({(await one.customers.ListCustomers(customer_pb2.ListCustomersRequest())).SerializeToString()
                    for one in made}) == 1  # fmt: skip
    # A terminal sends it to a process group.
    assert {os.getpgid(pid) for pid in workers(server)} == set(workers(server))
    assert server.stop(signal.SIGINT) == 0
    log = server.log()
    assert "Traceback" not in log
    for number in (1, 2):
        assert f"event=draining seconds=60.0 worker={number}" in log


async def test_a_killed_worker_is_replaced(server: Server) -> None:
    """Calls go on while a worker is dead, with UNAVAILABLE at most; soon another has its place.

    But not for ever: with the fifth death within a minute the others drain, and the server ends with an error.
    """
    before = workers(server)
    codes: set[Any] = set()

    async def write(client: Client, name: str) -> int:
        for number in range(10_000):
            if ended.is_set():
                return number
            while True:
                try:
                    answer = await client.ingest(event(f"{name}-{number}"))
                except grpc.aio.AioRpcError as error:
                    codes.add(error.code())
                    await asyncio.sleep(0.02)
                else:
                    assert set(answer.verdicts) <= {ACCEPTED, DUPLICATE}
                    break
        raise AssertionError("it took too long")

    ended = asyncio.Event()
    async with clients(server.address, 8) as made:
        await prepared(made[0])
        writers = [asyncio.create_task(write(one, str(n))) for n, one in enumerate(made)]
        await asyncio.sleep(0.2)
        os.kill(before[0], signal.SIGKILL)
        await until_async(lambda: set(workers(server)) - set(before))
        (new,) = set(workers(server)) - set(before)
        assert set(workers(server)) == {before[1], new}
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(20):
                while not connections(new, server.address):
                    await stack.enter_async_context(clients(server.address, 4))
        ended.set()
        written = sum(await asyncio.gather(*writers))
        assert written
        assert await total(made[0]) == [str(written)]
    assert codes <= {grpc.StatusCode.UNAVAILABLE}
    assert 'event="a worker ended and is started anew" worker=' in server.log()
    seen = {*before, new}
    os.kill(new, signal.SIGKILL)
    for _ in range(ENDS_MAX - 2):
        await until_async(lambda: set(workers(server)) - seen)
        (new,) = set(workers(server)) - seen
        seen.add(new)
        os.kill(new, signal.SIGKILL)
    assert await asyncio.to_thread(server.process.wait, 30) == 1
    assert not is_alive(before[1])
    (said,) = [line for line in server.log().splitlines() if line.startswith("Error: ")]
    assert f"ended {ENDS_MAX} times within a minute, the last time so: It ended with code -9." in said
    assert "Traceback" not in server.log()


async def until_async(condition: Callable[[], object], seconds: float = 20) -> None:
    """Poll until the condition holds, while other tasks work."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # there is no event for it
            await asyncio.sleep(0.02)


async def test_sigterm_lets_calls_in_flight_end(server: Server, database: Database) -> None:
    """In every worker a call that runs at SIGTERM gets its answer; newcomers get UNAVAILABLE; then all end with 0."""
    before = workers(server)
    async with clients(server.address, 24) as made:
        await prepared(made[0])
        assert all(connections(pid, server.address) for pid in before)
        async with database.engine.begin() as connection:
            await organizations.lock_exclusive(connection, "default")
            calls = [asyncio.ensure_future(one.ingest(event(str(n)))) for n, one in enumerate(made)]
            # Each of the two writes few events of an organization in one transaction at a time.
            await until_waiting(database.engine, 2)
            server.process.terminate()
            for one in made:
                await becomes(lambda one=one: is_well(one, waits=False), grpc.StatusCode.UNAVAILABLE)
            async with grpc.aio.insecure_channel(server.address, options=OWN) as channel:
                fault = await fault_of(Client(server.address, channel).ingest(event("too late")))
            assert fault.code == "UNAVAILABLE"
            assert server.process.poll() is None
            assert workers(server) == before
            assert not any(call.done() for call in calls)
        assert {tuple((await call).verdicts) for call in calls} == {(ACCEPTED,)}
    assert await asyncio.to_thread(server.process.wait, 30) == 0
    assert not any(map(is_alive, before))


async def test_nobody_is_left(place: Path) -> None:
    """After kill -9 of the parent its workers are gone, and so is its Postgres, which had room for all of them."""
    data_dir = place / "data dir"
    with started("--workers", "2", "--data-dir", data_dir) as server:
        before = workers(server)
        async with engine_of(running_url(data_dir)) as engine, engine.connect() as connection:
            room = int(await connection.scalar(sa.text("SHOW max_connections")))
        assert room >= 100 + POOL_SIZE
        async with clients(server.address, 4) as made:
            assert list((await made[0].ingest(event())).verdicts) == [ACCEPTED]
            server.process.kill()
            server.process.wait()
            until(lambda: not any(map(is_alive, before)), 5)
            until(lambda: not residents(data_dir))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), 2)
        assert "Traceback" not in server.log()


# --- What does not start


def test_a_port_has_one_server(server: Server, database_url: str) -> None:
    """Whoever comes second to a port is refused in the same words, with workers or without; the first goes on."""

    def check(first: Server, *counts: str) -> None:
        for count in counts:
            said = refused("--workers", count, "--database-url", database_url, listen=first.address, **UNSAFE)
            assert said == f"Error: Cannot listen on {first.address}: it is in use or not an address of this machine."
        with grpc.insecure_channel(first.address) as channel:
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1

    check(server, "1", "2")
    with started("--database-url", database_url, **UNSAFE) as alone:
        check(alone, "2")


def test_of_many_parents_at_once_one_gets_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even of such that have all bound it before one goes on."""
    everybody, got, address = threading.Barrier(6), list[str](), f"127.0.0.1:{test_gateway.free_port()}"

    class Together(socket.socket):
        def bind(self, place: Any) -> None:
            super().bind(place)
            everybody.wait(20)

    def parent() -> None:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(CannotServe):
                got.append(stack.enter_context(_held(address))[0])
            everybody.wait(20)

    monkeypatch.setattr(socket, "socket", Together)
    threads = [threading.Thread(target=parent) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [address]


def listening(address: str, *, shares: bool) -> socket.socket:
    """Listen as gRPC does."""
    host, _, port = address.rpartition(":")
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shares))
    try:
        one.bind((host, int(port)))
        one.listen(100)
    except OSError:
        one.close()
        raise
    return one


def test_a_held_port() -> None:
    """While no worker listens nobody can connect, nor listen who does not share; workers get every connection."""
    port = test_gateway.free_port()
    with _held(f"127.0.0.1:{port}") as (address, (same,)):
        assert address == same == f"127.0.0.1:{port}"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 2)
        for _ in range(2):
            for of_all in (address, f"0.0.0.0:{port}"):
                with pytest.raises(OSError, match="in use"):
                    listening(of_all, shares=False)
            with pytest.raises(CannotServe), _held(address):
                pass
            with listening(address, shares=True) as one, listening(address, shares=True) as other:
                callers = [socket.create_connection(("127.0.0.1", port), 2) for _ in range(40)]
                taken = 0
                for listener in (one, other):
                    listener.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            listener.accept()[0].close()
                            taken += 1
                for caller in callers:
                    assert caller.recv(1) == b""  # the server's end closes first, and keeps the port busy for a minute
                    caller.close()
                assert taken == len(callers)
    with _held(address) as (again, _):
        assert again == address


def test_addresses_of_names() -> None:
    """A name stands for all of its addresses, with one port; what cannot be an address is refused in plain words."""
    with _held("localhost:0") as (address, places):
        port = address.rpartition(":")[2]
        assert address == f"localhost:{port}"
        assert f"127.0.0.1:{port}" in places
        assert set(places) <= {f"127.0.0.1:{port}", f"[::1]:{port}"}
    for every in ("0.0.0.0:0", "[::]:0"):
        with _held(every) as (address, (one,)):
            assert address.rpartition(":")[0] == every.rpartition(":")[0]
            with pytest.raises(CannotServe), _held(f"127.0.0.1:{one.rpartition(':')[2]}"):
                pass
    for bad in ("127.0.0.1", "127.0.0.1:", "127.0.0.1:x", ":0", "127.0.0.1:65536", "192.0.2.1:0", "metering.invalid:0",
                "x" * 300 + ":0"):  # fmt: skip
        with pytest.raises(CannotServe, match="it is in use or not an address") as caught, _held(bad):
            pass
        assert bad in str(caught.value)


async def test_workers_that_cannot_start(database_url: str, database: Database, tmp_path: Path) -> None:
    """One message, whatever keeps them from it, in the words of one process."""
    empty = tmp_path / "empty.pem"
    empty.touch()
    options = ("--workers", "2", "--database-url", database_url)
    said = await asyncio.to_thread(refused, *options, "--tls-cert", empty, "--tls-key", empty, **UNSAFE)
    assert said.startswith(f"Error: {empty} ")
    # A gateway that the parent is to run would let in everybody, too.
    config = Config(listen=("127.0.0.1:0",), gateway="0.0.0.0:0", allow_unsafe_database=True)
    with pytest.raises(CannotServe, match="no credentials are configured"):
        async with serving(config, database, asyncio.Event()):
            pass


async def test_what_only_one_process_can_serve(tmp_path: Path) -> None:
    """A unix socket, and with it the gateway beside TLS: the refusal says what to do instead."""
    path = f"unix:{tmp_path}/m.sock"
    with pytest.raises(CannotServe, match=r"Leave out --workers;.* behind an Envoy") as caught:
        await serve(Config(listen=("127.0.0.1:0", path), workers=2), print)
    assert str(caught.value).startswith(f"{path} cannot have several workers")
    tls = Tls(tmp_path / "cert.pem", tmp_path / "key.pem")
    with pytest.raises(CannotServe, match="Leave out --workers or --gateway"):
        await serve(Config(tls=tls, gateway="127.0.0.1:0", workers=2), print)


# --- What works as with one process


async def test_tls_and_tokens(database_url: str, tmp_path: Path) -> None:
    """Every worker takes TLS only, follows the files, and knows whose tokens are good."""
    files = Files(tmp_path)
    (tmp_path / "keys.json").write_text(json.dumps({"keys": KEYS}))
    options = [
        *("--workers", "2", "--database-url", database_url),
        *("--tls-cert", files.tls.certificate, "--tls-key", files.tls.key),
        *("--jwt-issuer", ISSUER, "--jwt-audience", AUDIENCE, "--jwt-keys", tmp_path / "keys.json"),
    ]
    with started(*options, **UNSAFE) as server:
        for renewed in (False, True):
            if renewed:
                files.put(files.authority.server())
            trusted = grpc.ssl_channel_credentials(files.authority.pem)
            async with contextlib.AsyncExitStack() as stack:
                made = []
                for _ in range(12):
                    channel = grpc.aio.secure_channel(server.address, trusted, options=OWN)
                    made.append(Client(server.address, await stack.enter_async_context(channel)))
                for one in made:
                    await one.customers.ListCustomers(customer_pb2.ListCustomersRequest(), metadata=bearer(signed()))
                    fault = await fault_of(one.customers.ListCustomers(customer_pb2.ListCustomersRequest()))
                    assert fault.reason == "CREDENTIAL_MISSING"
                assert all(connections(pid, server.address) for pid in workers(server))
        async with grpc.aio.insecure_channel(server.address, options=OWN) as channel:
            assert (await fault_of(Client(server.address, channel).ingest(event()))).code == "UNAVAILABLE"
        assert server.stop() == 0
        assert server.log().count('event="certificate read again"') == 2


async def test_the_gateway_drains_before_the_workers(database_url: str, database: Database) -> None:
    """JSON is answered that a worker has at SIGTERM, or that comes afterwards on a kept connection; then all end."""
    options = ("--listen", "127.0.0.1:0", "--gateway", "127.0.0.1:0", "--database-url", database_url, "--workers", "2")
    async with test_gateway.started("serve", *options, lines=2) as server:
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=30) as http,
            httpx.AsyncClient(base_url=server.url, timeout=30) as kept,
        ):
            assert (await kept.post("/v1/ingest", json=test_gateway.events_of("before"))).status_code == 200
            async with database.engine.begin() as connection:
                await organizations.lock_exclusive(connection, "default")
                earlier = asyncio.ensure_future(http.post("/v1/ingest", json=test_gateway.events_of("earlier")))
                await until_waiting(database.engine)
                server.process.terminate()
                await until_async(lambda: server.log().count("event=draining") == 3)
                await asyncio.sleep(0.5)
                later = asyncio.ensure_future(kept.post("/v1/ingest", json=test_gateway.events_of("later")))
                await asyncio.sleep(0.5)
            for call in (earlier, later):
                assert (await call).status_code == 200
                assert (await call).headers["connection"] == "close"
        began = time.monotonic()
        assert await server.ended(None) == 0
        assert time.monotonic() - began < 5
        assert "Traceback" not in server.log()
