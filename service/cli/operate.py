"""The operator's commands beside `serve`: prepare and check the database, make reports, organizations, API keys."""

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import sqlalchemy as sa
import structlog

from service.auth import new_api_key
from service.config import DEFAULT_DATA_DIR, Config
from service.database import DATABASE_ERRORS, BadDatabaseUrl, Database, UnsafeDatabase
from service.domain.partners import BadRule, Rules, with_changes
from service.domain.roles import Role
from service.errors import MeteringError, Unavailable
from service.gateway import GatewayError
from service.migrations import upgrade
from service.postgres import PostgresError, running_url
from service.reporting import last_hour, roll_up_hour
from service.server import CannotServe, check_schema, open_database
from service.store import organizations
from service.store.organizations import DEFAULT_ORGANIZATION
from service.store.roll_up import Waiting, waiting_entitlements
from service.verify import FINDINGS_MAX, Finding, verify_cells

Result = TypeVar("Result")

_FAILED_SHOWN = 10
EPILOG = "Options can be set by environment variables too, METERING_ and the option's name; the flag wins."


def database_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where the database is."""
    options = (
        click.option(
            "--database-url",
            envvar="METERING_DATABASE_URL",
            help="A Postgres 15 or newer, postgresql://user@host/name. Without it an embedded Postgres is run.",
        ),
        click.option(
            "--data-dir",
            envvar="METERING_DATA_DIR",
            type=click.Path(path_type=Path, file_okay=False),
            default=DEFAULT_DATA_DIR,
            show_default=True,
            help="Where the embedded Postgres keeps its data.",
        ),
        click.option(
            "--pg-bin",
            envvar="METERING_PG_BIN",
            help="Directory of the Postgres programs to run embedded. Default: those of the `embedded` extra.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _read_partner_rules(_ctx: click.Context, _param: click.Parameter, changes: tuple[str, ...]) -> Rules:
    try:
        return with_changes(changes)
    except BadRule as error:
        raise click.BadParameter(str(error)) from error


partner_rule_option = click.option(
    "--partner-rule",
    envvar="METERING_PARTNER_RULE",
    multiple=True,
    metavar="PARTNER.RULE=NUMBER",
    callback=_read_partner_rules,
    help="Change what a marketplace takes, such as AWS.window_hours=6; repeatable. See docs/marketplaces.md.",
)


@click.command(epilog=EPILOG)
@database_options
def migrate(database_url: str | None, data_dir: Path, pg_bin: str | None) -> None:
    """Bring the database to this version's tables. Safe to repeat, and to run beside other migrations.

    Stop servers of an older version first: with newer tables their calls may fail.
    """

    async def work(database: Database) -> None:
        await upgrade(database.engine)

    _with_database(database_url, data_dir, pg_bin, work, migrated=False)
    click.echo("The database is up to date.")


@click.command()
@database_options
@click.option("--org", help="Only this organization. Default: all.")
@click.option("--metric", "metric_id", type=click.UUID, help="Only this billable metric. Default: all.")
@click.option("--from", "start", type=click.DateTime(), help="From this UTC time on. Default: the first event.")
@click.option("--to", "end", type=click.DateTime(), help="Before this UTC time. Default: after the last event.")
@click.option("--repair", is_flag=True, help="Compute wrong cells again from the raw events.")
def verify(
    database_url: str | None,
    data_dir: Path,
    pg_bin: str | None,
    org: str | None,
    metric_id: Any,
    start: datetime | None,
    end: datetime | None,
    repair: bool,
) -> None:
    """Compare stored aggregates with the raw events; exits 1 if any differ (and 0 once repaired).

    Each stretch of time is compared in one snapshot, so it may run beside servers.
    """
    findings: list[Finding] = []

    def found(finding: Finding) -> None:
        findings.append(finding)
        click.echo(str(finding))

    async def work(database: Database) -> int:
        return await verify_cells(
            database, found, organization=org, metric_id=metric_id, start=start, end=end, repair=repair
        )

    metrics = _with_database(database_url, data_dir, pg_bin, work)
    # A stretch reports so many of its cells and no more; a repair mends all.
    number = f"{'at least ' if len(findings) >= FINDINGS_MAX else ''}{len(findings)}"
    if not findings:
        click.echo(f"{metrics} metrics checked: every stored aggregate is what its events say.")
    elif repair:
        click.echo(f"{metrics} metrics checked: {number} cells were wrong and are repaired.")
    else:
        click.echo(f"{metrics} metrics checked: {number} cells are wrong. Run again with --repair.")
        raise SystemExit(1)


@click.command(epilog=EPILOG)
@click.option(
    "--hour",
    type=click.DateTime(["%Y-%m-%dT%H", "%Y-%m-%dT%HZ", "%Y-%m-%dT%H:00Z", "%Y-%m-%dT%H:00:00Z"]),
    metavar="YYYY-MM-DDTHH",
    help="The UTC hour, such as 2026-01-31T10. Default: the one that ended last.",
)
@partner_rule_option
@database_options
def report(
    hour: datetime | None, partner_rule: Rules, database_url: str | None, data_dir: Path, pg_bin: str | None
) -> None:
    """Make an hour's reports for the cloud marketplaces now, as every server does by itself within a minute.

    For each entitlement, the records of its usage record groups that wait and were used before the end of the hour
    become one report of that hour, which a reporter leases and completes (UsageRecordReportService). Groups that do
    not validate any more become INVALID. What is used or retried later goes into the report of a later hour.

    Safe to repeat, and to run beside servers: there is one report per entitlement and hour, and it never changes.
    Give the --partner-rule that the servers have.

    Exit code: 0 every report is made; 1 the report of an entitlement failed, or the database did.
    """
    now = datetime.now(UTC)
    wanted = last_hour(now) if hour is None else hour.replace(tzinfo=UTC)
    if wanted > last_hour(now):
        raise click.BadParameter(
            f"the hour {wanted:%Y-%m-%dT%H} (UTC) has not ended: it is {now:%Y-%m-%dT%H:%M:%SZ} now, and the last hour "
            f"that ended is {last_hour(now):%Y-%m-%dT%H}.",
            param_hint="--hour",
        )
    numbers = itertools.count(1)

    def made(waiting: Waiting) -> None:
        click.echo(f"{next(numbers):>6}  organization {waiting.organization}  entitlement {waiting.entitlement_id}")

    async def work(database: Database) -> tuple[int, list[Waiting]]:
        number = await roll_up_hour(database, partner_rule, wanted, wait=True, made=made)
        # One that fails does not keep the others from theirs; what still waits is what failed.
        return number, await database.background(
            lambda c: waiting_entitlements(c, wanted, partner_rule, None, _FAILED_SHOWN), snapshot=True
        )

    number, failed = _with_database(database_url, data_dir, pg_bin, work, log_level=logging.ERROR)
    told = f"the hour {wanted:%Y-%m-%dT%H:%M:%SZ}"
    if number:
        click.echo(f"{number} report{'s' if number > 1 else ''} of {told} made.")
    elif not failed:
        click.echo(f"No report of {told} made: nothing waits for it, or its reports are made already.")
    if failed:
        names = ", ".join(f"{one.entitlement_id} of {one.organization}" for one in failed)
        raise click.ClickException(f"Records still wait for a report of {told}, under the entitlements {names}.")


@click.group()
def orgs() -> None:
    """Make and list organizations: the tenants, none of which sees another's data."""


