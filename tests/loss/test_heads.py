"""The cosine head: every framework's layer against the definition, values and gradients."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import lmf_multi
from lmf_multi.reference import cosine_logits
from tests.checks import assert_within, refuses
from tests.frameworks import KERAS_BACKEND, load

N, D, C = 6, 5, 3
RNG = np.random.default_rng(0)
FEATURES, WEIGHT = RNG.normal(0, 1, (N, D)), RNG.normal(0, 1, (C, D))
UPSTREAM = RNG.normal(0, 1, (N, C))
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


# --- the definition


def exact(x, v, upstream):
    """Cosines and the gradients of their weighted sum; a vector of zeros counts as length 1."""

    def length(a):
        a = np.sqrt((a * a).sum(-1, keepdims=True))
        return np.where(a == 0, 1, a)

    x_unit, v_unit = x / length(x), v / length(v)
    to_x, to_v = upstream @ v_unit, upstream.T @ x_unit
    return (
        x_unit @ v_unit.T,
        (to_x - x_unit * (x_unit * to_x).sum(-1, keepdims=True)) / length(x),
        (to_v - v_unit * (v_unit * to_v).sum(-1, keepdims=True)) / length(v),
    )


def test_the_definition():
    cosines, to_x, to_v = exact(FEATURES, WEIGHT, UPSTREAM)
    np.testing.assert_allclose(cosine_logits(FEATURES, WEIGHT), cosines, rtol=1e-14)
    assert abs(cosines).max() < 1
    h = 1e-6
    for to, vary in (
        (to_x, lambda step: (FEATURES + step, WEIGHT)),
        (to_v, lambda step: (FEATURES, WEIGHT + step)),
    ):
        for index in np.ndindex(to.shape):
            step = np.zeros(to.shape)
            step[index] = h
            high, low = (cosine_logits(*vary(sign * step)) for sign in (1, -1))
            numeric = (UPSTREAM * (high - low)).sum() / (2 * h)
            np.testing.assert_allclose(to[index], numeric, rtol=1e-7, atol=1e-8)


def test_known_cosines():
    x = np.array([[[3.0, 4.0], [-1e300, 0.0]], [[0.0, 0.0], [1e-300, 1e-300]]])
    v = np.array([[1e-200, 0.0], [0.0, 7e200], [0.0, 0.0]])
    expected = [[[0.6, 0.8, 0], [-1, 0, 0]], [[0, 0, 0], [0.5**0.5, 0.5**0.5, 0]]]
    np.testing.assert_allclose(cosine_logits(x, v), expected, rtol=1e-15)
    np.testing.assert_allclose(cosine_logits(x[0, 0], v), [0.6, 0.8, 0], rtol=1e-15)
    assert cosine_logits(np.zeros((0, 2)), v).shape == (0, 3)


def cosine_linear(framework):
    """A framework's layer, or a skip where it or flax is absent."""
    load("flax" if framework == "jax" else framework)
    return load(f"lmf_multi.{framework}").CosineLinear


# --- the layers: features, weight (C, D) and upstream in NumPy; logits and gradients in float64


def torch_head(mode, x, v, upstream, dtype):
    torch = load("torch")
    kind = getattr(torch, dtype)
    head = cosine_linear("torch")(D, C, dtype=kind)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(v))
    x = torch.tensor(x).to(kind).requires_grad_()
    z = (torch_compiled() if mode == "compile" else call)(head, x)
    z.backward(torch.tensor(upstream).to(kind))
    results = z.detach(), x.grad, head.weight.grad
    assert {tensor.dtype for tensor in results} == {kind}
    return [tensor.double().numpy() for tensor in results]


def call(head, x):
    return head(x)


@cache
def torch_compiled():
    return load("torch").compile(call, fullgraph=True)


