"""Owns `metering groups`: groups out in batches, what became of each of them, and lists of those stored."""

import functools
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from time import sleep
from typing import Any, BinaryIO, Literal, cast

import click
import grpc
from google.protobuf.json_format import MessageToDict

from metering.v1 import entitlement_pb2, error_reason_pb2, event_pb2
from metering.v1 import usage_record_group_pb2 as pb
from metering.v1 import usage_record_group_pb2_grpc as pb_grpc
from service.cli import client
from service.cli.groups_input import RECORDS_MAX, Entry, Fault, Place, read_groups
from service.cli.ingest import ISSUES_SHOWN, MESSAGE_BYTES_MAX

GROUPS_MAX = 1_000
"""Groups per batch: what the server takes. A batch is also cut at 10,000 records and at 3 MiB."""

PAGE_SIZE_MAX = 1_000
SKIP_MAX = 1_000_000
TABLE_LIMIT = 1_000
RECORDS_SHOWN = 8

Format = Literal["text", "json"]
ListFormat = Literal["table", "json"]
_Result = pb.UsageRecordGroupValidation | pb.UsageRecordGroupResult

_VERDICTS = {
    event_pb2.VERDICT_ACCEPTED: "accepted",
    event_pb2.VERDICT_DUPLICATE: "duplicate",
    event_pb2.VERDICT_CONFLICT: "conflict",
    event_pb2.VERDICT_REJECTED: "rejected",
}
_BATCH_PATH = re.compile(r"groups\[\d+\]\.")
_BATCH_GROUP = re.compile(r"groups\[(\d+)\]")


def _names(enum: Any, prefix: str) -> dict[str, int]:
    """The short names of an enum, for people to type, but for that of its zero."""
    return {name.removeprefix(prefix): number for name, number in enum.items() if number}


_PARTNERS = _names(entitlement_pb2.Partner, "PARTNER_")
_STATUSES = _names(pb.UsageRecordGroupStatus, "USAGE_RECORD_GROUP_STATUS_")
_SOURCES = _names(pb.UsageRecordGroupSource, "USAGE_RECORD_GROUP_SOURCE_")


@click.group()
def groups() -> None:
    """Validate, report and list usage record groups: what buyers used under their marketplace entitlements.

    \b
      metering groups validate groups.jsonl
      metering groups report groups.jsonl
      metering groups list --entitlement ent-1

    A group is one JSON object, with quantities by dimension key or name:

    \b
      {"id": "acme-2026-01-31T10", "entitlement_id": "ent-1",
       "timestamp": "2026-01-31T10:15:00Z", "records": {"cpu_hours": 1.75}}

    or by billable metric, with the values of the metric's filters:

    \b
      {"id": "acme-2026-01-31T11", "entitlement_id": "ent-1", "timestamp": "2026-01-31T11:15:00Z",
       "billable_records": [{"key": "traffic", "quantity": 12, "properties": {"region": "eu"}}]}

    Every hour the server rolls what was reported up for the marketplace, once per entitlement.
    """


def _files_argument(command: Callable[..., None]) -> Callable[..., None]:
    taken = click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True)
    return click.argument("files", nargs=-1, required=True, type=taken, metavar="FILE...")(command)


def _format_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--format",
        "output",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help=f"text tells totals and the first {ISSUES_SHOWN} faults; json also writes one group per line to stdout.",
    )(command)


