"""What the gateway keeps: keys, who changed what, conversations, agents"""
from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

revision, down_revision, branch_labels, depends_on = "0006", "0005", None, None

FIXED = ("ts", "actor", "action", "target", "request", "status")  # `detail` may name a user: it can still be taken out when the user is forgotten

def json(name): return sa.Column(name, sa.JSON().with_variant(JSONB(), "postgresql"), nullable=False)
def text(*names): return [sa.Column(n, sa.Text(), nullable=False, server_default="") for n in names]
def time(name, nullable=False): return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)
def number(name): return sa.Column(name, sa.BigInteger(), nullable=False)
def key(table): return [sa.Column("id", sa.Text(), nullable=False), sa.PrimaryKeyConstraint("id", name=f"pk_{table}")]
def unique(table, *cols): return sa.UniqueConstraint(*cols, name=f"uq_{table}_{'_'.join(cols)}")

def _guard():
    said = "the audit log can only be added to"
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"CREATE TRIGGER audit_log_stay BEFORE DELETE ON audit_log BEGIN SELECT RAISE(ABORT, '{said}'); END")
        op.execute(f"CREATE TRIGGER audit_log_hold BEFORE UPDATE OF {', '.join(FIXED)} ON audit_log BEGIN SELECT RAISE(ABORT, '{said}'); END")
        return
    op.execute(f"CREATE FUNCTION audit_log_guard() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION '{said}'; END $$ LANGUAGE plpgsql")
    op.execute("CREATE TRIGGER audit_log_stay BEFORE DELETE ON audit_log FOR EACH ROW EXECUTE FUNCTION audit_log_guard()")
    op.execute(f"CREATE TRIGGER audit_log_hold BEFORE UPDATE OF {', '.join(FIXED)} ON audit_log FOR EACH ROW EXECUTE FUNCTION audit_log_guard()")

def _unguard():
    on = "" if op.get_bind().dialect.name == "sqlite" else " ON audit_log"
    for t in ("audit_log_stay", "audit_log_hold"): op.execute(f"DROP TRIGGER {t}{on}")
    if on: op.execute("DROP FUNCTION audit_log_guard()")

def upgrade():
    op.create_table("api_keys", *key("api_keys"), *text("name", "hash", "hint"), json("scopes"), json("limits"), *text("app", "actor"), time("created_at"), time("expires_at", True), time("revoked_at", True), unique("api_keys", "hash"))
    op.create_table("audit_log", *key("audit_log"), time("ts"), *text("actor", "action", "target", "request"), number("status"), json("detail"))
    for c in ("ts", "actor"): op.create_index(f"ix_audit_log_{c}", "audit_log", [c])
    op.create_table("conversations", *key("conversations"), *text("owner", "user_id", "title", "model", "agent"), json("meta"), time("created_at"), time("updated_at"))
    op.create_index("ix_conversations_owner_id", "conversations", ["owner", "id"])
    op.create_table("conversation_messages", *key("conversation_messages"), *text("conversation"), number("number"), *text("role", "content"), json("extra"), *text("interaction"), time("created_at"), unique("conversation_messages", "conversation", "number"))
    op.create_table("agents", *key("agents"), *text("name"), number("revision"), json("spec"), *text("actor"), time("created_at"), time("archived_at", True), unique("agents", "name", "revision"))
    _guard()

def downgrade():
    _unguard()
    for t in ("agents", "conversation_messages", "conversations", "audit_log", "api_keys"): op.drop_table(t)
