"""Owns the schema: every table, constraint and index, with the reason for each.

The organization leads every key, so that one organization's rows lie together and the schema can be distributed by it.
For the same reason the hot tables (events, cells, distinct values) have no foreign keys, triggers or sequences.
Text that is compared or ordered is COLLATE "C": byte order, the same on every host.
"""

import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, BYTEA, JSONB, TIMESTAMP

METADATA = sa.MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)

KEY = sa.Text(collation="C")
INSTANT = TIMESTAMP(timezone=True)
NUMERIC = sa.Numeric(asdecimal=True)


def _organization(*, references: bool = False) -> sa.Column[str]:
    constraints = [sa.ForeignKey("organizations.id")] if references else []
    return sa.Column("organization_id", KEY, *constraints, primary_key=True)


# The tenants. `catalog_version` moves with every change of a metric's definition, state or backfill, under the
# organization's exclusive lock: whoever reads it under the shared lock knows whether its compiled metrics are current.
organizations = sa.Table(
    "organizations",
    METADATA,
    sa.Column("id", KEY, primary_key=True),
    sa.Column("catalog_version", sa.BigInteger, nullable=False, server_default=sa.text("1")),
    sa.Column("created_at", INSTANT, nullable=False, server_default=sa.func.now()),
)

# Credentials. Only a hash of the secret is kept; `id` is the public part of the key and finds the row.
api_keys = sa.Table(
    "api_keys",
    METADATA,
    sa.Column("id", KEY, primary_key=True),
    sa.Column("organization_id", KEY, sa.ForeignKey("organizations.id"), nullable=False, index=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("secret_hash", BYTEA, nullable=False),
    sa.Column("created_at", INSTANT, nullable=False, server_default=sa.func.now()),
    sa.Column("revoked_at", INSTANT),
)

# Secrets that sign page tokens; the newest signs, the newest two are accepted.
page_token_keys = sa.Table(
    "page_token_keys",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("secret", BYTEA, nullable=False),
    sa.Column("created_at", INSTANT, nullable=False, server_default=sa.func.now()),
)

customers = sa.Table(
    "customers",
    METADATA,
    _organization(references=True),
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("buyer_id", KEY, nullable=False),
    sa.Column("billing_frequency", sa.Text),
    sa.Column("billing_anchor_date", sa.Date),
    sa.Column("billing_starting_on", sa.Date),
    sa.Column("billing_ending_before", sa.Date),
    sa.Column("custom_fields", JSONB, nullable=False),
    # What it was created with: a repeated creation is told from a different one even after the customer changed.
    sa.Column("create_digest", BYTEA, nullable=False),
    sa.Column("created_at", INSTANT, nullable=False, server_default=sa.func.now()),
    sa.Column("updated_at", INSTANT, nullable=False, server_default=sa.func.now()),
    sa.Column("archived_at", INSTANT),
    sa.UniqueConstraint("organization_id", "buyer_id"),
)

# Every key by which events may name a customer: its own id, and its ingest aliases. The one place where keys are
# resolved, when usage is read; the primary key is what keeps a key with one customer.
customer_keys = sa.Table(
    "customer_keys",
    METADATA,
    _organization(),
    sa.Column("key", KEY, primary_key=True),
    sa.Column("customer_id", sa.Uuid, nullable=False),
    # When the customer took the key, and with it the usage under it.
    sa.Column("attached_at", INSTANT, nullable=False, server_default=sa.func.clock_timestamp()),
    sa.ForeignKeyConstraint(["organization_id", "customer_id"], ["customers.organization_id", "customers.id"]),
    sa.Index(None, "organization_id", "customer_id"),
)

# Keys that a customer gave up, and when it last did: its windows with usage under them changed then, and no cell did.
released_keys = sa.Table(
    "released_keys",
    METADATA,
    _organization(),
    sa.Column("customer_id", sa.Uuid, primary_key=True),
    sa.Column("key", KEY, primary_key=True),
    sa.Column("released_at", INSTANT, nullable=False),
    sa.ForeignKeyConstraint(["organization_id", "customer_id"], ["customers.organization_id", "customers.id"]),
)

billable_metrics = sa.Table(
    "billable_metrics",
    METADATA,
    _organization(references=True),
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("key", KEY),
    # The caller's definition as JSON (`BillableMetric.definition`); it never changes, `name` above is the current one.
    sa.Column("definition", JSONB, nullable=False),
    sa.Column("create_digest", BYTEA, nullable=False),
    sa.Column("created_at", INSTANT, nullable=False),
    sa.Column("archived_at", INSTANT),
    # The first hour whose past events are not counted yet, and the range that the backfill began with.
    # NULL = everything is counted.
    sa.Column("backfilled_until", INSTANT),
    sa.Column("backfill_from", INSTANT),
    sa.Column("backfill_to", INSTANT),
    # When the backfill ended, and its usage could first be read: all of it changed then.
    sa.Column("backfilled_at", INSTANT),
    sa.UniqueConstraint("organization_id", "key"),
)

# The truth. Everything else about usage can be computed again from here.
usage_events = sa.Table(
    "usage_events",
    METADATA,
    _organization(),
    # The primary key is the idempotency promise: one row per transaction id, for ever.
    sa.Column("transaction_id", KEY, primary_key=True),
    sa.Column("customer_key", KEY, nullable=False),
    sa.Column("event_type", KEY, nullable=False),
    sa.Column("timestamp", INSTANT, nullable=False),
    sa.Column("properties", JSONB, nullable=False),
    sa.Column("digest", BYTEA, nullable=False),
    # 0 = sent as an event, 1 = made from a usage record group.
    sa.Column("source", sa.SmallInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("ingested_at", INSTANT, nullable=False, server_default=sa.func.now()),
    # A voided event counts nowhere, but its id stays taken.
    sa.Column("voided_at", INSTANT),
    # Backfills, recomputation and verification read by time.
    sa.Index(None, "organization_id", "timestamp"),
    # Cut cells of a customer, search by customer, and the list of keys that no customer owns.
    sa.Index(None, "organization_id", "customer_key", "timestamp"),
)

# The aggregates: one row per metric, customer key as sent, cell of time and values of all group properties.
usage_cells = sa.Table(
    "usage_cells",
    METADATA,
    _organization(),
    sa.Column("metric_id", sa.Uuid, primary_key=True),
    sa.Column("customer_key", KEY, primary_key=True),
    sa.Column("cell_start", INSTANT, primary_key=True),
    # Digest of `group_values`, which can be longer than an index entry may be; empty when there are none.
    sa.Column("group_digest", BYTEA, primary_key=True),
    # Values of the metric's group properties in the order of `group_properties`; NULL = the event lacks it.
    sa.Column("group_values", ARRAY(sa.Text), nullable=False),
    sa.Column("counted", sa.BigInteger, nullable=False),
    sa.Column("skipped", sa.BigInteger, nullable=False),
    # Only the columns of the metric's aggregation are filled. Unconstrained: sums stay exact at any size.
    sa.Column("sum", NUMERIC),
    sa.Column("min", NUMERIC),
    sa.Column("max", NUMERIC),
    sa.Column("latest_at", INSTANT),
    sa.Column("latest_transaction_id", KEY),
    sa.Column("latest_value", NUMERIC),
    sa.Column("updated_at", INSTANT, nullable=False),
)

# The different values of UNIQUE metrics per cell, as 16-byte digests.
usage_distinct_values = sa.Table(
    "usage_distinct_values",
    METADATA,
    _organization(),
    sa.Column("metric_id", sa.Uuid, primary_key=True),
    sa.Column("customer_key", KEY, primary_key=True),
    sa.Column("cell_start", INSTANT, primary_key=True),
    sa.Column("group_digest", BYTEA, primary_key=True),
    sa.Column("value_digest", BYTEA, primary_key=True),
)

# A batch on its way in: one temporary table per connection, emptied by every commit. Not part of the schema proper.
incoming_events = sa.Table(
    "incoming_events",
    sa.MetaData(),
    sa.Column("transaction_id", KEY, nullable=False),
    sa.Column("customer_key", KEY, nullable=False),
    sa.Column("event_type", KEY, nullable=False),
    sa.Column("timestamp", INSTANT, nullable=False),
    sa.Column("properties", JSONB, nullable=False),
    sa.Column("digest", BYTEA, nullable=False),
    prefixes=["TEMPORARY"],
    postgresql_on_commit="DELETE ROWS",
)


def texts(values: Sequence[str]) -> sa.BindParameter[Any]:
    """Bind strings as an array."""
    return sa.literal(list(values), ARRAY(sa.Text))


def uuids(values: Sequence[uuid.UUID]) -> sa.BindParameter[Any]:
    """Bind ids as an array."""
    return sa.literal(list(values), ARRAY(sa.Uuid))


def violated_constraint(error: sa.exc.IntegrityError) -> str | None:
    """Return the name of the constraint that a statement violated."""
    return getattr(getattr(error.orig, "__cause__", None), "constraint_name", None)
