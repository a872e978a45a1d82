"""Things that are written twice agree: migrations and tables, proto enums and the domain's, protos and stubs."""

import enum
import importlib
import random
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import test_voiding
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from conftest import Client
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from metering.v1 import (
    billable_metric_pb2,
    customer_pb2,
    entitlement_pb2,
    error_reason_pb2,
    event_pb2,
    usage_pb2,
    usage_record_group_pb2,
    usage_record_report_pb2,
)
from service.database import Database
from service.domain.customers import BillingFrequency
from service.domain.entitlements import EntitlementStatus
from service.domain.events import EventSource, Verdict
from service.domain.metrics import Aggregation
from service.domain.partners import Partner
from service.domain.record_groups import GroupStatus, RecordState, Source
from service.domain.record_reports import ReportOutcome, ReportStatus
from service.domain.windows import WindowSize
from service.errors import Reason
from service.migrations import is_current, upgrade
from service.server import SERVICES
from service.store.tables import METADATA, usage_cells

REPOSITORY = Path(__file__).resolve().parent.parent


# --- Migrations and table definitions


async def test_migrations_make_the_tables_that_are_defined(database: Database) -> None:
    """Alembic finds no difference in tables, columns, types, defaults, indexes or constraints."""

    def compare(connection: sa.Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, METADATA))

    async with database.engine.connect() as connection:
        assert await connection.run_sync(compare) == []


async def test_what_alembic_does_not_compare_agrees_too(database: Database) -> None:
    """Primary keys in their order, the names of all constraints, and the collation of every text column."""

    def describe(connection: sa.Connection) -> dict[str, Any]:
        inspector = sa.inspect(connection)
        return {
            table: (
                inspector.get_pk_constraint(table),
                sorted(str(one["name"]) for one in inspector.get_unique_constraints(table)),
                sorted(str(one["name"]) for one in inspector.get_foreign_keys(table)),
                # Their conditions too.
                {str(one["name"]): one for one in inspector.get_indexes(table)},
                {str(one["name"]): getattr(one["type"], "collation", None) for one in inspector.get_columns(table)},
            )
            for table in METADATA.tables
        }

    async with database.engine.begin() as connection:
        migrated = await connection.run_sync(describe)
        for table in METADATA.tables:
            await connection.execute(sa.DDL(f'DROP TABLE "{table}" CASCADE'))
        await connection.run_sync(METADATA.create_all)
        defined = await connection.run_sync(describe)
        await connection.rollback()
    assert migrated == defined


async def test_upgrade_of_an_upgraded_database_changes_nothing(database: Database) -> None:
    """A second upgrade leaves schema and rows as they are."""
    rows = sa.text("SELECT id, catalog_version, created_at FROM organizations")
    async with database.engine.connect() as connection:
        before = (await connection.execute(rows)).all()
    await upgrade(database.engine)
    assert await is_current(database.engine)
    async with database.engine.connect() as connection:
        assert (await connection.execute(rows)).all() == before
    assert [row.id for row in before] == ["default"]


async def test_totals_of_what_was_stored_before_them(client: Client, database: Database) -> None:
    """Cells of groups from before there were totals get the ones that storing their events gives, emptied ones too."""
    book = await test_voiding.opened(client, database)
    await book.ingest(test_voiding.drawn(random.Random(1), 400, hours=3))
    await book.ingest([test_voiding.at(500, "alone", q=1, u="x", g="eu")])
    await book.void(["alone", *(one.transaction_id for one in book.stored[::3])])
    totals = usage_cells.c.group_digest == b""
    grouped = [uuid.UUID(one.id) for one in book.definitions if one.group_keys]
    columns = [one for one in usage_cells.c if one.name != "updated_at"]
    of_grouped = sa.select(*columns).where(totals, usage_cells.c.metric_id.in_(grouped)).order_by(*columns[:4])
    changed = sa.select(sa.func.max(usage_cells.c.updated_at)).group_by(*columns[:4]).order_by(*columns[:4])
    async with database.engine.begin() as connection:
        before = (await connection.execute(of_grouped)).all()
        await connection.execute(sa.delete(usage_cells).where(totals, usage_cells.c.metric_id.in_(grouped)))
        await connection.execute(sa.DDL("DROP INDEX usage_cells_of_all_groups_idx"))
        await connection.execute(sa.DDL("ALTER TABLE usage_cells RENAME cell_group TO group_values"))
        of_groups = (await connection.execute(changed)).scalars().all()

        def migrate(synchronous: sa.Connection) -> None:
            with Operations.context(MigrationContext.configure(synchronous)):
                importlib.import_module("service.migrations.versions.0004_totals_beside_groups").upgrade()

        await connection.run_sync(migrate)
        assert (await connection.execute(of_grouped)).all() == before
        assert (await connection.execute(changed)).scalars().all() == of_groups
    assert {row.metric_id for row in before} == set(grouped)
    assert 0 in {row.counted + row.skipped for row in before}
    await book.check()


