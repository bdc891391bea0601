"""A day of coding agents: their requests as a trace, played on a scheduler and on an engine."""
