"""Owns the client's side of a call: options, channel, credentials, deadline, retry, and errors in plain words."""

import functools
import math
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from random import uniform
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from service.domain import windows
from service.tls import BadCertificate, check_authorities, check_key

if TYPE_CHECKING:
    from rich.console import Console

CALL_FAILED = 3
"""Exit code when a call failed: nothing is known to be wrong with the input."""

# After any of these the outcome is unknown or the call was never begun, so the same request may be sent again:
# INTERNAL and UNKNOWN because proxies and broken connections surface as them, CANCELLED because a gRPC server that
# sheds load answers with it.
RETRYABLE = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 10.0

_ADDRESS = re.compile(r"unix(-abstract)?:.+|dns:.+|[^/\s]+:\d+")
_RFC_3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d+))?([Zz]|[+-]\d\d:\d\d)?",
    re.ASCII,
)
_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = timedelta(seconds=1)

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Tls:
    """Whose certificates are trusted (None = whom the system trusts), the client's own, and the name to expect."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to call, as whom, and how long an answer may take."""

    address: str
    timeout_s: float
    api_key: str | None = field(default=None, repr=False)
    tls: Tls | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries beside its request."""
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)


class Seconds(click.FloatRange):
    """A finite number of seconds; `nan` would pass every comparison and be no deadline at all."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Refuses what is not a number of seconds in range."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail("nan is not a number of seconds.", param, ctx)
        return seconds


def target_options(
    timeout_s: float, timeout_help: str = "Deadline of each call in seconds."
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the options of every client command, which the command gets as one `target`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @click.option(
            "--address",
            envvar="METERING_ADDRESS",
            show_envvar=True,
            default="localhost:50051",
            show_default=True,
            metavar="HOST:PORT|unix:PATH",
            callback=_check_address,
            help="Where the server listens.",
        )
        @click.option(
            "--api-key",
            envvar="METERING_API_KEY",
            show_envvar=True,
            metavar="KEY",
            callback=_check_api_key,
            help="Sent as `authorization: Bearer KEY`, never printed. A server in open mode needs none.",
        )
        @click.option(
            "--timeout",
            type=Seconds(min=0, min_open=True, max=3600),
            default=timeout_s,
            show_default=True,
            help=timeout_help,
        )
        @_tls_options
        @functools.wraps(command)
        def with_target(address: str, api_key: str | None, timeout: float, **options: Any) -> None:
            tls = _tls(address, options)
            command(target=Target(address, timeout, api_key, tls), **options)

        return with_target

    return decorate


def _tls_options(command: Callable[..., None]) -> Callable[..., None]:
    # Variables of their own: METERING_TLS_CERT is the server's, beside which clients run too.
    file = click.Path(path_type=Path, dir_okay=False, exists=True)
    for option in (
        click.option(
            "--tls-server-name",
            envvar="METERING_CLIENT_TLS_SERVER_NAME",
            show_envvar=True,
            metavar="NAME",
            help="The host name that the server's certificate must be for, if not that of --address.",
        ),
        click.option(
            "--tls-key",
            envvar="METERING_CLIENT_TLS_KEY",
            show_envvar=True,
            type=file,
            help="The key of --tls-cert, as PEM.",
        ),
        click.option(
            "--tls-cert",
            envvar="METERING_CLIENT_TLS_CERT",
            show_envvar=True,
            type=file,
            help="Present this certificate to the server, as PEM.",
        ),
        click.option(
            "--tls-ca",
            envvar="METERING_CLIENT_TLS_CA",
            show_envvar=True,
            type=file,
            help="Trust only certificates that one of these signed, as PEM. Default: those that the system trusts.",
        ),
        click.option(
            "--tls",
            envvar="METERING_CLIENT_TLS",
            show_envvar=True,
            is_flag=True,
            help="Call with TLS; each of the --tls options implies it. Unix sockets do without.",
        ),
    ):
        command = option(command)
    return command


def _tls(address: str, options: dict[str, Any]) -> Tls | None:
    """Take what the options above set out of `options`; faults of the files are told before anything is sent."""
    wanted, ca, certificate, key, server_name = (
        options.pop(name) for name in ("tls", "tls_ca", "tls_cert", "tls_key", "tls_server_name")
    )
    if (certificate is None) != (key is None):
        raise click.UsageError("A client certificate needs both --tls-cert and --tls-key.")
    if not (wanted or ca or certificate or server_name) or address.startswith("unix"):
        return None
    try:
        if ca is not None:
            check_authorities(ca)
        if certificate is not None:
            check_key(certificate, key)
    except BadCertificate as error:
        raise click.UsageError(str(error)) from error
    return Tls(ca, certificate, key, server_name)


def open_channel(address: str, tls: Tls | None = None) -> grpc.Channel:
    """Opens the channel to a server; tests put a fake in its place."""
    # Without the bounds a channel that failed a few times waits up to two minutes before it looks again, longer than
    # our own retries last.
    options: list[tuple[str, Any]] = [
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    if tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    roots, key, certificate = (
        None if path is None else path.read_bytes() for path in (tls.ca or _system_roots(), tls.key, tls.certificate)
    )
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots, key, certificate), options=options)


