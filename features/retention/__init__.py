"""How long the cached pages of a prompt stay: as its request says, and longer where its session comes back."""
