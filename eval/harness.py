"""lm-eval's view of a zoo model: HFLM over the transformers adapter, registered as ``--model hybridzoo``.

Batching, rolling windows, stop strings and chat templates are HFLM's, so scores are the ones that ``--model hf``
gives. What differs, and why:

- a model is named by a folder or a config, or given as an object, and its tokenizer follows from it; no hub is asked;
- log-probabilities are formed in float32, also for models in half precision;
- an end-of-text token that a tokenizer appends to a prompt is taken off: the continuation would not follow the prompt;
- an empty prompt to generate from becomes the prefix token, and each prompt of a batch is encoded as it would be alone;
- ranks share the requests on a CPU as on GPUs, over ``torch.distributed`` (gloo);
- answers cached with ``--use_cache`` are kept apart by model and settings.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import lm_eval.models  # noqa: F401  # fills the registry of models; an empty one would never be filled once we are in it
import torch
import torch.distributed as dist
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..zoo.hf import HybridZooForCausalLM
from ..zoo.models.causal_lm import CausalLM
from ..zoo.models.decoder import not_finite, refuse
from ..zoo.models.finite import check_finite
from ..zoo.tokenizer import appends_end
from .pretrained import explained, fingerprint, open_model, open_tokenizer, quiet, reachable, usable_device, window

__all__ = ["HybridZooLM"]

Report = Callable[[str, int, int], None]

# float32 log-probabilities of one batch stay below a gigabyte on a CPU
_CPU_LOGITS = 2**28
_CPU_BATCH = 16

# arguments of HFLM that it honours, or may leave aside, whichever way the model came
_ANY_MODEL = frozenset({
    "backend", "truncation", "logits_cache", "mixed_precision_dtype", "trust_remote_code", "use_fast_tokenizer",
    "prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args",
})  # fmt: skip


@register_model("hybridzoo")
class HybridZooLM(HFLM):
    """A zoo model, or any causal model of transformers, under lm-eval.

    Args:
        pretrained: What ``zoo.load`` reads, a :class:`CausalLM` or transformers model, or the name or file of a config,
            which is built untrained, with a warning. Anything else is left to transformers' Auto classes, and so are
            models for which HFLM's arguments for loading (``peft``, ``revision``, ...) are given.
        tokenizer: A folder or hub id, ``"byte"``, or an object; by default what belongs to the model.
        dtype: Of the weights, such as ``"bfloat16"``; ``"auto"`` takes them as they are stored.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; a GPU by default, if there is one. An object stays where it is by default.
        batch_size: Requests per forward; ``"auto"`` finds what fits on a GPU (``"auto:N"``: N times, as requests get
            shorter) and takes a small fixed number on a CPU.
        max_batch_size: Where the search of ``"auto"`` starts.
        max_length: Tokens of the window, prompt included; by default what the config states.
        softmax_dtype: In which log-probabilities are formed.
        add_bos_token: Start every prompt with the tokenizer's BOS token. Right for models whose training documents
            started with it.
        seed: Of the weights of an untrained model.
        **kwargs: As HFLM's.

    Attributes:
        report: Called with the kind of requests, how many are done, and how many there are, in place of a progress bar.
        truncated: Requests so far that were longer than the window and lost their beginning.
    """

    cache_hook: CacheHook
    batch_size_per_gpu: int | str

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | CausalLM | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        dtype: str | torch.dtype | None = "auto",
        device: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int = 64,
        max_length: int | None = None,
        softmax_dtype: str | torch.dtype | None = "float32",
        add_bos_token: bool | None = None,
        seed: int = 0,
        **kwargs: Any,
    ):
        self.report: Report | None = None
        self.truncated = 0
        self._tick: Callable[[int], None] = lambda n: None
        self._rolling = False
        self._group: dist.ProcessGroup | None = None
        named = isinstance(pretrained, str | os.PathLike)
        device = usable_device(device, named)
        unusual = sorted(set(kwargs) - _ANY_MODEL)
        if unusual and not named:
            raise ValueError(
                f"{', '.join(unusual)}: cannot be applied to a model that exists. Pass its folder or name."
            )
        # adapters, quantisation and the like are transformers' to load
        model, folder = (None, None) if unusual else open_model(pretrained, dtype, device, seed)
        with quiet(HFLM.__module__), explained(pretrained):
            super().__init__(
                pretrained=reachable(str(pretrained), kwargs.get("revision")) if model is None else model,
                tokenizer=open_tokenizer(tokenizer, model, folder, add_bos_token),
                backend=kwargs.pop("backend", "causal"),
                dtype=dtype,
                device=device or "cpu",
                max_batch_size=max_batch_size,
                max_length=max_length,
                softmax_dtype=softmax_dtype,
                add_bos_token=add_bos_token,
                **kwargs,
            )
        check_finite(self.model, str(pretrained) if named else "the model")
        self._max_length = max_length or window(folder, self.tokenizer)
        self.pretrained = str(pretrained) if named else type(pretrained).__name__
        self._appends_eos = appends_end(self.tokenizer)
        self._set_batch_size(batch_size)
        if not (kwargs.get("tp_plan") or kwargs.get("parallelize")):
            self._join_ranks()

    # what a prompt is

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say; HFLM's 256, or half of a window that is too short for that."""
        return min(256, max(1, self.max_length // 2))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """As HFLM, without an end-of-text token that the tokenizer appends."""
        if self._rolling and self.add_bos_token:
            # each window brings its prefix token; a second one would be scored as text
            add_special_tokens = False
        ids = super().tok_encode(string, add_special_tokens, **kwargs)
        if self._appends_eos and ids[-1:] == [self.tokenizer.eos_token_id]:
            written = self.tokenizer.encode(string, add_special_tokens=False)
            # the text may end with that token itself
            if len(ids) > len(written) and (not written or ids[-len(written) :] != written):
                ids = ids[:-1]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and mask, ``(b, l)`` each, of prompts to generate from; each is encoded as it would be alone."""
        limit = self.tokenizer.model_max_length if truncation else None
        rows = [self.tok_encode(s)[:limit] or [self.prefix_token_id] for s in strings]
        if left_truncate_len:
            self.truncated += sum(len(row) > left_truncate_len for row in rows)
            rows = [row[-left_truncate_len:] for row in rows]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    # requests, with one progress bar for each kind

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM."""
        with self._progress("loglikelihood", len(requests), disable_tqdm, by_request=True):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """As HFLM; the bar counts windows."""
        self._rolling = True
        try:
            windows = sum(-(-len(self.tok_encode(r.args[0])) // self.max_length) for r in requests)
            with self._progress("loglikelihood_rolling", windows, disable_tqdm, by_request=False):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self._rolling = False

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """As HFLM."""
        with self._progress("generate_until", len(requests), disable_tqdm, by_request=True):
            return super().generate_until(requests, disable_tqdm=True)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if not isinstance(self.model, HybridZooForCausalLM):
            logits = super()._model_call(inps, attn_mask, labels)
        else:
            precision = self.mixed_precision_dtype
            with torch.no_grad(), torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
                logits = self.model(inps, use_cache=False).logits  # nothing follows on what is scored
        refuse(not_finite(logits))
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        if isinstance(self.model, HybridZooForCausalLM):
            # a config does not know which token the tokenizer ends a text with
            kwargs.setdefault("eos_token_id", self.tokenizer.eos_token_id)
        return super()._model_generate(context, max_length, stop, **kwargs)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ValueError(
                f"loglikelihood: a continuation of {longest} tokens exceeds the window of {self.max_length}. "
                "Raise max_length, or leave out the task."
            )
        if not self._rolling:
            self.truncated += sum(len(context) + len(target) > self.max_length + 1 for _, context, target in requests)
        out = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        if self._rolling:
            self._tick(len(requests))
        return out

    @contextlib.contextmanager
    def _progress(self, kind: str, total: int, disable: bool, by_request: bool) -> Iterator[None]:
        bar = tqdm(total=total, desc=kind, disable=disable or self.rank != 0 or self.report is not None)
        done = 0

        def tick(n: int) -> None:
            nonlocal done
            done += n
            bar.update(n)
            if self.report is not None:
                self.report(kind, done, total)

        hook, self._tick = self.cache_hook, tick
        if by_request:
            self.cache_hook = _TickingHook(hook, tick)
        try:
            yield
        finally:
            self.cache_hook, self._tick = hook, lambda n: None
            bar.close()

    # batches and ranks

    def _set_batch_size(self, batch_size: int | str) -> None:
        name, _, schedule = str(batch_size).partition(":")
        if name != "auto":
            self.batch_size_per_gpu = int(batch_size)
        elif self.device.type == "cpu":
            # a CPU never runs out of memory in HFLM's search, it only gets slower
            fits = _CPU_LOGITS // (self.max_length * self.config.get_text_config().vocab_size)
            self.batch_size_per_gpu = max(1, min(_CPU_BATCH, self.max_batch_size, fits))
            self.batch_sizes = {0: self.batch_size_per_gpu}
        else:
            self.batch_size_per_gpu, self.batch_schedule = name, float(schedule or 1)

    def _batch_scheduler(self, pos: int, n_reordered_requests: list) -> int:
        # HFLM divides by zero when there are fewer requests than searches
        self.batch_schedule = min(self.batch_schedule, len(n_reordered_requests))
        return super()._batch_scheduler(pos, n_reordered_requests)

    def _join_ranks(self) -> None:
        if not dist.is_available():
            return
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo")
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
            # a few numbers and Python objects are exchanged: gloo does that on any device
            self._group = dist.new_group(backend="gloo")

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, one after another."""
        if self.world_size == 1:
            return tensor
        mine = tensor.detach().cpu().reshape(-1)
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine, group=self._group)
        return torch.cat(parts).to(tensor.device)

    def gather_object(self, obj: Any, dst: int = 0) -> list | None:
        """The objects of all ranks, on rank ``dst``; ``None`` on the others."""
        if self.world_size == 1:
            return [obj]
        out: list | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, out, dst=dst, group=self._group)
        return out

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self._group)

    # who answered

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that an answer depends on: weights, config, tokenizer and settings."""
        names = (
            "max_length softmax_dtype mixed_precision_dtype add_bos_token prefix_token_id truncation think_end_token"
        )
        return fingerprint(self.model, self.tokenizer, {name: getattr(self, name) for name in names.split()})

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Keep cached answers in a table of this model's own: lm-eval's keys say nothing of the model."""
        super().set_cache_hook(cache_hook)
        db = cache_hook.dbdict
        if db is not None:
            table = self.fingerprint
            type(db)(db.filename, tablename=table).close()  # creates it
            db.tablename = table

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model that lm-eval records; no hub is asked."""
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": dtype,
            "model_revision": self.revision,
            "model_sha": self.fingerprint,
        }


class _TickingHook(CacheHook):
    """lm-eval calls the hook for every finished request."""

    def __init__(self, hook: CacheHook, tick: Callable[[int], None]):
        self.dbdict, self._tick = hook.dbdict, tick

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        super().add_partial(attr, req, res)
        self._tick(1)
