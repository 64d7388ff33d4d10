"""Strategies of searching configurations, compared over recorded spaces."""
