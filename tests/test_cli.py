"""Claims about the client commands, against a fake channel on which each test plays the server."""

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc_testing  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner, Result
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from metering.v1 import error_reason_pb2, event_pb2, usage_pb2
from service.cli import COMMANDS, client, ingest, main

INGEST = event_pb2.DESCRIPTOR.services_by_name["EventService"].methods_by_name["IngestEvents"]
LIST_USAGE = usage_pb2.DESCRIPTOR.services_by_name["UsageService"].methods_by_name["ListUsage"]
CHECK = health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name["Check"]

STOP = object()


@dataclass
class Refusal:
    """An error status, with google.rpc details."""

    code: grpc.StatusCode
    message: str = "refused"
    details: tuple[Message, ...] = ()

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """The details as gRPC carries them."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        return (("grpc-status-details-bin", status.SerializeToString()),)


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
class Clock:
    """Time that passes only while someone sleeps."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        """Lets time pass."""
        self.slept.append(seconds)
        self.now += seconds


@dataclass
class Server:
    """Plays the server: runs a command while a thread answers its calls, and keeps what came in."""

    channel: RecordingChannel
    clock: Clock
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
    """A server on a fake channel, and time under the test's control."""
    clock = Clock()
    channel = RecordingChannel(grpc_testing.channel([], grpc_testing.strict_fake_time(0)))
    monkeypatch.delenv("METERING_ADDRESS", raising=False)
    monkeypatch.delenv("METERING_API_KEY", raising=False)
    monkeypatch.setattr(client, "open_channel", lambda address: channel)
    monkeypatch.setattr(client, "sleep", clock.sleep)
    monkeypatch.setattr(client, "monotonic", lambda: clock.now)
    monkeypatch.setattr(client, "uniform", lambda low, high: high)
    return Server(channel, clock)


def lines(count: int, **changes: Any) -> str:
    """Events as JSON lines, with the ids t1, t2, …"""
    return "".join(json.dumps(event(f"t{number}", **changes)) + "\n" for number in range(1, count + 1))


