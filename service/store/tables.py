"""Owns the schema: every table, constraint and index, with the reason for each.

The organization leads every key, so that one organization's rows lie together and the schema can be distributed by it.
For the same reason the hot tables (events, cells, distinct values) have no foreign keys, triggers or sequences.
Text that is compared or ordered is COLLATE "C": byte order, the same on every host.

Statements name the organization. Behind that Postgres has a wall of its own: callers' transactions run as
APPLICATION_ROLE, to which row level security shows the rows of the organization in ORGANIZATION_SETTING and no others.
Under it a condition helps to find rows by an index only if its operator is leakproof, as comparisons of text, times and
ids are.
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

# Owns nothing and cannot log in; whoever logs in as the owner of the tables may become it.
APPLICATION_ROLE = "metering_app"
ORGANIZATION_SETTING = "metering.organization"

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
    # The last serial id given to a usage record group. Moving it orders the organization's reports by their commits.
    sa.Column("last_group_serial", sa.BigInteger, nullable=False, server_default=sa.text("0")),
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
    # What its callers may do.
    sa.Column("roles", ARRAY(sa.Text), nullable=False),
    sa.Column("created_at", INSTANT, nullable=False, server_default=sa.func.now()),
    sa.Column("expires_at", INSTANT),
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
    # Set = the record metric of this key: there is one for every key that records may have.
    sa.Column("record_key", KEY),
    sa.UniqueConstraint("organization_id", "key"),
    sa.UniqueConstraint("organization_id", "record_key"),
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

# The aggregates, "cells": per metric, customer key as sent and stretch of time a row for all events; beside it, of a
# metric with group keys, one for each group, which is a value for each of its group properties.
usage_cells = sa.Table(
    "usage_cells",
    METADATA,
    _organization(),
    sa.Column("metric_id", sa.Uuid, primary_key=True),
    sa.Column("customer_key", KEY, primary_key=True),
    sa.Column("cell_start", INSTANT, primary_key=True),
    # Digest of `cell_group`, which can be longer than an index entry may be; empty in the row for all events.
    sa.Column("group_digest", BYTEA, primary_key=True),
    # Values in the order of `group_properties`, NULL = the events lack it; none in the row for all events.
    sa.Column("cell_group", ARRAY(sa.Text), nullable=False),
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
    # What a question without groups reads, without the entries of all groups between.
    sa.Index(
        "usage_cells_of_all_groups_idx",
        "organization_id",
        "metric_id",
        "customer_key",
        "cell_start",
        postgresql_where=sa.text("group_digest = ''::bytea"),
    ),
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

# What is sold on the marketplaces; dimensions are a list of [key, name].
products = sa.Table(
    "products",
    METADATA,
    _organization(references=True),
    sa.Column("id", KEY, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("partner", sa.Text, nullable=False),
    sa.Column("dimensions", JSONB, nullable=False),
    sa.Column("create_digest", BYTEA, nullable=False),
    sa.Column("created_at", INSTANT, nullable=False, server_default=sa.func.now()),
    sa.Column("updated_at", INSTANT, nullable=False, server_default=sa.func.now()),
)

# Who bought what. The partner is the product's, here too because groups are listed by it.
entitlements = sa.Table(
    "entitlements",
    METADATA,
    _organization(references=True),
    sa.Column("id", KEY, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("product_id", KEY, nullable=False),
    sa.Column("customer_id", sa.Uuid, nullable=False),
    sa.Column("partner", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    # Every state with the time it began, oldest first: [["ACTIVE", "2026-01-31T00:00:00+00:00"], ...]
    sa.Column("status_changes", JSONB, nullable=False),
    sa.Column("starting_on", INSTANT, nullable=False),
    sa.Column("ending_before", INSTANT),
    sa.Column("dimensions", JSONB, nullable=False),
    sa.Column("billable_metric_keys", ARRAY(sa.Text), nullable=False),
    sa.Column("create_digest", BYTEA, nullable=False),
    sa.Column("created_at", INSTANT, nullable=False, server_default=sa.func.now()),
    sa.Column("updated_at", INSTANT, nullable=False, server_default=sa.func.now()),
    sa.ForeignKeyConstraint(["organization_id", "product_id"], ["products.organization_id", "products.id"]),
    sa.ForeignKeyConstraint(["organization_id", "customer_id"], ["customers.organization_id", "customers.id"]),
)

# What was used and not reported, because a partner takes whole numbers: the sum over reports that did not fail of what
# went into them minus what they said.
entitlement_carries = sa.Table(
    "entitlement_carries",
    METADATA,
    _organization(),
    sa.Column("entitlement_id", KEY, primary_key=True),
    sa.Column("key", KEY, primary_key=True),
    sa.Column("carried", NUMERIC, nullable=False),
    sa.ForeignKeyConstraint(["organization_id", "entitlement_id"], ["entitlements.organization_id", "entitlements.id"]),
)

_BY_TIME = ("created_at", "serial_id")

# Groups as reported. `status` follows from the states of the group's records; it is kept since groups are listed by it.
usage_record_groups = sa.Table(
    "usage_record_groups",
    METADATA,
    _organization(references=True),
    # The primary key is the idempotency promise: one group per id, for ever.
    sa.Column("id", KEY, primary_key=True),
    sa.Column("serial_id", sa.BigInteger, nullable=False),
    sa.Column("partner", sa.Text, nullable=False),
    sa.Column("product_id", KEY, nullable=False),
    sa.Column("entitlement_id", KEY, nullable=False),
    sa.Column("customer_id", sa.Uuid, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    # When the usage was.
    sa.Column("timestamp", INSTANT, nullable=False),
    sa.Column("meta_info", JSONB, nullable=False),
    sa.Column("digest", BYTEA, nullable=False),
    sa.Column("report_id", sa.Uuid),
    sa.Column("invalid_reasons", JSONB),
    sa.Column("created_at", INSTANT, nullable=False),
    sa.Column("updated_at", INSTANT, nullable=False),
    sa.Column("reported_at", INSTANT),
    sa.ForeignKeyConstraint(["organization_id", "entitlement_id"], ["entitlements.organization_id", "entitlements.id"]),
    # Each filter of the list, newest first.
    sa.Index("usage_record_groups_by_time_idx", "organization_id", *_BY_TIME),
    *(
        sa.Index(f"usage_record_groups_by_{column}_idx", "organization_id", column, *_BY_TIME)
        for column in ("partner", "product_id", "entitlement_id", "customer_id", "status", "source")
    ),
    # Each entry is a path with its value, and every path begins with the organization: one's entries are no other's.
    sa.Index(
        "usage_record_groups_by_meta_info_idx",
        sa.func.metering_scoped(sa.text("organization_id"), sa.text("meta_info")).label("scoped"),
        postgresql_using="gin",
        postgresql_ops={"scoped": "jsonb_path_ops"},
    ),
)

# The records of groups, each with the state of its way to the marketplace.
usage_records = sa.Table(
    "usage_records",
    METADATA,
    _organization(),
    sa.Column("group_id", KEY, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("entitlement_id", KEY, nullable=False),
    # The dimension, or the billable metric, that it counts for.
    sa.Column("key", KEY, nullable=False),
    sa.Column("quantity", NUMERIC, nullable=False),
    sa.Column("properties", JSONB),
    sa.Column("timestamp", INSTANT, nullable=False),
    # The group's status is the first in order among the states of its records (`domain.record_groups.STATUS_ORDER`).
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("report_id", sa.Uuid),
    sa.Column("failure", sa.Text),
    sa.ForeignKeyConstraint(
        ["organization_id", "group_id"], ["usage_record_groups.organization_id", "usage_record_groups.id"]
    ),
    # What waits for the next report of an entitlement.
    sa.Index(
        "usage_records_waiting_idx",
        "organization_id",
        "entitlement_id",
        "timestamp",
        postgresql_where=sa.text("state = 'CREATED'"),
    ),
    # What is in a report.
    sa.Index(None, "organization_id", "report_id"),
)

# One entitlement's hour, as its marketplace is told. What it says never changes; its delivery does.
usage_record_reports = sa.Table(
    "usage_record_reports",
    METADATA,
    _organization(references=True),
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("partner", sa.Text, nullable=False),
    sa.Column("product_id", KEY, nullable=False),
    sa.Column("entitlement_id", KEY, nullable=False),
    sa.Column("customer_id", sa.Uuid, nullable=False),
    sa.Column("marketplace_time", INSTANT, nullable=False),
    sa.Column("report_deadline", INSTANT, nullable=False),
    sa.Column("group_count", sa.BigInteger, nullable=False),
    sa.Column("created_at", INSTANT, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("completed_at", INSTANT),
    sa.Column("lease_token", sa.Text),
    sa.Column("lease_deadline", INSTANT),
    sa.Column("lease_count", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.ForeignKeyConstraint(["organization_id", "entitlement_id"], ["entitlements.organization_id", "entitlements.id"]),
    # Marketplaces refuse a second quantity for one time.
    sa.UniqueConstraint("organization_id", "entitlement_id", "marketplace_time"),
    sa.Index("usage_record_reports_by_time_idx", "organization_id", "marketplace_time", "id"),
    sa.Index("usage_record_reports_by_customer_id_idx", "organization_id", "customer_id", "marketplace_time", "id"),
    # What may be leased, the most urgent first.
    sa.Index(
        "usage_record_reports_pending_idx",
        "organization_id",
        "report_deadline",
        "id",
        postgresql_where=sa.text("status = 'PENDING'"),
    ),
    sa.Index("usage_record_reports_by_lease_idx", "organization_id", "lease_token"),
)

# What a report says of one dimension.
usage_record_report_lines = sa.Table(
    "usage_record_report_lines",
    METADATA,
    _organization(),
    sa.Column("report_id", sa.Uuid, primary_key=True),
    sa.Column("key", KEY, primary_key=True),
    sa.Column("quantity", NUMERIC, nullable=False),
    sa.Column("used", NUMERIC, nullable=False),
    sa.Column("carried_before", NUMERIC, nullable=False),
    sa.Column("record_count", sa.BigInteger, nullable=False),
    # REPORTED or FAILED, once it is known.
    sa.Column("outcome", sa.Text),
    sa.Column("message", sa.Text, nullable=False, server_default=""),
    sa.ForeignKeyConstraint(
        ["organization_id", "report_id"], ["usage_record_reports.organization_id", "usage_record_reports.id"]
    ),
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
    sa.Column("source", sa.SmallInteger, nullable=False, server_default=sa.text("0")),
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
