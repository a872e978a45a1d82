"""Claims about `metering ingest`: against a scripted server on a real socket, cut wherever a stream can be cut."""

import asyncio
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from conftest import start_server
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from scripted import Play, Refusal, ScriptedServer, refused, silent

from metering.v1 import error_reason_pb2, event_pb2
from service.cli import client, delivery, ingest, main

RETRYABLE = ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED", "RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN"]
GONE = Refusal(grpc.StatusCode.UNAVAILABLE, "gone")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    """A server that plays; waits between tries are too short to notice. In the end no thread is left."""
    monkeypatch.delenv("METERING_ADDRESS", raising=False)
    monkeypatch.delenv("METERING_API_KEY", raising=False)
    monkeypatch.setattr(client, "BACKOFF_FIRST_S", 0.01)
    before = set(threading.enumerate())
    with ScriptedServer(tmp_path) as server:
        yield server
    until = time.monotonic() + 5
    # The server's own workers stay until the process ends.
    while left := {new for new in set(threading.enumerate()) - before if "ThreadPoolExecutor" not in new.name}:
        assert time.monotonic() < until, left
        time.sleep(0.01)


class Ledger:
    """What a server stored: the content that came first under each id, in order, and how often."""

    def __init__(self) -> None:
        self.stored: dict[str, event_pb2.UsageEvent] = {}

    def store(self, request: event_pb2.StreamEventsRequest) -> event_pb2.StreamEventsResponse:
        """Stores a batch and gives the answer to it."""
        verdicts = []
        for event in request.events:
            known = self.stored.setdefault(event.transaction_id, event)
            if known is event:
                verdicts.append(event_pb2.VERDICT_ACCEPTED)
            else:
                verdicts.append(event_pb2.VERDICT_DUPLICATE if known == event else event_pb2.VERDICT_CONFLICT)
        return event_pb2.StreamEventsResponse(sequence=request.sequence, verdicts=verdicts)

    def play(self, answers: int | None = None, then: Refusal | None = None, lost: int = 0) -> Play:
        """Answers so many batches (None = all), stores `lost` more unanswered, and ends as told (None = OK)."""

        def play(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[event_pb2.StreamEventsResponse]:
            for request in itertools.islice(requests, answers):
                yield self.store(request)
            for request in itertools.islice(requests, lost):
                self.store(request)
            if then is not None:
                then.raise_in(context)

        return play


def taken(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[event_pb2.StreamEventsResponse]:
    """Takes every event as new."""
    for request in requests:
        verdicts = [event_pb2.VERDICT_ACCEPTED] * len(request.events)
        yield event_pb2.StreamEventsResponse(sequence=request.sequence, verdicts=verdicts)


def answering(*responses: event_pb2.StreamEventsResponse) -> Play:
    """Answers each batch with the next of these."""

    def play(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[event_pb2.StreamEventsResponse]:
        for response, _ in zip(responses, requests, strict=False):
            yield response
        for _ in requests:
            pass

    return play


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


def ids(request: event_pb2.StreamEventsRequest) -> list[str]:
    """Transaction ids of a request."""
    return [found.transaction_id for found in request.events]


def totals(result: Result) -> dict[str, int]:
    """The totals that ingest prints."""
    return {name: int(count) for name, count in (line.split() for line in result.stdout.splitlines())}


class Input(io.BytesIO):
    """Standard input that calls `before` with the number of each line, from 1, when it is asked for."""

    def __init__(self, text: str, before: Any) -> None:
        super().__init__(text.encode())
        self.asked = 0
        self._before = before

    def readline(self, size: int | None = -1, /) -> bytes:
        """The next line."""
        self.asked += 1
        self._before(self.asked)
        return super().readline(size)


def wait_until(condition: Any) -> None:
    """Waits until it holds; fails after ten seconds."""
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.005)


# ---------------------------------------------------------------- what is sent


def test_ingest_sends_what_the_lines_say(server: ScriptedServer) -> None:
    """A line becomes one event with exact instant and properties, signed in, over a stream without a deadline."""
    line = json.dumps(
        event(timestamp="2026-01-01T05:30:00.123456789+05:30", properties={"a": 1.5, "b": None, "c": [True]})
    )
    result = server.run(["ingest", "-", "--api-key", " key ", "--timeout", "7"], taken, stdin=line)
    expected = event_pb2.UsageEvent(
        transaction_id="t1",
        customer_id="acme",
        event_type="call",
        timestamp=Timestamp(seconds=1767225600, nanos=123456789),
    )
    expected.properties.update({"a": 1.5, "b": None, "c": [True]})
    assert (result.exit_code, totals(result)["accepted"]) == (0, 1)
    (call,) = server.calls
    assert call.requests == [event_pb2.StreamEventsRequest(sequence=1, events=[expected])]
    assert call.metadata["authorization"] == "Bearer key"
    assert call.time_remaining is None or call.time_remaining > 10**6


def test_batches_are_numbered_on_one_stream(server: ScriptedServer) -> None:
    """However many batches there are, they go over one stream, numbered from 1, in the order of the file."""
    result = server.run(["ingest", "-", "--batch-size", "2"], taken, stdin=lines(39))
    (call,) = server.calls
    assert [request.sequence for request in call.requests] == list(range(1, 21))
    assert [found for request in call.requests for found in ids(request)] == [f"t{number}" for number in range(1, 40)]
    assert (result.exit_code, totals(result)["accepted"], result.stderr) == (0, 39, "")


@pytest.mark.parametrize(("blob", "batch_size", "most"), [(1, 1, delivery.UNANSWERED_MAX), (400_000, 7, 2)])
def test_no_more_is_unanswered_than_agreed(server: ScriptedServer, blob: int, batch_size: int, most: int) -> None:
    """At most 8 batches and 8 MiB are on their way unanswered, and as many are, answer after answer."""
    batches = most + 2
    seen: list[int] = []

    def play(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[event_pb2.StreamEventsResponse]:
        came: list[event_pb2.StreamEventsRequest] = []
        reader = threading.Thread(target=lambda: came.extend(requests))
        reader.start()
        for answered in range(batches):
            wait_until(lambda: len(server.calls[0].requests) >= min(batches, answered + most))  # noqa: B023 - at once
            time.sleep(0.1)  # long enough for one too many to come
            seen.append(len(server.calls[0].requests) - answered)
            request = server.calls[0].requests[answered]
            verdicts = [event_pb2.VERDICT_ACCEPTED] * len(request.events)
            yield event_pb2.StreamEventsResponse(sequence=request.sequence, verdicts=verdicts)
        reader.join()

    stdin = lines(batches * batch_size, properties={"blob": "x" * blob})
    result = server.run(["ingest", "-", "--batch-size", str(batch_size)], play, stdin=stdin)
    assert (result.exit_code, totals(result)["accepted"]) == (0, batches * batch_size)
    assert seen == [min(most, batches - answered) for answered in range(batches)]


def test_input_is_not_read_ahead(server: ScriptedServer) -> None:
    """While nothing is answered, no more is read than the window and one batch hold."""
    stdin = Input(lines(1000), lambda number: None)
    command = ["ingest", "-", "--batch-size", "10", "--timeout", "0.3", "--retry-for", "0"]
    result = server.run(command, silent, stdin=stdin)
    assert result.exit_code == 3
    assert stdin.asked <= 10 * (delivery.UNANSWERED_MAX + 1)


def test_lines_without_events_open_no_stream(server: ScriptedServer) -> None:
    """Twenty issues are shown and the others counted, with no call for lines that make no event."""
    result = server.run(["ingest", "-", "--batch-size", "3"], stdin="x\n" * 25)
    assert (result.exit_code, totals(result)["rejected"], server.calls) == (1, 25, [])
    assert result.stderr.splitlines()[19:] == [
        "line 20: REJECTED MALFORMED_LINE line: not valid JSON: Expecting value: line 1 column 1 (char 0)",
        "… and 5 more",
    ]


def test_batches_without_events_keep_their_place(server: ScriptedServer) -> None:
    """Lines that make no event are told in the order of the file and take no number of the stream, cut or not."""
    good = lines(8).splitlines(keepends=True)
    stdin = "x\n" + "".join(line + "x\nx\n" for line in good)
    ledger = Ledger()
    shown = [f"line {number}" for number in range(1, 26) if (number - 2) % 3]
    result = server.run(["ingest", "-", "--batch-size", "1"], ledger.play(3, GONE, lost=2), ledger.play(), stdin=stdin)
    told = [line.split(":")[0] for line in result.stderr.splitlines() if line.startswith("line")]
    assert (result.exit_code, told) == (1, shown)
    assert totals(result) == {"accepted": 3 + 3, "duplicate": 2, "conflict": 0, "rejected": 17}
    assert [request.sequence for request in server.calls[1].requests] == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------- what is answered


@pytest.mark.parametrize(
    ("verdict", "exit_code"), [("ACCEPTED", 0), ("DUPLICATE", 0), ("CONFLICT", 1), ("REJECTED", 1)]
)
def test_exit_code_follows_the_verdicts(server: ScriptedServer, verdict: str, exit_code: int) -> None:
    """Duplicates are success; a conflict or a rejection is not."""
    verdicts = [event_pb2.VERDICT_ACCEPTED, event_pb2.Verdict.Value(f"VERDICT_{verdict}")]
    response = event_pb2.StreamEventsResponse(sequence=1, verdicts=verdicts)
    result = server.run(["ingest", "-"], answering(response), stdin=lines(2))
    assert result.exit_code == exit_code
    assert totals(result)[verdict.lower()] == (2 if verdict == "ACCEPTED" else 1)


def test_issues_name_their_lines(server: ScriptedServer, tmp_path: Path) -> None:
    """Issues of the server and of the client are told with line numbers, in order, and written to --issues."""
    response = event_pb2.StreamEventsResponse(
        sequence=1,
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
    result = server.run(["ingest", "-", "--issues", str(path)], answering(response), stdin=stdin)
    issues = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert result.exit_code == 1
    assert totals(result) == {"accepted": 1, "duplicate": 0, "conflict": 0, "rejected": 2}
    assert [(issue["line"], issue["transaction_id"], issue["reason"], issue["field"]) for issue in issues] == [
        (3, None, "MALFORMED_LINE", "line"),
        (4, "b", "TIMESTAMP_TOO_FAR_AHEAD", "timestamp"),
    ]
    assert "line 4: REJECTED TIMESTAMP_TOO_FAR_AHEAD timestamp: too far \\x1b[31m" in result.stderr


def test_issues_never_overwrite_the_input(server: ScriptedServer, tmp_path: Path) -> None:
    """--issues with the input's own path is refused and the input kept."""
    path = tmp_path / "events.jsonl"
    path.write_text(lines(1))
    result = server.run(["ingest", str(path), "--issues", str(path)], taken)
    assert (result.exit_code, path.read_text()) == (2, lines(1))


@pytest.mark.parametrize("sequences", [[2], [1, 3], [1, 1], [0], [1, 2, 3, 4], [-1]])
def test_answers_out_of_order_make_no_sense(server: ScriptedServer, sequences: list[int]) -> None:
    """An answer to another batch than the first unanswered one ends ingest, and counts nowhere."""
    responses = [
        event_pb2.StreamEventsResponse(sequence=sequence, verdicts=[event_pb2.VERDICT_ACCEPTED])
        for sequence in sequences
    ]

    def play(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[event_pb2.StreamEventsResponse]:
        list(itertools.islice(requests, 3))
        yield from responses

    result = server.run(["ingest", "-", "--batch-size", "1"], play, stdin=lines(3))
    good = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(sequences, [1, 2, 3], strict=False)))
    assert (result.exit_code, totals(result)["accepted"]) == (3, len(good))
    assert f"Error: the server answered batch {sequences[len(good)]} when " in result.stderr


@pytest.mark.parametrize("verdicts", [[], [1], [1, 1, 1], [1, 0], [1, 99]])
def test_answer_without_a_verdict_per_event_is_a_failure(server: ScriptedServer, verdicts: list[Any]) -> None:
    """An answer that leaves an event without verdict, or has one too many, is never taken for success."""
    response = event_pb2.StreamEventsResponse(sequence=1, verdicts=verdicts)
    result = server.run(["ingest", "-"], answering(response), stdin=lines(2))
    assert (result.exit_code, totals(result)["accepted"]) == (3, 0)
    assert "Running the same input again is safe" in result.stderr


# ---------------------------------------------------------------- cuts


@pytest.mark.parametrize("lost", [0, 1, 3])
@pytest.mark.parametrize("answers", range(6))
def test_a_cut_after_any_answer_loses_and_doubles_nothing(server: ScriptedServer, answers: int, lost: int) -> None:
    """Cut after k answers, with more stored than answered, just the unanswered go out again, in order, from 1."""
    ledger = Ledger()
    command = ["ingest", "-", "--batch-size", "2"]
    result = server.run(command, ledger.play(answers, GONE, lost), ledger.play(), stdin=lines(11))
    lost_events = len([number for number in range(1, 12) if 2 * answers < number <= 2 * (answers + lost)])
    assert result.exit_code == 0
    assert list(ledger.stored) == [f"t{number}" for number in range(1, 12)]
    assert totals(result) == {"accepted": 11 - lost_events, "duplicate": lost_events, "conflict": 0, "rejected": 0}
    resent = server.calls[1].requests
    assert [request.sequence for request in resent] == list(range(1, 7 - answers))
    assert [found for request in resent for found in ids(request)] == [f"t{n}" for n in range(2 * answers + 1, 12)]
    assert result.stderr.startswith(
        "UNAVAILABLE: sending again what was not answered in 0.0 s\nsending began again 1 t"
    )


@pytest.mark.parametrize("code", RETRYABLE)
def test_unknown_outcome_resends_the_same_batch(server: ScriptedServer, code: str) -> None:
    """After a failure of unknown outcome exactly the same events go out again, to the last byte."""
    ledger = Ledger()
    cut = ledger.play(1, Refusal(grpc.StatusCode[code]), lost=1)
    result = server.run(["ingest", "-", "--batch-size", "2"], cut, ledger.play(), stdin=lines(6))
    assert (result.exit_code, totals(result)["accepted"], totals(result)["duplicate"]) == (0, 4, 2)
    first, second = server.calls[0].requests[1], server.calls[1].requests[0]
    assert (second.sequence, list(first.events)) == (1, list(second.events))


@pytest.mark.parametrize("answers", range(3))
def test_a_stream_that_ends_early_with_ok_is_cut(server: ScriptedServer, answers: int) -> None:
    """OK says nothing of a batch that was not answered: it is sent again."""
    ledger = Ledger()
    result = server.run(["ingest", "-", "--batch-size", "1"], ledger.play(answers), ledger.play(), stdin=lines(3))
    assert (result.exit_code, totals(result)["accepted"], len(server.calls)) == (0, 3, 2)
    assert list(ledger.stored) == ["t1", "t2", "t3"]


def test_a_stream_that_always_ends_early_is_given_up(server: ScriptedServer) -> None:
    """A server that never answers, always with OK, is a failure and not success."""
    result = server.run(["ingest", "-", "--retry-for", "0"], Ledger().play(0), stdin=lines(1))
    assert (result.exit_code, totals(result)["accepted"]) == (3, 0)
    assert "error: UNKNOWN: the server ended the stream without answering every batch\n" in result.stderr


def test_a_cut_after_the_last_answer_is_no_failure(server: ScriptedServer) -> None:
    """When everything is answered, nothing is sent again however the stream ends."""
    ledger = Ledger()
    result = server.run(["ingest", "-", "--batch-size", "1"], ledger.play(3, GONE), stdin=lines(3))
    assert (result.exit_code, totals(result)["accepted"], result.stderr, len(server.calls)) == (0, 3, "", 1)


def test_a_key_revoked_while_nothing_is_unanswered_ends_the_run(server: ScriptedServer) -> None:
    """A refusal is told although everything was answered, and is not tried again."""
    play = Ledger().play(3, Refusal(grpc.StatusCode.UNAUTHENTICATED))
    result = server.run(["ingest", "-", "--batch-size", "1"], play, stdin=lines(3))
    assert (result.exit_code, totals(result)["accepted"], len(server.calls)) == (3, 3, 1)


def test_a_silent_server_is_cut(server: ScriptedServer) -> None:
    """A stream on which nothing is answered for --timeout seconds is replaced, and what it left is sent again."""
    ledger = Ledger()

    def answers_one(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        yield ledger.store(next(requests))
        yield from silent(requests, context)

    command = ["ingest", "-", "--batch-size", "1", "--timeout", "0.3"]
    result = server.run(command, answers_one, ledger.play(), stdin=lines(3))
    assert (result.exit_code, totals(result)["accepted"], len(server.calls)) == (0, 3, 2)
    assert "DEADLINE_EXCEEDED: sending again" in result.stderr


def test_a_server_that_stays_silent_is_given_up(server: ScriptedServer) -> None:
    """Silence that outlasts --retry-for ends ingest with exit code 3 and the advice to look at --timeout."""
    command = ["ingest", "-", "--timeout", "0.2", "--retry-for", "0.1"]
    result = server.run(command, silent, silent, stdin=lines(1))
    assert (result.exit_code, len(server.calls)) == (3, 2)
    assert "error: DEADLINE_EXCEEDED: no answer for 0.2 s\nhint: no answer within --timeout 0.2 s\n" in result.stderr


def test_a_stream_outlives_the_timeout(server: ScriptedServer) -> None:
    """Only silence is timed: neither slow answers nor an input that pauses end a stream after --timeout seconds."""

    def slow(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for answer in taken(requests, context):
            time.sleep(0.25)
            yield answer

    stdin = Input(lines(4), lambda number: time.sleep(1.3 if number == 3 else 0))
    result = server.run(["ingest", "-", "--batch-size", "1", "--timeout", "0.5"], slow, stdin=stdin)
    assert (result.exit_code, totals(result)["accepted"], len(server.calls)) == (0, 4, 1)


def test_a_cut_is_mended_while_the_input_pauses(server: ScriptedServer) -> None:
    """What was cut is stored before the next line comes, be it hours later."""
    ledger = Ledger()
    stdin = Input(lines(3), lambda number: wait_until(lambda: "t2" in ledger.stored) if number == 3 else None)
    result = server.run(["ingest", "-", "--batch-size", "1"], ledger.play(1, GONE), ledger.play(), stdin=stdin)
    assert (result.exit_code, totals(result)["accepted"]) == (0, 3)


def test_a_cut_while_nothing_is_unanswered_is_no_failure(server: ScriptedServer) -> None:
    """A server may end an idle stream, as one that drains does: the next batch quietly opens another."""
    ended = threading.Event()
    ledger = Ledger()

    def idle(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        yield ledger.store(next(requests))
        context.add_callback(ended.set)
        GONE.raise_in(context)

    def pause(number: int) -> None:
        if number == 2:
            assert ended.wait(10)
            time.sleep(0.2)  # for the end to arrive

    stdin = Input(lines(2), pause)
    result = server.run(["ingest", "-", "--batch-size", "1", "--retry-for", "0"], idle, ledger.play(), stdin=stdin)
    assert (result.exit_code, totals(result)["accepted"], result.stderr) == (0, 2, "")
    assert [request.sequence for request in server.calls[1].requests] == [1]


def test_progress_starts_the_clock_again(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """--retry-for counts from the first failure without an answer since: a lame server is not given up."""
    clock = itertools.count(0, 5)
    monkeypatch.setattr(client, "monotonic", lambda: next(clock))
    ledger = Ledger()
    lame = [ledger.play(1, GONE)] * 6
    result = server.run(["ingest", "-", "--batch-size", "1", "--retry-for", "3"], *lame, stdin=lines(6))
    assert (result.exit_code, totals(result)["accepted"], len(server.calls)) == (0, 6, 6)


def test_retry_gives_up(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """When --retry-for has passed, ingest ends with exit code 3, says how far it came and that a rerun is safe."""
    clock = itertools.count(0, 5)
    monkeypatch.setattr(client, "monotonic", lambda: next(clock))
    failures = [refused(GONE)] * 20
    command = ["ingest", "-", "--batch-size", "1", "--retry-for", "12"]
    result = server.run(command, Ledger().play(1, GONE), *failures, stdin=lines(3))
    assert (result.exit_code, totals(result)["accepted"], len(server.calls)) == (3, 1, 4)
    assert "1 lines were acknowledged. Running the same input again is safe" in result.stderr
    assert "error: UNAVAILABLE: gone\nhint: is the server running at unix:" in result.stderr


def test_backoff_grows_and_honours_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits double from half a second to ten, start no earlier than RetryInfo asks, and begin anew after progress."""
    monkeypatch.setattr(client, "uniform", lambda low, high: high)

    class Failure(client.CutShort):
        def __init__(self, *details: Any) -> None:
            super().__init__(grpc.StatusCode.UNAVAILABLE, "gone")
            self._trailing = Refusal(grpc.StatusCode.UNAVAILABLE, "gone", details).trailing_metadata()

        def trailing_metadata(self) -> Any:
            return self._trailing

    asks = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=3, nanos=500_000_000))
    retry = client.Retry(60)
    assert [retry.delay_s(Failure(*details)) for details in [(), (), (asks,), (), (), ()]] == [0.5, 1, 5.5, 4, 8, 10]
    retry.progressed()
    assert retry.delay_s(Failure()) == 0.5


def test_answers_before_the_end_are_counted(server: ScriptedServer) -> None:
    """A stream that ends for good still counts what it answered before, is not tried again, and is explained."""
    violation = error_details_pb2.BadRequest.FieldViolation(field="events", description="too many")
    refusal = Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "bad request",
        (
            error_details_pb2.ErrorInfo(reason="LIMIT_EXCEEDED", domain="metering"),
            error_details_pb2.BadRequest(field_violations=[violation]),
        ),
    )
    result = server.run(["ingest", "-", "--batch-size", "2"], Ledger().play(2, refusal), stdin=lines(8))
    assert (result.exit_code, totals(result)["accepted"], len(server.calls)) == (3, 4, 1)
    assert result.stderr.endswith("error: INVALID_ARGUMENT (LIMIT_EXCEEDED): bad request\n  events: too many\n")


def test_a_message_that_is_its_violation_is_told_once(server: ScriptedServer) -> None:
    """A violation that stands in the message word for word is not printed a second time."""
    violation = error_details_pb2.BadRequest.FieldViolation(field="events", description="too many")
    detail = error_details_pb2.BadRequest(field_violations=[violation])
    refusal = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "events: too many", (detail,))
    result = server.run(["ingest", "-"], refused(refusal), stdin=lines(1))
    assert result.stderr.count("events: too many") == 1


def test_wrong_key_gets_a_hint(server: ScriptedServer) -> None:
    """UNAUTHENTICATED points at --api-key and does not repeat the key."""
    refusal = refused(Refusal(grpc.StatusCode.UNAUTHENTICATED))
    result = server.run(["ingest", "-", "--api-key", "secret"], refusal, stdin=lines(1))
    assert (result.exit_code, "--api-key" in result.stderr, "secret" in result.output) == (3, True, False)


def test_an_older_server_gets_a_hint(server: ScriptedServer) -> None:
    """A server without StreamEvents is not tried again but told to be an older one."""
    result = server.run(["ingest", "-"], refused(Refusal(grpc.StatusCode.UNIMPLEMENTED)), stdin=lines(1))
    assert (result.exit_code, len(server.calls)) == (3, 1)
    assert "is no metering server, or an older one" in result.stderr


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("waiting_for", ["input", "answers", "the next try"])
def test_interrupt_tells_how_far_it_came(server: ScriptedServer, waiting_for: str) -> None:
    """Ctrl-C ends the process at once with exit code 130 and the exact totals, whatever it is waiting for."""
    ledger = Ledger()
    silenced = threading.Event()

    def answers_two(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for request in itertools.islice(requests, 2):
            yield ledger.store(request)
        silenced.set()
        if waiting_for == "the next try":
            wait = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=50))
            Refusal(grpc.StatusCode.UNAVAILABLE, "gone", (wait,)).raise_in(context)
        yield from silent(requests, context)

    server.play(answers_two)
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "ingest", "-", "--batch-size", "1", "--address", server.address],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", "generated"])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        process.stdin.write(lines(2 if waiting_for == "input" else 30))
        process.stdin.flush()
        assert silenced.wait(10)
        time.sleep(0.3)  # for the answers to arrive
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert time.monotonic() - began < 3
        process.stdin.close()
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read().split()[:2] == ["accepted", "2"]
        assert "stopped: 2 lines were acknowledged" in process.stderr.read()


# ---------------------------------------------------------------- lines


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
        request = event_pb2.StreamEventsRequest(events=[parsed])
        assert event_pb2.StreamEventsRequest.FromString(request.SerializeToString()) == request


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


def test_byte_order_mark_is_no_part_of_the_first_event(server: ScriptedServer) -> None:
    """A file that begins with a UTF-8 byte order mark is read like any other."""
    assert server.run(["ingest", "-"], taken, stdin=b"\xef\xbb\xbf" + lines(1).encode()).exit_code == 0


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


# ---------------------------------------------------------------- a real server


async def test_killed_servers_lose_and_double_nothing(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With servers killed and drained in mid-file, every event is stored, answered and counted exactly once."""
    monkeypatch.setattr(client, "BACKOFF_MAX_S", 0.2)
    options = ("--listen", f"unix:{tmp_path}/metering.sock", "--database-url", database_url)
    servers = [start_server(*options)]

    def replace_server(asked: int) -> None:
        if asked % 4000 == 0:
            servers[-1].kill() if asked % 8000 == 0 else servers[-1].stop()
            servers.append(start_server(*options))

    def run(*arguments: str, stdin: Any = "") -> Result:
        return CliRunner().invoke(main, [*arguments, "--address", f"unix:{tmp_path}/metering.sock"], input=stdin)

    try:
        stdin = Input(lines(15_000), replace_server)
        first = await asyncio.to_thread(run, "ingest", "-", "--batch-size", "50", stdin=stdin)
        again = await asyncio.to_thread(run, "ingest", "-", stdin=lines(15_000))
        unmatched = await asyncio.to_thread(run, "events", "unmatched", "--format", "json")
    finally:
        servers[-1].stop()
    assert (first.exit_code, len(servers)) == (0, 4)
    assert "UNAVAILABLE: sending again" in first.stderr
    counts = totals(first)
    assert counts["accepted"] + counts["duplicate"] == 15_000
    assert totals(again)["duplicate"] == 15_000
    assert json.loads(unmatched.stdout)["event_count"] == 15_000
