"""The language model: embedding, residual blocks, final norm, head. Every family in the zoo is this class and a YAML file.

State-dict keys follow mamba-ssm: ``backbone.embedding.weight``, ``backbone.layers.N.{norm,mixer}.*``, ``backbone.norm_f.weight``,
``lm_head.weight``.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers.adapter import Adapter
from ...layers.base import Mixer, Seq, shapes, tree
from ...layers.common import dtype_read, scaled, weight_dtype
from ...layers.moe import balance_loss
from ...layers.norm import make_norm
from ..config.resolve import Resolved, resolve
from ..tokenizer import load_tokenizer
from .block import Block, Stream, is_plain_norm, is_sharded, keep_sharing, share
from .generate import generate
from .hooks import Hooks, has_backward_hooks
from .loss import next_token_loss, share_of_items, shift_labels
from .state import ModelState

__all__ = ["Backbone", "CausalLM", "CausalLMOutput", "number_documents"]


@dataclasses.dataclass(repr=False)
class CausalLMOutput:
    """What a forward returns; a pytree of its tensors, so that what wraps a model finds them.

    Attributes:
        loss: With ``labels``: mean cross-entropy in nats per target, plus ``aux_loss``.
        aux_loss: The weighted sum of the mixers' auxiliary losses; ``None`` where no mixer has one. Experts are balanced over all
            layers together, see :func:`hybridzoo.layers.moe.balance_loss`.
        state: What the rows leave behind, for the next call.
        router: Statistics of every MoE block, a list of dicts.
        hidden: ``(b, l, d)`` after the final norm.
        hidden_states: Where asked for: ``(b, l, d)`` of the embedding and after every block, the last one after the final norm.
    """

    loss: Tensor | None
    aux_loss: Tensor | None
    state: ModelState | None
    router: list[dict[str, Any]]
    hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None
    _head: nn.Module
    _kept: int | Tensor = 0
    _logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """``(b, l, v)``. With ``labels`` they are formed when first asked for: the loss did not need them all at once."""
        if self._logits is None:
            kept, dtype = _keep(self.hidden, self._kept), weight_dtype(self._head)
            self._logits = self._head(kept if dtype is None else kept.to(dtype))
        return self._logits

    __repr__ = shapes


tree(CausalLMOutput)


class Backbone(nn.Module):
    """Embedding, blocks and final norm.

    Blocks that carry the same label in the pattern are one module; where it has adapters, modules that share all parts but those.
    """

    def __init__(self, resolved: Resolved, device=None, dtype=None):
        super().__init__()
        cfg, specs = resolved.config, resolved.specs
        norm = {"type": cfg.norm.type, "eps": cfg.norm.eps}
        table = torch.empty(padded_vocab(cfg), cfg.d_model, device=device, dtype=dtype)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        blocks: list[Block] = []
        shared: dict[str, Block] = {}
        for spec in specs:
            first = shared.get(spec.label) if spec.label else None
            if first is None:
                block = Block(spec, cfg.d_model, len(specs), norm, cfg.residual_multiplier, device=device, dtype=dtype)
            elif any(isinstance(module, Adapter) for module in first.modules()):
                block = Block(spec, cfg.d_model, len(specs), norm, cfg.residual_multiplier, device="meta", dtype=dtype)
                share(block, first)
            else:
                block = first
            if spec.label:
                shared.setdefault(spec.label, block)
            blocks.append(block)
        self.layers = nn.ModuleList(blocks)
        self.norm_f = make_norm(norm["type"], cfg.d_model, norm["eps"], device=device, dtype=dtype)
        self.residual_in_fp32 = bool(cfg.residual_in_fp32)
        self.embedding_multiplier, self.logits_multiplier = cfg.embedding_multiplier, cfg.logits_multiplier
        self.gradient_checkpointing, self.checkpoint_every = False, 1
        # under the name that transformers gives it, whose options (offloading, say) come with it
        self._gradient_checkpointing_func: Any = checkpoint

    @property
    def blocks(self) -> list[Block]:
        """``layers``, typed."""
        return cast(list[Block], list(self.layers))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids to the residual stream's first value, ``(...)`` to ``(..., d)``."""
        return scaled(self.embedding(input_ids), self.embedding_multiplier)

    def forward(
        self,
        x: Tensor,
        seq: Seq | None,
        state: ModelState | None,
        return_state: bool,
        passed: list[Tensor] | None = None,
    ) -> tuple[Tensor, ModelState | None, dict[str, list]]:
        """Run embedded tokens ``(b, l, d)``, in ``seq``'s order, through all blocks and the final norm.

        ``passed``, a list to fill, collects the embedding and what every block leaves, the last one after the norm.
        """
        if passed is not None:
            passed.append(x)
        x = x.float() if self.residual_in_fp32 else x
        before = (None,) * len(self.layers) if state is None else state.layers
        after: list[Any] = []
        aux: dict[str, list] = {}
        stream, embedding, side = Stream(x), x, None
        for i, (block, call, s) in enumerate(zip(self.blocks, self._callables(), before, strict=True)):
            rest = s, seq, return_state, embedding, side
            if self.gradient_checkpointing and self.training and i % self.checkpoint_every == 0:
                # one tensor to keep, not two
                call, stream = (
                    partial(self._gradient_checkpointing_func, call, use_reentrant=False),
                    Stream(stream.sum()),
                )
            value = stream.sum() if has_backward_hooks(block) else stream
            value, s, extra, side = call(value, *rest)
            stream = Stream(value) if isinstance(value, Tensor) else value
            after.append(s)
            if passed is not None and len(after) < len(before):
                passed.append(stream.sum())
            for key, values in extra.items():
                aux.setdefault(key, []).extend(values)
        new = None
        if return_state:
            seen = x.new_full((x.shape[0],), x.shape[1], dtype=torch.long) if seq is None else seq.lengths
            new = ModelState(tuple(after), seen if state is None else state.tokens + seen)
        normed, hidden = self._final(stream)
        if passed is not None:
            passed.append(normed)
        return hidden, new, aux

    def step(self, x: Tensor, state: ModelState) -> Tensor:
        """One embedded token per row, ``(b, d)``, through all blocks and the final norm; ``state`` is updated in place."""
        x = x.float() if self.residual_in_fp32 else x
        stream, embedding, side = Stream(x), x, None
        self._callables()
        for block, s in zip(self.blocks, state.layers, strict=True):
            stream, side = block.step(stream, s, embedding, side)
        state.tokens += 1
        return self._final(stream)[1]

    def _callables(self) -> list[Callable[..., Any]]:
        """The blocks, to be called; one whose owner is sharded by itself is called through that, which gathers the weights of both."""
        blocks: list[Any] = self.blocks
        for i, block in enumerate(blocks):
            for owner in getattr(block, "owner", ()):
                keep_sharing(block, owner)
                if is_sharded(owner):
                    blocks[i] = partial(owner, run=block)
        return blocks

    def _final(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """The normed stream, and what the head reads."""
        norm, factor = self.norm_f, self.logits_multiplier
        weight: Any = next(norm.parameters(), stream.x)
        dtype = dtype_read(weight) if factor == 1 else stream.x.dtype
        normed = norm(stream.x, dtype, add=stream.add) if is_plain_norm(norm) else norm(stream.sum()).to(dtype)
        # the head is linear, so the factor may stand in front of it, where it is d and not v multiplications
        return normed, normed if factor == 1 else (normed * factor).to(weight.dtype)


class CausalLM(nn.Module):
    """A decoder-only language model assembled from a config.

    Args:
        cfg: A config as ``zoo.config`` returns it, or anything ``zoo.build`` accepts.
        device: As for ``torch.nn.Linear``; ``"meta"`` allocates nothing.
        dtype: Of the weights; parameters that must stay float32 do.

    Attributes:
        cfg: The resolved config.
        specs: The mixers of each residual block, as the config says.
        source: The folder that the model was loaded from, where its tokenizer's files are; ``None`` if it was built.
        metadata: What that folder says about text and not about the network, by file: the ids of special tokens under
            ``"config.json"``, everything under ``"generation_config.json"``. Saving writes it back.
    """

    generate = generate

    def __init__(self, cfg: Any, device=None, dtype=None):
        super().__init__()
        resolved = resolve(cfg)
        self.cfg, self.specs = resolved.config, resolved.specs
        self.source: Path | None = None
        self.metadata: dict[str, dict[str, Any]] = {}
        # the published family whose files it was read from, which an export tries first
        self.family: str | None = None
        self._hooks = Hooks()
        self.backbone = Backbone(resolved, device=device, dtype=dtype)
        self.lm_head = nn.Linear(self.cfg.d_model, padded_vocab(self.cfg), bias=False, device=device, dtype=dtype)
        self._init_embeddings()
        if self.cfg.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the model's folder, else the one that its config names: ``encode``, ``decode``, ``eos_token_id``."""
        return load_tokenizer(self.cfg.tokenizer, self.source)

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Any = None,
        state: ModelState | None = None,
        *,
        return_state: bool | None = None,
        inputs_embeds: Tensor | None = None,
        num_items: Tensor | int | None = None,
        seq_idx: Any = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """Score tokens, and train on them.

        Args:
            input_ids: ``(b, l)`` int64, ``l >= 1``.
            labels: ``(b, l)`` int64 aligned with ``input_ids`` (the shift is done here), -100 where no loss is wanted. Padding and
                the first token of a packed document are never targets.
            attention_mask: ``(b, l)``, nonzero at real tokens of this call; padding may stand on either side, or in between.
            cu_seqlens: ``(n + 1,)`` offsets of the documents packed into one row, in a tensor, an array or a list; no token sees
                another document.
            state: What an earlier call returned (``out.state``) or :meth:`init_state`: the tokens continue from there. Not modified.
            return_state: Whether ``out.state`` is filled; by default, whenever ``labels`` is absent or ``state`` is given.
            inputs_embeds: ``(b, l, d)`` in place of ``input_ids``, as the first block shall see them (``backbone.embed``).
            num_items: What the summed cross-entropy is divided by, instead of the number of targets in this call: the targets of the
                larger batch that this call is a part of. The auxiliary loss counts by the same share.
            seq_idx: ``(b, l)`` integers (a tensor, an array or lists), the packed document that a token belongs to, in place of
                ``cu_seqlens``: a new one starts where the number changes; negative at padding, which stands at the end of a row.
            logits_to_keep: How many logits of the end of every row to form, 0 for all, or the indices of the positions, ``(m,)`` int64.
            output_hidden_states: Whether ``out.hidden_states`` is filled.

        Raises:
            ValueError: Shapes that disagree, two kinds of row description, or a packed row with a state.
        """
        x = self._embed(input_ids, inputs_embeds)
        seq = _describe_rows(x, attention_mask, cu_seqlens, seq_idx, state)
        if labels is not None and labels.shape != x.shape[:2]:
            raise ValueError(
                f"labels: shape {tuple(labels.shape)} differs from the tokens' {tuple(x.shape[:2])}. Pass unshifted labels."
            )
        if return_state is None:
            return_state = labels is None or state is not None
        if return_state and not torch.compiler.is_compiling():
            self._hooks.look_again()
        # from here on padding holds zeros, whatever the caller has there
        x, rows = (x, None) if seq is None else (seq.align(x), seq.cleared)
        passed: list[Tensor] | None = [] if output_hidden_states else None
        hidden, new_state, aux = self.backbone(x, rows, state, return_state, passed)
        aux_loss = _auxiliary(aux)
        loss = None
        if labels is not None:
            labels = _numbers("labels", labels).long()
            targets = shift_labels(labels if seq is None else seq.align(labels), seq)
            loss = next_token_loss(hidden, self.lm_head, targets, num_items)
            if aux_loss is not None:
                # a part of a larger batch adds its part, so that accumulating gradients does not multiply the auxiliary loss
                loss = loss + aux_loss * share_of_items(targets, num_items)
        if seq is not None:
            hidden, passed = seq.restore(hidden), passed and [seq.restore(h) for h in passed]
        states = None if passed is None else tuple(passed)
        out = CausalLMOutput(
            loss, aux_loss, new_state, aux.get("router", []), hidden, states, self.lm_head, logits_to_keep
        )
        if labels is None:
            out.logits  # noqa: B018  # formed inside the call, where hooks and wrappers expect the head's
        return out

    def step(self, input_ids: Tensor, state: ModelState) -> Tensor:
        """Decode one token per row: ``(b,)`` int64 to logits ``(b, v)``; ``state`` is updated in place.

        Where there are hooks, this is a call of the model with one token per row.

        Raises:
            ValueError: Another shape, or another number of rows than the state has.
            RuntimeError: There are hooks, and a CUDA graph is captured, which would not run them again.
        """
        if input_ids.shape != state.tokens.shape:
            raise ValueError(
                f"input_ids: expected shape (b,), one token for each of the state's {state.tokens.shape[0]} rows, got "
                f"{tuple(input_ids.shape)}."
            )
        if not self._hooks.anywhere(self, self._stepped):
            return self.lm_head(self.backbone.step(self.backbone.embed(_numbers("input_ids", input_ids)), state))
        if input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step: a CUDA graph cannot run the hooks on the model's modules when it is replayed. Remove the hooks, or do not capture."
            )
        # a backward needs what the forward has read, and the state is about to change
        before = state.clone() if torch.is_grad_enabled() else state
        out = self(input_ids.unsqueeze(1), state=before, return_state=True)
        state.copy_(out.state)
        return out.logits.squeeze(1)

    def _stepped(self) -> list[Any]:
        blocks: list[Any] = self.backbone.blocks
        return [*blocks, *(getattr(block, "mixer", None) for block in blocks)]

    def init_state(self, batch: int, max_len: int = 0, device=None, dtype=None) -> ModelState:
        """The state before the first token.

        Args:
            batch: Rows.
            max_len: Tokens a row may reach; attention allocates this many places and grows when they are used up.
            device: The weights' device by default.
            dtype: The weights' dtype by default; recurrent states are float32.
        """
        self._hooks.look_again()
        weight = self._weight()
        device, dtype = device or weight.device, dtype or weight.dtype
        # whatever stands around a block's mixer, or in the block's place, has a mixer inside
        mixers = (next(m for m in block.modules() if isinstance(m, Mixer)) for block in self.backbone.blocks)
        layers = tuple(mixer.init_state(batch, max_len, device, dtype) for mixer in mixers)
        return ModelState(layers, torch.zeros(batch, dtype=torch.long, device=device))

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Recompute every block in the backward instead of keeping its activations (training mode only)."""
        self.backbone.gradient_checkpointing = enabled

    def flops(self, seq_len: int) -> int:
        """Forward FLOPs per token (2 per multiply-add) in a sequence of ``seq_len`` tokens, head included."""
        head = 2 * self.cfg.d_model * padded_vocab(self.cfg)
        return sum(block.flops(seq_len) for block in self.backbone.blocks) + head

    def num_params(self) -> int:
        """Parameters, tied and shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def _weight(self) -> Tensor:
        # of the embedding, or of what comes next in a model whose embedding has none that is a floating-point number (quantised)
        parts = self.backbone.embedding, self
        return next(p for part in parts for p in part.parameters() if p.is_floating_point())

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give exactly one of them.")
        if inputs_embeds is not None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[1] == 0 or inputs_embeds.shape[2] != self.cfg.d_model:
                raise ValueError(
                    f"inputs_embeds: expected shape (b, l, {self.cfg.d_model}) with l >= 1, got {tuple(inputs_embeds.shape)}."
                )
            return inputs_embeds
        assert input_ids is not None
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids: expected shape (b, l) with l >= 1, got {tuple(input_ids.shape)}.")
        return self.backbone.embed(_numbers("input_ids", input_ids, ", or vectors as inputs_embeds"))

    def _init_embeddings(self) -> None:
        if self.backbone.embedding.weight.is_meta:
            return  # nothing to draw, and normal_ on a meta tensor would import the compiler: seconds
        std = self.cfg.initializer_range
        nn.init.normal_(self.backbone.embedding.weight, std=std)
        if not self.cfg.tie_embeddings:
            nn.init.normal_(self.lm_head.weight, std=std)


