"""All that models have in common, whatever their task."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...layers.base import Mixer, Seq, copy_state
from ...layers.common import is_captured
from ...layers.moe import balance_loss
from ...layers.reading import Reading
from ..config.resolve import resolve
from ..config.schema import ConfigSchema, TrunkSchema
from .hooks import Hooks
from .recordings import Recordings
from .state import ModelState
from .trunk import Backbone

__all__ = ["Model", "Passed"]


class Passed(NamedTuple):
    """The result of running rows of tokens through the trunk.

    Attributes:
        hidden: ``(b, l, d)`` after the final norm, in the order in which the rows are described: real tokens first.
        state: What the rows leave behind, if it was asked for.
        aux_loss: The weighted sum of the mixers' auxiliary losses; ``None`` where no mixer has one.
        router: Statistics of every MoE block.
        hidden_states: ``(b, l, d)`` of the embedding and after every block, in the caller's order, if they were asked for.
    """

    hidden: Tensor
    state: ModelState | None
    aux_loss: Tensor | None
    router: list[dict[str, Any]]
    hidden_states: tuple[Tensor, ...] | None


class Model(nn.Module):
    """A network assembled from a config: the trunk between the embedding and the head of a task.

    A task is a subclass that makes these two, says in its ``forward`` what goes in and comes out, and is registered
    (:func:`~hybridzoo.zoo.models.tasks.register_task`). Everything else in the zoo asks it and knows no task by name.

    Args:
        cfg: A config as ``zoo.config`` returns it, or anything ``zoo.build`` accepts.
        device: As for ``torch.nn.Linear``; ``"meta"`` allocates nothing.
        dtype: Of the weights; parameters that must stay float32 do.

    Attributes:
        schema: The dataclass of its config's keys, :class:`~hybridzoo.zoo.config.schema.TrunkSchema` or one derived from it.
        main_input_name: What it reads, the first argument of its forward.
        head_name: The head's name in the model, and in state-dict keys.
        may_tie: Whether the config's ``tie_embeddings`` says that the head's weight is the embedding's.
        unit: What FLOPs are stated of: a ``"token"`` in a sequence of a length, or an ``"image"`` of a height and width.
        hf_class: The class in :mod:`hybridzoo.zoo.hf` through which transformers sees the model; ``None`` if there is none.
        cfg: The resolved config.
        specs: The mixers of each residual block, as the config says.
        source: The folder that the model was loaded from, where its tokenizer's files are; ``None`` if it was built.
        metadata: Facts of that folder that are about text and not about the network, by file: the ids of special tokens under
            ``"config.json"``, everything under ``"generation_config.json"``. Saving writes it back.
        family: The published family whose files it was read from, which an export tries first.
        batch_mean: In a training by several processes, what averages a tensor over them, so that experts are balanced over the whole
            batch; all have to make the same calls then. ``None`` balances what a call sees.
        recordings: Steps that a GPU has recorded, for the next generation.
        load_report: What was matched, missing and unexpected when it was loaded; ``None`` if it was built.
    """

    schema: ClassVar[type[TrunkSchema]] = ConfigSchema
    main_input_name: ClassVar[str] = "input_ids"
    head_name: ClassVar[str] = "head"
    may_tie: ClassVar[bool] = False
    hf_class: ClassVar[str | None] = None
    unit: ClassVar[str] = "token"
    batch_mean: Callable[[Tensor], Tensor] | None = None

    def __init__(self, cfg: Any, device=None, dtype=None):
        super().__init__()
        resolved = resolve(cfg)
        self.cfg, self.specs = resolved.config, resolved.specs
        self.source: Path | None = None
        self.metadata: dict[str, dict[str, Any]] = {}
        self.family: str | None = None
        self.load_report: Any = None
        self._hooks = Hooks()
        self.recordings = Recordings()
        parts = self.make_embedding(device, dtype), self.make_downsample(device, dtype)
        self.backbone = Backbone(resolved, *parts, device=device, dtype=dtype)
        setattr(self, self.head_name, self.make_head(device, dtype))
        if not any(p.is_meta for p in self.head.parameters()):
            # there is nothing to draw, and normal_ on a meta tensor would import the compiler: seconds
            self.reset_ends()

    def make_embedding(self, device: Any, dtype: torch.dtype | None) -> nn.Module:
        """Return the module that makes ``(b, l, d)`` of the model's inputs."""
        raise NotImplementedError

    def make_downsample(self, device: Any, dtype: torch.dtype | None) -> list[nn.Module]:
        """Return what stands between the stages, one module less than there are stages; here, of a trunk that is one, none."""
        return []

    def make_head(self, device: Any, dtype: torch.dtype | None) -> nn.Module:
        """Return the module that makes the model's answers of the final norm's ``(b, l, d)``, or of what is pooled from it."""
        raise NotImplementedError

    @classmethod
    def auto_classes(cls, cfg: Any) -> dict[str, str]:
        """Return the classes of :mod:`hybridzoo.zoo.hf` that transformers reads a saved model by, under the names of its Auto classes."""
        if cls.hf_class is None:
            return {}
        return {"AutoConfig": "HybridZooConfig", "AutoModel" + cls.hf_class.removeprefix("HybridZoo"): cls.hf_class}

    @classmethod
    def companions(cls, cfg: Any) -> dict[str, dict[str, Any]]:
        """Return the content of further JSON files that transformers looks for beside a model of this config, by their names."""
        return {}

    def make_end(self, part: str) -> nn.Module | None:
        """Return what stands in front of the blocks, between or behind them, anew, by its dotted name; ``None`` if a draw tells no more.

        Here, where :meth:`reset_ends` draws what these hold, there is nothing to learn from another.
        """
        return None

    def reset_ends(self) -> None:
        """Draw the initial values of embedding and head, after those of the blocks; here, they stay as they were made."""

    @property
    def usual_size(self) -> int:
        """At which costs are stated unless another is asked for; here, tokens of a sequence."""
        return 2048

    @property
    def task(self) -> str:
        """The name in the config."""
        return self.cfg.task

    @property
    def head(self) -> nn.Module:
        """The head, under whatever name."""
        return cast(nn.Module, self._modules[self.head_name])

    def init_state(self, batch: int, max_len: int = 0, device=None, dtype=None, state_dtype=None) -> ModelState:
        """The state before the first token.

        Args:
            batch: Rows.
            max_len: Tokens a row may reach; attention allocates this many places and grows when they are used up.
            device: The weights' device by default.
            dtype: The weights' dtype by default; recurrent states are float32.
            state_dtype: Of recurrent states, where it is not to be float32: with ``torch.bfloat16`` they take half of the memory, and a
                step rounds what it leaves.
        """
        self._hooks.look_again()
        weight = self.some_weight()
        device, dtype = device or weight.device, dtype or weight.dtype
        # whatever stands around a block's mixer, or in the block's place, has a mixer inside
        mixers = (next(m for m in block.modules() if isinstance(m, Mixer)) for block in self.backbone.blocks)
        layers = tuple(mixer.init_state(batch, max_len, device, dtype) for mixer in mixers)
        return ModelState(layers, torch.zeros(batch, dtype=torch.long, device=device)).kept_in(state_dtype)

    def passed(
        self,
        x: Tensor,
        seq: Seq | None,
        state: ModelState | None = None,
        *,
        return_state: bool = False,
        hidden_states: bool = False,
    ) -> Passed:
        """Run the embedded tokens ``(b, l, d)`` of rows that ``seq`` describes through the trunk."""
        # from here on padding holds zeros, whatever the caller has there
        x, rows = (x, None) if seq is None else (seq.align(x), seq.cleared)
        every: list[Tensor] | None = [] if hidden_states else None
        hidden, new_state, aux = self.backbone(x, rows, state, return_state, every)
        if every and seq is not None:
            every = [seq.restore(h) for h in every]
        states = None if every is None else tuple(every)
        return Passed(hidden, new_state, self.aux_loss(aux), aux.get("router", []), states)

    def hooked(self) -> bool:
        """Tell whether hooks, or parts without a step of their own, have the whole model called for every token."""
        return self._hooks.anywhere(self)

    def _step(self, tokens: Tensor, state: ModelState) -> Tensor:
        """Decode one token per row, ``(b, ...)`` as the embedding reads them; ``state`` is updated in place.

        Where there are hooks, this is a call of the model with one token per row.

        Raises:
            RuntimeError: There are hooks, and a CUDA graph is captured, which would not run them again.
        """
        state.before_step()
        if not self.hooked():
            return self.backbone.step(self.backbone.embed(tokens), state, self.head)
        if is_captured(tokens):
            raise RuntimeError(
                "step: a CUDA graph cannot run the hooks on the model's modules when it is replayed. Remove the hooks, or do not capture."
            )
        # a backward needs what the forward has read, and the state is about to change
        before = state.clone() if torch.is_grad_enabled() else state
        out = self(tokens.unsqueeze(1), state=before, return_state=True)
        copy_state(state.layers, out.state.layers)
        state.tokens.copy_(out.state.tokens)
        return out.logits.squeeze(1)

    def read(self, tokens: Tensor, state: ModelState, reading: Reading) -> Tensor:
        """Read some tokens per row, ``(b, w, ...)`` as the embedding reads them, to their logits, ``(b, w, v)``.

        The state stays as it is until ``reading`` is taken over, by :meth:`~hybridzoo.zoo.models.state.ModelState.read_on`. There are no
        hooks (:meth:`hooked`).
        """
        return self.backbone.read(self.backbone.embed(tokens), state, self.head, reading)

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Recompute every block in the backward instead of keeping its activations (training mode only)."""
        self.backbone.gradient_checkpointing = enabled

    def aux_loss(self, aux: dict[str, list]) -> Tensor | None:
        """Return the weighted sum of the auxiliary losses that the blocks have left in a forward; ``None`` where no mixer has one."""
        losses = list(aux.get("loss", []))
        if aux.get("balance"):
            losses.append(balance_loss(aux["balance"], self.batch_mean if self.training else None))
        return torch.stack(losses).sum() if losses else None

    def head_flops(self, size: int) -> int:
        """Forward FLOPs per :attr:`unit` of the head, at ``size``; here, those of one that reads every token."""
        return 2 * sum(p.numel() for p in self.head.parameters())

    def embedding_flops(self, size: int) -> int:
        """Those of the embedding; here, of one that looks up."""
        return 0

    def between_flops(self, size: int) -> list[int]:
        """Those of what stands between stages."""
        return []

    def block_flops(self, size: int) -> list[int]:
        """Forward FLOPs per :attr:`unit` of every block; here, per token in a sequence of ``size``."""
        return [block.flops(size) for block in self.backbone.blocks]

    def flops(self, size: int) -> int:
        """Forward FLOPs (2 per multiply-add) per :attr:`unit`, at ``size``, :attr:`usual_size` or another; embedding and head included."""
        parts = sum(self.block_flops(size)) + sum(self.between_flops(size))
        return self.embedding_flops(size) + parts + self.head_flops(size)

    def num_params(self) -> int:
        """Parameters, tied and shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def some_weight(self) -> Tensor:
        """A weight of the model's device and dtype."""
        # of the embedding, or of what comes next in a model whose embedding has none that is a floating-point number (quantised)
        parts = self.backbone.embedding, self
        return next(p for part in parts for p in part.parameters() if p.is_floating_point())
