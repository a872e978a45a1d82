"""Owns the client's side of StreamEvents: batches out and answers back, in order, over as many streams as it takes."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from time import monotonic
from types import TracebackType

import grpc

from metering.v1 import event_pb2, event_pb2_grpc
from service.cli import client

UNANSWERED_MAX = 8
UNANSWERED_BYTES_MAX = 8 * 1024 * 1024

OnAnswer = Callable[[event_pb2.StreamEventsResponse], None]
OnCut = Callable[[grpc.StatusCode, float], None]


@dataclass(slots=True)
class _Batch:
    request: event_pb2.StreamEventsRequest
    on_answer: OnAnswer
    size: int


class Delivery:
    """Gets batches to the server, exactly those that were not answered again after each cut.

    The caller's thread hands over batches and may block elsewhere, on its input, for as long as it likes: a thread of
    the delivery takes the answers and mends the stream meanwhile. Leaving the context ends that thread at once.
    """

    def __init__(
        self, stub: event_pb2_grpc.EventServiceStub, target: client.Target, retry: client.Retry, on_cut: OnCut
    ) -> None:
        self._stub = stub
        self._target = target
        self._retry = retry
        self._on_cut = on_cut
        # Guards all below, and is notified of every change. Only our own thread takes from `_unanswered`.
        self._changed = threading.Condition()
        self._unanswered: deque[_Batch] = deque()
        self._unanswered_bytes = 0
        self._sent = 0  # how many of `_unanswered` are done with on the present stream
        self._input_ended = False
        self._stopped = False
        self._ended = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)

    def __enter__(self) -> "Delivery":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def send(self, request: event_pb2.StreamEventsRequest, on_answer: OnAnswer) -> None:
        """Hands over a batch as soon as there is room; raises what ended the delivery for good.

        `on_answer` is called once, in the order of the batches, by the delivery's thread. A batch without events is
        answered at its turn, without a message.
        """
        batch = _Batch(request, on_answer, request.ByteSize())
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._has_room(batch))
            self._raise_failure()
            self._unanswered.append(batch)
            self._unanswered_bytes += batch.size
            self._changed.notify_all()

    def finish(self) -> None:
        """Returns when every batch is answered; raises what ended the delivery for good."""
        with self._changed:
            self._input_ended = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended)
            self._raise_failure()

    def _has_room(self, batch: _Batch) -> bool:
        count, size = len(self._unanswered), self._unanswered_bytes
        return count == 0 or (count < UNANSWERED_MAX and size + batch.size <= UNANSWERED_BYTES_MAX)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while self._has_work():
                self._deliver()
        except BaseException as failure:  # told to the caller, whatever it is
            self._failure = failure
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _has_work(self) -> bool:
        """Waits for a batch that needs a stream; False when none will come."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unanswered or self._input_ended or self._stopped)
                if self._stopped or not self._unanswered:
                    return False
            self._settle_eventless()
            if self._unanswered:
                return True

    def _deliver(self) -> None:
        """Uses one stream to its end, and after a cut waits until it is time for the next one."""
        stream = _Stream(self._stub, self._target, self._changed)
        try:
            self._converse(stream)
        except grpc.RpcError as error:
            delay_s = self._retry.delay_s(error)
            self._on_cut(client.call_of(error).code(), delay_s)
            with self._changed:
                self._changed.wait_for(lambda: self._stopped, delay_s)
        finally:
            stream.close()

    def _converse(self, stream: "_Stream") -> None:
        """Sends what was not answered and takes the answers; raises RpcError if the stream ended short of one."""
        sequence = 0
        closed = False
        self._sent = 0
        heard_at = monotonic()

        def all_sent() -> bool:
            return self._sent == len(self._unanswered)

        def something_to_do() -> bool:
            to_send = not all_sent() or (self._input_ended and not closed)
            return bool(stream.answers) or stream.ended or self._stopped or to_send

        while True:
            self._settle_eventless()
            with self._changed:
                # Silence counts only while the server owes something, an answer or the end.
                patience_s = heard_at + self._target.timeout_s - monotonic() if self._sent or closed else None
                if not self._changed.wait_for(something_to_do, patience_s):
                    if not self._unanswered:
                        return
                    raise client.CutShort(
                        grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer for {self._target.timeout_s:g} s"
                    )
                answer = stream.answers.popleft() if stream.answers else None
                ended, stopped = stream.ended, self._stopped
            # What was answered before the end, or before a Ctrl-C, counts; so answers go first.
            if answer is not None:
                self._check_order(answer)
                self._settle_first(answer)
                self._retry.progressed()
                heard_at = monotonic()
                continue
            if stopped:
                return
            if ended:
                stream.check_end(bool(self._unanswered))
                return
            with self._changed:
                if not self._sent:
                    heard_at = monotonic()
                while not all_sent():
                    request = self._unanswered[self._sent].request
                    self._sent += 1
                    if request.events:
                        sequence += 1
                        request.sequence = sequence
                        stream.send(request)
                if self._input_ended and not closed:
                    closed = True
                    stream.close_sending()

    def _check_order(self, answer: event_pb2.StreamEventsResponse) -> None:
        expected = self._unanswered[0].request.sequence if self._sent else None
        if answer.sequence != expected:
            raise client.BadAnswer(
                f"the server answered batch {answer.sequence} when "
                + ("no batch was unanswered." if expected is None else f"batch {expected} was next.")
            )

    def _settle_eventless(self) -> None:
        """Answers the batches whose turn it is and that need no server."""
        while self._unanswered and not self._unanswered[0].request.events:
            self._settle_first(event_pb2.StreamEventsResponse())

    def _settle_first(self, answer: event_pb2.StreamEventsResponse) -> None:
        batch = self._unanswered[0]
        batch.on_answer(answer)
        with self._changed:
            self._unanswered.popleft()
            self._unanswered_bytes -= batch.size
            self._sent = max(0, self._sent - 1)
            self._changed.notify_all()


