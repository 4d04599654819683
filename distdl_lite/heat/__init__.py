"""Heat's calls: DASO, and the containers and optimizers that go with it."""
