"""Layers that change shapes: flattening, padding, means, transforms."""
