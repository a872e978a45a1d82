"""Owns `metering usage`: usage windows, page by page, as a table, JSON lines or CSV."""

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Literal

import click
from google.protobuf.timestamp_pb2 import Timestamp

from metering.v1 import usage_pb2, usage_pb2_grpc
from service.cli import client
from service.domain import windows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PAGE_SIZE = 10_000
"""What is asked for; the server also cuts a page at about 1 MiB, so memory stays bounded."""

TABLE_LIMIT = 1000

_SIZES = {
    "hour": usage_pb2.WINDOW_SIZE_HOUR,
    "day": usage_pb2.WINDOW_SIZE_DAY,
    "none": usage_pb2.WINDOW_SIZE_NONE,
}
_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_BAR_WIDTH = 16
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@click.command()
@click.option("--window", type=click.Choice(list(_SIZES)), required=True, help="Length of the windows; none = one.")
@click.option("--from", "start", required=True, metavar="TIME", help="Start of the range, inclusive.")
@click.option("--to", "end", required=True, metavar="TIME", help="End of the range, exclusive.")
@click.option("--customer", "customers", multiple=True, metavar="ID", help="Only this customer (UUID). Repeatable.")
@click.option("--metric", "metrics", multiple=True, metavar="ID", help="Only this metric (UUID). Repeatable.")
@click.option("--group-by", metavar="KEY", help="Also split each value by a property, a group key of every --metric.")
@click.option("--value", "values", multiple=True, metavar="V", help="Only this value of --group-by. Repeatable.")
@click.option(
    "--time-zone", default="", metavar="ZONE", help="Whose days are meant, such as Asia/Kolkata. [default: UTC]"
)
@click.option("--omit-empty", is_flag=True, help="Leave out windows without any event.")
@click.option(
    "--format",
    "output",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="json is one window per line; json and csv are written page by page.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help=f"Stop after this many windows. [default: {TABLE_LIMIT} in a table, else none]",
)
@client.target_options(timeout_s=30)
def usage(
    *,
    window: str,
    start: str,
    end: str,
    customers: tuple[str, ...],
    metrics: tuple[str, ...],
    group_by: str | None,
    values: tuple[str, ...],
    time_zone: str,
    omit_empty: bool,
    output: str,
    limit: int | None,
    target: client.Target,
) -> None:
    """Read how much was used, in hours, days or one window over the whole range.

    TIME is RFC 3339, such as 2026-01-01T10:00:00Z, or a date, which means the start of that day in --time-zone.

    \b
      metering usage --window day --from 2026-01-01 --to 2026-02-01 --time-zone Asia/Kolkata
      metering usage --window none --from 2026-01-01 --to 2026-02-01 --format csv > january.csv

    Values are exact decimals. No usage is not zero: it is null in JSON and an empty field in CSV. Times in JSON and
    CSV are UTC. With --group-by, CSV has a row per window and group value; a window without any group has one row in
    which group_key is empty.

    A window is marked incomplete while it has not ended, and "skipped" counts events that matched the metric but
    whose value was missing or no plain decimal.
    """
    if group_by is None and values:
        raise click.UsageError("--value needs --group-by.")
    if group_by is not None and not metrics:
        raise click.UsageError("--group-by needs --metric: the key must be one that the metric declares.")
    split = None if group_by is None else usage_pb2.GroupBy(key=group_by, values=values)
    request = usage_pb2.ListUsageRequest(
        customer_ids=customers,
        billable_metrics=[usage_pb2.BillableMetricSelector(id=metric, group_by=split) for metric in metrics],
        window_size=_SIZES[window],
        starting_on=_instant(start, time_zone, "--from"),
        ending_before=_instant(end, time_zone, "--to"),
        time_zone=time_zone,
        omit_empty_windows=omit_empty,
    )
    if output == "table" and limit is None:
        limit = TABLE_LIMIT
    request.page_size = PAGE_SIZE if limit is None else min(limit + 1, PAGE_SIZE)
    with client.connected(target) as channel:
        found = _windows(usage_pb2_grpc.UsageServiceStub(channel), request, target)
        shown = itertools.islice(found, limit)
        match output:
            case "json":
                _write_json(shown)
            case "csv":
                _write_csv(shown, group_by)
            case _:
                _print_table(shown, group_by, time_zone if window == "day" else None)
        if limit is not None and next(found, None) is not None:
            click.echo(f"stopped after {limit} windows; there are more (see --limit)", err=True)


def _windows(
    stub: usage_pb2_grpc.UsageServiceStub, request: usage_pb2.ListUsageRequest, target: client.Target
) -> Iterator[usage_pb2.UsageWindow]:
    while True:
        page = stub.ListUsage(request, timeout=target.timeout_s, metadata=target.metadata)
        yield from page.windows
        # What is complete goes out before the wait for the next page; and a reader that left is noticed in time.
        sys.stdout.flush()
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def _instant(text: str, time_zone: str, option: str) -> Timestamp:
    try:
        if not _DATE.fullmatch(text):
            return client.parse_timestamp(text)
        first = windows.first_instant(date.fromisoformat(text), time_zone or "UTC")
    except windows.WindowFault as fault:
        raise click.BadParameter(str(fault), param_hint="--time-zone") from None
    except ValueError as fault:
        raise click.BadParameter(f"{text!r}: {fault}.", param_hint=option) from None
    return Timestamp(seconds=int(first.timestamp()))