def jax_head(mode, x, v, upstream, dtype):
    jax, nnx = load("jax"), load("flax.nnx")
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        x, v, upstream = (jax.numpy.asarray(a, dtype) for a in (x, v, upstream))
        head = cosine_linear("jax")(D, C, rngs=nnx.Rngs(0), param_dtype=v.dtype)
        head.kernel[...] = v.T
        (_, z), (to_head, to_x) = jax_step(mode)(head, x, upstream)
        results = z, to_x, to_head.kernel[...].T
        assert {array.dtype.name for array in results} == {dtype}
        return [np.asarray(array).astype(np.float64) for array in results]


@cache
def jax_step(mode):
    def weighted_sum(head, x, upstream):
        z = head(x)
        return (z * upstream).sum(), z

    nnx = load("flax.nnx")
    step = nnx.value_and_grad(weighted_sum, argnums=(0, 1), has_aux=True)
    return nnx.jit(step) if mode == "jit" else step


def keras_head(mode, x, v, upstream, dtype):
    keras = load("keras")
    layer = cosine_linear("keras")(C, dtype=dtype)
    layer.build((None, D))
    layer.kernel.assign(keras.ops.convert_to_tensor(v.T, dtype=dtype))
    x, upstream = (keras.ops.convert_to_tensor(a, dtype=dtype) for a in (x, upstream))
    z, to_x, to_kernel = KERAS_GRADIENTS[KERAS_BACKEND](layer, x, upstream)
    results = z, to_x, keras.ops.transpose(to_kernel)
    assert {keras.backend.standardize_dtype(tensor.dtype) for tensor in results} == {dtype}
    return [numpy(tensor) for tensor in results]


def numpy(tensor):
    """float64 of a Keras tensor of any dtype."""
    keras = load("keras")
    exact = "float64" if keras.backend.standardize_dtype(tensor.dtype) == "float64" else "float32"
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(tensor, exact)), np.float64)


def tensorflow_gradients(layer, x, upstream):
    tf = load("tensorflow")
    with tf.GradientTape() as tape:
        tape.watch(x)
        z = layer(x)
    return z, *tape.gradient(z, [x, layer.kernel.value], upstream)


def torch_gradients(layer, x, upstream):
    x = x.clone().requires_grad_()
    z = layer(x)
    z.backward(upstream)
    return z.detach(), x.grad, layer.kernel.value.grad


def jax_gradients(layer, x, upstream):
    def weighted_sum(kernel, x):
        z, _ = layer.stateless_call([kernel], [], x)
        return (z * upstream).sum(), z

    gradient = load("jax").value_and_grad(weighted_sum, argnums=(0, 1), has_aux=True)
    (_, z), (to_kernel, to_x) = gradient(layer.kernel.value, x)
    return z, to_x, to_kernel


KERAS_GRADIENTS = {
    "tensorflow": tensorflow_gradients,
    "jax": jax_gradients,
    "torch": torch_gradients,
}

HEADS = {
    "torch-eager": torch_head,
    "torch-compile": torch_head,
    "jax-eager": jax_head,
    "jax-jit": jax_head,
    "keras-eager": keras_head,
}


@pytest.fixture(params=HEADS)
def head(request):
    """A framework's head in one mode: (x, v, upstream, dtype) in, logits and gradients out."""
    mode = request.param.partition("-")[2]
    return lambda *arguments: HEADS[request.param](mode, *arguments)


def takes(head_name, dtype):
    """Keras on JAX has no float64 unless JAX_ENABLE_X64 is set."""
    return (head_name, KERAS_BACKEND, dtype) != ("keras-eager", "jax", "float64")


# --- numbers


