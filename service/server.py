"""Owns the life of a server process: database, services, addresses, health, and the drain at its end."""

import asyncio
import contextlib
import fcntl
import gc
import os
import signal
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from compat.metronome.v1 import billable_metric_pb2 as metronome_billable_metric_pb2
from compat.metronome.v1 import billable_metric_pb2_grpc as metronome_billable_metric_pb2_grpc
from compat.metronome.v1 import customer_pb2 as metronome_customer_pb2
from compat.metronome.v1 import customer_pb2_grpc as metronome_customer_pb2_grpc
from compat.metronome.v1 import usage_pb2 as metronome_usage_pb2
from compat.metronome.v1 import usage_pb2_grpc as metronome_usage_pb2_grpc
from compat.suger.v1 import billable_metric_pb2 as suger_billable_metric_pb2
from compat.suger.v1 import billable_metric_pb2_grpc as suger_billable_metric_pb2_grpc
from compat.suger.v1 import entitlement_pb2 as suger_entitlement_pb2
from compat.suger.v1 import entitlement_pb2_grpc as suger_entitlement_pb2_grpc
from compat.suger.v1 import usage_record_group_pb2 as suger_usage_record_group_pb2
from compat.suger.v1 import usage_record_group_pb2_grpc as suger_usage_record_group_pb2_grpc
from compat.suger.v1 import usage_record_report_pb2 as suger_usage_record_report_pb2
from compat.suger.v1 import usage_record_report_pb2_grpc as suger_usage_record_report_pb2_grpc
from metering.v1 import (
    billable_metric_pb2,
    billable_metric_pb2_grpc,
    customer_pb2,
    customer_pb2_grpc,
    entitlement_pb2,
    entitlement_pb2_grpc,
    event_pb2,
    event_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
    usage_record_group_pb2,
    usage_record_group_pb2_grpc,
    usage_record_report_pb2,
    usage_record_report_pb2_grpc,
)
from service import limits
from service.auth import Auth
from service.auth.certificates import BadClients, Clients
from service.auth.tokens import BadTokenSettings, Tokens
from service.backfill import Backfill
from service.config import Config, Load, Tls
from service.database import POOL_SIZE, Database, UnsafeDatabase
from service.domain.events import MERGED_EVENTS_MAX
from service.gateway import Gateway, gateway, is_loopback
from service.ingest import Ingest
from service.migrations import is_current, upgrade
from service.postgres import EmbeddedPostgres
from service.reporting import Reporting
from service.rpc.billable_metrics import BillableMetricService
from service.rpc.compat.metronome import MetronomeBillableMetrics, MetronomeCustomers, MetronomeUsage
from service.rpc.compat.suger import SugerEntitlements, SugerUsageRecordReports
from service.rpc.compat.suger_billable_metrics import SugerBillableMetrics
from service.rpc.compat.suger_record_groups import SugerUsageRecordGroups
from service.rpc.customers import CustomerService
from service.rpc.entitlements import EntitlementService
from service.rpc.events import EventService
from service.rpc.hardened import aio_server
from service.rpc.health import HealthService
from service.rpc.interceptor import Interceptor, RequestBytes, Room
from service.rpc.pages import PageTokens
from service.rpc.record_groups import UsageRecordGroupService
from service.rpc.record_reports import UsageRecordReportService
from service.rpc.streams import Streams
from service.rpc.usage import UsageService
from service.rpc.wire.record_groups import DECODERS
from service.tls import BadCertificate, credentials
from service.turns import Places, Rate

log = structlog.get_logger("metering.server")

