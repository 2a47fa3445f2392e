"""The fixed grid of hard examples, for the reference and for every backend."""

import numpy as np

GAMMAS = (0.0, 0.25, 0.5, 1.0, 1.5, 5.0)
SCALES = (1.0, 30.0, 64.0)

# With each class as the label in turn, every row is an easy, a hard or a middling example. 88 and
# 104 are where float32's exp(-x) becomes subnormal and 0, 709 and 745 where float64's does.
_ROWS = [
    [0.0, 0.0, 0.0],
    [0.3, -0.2, 0.1],
    [0.5, 0.25, -0.125],
    [2.0, 1.0, -1.0],
    [17.0, 0.0, -3.0],
    [40.0, 0.0, 1.0],
    [70.0, 69.5, 0.0],
    [90.0, 1.0, -2.0],
    [110.0, 5.0, 4.0],
    [720.0, 0.0, -20.0],
    [1e4, 0.0, 9e3],
    [1e4, -1e4, 5.0],
    [1e4, 1e4, -1e4],
    [1e4, 9999.5, 9999.0],
    [-1e4, -1e4, -1e4],
]
_IMPOSSIBLE = [([0.5, -np.inf, 0.25], 0), ([0.5, -np.inf, 0.25], 2), ([2.0, -np.inf, -np.inf], 0)]


def hard_examples(num_classes=3):
    """Logits (N, C) and labels (N,); further classes than three lie between -5 and 5."""
    rows = np.array(_ROWS)[:, : min(num_classes, 3)]
    targets = [*range(min(num_classes, 3)), num_classes - 1]
    logits = np.repeat(rows, len(targets), axis=0)
    labels = np.tile(targets, len(rows))
    if num_classes >= 3:
        logits = np.concatenate([logits, [row for row, _ in _IMPOSSIBLE]])
        labels = np.concatenate([labels, [label for _, label in _IMPOSSIBLE]])
    others = np.linspace(-5.0, 5.0, max(num_classes - 3, 0))
    return np.concatenate([logits, np.tile(others, (len(logits), 1))], axis=1), labels
