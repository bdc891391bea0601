"""`starling selftest`: checks whether Starling computes the right thing on this machine."""
