"""Planning of prompts: from options to a star plan, and its split over replicas. Pure functions."""
