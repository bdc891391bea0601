"""Activation of Starling in an engine, and the checks that refuse unusable options."""