def vectors():
    """Features and weights, each of its own size."""
    sizes = 10.0 ** np.array([-30, 30, -3, 0, 3, 37])[:, None]
    x, v = FEATURES * sizes, WEIGHT * 10.0 ** np.array([-30, 30, 0])[:, None]
    zeros_x, zeros_v = FEATURES.copy(), WEIGHT.copy()
    zeros_x[1], zeros_v[2] = 0, 0
    apart = np.where(np.arange(D) % 2, FEATURES * 1e30, FEATURES * 1e-30)
    parallel = (
        np.arange(1, N + 1)[:, None] * np.tile(WEIGHT, (2, 1)) * np.repeat([1, -1], 3)[:, None]
    )
    one_hot = np.eye(N, D) * 7
    return {
        "ordinary": (FEATURES, WEIGHT),
        "tiny and huge": (x, v),
        "smallest and largest": (np.sign(FEATURES) * 3e-38, np.sign(WEIGHT) * 3e38),
        "zeros": (zeros_x, zeros_v),
        "all zeros": (0 * FEATURES, 0 * WEIGHT),
        "tiny beside huge": (apart, WEIGHT),
        "parallel": (parallel, WEIGHT),
        "one-hot": (one_hot, np.eye(C, D)),
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", vectors())
def test_values_and_gradients(head, request, name, dtype):
    if not takes(request.node.callspec.params["head"], dtype):
        pytest.skip("Keras on JAX computes in float32")
    x, v, upstream = (a.astype(dtype).astype(np.float64) for a in (*vectors()[name], UPSTREAM))
    actual = head(x, v, upstream, dtype)
    expected = exact(x, v, upstream)
    np.testing.assert_array_equal(cosine_logits(x, v).round(12), expected[0].round(12))
    sums = np.abs(upstream).sum(1, keepdims=True), np.abs(upstream).sum(0)[:, None]
    scales = 1.0, sums[0] / lengths(x), sums[1] / lengths(v)
    for value, truth, scale in zip(actual, expected, scales, strict=True):
        # what lies below the smallest normal number may count as 0
        bound = TOLERANCE[dtype] * scale + np.finfo(dtype).tiny
        assert_within(value, truth, np.broadcast_to(bound, truth.shape), name)


def lengths(a):
    a = np.sqrt((a * a).sum(-1, keepdims=True))
    return np.where(a == 0, 1, a)


def test_the_comparison_notices_a_missing_derivative():
    """Were the lengths constants, the gradient would be wrong by far more than the tolerance."""
    to_x = exact(FEATURES, WEIGHT, UPSTREAM)[1]
    constant = UPSTREAM @ (WEIGHT / lengths(WEIGHT)) / lengths(FEATURES)
    with pytest.raises(AssertionError):
        assert_within(constant, to_x, np.full(to_x.shape, 1e-2))


def test_equal_weights_give_equal_logits():
    """Carried from PyTorch to Flax and Keras, the weight transposed as a Linear's is."""
    torch, nnx, ops = load("torch"), load("flax.nnx"), load("keras").ops
    x = FEATURES.astype(np.float32)
    first = cosine_linear("torch")(D, C)
    second = cosine_linear("jax")(D, C, rngs=nnx.Rngs(0))
    third = cosine_linear("keras")(C)
    third.build((None, D))
    weight = first.state_dict()["weight"].numpy()
    second.kernel[...] = weight.T
    third.set_weights([weight.T])
    with torch.no_grad():
        expected = first(torch.tensor(x)).numpy()
    np.testing.assert_allclose(second(load("jax").numpy.asarray(x)), expected, atol=1e-6)
    np.testing.assert_allclose(numpy(third(ops.convert_to_tensor(x))), expected, atol=1e-6)


# half a unit in the last place of numbers up to 1, and float32's own error
ROUNDING = {"float16": 2.0**-12, "bfloat16": 2.0**-9}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_half_types_round_once(head, dtype):
    """The lengths and the products are float32's, of sizes whose squares half cannot hold."""
    size = {"float16": 2e4, "bfloat16": 2e30}[dtype]
    x, v = (half(a, dtype) for a in (np.clip(FEATURES, -2, 2) * size, WEIGHT))
    expected, to_x, _ = exact(x, v, half(UPSTREAM, dtype))
    z, actual, _ = head(x, v, UPSTREAM, dtype)
    assert_within(z, expected, np.full(z.shape, ROUNDING[dtype] + 1e-6))
    if dtype == "bfloat16":  # float16 has no number so small
        assert_within(actual, to_x, np.full(to_x.shape, 0.01 * abs(to_x).max()))


def half(a, dtype):
    """What a half type holds of an array."""
    torch = load("torch")
    return torch.tensor(a).to(getattr(torch, dtype)).double().numpy()


def test_nan_and_infinity_are_no_cosines(head):
    x = FEATURES.copy()
    x[1, 2], x[3, 0] = np.nan, np.inf
    z = head(x, WEIGHT, UPSTREAM, "float32")[0]
    assert np.isnan(z[[1, 3]]).all()
    others = [0, 2, 4, 5]
    np.testing.assert_allclose(z[others], cosine_logits(x[others], WEIGHT), rtol=1e-5, atol=1e-6)


# --- sizes, kinds and what is refused


@pytest.fixture(params=["reference", "torch", "jax", "keras"])
def build(request):
    """A framework's head from a weight (C, D): features in NumPy in, logits in NumPy out."""
    return {
        "reference": lambda v: lambda x: cosine_logits(x, v),
        "torch": torch_with,
        "jax": jax_with,
        "keras": keras_with,
    }[request.param]


def torch_with(v):
    torch = load("torch")
    layer = cosine_linear("torch")(*v.shape[::-1])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(v))
    return lambda x: layer(torch.tensor(x)).detach().numpy()


