"""Jinja2 templates of everything that is generated; installed as `layerzero_tune.templates`."""
