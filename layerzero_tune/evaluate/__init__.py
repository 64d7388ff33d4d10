"""Evaluation: how good the generated function is on shapes that it never saw."""
