"""Claims about row level security: Postgres itself keeps organizations apart, whatever statements forget to say."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from conftest import FAST, acting_for, event, running_server
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from test_tenancy import METRIC, WAITING, WRITES, Caller, batch, everything, fill, new_key, stored, usage_of

from metering.v1 import event_pb2
from service.cli import main
from service.database import Database
from service.migrations import is_current
from service.postgres import EmbeddedPostgres, find_binaries
from service.server import CannotServe
from service.store import usage
from service.store.tables import (
    APPLICATION_ROLE,
    METADATA,
    ORGANIZATION_SETTING,
    api_keys,
    organizations,
    page_token_keys,
)

# What callers' transactions may not so much as read: credentials, and the secrets that sign page tokens.
HIDDEN = {api_keys.name, page_token_keys.name, "alembic_version"}
# Every other table, with the column that says whose row it is: a new one without any is a fault of its own.
PROTECTED: dict[sa.Table, sa.Column[Any]] = {
    table: table.c.id if table is organizations else table.c.organization_id
    for table in METADATA.sorted_tables
    if table.name not in HIDDEN
}
REFUSED = "42501"


def sqlstate(error: sa.exc.DBAPIError) -> str:
    """What Postgres said."""
    return str(getattr(error.orig, "sqlstate", ""))


@pytest.fixture
async def both(database_url: str, database: Database) -> AsyncIterator[tuple[Caller, Caller]]:
    """Two organizations with the same ids and other contents, every table filled."""
    keys = [await new_key(database, name) for name in ("one", "two")]
    async with running_server(database_url) as client:
        one, two = (Caller(client, key, database, name) for key, name in zip(keys, ("one", "two"), strict=True))
        await fill(one, 1, "north")
        await fill(two, 100, "south")
        yield one, two


async def rows_of(database: Database, organization: str) -> dict[str, list[Any]]:
    """Every row of an organization, as the owner of the tables sees it."""
    found = await stored(database, organization)
    async with database.engine.connect() as connection:
        row = await connection.execute(sa.select(organizations).where(organizations.c.id == organization))
        return {**found, organizations.name: list(map(str, row))}


# --- What is in the schema


async def test_every_table_is_protected(database: Database) -> None:
    """Each table of the schema has the one policy, for every command, or cannot be read by callers' role at all."""
    of_tables = sa.text(
        "SELECT relname, relrowsecurity, has_table_privilege(:role, oid, 'SELECT,INSERT,UPDATE,DELETE')"
        " OR has_any_column_privilege(:role, oid, 'SELECT,INSERT,UPDATE'),"
        " has_table_privilege(:role, oid, 'TRUNCATE,REFERENCES,TRIGGER') FROM pg_class"
        " WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')"
    )
    of_policies = sa.text("SELECT tablename, permissive, roles, cmd, qual, with_check FROM pg_policies")
    async with database.engine.connect() as connection:
        tables = {row[0]: tuple(row[1:]) for row in await connection.execute(of_tables, {"role": APPLICATION_ROLE})}
        policies = [tuple(row) for row in await connection.execute(of_policies)]
    assert set(tables) == {table.name for table in PROTECTED} | HIDDEN
    for name, (protected, usable, more) in tables.items():
        assert (protected, usable) == ((False, False) if name in HIDDEN else (True, True)), name
        assert not more, name
    expected = []
    for table, column in PROTECTED.items():
        mine = f"({column.name} = current_setting('{ORGANIZATION_SETTING}'::text, true))"
        expected.append((table.name, "PERMISSIVE", [APPLICATION_ROLE], "ALL", mine, mine))
    assert sorted(policies) == sorted(expected)


