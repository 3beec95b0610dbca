"""The device that a user names: checked once, before anything is read, built or downloaded."""

import torch

__all__ = ["pick_device"]


def pick_device(
    device: torch.device | str | int | None = None, *, meta: bool = False, numbered: bool = True
) -> torch.device:
    """Return the device that is meant, ``None`` for a GPU if there is one; for one that is not there, raise a ``ValueError``.

    ``"meta"``, which holds no values, is none unless the caller says so. Training cannot use one GPU by its number, since it takes all
    that the process sees.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"device={str(device)!r}: torch knows no such device. {_there()}") from e
    if chosen.type == "cpu":
        return chosen
    if chosen.type == "meta" and not meta:
        raise ValueError(f"device='meta': holds no values, and nothing can be computed on it. {_there()}")
    kind = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    if kind is not None and chosen.type == kind.type and chosen.index is not None and chosen.index >= count:
        raise ValueError(f"device={str(device)!r}: there are only {count} of its kind. {_there()}")
    try:
        torch.empty(0, device=chosen)
    # a backend that is not compiled in, has no driver or no hardware fails in a way of its own
    except Exception as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0].split(". ")[0].rstrip(".")
        raise ValueError(f"device={str(device)!r}: cannot be used here ({why}). {_there()}") from e
    if chosen.index is not None and not numbered:
        raise ValueError(
            f"device={str(device)!r}: training takes the GPUs that the process sees. Say {chosen.type}, and choose them by "
            f"CUDA_VISIBLE_DEVICES={chosen.index}."
        )
    return chosen


def _there() -> str:
    kind = torch.accelerator.current_accelerator(check_available=True)
    others = [] if kind is None else [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]
    return f"There is: {', '.join(['cpu', *others])}. Name one of them, or leave the device out."
