"""Numbers of a device that the host reads when it has given the device something else to do."""

import torch
from torch import Tensor

__all__ = ["Later"]


class Later:
    """Scalars on their way to the host, by name: what writes them is waited for in :meth:`read`, and not before."""

    def __init__(self, named: dict[str, Tensor]):
        self.names = list(named)
        self.sent: torch.cuda.Event | None = None
        if not named:
            return
        self.values = torch.stack([x.detach().float().reshape(()) for x in named.values()])
        if self.values.is_cuda:
            there = torch.empty(self.values.shape, pin_memory=True)
            self.values = there.copy_(self.values, non_blocking=True)
            self.sent = torch.cuda.Event()
            self.sent.record()

    def read(self) -> dict[str, float]:
        """Return the numbers."""
        if self.sent is not None:
            self.sent.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True)) if self.names else {}
