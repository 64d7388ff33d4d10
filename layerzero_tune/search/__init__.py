"""Which contests to measure, on which device, in which order."""
