"""What a comparison of losses found: one table, and what it says in words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from scipy.stats import t as student_t

LOSSES = ("cross-entropy", "LMF")


@dataclass(frozen=True)
class Run:
    """One training from scratch: its scores on the test images and what it took."""

    framework: str
    loss: str
    seed: int
    macro_f1: float
    rarest_f1: float
    seconds: float
    epoch_losses: tuple[float, ...]


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean, and sample standard deviation where there is more than one value.

    >>> mean_and_spread([0.5, 0.7]), mean_and_spread([1000, 1200])
    ('0.600 ± 0.141', '1100 ± 141')
    """
    mean = np.mean(values)
    digits = 3 if abs(mean) < 100 else 0
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def table(runs: Sequence[Run]) -> Table:
    """Framework × loss, each row over its seeds."""
    seeds = len({run.seed for run in runs})
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    result = Table(caption=f"{spread}; seconds: median training", caption_justify="left")
    for heading in ("framework", "loss"):
        result.add_column(heading, no_wrap=True)
    for heading in ("macro-F1", "rarest-class F1", "seconds"):
        result.add_column(heading, justify="right")
    for framework in dict.fromkeys(run.framework for run in runs):
        for loss in LOSSES:
            rows = [run for run in runs if (run.framework, run.loss) == (framework, loss)]
            result.add_row(
                framework,
                loss,
                mean_and_spread([run.macro_f1 for run in rows]),
                mean_and_spread([run.rarest_f1 for run in rows]),
                f"{np.median([run.seconds for run in rows]):.1f}",
                end_section=loss == LOSSES[-1],
            )
    return result


def comparison(runs: Sequence[Run], score: str) -> str:
    """What the numbers say of LMF against cross-entropy, and how sure they are.

    Frameworks share a seed's images, so the mean over frameworks is one observation a seed; the
    interval is Student's.
    """
    seeds = sorted({run.seed for run in runs})

    def of(loss: str) -> np.ndarray:
        rows = [[run for run in runs if (run.loss, run.seed) == (loss, seed)] for seed in seeds]
        return np.array([np.mean([getattr(run, score) for run in row]) for row in rows])

    lmf, cross_entropy = of("LMF"), of("cross-entropy")
    gain = (lmf - cross_entropy).mean()
    if len(seeds) == 1:
        verdict = "is above" if gain > 0 else "is below" if gain < 0 else "is level with"
        doubt = "one seed, perhaps by chance"
    else:
        error = np.std(lmf - cross_entropy, ddof=1) / np.sqrt(len(seeds))
        half = student_t.ppf(0.975, len(seeds) - 1) * error
        verdict = "beats" if gain > half else "loses to" if gain < -half else "is on a par with"
        doubt = f"{gain:+.3f}, 95 % interval {gain - half:+.3f} to {gain + half:+.3f}"
    means = f"{lmf.mean():.3f} against {cross_entropy.mean():.3f}"
    return f"LMF {verdict} cross-entropy, {means} ({doubt})"
