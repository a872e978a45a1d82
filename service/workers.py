"""Owns a server of several processes: the parent, which holds the ports and keeps up workers, and a worker's start."""

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from service.child import Identity
from service.config import Config
from service.server import Addresses, CannotServe, gateway_of, migrated_database, not_ours, stop_on, watch
from service.server import serve as serve_alone

log = structlog.get_logger("metering.workers")

# A worker that ends so often in such a time would do it for ever.
ENDS_MAX = 5
ENDS_WITHIN_S = 60.0
_PAUSE_S = 0.1
_PAUSE_MAX_S = 5.0
_POLL_S = 0.02
# The first line that a worker writes; any other says why it cannot serve.
_READY = b"ready\n"
# A worker finds its modules where we found ours, not where it happens to be started; and it is given SIGINT only when
# its parent has died (see service.child), which is to end it as it is, as it would one process.
_START = """
import pickle, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path[:] = pickle.load(sys.stdin.buffer)
from service.cli.serve import work
work()
"""


async def serve(config: Config, ready: Callable[[Addresses], None]) -> None:
    """Serve from `config.workers` processes until SIGTERM or SIGINT, then drain all of them.

    `ready` is called once each of them answers. Postgres and the gateway are run here. Raises as server.serve does, and
    CannotServe when a worker cannot be kept up.
    """
    _check(config)
    stop = stop_on(signal.SIGTERM, signal.SIGINT)
    async with migrated_database(config) as (_, postgres):
        with contextlib.ExitStack() as ports:
            held = [ports.enter_context(_held(address)) for address in config.listen]
            addresses = Addresses(address for address, _ in held)
            workers = Workers(
                replace(
                    config,
                    listen=tuple(place for _, places in held for place in places),
                    database_url=postgres.url if postgres is not None else config.database_url,
                    migrate=False,
                    partner_rules=dict(config.partner_rules),
                )
            )
            front = contextlib.AsyncExitStack()
            try:
                await workers.started()
                addresses.gateway = await front.enter_async_context(gateway_of(config, addresses[0]))
                ready(addresses)
                await watch(config, stop, workers.check, addresses.gateway, postgres)
            finally:
                workers.drain()
                await front.aclose()
                await workers.ended()


