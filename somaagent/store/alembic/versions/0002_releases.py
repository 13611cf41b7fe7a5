"""Signed manifests, aliases, the keys that a registry trusts; release events that can only be added to"""
from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

revision, down_revision, branch_labels, depends_on = "0002", "0001", None, None

FIXED = ("ts", "version", "action", "from_version")  # texts may still be taken out when a user is forgotten

def json(): return sa.JSON().with_variant(JSONB(), "postgresql")
def time(): return sa.DateTime(timezone=True)
def text(name, **kw): return sa.Column(name, sa.Text(), nullable=False, server_default="", **kw)

def _guard():
    said = "release events can only be added"
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"CREATE TRIGGER release_events_stay BEFORE DELETE ON release_events BEGIN SELECT RAISE(ABORT, '{said}'); END")
        op.execute(f"CREATE TRIGGER release_events_hold BEFORE UPDATE OF {', '.join(FIXED)} ON release_events BEGIN SELECT RAISE(ABORT, '{said}'); END")
        return
    op.execute(f"CREATE FUNCTION release_events_guard() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION '{said}'; END $$ LANGUAGE plpgsql")
    op.execute("CREATE TRIGGER release_events_stay BEFORE DELETE ON release_events FOR EACH ROW EXECUTE FUNCTION release_events_guard()")
    op.execute(f"CREATE TRIGGER release_events_hold BEFORE UPDATE OF {', '.join(FIXED)} ON release_events FOR EACH ROW EXECUTE FUNCTION release_events_guard()")

def _unguard():
    on = "" if op.get_bind().dialect.name == "sqlite" else " ON release_events"
    for t in ("release_events_stay", "release_events_hold"): op.execute(f"DROP TRIGGER {t}{on}")
    if on: op.execute("DROP FUNCTION release_events_guard()")

def upgrade():
    op.add_column("model_versions", sa.Column("manifest", json(), nullable=True))
    op.add_column("model_versions", text("signature"))
    op.add_column("release_events", text("alias"))
    op.create_table("model_aliases", sa.Column("name", sa.Text(), nullable=False), sa.Column("alias", sa.Text(), nullable=False), text("version"), sa.Column("since", time(), nullable=False), text("actor"),
        sa.PrimaryKeyConstraint("name", "alias", name="pk_model_aliases"))
    op.create_table("signing_keys", sa.Column("id", sa.Text(), nullable=False), text("public"), sa.Column("since", time(), nullable=False), text("actor"), text("reason"), sa.PrimaryKeyConstraint("id", name="pk_signing_keys"))
    _guard()

def downgrade():
    _unguard()
    for t in ("signing_keys", "model_aliases"): op.drop_table(t)
    op.drop_column("release_events", "alias")
    for c in ("signature", "manifest"): op.drop_column("model_versions", c)
