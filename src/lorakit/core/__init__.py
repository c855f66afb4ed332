"""The low-rank core: torch only, no models, no files."""