@groups.command(short_help="Say of each group in files whether `report` would take it.")
@_files_argument
@_format_option
@client.retry_option
@client.target_options(timeout_s=30)
def validate(*, files: tuple[str, ...], output: Format, retry_for: float, target: client.Target) -> None:
    """Say of each group in FILE... (- is standard input) whether `report` would take it, with all its faults.

    Nothing is stored. What is read, and how, is told by `metering groups report --help`; here an id may be missing.

    JSON has for each group its place, id, verdict (VALID or REJECTED) and violations, in the order of the files.

    Exit code: 0 all are valid; 1 any is not; 2 wrong usage; 3 the calls failed for good; 130 Ctrl-C.
    """
    tally = _Tally(("valid", "rejected"), output)
    first_of: dict[str, Place] = {}

    def ask(stub: pb_grpc.UsageRecordGroupServiceStub, sent: list[pb.NewUsageRecordGroup]) -> list[_Result]:
        request = pb.BatchValidateUsageRecordGroupsRequest(groups=sent)
        answer = stub.BatchValidateUsageRecordGroups(request, timeout=target.timeout_s, metadata=target.metadata)
        return list(answer.results)

    def judge(entry: Entry, result: _Result) -> str:
        # The server finds two of one id in a batch; to it, ours are several.
        first = first_of.setdefault(entry.id, entry.place) if entry.id else entry.place
        if first != entry.place and not any(fault.code == "DUPLICATE_ITEM" for fault in entry.faults):
            message = f"is also the id of {first}; every group needs its own"
            entry.faults.append(Fault("DUPLICATE_ITEM", "id", message))
        return "rejected" if entry.faults or result.violation_count else "valid"

    _send(_entries(files, needs_id=False), ask, judge, tally, client.Retry(retry_for), target)


@groups.command(short_help="Store the groups in files, and count them as usage.")
@_files_argument
@_format_option
@client.retry_option
@client.target_options(timeout_s=30)
def report(*, files: tuple[str, ...], output: Format, retry_for: float, target: client.Target) -> None:
    """Store the groups in FILE... (- is standard input), and count their records as usage at once.

    A FILE holds JSON lines, one array, or objects one after another. Names of fields are those of the message
    NewUsageRecordGroup, entitlement_id or entitlementId; an unknown one is a fault.

    \b
      id                your own, at most 36 characters; required
      entitlement_id    the entitlement that it was used under; required
      records           quantities by dimension key or name; this or billable_records is required
      billable_records  a list of {"key", "quantity", "properties"}, by billable metric
      timestamp         when it was used, RFC 3339 with Z or an offset; the time of the report if left out
      meta_info         what else is known about it

    Quantities are JSON strings or numbers and stay exact: 0.1 and 123456789012345678901234567890.5 arrive digit by
    digit, and 1e2 as 100.

    Repeating a run is safe: a group that is stored already is answered "duplicate" and counts once. That is also why
    ids are never made up here.

    A group that is rejected or in conflict, told with FILE:LINE (and [ELEMENT] of an array), stops nothing. Of a FILE
    that is not JSON nothing is sent; of JSON lines only the bad line is not. Groups are sent in the order of the
    files, up to 1,000 groups, 10,000 records or 3 MiB at once; a failed call is repeated.

    JSON has for each group its place, id, verdict, violations and what is stored, in the order of the files.

    Exit code: 0 all accepted or duplicate; 1 any rejected or in conflict; 2 wrong usage; 3 the calls failed for good,
    or an answer made no sense: run the same command again; 130 Ctrl-C.
    """
    tally = _Tally(tuple(_VERDICTS.values()), output)

    def ask(stub: pb_grpc.UsageRecordGroupServiceStub, sent: list[pb.NewUsageRecordGroup]) -> list[_Result]:
        request = pb.ReportUsageRecordGroupsRequest(groups=sent)
        answer = stub.ReportUsageRecordGroups(request, timeout=target.timeout_s, metadata=target.metadata)
        return list(answer.results)

    def judge(_entry: Entry, result: _Result) -> str:
        verdict = _VERDICTS.get(cast(pb.UsageRecordGroupResult, result).verdict)
        if verdict is None:
            raise client.BadAnswer("the server's answer has a verdict that is not known here.")
        return verdict

    _send(_entries(files, needs_id=True), ask, judge, tally, client.Retry(retry_for), target)


