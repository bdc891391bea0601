"""Starling's gRPC interface: one package for each version of the protocol, and the Python client."""
