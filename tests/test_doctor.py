"""``zoo doctor`` on a GPU: what it says of the device, the compiler and the cache, and which backend it names, here with the facts made up."""

import importlib.metadata
import types

import pytest
import torch

from hybridzoo.kernels import dispatch
from hybridzoo.kernels.gpu import nvrtc
from hybridzoo.zoo import doctor


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    card = types.SimpleNamespace(name="Some GPU", total_memory=80 << 30, multi_processor_count=132, major=9, minor=0)
    card.shared_memory_per_multiprocessor = 228 << 10
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: "13.0")
    monkeypatch.setattr(doctor, "_loaded_from", lambda library: f"/somewhere/{library}.13")
    monkeypatch.setattr(dispatch, "installed", dict.fromkeys(dispatch.installed, False))
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HYBRIDZOO_BACKEND", raising=False)
    return tmp_path / "cache"


def test_a_gpu_with_a_compiler(gpu):
    gpu.mkdir()
    (gpu / "a.cubin").write_bytes(b"12345")
    report = doctor.examine("cuda")
    said = report["gpu"]
    assert said["device"] == "Some GPU, 80.0 GiB, 132 multiprocessors" and said["arch"] == "sm_90"
    assert said["compiler"] == "NVRTC 13.0 from /somewhere/libnvrtc.so.13"
    assert said["kernel cache"] == f"{gpu}: 1 kernels, 5 bytes, writable"
    assert said["kernels"] == "compiled at first use"
    assert set(report["verdicts"]) == set(dispatch.TABLES)


def test_without_a_compiler_chunked_is_taken_and_the_reason_said(gpu, monkeypatch):
    def missing():
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(nvrtc, "unavailable", lambda: "the CUDA kernels need cuda-bindings and NVRTC")
    monkeypatch.setattr(nvrtc, "compiler_version", missing)
    report = doctor.examine("cuda")
    assert report["gpu"]["compiler"] == "none (ImportError: No module named 'cuda')"
    assert report["gpu"]["kernels"] == "off: the CUDA kernels need cuda-bindings and NVRTC"
    verdict = report["verdicts"]["selective_scan"]
    assert verdict.startswith("chunked (") and "not cuda: the CUDA kernels need cuda-bindings and NVRTC" in verdict
    assert "0 kernels, 0 bytes, writable" in report["gpu"]["kernel cache"]


def test_a_cache_that_cannot_be_written_is_said(gpu, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "not writable" in doctor.examine("cuda")["gpu"]["kernel cache"]


def test_a_gpu_asked_about_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.examine("cuda")["gpu"]["device"] == "none that torch sees"
    assert "gpu" not in doctor.examine("cpu")


def test_where_a_library_was_loaded_from_is_found():
    assert doctor._loaded_from("libc.so") and doctor._loaded_from("libnothing.so") is None


@pytest.mark.parametrize("group", ["torch.backends", "something.else"])
def test_an_installation_that_torch_loads_as_a_backend_is_said(group, monkeypatch):
    old = importlib.metadata.EntryPoint("hybridzoo", "hybridzoo.zoo.autoregister:register_when_loaded", group)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [old] if group == old.group else [])
    said = doctor.examine("cpu")["system"].get("installation", "")
    assert ("Install hybridzoo again" in said) == (group == "torch.backends")
    old.load()()  # an installation that is stale can still call it


@pytest.mark.parametrize("value", ["hybridzoo.zoo.cli:main", "hybridzoo.__main__:main", "another.zoo:main"])
def test_an_installation_whose_script_has_moved_is_said(value, monkeypatch):
    old = importlib.metadata.EntryPoint("zoo", value, "console_scripts")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [old] if group == old.group else [])
    said = doctor.examine("cpu")["system"].get("installation", "")
    assert ("`zoo` starts hybridzoo.zoo.cli:main. Install" in said) == ("cli" in value)
