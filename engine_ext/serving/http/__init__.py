"""ASGI middleware of the OpenAI server."""
