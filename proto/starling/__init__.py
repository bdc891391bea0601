"""Starling's gRPC interface, one package a version."""