@orgs.command("create")
@click.argument("name")
@database_options
def create_org(name: str, database_url: str | None, data_dir: Path, pg_bin: str | None) -> None:
    """Make an organization; its name is its id: 1..63 of a-z, 0-9 and -, beginning with a letter."""
    if not _is_organization_name(name):
        raise click.BadParameter("1..63 of a-z, 0-9 and -, beginning with a letter", param_hint="NAME")
    created = _with_database(
        database_url,
        data_dir,
        pg_bin,
        lambda database: database.background(lambda c: organizations.create_organization(c, name)),
    )
    click.echo(f"Organization {name} {'created' if created else 'exists already'}.")


@orgs.command("list")
@database_options
def list_orgs(database_url: str | None, data_dir: Path, pg_bin: str | None) -> None:
    """List every organization."""
    for name in _with_database(
        database_url, data_dir, pg_bin, lambda database: database.background(organizations.list_organizations)
    ):
        click.echo(name)


@click.group()
def keys() -> None:
    """Make, list and revoke API keys. The first key ends open mode: from then on every call needs one."""


@keys.command("create")
@click.option("--org", default=DEFAULT_ORGANIZATION, show_default=True, help="The organization that its calls act for.")
@click.option("--name", default="", help="For people: who holds it.")
@click.option(
    "--role",
    "roles",
    type=click.Choice([role.value for role in Role]),
    multiple=True,
    default=(Role.ADMIN.value,),
    show_default=True,
    help="What its callers may do: send usage, read, or everything; repeatable.",
)
@click.option(
    "--expires",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ"]),
    help="The UTC time from which on it is not valid any more. Default: never.",
)
@database_options
def create_key(
    org: str,
    name: str,
    roles: tuple[str, ...],
    expires: datetime | None,
    database_url: str | None,
    data_dir: Path,
    pg_bin: str | None,
) -> None:
    """Make an API key and print it, once: only a hash of it is kept."""
    key = new_api_key()
    until = None if expires is None else expires.replace(tzinfo=UTC)
    if until is not None and until <= datetime.now(UTC):
        raise click.BadParameter("the key would have expired already", param_hint="--expires")

    async def work(database: Database) -> None:
        try:
            await database.background(
                lambda c: organizations.create_api_key(
                    c, org, key.id, name, key.secret_hash, frozenset(map(Role, roles)), until
                )
            )
        except sa.exc.IntegrityError as error:
            raise click.ClickException(f"There is no organization {org!r}; see `metering orgs list`.") from error

    _with_database(database_url, data_dir, pg_bin, work)
    click.echo(key.text)
    click.echo("Send it as `authorization: Bearer <key>`. It is not shown again.", err=True)