@groups.command("list", short_help="List stored groups, the newest first.")
@click.option(
    "--partner", type=click.Choice(list(_PARTNERS), case_sensitive=False), help="Only groups of this marketplace."
)
@click.option("--product", default="", metavar="ID", help="Only groups of this product.")
@click.option("--entitlement", default="", metavar="ID", help="Only groups of this entitlement.")
@click.option("--buyer", default="", metavar="ID", help="Only groups of this buyer, by its buyer id.")
@click.option("--status", type=click.Choice(list(_STATUSES), case_sensitive=False), help="Only groups in this state.")
@click.option("--source", type=click.Choice(list(_SOURCES), case_sensitive=False), help="Only groups from this source.")
@click.option(
    "--meta-info",
    default="",
    metavar="FILTER",
    help="Only groups whose meta_info holds this: NAME=VALUE, or a JSON object that must be contained in it.",
)
@click.option("--from", "start", metavar="DAY", help="Only groups stored on this UTC day or later.")
@click.option("--to", "end", metavar="DAY", help="Only groups stored before this UTC day.")
@click.option(
    "--skip", type=click.IntRange(0, SKIP_MAX), default=0, help="Pass over so many groups, the newest ones, first."
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help=f"Stop after this many groups. [default: {TABLE_LIMIT} in a table, else none]",
)
@click.option(
    "--format",
    "output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="json is one group per line.",
)
@client.target_options(timeout_s=30)
def list_groups(
    *,
    partner: str | None,
    product: str,
    entitlement: str,
    buyer: str,
    status: str | None,
    source: str | None,
    meta_info: str,
    start: str | None,
    end: str | None,
    skip: int,
    limit: int | None,
    output: ListFormat,
    target: client.Target,
) -> None:
    """List stored groups, the newest first; deleted ones too, unless --status leaves them out.

    DAY is YYYY-MM-DD. Without --to the list ends with today, and without --from it begins 30 days before its end.

    \b
      metering groups list --buyer acme --from 2026-01-01 --to 2026-02-01      all of January
      metering groups list --status REPORT_FAILED
      metering groups list --meta-info metronome_invoice_id=inv-7
      metering groups list --meta-info '{"billable_records": [{"key": "traffic"}]}'

    At most one of --partner, --product, --entitlement and --buyer can be given.

    JSON is the API's message UsageRecordGroup, with every field; null is what is not known.
    """
    given = {"--partner": partner, "--product": product, "--entitlement": entitlement, "--buyer": buyer}
    if len(named := [option for option, value in given.items() if value]) > 1:
        raise click.UsageError(f"{' and '.join(named)} cannot be given together.")
    first = None if start is None else _day(start, "--from")
    last = None if end is None else _day(end, "--to") - timedelta(days=1)
    if first is not None and last is not None and first > last:
        raise click.UsageError("--to must be after --from.")
    if output == "table" and limit is None:
        limit = TABLE_LIMIT
    request = pb.ListUsageRecordGroupsRequest(
        partner=cast(Any, _PARTNERS[partner] if partner else 0),
        product_id=product,
        entitlement_id=entitlement,
        buyer_id=buyer,
        status=cast(Any, _STATUSES[status] if status else 0),
        source=cast(Any, _SOURCES[source] if source else None),
        meta_info=meta_info,
        start_date="" if first is None else first.isoformat(),
        end_date="" if last is None else last.isoformat(),
        page_size=PAGE_SIZE_MAX if limit is None else min(limit + 1, PAGE_SIZE_MAX),
        skip=skip,
    )
    with client.connected(target) as channel:
        found = _listed(pb_grpc.UsageRecordGroupServiceStub(channel), request, target)
        shown = itertools.islice(found, limit)
        if output == "json":
            for one in shown:
                _write_json(_record(one))
        else:
            _print_table(shown)
        if limit is not None and next(found, None) is not None:
            click.echo(f"stopped after {limit}; there are more (see --limit)", err=True)


