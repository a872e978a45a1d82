"""Owns `metering usage`: what is asked, and reading the answer's stream to its end through every cut."""

import itertools
import sys
from collections.abc import Callable, Iterator
from time import sleep
from typing import Any

import click
import grpc

from metering.v1 import usage_pb2, usage_pb2_grpc
from service.cli import client, usage_output

TABLE_LIMIT = 1000

_SIZES = {
    "hour": usage_pb2.WINDOW_SIZE_HOUR,
    "day": usage_pb2.WINDOW_SIZE_DAY,
    "none": usage_pb2.WINDOW_SIZE_NONE,
}

_Request = usage_pb2.StreamUsageRequest | usage_pb2.StreamUsageWithGroupsRequest
_Response = usage_pb2.StreamUsageResponse | usage_pb2.StreamUsageWithGroupsResponse


@click.command()
@click.option("--window", type=click.Choice(list(_SIZES)), required=True, help="Length of the windows; none = one.")
@click.option("--from", "start", metavar="TIME", help="Start of the range, inclusive.")
@click.option("--to", "end", metavar="TIME", help="End of the range, exclusive.")
@click.option("--customer", "customers", multiple=True, metavar="ID", help="Only this customer (UUID). Repeatable.")
@click.option("--metric", "metrics", multiple=True, metavar="ID", help="Only this metric (UUID). Repeatable.")
@click.option("--group-by", metavar="KEY", help="Also split each value by a property, a group key of every --metric.")
@click.option("--value", "values", multiple=True, metavar="V", help="Only this value of --group-by. Repeatable.")
@click.option(
    "--group-key",
    "group_keys",
    multiple=True,
    metavar="KEY",
    help="List groups, a row each: a property to group by. Repeat it for a group key of several properties.",
)
@click.option(
    "--group-filter",
    "group_filters",
    multiple=True,
    metavar="KEY=VALUE",
    help="List only this value of a --group-key. Repeatable.",
)
@click.option(
    "--current-period",
    is_flag=True,
    help="Instead of --from and --to: the customer's billing period now, as a listing of groups.",
)
@click.option(
    "--updated-since",
    metavar="TIME",
    help="Only windows whose usage changed since. The TIME for the next run is printed to stderr at the end.",
)
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
    help="json is one row per line; json and csv are written as they come.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help=f"Stop after this many rows. [default: {TABLE_LIMIT} in a table, else none]",
)
@client.retry_option
@client.target_options(timeout_s=30, timeout_help="Seconds without any message that are taken for a failure.")
def usage(
    *,
    window: str,
    start: str | None,
    end: str | None,
    customers: tuple[str, ...],
    metrics: tuple[str, ...],
    group_by: str | None,
    values: tuple[str, ...],
    group_keys: tuple[str, ...],
    group_filters: tuple[str, ...],
    current_period: bool,
    updated_since: str | None,
    time_zone: str,
    omit_empty: bool,
    output: usage_output.Format,
    limit: int | None,
    retry_for: float,
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

    --group-key or --current-period ask for a listing of groups: one --customer and one --metric, a row per window
    and combination of values, without a limit to their number.

    \b
      metering usage --window day --current-period --customer ID --metric ID --group-key region --group-key status

    Its CSV has a column "group.KEY" for each property. A property that the events lack is an empty field there, as
    is one whose value is empty; the column "group" has the same as JSON, which tells them apart.

    Only what changed, for a copy kept elsewhere: begin with --updated-since 1970-01-01, replace the rows you have by
    those you get, and run again with the TIME printed. A run that --limit stopped prints none.

    A read that is cut goes on where it was, without a row lost or twice.
    """
    request = (
        _groups_query(customers, metrics, group_by, values, group_keys, group_filters, current_period)
        if group_keys or group_filters or current_period
        else _windows_query(customers, metrics, group_by, values)
    )
    if current_period and (start is not None or end is not None):
        raise click.UsageError("--current-period stands instead of --from and --to.")
    if not current_period and (start is None or end is None):
        raise click.UsageError("--from and --to are needed, or --current-period.")
    for name, option, text in (
        ("starting_on", "--from", start),
        ("ending_before", "--to", end),
        ("updated_since", "--updated-since", updated_since),
    ):
        if text is not None:
            getattr(request, name).CopyFrom(client.parse_instant(text, time_zone, option))
    request.window_size = _SIZES[window]
    request.time_zone = time_zone
    request.omit_empty_windows = omit_empty
    day_zone = (time_zone or "UTC") if window == "day" else None
    if output == "table" and limit is None:
        limit = TABLE_LIMIT

    retry = client.Retry(retry_for)
    with client.connected(target) as channel:
        stub = usage_pb2_grpc.UsageServiceStub(channel)
        if isinstance(request, usage_pb2.StreamUsageWithGroupsRequest):
            groups = _Reading(stub.StreamUsageWithGroups, request, target, retry)
            usage_output.write_groups(itertools.islice(groups.rows, limit), output, request, day_zone)
            since = groups.next_updated_since()
        else:
            windows = _Reading(stub.StreamUsage, request, target, retry)
            usage_output.write_windows(itertools.islice(windows.rows, limit), output, group_by, day_zone)
            since = windows.next_updated_since()
    if since is None:
        click.echo(f"stopped after {limit} rows; there are more (see --limit)", err=True)
    elif updated_since is not None:
        click.echo(f"next --updated-since: {since}", err=True)


def _windows_query(
    customers: tuple[str, ...], metrics: tuple[str, ...], group_by: str | None, values: tuple[str, ...]
) -> usage_pb2.StreamUsageRequest:
    if group_by is None and values:
        raise click.UsageError("--value needs --group-by.")
    if group_by is not None and not metrics:
        raise click.UsageError("--group-by needs --metric: the key must be one that the metric declares.")
    split = None if group_by is None else usage_pb2.GroupBy(key=group_by, values=values)
    return usage_pb2.StreamUsageRequest(
        customer_ids=customers,
        billable_metrics=[usage_pb2.BillableMetricSelector(id=metric, group_by=split) for metric in metrics],
    )


def _groups_query(
    customers: tuple[str, ...],
    metrics: tuple[str, ...],
    group_by: str | None,
    values: tuple[str, ...],
    group_keys: tuple[str, ...],
    group_filters: tuple[str, ...],
    current_period: bool,
) -> usage_pb2.StreamUsageWithGroupsRequest:
    if len(customers) != 1 or len(metrics) != 1:
        raise click.UsageError("a listing of groups needs exactly one --customer and one --metric.")
    if group_by is not None or values:
        raise click.UsageError("a listing of groups has --group-key and --group-filter, not --group-by and --value.")
    request = usage_pb2.StreamUsageWithGroupsRequest(
        customer_id=customers[0],
        billable_metric_id=metrics[0],
        current_period=current_period,
        group_key=group_keys,
    )
    for text in group_filters:
        # Property names and values can hold any "=", so the keys say where the name ends; the longest one that fits.
        key = max((key for key in group_keys if text.startswith(f"{key}=")), key=len, default=None)
        if key is None:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE of a --group-key.", param_hint="--group-filter")
        request.group_filters[key].values.append(text[len(key) + 1 :])
    return request


class _Reading:
    """One read of a stream of rows, from the first to the last, over as many calls as it takes."""

    def __init__(
        self,
        method: Callable[..., Any],
        request: _Request,
        target: client.Target,
        retry: client.Retry,
    ) -> None:
        self._method = method
        self._request = request
        self._target = target
        self._retry = retry
        self._last: _Response | None = None
        self.rows = self._read_rows()

    def next_updated_since(self) -> str | None:
        """Where the next read for changes begins; None if this one left rows unread, which it would then miss."""
        if next(self.rows, None) is not None or self._last is None:
            return None
        return self._last.next_updated_since.ToJsonString()

    def _read_rows(self) -> Iterator[Any]:
        for message in self._messages():
            self._last = message
            yield from message.windows
            # What is complete goes out before the wait for the next message; and a reader that left is noticed in time.
            sys.stdout.flush()

    def _messages(self) -> Iterator[_Response]:
        while True:
            call = self._method(self._request, metadata=self._target.metadata)
            complete = False
            try:
                for message in client.messages(call, self._target.timeout_s):
                    self._request.resume_token = message.resume_token
                    self._retry.progressed()
                    complete = message.complete
                    yield message
                if complete:
                    return
                raise client.CutShort(grpc.StatusCode.UNKNOWN, "the server ended the stream before it was complete")
            except grpc.RpcError as error:
                if complete:
                    return
                # Nothing was read yet: a server that is not there is told at once, and so is a query it refuses.
                if not self._request.resume_token:
                    raise
                delay_s = self._retry.delay_s(error)
                click.echo(f"{client.call_of(error).code().name}: reading on in {delay_s:.1f} s", err=True)
                sleep(delay_s)
            finally:
                call.cancel()
