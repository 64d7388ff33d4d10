"""What a GPU's table has to hold, judged over its committed evaluation and what was measured beside it."""
