"""Forward and backward of a training step as one CUDA graph, for hosts that launch kernels more slowly than the GPU runs them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ...kernels.seq import Seq
from ...layers.moe import MoE
from ..models.block import Block
from ..models.hooks import has_hooks

__all__ = ["CapturedStep", "why_not_captured"]


class CapturedStep:
    """The loss of a batch and the gradients of all parameters, replayed from a CUDA graph: ``loss = step(inputs, labels)``.

    A step has a thousand launches, and Python between them; a graph is one. Everything else is as in
    ``model(inputs, labels=labels).loss.backward()``: gradients appear in ``p.grad`` and are added to what is there, and any
    optimiser may follow. Values are the same to the bit. What a graph asks for: a GPU, batches of one shape, and a model that stays
    as it is (its parameters may be changed in place, as optimisers do, and not be replaced).

    Args:
        model: A model of the zoo.
        inputs: A batch to record the step with, whose values do not matter: ``input_ids`` ``(b, l)`` int64 of a language model,
            ``pixel_values`` ``(b, c, h, w)`` of one of images.
        labels: The model's, as they will be given: integers, or the probabilities of classes. ``inputs`` stand in for those of tokens by
            default.
        documents: ``(b, l)`` int64, the packed document of every token, -1 at padding at a row's end: rows of the step are packed.
        most: The most documents that a row of the step may hold, its padding counted as one; needed with ``documents``.
        num_items: Whether the step is told what to divide the summed loss by, as ``num_items`` of the model's forward.
        autocast: ``torch.bfloat16`` or ``torch.float16`` to record the step under autocast.

    Attributes:
        aux_loss: The auxiliary loss of the last batch, a scalar that the next call writes over; ``None`` for a model without.
        router: The routers' statistics of the last batch, as ``out.router``, which the next call writes over.

    Raises:
        ValueError: The step cannot be captured (:func:`why_not_captured`), or draws random numbers that recomputed activations would
            draw anew; or ``documents`` without ``most``, or more of them.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        most: int | None = None,
        num_items: bool = False,
        autocast: torch.dtype | None = None,
    ):
        if (documents is None) != (most is None):
            raise ValueError("CapturedStep: documents, most: one says nothing without the other. Give both, or none.")
        if documents is not None:
            Seq.from_documents(documents, most=most)
        if (why := why_not_captured(model, autocast)) is not None:
            raise ValueError(f"CapturedStep: {why}")
        self.model, self.autocast, self.most = model, autocast, most
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.reads = getattr(model, "main_input_name", "input_ids")
        if labels is None and inputs.is_floating_point():
            raise ValueError(f"CapturedStep: labels: are missing, and {self.reads} are none. Pass them.")
        self.inputs = inputs.to(device, copy=True)
        self.labels = self.inputs.clone() if labels is None else labels.to(device, copy=True)
        self.documents: Any = None if documents is None else documents.to(device, torch.long, copy=True)
        self.num_items: Any = torch.ones((), dtype=torch.long, device=device) if num_items else None
        before = [p.grad for p in self.parameters]
        try:
            with torch.cuda.device(device):
                self._record(device)
            # memory of the graph, written by every replay; parameters that the loss does not depend on have none
            self.gradients = [p.grad for p in self.parameters]
        finally:
            for p, grad in zip(self.parameters, before, strict=True):
                p.grad = grad

    def _record(self, device: torch.device) -> None:
        # what is compiled, loaded or allocated at the first call must be there when the graph is recorded
        aside, drawn = torch.cuda.Stream(), torch.cuda.get_rng_state(device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._forget()
                self._step()
        torch.cuda.current_stream().wait_stream(aside)
        if _checkpoints(self.model) and not torch.equal(drawn, torch.cuda.get_rng_state(device)):
            torch.cuda.set_rng_state(drawn, device)
            raise ValueError(f"CapturedStep: {_DRAWS.format('it draws random numbers')}")
        self._forget()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss, self.aux_loss, self.router = self._step()
        # what a step draws (stochastic depth), the first replay draws as the step itself would have done
        torch.cuda.set_rng_state(drawn, device)

    def _step(self) -> tuple[Tensor, Tensor | None, list[dict[str, Any]]]:
        options: dict[str, Any] = {} if self.num_items is None else {"num_items": self.num_items}
        if self.documents is not None:
            options["seq"] = Seq.from_documents(self.documents, most=self.most)
        with torch.autocast("cuda", self.autocast, enabled=self.autocast is not None):
            out = self.model(self.inputs, labels=self.labels, **options)
        out.loss.backward()
        # an adapter's output has neither
        aux_loss = getattr(out, "aux_loss", None)
        return out.loss.detach(), None if aux_loss is None else aux_loss.detach(), getattr(out, "router", [])

    def __call__(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        """Run the step on a batch.

        Args:
            inputs: Of the shape that was recorded.
            labels: The same; of tokens, ``inputs`` by default.
            documents: The same, where the step was recorded with documents.
            num_items: What the summed loss is divided by, where the step was recorded with that.

        Returns:
            The loss, a scalar outside any graph.

        Raises:
            ValueError: Another shape, more documents than the step was recorded for, or an argument that it was recorded without.
        """
        rows = {"inputs": inputs, "labels": inputs if labels is None else labels, "documents": documents}
        for name, given in {**rows, "num_items": num_items}.items():
            _check_given(self.reads if name == "inputs" else name, given, getattr(self, name))
        if documents is not None and not documents.is_cuda:
            # what a device would stop at can be said here
            Seq.from_documents(documents, most=self.most)
        for name, given in rows.items():
            if given is not None:
                getattr(self, name).copy_(given, non_blocking=True)
        if isinstance(num_items, Tensor):
            self.num_items.copy_(num_items, non_blocking=True)
        elif num_items is not None:
            self.num_items.fill_(num_items)  # an argument of the kernel that writes it: nobody waits
        return self._replay()

    def _replay(self) -> Tensor:
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


def _check_given(name: str, given: Any, kept: Tensor | None) -> None:
    if (given is None) != (kept is None):
        was, remedy = ("without", "Leave it out") if kept is None else ("with", "Pass it")
        raise ValueError(f"{name}: the step was recorded {was} it. {remedy}, or record a second step.")
    if isinstance(given, Tensor) and kept is not None and given.shape != kept.shape:
        raise ValueError(
            f"{name}: shape {tuple(given.shape)}, but the step was recorded with {tuple(kept.shape)}. Drop or pad the last batch of an "
            "epoch, or record a second step."
        )


_DRAWS = (
    "{} and gradient checkpointing, which would draw others when it recomputes: a graph does not take their state back. Do without one "
    "of the two, or call the model itself."
)


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def why_not_captured(model: nn.Module, autocast: torch.dtype | None = None) -> str | None:
    """Say why a training step of a model cannot be captured, and what to do about it; ``None`` where nothing is known against it.

    Args:
        model: The model, where it would be trained.
        autocast: The type of the autocast, if it would be trained under one.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return "the model has no parameter that requires a gradient. Unfreeze one."
    if any(type(p) is not nn.Parameter for p in parameters):
        return "the parameters are sharded, and gathering them is no part of a graph. Call the model itself."
    hooked = [name or "the model" for name, m in model.named_modules(remove_duplicate=False) if has_hooks(m)]
    hooks = {name: p._backward_hooks or p._post_accumulate_grad_hooks for name, p in model.named_parameters()}
    if hooked := [*hooked, *filter(hooks.get, hooks)]:
        return f"there are hooks, on {hooked[0]} for one, and a replayed graph runs none. Remove them, or call the model itself."
    device = parameters[0].device
    if device.type != "cuda":
        return f"the model is on {device.type}, and only a GPU has CUDA graphs. Call the model itself."
    dropout = next((name for name, m in model.named_modules() if isinstance(m, _DropoutNd) and m.p > 0), None)
    if dropout is not None and _checkpoints(model):
        return _DRAWS.format(f"there is dropout, {dropout} for one,")
    drawing = next((name for name, m in model.named_modules() if isinstance(m, Block) and m.drop), None)
    if drawing is not None and _checkpoints(model):
        return _DRAWS.format(f"there is stochastic depth, {drawing} for one,")
    return _why_not_experts(model, autocast or parameters[0].dtype, device)


def _why_not_experts(model: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    if not layers:
        return None
    # experts' loads are known on the GPU alone, and only this kernel reads them there
    major, _ = torch.cuda.get_device_capability(device)
    if dtype != torch.bfloat16 or major < 9:
        return (
            f"experts in {str(dtype).removeprefix('torch.')} on compute capability {major}.x ask the host how many rows each has. Use "
            "autocast=torch.bfloat16 on compute capability 9.0, or call the model itself."
        )
    for layer in layers:
        rows = layer.explain(device.type, dtype)
        taken = next((name for name, chosen, _ in rows if chosen), "loop")
        if taken != "grouped_mm":
            reason = next(reason for name, _, reason in rows if name == "grouped_mm")
            return f"the experts of layer {layer.layer_idx} go through {taken!r}, which asks the host how many rows each has ({reason})."
    return None
