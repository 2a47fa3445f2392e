"""The CPU kernel called by hand, as PyTorch and as XLA call it, with NumPy alone.

`nox -s sanitize` repeats it with a library that watches its own memory and threads.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from ctypes import CFUNCTYPE, POINTER, Structure, c_bool, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from lmf_multi import _kernel
from tests.cases import Case, Result, SigmoidCase, rounded
from tests.frameworks import need_kernel

CALLS = int(os.environ.get("LMF_MULTI_RANDOM_CALLS", "40"))
DTYPES = ("float32", "bfloat16", "float16")
SENTINEL = 77.0  # in what the kernel must not write


@pytest.fixture(scope="module")
def kernel():
    need_kernel(_kernel.library(), "numpy")
    return _kernel.library()


def stored(values, dtype):
    """The bits of numbers that ``dtype`` represents."""
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def laid_out(rng, values, fill, in_order):
    """The same numbers with axes in any order, and with gaps of what ``fill`` is."""
    order, steps = rng.permutation(3), rng.choice([1, 1, 1, 2], 3)
    if in_order:
        order, steps = np.arange(3), np.ones(3, int)
    memory = np.full(np.multiply(values.shape, steps)[order], fill, values.dtype)
    lying = memory.transpose(np.argsort(order))[tuple(slice(None, None, step) for step in steps)]
    lying[...] = values
    return memory, lying


@dataclass
class Batch:
    """Random logits (outer, C, inner), and what is exact for them, classes last.

    Labels are (outer, inner), or probabilities (outer, C, inner) of the sigmoid form.
    """

    case: Case
    dtype: str
    logits: np.ndarray
    labels: np.ndarray
    where: np.ndarray  # of the labels' shape
    ignore_index: int
    with_grad: bool
    threads: int

    @property
    def is_sigmoid(self):
        return self.case.by_element

    @property
    def vectors(self):
        """Margins, where there is LDAM, and weights, (C,) or (C, 2); adjustments (C,)."""
        case = self.case
        given = (case.margins if case.alpha else None, case.weights, case.adjustments)
        return [None if v is None else np.ascontiguousarray(v, np.float64) for v in given]

    @property
    def totals(self):
        """What the means divide by."""
        case, C = self.case, self.logits.shape[1]
        if self.is_sigmoid:
            w, t = np.ones(2) if case.weights is None else case.weights, case.labels
            each = (1 - t) * w[..., 0] + t * w[..., 1]
        else:
            each = (np.ones(C) if case.weights is None else case.weights)[case.labels]
        return each[case.where].sum(), case.where.sum()

    def gradient(self):
        """Room for it, of what the kernel must overwrite."""
        return np.full(self.logits.shape, SENTINEL, np.float32)

    def check(self, value, grad):
        """Of shapes (outer, inner) and (outer, C, inner)."""
        value, exact = np.float64(value), self.case.exact[1]
        if value.ndim and self.is_sigmoid:
            value = value.swapaxes(1, 2)
        grad = exact if grad is None else np.float64(grad).swapaxes(1, 2)
        self.case.check(Result(value, grad, "float32", "float32"))


def batch(seed, reduction):
    rng = np.random.default_rng(seed)
    outer, inner = rng.integers(1, 40), rng.choice([1, 1, rng.integers(2, 40)])
    C = int(rng.choice([rng.integers(2, 9), rng.integers(9, 70), rng.integers(70, 300)]))
    is_sigmoid = rng.random() < 0.4
    if is_sigmoid and rng.random() < 0.3:
        C = 1
    if rng.random() < 0.15:  # worth several threads
        outer = int(rng.integers(300_000, 500_000) // (C * inner)) + 1
    dtype = str(rng.choice(DTYPES))
    # no loss near float32's smallest number, which is flushed before the factors that follow
    scale = float(rng.choice([1, 8, 30]))
    z = np.clip(rng.normal(0, rng.choice([1, 5]), (outer, inner, C)), -16, 16)
    z = rounded(np.clip(z, -40 / scale, 40 / scale), dtype)
    labels = (sigmoid_labels if is_sigmoid else softmax_labels)(rng, z.shape)
    y, where, ignore_index, known = labels
    alpha, beta = [(1.5, 1.0), (1.0, 0.0), (0.0, 1.0)][rng.integers(3)]
    case = known(
        logits=np.where(where if is_sigmoid else where[..., None], z, 0.0),
        labels=np.where(where, y, 0),
        alpha=alpha,
        beta=beta,
        gamma=float(rng.choice([0, 0.5, 1.5])),
        scale=scale,
        logit_adjustment=float(rng.choice([0, 0.1])),  # of logits that stay within the bound
        where=where,
        reduction=reduction,
    )
    z[~where] = rng.choice([0, np.nan, np.inf])  # nobody looks
    options = {"with_grad": rng.random() < 0.7, "threads": int(rng.integers(1, 5))}
    if is_sigmoid:
        y[~where] = rng.choice([0, np.nan, 7])
        y, where = y.swapaxes(1, 2), where.swapaxes(1, 2)
    return Batch(case, dtype, z.swapaxes(1, 2), y, where, ignore_index, **options)


def softmax_labels(rng, shape):
    *batch, C = shape
    y, ignore_index = rng.integers(0, C, batch), int(rng.choice([-100, 0, C, 2**40]))
    y[rng.random(batch) < rng.choice([0, 0.2, 1], p=[0.4, 0.5, 0.1])] = ignore_index
    weights = rounded(rng.uniform(0.2, 3, C), "float32") if rng.random() < 0.5 else None
    known = partial(Case, class_counts=tuple(range(1, C + 1)), class_weight=weights)
    return y, y != ignore_index, ignore_index, known


def sigmoid_labels(rng, shape):
    t, C = rng.integers(0, 2, shape).astype(float), shape[-1]
    smoothing = rng.choice([0, 0, 0.1, 1e-4])
    if rng.random() < 0.3:
        t = rounded(rng.uniform(0, 1, shape), "float32")
    where = rng.random(shape) >= rng.choice([0, 0.2, 1], p=[0.4, 0.5, 0.1])
    weights = rounded(rng.uniform(0.2, 3, (C, 2)), "float32") if rng.random() < 0.5 else None
    counts = np.arange(1, C + 1), np.arange(C, 0, -1)
    known = partial(
        SigmoidCase, class_counts=counts, class_weight=weights, label_smoothing=float(smoothing)
    )
    return t, where, 0, known


def pointer(array):
    return None if array is None else array.ctypes.data


def strides(array):
    """In numbers, from one outer to the next, one inner, one class."""
    outer, of_class, inner = (n // array.itemsize for n in array.strides)
    return outer, inner, of_class


def as_pytorch(kernel, seed):
    rng = np.random.default_rng([seed, 1])
    some = batch(seed, str(rng.choice(["none", "sum", "mean", "batch_mean"])))
    case, in_order = some.case, some.is_sigmoid or rng.random() < 0.3
    bits, empty = stored(some.logits, some.dtype), some.gradient()
    _, z = laid_out(rng, bits, 0xFFFF if bits.dtype == np.uint16 else np.nan, in_order)
    memory, grad = laid_out(rng, empty, SENTINEL, in_order)
    kind = np.float32 if some.is_sigmoid else np.int64
    labels, where = np.ascontiguousarray(some.labels, kind), np.ascontiguousarray(some.where)
    losses = np.empty(labels.shape, np.float32) if case.reduction == "none" else None
    held = {"z": z, "losses": losses}
    held |= zip(("margins", "weights", "adjustments"), some.vectors, strict=True)
    held |= {"t": labels} if some.is_sigmoid else {"y": labels}
    ignored = np.nan
    if some.is_sigmoid and rng.random() < 0.5:
        held["where"] = where
    elif some.is_sigmoid:
        ignored = labels[~where] = -100
    held["grad"] = grad if some.with_grad else None
    call = _kernel.LossCall(
        size=ctypes.sizeof(_kernel.LossCall),
        **{name: pointer(array) for name, array in held.items()},
        N=labels.size,
        C=z.shape[1],
        inner=z.shape[2],
        z_strides=strides(z),
        grad_strides=strides(grad),
        ignore_index=some.ignore_index,
        alpha=case.alpha,
        beta=case.beta,
        gamma=case.gamma,
        scale=case.scale,
        smoothing=case.label_smoothing,
        ignored=ignored,
        dtype=_kernel.DTYPES[some.dtype],
        by_weight=case.reduction == "mean",
        by_examples=case.reduction in ("mean", "batch_mean"),
        margins_by_label=True,
        weights_by_label=True,
        adjustments_by_label=True,
        threads=some.threads,
    )
    call.total_weight, call.total_examples = some.totals if rng.random() < 0.5 else (np.nan, np.nan)
    assert kernel.lmf_multi_loss(call) == 0
    some.check(call.loss if losses is None else losses, held["grad"])
    if some.with_grad:
        grad[...] = empty
    assert (memory == SENTINEL).all()  # nothing was written beside the gradient's numbers


# --- xla.h, and an XLA whose threads are Python's


def structure(*fields):
    head = [("struct_size", c_size_t), ("extensions", c_void_p)]
    return type("", (Structure,), {"_fields_": head + list(fields)})


RUN = CFUNCTYPE(None, c_void_p)
Buffer = structure(
    ("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64))
)
Buffers = structure(("size", c_int64), ("types", c_void_p), ("each", POINTER(POINTER(Buffer))))
Attributes = structure(
    ("size", c_int64), ("types", c_void_p), ("names", c_void_p), ("each", c_void_p)
)
Task = structure(("context", c_void_p), ("run", c_void_p), ("data", c_void_p))
Threads = structure(("context", c_void_p), ("number", POINTER(c_int64)))
Error = structure(("error", c_void_p))
SCHEDULE, NUMBER, DESTROY = (CFUNCTYPE(c_void_p, POINTER(kind)) for kind in (Task, Threads, Error))
Api = structure(
    *(("version", 3 * c_size_t), ("internal", c_void_p)),
    *((name, c_void_p) for name in ("create_error", "message_of_error")),
    *(("destroy_error", DESTROY), ("register_handler", c_void_p), ("others", 7 * c_void_p)),
    *(("schedule", SCHEDULE), ("number_of_threads", NUMBER)),
)
Frame = structure(
    *(("api", POINTER(Api)), ("context", c_void_p), ("stage", c_int)),
    *(("arguments", Buffers), ("results", Buffers), ("attributes", Attributes)),
    ("future", c_void_p),
)
FLOATS = {"float32": 11, "bfloat16": 16, "float16": 10}  # XLA's numbers for them


class Scalar(Structure):
    _fields_ = (("dtype", c_int), ("value", c_void_p))


def api(pool, threads, refused):
    """An XLA with as many threads, which refuses one task; the errors that it got back."""
    done = []

    def schedule(task):
        if len(done) == refused:
            return 1  # an error, whatever it is
        done.append(pool.submit(RUN(task[0].run), task[0].data))

    def number(told):
        told[0].number[0] = threads

    def destroy(error):
        assert error[0].error == 1

    return Api(
        schedule=SCHEDULE(schedule),
        number_of_threads=NUMBER(number),
        destroy_error=DESTROY(destroy),
    ), done


def buffers(arrays, dtype="float32"):
    """``dtype`` is the first one's, the kernel asks for no other."""
    each = (POINTER(Buffer) * len(arrays))()
    for i, array in enumerate(arrays):
        of_array = {"data": pointer(array), "rank": array.ndim}
        dims = (c_int64 * array.ndim)(*array.shape)
        each[i] = ctypes.pointer(Buffer(dtype=FLOATS[dtype], dims=dims, **of_array))
    return Buffers(size=len(arrays), each=each)


