"""Answers calls with nothing, on the server's own settings: what any call costs before a word of it is read.

`python -m service.bench.echo --listen 127.0.0.1:0` says its address as `metering serve` does, and ends on SIGTERM.
"""

import argparse
import asyncio
import functools
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from service.config import Load
from service.rpc.hardened import aio_server
from service.server import grpc_options

SERVICE = "metering.bench.Echo"
EMPTY = f"/{SERVICE}/Empty"
REPLAY = f"/{SERVICE}/Replay"
_LENGTH_BYTES = 4


async def _empty(_request: bytes, _context: Any) -> bytes:
    return b""


async def _replay(request: bytes, _context: Any) -> AsyncIterator[bytes]:
    """Send the messages of the file whose path the request is."""
    for message in kept(Path(request.decode())):
        yield message


def keep(path: Path, messages: Sequence[bytes]) -> None:
    """Write the messages that are to be replayed."""
    path.write_bytes(b"".join(len(one).to_bytes(_LENGTH_BYTES) + one for one in messages))


@functools.lru_cache(maxsize=1)
def kept(path: Path) -> Sequence[bytes]:
    """Read them again."""
    content, found, at = path.read_bytes(), [], 0
    while at < len(content):
        end = at + _LENGTH_BYTES + int.from_bytes(content[at : at + _LENGTH_BYTES])
        found.append(content[at + _LENGTH_BYTES : end])
        at = end
    return found


async def serve(address: str, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is called with the address, which has the real port."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    load = Load()
    server = aio_server([], grpc_options(load), load.calls_max + load.streams_max)
    # Without serializers requests and answers are bytes.
    handlers: dict[str, Any] = {
        "Empty": grpc.unary_unary_rpc_method_handler(_empty),
        "Replay": grpc.unary_stream_rpc_method_handler(_replay),
    }
    server.add_registered_method_handlers(SERVICE, handlers)
    port = server.add_insecure_port(address)
    await server.start()
    ready(f"{address.rpartition(':')[0]}:{port}")
    await stop.wait()
    await server.stop(0)


def main() -> None:
    """Run the process."""
    parser = argparse.ArgumentParser(prog="python -m service.bench.echo", description=__doc__)
    parser.add_argument("--listen", default="127.0.0.1:0", help="host:port; port 0 = a free one")
    address = parser.parse_args().listen

    def ready(bound: str) -> None:
        print(f"echo is ready on {bound}", flush=True)

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(address, ready))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the loop that the server itself runs on."""
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


if __name__ == "__main__":
    main()
