"""Claims about the client commands: unary calls on a fake channel, streams on a scripted server."""

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc_testing  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner, Result
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from scripted import Play, Refusal, ScriptedServer, messages, refused, silent

from metering.v1 import event_pb2, usage_pb2
from service.cli import COMMANDS, client, events, ingest, main
from service.server import SERVICES

SEARCH = event_pb2.DESCRIPTOR.services_by_name["EventService"].methods_by_name["SearchEvents"]
UNMATCHED = event_pb2.DESCRIPTOR.services_by_name["EventService"].methods_by_name["ListUnmatchedCustomerKeys"]
CHECK = health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name["Check"]

STOP = object()


class RecordingChannel:
    """Hands calls on to the fake channel, which itself forgets the deadline of a call."""

    def __init__(self, fake: grpc_testing.Channel) -> None:
        self.fake = fake
        self.timeouts: list[float | None] = []

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """A callable that notes its timeout."""
        inner, timeouts = self.fake.unary_unary(*args, **kwargs), self.timeouts

        class Call:
            def __call__(self, request: Message, **options: Any) -> Any:
                timeouts.append(options.get("timeout"))
                return inner(request, **options)

            def future(self, request: Message, **options: Any) -> Any:
                timeouts.append(options.get("timeout"))
                return inner.future(request, **options)

        return Call()

    unary_stream = stream_unary = stream_stream = unary_unary

    def __enter__(self) -> "RecordingChannel":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