def as_xla(kernel, pool, seed):
    rng = np.random.default_rng([seed, 2])
    some = batch(seed, "none")
    case, kind = some.case, np.float32 if some.is_sigmoid else np.int32
    labels = np.ascontiguousarray(np.where(some.where, some.labels, -2), kind)
    z, grad = np.ascontiguousarray(stored(some.logits, some.dtype)), some.gradient()
    losses, untouched = np.full(labels.shape, SENTINEL, np.float32), grad.copy()
    shaped = [x[..., 0] if z.shape[2] == 1 else x for x in (z, labels, losses, grad)]
    numbers = [case.gamma, case.scale, case.alpha, case.beta, case.label_smoothing]
    numbers = np.array(numbers, np.float32)
    vectors = [np.ascontiguousarray(v.T, np.float32) for v in some.vectors if v is not None]
    arguments = buffers([*shaped[:2], numbers, *vectors], some.dtype)
    results = buffers(shaped[2:][: 1 + some.with_grad])
    given = (case.logit_adjustment, case.beta, case.alpha, some.is_sigmoid)
    terms = [c_bool(bool(term)) for term in given]
    scalars = [Scalar(value=ctypes.addressof(term)) for term in terms]
    each = (POINTER(Scalar) * len(terms))(*map(ctypes.pointer, scalars))
    interface, done = api(pool, some.threads, refused=int(rng.choice([0, 1, 9])))
    frame = Frame(api=ctypes.pointer(interface), stage=3, arguments=arguments, results=results)
    frame.attributes = Attributes(size=len(terms), each=ctypes.addressof(each))
    call = CFUNCTYPE(c_void_p, POINTER(Frame))(("lmf_multi_loss_xla", kernel))
    assert call(frame) is None
    for task in done:
        task.result()
    some.check(losses, grad if some.with_grad else None)
    assert some.with_grad or (grad == untouched).all()


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.mark.parametrize("generation", [0, 1, 2])
def test_calls_as_pytorchs(kernel, generation):
    newest = c_int.in_dll(kernel, "lmf_multi_generation")
    found = newest.value
    if generation > found:
        pytest.skip("this processor has no such instructions")
    newest.value = generation
    try:
        for i in range(CALLS):
            as_pytorch(kernel, 3 * i + generation)
    finally:
        newest.value = found