async def test_the_role_is_nobody(database: Database) -> None:
    """Callers' role has no attribute or membership that leads around policies, owns nothing and can make nothing."""
    role = sa.text(
        "SELECT rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolreplication OR rolcanlogin,"
        " EXISTS (SELECT FROM pg_auth_members WHERE member = pg_roles.oid),"
        " EXISTS (SELECT FROM pg_shdepend WHERE refobjid = pg_roles.oid AND deptype = 'o'),"
        " has_schema_privilege(oid, 'public', 'CREATE') FROM pg_roles WHERE rolname = :role"
    )
    # What runs with the owner's rights: only this, for this role, and with names that nobody else can take.
    definers = sa.text(
        "SELECT proname, proconfig, has_function_privilege('public', oid, 'EXECUTE') FROM pg_proc WHERE prosecdef"
    )
    async with database.engine.connect() as connection:
        assert tuple((await connection.execute(role, {"role": APPLICATION_ROLE})).one()) == (False,) * 4
        assert [tuple(row) for row in await connection.execute(definers)] == [
            ("metering_groups_containing", ["search_path=pg_catalog, public, pg_temp"], False)
        ]


# --- What the role sees and changes


@pytest.mark.parametrize("organization", [None, "", "nobody"])
async def test_without_an_organization_there_is_nothing(
    both: tuple[Caller, Caller], database: Database, organization: str | None
) -> None:
    """Where no organization is set, or one that is not there, every table is empty and takes nothing."""
    for table, column in PROTECTED.items():
        async with acting_for(database, organization) as connection:
            assert (await connection.execute(sa.select(sa.func.count()).select_from(table))).scalar_one() == 0
            assert (await connection.execute(sa.update(table).values({column: column}))).rowcount == 0
        await refuse_rows(database, organization, table)


async def refuse_rows(database: Database, organization: str | None, table: sa.Table) -> None:
    """Fail if rows of the organization `one` can be stored, or if it shows which of them there are."""
    column = PROTECTED[table]
    async with database.engine.connect() as connection:
        row = dict((await connection.execute(sa.select(table).where(column == "one").limit(1))).mappings().one())
    known = sa.insert(table).values(row)
    # Whether the row is there or not: it is refused before anything is looked up.
    names = [one.name for one in table.primary_key if one.type.python_type is str and one is not column]
    new = sa.insert(table).values({**row, **dict.fromkeys(names, "new")})
    for statement in (known, new):
        with pytest.raises(sa.exc.DBAPIError) as caught:
            async with acting_for(database, organization) as connection:
                await connection.execute(statement)
        assert sqlstate(caught.value) == REFUSED, table.name


async def test_rows_of_another_organization(both: tuple[Caller, Caller], database: Database) -> None:
    """Rows of another organization cannot be read, locked, stored, changed, deleted, taken or given away."""
    before, own = await rows_of(database, "one"), await rows_of(database, "two")
    for table, column in PROTECTED.items():
        number = len(own[table.name])
        theirs = column == "one"
        async with acting_for(database, "two") as connection:
            assert (await connection.execute(sa.select(column))).scalars().all() == ["two"] * number
            assert not (await connection.execute(sa.select(table).where(theirs))).all()
            assert not (await connection.execute(sa.select(table).where(theirs).with_for_update())).all()
            # A command without a condition is one about the own rows; others' are not taken over either.
            assert (await connection.execute(sa.update(table).values({column: column}))).rowcount == number
            for value in (column, "two"):
                change = sa.update(table).where(theirs).values({column: value})
                assert (await connection.execute(change)).rowcount == 0
        for statement, most in ((sa.delete(table).where(theirs), 0), (sa.delete(table), number)):
            async with acting_for(database, "two") as connection:
                # Most tables are never deleted from.
                allowed = sa.func.has_table_privilege(table.name, "DELETE")
                if (await connection.execute(sa.select(allowed))).scalar_one():
                    assert (await connection.execute(statement)).rowcount == most
                    continue
                with pytest.raises(sa.exc.DBAPIError) as caught:
                    await connection.execute(statement)
                assert sqlstate(caught.value) == REFUSED
        with pytest.raises(sa.exc.DBAPIError) as caught:
            async with acting_for(database, "two") as connection:
                await connection.execute(sa.update(table).values({column: "one"}))
        assert sqlstate(caught.value) == REFUSED
        await refuse_rows(database, "two", table)
    assert await rows_of(database, "one") == before


