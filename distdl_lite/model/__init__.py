"""Whole models: weights and optimizer states in and out of the serial model, and norms of gradients."""
