"""A copy of a module on each rank, with the gradients summed."""
