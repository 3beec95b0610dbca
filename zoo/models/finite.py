"""Weights that are no numbers: a diverged run leaves them behind, and everything that follows is NaN, or looks like text."""

from torch import nn

__all__ = ["check_finite"]


def check_finite(model: nn.Module, where: str) -> None:
    """Raise a ``ValueError`` that blames ``where``, a folder or a name, for NaN or infinity in a floating-point weight."""
    for name, tensor in model.state_dict().items():
        if not hasattr(tensor, "is_floating_point") or tensor.is_meta or not tensor.is_floating_point():
            continue
        if tensor.dtype.itemsize > 1 and not bool((finite := tensor.detach().isfinite()).all()):
            broken = int(finite.numel() - finite.sum())
            raise ValueError(
                f"{where}: {broken:,} of the {tensor.numel():,} values of {name} are NaN or infinite. The run that wrote it has diverged: "
                "take an earlier checkpoint, or train again with a smaller learning rate."
            )
