"""From logits to an answer: the one place that knows by which rule a run decides."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, softmax

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

    def answers(self, logits: np.ndarray) -> list[tuple[str, ...]]:
        """Their names, one an image."""
        return [(self.class_names[c],) for c in self.classes(logits)]

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


@dataclass(frozen=True)
class Findings:
    """Every finding whose logit reaches the threshold that validation images chose for it."""

    class_names: tuple[str, ...]  # in label order
    thresholds: tuple[float, ...]  # on the logits (L,)

    def classes(self, logits: np.ndarray) -> np.ndarray:
        """The finding int64 (N,) that is furthest above its threshold, of logits (N, L)."""
        return (logits - self.thresholds).argmax(1)

    def answers(self, logits: np.ndarray) -> list[tuple[str, ...]]:
        """The names of all that there are, none to L an image."""
        names = np.array(self.class_names)
        return [tuple(names[row].tolist()) for row in logits >= np.array(self.thresholds)]

    def columns(self) -> list[str]:
        """What the probabilities are called."""
        return [f"sigmoid {name}" for name in self.class_names]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Sigmoid float64 (N, L) of the network's own logits."""
        return expit(np.asarray(logits, np.float64))

    def sentence(self) -> str:
        """What the answers are."""
        told = ", ".join(map("{} {:.2f}".format, self.class_names, self.thresholds))
        return (
            f"An image has the findings whose logits reach their thresholds ({told}), tuned on "
            "validation images; probabilities are the sigmoids of the logits."
        )

    def about(self) -> dict[str, Any]:
        """What a program that has only the logits needs to decide alike; JSON."""
        return {
            "decision": "each finding whose logit is at least its threshold",
            "class_names": list(self.class_names),
            "thresholds": list(self.thresholds),
        }


Rule = Decision | Findings


def of(result: dict[str, Any]) -> Rule:
    """The rule that a run tuned on its validation images, of the content of its ``result.json``.

    Raises:
        ValueError: it holds none.
    """
    try:
        if "thresholds" in result:
            names, thresholds = zip(*result["thresholds"].items(), strict=True)
            return Findings(names, thresholds)
        data, tau = result["data"], result["tuned"]["tau"]
        return Decision(tuple(data["class_names"]), tuple(data["class_counts"]), float(tau))
    except KeyError as error:
        raise ValueError(
            f"result.json must hold the τ that was tuned on validation images, but has no {error}; "
            "train again with this version"
        ) from error
