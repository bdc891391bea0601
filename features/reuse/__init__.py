"""Cached star blocks behind a part of the prompt that is not cached."""
