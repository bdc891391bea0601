"""Retention of a prompt's cached pages: as its request says, and longer where its session comes back."""
