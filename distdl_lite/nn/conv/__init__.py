"""Convolutions, cut along batch, space and features."""
