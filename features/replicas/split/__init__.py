"""One prompt that is split over replicas, as the front that it has arrived at runs it."""
