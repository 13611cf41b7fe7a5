"""Versions of prompt templates, and what their labels stood for"""
from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

revision, down_revision, branch_labels, depends_on = "0005", "0004", None, None

def json(): return sa.JSON().with_variant(JSONB(), "postgresql")
def text(name): return sa.Column(name, sa.Text(), nullable=False, server_default="")
def col(name, kind, nullable=False): return sa.Column(name, kind, nullable=nullable)
def key(table): return sa.Column("id", sa.Text(), nullable=False), sa.PrimaryKeyConstraint("id", name=f"pk_{table}")

def upgrade():
    time = sa.DateTime(timezone=True)
    op.create_table("prompts", *key("prompts"), text("name"), col("version", sa.BigInteger()), text("hash"), col("body", json()), text("note"), text("actor"), col("created_at", time),
        sa.UniqueConstraint("name", "version", name="uq_prompts_name_version"))
    op.create_index("ix_prompts_hash", "prompts", ["hash"])
    op.create_table("prompt_labels", *key("prompt_labels"), text("name"), text("label"), col("version", sa.BigInteger()), text("actor"), text("reason"), col("since", time), col("until", time, True))
    now = sa.text("until IS NULL")  # a label stands for one version at a time
    op.create_index("uq_prompt_labels_now", "prompt_labels", ["name", "label"], unique=True, sqlite_where=now, postgresql_where=now)

def downgrade():
    for t in ("prompt_labels", "prompts"): op.drop_table(t)
