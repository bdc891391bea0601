"""The commands `starling eval`, `starling advise` and `starling warm`."""
