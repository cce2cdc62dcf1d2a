"""The plan of a run, counted and described without building it; free of torch."""