@pytest.mark.parametrize("C", range(2, 10))
def test_packed_rows_of_full_vectors(kernel, C):
    """Whose gradient ends with the memory that is theirs."""
    N, rng = 64, np.random.default_rng(C)
    z, y = rng.normal(0, 3, (N, C)).astype(np.float32), np.arange(N) % C
    memory = np.full(N * C + 16, SENTINEL, np.float32)
    call = _kernel.LossCall(
        size=ctypes.sizeof(_kernel.LossCall),
        **{"z": pointer(z), "y": pointer(y), "grad": pointer(memory)},
        **{"N": N, "C": C, "inner": 1, "z_strides": (C, 0, 1), "grad_strides": (C, 0, 1)},
        **{"ignore_index": -1, "beta": 1, "scale": 1, "threads": 1},
    )
    assert kernel.lmf_multi_loss(call) == 0
    p = np.exp(z - np.logaddexp.reduce(z, 1, keepdims=True))  # without γ it is cross-entropy
    np.testing.assert_allclose(memory[: N * C].reshape(N, C), p - np.eye(C)[y], rtol=0, atol=1e-6)
    assert (memory[N * C :] == SENTINEL).all()


def test_calls_as_xlas(kernel, pool):
    for seed in range(CALLS):
        as_xla(kernel, pool, seed)


def test_callers_at_once(kernel, pool):
    """Each of which starts threads, or shares those of the process."""
    with ThreadPoolExecutor(3) as callers:
        both = [callers.submit(as_pytorch, kernel, seed) for seed in range(CALLS)]
        both += [callers.submit(as_xla, kernel, pool, seed) for seed in range(CALLS)]
        for one in both:
            one.result()
