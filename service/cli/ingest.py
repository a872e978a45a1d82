"""Owns `metering ingest`: JSON lines in, batches of events out, and what became of every line."""

import contextlib
import functools
import itertools
import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import IO, Any, BinaryIO

import click
import grpc

from metering.v1 import error_reason_pb2, event_pb2, event_pb2_grpc
from service.cli import client
from service.cli.delivery import Delivery

MESSAGE_BYTES_MAX = 3 * 1024 * 1024
"""Largest request: a margin below the 4 MiB that gRPC servers take by default."""

LINE_BYTES_MAX = 512 * 1024
"""Longest line. Far above any valid event; and since JSON (worst case `0,`) grows less than sixfold as a message, one
event always fits into one request."""

NESTING_MAX = 30
"""Deepest properties. A level costs up to three of the 100 that protobuf decodes; deeper would sink the whole batch."""

ISSUES_SHOWN = 20

_SAFE_INTEGER = 2**53 - 1
_VERDICTS = {
    event_pb2.VERDICT_ACCEPTED: "accepted",
    event_pb2.VERDICT_DUPLICATE: "duplicate",
    event_pb2.VERDICT_CONFLICT: "conflict",
    event_pb2.VERDICT_REJECTED: "rejected",
}
_FIELDS = {"transaction_id": str, "customer_id": str, "event_type": str, "timestamp": str, "properties": dict}
_EVENT_PATH = re.compile(r"events\[\d+\]\.")


class NumberText(str):
    """A JSON number that a double would change, kept as text. Not a string to the checks of other fields."""

    __slots__ = ()


class LineFault(ValueError):
    """Why a line is not an event."""

    def __init__(self, reason: str, field: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field


@dataclass(slots=True)
class Issue:
    """One reason why one line was not stored."""

    line: int
    transaction_id: str | None
    verdict: str
    reason: str
    field: str
    message: str


@dataclass(slots=True)
class Batch:
    """Some lines in a row: the request made of them, and those that no event could be made of."""

    request: event_pb2.StreamEventsRequest = field(default_factory=event_pb2.StreamEventsRequest)
    lines: list[int] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)
    message_bytes: int = 0
    input_bytes: int = 0


@dataclass(slots=True)
class Tally:
    """What became of the lines so far. Holds the first issues only; the rest is in the issues file, if one is kept."""

    issues_file: IO[str] | None
    counts: Counter[str] = field(default_factory=Counter)
    first_issues: list[Issue] = field(default_factory=list)
    issue_count: int = 0
    cut_count: int = 0

    def add(self, batch: Batch, response: event_pb2.StreamEventsResponse) -> None:
        """Counts an answered batch."""
        events = batch.request.events
        if (
            len(response.verdicts) != len(events)
            or not all(verdict in _VERDICTS for verdict in response.verdicts)
            or not all(issue.index < len(events) for issue in response.issues)
        ):
            raise client.BadAnswer(f"the server's answer does not give one verdict to each of {len(events)} events.")
        self.counts.update(_VERDICTS[verdict] for verdict in response.verdicts)
        self.counts["rejected"] += len(batch.issues)
        issues = [
            Issue(
                line=batch.lines[issue.index],
                transaction_id=events[issue.index].transaction_id,
                verdict=_VERDICTS[response.verdicts[issue.index]].upper(),
                reason=_reason_name(issue.reason),
                field=_EVENT_PATH.sub("", issue.field, count=1),
                message=issue.message,
            )
            for issue in response.issues
        ]
        for found in sorted(batch.issues + issues, key=lambda issue: issue.line):
            self.issue_count += 1
            if len(self.first_issues) < ISSUES_SHOWN:
                self.first_issues.append(found)
            if self.issues_file is not None:
                as_dict = {name: getattr(found, name) for name in Issue.__slots__}
                self.issues_file.write(json.dumps(as_dict, ensure_ascii=False) + "\n")

    def print(self) -> None:
        """Prints the issues to stderr and the totals to stdout."""
        for issue in self.first_issues:
            text = f"line {issue.line}: {issue.verdict} {issue.reason} {issue.field}: {issue.message}"
            click.echo(client.printable(text), err=True)
        if self.issue_count > len(self.first_issues):
            click.echo(f"… and {self.issue_count - len(self.first_issues)} more", err=True)
        if self.cut_count:
            click.echo(
                f"sending began again {self.cut_count} times; what was stored without an answer shows as duplicate",
                err=True,
            )
        for name in _VERDICTS.values():
            click.echo(f"{name:<10}{self.counts[name]:>12}")


