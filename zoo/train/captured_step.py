"""Forward and backward of a training step as one CUDA graph, for hosts that launch kernels more slowly than the GPU runs them."""

from typing import NoReturn

import torch
from torch import Tensor, nn

from ...layers.moe import MoE
from ..models.hooks import has_hooks

__all__ = ["CapturedStep"]


class CapturedStep:
    """The loss of a batch and the gradients of all parameters, replayed from a CUDA graph: ``loss = step(input_ids, labels)``.

    A step has a thousand launches, and Python between them; a graph is one. Everything else is as in
    ``model(input_ids, labels=labels).loss.backward()``: gradients appear in ``p.grad`` and are added to what is there, and any
    optimiser may follow. Values are the same to the bit. What a graph asks for: a GPU, batches of one shape, and a model that stays
    as it is (its parameters may be changed in place, as optimisers do, and not be replaced).

    Args:
        model: A language model whose ``forward`` takes ``input_ids`` and ``labels``.
        input_ids: ``(b, l)`` int64, a batch to record the step with; its values do not matter.
        labels: As ``input_ids``, which stand in for them by default.
        autocast: ``torch.bfloat16`` or ``torch.float16`` to record the step under autocast.

    Raises:
        ValueError: The model is not on a GPU, its parameters are sharded, it has hooks, or its experts ask the host for their loads.
    """

    def __init__(
        self, model: nn.Module, input_ids: Tensor, labels: Tensor | None = None, *, autocast: torch.dtype | None = None
    ):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        _check(model, self.parameters, autocast)
        device = self.parameters[0].device
        self.input_ids = input_ids.to(device, copy=True)
        self.labels = self.input_ids.clone() if labels is None else labels.to(device, copy=True)

        def step() -> Tensor:
            with torch.autocast("cuda", autocast, enabled=autocast is not None):
                loss = model(self.input_ids, labels=self.labels).loss
            loss.backward()
            return loss.detach()

        before = [p.grad for p in self.parameters]
        with torch.cuda.device(device):
            # what is compiled, loaded or allocated at the first call must be there when the graph is recorded
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    self._forget()
                    step()
            torch.cuda.current_stream().wait_stream(aside)
            self._forget()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = step()
        # memory of the graph, written by every replay; parameters that the loss does not depend on have none
        self.gradients = [p.grad for p in self.parameters]
        for p, grad in zip(self.parameters, before, strict=True):
            p.grad = grad

    def __call__(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Run the step on a batch.

        Args:
            input_ids: Of the shape that was recorded.
            labels: The same; ``input_ids`` by default.

        Returns:
            The loss, a scalar outside any graph.

        Raises:
            ValueError: Another shape.
        """
        for name, given, kept in (("input_ids", input_ids, self.input_ids), ("labels", labels, self.labels)):
            given = input_ids if given is None else given
            if given.shape != kept.shape:
                raise ValueError(
                    f"{name}: shape {tuple(given.shape)}, but the step was recorded with {tuple(kept.shape)}. Drop or pad the last "
                    "batch of an epoch, or record a second step."
                )
            kept.copy_(given, non_blocking=True)
        pairs = [(p, g) for p, g in zip(self.parameters, self.gradients, strict=True) if g is not None]
        # as backward does, add to what is there; a replay writes over it where it is the graph's own
        earlier = [(g, p.grad.clone() if p.grad is g else p.grad) for p, g in pairs if p.grad is not None]
        self.graph.replay()
        for p, g in pairs:
            p.grad = g
        if earlier:
            torch._foreach_add_(*map(list, zip(*earlier, strict=True)))
        return self.loss.clone()

    def _forget(self) -> None:
        for p in self.parameters:
            p.grad = None


def _check(model: nn.Module, parameters: list[nn.Parameter], autocast: torch.dtype | None) -> None:
    if not parameters:
        _refuse("the model has no parameter that requires a gradient.")
    if any(type(p) is not nn.Parameter for p in parameters):
        _refuse("the parameters are sharded, and gathering them is no part of a graph. Call the model itself.")
    hooked = [name or "the model" for name, m in model.named_modules(remove_duplicate=False) if has_hooks(m)]
    hooks = {name: p._backward_hooks or p._post_accumulate_grad_hooks for name, p in model.named_parameters()}
    if hooked := [*hooked, *filter(hooks.get, hooks)]:
        _refuse(
            f"there are hooks, on {hooked[0]} for one, and a replayed graph runs none. Remove them, or call the model itself."
        )
    device = parameters[0].device
    if device.type != "cuda":
        _refuse(f"the model is on {device.type}, and only a GPU has CUDA graphs. Call the model itself.")
    # experts' loads are known on the GPU alone, and only this kernel reads them there
    dtype = autocast or parameters[0].dtype
    if any(isinstance(m, MoE) for m in model.modules()):
        major, _ = torch.cuda.get_device_capability(device)
        if dtype != torch.bfloat16 or major < 9:
            _refuse(
                f"experts in {str(dtype).removeprefix('torch.')} on compute capability {major}.x ask the host how many rows each has. Use "
                "autocast=torch.bfloat16 on compute capability 9.0, or call the model itself."
            )


def _refuse(why: str) -> NoReturn:
    raise ValueError(f"CapturedStep: {why}")
