"""Second derivatives against central differences of the reference's gradient."""

from dataclasses import replace

import numpy as np
import pytest

from tests.cases import Case
from tests.frameworks import KERAS_BACKEND, load
from tests.hard import hard_examples

COUNTS, WEIGHTS = (625, 16, 1), np.array([0.5, 1.0, 3.0])
RNG = np.random.default_rng(0)
LOGITS, DIRECTION = RNG.normal(0, 1, (5, 3)), RNG.normal(0, 1, (5, 3))
LABELS, SOFT = np.array([0, 1, 2, 1, 0]), RNG.dirichlet([1] * 3, 5)
CASES = {
    "integer": {"labels": LABELS},
    "masked": {"labels": LABELS, "where": np.array([True, True, False, True, True])},
    "smoothed": {"labels": LABELS, "label_smoothing": 0.1},
    "soft": {"labels": SOFT, "label_dtype": "float64"},
}
OPTIONS = {"dtype": "float64", "scale": 3.0, "reduction": "mean", "as_class": True}


def build(form, gamma):
    labels = CASES[form]["labels"]
    case = Case(LOGITS, labels, COUNTS, WEIGHTS, gamma=gamma, **OPTIONS)
    return replace(case, **CASES[form])


def hessian_times(case, direction, h=1e-5):
    """Central difference of the reference's gradient."""
    up, down = (replace(case, logits=case.logits + step * direction) for step in (h, -h))
    return (up.exact[1] - down.exact[1]) / (2 * h)


def compare(actual, case):
    expected = hessian_times(case, DIRECTION)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-8)


grid = pytest.mark.parametrize("gamma", [0.25, 1.5])
forms = pytest.mark.parametrize("form", CASES)


def torch_loss(case):
    torch, losses = load("torch"), load("lmf_multi.torch")
    y = torch.tensor(case.labels if case.where is None else np.where(case.where, case.labels, -100))
    loss = losses.LMFLoss(case.class_counts, **case.options, reduction=case.reduction)
    return lambda z: loss(z, y)


@forms
@grid
def test_torch_double_backward(form, gamma):
    torch, case = load("torch"), build(form, gamma)
    z, v = torch.tensor(LOGITS, requires_grad=True), torch.tensor(DIRECTION)
    (grad,) = torch.autograd.grad(torch_loss(case)(z), z, create_graph=True)
    (product,) = torch.autograd.grad(grad, z, v)
    compare(product.numpy(), case)


# PyTorch's own, when it loads its rules for forward mode
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@forms
@grid
def test_torch_func(form, gamma):
    torch, case = load("torch"), build(form, gamma)
    f, z, v = torch_loss(case), torch.tensor(LOGITS), torch.tensor(DIRECTION)
    for hessian in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        compare(torch.einsum("ijkl,kl->ij", hessian(f)(z), v).numpy(), case)
    _, product = torch.func.jvp(torch.func.grad(f), (z,), (v,))
    compare(product.numpy(), case)


# PyTorch's own, when it loads its rules for forward mode
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@forms
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_torch_nested_transforms(form, compiled):
    """Each of the four nestings, and reverse mode around them; compiled, PyTorch can do fewer."""
    torch, case = load("torch"), build(form, 1.5)
    f, func, v = torch_loss(case), torch.func, torch.tensor(DIRECTION)
    products = {
        "forward over reverse": lambda z: func.jvp(func.grad(f), (z,), (v,))[1],
        "reverse over reverse": lambda z: func.grad(lambda z: (func.grad(f)(z) * v).sum())(z),
        "reverse over forward": lambda z: func.grad(lambda z: func.jvp(f, (z,), (v,))[1])(z),
        "autograd over reverse": lambda z: torch.autograd.grad((func.grad(f)(z) * v).sum(), z)[0],
    }
    torch._dynamo.reset()
    for name, product in products.items():
        z = torch.tensor(LOGITS, requires_grad=name.startswith("autograd"))
        if name.startswith("autograd") and compiled:
            slope = torch.compile(func.grad(f), fullgraph=True)(z)
            (result,) = torch.autograd.grad((slope * v).sum(), z)
        else:
            result = (torch.compile(product, fullgraph=True) if compiled else product)(z)
        compare(result.detach().numpy(), case)
    if not compiled:
        z = torch.tensor(LOGITS)
        slope = func.jvp(lambda z: func.jvp(f, (z,), (v,))[1], (z,), (v,))[1]
        np.testing.assert_allclose(slope, (hessian_times(case, DIRECTION) * DIRECTION).sum(), 1e-6)


