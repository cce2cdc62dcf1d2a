"""A run's state: what a checkpoint holds, how it is saved, and how a run resumes from it."""
