"""The adapter of image classifiers to transformers: Trainer, ``AutoModelForImageClassification`` and its pipeline see them through it."""

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import ImageClassifierOutput

from .hf_base import Adapter
from .hf_calls import refuse_others

__all__ = ["HybridZooForImageClassification"]


class HybridZooForImageClassification(Adapter):
    """A zoo classifier of images as transformers knows it; ``core`` is the model itself."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _fsdp_plan = {  # noqa: RUF012
        "backbone.embedding": "free_full_weight",
        "backbone.downsample.*": "free_full_weight",
        "backbone.layers.*": "free_full_weight",
        "backbone.norm_f": "keep_full_weight",
        "head": "keep_full_weight",
    }

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple:
        """As :meth:`ImageClassifier.forward`, in transformers' words; the image processor beside a saved model makes ``pixel_values``.

        Args:
            pixel_values: ``(b, c, h, w)``, floating-point.
            labels: ``(b,)`` int64, or ``(b, n_classes)`` probabilities.
            output_hidden_states: Whether ``hidden_states`` is filled; by default as the config says, and so for ``return_dict``.
            return_dict: Whether the output is an object or a tuple.
            num_items_in_batch: Entries of the labels in the larger batch that this is part of, as the Trainer counts them.
            kwargs: What else transformers may pass; what cannot be honoured is refused.

        Raises:
            ValueError: As :meth:`ImageClassifier.forward`; for what the model cannot give (attentions); for another loss than
                cross-entropy; and for an unknown argument.
        """
        refuse_others(self, kwargs, output_attentions=self.config.output_attentions)
        if pixel_values is None:
            raise ValueError("pixel_values: are missing. Pass (b, c, h, w), as the image processor makes them.")
        if labels is not None and self.config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"problem_type: is {self.config.problem_type!r}, and the loss is the cross-entropy of one class per image. Leave labels "
                "out, and compute another loss from the logits."
            )
        items: Any = num_items_in_batch
        if items is not None and labels is not None and labels.dim() == 2:
            items = items / labels.shape[1]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        out = self.core(pixel_values, labels, num_items=items, output_hidden_states=bool(output_hidden_states))
        output = ImageClassifierOutput(loss=out.loss, logits=out.logits, hidden_states=out.hidden_states)
        return self._answer(out, output, return_dict)