@click.command()
@click.argument("file", type=click.File("rb"))
@click.option(
    "--batch-size",
    type=click.IntRange(1, 10_000),
    default=1000,
    show_default=True,
    help="Events per batch. A batch is also cut at 3 MiB.",
)
@click.option(
    "--issues",
    "issues_path",
    type=click.Path(dir_okay=False, writable=True),
    metavar="PATH",
    help="Write every issue to this file, as JSON lines with the line number.",
)
@client.retry_option
@client.target_options(timeout_s=30, timeout_help="Seconds without any answer that are taken for a failure.")
def ingest(
    *,
    file: BinaryIO,
    batch_size: int,
    retry_for: float,
    issues_path: str | None,
    target: client.Target,
) -> None:
    """Send events from FILE (- is standard input), one JSON object per line.

    \b
      transaction_id  the event's own id, at most 128 characters; required
      customer_id     the customer's UUID or one of its aliases; required
      event_type      what happened, for example "api_request"; required
      timestamp       RFC 3339 with Z or an offset, "2026-01-01T10:00:00+05:30"; required
      properties      an object of facts to filter, group and add up; optional

    Repeating a run is safe: an event that is stored already is answered "duplicate" and counts once. That is also why
    ids are never made up here: an id must come from where the event happened, so that every retry sends the same one.

    Numbers stay exact. One that a double cannot hold, such as an integer beyond 2^53-1 or 0.1000000000000000001, is
    sent as a string of the same digits, which metrics add up exactly.

    A line that is no valid event is counted as rejected, with its number, and stops nothing. Blank lines are skipped.
    A batch goes out when it is full or the input ends. Batches are stored in the order of the file, so of two contents
    under one id the first is kept. They go over one stream; when it is cut, what was not answered is sent again.

    Exit code: 0 all accepted or duplicate; 1 any event rejected or in conflict; 2 wrong usage; 3 the calls failed for
    good, or an answer made no sense: run the same command again; 130 Ctrl-C.
    """
    with contextlib.ExitStack() as stack:
        tally = Tally(issues_file=_open_issues(issues_path, file, stack))
        channel = stack.enter_context(client.connected(target))
        stub = event_pb2_grpc.EventServiceStub(channel)
        show = stack.enter_context(_progress(file))

        def settle(batch: Batch, response: event_pb2.StreamEventsResponse) -> None:
            tally.add(batch, response)
            show(batch, tally)

        def on_cut(code: grpc.StatusCode, delay_s: float) -> None:
            tally.cut_count += 1
            click.echo(f"{code.name}: sending again what was not answered in {delay_s:.1f} s", err=True)

        try:
            # All that is tallied is tallied by the delivery's thread, until that has ended.
            with Delivery(stub, target, client.Retry(retry_for), on_cut) as delivery:
                for batch in batches(file, batch_size):
                    delivery.send(batch.request, functools.partial(settle, batch))
                delivery.finish()
        except (grpc.RpcError, client.BadAnswer, KeyboardInterrupt) as stop:
            tally.print()
            click.echo(
                f"stopped: {tally.counts.total()} lines were acknowledged. Running the same input again is safe: "
                "what is stored already is answered duplicate",
                err=True,
            )
            if isinstance(stop, KeyboardInterrupt):
                raise click.exceptions.Exit(130) from None
            raise
    tally.print()
    if tally.counts["rejected"] or tally.counts["conflict"]:
        raise click.exceptions.Exit(1)


def batches(stream: BinaryIO, batch_size: int) -> Iterator[Batch]:
    """Cuts the input into batches by number of lines and size of the message; reads no further than asked."""
    batch = Batch()
    for number, line, read_bytes in _numbered_lines(stream):
        try:
            event = parse_event(line)
        except LineFault as fault:
            issue = Issue(number, None, "REJECTED", fault.reason, fault.field, str(fault))
            batch.issues.append(issue)
        else:
            if event is not None:
                event_bytes = event.ByteSize() + 8  # 8: the field's tag and length within the request
                if batch.message_bytes + event_bytes > MESSAGE_BYTES_MAX:
                    yield batch
                    batch = Batch()
                batch.request.events.append(event)
                batch.lines.append(number)
                batch.message_bytes += event_bytes
        batch.input_bytes += read_bytes
        if len(batch.lines) + len(batch.issues) == batch_size:
            yield batch
            batch = Batch()
    if batch.input_bytes:
        yield batch


