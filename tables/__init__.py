"""Generated lookup modules, one folder per device; installed as `layerzero_tables`."""
