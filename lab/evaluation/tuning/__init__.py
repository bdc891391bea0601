"""`starling tune`: the cheapest star plan whose loss against dense stays within a budget. See docs/tune.md."""
