"""A run in progress: the loop, its checkpoints, its sample pictures, and what it reports."""