SERVICES = tuple(
    service.full_name
    for module in (
        event_pb2,
        billable_metric_pb2,
        customer_pb2,
        usage_pb2,
        entitlement_pb2,
        usage_record_group_pb2,
        usage_record_report_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
)
# The APIs of other services, for a JSON transcoder in front.
COMPAT_SERVICES = tuple(
    service.full_name
    for module in (
        metronome_usage_pb2,
        metronome_billable_metric_pb2,
        metronome_customer_pb2,
        suger_usage_record_group_pb2,
        suger_usage_record_report_pb2,
        suger_billable_metric_pb2,
        suger_entitlement_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
)
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
HEALTH_PERIOD_S = 2.0

# How long a connection may take to say who it is and what it speaks.
_HANDSHAKE_MS = 10_000


def grpc_options(load: Load, *, shares_ports: bool = False) -> list[tuple[str, int]]:
    """Return gRPC's options for a server; `shares_ports` with other processes."""

    def milliseconds(time: timedelta) -> int:
        return int(time / timedelta(milliseconds=1))

    options = [
        # Two servers on one port would share its connections by chance; the second must fail instead. Of workers, which
        # are to share them, the parent sees to that.
        ("grpc.so_reuseport", int(shares_ports)),
        # gRPC's own defaults drop bursts of over 1,000 calls as CANCELLED, which clients do not retry; our limits
        # answer.
        ("grpc.server.max_pending_requests", 20_000),
        ("grpc.server.max_pending_requests_hard_limit", 30_000),
        ("grpc.max_concurrent_streams", 20_000),
        ("grpc.max_receive_message_length", load.message_bytes_max),
        # By default it is chance whether headers of 8 to 16 KiB are taken.
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.absolute_max_metadata_size", 16 * 1024),
        ("grpc.keepalive_time_ms", milliseconds(load.keepalive)),
        ("grpc.keepalive_timeout_ms", milliseconds(load.keepalive_timeout)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", milliseconds(load.ping_interval_min)),
        ("grpc.max_allowed_incoming_connections", load.connections_max),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
    ]
    if load.connection_age_max is not None:
        # No grace: calls and streams that are open go on over the old connection for as long as they like.
        options.append(("grpc.max_connection_age_ms", milliseconds(load.connection_age_max)))
    return options


class Addresses(list[str]):
    """Where a server listens, with real ports, and the gateway in front of it, if there is one."""

    gateway: Gateway | None = None
    # Done once gRPC takes no more calls.
    ended: "asyncio.Task[bool]"


class CannotServe(Exception):
    """The server cannot start; the text says why and what to do."""


def not_ours(address: str) -> CannotServe:
    """Return the error that tells of a TCP address that cannot be had."""
    return CannotServe(f"Cannot listen on {address}: it is in use or not an address of this machine.")


@contextlib.asynccontextmanager
async def serving(
    config: Config, database: Database, released: asyncio.Event | None = None
) -> AsyncIterator[Addresses]:
    """Serve `database` on the configured addresses, and the gateway, while the block runs, then drain.

    With `released` this is one of several processes that share the ports, and the gateway is run by another: calls
    are taken until that is gone, which `released` says, or half of the drain has passed.

    Raises CannotServe when an address is taken or not allowed, a setting is wrong, or the database is not ready for
    this version, GatewayError.
    """
    if wrong := limits.faults():
        raise CannotServe(" ".join(wrong))
    load = config.load
    auth, tokens = await _auth(config, database), PageTokens(database)
    rate = None if load.ingest_rate is None else Rate(load.ingest_rate, MERGED_EVENTS_MAX)
    ingest = Ingest(database, config.time_limits, rate, queue_events_max=load.ingest_queue_max)
    backfill = Backfill(database)
    reporting = Reporting(database, config.partner_rules)
    await _check_database(config, database)
    if await auth.is_open():
        require_local((*config.listen, *filter(None, [config.gateway])))
    _check_tls(config)
    _say_who_comes_in(config, is_open=await auth.is_open())
    streams = Streams(config.stream_stall)
    room = Room(
        Places("calls in flight", load.calls_max, load.calls_of_organization_max),
        Places("open streams", load.streams_max, load.streams_of_organization_max),
        *(RequestBytes(load.request_bytes_max) for _ in range(4)),
    )
    interceptor = Interceptor(auth, room, streams, DECODERS)
    options = grpc_options(load, shares_ports=released is not None)
    server = aio_server([interceptor], options, load.calls_max + load.streams_max)
    _add_services(server, config, database, tokens, ingest, backfill, streams, room.batch_bytes, rate)
    health = HealthService(config.stream_stall)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((*SERVICES, *COMPAT_SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME), server)
    with contextlib.ExitStack() as addresses:
        bound = Addresses(addresses.enter_context(_listen(server, address, config.tls)) for address in config.listen)
        await _set_health(health, database)
        await server.start()
        bound.ended = asyncio.create_task(server.wait_for_termination())
        work = (backfill.run(), reporting.run(), _watch_health(health, database))
        tasks = [asyncio.create_task(one) for one in work]
        front, clock = contextlib.AsyncExitStack(), asyncio.get_running_loop().time
        try:
            before = gateway_of(config, bound[0]) if released is None else _gateway_elsewhere(config, released)
            bound.gateway = await front.enter_async_context(before)
            yield bound
        finally:
            ends = clock() + config.drain.total_seconds()
            for task in tasks:
                task.cancel()
            health.shut_down()
            # Streams end by themselves now, those that came through the gateway too. It has half of the time at most;
            # the rest is for calls that came to the server directly.
            streams.draining.set()
            await front.aclose()
            await server.stop(max(0.0, ends - clock()))
            await asyncio.gather(*tasks, bound.ended, return_exceptions=True)
            await ingest.close()


def _add_services(
    server: grpc.aio.Server,
    config: Config,
    database: Database,
    tokens: PageTokens,
    ingest: Ingest,
    backfill: Backfill,
    streams: Streams,
    batch_bytes: RequestBytes,
    rate: Rate | None,
) -> None:
    events = EventService(database, tokens, ingest, streams, batch_bytes)
    metrics = BillableMetricService(database, tokens, backfill.wake)
    customers = CustomerService(database, tokens)
    usage = UsageService(database, tokens, streams)
    entitlements = EntitlementService(database, tokens)
    groups = UsageRecordGroupService(database, tokens, config.partner_rules, rate)
    reports = UsageRecordReportService(database, tokens)
    event_pb2_grpc.add_EventServiceServicer_to_server(events, server)
    billable_metric_pb2_grpc.add_BillableMetricServiceServicer_to_server(metrics, server)
    customer_pb2_grpc.add_CustomerServiceServicer_to_server(customers, server)
    usage_pb2_grpc.add_UsageServiceServicer_to_server(usage, server)
    entitlement_pb2_grpc.add_EntitlementServiceServicer_to_server(entitlements, server)
    usage_record_group_pb2_grpc.add_UsageRecordGroupServiceServicer_to_server(groups, server)
    usage_record_report_pb2_grpc.add_UsageRecordReportServiceServicer_to_server(reports, server)
    metronome_usage = MetronomeUsage(
        ingest, events, usage, customers, metrics, strict_windows=config.strict_compat_windows
    )
    metronome_usage_pb2_grpc.add_UsageServiceServicer_to_server(metronome_usage, server)
    metronome_billable_metric_pb2_grpc.add_BillableMetricServiceServicer_to_server(
        MetronomeBillableMetrics(metrics, customers), server
    )
    metronome_customer_pb2_grpc.add_CustomerServiceServicer_to_server(MetronomeCustomers(customers), server)
    suger_usage_record_group_pb2_grpc.add_UsageRecordGroupServiceServicer_to_server(
        SugerUsageRecordGroups(groups), server
    )
    suger_usage_record_report_pb2_grpc.add_UsageRecordReportServiceServicer_to_server(
        SugerUsageRecordReports(reports), server
    )
    suger_billable_metric_pb2_grpc.add_BillableMetricServiceServicer_to_server(
        SugerBillableMetrics(database, metrics), server
    )
    suger_entitlement_pb2_grpc.add_EntitlementServiceServicer_to_server(SugerEntitlements(entitlements), server)


async def serve(config: Config, ready: Callable[[Addresses], None], released: asyncio.Event | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `ready` is called with the addresses once calls are answered.

    Without a database URL an embedded Postgres runs as a child of this process. `released` is as in `serving`, and
    leaves SIGINT to the caller. Raises CannotServe, PostgresError, GatewayError.
    """
    stop = stop_on(signal.SIGTERM) if released is not None else stop_on(signal.SIGTERM, signal.SIGINT)
    async with migrated_database(config) as (database, postgres), serving(config, database, released) as addresses:

        def check_server() -> None:
            if addresses.ended.done():
                raise CannotServe("gRPC ended by itself, so that no call would be answered any more.")

        _tame_collector()
        ready(addresses)
        await watch(config, stop, check_server, addresses.gateway, postgres)


def _tame_collector() -> None:
    """Keep Python's collector of cycles from walking over what lives as long as the process, again and again.

    What calls leave behind is freed without it; it took a tenth of the time of ingest and a third of a stream's.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


def stop_on(*signals: signal.Signals) -> asyncio.Event:
    """Return what is set from the first of the signals on."""
    stop = asyncio.Event()
    for number in signals:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def watch(
    config: Config,
    stop: asyncio.Event,
    check_server: Callable[[], None],
    front: Gateway | None,
    postgres: EmbeddedPostgres | None,
) -> None:
    """Return with `stop`, when the drain is to begin; raises what ends a server before that."""
    while not stop.is_set():
        check_server()
        if front is not None:
            front.check()
        if postgres is not None:
            # Raises once the supervisor has given up: an orchestrator can do more about that than we can.
            postgres.check()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEALTH_PERIOD_S):
                await stop.wait()
    log.info("draining", seconds=config.drain.total_seconds())


@contextlib.asynccontextmanager
async def _gateway_elsewhere(config: Config, released: asyncio.Event) -> AsyncIterator[None]:
    yield None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(config.drain.total_seconds() / 2):
            await released.wait()


@contextlib.asynccontextmanager
async def gateway_of(config: Config, server: str) -> AsyncIterator[Gateway | None]:
    """Run the gateway around the block, if one is wanted, in front of the server at this address."""
    if config.gateway is None:
        yield None
        return
    host, colon, port = server.rpartition(":")
    # A server on all addresses is called on one.
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104  # not bound here
    async with gateway(config.gateway, f"{host}{colon}{port}", config.drain.total_seconds() / 2) as running:
        yield running


@contextlib.asynccontextmanager
async def open_database(config: Config) -> AsyncIterator[tuple[Database, EmbeddedPostgres | None]]:
    """Give the configured database, running the embedded Postgres around the block (and giving it too) without a URL.

    Raises PostgresError when that cannot be started, BadDatabaseUrl.
    """
    with contextlib.ExitStack() as stack:
        url, postgres = config.database_url, None
        if url is None:
            bin_dir = Path(config.pg_bin) if config.pg_bin else None
            settings = {"max_connections": str(100 + POOL_SIZE * (config.workers - 1))}
            postgres = EmbeddedPostgres(config.data_dir, bin_dir=bin_dir, settings=settings)
            stack.callback(postgres.stop)
            await asyncio.to_thread(postgres.start)
            url = postgres.url
        database = Database(url, statement_timeout=config.load.statement_timeout)
        try:
            yield database, postgres
        finally:
            await database.close()


@contextlib.asynccontextmanager
async def migrated_database(config: Config) -> AsyncIterator[tuple[Database, EmbeddedPostgres | None]]:
    """Open the database as `open_database` does, with this version's tables where that is up to us."""
    async with open_database(config) as (database, postgres):
        if config.migrate or config.database_url is None:
            await upgrade(database.engine)
        yield database, postgres


async def _auth(config: Config, database: Database) -> Auth:
    """Return what checks credentials; raises CannotServe if it cannot."""
    try:
        tokens = None if config.tokens is None else Tokens(config.tokens)
        if tokens is not None:
            await tokens.start()
        clients = None if config.tls is None or config.tls.clients is None else Clients(config.tls.clients)
    except (BadTokenSettings, BadClients) as error:
        raise CannotServe(str(error)) from error
    return Auth(database, tokens, clients)


async def check_schema(database: Database) -> None:
    """Raise CannotServe if the tables are not exactly this version's."""
    if not await is_current(database.engine):
        raise CannotServe("The database has another schema than this version needs. Run `metering migrate` first.")


async def _check_database(config: Config, database: Database) -> None:
    """Raise CannotServe where the database is not one to serve."""
    try:
        await database.check(allow_unsafe=config.allow_unsafe_database)
        await check_schema(database)
        await database.check_policies()
    except UnsafeDatabase as error:
        raise CannotServe(str(error)) from error


def _check_tls(config: Config) -> None:
    """Raise CannotServe where TLS is on and something would go around it."""
    if config.tls is None or config.gateway is None:
        return
    if not config.listen[0].startswith("unix:"):
        raise CannotServe(
            "The gateway calls the server's first address without TLS: let that be a unix socket, such as "
            "--listen unix:/run/metering/metering.sock --listen 0.0.0.0:50051."
        )
    if not is_loopback(config.gateway):
        raise CannotServe(
            f"The gateway on {config.gateway} would take credentials from other machines without TLS, which is on for "
            "the server. Let it listen on loopback (--gateway 127.0.0.1:8080), behind a proxy on this machine that "
            "ends TLS; or run `metering gateway --server unix:/path` apart, where plain HTTP is meant."
        )


def _say_who_comes_in(config: Config, *, is_open: bool) -> None:
    if is_open:
        log.warning("open mode: no credentials are configured, every local caller is an administrator")
    away = [one for one in config.listen if not one.startswith("unix:") and not is_loopback(one)]
    if away and config.tls is None:
        log.warning("without TLS, credentials and data can be read on the way", addresses=away)


def require_local(addresses: Sequence[str]) -> None:
    """Raise CannotServe if a server without credentials could be reached from elsewhere at one of the addresses."""
    for address in addresses:
        if not address.startswith("unix:") and not is_loopback(address):
            raise CannotServe(
                f"{address} can be reached from other machines, but no credentials are configured and every caller "
                "would be an administrator. Listen on loopback (127.0.0.1:50051) or a unix socket (unix:/path); or "
                "ask for credentials, in one of three ways: make an API key (`metering keys create`), know clients by "
                "their certificates (--tls-client-ca and --tls-clients), or take JSON Web Tokens (--jwt-issuer, "
                "--jwt-audience and --jwt-keys)."
            )


@contextlib.contextmanager
def _listen(server: grpc.aio.Server, address: str, tls: Tls | None) -> Iterator[str]:
    """Bind one address while the block runs; yields it with its real port. Unix sockets do without TLS."""
    if not address.startswith("unix:"):
        try:
            if tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials(tls))
        except BadCertificate as error:
            raise CannotServe(str(error)) from error
        except RuntimeError as error:
            raise not_ours(address) from error
        yield f"{address.rpartition(':')[0]}:{port}"
        return
    path = Path(address.removeprefix("unix:"))
    with _owned_socket(path):
        # gRPC would make the socket open to every user; owner and group are enough.
        umask = os.umask(0o117)
        try:
            server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise CannotServe(f"Cannot listen on {address}: is its directory there and writable?") from error
        finally:
            os.umask(umask)
        yield address


@contextlib.contextmanager
def _owned_socket(path: Path) -> Iterator[None]:
    """Hold a lock beside a socket path: gRPC itself would silently take a socket over from a running server."""
    lock = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise CannotServe(f"Cannot listen on unix:{path}: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CannotServe(f"Cannot listen on unix:{path}: another server is running there.") from error
        if path.exists():
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise CannotServe(f"Cannot listen on unix:{path}: there is a file that is not a socket.")
            path.unlink()
        yield
    finally:
        os.close(descriptor)


async def _watch_health(health: HealthService, database: Database) -> None:
    while True:
        await asyncio.sleep(HEALTH_PERIOD_S)
        try:
            await _set_health(health, database)
        except Exception:
            log.exception("health could not be told; trying again")


async def _set_health(health: HealthService, database: Database) -> None:
    """The empty name says that the process lives; each service's name that its database answers too."""
    states = health_pb2.HealthCheckResponse
    ready = await database.ping()
    state = states.SERVING if ready else states.NOT_SERVING
    health.set({"": states.SERVING} | dict.fromkeys((*SERVICES, *COMPAT_SERVICES), state))
