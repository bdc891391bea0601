"""Starling in the worker's process."""