@dataclass
class Server:
    """Plays the server: runs a command while a thread answers its calls, and keeps what came in."""

    channel: RecordingChannel
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def run(
        self, command: list[str], method: Any, answer: Callable[[Any], Message | Refusal], stdin: str | bytes = ""
    ) -> Result:
        """The command's result; `answer` is asked in the order of the calls."""
        fake = self.channel.fake

        def serve() -> None:
            while True:
                metadata, request, rpc = fake.take_unary_unary(method)
                if request is STOP:
                    return
                self.requests.append(type(request).FromString(request.SerializeToString()))
                self.metadata.append(dict(metadata))
                match answer(request):
                    case Refusal() as refusal:
                        rpc.terminate(None, refusal.trailing_metadata(), refusal.code, refusal.message)
                    case response:
                        rpc.terminate(response, (), grpc.StatusCode.OK, "")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return CliRunner().invoke(main, command, input=stdin)
        finally:
            fake.unary_unary(f"/{method.containing_service.full_name}/{method.name}").future(STOP)
            thread.join(timeout=10)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server on a fake channel."""
    channel = RecordingChannel(grpc_testing.channel([], grpc_testing.strict_fake_time(0)))
    monkeypatch.delenv("METERING_ADDRESS", raising=False)
    monkeypatch.delenv("METERING_API_KEY", raising=False)
    monkeypatch.setattr(client, "open_channel", lambda address, tls: channel)
    return Server(channel)


@pytest.fixture
def streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    """A server that plays streams; waits between tries are too short to notice."""
    monkeypatch.delenv("METERING_ADDRESS", raising=False)
    monkeypatch.delenv("METERING_API_KEY", raising=False)
    monkeypatch.setattr(client, "BACKOFF_FIRST_S", 0.01)
    with ScriptedServer(tmp_path) as server:
        yield server


def in_turn(*answers: Any) -> Callable[[Any], Any]:
    """Gives the answers one by one; a function among them is asked."""
    # A call too many is refused rather than left to hang.
    remaining = itertools.chain(answers, itertools.repeat(Refusal(grpc.StatusCode.UNIMPLEMENTED, "one call too many")))

    def answer(request: Any) -> Any:
        turn = next(remaining)
        return turn(request) if callable(turn) else turn

    return answer


# ---------------------------------------------------------------- the group


def test_help_needs_no_command_module() -> None:
    """`metering --help` names every command and imports none of them, nor gRPC."""
    code = (
        "import sys; from service.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'grpc', 'rich', 'service.cli.ingest', 'service.cli.client'} & set(sys.modules)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert [name for name in COMMANDS if f"  {name} " not in done.stdout] == []


@pytest.mark.parametrize(
    "name",
    [
        "ingest",
        "usage",
        "health",
        "events search",
        "events explain",
        "events unmatched",
        "groups validate",
        "groups report",
        "groups list",
    ],
)
def test_commands_load(name: str) -> None:
    """Each client command is found through the table and explains itself."""
    result = CliRunner().invoke(main, [*name.split(), "--help"])
    assert (result.exit_code, "--address" in result.stdout) == (0, True)


@pytest.mark.parametrize("address", ["localhost", "http://localhost:50051", ""])
def test_bad_address_is_a_usage_error(address: str) -> None:
    """An address that gRPC would misread (port 443, a host named http) is refused before any call."""
    assert CliRunner().invoke(main, ["health", "--address", address]).exit_code == 2


def test_api_key_is_never_printed() -> None:
    """A key that cannot be sent is refused without being repeated."""
    result = CliRunner().invoke(main, ["health", "--api-key", "se\ncret"])
    assert (result.exit_code, "cret" in result.output) == (2, False)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_timeout_is_always_a_deadline(seconds: str) -> None:
    """No value of --timeout turns the deadline off."""
    assert CliRunner().invoke(main, ["health", "--timeout", seconds]).exit_code == 2


# ---------------------------------------------------------------- usage

CUSTOMER = "04ca7e72-4229-4a6e-ab11-9f7376fccbcb"
METRIC = "222796fd-d29c-429e-89b2-549fabda4ed6"
PAIR = ["--customer", CUSTOMER, "--metric", METRIC]
RANGE = ["usage", "--window", "day", "--from", "2026-01-01", "--to", "2026-01-04"]
EXACT = "12345678901234567890.123456789012345678"


def window(day: int, value: str | None = None, **changes: Any) -> usage_pb2.UsageWindow:
    """The window of a day of January 2026."""
    start = Timestamp()
    start.FromJsonString(f"2026-01-{day:02}T00:00:00Z")
    return usage_pb2.UsageWindow(
        customer_id=CUSTOMER,
        billable_metric_id=METRIC,
        billable_metric_name="api, calls",
        starting_on=start,
        ending_before=Timestamp(seconds=start.seconds + 86400),
        value=value,
        **changes,
    )


def part(
    token: str, *windows: usage_pb2.UsageWindow, complete: bool = False, **fields: Any
) -> usage_pb2.StreamUsageResponse:
    """A message of StreamUsage."""
    since = Timestamp(seconds=1767225600, nanos=123456000)
    return usage_pb2.StreamUsageResponse(
        windows=windows, resume_token=token, complete=complete, next_updated_since=since, **fields
    )


def three_windows() -> Play:
    """Three windows in three messages, one of them empty."""
    updated = Timestamp(seconds=1767225661)
    return messages(
        part("a", window(1, EXACT, update_time=updated)),
        part("b"),
        part("c", window(2), window(3, "-0.5", incomplete=True, skipped_count=2), complete=True),
    )


def days(result: Result) -> list[int]:
    """The days of January 2026 whose windows were written as JSON."""
    return [int(json.loads(line)["starting_on"][8:10]) for line in result.stdout.splitlines()]


def test_usage_asks_once(streams: ScriptedServer) -> None:
    """One stream, signed in and without a deadline, gives every window; nothing is said of the next run unasked."""
    result = streams.run([*RANGE, "--format", "json", "--api-key", "k"], three_windows())
    assert (result.exit_code, days(result), result.stderr) == (0, [1, 2, 3], "")
    (call,) = streams.calls
    assert call.requests[0].resume_token == ""
    assert call.metadata["authorization"] == "Bearer k"
    assert call.time_remaining is None or call.time_remaining > 10**6


@pytest.mark.parametrize("output", ["json", "csv", "table"])
@pytest.mark.parametrize("received", [1, 2, 3])
def test_a_cut_read_goes_on_where_it_was(streams: ScriptedServer, received: int, output: str) -> None:
    """Cut after any message, by a status, by OK or by silence, no window is lost or written twice."""
    parts = [
        part(str(number), *(window(2 * number + day, str(2 * number + day)) for day in (1, 2)), complete=number == 3)
        for number in range(4)
    ]
    whole = streams.run([*RANGE, "--format", output], messages(*parts))
    for then in (Refusal(grpc.StatusCode.UNAVAILABLE), Refusal(grpc.StatusCode.ABORTED), None, "silence"):
        streams.calls.clear()
        first = muted(*parts[:received]) if isinstance(then, str) else messages(*parts[:received], then=then)
        # The second call is cut before it says anything.
        plays = [first, refused(Refusal(grpc.StatusCode.INTERNAL)), messages(*parts[received:])]
        result = streams.run([*RANGE, "--format", output, "--timeout", "0.3"], *plays)
        assert (result.exit_code, result.stdout) == (0, whole.stdout)
        tokens = [call.requests[0].resume_token if call.requests else None for call in streams.calls]
        assert tokens[:3] == ["", None, str(received - 1)]
        assert {call.requests[0].window_size for call in streams.calls if call.requests} == {2}
        assert "reading on in 0.0 s" in result.stderr


def muted(*sent: Message) -> Play:
    """A stream of these messages that then says no more and does not end."""

    def play(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Message]:
        next(requests)
        yield from sent
        yield from silent(requests, context)

    return play


def test_a_cut_after_the_complete_message_is_no_failure(streams: ScriptedServer) -> None:
    """When the stream said that it is complete, it does not matter how it ends."""
    play = messages(part("a", window(1, "1"), complete=True), then=Refusal(grpc.StatusCode.UNAVAILABLE))
    result = streams.run([*RANGE, "--format", "json"], play)
    assert (result.exit_code, days(result), result.stderr, len(streams.calls)) == (0, [1], "", 1)


def test_a_read_that_gets_nowhere_is_given_up(streams: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """--retry-for counts from the first failure without a message since; then the error is told, exit code 3."""
    clock = itertools.count(0, 5)
    monkeypatch.setattr(client, "monotonic", lambda: next(clock))
    gone = Refusal(grpc.StatusCode.UNAVAILABLE, "gone")
    lame = [messages(part(str(day), window(day, "1")), then=gone) for day in range(1, 5)]
    result = streams.run([*RANGE, "--format", "json", "--retry-for", "7"], *lame, *[refused(gone)] * 9)
    assert (result.exit_code, days(result), len(streams.calls)) == (3, [1, 2, 3, 4], 6)
    assert "error: UNAVAILABLE: gone" in result.stderr


def test_a_query_that_never_began_is_not_repeated(streams: ScriptedServer) -> None:
    """A server that is not there is told at once, not after --retry-for."""
    result = streams.run(RANGE, refused(Refusal(grpc.StatusCode.UNAVAILABLE, "gone")))
    assert (result.exit_code, len(streams.calls)) == (3, 1)


def test_a_silent_server_is_told_as_such(streams: ScriptedServer) -> None:
    """A stream that never says a word ends after --timeout seconds, told as silence and not as a cancellation."""
    result = streams.run([*RANGE, "--timeout", "0.2"], muted())
    assert (result.exit_code, len(streams.calls)) == (3, 1)
    assert result.stderr.startswith("error: DEADLINE_EXCEEDED: no message for 0.2 s\nhint: no answer within --timeout")


def test_a_refused_resumption_ends_the_read(streams: ScriptedServer) -> None:
    """A server that does not know the token is not asked again, and the read is not taken for complete."""
    cut = messages(part("a", window(1)), then=Refusal(grpc.StatusCode.UNAVAILABLE))
    result = streams.run(
        [*RANGE, "--updated-since", "2026-01-01"], cut, refused(Refusal(grpc.StatusCode.INVALID_ARGUMENT))
    )
    assert (result.exit_code, len(streams.calls), "next --updated-since" in result.stderr) == (3, 2, False)


def test_updated_since_tells_the_next(streams: ScriptedServer) -> None:
    """With --updated-since the request has it, and the value for the next run is told, exactly, on stderr."""
    command = [*RANGE, "--updated-since", "2026-01-02T00:00:00.5Z", "--format", "csv"]
    result = streams.run(command, three_windows())
    assert streams.calls[0].requests[0].updated_since == Timestamp(seconds=1767312000, nanos=500_000_000)
    assert (result.exit_code, result.stderr) == (0, "next --updated-since: 2026-01-01T00:00:00.123456Z\n")


@pytest.mark.parametrize("limit", [1, 2])
def test_a_stopped_read_tells_no_next(streams: ScriptedServer, limit: int) -> None:
    """A read that --limit stopped would lose its unread windows if it told where to begin next."""
    command = [*RANGE, "--updated-since", "2026-01-02", "--format", "json", "--limit", str(limit)]
    result = streams.run(command, three_windows())
    assert (days(result), result.stderr) == (
        [1, 2][:limit],
        f"stopped after {limit} rows; there are more (see --limit)\n",
    )


def test_usage_as_json(streams: ScriptedServer) -> None:
    """JSON lines carry proto names, exact decimals as strings, and null for what is unset."""
    result = streams.run([*RANGE, "--format", "json"], three_windows())
    common: dict[str, Any] = {
        "customer_id": CUSTOMER,
        "billable_metric_id": METRIC,
        "billable_metric_name": "api, calls",
    }
    common |= {"groups": {}, "groups_truncated": False}
    days = [f"2026-01-0{day}T00:00:00Z" for day in range(1, 5)]
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        common
        | {"starting_on": days[0], "ending_before": days[1], "value": EXACT}
        | {"incomplete": False, "skipped_count": 0, "update_time": "2026-01-01T00:01:01Z"},
        common
        | {"starting_on": days[1], "ending_before": days[2], "value": None}
        | {"incomplete": False, "skipped_count": 0, "update_time": None},
        common
        | {"starting_on": days[2], "ending_before": days[3], "value": "-0.5"}
        | {"incomplete": True, "skipped_count": 2, "update_time": None},
    ]


def test_usage_as_csv(streams: ScriptedServer) -> None:
    """CSV has a header, a row per window, exact decimals, and an empty field for no usage."""
    result = streams.run([*RANGE, "--format", "csv"], three_windows())
    head = f'{CUSTOMER},{METRIC},"api, calls"'
    assert result.stdout == (
        "customer_id,billable_metric_id,billable_metric_name,starting_on,ending_before,value,incomplete,skipped_count,"
        "update_time\n"
        f"{head},2026-01-01T00:00:00Z,2026-01-02T00:00:00Z,{EXACT},false,0,2026-01-01T00:01:01Z\n"
        f"{head},2026-01-02T00:00:00Z,2026-01-03T00:00:00Z,,false,0,\n"
        f"{head},2026-01-03T00:00:00Z,2026-01-04T00:00:00Z,-0.5,true,2,\n"
    )


def test_grouped_usage_as_csv(streams: ScriptedServer) -> None:
    """With --group-by there is a row per group in order, and one with an empty key for a window without groups."""
    groups = {"b": usage_pb2.GroupValue(value="2"), "": usage_pb2.GroupValue(value="1"), "a": usage_pb2.GroupValue()}
    play = messages(part("a", window(1, "3", groups=groups, groups_truncated=True), window(2), complete=True))
    command = [*RANGE, "--format", "csv", "--metric", METRIC, "--group-by", "status", "--value", "a", "--value", "b"]
    result = streams.run(command, play)
    rows = [line.split("Z,", 2)[2] for line in result.stdout.splitlines()[1:]]
    assert rows == [
        "status,,1,false,0,,true",
        "status,a,,false,0,,true",
        "status,b,2,false,0,,true",
        ",,,false,0,,false",
    ]
    group_by = usage_pb2.GroupBy(key="status", values=["a", "b"])
    assert list(streams.calls[0].requests[0].billable_metrics) == [
        usage_pb2.BillableMetricSelector(id=METRIC, group_by=group_by)
    ]


def test_usage_as_a_table(streams: ScriptedServer) -> None:
    """The table shows every digit, a bar, no usage as such, and what is incomplete or skipped."""
    result = streams.run([*RANGE], three_windows())
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("2026")]
    assert rows == [
        ["2026-01-01", EXACT, "█" * 16],
        ["2026-01-02", "no", "usage"],
        ["2026-01-03", "-0.5", "incomplete,", "2", "skipped"],
    ]
    assert "api, calls" in result.stdout


def test_table_says_that_there_is_more(streams: ScriptedServer) -> None:
    """A table stops at --limit and says so only if there is more."""
    windows = [window(1, "1"), window(2, "2"), window(3, "3")]
    for limit, more in (("2", True), ("3", False)):
        result = streams.run([*RANGE, "--limit", limit], messages(part("a", *windows, complete=True)))
        assert ("there are more" in result.stderr, result.stdout.count("2026-01")) == (more, int(limit))


@pytest.mark.parametrize(
    ("text", "time_zone", "instant"),
    [
        ("2026-01-01", "", "2026-01-01T00:00:00Z"),
        ("2026-01-01", "Asia/Kolkata", "2025-12-31T18:30:00Z"),
        ("2018-11-04", "America/Sao_Paulo", "2018-11-04T03:00:00Z"),  # this day began at 01:00
        ("2026-01-01T00:00:00+05:30", "", "2025-12-31T18:30:00Z"),
    ],
)
def test_bounds_are_instants_or_local_dates(streams: ScriptedServer, text: str, time_zone: str, instant: str) -> None:
    """A date means the first instant of that day in --time-zone, which goes to the server too."""
    command = ["usage", "--window", "none", "--from", text, "--to", "2030-01-01", "--time-zone", time_zone]
    streams.run(command, messages(part("a", complete=True)))
    (request,) = streams.calls[0].requests
    assert (request.starting_on.ToJsonString(), request.time_zone) == (instant, time_zone)


@pytest.mark.parametrize(
    "options",
    [
        ["--from", "yesterday"],
        ["--from", "2026-02-30"],
        ["--from", "2026-01-01T00:00:00"],
        ["--time-zone", "Mars/Olympus"],
        ["--value", "a"],
        ["--group-by", "status"],
        ["--updated-since", "yesterday"],
        ["--group-key", "region"],
        ["--group-key", "region", "--customer", CUSTOMER],
        ["--group-key", "region", "--customer", CUSTOMER, "--customer", METRIC, "--metric", METRIC],
        [*PAIR, "--group-key", "region", "--group-by", "region"],
        [*PAIR, "--group-key", "region", "--group-filter", "region"],
        [*PAIR, "--group-key", "region", "--group-filter", "other=a"],
        [*PAIR, "--group-filter", "region=a"],
        [*PAIR, "--current-period"],
    ],
)
def test_usage_errors_are_found_before_any_call(streams: ScriptedServer, options: list[str]) -> None:
    """What cannot be meant is a usage error, exit code 2."""
    assert (streams.run([*RANGE, *options]).exit_code, streams.calls) == (2, [])


@pytest.mark.parametrize("options", [[], ["--from", "2026-01-01"], ["--to", "2026-01-01"]])
def test_usage_needs_a_range(streams: ScriptedServer, options: list[str]) -> None:
    """Both bounds are needed unless the billing period is asked for."""
    result = streams.run(["usage", "--window", "day", *options])
    assert (result.exit_code, "--current-period" in result.stderr, streams.calls) == (2, True, [])


def test_usage_failure_is_told(streams: ScriptedServer) -> None:
    """A refused query prints the error, with how long to wait, and ends with exit code 3."""
    refusal = Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "still counting",
        (
            error_details_pb2.ErrorInfo(reason="METRIC_BACKFILLING", domain="metering"),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2)),
        ),
    )
    result = streams.run(RANGE, refused(refusal))
    assert result.exit_code == 3
    assert result.stderr == (
        "error: FAILED_PRECONDITION (METRIC_BACKFILLING): still counting\nhint: the server asks to try again in 2 s\n"
    )


def group(day: int, total: str | None, **properties: str) -> usage_pb2.GroupedUsageWindow:
    """A row of a listing of groups."""
    found = window(day)
    return usage_pb2.GroupedUsageWindow(
        starting_on=found.starting_on, ending_before=found.ending_before, group=properties, value=total
    )


def grouped_rows() -> Play:
    """Rows by region and value: both given, one empty, one absent, and a window without usage; cut in the middle."""
    return messages(
        usage_pb2.StreamUsageWithGroupsResponse(
            windows=[group(1, EXACT, region="eu", value="x,y"), group(1, "0", region="", value="\x1b[1m")],
            resume_token="a",
        ),
        then=Refusal(grpc.StatusCode.UNAVAILABLE),
    )


def more_grouped_rows() -> Play:
    """The rest of them."""
    return messages(
        usage_pb2.StreamUsageWithGroupsResponse(
            windows=[group(1, "7", value="ü"), group(2, None)],
            resume_token="b",
            complete=True,
        )
    )


GROUPED = [*PAIR, "--group-key", "region", "--group-key", "value"]


def test_groups_as_csv(streams: ScriptedServer) -> None:
    """A row per group, a column per property; the column `group` tells absent from empty; read on after a cut."""
    result = streams.run([*RANGE, *GROUPED, "--format", "csv"], grouped_rows(), more_grouped_rows())
    head = f"{CUSTOMER},{METRIC},2026-01-0"
    first = f"{head}1T00:00:00Z,2026-01-02T00:00:00Z"
    assert result.stdout.splitlines() == [
        "customer_id,billable_metric_id,starting_on,ending_before,group.region,group.value,group,value,incomplete,"
        "skipped_count,update_time",
        f'{first},eu,"x,y","{{""region"": ""eu"", ""value"": ""x,y""}}",{EXACT},false,0,',
        f'{first},,\x1b[1m,"{{""region"": """", ""value"": ""\\u001b[1m""}}",0,false,0,',
        f'{first},,ü,"{{""value"": ""ü""}}",7,false,0,',
        f"{head}2T00:00:00Z,2026-01-03T00:00:00Z,,,{{}},,false,0,",
    ]
    assert [call.requests[0].resume_token for call in streams.calls] == ["", "a"]


