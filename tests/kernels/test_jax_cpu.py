"""The CPU kernel as XLA calls it, beside the suite of every backend, and where XLA does not."""

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lmf_multi import _kernel, log_priors, reference
from tests.adapters import Jax as JaxAdapter
from tests.cases import Case, masked_case, rounded
from tests.engines import without_kernel
from tests.frameworks import load, need_kernel
from tests.hard import hard_examples

RNG = np.random.default_rng(0)
COUNTS = (625, 16, 1)
CALL = "@lmf_multi_loss"  # in the text of a program


@pytest.fixture(scope="module")
def losses(jax):
    return load("lmf_multi.jax")


@pytest.fixture(autouse=True)
def cpu():
    """The module, or a skip where the kernel was not compiled or JAX cannot call it."""
    cpu = load("lmf_multi.jax._cpu")
    need_kernel(cpu.has_kernel(), "jax")
    return cpu


def batch(*shape, axis=-1, dtype="float32"):
    """Logits and labels."""
    z = np.moveaxis(RNG.normal(0, 3, shape), -1, axis)
    return load("jax").numpy.asarray(z, dtype), RNG.integers(0, shape[-1], shape[:-1])


def step(jax, loss):
    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5000, 7), -1),
        ((7000, 70), 0),
        ((45, 1000), -1),
        ((3, 30_011), -1),
        ((2, 90, 100, 5), 1),
        ((70, 3, 3, 40), 1),
        ((19, 4, 65), 0),
        ((40,), 0),
    ],
)
def test_sizes(jax, losses, shape, axis, dtype):
    """Tiles, vectors and threads that are busy and not; a fifth of the examples masked."""
    case = masked_case(RNG, shape, dtype=dtype, axis=axis)
    case.check(JaxAdapter("jit")(case))


@pytest.mark.parametrize("term", ["lmf", "ldam", "focal"])
@pytest.mark.parametrize("C", [3, 100])
def test_hard_examples(C, term):
    logits, labels = hard_examples(C)
    for gamma in (0.0, 0.25, 1.5, 8.0) if term != "ldam" else (1.5,):
        numbers = {"term": term, "gamma": gamma, "scale": 64.0, "reduction": "none"}
        logits = rounded(logits, "float32")
        for tau in (0.0, 1.5):
            options = numbers | {"logit_adjustment": tau}
            case = Case(logits, labels, tuple(range(1, C + 1)), dtype="float32", **options)
            case.check(JaxAdapter("jit")(case))