def jax_with(v):
    nnx = load("flax.nnx")
    layer = cosine_linear("jax")(*v.shape[::-1], rngs=nnx.Rngs(0))
    layer.kernel[...] = v.T
    return lambda x: np.asarray(layer(load("jax").numpy.asarray(x)))


def keras_with(v):
    layer = cosine_linear("keras")(len(v))
    layer.build((None, v.shape[1]))
    layer.set_weights([v.T])
    return lambda x: numpy(layer(load("keras").ops.convert_to_tensor(x)))


@pytest.mark.parametrize("shape", [(2, 3, D), (2, 1, 3, D), (0, D)], ids=str)
def test_batches_of_any_shape(build, shape):
    x = RNG.normal(0, 1, shape).astype(np.float32)
    z = build(WEIGHT.astype(np.float32))(x)
    np.testing.assert_allclose(z, cosine_logits(x, WEIGHT), rtol=1e-5, atol=1e-6)
    assert z.shape == (*shape[:-1], C)


def test_other_features_are_refused(build):
    layer = build(WEIGHT.astype(np.float32))
    other, integers = np.ones((2, 4), np.float32), np.ones((2, D), np.int32)
    size = "features must have shape (..., 5), got (2, 4); the last axis holds in_features"
    kind = "features must be one of float16, bfloat16, float32, float64, got int32"
    if build is keras_with:  # Keras writes around a layer's error what it was called with
        with pytest.raises(ValueError) as caught:
            layer(other)
        assert size in str(caught.value)
        with pytest.raises(TypeError) as caught:
            layer(integers)
        assert kind in str(caught.value)
        return
    with refuses(ValueError, size):
        layer(other)
    with refuses(TypeError, kind):
        layer(integers)
    with refuses(ValueError, size.replace("(2, 4)", "()")):
        layer(np.float32(1))


def test_another_weight_is_refused():
    sentence = "weight must have shape (C, D), one row for each class, got shape (5,)"
    with refuses(ValueError, sentence):
        cosine_logits(FEATURES, WEIGHT[0])