def test_groups_as_json(streams: ScriptedServer) -> None:
    """Each row is a line with its group as an object, and null for no usage."""
    result = streams.run([*RANGE, *GROUPED, "--format", "json"], grouped_rows(), more_grouped_rows())
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["group"], row["value"]) for row in found] == [
        ({"region": "eu", "value": "x,y"}, EXACT),
        ({"region": "", "value": "\x1b[1m"}, "0"),
        ({"value": "ü"}, "7"),
        ({}, None),
    ]
    assert found[0] | {"group": 0, "value": 0} == {
        "customer_id": CUSTOMER,
        "billable_metric_id": METRIC,
        "starting_on": "2026-01-01T00:00:00Z",
        "ending_before": "2026-01-02T00:00:00Z",
        "group": 0,
        "value": 0,
        "incomplete": False,
        "skipped_count": 0,
        "update_time": None,
    }


def test_groups_as_a_table(streams: ScriptedServer) -> None:
    """The table has a column per property, shows every digit and lets no value steer the terminal."""
    result = streams.run([*RANGE, *GROUPED], grouped_rows(), more_grouped_rows())
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row for row in rows if row][4:] == [
        ["2026-01-01", "eu", "x,y", EXACT, "█" * 16],
        ['""', "\\x1b[1m", "0"],
        ["absent", "ü", "7"],
        ["2026-01-02", "no", "usage"],
    ]


