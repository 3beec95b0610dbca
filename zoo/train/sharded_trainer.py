"""Training where every process holds a part of the weights, their gradients and the optimiser's state (FSDP2)."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import AutocastKwargs
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from .loop import ZooTrainer
from .run_folder import SHARDED
from .sharding import read_shards, weights_of

__all__ = ["ShardedTrainer"]

_SCHEDULE = "schedule.pt"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class ShardedTrainer(ZooTrainer):
    """A :class:`ZooTrainer` of all processes of torchrun that together hold one model: a block at a time is gathered, whole, and let go."""

    def __init__(self, model: Any, args: Any, **kwargs: Any):
        device = args.device  # the processes know each other now
        if not dist.is_initialized():
            raise ValueError("train(shard=True): torchrun has started no group of processes. Leave shard out.")
        # of what blocks return, nobody changes anything in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        model.to(device)
        for block in dict.fromkeys(model.core.backbone.layers):
            fully_shard(block, mesh=mesh)
        super().__init__(fully_shard(model, mesh=mesh), args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers; norms are numbers that every process knows, and half-precision copies of weights go with them."""
        super().create_accelerator_and_postprocess()
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = lambda *args, **kwargs: _whole(clip(*args, **kwargs))

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if training and not getattr(model, "_is_accelerate_prepared", False):
            # autocast, and no averaging of gradients, which they are already
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
            model._is_accelerate_prepared = True
        return model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Do nothing: weights are saved with the optimiser's state."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # nothing but tensors: reading other things could run code
        dcp.save(weights_of(self.model) | self._known(), checkpoint_id=Path(output_dir) / SHARDED)
        if self.args.should_save:
            groups = [{k: v for k, v in g.items() if k != "params"} for g in self._plain_optimizer.param_groups]
            torch.save({"groups": groups, "scheduler": self.lr_scheduler.state_dict()}, Path(output_dir) / _SCHEDULE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, optimizer = Path(checkpoint), self._plain_optimizer
        tensors, prefix = self._known(), "optimizer."
        read_shards(tensors, folder, prefix)
        state: Any = get_optimizer_state_dict(self.model, optimizer, options=_FLAT)
        state |= {name.removeprefix(prefix): t for name, t in tensors.items()}
        set_optimizer_state_dict(self.model, optimizer, state, options=_FLAT)
        kept = torch.load(folder / _SCHEDULE, weights_only=True)
        for group, before in zip(optimizer.param_groups, kept["groups"], strict=True):
            group.update(before)
        self.lr_scheduler.load_state_dict(kept["scheduler"])

    def _known(self) -> dict[str, Any]:
        """The tensors that the optimiser keeps of every weight."""
        state = get_optimizer_state_dict(self.model, self._plain_optimizer, options=_FLAT)
        return {f"optimizer.{name}": t for name, t in state.items() if isinstance(t, Tensor)}

    def _locate(self, *args: Any) -> str:
        return "not looked for where weights are sharded"


def _whole(norm: Any) -> Any:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
