"""Migrations of the state store, applied by `somaagent.store.state` when it is opened."""
