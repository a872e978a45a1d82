"""Owns how usage is written: windows and groups, as tables, JSON lines or CSV."""

import csv
import itertools
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from google.protobuf.timestamp_pb2 import Timestamp

from metering.v1 import usage_pb2
from service.cli import client
from service.domain import windows

if TYPE_CHECKING:
    from rich.text import Text

Format = Literal["table", "json", "csv"]

_BAR_WIDTH = 16
_EIGHTHS = " ▏▎▍▌▋▊▉█"

_Row = usage_pb2.UsageWindow | usage_pb2.GroupedUsageWindow
_Holder = _Row | usage_pb2.GroupValue


@dataclass(slots=True)
class _Line:
    """One line of a table."""

    label: str
    group: list["Text"]
    value: str | None
    marks: list[str] = field(default_factory=list)


def write_windows(
    found: Iterable[usage_pb2.UsageWindow], output: Format, group_by: str | None, day_zone: str | None
) -> None:
    """Writes usage windows; `day_zone` is the zone whose days they are, None if they are none."""
    match output:
        case "json":
            _write_json(map(_window_record, found))
        case "csv":
            _write_windows_csv(found, group_by)
        case _:
            _print_windows(found, group_by, day_zone)


def write_groups(
    found: Iterable[usage_pb2.GroupedUsageWindow],
    output: Format,
    request: usage_pb2.StreamUsageWithGroupsRequest,
    day_zone: str | None,
) -> None:
    """Writes the rows that answer `request`, with the customer and the metric that it named."""
    ids = {"customer_id": request.customer_id.lower(), "billable_metric_id": request.billable_metric_id.lower()}
    keys = list(request.group_key)
    match output:
        case "json":
            _write_json(ids | _group_record(row, keys) for row in found)
        case "csv":
            _write_groups_csv(found, ids, keys)
        case _:
            _print_groups(found, ids, keys, day_zone)


def _write_json(records: Iterable[dict[str, object]]) -> None:
    for record in records:
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


