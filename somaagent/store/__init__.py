"""Where records live: warehouse, state, cache, artifacts."""
