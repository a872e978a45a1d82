"""A cell for all events beside those of each group, for the metrics that have group keys."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

# A cell's three fields of what is latest are filled together or not at all.
_TOTALS = """
INSERT INTO usage_cells (
    organization_id, metric_id, customer_key, cell_start, group_digest, cell_group, counted, skipped, sum, min, max,
    latest_at, latest_transaction_id, latest_value, updated_at
)
SELECT
    total.organization_id, total.metric_id, total.customer_key, total.cell_start, '', '{}', counted, skipped, sum, min,
    max, latest.latest_at, latest.latest_transaction_id, latest.latest_value, updated_at
FROM (
    SELECT
        organization_id, metric_id, customer_key, cell_start, sum(counted) AS counted, sum(skipped) AS skipped,
        sum(sum) AS sum, min(min) AS min, max(max) AS max, bool_or(latest_at IS NOT NULL) AS has_latest,
        max(updated_at) AS updated_at
    FROM usage_cells
    WHERE group_digest > ''
    GROUP BY organization_id, metric_id, customer_key, cell_start
) AS total
LEFT JOIN LATERAL (
    SELECT latest_at, latest_transaction_id, latest_value
    FROM usage_cells AS one
    WHERE total.has_latest AND one.organization_id = total.organization_id AND one.metric_id = total.metric_id
        AND one.customer_key = total.customer_key AND one.cell_start = total.cell_start AND one.group_digest > ''
        AND one.latest_at IS NOT NULL
    ORDER BY latest_at DESC, latest_transaction_id COLLATE "C" DESC
    LIMIT 1
) AS latest ON total.has_latest
"""


def upgrade() -> None:
    """Apply."""
    # Servers from before would keep no totals, and count those that are there beside the groups. Whatever of theirs
    # reads the figures of cells, or stores cells, names this column: it fails from here on, and writes nothing.
    op.alter_column("usage_cells", "group_values", new_column_name="cell_group")
    op.execute(_TOTALS)
    op.create_index(
        "usage_cells_of_all_groups_idx",
        "usage_cells",
        ["organization_id", "metric_id", "customer_key", "cell_start"],
        postgresql_where=sa.text("group_digest = ''::bytea"),
    )


def downgrade() -> None:
    """Not offered: restore a backup instead."""
    raise NotImplementedError
