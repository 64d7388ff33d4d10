"""What `scripts/bench_selection.py` measures, by subject."""
