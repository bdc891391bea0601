"""Documents: blocks with positions of their own, each on pages of its own."""
