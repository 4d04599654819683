"""Pools and interpolation: layers that treat each channel alone."""
