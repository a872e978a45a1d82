"""Owns `metering health`: what the server says about itself and its services."""

from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.cli import client

SERVICES = (
    "metering.v1.EventService",
    "metering.v1.BillableMetricService",
    "metering.v1.CustomerService",
    "metering.v1.UsageService",
    "metering.v1.EntitlementService",
    "metering.v1.UsageRecordGroupService",
    "metering.v1.UsageRecordReportService",
)


@click.command()
@click.option(
    "--service",
    "services",
    multiple=True,
    metavar="NAME",
    help="A service to ask for, instead of those of metering.v1. Can be given several times.",
)
@client.target_options(timeout_s=5)
def health(services: tuple[str, ...], target: client.Target) -> None:
    """Ask whether the server lives and its services can answer.

    The process lives when the first line says SERVING; a service is SERVING when its database answers too.

    Exit code: 0 if everything asked for is SERVING, 1 if not, so it serves as a container's health check:

    \b
      HEALTHCHECK CMD ["metering", "health"]

    Beside a server with TLS, whose certificate is rarely for localhost, ask through a unix socket, or give the name:

    \b
      metering health --address unix:/run/metering/metering.sock
      metering health --tls-ca ca.pem --tls-server-name metering.example
    """
    failure: grpc.RpcError | None = None
    healthy = True
    with client.connected(target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its published types leave the methods out
        # All at once: however many services there are, a server that hangs costs one --timeout.
        calls = [
            (
                name,
                stub.Check.future(
                    health_pb2.HealthCheckRequest(service=name), timeout=target.timeout_s, metadata=target.metadata
                ),
            )
            for name in ("", *(services or SERVICES))
        ]
        for name, call in calls:
            try:
                status = health_pb2.HealthCheckResponse.ServingStatus.Name(call.result().status)
            except grpc.RpcError as error:
                status = client.call_of(error).code().name
                failure = error
            healthy = healthy and status == "SERVING"
            click.echo(f"{status:<18} {name or '(the process)'}")
    if failure is not None:
        client.print_error(failure, target)
    if not healthy:
        raise click.exceptions.Exit(1)
