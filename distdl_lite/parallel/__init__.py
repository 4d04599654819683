"""Data-parallel containers."""
