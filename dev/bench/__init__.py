"""Side by side benchmarks: `python3 dev bench AREA [--json FILE]`."""
