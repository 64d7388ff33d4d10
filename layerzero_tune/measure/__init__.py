"""Measuring: inputs, correctness, the clock, contests and the statistics that judge them."""