def test_groups_are_asked_for_exactly(streams: ScriptedServer) -> None:
    """Keys and filters go out as given, a value with `=` or an empty one too; dates mean days of --time-zone."""
    filters = ["--group-filter", "region=a=b", "--group-filter", "region=", "--group-filter", "a=b=c"]
    command = [
        *RANGE,
        *PAIR,
        "--group-key",
        "a",
        "--group-key",
        "region",
        "--group-key",
        "a=b",
        *filters,
        "--omit-empty",
    ]
    done = messages(usage_pb2.StreamUsageWithGroupsResponse(resume_token="a", complete=True))
    result = streams.run([*command, "--time-zone", "Asia/Kolkata", "--updated-since", "2026-01-02"], done)
    assert (result.exit_code, result.stdout) == (0, "No windows in this range.\n")
    assert streams.calls[0].requests == [
        usage_pb2.StreamUsageWithGroupsRequest(
            customer_id=CUSTOMER,
            billable_metric_id=METRIC,
            window_size=usage_pb2.WINDOW_SIZE_DAY,
            starting_on=Timestamp(seconds=1767205800),
            ending_before=Timestamp(seconds=1767205800 + 3 * 86400),
            group_key=["a", "region", "a=b"],
            group_filters={
                "region": usage_pb2.GroupFilter(values=["a=b", ""]),
                "a=b": usage_pb2.GroupFilter(values=["c"]),
            },
            time_zone="Asia/Kolkata",
            omit_empty_windows=True,
            updated_since=Timestamp(seconds=1767205800 + 86400),
        )
    ]


