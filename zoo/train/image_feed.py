"""Images as a training has them: pixels, each image of a class."""

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config.files import overridden
from ..config.resolve import resolve
from ..hf_images import HybridZooForImageClassification
from ..images.augment import Augment
from ..images.builtin import BUILT_IN
from ..images.examples import ImageExamples, images_from
from ..images.facts import Facts, facts_of
from ..images.mixing import Mixing
from ..images.pixels import PHOTO
from ..models.loss import IGNORE
from ..terminal import counted
from .batches import Batch, evaluation_batches
from .confusion import write_confusion
from .feed import Feed
from .flops import flops_per_token
from .options import TrainOptions

__all__ = ["ImageFeed"]

# from so many classes on, an answer among the first five says something
_TOP = 5, 11


class ImageFeed(Feed):
    """Images with labels for a classifier; see :class:`Feed`."""

    kind, unit, row, reads = "images", "images", "image", "pixel_values"
    defaults: ClassVar[dict[str, Any]] = {"batch_size": 64, "lr": 3e-3}

    def __init__(self, core: Any, options: Any):
        super().__init__(core, options)
        self.mixing: Mixing | None = None
        self.confusion: list[list[int]] = []
        self.held_out = False
        self.several = int(os.environ.get("WORLD_SIZE", "1")) > 1

    def adapter(self, core: Any = None) -> HybridZooForImageClassification:
        """As :meth:`Feed.adapter`."""
        return HybridZooForImageClassification.wrap(core or self.core)

    def fit(self, fresh: bool, overrides: Any) -> list[str]:
        """Give the model a head for the classes of the data, where it has none.

        ``n_classes`` and ``labels`` of a fresh model are those of the data, whatever its config says, unless they are overridden: then they
        have to agree. A model with weights keeps its head where that knows all classes by name, or, without names, has as many. Size and
        channels are always the model's, and images are brought to them; only for those in memory, a fresh model has to have their channels
        and, where either is small, their size, or be overridden.
        """
        call = self.options
        for data in (call.data, call.val):
            if isinstance(data, str | os.PathLike) and os.path.realpath(data) == os.path.realpath(call.out):
                raise ValueError(
                    f"out: {call.out} holds the data, and folders of the run would be taken for classes. Name another folder."
                )
        facts, said = facts_of(_named(call.data), self._column()), overridden(overrides)
        self.held_out = facts.held_out
        if fresh or call.base is not None:
            self._check_shape(facts, said)
        if fresh and call.freeze:
            raise ValueError(
                f"train(freeze={call.freeze}): would leave the random weights of a fresh model as they are. Name a model with weights, "
                "or leave it out."
            )
        about = self._fit_head(facts, fresh, said)
        if self.core.cfg.n_classes < 2:
            raise ValueError(
                f"data: have one class only, {facts.classes[0]!r}. To tell images apart takes two or more."
            )
        if call.freeze:
            self.core.freeze(call.freeze)
            about.append(f"the stem and {counted(call.freeze, 'stage')} stay as they are")
        options = {"mixup": call.mixup, "cutmix": call.cutmix, "smoothing": call.label_smoothing}
        if any(options.values()):
            self.mixing = Mixing(n_classes=self.core.cfg.n_classes, **options)
        return about

    def _check_shape(self, facts: Facts, said: set[str]) -> None:
        if facts.shape is None:
            return
        (h, w, c), cfg = facts.shape, self.core.cfg
        size = cfg.image_size
        wrong = [f"image_size={max(h, w)}"] if (h, w) != (size, size) and min(h, w, size) < PHOTO else []
        wrong = [] if "image_size" in said else wrong
        if c != cfg.in_channels and "in_channels" not in said:
            wrong.append(f"in_channels={c}")
        if wrong:
            asked = f"image_size={size} in_channels={cfg.in_channels}"
            instead = f"{' '.join(wrong)}; or " if set(wrong) - set(asked.split()) else ""
            raise ValueError(
                f"data: are images of {h} x {w} pixels in {counted(c, 'channel')}, and the config is for {size} x {size} in "
                f"{cfg.in_channels}. Say {instead}{asked}, to have them brought to that."
            )

    def _fit_head(self, facts: Facts, fresh: bool, said: set[str]) -> list[str]:
        cfg, n = self.core.cfg, len(facts.classes)
        names = None if facts.numbered else facts.classes
        if fresh and {"n_classes", "labels"} & said:
            fits = True
            if cfg.labels is None and (n > cfg.n_classes or (names is not None and n < cfg.n_classes)):
                raise ValueError(
                    f"data: have {n} classes, and n_classes={cfg.n_classes} was asked for. Leave it out: it follows from the data."
                )
        elif fresh:
            fits = n == cfg.n_classes and (cfg.labels is None or list(cfg.labels) == names)
        elif cfg.labels is not None:
            fits = n <= cfg.n_classes if names is None else set(names) <= set(cfg.labels)
        else:
            fits = n == cfg.n_classes or (names is None and n < cfg.n_classes)
        if not fits:
            before = cfg.n_classes
            self.core.reset_head(n, names)
            had = f"in place of that for {before:,}" if before else "where there was none"
            return [] if fresh else [f"a new head for {n:,} classes {had}"]
        if names is not None and cfg.labels is None:
            self.core.cfg = resolve(cfg, {"labels": names}).config
        return []

    def examples(self, devices: int) -> tuple[ImageExamples, ImageExamples | None]:
        """As :meth:`Feed.examples`; what is held out of the data is evaluated on where nothing else is named."""
        call = self.options
        data = _named(call.data)
        rows = self._examples(data, "train", self._augment())
        val = data if call.val is None and self.held_out else _named(call.val)
        call.check_evaluated(val)
        if val is None:
            return rows, None
        try:
            return rows, self._examples(val, "val", None, rows.classes)
        except ValueError as e:
            raise ValueError(f"val: {str(e).removeprefix('data: ')}") from e

    def _examples(
        self, data: Any, split: str, augment: Augment | None, classes: list[str] | None = None
    ) -> ImageExamples:
        call, cfg = self.options, self.core.cfg
        classes = None if cfg.labels is not None else classes
        how: dict[str, Any] = {"column": self._column(), "damaged": call.damaged, "seed": call.seed}
        return images_from(data, cfg, split, augment=augment, classes=classes, **how)

    def _column(self) -> str | None:
        # the default is that of texts
        return None if self.options.column == TrainOptions.column else self.options.column

    def _augment(self) -> Augment | None:
        call = self.options
        flip = 0.0 if call.flip is None and call.augment == "none" else call.flip
        if call.augment == "none" and not (flip or call.rand_augment or call.random_erasing):
            return None
        return Augment(crop=call.augment, flip=flip, rand_augment=call.rand_augment, erasing=call.random_erasing)

    def size(self, examples: ImageExamples) -> int:
        """As :meth:`Feed.size`: an example is an image."""
        return 1

    def flops(self, examples: ImageExamples, frozen: bool) -> float:
        """As :meth:`Feed.flops`."""
        return flops_per_token(self.core, self.core.cfg.image_size, frozen)

    def prepared(self, batch: Batch, *key: int) -> Batch:
        """As :meth:`Feed.prepared`: mixed, with soft labels, where that is asked for."""
        if self.mixing is None:
            return batch
        images, labels = self.mixing(
            batch["pixel_values"], batch["labels"], self.options.seed, *key, padded=self.several
        )
        return {**batch, "pixel_values": images, "labels": labels}

    def items(self, batch: Batch, items: Any) -> Any:
        """As :meth:`Feed.items`: the Trainer that the adapter is for counts every entry of soft labels."""
        soft = batch["labels"].dim() == 2 and items is not None
        return items * batch["labels"].shape[1] if soft else items

    def evaluated(self, trainer: Any) -> dict[str, float]:
        """As :meth:`Feed.evaluated`: the loss per image, and the shares of right answers."""
        model, examples = trainer.model, trainer.eval_dataset
        n, top = self.core.cfg.n_classes, _TOP[0] if self.core.cfg.n_classes >= _TOP[1] else 1
        # nats, images, right, right among the first
        sums = torch.zeros(4, dtype=torch.float64, device=trainer.args.device)
        # class and guess of every image as one number: of many classes, most pairs never occur
        pairs: list[Tensor] = []
        with evaluation_batches(trainer) as batches:
            for batch in batches:
                labels = batch["labels"]
                out = model(**self.inputs(batch, examples), num_items_in_batch=1)
                aux_loss, _ = model.reported
                real = labels != IGNORE
                nats = out.loss if aux_loss is None else out.loss - aux_loss * len(labels)
                first = out.logits.topk(top).indices
                guess = out.logits.argmax(1)
                right = (guess == labels).sum(), (first == labels[:, None]).sum()
                sums += torch.stack([x.double() for x in (nats, real.sum(), *right)])
                pairs.append(torch.where(real, labels * n + guess, -1))
        nats, count, right, among = trainer.accelerator.reduce(sums, "sum").tolist()
        found, counts = trainer.accelerator.gather(torch.cat(pairs)).unique(return_counts=True)
        every = zip(found.tolist(), counts.tolist(), strict=True)
        self.confusion = [[pair // n, pair % n, times] for pair, times in every if pair >= 0]
        metrics = {"eval_loss": nats / count, "eval_accuracy": right / count}
        return metrics | ({"eval_accuracy_top5": among / count} if top > 1 else {})

    def keep(self, folder: Path, step: int) -> None:
        """As :meth:`Feed.keep`: which classes are taken for which."""
        labels = self.core.cfg.labels or range(self.core.cfg.n_classes)
        write_confusion(folder, step, [str(label) for label in labels], self.confusion)

    def judged(self, examples: ImageExamples) -> str:
        """As :meth:`Feed.judged`."""
        return f"{examples.about[0]}; the best has the highest accuracy"

    def methods(self, training: ImageExamples) -> dict[str, str]:
        """As :meth:`Feed.methods`."""
        call, cfg = self.options, self.core.cfg
        size = f"{cfg.image_size} x {cfg.image_size} pixels in {counted(cfg.in_channels, 'channel')}"
        changes: list[str] = []
        augmented = training.rows.augmented
        if augmented is not None:
            how = augmented.augment
            crop = {"resized": "random parts", "shift": "shifted by up to an eighth", "none": ""}[how.crop]
            parts = (
                crop, f"{how.flip:.0%} mirrored" if how.flip else "", how.rand_augment or "",
                f"{how.erasing:.0%} erased in part" if how.erasing else "",
            )  # fmt: skip
            changes += filter(None, parts)
        changes += [
            f"{name} {value:g}"
            for name, value in (("mixup", call.mixup), ("cutmix", call.cutmix), ("smoothing", call.label_smoothing))
            if value
        ]
        return {"images": f"brought to {size}; {', '.join(changes) or 'as they are'}"}

    def in_memory(self, examples: ImageExamples) -> tuple[str, str]:
        """As :meth:`Feed.in_memory`."""
        cfg = self.core.cfg
        size = f"{cfg.image_size} x {cfg.image_size}"
        return f"images of {cfg.in_channels} x {size}", f"images smaller than {size} (image_size)"

    def done(self) -> None:
        """As :meth:`Feed.done`: nothing is frozen any more."""
        if self.options.freeze:
            self.core.freeze(0)


def _named(data: Any) -> Any:
    """Return data, of a path that is not there as the name of a built-in set, if it is one."""
    known = isinstance(data, Path) and str(data) in BUILT_IN and not data.exists()
    return str(data) if known else data
