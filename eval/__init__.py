"""Evaluation: the lm-eval adapter and its offline tasks, benchmarks, studies of architectures, and the demo."""

from ..zoo.lazily import lazily

__getattr__, __dir__ = lazily(__name__, ablate="ablate")
