import gc
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

# set before anything asks the hub: the tests must not depend on a network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# packages that few have and tests go without (timm, mlxtend), for who keeps them apart
sys.path += filter(None, os.environ.get("HYBRIDZOO_TEST_PATH", "").split(os.pathsep))
# a job in a shell's background starts with Ctrl-C ignored, and hands that on to what the tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _freeze():
    """Leave what is there already out of garbage collections: every training begins with one, of all that was ever imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def emulated(monkeypatch):
    """The CUDA sources run on the CPU, thread by thread, where they would be launched on a GPU."""
    from hybridzoo.kernels.gpu import launch_plans, nvrtc

    spec = importlib.util.spec_from_file_location("emulator", Path(__file__).parent / "emulator" / "emulator.py")
    emulator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulator)
    monkeypatch.setattr(nvrtc, "launch", emulator.launch)
    # what is learned of tensors on the CPU must not last
    monkeypatch.setattr(launch_plans, "_known", {})


@pytest.fixture(scope="session")
def train_until():
    """Cut a training off after a step: ``train_until(step, ...)``, the rest as for ``train``."""
    from hybridzoo.zoo.train.run import train

    class Stop(Exception):
        pass

    def cut_off(step, *args, **options):
        def on_step(done, loss):
            if done == step:
                raise Stop

        with pytest.raises(Stop):
            train(*args, on_step=on_step, **options)

    return cut_off


# the first version known to be right: older ones normalise Mamba-2's groups as one (or cannot make Zamba2), and compute other logits
# than the newer from the same files
JUDGES = {"Mamba2": "5.23", "Bamba": "5.23", "GraniteMoeHybrid": "5.23", "Zamba2": "5.17", "NemotronH": "5.17"}


@pytest.fixture(scope="session")
def judged():
    """Skips what would be compared with a class (``Mamba2``, ...) that the installed transformers has wrong."""
    import transformers
    from packaging.version import Version

    def check(kind):
        if Version(transformers.__version__) < Version(JUDGES.get(kind, "5.13")):
            pytest.skip(f"{kind} of transformers {transformers.__version__} is wrong, that of {JUDGES[kind]} is not")

    return check


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
