"""Builds the parts of a stage from its configuration: the only place that chooses implementations."""
