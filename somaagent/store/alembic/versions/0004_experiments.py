"""Experiments with their question, rule, layer and revision; what happened to them, which can only be added to; holdouts"""
from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

revision, down_revision, branch_labels, depends_on = "0004", "0003", None, None

FIXED = ("experiment", "revision", "ts", "action")  # what was changed may name units: it can still be taken out when a user is forgotten
DICTS, LISTS, TEXTS = ("population", "rule", "horizon", "overrides", "meta"), ("slots", "excluded"), ("question", "layer", "owner")

def json(): return sa.JSON().with_variant(JSONB(), "postgresql")
def time(): return sa.DateTime(timezone=True)
def text(name, default="", **kw): return sa.Column(name, sa.Text(), nullable=False, server_default=default, **kw)
def col(name, kind, nullable=False, **kw): return sa.Column(name, kind, nullable=nullable, **kw)

def _guard():
    said = "experiment events can only be added"
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"CREATE TRIGGER experiment_events_stay BEFORE DELETE ON experiment_events BEGIN SELECT RAISE(ABORT, '{said}'); END")
        op.execute(f"CREATE TRIGGER experiment_events_hold BEFORE UPDATE OF {', '.join(FIXED)} ON experiment_events BEGIN SELECT RAISE(ABORT, '{said}'); END")
        return
    op.execute(f"CREATE FUNCTION experiment_events_guard() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION '{said}'; END $$ LANGUAGE plpgsql")
    op.execute("CREATE TRIGGER experiment_events_stay BEFORE DELETE ON experiment_events FOR EACH ROW EXECUTE FUNCTION experiment_events_guard()")
    op.execute(f"CREATE TRIGGER experiment_events_hold BEFORE UPDATE OF {', '.join(FIXED)} ON experiment_events FOR EACH ROW EXECUTE FUNCTION experiment_events_guard()")

def _unguard():
    on = "" if op.get_bind().dialect.name == "sqlite" else " ON experiment_events"
    for t in ("experiment_events_stay", "experiment_events_hold"): op.execute(f"DROP TRIGGER {t}{on}")
    if on: op.execute("DROP FUNCTION experiment_events_guard()")

def upgrade():
    for n in DICTS: op.add_column("experiments", col(n, json(), server_default=sa.text("'{\"kind\": \"group\"}'" if n == "rule" else "'{}'")))
    for n in LISTS: op.add_column("experiments", col(n, json(), server_default=sa.text("'[]'")))
    for n in TEXTS: op.add_column("experiments", text(n))
    op.add_column("experiments", text("hashing", "xxh64"))
    op.add_column("experiments", col("coverage", sa.Double(), server_default="1"))
    op.add_column("experiments", col("revision", sa.BigInteger(), server_default="0"))
    for n in ("started_at", "stopped_at"): op.add_column("experiments", col(n, time(), True))
    op.create_table("experiment_events", sa.Column("id", sa.Text(), nullable=False), text("experiment"), col("revision", sa.BigInteger()), col("ts", time()), text("action"), text("actor"), text("reason"),
        col("before", json()), col("after", json()), sa.PrimaryKeyConstraint("id", name="pk_experiment_events"), sa.UniqueConstraint("experiment", "revision", name="uq_experiment_events_experiment_revision"))
    op.create_table("experiment_holdouts", sa.Column("name", sa.Text(), nullable=False), col("share", sa.Double()), text("salt"), text("unit"), text("actor"), text("reason"), col("since", time()),
        sa.PrimaryKeyConstraint("name", name="pk_experiment_holdouts"))
    _guard()

def downgrade():
    _unguard()
    for t in ("experiment_holdouts", "experiment_events"): op.drop_table(t)
    for c in ("stopped_at", "started_at", "revision", "coverage", "hashing", *TEXTS, *LISTS, *DICTS): op.drop_column("experiments", c)
