"""The commands `starling eval` and `starling tune`."""
