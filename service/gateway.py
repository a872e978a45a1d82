"""Owns the Envoy in front of a server: its configuration, its process from start to drain, and what is known of it."""

import asyncio
import contextlib
import importlib.resources
import importlib.util
import ipaddress
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import structlog

from service.child import Identity

log = structlog.get_logger("metering.gateway")

_HOME = "metering-gateway-"
_PLACE_MAX = 50  # of the 103 to 107 bytes that the path of a socket may have
DEFAULT_ADDRESS = "127.0.0.1:8080"
_READY_WITHIN_S = 30.0
_STOPS_WITHIN_S = 5.0
_ANSWERS_WITHIN_S = 2.0
_POLL_S = 0.05


class GatewayError(Exception):
    """The gateway cannot run; the text says why and what to do."""


class Gateway:
    """A running Envoy. `address` is where it listens, with its real port."""

    def __init__(self, process: "subprocess.Popen[bytes]", home: Path) -> None:
        """Talk to a started `process` through the socket in its `home`."""
        self._process = process
        self._home = home
        self.address = ""

    def check(self) -> None:
        """Raise GatewayError if it ended by itself."""
        if self._process.poll() is not None:
            raise GatewayError(f"Envoy ended with code {self._process.returncode}: {_tail(self._home)}")

    async def wait_until_ready(self) -> None:
        """Wait until it takes calls; raises GatewayError if it does not."""
        try:
            async with asyncio.timeout(_READY_WITHIN_S):
                while not (listeners := await self._listeners()):
                    self.check()
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise GatewayError(f"Envoy was not ready within {_READY_WITHIN_S:.0f} s: {_tail(self._home)}") from None
        bound = listeners[0]["local_address"]["socket_address"]
        host = f"[{bound['address']}]" if ":" in bound["address"] else bound["address"]
        self.address = f"{host}:{bound['port_value']}"

    async def drain(self, seconds: float) -> None:
        """Take no new connection, and wait until the calls in flight are answered, but no longer than `seconds`.

        Kept connections are told to close with their next answer.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                # Only the first tells connections to close, only the second stops new ones.
                for path in ("/drain_listeners?graceful&skip_exit", "/drain_listeners"):
                    while self._lives() and await self._ask("POST", path) is None:  # noqa: ASYNC110
                        await asyncio.sleep(_POLL_S)
                while self._lives() and await self._active() != 0:  # noqa: ASYNC110  # there is no event for it
                    await asyncio.sleep(_POLL_S)

    def _lives(self) -> bool:
        return self._process.poll() is None

    async def _listeners(self) -> list[dict[str, Any]]:
        """Return what it listens on, once it takes calls; until then nothing."""
        if await self._ask("GET", "/ready") is None:
            return []
        answer = await self._ask("GET", "/listeners?format=json")
        found: list[dict[str, Any]] = json.loads(answer).get("listener_statuses", []) if answer else []
        return found

    async def _active(self) -> int | None:
        """Return how many calls are in flight, None if it does not say."""
        answer = await self._ask("GET", "/stats?format=json&filter=http.gateway.downstream_rq_active")
        return None if answer is None else sum(one["value"] for one in json.loads(answer)["stats"])

    async def _ask(self, method: str, path: str) -> bytes | None:
        """Return what Envoy's admin interface answers, None while it does not, or says no."""
        try:
            async with asyncio.timeout(_ANSWERS_WITHIN_S):
                reader, writer = await asyncio.open_unix_connection(_admin(self._home))
                try:
                    writer.write(f"{method} {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n".encode())
                    answer = await reader.read()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return None
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            return None
        return _unchunked(body) if b"transfer-encoding: chunked" in head.lower() else body


@contextlib.asynccontextmanager
async def gateway(listen: str, upstream: str, drain_s: float) -> AsyncIterator[Gateway]:
    """Run Envoy while the block runs: it listens on `listen` (host:port) and calls the server at `upstream`.

    At the end it takes no more connections and has `drain_s` seconds to answer calls in flight. Raises GatewayError.
    """
    envoy = find_envoy()
    home = _make_home()
    try:
        process = _start(envoy, configuration(listen, upstream, home), home)
        running = Gateway(process, home)
        try:
            await running.wait_until_ready()
            log.info("gateway started", address=running.address, upstream=upstream)
            yield running
        finally:
            if process.poll() is None:
                await running.drain(drain_s)
            await _stop(process)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _make_home() -> Path:
    """Make a directory for one run, and take away those of owners that were killed: their Envoys went with them."""
    places = Path(tempfile.gettempdir())
    if len(os.fsencode(places)) > _PLACE_MAX:
        places = Path("/tmp")  # noqa: S108  # mkdtemp's directories are its owner's only
    for left in places.glob(f"{_HOME}*"):
        owner = left.name.removeprefix(_HOME).partition("-")[0]
        with contextlib.suppress(OSError):
            if owner.isdigit() and left.stat().st_uid == os.geteuid() and not _lives(int(owner)):
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_HOME}{os.getpid()}-", dir=places))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def _start(envoy: Path, config: dict[str, Any], home: Path) -> "subprocess.Popen[bytes]":
    file = home / "envoy.json"
    file.write_text(json.dumps(config))
    options: tuple[str | Path, ...] = ("-c", file, "--disable-hot-restart", "--concurrency", "1", "-l", "warning")
    # Told to drain, it asks callers at once to close their connections.
    options += ("--drain-strategy", "immediate")
    # Not asyncio's: that forks, which gRPC, whose server runs by now, has handlers for. This takes milliseconds.
    with open(_log(home), "wb") as output:
        return subprocess.Popen(  # noqa: S603
            Identity("keep").command(home, envoy, *options),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C in a terminal is for us, who then let it drain.
            start_new_session=True,
        )


