"""Roles and expiry of API keys, and row level security: each organization's rows for its own transactions only."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"

_MINE = "current_setting('metering.organization', true)"
_OWNED = (
    "customers",
    "customer_keys",
    "released_keys",
    "billable_metrics",
    "usage_events",
    "usage_cells",
    "usage_distinct_values",
    "products",
    "entitlements",
    "entitlement_carries",
    "usage_record_groups",
    "usage_records",
    "usage_record_reports",
    "usage_record_report_lines",
)
_DELETED_FROM = ("customer_keys", "usage_distinct_values")

# Roles belong to the whole server: another database may have made this one, or be about to.
_ROLE = """
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'metering_app') THEN
        BEGIN
            CREATE ROLE metering_app NOLOGIN;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;
        END;
    END IF;
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'metering_app' AND (rolsuper OR rolbypassrls)) THEN
        RAISE EXCEPTION 'the role metering_app may not be a superuser nor have BYPASSRLS';
    END IF;
    BEGIN
        SET LOCAL ROLE metering_app;
        RESET ROLE;
    EXCEPTION WHEN insufficient_privilege THEN
        EXECUTE format('GRANT metering_app TO %I', current_user);
    END;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE EXCEPTION 'the role metering_app is needed, and % may not make it or become it; an administrator can: '
        'CREATE ROLE metering_app NOLOGIN; GRANT metering_app TO %;', current_user, current_user
        USING ERRCODE = 'insufficient_privilege';
END
$$
"""

# Containment is not leakproof, so that under row level security no index is used for it. This is the one place that
# looks past it, for the organization of the transaction. The statement is planned for the values it has: SECURITY
# DEFINER functions are never inlined, and a plan for any value would not know what is rare.
_CONTAINING = """
CREATE FUNCTION metering_groups_containing(wanted jsonb, since timestamptz, before timestamptz)
RETURNS TABLE (
    id text, created_at timestamptz, serial_id bigint, partner text, product_id text, entitlement_id text,
    customer_id uuid, status text, source text
)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN QUERY EXECUTE
        'SELECT id, created_at, serial_id, partner, product_id, entitlement_id, customer_id, status, source'
        ' FROM usage_record_groups WHERE organization_id = $1 AND created_at >= $2 AND created_at < $3'
        ' AND metering_scoped(organization_id, meta_info) @> metering_scoped($1, $4)'
        USING current_setting('metering.organization'), since, before, wanted;
END
$$
"""


def upgrade() -> None:
    """Apply."""
    op.add_column("api_keys", sa.Column("roles", postgresql.ARRAY(sa.Text()), server_default="{admin}", nullable=False))
    op.alter_column("api_keys", "roles", server_default=None)
    op.execute("UPDATE api_keys SET roles = '{ingest,read}' WHERE NOT is_admin")
    op.drop_column("api_keys", "is_admin")
    op.add_column("api_keys", sa.Column("expires_at", postgresql.TIMESTAMP(timezone=True), nullable=True))

    op.execute(_ROLE)
    op.execute("DO $$ BEGIN EXECUTE format('GRANT USAGE ON SCHEMA %I TO metering_app', current_schema()); END $$")
    for table, column in (("organizations", "id"), *((table, "organization_id") for table in _OWNED)):
        op.execute(f"GRANT SELECT, UPDATE ON {table} TO metering_app")
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY own_organization ON {table} TO metering_app"
            f" USING ({column} = {_MINE}) WITH CHECK ({column} = {_MINE})"
        )
    for table in _OWNED:
        op.execute(f"GRANT INSERT ON {table} TO metering_app")
    for table in _DELETED_FROM:
        op.execute(f"GRANT DELETE ON {table} TO metering_app")

    op.execute(
        "CREATE FUNCTION metering_scoped(organization text, content jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE"
        " PARALLEL SAFE AS $$ SELECT jsonb_build_object(organization, content) $$"
    )
    op.drop_index("usage_record_groups_by_meta_info_idx", "usage_record_groups")
    op.create_index(
        "usage_record_groups_by_meta_info_idx",
        "usage_record_groups",
        [sa.func.metering_scoped(sa.text("organization_id"), sa.text("meta_info")).label("scoped")],
        postgresql_using="gin",
        postgresql_ops={"scoped": "jsonb_path_ops"},
    )
    op.execute(_CONTAINING)
    op.execute("REVOKE ALL ON FUNCTION metering_groups_containing FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION metering_groups_containing TO metering_app")


def downgrade() -> None:
    """Not offered: restore a backup instead."""
    raise NotImplementedError