def event(transaction_id: Any = "t1", **changes: Any) -> dict[str, Any]:
    """A valid event; a change to None takes the field out."""
    fields = {
        "transaction_id": transaction_id,
        "customer_id": "acme",
        "event_type": "call",
        "timestamp": "2026-01-01T00:00:00Z",
        "properties": {"n": 1},
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def accept(request: event_pb2.IngestEventsRequest) -> event_pb2.IngestEventsResponse:
    """Takes every event."""
    return event_pb2.IngestEventsResponse(verdicts=[event_pb2.VERDICT_ACCEPTED] * len(request.events))


def in_turn(*answers: Any) -> Callable[[Any], Any]:
    """Gives the answers one by one; a function among them is asked."""
    # A call too many is refused rather than left to hang.
    remaining = itertools.chain(answers, itertools.repeat(Refusal(grpc.StatusCode.UNIMPLEMENTED, "one call too many")))

    def answer(request: Any) -> Any:
        turn = next(remaining)
        return turn(request) if callable(turn) else turn

    return answer


def ids(request: event_pb2.IngestEventsRequest) -> list[str]:
    """Transaction ids of a request."""
    return [found.transaction_id for found in request.events]


def totals(result: Result) -> dict[str, int]:
    """The totals that ingest prints."""
    return {name: int(count) for name, count in (line.split() for line in result.stdout.splitlines())}


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


@pytest.mark.parametrize("name", ["ingest", "usage", "health"])
def test_commands_load(name: str) -> None:
    """Each client command is found through the table and explains itself."""
    result = CliRunner().invoke(main, [name, "--help"])
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


# ---------------------------------------------------------------- ingest


def test_ingest_sends_what_the_lines_say(server: Server) -> None:
    """A line becomes one event with exact instant and properties, signed in and under a deadline."""
    line = json.dumps(
        event(timestamp="2026-01-01T05:30:00.123456789+05:30", properties={"a": 1.5, "b": None, "c": [True]})
    )
    result = server.run(["ingest", "-", "--api-key", " key ", "--timeout", "7"], INGEST, accept, line)
    expected = event_pb2.UsageEvent(
        transaction_id="t1",
        customer_id="acme",
        event_type="call",
        timestamp=Timestamp(seconds=1767225600, nanos=123456789),
    )
    expected.properties.update({"a": 1.5, "b": None, "c": [True]})
    assert (result.exit_code, totals(result)["accepted"]) == (0, 1)
    assert server.requests == [event_pb2.IngestEventsRequest(events=[expected])]
    assert server.metadata[0]["authorization"] == "Bearer key"
    assert server.channel.timeouts == [7.0]


@pytest.mark.parametrize(
    ("verdict", "exit_code"), [("ACCEPTED", 0), ("DUPLICATE", 0), ("CONFLICT", 1), ("REJECTED", 1)]
)
def test_exit_code_follows_the_verdicts(server: Server, verdict: str, exit_code: int) -> None:
    """Duplicates are success; a conflict or a rejection is not."""
    response = event_pb2.IngestEventsResponse(
        verdicts=[event_pb2.VERDICT_ACCEPTED, event_pb2.Verdict.Value(f"VERDICT_{verdict}")]
    )
    result = server.run(["ingest", "-"], INGEST, lambda request: response, lines(2))
    assert result.exit_code == exit_code
    assert totals(result)[verdict.lower()] == (2 if verdict == "ACCEPTED" else 1)


def test_issues_name_their_lines(server: Server, tmp_path: Path) -> None:
    """Issues of the server and of the client are told with line numbers, in order, and written to --issues."""
    response = event_pb2.IngestEventsResponse(
        verdicts=[event_pb2.VERDICT_ACCEPTED, event_pb2.VERDICT_REJECTED],
        issues=[
            event_pb2.EventIssue(
                index=1,
                reason=error_reason_pb2.ERROR_REASON_TIMESTAMP_TOO_FAR_AHEAD,
                field="events[1].timestamp",
                message="too far \x1b[31m",
            )
        ],
    )
    stdin = json.dumps(event("a")) + "\n\n{oops\n" + json.dumps(event("b"))
    path = tmp_path / "issues.jsonl"
    result = server.run(["ingest", "-", "--issues", str(path)], INGEST, lambda request: response, stdin)
    issues = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert result.exit_code == 1
    assert totals(result) == {"accepted": 1, "duplicate": 0, "conflict": 0, "rejected": 2}
    assert [(issue["line"], issue["transaction_id"], issue["reason"], issue["field"]) for issue in issues] == [
        (3, None, "MALFORMED_LINE", "line"),
        (4, "b", "TIMESTAMP_TOO_FAR_AHEAD", "timestamp"),
    ]
    assert "line 4: REJECTED TIMESTAMP_TOO_FAR_AHEAD timestamp: too far \\x1b[31m" in result.stderr


def test_many_issues_are_cut(server: Server) -> None:
    """Twenty issues are shown and the others counted, with no call for lines that make no event."""
    result = server.run(["ingest", "-"], INGEST, accept, "x\n" * 25)
    assert (result.exit_code, totals(result)["rejected"], server.requests) == (1, 25, [])
    assert result.stderr.splitlines()[19:] == [
        "line 20: REJECTED MALFORMED_LINE line: not valid JSON: Expecting value: line 1 column 1 (char 0)",
        "… and 5 more",
    ]


def test_issues_never_overwrite_the_input(server: Server, tmp_path: Path) -> None:
    """--issues with the input's own path is refused and the input kept."""
    path = tmp_path / "events.jsonl"
    path.write_text(lines(1))
    result = server.run(["ingest", str(path), "--issues", str(path)], INGEST, accept)
    assert (result.exit_code, path.read_text()) == (2, lines(1))


@pytest.mark.parametrize(
    "code",
    [
        "UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "CANCELLED",
        "ABORTED",
        "RESOURCE_EXHAUSTED",
        "INTERNAL",
        "UNKNOWN",
    ],
)
def test_unknown_outcome_resends_the_same_batch(server: Server, code: str) -> None:
    """After a failure of unknown outcome in mid-file exactly the same events go out again, and the totals are exact."""
    answer = in_turn(accept, Refusal(grpc.StatusCode[code]), accept, accept)
    result = server.run(["ingest", "-", "--batch-size", "2", "--concurrency", "1"], INGEST, answer, lines(6))
    assert (result.exit_code, totals(result)["accepted"]) == (0, 6)
    assert [ids(request) for request in server.requests] == [["t1", "t2"], ["t3", "t4"], ["t3", "t4"], ["t5", "t6"]]
    assert server.requests[1] == server.requests[2]


def test_backoff_grows_and_honours_the_server(server: Server) -> None:
    """Waits double from half a second, and start no earlier than RetryInfo asks."""
    asked = Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        details=(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=3, nanos=500_000_000)),),
    )
    unavailable = Refusal(grpc.StatusCode.UNAVAILABLE)
    result = server.run(["ingest", "-"], INGEST, in_turn(unavailable, unavailable, asked, accept), lines(1))
    assert (result.exit_code, server.clock.slept) == (0, [0.5, 1.0, 5.5])


