"""Compiles the CUDA sources at first use, keeps the machine code on disk, and launches it on torch's stream.

NVRTC and the driver are reached through ``cuda-bindings``, NVIDIA's public Python API, which comes with torch's CUDA wheels. A kernel is a
source file and a C++ name expression, ``scan_forward<bf16, 4, ...>``; each is compiled on its own, when it is first called. The disk
cache (see ``cache``) is keyed by the sources, the name, the options, the architecture and the compiler's version.
"""

import ctypes
import functools
import hashlib
import warnings
from importlib import resources
from typing import Any

import torch

from ..torch_private import constant_when_compiled, current_stream
from . import cache
from .device import GROUPS

OPTIONS = ("--std=c++17", "--ftz=true")


class CompileError(RuntimeError):
    """A CUDA source did not compile; the message has the compiler's log."""


def launch(
    source: str,
    name: str,
    params: bytes,
    grid: int,
    block: int,
    shared_bytes: int,
    device: torch.device,
    overlaps: bool = False,
) -> None:
    """Run a kernel on torch's current stream.

    Args:
        source: The name of a ``.cu`` file of ``kernels``.
        name: The kernel, with template arguments.
        params: Its one parameter, a struct.
        grid: Blocks.
        block: Threads in each.
        shared_bytes: Dynamic shared memory of a block.
        device: Where the tensors are; made current for the launch.
        overlaps: Whether it may begin while the kernel before it still runs, for which its source waits (``overlap.cuh``).
    """
    index = device.index
    kernel = _loaded.get((source, name, index, shared_bytes))
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return launch(source, name, params, grid, block, shared_bytes, device, overlaps)
    if kernel is None:
        kernel = _loaded[source, name, index, shared_bytes] = _load(source, name, index, shared_bytes, overlaps)
    # an array of one pointer to the bytes, which the driver copies before it returns
    pointers = _ONE_POINTER(params)
    stream, driver = current_stream(index), _driver()
    arguments: tuple
    if overlaps and OVERLAP and _can_overlap(index):
        start, config = driver.cuLaunchKernelEx, _overlapping(grid, block, shared_bytes, stream)
        arguments = (config, kernel, ctypes.addressof(pointers), 0)
    else:
        start = driver.cuLaunchKernel
        arguments = (kernel, grid, 1, 1, block, 1, 1, shared_bytes, stream, ctypes.addressof(pointers), 0)
    (status,) = start(*arguments)
    if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        _enter(index)
        (status,) = start(*arguments)
    if status:
        raise RuntimeError(
            f"{name}: launch of {grid} x {block} threads with {shared_bytes} bytes of shared memory failed: {status.name}."
        )


_ONE_POINTER = ctypes.c_char_p * 1
# whether launches may overlap at all; results are the same
OVERLAP = True


# a kernel by its source, name, device, and bytes of shared memory
_loaded: dict[tuple[str, str, int | None, int], Any] = {}


