"""Training jobs and what happened to them"""
from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

revision, down_revision, branch_labels, depends_on = "0003", "0002", None, None

def json(): return sa.JSON().with_variant(JSONB(), "postgresql")
def time(): return sa.DateTime(timezone=True)
def texts(*names): return [sa.Column(n, sa.Text(), nullable=False, server_default="") for n in names]
def col(name, kind, nullable=False): return sa.Column(name, kind, nullable=nullable)

def upgrade():
    op.create_table("train_jobs", sa.Column("id", sa.Text(), nullable=False), *texts("key", "name", "method", "provider", "base", "status", "reason", "error"), col("spec", json()), col("progress", json()), col("result", json()),
        *texts("place", "device", "folder", "dataset_hash", "model_hash"), col("attempt", sa.BigInteger()), col("attempts", sa.BigInteger()), col("priority", sa.BigInteger()), *texts("worker"),
        col("lease_until", time(), True), col("cancel_at", time(), True), col("seconds", sa.Double()), col("peak_mb", sa.Double(), True), col("created_at", time()), col("updated_at", time()), col("started_at", time(), True),
        col("ended_at", time(), True), col("recorded_at", time(), True), sa.PrimaryKeyConstraint("id", name="pk_train_jobs"))
    op.create_index("ix_train_jobs_key", "train_jobs", ["key"])
    op.create_index("ix_train_jobs_status_place", "train_jobs", ["status", "place"])
    op.create_table("train_events", sa.Column("id", sa.Text(), nullable=False), *texts("job"), col("ts", time()), *texts("kind", "text"), sa.PrimaryKeyConstraint("id", name="pk_train_events"))
    op.create_index("ix_train_events_job_id", "train_events", ["job", "id"])

def downgrade():
    for t in ("train_events", "train_jobs"): op.drop_table(t)
