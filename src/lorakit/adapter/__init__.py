"""Adapters as values, and the two doors between values and models: attach and extract."""
