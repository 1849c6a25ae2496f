"""A run as it goes on: the loop, its checkpoints, its sample pictures and what it reports."""
