"""Generated tables: found, checked, loaded, judged for staleness; the evidence beside them, and what it says nearby."""