@keys.command("list")
@click.option("--org", default=DEFAULT_ORGANIZATION, show_default=True, help="The organization.")
@database_options
def list_keys(org: str, database_url: str | None, data_dir: Path, pg_bin: str | None) -> None:
    """List an organization's API keys by their public ids."""
    now = datetime.now(UTC)
    for key in _with_database(
        database_url,
        data_dir,
        pg_bin,
        lambda database: database.background(lambda c: organizations.list_api_keys(c, org)),
    ):
        state = "active"
        if key.revoked_at is not None:
            state = f"revoked {key.revoked_at:%Y-%m-%d %H:%M}Z"
        elif key.expires_at is not None:
            state = f"{'expires' if key.expires_at > now else 'expired'} {key.expires_at:%Y-%m-%d %H:%M}Z"
        roles = ",".join(sorted(key.roles))
        click.echo(f"{key.id}  created {key.created_at:%Y-%m-%d %H:%M}Z  {state}  {roles}  {key.name}".rstrip())


@keys.command("revoke")
@click.argument("key_id")
@click.option("--org", default=DEFAULT_ORGANIZATION, show_default=True, help="The organization.")
@database_options
def revoke_key(key_id: str, org: str, database_url: str | None, data_dir: Path, pg_bin: str | None) -> None:
    """Revoke an API key by its public id; every server refuses it within seconds. Cannot be undone."""
    if not _with_database(
        database_url,
        data_dir,
        pg_bin,
        lambda database: database.background(lambda c: organizations.revoke_api_key(c, org, key_id)),
    ):
        raise click.ClickException(f"Organization {org!r} has no key {key_id!r}; see `metering keys list`.")
    click.echo(f"Key {key_id} is revoked.")


def _is_organization_name(name: str) -> bool:
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789-")
    return 0 < len(name) <= 63 and set(name) <= allowed and name[0].isalpha()


def _with_database(
    database_url: str | None,
    data_dir: Path,
    pg_bin: str | None,
    work: Callable[[Database], Awaitable[Result]],
    *,
    migrated: bool = True,
    log_level: int = logging.CRITICAL,
) -> Result:
    """Run `work` on the configured database, its schema brought up to date first if it is the embedded one."""
    # Beside a running server the embedded Postgres is up already, and has one owner: use that one.
    database_url = database_url or running_url(data_dir)
    config = replace(Config(), database_url=database_url, data_dir=data_dir, pg_bin=pg_bin)
    log_to_stderr(log_level)  # by default what went wrong is said once, at the end

    async def connected() -> Result:
        async with open_database(config) as (database, _):
            if migrated and database_url is None:
                await upgrade(database.engine)
            if migrated:
                await check_schema(database)
            return await work(database)

    return run(connected())


def run(work: Awaitable[Result]) -> Result:
    """Run an operator's work; what an operator can mend is told in one line."""

    async def main() -> Result:
        return await work

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(main())
    except Unavailable as error:
        # The words for callers hide the cause, which is just what an operator needs.
        raise click.ClickException(f"The database cannot be used: {_cause(error)}") from error
    except (CannotServe, GatewayError, PostgresError, BadDatabaseUrl, UnsafeDatabase, MeteringError) as error:
        raise click.ClickException(str(error)) from error
    except DATABASE_ERRORS as error:
        raise click.ClickException(f"The database cannot be used: {_cause(error)}") from error


def _cause(error: BaseException) -> BaseException:
    cause = error.__cause__ if isinstance(error, Unavailable) and error.__cause__ else error
    return getattr(cause, "orig", None) or cause


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    return uvloop.new_event_loop


def log_to_stderr(level: int) -> None:
    """Send log lines of this level and above to stderr, which is not what commands print for programs to read."""
    # gRPC's C core logs by itself; errors are enough, as calls report their own.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
