"""PyTorch's Triton kernel where it is called again and again, compiled, or captured."""

from importlib import import_module

import numpy as np
import pytest

from tests.adapters import Triton
from tests.frameworks import load

COUNTS = (625, 60, 16, 4, 1)
CALLS = {
    "mean": ((40, 5), {}),
    "pixels": ((2, 5, 8, 16), {"reduction": "none"}),
    "smoothed": ((2, 5, 8, 16), {"reduction": "sum", "label_smoothing": 0.1}),
    "adjusted": ((40, 5), {"logit_adjustment": 1.0, "gamma": 0.5}),
    "focal alone": ((40, 5), {"alpha": 0.0, "ignore_index": 3}),
    "three strides": ((4, 5, 3, 2, 2), {}),
}


@pytest.fixture
def torch(monkeypatch):
    Triton("triton").losses  # noqa: B018  imports what it needs, or skips
    monkeypatch.setenv("LMF_MULTI_CPU_KERNEL", "0")
    monkeypatch.setenv("LMF_MULTI_TRITON", "always")
    torch = load("torch")
    torch._dynamo.reset()
    with np.errstate(all="ignore"), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield torch


def batch(torch, shape, seed=0, ignored=-100):
    """Logits and labels, some of them masked; strides that two of rows do not address in 5-D."""
    torch.manual_seed(seed)
    z = 3 * torch.randn(shape)
    z = z.permute(0, 1, 4, 2, 3) if z.dim() == 5 else z
    y = torch.randint(0, 3, z[:, 0].shape)
    y[0] = ignored
    return z.detach().requires_grad_(), y


def value_and_grad(torch, loss, z, y, seed=0):
    """With an upstream gradient of its own for each loss."""
    value = loss(z, y)
    torch.manual_seed(seed)
    return value.detach(), *torch.autograd.grad(value, z, torch.rand(value.shape) + 0.5)


def exact(torch, loss, z, y):
    """Of float64 logits, in operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMF_MULTI_TRITON", "0")
        return value_and_grad(torch, loss, z.detach().double().requires_grad_(), y)


def close(torch, found, expected):
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=0)
    size = expected[1].abs().max()
    torch.testing.assert_close(found[1].double(), expected[1], rtol=0, atol=1e-5 * size.item())


@pytest.mark.parametrize("call", CALLS)
def test_programs_are_launched_again(torch, call):
    """What Triton compiled for a shape is launched at once with other numbers and addresses."""
    shape, options = CALLS[call]
    loss = load("lmf_multi.torch").LMFLoss(COUNTS, class_weight="balanced", **options)
    for seed in range(3):
        z, y = batch(torch, shape, seed, loss.ignore_index)
        close(torch, value_and_grad(torch, loss, z, y), exact(torch, loss, z, y))
    # an address that is no multiple of 16 bytes, for which another program is compiled
    odd = torch.empty(z.numel() + 1)[1:].view(z.shape).copy_(z.detach()).requires_grad_()
    close(torch, value_and_grad(torch, loss, odd, y), exact(torch, loss, z, y))


@pytest.mark.parametrize("call", CALLS)
def test_compiled_code_calls_it(torch, call):
    shape, options = CALLS[call]
    loss = load("lmf_multi.torch").LMFLoss(COUNTS, class_weight="balanced", **options)
    z, y = batch(torch, shape, ignored=loss.ignore_index)
    called = []

    def see(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return import_module("functorch.compile").make_boxed_func(graph.forward)

    aot_autograd = import_module("torch._dynamo.backends.common").aot_autograd
    seen = torch.compile(loss, backend=aot_autograd(fw_compiler=see, bw_compiler=see))
    close(torch, value_and_grad(torch, seen, z, y), exact(torch, loss, z, y))
    assert {"lmf_multi.fused.default", "lmf_multi.fused_gradient.default"} <= {*called}
    torch._dynamo.reset()
    found = value_and_grad(torch, torch.compile(loss), z, y)
    close(torch, found, exact(torch, loss, z, y))
    assert found[1].stride() == torch.empty_like(z).stride()


def test_long_rows_in_compiled_code(torch):
    """Whose statistics are kept for the backward pass."""
    torch.manual_seed(0)
    z, y = torch.randn(3, 20000, requires_grad=True), torch.tensor([0, 19999, -100])
    loss = load("lmf_multi.torch").LMFLoss([*range(20000, 0, -1)])
    compiled = torch.compile(loss)
    close(torch, value_and_grad(torch, compiled, z, y), exact(torch, loss, z, y))


def test_second_derivatives_of_compiled_code(torch):
    loss = load("lmf_multi.torch").LMFLoss(COUNTS)
    z, y = batch(torch, (40, 5))
    operators = load("lmf_multi.torch._triton")
    seconds = []
    for function in (lambda z: loss(z, y), lambda z: _operator_loss(torch, operators, loss, z, y)):
        (grad,) = torch.autograd.grad(function(z), z, create_graph=True)
        seconds += torch.autograd.grad(grad.square().sum(), z)
    torch.testing.assert_close(*seconds)
    assert seconds[0].abs().max() > 0


def _operator_loss(torch, operators, loss, z, y):
    """What compiled code computes, without compiling it."""
    numbers = [loss.alpha, loss.beta, loss.gamma, loss.scale, loss.label_smoothing]
    vectors = (loss.margins, loss.class_weight, None)
    settings = (1, -100, "mean", False)
    return operators.operator(z, y, None, *vectors, None, None, numbers, *settings)[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which the check itself looks at
def test_the_operators_keep_pytorchs_rules(torch):
    """Of schemas, of what is drawn up without numbers, of gradients."""
    operators, Δ = load("lmf_multi.torch._triton"), torch.linspace(0.1, 0.5, 5)
    z, y = batch(torch, (40, 5))
    for reduction in ("mean", "none"):
        settings = ([1.5, 1.0, 1.5, 30.0, 0.0], 1, -100, reduction, False)
        arguments = (z, y, None, Δ, None, None, None, None, *settings)
        torch.library.opcheck(operators.operator, arguments)


def test_what_is_switched_off_takes_operations(torch, monkeypatch):
    monkeypatch.setenv("LMF_MULTI_TRITON", "0")
    monkeypatch.setattr(
        load("lmf_multi.torch._triton"), "forward", None
    )  # to be called is an error
    loss = load("lmf_multi.torch").LMFLoss(COUNTS)
    z, y = batch(torch, (40, 5))
    close(torch, value_and_grad(torch, torch.compile(loss), z, y), exact(torch, loss, z, y))


def test_a_cuda_graph_replays_it(torch):
    """Nothing waits for the device, so that a step can be captured and replayed."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    loss = load("lmf_multi.torch").LMFLoss(COUNTS, class_weight="balanced")
    z, y = batch(torch, (4096, 5))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(loss(z, y), z)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(z, y)
        (grad,) = torch.autograd.grad(value, z)
    for seed in (1, 2):
        with torch.no_grad():
            z.copy_(batch(torch, (4096, 5), seed)[0])
        graph.replay()
        fresh = z.detach().clone().requires_grad_()
        again = loss(fresh, y)
        torch.testing.assert_close(value, again)
        torch.testing.assert_close(grad, *torch.autograd.grad(again, fresh))
