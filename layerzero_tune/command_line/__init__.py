"""The command `layerzero-tune`."""