@functools.cache
def _can_overlap(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


@functools.lru_cache(maxsize=1024)
def _overlapping(grid: int, block: int, shared_bytes: int, stream: int) -> Any:
    """A launch that need not wait for the one before it."""
    driver = _driver()
    attribute, config = driver.CUlaunchAttribute(), driver.CUlaunchConfig()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, stream
    config.attrs, config.numAttrs = [attribute], 1
    return config


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def enter(device: torch.device) -> None:
    """Make torch's context on a GPU current, in a thread whose first act there this may be, such as autograd's."""
    if device.type == "cuda":
        _enter(device.index)


def _enter(index: int | None) -> None:
    driver = _driver()
    context = _checked(driver.cuDevicePrimaryCtxRetain(index), "cuDevicePrimaryCtxRetain")
    _checked(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")


def arch_of(major: int, minor: int) -> str:
    """Return the architecture that a GPU of a compute capability is compiled for."""
    return f"sm_{major}{minor}" + ("a" if (major, minor) == GROUPS else "")


def _load(source: str, name: str, index: int | None, shared_bytes: int, overlaps: bool) -> Any:
    _enter(index)
    driver = _driver()
    major, minor = torch.cuda.get_device_capability(index)
    lowered, code = machine_code(source, name, arch_of(major, minor))
    module = _checked(driver.cuModuleLoadData(code), name)
    function = _checked(driver.cuModuleGetFunction(module, lowered), name)
    attribute = driver.CUfunction_attribute
    if shared_bytes:
        limit = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(
            driver.cuFuncSetAttribute(function, limit, shared_bytes), f"{name}: {shared_bytes} bytes of shared memory"
        )
    if shared_bytes or overlaps:
        # the same for all that overlap: a multiprocessor divides its memory anew only when it is empty
        carveout = attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _checked(driver.cuFuncSetAttribute(function, carveout, 100), name)
    return function


def _checked(result: tuple, what: str) -> Any:
    status, *values = result
    if status:
        raise RuntimeError(f"{what}: {status.name}.")
    return values[0] if values else None


@functools.cache
def sources() -> dict[str, bytes]:
    """The ``.cu`` and ``.cuh`` files of all rooms of ``kernels``, by name."""
    rooms = resources.files(__package__.rpartition(".")[0]).iterdir()
    files = [f for room in rooms if room.is_dir() for f in room.iterdir() if f.name.endswith((".cu", ".cuh"))]
    return {f.name: f.read_bytes() for f in sorted(files, key=lambda f: f.name)}


@constant_when_compiled
def unavailable() -> str | None:
    """Say why nothing can be compiled or launched here, or ``None``; a warning says it once where there is a GPU."""
    return _unavailable()


@functools.cache
def _unavailable() -> str | None:
    reason = _missing()
    if reason is not None and torch.cuda.is_available():
        warnings.warn(f"hybridzoo: the CUDA kernels are off, PyTorch operations run instead: {reason}.", stacklevel=2)
    return reason


def _missing() -> str | None:
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401

        compiler_version()
    # without its shared library, a binding raises RuntimeError or an error of the package that looks for libraries
    except (ImportError, OSError, RuntimeError) as e:
        hint = "pip install 'hybridzoo[cuda]'" if isinstance(e, ImportError) else "the NVRTC library of CUDA is missing"
        return f"the CUDA kernels need cuda-bindings and NVRTC ({type(e).__name__}: {str(e).splitlines()[0]}; {hint})"
    if not torch.cuda.is_available():
        return "the CUDA kernels need an NVIDIA GPU, and torch sees none"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the CUDA kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None


@functools.cache
def compiler_version() -> str:
    """Of the NVRTC that is used, ``13.0``."""
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if status:
        raise RuntimeError(f"nvrtcVersion: {status.name}")
    return f"{major}.{minor}"


def machine_code(source: str, name: str, arch: str) -> tuple[bytes, bytes]:
    """The kernel's symbol and its cubin, from the disk cache or the compiler.

    Raises:
        CompileError: The source does not compile.
    """
    stamp = hashlib.sha256(repr((source, name, arch, compiler_version(), OPTIONS)).encode())
    for file, text in sources().items():
        if file == source or file.endswith(".cuh"):
            stamp.update(text)
    key = stamp.hexdigest()
    kept = cache.read(key)
    if kept is not None:
        lowered, code = kept.split(b"\n", 1)
    else:
        lowered, code, _ = compile_source(source, name, arch)
        cache.keep(key, lowered + b"\n" + code)
    return lowered, code


def compile_source(source: str, name: str, arch: str, *options: str) -> tuple[bytes, bytes, str]:
    """Compile one kernel, no device needed: its symbol, its cubin and the compiler's log.

    Raises:
        CompileError: The source does not compile.
    """
    from cuda.bindings import nvrtc

    files = sources()
    headers = [f for f in files if f.endswith(".cuh")]
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            files[source], source.encode(), len(headers), [files[h] for h in headers], [h.encode() for h in headers]
        ),
        name,
    )
    try:
        _checked(nvrtc.nvrtcAddNameExpression(program, name.encode()), name)
        flags = [o.encode() for o in (f"--gpu-architecture={arch}", *OPTIONS, *options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        # NVRTC writes into what it is given: not into bytes, of which Python keeps one object for all that are equal and short
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program), name))
        _checked(nvrtc.nvrtcGetProgramLog(program, log), name)
        text = log.decode(errors="replace").strip("\0 \n")
        if status:
            raise CompileError(f"{source}: {name} does not compile for {arch} ({status.name}).\n{text}")
        lowered = _checked(nvrtc.nvrtcGetLoweredName(program, name.encode()), name)
        code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program), name))
        _checked(nvrtc.nvrtcGetCUBIN(program, code), name)
        return lowered, bytes(code), text
    finally:
        nvrtc.nvrtcDestroyProgram(program)
