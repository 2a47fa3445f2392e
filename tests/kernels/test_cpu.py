"""PyTorch's compiled CPU kernel, beside the suite of every backend: layouts and sizes."""

import contextlib
import ctypes
import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lmf_multi import _kernel, reference
from tests.adapters import Torch as TorchAdapter
from tests.cases import Case, Result, rounded
from tests.checks import refuses
from tests.engines import without_kernel
from tests.frameworks import load, need_kernel
from tests.hard import hard_examples

RNG = np.random.default_rng(0)
COUNTS, WEIGHTS = (625, 16, 1), np.array([0.5, 1.0, 3.0])


@pytest.fixture
def cpu(torch):
    """The module, or a skip where no compiler was at hand when the package was installed."""
    need_kernel(_kernel.library(), "torch")
    return load("lmf_multi.torch._cpu")


@pytest.fixture
def calls(cpu, monkeypatch):
    """One entry for each call of the kernel."""
    calls, kernel = [], _kernel.library().lmf_multi_loss
    spy = lambda call: calls.append(1) or kernel(call)  # noqa: E731
    monkeypatch.setattr(_kernel.library(), "lmf_multi_loss", spy)
    return calls


def check(torch, z, y, **options):
    """Value and gradient against the reference, at the tolerance of the suite."""
    logits, labels = z.detach().movedim(1, -1), y.clone()
    C, where = logits.shape[-1], labels != options.get("ignore_index", -100)
    labels[~where] = 0
    case = Case(
        logits.double().numpy(),
        labels.numpy(),
        tuple(range(1, C + 1)),
        np.linspace(0.5, 2, C),
        where=where.numpy(),
        dtype=str(z.dtype).removeprefix("torch."),
        logit_adjustment=options.pop("logit_adjustment", 0.0),
        reduction=options.get("reduction", "mean"),
    )
    vectors = (*case.vectors, case.adjustments)
    given = (None if v is None else torch.tensor(v, dtype=torch.float32) for v in vectors)
    margins, weights, options["logit_adjustment"] = given
    loss = load("lmf_multi.torch").lmf_loss(z, y, margins, weights, **options)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert grad.stride() == torch.empty_like(z).stride()
    case.check(result(loss, grad))
    return loss, grad


def result(loss, grad):
    value, of_logits = loss.detach().double().numpy(), grad.movedim(1, -1).double().numpy()
    return Result(value, of_logits, *(str(v.dtype).removeprefix("torch.") for v in (loss, grad)))


