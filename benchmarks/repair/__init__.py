"""Repair of documents' KV: the question chooses pages that are computed again with everything in view."""
