"""Streams a month of events in and its usage out, with asyncio. A broken connection costs a resend, never a number.

    pip install .                                   # in the repository: brings the stubs, `metering.v1`
    metering serve                                  # in another terminal
    python examples/python_async/main.py            # as often as you like: nothing counts twice

It calls METERING_ADDRESS (localhost:50051) with METERING_API_KEY, if there is one.
"""

import asyncio
import os
import random
import sys
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, localcontext
from typing import Any

import grpc

from metering.v1 import (
    billable_metric_pb2,
    billable_metric_pb2_grpc,
    customer_pb2,
    customer_pb2_grpc,
    event_pb2,
    event_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)

# Ids of our own make creations safe to retry. Yours come from where you keep your customers.
METRIC = billable_metric_pb2.BillableMetric(
    id="6f1c2a52-5d0e-4f7b-9c57-0a1b8a3d9e10",
    name="Example downloads",
    aggregation_type=billable_metric_pb2.AGGREGATION_TYPE_SUM,
    aggregation_key="bytes",
    event_type_filter=billable_metric_pb2.EventTypeFilter(in_values=["download"]),
)
CUSTOMERS = {
    "globex": "0b6e3c1e-94c4-4d0a-8f4e-3f6a52b7c101",
    "initech": "0b6e3c1e-94c4-4d0a-8f4e-3f6a52b7c102",
    "umbrella": "0b6e3c1e-94c4-4d0a-8f4e-3f6a52b7c103",
}
START, HOURS, BATCH = datetime(2026, 1, 1, tzinfo=UTC), 31 * 24, 200
ADDRESS = os.environ.get("METERING_ADDRESS", "localhost:50051")
KEY = os.environ.get("METERING_API_KEY")
# The deadline also ends a call whose connection went silent. A stream that it cuts is resumed like any other.
CALL: dict[str, Any] = {"timeout": 60, "metadata": (("authorization", f"Bearer {KEY}"),) if KEY else ()}
STORED = {event_pb2.VERDICT_ACCEPTED, event_pb2.VERDICT_DUPLICATE}  # now, or by a call before
# Some of these were never begun, of others the outcome is unknown, and proxies turn broken connections into INTERNAL
# and UNKNOWN: do the same again. Anything else, such as a bad field or a bad key, would only fail again.
RETRYABLE = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED", "RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN"}


class Attempt:
    """A block that may be entered again: later after each failure in a row, and not after the sixth."""

    def __init__(self, what: str, *retryable: str) -> None:
        self.what, self.retryable, self.failures = what, RETRYABLE.union(retryable), 0

    async def __aenter__(self) -> None:
        if self.failures > 6:
            raise ConnectionError(f"{self.what}: every stream ended before its end")
        if self.failures:  # with jitter: clients that failed together must not come back together
            await asyncio.sleep(random.uniform(0.5, 1) * min(5, 0.1 * 2**self.failures))  # noqa: S311

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.failures += 1
        if not isinstance(error, grpc.aio.AioRpcError) or error.code().name not in self.retryable or self.failures > 6:
            return False
        print(f"{self.what}: again after {error.code().name}: {error.details()}", file=sys.stderr)
        return True


async def create_catalog(channel: grpc.aio.Channel) -> None:
    """Create the metric, which says what counts, and the customers for whom it counts. Again changes nothing."""
    metrics = billable_metric_pb2_grpc.BillableMetricServiceStub(channel)
    customers = customer_pb2_grpc.CustomerServiceStub(channel)
    todo: list[Any] = [
        (metrics.CreateBillableMetric, billable_metric_pb2.CreateBillableMetricRequest(billable_metric=METRIC))
    ]
    for name, customer_id in CUSTOMERS.items():
        customer = customer_pb2.Customer(id=customer_id, name=name, ingest_aliases=[name])  # events use the alias
        todo.append((customers.CreateCustomer, customer_pb2.CreateCustomerRequest(customer=customer)))
    for create, request in todo:
        created, attempt = None, Attempt("creating")
        while not created:
            async with attempt:
                created = await create(request, **CALL)


