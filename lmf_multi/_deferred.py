"""Deferred re-weighting: no class weights at first, effective-number weights later."""

import numpy as np

from lmf_multi.spec import Counts, Floats, as_counts, check_whole, class_weights


def deferred_weights(
    class_counts: Counts, epoch: int, start: int, *, effective_beta: float = 0.9999
) -> Floats:
    """Class weights of one epoch: ones before ``start``, ``"effective"`` from it on.

    They depend on the epoch alone, so a run that is resumed has the right ones at once.

    Args:
        class_counts: training examples of each class (C,), in any form that ``LMFSpec`` takes.
        epoch: of training, counted from 0.
        start: the first epoch with weights; Cao et al. take it late, at 160 of 200.
        effective_beta: of the effective number of samples, in [0, 1).

    Returns:
        float64 (C,).

    Raises:
        ValueError: a value breaks its rule.
        TypeError: an epoch that is no whole number.

    Source: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss,
    arXiv 1906.07413, section 3.3; the weights: Cui et al., arXiv 1901.05555.

    >>> deferred_weights([900, 100], epoch=159, start=160)
    array([1., 1.])
    >>> deferred_weights([900, 100], epoch=160, start=160).round(2)
    array([0.21, 1.79])
    """
    check_whole(0, "; epochs count from 0", epoch=epoch, start=start)
    weights = class_weights(class_counts, "effective", effective_beta=effective_beta)
    return np.ones(len(as_counts(class_counts))) if epoch < start else weights
