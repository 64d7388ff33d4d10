"""Which configurations of a kernel to measure at a point."""
