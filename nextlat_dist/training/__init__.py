"""The training run: build, loop, optimizer, schedule, metrics."""