async def test_another_version_is_not_current(database: Database) -> None:
    """A database of a version that this one does not know is told from its own."""
    async with database.engine.begin() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    assert not await is_current(database.engine)


# --- The contract and the domain

ENUMS: list[tuple[EnumTypeWrapper, str, type[enum.Enum]]] = [
    (billable_metric_pb2.AggregationType, "AGGREGATION_TYPE_", Aggregation),
    (usage_pb2.WindowSize, "WINDOW_SIZE_", WindowSize),
    (event_pb2.Verdict, "VERDICT_", Verdict),
    (event_pb2.EventSource, "EVENT_SOURCE_", EventSource),
    (customer_pb2.BillingFrequency, "BILLING_FREQUENCY_", BillingFrequency),
    (error_reason_pb2.ErrorReason, "ERROR_REASON_", Reason),
    (entitlement_pb2.Partner, "PARTNER_", Partner),
    (entitlement_pb2.EntitlementStatus, "ENTITLEMENT_STATUS_", EntitlementStatus),
    (usage_record_group_pb2.UsageRecordGroupSource, "USAGE_RECORD_GROUP_SOURCE_", Source),
    (usage_record_group_pb2.UsageRecordGroupStatus, "USAGE_RECORD_GROUP_STATUS_", GroupStatus),
    (usage_record_group_pb2.UsageRecordState, "USAGE_RECORD_STATE_", RecordState),
    (usage_record_report_pb2.UsageRecordReportStatus, "USAGE_RECORD_REPORT_STATUS_", ReportStatus),
    (usage_record_report_pb2.ReportOutcome, "REPORT_OUTCOME_", ReportOutcome),
]


@pytest.mark.parametrize(("wire", "prefix", "domain"), ENUMS, ids=[one[2].__name__ for one in ENUMS])
def test_proto_enums_are_the_domains(wire: EnumTypeWrapper, prefix: str, domain: type[enum.Enum]) -> None:
    """Every value but 0 = UNSPECIFIED has the name of exactly one domain value, and the other way round."""
    names = {number: name for name, number in wire.items()}
    assert names.pop(0) == f"{prefix}UNSPECIFIED"
    assert {name.removeprefix(prefix) for name in names.values()} == {one.name for one in domain}
    if domain not in {Verdict, EventSource}:  # all others go by their values
        assert {one.value for one in domain} == {one.name for one in domain}


def test_every_error_reason_is_documented_with_its_own_example() -> None:
    """Above each reason stands an ErrorInfo as JSON that names that reason."""
    lines = (REPOSITORY / "protos/metering/v1/error_reason.proto").read_text().splitlines()
    for i, line in enumerate(lines):
        name = line.strip().partition(" ")[0].removeprefix("ERROR_REASON_")
        if line.strip().startswith("ERROR_REASON_") and name != "UNSPECIFIED":
            assert f'{{"reason":"{name}","domain":"metering"' in lines[i - 1], name


# --- Generated code


def test_generated_code_is_fresh() -> None:
    """The stubs and the descriptor set in generated/ are what the protos say."""
    done = subprocess.run(
        [sys.executable, "protos/generate.py", "--check"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_descriptor_set_is_whole() -> None:
    """A tool without reflection finds every service, and the error details, in the committed descriptor set."""
    raw = (REPOSITORY / "generated/metering/descriptors.binpb").read_bytes()
    files = descriptor_pb2.FileDescriptorSet.FromString(raw).file
    pool = descriptor_pool.DescriptorPool()
    for file in files:  # fails when a file that another one imports is missing
        pool.Add(file)  # type: ignore[no-untyped-call]
    for name in SERVICES:
        assert pool.FindServiceByName(name).methods
    for name in ("ErrorInfo", "BadRequest", "RetryInfo"):
        assert pool.FindMessageTypeByName(f"google.rpc.{name}").fields