def _system_roots() -> Path | None:
    """Where the system keeps whom it trusts, or what SSL_CERT_FILE names; None = gRPC's own list is all there is."""
    places = (ssl.get_default_verify_paths().cafile, "/etc/ssl/certs/ca-certificates.crt")
    return next((path for path in map(Path, filter(None, places)) if path.is_file()), None)


@contextmanager
def connected(target: Target) -> Iterator[grpc.Channel]:
    """A channel for the length of a command; an RPC error inside ends it in plain words with exit code 3."""
    try:
        with open_channel(target.address, target.tls) as channel:
            yield channel
    except grpc.RpcError as error:
        print_error(error, target)
        raise click.exceptions.Exit(CALL_FAILED) from None


class CutShort(grpc.RpcError):
    """A call that this side found to be broken, with a status such as a server would have sent."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code = code
        self._details = details

    def code(self) -> grpc.StatusCode:
        """What it comes closest to."""
        return self._code

    def details(self) -> str:
        """What was found."""
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        """None came."""
        return ()


class BadAnswer(click.ClickException):
    """The server answered something that the API rules out."""

    exit_code = CALL_FAILED


class Retry:
    """When to try again after failures, and when to give up: `for_s` seconds after the first one without progress."""

    def __init__(self, for_s: float) -> None:
        self._for_s = for_s
        self.progressed()

    def progressed(self) -> None:
        """Forgets the failures so far."""
        self._give_up_at: float | None = None
        self._backoff_s = BACKOFF_FIRST_S

    def delay_s(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next try; raises the error if there is to be none."""
        now = monotonic()
        self._give_up_at = now + self._for_s if self._give_up_at is None else self._give_up_at
        # Full jitter on top of what the server asks for: clients that failed together must not come back together.
        delay_s = (_retry_info_s(error) or 0.0) + uniform(0, self._backoff_s)  # noqa: S311 - jitter is no secret
        is_final = call_of(error).code() not in RETRYABLE or _tls_fault(error, "") is not None
        if is_final or now + delay_s > self._give_up_at:
            raise error
        self._backoff_s = min(self._backoff_s * 2, BACKOFF_MAX_S)
        return delay_s


