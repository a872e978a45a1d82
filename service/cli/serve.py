"""Owns `metering serve`: every setting of a server, as flags and variables."""

import logging
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import structlog

from service.auth.tokens import ALGORITHMS, TokenSettings
from service.cli.operate import EPILOG, database_options, log_to_stderr, partner_rule_option, run
from service.config import DEFAULT_ADDRESS, MIB, Config, Load, Tls
from service.domain.events import TimeLimits
from service.domain.partners import Rules
from service.server import Addresses
from service.server import serve as run_server
from service.workers import serve as run_workers
from service.workers import serve_as_worker, told

_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
_AT_LEAST_ONE = click.IntRange(min=1)
_SECONDS = click.FloatRange(min=0, min_open=True)
# Flag, the field of `Load` that it sets, type and help. Times are seconds, and 0 = never where that can be.
_LOAD: tuple[tuple[str, str, click.ParamType[Any], str], ...] = (
    ("max-calls", "calls_max", _AT_LEAST_ONE, "Unary calls in flight."),
    ("max-calls-per-org", "calls_of_organization_max", _AT_LEAST_ONE, "Unary calls in flight of one organization."),
    ("max-streams", "streams_max", _AT_LEAST_ONE, "Open streams."),
    ("max-streams-per-org", "streams_of_organization_max", _AT_LEAST_ONE, "Open streams of one organization."),
    ("max-connections", "connections_max", _AT_LEAST_ONE, "Open connections; one more is closed at once."),
    (
        "max-request-bytes",
        "request_bytes_max",
        click.IntRange(min=4096),
        "Bytes of requests in flight: of unary calls, of usage streams, and of streams of events, each.",
    ),
    (
        "max-message-bytes",
        "message_bytes_max",
        click.IntRange(min=4096, max=4 * MIB),
        "Bytes of one request.",
    ),
    (
        "ingest-rate",
        "ingest_rate",
        _SECONDS,
        "Events a second of one organization, more of which are refused until later. Default: any number.",
    ),
    ("ingest-queue", "ingest_queue_max", _AT_LEAST_ONE, "Events of one organization that wait to be stored."),
    (
        "statement-timeout",
        "statement_timeout",
        click.FloatRange(min=1, max=3600),
        "Seconds that a statement may run; the caller's deadline, if that is sooner.",
    ),
    (
        "connection-age",
        "connection_age_max",
        click.FloatRange(min=0),
        "Seconds after which a client is asked to connect anew, so that they spread over replicas; 0 = never.",
    ),
    ("keepalive", "keepalive", _SECONDS, "Seconds of silence after which a client is asked for a sign of life."),
    ("keepalive-timeout", "keepalive_timeout", _SECONDS, "Seconds it has to give one before it is disconnected."),
    (
        "ping-interval",
        "ping_interval_min",
        _SECONDS,
        "Seconds between pings of a client; one that sends them more often is disconnected.",
    ),
)


def _load_options(command: Callable[..., None]) -> Callable[..., None]:
    defaults = Load()
    for flag, field, kind, text in reversed(_LOAD):
        default = getattr(defaults, field)
        command = click.option(
            f"--{flag}",
            field,
            envvar=_variable(flag),
            type=kind,
            default=default.total_seconds() if isinstance(default, timedelta) else default,
            show_default=default is not None,
            help=text,
        )(command)
    return command


def _load(options: dict[str, Any]) -> Load:
    """Take what the options above set out of `options`."""
    values = {one.name: options.pop(one.name) for one in fields(Load)}
    for one in fields(Load):
        if "timedelta" in str(one.type):
            values[one.name] = timedelta(seconds=values[one.name]) or None
    return Load(**values)


def _variable(flag: str) -> str:
    return f"METERING_{flag.upper().replace('-', '_')}"


