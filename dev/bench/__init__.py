"""Benchmarks: `python3 dev bench AREA [--json FILE]`."""
