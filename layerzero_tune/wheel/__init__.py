"""Shipping: tables as a pure wheel, which the runtime finds by its entry points."""
