"""Star options, the star plan made from them, prefix-cache keys and the scheduler that uses both."""