@pytest.mark.parametrize("table", sorted(HIDDEN))
async def test_credentials_are_hidden(both: tuple[Caller, Caller], database: Database, table: str) -> None:
    """Callers' role reads no key, no secret and no version, and stores none."""
    for statement in (f"TABLE {table}", f"INSERT INTO {table} DEFAULT VALUES", f"TRUNCATE {table}"):
        with pytest.raises(sa.exc.DBAPIError) as caught:
            async with acting_for(database, "one") as connection:
                await connection.exec_driver_sql(statement)
        assert sqlstate(caught.value) == REFUSED


async def test_copy_comes_in_by_no_protected_table(both: tuple[Caller, Caller], database: Database) -> None:
    """COPY, which policies do not check, is refused for tables that have one; COPY out shows the own rows only."""
    for table, column in PROTECTED.items():
        async with acting_for(database, "two") as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            lines: list[bytes] = []

            async def keep(data: bytes, lines: list[bytes] = lines) -> None:
                lines.append(data)

            await driver.copy_from_table(table.name, columns=[column.name], output=keep)
            assert set(b"".join(lines).split()) == {b"two"}
            with pytest.raises(asyncpg.PostgresError) as caught:
                await driver.copy_records_to_table(table.name, records=[("two",)], columns=[column.name])
            assert caught.value.sqlstate in {"0A000", REFUSED}, table.name


async def test_a_function_with_the_owners_rights_stays_inside(both: tuple[Caller, Caller], database: Database) -> None:
    """What searches meta_info past the policies finds the own groups only, whatever tables are made to fool it."""
    search = sa.text("SELECT count(*) FROM metering_groups_containing('{}', '-infinity', 'infinity')")
    for organization, number in (("one", 2), ("two", 2), ("nobody", 0), ("", 0), (None, 0)):
        async with acting_for(database, organization) as connection:
            assert (await connection.execute(search)).scalar_one() == number
    async with acting_for(database, "two") as connection:
        await connection.exec_driver_sql("CREATE TEMP TABLE usage_record_groups AS SELECT * FROM public.organizations")
        await connection.exec_driver_sql(
            "CREATE FUNCTION pg_temp.metering_scoped(text, jsonb) RETURNS jsonb LANGUAGE sql RETURN jsonb_build_array()"
        )
        assert (await connection.execute(search)).scalar_one() == 2


# --- Transactions


class Undone(Exception):
    """What ends a transaction of a test."""


async def _who(connection: AsyncConnection) -> tuple[int, str, str, int]:
    """The connection, its role and organization, and how many organizations it sees."""
    mine = sa.func.coalesce(sa.func.current_setting(ORGANIZATION_SETTING, True), "")
    number = sa.select(sa.func.count()).select_from(organizations).scalar_subquery()
    query = sa.select(sa.func.pg_backend_pid(), sa.func.current_user(), mine, number)
    return tuple((await connection.execute(query)).one())  # type: ignore[return-value]


