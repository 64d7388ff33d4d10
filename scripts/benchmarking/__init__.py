"""What the benchmarks share: the clock, the yardstick, and what is put in force while they run."""
