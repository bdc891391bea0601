"""How a prompt's star plan is decided from its options, and how it is split over replicas. Pure functions."""