def messages(call: "grpc._CallIterator[Answer]", timeout_s: float) -> Iterator[Answer]:
    """The messages of a server's stream; one that is not there `timeout_s` seconds after it was wanted is a cut.

    Taken one by one as the caller wants them, so that the server need not go faster than its reader.
    """
    while True:
        silent = threading.Event()

        def give_up(silent: threading.Event = silent) -> None:
            silent.set()
            call.cancel()

        watchdog = threading.Timer(timeout_s, give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            message = next(call)
        except StopIteration:
            return
        except grpc.RpcError:
            if silent.is_set():
                raise CutShort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no message for {timeout_s:g} s") from None
            raise
        finally:
            watchdog.cancel()
        yield message


def print_error(error: grpc.RpcError, target: Target) -> None:
    """Prints what the server said to stderr: status, reason, message, each field at fault, and what to try."""
    status = call_of(error)
    code = status.code()
    reason, violations = "", []
    for detail in _details(error):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason = info.reason
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad_request = error_details_pb2.BadRequest()
            detail.Unpack(bad_request)
            violations += [f"{fault.field}: {fault.description}" for fault in bad_request.field_violations]
    untold = status.details(), _hint(code, reason, target)
    text, hint = _tls_fault(error, _expected_name(target)) or _closed(error, target) or untold
    click.echo(printable(f"error: {code.name}{f' ({reason})' if reason else ''}: {text}"), err=True)
    for violation in violations:
        if violation not in (status.details() or ""):  # a lone violation is often the whole message
            click.echo(printable(f"  {violation}"), err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    retry_s = _retry_info_s(error)
    if retry_s is not None:
        click.echo(f"hint: the server asks to try again in {retry_s:g} s", err=True)


def call_of(error: grpc.RpcError) -> grpc.Call:
    """The failed call, for its status: every RpcError that a call raises is one, which the types do not say."""
    return cast(grpc.Call, error)


def retry_option(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --retry-for, for commands over streams."""
    return click.option(
        "--retry-for",
        type=Seconds(min=0, max=86_400),
        default=60,
        show_default=True,
        help="How many seconds to go on after a failure without any progress before giving up.",
    )(command)


def console() -> "Console":
    """Where tables go."""
    from rich.console import Console

    found = Console(highlight=False)
    if not found.is_terminal:
        found.width = 120  # a pipe has no width; rich would take 80 and fold the values
    return found


def printable(text: str) -> str:
    """The text with control characters escaped: names and values come from events and must not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def parse_timestamp(text: str) -> Timestamp:
    """Reads an RFC 3339 instant; ValueError says what is wrong with it."""
    match = _RFC_3339.fullmatch(text)
    if match is None:
        raise ValueError("not an RFC 3339 time such as 2026-01-01T10:00:00Z")
    day, time, fraction, offset = match.groups()
    if offset is None:
        raise ValueError("has no offset: add Z for UTC or for example +05:30; a guess would move usage between windows")
    try:
        instant = datetime.fromisoformat(f"{day}T{time}{'+00:00' if offset in 'Zz' else offset}")
    except ValueError as fault:
        raise ValueError(f"no such time: {fault}") from None
    # Not via a datetime's microseconds, so that the server is the one that cuts, and never through a float.
    return Timestamp(seconds=(instant - _EPOCH) // _SECOND, nanos=int((fraction or "0")[:9].ljust(9, "0")))


def parse_instant(text: str, time_zone: str, option: str) -> Timestamp:
    """Reads an option that is an RFC 3339 instant or a date, the start of that day in `time_zone`."""
    try:
        if not _DATE.fullmatch(text):
            return parse_timestamp(text)
        first = windows.first_instant(date.fromisoformat(text), time_zone or "UTC")
    except windows.WindowFault as fault:
        raise click.BadParameter(str(fault), param_hint="--time-zone") from None
    except ValueError as fault:
        raise click.BadParameter(f"{text!r}: {fault}.", param_hint=option) from None
    return Timestamp(seconds=int(first.timestamp()))


def _check_address(_ctx: click.Context, _param: click.Parameter, address: str) -> str:
    # gRPC takes anything here: it dials port 443 when the port is missing and looks up `http` as a host.
    if not _ADDRESS.fullmatch(address):
        raise click.BadParameter(f"{address!r} is neither host:port nor unix:/path.")
    return address


def _check_api_key(_ctx: click.Context, _param: click.Parameter, api_key: str | None) -> str | None:
    key = (api_key or "").strip()
    if not (key.isascii() and key.isprintable()):
        # gRPC would refuse it too, with the key in the text of the error.
        raise click.BadParameter("the key holds characters that cannot be sent in a header.")
    return key or None


def _details(error: grpc.RpcError) -> list[Any]:
    try:
        status = rpc_status.from_call(call_of(error))
    except ValueError:  # details that contradict the status, as a proxy can make them
        return []
    return [] if status is None else list(status.details)


def _retry_info_s(error: grpc.RpcError) -> float | None:
    for detail in _details(error):
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            info = error_details_pb2.RetryInfo()
            detail.Unpack(info)
            return max(0.0, float(info.retry_delay.ToTimedelta().total_seconds()))
    return None


def _expected_name(target: Target) -> str:
    """The host name that the server's certificate must be for."""
    if target.tls is not None and target.tls.server_name is not None:
        return target.tls.server_name
    return target.address.removeprefix("dns:").rpartition("/")[2].rpartition(":")[0]


def _tls_fault(error: grpc.RpcError, expected: str) -> tuple[str, str] | None:
    """What keeps this side from trusting the server and what to do, if that is why there is no connection."""
    said = call_of(error).details() or ""
    if not said.startswith("failed to connect"):
        return None
    if "Hostname Verification Check failed" in said:
        return (
            f"the server's certificate is not for {expected}",
            "call it by a name that the certificate is for, or give that name with --tls-server-name",
        )
    if failed := re.search(r"CERTIFICATE_VERIFY_FAILED: ([^:]+)", said):
        advice = "" if "expired" in failed[1] or "not yet valid" in failed[1] else "give who signed it with --tls-ca"
        return f"the server's certificate cannot be trusted: {failed[1]}", advice
    if "WRONG_VERSION_NUMBER" in said:
        return "the server does not speak TLS", "call it without the --tls options"
    return None


def _closed(error: grpc.RpcError, target: Target) -> tuple[str, str] | None:
    """What is known if the server broke the connection off at once: servers do not say what they missed in TLS."""
    said = call_of(error).details() or ""
    if not said.startswith("failed to connect") or not ("Socket closed" in said or "reset by peer" in said):
        return None
    if target.tls is None:
        hint = "does it want TLS? give --tls, or --tls-ca with who signed its certificate"
    elif target.tls.certificate is None:
        hint = "does it want a client certificate? give --tls-cert and --tls-key"
    else:
        hint = "does it take this client certificate? it may have expired, or be signed by another"
    return f"the server at {target.address} closed the connection at once", hint


def _hint(code: grpc.StatusCode, reason: str, target: Target) -> str | None:
    match code:
        case grpc.StatusCode.UNAVAILABLE if not reason:  # with a reason a server did answer
            return f"is the server running at {target.address}? `metering serve` starts one"
        case grpc.StatusCode.UNAUTHENTICATED:
            return "give an API key with --api-key or METERING_API_KEY"
        case grpc.StatusCode.PERMISSION_DENIED:
            return "the API key given with --api-key or METERING_API_KEY does not allow this"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no answer within --timeout {target.timeout_s:g} s"
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"the server at {target.address} is no metering server, or an older one"
    return None
