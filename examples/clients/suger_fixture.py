"""Makes what the programs for Suger's SDKs name: a buyer, a product, a billable metric and an entitlement to them.

    pip install .                                   # in the repository: brings the stubs, `metering.v1`
    metering serve                                  # in another terminal
    python examples/clients/suger_fixture.py        # as often as you like: again changes nothing

It calls METERING_ADDRESS (localhost:50051) with METERING_API_KEY, if there is one. By gRPC, as Suger itself learns of
buyers, products and entitlements from the marketplaces.
"""

import os
import sys
from datetime import UTC, datetime
from typing import Any

import grpc

from metering.v1 import (
    billable_metric_pb2,
    billable_metric_pb2_grpc,
    customer_pb2,
    customer_pb2_grpc,
    entitlement_pb2,
    entitlement_pb2_grpc,
)

METRIC = billable_metric_pb2.BillableMetric(
    id="9d5b3c0e-6a0c-4d35-8a57-1f0e8f1c7a01",
    key="example-calls",
    name="Example calls",
    aggregation_type=billable_metric_pb2.AGGREGATION_TYPE_SUM,
    aggregation_key="quantity",
    event_type_filter=billable_metric_pb2.EventTypeFilter(in_values=["example-calls"]),
    property_filters=[billable_metric_pb2.PropertyFilter(name="region", in_values=["eu"])],
)
BUYER = customer_pb2.Customer(id="9d5b3c0e-6a0c-4d35-8a57-1f0e8f1c7a02", name="Example buyer", buyer_id="example-buyer")
PRODUCT = entitlement_pb2.Product(
    id="example-product",
    name="Example product",
    partner=entitlement_pb2.PARTNER_AWS,
    dimensions=[
        entitlement_pb2.Dimension(key="cpu", name="CPU hours"),
        entitlement_pb2.Dimension(key="mem", name="Memory"),
    ],
)
ENTITLEMENT = entitlement_pb2.Entitlement(
    id="example-entitlement",
    name="Example entitlement",
    product_id=PRODUCT.id,
    buyer_id=BUYER.buyer_id,
    billable_metric_keys=[METRIC.key],
)
ENTITLEMENT.starting_on.FromDatetime(datetime(2025, 1, 1, tzinfo=UTC))
ADDRESS = os.environ.get("METERING_ADDRESS", "localhost:50051")
KEY = os.environ.get("METERING_API_KEY")
CALL: dict[str, Any] = {
    "timeout": 30,
    "metadata": (("authorization", f"Bearer {KEY}"),) if KEY else (),
}


def main() -> None:
    """Create all of it; what is there already stays as it is."""
    with grpc.insecure_channel(ADDRESS) as channel:
        metrics = billable_metric_pb2_grpc.BillableMetricServiceStub(channel)
        metrics.CreateBillableMetric(billable_metric_pb2.CreateBillableMetricRequest(billable_metric=METRIC), **CALL)
        customers = customer_pb2_grpc.CustomerServiceStub(channel)
        customers.CreateCustomer(customer_pb2.CreateCustomerRequest(customer=BUYER), **CALL)
        sold = entitlement_pb2_grpc.EntitlementServiceStub(channel)
        sold.CreateProduct(entitlement_pb2.CreateProductRequest(product=PRODUCT), **CALL)
        sold.CreateEntitlement(entitlement_pb2.CreateEntitlementRequest(entitlement=ENTITLEMENT), **CALL)
    print(f"entitlement {ENTITLEMENT.id} of {BUYER.buyer_id} to {PRODUCT.id}, metric {METRIC.key}")


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as error:
        sys.exit(f"failed at {ADDRESS}: {error.code().name}: {error.details()}")
