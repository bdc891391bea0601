"""The server's adapter."""
