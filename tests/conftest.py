"""Settings of all tests."""

from __future__ import annotations

import pytest
import torch

pytest_plugins = ["distdl_lite.pytest_plugin"]


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On several ranks run only what is about them: the other tests would do the same on every rank."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip("needs a GPU"))
    if config.getoption("--with-mpi"):
        serial = [item for item in items if item.get_closest_marker("mpi") is None]
        config.hook.pytest_deselected(items=serial)
        items[:] = [item for item in items if item.get_closest_marker("mpi") is not None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed, which asks for GPUs, takes milliseconds
