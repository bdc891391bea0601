"""Paged attention by xformers."""
