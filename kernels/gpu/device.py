"""Sizes of the device that launches are planned for."""

import functools

import torch

# bytes of shared memory that the driver takes of every block
DRIVERS = 1024
# the compute capability with instructions for four warps together (`wgmma`), which no later one has
GROUPS = (9, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def has_groups(device: torch.device) -> bool:
    """Say whether four warps of a device can multiply together; the emulator takes part."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == GROUPS


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a multiprocessor has: 228 K on an H100, 100 K on many a laptop; a block may have all but ``DRIVERS``."""
    return (
        torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
        if device.type == "cuda"
        else 228 << 10
    )
