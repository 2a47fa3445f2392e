"""From logits to an answer: the one place that knows by which rule a run decides."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import softmax

from lmf_multi import adjust_logits


@dataclass(frozen=True)
class Decision:
    """The class of the largest logit less τ log π, of the τ that validation images chose."""

    class_names: tuple[str, ...]  # in label order
    class_counts: tuple[int, ...]  # training images of each, whose shares are π
    tau: float

    def classes(self, logits: np.ndarray) -> np.ndarray:
        """The class int64 (N,) to decide for, of logits (N, C)."""
        return adjust_logits(logits, self.class_counts, self.tau).argmax(1)

    def answers(self, logits: np.ndarray) -> list[str]:
        """Their names."""
        return [self.class_names[c] for c in self.classes(logits)]

    def columns(self) -> list[str]:
        """What the probabilities are called."""
        return [f"softmax {name}" for name in self.class_names]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Softmax float64 (N, C) of the network's own logits, in which τ has no part."""
        return softmax(np.asarray(logits, np.float64), axis=1)

    def sentence(self) -> str:
        """What the answers are."""
        return (
            f"The class is that of the largest logit less τ log π, with τ = {self.tau:.2f}, tuned "
            "on validation images; probabilities are the softmax of the logits themselves, so "
            "their largest may be another's."
        )

    def about(self) -> dict[str, Any]:
        """What a program that has only the logits needs to decide alike; JSON."""
        shift = -adjust_logits(np.zeros(len(self.class_counts)), self.class_counts, self.tau)
        return {
            "decision": "the class of the largest logit less subtract_from_logits",
            "class_names": list(self.class_names),
            "class_counts": list(self.class_counts),
            "tau": self.tau,
            "subtract_from_logits": shift.tolist(),
        }


def of(result: dict[str, Any]) -> Decision:
    """The rule that a run tuned on its validation images, of the content of its ``result.json``.

    Raises:
        ValueError: it holds none.
    """
    try:
        data, tau = result["data"], result["tuned"]["tau"]
        return Decision(tuple(data["class_names"]), tuple(data["class_counts"]), float(tau))
    except KeyError as error:
        raise ValueError(
            f"result.json must hold the τ that was tuned on validation images, but has no {error}; "
            "train again with this version"
        ) from error
