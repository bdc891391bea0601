"""Star options, the star plan made from them, and how one prompt is split over replicas. Pure functions."""
