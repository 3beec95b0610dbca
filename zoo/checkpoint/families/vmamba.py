"""VMamba's files (arXiv:2401.10166), of all three generations of names, which hold no config.

Era A, January 2024: ``ln_1``, ``self_attention``, ``patch_embed.proj``, ``head``. Era B, the classification folder's code, by whose names
the second version is published: ``norm``, ``op``, ``patch_embed.0``, ``classifier.head``. Era C, the one-file version: as B, with the
projections of all directions joined as linear layers, and patch merging under numbers. Linear layers are ``(out, in)``, or ``(out, in, 1,
1)`` where a model kept channels first. A detector's backbone has one norm more per stage and no classifier. What is written is era B's.
"""

from collections.abc import Iterator
from typing import Any

from ...config.stages import stages_of
from ..family import FileFamily, Shapes
from ..keys import Piece, View, same

__all__ = ["VMamba"]

# ours and theirs: the parts of a stem and of what stands between stages, for each kind of it
_STEMS = {"patch": {"proj": "0", "norm": "2"}, "conv": {"conv1": "0", "norm1": "2", "conv2": "5", "norm2": "7"}}
_CONVOLVED = {"proj": "1", "norm": "3"}
_EVERY = slice(None)
# of the directions, in the order in which parameters have them
_K = 4


