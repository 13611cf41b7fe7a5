"""The nouns: model versions and their releases, datasets, runs, experiments, imports"""
from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

revision, down_revision, branch_labels, depends_on = "0001", None, None, None

def json(): return sa.JSON().with_variant(JSONB(), "postgresql")
def time(): return sa.DateTime(timezone=True)
def text(name, **kw): return sa.Column(name, sa.Text(), nullable=False, server_default="", **kw)
def col(name, kind, nullable=False): return sa.Column(name, kind, nullable=nullable)

def upgrade():
    op.create_table("model_versions", sa.Column("id", sa.Text(), nullable=False), text("name"), text("version"), text("base"), text("path"), text("hash"), text("dataset_hash"), text("status"),
        col("evidence", json()), col("created_at", time()), col("parent", sa.Text(), True),
        sa.PrimaryKeyConstraint("id", name="pk_model_versions"), sa.UniqueConstraint("name", "version", name="uq_model_versions_name_version"))
    op.create_index("ix_model_versions_hash", "model_versions", ["hash"])
    op.create_table("release_events", sa.Column("id", sa.Text(), nullable=False), col("ts", time()), text("name"), text("version"), text("action"), col("from_version", sa.Text(), True), text("reason"), text("actor"),
        col("evidence", json()), sa.PrimaryKeyConstraint("id", name="pk_release_events"))
    op.create_index("ix_release_events_name_ts", "release_events", ["name", "ts"])
    op.create_table("datasets", sa.Column("id", sa.Text(), nullable=False), text("name"), text("hash"), text("path"), col("created_at", time()), col("splits", json()), col("sources", json()), col("rules", json()),
        col("counts", json()), col("parents", json()), text("code_hash"), sa.PrimaryKeyConstraint("id", name="pk_datasets"))
    op.create_index("ix_datasets_hash", "datasets", ["hash"])
    op.create_table("runs", sa.Column("id", sa.Text(), nullable=False), text("name"), text("kind"), text("status"), col("parameters", json()), col("inputs", json()), col("outputs", json()), col("metrics", json()),
        col("started_at", time(), True), col("ended_at", time(), True), col("cost", json()), col("env", json()), col("parent", sa.Text(), True), text("path"), text("error"), sa.PrimaryKeyConstraint("id", name="pk_runs"))
    op.create_index("ix_runs_status", "runs", ["status"])
    op.create_index("ix_runs_started_at", "runs", ["started_at"])
    op.create_index("ix_runs_parent", "runs", ["parent"])
    op.create_table("experiments", sa.Column("id", sa.Text(), nullable=False), text("name"), col("arms", json()), text("unit"), text("salt"), col("metrics", json()), text("status"), col("decision", json(), True),
        col("created_at", time()), sa.PrimaryKeyConstraint("id", name="pk_experiments"))
    op.create_index("ix_experiments_name", "experiments", ["name"])
    op.create_table("imports", sa.Column("id", sa.Text(), nullable=False), text("file"), text("hash"), text("app"), text("format"), col("mapping", json()), text("status"), col("read", sa.BigInteger()),
        col("imported", sa.BigInteger()), col("quarantined", sa.BigInteger()), col("duplicates", sa.BigInteger()), col("reasons", json()), col("seconds", sa.Double()), col("created_at", time()),
        col("ended_at", time(), True), sa.PrimaryKeyConstraint("id", name="pk_imports"))
    op.create_index("ix_imports_hash", "imports", ["hash"])

def downgrade():
    for t in ("imports", "experiments", "runs", "datasets", "release_events", "model_versions"): op.drop_table(t)
