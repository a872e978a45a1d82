"""Owns what an operator can set: frozen values, each field with its default, read from flags or METERING_* by the
command line.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from service.auth.tokens import TokenSettings
from service.domain.events import TimeLimits
from service.domain.partners import DEFAULT_RULES, Rules

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_DATA_DIR = Path.home() / ".local" / "share" / "metering"
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tls:
    """The files of the server's certificate and its key; with `client_ca` every client must have a certificate of it.

    `clients` is a file that says which certificate is which caller's (see service.auth.certificates).
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    clients: Path | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """How much a server process takes on at once; what is more is refused, or waits.

    The numbers of one organization are below those of the server, so that none keeps all others out.
    """

    calls_max: int = 16_384
    calls_of_organization_max: int = 12_288
    streams_max: int = 16_384
    streams_of_organization_max: int = 12_288
    connections_max: int = 10_000
    # Unary requests in flight may hold this many bytes before new ones are refused, and usage streams as many again;
    # streams of events too, before their next batch has to wait.
    request_bytes_max: int = 64 * MIB
    message_bytes_max: int = 4 * MIB
    # Events a second of one organization, None = any number.
    ingest_rate: float | None = None
    # Events of one organization that wait to be stored.
    ingest_queue_max: int = 40_000
    # The longest that a statement of a caller runs; its deadline, if that is sooner.
    statement_timeout: timedelta = timedelta(seconds=30)
    # After so long a connection is asked to be opened anew, which spreads clients over replicas; None = never.
    connection_age_max: timedelta | None = timedelta(minutes=30)
    # A connection that is silent for so long is asked for a sign of life, and closed without one.
    keepalive: timedelta = timedelta(seconds=30)
    keepalive_timeout: timedelta = timedelta(seconds=10)
    # Clients that ask for signs of life more often than this are sent away.
    ping_interval_min: timedelta = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one server.

    `listen` holds `host:port` or `unix:/path` addresses (port 0 = any free one); `gateway` is where Envoy answers JSON,
    None = nowhere. Without `database_url` an embedded Postgres runs in `data_dir`. `drain` is how long calls in flight
    may go on after SIGTERM, `stream_stall` how long a client may leave a message of a stream untaken. `workers` is how
    many processes answer calls; what `load` says holds for each.
    """

    listen: tuple[str, ...] = (DEFAULT_ADDRESS,)
    gateway: str | None = None
    workers: int = 1
    database_url: str | None = None
    data_dir: Path = DEFAULT_DATA_DIR
    pg_bin: str | None = None
    migrate: bool = False
    allow_unsafe_database: bool = False
    drain: timedelta = timedelta(seconds=20)
    stream_stall: timedelta = timedelta(seconds=60)
    time_limits: TimeLimits = field(default_factory=TimeLimits)
    # What the cloud marketplaces take.
    partner_rules: Rules = field(default_factory=lambda: DEFAULT_RULES)
    # Whether Metronome's usage calls refuse bounds inside of windows, as metering.v1 does, instead of widening them.
    strict_compat_windows: bool = False
    tls: Tls | None = None
    tokens: TokenSettings | None = None
    load: Load = field(default_factory=Load)