def test_current_period_needs_no_group_key(streams: ScriptedServer) -> None:
    """--current-period alone asks for the ungrouped rows of the billing period, which have no group columns."""
    answer = usage_pb2.StreamUsageWithGroupsResponse(windows=[group(1, "5")], resume_token="a", complete=True)
    command = ["usage", "--window", "none", "--current-period", *PAIR, "--format", "csv"]
    result = streams.run(command, messages(answer))
    assert (result.exit_code, result.stdout.splitlines()[1]) == (
        0,
        f"{CUSTOMER},{METRIC},2026-01-01T00:00:00Z,2026-01-02T00:00:00Z,5,false,0,",
    )
    (request,) = streams.calls[0].requests
    assert (request.current_period, request.HasField("starting_on"), list(request.group_key)) == (True, False, [])


# ---------------------------------------------------------------- events


def explained(identifier: str, name: str, outcome: Any, **fields: str) -> event_pb2.MetricExplanation:
    """What a metric made of an event."""
    return event_pb2.MetricExplanation(
        billable_metric_id=identifier, billable_metric_name=name, outcome=outcome, **fields
    )


def stored(transaction_id: str, matched: str = CUSTOMER, **fields: Any) -> event_pb2.StoredEvent:
    """An event as the server tells it."""
    rule, message = "property_filters[0].in_values", 'property "region" is "eu", not one of the 1 values allowed'
    outcomes = [
        explained(METRIC, "calls", event_pb2.METRIC_OUTCOME_COUNTED),
        explained("m2", "by\x1b[2J", event_pb2.METRIC_OUTCOME_SKIPPED),
        explained("m3", "us only", event_pb2.METRIC_OUTCOME_NOT_MATCHED, rule=rule, message=message),
        explained("m4", "new", event_pb2.METRIC_OUTCOME_PENDING),
    ]
    event = event_pb2.UsageEvent(
        transaction_id=transaction_id,
        customer_id="acme\x07",
        event_type="call",
        timestamp=Timestamp(seconds=1767225600, nanos=5000),
    )
    event.properties.update({"n": 1, "f": 0.1, "text": "12345678901234567890", "list": [True, None]})
    return event_pb2.StoredEvent(
        event=event,
        matched_customer_id=matched,
        ingest_time=Timestamp(seconds=1767225601),
        metrics=outcomes,
        **fields,
    )