class VMamba(FileFamily):
    """The converter of VMamba's files."""

    model_type = "vmamba"
    mark = r"layers\.0\.blocks\.0\.(?:self_attention|op)\.A_logs"
    # norms of a detector, which reads maps before they are made smaller; ours gives them as they are
    ignored = r"outnorm\d\.(weight|bias)"
    configs = ("vmamba-*", "vanilla-vmamba-*")

    def find(self, shapes: Shapes) -> dict[str, Any]:
        """As :meth:`FileFamily.find`."""
        old = _is_old(shapes)
        stem, in_channels = self._stem(shapes, old)
        n = shapes.count("layers")
        found = [self._block(shapes, f"layers.{i}.blocks.0", old) for i in range(n)]
        # one table of mixers for all stages where they differ in nothing but their width
        alike = all(kinds == found[0][0] for kinds, _ in found)
        mixers: dict[str, Any] = {}
        stages: list[dict[str, Any]] = []
        for i, (kinds, width) in enumerate(found):
            names = {kind: kind if alike else f"{kind}{i + 1}" for kind in kinds}
            mixers |= {names[kind]: spec for kind, spec in kinds.items()}
            stages.append({"layers": f"({' '.join(names.values())}) * {shapes.count(f'layers.{i}.blocks')}"})
            if i and width != 2 * found[i - 1][1]:
                stages[-1]["d_model"] = width
        return {
            "task": "image_classification", "d_model": found[0][1], "stages": stages, "mixers": mixers, "stem": stem,
            "downsample": self._downsample(shapes, n), "norm": {"type": "layernorm", "eps": 1e-5},
            "n_classes": self.classes(shapes), "in_channels": in_channels,
        }  # fmt: skip

    def classes(self, shapes: Shapes) -> int:
        """As :meth:`FileFamily.classes`."""
        head = "head.weight" if _is_old(shapes) else "classifier.head.weight"
        return shapes.of(head, 2)[0] if head in shapes else 0

    def _stem(self, shapes: Shapes, old: bool) -> tuple[dict[str, Any], int]:
        first = "patch_embed.proj" if old else "patch_embed.0"
        _, in_channels, size, _ = shapes.of(f"{first}.weight", 4)
        if "patch_embed.5.weight" in shapes:
            # steps of size - 1, twice
            return {"type": "conv", "patch": 2 * (size - 1), "norm": True}, in_channels
        norm = f"patch_embed.{'norm' if old else '2'}.weight" in shapes
        return {"type": "patch", "patch": size, "norm": norm}, in_channels

    def _block(self, shapes: Shapes, block: str, old: bool) -> tuple[dict[str, Any], int]:
        """The mixers of a block and its width."""
        op = f"{block}.{'self_attention' if old else 'op'}"
        # the last two dimensions are 1, where there are any
        wide, d = _matrix(shapes, f"{op}.in_proj.weight")
        _, inner = _matrix(shapes, f"{op}.out_proj.weight")
        _, n = shapes.of(f"{op}.A_logs", 2)
        rank = (
            shapes.of(f"{op}.dt_projs.weight", 2)[1] if _is_joined(shapes) else shapes.of(f"{op}.dt_projs_weight", 3)[2]
        )
        size = shapes.of(f"{op}.conv2d.weight", 4)[2] if f"{op}.conv2d.weight" in shapes else 0
        found: dict[str, Any] = {
            "ss2d": {
                "type": "ss2d", "d_state": n, "d_conv": size, "ssm_ratio": inner / d, "gate": wide == 2 * inner,
                "conv_bias": f"{op}.conv2d.bias" in shapes, "dt_rank": None if rank == -(-d // 16) else rank,
                "out_norm": "layernorm" if f"{op}.out_norm.weight" in shapes else None,
            }
        }  # fmt: skip
        if f"{block}.mlp.fc1.weight" in shapes:
            hidden = _matrix(shapes, f"{block}.mlp.fc1.weight")[0]
            plain = {"gated": False, "activation": "gelu", "bias": True, "init_std": 0.02}
            found["mlp"] = {"type": "mlp", "expand": hidden / d, **plain}
        return found, d

    def _downsample(self, shapes: Shapes, stages: int) -> str:
        if stages == 1 or any(f"layers.0.downsample.{name}.weight" in shapes for name in ("reduction", "2")):
            return "merge"
        return "conv" if shapes.of("layers.0.downsample.1.weight", 4)[2] == 3 else "conv2"

    def keys(self, view: View) -> Iterator[Piece]:
        """Era B's names, or those that the stored tensors have."""
        cfg, old = view.cfg, _is_old(view.stored)
        for ours, theirs in _STEMS[cfg.stem.type].items():
            yield from same(view, f"backbone.embedding.{ours}", f"patch_embed.{ours if old else theirs}")
        n = 0
        stages = stages_of(cfg)
        for i, stage in enumerate(stages):
            block = -1
            for _ in stage.tokens:
                (part,) = view.blocks[n]
                block += part.type != "mlp"
                yield from self._block_keys(view, n, part.type, f"layers.{i}.blocks.{block}")
                n += 1
            if i + 1 < len(stages):
                yield from self._downsample_keys(view, i)
        last = f"outnorm{len(stages) - 1}"
        final = "norm" if old else "classifier.norm"
        yield from same(
            view, "backbone.norm_f", last if f"{last}.weight" in view.stored and not cfg.n_classes else final
        )
        yield from same(view, "head", "head" if old else "classifier.head")

    def _block_keys(self, view: View, n: int, kind: str, theirs: str) -> Iterator[Piece]:
        old, ours = _is_old(view.stored), f"backbone.layers.{n}"
        norms = {"mlp": "norm2", "ss2d": "ln_1" if old else "norm"}
        parts = {"mlp": "mlp", "ss2d": "self_attention" if old else "op"}
        yield from same(view, f"{ours}.norm", f"{theirs}.{norms[kind]}")
        for piece in same(view, f"{ours}.mixer", f"{theirs}.{parts[kind]}"):
            name = piece.theirs.rpartition(".")[2]
            joined = piece.theirs.removesuffix("_weight") + ".weight"
            if name in ("x_proj_weight", "dt_projs_weight") and joined in view.stored:
                rows = view.shapes[piece.ours][1]
                for k in range(_K):
                    yield Piece(piece.ours, joined, (k,), (slice(k * rows, (k + 1) * rows),))
            else:
                yield _stored_as(view, piece)

    def _downsample_keys(self, view: View, stage: int) -> Iterator[Piece]:
        ours, theirs = f"backbone.downsample.{stage}", f"layers.{stage}.downsample"
        names = _CONVOLVED
        if view.cfg.downsample == "merge":
            numbered = f"{theirs}.2.weight" in view.stored
            names = {"norm": "1", "proj": "2"} if numbered else {"norm": "norm", "proj": "reduction"}
        for part, name in names.items():
            for piece in same(view, f"{ours}.{part}", f"{theirs}.{name}"):
                yield _stored_as(view, piece)


def _stored_as(view: View, piece: Piece) -> Piece:
    """A piece whose matrix may be stored as a 1 x 1 convolution."""
    convolved = len(view.shapes[piece.ours]) == 2 and len(view.stored.get(piece.theirs, ())) == 4
    return Piece(piece.ours, piece.theirs, (_EVERY, _EVERY, None, None)) if convolved else piece


def _matrix(shapes: Shapes, name: str) -> tuple[int, ...]:
    return shapes.of(name, 4 if len(shapes.get(name, ())) == 4 else 2)[:2]


def _is_old(names: Any) -> bool:
    return "layers.0.blocks.0.self_attention.in_proj.weight" in names


def _is_joined(names: Any) -> bool:
    return "layers.0.blocks.0.op.dt_projs.weight" in names
