"""Sends events by plain calls, reads every verdict, pages through usage, and reads what an error says.

    pip install .                                   # in the repository: brings the stubs, `metering.v1`
    metering serve                                  # in another terminal
    python examples/python_sync/main.py             # as often as you like: nothing counts twice

It calls METERING_ADDRESS (localhost:50051) with METERING_API_KEY, if there is one.
"""

import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Set
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, localcontext
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from metering.v1 import (
    billable_metric_pb2,
    billable_metric_pb2_grpc,
    customer_pb2,
    customer_pb2_grpc,
    error_reason_pb2,
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
START, DAYS = datetime(2026, 1, 1, tzinfo=UTC), 31
ADDRESS = os.environ.get("METERING_ADDRESS", "localhost:50051")
KEY = os.environ.get("METERING_API_KEY")
CALL: dict[str, Any] = {"timeout": 30, "metadata": (("authorization", f"Bearer {KEY}"),) if KEY else ()}
# Some of these were never begun, of others the outcome is unknown, and proxies turn broken connections into INTERNAL
# and UNKNOWN: do the same again. Anything else, such as a bad field or a bad key, would only fail again.
RETRYABLE = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED", "RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN"}
# A metric just created may still be counting the events of the past.
RETRYABLE_READING = RETRYABLE | {"FAILED_PRECONDITION"}


def call(method: Any, request: Any, retryable: Set[str] = RETRYABLE) -> Any:
    """Call, and call again with the same request, so with the same ids: safe for every call that is made here.

    By hand, since gRPC's own retryPolicy gives up on an answer whose headers have come and whose rest was lost.
    """
    for failures in range(1, 8):
        try:
            return method(request, **CALL)
        except grpc.RpcError as error:
            if error.code().name not in retryable or failures == 7:
                raise
            print(f"again after {error.code().name}: {error.details()}", file=sys.stderr)
        # With jitter: clients that failed together must not come back together.
        time.sleep(random.uniform(0.5, 1) * min(5, 0.1 * 2**failures))  # noqa: S311
    raise AssertionError("unreachable")


def create_catalog(channel: grpc.Channel) -> None:
    """Create the metric, which says what counts, and the customers for whom it counts. Again changes nothing."""
    metrics = billable_metric_pb2_grpc.BillableMetricServiceStub(channel)
    call(metrics.CreateBillableMetric, billable_metric_pb2.CreateBillableMetricRequest(billable_metric=METRIC))
    customers = customer_pb2_grpc.CustomerServiceStub(channel)
    for name, customer_id in CUSTOMERS.items():
        customer = customer_pb2.Customer(id=customer_id, name=name, ingest_aliases=[name])  # events use the alias
        call(customers.CreateCustomer, customer_pb2.CreateCustomerRequest(customer=customer))


def make_events(day: int) -> Iterator[event_pb2.UsageEvent]:
    """A download per customer and hour, in place of what your service has seen."""
    for hour in range(24 * day, 24 * day + 24):
        for number, customer in enumerate(CUSTOMERS, start=1):
            event = event_pb2.UsageEvent(customer_id=customer, event_type="download")
            # Made of what identifies the fact, so the same after a crash. A random id must be kept with its event.
            event.transaction_id = f"download-{customer}-{hour}"
            event.timestamp.FromDatetime(START + timedelta(hours=hour))
            # A string is exact at any length; a JSON number only as far as a double is.
            event.properties["bytes"] = str(1000 * (day + 1) + 10 * (hour % 24) + number)
            yield event


def send(channel: grpc.Channel) -> None:
    """Send a batch per day, and two events that are wrong on purpose; say what became of them."""
    stub = event_pb2_grpc.EventServiceStub(channel)
    verdicts: dict[str, int] = defaultdict(int)
    for day in range(DAYS):
        events = list(make_events(day))
        if day == 0:
            no_time = event_pb2.UsageEvent(transaction_id="no-time", customer_id="globex", event_type="download")
            changed = event_pb2.UsageEvent()
            changed.CopyFrom(events[0])  # the id of another event, with other content
            changed.properties["bytes"] = "999999"
            events += [no_time, changed]
        answer = call(stub.IngestEvents, event_pb2.IngestEventsRequest(events=events))
        for verdict in answer.verdicts:  # in the order of the events
            stored = verdict in {event_pb2.VERDICT_ACCEPTED, event_pb2.VERDICT_DUPLICATE}  # now, or by a call before
            verdicts["stored" if stored else event_pb2.Verdict.Name(verdict)] += 1
        for issue in answer.issues:  # why CONFLICT or REJECTED; sending these again would not help
            reason = error_reason_pb2.ErrorReason.Name(issue.reason)
            print(f"{events[issue.index].transaction_id}: {reason} {issue.field}")
    print(", ".join(f"{count} {name}" for name, count in verdicts.items()))


def total_per_day(channel: grpc.Channel) -> dict[date, Decimal]:
    """Read the days of all customers, page by page."""
    stub = usage_pb2_grpc.UsageServiceStub(channel)
    request = usage_pb2.ListUsageRequest(
        billable_metrics=[usage_pb2.BillableMetricSelector(id=METRIC.id)],
        customer_ids=CUSTOMERS.values(),
        window_size=usage_pb2.WINDOW_SIZE_DAY,
        page_size=50,  # to see more than one page; the default is 1,000
    )
    request.starting_on.FromDatetime(START)
    request.ending_before.FromDatetime(START + timedelta(days=DAYS))
    totals: dict[date, Decimal] = defaultdict(Decimal)
    while True:
        page = call(stub.ListUsage, request, RETRYABLE_READING)
        for window in page.windows:
            totals[window.starting_on.ToDatetime(UTC).date()] += Decimal(window.value or 0)  # unset = no usage
        if not page.next_page_token:  # only this ends it: a page may be short, or even empty
            return totals
        request.page_token = page.next_page_token


def explain(error: Any) -> str:  # an RpcError that is also a Call, which its type does not say
    """What an error says: `reason` is for programs and stays the same, the texts are for people."""
    lines = [f"{error.code().name}: {error.details()}"]
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            lines.append(f"  reason {info.reason}")
        elif detail.Unpack(bad_request):
            lines += [f"  field {fault.field}: {fault.description}" for fault in bad_request.field_violations]
    return "\n".join(lines)


def main() -> None:
    """Create, send, read, and fail once on purpose."""
    with grpc.insecure_channel(ADDRESS) as channel:
        create_catalog(channel)
        send(channel)
        totals = total_per_day(channel)
        for day, total in sorted(totals.items()):
            print(f"{day} {total:f}")
        print(f"total {sum(totals.values()):f}")
        try:
            call(usage_pb2_grpc.UsageServiceStub(channel).ListUsage, usage_pb2.ListUsageRequest())
        except grpc.RpcError as error:
            print(explain(error))


if __name__ == "__main__":
    try:
        with localcontext(prec=60):  # exact sums of values of up to 38 digits
            main()
    except grpc.RpcError as error:
        sys.exit(f"failed at {ADDRESS}: {explain(error)}")