def parse_event(line: bytes) -> event_pb2.UsageEvent | None:
    """Reads one line, None if it is blank; LineFault if it makes no event. What fields say is the server's to judge."""
    if not line.strip():
        return None
    if len(line) > LINE_BYTES_MAX:
        raise LineFault("LIMIT_EXCEEDED", "line", f"longer than {LINE_BYTES_MAX // 1024} KiB")
    try:
        record = json.loads(
            line.decode(),
            parse_int=_number,
            parse_float=_number,
            parse_constant=_no_constant,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as fault:
        raise LineFault("MALFORMED_LINE", "line", f"not UTF-8: {fault.reason} at byte {fault.start + 1}") from None
    except RecursionError:
        raise LineFault("MALFORMED_LINE", "line", "nested too deeply") from None
    except ValueError as fault:
        raise LineFault("MALFORMED_LINE", "line", f"not valid JSON: {fault}") from None
    if type(record) is not dict:
        raise LineFault("MALFORMED_LINE", "line", "not a JSON object")
    _check_fields(record)
    try:
        timestamp = client.parse_timestamp(record["timestamp"])
    except ValueError as fault:
        raise LineFault("FIELD_INVALID", "timestamp", str(fault)) from None
    try:
        return event_pb2.UsageEvent(
            transaction_id=record["transaction_id"],
            customer_id=record["customer_id"],
            event_type=record["event_type"],
            timestamp=timestamp,
            properties=record.get("properties"),
        )
    except UnicodeEncodeError:
        raise LineFault("FIELD_INVALID", "line", "holds half of a surrogate pair, which is no character") from None


def _reason_name(reason: error_reason_pb2.ErrorReason.ValueType) -> str:
    try:
        return error_reason_pb2.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")
    except ValueError:  # one that a newer server knows
        return str(reason)


def _check_fields(record: dict[str, Any]) -> None:
    for name in record:
        if name not in _FIELDS:
            raise LineFault("FIELD_INVALID", name, f"unknown field; an event has {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if record.get(name) in (None, "") and name == "transaction_id":
            message = (
                "missing, and never made up here: it must come from where the event happened, so that a retry sends "
                "the same id and the event counts once"
            )
            raise LineFault("FIELD_REQUIRED", name, message)
        if name not in record:
            if name != "properties":
                raise LineFault("FIELD_REQUIRED", name, "missing")
        elif type(record[name]) is not kind:
            raise LineFault("FIELD_INVALID", name, f"must be a JSON {'object' if kind is dict else 'string'}")
    if _nesting(record.get("properties"), NESTING_MAX) > NESTING_MAX:
        raise LineFault("LIMIT_EXCEEDED", "properties", f"nested more than {NESTING_MAX} levels deep")


def _nesting(value: Any, levels_left: int) -> int:
    """Levels of objects and lists in a value; counts no further than one beyond `levels_left`."""
    if type(value) is dict:
        value = value.values()
    elif type(value) is not list:
        return 0
    if levels_left == 0:
        return 1
    return 1 + max((_nesting(item, levels_left - 1) for item in value), default=0)


def _number(literal: str) -> float | NumberText:
    """A double if the server reads the very same decimal from it, else the digits as text."""
    if len(literal) <= 15 and "e" not in literal and "E" not in literal:
        return float(literal)  # 15 digits always survive
    try:
        decimal = Decimal(literal)
    except InvalidOperation:  # an exponent of 19 digits
        return NumberText(literal)
    number = float(literal)
    # Beyond ±(2^53-1) a Struct number stands for several integers, and the server refuses it.
    if abs(number) <= _SAFE_INTEGER and Decimal(repr(number)) == decimal:
        return number
    # Without an exponent, as the server reads plain decimals only; but 1e999999999 is not spelled out.
    return NumberText(format(decimal, "f") if abs(decimal.adjusted()) < 64 else literal)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {name!r} stands twice in one object")
    return record


def _numbered_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes, int]]:
    """Line number, line, and bytes read for it; of a line that is too long only the beginning, so memory is bounded."""
    for number in itertools.count(1):
        line = stream.readline(LINE_BYTES_MAX + 1)
        if not line:
            return
        read_bytes = len(line)
        piece = line
        while len(piece) == LINE_BYTES_MAX + 1 and not piece.endswith(b"\n"):
            piece = stream.readline(LINE_BYTES_MAX + 1)
            read_bytes += len(piece)
        # A byte order mark is how some systems begin a file; it is no part of the first event.
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, read_bytes


def _open_issues(path: str | None, file: BinaryIO, stack: contextlib.ExitStack) -> IO[str] | None:
    if path is None:
        return None
    source = getattr(file, "name", "-")
    if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
        raise click.BadParameter("this is the input; it would be overwritten.", param_hint="--issues")
    try:
        return stack.enter_context(open(path, "w", encoding="utf-8"))
    except OSError as fault:
        raise click.FileError(path, fault.strerror) from None


@contextlib.contextmanager
def _progress(file: BinaryIO) -> Iterator[Callable[[Batch, Tally], None]]:
    """Shows on a terminal how much was acknowledged: percent of a file, counts of a pipe."""
    if not sys.stderr.isatty():
        yield lambda batch, tally: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    found = os.fstat(file.fileno())
    size = found.st_size if stat.S_ISREG(found.st_mode) else None
    share = (SpinnerColumn(),) if size is None else (BarColumn(), TaskProgressColumn())
    columns = (*share, TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("0 events", total=size)

        def show(batch: Batch, tally: Tally) -> None:
            counts = ", ".join(f"{tally.counts[name]:,} {name}" for name in _VERDICTS.values() if tally.counts[name])
            progress.update(task, advance=batch.input_bytes, description=counts or "0 events")

        yield show
