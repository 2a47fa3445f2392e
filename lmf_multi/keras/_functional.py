"""One signature on three backends: the JAX and PyTorch cores on theirs, TensorFlow's here."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from lmf_multi._terms import Numbers, Options, Vectors

_core: Any
_backend = keras.backend.backend()
if _backend == "tensorflow":
    import lmf_multi.keras._tensorflow as _core
elif _backend == "jax":
    import lmf_multi.jax._functional as _core
elif _backend == "torch":
    import lmf_multi.torch._functional as _core
else:
    raise ImportError(
        "lmf_multi.keras needs one of the backends tensorflow, jax, torch, "
        f"got {_backend!r}; set KERAS_BACKEND before importing keras"
    )
compute_loss: Callable[..., Any] = _core.compute_loss
compute_sigmoid_loss: Callable[..., Any] = _core.compute_sigmoid_loss
# the other cores check arrays by themselves
check_given: Callable[..., None] = getattr(_core, "check_given", lambda **vectors: None)
# of totals that one of TensorFlow's strategies may have split; elsewhere they are whole
over_replicas: Callable[[list[Any]], list[Any]] = getattr(_core, "over_replicas", list)
of_whole_batch: Callable[[Any], Any] = getattr(_core, "of_whole_batch", lambda total: total)
# of sizes that are not known yet, which only TensorFlow has
squeeze: Callable[[Any, int], Any] = getattr(_core, "squeeze", ops.squeeze)
sparse_or_soft: Callable[..., Any] = getattr(_core, "sparse_or_soft", ops.convert_to_tensor)


def as_tensor(name: str, values: Any, dtype: Any = None) -> Any:
    """A tensor, of a rank that is known while TensorFlow traces."""
    tensor = ops.convert_to_tensor(values, dtype=dtype)
    if getattr(tensor.shape, "rank", 0) is None:
        raise ValueError(
            f"{name} must have a known number of axes while a graph is traced, "
            "got shape <unknown>; give it one with tf.ensure_shape"
        )
    return tensor


def _given(
    logits: Any, labels: Any, vectors: Vectors, options: Options
) -> tuple[Any, Any, Options]:
    """Logits, labels and mask as tensors of the backend."""
    check_given(**vectors._asdict())
    z, y = as_tensor("logits", logits), as_tensor("labels", labels)
    mask = None if options.where is None else as_tensor("where", options.where)
    return z, y, options._replace(where=mask)


def lmf_loss(
    logits: Any,
    labels: Any,
    margins: Any,
    class_weight: Any = None,
    *,
    alpha: float = 1.5,
    beta: float = 1.0,
    gamma: float = 1.5,
    scale: float = 30.0,
    label_smoothing: float = 0.0,
    logit_adjustment: Any = None,
    axis: int = -1,
    where: Any = None,
) -> Any:
    r"""Large-margin and focal losses, mixed, as :func:`lmf_multi.reference.lmf_loss` defines them.

    Args:
        logits: float (..., C), nats; half types are computed in float32.
        labels: integer, the logits' shape without the class axis, each in [0, C); or float, the
            logits' shape, a distribution over the classes.
        margins: float (C,), logit units, before scaling.
        class_weight: float (C,), at least 0, or None for ones.
        alpha: share of the LDAM term; 0 leaves it out.
        beta: share of the focal term; 0 leaves it out.
        gamma: focusing exponent, at least 0.
        scale: factor on the logits inside the LDAM term, positive.
        label_smoothing: ε, in [0, 1].
        logit_adjustment: float (C,), nats, added to the logits before both terms, such as τ times
            ``lmf_multi.log_priors``; or None.
        axis: the class axis of ``logits``.
        where: bool, one value for each example; False gives 0, whatever the logits and the label.

    Returns:
        float32, or float64 for float64 logits: one value for each example. The gradient with
        respect to the logits has the logits' dtype.

    Raises:
        ValueError: shapes disagree, a parameter breaks its rule, or an eager label is out of range;
            in a compiled step such a label gives NaN.
        TypeError: a dtype of the wrong kind.

    >>> loss = lmf_loss(ops.array([[2.0, 0.0], [0.5, 1.0]]), ops.array([0, 1]), [0.1, 0.5])
    >>> ops.convert_to_numpy(loss).round(4)
    array([0.0052, 1.1497], dtype=float32)
    """
    vectors = Vectors(margins, class_weight, logit_adjustment)
    numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
    z, y, options = _given(logits, labels, vectors, Options(axis, where))
    return compute_loss(z, y, vectors, numbers, options)


def ldam_loss(
    logits: Any,
    labels: Any,
    margins: Any,
    class_weight: Any = None,
    *,
    scale: float = 30.0,
    label_smoothing: float = 0.0,
    logit_adjustment: Any = None,
    axis: int = -1,
    where: Any = None,
) -> Any:
    """The LDAM term alone: ``lmf_loss`` with alpha 1 and beta 0.

    >>> loss = ldam_loss(ops.array([[0.2, 0.0]]), ops.array([0]), [0.2, 0.5], scale=2.0)
    >>> ops.convert_to_numpy(loss).round(4)
    array([0.6931], dtype=float32)
    """
    vectors = Vectors(margins, class_weight, logit_adjustment)
    numbers = Numbers(1.0, 0.0, 0.0, scale, label_smoothing)
    z, y, options = _given(logits, labels, vectors, Options(axis, where))
    return compute_loss(z, y, vectors, numbers, options)


def focal_loss(
    logits: Any,
    labels: Any,
    class_weight: Any = None,
    *,
    gamma: float = 1.5,
    label_smoothing: float = 0.0,
    logit_adjustment: Any = None,
    axis: int = -1,
    where: Any = None,
) -> Any:
    """The focal term alone: ``lmf_loss`` with alpha 0 and beta 1.

    >>> ops.convert_to_numpy(focal_loss(ops.zeros((1, 2)), ops.array([0]), gamma=2.0)).round(4)
    array([0.1733], dtype=float32)
    """
    vectors = Vectors(None, class_weight, logit_adjustment)
    numbers = Numbers(0.0, 1.0, gamma, 1.0, label_smoothing)
    z, y, options = _given(logits, labels, vectors, Options(axis, where))
    return compute_loss(z, y, vectors, numbers, options)


def sigmoid_lmf_loss(
    logits: Any,
    labels: Any,
    margins: Any,
    class_weight: Any = None,
    *,
    alpha: float = 1.5,
    beta: float = 1.0,
    gamma: float = 1.5,
    scale: float = 30.0,
    label_smoothing: float = 0.0,
    logit_adjustment: Any = None,
    axis: int = -1,
    where: Any = None,
) -> Any:
    """The sigmoid form, as :func:`lmf_multi.reference.sigmoid_lmf_loss` defines it.

    Args:
        logits: float, any shape, log-odds of the positive, nats.
        labels: the logits' shape: 0 and 1, bool, or float, the probability of the positive.
        margins: float (2,), or (L, 2) for the L labels along ``axis``: of the negative and of the
            positive.
        class_weight: float (2,) or (L, 2), at least 0, or None for ones.
        logit_adjustment: float () or (L,), nats, added to the logits, such as τ log(n⁺ / n⁻).
        axis: the label axis of ``logits``, for (L, 2) and (L,).
        where: bool, the logits' shape; False gives 0, whatever the logit and the label.

    The other arguments, results and errors as :func:`lmf_loss`; one value for each element.

    >>> loss = sigmoid_lmf_loss(ops.array([-2.0, 0.5]), ops.array([0, 1]), [0.1, 0.5])
    >>> ops.convert_to_numpy(loss).round(4)
    array([0.0052, 1.1497], dtype=float32)
    """
    vectors = Vectors(margins, class_weight, logit_adjustment)
    numbers = Numbers(alpha, beta, gamma, scale, label_smoothing)
    z, y, options = _given(logits, labels, vectors, Options(axis, where))
    return compute_sigmoid_loss(z, y, vectors, numbers, options)
