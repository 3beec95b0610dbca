"""Scores of a causal model on rows with labels, whatever their length: one number per row and kind, summed up afterwards."""

from typing import Any

import numpy as np
import torch

from ....zoo.train.labelled import scores_of

__all__ = ["row_scores", "summed"]


@torch.no_grad()
def row_scores(model: Any, inputs: np.ndarray, labels: np.ndarray, at_once: dict[str, int]) -> np.ndarray:
    """Score rows one by one.

    Args:
        model: A causal language model; it is put into evaluation mode, and runs where it is, under the caller's autocast.
        inputs: ``(n, l)`` ids.
        labels: ``(n, l)``, the label at the token whose logits are to say it, -100 where nothing is asked.
        at_once: Tokens that it reads at once, by the kind of device; longer rows are read in pieces, each from the state of the one before.

    Returns:
        ``(n, 3)`` float64: the sum of the cross-entropies in nats, right answers, and questions.
    """
    model.eval()
    device = model.some_weight().device
    most, (n, length) = at_once.get(device.type, 1 << 17), inputs.shape
    size, piece = max(1, most // length), min(length, most)
    found = []
    for i in range(0, n, size):
        ids, wanted = (torch.from_numpy(x[i : i + size].astype(np.int64)).to(device) for x in (inputs, labels))
        sums, state = torch.zeros(len(ids), 3, dtype=torch.float64, device=device), None
        for at in range(0, length, piece):
            targets = wanted[:, at : at + piece]
            last = at + piece >= length
            out = model(ids[:, at : at + piece], state=state, return_state=not last, logits_to_keep=1)
            state = out.state
            nats, right = scores_of(out.hidden, model.lm_head, targets)
            sums += torch.stack([nats.sum(1), right.sum(1), (targets != -100).sum(1)], 1).double()
        found.append(sums.cpu().numpy())
    return np.concatenate(found)


def summed(rows: list[np.ndarray]) -> dict[str, Any]:
    """Sum up tables of :func:`row_scores` in means: over rows of their shares of right answers, and over questions of their nats."""
    nats, right, asked = np.concatenate(rows).T
    return {
        "accuracy": float((right / asked).mean()), "exact": float((right == asked).mean()),
        "loss": float(nats.sum() / asked.sum()), "n": len(asked),
    }  # fmt: skip
