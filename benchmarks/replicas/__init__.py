"""Benchmarks of one prompt that is split over several replicas."""
