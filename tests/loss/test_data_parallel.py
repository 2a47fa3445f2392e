"""The whole batch's mean where processes, devices, replicas or micro-batches share it.

Each test trains a linear model one step on shards of unequal size (where the framework allows it)
and unequal class mixes, and asks for the loss and the gradient of one process with everything.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmf_multi import reference
from tests.checks import refuses
from tests.frameworks import KERAS_BACKEND, load

ROOT = Path(__file__).parents[2]
COUNTS = (625, 16, 1)
RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (16, 5))
# the first half holds one class, and two examples without any
Y = np.array([0, 0, 0, 0, -100, 0, 0, -100, 2, 1, 2, 1, 0, 2, 2, 1])
KERNEL = RNG.normal(0, 0.3, (5, 3))
REDUCTIONS = ("mean", "batch_mean", "sum")


def whole_batch(reduction, x=X, y=Y, **options):
    """Loss and kernel gradient of one process with the whole batch."""
    spec = reference.LMFLoss(COUNTS, **options)
    value, grad = reference.lmf_loss_and_grad(
        x @ KERNEL, y, spec.margins, spec.class_weight, where=y >= 0, reduction=reduction
    )
    return value, x.T @ grad


def of_another_process(code, **environment):
    """What a process of its own prints last, as JSON."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- PyTorch

TWO_PROCESSES = """
import json, sys
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from lmf_multi.torch import LMFLoss
from tests.loss.test_data_parallel import COUNTS, KERNEL, REDUCTIONS, X, Y


def run(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    every = {}
    for first in (8, 3, 16):  # even shards, an uneven last batch, a process without examples
        mine = slice(0, first) if rank == 0 else slice(first, None)
        x, y = torch.tensor(X)[mine], torch.tensor(Y)[mine]
        for compiled in (False, True):
            for reduction in REDUCTIONS:
                group = "world" if first == 8 else torch.distributed.group.WORLD
                criterion = LMFLoss(COUNTS, reduction=reduction, process_group=group)
                linear = torch.nn.Linear(5, 3, bias=False, dtype=torch.float64)
                linear.weight.data = torch.tensor(KERNEL.T.copy())
                model = DistributedDataParallel(linear)
                if compiled and first == 8:
                    criterion = torch.compile(criterion, backend="aot_eager", fullgraph=True)
                loss = criterion(model(x), y)
                loss.backward()
                mean = loss.detach().clone()
                torch.distributed.all_reduce(mean)
                result = [float(mean) / 2, linear.weight.grad.T.tolist()]
                every[f"{first} {compiled} {reduction}"] = result
    if rank == 0:
        Path(folder, "results").write_text(json.dumps(every))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""
BOTH_PROCESSES = """