LAYOUTS = {
    "rows": lambda z: z,
    "columns": lambda z: z.t().contiguous().t(),
    "every second row": lambda z: z.repeat_interleave(2, 0)[::2],
    "every second class": lambda z: z.repeat_interleave(2, 1)[:, ::2],
    "pixels": lambda z: z.view(3, -1, z.shape[1]).movedim(-1, 1).contiguous(),
    "one image": lambda z: z.t().contiguous()[None],
    "channels last": lambda z: z.view(3, -1, z.shape[1]).movedim(-1, 1),
    "every second pixel": lambda z: (
        z.view(3, -1, z.shape[1]).movedim(-1, 1).repeat_interleave(2, 2)[:, :, ::2]
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("C", [2, 7, 64, 65, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(torch, calls, layout, C, dtype):
    """Tiles and vectors that are full and not, rows of several axes, ignored ones among them."""
    for N in (3, 48, 165):
        z = torch.tensor(RNG.normal(0, 3, (N, C)), dtype=getattr(torch, dtype))
        z = LAYOUTS[layout](z).detach().requires_grad_()
        y = torch.tensor(RNG.integers(0, C, (z.shape[0], *z.shape[2:])))
        y[RNG.random(y.shape) < 0.2] = -100
        for reduction in ("none", "mean", "batch_mean"):
            check(torch, z, y, reduction=reduction)
        check(torch, z, y, logit_adjustment=1.5)
    assert len(calls) == 12


@pytest.mark.parametrize("C", [4, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_half(torch, calls, C, dtype):
    """Each of the 2^16 that is finite, subnormal ones among them, gives the bits of its float32."""
    bits = torch.arange(2**16).to(torch.int16).view(getattr(torch, dtype))
    z = bits.where(bits.isfinite(), 0).view(-1, C)
    y, loss = (
        torch.zeros(len(z), dtype=torch.long),
        load("lmf_multi.torch").LMFLoss(range(1, C + 1)),
    )
    results = []
    for logits in (z.requires_grad_(), z.detach().float().requires_grad_()):
        value = loss(logits, y)
        results.append((value, torch.autograd.grad(value, logits)[0].to(z.dtype)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert len(calls) == 2


@pytest.mark.parametrize("C", range(2, 10))
def test_rows_at_the_distance_of_packed_ones(torch, calls, C):
    """Whose classes are far from one another."""
    base = torch.tensor(RNG.normal(0, 3, (C, 64, C)), dtype=torch.float32)
    z = base[..., 0].t().requires_grad_()
    assert z.stride() == (C, 64 * C)
    check(torch, z, torch.arange(64) % C)
    assert len(calls) == 1


ELEMENTS = {  # of logits with the label axis second, and what they are made of
    "labels last": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "pixels": lambda x: x.view(3, -1, x.shape[1]).movedim(-1, 1).contiguous(),
    "channels last": lambda x: x.view(3, -1, x.shape[1]).movedim(-1, 1),
    "every second": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("labels", ["float", "bool", "int", "between"])
@pytest.mark.parametrize("L", [1, 3, 16, 70])
@pytest.mark.parametrize("layout", ELEMENTS)
def test_elements(torch, calls, layout, L, labels):
    """Of one label and of several, in any layout, with and without vectors for each and masks."""
    sigmoid_lmf_loss = load("lmf_multi.torch").sigmoid_lmf_loss
    generator = torch.Generator().manual_seed(0)
    x = ELEMENTS[layout](torch.randn(999, L, generator=generator) * 3).requires_grad_()
    t = torch.rand(x.shape, generator=generator)
    t = t if labels == "between" else (t < 0.3).to(getattr(torch, labels))
    of_each = torch.rand(L, 2, generator=generator) / 2
    masks = {"where": torch.rand(x.shape, generator=generator) < 0.8}
    if labels in ("float", "int"):
        t = t.where(torch.rand(x.shape, generator=generator) < 0.9, -100)
    smooth = masks | {"reduction": "none", "label_smoothing": 0.1}
    one = of_each[0]
    for vectors in ([of_each, of_each + 1], [one, of_each + 1], [of_each, one + 1], [one, None]):
        added = [{"logit_adjustment": added} for added in (of_each[0, 0] - 2, of_each[:, 1] - 3)]
        for options in ({}, smooth, added[0], smooth | added[1], added[1]):
            results = []
            for setting in (without_kernel(), contextlib.nullcontext()):
                with setting:
                    loss = sigmoid_lmf_loss(x, t, *vectors, **options)
                    (grad,) = torch.autograd.grad(loss.sum(), x)
                results += [loss, grad]
            for expected, actual in zip(results[:2], results[2:], strict=True):
                # of a label between, whose two gradients of up to 70 may cancel
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=3e-5)
    assert len(calls) == 20


def test_probabilities_out_of_range(torch, calls):
    """The kernel tells, and the operations say it."""
    loss = load("lmf_multi.torch").SigmoidLMFLoss(10, 90)
    t = torch.zeros(500)
    for t[400] in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 1\]"):
            loss(torch.zeros(500), t)
    t[400] = torch.nan
    assert loss(torch.zeros(500), t).isnan() and len(calls) == 3


def test_a_label_to_ignore_that_float32_has_not(torch, calls):
    """2^24 + 1, which would be the same as 2^24."""
    loss = load("lmf_multi.torch").SigmoidLMFLoss(10, 90, ignore_index=2**24 + 1)
    with pytest.raises(ValueError, match=r"got 1.67772e"):
        loss(torch.zeros(50), torch.full((50,), 2**24))
    assert loss(torch.zeros(50), torch.full((50,), 2**24 + 1)) == 0 and not calls


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["rows", "channels last", "every second row"])
def test_half_gradients_in_their_own_memory(torch, calls, layout, dtype):
    """The bits of ``to``, in two sizes of the logits; a graph that is kept keeps its gradient."""
    dtype, C = getattr(torch, dtype), 7
    z = LAYOUTS[layout](torch.randn(15_000, C)).to(dtype).requires_grad_()
    y = torch.randint(0, C, (z.shape[0], *z.shape[2:]))
    loss = load("lmf_multi.torch").LMFLoss(range(1, C + 1))(z, y)
    (kept,) = torch.autograd.grad(loss, z, torch.tensor(0.7), retain_graph=True)
    (grad,) = torch.autograd.grad(loss, z, torch.tensor(0.7))
    assert torch.equal(grad, kept) and grad.stride() == kept.stride()
    assert kept.untyped_storage().nbytes() == grad.untyped_storage().nbytes() / 2

    def run():
        torch.autograd.grad(load("lmf_multi.torch").LMFLoss(range(1, C + 1))(z, y), z)

    peak = load("examples.bench.torch").peak_memory(run, "cpu")
    assert peak <= 2.1 * z.numel() * z.itemsize
    assert len(calls) == 2


@pytest.mark.parametrize("generation", [0, 1])
def test_older_processors(torch, calls, generation):
    """The same code in the instructions of older ones; the newest this one has are tested above."""
    newest = ctypes.c_int.in_dll(_kernel.library(), "lmf_multi_generation")
    found = newest.value
    if generation >= found:
        pytest.skip("this processor has no newer instructions")
    newest.value = generation
    try:
        for layout in ("rows", "pixels"):
            for C in (7, 70):
                test_layouts(torch, calls, layout, C, "bfloat16" if C == 7 else "float32")
                calls.clear()
        test_hard_examples(torch, calls)
        calls.clear()
        test_elements(torch, calls, "labels last", 16, "between")
    finally:
        newest.value = found


@pytest.mark.parametrize("C", [5, 20_000])
def test_threads_change_no_bit(torch, calls, C):
    z = torch.randn(200_000 // C, C, requires_grad=True)
    y, threads, results = torch.randint(0, C, (len(z),)), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            loss = load("lmf_multi.torch").LMFLoss(range(1, C + 1))(z, y)
            results.append((loss.item(), torch.autograd.grad(loss, z)[0]))
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 3
    for value, grad in results[1:]:
        assert value == results[0][0]
        assert torch.equal(grad, results[0][1])


def worth_two_threads(torch):
    """Logits and labels."""
    z = torch.linspace(-3, 3, 400_000).reshape(-1, 5).requires_grad_()
    return z, torch.arange(len(z)) % 5


def value_and_grad(torch, z, y):
    loss = load("lmf_multi.torch").LMFLoss(range(1, 6))(z, y)
    return loss.item(), *torch.autograd.grad(loss, z)


def test_two_callers_at_once(torch, calls):
    batch = worth_two_threads(torch)
    value, grad = value_and_grad(torch, *batch)
    with ThreadPoolExecutor(2) as callers:
        others = [callers.submit(value_and_grad, torch, *batch) for _ in range(20)]
    assert len(calls) == 21
    for other in others:
        assert other.result()[0] == value
        assert torch.equal(other.result()[1], grad)


FORKED = """
import os, signal
import torch
from tests.kernels.test_cpu import value_and_grad, worth_two_threads

torch.set_num_threads(2)
batch = worth_two_threads(torch)
value, grad = value_and_grad(torch, *batch)
if child := os.fork():
    _, status = os.waitpid(child, 0)
    raise SystemExit(os.waitstatus_to_exitcode(status))
signal.alarm(60)  # it would wait for threads that it has not, as PyTorch's own operations do
value_of_child, grad_of_child = value_and_grad(torch, *batch)
os._exit(value_of_child != value or grad_of_child.numpy().tobytes() != grad.numpy().tobytes())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_calls_it_too(cpu):
    assert of_a_process(FORKED) == ""


def test_subnormal_numbers_are_flushed_inside_alone(torch, calls):
    """In the threads that worked, and in the one that called."""
    threads, tiny = torch.get_num_threads(), torch.full((100_000,), 1e-40)
    try:
        torch.set_num_threads(2)
        value_and_grad(torch, *worth_two_threads(torch))
        assert (tiny * 1 > 0).all()
    finally:
        torch.set_num_threads(threads)


WITHOUT_PYTORCH = """
import ctypes, sys
import numpy as np
from lmf_multi import _kernel

assert not hasattr(ctypes.CDLL(None), "GOMP_parallel")
N, C = 80_000, 5
z, y = np.linspace(-3, 3, N * C, dtype=np.float32), np.arange(N) % C
results = []
for threads in (1, 2, 3):
    grad = np.zeros_like(z)
    call = _kernel.LossCall(
        ctypes.sizeof(_kernel.LossCall), z=z.ctypes.data, y=y.ctypes.data,
        grad=grad.ctypes.data, N=N, C=C, inner=1, z_strides=(C, 0, 1), grad_strides=(C, 0, 1),
        ignore_index=-1, beta=1, gamma=2, scale=1, by_examples=1, threads=threads,
        total_weight=np.nan, total_examples=np.nan,
    )
    assert _kernel.library().lmf_multi_loss(call) == 0
    results.append((call.loss, grad.tobytes()))
assert results[0] == results[1] == results[2]
assert 1 < results[0][0] < 1.1 and grad.any()
"""


def test_threads_without_pytorchs(cpu):
    """Where PyTorch's are not libgomp's, or were left behind by a fork, the kernel starts some."""
    assert of_a_process(WITHOUT_PYTORCH) == ""


def of_a_process(code):
    """What it prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def test_masked_rows_may_hold_anything(torch, calls):
    z = torch.randn(40, 3)
    z[::2], y = torch.tensor([torch.nan, torch.inf, -torch.inf]), torch.zeros(40, dtype=torch.long)
    y[::2] = 7
    z.requires_grad_()
    options = {"ignore_index": 7, "reduction": "sum"}
    loss = load("lmf_multi.torch").lmf_loss(z, y, [0.1, 0.2, 0.5], **options)
    (grad,) = torch.autograd.grad(loss, z)
    assert calls and loss.isfinite()
    assert "Known" in loss.grad_fn.name()  # nothing was left to operations
    assert not grad[::2].any() and grad[1::2].all()


@pytest.mark.parametrize("bad", [-1, 3, 2**40, -(2**40)])
def test_labels_out_of_range(torch, calls, bad):
    z, y = torch.zeros(50, 3), torch.zeros(50, dtype=torch.long)
    y[40] = bad
    remedy = "mask examples without a class with ignore_index=-100, or pass "
    remedy += f"ignore_index={bad}" + (", or subtract 1 if labels begin at 1" if bad == 3 else "")
    with refuses(ValueError, f"labels must be in [0, 3), got {bad}; {remedy}"):
        load("lmf_multi.torch").lmf_loss(z, y, [0.1, 0.2, 0.5])
    assert calls


@pytest.mark.parametrize("rows", [4, 40_000])
@pytest.mark.parametrize("form", ["integer", "smoothed", "float64", "sigmoid"])
@pytest.mark.parametrize("which", ["input", "target", "margins", "class_weight", "where"])
def test_what_has_lost_its_memory_is_refused(torch, which, form, rows):
    """As cross-entropy does: to read it would end the process. A part of it is no more."""
    losses, dtype = load("lmf_multi.torch"), torch.float64 if form == "float64" else torch.float32
    y = torch.zeros(rows, dtype=torch.long)
    where = torch.ones(rows, dtype=torch.bool) if form == "sigmoid" else None
    for rest in (0, 1):
        arrays = {
            "input": torch.zeros(2 * rows, 3, dtype=dtype)[::2],
            "target": y.clone(),
            "margins": torch.tensor([0.1, 0.2, 0.5]),
            "class_weight": torch.ones(3),
        }
        function, options = losses.lmf_loss, {"label_smoothing": 0.1 if form == "smoothed" else 0.0}
        if form == "sigmoid":
            function = losses.sigmoid_lmf_loss
            arrays["input"], options = torch.zeros(rows), {}
            arrays |= {name: torch.ones(2) for name in ("margins", "class_weight")}
            arrays["where"] = where.clone()
        if which not in arrays:
            return
        x = arrays[which]
        size = rest * (x.untyped_storage().nbytes() - 2 * x.itemsize * max(x.stride()))
        x.untyped_storage().resize_(max(size, 0))
        with pytest.raises(RuntimeError, match=f"{which} must have memory for its shape"):
            function(**arrays, **options)


@pytest.mark.parametrize("shares", [(1.5, 1.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("kind", ["infinite", "nan"])
def test_what_is_not_finite_is_left_to_operations(torch, calls, kind, shares):
    """An impossible label of no weight counts for nothing; NaN spoils its own row alone."""
    options = {"reduction": "none", "alpha": shares[0], "beta": shares[1]}
    losses, z = load("lmf_multi.torch"), torch.tensor(RNG.normal(0, 1, (4, 3))).float()
    z[1, 0] = -torch.inf if kind == "infinite" else torch.nan
    z.requires_grad_()
    y, weights = torch.tensor([1, 0 if kind == "infinite" else 1, 2, 1]), [0.0, 1.0, 1.0]
    loss = losses.lmf_loss(z, y, [0.1, 0.2, 0.5], weights, **options)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert calls
    if kind == "infinite":
        assert loss[1] == 0 and loss.isfinite().all() and not grad[1].any()
    else:
        assert loss.isnan().tolist() == [False, True, False, False]
        assert grad.isnan().any(1).tolist() == [False, True, False, False]


def test_views_that_negate(torch, calls):
    """Such a view shares memory that holds the opposite numbers."""
    imaginary = torch.tensor(RNG.normal(0, 1, (4, 3)), dtype=torch.float32)
    conjugate = torch.complex(torch.zeros(4, 3), imaginary).conj()
    z, y = conjugate.imag, torch.tensor([0, 1, 2, 0])
    assert z.is_neg()
    loss = load("lmf_multi.torch").LMFLoss(COUNTS)
    torch.testing.assert_close(loss(z, y), loss(-imaginary, y), rtol=1e-5, atol=0)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_without_the_kernel(torch, monkeypatch, dtype):
    """Hard examples, masked ones with NaN among them."""
    monkeypatch.setenv("LMF_MULTI_CPU_KERNEL", "0")
    logits, labels = hard_examples(3)
    logits, where = rounded(logits, dtype), np.arange(len(labels)) % 5 > 0
    case = Case(logits, labels, COUNTS, WEIGHTS, dtype=dtype, reduction="none")
    case.check(TorchAdapter("eager")(case))
    logits = np.where(where[:, None], logits, np.nan)
    case = dataclasses.replace(case, logits=logits, where=where, reduction="mean")
    case.check(TorchAdapter("eager")(case))


def test_hard_examples(torch, calls):
    for C in (3, 100):
        logits, labels = hard_examples(C)
        case = Case(rounded(logits, "float32"), labels, tuple(range(1, C + 1)), dtype="float32")
        for term in ("lmf", "ldam", "focal"):
            for gamma in (0.0, 0.25, 1.5, 8.0) if term != "ldam" else (1.5,):
                numbers = {"gamma": gamma, "scale": 64.0}
                each = dataclasses.replace(case, term=term, reduction="none", **numbers)
                each.check(TorchAdapter("eager")(each))
    assert len(calls) == 18


def test_second_derivatives(torch, calls):
    z, y = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, 2, 2, 1, 0])
    loss = load("lmf_multi.torch").lmf_loss(z, y, [0.1, 0.2, 0.5], scale=2.0)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    direction = torch.randn(6, 3)
    (product,) = torch.autograd.grad((grad * direction).sum(), z)
    h, grads = 1e-6, []
    for sign in (1, -1):
        at = z.detach().double().numpy() + sign * h * direction.double().numpy()
        grads.append(
            reference.lmf_loss_and_grad(at, y.numpy(), np.array([0.1, 0.2, 0.5]), scale=2.0)[1]
        )
    assert calls
    expected = (grads[0] - grads[1]) / (2 * h)
    np.testing.assert_allclose(product.numpy(), expected, rtol=1e-4, atol=1e-6)


# --- compiled code, beside the suite's mode "operator"


@pytest.fixture
def operator(calls, monkeypatch):
    """One entry for each call of the kernel, which compiled code makes whatever the size."""
    monkeypatch.setenv("LMF_MULTI_CPU_KERNEL", "always")
    return calls


def compiled(torch, loss, **options):
    torch._dynamo.reset()
    return torch.compile(loss, fullgraph=True, **options)


def batch(torch, *shape):
    """Logits, labels, a seventh of which is ignored, and the loss."""
    z, y = torch.randn(shape), torch.randint(0, shape[1], (shape[0], *shape[2:]))
    y.view(-1)[::7] = -100
    return z.requires_grad_(), y, load("lmf_multi.torch").LMFLoss(range(1, shape[1] + 1))


@pytest.mark.parametrize("rows", [1170, 1171])
def test_compiled_batches_worth_a_call(torch, calls, rows):
    """From 2^13 logits on; the same bits as eagerly."""
    z, y, loss = batch(torch, rows, 7)
    value = compiled(torch, loss)(z, y)
    assert len(calls) == (rows == 1171)
    (grad,) = torch.autograd.grad(value, z)
    if calls:
        expected = loss(z, y)
        assert torch.equal(value, expected)
        assert torch.equal(grad, torch.autograd.grad(expected, z)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_layouts(torch, operator, layout):
    z = LAYOUTS[layout](torch.randn(48, 7)).detach().requires_grad_()
    y, upstream = torch.randint(0, 7, (z.shape[0], *z.shape[2:])), torch.rand(z.select(1, 0).shape)
    y[..., ::5] = -100
    for reduction in ("none", "mean"):
        loss = load("lmf_multi.torch").LMFLoss(range(1, 8), reduction=reduction)
        values = [f(z, y) for f in (loss, compiled(torch, loss))]
        (grad, of_compiled) = (
            torch.autograd.grad(v, z, upstream if v.dim() else None)[0] for v in values
        )
        assert torch.equal(*values) and torch.equal(grad, of_compiled)
        assert grad.stride() == of_compiled.stride()
    assert len(operator) == 4


def test_compiled_parts_of_a_batch(torch, operator, monkeypatch):
    """The means of a larger batch: its totals reach the kernel, and the operations without it."""
    z, y, loss = batch(torch, 30, 3)
    run, totals, expected = compiled(torch, loss), loss.normalizers(y), loss(z, y)
    parts = [(z.detach()[rows], y[rows]) for rows in (slice(0, 10), slice(10, 30))]
    value = sum(run(*part, normalizers=totals) for part in parts)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert len(operator) == 3
    monkeypatch.setenv("LMF_MULTI_CPU_KERNEL", "0")
    value = sum(run(*part, normalizers=totals) for part in parts)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert len(operator) == 3


def test_compiled_without_gradient(torch, operator, cpu):
    """None is computed."""
    z, y, loss = batch(torch, 30, 3)
    with torch.no_grad():
        assert torch.equal(compiled(torch, loss)(z, y), loss(z, y))
    assert len(operator) == 2
    arguments = (z, y, *[None] * 6, [0.0, 1.0, 1.5, 1.0, 0.0], 1, -100, "mean", False)
    assert cpu.operator(*arguments, True)[1].shape == z.shape
    assert cpu.operator(*arguments, False)[1].shape == (0,)


def test_compiled_for_any_number_of_rows(torch, operator):
    z, y, loss = batch(torch, 60, 3)
    counting = load("torch._dynamo.testing").CompileCounterWithBackend("inductor")
    run = compiled(torch, loss, dynamic=True, backend=counting)
    frames = []
    for rows in (60, 50, 7):
        some = z[:rows].detach().requires_grad_(), y[:rows].clone()
        assert torch.equal(run(*some), loss(*some))
        frames.append(counting.frame_count)
    assert len(set(frames)) == 1 and len(operator) == 6


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("bad", [3, -1, 2**40])
def test_compiled_labels_out_of_range_give_nan(torch, operator, reduction, bad):
    z, y, _ = batch(torch, 30, 3)
    y[1] = bad
    loss = load("lmf_multi.torch").LMFLoss(COUNTS, reduction=reduction)
    value = compiled(torch, loss)(z, y)
    (grad,) = torch.autograd.grad(value.sum(), z)
    spoilt = torch.arange(30) == 1
    assert torch.equal(value.isnan(), spoilt if reduction == "none" else torch.tensor(True))
    assert torch.equal(grad.isnan().all(1), spoilt if reduction != "mean" else spoilt | True)
    assert operator


@pytest.mark.parametrize("which", [0, 1])
def test_compiled_tensors_without_memory_are_refused(torch, operator, which):
    tensors = [torch.randn(30, 3), torch.randint(0, 3, (30,))]
    run = compiled(torch, load("lmf_multi.torch").LMFLoss(COUNTS))
    run(*tensors)
    tensors[which].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="must have memory for its shape"):
        run(*tensors)


def test_a_compiled_mask_without_memory_is_refused(torch, operator):
    """The sigmoid form's, which the kernel reads too."""
    x, t, where = torch.randn(30, 3), torch.rand(30, 3), torch.ones(30, 3, dtype=torch.bool)
    loss = load("lmf_multi.torch").SigmoidLMFLoss(10, 90)
    run = compiled(torch, lambda x, t, where: loss(x, t, where=where))
    run(x, t, where)
    assert operator
    where.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="where must have memory for its shape"):
        run(x, t, where)


# of opcheck's own copies
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_operator_keeps_pytorchs_rules(torch, cpu):
    """Schema, shapes and strides without numbers, autograd, dynamic shapes."""
    z, y, loss = batch(torch, 5, 3, 4)
    pair, totals = [loss.margins.float(), loss.class_weight.float()], [torch.tensor(2.0)] * 2
    vectors, plain = [*pair, loss.margins.float() - 2], [*pair, None]
    numbers, focal, others = [1.5, 1.0, 1.5, 30.0, 0.0], [0.0, 1.0, 1.5, 30.0, 0.0], (1, -100)
    strided = torch.randn(5, 4, 3).movedim(-1, 1)
    halved = strided.bfloat16().requires_grad_()
    of_labels = torch.tensor([[0.1, 0.5], [0.2, 0.3], [0.4, 0.1]])
    t, where, smoothed = torch.rand(5, 3, 4), torch.rand(5, 3, 4) > 0.2, [*numbers[:4], 0.1]
    added = torch.tensor([-1.0, 0.5, 0.0])
    softmax, sigmoid = False, True
    for arguments in (
        (z, y, None, *vectors, None, None, numbers, *others, "mean", softmax, True),
        (z.detach(), y, None, *plain, *totals, numbers, *others, "batch_mean", softmax, False),
        (strided.requires_grad_(), y.int(), *[None] * 6, focal, *others, "none", softmax, True),
        (halved, y, None, *vectors, None, None, numbers, *others, "none", softmax, True),
        (
            z,
            t,
            where,
            of_labels,
            of_labels,
            added,
            None,
            None,
            smoothed,
            *others,
            "mean",
            sigmoid,
            True,
        ),
        (halved, t > 0.5, *[None] * 6, focal, *others, "none", sigmoid, True),
    ):
        torch.library.opcheck(cpu.operator, arguments)


def test_compiled_second_derivatives(torch, operator):
    """By autograd in the traced graph; a compiled backward pass has none, and PyTorch says so."""
    z, y, loss = batch(torch, 12, 3)
    products = []
    for run in (loss, compiled(torch, loss, backend="eager")):
        (grad,) = torch.autograd.grad(run(z, y), z, create_graph=True)
        products += torch.autograd.grad(grad.square().sum(), z)
    assert products[0].any()
    torch.testing.assert_close(*products, rtol=1e-5, atol=0)
    assert len(operator) == 2


def test_transforms_in_compiled_code_take_operations(torch, operator):
    z, y, loss = batch(torch, 12, 3)
    z, y = z.detach(), y.clamp(min=0)
    expected = torch.func.grad(loss)(z, y)
    torch.testing.assert_close(compiled(torch, torch.func.grad(loss))(z, y), expected)
    of_rows = torch.func.vmap(loss)
    torch.testing.assert_close(compiled(torch, of_rows)(z, y), of_rows(z, y))
    assert not operator


@pytest.mark.parametrize("strict", [False, True])
def test_exported_code_needs_no_kernel(torch, operator, strict):
    z, y, loss = batch(torch, 12, 3)
    program = torch.export.export(loss, (z.detach(), y), strict=strict)
    assert "lmf_multi" not in str(program.graph)
    torch.testing.assert_close(program.module()(z.detach(), y), loss(z, y).detach())
