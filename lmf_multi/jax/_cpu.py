"""The loss of integer labels on one CPU in one pass over the logits, where its kernel was compiled.

XLA calls ``lmf_multi/_kernel`` instead of the operations, of which it would write the exponentials
to memory. It takes a primitive, since only its lowering knows what a program is compiled for.
"""

import ctypes
import logging
import math
from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmf_multi._kernel import library
from lmf_multi._terms import Labels, Terms
from lmf_multi.jax._closed_form import value_and_grad

_MOVED: ImportError | None = None
try:  # what JAX may move from one version to the next, and what only the kernel needs
    from jax.core import ShapedArray
    from jax.extend.core import Primitive
    from jax.interpreters.batching import primitive_batchers
    from jax.interpreters.mlir import ShardingContext, lower_fun, register_lowering
except ImportError as error:
    _MOVED = error

_LOG = logging.getLogger("lmf_multi")
_NAME = "lmf_multi_one_class"
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_MASKED = -2  # the label of an example that takes no part; -1 is an unknown one


def has_kernel() -> bool:
    """Whether XLA can call the kernel, which the environment may switch off."""
    compiled = library()
    return compiled is not None and _registers(compiled)


@cache
def _registers(compiled: ctypes.CDLL) -> bool:
    """Tell XLA of the kernel; says once, for debugging, if JAX is too old or too new."""
    try:
        if _MOVED is not None:
            raise _MOVED
        function = cast(Any, jax.ffi).pycapsule(compiled.lmf_multi_one_class_xla)
        jax.ffi.register_ffi_target(_NAME, function, platform="cpu")
        _primitive()
    except (AttributeError, ImportError, RuntimeError) as error:
        _LOG.debug("JAX %s cannot call the CPU kernel: %s", jax.__version__, error)
        return False
    return True


def has_kernel_for(z: Array) -> bool:
    """Whether ``by_kernel`` takes these logits, as far as tracing tells.

    Not where there is a mesh, with its rules for what primitives do to sharded arrays.
    """
    return (
        z.dtype in _DTYPES
        and all(isinstance(n, int) for n in z.shape)
        and z.size > 0
        and jax.default_backend() == "cpu"
        and has_kernel()
        and jax.typeof(z).sharding.mesh.empty
    )


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def by_kernel(
    z: Array, labels: Labels, terms: Terms, axis: int, with_grad: bool
) -> tuple[Array, Array | None]:
    """Loss (N,), and perhaps the gradient (N, C), as ``value_and_grad`` gives them.

    That is what shards and other devices run, what is exported, which may run without this
    package, and what is differentiated.

    Args:
        z: float (N, C), at most 32 bits, logits, the classes along ``axis``.
        labels: y int32 (N,), -1 for an unknown one, which gives NaN; masked bool (N,) or None.
        terms: Δ, w float32 (C,).
    """
    terms = Terms(*(None if x is None else jnp.asarray(x, jnp.float32) for x in terms))
    operands, structure = jax.tree.flatten((z, labels, terms))
    results = _primitive().bind(*operands, structure=structure, axis=axis, with_grad=with_grad)
    return results[0], results[1] if with_grad else None


@by_kernel.defjvp
def _by_kernel_jvp(axis: int, with_grad: bool, primals: Any, tangents: Any) -> Any:
    (z, labels, terms), (dz, _, dterms) = primals, tangents

    def differentiable(z: Array, terms: Terms) -> tuple[Array, Array | None]:
        loss, grad = value_and_grad(z, labels, terms, axis)
        return loss, grad if with_grad else None

    return jax.jvp(differentiable, (z, terms), (dz, dterms))


# --- the primitive, whose operands are the arrays of logits, labels and terms, of a known structure