if __name__ == "__main__":
    processes = torch.multiprocessing.get_context("fork")
    both = [processes.Process(target=run, args=(rank, sys.argv[1])) for rank in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(300)  # an error in one leaves the other waiting
        assert each.exitcode == 0
    print(Path(sys.argv[1], "results").read_text())
"""


def of_two_processes(code, folder):
    """What the first of two that call ``run`` writes to ``results``."""
    return of_another_process((code + BOTH_PROCESSES).replace("sys.argv[1]", repr(str(folder))))


def test_torch_ddp(tmp_path):
    load("torch")
    results = of_two_processes(TWO_PROCESSES, tmp_path)
    assert len(results) == 18
    for name, (value, grad) in results.items():
        expected = whole_batch(name.split()[-1])
        np.testing.assert_allclose(value, expected[0], rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(grad, expected[1], rtol=1e-10, atol=1e-13, err_msg=name)


PIXELS = RNG.normal(0, 1, (7, 3, 2))
PIXEL_LABELS = RNG.integers(-1, 3, (7, 2))
PIXEL_SHARES = RNG.dirichlet([1, 1, 1], (7, 2)).transpose(0, 2, 1)
ELEMENTS, ELEMENT_MASK = RNG.integers(0, 2, (7, 3, 2)), RNG.random((7, 3, 2)) < 0.7
FIGURES = {"gamma": 0.5, "scale": 2.0}

OF_ONE_TENSOR = """
import json, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.device_mesh import init_device_mesh
from lmf_multi.torch import LMFLoss, SigmoidLMFLoss
from tests.checks import refuses
from tests.loss.test_data_parallel import (
    COUNTS, ELEMENT_MASK, ELEMENTS, FIGURES, PIXEL_LABELS, PIXEL_SHARES, PIXELS
)


def run(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    mesh, every = init_device_mesh("cpu", (2,)), {}
    placements = {"plain": None, "S0": Shard(0), "S1": Shard(1), "S2": Shard(2), "R": Replicate()}

    def placed(array, name):
        x = torch.tensor(array)
        return x if name == "plain" else distribute_tensor(x, mesh, [placements[name]])

    def record(name, loss, z, *labels, **masks):
        z.requires_grad_()
        value = loss(z, *labels, **masks)
        (grad,) = torch.autograd.grad(value.sum(), z, create_graph=True)
        (second,) = torch.autograd.grad((grad * grad).sum(), z)
        assert second.placements == grad.placements
        if not any(p.is_partial() for p in z.placements):
            assert grad.placements == z.placements, name
        every[name] = [x.full_tensor().tolist() for x in (value, grad, second)]

    for of_logits in ("S0", "S1", "S2", "R"):
        for of_labels in ("plain", "S0", "S1", "R"):
            for reduction in ("mean", "batch_mean", "sum", "none"):
                loss = LMFLoss(COUNTS, **FIGURES, ignore_index=-1, reduction=reduction)
                z, y = placed(PIXELS, of_logits), placed(PIXEL_LABELS, of_labels)
                record(f"integer {reduction} {of_logits} {of_labels}", loss, z, y)
            loss = LMFLoss(COUNTS, **FIGURES, label_smoothing=0.1)
            y = placed(PIXEL_SHARES, of_labels)
            record(f"soft mean {of_logits} {of_labels}", loss, placed(PIXELS, of_logits), y)
            for counts in ((3, 9), ([3, 1, 9], [9, 5, 3])):
                loss = SigmoidLMFLoss(*counts, **FIGURES)
                t, where = placed(ELEMENTS, of_labels), placed(ELEMENT_MASK, "S0")
                name = f"sigmoid mean {of_logits} {of_labels} {len(repr(counts)) > 6}"
                record(name, loss, placed(PIXELS, of_logits), t, where=where)
    loss = LMFLoss(COUNTS, **FIGURES, ignore_index=-1)
    halves = DTensor.from_local(torch.tensor(PIXELS) / 2, mesh, [Partial()])
    record("integer mean halves", loss, halves, placed(PIXEL_LABELS, "S0"))
    z, y = placed(PIXELS, "S0"), placed(PIXEL_LABELS, "S0")
    totals = loss.normalizers(y)
    record("integer mean totals", lambda z, y: loss(z, y, normalizers=totals), z, y)

    z.requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager")(z, y)
    (grad,) = torch.autograd.grad(compiled, z)
    every["integer mean compiled"] = [compiled.full_tensor().tolist(), grad.full_tensor().tolist()]

    with refuses(
        TypeError,
        "target must be a plain tensor, as input is one, got a DTensor; "
        "pass target.full_tensor(), or its to_local()"
    ):
        loss(torch.tensor(PIXELS), y)
    own = y.to_local()
    with refuses(
        ValueError,
        "target must be a DTensor, as input is one, or hold all 7 examples, "
        f"got {len(own)}; wrap each process's own with DTensor.from_local"
    ):
        loss(z, own)
    if rank == 0:
        Path(folder, "results").write_text(json.dumps(every))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def test_torch_sharded_logits(tmp_path):
    """DTensors, as tensor parallelism makes them: sharded over examples, classes or pixels."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    results = of_two_processes(OF_ONE_TENSOR, tmp_path)
    assert len(results) == 4 * 4 * 7 + 3
    for name, (value, grad, *second) in results.items():
        form, reduction, *_ = name.split()
        options = FIGURES | {"axis": 1, "reduction": reduction}
        if form == "sigmoid":
            counts = ([3, 1, 9], [9, 5, 3]) if name.endswith("True") else (3, 9)
            exact, labels = reference.SigmoidLMFLoss(*counts, **options), ELEMENTS
            function, options["where"] = reference.sigmoid_lmf_loss_and_grad, ELEMENT_MASK
            one = losses.SigmoidLMFLoss(*counts, **FIGURES)
            arguments = torch.tensor(labels), {"where": torch.tensor(ELEMENT_MASK)}
        else:
            options["label_smoothing"] = 0.1 if form == "soft" else 0.0
            exact, function = reference.LMFLoss(COUNTS), reference.lmf_loss_and_grad
            labels = PIXEL_SHARES if form == "soft" else PIXEL_LABELS
            options["where"] = None if form == "soft" else PIXEL_LABELS >= 0
            smoothing = {"label_smoothing": options["label_smoothing"], "reduction": reduction}
            one = losses.LMFLoss(COUNTS, **FIGURES, **smoothing, ignore_index=-1)
            arguments = torch.tensor(labels), {}
        expected = function(PIXELS, labels, exact.margins, exact.class_weight, **options)
        np.testing.assert_allclose(value, expected[0], rtol=1e-12, atol=1e-14, err_msg=name)
        np.testing.assert_allclose(grad, expected[1], rtol=1e-10, atol=1e-13, err_msg=name)
        if second:  # of one process
            z = torch.tensor(PIXELS, requires_grad=True)
            loss = one(z, arguments[0], **arguments[1]).sum()
            (grad,) = torch.autograd.grad(loss, z, create_graph=True)
            (expected,) = torch.autograd.grad((grad * grad).sum(), z)
            np.testing.assert_allclose(second[0], expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_a_mean_of_shard_means_is_another_number():
    """What the losses without these options compute, and why they have them."""
    shards = [whole_batch("mean", X[part], Y[part])[1] for part in (slice(0, 8), slice(8, 16))]
    exact = whole_batch("mean")[1]
    assert np.abs(np.mean(shards, 0) - exact).max() > 0.1 * np.abs(exact).max()


def test_torch_process_group_is_checked():
    torch, losses = load("torch"), load("lmf_multi.torch")
    sentence = (
        "process_group needs a reduction over the batch, got reduction 'none'; "
        "use 'mean', 'batch_mean' or 'sum'"
    )
    with refuses(ValueError, sentence):
        losses.LMFLoss(COUNTS, reduction="none", process_group="world")
    with refuses(TypeError, "process_group must be a ProcessGroup, \"world\" or None, got 'all'"):
        losses.LMFLoss(COUNTS, process_group="all")
    one = losses.LMFLoss(COUNTS, process_group="world")  # nothing is initialised: one process
    value = one(torch.tensor(X @ KERNEL), torch.tensor(Y))
    np.testing.assert_allclose(value.numpy(), whole_batch("mean")[0], rtol=1e-12)


PARTS = (slice(0, 3), slice(3, 8), slice(8, 8), slice(8, 16))


@pytest.mark.parametrize("reduction", ["mean", "batch_mean"])
@pytest.mark.parametrize("soft", [False, True], ids=["integer", "soft"])
def test_torch_accumulation(reduction, soft):
    """README's recipe: the totals of all micro-batches first, then one backward pass for each."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    criterion = losses.LMFLoss(COUNTS, reduction=reduction)
    x, labels = (X, Y) if not soft else (X[Y >= 0], np.eye(3)[Y[Y >= 0]])
    x, y = torch.tensor(x), torch.tensor(labels)
    kernel = torch.tensor(KERNEL, requires_grad=True)
    totals = [sum(each) for each in zip(*(criterion.normalizers(y[p]) for p in PARTS), strict=True)]
    parts = [criterion(x[p] @ kernel, y[p], normalizers=tuple(totals)) for p in PARTS]
    for part in parts:
        part.backward()
    value, grad = whole_batch(reduction)
    np.testing.assert_allclose(sum(part.item() for part in parts), value, rtol=1e-12)
    np.testing.assert_allclose(kernel.grad.numpy(), grad, rtol=1e-12, atol=1e-14)
    again = criterion.normalizers(y)
    np.testing.assert_allclose([float(each) for each in again], [float(t) for t in totals])


def test_normalizers_need_a_mean():
    sentence = "normalizers need the reduction 'mean' or 'batch_mean', got 'sum'"
    torch, losses = load("torch"), load("lmf_multi.torch")
    loss = losses.LMFLoss(COUNTS, reduction="sum")
    y = torch.tensor(Y)
    with refuses(ValueError, sentence):
        loss(torch.tensor(X @ KERNEL), y, normalizers=loss.normalizers(y))


def test_torch_sigmoid_accumulation():
    torch, losses = load("torch"), load("lmf_multi.torch")
    loss = losses.SigmoidLMFLoss([3, 1, 9], [9, 5, 3])
    x, t = torch.tensor(X @ KERNEL), torch.tensor(np.eye(3, dtype=int)[Y % 3])
    where = torch.tensor(np.random.default_rng(1).random((16, 3)) < 0.7)
    totals = loss.normalizers(t, where=where)
    parts = [loss(x[p], t[p], where=where[p], normalizers=totals) for p in PARTS]
    np.testing.assert_allclose(sum(map(float, parts)), float(loss(x, t, where=where)), rtol=1e-12)


# --- JAX

EIGHT_DEVICES = """
import json, os
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from lmf_multi.jax import LMFLoss
from tests.loss.test_data_parallel import COUNTS, KERNEL, REDUCTIONS, X, Y

jax.config.update("jax_enable_x64", True)
assert jax.device_count() == 8
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
explicit = jax.make_mesh((8,), ("batch",))  # of explicit axes since JAX 0.9
x, kernel = (jnp.array(a, os.environ["DTYPE"]) for a in (X, KERNEL))
y = jnp.array(Y)
every = {}
for reduction in REDUCTIONS:
    def loss_of(kernel, x, y, loss):
        return loss(x @ kernel, y, where=y >= 0)

    split = LMFLoss(COUNTS, reduction=reduction, axis_name="batch")
    whole = LMFLoss(COUNTS, reduction=reduction)

    def averaged(kernel, x, y):
        result = jax.value_and_grad(loss_of)(kernel, x, y, split)
        return jax.lax.pmean(result, "batch")

    shards = x.reshape(8, 2, 5), y.reshape(8, 2)
    value, grad = jax.pmap(averaged, "batch", in_axes=(None, 0, 0))(kernel, *shards)
    every[f"pmap {reduction}"] = value[0], grad[0]
    value, grad = jax.vmap(averaged, (None, 0, 0), axis_name="batch")(kernel, *shards)
    every[f"vmap {reduction}"] = value[3], grad[3]

    specs = dict(mesh=mesh, in_specs=(P(), P("batch"), P("batch")), out_specs=P())
    inside = jax.shard_map(averaged, check_vma=False, **specs)
    every[f"shard_map {reduction}"] = jax.jit(inside)(kernel, x, y)

    @jax.shard_map(**specs)
    def outside(kernel, x, y):  # differentiated from outside the shard_map
        return jax.lax.pmean(loss_of(kernel, x, y, split), "batch")

    every[f"grad of shard_map {reduction}"] = jax.jit(jax.value_and_grad(outside))(kernel, x, y)

    sharded = jax.device_put((x, y), NamedSharding(mesh, P("batch")))
    step = jax.jit(jax.value_and_grad(partial(loss_of, loss=whole)))
    every[f"jit {reduction}"] = step(kernel, *sharded)
    with jax.set_mesh(explicit):
        sharded = jax.device_put((x, y), NamedSharding(explicit, P("batch")))
        every[f"explicit {reduction}"] = step(kernel, *sharded)
every = {name: [float(value), np.asarray(grad).tolist()] for name, (value, grad) in every.items()}
print(json.dumps(every))
"""


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [("float64", 1e-11, 1e-13), ("float32", 1e-4, 1e-5)]
)
def test_jax_eight_devices(dtype, rtol, atol):
    load("jax")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    results = of_another_process(EIGHT_DEVICES, DTYPE=dtype, **flags)
    assert len(results) == 18
    for name, (value, grad) in results.items():
        expected = whole_batch(name.split()[-1])
        np.testing.assert_allclose(value, expected[0], rtol=rtol / 10, err_msg=name)
        np.testing.assert_allclose(grad, expected[1], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("reduction", ["mean", "batch_mean"])
def test_jax_accumulation(reduction):
    jax, losses = load("jax"), load("lmf_multi.jax")
    with jax.enable_x64(True):
        loss = losses.LMFLoss(COUNTS, reduction=reduction)
        totals = loss.normalizers(Y, where=Y >= 0)

        def part(kernel, p):
            return loss(X[p] @ kernel, Y[p], where=Y[p] >= 0, normalizers=totals)

        parts = [jax.value_and_grad(part)(KERNEL, p) for p in PARTS]
        value, grad = whole_batch(reduction)
        np.testing.assert_allclose(sum(float(v) for v, _ in parts), value, rtol=1e-12)
        np.testing.assert_allclose(sum(np.asarray(g) for _, g in parts), grad, rtol=1e-12)


def test_jax_normalizers_check_the_mask():
    loss = load("lmf_multi.jax").LMFLoss(COUNTS)
    sentence = "where must have shape (16,), one value for each example, got (8,)"
    with refuses(ValueError, sentence):
        loss.normalizers(np.zeros(16, int), where=np.ones(8, bool))


def test_jax_axis_name_needs_a_reduction():
    losses = load("lmf_multi.jax")
    sentence = (
        "axis_name needs a reduction over the batch, got reduction 'none'; "
        "use 'mean', 'batch_mean' or 'sum'"
    )
    with refuses(ValueError, sentence):
        losses.LMFLoss(COUNTS, reduction="none", axis_name="batch")
    loss = losses.LMFLoss(COUNTS, reduction="sum")
    with refuses(ValueError, "normalizers need the reduction 'mean' or 'batch_mean', got 'sum'"):
        loss(X @ KERNEL, Y, where=Y >= 0, normalizers=loss.normalizers(Y, where=Y >= 0))


# --- Keras

LAST = 15 if KERAS_BACKEND == "tensorflow" else 16  # JAX splits a batch into equal parts alone
KERAS_FIT = """
import json
import keras, numpy as np
from lmf_multi.keras import LMFLoss
from tests.loss.test_data_parallel import COUNTS, KERNEL, LAST, X, Y

results = {}
for reduction in ("sum_over_batch_size", "batch_mean", "sum", "mean_with_sample_weight"):
    for weighted in (False, True):
        def compiled():
            keras.utils.set_random_seed(0)
            model = keras.Sequential(
                [keras.Input((5,)), keras.layers.Dense(3, use_bias=False)]
            )
            model.layers[-1].set_weights([KERNEL])
            loss = LMFLoss(COUNTS, ignore_class=-100, reduction=reduction)
            model.compile(keras.optimizers.SGD(1.0), loss=loss, jit_compile=False)
            return model

        PREPARE
        weight = np.linspace(0.5, 2.0, 16) if weighted else None
        x, y = X.astype("float32"), Y.astype("int32")
        model.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0, sample_weight=weight)
        grad = KERNEL.astype("float32") - model.layers[-1].get_weights()[0]
        model.layers[-1].set_weights([KERNEL])
        model.optimizer.learning_rate = 0.0
        # two batches, and on two replicas four, four, four and three examples
        weight = None if weight is None else weight[:LAST]
        options = {"batch_size": 8, "sample_weight": weight, "verbose": 0}
        uneven = model.fit(x[:LAST], y[:LAST], shuffle=False, **options).history["loss"]
        uneven += [model.evaluate(x[:LAST], y[:LAST], **options)]
        results[f"{reduction} {weighted}"] = [grad.tolist(), uneven]
print(json.dumps(results))
"""
MIRRORED = """
        if not results:
            import tensorflow as tf
            cpu = tf.config.list_physical_devices("CPU")[0]
            logical = [tf.config.LogicalDeviceConfiguration()] * 2
            tf.config.set_logical_device_configuration(cpu, logical)
            strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        with strategy.scope():
            model = compiled()
        assert strategy.num_replicas_in_sync == 2
"""
DATA_PARALLEL = """
        if not results:
            keras.distribution.set_distribution(keras.distribution.DataParallel())
            assert len(keras.distribution.list_devices("cpu")) == 8
        model = compiled()
"""


@pytest.mark.parametrize(("backend", "prepare"), [("tensorflow", MIRRORED), ("jax", DATA_PARALLEL)])
def test_keras_distribution(backend, prepare):
    if backend != KERAS_BACKEND:
        pytest.skip(f"runs with Keras on {backend}")
    load("keras")
    options = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    results = of_another_process(KERAS_FIT.replace("PREPARE", prepare.strip()), **options)
    single = of_another_process(KERAS_FIT.replace("PREPARE", "model = compiled()"))
    assert results.keys() == single.keys() and len(single) == 8
    for name, (grad, uneven) in results.items():
        np.testing.assert_allclose(grad, single[name][0], rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(uneven, single[name][1], rtol=1e-5, err_msg=name)
    for name, reduction in (("sum_over_batch_size", "mean"), ("batch_mean", "batch_mean")):
        grad, uneven = results[f"{name} False"]
        np.testing.assert_allclose(grad, whole_batch(reduction)[1], rtol=1e-4, atol=1e-6)
        parts = [(whole_batch(reduction, X[p], Y[p])[0], p) for p in (slice(8), slice(8, LAST))]
        expected = np.average([value for value, _ in parts], weights=[8, LAST - 8])
        np.testing.assert_allclose(uneven, [expected, expected], rtol=1e-5)
