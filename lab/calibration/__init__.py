"""`starling calibrate`: finds out which KV heads carry star's loss in answers."""
