"""Commands that measure, train and check: clients of the engine."""