ENDS = ["commit", "error", "refusal", "cancelled", "timeout"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("way", ["write", "read", "read_ahead", "background"])
async def test_role_and_setting_end_with_the_transaction(database: Database, way: str, end: str) -> None:
    """However a transaction ends, its connection is nobody's again when the pool hands it to the next one."""
    await new_key(database, "one")
    owner = (await database.look_up(_who))[1]
    seen: list[tuple[int, str, str, int]] = []
    asleep = asyncio.Event()

    async def work(connection: AsyncConnection) -> None:
        seen.append(await _who(connection))
        if end == "error":
            raise Undone
        if end == "refusal":
            await connection.exec_driver_sql("SELECT FROM api_keys")
        if end == "cancelled":
            asleep.set()
            await connection.exec_driver_sql("SELECT pg_sleep(0.2)")
        if end == "timeout":
            await connection.exec_driver_sql("SET LOCAL statement_timeout = 20")
            await connection.exec_driver_sql("SELECT pg_sleep(20)")

    if way == "background":
        running = asyncio.create_task(database.background(work, organization="one"))
    else:
        running = asyncio.create_task(getattr(database, way)("one", work))
    if end == "cancelled" and way != "background":
        await asleep.wait()
        running.cancel()
    await asyncio.wait([running])
    async with asyncio.timeout(10):
        while running_still := set(database._running):
            await asyncio.wait(running_still)
    ((pid, *bound),) = seen
    assert bound == [APPLICATION_ROLE, "one", 1]
    after = await database.look_up(_who)
    assert after[1:] == (owner, "", 2)
    # Not a new connection in its place: this is about the one that was used.
    assert after[0] == pid
    # A transaction without an organization on a connection that had one sees everyone's rows, as it is meant to.
    assert (await database.background(_who))[1:] == (owner, "", 2)


LEAVING = re.compile(r"\b(RESET|DISCARD|AUTHORIZATION|SET +(LOCAL +|SESSION +)?ROLE|row_security)\b|'role'", re.I)


async def test_no_statement_leaves_the_role(both: tuple[Caller, Caller], database: Database) -> None:
    """Among all statements that calls send, only the one that binds a transaction touches role or organization."""
    with statements() as sent:
        for caller in both:
            await everything(caller)
            await caller.call("IngestEvents", **batch(7, "east"))
        for method, fields in WRITES:
            await both[1].call(method, **fields)
    binding = [text for text in sent if text.count("set_config(") == 3]
    others = [text for text in sent if text not in set(binding)]
    assert len(binding) > 100
    assert not [text for text in others if LEAVING.search(text)]


@contextmanager
def statements(change: Callable[[str], str] = lambda text: text) -> Iterator[list[str]]:
    """Collect the statements sent, after changing them."""
    found: list[str] = []

    def note(_: Any, __: Any, text: str, parameters: Any, *___: Any) -> tuple[str, Any]:
        found.append(text)
        return change(text), parameters

    sa.event.listen(sa.Engine, "before_cursor_execute", note, retval=True)
    try:
        yield found
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


# --- One wall without the other

_OWN = re.compile(r'(?:\b\w+\.)?\b(?:organization_id|organizations\.id) = (\$\d+(?:::\w+)?)(?: COLLATE "C")?')


def forgetful(text: str) -> str:
    """A statement without its conditions on the organization; the value stays where it was, and means nothing."""
    if text.lstrip().startswith("INSERT INTO organizations"):
        return text
    return _OWN.sub(r"(\1 IS NOT NULL)", text)


async def forget(one: Caller, two: Caller, database: Database) -> list[str]:
    """Let every statement forget the organization; returns what shows that this was noticed."""
    noticed = []
    before = {caller.organization: await everything(caller) for caller in (one, two)}
    rows = await rows_of(database, "one")
    with statements(forgetful) as sent:
        for caller in (one, two):
            if await everything(caller) != before[caller.organization]:
                noticed.append(f"reads of {caller.organization}")
        # The second half of the conditions is in statements that write.
        for caller, n, region in ((one, 1, "north"), (two, 100, "south")):
            answer = await caller.call("IngestEvents", **batch(n, region))
            if set(answer.verdicts) != {event_pb2.VERDICT_DUPLICATE}:
                noticed.append(f"verdicts of {caller.organization}")
        more = [event(f"more{i}", customer_id="acme", properties={"n": 7, "region": "south"}) for i in range(5)]
        await two.call("IngestEvents", events=more)
        for method, fields in WRITES:
            await two.call(method, **fields)
        if await everything(one) != before["one"]:
            noticed.append("changes of two")
    assert sum(text != forgetful(text) for text in sent) > 300
    if await rows_of(database, "one") != rows:
        noticed.append("rows of one")
    return noticed


async def test_the_second_wall_holds_alone(both: tuple[Caller, Caller], database: Database) -> None:
    """Without the organization in any statement's conditions no call sees, changes or counts another's rows."""
    assert await forget(*both, database) == []


async def test_without_either_wall_the_test_above_fails(both: tuple[Caller, Caller], database: Database) -> None:
    """What the test above takes away is a wall: without policies too, calls see and change what is another's."""
    async with database.engine.begin() as connection:
        for table in PROTECTED:
            await connection.exec_driver_sql(f"ALTER TABLE {table.name} DISABLE ROW LEVEL SECURITY")
    _, two = both
    before = await everything(two)
    with statements(forgetful):
        seen = []
        for method, fields in (("ListUsage", usage_of()), ("GetBillableMetric", {"id": METRIC}), ("SearchEvents", {})):
            try:
                seen.append(str(await two.call(method, **fields)))
            except Exception as error:  # two rows where there must be one
                seen.append(str(error))
    assert any("north" in text or "INTERNAL" in text for text in seen)
    assert await everything(two) == before


# --- Servers and their roles


@contextmanager
def cluster() -> Iterator[sa.URL]:
    """A Postgres that has never heard of us."""
    root = Path(tempfile.mkdtemp(prefix="metering-roles-"))
    root.chmod(0o755)
    try:
        with EmbeddedPostgres(root / "data", settings=FAST, sync=False) as running:
            yield sa.make_url(running.url)
    finally:
        shutil.rmtree(root, ignore_errors=True)


async def administer(url: sa.URL, *commands: str) -> None:
    """Do what only a superuser may."""
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        for one in commands:
            await connection.exec_driver_sql(one)
    await engine.dispose()


async def migrated(url: str) -> tuple[int, str]:
    """Run `metering migrate` on a database; returns its exit code and what it said."""
    done = await asyncio.to_thread(CliRunner().invoke, main, ["migrate", "--database-url", url])
    return done.exit_code, done.output


async def require_service(url: str, owner: str) -> None:
    """Fail if a server on this database does not work, or not in the role that it should."""
    database = Database(url)
    try:
        assert await is_current(database.engine)
        one, two = [await new_key(database, name) for name in ("one", "two")]
        async with running_server(url) as client:
            for key, name in ((one, "one"), (two, "two")):
                caller = Caller(client, key, database, name)
                await fill(caller, 1, "north")
                await caller.call("ListUsageRecordGroups", meta_info='{"source":"API"}')
                await caller.call("DeleteUsageRecordGroup", id=WAITING)
        assert (await database.read("one", _who))[1:] == (APPLICATION_ROLE, "one", 1)
        # Work for everybody is the owner's, whom policies do not bind.
        assert (await database.background(_who))[1:] == (owner, "", 3)
        # The server's own transactions hide nothing from the watermark, whatever role they are in.
        async with acting_for(database, "one"):
            age = await database.look_up(_watermark_age)
        assert age < timedelta(minutes=2)
    finally:
        await database.close()


async def _watermark_age(connection: AsyncConnection) -> timedelta:
    return datetime.now(UTC) - await usage.watermark(connection)


async def test_owners_that_are_no_superusers() -> None:
    """Any owner of a database can migrate and serve it, who may make the role or was given it; else it is told how."""
    with cluster() as url:
        urls = {}
        for owner, attribute in (("plain owner", ""), ("maker", "CREATEROLE"), ("guest", "")):
            await administer(
                url, f'CREATE ROLE "{owner}" LOGIN {attribute}', f'CREATE DATABASE "{owner}" OWNER "{owner}"'
            )
            urls[owner] = url.set(username=owner, database=owner).render_as_string(hide_password=False)
        # Neither the role nor the right to make it: nothing is done, and what an administrator must do is said.
        code, said = await migrated(urls["plain owner"])
        assert code == 1
        wanted = re.search(r"an administrator can: (CREATE ROLE metering_app NOLOGIN; GRANT .*;)", said)
        assert wanted, said
        assert not await _relations(urls["plain owner"])
        # An owner who may make roles needs nobody.
        assert await migrated(urls["maker"]) == (0, "The database is up to date.\n")
        await require_service(urls["maker"], "maker")
        # The role is there, and nobody may take it unasked.
        for owner in ("plain owner", "guest"):
            code, said = await migrated(urls[owner])
            assert code == 1
            wanted = re.search(r"an administrator can: (GRANT metering_app TO .*;)", said)
            assert wanted, said
            assert "CREATE ROLE" not in said
            await administer(url, *filter(None, wanted[1].split(";")))
            assert await migrated(urls[owner]) == (0, "The database is up to date.\n")
        await require_service(urls["plain owner"], "plain owner")


async def _relations(url: str) -> list[str]:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        query = sa.text("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace")
        found = list((await connection.execute(query)).scalars())
    await engine.dispose()
    return found


@pytest.mark.parametrize("rights", ["SUPERUSER", "BYPASSRLS", "CREATEROLE", "IN ROLE pg_read_all_data"])
async def test_a_role_with_rights_of_its_own_is_refused(rights: str) -> None:
    """A role of our name that policies would not bind is not taken for ours."""
    with cluster() as url:
        await administer(url, f"CREATE ROLE {APPLICATION_ROLE} {rights}")
        code, said = await migrated(url.render_as_string(hide_password=False))
        assert (code, "the role metering_app may not be" in said) == (1, True), said


@pytest.mark.parametrize("attribute", ["SUPERUSER", "CREATEROLE"])
async def test_databases_of_one_server_migrate_at_once(attribute: str) -> None:
    """Migrations of several databases, each by several servers, make the one role they share, without a fault."""
    with cluster() as url:
        await administer(url, f"CREATE ROLE maker LOGIN {attribute}")
        urls = [url.set(username="maker", database=f"d{i}") for i in range(2)]
        await administer(url, *(f"CREATE DATABASE {one.database} OWNER maker" for one in urls))
        # Processes, since Alembic's migrations are global to each.
        command = [sys.executable, "-m", "service", "migrate", "--database-url"]
        texts = [one.render_as_string(hide_password=False) for one in (*urls, *urls)]
        root = Path(__file__).parent.parent
        path = os.pathsep.join([str(root), str(root / "generated")])
        done = await asyncio.gather(
            *(
                asyncio.to_thread(
                    subprocess.run,
                    [*command, text],
                    cwd=root,
                    env={**os.environ, "PYTHONPATH": path},
                    capture_output=True,
                    timeout=100,
                    check=False,
                )
                for text in texts
            )
        )
        assert not [one.stderr for one in done if one.returncode]
        for text in texts:
            engine = create_async_engine(text)
            assert await is_current(engine)
            await engine.dispose()


async def test_a_restored_backup_is_protected_again(database_url: str, database: Database) -> None:
    """What pg_dump writes of a database brings back policies, grants, index and function as they were."""
    programs = find_binaries()
    if not (programs / "pg_dump").exists() or not (programs / "psql").exists():
        pytest.skip("pg_dump or psql is not there")
    url = sa.make_url(database_url)
    host = str(url.query["host"])
    where = ["-h", host, "-p", "5432", "-U", str(url.username)]
    dump = await asyncio.to_thread(
        subprocess.run, [programs / "pg_dump", *where, str(url.database)], capture_output=True, check=True, timeout=60
    )
    target = f"{url.database}_restored"
    await administer(url, f"CREATE DATABASE {target}")
    try:
        await asyncio.to_thread(
            subprocess.run,
            [programs / "psql", *where, "-d", target, "-q", "-v", "ON_ERROR_STOP=1"],
            input=dump.stdout,
            capture_output=True,
            check=True,
            timeout=60,
        )
        restored = Database(url.set(database=target).render_as_string(hide_password=False))
        await test_every_table_is_protected(restored)
        await test_the_role_is_nobody(restored)
        await restored.close()
        await require_service(url.set(database=target).render_as_string(hide_password=False), str(url.username))
    finally:
        await administer(url, f"DROP DATABASE {target} WITH (FORCE)")


@pytest.mark.parametrize(
    "lost",
    [
        "DROP POLICY own_organization ON usage_cells",
        "ALTER TABLE usage_events DISABLE ROW LEVEL SECURITY",
        "REVOKE INSERT ON customers FROM metering_app",
        "REVOKE USAGE ON SCHEMA public FROM metering_app, PUBLIC",
    ],
)
async def test_a_database_without_its_wall_is_not_served(database: Database, database_url: str, lost: str) -> None:
    """Where a policy, row level security or a grant is missing, as after a restore, the server does not start."""
    async with running_server(database_url):
        pass
    async with database.engine.begin() as connection:
        await connection.exec_driver_sql(lost)
    with pytest.raises(CannotServe, match="does not keep organizations apart"):
        async with running_server(database_url):
            pass
