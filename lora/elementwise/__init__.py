"""Rules that merge full weight changes value by value. Each is one file with a pure function and a
declaration."""