def _window_record(window: usage_pb2.UsageWindow) -> dict[str, object]:
    return {
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


def _group_record(row: usage_pb2.GroupedUsageWindow, keys: list[str]) -> dict[str, object]:
    return {
        "starting_on": _time(row, "starting_on"),
        "ending_before": _time(row, "ending_before"),
        "group": _group(row, keys),
        "value": _value(row),
        "incomplete": row.incomplete,
        "skipped_count": row.skipped_count,
        "update_time": _time(row, "update_time"),
    }


def _write_windows_csv(found: Iterable[usage_pb2.UsageWindow], group_by: str | None) -> None:
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


def _write_groups_csv(found: Iterable[usage_pb2.GroupedUsageWindow], ids: dict[str, str], keys: list[str]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    names = [*ids, "starting_on", "ending_before"]
    # Prefixed, so that a property named `value` is not taken for the value.
    names += [f"group.{key}" for key in keys] + (["group"] if keys else [])
    writer.writerow([*names, "value", "incomplete", "skipped_count", "update_time"])
    for row in found:
        group = _group(row, keys)
        cells = [group.get(key) for key in keys] + ([json.dumps(group, ensure_ascii=False)] if keys else [])
        head = [*ids.values(), _time(row, "starting_on"), _time(row, "ending_before")]
        tail = [_flag(row.incomplete), str(row.skipped_count), _time(row, "update_time")]
        writer.writerow([*head, *cells, _value(row), *tail])


def _print_windows(found: Iterable[usage_pb2.UsageWindow], group_by: str | None, day_zone: str | None) -> None:
    from rich.text import Text

    by_series = itertools.groupby(found, key=lambda window: (window.customer_id, window.billable_metric_id))
    empty = True
    for _, series in by_series:
        empty = False
        lines = []
        for window in series:
            name, customer = window.billable_metric_name, window.customer_id
            title = Text(client.printable(name), style="bold")
            title.append(f" {window.billable_metric_id}\ncustomer {customer}", style="dim")
            marks = _marks(window) + (["more groups not shown"] if window.groups_truncated else [])
            group = [] if group_by is None else [Text("all", style="dim")]
            lines.append(_Line(_label(window, day_zone), group, _value(window), marks))
            lines += [_Line("", [_told(name)], _value(group)) for name, group in _groups(window)]
        _print_table(title, [] if group_by is None else [group_by], lines, day_zone)
    if empty:
        _print_none()


def _print_groups(
    found: Iterable[usage_pb2.GroupedUsageWindow], ids: dict[str, str], keys: list[str], day_zone: str | None
) -> None:
    from rich.text import Text

    title = Text(f"metric {ids['billable_metric_id']}\ncustomer {ids['customer_id']}", style="dim")
    lines: list[_Line] = []
    shown = ""
    for row in found:
        label = _label(row, day_zone)
        # A window without usage has no group at all; that is not the group whose properties are absent.
        absent = Text("absent" if row.HasField("value") or row.skipped_count else "", style="dim")
        empty = Text('""', style="dim")
        group = [(_told(row.group[key]) if row.group[key] else empty) if key in row.group else absent for key in keys]
        lines.append(_Line("" if label == shown else label, group, _value(row), _marks(row)))
        shown = label
    if lines:
        _print_table(title, keys, lines, day_zone)
    else:
        _print_none()


def _print_table(title: "Text", group_columns: list[str], lines: list[_Line], day_zone: str | None) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = client.console()
    # Text, never markup: names and group values are other people's words.
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    table.add_column("day" if day_zone is not None else "window (UTC)", no_wrap=True)
    for name in group_columns:
        table.add_column(_told(name), overflow="fold")
    table.add_column("value", justify="right", overflow="fold")  # folded, so that no digit is ever cut off
    table.add_column("", no_wrap=True)
    table.add_column("")

    # Floats are good enough for a bar, and only for that.
    greatest = max((abs(float(line.value)) for line in lines if line.value is not None), default=0.0)
    with_bars = console.encoding.startswith("utf")
    for line in lines:
        value, bar = Text("no usage", style="dim"), ""
        if line.value is not None:
            value, bar = Text(line.value), _bar(abs(float(line.value)), greatest) if with_bars else ""
        table.add_row(line.label, *line.group, value, bar, Text(", ".join(line.marks), style="yellow"))
    console.print(table)


def _print_none() -> None:
    client.console().print("No windows in this range.")


def _told(text: str) -> "Text":
    from rich.text import Text

    return Text(client.printable(text))


def _marks(row: _Row) -> list[str]:
    marks = ["incomplete"] if row.incomplete else []
    return marks + ([f"{row.skipped_count} skipped"] if row.skipped_count else [])


def _label(row: _Row, day_zone: str | None) -> str:
    start = _datetime(row.starting_on)
    if day_zone is not None:
        return windows.local_date(start, day_zone).isoformat()
    end = _datetime(row.ending_before)
    if end - start == timedelta(hours=1):
        return f"{start:%Y-%m-%d %H:%M}"
    return f"{_time(row, 'starting_on')} … {_time(row, 'ending_before')}"


def _bar(value: float, greatest: float) -> str:
    eighths = round(value / greatest * _BAR_WIDTH * 8) if greatest else 0
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def _groups(window: usage_pb2.UsageWindow) -> list[tuple[str, usage_pb2.GroupValue]]:
    """In the order of their names: that of a map is arbitrary."""
    return sorted(window.groups.items(), key=lambda item: item[0])


def _group(row: usage_pb2.GroupedUsageWindow, keys: list[str]) -> dict[str, str]:
    """In the order of the group key: that of a map is arbitrary."""
    return {key: row.group[key] for key in keys if key in row.group}


def _value(holder: _Holder) -> str | None:
    if not holder.HasField("value"):
        return None
    return holder.value


def _time(row: _Row, name: Literal["starting_on", "ending_before", "update_time"]) -> str | None:
    if not row.HasField(name):
        return None
    timestamp: Timestamp = getattr(row, name)
    return timestamp.ToJsonString()


def _datetime(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)


def _flag(value: bool) -> str:
    return "true" if value else "false"
