"""Alembic's entry point: runs on the connection that `State` hands over."""
from alembic import context

from somaagent.store.state import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True, compare_type=True)
context.run_migrations()
