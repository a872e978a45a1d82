"""Owns what an operator can set: one frozen value, each field with its default, read from flags or METERING_* by the
command line.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from service.domain.events import TimeLimits
from service.domain.partners import DEFAULT_RULES, Rules

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_DATA_DIR = Path.home() / ".local" / "share" / "metering"


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one server process.

    `listen` holds `host:port` or `unix:/path` addresses (port 0 = any free one); `gateway` is where Envoy answers JSON,
    None = nowhere. Without `database_url` an embedded Postgres runs in `data_dir`. `drain` is how long calls in flight
    may go on after SIGTERM, `stream_stall` how long a client may leave a message of a stream untaken.
    """

    listen: tuple[str, ...] = (DEFAULT_ADDRESS,)
    gateway: str | None = None
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
    # Unary requests in flight may hold this many bytes before new ones are refused with RESOURCE_EXHAUSTED, and streams
    # as many again before their next request has to wait.
    request_bytes_max: int = 64 * 1024 * 1024
