"""The loss on one CPU in one pass over the logits, where its kernel was compiled.

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
_NAME = "lmf_multi_loss"
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_MASKED = -2  # the label of an example that takes no part; -1 is an unknown one, or NaN


def has_kernel(logits: int = 0) -> bool:
    """Whether XLA can call the kernel, which the environment may switch off."""
    compiled = library(logits)
    return compiled is not None and _registers(compiled)


@cache
def _registers(compiled: ctypes.CDLL) -> bool:
    """Tell XLA of the kernel; says once, for debugging, if JAX is too old or too new."""
    try:
        if _MOVED is not None:
            raise _MOVED
        function = cast(Any, jax.ffi).pycapsule(compiled.lmf_multi_loss_xla)
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
        and has_kernel(z.size)
        and jax.typeof(z).sharding.mesh.empty
    )


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def by_kernel(
    z: Array, labels: Labels, terms: Terms, axis: int | None, with_grad: bool
) -> tuple[Array, Array | None]:
    """Loss (N,), and perhaps the gradient (N, C), as ``value_and_grad`` gives them.

    That is what shards and other devices run, what is exported, which may run without this
    package, and what is differentiated.

    Args:
        z: float (N, C), at most 32 bits, logits, the classes along ``axis``; (N,) in the sigmoid
            form, which has none.
        labels: y int32 (N,), -1 for an unknown one, which gives NaN; masked bool (N,) or None. Or q
            float32 (2, N) of the sigmoid form, before smoothing.
        terms: Δ, w, o float32 (C,), or of the sigmoid form (2, …), (2, …) and as the logits.
    """
    terms = Terms(*(None if x is None else jnp.asarray(x, jnp.float32) for x in terms))
    operands, structure = jax.tree.flatten((z, labels, terms))
    results = _primitive().bind(*operands, structure=structure, axis=axis, with_grad=with_grad)
    return results[0], results[1] if with_grad else None


@by_kernel.defjvp
def _by_kernel_jvp(axis: int | None, with_grad: bool, primals: Any, tangents: Any) -> Any:
    def differentiable(z: Array, labels: Labels, terms: Terms) -> tuple[Array, Array | None]:
        loss, grad = value_and_grad(z, labels, terms, axis)
        return loss, grad if with_grad else None

    return jax.jvp(differentiable, primals, tangents)


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


def _shapes(z: Any, *_: Any, axis: int | None, with_grad: bool, **settings: Any) -> list[Any]:
    examples = z.shape if axis is None else z.shape[:axis] + z.shape[axis + 1 :]
    return [ShapedArray(shape, jnp.float32) for shape in (examples, z.shape)[: 1 + with_grad]]


def _by_operations(
    *operands: Array, structure: Any, axis: int | None, with_grad: bool
) -> tuple[Array, ...]:
    z, labels, terms = structure.unflatten(operands)
    return value_and_grad(z, labels, terms, axis)[: 1 + with_grad]


def _by_call(*operands: Array, structure: Any, axis: int | None, with_grad: bool) -> list[Array]:
    """Rows in memory order, (outer, C, inner), or (N, C), for XLA copies an inner axis of 1."""
    z, (y, masked, q), (Δ, w, a, b, γ, s, o, ε) = structure.unflatten(operands)
    vectors = [v for v in (None if a is None else Δ, w, o) if v is not None]
    results, is_sigmoid = _shapes(z, axis=axis, with_grad=with_grad), axis is None
    if axis is not None:
        sizes = [math.prod(z.shape[:axis]), z.shape[axis], math.prod(z.shape[axis + 1 :])]
        labels = y
    else:
        sizes, vectors = _labels(z, vectors)  # (2, …), but o
        labels = jnp.where(y < 0, jnp.nan, jnp.float32(y)) if q is None else q[1]
    labels = labels if masked is None else jnp.where(masked, _MASKED, labels)
    numbers = [jnp.float32(0) if number is None else number for number in (γ, s, a, b, ε)]
    sizes = sizes[: 3 if sizes[2] > 1 else 2]
    of_labels = sizes if is_sigmoid else [sizes[0], *sizes[2:]]
    shaped = [x.update(shape=n) for x, n in zip(results, (of_labels, sizes), strict=False)]
    terms = {"has_focal": b is not None, "has_ldam": a is not None, "is_sigmoid": is_sigmoid}
    terms["has_adjustment"] = o is not None
    settings = {name: np.bool_(value) for name, value in terms.items()}
    call = jax.ffi.ffi_call(_NAME, shaped)
    found = call(
        z.reshape(sizes), labels.reshape(of_labels), jnp.stack(numbers), *vectors, **settings
    )
    return [x.reshape(like.shape) for x, like in zip(found, results, strict=True)]


def _labels(z: Array, vectors: list[Array]) -> tuple[list[int], list[Array]]:
    """The sizes before, of and after the label axis of the sigmoid form; and vectors (…, L).

    Those broadcast against the logits, those of negative and positive with 2 in front.
    """
    own = [v.shape[v.ndim - z.ndim :] for v in vectors]
    axis = next((i for shape in own for i, n in enumerate(shape) if n > 1), None)
    L = 1 if axis is None else z.shape[axis]
    signs = [v.shape[: v.ndim - z.ndim] for v in vectors]
    flat = [
        jnp.broadcast_to(v.reshape(*sign, -1), (*sign, L))
        for v, sign in zip(vectors, signs, strict=True)
    ]
    if axis is None:
        return [1, 1, z.size], flat
    return [math.prod(z.shape[:axis]), L, math.prod(z.shape[axis + 1 :])], flat


def _lowered(context: Any, *operands: Any, **settings: Any) -> Any:
    module = context.module_context
    where = module.axis_context
    alone = isinstance(where, ShardingContext) and where.num_devices == 1
    chosen = _by_call if alone and not module.lowering_parameters.for_export else _by_operations
    return lower_fun(chosen, multiple_results=True)(context, *operands, **settings)


def _batched(
    operands: Any, axes: Any, *, structure: Any, axis: int | None, **settings: Any
) -> tuple[Any, list[int]]:
    """With the axis that is mapped over in front; numbers and vectors that are take operations."""
    (z, labels, terms), (i, j, others) = map(structure.unflatten, (operands, axes))
    settings["structure"] = structure
    if jax.tree.leaves(others):
        results = jax.vmap(partial(_by_operations, axis=axis, **settings), axes)(*operands)
        return results, [0] * len(results)
    rows = list(zip((z, *labels), (i, *j), strict=True))
    n = next(x.shape[k] for x, k in rows if k is not None)
    z, *labels = (None if x is None else _mapped(x, k, n, x is labels.q) for x, k in rows)
    if axis is None:
        Δ, w = (None if v is None else jnp.expand_dims(v, 1) for v in (terms.Δ, terms.w))
        o = None if terms.o is None else jnp.expand_dims(terms.o, 0)
        terms = terms._replace(Δ=Δ, w=w, o=o)
    operands = jax.tree.leaves((z, labels, terms))
    results = _primitive().bind(*operands, axis=None if axis is None else axis + 1, **settings)
    return results, [0] * len(results)


def _mapped(x: Array, axis: int | None, n: int, to: int) -> Array:
    """With the axis that is mapped over as number ``to``, which is 1 for q (2, …)."""
    if axis is not None:
        return jnp.moveaxis(x, axis, to)
    return jnp.broadcast_to(jnp.expand_dims(x, to), (*x.shape[:to], n, *x.shape[to:]))
