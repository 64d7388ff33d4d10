"""What `scripts/host_cost.py` calls."""
