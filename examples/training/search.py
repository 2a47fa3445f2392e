"""Random settings of a loss: Adam's rate and penalty, and the loss's own hyper-parameters."""

from collections.abc import Collection

import optuna
from optuna.distributions import FloatDistribution

RATES = {
    "learning_rate": FloatDistribution(1e-4, 1e-1, log=True),
    "weight_decay": FloatDistribution(1e-6, 1e-1, log=True),
}
GAMMA, MARGIN = FloatDistribution(0.5, 3.0), FloatDistribution(0.1, 4.0, log=True)
SCALE = FloatDistribution(1.0, 30.0, log=True)
# Of each loss; beta is 1, since Adam takes no notice of a factor on the whole loss.
OWN = {
    "focal": {"gamma": GAMMA},
    "ldam": {"max_margin": MARGIN, "scale": SCALE},
    "lmf": {
        "alpha": FloatDistribution(0.2, 5.0, log=True),
        "gamma": GAMMA,
        "max_margin": MARGIN,
        "scale": SCALE,
    },
    "la": {"logit_adjustment": FloatDistribution(0.5, 2.0)},
}


def draw(loss: str, fixed: Collection[str], number: int) -> list[dict[str, float]]:
    """So many settings; every loss gets the same rates and penalties.

    Args:
        loss: its name.
        fixed: hyper-parameters that are given already.
        number: at least 1; more of them begin with the same ones.
    """
    own = {name: space for name, space in OWN.get(loss, {}).items() if name not in fixed}
    rates, others = (_drawn(space, number, seed) for seed, space in enumerate((RATES, own)))
    return [rate | other for rate, other in zip(rates, others, strict=True)]


def _drawn(space: dict[str, FloatDistribution], number: int, seed: int) -> list[dict[str, float]]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [study.ask(dict(space)).params for _ in range(number)]
