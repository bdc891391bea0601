"""`starling doctor`: what works on this machine."""
