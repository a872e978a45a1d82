"""Owns `metering events`: what is stored, whom it belongs to, and which metrics count it or why not."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from metering.v1 import event_pb2, event_pb2_grpc
from service.cli import client

PAGE_SIZE_MAX = 1000
IDS_AT_ONCE = 100
"""Far below what the server takes: each answer holds all metrics of the organization for each event."""

TABLE_LIMIT = 1000

Format = Literal["table", "json"]


@click.group()
def events() -> None:
    """Look up stored events, and find out why one is not counted.

    \b
      metering events search --customer acme --from 2026-01-01
      metering events explain req-1 req-2
      metering events unmatched
    """


def _format_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--format",
        "output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="json is one record per line.",
    )(command)


@events.command()
@click.option(
    "--customer",
    default="",
    metavar="KEY",
    help="Only this customer: a UUID finds events under any of its keys, any other text those sent with it.",
)
@click.option("--type", "event_type", default="", metavar="TYPE", help="Only events of this type.")
@click.option("--from", "start", metavar="TIME", help="Only events from here on.")
@click.option("--to", "end", metavar="TIME", help="Only events before.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Stop after this many events.")
@_format_option
@client.target_options(timeout_s=30)
def search(
    *,
    customer: str,
    event_type: str,
    start: str | None,
    end: str | None,
    limit: int,
    output: Format,
    target: client.Target,
) -> None:
    """List stored events, the latest first, with the customer each belongs to and how many metrics count it.

    TIME is RFC 3339, such as 2026-01-01T10:00:00Z, or a date, which means the start of that day in UTC.

    JSON has the event as it was sent, its customer's UUID (null: no customer owns the key) and every metric.
    """
    request = event_pb2.SearchEventsRequest(
        customer_id=customer,
        event_type=event_type,
        starting_on=None if start is None else client.parse_instant(start, "", "--from"),
        ending_before=None if end is None else client.parse_instant(end, "", "--to"),
        page_size=min(limit + 1, PAGE_SIZE_MAX),
    )
    with client.connected(target) as channel:
        found = _search(event_pb2_grpc.EventServiceStub(channel), request, target)
        shown = itertools.islice(found, limit)
        if output == "json":
            _write_json(map(_record, shown))
        else:
            header = ["time (UTC)", "transaction id", "type", "customer key", "customer", "metrics"]
            _print_table(header, map(_row, shown), "No events found.")
        _tell_more(found, limit)


@events.command()
@click.argument("transaction_ids", nargs=-1, required=True, metavar="TRANSACTION_ID...")
@_format_option
@client.target_options(timeout_s=30)
def explain(*, transaction_ids: tuple[str, ...], output: Format, target: client.Target) -> None:
    """Tell for each id whether it is stored, whose it is, and what every metric made of it.

    \b
      COUNTED      it is part of the metric's usage
      SKIPPED      it matches, but its value is missing or no plain decimal
      NOT_MATCHED  a rule of the metric leaves it out; the rule and the reason are told
      PENDING      it matches, and will be counted once the metric has counted its past

    Exit code: 0 all are stored; 1 any is not; 3 the call failed.
    """
    missing = False
    ids = iter(dict.fromkeys(transaction_ids))  # each once
    with client.connected(target) as channel:
        stub = event_pb2_grpc.EventServiceStub(channel)
        while some := list(itertools.islice(ids, IDS_AT_ONCE)):
            request = event_pb2.SearchEventsRequest(transaction_ids=some)
            found = {stored.event.transaction_id: stored for stored in _search(stub, request, target)}
            for transaction_id in some:
                stored = found.get(transaction_id)
                missing = missing or stored is None
                if output == "json":
                    _write_json([{"transaction_id": transaction_id, "stored": stored is not None} | _record(stored)])
                else:
                    _print_explanation(transaction_id, stored)
    if missing:
        raise click.exceptions.Exit(1)


@events.command()
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help=f"Stop after this many keys. [default: {TABLE_LIMIT} in a table, else none]",
)
@_format_option
@client.target_options(timeout_s=30)
def unmatched(*, limit: int | None, output: Format, target: client.Target) -> None:
    """List the customer keys that events name but no customer owns.

    Usage under such a key is stored and counted. It belongs to a customer as soon as the key becomes that customer's
    id or ingest alias.
    """
    if output == "table" and limit is None:
        limit = TABLE_LIMIT
    with client.connected(target) as channel:
        found = _unmatched(event_pb2_grpc.EventServiceStub(channel), target, limit)
        shown = itertools.islice(found, limit)
        if output == "json":
            _write_json(
                {
                    "customer_key": key.customer_key,
                    "event_count": key.event_count,
                    "first_seen_time": _time(key.first_seen_time),
                    "last_seen_time": _time(key.last_seen_time),
                }
                for key in shown
            )
        else:
            rows = (
                [key.customer_key, f"{key.event_count:,}", _time(key.first_seen_time), _time(key.last_seen_time)]
                for key in shown
            )
            _print_table(["customer key", "events", "first", "last"], rows, "Every customer key has its customer.")
        if limit is not None:
            _tell_more(found, limit)


def _search(
    stub: event_pb2_grpc.EventServiceStub, request: event_pb2.SearchEventsRequest, target: client.Target
) -> Iterator[event_pb2.StoredEvent]:
    while True:
        page = stub.SearchEvents(request, timeout=target.timeout_s, metadata=target.metadata)
        yield from page.events
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def _unmatched(
    stub: event_pb2_grpc.EventServiceStub, target: client.Target, limit: int | None
) -> Iterator[event_pb2.UnmatchedCustomerKey]:
    page_size = PAGE_SIZE_MAX if limit is None else min(limit + 1, PAGE_SIZE_MAX)
    request = event_pb2.ListUnmatchedCustomerKeysRequest(page_size=page_size)
    while True:
        page = stub.ListUnmatchedCustomerKeys(request, timeout=target.timeout_s, metadata=target.metadata)
        yield from page.unmatched_customer_keys
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def _tell_more(found: Iterator[object], limit: int) -> None:
    if next(found, None) is not None:
        click.echo(f"stopped after {limit}; there are more (see --limit)", err=True)


def _write_json(records: Iterable[dict[str, Any]]) -> None:
    for record in records:
        click.echo(json.dumps(record, ensure_ascii=False))


def _record(stored: event_pb2.StoredEvent | None) -> dict[str, Any]:
    """An event as JSON, null where nothing is known; its `event` is what `metering ingest` takes."""
    if stored is None:
        names = ("event", "matched_customer_id", "ingest_time", "void_time", "metrics")
        return dict.fromkeys(names)
    return {
        "event": _plain(stored.event),
        "matched_customer_id": stored.matched_customer_id or None,
        "ingest_time": _time(stored.ingest_time),
        "void_time": _time(stored.void_time) if stored.HasField("void_time") else None,
        "metrics": [
            {
                "billable_metric_id": metric.billable_metric_id,
                "billable_metric_name": metric.billable_metric_name,
                "outcome": _outcome(metric),
                "rule": metric.rule or None,
                "message": metric.message or None,
            }
            for metric in stored.metrics
        ],
    }


def _plain(message: Message) -> Any:
    """A message as plain values, in which the number 1 is not 1.0."""

    def number(literal: str) -> float:
        return int(literal[:-2]) if literal.endswith(".0") and literal != "-0.0" else float(literal)

    # Sorted, because the order of properties is arbitrary.
    text = json.dumps(MessageToDict(message, preserving_proto_field_name=True), sort_keys=True)
    return json.loads(text, parse_float=number)


def _row(stored: event_pb2.StoredEvent) -> list[str]:
    event = stored.event
    outcomes = [_outcome(metric) for metric in stored.metrics]
    counts = [f"{outcomes.count(name)} {name.lower()}" for name in dict.fromkeys(outcomes) if name != "NOT_MATCHED"]
    told = "voided" if stored.HasField("void_time") else ", ".join(counts) or "none"
    matched = stored.matched_customer_id or "no customer"
    return [_time(event.timestamp), event.transaction_id, event.event_type, event.customer_id, matched, told]


def _print_explanation(transaction_id: str, stored: event_pb2.StoredEvent | None) -> None:
    if stored is None:
        _print_line(f"{transaction_id}: not stored")
        return
    event = stored.event
    _print_line(f"{transaction_id}: stored {_time(stored.ingest_time)}")
    if stored.HasField("void_time"):
        _print_line(f"  voided {_time(stored.void_time)}: it counts nowhere since")
    _print_line(f"  {event.event_type} at {_time(event.timestamp)}")
    owner = f"customer {stored.matched_customer_id}" if stored.matched_customer_id else "no customer owns this key"
    _print_line(f"  customer key {event.customer_id}: {owner}")
    _print_line(f"  properties {json.dumps(_plain(event.properties), ensure_ascii=False)}")
    for metric in stored.metrics:
        why = f" ({metric.rule})" if metric.rule else ""
        why += f": {metric.message}" if metric.message else ""
        _print_line(f"  {_outcome(metric):<11}  {metric.billable_metric_name}  {metric.billable_metric_id}{why}")


def _print_line(text: str) -> None:
    click.echo(client.printable(text))


def _print_table(header: list[str], rows: Iterable[list[str]], nothing: str) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for name in header:
        # Times and UUIDs stay in one piece; ids and keys, which can be long, are folded rather than cut.
        whole = name in {"time (UTC)", "customer", "first", "last"}
        table.add_column(name, overflow="fold", no_wrap=whole, justify="right" if name == "events" else "left")
    for row in rows:
        # Text, never markup: ids and keys are other people's words.
        table.add_row(*(Text(client.printable(cell)) for cell in row))
    client.console().print(table if table.row_count else nothing)


def _outcome(metric: event_pb2.MetricExplanation) -> str:
    try:
        return event_pb2.MetricOutcome.Name(metric.outcome).removeprefix("METRIC_OUTCOME_")
    except ValueError:  # one that a newer server knows
        return str(metric.outcome)


def _time(timestamp: Timestamp) -> str:
    return timestamp.ToJsonString()
