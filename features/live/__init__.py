"""The page that shows the requests while they run."""
