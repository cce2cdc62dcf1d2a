"""The scores and the map of the city task."""