def _auxiliary(aux: dict[str, list]) -> Tensor | None:
    losses = [*aux.get("loss", []), *([balance_loss(aux["balance"])] if aux.get("balance") else [])]
    return torch.stack(losses).sum() if losses else None


def padded_vocab(cfg: DictConfig) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up to ``pad_vocab_size_multiple``."""
    multiple = cfg.pad_vocab_size_multiple
    return -(-cfg.vocab_size // multiple) * multiple


def _keep(x: Tensor, kept: int | Tensor) -> Tensor:
    """Positions of ``(b, l, d)``: the last ``kept``, all if 0, or those of the indices."""
    if isinstance(kept, int):
        return x[:, -kept:] if kept else x
    return x[:, kept]


def _numbers(name: str, ids: Tensor, instead: str = "") -> Tensor:
    """Token ids of any integer type in one that an embedding takes."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {ids.dtype}. Pass token ids{instead}.")
    return ids if ids.dtype in (torch.int32, torch.int64) else ids.long()


def _describe_rows(
    x: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Any,
    seq_idx: Any,
    state: ModelState | None,
) -> Seq | None:
    b, l = x.shape[:2]
    if state is not None and state.tokens.shape[0] != b:
        raise ValueError(
            f"state: holds {state.tokens.shape[0]} rows, the tokens have {b}. Use state.reorder to select rows."
        )
    packing = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
    given = [name for name, value in packing.items() if value is not None]
    if given:
        name = ", ".join(given)
        if len(given) > 1:
            raise ValueError(f"{name}: say the same in two ways. Give one of them.")
        if attention_mask is not None:
            raise ValueError(f"attention_mask, {name}: give one of them; a packed row has no padding.")
        if state is not None:
            raise ValueError(f"state, {name}: a packed row starts every document afresh and cannot continue a state.")
    if cu_seqlens is not None:
        return Seq.from_cu_seqlens(cu_seqlens, b, l, x.device)
    if seq_idx is not None:
        return Seq.from_documents(number_documents(seq_idx, (b, l)), x.device)
    if attention_mask is None:
        return None
    if attention_mask.shape != (b, l):
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)} differs from the tokens' {(b, l)}. Mask this call's tokens only."
        )
    return Seq.from_mask(attention_mask.to(x.device))


def number_documents(seq_idx: Any, shape: tuple[int, int]) -> Tensor:
    """Documents counted from 0 along the rows of ``seq_idx``, where a number may come twice; -1 at padding.

    Raises:
        ValueError: No numbers, another shape, or padding that does not stand at the end of a row.
    """
    if not isinstance(seq_idx, Tensor):
        try:
            seq_idx = torch.as_tensor(seq_idx)
        except (TypeError, ValueError, RuntimeError) as e:
            raise ValueError(
                f"seq_idx: {type(seq_idx).__name__} is not (b, l) integers ({e}). Pass one number per token."
            ) from e
    if seq_idx.shape != shape:
        raise ValueError(f"seq_idx: shape {tuple(seq_idx.shape)} differs from the tokens' {shape}.")
    padding = seq_idx < 0
    if not torch.compiler.is_compiling() and bool((padding[:, :-1] & ~padding[:, 1:]).any()):
        raise ValueError("seq_idx: has padding (negative numbers) before a token. Padding stands at the end of a row.")
    starts = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).long(), (1, 0))
    return starts.cumsum(1).masked_fill(padding, -1)
