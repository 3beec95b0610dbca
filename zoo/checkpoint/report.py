"""Reports of a load or a conversion: what was matched, and what was not."""

import dataclasses
from collections.abc import Iterable

__all__ = ["LoadReport", "Report"]


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """The outcome of ``zoo.load``, of which nothing is missing or unexpected unless it is said here.

    Attributes:
        source: The folder or file.
        family: The format: ``hybridzoo``, or the family's name.
        part: The key that a file has the weights under, ``"model_ema"`` say; ``None`` where it is nothing else.
        parts: All such keys of the file.
        config: The config of a file that holds none: the name of a shipped one, what ``config`` was, or ``"found"`` in the tensors.
        matched: Stored tensors that the model was filled from.
        missing: Parameters that were not filled but drawn: those of a head for other classes.
        unexpected: Stored tensors that the model has no place for: the head in whose place another stands, copies of a tied one, norms of
            a detector, other parts beside a backbone.
    """

    source: str
    family: str
    part: str | None = None
    parts: tuple[str, ...] = ()
    config: str | None = None
    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def without(self, stored: Iterable[str], drawn: Iterable[str]) -> "LoadReport":
        """The same, where ``stored`` tensors were left out in the end, and the parameters ``drawn`` stand in their place."""
        out = tuple(stored)
        matched = tuple(name for name in self.matched if name not in out)
        return dataclasses.replace(self, matched=matched, missing=tuple(drawn), unexpected=(*out, *self.unexpected))

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.family}): {len(self.matched)} tensors matched"]
        if self.part is not None:
            others = [name for name in self.parts if name != self.part]
            beside = f"; beside it: {', '.join(others)}" if others else ""
            lines.append(f"weights of {self.part}{beside}")
        if self.config is not None:
            lines.append(f"config: {self.config}")
        if self.missing:
            lines.append(f"missing, drawn anew: {_some(self.missing)}")
        if self.unexpected:
            lines.append(f"unexpected, left out: {_some(self.unexpected)}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of ``convert``.

    Attributes:
        source: Format that was read: ``hybridzoo``, a ``model_type``, or a family of files.
        target: Format that was written, likewise.
        tensors: Parameters of the model, shared ones once.
        parameters: Numbers in them.
        pattern: The model's layers.
        files: What the new folder holds.
        left_out: Stored tensors that are not taken: copies of a tied head, tables, layers that nobody loads.
        part: The key that a training's file has the weights under; ``None`` where it is nothing else.
    """

    source: str
    target: str
    tensors: int
    parameters: int
    pattern: str
    files: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    part: str | None = None

    def __str__(self) -> str:
        left_out = (
            f"\nleft out {len(self.left_out)} that the model does not need: {_some(self.left_out)}"
            if self.left_out
            else ""
        )
        of = "" if self.part is None else f" of {self.part}"
        return (
            f"{self.source} -> {self.target}: all {self.tensors} tensors{of} matched, {self.parameters:,} parameters, "
            f"layers {self.pattern}{left_out}\nwrote {', '.join(self.files)}"
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