class Workers:
    """Processes that serve the same addresses, each followed by another when it ends."""

    def __init__(self, config: Config) -> None:
        """Start `config.workers` of them."""
        self._config = config
        self._draining = asyncio.Event()
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._served: set[int] = set()
        self._tasks = [asyncio.create_task(self._keep(number)) for number in range(1, config.workers + 1)]

    async def started(self) -> None:
        """Wait until all of them have answered calls; raises CannotServe if one cannot."""
        while len(self._served) < len(self._tasks):
            self.check()
            await asyncio.sleep(_POLL_S)

    def check(self) -> None:
        """Raise CannotServe if one of them could not be kept up."""
        for task in self._tasks:
            if task.done():
                task.result()

    def drain(self) -> None:
        """Let them end their streams and, when `ended` is called or half of the drain is over, their calls."""
        self._draining.set()
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()

    async def ended(self) -> None:
        """Wait until they are gone, after `drain`."""
        for process in self._processes.values():
            _stdin(process).close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep(self, number: int) -> None:
        """Run one process after another until the drain; raises CannotServe when that has become pointless."""
        clock = asyncio.get_running_loop().time
        ends: deque[float] = deque(maxlen=ENDS_MAX)
        while not self._draining.is_set():
            said = await self._run(number)
            if self._draining.is_set():
                return
            if number not in self._served:
                raise CannotServe(said)
            ends.append(clock())
            recent = sum(ends[-1] - end < ENDS_WITHIN_S for end in ends)
            if recent == ENDS_MAX:
                raise CannotServe(f"Worker {number} ended {ENDS_MAX} times within a minute, the last time so: {said}")
            pause = min(_PAUSE_S * 2 ** (recent - 1), _PAUSE_MAX_S)
            log.warning("a worker ended and is started anew", worker=number, said=said, pause_s=pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._draining.wait()

    async def _run(self, number: int) -> str:
        """Run one process to its end; returns what is known of that."""
        command = (sys.executable, "-P", "-c", _START, f"metering worker {number}")
        try:
            process = await asyncio.create_subprocess_exec(
                *Identity("keep").command(Path.cwd(), *command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # Ctrl-C in a terminal is for us, who then let it drain.
                start_new_session=True,
            )
        except OSError as error:
            return f"It cannot be started: {error}."
        self._processes[number] = process
        try:
            if self._draining.is_set():
                process.terminate()
            # The settings hold secrets, which arguments would show to every user of the machine.
            _stdin(process).write(pickle.dumps(sys.path) + pickle.dumps((number, self._config)))
            assert process.stdout is not None  # noqa: S101
            said = await process.stdout.readline()
            if said == _READY:
                self._served.add(number)
                said = b""
            said += await process.stdout.read()
            code = await process.wait()
        finally:
            del self._processes[number]
        return said.decode(errors="replace").strip() or f"It ended with code {code}."


def told() -> tuple[int, Config]:
    """Return the number of this worker and what it is to serve."""
    number, config = pickle.load(sys.stdin.buffer)  # noqa: S301  # from the parent
    return number, config


async def serve_as_worker(config: Config) -> None:
    """Serve as one of the workers. The end of the standard input says that the gateway in front is gone."""
    released = asyncio.Event()
    loop, stdin = asyncio.get_running_loop(), sys.stdin.fileno()

    def end() -> None:
        loop.remove_reader(stdin)
        released.set()

    loop.add_reader(stdin, end)

    def ready(_: Addresses) -> None:
        os.write(sys.stdout.fileno(), _READY)

    await serve_alone(config, ready, released)


def _stdin(process: asyncio.subprocess.Process) -> asyncio.StreamWriter:
    assert process.stdin is not None  # noqa: S101
    return process.stdin


def _check(config: Config) -> None:
    """Raise CannotServe where one process could serve, but several cannot."""
    if sys.platform != "linux":
        raise CannotServe("Only Linux spreads the connections of a port over processes. Leave out --workers.")
    sockets = [address for address in config.listen if address.startswith("unix:")]
    if sockets:
        raise CannotServe(
            f"{sockets[0]} cannot have several workers: the connections of a unix socket all go to one process. Leave "
            "out --workers; or let the workers listen on a TCP address; or run several servers, a socket each, behind "
            "an Envoy."
        )
    if config.tls is not None and config.gateway is not None:
        raise CannotServe(
            "With TLS the gateway calls the server through a unix socket, which cannot have several workers. Leave out "
            "--workers or --gateway."
        )


@contextlib.contextmanager
def _held(address: str) -> Iterator[tuple[str, Sequence[str]]]:
    """Hold a TCP address for workers; gives it with its real port, and the addresses behind its name as numbers.

    As one process does, it takes those that can be had, all with one port. Raises CannotServe if there is none.
    """
    host, _, port = address.rpartition(":")
    try:
        number = int(port)
        found = [(family, place) for family, *_, place in _resolved(host.strip("[]"), number)]
    except (OSError, ValueError, OverflowError):
        raise not_ours(address) from None
    places = []
    with contextlib.ExitStack() as sockets:
        for family, (ip, _, *scope) in found:
            with contextlib.suppress(OSError):
                one = _bound(family, (ip, number, *scope))
                sockets.enter_context(one)
                number = one.getsockname()[1]
                places.append(f"[{ip}]:{number}" if family == socket.AF_INET6 else f"{ip}:{number}")
        if not places:
            raise not_ours(address)
        yield f"{host}:{number}", places


def _resolved(host: str, port: int) -> list[Any]:
    if not host or not 0 <= port <= 65535:  # the last port
        raise ValueError("no host, or no port")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if any(place[0] in {"::", "0.0.0.0"} for *_, place in found):  # noqa: S104  # not bound here
        # As for gRPC, all addresses are those of both families; the second is taken where the first has no IPv6.
        return [one for every in ("::", "0.0.0.0") for one in socket.getaddrinfo(every, port, type=socket.SOCK_STREAM)]  # noqa: S104
    return found


def _bound(family: int, place: tuple[Any, ...]) -> socket.socket:
    """Return a socket that keeps an address for processes that share it, and takes no connection itself.

    Among all who try, one gets it: Linux lets only one listen, and lets nobody bind beside a socket that does not
    allow it. So it listens for a moment, forbids to bind beside it, and then allows that to sockets which share (those
    of our workers: another server's parent never comes to have any). Until it listens it has to allow binding, because
    connections of an earlier server may not be quite over. Raises OSError.
    """
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if place[1]:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(place)
            one.listen(0)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            one.shutdown(socket.SHUT_RD)
        else:
            one.bind(place)  # to a port that nobody has
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        one.close()
        raise
    return one
