"""Workloads: which contexts to measure or evaluate, and how much each counts."""
