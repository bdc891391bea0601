"""What turns Starling on in an engine, and refuses what it can't run."""
