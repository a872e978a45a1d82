"""Turns a web access log (common or combined format) into usage events: requests and bytes, per client.

    python examples/access_log.py --setup access.log                    # once: two metrics, a customer per client
    python examples/access_log.py access.log | metering ingest -        # as often as you like
    metering usage --window day --from 2026-01-01 --to 2026-02-01 --metric ID --group-by status    # ID: see --setup

Each request becomes one `http_request` event of the client's address, with its method, status and bytes. A size of
`-` means that no body was sent, so it is 0. The path is left out: nothing counts by it.

A log has no ids, so the transaction id is made of what never changes: the SHA-256 of the line, and which of the lines
with the same text this is, since two requests can look the same within one second and both count. So a log can be
sent again, whole or after it grew or was renamed. Give files that continue one another in one run, oldest first:
between runs, the second of two equal lines could not be told from the first.

Lines that cannot be read are reported on stderr, the others go on, and the exit code is 1.
Only --setup needs more than Python: the package installed, or this repository's `generated` folder on PYTHONPATH; it
calls METERING_ADDRESS (localhost:50051) with METERING_API_KEY, if there is one.
"""

import argparse
import fileinput
import hashlib
import json
import os
import re
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

LINE = re.compile(
    r'(?P<client>\S+) \S+ .*?\[(?P<time>[^\]]+)\] "(?P<request>(?:[^"\\]|\\.)*)" '
    r"(?P<status>\d{3}) (?P<bytes>\d+|-)(?: |$)",
    re.ASCII,
)
IDS = uuid.uuid5(uuid.NAMESPACE_URL, "metering/examples/access_log")


def read_events(lines: Iterable[bytes], report: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """Yields an event per line, and reports the number of each line that cannot be read."""
    seen: Counter[bytes] = Counter()
    for number, raw in enumerate(lines, start=1):
        line = raw.rstrip(b"\r\n")
        match = LINE.match(line.decode(errors="backslashreplace"))
        try:
            timestamp = datetime.strptime(match["time"], "%d/%b/%Y:%H:%M:%S %z") if match else None
        except ValueError:
            timestamp = None
        if match is None or timestamp is None:
            report(number)
            continue
        digest = hashlib.sha256(line)
        seen[digest.digest()] += 1
        method = re.match("([A-Z]+) ", match["request"])  # what scanners send may have none
        size = "0" if match["bytes"] == "-" else match["bytes"]
        yield {
            "transaction_id": f"{digest.hexdigest()}-{seen[digest.digest()]}",
            "customer_id": match["client"],
            "event_type": "http_request",
            "timestamp": timestamp.isoformat(),
            "properties": {"method": method[1] if method else "-", "status": match["status"], "bytes": size},
        }


def create_catalog(clients: Iterable[str]) -> None:
    """Creates the metrics and customers by which usage is read. The ids are computed, so again changes nothing."""
    import grpc

    from metering.v1 import billable_metric_pb2 as metrics
    from metering.v1 import billable_metric_pb2_grpc, customer_pb2, customer_pb2_grpc

    key = os.environ.get("METERING_API_KEY")
    call: dict[str, Any] = {"timeout": 30, "metadata": (("authorization", f"Bearer {key}"),) if key else ()}
    counted = (("requests", metrics.AGGREGATION_TYPE_COUNT, ""), ("bytes", metrics.AGGREGATION_TYPE_SUM, "bytes"))
    group_keys = [metrics.GroupKey(properties=keys) for keys in (["status"], ["method"], ["status", "method"])]
    with grpc.insecure_channel(os.environ.get("METERING_ADDRESS", "localhost:50051")) as channel:
        for name, aggregation_type, aggregation_key in counted:
            metric = metrics.BillableMetric(
                id=str(uuid.uuid5(IDS, f"metric {name}")),
                name=f"access log {name}",
                aggregation_type=aggregation_type,
                aggregation_key=aggregation_key,
                event_type_filter=metrics.EventTypeFilter(in_values=["http_request"]),
                group_keys=group_keys,
            )
            metric_request = metrics.CreateBillableMetricRequest(billable_metric=metric)
            billable_metric_pb2_grpc.BillableMetricServiceStub(channel).CreateBillableMetric(metric_request, **call)
            print(f"metric    {metric.id}  {name}")
        create_customer = customer_pb2_grpc.CustomerServiceStub(channel).CreateCustomer
        for name in dict.fromkeys(clients):
            customer_id = str(uuid.uuid5(IDS, f"customer {name}"))
            customer = customer_pb2.Customer(id=customer_id, name=name, ingest_aliases=[name])
            create_customer(customer_pb2.CreateCustomerRequest(customer=customer), **call)
            print(f"customer  {customer.id}  {name}")


def main() -> None:
    """Reads the command line and the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="logs, oldest first; none or - is standard input")
    parser.add_argument("--setup", action="store_true", help="create metrics and customers, as METERING_API_KEY allows")
    options = parser.parse_args()
    malformed: list[int] = []
    with fileinput.input(options.files, mode="rb") as lines:
        events = read_events(lines, malformed.append)
        if options.setup:
            create_catalog(event["customer_id"] for event in events)
        else:
            sys.stdout.writelines(json.dumps(event) + "\n" for event in events)
    if malformed:
        sys.exit(f"not in the common or combined log format: line {', '.join(map(str, malformed))}")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # `| head`
        os._exit(1)