@pytest.mark.parametrize(
    ("size", "kind", "sentence"),
    [
        (0, ValueError, "{} must be at least 1, got 0"),
        (-3, ValueError, "{} must be at least 1, got -3"),
        (2.0, TypeError, "{} must be a whole number, got 2.0"),
        ("3", TypeError, "{} must be a whole number, got '3'"),
        (True, TypeError, "{} must be a whole number, got True"),
        (None, TypeError, "{} must be a whole number, got None"),
    ],
)
@pytest.mark.parametrize("framework", ["torch", "jax", "keras"])
def test_sizes_are_checked(framework, size, kind, sentence):
    cls = cosine_linear(framework)
    options = {"rngs": load("flax.nnx").Rngs(0)} if framework == "jax" else {}
    if framework == "keras":
        with refuses(kind, sentence.format("units")):
            cls(size)
        return
    with refuses(kind, sentence.format("in_features")):
        cls(size, 3, **options)
    with refuses(kind, sentence.format("out_features")):
        cls(3, size, **options)


def test_weights_start_near_length_1():
    torch, nnx, keras = load("torch"), load("flax.nnx"), load("keras")
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    layer = cosine_linear("keras")(200)
    layer.build((None, 300))
    weights = [
        cosine_linear("torch")(300, 200).weight.detach().numpy(),
        cosine_linear("jax")(300, 200, rngs=nnx.Rngs(0)).kernel[...].T,
        numpy(layer.kernel).T,
    ]
    for weight in weights:
        assert weight.shape == (200, 300)
        lengths = np.linalg.norm(weight, axis=1)
        assert 0.7 < lengths.min() < 1 < lengths.max() < 1.3
        np.testing.assert_allclose(lengths.mean(), 1, rtol=0.02)
        np.testing.assert_allclose(weight.mean(), 0, atol=5 / weight.size**0.5 / 300**0.5)


# --- PyTorch


@pytest.fixture
def torch_layer():
    load("torch").manual_seed(0)
    return cosine_linear("torch")(D, C)


def test_torch_keeps_a_linears_state(torch_layer):
    torch = load("torch")
    assert set(torch_layer.state_dict()) == {"weight"}
    torch_layer.load_state_dict(torch.nn.Linear(D, C, bias=False).state_dict())
    file = io.BytesIO()
    torch.save(torch_layer, file)
    file.seek(0)
    x = torch.tensor(FEATURES, dtype=torch.float32)
    twins = [
        copy.deepcopy(torch_layer),
        pickle.loads(pickle.dumps(torch_layer)),
        torch.load(file, weights_only=False),
    ]
    for twin in twins:
        torch.testing.assert_close(twin(x), torch_layer(x), rtol=0, atol=0)
        assert twin.weight is not torch_layer.weight
    assert repr(torch_layer) == "CosineLinear(in_features=5, out_features=3)"


def test_torch_options(torch_layer):
    torch = load("torch")
    layer = cosine_linear("torch")(D, C, device="meta", dtype=torch.bfloat16)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)
    z = layer(torch.ones(2, D, device="meta", dtype=torch.bfloat16))
    assert (z.shape, z.dtype) == ((2, C), torch.bfloat16)
    before = torch_layer.weight.detach().clone()
    torch_layer.reset_parameters()
    assert not torch.equal(torch_layer.weight, before)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
