"""The truth: the papers' formulas as printed, in p, with digits to spare.

400 digits leave 50 after every cancellation whose result float64 can represent; 1 - p becomes 0
only below 1e-400.
"""

from functools import cache

import mpmath as mp
import numpy as np

DIGITS = 400


@cache
def softmax(z):
    e = [mp.exp(x) for x in z]
    total = mp.fsum(e)
    return [x / total for x in e]


@cache
def focal(z, j, γ):
    """-(1 - p)^γ log p, Lin et al., equation 4; its gradient through ∂p/∂z_k = p (δ_jk - p_k)."""
    p = softmax(z)
    if p[j] == 1:
        return mp.mpf(0), [mp.mpf(0)] * len(z)
    value = -((1 - p[j]) ** γ) * mp.log(p[j])
    slope = γ * (1 - p[j]) ** (γ - 1) * mp.log(p[j]) - (1 - p[j]) ** γ / p[j]
    return value, [slope * p[j] * ((k == j) - p[k]) for k in range(len(z))]


@cache
def ldam(z, j, margin, s):
    """-log of the softmax of s (z - Δ_j e_j), Cao et al., equation 10; its gradient s (p - e_j)."""
    p = softmax(tuple(s * (x - margin * (k == j)) for k, x in enumerate(z)))
    return -mp.log(p[j]), [s * (p[k] - (k == j)) for k in range(len(z))]


def exact_terms(z, j, margin, gamma, scale):
    """LDAM_j, Focal_j, and their gradients (C,), for one row of logits, rounded to float64."""
    with mp.workdps(DIGITS):
        z, j = tuple(x if isinstance(x, mp.mpf) else mp.mpf(float(x)) for x in z), int(j)
        margin_loss, margin_grad = ldam(z, j, mp.mpf(float(margin)), mp.mpf(scale))
        focal_loss, focal_grad = focal(z, j, mp.mpf(gamma))
        grads = np.array([margin_grad, focal_grad], np.float64)
        return float(margin_loss), float(focal_loss), *grads


def exact_lmf(z, j, margins, w, alpha, beta, gamma, scale, added=None):
    """LMF_j and its gradient (C,) for one row of logits, to which something may be added."""
    if added is not None:
        with mp.workdps(DIGITS):
            z = [mp.mpf(float(x)) + mp.mpf(float(o)) for x, o in zip(z, added, strict=True)]
    margin_loss, focal_loss, margin_grad, focal_grad = exact_terms(z, j, margins[j], gamma, scale)
    a, b = alpha * w[j], beta * w[j]
    return a * margin_loss + b * focal_loss, a * margin_grad + b * focal_grad
