"""PyTorch's Triton kernel, beside the suite of every backend: compiled code, layouts, long rows."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from lmf_multi import reference
from tests.adapters import Triton, torch_batch
from tests.cases import Case
from tests.checks import refuses
from tests.frameworks import load
from tests.hard import hard_examples

RNG = np.random.default_rng(0)
COUNTS, WEIGHTS = (625, 16, 1), np.array([0.5, 1.0, 3.0])
NUMBERS = {"alpha": 1.5, "beta": 1.0, "gamma": 1.5, "scale": 30.0, "label_smoothing": 0.0}


@pytest.fixture(scope="module")
def backend():
    adapter = Triton("triton")
    adapter.losses  # noqa: B018  imports what it needs, or skips
    return adapter


@pytest.fixture
def fused(backend):
    """The kernel, and tensors on the GPU if there is one."""
    torch = load("torch")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with np.errstate(all="ignore"), device:
        yield load("lmf_multi.torch._triton")


def arrays(C):
    """Margins and class weights, as modules keep them."""
    torch = load("torch")
    return torch.linspace(0.1, 0.5, C).double(), torch.linspace(0.5, 2.0, C).double()


def batch_of(y, Δ=None, w=None, o=None, *, ignore_index=-100, totals=None, **options):
    numbers = [options.pop(name, default) for name, default in NUMBERS.items()]
    axis, reduction = options.pop("axis", 1), options.pop("reduction", "mean")
    assert not options
    ignored = None if y.is_floating_point() else ignore_index
    return torch_batch(y, Δ, w, o, numbers, (axis, None, ignored, "", reduction, totals))


def plain_loss(z, batch):
    each = load("lmf_multi.torch._mixture").by_operations(z, batch)
    return each if batch.options.reduction == "none" else each.sum()


def check(fused, z, y, axis=1, **options):
    """Value and gradient of the kernel against the closed form in float64."""
    torch = load("torch")
    z, vectors = z.detach().requires_grad_(), arrays(z.shape[axis])
    batch = batch_of(y, *vectors, axis=axis, **options)
    assert fused.supports(z, batch)
    value = fused.fused_loss(z, batch)
    upstream = torch.linspace(0.5, 2.0, value.numel()).view(value.shape)
    (grad,) = torch.autograd.grad(value, z, upstream.to(value.dtype))

    exact = z.detach().double().contiguous().requires_grad_()
    labels = y.double() if y.is_floating_point() else y.long()
    expected = plain_loss(exact, batch_of(labels, *vectors, axis=axis, **options))
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    size = expected_grad.abs().amax(axis, keepdim=True)
    assert ((grad.double() - expected_grad).abs() <= 1e-5 * size).all()
    assert expected_grad.abs().max() > 0
    assert grad.stride() == torch.empty_like(z).stride()


def ahead_of_time(capability, tmp_path):
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.ahead_of_time", str(capability)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(capability, tmp_path):
    """Every path through the kernel's flags, by the compiler and NVIDIA's assembler."""
    load("triton")
    kernels = ahead_of_time(capability, tmp_path)
    passes = [kernel["kernel"] for kernel in kernels]
    assert min(passes.count("forward"), passes.count("backward")) > 30 and "finish" in passes
    for kernel in kernels:
        if kernel["shape"] not in ("in blocks", "most of all"):
            assert kernel["spilt"] == kernel["stack"] == 0, kernel

    # 32 elements for each thread, loaded once in either pass, 16 bytes at a time, or where threads
    # have 4 rows each 8 of bfloat16; and once more the labelled element of each row
    for shape, dtype, count, vector, rows in (
        ("wide", "float32", 8, "v4.b32", 1),
        ("wide", "bfloat16", 4, "v4.b32", 1),
        ("pixels", "float32", 8, "v4.b32", 4),
        ("pixels", "bfloat16", 8, "v2.b32", 4),
    ):
        call = {"shape": shape, "dtype": dtype}
        forward, backward = (
            next(kernel for kernel in kernels if kernel.items() >= (call | each).items())
            for each in ({"kernel": "forward"}, {"kernel": "backward"})
        )
        assert forward["loads"].count(f"ld.global.{vector}") == count
        assert backward["loads"].count(f"ld.global.{vector}") == count
        assert backward["stores"] == count * [f"st.global.{vector}"]
        element = {"float32": "b32", "bfloat16": "b16"}[dtype]
        assert forward["loads"].count(f"ld.global.{element}") == rows


LAYOUTS = {
    "pixels": lambda z: z,
    "channels last": lambda z: z.contiguous(memory_format=load("torch").channels_last),
    "classes first": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "part of the classes": lambda z: load("torch").cat([z, z], 1)[:, : z.shape[1]],
    "part of the rows": lambda z: load("torch").cat([z, z], 2)[:, :, : z.shape[2]],
    "every other image": lambda z: load("torch").cat([z, z], 1).view(4, *z.shape[1:])[::2],
    "one image for all": lambda z: z[:1].expand(z.shape),
}


@pytest.mark.parametrize("soft", [False, True], ids=["integer", "soft"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(fused, name, soft):
    torch = load("torch")
    z = LAYOUTS[name](torch.tensor(RNG.normal(0, 3, (2, 5, 6, 7)), dtype=torch.float32))
    y = torch.tensor(RNG.integers(0, 5, (2, 6, 7)))
    y[0, 1, 2:5] = -100
    if soft:
        y = torch.tensor(RNG.dirichlet([0.5] * 5, (2, 6, 7)), dtype=torch.float32).movedim(-1, 1)
    for reduction in ("mean", "none"):
        check(fused, z, y, reduction=reduction)


def test_labels_of_other_dtypes_and_strides(fused):
    torch = load("torch")
    z = torch.tensor(RNG.normal(0, 3, (4, 3, 5)), dtype=torch.float32)
    y = torch.tensor(RNG.integers(0, 3, (5, 4)))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        check(fused, z, y.to(dtype).T, reduction="none")
    check(fused, z[0], y[:, 0] % 3, axis=0)
    check(fused, z[0, :, 0], y[0, 0], axis=0)


def test_no_array_of_the_logits_size_but_the_gradient(fused):
    torch = load("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result, name = operation(*args, **(kwargs or {})), operation.overloadpacket.__name__
            if (
                isinstance(result, torch.Tensor)
                and result.numel() >= 60
                and not result.is_meta  # which has no memory
                and name not in ("set_", "copy_")  # the interpreter's ways with memory
            ):
                seen.append(name)
            return result

    z = torch.tensor(RNG.normal(0, 3, (60, 7)), dtype=torch.float32, requires_grad=True)
    y, (Δ, w) = torch.tensor(RNG.integers(0, 7, 60)), arrays(7)
    with Record():
        loss = fused.fused_loss(z, batch_of(y, Δ, w))
        assert not seen
        torch.autograd.grad(loss, z)
        assert seen == ["empty_like"]
        loss = fused.fused_loss(z, batch_of(y, Δ, w, reduction="none"))
        torch.autograd.grad(loss.sum(), z)
    # the losses of the rows, sum()'s gradient without memory of its own, the logits' gradient
    assert seen[1:] == ["new_empty", "expand", "empty_like"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_long_rows(backend, dtype):
    """More classes than a program holds at once, as hard as they come."""
    logits, labels = hard_examples(17000)
    rows = np.r_[:8, 20:24, 48:52]  # easy, hard, impossible
    case = Case(
        logits[rows], labels[rows], tuple(range(17000, 0, -1)), "complement", reduction="mean"
    )
    case = replace(case, dtype=dtype, logits=case.logits.astype(np.float32).astype(np.float64))
    if dtype != "bfloat16":
        case.check(backend(case))
        return
    logits = load("torch").tensor(case.logits).bfloat16().double().numpy()
    case = replace(case, dtype=dtype, logits=logits)
    case.check(backend(case))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 5.0])
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_blocks_of_a_row(backend, monkeypatch, scale, gamma, dtype):
    """The hard examples in blocks of two classes."""
    launch = load("lmf_multi.torch._triton_launch")
    monkeypatch.setattr(launch, "LONGEST_ROW", 0)
    monkeypatch.setattr(launch, "_BLOCK", 2)
    launch._plan.cache_clear()
    logits, labels = hard_examples()
    where = np.arange(len(labels)) % 5 != 3
    case = Case(logits, np.where(where, labels, -1), COUNTS, WEIGHTS, where=where)
    case = replace(case, gamma=gamma, scale=scale, dtype=dtype)
    for reduction in ("none", "mean"):
        case = replace(case, reduction=reduction)
        case.check(backend(case))
    case = replace(case, where=None, labels=labels, reduction="none")
    result = backend(replace(case, labels=np.where(where, labels, 3)))
    np.testing.assert_array_equal(np.isnan(result.value), ~where)
    np.testing.assert_array_equal(np.isnan(result.grad).all(1), ~where)
    logits = np.where(np.arange(3) == 1, np.nan, logits)
    result = backend(replace(case, logits=logits))
    assert np.isnan(result.value).all() and np.isnan(result.grad).all()


def test_many_programs(fused, monkeypatch):
    """More sums than one program adds at a time, and more than it adds at all."""
    torch, launch = load("torch"), load("lmf_multi.torch._triton_launch")
    monkeypatch.setattr(launch, "_TILE", 1)  # a program a row
    monkeypatch.setattr(launch, "_FINISH", 4)
    monkeypatch.setattr(launch, "_FINISH_FEW", 2)
    launch._plan.cache_clear()
    z = torch.tensor(RNG.normal(0, 3, (66, 3)), dtype=torch.float32)
    y = torch.tensor(RNG.integers(0, 3, 66))
    for N in (4, 7, 66):
        check(fused, z[:N], y[:N])


@pytest.mark.parametrize("soft", [False, True], ids=["integer", "soft"])
def test_operations_take_the_kernels_vectors(fused, soft):
    """Margins, weights and adjustments in float64, beside float32 logits, whose dtype counts."""
    torch, by_operations = load("torch"), load("lmf_multi.torch._mixture").by_operations
    z = torch.tensor(RNG.normal(0, 3, (8, 3)), dtype=torch.float32)
    y = torch.tensor(np.eye(3)[RNG.integers(0, 3, 8)]) if soft else torch.arange(8) % 3
    vectors = (*arrays(3), torch.linspace(-1, 1, 3).double())
    wide, narrow = (
        by_operations(z, batch_of(y, *given)) for given in (vectors, [v.float() for v in vectors])
    )
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, narrow, rtol=0, atol=0)


def test_totals_replace_those_of_the_batch(fused):
    torch = load("torch")
    z, y = torch.tensor(RNG.normal(0, 3, (8, 3))), torch.tensor([0, 1, 2, -100, 1, 2, 0, 0])
    Δ, w = arrays(3)
    totals = w[y[y >= 0]].sum().float(), torch.ones(7)  # of any dtype, and summed if not yet
    for reduction in ("mean", "batch_mean"):
        whole = plain_loss(z, batch_of(y, Δ, w, reduction=reduction))
        parts = [
            fused.fused_loss(z[i], batch_of(y[i], Δ, w, reduction=reduction, totals=totals))
            for i in (slice(3), slice(3, 8))
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)


FORMS = {
    "integer": {},
    "smoothed": {"label_smoothing": 0.1},
    "soft": {"soft": True},
    "mean": {"reduction": "mean"},
}


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(fused, form):
    torch = load("torch")
    options = {"reduction": "none", **FORMS[form]}
    y = torch.tensor([0, 2, -100, 1])
    if options.pop("soft", False):
        y = torch.tensor(RNG.dirichlet([1.0] * 3, 4))
    batch = batch_of(y, *arrays(3), scale=3.0, **options)

    def loss(z):
        return fused.fused_loss(z, batch)

    z = torch.tensor(RNG.normal(0, 1, (4, 3)), requires_grad=True)
    v = torch.linspace(0.5, 2.0, loss(z).numel()).double().view(loss(z).shape)
    (of_plain,) = torch.autograd.grad(loss(z), z, v, create_graph=True)
    (of_kernel,) = torch.autograd.grad(loss(z), z, v)
    torch.testing.assert_close(of_plain, of_kernel, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(loss, z)
    assert torch.autograd.gradgradcheck(loss, z)


# PyTorch's own, when it loads its rules for forward mode
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_what_the_kernel_leaves_to_the_plain_path(fused):
    torch = load("torch")
    z, y = torch.zeros(4, 3, 2, 2), torch.zeros(4, 2, 2, dtype=torch.int64)

    def supports(z, y, **options):
        return fused.supports(z, batch_of(y, **options))

    assert supports(z, y)
    assert not supports(z.expand(4, 3, 2, 2).permute(3, 1, 0, 2), y)  # three axes of rows
    assert not supports(z.to(torch.float8_e4m3fn), y)
    assert not supports(z, y.to("meta"))
    for dtype, most in ((torch.float32, 4096), (torch.float64, 2048)):
        row = torch.zeros(1, most + 1, dtype=dtype)
        assert supports(row, torch.zeros(1, dtype=torch.int64))
        assert not supports(row, torch.zeros(1, dtype=torch.int64), label_smoothing=0.1)
        assert not supports(row, row)
        assert supports(row[:, :most], row[:, :most])
    q = torch.full_like(z, 1 / 3)
    assert supports(z, q)
    assert not supports(z, q.requires_grad_())
    assert supports(torch.empty(2, 0, 0, 0), torch.empty(0, 0, 0, dtype=torch.int64), axis=0)
    huge = torch.empty(1, device="meta").expand(2**31, 3)
    assert not supports(huge, torch.empty(2**31, dtype=torch.int64, device="meta"))


def test_absent_triton_is_said_once(monkeypatch, caplog):
    load("torch")
    fused = load("lmf_multi.torch._triton")
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    fused.available.cache_clear()
    try:
        with caplog.at_level(logging.DEBUG, logger="lmf_multi"):
            assert not fused.available() and not fused.available()
    finally:
        fused.available.cache_clear()
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG and "Triton is not installed" in record.message


@pytest.mark.parametrize("soft", [False, True], ids=["integer", "soft"])
def test_losses_take_the_kernel_on_a_gpu(fused, monkeypatch, soft):
    """Modules and functions dispatch to it, by CPU tensors where there is no GPU."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    functional = load("lmf_multi.torch._functional")
    device, calls, kernel = "cuda", [], functional.fused_loss
    if not torch.cuda.is_available():
        device = "cpu"
        monkeypatch.setenv("LMF_MULTI_TRITON", "always")
    monkeypatch.setattr(
        functional, "fused_loss", lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )
    logits, labels = RNG.normal(0, 2, (40, 3)), RNG.integers(0, 3, 40)
    where = np.arange(40) % 5 > 0
    if soft:
        y, where = torch.tensor(np.eye(3)[labels], device=device), None
    else:
        y = torch.tensor(np.where(where, labels, -100), device=device)
    z = torch.tensor(logits, device=device, requires_grad=True)
    loss = losses.LMFLoss(COUNTS, class_weight=WEIGHTS).to(device)
    (grad,) = torch.autograd.grad(loss(z, y), z, create_graph=True)
    exact = reference.LMFLoss(COUNTS, class_weight=WEIGHTS)
    value, expected = reference.lmf_loss_and_grad(
        logits, labels, exact.margins, exact.class_weight, where=where
    )
    np.testing.assert_allclose(loss(z, y).item(), value, rtol=1e-12)
    np.testing.assert_allclose(grad.detach().cpu().numpy(), expected, rtol=1e-9, atol=1e-14)
    (second,) = torch.autograd.grad(grad.square().sum(), z)
    assert second.abs().max() > 0
    assert len(calls) == 2
    torch.func.grad(lambda z: loss(z, y))(z.detach())  # traced: the plain path
    assert len(calls) == 2
    monkeypatch.setenv("LMF_MULTI_TRITON", "0")
    np.testing.assert_allclose(loss(z, y).item(), value, rtol=1e-12)
    assert len(calls) == 2


def test_what_the_switch_cannot_be(monkeypatch):
    """In float64, which the CPU kernel does not take."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    monkeypatch.setenv("LMF_MULTI_TRITON", "off")
    sentence = "LMF_MULTI_TRITON must be 0, 1 or always, got 'off'; 0 turns the Triton kernel off"
    with refuses(ValueError, sentence):
        losses.lmf_loss(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1]), [0.1] * 3)