def test_search_pages_up_to_its_limit(server: Server) -> None:
    """All criteria go out; pages, an empty one too, are followed up to --limit, and no further than to see if more."""
    answer = in_turn(
        event_pb2.SearchEventsResponse(events=[stored("t1")], next_page_token="p2"),
        event_pb2.SearchEventsResponse(next_page_token="p3"),
        event_pb2.SearchEventsResponse(events=[stored("t2"), stored("t3")], next_page_token="p4"),
    )
    command = ["events", "search", "--customer", "acme", "--type", "call", "--from", "2026-01-01", "--limit", "2"]
    command += ["--to", "2026-01-02T00:00:00+05:30", "--format", "json", "--timeout", "7", "--api-key", "k"]
    result = server.run(command, SEARCH, answer)
    assert result.exit_code == 0
    assert [json.loads(line)["event"]["transaction_id"] for line in result.stdout.splitlines()] == ["t1", "t2"]
    assert result.stderr == "stopped after 2; there are more (see --limit)\n"
    assert [request.page_token for request in server.requests] == ["", "p2", "p3"]
    assert server.requests[0] == event_pb2.SearchEventsRequest(
        customer_id="acme",
        event_type="call",
        starting_on=Timestamp(seconds=1767225600),
        ending_before=Timestamp(seconds=1767312000 - 19800),
        page_size=3,
    )
    assert (server.channel.timeouts, server.metadata[2]["authorization"]) == ([7.0] * 3, "Bearer k")


