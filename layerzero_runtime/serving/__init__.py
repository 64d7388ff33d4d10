"""Serving calls: routes to prepared kernels, failures and health, modes of execution, what is recorded."""