@cache
def _primitive() -> Any:
    """The call as programs hold it until they are lowered for a device."""
    primitive: Any = Primitive(_NAME)
    primitive.multiple_results = True
    primitive.def_impl(_eager)
    primitive.def_abstract_eval(_shapes)
    primitive_batchers[primitive] = _batched
    register_lowering(primitive, lower_fun(_by_operations, multiple_results=True))
    register_lowering(primitive, _lowered, platform="cpu")
    return primitive


@partial(jax.jit, static_argnames=("structure", "axis", "with_grad"))
def _compiled(*operands: Array, **settings: Any) -> Any:
    return _primitive().bind(*operands, **settings)


def _eager(*operands: Array, **settings: Any) -> Any:
    config = cast(Any, jax.config)
    if config.jax_debug_nans or config.jax_debug_infs:  # whose alarm names an operation
        return _by_operations(*operands, **settings)
    with jax.disable_jit(False):  # a primitive is compiled by itself whatever the user asks for
        return _compiled(*operands, **settings)


def _shapes(z: Any, y: Any, *_: Any, with_grad: bool, **settings: Any) -> list[Any]:
    return [ShapedArray(x.shape, jnp.float32) for x in (y, z)[: 1 + with_grad]]


def _by_operations(
    *operands: Array, structure: Any, axis: int, with_grad: bool
) -> tuple[Array, ...]:
    z, labels, terms = structure.unflatten(operands)
    return value_and_grad(z, labels, terms, axis)[: 1 + with_grad]


def _by_call(*operands: Array, structure: Any, axis: int, with_grad: bool) -> list[Array]:
    """Rows in memory order, (outer, C, inner), or (N, C), for XLA copies an inner axis of 1."""
    z, (y, masked, _), (Δ, w, a, b, γ, s) = structure.unflatten(operands)
    labels = y if masked is None else jnp.where(masked, _MASKED, y)
    numbers = jnp.stack([jnp.float32(0) if number is None else number for number in (γ, s, a, b)])
    vectors = [v for v in (None if a is None else Δ, w) if v is not None]
    outer, C, inner = math.prod(z.shape[:axis]), z.shape[axis], math.prod(z.shape[axis + 1 :])
    rows = (outer,) if inner == 1 else (outer, inner)
    shapes = [rows, (outer, C, *rows[1:])]
    call = jax.ffi.ffi_call(_NAME, [ShapedArray(x, jnp.float32) for x in shapes[: 1 + with_grad]])
    settings = {"has_focal": np.bool_(b is not None), "has_ldam": np.bool_(a is not None)}
    results = call(z.reshape(shapes[1]), labels.reshape(rows), numbers, *vectors, **settings)
    return [x.reshape(like.shape) for x, like in zip(results, (y, z), strict=False)]


def _lowered(context: Any, *operands: Any, **settings: Any) -> Any:
    module = context.module_context
    where = module.axis_context
    alone = isinstance(where, ShardingContext) and where.num_devices == 1
    chosen = _by_call if alone and not module.lowering_parameters.for_export else _by_operations
    return lower_fun(chosen, multiple_results=True)(context, *operands, **settings)


def _batched(
    operands: Any, axes: Any, *, structure: Any, axis: int, **settings: Any
) -> tuple[Any, list[int]]:
    """With the axis that is mapped over in front; numbers and vectors that are take operations."""
    (z, labels, terms), (i, j, others) = map(structure.unflatten, (operands, axes))
    settings["structure"] = structure
    if jax.tree.leaves(others):
        results = jax.vmap(partial(_by_operations, axis=axis, **settings), axes)(*operands)
    else:
        rows = (z, *labels), (i, *j)
        n = next(x.shape[k] for x, k in zip(*rows, strict=True) if k is not None)
        z, *labels = (None if x is None else _mapped(x, k, n) for x, k in zip(*rows, strict=True))
        operands = jax.tree.leaves((z, labels, terms))
        results = _primitive().bind(*operands, axis=axis + 1, **settings)
    return results, [0] * len(results)


def _mapped(x: Array, axis: int | None, n: int) -> Array:
    return jnp.broadcast_to(x, (n, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