def _tls_options(command: Callable[..., None]) -> Callable[..., None]:
    for flag, text in reversed(
        (
            ("tls-cert", "The server's certificate, and those that sign it, as PEM; TCP addresses then take only TLS."),
            ("tls-key", "The certificate's key, as PEM. All these files may be replaced while the server runs."),
            ("tls-client-ca", "Let in only clients with a certificate that one of these signed."),
            ("tls-clients", "Which certificate is whose, as TOML: see docs/security.md. Needs --tls-client-ca."),
        )
    ):
        command = click.option(f"--{flag}", envvar=_variable(flag), type=_FILE, help=text)(command)
    return command


def _tls(options: dict[str, Any]) -> Tls | None:
    certificate, key, client_ca, clients = (
        options.pop(name) for name in ("tls_cert", "tls_key", "tls_client_ca", "tls_clients")
    )
    if certificate is None and key is None and client_ca is None and clients is None:
        return None
    if certificate is None or key is None:
        raise click.UsageError("TLS needs both --tls-cert and --tls-key.")
    if clients is not None and client_ca is None:
        raise click.UsageError("--tls-clients needs --tls-client-ca: who signs the certificates it names.")
    return Tls(certificate, key, client_ca, clients)


def _token_options(command: Callable[..., None]) -> Callable[..., None]:
    defaults = TokenSettings("", "", "")
    for option in (
        click.option(
            "--jwt-roles-claim",
            envvar=_variable("jwt-roles-claim"),
            default=defaults.roles_claim,
            show_default=True,
            help="The claim with the caller's roles: a list, or a text with blanks between.",
        ),
        click.option(
            "--jwt-org-claim",
            envvar=_variable("jwt-org-claim"),
            default=defaults.organization_claim,
            show_default=True,
            help="The claim with the caller's organization.",
        ),
        click.option(
            "--jwt-algorithm",
            "jwt_algorithms",
            envvar=_variable("jwt-algorithm"),
            type=click.Choice(ALGORITHMS),
            multiple=True,
            default=defaults.algorithms,
            show_default=True,
            help="How tokens may be signed; repeatable.",
        ),
        click.option(
            "--jwt-keys",
            envvar=_variable("jwt-keys"),
            metavar="FILE|URL",
            help="The issuer's JSON Web Key Set: a file, or an https URL that is read every five minutes.",
        ),
        click.option("--jwt-audience", envvar=_variable("jwt-audience"), help="For whom tokens must be made out."),
        click.option(
            "--jwt-issuer", envvar=_variable("jwt-issuer"), help="Take JSON Web Tokens of this issuer (extra `jwt`)."
        ),
    ):
        command = option(command)
    return command


def _tokens(options: dict[str, Any]) -> TokenSettings | None:
    issuer, audience, keys = (options.pop(name) for name in ("jwt_issuer", "jwt_audience", "jwt_keys"))
    rest = (options.pop("jwt_algorithms"), options.pop("jwt_org_claim"), options.pop("jwt_roles_claim"))
    if issuer is None and audience is None and keys is None:
        return None
    if not (issuer and audience and keys):
        raise click.UsageError("Tokens need all of --jwt-issuer, --jwt-audience and --jwt-keys.")
    return TokenSettings(issuer, audience, keys, *rest)


