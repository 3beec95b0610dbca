"""Arithmetic of a training step: what a token costs, and what a device could do at most."""

import torch

from ..models.model import Model
from .examples import Examples

__all__ = ["context_length", "flops_per_token", "peak_flops"]

# dense TFLOP/s of matrix products in (bfloat16 or float16 with float32 sums, TF32, float32), from NVIDIA's data sheets and architecture
# white papers of each product; those state sparse figures, of which these are half
_PEAKS = {
    "B200": (2250, 1125, 75),
    "GH200": (989.4, 494.7, 66.9),
    "H200": (989.4, 494.7, 66.9),
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 417.5, 60),
    "H100": (989.4, 494.7, 66.9),
    "H800": (989.4, 494.7, 66.9),
    "H20": (148, 74, 44),
    "A100": (312, 156, 19.5),
    "A800": (312, 156, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165, 82, 10.3),
    "A10G": (70, 35, 35),
    "A10": (125, 62.5, 31.2),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "RTX A6000": (154.8, 77.4, 38.7),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
}


def peak_flops(device: str, half: bool) -> float | None:
    """Return the most FLOPs a second that a GPU does, by its name, in the type in which products are taken; None where it is not known.

    ``half`` is for products in 16 bits; others are in TF32 where :func:`torch.get_float32_matmul_precision` allows it.
    """
    words = device.replace("-", " ").split()
    if {"MIG", "Laptop"} & set(words):  # a part of one, and a smaller one of the same name
        return None
    name = next((known for known in _PEAKS if _within(known.split(), words)), None)
    if name is None:
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return 1e12 * _PEAKS[name][0 if half else 1 if tf32 else 2]


def _within(name: list[str], words: list[str]) -> bool:
    return any(words[i : i + len(name)] == name for i in range(len(words)))


def flops_per_token(model: Model, context: float, frozen: bool = False) -> int:
    """Return the FLOPs of a training step per token: three forwards, since a backward takes two, or one where the weights are frozen.

    What is computed again is not counted, and adapters are not.
    """
    return (2 if frozen else 3) * model.flops(max(1, round(context)))


def context_length(examples: Examples, looked_at: int = 64) -> float:
    """Return the length of the document that a token stands in, on average over tokens: attention costs as much as that is long.

    Rows without documents are one each. Packed ones are looked at, as many as asked for, evenly spread.
    """
    if examples.documents is None:
        return examples.length
    step = max(1, len(examples) // looked_at)
    lengths = []
    for i in range(0, len(examples), step):
        documents = examples[i]["documents"]
        lengths.append(torch.unique_consecutive(documents[documents >= 0], return_counts=True)[1])
    counts = torch.cat(lengths).double()
    return float((counts**2).sum() / counts.sum())
