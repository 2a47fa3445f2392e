r"""The definition: values and analytic gradients in float64 NumPy.

``lmf_multi._terms`` says what the symbols mean and have as shapes. Every other implementation keeps
these steps, their order and their names:

1. ``check_inputs``: shapes and dtypes.
2. ``targets``: labels become a distribution q over the classes, with zeros for masked examples.
3. ``normalizers``, and from them a and b: what a class weight of 1 counts for in each term.
4. ``all_classes``: the terms weighted by q and w, and the gradient by the chain rule.
5. ``ldam``, ``focal``: a term from its one-vs-rest log-odds, and its slope.

The sigmoid form has the same steps, with ``sigmoid_targets`` and ``sigmoid`` for 2 and 4. The fast
implementations compute the labelled class alone (``one_class``) or all of them together; here each
class is computed by itself.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmf_multi._constructors import (
    FocalConstructors,
    LDAMConstructors,
    LMFConstructors,
    Parameters,
    SigmoidConstructors,
    arguments,
    current,
    remember,
)
from lmf_multi._heads import cosine_logits
from lmf_multi._terms import Labels, Numbers, Options, Terms, Vectors, numbers_of
from lmf_multi.spec import (
    Counts,
    Floats,
    Reduction,
    Weights,
    check_inputs,
    check_label_range,
    check_parameters,
    check_probability_range,
    check_reduction,
    check_sigmoid_inputs,
    check_vectors,
    described,
    shapes_of,
)

__all__ = ["FocalLoss", "LDAMLoss", "LMFLoss", "SigmoidLMFLoss"]
__all__ += ["focal_loss", "ldam_loss", "lmf_loss", "sigmoid_lmf_loss"]
__all__ += ["cosine_logits", "lmf_loss_and_grad", "sigmoid_lmf_loss_and_grad"]


def lmf_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    margins: ArrayLike,
    class_weight: ArrayLike | None = None,
    *,
    alpha: float = 1.5,
    beta: float = 1.0,
    gamma: float = 1.5,
    scale: float = 30.0,
    label_smoothing: float = 0.0,
    logit_adjustment: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Floats:
    r"""Large-margin and focal losses, mixed, for each example.

    .. math::
        \omega_j(z) &= z_j - \log \sum_{k \ne j} e^{z_k} \\
        \mathrm{Focal}_j &= \mathrm{sigmoid}(-\omega_j(z))^\gamma \, \mathrm{softplus}(-\omega_j(z))
            = -(1 - p_j)^\gamma \log p_j \\
        \mathrm{LDAM}_j &= \mathrm{softplus}(s \Delta_j - \omega_j(s z))
            = -\log \frac{e^{s (z_j - \Delta_j)}}
                         {e^{s (z_j - \Delta_j)} + \sum_{k \ne j} e^{s z_k}} \\
        L_i &= \sum_j q_{ij} \, w_j \, (\alpha \, \mathrm{LDAM}_j + \beta \, \mathrm{Focal}_j)

    z is one row of ``logits``, p its softmax, s ``scale``, Δ ``margins``, w ``class_weight``; q_i
    is the label as a distribution, one-hot for an integer, after smoothing (1 - ε) q + ε / C. The
    forms in ω equal the papers' and stay accurate for the easiest and the hardest examples.

    Args:
        logits: float (..., C), unnormalised log-probabilities, nats; -inf for an impossible class.
        labels: integer, the logits' shape without the class axis, each in [0, C); or float, the
            logits' shape, a distribution over the classes.
        margins: float (C,), logit units, before scaling; ``class_margins`` computes them.
        class_weight: float (C,), at least 0, or None for ones.
        alpha: share of the LDAM term.
        beta: share of the focal term.
        gamma: focusing exponent, at least 0.
        scale: factor on the logits inside the LDAM term, positive.
        label_smoothing: ε, in [0, 1].
        logit_adjustment: float (C,), nats, added to the logits before anything else, of which z
            above is the sum; τ · ``log_priors`` for logit adjustment. None for zeros.
        axis: the class axis of ``logits``.
        where: bool, one value for each example; False leaves the example out of every sum and
            count, whatever its logits and its label.
        reduction: ``"none"``; ``"sum"``; ``"mean"``, each term averaged as published, LDAM over the
            total class weight Σ_ij q_ij w_j (before smoothing) and focal over the N valid examples;
            ``"batch_mean"``, Σ L_i / N. No valid example gives 0.

    Returns:
        float64, nats: one value for each example for ``"none"``, a scalar otherwise.

    Raises:
        ValueError: shapes disagree, a label is out of range, a parameter breaks its rule.
        TypeError: a dtype of the wrong kind.

    Source: Sadi et al., LMFLOSS, arXiv 2212.12741; LDAM: Cao et al., arXiv 1906.07413, equation 10;
    focal: Lin et al., arXiv 1708.02002, equation 4.

    >>> lmf_loss(np.array([[2.0, 0.0], [0.5, 1.0]]), np.array([0, 1]), [0.1, 0.5]).round(4)
    np.float64(0.5775)
    """
    numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
    options = Options(axis, where, reduction=reduction)
    vectors = Vectors(margins, class_weight, logit_adjustment)
    return _softmax_loss(logits, labels, vectors, numbers, options)[0]


def ldam_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    margins: ArrayLike,
    class_weight: ArrayLike | None = None,
    *,
    scale: float = 30.0,
    label_smoothing: float = 0.0,
    logit_adjustment: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Floats:
    """The LDAM term alone: ``lmf_loss`` with alpha 1 and beta 0.

    >>> ldam_loss(np.array([[0.2, 0.0]]), np.array([0]), [0.2, 0.5], scale=2.0).round(4)
    np.float64(0.6931)
    """
    numbers = Numbers(1.0, 0.0, 0.0, scale, label_smoothing)
    options = Options(axis, where, reduction=reduction)
    vectors = Vectors(margins, class_weight, logit_adjustment)
    return _softmax_loss(logits, labels, vectors, numbers, options)[0]


def focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    class_weight: ArrayLike | None = None,
    *,
    gamma: float = 1.5,
    label_smoothing: float = 0.0,
    logit_adjustment: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Floats:
    """The focal term alone: ``lmf_loss`` with alpha 0 and beta 1.

    >>> focal_loss(np.array([[0.0, 0.0]]), np.array([0]), gamma=2.0).round(4)
    np.float64(0.1733)
    """
    numbers = Numbers(0.0, 1.0, gamma, 1.0, label_smoothing)
    options = Options(axis, where, reduction=reduction)
    vectors = Vectors(None, class_weight, logit_adjustment)
    return _softmax_loss(logits, labels, vectors, numbers, options)[0]


def sigmoid_lmf_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    margins: ArrayLike,
    class_weight: ArrayLike | None = None,
    *,
    alpha: float = 1.5,
    beta: float = 1.0,
    gamma: float = 1.5,
    scale: float = 30.0,
    label_smoothing: float = 0.0,
    logit_adjustment: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Floats:
    r"""The loss for labels that do not exclude each other: binary, multi-label, one channel.

    .. math::
        L^+(x) &= w^+ (\alpha \, \mathrm{softplus}(s (\Delta^+ - x))
            + \beta \, \mathrm{sigmoid}(-x)^\gamma \, \mathrm{softplus}(-x)) \\
        L^-(x) &= w^- (\alpha \, \mathrm{softplus}(s (\Delta^- + x))
            + \beta \, \mathrm{sigmoid}(x)^\gamma \, \mathrm{softplus}(x)) \\
        L &= t \, L^+(x) + (1 - t) \, L^-(x)

    x is an element of ``logits`` and t its label, after smoothing (1 - ε) t + ε / 2. It is
    ``lmf_loss`` on the two logits (0, x), for each element by itself; an element is what an example
    is there, in every reduction.

    Args:
        logits: float, any shape, log-odds of the positive, nats.
        labels: the logits' shape: 0 and 1, bool, or float, the probability t of the positive.
        margins: float (2,), or (L, 2) for the L labels along ``axis``: of the negative and of the
            positive, logit units, before scaling.
        class_weight: float (2,) or (L, 2), at least 0, or None for ones.
        logit_adjustment: float () or (L,), nats, added to the logits; τ log(n⁺ / n⁻) for logit
            adjustment.
        axis: the label axis of ``logits``, for (L, 2) and (L,).
        where: bool, the logits' shape; False leaves the element, perhaps a label that nobody
            annotated, out of every sum and count, whatever its logit and its label.

    The other arguments, and errors, as ``lmf_loss``.

    Returns:
        float64, nats: the logits' shape for ``"none"``, a scalar otherwise.

    Source: the softmax form for two classes. Deliberately not the binary LDAM of the widespread
    clones, which makes a negative's margin easier to keep instead of harder.

    >>> margins = np.array([0.1, 0.5])  # of the many negatives, of the few positives
    >>> sigmoid_lmf_loss(np.array([-2.0, 0.5]), np.array([0, 1]), margins).round(4)
    np.float64(0.5775)
    """
    numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
    options = Options(axis, where, reduction=reduction)
    vectors = Vectors(margins, class_weight, logit_adjustment)
    return _sigmoid_loss(logits, labels, vectors, numbers, options)[0]


def lmf_loss_and_grad(
    logits: ArrayLike,
    labels: ArrayLike,
    margins: ArrayLike,
    class_weight: ArrayLike | None = None,
    *,
    alpha: float = 1.5,
    beta: float = 1.0,
    gamma: float = 1.5,
    scale: float = 30.0,
    label_smoothing: float = 0.0,
    logit_adjustment: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> tuple[Floats, Floats]:
    r"""``lmf_loss`` and its gradient with respect to the logits.

    Each term depends on one log-odds, so with r the softmax over k ≠ j

    .. math:: \partial L / \partial z_j = L', \qquad \partial L / \partial z_k = -L' r_k,
        \qquad L' = \partial L / \partial \omega_j

    Args: as ``lmf_loss``.

    Returns:
        The value, and float64 of the logits' shape: the gradient of the value, for ``"none"`` of
        its sum. Every row sums to 0; a masked example's row is 0.

    >>> value, grad = lmf_loss_and_grad(np.array([[1.0, 0.0, -1.0]]), [0], [0.5, 0.5, 0.5])
    >>> grad.round(4)
    array([[-0.1436,  0.105 ,  0.0386]])
    """
    numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
    options = Options(axis, where, reduction=reduction)
    vectors = Vectors(margins, class_weight, logit_adjustment)
    return _softmax_loss(logits, labels, vectors, numbers, options)


def sigmoid_lmf_loss_and_grad(
    logits: ArrayLike,
    labels: ArrayLike,
    margins: ArrayLike,
    class_weight: ArrayLike | None = None,
    *,
    alpha: float = 1.5,
    beta: float = 1.0,
    gamma: float = 1.5,
    scale: float = 30.0,
    label_smoothing: float = 0.0,
    logit_adjustment: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> tuple[Floats, Floats]:
    """``sigmoid_lmf_loss`` and its gradient with respect to the logits, ∂L⁺/∂ω - ∂L⁻/∂ω.

    >>> value, grad = sigmoid_lmf_loss_and_grad(np.array([1.0, -1.0]), [1, 0], [0.5, 0.5])
    >>> grad.round(4)
    array([-0.0427,  0.0427])
    """
    numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
    options = Options(axis, where, reduction=reduction)
    vectors = Vectors(margins, class_weight, logit_adjustment)
    return _sigmoid_loss(logits, labels, vectors, numbers, options)


def _softmax_loss(
    logits: ArrayLike, labels: ArrayLike, vectors: Vectors, numbers: Numbers, options: Options
) -> tuple[Floats, Floats]:
    """The reduced loss () or (...,), and its gradient (..., C)."""
    batch, soft = _checked(check_inputs, (logits, labels), vectors, numbers, options)
    z, y, mask, Δ, w, o = batch
    z = np.moveaxis(z, options.axis, -1)
    shape, C = z.shape, z.shape[-1]
    y = np.moveaxis(y, options.axis, -1).reshape(-1, C) if soft else y.reshape(-1)
    valid = np.ones(len(y), bool) if mask is None else mask.reshape(-1)
    z = np.where(valid[:, None], z.reshape(-1, C).astype(np.float64), 0.0)

    q = _targets(y, valid, C)
    Δ, o = (np.zeros(C) if v is None else v for v in (Δ, o))
    w = np.ones(C) if w is None else w
    a, b = _shares(q @ w, valid, numbers, options.reduction)
    ε = numbers.label_smoothing
    q = ((1 - ε) * q + ε / C) * valid[:, None]
    terms = Terms(Δ=Δ, w=w, a=a, b=b, γ=numbers.gamma, s=numbers.scale, o=o)
    loss, grad = _all_classes(z, Labels(q=q), terms)

    value: Floats = loss.reshape(shape[:-1]) if options.reduction == "none" else loss.sum()
    return value, np.moveaxis(grad.reshape(shape), -1, options.axis)


def _sigmoid_loss(
    logits: ArrayLike, labels: ArrayLike, vectors: Vectors, numbers: Numbers, options: Options
) -> tuple[Floats, Floats]:
    """The reduced loss () or (...,), and its gradient (...,)."""
    batch, _ = _checked(check_sigmoid_inputs, (logits, labels), vectors, numbers, options)
    x, t, mask, Δ, w, o = batch
    valid = np.ones(x.shape, bool) if mask is None else mask
    x = np.where(valid, x.astype(np.float64), 0.0)
    o = _along(np.zeros(()) if o is None else o, x.ndim, options.axis)
    Δ, w = (_by_label(v, x.ndim, options.axis) for v in (Δ, np.ones(2) if w is None else w))

    q = _sigmoid_targets(t, valid)
    a, b = _shares((q * w).sum(0), valid, numbers, options.reduction)
    ε = numbers.label_smoothing
    terms = Terms(Δ=Δ, w=w, a=a, b=b, γ=numbers.gamma, s=numbers.scale, o=o, ε=ε)
    loss, grad = _sigmoid(x, Labels(q=q), terms)

    value: Floats = loss if options.reduction == "none" else loss.sum()
    return value, grad


def _checked(
    check: Any, arrays: tuple[ArrayLike, ...], vectors: Vectors, numbers: Numbers, options: Options
) -> tuple[tuple[Any, ...], bool]:
    """Logits, labels, mask and vectors as arrays; whether labels are distributions."""
    check_vectors(**vectors._asdict())
    check_parameters(**numbers._asdict())
    check_reduction(options.reduction)
    z, y = map(np.asarray, arrays)
    mask = None if options.where is None else np.asarray(options.where)
    vectors = Vectors(*(None if v is None else np.asarray(v, np.float64) for v in vectors))
    soft = check(described(z), described(y), options.axis, shapes_of(*vectors), described(mask))
    return (z, y, mask, *vectors), soft


def _targets(y: NDArray[Any], valid: NDArray[np.bool_], C: int) -> Floats:
    """Distributions q (N, C) before smoothing; rows of zeros for masked examples."""
    if y.ndim == 2:
        return np.where(valid[:, None], y.astype(np.float64), 0.0)
    y = np.where(valid, y, 0)
    check_label_range(int(y.min(initial=0)), int(y.max(initial=0)), C, "where")
    return np.where(valid[:, None], np.eye(C)[y], 0.0)


def _sigmoid_targets(t: NDArray[Any], valid: NDArray[np.bool_]) -> Floats:
    """Distributions over negative and positive (2, …) before smoothing; 0 for masked elements."""
    t = np.where(valid, t.astype(np.float64), 0.0)
    check_probability_range(t.min(initial=0), t.max(initial=0), "where")
    return np.stack([1 - t, t]) * valid


def _by_label(vector: Floats, ndim: int, axis: int) -> Floats:
    """(2,) or (L, 2) as (2, …), which broadcasts against the logits with L along their axis."""
    if vector.ndim == 1:
        return vector.reshape(2, *[1] * ndim)
    return _along(vector.T, ndim, axis)


def _along(vector: Floats, ndim: int, axis: int) -> Floats:
    """(…, L), or () for one of all labels, with L along the axis of the logits."""
    if vector.ndim == 0:
        return vector
    return vector.reshape(*vector.shape[:-1], *[-1 if i == axis % ndim else 1 for i in range(ndim)])


def _normalizers(W: Floats, valid: NDArray[np.bool_], reduction: Reduction) -> tuple[float, float]:
    """What the sums over LDAM and over focal are divided by."""
    if reduction in ("none", "sum"):
        return 1.0, 1.0
    N = max(float(valid.sum()), 1.0)
    if reduction == "batch_mean":
        return N, N
    return float(W.sum()) or 1.0, N


def _shares(
    W: Floats, valid: NDArray[np.bool_], numbers: Numbers, reduction: Reduction
) -> tuple[float, float]:
    """a and b."""
    by_weight, by_examples = _normalizers(W, valid, reduction)
    return numbers.alpha / by_weight, numbers.beta / by_examples


def _all_classes(z: Floats, labels: Labels, terms: Terms) -> tuple[Floats, Floats]:
    """Σ_j q_j w_j (a LDAM_j + b Focal_j) of each example (N,), and its gradient (N, C)."""
    Δ, w, a, b, γ, s, o, _ = terms
    loss, grad = np.zeros(len(z)), np.zeros_like(z)
    spoilt = np.flatnonzero(np.isnan(z).any(axis=1))  # NaN, even where no term counts
    loss[spoilt], grad[spoilt] = np.nan, np.nan
    for j in range(z.shape[1]):
        share = labels.q[:, j] * w[j]
        i = np.flatnonzero((share * a != 0) | (share * b != 0))
        if i.size == 0:
            continue
        others, added, share = np.delete(z[i], j, axis=1), np.delete(o, j), share[i]
        top = (others + added).argmax(1)
        M = np.maximum(others[np.arange(len(i)), top], -_LARGE)  # of the logits themselves, for
        added, o_j = added - added[top][:, None], o[j] - added[top]  # a sum would be rounded
        d, x = (z[i, j] - M) + o_j, (others - M[:, None]) + added
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            e_s, e = np.exp(s * x), np.exp(x)
            # the sums are 1 or more unless no other class is possible
            S_s, S = np.maximum(e_s.sum(1), 1.0), np.maximum(e.sum(1), 1.0)
            ldam, ldam_slope = _ldam(s * (d - Δ[j]) - np.log(S_s), s)
            focal, focal_slope = _focal(d - np.log(S), γ)
            loss[i] += _times(share * a, ldam) + _times(share * b, focal)
            G_s, G = share * a * ldam_slope, share * b * focal_slope
            grad[i, j] += G_s + G
            others_grad = -(G_s / S_s)[:, None] * e_s - (G / S)[:, None] * e
        grad[np.ix_(i, np.arange(z.shape[1]) != j)] += others_grad
    return loss, grad


def _sigmoid(x: Floats, labels: Labels, terms: Terms) -> tuple[Floats, Floats]:
    """The same of each element (N,) as negative and as positive, with q, Δ and w (2, …)."""
    (Δ, w, a, b, γ, s, o, ε), sign = terms, np.array([-1.0, 1.0]).reshape(2, *[1] * x.ndim)
    q = (1 - ε) * labels.q + ε / 2 * labels.q.sum(0)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        ω, share = sign * (x + o), q * w
        ldam, ldam_slope = _ldam(s * (ω - Δ), s)
        focal, focal_slope = _focal(ω, γ)
        loss = (_times(share * a, ldam) + _times(share * b, focal)).sum(0)
        return loss, (sign * share * (a * ldam_slope + b * focal_slope)).sum(0)


def _ldam(τ: Floats, s: float) -> tuple[Floats, Floats]:
    """softplus(-τ) and its slope, with τ = ω(s z) - s Δ."""
    return _softplus(-τ), -s * np.exp(-_softplus(τ))


def _focal(ω: Floats, γ: float) -> tuple[Floats, Floats]:
    """sigmoid(-ω)^γ softplus(-ω) and its slope; the power in log space has no bad point."""
    ce, modulation = _softplus(-ω), np.exp(-γ * _softplus(ω))
    p, miss = np.exp(-ce), np.exp(-_softplus(ω))
    return modulation * ce, -modulation * (γ * p * np.minimum(ce, _LARGE) + miss)


def _softplus(x: Floats) -> Floats:
    result: Floats = np.logaddexp(0.0, x)
    return result


def _times(coefficient: Floats, term: Floats) -> Floats:
    """Their product with 0 · ∞ = 0: what counts for nothing may be impossible."""
    return np.where((coefficient == 0) & (term == np.inf), 0.0, coefficient * term)


# Beyond every log-odds that matters, and small enough for products with it to stay finite.
_LARGE = 1e18


class _Loss:
    """The parameters of one loss; calling it calls ``lmf_loss``."""

    _config: dict[str, Any]
    _function = staticmethod(_softmax_loss)

    def __init__(self, parameters: Parameters, axis: int, reduction: Reduction) -> None:
        check_reduction(reduction)
        self.margins, self.class_weight, self.logit_adjustment = parameters.vectors
        remember(self, parameters)
        self.axis, self.reduction = axis, reduction

    def __repr__(self) -> str:
        options = {"axis": self.axis, "reduction": self.reduction}
        return f"{type(self).__name__}({arguments(current(self._config, self) | options)})"

    def __call__(
        self, logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
    ) -> Floats:
        options = Options(self.axis, where, reduction=self.reduction)
        vectors = Vectors(self.margins, self.class_weight, self.logit_adjustment)
        return self._function(logits, labels, vectors, numbers_of(self), options)[0]


class LMFLoss(LMFConstructors, _Loss):
    """``lmf_loss`` with margins and class weights from class counts; parameters as ``LMFSpec``.

    >>> LMFLoss([90, 10])(np.array([[2.0, 0.0], [0.5, 1.0]]), np.array([0, 1])).round(4)
    np.float64(0.6874)
    """

    def __init__(
        self,
        class_counts: Counts,
        *,
        alpha: float = 1.5,
        beta: float = 1.0,
        gamma: float = 1.5,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weight: Weights = "margin",
        label_smoothing: float = 0.0,
        logit_adjustment: float = 0.0,
        axis: int = -1,
        reduction: Reduction = "mean",
    ) -> None:
        numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
        options = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(class_counts, numbers, *options)
        super().__init__(parameters, axis, reduction)


class LDAMLoss(LDAMConstructors, _Loss):
    """``ldam_loss`` with margins and class weights from class counts; parameters as ``LMFSpec``."""

    def __init__(
        self,
        class_counts: Counts,
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weight: Weights = None,
        label_smoothing: float = 0.0,
        logit_adjustment: float = 0.0,
        axis: int = -1,
        reduction: Reduction = "mean",
    ) -> None:
        numbers = Numbers(scale=scale, label_smoothing=label_smoothing)
        options = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(class_counts, numbers, *options)
        super().__init__(parameters, axis, reduction)


class FocalLoss(FocalConstructors, _Loss):
    """``focal_loss`` with class weights; counts are needed for the named class weights only."""

    def __init__(
        self,
        class_counts: Counts = None,
        *,
        gamma: float = 1.5,
        max_margin: float = 0.5,
        class_weight: Weights = None,
        label_smoothing: float = 0.0,
        logit_adjustment: float = 0.0,
        axis: int = -1,
        reduction: Reduction = "mean",
    ) -> None:
        numbers = Numbers(gamma=gamma, label_smoothing=label_smoothing)
        options = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(class_counts, numbers, *options)
        super().__init__(parameters, axis, reduction)


class SigmoidLMFLoss(SigmoidConstructors, _Loss):
    """``sigmoid_lmf_loss`` with margins and class weights from the counts of each label.

    Args:
        positive_counts: training examples in which the label is positive, at least 1: a number, or
            (L,) for the L labels along ``axis``.
        negative_counts: likewise; examples without an annotation belong to neither.
        class_weight: a scheme's name, computed for each label from its two counts; float (2,) or
            (L, 2), of negative and positive; or None.

    The other parameters as ``LMFSpec``.

    >>> loss = SigmoidLMFLoss(positive_counts=10, negative_counts=90)
    >>> loss(np.array([-2.0, 0.5]), np.array([0, 1])).round(4)
    np.float64(0.6874)
    """

    _function = staticmethod(_sigmoid_loss)

    def __init__(
        self,
        positive_counts: Any,
        negative_counts: Any,
        *,
        alpha: float = 1.5,
        beta: float = 1.0,
        gamma: float = 1.5,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weight: Weights = "margin",
        label_smoothing: float = 0.0,
        logit_adjustment: float = 0.0,
        axis: int = -1,
        reduction: Reduction = "mean",
    ) -> None:
        counts = (positive_counts, negative_counts)
        numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
        options = (max_margin, class_weight, logit_adjustment)
        parameters = self._build(*counts, numbers, *options)
        super().__init__(parameters, axis, reduction)
