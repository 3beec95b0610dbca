"""The trunk that every task shares: embedding in, residual blocks, final norm out; between stages of an image model, a smaller map.

State-dict keys follow mamba-ssm: ``backbone.embedding.weight``, ``backbone.layers.N.{norm,mixer}.*``, ``backbone.norm_f.weight``; blocks
are counted over all stages, and behind stage S stands ``backbone.downsample.S``.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers.adapter import Adapter
from ...layers.base import Seq
from ...layers.common import dtype_read, is_captured, scaled, upcast
from ...layers.fused import head_step, step_norm, why_head_apart
from ...layers.norm import make_norm
from ...layers.patches import Map
from ...layers.reading import Reading
from ..config.resolve import Resolved
from .block import Block, Stream, is_plain_norm, is_sharded, keep_sharing, share
from .hooks import has_backward_hooks
from .state import ModelState

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """Embedding (the task's, from what it reads to ``(b, l, d)``), blocks and final norm.

    Blocks that carry the same label in the pattern are one module; where it has adapters, modules that share all parts but those.

    Args:
        resolved: The config.
        embedding: From the task's inputs to the first stage's tokens.
        downsample: Behind every stage but the last, from its map ``(b, h * w, d)`` and ``(h, w)`` to those of the next.
        device, dtype: As for ``torch.nn.Linear``.
    """

    def __init__(
        self, resolved: Resolved, embedding: nn.Module, downsample: Iterable[nn.Module] = (), device=None, dtype=None
    ):
        super().__init__()
        self.embedding = embedding
        self.downsample = nn.ModuleList(downsample)
        self.layers = nn.ModuleList()
        labelled: dict[str, Block] = {}
        for spec in resolved.specs:
            block = labelled.get(spec.label or "")
            if block is None:
                block = Block(resolved, spec.index, device=device, dtype=dtype)
                labelled |= {spec.label: block} if spec.label else {}
            elif any(isinstance(module, Adapter) for module in block.modules()):
                first, block = block, Block(resolved, spec.index, device="meta", dtype=dtype)
                share(block, first)
            self.layers.append(block)
        cfg, stages = resolved.config, [spec.stage for spec in resolved.specs]
        # the block that each later stage begins with, and the number of the stage before
        self.begins = {stages.index(stage): stage - 1 for stage in range(1, stages[-1] + 1)}
        width = resolved.specs[-1].d_model
        self.norm_f = make_norm(cfg.norm.type, width, cfg.norm.eps, device=device, dtype=dtype)
        # keys of tasks that read tokens and give logits
        self.embedding_multiplier = cfg.get("embedding_multiplier", 1.0)
        self.logits_multiplier = cfg.get("logits_multiplier", 1.0)
        self.residual_in_fp32 = bool(cfg.residual_in_fp32)
        self.gradient_checkpointing, self.checkpoint_every = False, 1
        # under the name that transformers gives it, whose options (offloading, say) come with it
        self._gradient_checkpointing_func: Any = checkpoint

    @property
    def blocks(self) -> list[Block]:
        """``layers``, typed."""
        return cast(list[Block], list(self.layers))

    def embed(self, inputs: Tensor) -> Tensor:
        """The residual stream's first value: of token ids, ``(...)`` to ``(..., d)``."""
        return scaled(self.embedding(inputs), self.embedding_multiplier)

    def forward(
        self,
        x: Tensor,
        seq: Seq | None = None,
        state: ModelState | None = None,
        return_state: bool = False,
        passed: list[Tensor] | None = None,
        maps: list[Map] | None = None,
    ) -> tuple[Tensor, ModelState | None, dict[str, list]]:
        """Run embedded tokens ``(b, l, d)``, in ``seq``'s order, through all blocks and the final norm.

        ``passed``, a list to fill, collects the embedding and what every block leaves, the last one after the norm; ``maps`` what every
        stage leaves, before it is made smaller or normed, with the height and width that it has.
        """
        if passed is not None:
            passed.append(x)
        x = upcast(x) if self.residual_in_fp32 else x
        before = (None,) * len(self.layers) if state is None else state.layers
        after: list[Any] = []
        aux: dict[str, list] = {}
        length = x.shape[1]
        stream = Stream(x, embedding=x)
        for i, (block, call, s) in enumerate(zip(self.blocks, self._callables(), before, strict=True)):
            if i in self.begins:
                x, seq = self._smaller(self.downsample[self.begins[i]], stream.sum(), seq, maps)
                stream = Stream(x, embedding=x)
            if self.gradient_checkpointing and self.training and i % self.checkpoint_every == 0:
                # a CUDA graph has no state of random numbers to keep, and who records one refuses layers that draw any
                options = {"preserve_rng_state": False} if is_captured(x) else {}
                call = partial(self._gradient_checkpointing_func, call, use_reentrant=False, **options)
                stream = stream._replace(x=stream.sum(), add=None)  # one tensor to keep, not two
            # a tensor where somebody waits for its gradient, which torch gives those of arguments alone
            value, around = (stream.sum(), {"beside": stream}) if has_backward_hooks(block) else (stream, {})
            value, s, extra, stream = call(value, s, seq, return_state, **around)
            stream = stream.replaced_by(value)
            after.append(s)
            if passed is not None and len(after) < len(before):
                passed.append(stream.sum())
            for key, values in extra.items():
                aux.setdefault(key, []).extend(values)
        new = None
        if return_state:
            seen = x.new_full((x.shape[0],), length, dtype=torch.long) if seq is None else seq.lengths
            new = ModelState(tuple(after), seen if state is None else state.tokens + seen)
        if maps is not None:
            maps.append((stream.sum(), grid_of(seq)))
        normed, hidden = self._final(stream)
        if passed is not None:
            passed.append(normed)
        return hidden, new, aux

    def _smaller(self, part: nn.Module, x: Tensor, seq: Seq | None, maps: list[Map] | None) -> tuple[Tensor, Seq]:
        grid = grid_of(seq)
        if maps is not None:
            maps.append((x, grid))
        x, grid = part(x, grid)
        return (upcast(x) if self.residual_in_fp32 else x), Seq.from_grid(grid, x.shape[0], x.shape[1], x.device)

    def step(self, x: Tensor, state: ModelState, head: nn.Module) -> Tensor:
        """One embedded token per row, ``(b, d)``, through all blocks, the final norm and the head; ``state`` is updated in place."""
        x = upcast(x) if self.residual_in_fp32 else x
        stream = Stream(x, embedding=x)
        self._callables()
        for block, s in zip(self.blocks, state.layers, strict=True):
            stream = block.step(stream, s)
        state.tokens += 1
        return self._logits(stream, head)

    def read(self, x: Tensor, state: ModelState, head: nn.Module, reading: Reading) -> Tensor:
        """Some embedded tokens per row, ``(b, w, d)``, to their logits; ``state`` stays as it is until ``reading`` is taken over."""
        x = reading.seq.clear(upcast(x) if self.residual_in_fp32 else x)
        stream = Stream(x, embedding=x)
        for block, call, s in zip(self.blocks, self._callables(), state.layers, strict=True):
            if isinstance(block, Block) and block.why_not_read(stream.x, s) is None:
                stream = block.read(stream, s, reading)
            else:
                value, new, _, after = call(stream, s, reading.seq.cleared, True)
                stream = after.replaced_by(value)
                reading.form(s, new)
        return self._logits(stream, head)

    @torch.no_grad()
    def steps_taken(self, state: ModelState, width: int = 0) -> str:
        """Say of how many blocks a step from a state does norm, mixer and residual addition together, and of the others why not.

        With ``width``, the same of reading as many tokens of a row at once (:meth:`read`).
        """
        x = self.embed(torch.zeros_like(state.tokens))
        x = upcast(x) if self.residual_in_fp32 else x
        x = x[:, None].expand(-1, width, -1) if width else x
        pairs: Any = zip(self.layers, state.layers, strict=True)
        why = Block.why_not_read if width else Block.why_apart
        apart = Counter(why(b, x, s) if isinstance(b, Block) else "is none of our blocks" for b, s in pairs)
        together = apart.pop(None, 0)
        others = "".join(f"; {count} part by part ({why})" for why, count in apart.most_common())
        return f"{together} of {len(self.layers)} blocks in a few launches each{others}"

    def why_head_apart(self, x: Tensor, head: nn.Module) -> str | None:
        """Say why the final norm and the head are taken apart in a step, as :meth:`Block.why_apart`."""
        return "logits have a factor" if self.logits_multiplier != 1 else why_head_apart(head, self.norm_f, x)

    def follow_owners(self) -> None:
        """Let blocks that borrow parts have what somebody has put in the place of them: adapters, say, or weights with these merged."""
        for block in self.blocks:
            for owner in getattr(block, "owner", ()):
                keep_sharing(block, owner)

    def _callables(self) -> list[Callable[..., Any]]:
        """The blocks, to be called; one whose owner is sharded by itself is called through that, which gathers the weights of both."""
        self.follow_owners()
        blocks: list[Any] = self.blocks
        for i, block in enumerate(blocks):
            for owner in getattr(block, "owner", ()):
                if is_sharded(owner):
                    blocks[i] = partial(owner, run=block)
        return blocks

    def _logits(self, stream: Stream, head: nn.Module) -> Tensor:
        """The logits of one token per row, ``(b, d)``, or of some, ``(b, w, d)``."""
        places = stream.x.shape[:-1]
        if self.why_head_apart(stream.x.flatten(0, -2), head) is not None:
            return head(self._final(stream)[1])
        found = head_step(cast(nn.Linear, head), stream.sum().flatten(0, -2), step_norm(cast(Any, self.norm_f)))
        return found.unflatten(0, places)

    def _final(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """The normed stream, and what the head reads."""
        norm, factor = self.norm_f, self.logits_multiplier
        weight: Any = next(norm.parameters(), stream.x)
        dtype = dtype_read(weight) if factor == 1 else stream.x.dtype
        normed = norm(stream.x, dtype, add=stream.add) if is_plain_norm(norm) else norm(stream.sum()).to(dtype)
        # the head is linear, so the factor may stand in front of it, where it is d and not v multiplications
        return normed, normed if factor == 1 else (normed * factor).to(weight.dtype)


def grid_of(seq: Seq | None) -> tuple[int, int]:
    """``(h, w)`` of the maps that the rows of a stage are; ``(0, 0)`` where they are none."""
    return (0, 0) if seq is None or seq.grid is None else seq.grid
