"""Optimizers that average over ranks from time to time, in place of summing gradients at every step."""
