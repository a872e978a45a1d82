"""Organizations, credentials, customers, metrics, events and their aggregates."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table, and the organization that calls without credentials belong to."""
    op.create_table(
        "organizations",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("catalog_version", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("organizations_pkey")),
    )
    op.create_table(
        "page_token_keys",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("secret", postgresql.BYTEA(), nullable=False),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("page_token_keys_pkey")),
    )
    op.create_table(
        "usage_cells",
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("metric_id", sa.Uuid(), nullable=False),
        sa.Column("customer_key", sa.Text(collation="C"), nullable=False),
        sa.Column("cell_start", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("group_digest", postgresql.BYTEA(), nullable=False),
        sa.Column("group_values", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("counted", sa.BigInteger(), nullable=False),
        sa.Column("skipped", sa.BigInteger(), nullable=False),
        sa.Column("sum", sa.Numeric(), nullable=True),
        sa.Column("min", sa.Numeric(), nullable=True),
        sa.Column("max", sa.Numeric(), nullable=True),
        sa.Column("latest_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("latest_transaction_id", sa.Text(collation="C"), nullable=True),
        sa.Column("latest_value", sa.Numeric(), nullable=True),
        sa.Column("updated_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint(
            "organization_id", "metric_id", "customer_key", "cell_start", "group_digest", name=op.f("usage_cells_pkey")
        ),
    )
    op.create_table(
        "usage_distinct_values",
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("metric_id", sa.Uuid(), nullable=False),
        sa.Column("customer_key", sa.Text(collation="C"), nullable=False),
        sa.Column("cell_start", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("group_digest", postgresql.BYTEA(), nullable=False),
        sa.Column("value_digest", postgresql.BYTEA(), nullable=False),
        sa.PrimaryKeyConstraint(
            "organization_id",
            "metric_id",
            "customer_key",
            "cell_start",
            "group_digest",
            "value_digest",
            name=op.f("usage_distinct_values_pkey"),
        ),
    )
    op.create_table(
        "usage_events",
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("transaction_id", sa.Text(collation="C"), nullable=False),
        sa.Column("customer_key", sa.Text(collation="C"), nullable=False),
        sa.Column("event_type", sa.Text(collation="C"), nullable=False),
        sa.Column("timestamp", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("properties", postgresql.JSONB(), nullable=False),
        sa.Column("digest", postgresql.BYTEA(), nullable=False),
        sa.Column("source", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("ingested_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("voided_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("organization_id", "transaction_id", name=op.f("usage_events_pkey")),
    )
    op.create_index(
        op.f("usage_events_organization_id_customer_key_timestamp_idx"),
        "usage_events",
        ["organization_id", "customer_key", "timestamp"],
        unique=False,
    )
    op.create_index(
        op.f("usage_events_organization_id_timestamp_idx"),
        "usage_events",
        ["organization_id", "timestamp"],
        unique=False,
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("secret_hash", postgresql.BYTEA(), nullable=False),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("revoked_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["organization_id"], ["organizations.id"], name=op.f("api_keys_organization_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("api_keys_pkey")),
    )
    op.create_index(op.f("api_keys_organization_id_idx"), "api_keys", ["organization_id"], unique=False)
    op.create_table(
        "billable_metrics",
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(collation="C"), nullable=True),
        sa.Column("definition", postgresql.JSONB(), nullable=False),
        sa.Column("create_digest", postgresql.BYTEA(), nullable=False),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("archived_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("backfilled_until", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("backfill_from", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("backfill_to", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("backfilled_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name=op.f("billable_metrics_organization_id_fkey")
        ),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("billable_metrics_pkey")),
        sa.UniqueConstraint("organization_id", "key", name=op.f("billable_metrics_organization_id_key_key")),
    )
    op.create_table(
        "customers",
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("buyer_id", sa.Text(collation="C"), nullable=False),
        sa.Column("billing_frequency", sa.Text(), nullable=True),
        sa.Column("billing_anchor_date", sa.Date(), nullable=True),
        sa.Column("billing_starting_on", sa.Date(), nullable=True),
        sa.Column("billing_ending_before", sa.Date(), nullable=True),
        sa.Column("custom_fields", postgresql.JSONB(), nullable=False),
        sa.Column("create_digest", postgresql.BYTEA(), nullable=False),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("archived_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["organization_id"], ["organizations.id"], name=op.f("customers_organization_id_fkey")),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("customers_pkey")),
        sa.UniqueConstraint("organization_id", "buyer_id", name=op.f("customers_organization_id_buyer_id_key")),
    )
    op.create_table(
        "customer_keys",
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("key", sa.Text(collation="C"), nullable=False),
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column(
            "attached_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["organization_id", "customer_id"],
            ["customers.organization_id", "customers.id"],
            name=op.f("customer_keys_organization_id_customer_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "key", name=op.f("customer_keys_pkey")),
    )
    op.create_index(
        op.f("customer_keys_organization_id_customer_id_idx"),
        "customer_keys",
        ["organization_id", "customer_id"],
        unique=False,
    )
    op.create_table(
        "released_keys",
        sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
        sa.Column("customer_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.Text(collation="C"), nullable=False),
        sa.Column("released_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id", "customer_id"],
            ["customers.organization_id", "customers.id"],
            name=op.f("released_keys_organization_id_customer_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "customer_id", "key", name=op.f("released_keys_pkey")),
    )
    op.bulk_insert(sa.table("organizations", sa.column("id")), [{"id": "default"}])
