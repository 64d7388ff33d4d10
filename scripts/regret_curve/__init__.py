"""Curves of regret as a picture."""
