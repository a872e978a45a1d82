"""Owns `metering demo`: the whole path in one command, on a database that is thrown away."""

import asyncio
import logging
import math
import os
import random
import sys
import tempfile
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import grpc

from metering.v1 import (
    billable_metric_pb2,
    billable_metric_pb2_grpc,
    customer_pb2,
    customer_pb2_grpc,
    event_pb2,
    event_pb2_grpc,
)
from service.cli.operate import log_to_stderr, run
from service.cli.usage import usage
from service.config import Config
from service.migrations import upgrade
from service.server import open_database, serving

DAYS = 3
REGIONS = {"eu-central": 1.0, "us-east": 0.7, "ap-south": 0.4}
CUSTOMERS = {"acme": ("Acme", 1.0), "globex": ("Globex", 0.5)}
# The same ids in every demo, so that a line copied from one works in the next.
_NAMESPACE = uuid.UUID("6f1d6a53-0e4c-4bb5-9c76-0c3f6d1c9a11")
_TIMEOUT_S = 30


@click.command()
@click.option("--listen", default="127.0.0.1:0", show_default=True, help="Where the demo's server listens.")
@click.option(
    "--keep/--exit",
    "keep",
    default=None,
    help="Go on serving until Ctrl-C, or end at once. Default: go on if this is a terminal.",
)
def demo(listen: str, keep: bool | None) -> None:
    """Show the whole path in one run: a Postgres, a server, a few days of usage, and the answer by region.

    Everything happens in a temporary directory and is gone afterwards.
    """
    terminal = sys.stdout.isatty()
    log_to_stderr(logging.WARNING)
    run(_demo(listen, terminal if keep is None else keep))


async def _demo(listen: str, keep: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="metering-demo-", ignore_cleanup_errors=True) as directory:
        # Postgres does not run as root; the user it runs as instead must get to its data.
        os.chmod(directory, 0o755)  # noqa: S103 - what it holds is closed by itself
        _say("Starting an embedded Postgres and a server")
        config = Config(listen=(listen,), data_dir=Path(directory) / "data")
        async with open_database(config) as (database, _):
            await upgrade(database.engine)
            async with serving(config, database) as (address,):
                await asyncio.to_thread(_tour, address, keep)
                if keep:
                    _say(f"The server goes on at {address}. Ctrl-C ends it and deletes its data")
                    await asyncio.Event().wait()


def _tour(address: str, keep: bool) -> None:
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    start = today - timedelta(days=DAYS)
    with grpc.insecure_channel(address) as channel:
        _say("Making two customers and three billable metrics (COUNT, SUM by region, UNIQUE)")
        traffic = _catalog(channel)
        events = list(_traffic(start))
        _say(f"Ingesting {len(events):,} events, twice, as a client does that lost the first answer")
        stub = event_pb2_grpc.EventServiceStub(channel)
        for _ in range(2):
            request = event_pb2.IngestEventsRequest(events=events)
            verdicts = list(stub.IngestEvents(request, timeout=_TIMEOUT_S).verdicts)
            accepted = verdicts.count(event_pb2.VERDICT_ACCEPTED)
            duplicates = verdicts.count(event_pb2.VERDICT_DUPLICATE)
            click.echo(f"    {accepted:,} accepted, {duplicates:,} duplicates")
    _say("Asking for traffic in bytes, by day and region")
    span = ["--from", f"{start:%Y-%m-%d}", "--to", f"{today:%Y-%m-%d}"]
    arguments = ["--address", address, "--window", "day", *span, "--metric", traffic, "--group-by", "region"]
    usage.main(arguments, prog_name="metering usage", standalone_mode=False)
    click.echo(f"That was: metering usage {' '.join(arguments)}")
    bounds = f'"starting_on":"{start:%Y-%m-%dT00:00:00Z}","ending_before":"{today:%Y-%m-%dT00:00:00Z}"'
    query = f'{{"window_size":"WINDOW_SIZE_NONE",{bounds}}}'
    click.echo("Try next:" if keep else "Try next, beside `metering demo --keep` and with its address:")
    click.echo(f"  grpcurl -plaintext -d '{query}' {address} metering.v1.UsageService/ListUsage")


def _catalog(channel: grpc.Channel) -> str:
    """Create customers and metrics; returns the id of the metric of bytes."""
    customers = customer_pb2_grpc.CustomerServiceStub(channel)
    for alias, (name, _) in CUSTOMERS.items():
        customer = customer_pb2.Customer(id=_id(alias), name=name, ingest_aliases=[alias])
        customers.CreateCustomer(customer_pb2.CreateCustomerRequest(customer=customer), timeout=_TIMEOUT_S)
    metrics = billable_metric_pb2_grpc.BillableMetricServiceStub(channel)
    region = [billable_metric_pb2.GroupKey(properties=["region"])]
    for name, aggregation, key in (
        ("Requests", billable_metric_pb2.AGGREGATION_TYPE_COUNT, ""),
        ("Traffic", billable_metric_pb2.AGGREGATION_TYPE_SUM, "bytes"),
        ("Active users", billable_metric_pb2.AGGREGATION_TYPE_UNIQUE, "user"),
    ):
        metric = billable_metric_pb2.BillableMetric(
            id=_id(name), name=name, aggregation_type=aggregation, aggregation_key=key, group_keys=region
        )
        request = billable_metric_pb2.CreateBillableMetricRequest(billable_metric=metric)
        metrics.CreateBillableMetric(request, timeout=_TIMEOUT_S)
    return _id("Traffic")


def _traffic(start: datetime) -> Iterator[event_pb2.UsageEvent]:
    """Draw requests that follow the sun of each region; the same in every run."""
    draw = random.Random(20_260_101)  # noqa: S311 - sample data
    for hour in range(24 * DAYS):
        for place, (region, share) in enumerate(REGIONS.items()):
            daylight = 1 + math.sin((hour + 6 * place) / 24 * math.tau)
            for alias, (_, weight) in CUSTOMERS.items():
                for number in range(round(20 * share * weight * daylight * draw.uniform(0.7, 1.3))):
                    yield _request(draw, f"{alias}-{region}-{hour}-{number}", alias, region, start, hour)


def _request(
    draw: random.Random, transaction_id: str, alias: str, region: str, start: datetime, hour: int
) -> event_pb2.UsageEvent:
    event = event_pb2.UsageEvent(transaction_id=transaction_id, customer_id=alias, event_type="http_request")
    event.timestamp.FromDatetime(start + timedelta(hours=hour, seconds=draw.uniform(0, 3600)))
    user = f"user-{draw.randrange(60)}"
    event.properties.update({"region": region, "bytes": round(draw.lognormvariate(9, 1.2)), "user": user})
    return event


def _id(name: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, name))


def _say(text: str) -> None:
    click.secho(f"» {text}.", bold=True)
