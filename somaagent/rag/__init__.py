"""Retrieval: documents in chunks, vectors in stores, search by words and by meaning."""
