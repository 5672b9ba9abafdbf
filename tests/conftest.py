"""Checked shapes and quiet threads for every test."""

import os

# One thread a test process: two cores are shared, and results do not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook(["moezoo.zoo", "moezoo.tasks", "moezoo.datasets"], "beartype.beartype")  # where tensors live

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither the user's cache nor their weights server takes part in a test."""
    monkeypatch.delenv("MOEZOO_WEIGHTS", raising=False)
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