def test_torch_autocast_leaves_the_cosines_in_float32(torch_layer, compiled):
    torch = load("torch")
    run = torch_compiled() if compiled else call
    x = torch.tensor(FEATURES).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(x, torch_layer.weight).dtype == torch.bfloat16
        z = run(torch_layer, x)
    assert z.dtype == torch.float32
    expected = cosine_logits(x.double().numpy(), torch_layer.weight.detach().numpy())
    np.testing.assert_allclose(z.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_torch_differentiates_twice(torch_layer):
    torch = load("torch")
    layer, x = torch_layer.double(), torch.tensor(FEATURES, requires_grad=True)

    def logits(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    weight = layer.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(logits, (x, weight))
    assert torch.autograd.gradgradcheck(logits, (x, weight))
    each = torch.func.vmap(layer)(x)
    torch.testing.assert_close(each, layer(x))


# --- Flax


@pytest.fixture
def flax_layer():
    return cosine_linear("jax")(D, C, rngs=load("flax.nnx").Rngs(0))


def test_flax_keeps_a_linears_state(flax_layer):
    nnx = load("flax.nnx")
    x = FEATURES.astype(np.float32)
    graph, state = nnx.split(flax_layer)
    linear = nnx.Linear(D, C, use_bias=False, rngs=nnx.Rngs(0))
    shapes = [load("jax").tree.map(np.shape, nnx.to_pure_dict(nnx.state(m, nnx.Param)))
              for m in (flax_layer, linear)]  # fmt: skip
    assert shapes[0] == shapes[1] == {"kernel": (D, C)}
    twins = [
        nnx.merge(graph, state),
        copy.deepcopy(flax_layer),
        pickle.loads(pickle.dumps(flax_layer)),
    ]
    for twin in twins:
        np.testing.assert_array_equal(twin(load("jax").numpy.asarray(x)), flax_layer(x))


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"param_dtype": "bfloat16"}], ids=str)
def test_flax_dtypes(options):
    """``dtype`` is the logits' alone: the cosines come from float32 features and kernel."""
    jnp, nnx = load("jax").numpy, load("flax.nnx")
    layer = cosine_linear("jax")(D, C, rngs=nnx.Rngs(0), **options)
    assert layer.kernel[...].dtype.name == options.get("param_dtype", "float32")
    x = jnp.asarray(FEATURES, options.get("param_dtype", "float32"))
    z = layer(x)
    assert z.dtype.name == "bfloat16"
    expected = cosine_logits(np.asarray(x, np.float64), np.asarray(layer.kernel[...].T, np.float64))
    bound = np.full(z.shape, ROUNDING["bfloat16"] + 1e-6)
    assert_within(np.asarray(z, np.float64), expected, bound)


def test_flax_transforms(flax_layer):
    jax, nnx = load("jax"), load("flax.nnx")
    x, traces = jax.numpy.asarray(FEATURES, "float32"), []
    np.testing.assert_allclose(jax.vmap(flax_layer)(x), flax_layer(x), rtol=1e-5, atol=1e-6)

    @nnx.jit
    def step(layer, x):
        traces.append(x)
        return layer(x)

    for _ in range(2):
        np.testing.assert_allclose(step(flax_layer, x), flax_layer(x), rtol=1e-5, atol=1e-6)
        flax_layer.kernel[...] = -flax_layer.kernel[...] + 1
    assert len(traces) == 1
    graph, state = nnx.split(flax_layer)
    from jax.test_util import check_grads

    with jax.enable_x64(True):
        state = jax.tree.map(lambda a: a.astype("float64"), state)
        x = jax.numpy.asarray(FEATURES[:1])
        logits = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
        check_grads(logits, (state, x), order=2)


# --- Keras


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "jit_compile"])
def test_keras_fit_takes_the_exact_gradient(compiled):
    """One step of size 1 in ``fit`` subtracts the gradients: of features, a Dense kernel, too."""
    keras = load("keras")
    head = cosine_linear("keras")(C)
    model = keras.Sequential([keras.Input((N,)), keras.layers.Dense(D, use_bias=False), head])
    before = [FEATURES.astype(np.float32), WEIGHT.T.astype(np.float32)]
    model.set_weights(before)
    model.compile(
        keras.optimizers.SGD(1.0),
        loss=lambda upstream, z: keras.ops.sum(upstream * z, -1) * N,  # fit takes the mean
        jit_compile=compiled,
    )
    upstream = UPSTREAM.astype(np.float32)
    model.fit(np.eye(N, dtype=np.float32), upstream, batch_size=N, shuffle=False, verbose=0)
    _, to_x, to_v = exact(FEATURES, WEIGHT, UPSTREAM)
    for old, new, gradient in zip(before, model.get_weights(), (to_x, to_v.T), strict=True):
        np.testing.assert_allclose(old - new, gradient, rtol=1e-4, atol=1e-5)


