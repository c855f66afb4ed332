"""Adapter file formats: one strict codec each."""
