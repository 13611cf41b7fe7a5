"""What runs at its times: schedules, and what became of each of their moments"""
from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

revision, down_revision, branch_labels, depends_on = "0008", "0007", None, None

def json(name, nullable=False): return sa.Column(name, sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql"), nullable=nullable)
def text(*names): return [sa.Column(n, sa.Text(), nullable=False, server_default="") for n in names]
def time(name, nullable=False): return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)
def number(*names): return [sa.Column(n, sa.BigInteger(), nullable=False) for n in names]
def real(*names): return [sa.Column(n, sa.Double(), nullable=False) for n in names]
def key(table): return [sa.Column("id", sa.Text(), nullable=False), sa.PrimaryKeyConstraint("id", name=f"pk_{table}")]

def upgrade():
    op.create_table("schedules", *key("schedules"), *text("name", "owner", "cron", "timezone", "missed", "overlap", "status", "reason"), json("what"), json("meta"), *real("every_s", "jitter_s", "grace_s", "retry_s"),
                    *number("bound", "retries", "pause_after", "failures"), *[time(n, True) for n in ("start_at", "end_at", "cursor", "next_slot", "next_at", "seen_at", "deleted_at")], time("anchor"), time("created_at"), time("updated_at"))
    op.create_index("uq_schedules_name_now", "schedules", ["name"], unique=True, sqlite_where=sa.text("deleted_at IS NULL"), postgresql_where=sa.text("deleted_at IS NULL"))
    op.create_index("ix_schedules_status_next_at", "schedules", ["status", "next_at"])
    op.create_table("schedule_fires", *key("schedule_fires"), *text("schedule", "name", "key", "cause", "status", "reason", "error", "token", "run"), time("slot"), time("due"), *number("count", "attempt"), json("what"), json("worker", True),
                    json("attempts"), json("outputs"), *[time(n, True) for n in ("beat_at", "cancel_at", "started_at", "ended_at")], time("created_at"), sa.UniqueConstraint("schedule", "key", name="uq_schedule_fires_schedule_key"))
    op.create_index("ix_schedule_fires_status_due", "schedule_fires", ["status", "due"])
    op.create_index("ix_schedule_fires_schedule_slot", "schedule_fires", ["schedule", "slot"])

def downgrade():
    for t in ("schedule_fires", "schedules"): op.drop_table(t)
