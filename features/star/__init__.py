"""Star blocks themselves."""