def make_events() -> list[event_pb2.UsageEvent]:
    """A download per customer and hour, in place of what your service has seen."""
    events = []
    for hour in range(HOURS):
        for number, customer in enumerate(CUSTOMERS, start=1):
            event = event_pb2.UsageEvent(customer_id=customer, event_type="download")
            # Made of what identifies the fact, so the same after a crash. A random id must be kept with its event.
            event.transaction_id = f"download-{customer}-{hour}"
            event.timestamp.FromDatetime(START + timedelta(hours=hour))
            # A string is exact at any length; a JSON number only as far as a double is.
            event.properties["bytes"] = str(1000 * (hour // 24 + 1) + 10 * (hour % 24) + number)
            events.append(event)
    return events


async def send(channel: grpc.aio.Channel, events: list[event_pb2.UsageEvent]) -> int:
    """Stream events in batches; those not answered when a stream breaks are sent again. Returns how many are stored."""
    stub = event_pb2_grpc.EventServiceStub(channel)
    batches = [events[i : i + BATCH] for i in range(0, len(events), BATCH)]
    stored, answered, attempt = 0, 0, Attempt("sending")
    while answered < len(batches):
        numbered = enumerate(batches[answered:], start=1)  # every stream counts from 1
        requests = (event_pb2.StreamEventsRequest(sequence=number, events=batch) for number, batch in numbered)
        async with attempt:
            async for answer in stub.StreamEvents(requests, **CALL):  # draws from requests as the server reads
                for issue in answer.issues:  # the fault of one event; the others are stored all the same
                    name = batches[answered][issue.index].transaction_id
                    print(f"not stored: {name}: {issue.field}: {issue.message}", file=sys.stderr)
                stored += sum(verdict in STORED for verdict in answer.verdicts)
                answered += 1  # answers come in the order of the batches
                attempt.failures = 0
    return stored


async def total_per_day(channel: grpc.aio.Channel) -> dict[date, Decimal]:
    """Stream the usage of every hour, and resume after the last message received until one says `complete`."""
    stub = usage_pb2_grpc.UsageServiceStub(channel)
    request = usage_pb2.StreamUsageRequest(
        billable_metrics=[usage_pb2.BillableMetricSelector(id=METRIC.id)],
        customer_ids=CUSTOMERS.values(),
        window_size=usage_pb2.WINDOW_SIZE_HOUR,
    )
    request.starting_on.FromDatetime(START)
    request.ending_before.FromDatetime(START + timedelta(hours=HOURS))
    totals: dict[date, Decimal] = defaultdict(Decimal)
    # FAILED_PRECONDITION: a metric just created may still be counting the events of the past.
    windows, complete, attempt = 0, False, Attempt("reading", "FAILED_PRECONDITION")
    while not complete:
        async with attempt:
            if request.resume_token:
                print(f"resuming after {windows} windows", file=sys.stderr)
            async for message in stub.StreamUsage(request, **CALL):
                for window in message.windows:
                    totals[window.starting_on.ToDatetime(UTC).date()] += Decimal(window.value or 0)  # unset = no usage
                windows += len(message.windows)
                # A program that keeps its totals in a database writes the token there in the same transaction.
                request.resume_token, complete = message.resume_token, message.complete
                attempt.failures = 0
    return totals


async def main() -> None:
    """Create, send, read."""
    async with grpc.aio.insecure_channel(ADDRESS) as channel:
        await create_catalog(channel)
        events = make_events()
        stored = await send(channel, events)
        print(f"stored {stored} of {len(events)} events")
        totals = await total_per_day(channel)
    for day, total in sorted(totals.items()):
        print(f"{day} {total:f}")
    print(f"total {sum(totals.values()):f}")
    if stored < len(events):
        sys.exit("some events were not stored, see above")


if __name__ == "__main__":
    try:
        with localcontext(prec=60):  # exact sums of values of up to 38 digits
            asyncio.run(main())
    except grpc.aio.AioRpcError as error:
        sys.exit(f"failed at {ADDRESS}: {error.code().name}: {error.details()}")