async def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STOPS_WITHIN_S):
            while process.poll() is None:  # noqa: ASYNC110  # there is no event for it
                await asyncio.sleep(_POLL_S)
    process.kill()
    process.wait()


def find_envoy() -> Path:
    """Return the Envoy of the `gateway` extra, or else one on the PATH; raises GatewayError."""
    # Looked up, not imported: another package may own the name.
    spec = importlib.util.find_spec("envoy")
    places = [Path(place) / "_bin" / "envoy" for place in (spec and spec.submodule_search_locations) or ()]
    found = next((place for place in places if os.access(place, os.X_OK)), None) or shutil.which("envoy")
    if found is None:
        raise GatewayError("There is no Envoy here. Install one with: pip install 'metering[gateway]'")
    return Path(found)


def configuration(listen: str, upstream: str, home: Path) -> dict[str, Any]:
    """Return the configuration in deploy/envoy with addresses of its own; raises GatewayError for a bad address."""
    try:
        import yaml
    except ImportError as error:
        raise GatewayError("PyYAML is missing. Install it with: pip install 'metering[gateway]'") from error
    config: dict[str, Any] = yaml.safe_load(_template().read_text())
    listener, cluster = config["static_resources"]["listeners"][0], config["static_resources"]["clusters"][0]
    listener["address"] = _socket(listen)
    place = listener["address"]["socket_address"]
    if place["address"] == "localhost":
        place["address"] = "127.0.0.1"
    try:
        ipaddress.ip_address(place["address"])
    except ValueError:
        # Envoy would say it in words of its own.
        raise GatewayError(f"Nothing can listen on {listen!r}: give an IP address, or localhost.") from None
    endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    if upstream.startswith("unix:"):
        endpoint["address"] = {"pipe": {"path": str(Path(upstream.removeprefix("unix:")).absolute())}}
    else:
        endpoint["address"] = _socket(upstream)
        # Also takes addresses. All that a name has are of one server, which may listen on one of them only.
        cluster |= {"type": "LOGICAL_DNS", "dns_lookup_family": "ALL"}
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    hosts = manager["route_config"]["virtual_hosts"]
    if is_loopback(listen):
        own = listen.rpartition(":")[0]
        hosts[0]["domains"] = sorted({*hosts[0]["domains"], own})
    else:
        # Other machines know this one by names of their own.
        hosts[0]["domains"] = ["*"]
        del hosts[1:]
    transcoder = next(one for one in manager["http_filters"] if one["name"].endswith("grpc_json_transcoder"))
    descriptors = importlib.resources.files("metering") / "descriptors.binpb"
    transcoder["typed_config"]["proto_descriptor"] = str(descriptors)
    config["admin"] = {"address": {"pipe": {"path": _admin(home), "mode": 0o600}}}
    return config


def _template() -> Path:
    packaged = Path(__file__).with_name("envoy.yaml")
    return packaged if packaged.exists() else Path(__file__).parent.parent / "deploy" / "envoy" / "envoy.yaml"


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches what listens on an address (host:port)."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _socket(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:  # the last port
        raise GatewayError(f"{address!r} is not an address: give host:port.")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def _admin(home: Path) -> str:
    return str(home / "admin.sock")


def _unchunked(body: bytes) -> bytes:
    found = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size or b"0", 16)
        found, body = found + rest[:length], rest[length + 2 :] if length else b""
    return found


def _log(home: Path) -> Path:
    return home / "envoy.log"


def _tail(home: Path) -> str:
    lines = _log(home).read_text(errors="replace").splitlines()
    # Addresses in use and the like are told as critical; the rest is noise.
    told = [line for line in lines if "[critical]" in line or "[error]" in line] or lines[-3:]
    return " ".join(told)[-500:] or "it said nothing"
