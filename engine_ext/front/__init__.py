"""Starling in the front's process, for OpenAI and gRPC alike: plans, progress, the live view."""
