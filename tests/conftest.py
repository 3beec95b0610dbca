import importlib.util
import os
from pathlib import Path

import pytest
import torch

# set before anything asks the hub: the tests must not depend on a network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def emulated(monkeypatch):
    """The CUDA sources run on the CPU, thread by thread, where they would be launched on a GPU."""
    from hybridzoo.kernels import nvrtc

    spec = importlib.util.spec_from_file_location("emulator", Path(__file__).parent / "emulator" / "emulator.py")
    emulator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulator)
    monkeypatch.setattr(nvrtc, "launch", emulator.launch)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
