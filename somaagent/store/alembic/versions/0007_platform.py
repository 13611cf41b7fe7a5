"""What the platform's API keeps: deployments, work that runs outside of requests, answers to repeated requests"""
from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

revision, down_revision, branch_labels, depends_on = "0007", "0006", None, None

def json(name, nullable=False): return sa.Column(name, sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"), nullable=nullable)
def text(*names): return [sa.Column(n, sa.Text(), nullable=False, server_default="") for n in names]
def time(name, nullable=False): return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)
def number(name): return sa.Column(name, sa.BigInteger(), nullable=False)
def key(table): return [sa.Column("id", sa.Text(), nullable=False), sa.PrimaryKeyConstraint("id", name=f"pk_{table}")]

def upgrade():
    op.create_table("deployments", *key("deployments"), *text("model", "version", "alias", "target", "status", "hash", "folder", "work", "error", "actor"), time("created_at"), time("updated_at"), time("ready_at", True), time("ended_at", True))
    op.create_index("uq_deployments_alias_now", "deployments", ["alias"], unique=True, sqlite_where=sa.text("ended_at IS NULL"), postgresql_where=sa.text("ended_at IS NULL"))
    op.create_table("work", *key("work"), *text("kind", "lane", "name", "status"), json("spec"), *text("run"), json("outputs"), *text("error", "actor", "place"), json("worker", True), time("cancel_at", True), time("created_at"), time("updated_at"), time("started_at", True), time("ended_at", True))
    op.create_index("ix_work_lane_status", "work", ["lane", "status"])
    op.create_table("idempotency", *key("idempotency"), *text("owner", "path", "hash"), number("status"), json("body", True), time("created_at"))
    op.create_index("ix_idempotency_created_at", "idempotency", ["created_at"])

def downgrade():
    for t in ("idempotency", "work", "deployments"): op.drop_table(t)
