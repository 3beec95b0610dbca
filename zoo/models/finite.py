"""Weights that are no numbers: a diverged run leaves them behind, and everything that follows is NaN, or looks like text."""

from torch import nn

__all__ = ["check_finite"]


def check_finite(model: nn.Module, where: str) -> None:
    """Refuse a model with NaN or infinity in a weight.

    Args:
        model: Any module; weights on the meta device and those that are not floating-point are passed over.
        where: The folder or name to blame in the message.

    Raises:
        ValueError: Names the first such weight, and how many of its values are none.
    """
    for name, tensor in model.state_dict().items():
        if not hasattr(tensor, "is_floating_point") or tensor.is_meta or not tensor.is_floating_point():
            continue
        if tensor.dtype.itemsize > 1 and not bool((finite := tensor.detach().isfinite()).all()):
            broken = int(finite.numel() - finite.sum())
            raise ValueError(
                f"{where}: {broken:,} of the {tensor.numel():,} values of {name} are NaN or infinite. The run that wrote it has diverged: "
                "take an earlier checkpoint, or train again with a smaller learning rate."
            )