def test_retry_gives_up(server: Server) -> None:
    """When --retry-for has passed, ingest ends with exit code 3, says how far it came and that a rerun is safe."""
    failures = [Refusal(grpc.StatusCode.UNAVAILABLE, "gone")] * 20
    command = ["ingest", "-", "--batch-size", "1", "--concurrency", "1", "--retry-for", "10"]
    result = server.run(command, INGEST, in_turn(accept, *failures), lines(3))
    assert (result.exit_code, totals(result)["accepted"]) == (3, 1)
    assert sum(server.clock.slept) <= 10
    assert "1 lines were acknowledged. Running the same input again is safe" in result.stderr
    assert "error: UNAVAILABLE: gone\nhint: is the server running at localhost:50051?" in result.stderr


def test_interrupt_tells_how_far_it_came(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends ingest with exit code 130 and the exact totals so far."""

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "sleep", interrupt)
    command = ["ingest", "-", "--batch-size", "1", "--concurrency", "1"]
    result = server.run(command, INGEST, in_turn(accept, Refusal(grpc.StatusCode.UNAVAILABLE)), lines(3))
    assert (result.exit_code, totals(result)["accepted"]) == (130, 1)


def test_answers_after_the_failed_call_are_counted(server: Server) -> None:
    """A batch that was in flight behind the one that failed for good still counts as acknowledged."""
    answer = in_turn(Refusal(grpc.StatusCode.PERMISSION_DENIED), accept)
    result = server.run(["ingest", "-", "--batch-size", "2", "--concurrency", "2"], INGEST, answer, lines(4))
    assert (result.exit_code, totals(result)["accepted"]) == (3, 2)


def test_refusal_is_not_retried_and_is_explained(server: Server) -> None:
    """A call that cannot succeed ends ingest at once with code, reason, message and each violation."""
    violation = error_details_pb2.BadRequest.FieldViolation(field="events", description="too many")
    refusal = Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "bad request",
        (
            error_details_pb2.ErrorInfo(reason="LIMIT_EXCEEDED", domain="metering"),
            error_details_pb2.BadRequest(field_violations=[violation]),
        ),
    )
    result = server.run(["ingest", "-"], INGEST, in_turn(refusal), lines(1))
    assert (result.exit_code, len(server.requests)) == (3, 1)
    assert result.stderr.endswith("error: INVALID_ARGUMENT (LIMIT_EXCEEDED): bad request\n  events: too many\n")


def test_a_message_that_is_its_violation_is_told_once(server: Server) -> None:
    """A violation that stands in the message word for word is not printed a second time."""
    violation = error_details_pb2.BadRequest.FieldViolation(field="events", description="too many")
    detail = error_details_pb2.BadRequest(field_violations=[violation])
    refusal = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "events: too many", (detail,))
    result = server.run(["ingest", "-"], INGEST, in_turn(refusal), lines(1))
    assert result.stderr.count("events: too many") == 1


def test_wrong_key_gets_a_hint(server: Server) -> None:
    """UNAUTHENTICATED points at --api-key and does not repeat the key."""
    refusal = Refusal(grpc.StatusCode.UNAUTHENTICATED)
    result = server.run(["ingest", "-", "--api-key", "secret"], INGEST, in_turn(refusal), lines(1))
    assert (result.exit_code, "--api-key" in result.stderr, "secret" in result.output) == (3, True, False)


def test_answer_without_a_verdict_per_event_is_a_failure(server: Server) -> None:
    """An answer that leaves an event without verdict is never taken for success."""
    answer = in_turn(event_pb2.IngestEventsResponse(verdicts=[event_pb2.VERDICT_ACCEPTED]))
    assert server.run(["ingest", "-"], INGEST, answer, lines(2)).exit_code == 3


def test_calls_overlap_up_to_the_limit(server: Server) -> None:
    """--concurrency calls are in flight before any is answered, and not one more."""
    fake = server.channel.fake
    most: list[int] = []

    def serve() -> None:
        taken = [fake.take_unary_unary(INGEST) for _ in range(3)]
        most.append(len(server.channel.timeouts))
        for _, request, rpc in taken:
            rpc.terminate(accept(request), (), grpc.StatusCode.OK, "")
        for _ in range(2):
            _, request, rpc = fake.take_unary_unary(INGEST)
            rpc.terminate(accept(request), (), grpc.StatusCode.OK, "")

    thread = threading.Thread(target=serve)
    thread.start()
    result = CliRunner().invoke(main, ["ingest", "-", "--batch-size", "1", "--concurrency", "3"], input=lines(5))
    thread.join(timeout=10)
    assert (result.exit_code, totals(result)["accepted"], most) == (0, 5, [3])


def test_batches_are_cut_by_bytes(tmp_path: Path) -> None:
    """Whatever the batch size, no message reaches 3 MiB, and no line is lost."""
    path = tmp_path / "events.jsonl"
    path.write_text(lines(20, properties={"blob": "x" * 400_000}))
    with path.open("rb") as stream:
        found = list(ingest.batches(stream, 10_000))
    assert [len(batch.lines) for batch in found] == [7, 7, 6]
    assert max(batch.request.ByteSize() for batch in found) < 3 * 1024 * 1024
    assert sum(batch.input_bytes for batch in found) == path.stat().st_size


def test_longest_line_fits_one_message() -> None:
    """The worst growth from JSON to message still fits, so a single event never needs cutting."""
    head = json.dumps(event())[: -len("1}}")] + "["
    line = head + "0," * ((ingest.LINE_BYTES_MAX - len(head) - 4) // 2) + "0]}}"
    parsed = ingest.parse_event(line.encode())
    assert parsed is not None
    assert parsed.ByteSize() < 3 * 1024 * 1024


def test_too_long_a_line_costs_only_itself(tmp_path: Path) -> None:
    """A line beyond the limit is rejected without being held in memory; the next one has the right number."""
    path = tmp_path / "events.jsonl"
    path.write_text("x" * 2_000_000 + "\n" + lines(1))
    with path.open("rb") as stream:
        (batch,) = ingest.batches(stream, 10)
    assert ([issue.line for issue in batch.issues], batch.lines) == ([1], [2])
    assert batch.input_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "field_", "message"),
    [
        (b"{", "line", "not valid JSON"),
        (b"[]", "line", "not a JSON object"),
        (b"\xff{}", "line", "not UTF-8"),
        (b"[" * 100_000, "line", "nested too deeply"),
        (b'{"a":1,"a":2}', "line", "the name 'a' stands twice"),
        (b'{"a":NaN}', "line", "NaN is not a JSON value"),
        (json.dumps(event(transaction_id=None)).encode(), "transaction_id", "never made up here"),
        (json.dumps(event(transaction_id="")).encode(), "transaction_id", "never made up here"),
        (json.dumps(event(transaction_id=7)).encode(), "transaction_id", "must be a JSON string"),
        (json.dumps(event(transaction_id=2**70)).encode(), "transaction_id", "must be a JSON string"),
        (json.dumps(event(customer_id=None)).encode(), "customer_id", "missing"),
        (json.dumps(event(properties=[])).encode(), "properties", "must be a JSON object"),
        (json.dumps(event(colour="red")).encode(), "colour", "unknown field"),
        (json.dumps(event(timestamp="2026-01-01T00:00:00")).encode(), "timestamp", "has no offset"),
        (json.dumps(event(timestamp="2026-02-30T00:00:00Z")).encode(), "timestamp", "no such time"),
        (json.dumps(event(timestamp="20260101T000000Z")).encode(), "timestamp", "not an RFC 3339 time"),
        (json.dumps(event(customer_id="\ud800")).encode(), "line", "surrogate"),
        (json.dumps(event(properties={"\ud800": 1})).encode(), "line", "surrogate"),
        (json.dumps(event(properties={"a": "b"})).replace('"b"', "[" * 30 + "]" * 30).encode(), "properties", "nested"),
        (b" " * ingest.LINE_BYTES_MAX + b"{}", "line", "longer than"),
    ],
)
def test_lines_that_are_no_events(line: bytes, field_: str, message: str) -> None:
    """Each way a line can fail is told with the field and what is wrong."""
    with pytest.raises(ingest.LineFault, match=message) as caught:
        ingest.parse_event(line)
    assert caught.value.field == field_


def test_deepest_properties_survive_the_wire() -> None:
    """What passes the nesting limit can be decoded again within a request."""
    for opening, closing in (("[", "]"), ('{"k":', "}")):
        nested = opening * (ingest.NESTING_MAX - 1) + "0" + closing * (ingest.NESTING_MAX - 1)
        parsed = ingest.parse_event(json.dumps(event(properties={"a": "b"})).replace('"b"', nested).encode())
        assert parsed is not None
        request = event_pb2.IngestEventsRequest(events=[parsed])
        assert event_pb2.IngestEventsRequest.FromString(request.SerializeToString()) == request


@pytest.mark.parametrize(
    ("literal", "sent"),
    [
        ("60", 60.0),
        ("1.50", 1.5),
        ("-0.1", -0.1),
        ("1e3", 1000.0),
        ("9007199254740991", 9007199254740991.0),
        ("9007199254740992", "9007199254740992"),
        ("9007199254740993", "9007199254740993"),
        ("-9007199254740993.0", "-9007199254740993.0"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("123456789012345678.123456789", "123456789012345678.123456789"),
        ("1e20", "100000000000000000000"),
        ("1.5e20", "150000000000000000000"),
        ("1e400", "1e400"),
        ("1e-400", "1e-400"),
        ("1e99999999999999999999", "1e99999999999999999999"),
    ],
)
def test_numbers_are_sent_exactly(literal: str, sent: float | str) -> None:
    """A number goes as a double only if the server reads the same decimal back, else as text without exponent."""
    line = json.dumps(event(properties={"n": "N"})).replace('"N"', literal)
    parsed = ingest.parse_event(line.encode())
    assert parsed is not None
    assert parsed.properties["n"] == sent


def test_byte_order_mark_is_no_part_of_the_first_event(server: Server) -> None:
    """A file that begins with a UTF-8 byte order mark is read like any other."""
    assert server.run(["ingest", "-"], INGEST, accept, b"\xef\xbb\xbf" + lines(1).encode()).exit_code == 0


@pytest.mark.parametrize(
    ("text", "seconds", "nanos"),
    [
        ("1970-01-01T00:00:01.5Z", 1, 500_000_000),
        ("1969-12-31T23:59:59.25z", -1, 250_000_000),
        ("1970-01-01 00:00:00.123456789987-00:01", 60, 123_456_789),
    ],
)
def test_fractions_of_a_second_are_exact(text: str, seconds: int, nanos: int) -> None:
    """A fraction counts forward from its second, before 1970 too; what lies below a nanosecond is cut."""
    assert client.parse_timestamp(text) == Timestamp(seconds=seconds, nanos=nanos)


# ---------------------------------------------------------------- usage

CUSTOMER = "04ca7e72-4229-4a6e-ab11-9f7376fccbcb"
METRIC = "222796fd-d29c-429e-89b2-549fabda4ed6"
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


def two_pages() -> Callable[[Any], Any]:
    """Three windows on three pages, one of them empty."""
    updated = Timestamp(seconds=1767225661)
    return in_turn(
        usage_pb2.ListUsageResponse(windows=[window(1, EXACT, update_time=updated)], next_page_token="p2"),  # noqa: S106
        usage_pb2.ListUsageResponse(next_page_token="p3"),  # noqa: S106 - a place in a list, no secret
        usage_pb2.ListUsageResponse(windows=[window(2), window(3, "-0.5", incomplete=True, skipped_count=2)]),
    )


def test_usage_pages_to_the_end(server: Server) -> None:
    """Every page is asked for, an empty one too, with the same query, signed in and under a deadline."""
    result = server.run([*RANGE, "--format", "json", "--api-key", "k"], LIST_USAGE, two_pages())
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 3)
    assert [request.page_token for request in server.requests] == ["", "p2", "p3"]
    for request in server.requests:
        request.page_token = ""
    assert server.requests[0] == server.requests[1] == server.requests[2]
    assert server.channel.timeouts == [30.0] * 3
    assert [metadata["authorization"] for metadata in server.metadata] == ["Bearer k"] * 3


def test_usage_as_json(server: Server) -> None:
    """JSON lines carry proto names, exact decimals as strings, and null for what is unset."""
    result = server.run([*RANGE, "--format", "json"], LIST_USAGE, two_pages())
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


def test_usage_as_csv(server: Server) -> None:
    """CSV has a header, a row per window, exact decimals, and an empty field for no usage."""
    result = server.run([*RANGE, "--format", "csv"], LIST_USAGE, two_pages())
    head = f'{CUSTOMER},{METRIC},"api, calls"'
    assert result.stdout == (
        "customer_id,billable_metric_id,billable_metric_name,starting_on,ending_before,value,incomplete,skipped_count,"
        "update_time\n"
        f"{head},2026-01-01T00:00:00Z,2026-01-02T00:00:00Z,{EXACT},false,0,2026-01-01T00:01:01Z\n"
        f"{head},2026-01-02T00:00:00Z,2026-01-03T00:00:00Z,,false,0,\n"
        f"{head},2026-01-03T00:00:00Z,2026-01-04T00:00:00Z,-0.5,true,2,\n"
    )


def test_grouped_usage_as_csv(server: Server) -> None:
    """With --group-by there is a row per group in order, and one with an empty key for a window without groups."""
    groups = {"b": usage_pb2.GroupValue(value="2"), "": usage_pb2.GroupValue(value="1"), "a": usage_pb2.GroupValue()}
    answer = in_turn(
        usage_pb2.ListUsageResponse(windows=[window(1, "3", groups=groups, groups_truncated=True), window(2)])
    )
    command = [*RANGE, "--format", "csv", "--metric", METRIC, "--group-by", "status", "--value", "a", "--value", "b"]
    result = server.run(command, LIST_USAGE, answer)
    rows = [line.split("Z,", 2)[2] for line in result.stdout.splitlines()[1:]]
    assert rows == [
        "status,,1,false,0,,true",
        "status,a,,false,0,,true",
        "status,b,2,false,0,,true",
        ",,,false,0,,false",
    ]
    group_by = usage_pb2.GroupBy(key="status", values=["a", "b"])
    assert list(server.requests[0].billable_metrics) == [usage_pb2.BillableMetricSelector(id=METRIC, group_by=group_by)]


def test_usage_as_a_table(server: Server) -> None:
    """The table shows every digit, a bar, no usage as such, and what is incomplete or skipped."""
    result = server.run([*RANGE], LIST_USAGE, two_pages())
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("2026")]
    assert rows == [
        ["2026-01-01", EXACT, "█" * 16],
        ["2026-01-02", "no", "usage"],
        ["2026-01-03", "-0.5", "incomplete,", "2", "skipped"],
    ]
    assert "api, calls" in result.stdout


def test_table_says_that_there_is_more(server: Server) -> None:
    """A table stops at --limit and says so only if there is more."""
    windows = [window(1, "1"), window(2, "2"), window(3, "3")]
    for limit, more in (("2", True), ("3", False)):
        answer = in_turn(usage_pb2.ListUsageResponse(windows=windows))
        result = server.run([*RANGE, "--limit", limit], LIST_USAGE, answer)
        assert ("there are more" in result.stderr, result.stdout.count("2026-01")) == (more, int(limit))
        assert server.requests[-1].page_size == int(limit) + 1


@pytest.mark.parametrize(
    ("text", "time_zone", "instant"),
    [
        ("2026-01-01", "", "2026-01-01T00:00:00Z"),
        ("2026-01-01", "Asia/Kolkata", "2025-12-31T18:30:00Z"),
        ("2018-11-04", "America/Sao_Paulo", "2018-11-04T03:00:00Z"),  # this day began at 01:00
        ("2026-01-01T00:00:00+05:30", "", "2025-12-31T18:30:00Z"),
    ],
)
def test_bounds_are_instants_or_local_dates(server: Server, text: str, time_zone: str, instant: str) -> None:
    """A date means the first instant of that day in --time-zone, which goes to the server too."""
    command = ["usage", "--window", "none", "--from", text, "--to", "2030-01-01", "--time-zone", time_zone]
    server.run(command, LIST_USAGE, in_turn(usage_pb2.ListUsageResponse()))
    assert (server.requests[0].starting_on.ToJsonString(), server.requests[0].time_zone) == (instant, time_zone)


@pytest.mark.parametrize(
    "options",
    [
        ["--from", "yesterday"],
        ["--from", "2026-02-30"],
        ["--from", "2026-01-01T00:00:00"],
        ["--time-zone", "Mars/Olympus"],
        ["--value", "a"],
        ["--group-by", "status"],
    ],
)
def test_usage_errors_are_found_before_any_call(server: Server, options: list[str]) -> None:
    """What cannot be meant is a usage error, exit code 2."""
    assert server.run([*RANGE, *options], LIST_USAGE, in_turn()).exit_code == 2


def test_usage_failure_is_told(server: Server) -> None:
    """A refused query prints the error, with how long to wait, and ends with exit code 3."""
    refusal = Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "still counting",
        (
            error_details_pb2.ErrorInfo(reason="METRIC_BACKFILLING", domain="metering"),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2)),
        ),
    )
    result = server.run(RANGE, LIST_USAGE, in_turn(refusal))
    assert result.exit_code == 3
    assert result.stderr == (
        "error: FAILED_PRECONDITION (METRIC_BACKFILLING): still counting\nhint: the server asks to try again in 2 s\n"
    )


# ---------------------------------------------------------------- health


def serving(request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
    """Says that all is well."""
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


def test_health_asks_for_every_service(server: Server) -> None:
    """Without options health asks for the process and the four services, each under the deadline."""
    result = server.run(["health"], CHECK, serving)
    assert result.exit_code == 0
    assert [request.service for request in server.requests] == [
        "",
        "metering.v1.EventService",
        "metering.v1.BillableMetricService",
        "metering.v1.CustomerService",
        "metering.v1.UsageService",
    ]
    assert server.channel.timeouts == [5.0] * 5


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