def _write_json(found: Iterable[usage_pb2.UsageWindow]) -> None:
    for window in found:
        record = {
            "customer_id": window.customer_id,
            "billable_metric_id": window.billable_metric_id,
            "billable_metric_name": window.billable_metric_name,
            "starting_on": _time(window, "starting_on"),
            "ending_before": _time(window, "ending_before"),
            "value": _value(window),
            "groups": {name: {"value": _value(group)} for name, group in _groups(window)},
            "groups_truncated": window.groups_truncated,
            "incomplete": window.incomplete,
            "skipped_count": window.skipped_count,
            "update_time": _time(window, "update_time"),
        }
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_csv(found: Iterable[usage_pb2.UsageWindow], group_by: str | None) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    names = ["customer_id", "billable_metric_id", "billable_metric_name", "starting_on", "ending_before"]
    names += [] if group_by is None else ["group_key", "group_value"]
    names += ["value", "incomplete", "skipped_count", "update_time"]
    names += [] if group_by is None else ["groups_truncated"]
    writer.writerow(names)
    for window in found:
        head = [window.customer_id, window.billable_metric_id, window.billable_metric_name]
        head += [_time(window, "starting_on") or "", _time(window, "ending_before") or ""]
        tail = [_flag(window.incomplete), str(window.skipped_count), _time(window, "update_time") or ""]
        if group_by is None:
            writer.writerow([*head, _value(window), *tail])
            continue
        tail.append(_flag(window.groups_truncated))
        for name, group in _groups(window):
            writer.writerow([*head, group_by, name, _value(group), *tail])
        if not window.groups:
            writer.writerow([*head, "", "", None, *tail])


def _print_table(found: Iterable[usage_pb2.UsageWindow], group_by: str | None, day_zone: str | None) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a pipe has no width; rich would take 80 and fold the values
    by_series = itertools.groupby(found, key=lambda window: (window.customer_id, window.billable_metric_id))
    empty = True
    for _, series in by_series:
        empty = False
        console.print(_series_table(list(series), group_by, day_zone, console))
    if empty:
        console.print("No windows in this range.")


def _series_table(
    series: list[usage_pb2.UsageWindow], group_by: str | None, day_zone: str | None, console: "Console"
) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    first = series[0]
    # Text, never markup: names and group values are other people's words.
    title = Text(client.printable(first.billable_metric_name), style="bold")
    title.append(f" {first.billable_metric_id}\ncustomer {first.customer_id}", style="dim")
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    table.add_column("day" if day_zone is not None else "window (UTC)", no_wrap=True)
    if group_by is not None:
        table.add_column(Text(client.printable(group_by)), overflow="fold")
    table.add_column("value", justify="right", overflow="fold")  # folded, so that no digit is ever cut off
    table.add_column("", no_wrap=True)
    table.add_column("")

    values = [_value(window) for window in series]
    values += [_value(group) for window in series for group in window.groups.values()]
    # Floats are good enough for a bar, and only for that.
    greatest = max((abs(float(value)) for value in values if value is not None), default=0.0)
    with_bars = console.encoding.startswith("utf")

    def cells(holder: usage_pb2.UsageWindow | usage_pb2.GroupValue) -> tuple[Text, str]:
        value = _value(holder)
        if value is None:
            return Text("no usage", style="dim"), ""
        return Text(value), _bar(abs(float(value)), greatest) if with_bars else ""

    for window in series:
        marks = ["incomplete"] if window.incomplete else []
        marks += [f"{window.skipped_count} skipped"] if window.skipped_count else []
        marks += ["more groups not shown"] if window.groups_truncated else []
        group_cells = [] if group_by is None else [Text("all", style="dim")]
        table.add_row(_label(window, day_zone), *group_cells, *cells(window), Text(", ".join(marks), style="yellow"))
        for name, group in _groups(window):
            table.add_row("", Text(client.printable(name)), *cells(group), "")
    return table


def _label(window: usage_pb2.UsageWindow, day_zone: str | None) -> str:
    start = _datetime(window.starting_on)
    if day_zone is not None:
        return windows.local_date(start, day_zone or "UTC").isoformat()
    end = _datetime(window.ending_before)
    if end - start == timedelta(hours=1):
        return f"{start:%Y-%m-%d %H:%M}"
    return f"{_time(window, 'starting_on')} … {_time(window, 'ending_before')}"


def _bar(value: float, greatest: float) -> str:
    eighths = round(value / greatest * _BAR_WIDTH * 8) if greatest else 0
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def _groups(window: usage_pb2.UsageWindow) -> list[tuple[str, usage_pb2.GroupValue]]:
    """In the order of their names: that of a map is arbitrary."""
    return sorted(window.groups.items(), key=lambda item: item[0])


def _value(holder: usage_pb2.UsageWindow | usage_pb2.GroupValue) -> str | None:
    if not holder.HasField("value"):
        return None
    return holder.value


def _time(window: usage_pb2.UsageWindow, name: Literal["starting_on", "ending_before", "update_time"]) -> str | None:
    if not window.HasField(name):
        return None
    timestamp: Timestamp = getattr(window, name)
    return timestamp.ToJsonString()


def _datetime(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)


def _flag(value: bool) -> str:
    return "true" if value else "false"