LOAD = """
import sys
import numpy as np, keras
import lmf_multi.keras
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))
"""


def test_keras_saves_and_loads_in_a_fresh_process(tmp_path):
    keras = load("keras")
    head = cosine_linear("keras")(C, kernel_initializer="orthogonal", name="cosines")
    model = keras.Sequential([keras.Input((D,)), head])
    x = FEATURES.astype(np.float32)
    paths = [tmp_path / name for name in ("model.keras", "x.npy", "z.npy")]
    model.save(paths[0])
    np.save(paths[1], x)
    result = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, paths)],
        env=os.environ
        | {"PYTHONPATH": str(Path(lmf_multi.__file__).parents[1]), "KERAS_BACKEND": KERAS_BACKEND},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(np.load(paths[2]), model.predict(x, verbose=0))


def test_keras_config_rebuilds_the_layer():
    keras = load("keras")
    layer = cosine_linear("keras")(
        np.int64(C), kernel_initializer="ones", name="cosines", dtype="mixed_bfloat16"
    )
    config = layer.get_config()
    assert json.loads(json.dumps(config)) == config
    twins = [
        type(layer).from_config(config),
        keras.layers.deserialize(keras.layers.serialize(layer)),
    ]
    for twin in twins:
        assert twin.get_config() == config
        assert (twin.units, twin.name, twin.compute_dtype) == (C, "cosines", "bfloat16")
        twin.build((None, D))
        np.testing.assert_array_equal(numpy(twin.kernel), np.ones((D, C)))
    assert layer.compute_output_shape((None, 7, D)) == (None, 7, C)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_keras_mixed_precision_rounds_only_the_logits(dtype):
    """From the float32 kernel and features, which half would round, or lose."""
    keras = load("keras")
    layer = cosine_linear("keras")(C, dtype=f"mixed_{dtype}")
    layer.build((None, D))
    layer.kernel.assign(WEIGHT.T)
    x = (FEATURES * 1e30).astype(np.float32)
    z = layer(keras.ops.convert_to_tensor(x))
    kinds = [keras.backend.standardize_dtype(a.dtype) for a in (z, layer.kernel)]
    assert kinds == [dtype, "float32"]
    expected = cosine_logits(x, WEIGHT.astype(np.float32))
    assert_within(numpy(z), expected, np.full(z.shape, ROUNDING[dtype] + 1e-6))


def test_keras_functional_model_passes_the_mask_on():
    keras = load("keras")
    inputs = keras.Input((None, D))
    masked = keras.layers.Masking()(inputs)
    outputs = cosine_linear("keras")(C)(masked)
    assert outputs.shape == (None, None, C)
    x = RNG.normal(0, 1, (2, 4, D)).astype(np.float32)
    x[1, 2:] = 0
    z = keras.Model(inputs, outputs)(x)
    np.testing.assert_array_equal(numpy(z._keras_mask), [[1, 1, 1, 1], [1, 1, 0, 0]])


def test_keras_needs_to_know_the_number_of_features():
    keras = load("keras")
    sentence = (
        "features must have a known last axis, got shape (None, None); give keras.Input its size"
    )
    with pytest.raises(ValueError) as caught:
        cosine_linear("keras")(C)(keras.Input((None,)))
    assert sentence in str(caught.value)


# --- with the loss


def test_torch_trains_with_ldam():
    torch = load("torch")
    torch.manual_seed(0)
    layer = cosine_linear("torch")(D, C)
    loss = load("lmf_multi.torch").LDAMLoss([100, 10, 1])
    x, y = torch.tensor(FEATURES, dtype=torch.float32), torch.arange(N) % C
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(layer(x), y)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]