def test_programs_for_one_cpu_call_it(jax, losses):
    z, y = batch(6, 3)
    for tau in (0.0, 1.0):
        program = step(jax, losses.LMFLoss(COUNTS, logit_adjustment=tau)).lower(z, y)
        assert CALL in program.as_text()
    with without_kernel():
        assert CALL not in step(jax, losses.LMFLoss(COUNTS)).lower(z, y).as_text()
    with jax.enable_x64(True):
        text = step(jax, losses.LMFLoss(COUNTS)).lower(z.astype("float64"), y).as_text()
    assert CALL not in text


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(300, 14), (2, 14, 30, 5), (2, 1, 40, 40), (77,)], ids=str)
def test_the_sigmoid_form_calls_it(jax, losses, shape, tau):
    """With labels between 0 and 1 too, masks, and what is mapped over; as operations have it."""
    jnp, L = jax.numpy, shape[1] if len(shape) > 1 else 1
    x = jnp.asarray(RNG.normal(0, 3, shape), "float32")
    counts = (RNG.integers(1, 90, L), RNG.integers(90, 900, L)) if L > 1 else (10, 90)
    options = {"axis": min(1, len(shape) - 1), "reduction": "none", "logit_adjustment": tau}
    loss = losses.SigmoidLMFLoss(*counts, **options)
    where = jnp.asarray(RNG.random(shape) < 0.8)
    for t in (RNG.integers(0, 2, shape), jnp.asarray(RNG.random(shape), "float32")):

        def value(x, t=t):
            return loss(x, t, where=where)

        def each(x, value=value):
            loss, pull = jax.vjp(value, x)
            return loss, *pull(jnp.ones_like(loss))

        program = jax.jit(each)
        assert CALL in program.lower(x).as_text()
        actual = program(x)
        with without_kernel():
            expected = jax.jit(lambda x, each=each: each(x))(x)
        for one, other in zip(actual, expected, strict=True):
            # of labels in between, the negative's part cancels the positive's
            atol = 1e-6 * max(1.0, float(abs(other).max()))
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol)
        mapped = jax.jit(jax.vmap(each))
        assert CALL in mapped.lower(x[None]).as_text()
        for one, other in zip(mapped(jnp.stack([x, -x])), actual, strict=True):
            np.testing.assert_allclose(one[0], other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("vectors", [(2,), (4, 2)], ids=str)
@pytest.mark.parametrize("added", [(), (4,)], ids=str)
def test_an_adjustment_by_label_of_vectors_that_are_not(jax, losses, added, vectors):
    """And the other way round; the kernel takes all of them by label."""
    x, t = jax.numpy.asarray(RNG.normal(0, 3, (9, 4)), "float32"), RNG.integers(0, 2, (9, 4))
    margins, w = RNG.random((2, *vectors)).astype("float32") + 0.1
    numbers = {"logit_adjustment": jax.numpy.asarray(RNG.normal(0, 2, added), "float32")}

    def of(x):
        return losses.sigmoid_lmf_loss(x, t, margins, w, **numbers).sum()

    run = jax.jit(jax.value_and_grad(of))
    assert CALL in run.lower(x).as_text()
    value, grad = run(x)
    numbers = {name: np.asarray(number) for name, number in numbers.items()} | {"reduction": "sum"}
    exact = reference.sigmoid_lmf_loss_and_grad(np.asarray(x), t, margins, w, **numbers)
    np.testing.assert_allclose(value, exact[0], rtol=1e-5)
    np.testing.assert_allclose(grad, exact[1], rtol=1e-5, atol=1e-6)


def test_learned_probabilities(jax, losses):
    """Their gradient, which is not the logits', is that of the operations."""
    jnp, loss = jax.numpy, losses.SigmoidLMFLoss(10, 90)
    x, t = (jnp.asarray(RNG.random(50), "float32") for _ in range(2))
    of_labels = jax.grad(lambda x, t: loss(x, t), 1)
    actual = jax.jit(of_labels)(x, t)
    with without_kernel():
        expected = jax.jit(lambda x, t: of_labels(x, t))(x, t)
    assert actual.any()
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_no_gradient_is_computed_that_nobody_wants(jax, losses):
    z, y = batch(6, 3)
    call = next(
        line
        for line in jax.jit(losses.LMFLoss(COUNTS)).lower(z, y).as_text().splitlines()
        if CALL in line
    )
    assert "-> tensor<6xf32>" in call


def test_without_jit(jax, losses):
    z, y = batch(6, 3)
    run = jax.value_and_grad(losses.LMFLoss(COUNTS))
    expected = run(z, y)
    with jax.disable_jit():
        for actual, each in zip(run(z, y), expected, strict=True):
            np.testing.assert_array_equal(actual, each)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("bad", [-3, -1, 3, 2**31 - 1])
def test_labels_out_of_range_give_nan(jax, losses, bad, reduction):
    z, y = batch(40, 3)
    y[5] = bad
    where = np.arange(40) != 9
    loss = losses.LMFLoss(COUNTS, reduction=reduction)
    value, pull = jax.vjp(jax.jit(lambda z, y: loss(z, y, where=where)), z, y)
    grad, spoilt = pull(np.ones(value.shape, np.float32))[0], np.arange(40) == 5
    if reduction == "none":
        np.testing.assert_array_equal(np.isnan(value), spoilt)
        np.testing.assert_array_equal(np.isnan(grad).all(1), spoilt)
        assert value[9] == 0 and not grad[9].any()
    else:
        assert np.isnan(value) and np.isnan(grad).all()


def test_masked_rows_may_hold_anything(jax, losses):
    z, y = batch(40, 3)
    where, y[::2] = np.arange(40) % 2 > 0, 7
    z = z.at[::2].set(np.array([np.nan, np.inf, -np.inf]))
    value, grad = step(jax, lambda z: losses.LMFLoss(COUNTS)(z, y, where=where))(z)
    assert np.isfinite(value) and not grad[::2].any() and np.all(grad[1::2] != 0)


@pytest.mark.parametrize("shares", [(1.5, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_impossible_classes(jax, losses, shares):
    """A label of no weight may be impossible; NaN and a class that is certain spoil their rows."""
    z, y = np.zeros((4, 3), np.float32), np.array([1, 0, 1, 2])
    z[0, 0] = z[1, 0] = -np.inf
    z[2, 2], z[3, 0] = np.nan, np.inf
    numbers = {"alpha": shares[0], "beta": shares[1]}

    def of(z):
        return losses.lmf_loss(z, y, [0.1, 0.2, 0.5], [0.0, 1.0, 1.0], **numbers)

    value, pull = jax.vjp(jax.jit(of), z)
    (grad,) = pull(np.ones(4, np.float32))
    np.testing.assert_array_equal(np.isnan(value), [False, False, True, True])
    np.testing.assert_array_equal(np.isnan(grad).any(1), [False, False, True, True])
    assert value[1] == 0 and not grad[1].any() and value[0] > 0 and grad[0, 0] == 0


def test_mapped_axes_are_more_rows(jax, losses):
    """Whichever of logits and labels is mapped over, from any place, and twice."""
    z, y = batch(2, 5, 4, 3)
    loss = losses.LMFLoss(COUNTS, reduction="none", logit_adjustment=1.0)
    expected = loss(z, y)

    def check(f, *arguments):
        text = jax.jit(f).lower(*arguments).as_text()
        assert text.count(f"custom_call {CALL}") == 1
        return jax.jit(f)(*arguments)

    np.testing.assert_array_equal(check(jax.vmap(loss), z, y), expected)
    np.testing.assert_array_equal(check(jax.vmap(jax.vmap(loss)), z, y), expected)
    of_logits = check(jax.vmap(loss, (2, None)), z.swapaxes(0, 2), y[0].T)
    np.testing.assert_array_equal(of_logits[0], expected[0].T)
    of_labels = check(jax.vmap(loss, (None, 1)), z[0], y[0][:, None].repeat(2, 1))
    np.testing.assert_array_equal(of_labels[1], expected[0])
    grads = check(jax.vmap(jax.grad(lambda z, y: loss(z, y).sum())), z, y)
    np.testing.assert_array_equal(grads, jax.grad(lambda z: loss(z, y).sum())(z))


def test_numbers_that_are_mapped_over_take_operations(jax, losses):
    z, y = batch(6, 3)
    with without_kernel():
        expected = [losses.LMFLoss(COUNTS, gamma=gamma)(z, y) for gamma in (0.5, 2.0)]
    loss = losses.LMFLoss(COUNTS)
    values = jax.vmap(lambda gamma: loss.replace(gamma=gamma)(z, y))(np.array([0.5, 2.0]))
    assert expected[0] != expected[1]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    # so does what is added to the logits
    with without_kernel():
        expected = [losses.LMFLoss(COUNTS, logit_adjustment=tau)(z, y) for tau in (0.5, 2.0)]
    added = np.outer([0.5, 2.0], log_priors(COUNTS))
    values = jax.vmap(lambda added: loss.replace(logit_adjustment=added)(z, y))(added)
    assert expected[0] != expected[1]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    # as are the means of each part of a batch
    z, y = batch(2, 6, 3)
    with without_kernel():
        expected = jax.vmap(loss)(z, y)
    np.testing.assert_allclose(jax.vmap(loss)(z, y), expected, rtol=1e-6)


def test_derivatives_of_every_kind(jax, losses):
    """Hessians, forward mode, a learned number: what the operations give."""
    z, y = batch(4, 3)
    loss = losses.LMFLoss(COUNTS, scale=2.0, logit_adjustment=0.5)

    def learned(gamma, z):
        return loss.replace(gamma=gamma)(z, y)

    def of_added(added):
        return loss.replace(logit_adjustment=added)(z, y)

    def derivatives():
        yield jax.hessian(loss)(z, y)
        yield jax.jit(jax.hessian(loss))(z, y)
        yield jax.jit(jax.jacfwd(jax.checkpoint(loss)))(z, y)
        yield jax.jvp(lambda z: jax.grad(loss)(z, y), (z,), (z,))[1]
        yield jax.jit(jax.grad(learned))(1.5, z)
        yield jax.jit(jax.grad(of_added))(jax.numpy.asarray(loss.logit_adjustment))
        yield jax.jit(jax.grad(jax.grad(learned)))(1.5, z)
        yield jax.jit(jax.jacrev(jax.grad(learned), 1))(1.5, z)
        yield jax.jit(jax.grad(lambda z: jax.grad(loss)(z, y).max() * loss(z, y)))(z)

    actual = list(derivatives())
    with without_kernel():
        expected = list(derivatives())
    for one, other in zip(actual, expected, strict=True):
        largest = np.abs(other).max()
        assert largest > 0
        np.testing.assert_allclose(one / largest, other / largest, rtol=0, atol=1e-5)


def test_exported_programs_need_no_kernel(jax, losses):
    """They may run elsewhere; their number of rows may be unknown."""
    export = pytest.importorskip("jax.export")
    z, y = batch(6, 3)
    run = step(jax, losses.LMFLoss(COUNTS))
    exported = export.export(run)(z, y)
    assert CALL not in exported.mlir_module()
    value, grad = exported.call(z, y)
    expected = run(z, y)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-5, atol=1e-7)
    (n,) = export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((n, 3), "float32"), jax.ShapeDtypeStruct((n,), "int32")
    of_any = export.export(run)(*shapes)
    assert of_any.call(z, y.astype("int32"))[0] == value


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from lmf_multi.jax import LMFLoss

rng = np.random.default_rng(0)
z, y = rng.normal(0, 3, (8, 4)).astype("float32"), rng.integers(0, 4, 8)
loss = LMFLoss((40, 8, 3, 1), logit_adjustment=1.0)
run = jax.jit(jax.value_and_grad(loss))
value, grad = run(z, y)
assert "@lmf_multi_loss" in run.lower(z, y).as_text()

def check(name, run, *arguments):
    program = run.lower(*arguments)
    assert "@lmf_multi_loss" not in program.as_text(), name
    found = program.compile()(*arguments)
    np.testing.assert_allclose(found[0], value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(found[1], grad, rtol=1e-5, atol=1e-7, err_msg=name)

for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(kind,))
    for spec in (P("batch"), P()):
        some = jax.device_put((z, y), NamedSharding(mesh, spec))
        check(f"{kind} {spec}", run, *some)
        shardings = NamedSharding(mesh, spec)
        of_whole = jax.jit(jax.value_and_grad(loss), in_shardings=shardings)
        check(f"{kind} {spec}, whole", of_whole, z, y)
        with jax.set_mesh(mesh):
            check(f"{kind} {spec}, set", run, *some)
            check(f"{kind} {spec}, whole, set", run, z, y)
mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
each = LMFLoss((40, 8, 3, 1), reduction="none", logit_adjustment=1.0)
value, grad = each(z, y), jax.grad(lambda z: each(z, y).sum())(z)
specs = dict(mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
for checked in (True, False):
    def both(z, y):
        return each(z, y), jax.grad(lambda z: each(z, y).sum())(z)

    of_shards = jax.shard_map(both, check_vma=checked, **specs)
    check(f"shard_map {checked}", jax.jit(of_shards), z, y)
"""


def test_shards_take_operations():
    """Of several CPU devices, whatever tells XLA of them."""
    python({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, SHARDED)


BITS = """
import hashlib, jax, numpy as np
from lmf_multi.jax import LMFLoss

rng = np.random.default_rng(0)
for shape in ((30_000, 5), (12, 20_000)):
    z, y = rng.normal(0, 3, shape).astype("float32"), rng.integers(0, shape[1], shape[0])
    loss = LMFLoss(range(1, shape[1] + 1), reduction="none")
    value, pull = jax.vjp(jax.jit(loss), z, y)
    for _ in range(20):
        bits = np.asarray(value).tobytes(), np.asarray(pull(np.ones_like(value))[0]).tobytes()
        value, pull = jax.vjp(jax.jit(loss), z, y)
        print(*(hashlib.sha256(each).hexdigest() for each in bits))
"""


def test_threads_change_no_bit():
    """One thread waits for nobody; two and five share the work in any order."""
    every = [set(python({"NPROC": n}, BITS).split("\n")) for n in ("1", "2", "5")]
    assert len(every[0]) == 3  # of two shapes, and the empty last line
    assert every[1] == every[0] and every[2] == every[0]


def test_many_callers_at_once(jax, losses):
    z, y = batch(20_000, 7)
    run = step(jax, losses.LMFLoss(range(1, 8)))
    expected = run(z, y)
    with ThreadPoolExecutor(8) as pool:
        for value, grad in pool.map(lambda _: run(z, y), range(40)):
            assert value == expected[0]
            np.testing.assert_array_equal(grad, expected[1])


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_memory(jax, losses, tau):
    """None beside the gradient but some for each example."""
    z, y = batch(512, 1000)
    run = step(jax, losses.LMFLoss(range(1, 1001), logit_adjustment=tau))
    memory = run.lower(z, y).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.02 * z.nbytes


@pytest.mark.parametrize("reason", ["not compiled", "unknown to JAX"])
def test_absence_is_said_once(jax, losses, cpu, monkeypatch, caplog, reason):
    if reason == "not compiled":
        monkeypatch.setattr(_kernel, "_LIBRARY", Path("absent"))
    else:

        def refuse(*arguments, **options):
            raise RuntimeError("version 0.3 is not supported")

        monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    z, y = batch(6, 3)
    expected = losses.LMFLoss(COUNTS)(z, y)
    caches = (_kernel.opened, cpu._registers)
    try:
        for cache in caches:
            cache.cache_clear()
        with caplog.at_level(logging.DEBUG, logger="lmf_multi"):
            values = [losses.LMFLoss(COUNTS)(z, y) for _ in range(2)]
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()
    np.testing.assert_allclose(values, 2 * [expected], rtol=1e-6)
    (record,) = (record for record in caplog.records if record.name == "lmf_multi")
    assert record.levelno == logging.DEBUG
    said = "it was not compiled" if reason == "not compiled" else "version 0.3 is not supported"
    assert said in record.getMessage()


OURS_AND_XLAS = {
    "Extension": ("XLA_FFI_Extension_Base", "struct_size type next"),
    "Version": ("XLA_FFI_Api_Version", "struct_size major_version minor_version"),
    "Buffer": ("XLA_FFI_Buffer", "struct_size dtype data rank dims"),
    "Buffers": ("XLA_FFI_Args", "struct_size size types each=args"),
    "Attributes": ("XLA_FFI_Attrs", "struct_size size types names each=attrs"),
    "Scalar": ("XLA_FFI_Scalar", "dtype value"),
    "NewError": ("XLA_FFI_Error_Create_Args", "message code=errc"),
    "OldError": ("XLA_FFI_Error_Destroy_Args", "error"),
    "Task": ("XLA_FFI_ThreadPool_Schedule_Args", "context=ctx run=task data"),
    "Threads": ("XLA_FFI_ThreadPool_NumThreads_Args", "context=ctx number=num_threads"),
    "Text": ("XLA_FFI_ByteSpan", "data=ptr size=len"),
    "Registration": ("XLA_FFI_Handler_Register_Args", "name platform instantiate=bundle traits"),
    "Frame": (
        "XLA_FFI_CallFrame",
        "api context=ctx stage arguments=args results=rets attributes=attrs",
    ),
    "Metadata": ("XLA_FFI_Metadata", "struct_size version=api_version traits"),
    "MetadataExtension": ("XLA_FFI_Metadata_Extension", "base=extension_base metadata"),
    "Api": (
        "XLA_FFI_Api",
        "struct_size version=api_version create_error=XLA_FFI_Error_Create "
        "destroy_error=XLA_FFI_Error_Destroy register_handler=XLA_FFI_Handler_Register "
        "schedule=XLA_FFI_ThreadPool_Schedule number_of_threads=XLA_FFI_ThreadPool_NumThreads",
    ),
}
SIZED = ("Buffer", "Buffers", "Attributes", "Scalar", "NewError", "OldError", "Task", "Threads")


@pytest.mark.parametrize("C", [3, 100])
@pytest.mark.parametrize("label", [-1, 1000, 2**31 - 1])
def test_an_unknown_label_reads_and_writes_nothing_else(jax, cpu, C, label):
    """NaN in its row alone, whoever calls: JAX's losses hand down -1, and this is memory."""
    assert cpu.has_kernel()
    jnp, N = jax.numpy, 40
    y = jnp.full(N, 2, jnp.int32).at[7].set(label)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((N,), (N, C))]
    call = jax.ffi.ffi_call(CALL.removeprefix("@"), shapes)
    numbers = jnp.array([1.5, 30.0, 1.5, 1.0], jnp.float32)  # γ, s and what the terms count for
    terms = {"has_adjustment": True, "has_focal": True, "has_ldam": True, "is_sigmoid": False}
    terms = {name: np.bool_(value) for name, value in terms.items()}
    vectors = jnp.full(C, 0.1), jnp.full(C, -1.0)  # margins, and what is added to the logits
    loss, grad = call(jnp.ones((N, C)), y, numbers, *vectors, **terms)
    np.testing.assert_array_equal(np.isnan(loss), np.arange(N) == 7)
    assert np.isfinite(np.delete(grad, 7, axis=0)).all()


def test_declarations_are_xlas(jax, tmp_path):
    """Every field that is used lies where XLA's own header puts it."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    lines = ['#include "xla.h"', '#include "xla/ffi/api/c_api.h"']
    for ours, (theirs, fields) in OURS_AND_XLAS.items():
        for field in fields.split():
            our, _, their = field.partition("=")
            offsets = f"offsetof(xla::{ours}, {our}) == offsetof({theirs}, {their or our})"
            lines.append(f'static_assert({offsets}, "{ours}.{our}");')
    lines += [
        f'static_assert(sizeof(xla::{ours}) == sizeof({OURS_AND_XLAS[ours][0]}), "{ours}");'
        for ours in SIZED
    ]
    constants = {
        "METADATA": "XLA_FFI_Extension_Metadata",
        "EXECUTE": "XLA_FFI_ExecutionStage_EXECUTE",
        "RESOURCE_EXHAUSTED": "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED",
        "F16": "XLA_FFI_DataType_F16",
        "BF16": "XLA_FFI_DataType_BF16",
        "MAJOR": "XLA_FFI_API_MAJOR",
    }
    lines += [
        f'static_assert(xla::{ours} == (int){theirs}, "{ours}");'
        for ours, theirs in constants.items()
    ]
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines) + "\n")
    folders = Path(_kernel.__file__).parent, jax.ffi.include_dir()
    command = [compiler, "-fsyntax-only", *(f"-I{folder}" for folder in folders), str(source)]
    subprocess.run(command, check=True)


def python(environment, code):
    """What code prints in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
