"""What `scripts/bench_lookup.py` measures, by subject."""
