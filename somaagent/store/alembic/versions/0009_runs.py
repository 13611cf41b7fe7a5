"""Runs with tags, seeds and artifacts; indexes for lists of many runs"""
from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

revision, down_revision, branch_labels, depends_on = "0009", "0008", None, None

COLUMNS = dict(tags="[]", seeds="{}", artifacts="{}")
INDEXES = (("kind", "started_at"), ("name", "started_at"))

def json(): return sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")

def upgrade():
    for name,empty in COLUMNS.items(): op.add_column("runs", sa.Column(name, json(), nullable=False, server_default=sa.text(f"'{empty}'")))
    for cols in INDEXES: op.create_index(f"ix_runs_{'_'.join(cols)}", "runs", list(cols))

def downgrade():
    for cols in INDEXES: op.drop_index(f"ix_runs_{'_'.join(cols)}", "runs")
    for name in reversed(COLUMNS): op.drop_column("runs", name)
