"""Normalisations, and the softmax."""
