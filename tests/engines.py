"""Differentiation by each framework: NumPy arrays in, value and gradient in NumPy out.

``call(parameters, z, y)`` or ``call(parameters, z, y, where)`` is the loss; ``mode`` says how it is
run. Compiled functions are cached by ``call``, so that values alone never cost a compilation.
"""

import gc
import os
import sys
from collections import ChainMap
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np

from tests.cases import Result
from tests.frameworks import load

cached = lru_cache(maxsize=32)  # compiled code takes memory: what is not used again goes


def torch_engine(call, parameters, arrays, dtypes, mode):
    torch = load("torch")
    tensors = {
        name: torch.tensor(a, device="cpu").to(getattr(torch, dtypes[name]))
        for name, a in arrays.items()
    }
    upstream = tensors.pop("upstream")
    if mode == "vmap":

        def scaled(z, y, upstream):
            value = call(parameters, z, y)
            return upstream * value, value

        each = torch.func.vmap(torch.func.grad_and_value(scaled, has_aux=True))
        grad, (_, value) = each(tensors["z"], tensors["y"], upstream)
    else:
        z = tensors["z"].requires_grad_()
        run = torch_compiled(call, mode) if mode in ("compile", "operator") else call
        with kernel_switch("always") if mode == "operator" else nullcontext():
            value = run(parameters, **tensors)
        value.backward(upstream)
        grad = z.grad
    names = [str(tensor.dtype).removeprefix("torch.") for tensor in (value, grad)]
    return Result(value.detach().double().numpy(), grad.double().numpy(), *names)


def kernel_switch(setting):
    """What the environment says of the CPU kernel: "0" for off, "always" for small batches too.

    As Python sees it. The process' own stays as it is: XLA's threads read it while they compute,
    and crash where it is written meanwhile.
    """
    return mock.patch.object(
        os, "environ", _Switched({"LMF_MULTI_CPU_KERNEL": setting}, os.environ)
    )


class _Switched(ChainMap):
    """The process' variables, some of which are seen with other values; writes change its own.

    PyTorch's Inductor hands its compiled code an address by such a write.
    """

    def __setitem__(self, name, value):
        self.maps[1][name] = value

    def __delitem__(self, name):
        del self.maps[1][name]

    def copy(self):
        return dict(self)


@cached
def torch_compiled(call, mode):
    torch = load("torch")
    config = torch._dynamo.config  # one entry for each plan, and none given up
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, 1000)

    def operator(*arguments, **tensors):  # Dynamo keeps programs by code, whatever the environment
        return call(*arguments, **tensors)

    return torch.compile(operator if mode == "operator" else call, fullgraph=True)


def jax_engine(call, parameters, arrays, dtypes, mode):
    jax = load("jax")
    with jax.enable_x64(dtypes["z"] == "float64"), strict(jax):
        arrays = {
            k: jax.numpy.asarray(a.astype(jax.numpy.dtype(dtypes[k]))) for k, a in arrays.items()
        }
        changes = {"operations": without_kernel, "alarms": lambda: alarms(jax, arrays.values())}
        with changes.get(mode, nullcontext)():
            value, grad = jax_function(call, mode)(parameters, arrays)
        names = value.dtype.name, grad.dtype.name
        return Result(*(np.asarray(a).astype(np.float64) for a in (value, grad)), *names)


@contextmanager
def strict(jax):
    """What users set against surprises, without which nothing here runs."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@contextmanager
def alarms(jax, arrays):
    """Every operation by itself, and none may give NaN or infinity where the input has none."""
    floats = [a for a in arrays if jax.numpy.issubdtype(a.dtype, jax.numpy.floating)]
    finite = all(np.isfinite(np.asarray(a, np.float64)).all() for a in floats)
    holds = all(a.dtype != "float16" for a in floats)  # which a gradient may leave
    with jax.disable_jit(), jax.debug_nans(finite), jax.debug_infs(finite and holds):
        yield


def without_kernel():
    """Operations on the CPU too, as elsewhere."""
    return kernel_switch("0")


@cached
def jax_function(call, mode):
    jax = load("jax")

    def run(parameters, arrays):
        others = {name: array for name, array in arrays.items() if name in ("y", "where")}
        value, pull = jax.vjp(lambda z: call(parameters, z, **others), arrays["z"])
        return value, pull(arrays["upstream"])[0]

    if mode == "vmap":
        return jax.vmap(run, (None, 0))
    return run if mode in ("eager", "alarms") else jax.jit(run)


def tensorflow_engine(call, parameters, arrays, dtypes, mode):
    tf = load("tensorflow")
    tensors = {name: tf.cast(tf.constant(a), dtypes[name]) for name, a in arrays.items()}
    with without_kernel() if mode == "operations" else nullcontext():
        value, grad = tensorflow_function(call, mode)(parameters, tensors)
    results = (tf.cast(tensor, tf.float64).numpy() for tensor in (value, grad))
    return Result(*results, value.dtype.name, grad.dtype.name)


@cached
def tensorflow_function(call, mode):
    tf = load("tensorflow")

    def run(parameters, tensors):
        others = {name: tensor for name, tensor in tensors.items() if name in ("y", "where")}
        with tf.GradientTape() as tape:
            tape.watch(tensors["z"])
            value = call(parameters, tensors["z"], **others)
        return value, tape.gradient(value, tensors["z"], tensors["upstream"])

    return run if mode == "eager" else tf.function(run, jit_compile=mode != "graph")


ENGINES = {"torch": torch_engine, "jax": jax_engine, "tensorflow": tensorflow_engine}


def mappings():
    """How many of memory this process has; 0 where the system does not tell."""
    file = Path("/proc/self/maps")
    return file.read_bytes().count(b"\n") if file.exists() else 0


def forget():
    """Let go of compiled code, which takes memory and mappings, of which a process has so many."""
    for function in (torch_compiled, jax_function, tensorflow_function):
        function.cache_clear()
    if "jax" in sys.modules:
        load("jax").clear_caches()
    if "torch" in sys.modules:
        load("torch").compiler.reset()
    gc.collect()
