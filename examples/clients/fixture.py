"""Makes what the programs for Metronome's SDKs ask for: a customer, a metric and a few events, under the ids they name.

    pip install .                                   # in the repository: brings the stubs, `metering.v1`
    metering serve                                  # in another terminal
    python examples/clients/fixture.py              # as often as you like: nothing counts twice

It calls METERING_ADDRESS (localhost:50051) with METERING_API_KEY, if there is one. By gRPC, as Metronome's API lets
nobody choose the ids of customers and metrics.
"""

import os
import sys
import time
from datetime import UTC, datetime
from typing import Any

import grpc

from metering.v1 import (
    billable_metric_pb2,
    billable_metric_pb2_grpc,
    customer_pb2,
    customer_pb2_grpc,
    event_pb2,
    event_pb2_grpc,
)

METRIC = billable_metric_pb2.BillableMetric(
    id="222796fd-d29c-429e-89b2-549fabda4ed6",
    name="Data transfer",
    aggregation_type=billable_metric_pb2.AGGREGATION_TYPE_SUM,
    aggregation_key="gigabytes",
    event_type_filter=billable_metric_pb2.EventTypeFilter(in_values=["transfer"]),
    group_keys=[billable_metric_pb2.GroupKey(properties=["region"])],
)
CUSTOMER = customer_pb2.Customer(
    id="04ca7e72-4229-4a6e-ab11-9f7376fccbcb", name="Example customer", ingest_aliases=["example@clients.test"]
)
# When, where, and how much: a string is exact at any length.
TRANSFERS = [
    (datetime(2021, 1, 1, 3, tzinfo=UTC), "US-East", "10.1"),
    (datetime(2021, 1, 1, 15, tzinfo=UTC), "US-East", "0.2"),
    (datetime(2021, 1, 1, 23, 59, 59, tzinfo=UTC), "EU-Central", "7"),
    (datetime(2021, 1, 2, tzinfo=UTC), "US-West", "3.5"),
    (datetime(2021, 1, 2, 12, tzinfo=UTC), "US-East", "20"),
    (datetime(2021, 1, 2, 18, tzinfo=UTC), "EU-Central", "0"),
]
ADDRESS = os.environ.get("METERING_ADDRESS", "localhost:50051")
KEY = os.environ.get("METERING_API_KEY")
CALL: dict[str, Any] = {
    "timeout": 30,
    "metadata": (("authorization", f"Bearer {KEY}"),) if KEY else (),
}


def create_catalog(channel: grpc.Channel) -> None:
    """Create the metric and the customer, and wait until the metric has counted what was there before."""
    metrics = billable_metric_pb2_grpc.BillableMetricServiceStub(channel)
    metrics.CreateBillableMetric(billable_metric_pb2.CreateBillableMetricRequest(billable_metric=METRIC), **CALL)
    customers = customer_pb2_grpc.CustomerServiceStub(channel)
    customers.CreateCustomer(customer_pb2.CreateCustomerRequest(customer=CUSTOMER), **CALL)
    wanted = billable_metric_pb2.GetBillableMetricRequest(id=METRIC.id)
    while metrics.GetBillableMetric(wanted, **CALL).billable_metric.HasField("backfill_progress"):
        time.sleep(0.1)


def send(channel: grpc.Channel) -> list[str]:
    """Send the events; returns what became of each, ACCEPTED or, in another run, DUPLICATE."""
    request = event_pb2.IngestEventsRequest()
    for number, (at, region, gigabytes) in enumerate(TRANSFERS, start=1):
        event = request.events.add(event_type="transfer", customer_id=CUSTOMER.ingest_aliases[0])
        # Fixed, so that a second run is known to say the same.
        event.transaction_id = f"example-transfer-{number}"
        event.timestamp.FromDatetime(at)
        event.properties.update({"region": region, "gigabytes": gigabytes})
    answer = event_pb2_grpc.EventServiceStub(channel).IngestEvents(request, **CALL)
    return [event_pb2.Verdict.Name(verdict).removeprefix("VERDICT_") for verdict in answer.verdicts]


def main() -> None:
    """Create and send; everything may be there already."""
    with grpc.insecure_channel(ADDRESS) as channel:
        create_catalog(channel)
        verdicts = send(channel)
    if wrong := set(verdicts) - {"ACCEPTED", "DUPLICATE"}:
        sys.exit(f"failed at {ADDRESS}: events were {', '.join(sorted(wrong))}")
    print(f"metric {METRIC.id}, customer {CUSTOMER.id}, {len(verdicts)} events")


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as error:
        sys.exit(f"failed at {ADDRESS}: {error.code().name}: {error.details()}")