class _Stream:
    """One call of StreamEvents: never blocks its user, and notifies `changed` of what comes in.

    gRPC takes requests in a thread of its own, and gives responses only to who blocks for them, without a limit of
    time; so there is a queue to the one and a thread for the other. Both threads end with `close`.
    """

    def __init__(
        self, stub: event_pb2_grpc.EventServiceStub, target: client.Target, changed: threading.Condition
    ) -> None:
        self.answers: deque[event_pb2.StreamEventsResponse] = deque()
        self.ended = False
        self._error: grpc.RpcError | None = None
        self._changed = changed
        self._requests: SimpleQueue[event_pb2.StreamEventsRequest | None] = SimpleQueue()
        # No deadline: the input may take hours.
        self._call = stub.StreamEvents(iter(self._requests.get, None), metadata=target.metadata)
        self._thread = threading.Thread(target=self._listen, name="delivery-answers", daemon=True)
        self._thread.start()

    def send(self, request: event_pb2.StreamEventsRequest) -> None:
        self._requests.put(request)

    def close_sending(self) -> None:
        self._requests.put(None)

    def close(self) -> None:
        self._call.cancel()
        self._requests.put(None)
        self._thread.join()

    def check_end(self, unanswered: bool) -> None:
        """Raises unless the stream ended so that nothing is left to say: a cut does no harm when all is answered."""
        if self._error is not None:
            if unanswered or client.call_of(self._error).code() not in client.RETRYABLE:
                raise self._error
        elif unanswered:
            raise client.CutShort(grpc.StatusCode.UNKNOWN, "the server ended the stream without answering every batch")

    def _listen(self) -> None:
        error: grpc.RpcError | None = None
        try:
            for answer in self._call:
                with self._changed:
                    self.answers.append(answer)
                    self._changed.notify_all()
        except grpc.RpcError as cut:
            error = cut
        with self._changed:
            self._error = error
            self.ended = True
            self._changed.notify_all()
