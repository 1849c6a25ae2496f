"""Jobs on the user's Ray cluster: its settings, its HTTP interface, and following a job there."""