def test_torch_gradcheck():
    """Third derivatives too; autograd's own differences in place of the reference's."""
    torch = load("torch")
    z = torch.tensor(LOGITS, requires_grad=True)
    for form in CASES:
        f = torch_loss(build(form, 1.5))
        assert torch.autograd.gradcheck(f, z)
        assert torch.autograd.gradgradcheck(f, z)


def jax_loss(case):
    losses = load("lmf_multi.jax")
    loss = losses.LMFLoss(case.class_counts, **case.options, reduction=case.reduction)
    return lambda z: loss(z, case.labels, where=case.where)


@forms
@grid
def test_jax(form, gamma):
    jax, case = load("jax"), build(form, gamma)
    f = jax_loss(case)

    @jax.jit
    def products(z, v):
        return {
            "hessian": jax.numpy.einsum("ijkl,kl->ij", jax.hessian(f)(z), v),
            "forward over reverse": jax.jvp(jax.grad(f), (z,), (v,))[1],
            "reverse over reverse": jax.vjp(jax.grad(f), z)[1](v)[0],
            "reverse over forward": jax.grad(lambda z: jax.jvp(f, (z,), (v,))[1])(z),
        }

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for product in products(jax.numpy.array(LOGITS), jax.numpy.array(DIRECTION)).values():
            compare(np.asarray(product), case)


@pytest.mark.skipif(KERAS_BACKEND != "tensorflow", reason="JAX and PyTorch have their own above")
@forms
@grid
def test_keras_on_tensorflow(form, gamma):
    losses, tf, case = load("lmf_multi.keras"), load("tensorflow"), build(form, gamma)
    labels, options = case.labels, {"dtype": "float64"}
    if case.where is not None:
        labels, options = np.where(case.where, labels, -100), {"ignore_class": -100, **options}
    loss = losses.LMFLoss(case.class_counts, **case.options, **options)
    z, v = tf.constant(LOGITS), tf.constant(DIRECTION)

    def product(z):
        with tf.GradientTape() as outer:
            outer.watch(z)
            with tf.GradientTape() as inner:
                inner.watch(z)
                value = loss(labels, z)
            grad = inner.gradient(value, z)
        return outer.gradient(grad, z, v)

    compare((product if gamma < 1 else tf.function(product))(z).numpy(), case)


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.5])
def test_hard_examples_have_finite_curvature(framework, gamma):
    logits, labels = hard_examples()
    case = Case(logits, labels, COUNTS, WEIGHTS, gamma=gamma, dtype="float64", reduction="sum")
    v = np.ones((len(labels), 3)) * [1.0, -1.0, 0.5]
    module = load(framework)
    if framework == "torch":
        z = module.tensor(logits, requires_grad=True)
        (grad,) = module.autograd.grad(torch_loss(case)(z), z, create_graph=True)
        (product,) = module.autograd.grad(grad, z, module.tensor(v))
    else:
        with module.enable_x64(True):
            z = module.numpy.array(logits)
            product = module.jvp(module.grad(jax_loss(case)), (z,), (module.numpy.array(v),))[1]
    product = np.asarray(product)
    assert np.isfinite(product).all()
    finite = np.isfinite(logits).all(1)  # differences across 1e4 keep 1e-7 of the gradient
    expected = hessian_times(replace(case, logits=np.where(finite[:, None], logits, 0.0)), v, 1e-4)
    np.testing.assert_allclose(product[finite], expected[finite], rtol=1e-4, atol=1e-4)
