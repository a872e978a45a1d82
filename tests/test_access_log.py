"""Claims about the access log example."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import grpc_testing  # type: ignore[import-untyped]
import pytest

from examples import access_log
from metering.v1 import billable_metric_pb2, customer_pb2
from service.cli import ingest

ROOT = Path(__file__).parents[1]
LINE = b'192.0.2.7 - - [01/Jan/2026:10:00:00 +0530] "GET /a?b=1 HTTP/1.1" 200 512 "-" "curl/8.5 (\\"x\\")"\n'


def read(*lines: bytes) -> tuple[list[dict[str, object]], list[int]]:
    """Events and malformed line numbers of some lines."""
    malformed: list[int] = []
    return list(access_log.read_events(lines, malformed.append)), malformed


def test_a_request_becomes_an_event() -> None:
    """A line of the combined format gives client, instant with offset, method, status and bytes."""
    ((event,), malformed) = read(LINE)
    transaction_id = str(event.pop("transaction_id"))
    assert (event, malformed, len(transaction_id)) == (
        {
            "customer_id": "192.0.2.7",
            "event_type": "http_request",
            "timestamp": "2026-01-01T10:00:00+05:30",
            "properties": {"method": "GET", "status": "200", "bytes": "512"},
        },
        [],
        66,
    )


@pytest.mark.parametrize(
    ("line", "properties"),
    [
        (LINE.replace(b"512", b"-"), {"method": "GET", "status": "200", "bytes": "0"}),
        (b'::1 - "o k" [01/Jan/2026:10:00:00 +0000] "-" 408 0\n', {"method": "-", "status": "408", "bytes": "0"}),
        (
            b'h - - [01/Jan/2026:10:00:00 +0000] "\\x16\xff\\"" 400 1\r\n',
            {"method": "-", "status": "400", "bytes": "1"},
        ),
    ],
)
def test_odd_lines_are_requests_too(line: bytes, properties: dict[str, str]) -> None:
    """No body counts as 0 bytes, and a request without a method is still a request."""
    ((event,), malformed) = read(line)
    assert (event["properties"], malformed) == (properties, [])


def test_ids_survive_a_rerun_and_tell_equal_lines_apart() -> None:
    """The same lines give the same ids wherever they stand; of two equal lines each has its own."""
    other = LINE.replace(b"200", b"404")
    first = [event["transaction_id"] for event in read(LINE, other, LINE)[0]]
    again = [event["transaction_id"] for event in read(LINE, LINE, other.rstrip())[0]]
    assert len(set(first)) == 3
    assert set(first) == set(again)


def test_events_are_what_ingest_reads() -> None:
    """Every line of output makes an event of `metering ingest`."""
    (event,) = read(LINE)[0]
    parsed = ingest.parse_event(json.dumps(event).encode())
    assert parsed is not None
    assert parsed.transaction_id == event["transaction_id"]


def test_malformed_lines_are_reported_and_stop_nothing(tmp_path: Path) -> None:
    """Lines that cannot be read are named by number and make the exit code 1; the others are written."""
    path = tmp_path / "access.log"
    path.write_bytes(b"nonsense\n" + LINE + LINE.replace(b"01/Jan", b"31/Feb") + LINE)
    command = [sys.executable, str(ROOT / "examples/access_log.py")]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    piped = subprocess.run(command, input=path.read_text(), capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 2)
    assert done.stderr == "not in the common or combined log format: line 1, 3\n"
    assert (piped.returncode, piped.stdout) == (1, done.stdout)


def test_setup_creates_the_same_catalog_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setup creates two metrics and a customer per client under computed ids, signed in: a rerun sends the same."""
    metric_call = billable_metric_pb2.DESCRIPTOR.services_by_name["BillableMetricService"].methods_by_name
    customer_call = customer_pb2.DESCRIPTOR.services_by_name["CustomerService"].methods_by_name
    monkeypatch.setitem(os.environ, "METERING_API_KEY", "k")
    runs = []
    for _ in range(2):
        fake = grpc_testing.channel([], grpc_testing.strict_fake_time(0))
        monkeypatch.setattr(grpc, "insecure_channel", lambda address, fake=fake: fake)
        thread = threading.Thread(target=access_log.create_catalog, args=(["192.0.2.7", "::1", "192.0.2.7"],))
        thread.start()
        requests = []
        for method, answer in (
            (metric_call["CreateBillableMetric"], billable_metric_pb2.CreateBillableMetricResponse()),
            (metric_call["CreateBillableMetric"], billable_metric_pb2.CreateBillableMetricResponse()),
            (customer_call["CreateCustomer"], customer_pb2.CreateCustomerResponse()),
            (customer_call["CreateCustomer"], customer_pb2.CreateCustomerResponse()),
        ):
            metadata, request, rpc = fake.take_unary_unary(method)
            assert dict(metadata)["authorization"] == "Bearer k"
            requests.append(request)
            rpc.terminate(answer, (), grpc.StatusCode.OK, "")
        thread.join(timeout=10)
        runs.append(requests)
    assert runs[0] == runs[1]
    metrics = [request.billable_metric for request in runs[0][:2]]
    assert [(metric.aggregation_type, metric.aggregation_key) for metric in metrics] == [
        (billable_metric_pb2.AGGREGATION_TYPE_COUNT, ""),
        (billable_metric_pb2.AGGREGATION_TYPE_SUM, "bytes"),
    ]
    assert [list(key.properties) for key in metrics[0].group_keys] == [["status"], ["method"], ["status", "method"]]
    assert [list(request.customer.ingest_aliases) for request in runs[0][2:]] == [["192.0.2.7"], ["::1"]]