def test_search_as_json_is_exact(server: Server) -> None:
    """JSON has null for what is not known, and the event in the form that `metering ingest` takes."""
    found = [stored("t1"), stored("t2", "", void_time=Timestamp(seconds=1767225602))]
    result = server.run(
        ["events", "search", "--format", "json"], SEARCH, in_turn(event_pb2.SearchEventsResponse(events=found))
    )
    one, two = (json.loads(line) for line in result.stdout.splitlines())
    assert ingest.parse_event(json.dumps(one["event"]).encode()) == found[0].event
    assert {name: one[name] for name in ("matched_customer_id", "ingest_time", "void_time")} == {
        "matched_customer_id": CUSTOMER,
        "ingest_time": "2026-01-01T00:00:01Z",
        "void_time": None,
    }
    assert (two["matched_customer_id"], two["void_time"]) == (None, "2026-01-01T00:00:02Z")
    assert [metric["outcome"] for metric in one["metrics"]] == ["COUNTED", "SKIPPED", "NOT_MATCHED", "PENDING"]
    assert [metric["rule"] for metric in one["metrics"]] == [None, None, "property_filters[0].in_values", None]


def test_search_as_a_table(server: Server) -> None:
    """A row per event says whose it is and what counts it, and lets no key steer the terminal."""
    found = [stored("t1"), stored("t2", ""), stored("t3", void_time=Timestamp(seconds=1767225602))]
    result = server.run(["events", "search"], SEARCH, in_turn(event_pb2.SearchEventsResponse(events=found)))
    text = " ".join(result.stdout.split())
    assert ("\x07" in result.stdout, "acme\\x07" in result.stdout) == (False, True)
    assert "no customer" in text
    assert "voided" in text
    assert "skipped" in text
    assert server.run(["events", "search"], SEARCH, in_turn(event_pb2.SearchEventsResponse())).stdout == (
        "No events found.\n"
    )


@pytest.mark.parametrize("options", [["--from", "yesterday"], ["--to", "2026-02-30"], ["--limit", "0"]])
def test_bad_criteria_are_found_before_any_call(server: Server, options: list[str]) -> None:
    """What cannot be meant is a usage error, exit code 2."""
    result = server.run(["events", "search", *options], SEARCH, in_turn())
    assert (result.exit_code, server.requests) == (2, [])


def test_explain_tells_every_id(server: Server) -> None:
    """Each id is told in the order given, each once, with every metric's outcome; a missing one makes exit code 1."""
    answer = in_turn(
        event_pb2.SearchEventsResponse(events=[stored("t3", "")], next_page_token="p2"),
        event_pb2.SearchEventsResponse(events=[stored("t1")]),
    )
    result = server.run(["events", "explain", "t1", "no\x1b[2Jne", "t3", "t1"], SEARCH, answer)
    assert result.exit_code == 1
    assert list(server.requests[0].transaction_ids) == ["t1", "no\x1b[2Jne", "t3"]
    assert result.stdout.splitlines() == [
        "t1: stored 2026-01-01T00:00:01Z",
        "  call at 2026-01-01T00:00:00.000005Z",
        f"  customer key acme\\x07: customer {CUSTOMER}",
        '  properties {"f": 0.1, "list": [true, null], "n": 1, "text": "12345678901234567890"}',
        f"  COUNTED      calls  {METRIC}",
        "  SKIPPED      by\\x1b[2J  m2",
        "  NOT_MATCHED  us only  m3 (property_filters[0].in_values): "
        'property "region" is "eu", not one of the 1 values allowed',
        "  PENDING      new  m4",
        "no\\x1b[2Jne: not stored",
        "t3: stored 2026-01-01T00:00:01Z",
        "  call at 2026-01-01T00:00:00.000005Z",
        "  customer key acme\\x07: no customer owns this key",
        *result.stdout.splitlines()[3:8],
    ]


