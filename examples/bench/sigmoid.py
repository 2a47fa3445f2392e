"""What ``bench_loss --sigmoid`` measures: the sigmoid form beside binary cross-entropy.

Labels are floats, 0 and 1, one in five positive; the label axis is the second in every framework.
"""

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np

from examples.bench.measure import Run


def of(framework: str) -> SimpleNamespace:
    """The framework's module, with other contenders."""
    module, contenders = (
        importlib.import_module(f"examples.bench.{framework}"),
        globals()[framework],
    )

    def with_copy(shape: tuple[int, ...], dtype: str, device: str) -> dict[str, Run]:
        rng = np.random.default_rng(0)
        x, t = rng.normal(size=shape), (rng.random(shape) < 0.2).astype("float32")
        return dict(contenders(module, x, t, dtype, device))

    return SimpleNamespace(**{**vars(module), "contenders": with_copy})


def counts(x: np.ndarray) -> tuple[Any, Any]:
    """Positive and negative examples of each label, or of the only one."""
    L = x.shape[1]
    return (100, 900) if L == 1 else (np.linspace(10, 900, L).astype(int), np.full(L, 1000))


def torch(module: Any, x: np.ndarray, t: np.ndarray, dtype: str, device: str) -> dict[str, Run]:
    """Eager and compiled."""
    torch = module.torch
    logits = torch.tensor(x, dtype=getattr(torch, dtype), device=device).requires_grad_()
    labels, target = torch.tensor(t, device=device), torch.empty_like(logits)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    ours = importlib.import_module("lmf_multi.torch").SigmoidLMFLoss(*counts(x)).to(device)
    losses = {"cross-entropy": lambda z, y: bce(z, y.to(z.dtype)), "ours": ours}
    torch._dynamo.reset()  # each shape is compiled for itself
    losses |= {f"{name}, compiled": torch.compile(loss) for name, loss in losses.items()}

    def step(loss: Any) -> Run:
        def run() -> None:
            torch.autograd.grad(loss(logits, labels), logits)

        return Run(run, lambda: module.peak_memory(run, device))

    copy = {"copy": Run(lambda: target.detach().copy_(logits.detach()), lambda: None)}
    return copy | {name: step(loss) for name, loss in losses.items()}


def jax(module: Any, x: np.ndarray, t: np.ndarray, dtype: str, device: str) -> dict[str, Run]:
    """Compiled."""
    jax, bce = module.jax, module.optax.sigmoid_binary_cross_entropy
    z, y = jax.numpy.asarray(x, dtype), jax.numpy.asarray(t)
    ours = importlib.import_module("lmf_multi.jax").SigmoidLMFLoss(*counts(x), axis=1)
    losses = {
        "cross-entropy": lambda z, y: bce(z, y.astype(z.dtype)).mean(),
        "ours": lambda z, y: ours(z, y),
    }
    copy = jax.jit(lambda z: z.copy())

    def step(loss: Any) -> Run:
        program = module.compiled(loss, z, y)
        found = program.memory_analysis()
        memory = found.temp_size_in_bytes + found.output_size_in_bytes
        return Run(lambda: jax.block_until_ready(program(z, y)), lambda: memory)

    runs = {"copy": Run(lambda: jax.block_until_ready(copy(z)), lambda: None)}
    return runs | {name: step(loss) for name, loss in losses.items()}


def keras(module: Any, x: np.ndarray, t: np.ndarray, dtype: str, device: str) -> dict[str, Run]:
    """Compiled by XLA."""
    tf, of_keras = module.tf, module.keras.losses
    z, y = tf.cast(x, dtype), tf.constant(t)
    loss = importlib.import_module("lmf_multi.keras").SigmoidLMFLoss
    losses = {
        "cross-entropy": of_keras.BinaryCrossentropy(from_logits=True, dtype=dtype),
        "ours": loss(*counts(x), axis=1, dtype=dtype),
    }
    copy = tf.function(lambda z: tf.identity(z) + tf.zeros([], z.dtype), jit_compile=True)

    def step(run: Any, *arrays: Any) -> Run:
        def call() -> None:
            tf.nest.map_structure(lambda result: result.numpy(), run(*arrays))

        return Run(call, lambda: None)

    runs = {"copy": step(copy, z)}
    return runs | {name: step(module.compiled(loss), z, y) for name, loss in losses.items()}
