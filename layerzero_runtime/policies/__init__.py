"""Policies: rules that bind the selection, from code or from YAML."""