@dataclass(slots=True)
class _Tally:
    """What became of the groups so far, told as it comes."""

    verdicts: tuple[str, ...]
    output: Format
    counts: Counter[str] = field(default_factory=Counter)
    faults_told: int = 0
    faults_untold: int = 0

    def add(self, entry: Entry, verdict: str, result: _Result | None) -> None:
        """Count a group that was answered, or that could not be sent."""
        self.counts[verdict] += 1
        unlisted = 0 if result is None else result.violation_count - len(result.violations)
        if self.output == "json":
            outcome = _outcome(entry, verdict, result)
            if "accepted" in self.verdicts:  # else nothing is stored
                outcome["group"] = _stored(result)
            _write_json(outcome)
            return
        for fault in entry.faults:
            if self.faults_told == ISSUES_SHOWN:
                self.faults_untold += 1
                continue
            self.faults_told += 1
            where = f" {fault.field}" if fault.field else ""
            text = f"{entry.place}: {verdict.upper()} {entry.id or '(no id)'} {fault.code}{where}: {fault.message}"
            click.echo(client.printable(text), err=True)
        self.faults_untold += unlisted

    def print(self) -> None:
        """Print the totals."""
        if self.faults_untold:
            click.echo(f"… and {self.faults_untold} more; --format json tells more", err=True)
        for name in self.verdicts:
            click.echo(f"{name:<10}{self.counts[name]:>12}", err=True)


def _entries(files: Iterable[str], *, needs_id: bool) -> Iterator[Entry]:
    for name in files:
        empty = True
        with click.open_file(name, "rb") as stream:
            for entry in read_groups(name, cast(BinaryIO, stream), needs_id=needs_id):
                empty = False
                yield entry
        if empty:
            click.echo(client.printable(f"{name} holds no groups"), err=True)


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Cut groups, and what stands among them, into batches by their number, their records and the message's size."""
    batch: list[Entry] = []
    size = records = 0
    for entry in entries:
        more, more_records = (0, 0) if entry.group is None else (entry.message_bytes, entry.records)
        too_large = size + more > MESSAGE_BYTES_MAX or records + more_records > RECORDS_MAX
        if len(batch) == GROUPS_MAX or too_large:
            yield batch
            batch, size, records = [], 0, 0
        batch.append(entry)
        size, records = size + more, records + more_records
    if batch:
        yield batch


def _send(
    entries: Iterator[Entry],
    ask: Callable[[pb_grpc.UsageRecordGroupServiceStub, list[pb.NewUsageRecordGroup]], list[_Result]],
    judge: Callable[[Entry, _Result], str],
    tally: _Tally,
    retry: client.Retry,
    target: client.Target,
) -> None:
    """Send all groups, tell what became of each, and end with the exit code that says it."""
    with client.connected(target) as channel:
        stub = pb_grpc.UsageRecordGroupServiceStub(channel)
        try:
            for batch in _batches(entries):
                sent = [entry for entry in batch if entry.group is not None]
                wanted = [entry.group for entry in batch if entry.group is not None]
                results = _answered(functools.partial(ask, stub, wanted), retry) if sent else []
                if [result.index for result in results] != list(range(len(sent))):
                    raise client.BadAnswer(
                        f"the server's answer does not give one result to each of {len(sent)} groups."
                    )
                found = dict(zip((id(entry) for entry in sent), results, strict=True))
                for entry in batch:
                    result = found.get(id(entry))
                    if result is not None:
                        entry.faults = [_fault(one, sent) for one in result.violations]
                    tally.add(entry, "rejected" if result is None else judge(entry, result), result)
                sys.stdout.flush()
        except (grpc.RpcError, client.BadAnswer, KeyboardInterrupt) as stop:
            tally.print()
            click.echo(
                f"stopped: {tally.counts.total()} groups were answered. Running the same command again is safe",
                err=True,
            )
            if isinstance(stop, KeyboardInterrupt):
                raise click.exceptions.Exit(130) from None
            raise
    tally.print()
    if tally.counts["rejected"] or tally.counts["conflict"]:
        raise click.exceptions.Exit(1)


def _answered(call: Callable[[], list[_Result]], retry: client.Retry) -> list[_Result]:
    """The answer to a call, which is made again until it comes or there is no hope."""
    while True:
        try:
            results = call()
        except grpc.RpcError as error:
            delay_s = retry.delay_s(error)
            click.echo(f"{client.call_of(error).code().name}: sending again in {delay_s:.1f} s", err=True)
            sleep(delay_s)
        else:
            retry.progressed()
            return results


