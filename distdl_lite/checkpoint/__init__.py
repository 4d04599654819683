"""Checkpoints whose meaning does not depend on the grid: serial names, global boxes, safetensors and JSON."""
