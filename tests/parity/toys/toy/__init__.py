"""A feature of tests, as docs/architecture.md says how to add one: it has parts in front, core and worker."""