def _fault(violation: pb.GroupViolation, sent: list[Entry]) -> Fault:
    """A fault as the server tells it, in terms of the files instead of the batch."""
    message = violation.message
    if violation.code == error_reason_pb2.ERROR_REASON_DUPLICATE_ITEM:
        message = _BATCH_GROUP.sub(lambda match: _place(sent, int(match[1])), message, count=1)
    try:
        code = error_reason_pb2.ErrorReason.Name(violation.code).removeprefix("ERROR_REASON_")
    except ValueError:  # one that a newer server knows
        code = str(violation.code)
    return Fault(code, _BATCH_PATH.sub("", violation.field, count=1), message)


def _place(sent: list[Entry], index: int) -> str:
    return str(sent[index].place) if index < len(sent) else f"groups[{index}]"


def _outcome(entry: Entry, verdict: str, result: _Result | None) -> dict[str, Any]:
    """What became of a group as JSON."""
    return {
        "file": entry.place.file,
        "line": entry.place.line,
        "element": entry.place.element,
        "id": entry.id,
        "verdict": verdict.upper(),
        "violations": [fault._asdict() for fault in entry.faults],
        "violation_count": max(len(entry.faults), 0 if result is None else result.violation_count),
    }


def _stored(result: _Result | None) -> dict[str, Any] | None:
    """The group as stored; None if nothing is, or it did not fit into the answer."""
    if isinstance(result, pb.UsageRecordGroupResult) and result.HasField("group"):
        return _record(result.group)
    return None


def _record(group: pb.UsageRecordGroup) -> dict[str, Any]:
    """A group as the API's JSON with every field, null where nothing is known."""
    found = MessageToDict(group, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    # The order of names within maps is arbitrary.
    found = json.loads(json.dumps(found, sort_keys=True))
    return {one.name: found.get(one.name) for one in group.DESCRIPTOR.fields}


def _write_json(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


def _day(text: str, option: str) -> date:
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
            raise ValueError("not a day such as 2026-01-31")
        day = date.fromisoformat(text)
    except ValueError as fault:
        raise click.BadParameter(f"{text!r}: {fault}.", param_hint=option) from None
    if day == date.min:
        raise click.BadParameter(f"{text!r}: too early.", param_hint=option)
    return day


def _listed(
    stub: pb_grpc.UsageRecordGroupServiceStub, request: pb.ListUsageRecordGroupsRequest, target: client.Target
) -> Iterator[pb.UsageRecordGroup]:
    while True:
        page = stub.ListUsageRecordGroups(request, timeout=target.timeout_s, metadata=target.metadata)
        yield from page.usage_record_groups
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token
        request.skip = 0  # counts from where the token leads


def _print_table(found: Iterable[pb.UsageRecordGroup]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("id", "created (UTC)", "buyer", "entitlement", "partner", "status", "records"):
        # Ids, which can be long, are folded rather than cut.
        table.add_column(name, overflow="fold", no_wrap=name in {"created (UTC)", "partner", "status"})
    for one in found:
        cells = [
            one.id,
            f"{one.create_time.ToDatetime():%Y-%m-%d %H:%M:%S}",
            one.buyer_id,
            one.entitlement_id,
            _short(entitlement_pb2.Partner, one.partner, "PARTNER_"),
            _short(pb.UsageRecordGroupStatus, one.status, "USAGE_RECORD_GROUP_STATUS_"),
            _told_records(one),
        ]
        # Text, never markup: ids and keys are other people's words.
        table.add_row(*(Text(client.printable(cell)) for cell in cells))
    client.console().print(table if table.row_count else "No groups found.")


def _told_records(group: pb.UsageRecordGroup) -> str:
    told = [f"{record.key} {record.quantity}" for record in group.usage_records[:RECORDS_SHOWN]]
    more = len(group.usage_records) - len(told)
    return ", ".join(told) + (f", and {more} more" if more else "")


def _short(enum: Any, number: int, prefix: str) -> str:
    try:
        return str(enum.Name(number)).removeprefix(prefix)
    except ValueError:  # one that a newer server knows
        return str(number)
