"""Slow, obvious references that the package is tested against; nothing here imports the package."""
