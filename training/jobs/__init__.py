"""Background jobs: what is on disk, and the process that runs them one after the other."""
