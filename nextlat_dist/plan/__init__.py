"""What a run would be, counted and described without building it; free of torch."""