@click.command(epilog=EPILOG)
@click.option(
    "--listen",
    envvar="METERING_LISTEN",
    multiple=True,
    default=(DEFAULT_ADDRESS,),
    show_default=True,
    help="host:port or unix:/path; repeatable (several in the variable: divided by blanks). Port 0 = a free one.",
)
@click.option(
    "--gateway",
    envvar="METERING_GATEWAY",
    metavar="HOST:PORT",
    help="Also run Envoy there, which answers Metronome's and Suger's SDKs in JSON (extra `gateway`).",
)
@click.option(
    "--workers",
    envvar="METERING_WORKERS",
    type=click.IntRange(min=1, max=64),
    default=1,
    show_default=True,
    help="Processes that answer on the TCP addresses. What limits load (--max-calls and so on) holds for each of them.",
)
@database_options
@click.option("--migrate", envvar="METERING_MIGRATE", is_flag=True, help="Run `metering migrate` first.")
@click.option(
    "--max-event-age",
    envvar="METERING_MAX_EVENT_AGE",
    type=click.FloatRange(min=0),
    help="Refuse new events older than this many hours. Default: any age is taken.",
)
@click.option(
    "--max-event-lead",
    envvar="METERING_MAX_EVENT_LEAD",
    type=click.FloatRange(min=0, max=24 * 366),
    default=24.0,
    show_default=True,
    help="Refuse new events this many hours ahead of the clock.",
)
@partner_rule_option
@click.option(
    "--drain",
    envvar="METERING_DRAIN",
    type=click.FloatRange(min=0),
    default=20.0,
    show_default=True,
    help="Seconds that calls in flight may go on after SIGTERM.",
)
@click.option(
    "--stream-stall",
    envvar="METERING_STREAM_STALL",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds after which a stream ends whose client does not take the next message.",
)
@click.option(
    "--strict-compat-windows",
    envvar="METERING_STRICT_COMPAT_WINDOWS",
    is_flag=True,
    help="Refuse bounds of Metronome's usage calls that are not those of windows, instead of widening them.",
)
@click.option(
    "--allow-unsafe-database",
    envvar="METERING_ALLOW_UNSAFE_DATABASE",
    is_flag=True,
    help="Serve a database that can lose acknowledged events (fsync off). For tests only.",
)
@_tls_options
@_token_options
@_load_options
def serve(
    listen: tuple[str, ...],
    gateway: str | None,
    workers: int,
    database_url: str | None,
    data_dir: Path,
    pg_bin: str | None,
    migrate: bool,
    max_event_age: float | None,
    max_event_lead: float,
    partner_rule: Rules,
    drain: float,
    stream_stall: float,
    strict_compat_windows: bool,
    allow_unsafe_database: bool,
    **options: Any,
) -> None:
    """Run the server until SIGTERM or Ctrl-C.

    With no options it keeps its data in an embedded Postgres and listens on loopback. As long as there is no API key,
    and neither --tls-clients nor --jwt-issuer, every caller is an administrator of the organization `default`, and only
    loopback and unix sockets are allowed; the first `metering keys create` ends that.

    What requests may look like is limited too: see `metering limits`.
    """
    age = None if max_event_age is None else timedelta(hours=max_event_age)
    config = Config(
        listen=listen,
        gateway=gateway,
        workers=workers,
        database_url=database_url,
        data_dir=data_dir,
        pg_bin=pg_bin,
        migrate=migrate,
        allow_unsafe_database=allow_unsafe_database,
        drain=timedelta(seconds=drain),
        stream_stall=timedelta(seconds=stream_stall),
        time_limits=TimeLimits(ahead=timedelta(hours=max_event_lead), oldest=age),
        partner_rules=partner_rule,
        strict_compat_windows=strict_compat_windows,
        tls=_tls(options),
        tokens=_tokens(options),
        load=_load(options),
    )

    def ready(addresses: Addresses) -> None:
        click.echo(f"metering is ready on {' '.join(addresses)}")
        if addresses.gateway is not None:
            click.echo(f"JSON for the SDKs is ready on http://{addresses.gateway.address}")

    log_to_stderr(logging.INFO)
    run(run_server(config, ready) if workers == 1 else run_workers(config, ready))


def work() -> None:
    """Be one of the processes of a server with several: service.workers starts them here."""
    number, config = told()
    log_to_stderr(logging.INFO)
    structlog.contextvars.bind_contextvars(worker=number)
    try:
        run(serve_as_worker(config))
    except click.ClickException as error:
        # The parent tells it, once for all of them.
        click.echo(error.message)
        raise SystemExit(error.exit_code) from error