def test_explain_as_json(server: Server) -> None:
    """Every id is a line of one shape, stored or not; many ids are asked for in several calls."""
    ids = [f"t{number}" for number in range(events.IDS_AT_ONCE + 1)]

    def answer(request: event_pb2.SearchEventsRequest) -> event_pb2.SearchEventsResponse:
        return event_pb2.SearchEventsResponse(events=[stored(name) for name in request.transaction_ids if name != "t5"])

    result = server.run(["events", "explain", *ids, "--format", "json"], SEARCH, answer)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["transaction_id"] for record in found] == ids
    assert [record["transaction_id"] for record in found if not record["stored"]] == ["t5"]
    assert {tuple(record) for record in found} == {
        ("transaction_id", "stored", "event", "matched_customer_id", "ingest_time", "void_time", "metrics")
    }
    assert (result.exit_code, found[5]["event"], len(server.requests)) == (1, None, 2)


def test_explain_succeeds_when_all_are_stored(server: Server) -> None:
    """Exit code 0 means that every id is stored, counted or not."""
    answer = in_turn(event_pb2.SearchEventsResponse(events=[stored("t1", "")]))
    assert server.run(["events", "explain", "t1"], SEARCH, answer).exit_code == 0


def test_unmatched_lists_every_key(server: Server) -> None:
    """All pages are read; JSON has the exact keys, the table lets none steer the terminal."""
    keys = [
        event_pb2.UnmatchedCustomerKey(
            customer_key=name,
            event_count=12345,
            first_seen_time=Timestamp(seconds=1767225600),
            last_seen_time=Timestamp(seconds=1767225601),
        )
        for name in ("a\x1b[2J", "b")
    ]
    pages = [
        event_pb2.ListUnmatchedCustomerKeysResponse(unmatched_customer_keys=keys[:1], next_page_token="p2"),
        event_pb2.ListUnmatchedCustomerKeysResponse(unmatched_customer_keys=keys[1:]),
    ]
    result = server.run(["events", "unmatched", "--format", "json"], UNMATCHED, in_turn(*pages))
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {
            "customer_key": name,
            "event_count": 12345,
            "first_seen_time": "2026-01-01T00:00:00Z",
            "last_seen_time": "2026-01-01T00:00:01Z",
        }
        for name in ("a\x1b[2J", "b")
    ]
    table = server.run(["events", "unmatched"], UNMATCHED, in_turn(*pages))
    assert (table.exit_code, "\x1b" in table.stdout, "12,345" in table.stdout) == (0, False, True)
    cut = server.run(["events", "unmatched", "--limit", "1"], UNMATCHED, in_turn(*pages))
    assert cut.stderr == "stopped after 1; there are more (see --limit)\n"


# ---------------------------------------------------------------- health


def serving(request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
    """Says that all is well."""
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


def test_health_asks_for_every_service(server: Server) -> None:
    """Without options health asks for the process and all services of the server, each under the deadline."""
    result = server.run(["health"], CHECK, serving)
    assert result.exit_code == 0
    assert [request.service for request in server.requests] == ["", *SERVICES]
    assert server.channel.timeouts == [5.0] * (1 + len(SERVICES))


@pytest.mark.parametrize(
    "answer",
    [
        health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING),
        health_pb2.HealthCheckResponse(),
        Refusal(grpc.StatusCode.NOT_FOUND),
        Refusal(grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_health_fails_unless_all_serve(server: Server, answer: Message | Refusal) -> None:
    """One service that does not serve, is not known or does not answer makes the exit code 1."""
    result = server.run(["health", "--service", "a", "--service", "b"], CHECK, in_turn(serving, answer, serving))
    assert result.exit_code == 1
    assert [line.split(maxsplit=1)[1] for line in result.stdout.splitlines()] == ["(the process)", "a", "b"]


def test_no_server_is_told_in_plain_words(tmp_path: Path) -> None:
    """With nobody listening on a real channel, health says what to try and shows no traceback."""
    result = CliRunner().invoke(main, ["health", "--address", f"unix:{tmp_path}/none.sock"])
    assert result.exit_code == 1
    assert "hint: is the server running at unix:" in result.stderr
    assert "Traceback" not in result.output
