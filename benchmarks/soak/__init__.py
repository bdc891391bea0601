"""A server under a mixed load for a long time: `python -m benchmarks.soak`. Nothing may be lost, nothing may grow."""
