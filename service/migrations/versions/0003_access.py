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

# Roles belong to the whole server: another database may have made this one, or be about to. It must own nothing and
# inherit nothing, or the policies would not bind it. Since Postgres 16 whoever makes a role may not become it without
# a grant, which they may give themselves.
_ROLE = """
DO $$
DECLARE
    missing boolean := NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'metering_app');
BEGIN
    IF missing THEN
        BEGIN
            CREATE ROLE metering_app NOLOGIN;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;
        END;
    END IF;
    IF EXISTS (
        SELECT FROM pg_roles AS role WHERE rolname = 'metering_app' AND (
            rolsuper OR rolbypassrls OR rolcreaterole OR EXISTS (SELECT FROM pg_auth_members WHERE member = role.oid)
        )
    ) THEN
        RAISE EXCEPTION 'the role metering_app may not be a superuser, nor have BYPASSRLS or CREATEROLE, nor be a'
            ' member of other roles';
    END IF;
    BEGIN
        SET LOCAL ROLE metering_app;
        RESET ROLE;
    EXCEPTION WHEN insufficient_privilege THEN
        BEGIN
            EXECUTE format('GRANT metering_app TO %I', current_user);
        EXCEPTION WHEN unique_violation THEN
            NULL;
        END;
    END;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE EXCEPTION 'the role metering_app is needed, and % may not %; an administrator can: %GRANT metering_app TO %;',
        quote_ident(current_user), CASE WHEN missing THEN 'make it' ELSE 'become it' END,
        CASE WHEN missing THEN 'CREATE ROLE metering_app NOLOGIN; ' ELSE '' END, quote_ident(current_user)
        USING ERRCODE = 'insufficient_privilege';
END
$$
"""

# Containment is not leakproof, so that under row level security no index is used for it. This is the one place that
# looks past it, for the organization of the transaction. The statement is planned for the values it has: SECURITY
# DEFINER functions are never inlined, and a plan for any value would not know what is rare. Where names are looked for
# is fixed, temporary tables last, so that nobody can put another table in the place of the right one.
_CONTAINING = """
CREATE FUNCTION metering_groups_containing(wanted jsonb, since timestamptz, before timestamptz)
RETURNS TABLE (
    id text, created_at timestamptz, serial_id bigint, partner text, product_id text, entitlement_id text,
    customer_id uuid, status text, source text
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
AS $$
BEGIN
    RETURN QUERY EXECUTE
        'SELECT id, created_at, serial_id, partner, product_id, entitlement_id, customer_id, status, source'
        ' FROM usage_record_groups WHERE organization_id = $1 AND created_at >= $2 AND created_at < $3'
        ' AND metering_scoped(organization_id, meta_info) @> metering_scoped($1, $4)'
        USING current_setting('metering.organization', true), since, before, wanted;
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

    # Not as text, which would be read anew, under whatever search path, each time; and of functions that are immutable
    # themselves, as jsonb_build_object is not: so it is inlined, and a search takes a third of the time.
    op.execute(
        "CREATE FUNCTION metering_scoped(organization text, content jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE"
        " PARALLEL SAFE RETURN jsonb_set('{}', ARRAY[organization], content)"
    )
    op.execute("GRANT EXECUTE ON FUNCTION metering_scoped TO metering_app")
    op.drop_index("usage_record_groups_by_meta_info_idx", "usage_record_groups")
    op.create_index(
        "usage_record_groups_by_meta_info_idx",
        "usage_record_groups",
        [sa.func.metering_scoped(sa.text("organization_id"), sa.text("meta_info")).label("scoped")],
        postgresql_using="gin",
        postgresql_ops={"scoped": "jsonb_path_ops"},
    )
    op.execute(_CONTAINING)
    op.execute(
        "DO $$ BEGIN EXECUTE format('ALTER FUNCTION metering_groups_containing"
        " SET search_path = pg_catalog, %I, pg_temp', current_schema()); END $$"
    )
    op.execute("REVOKE ALL ON FUNCTION metering_groups_containing FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION metering_groups_containing TO metering_app")


def downgrade() -> None:
    """Not offered: restore a backup instead."""
    raise NotImplementedError
