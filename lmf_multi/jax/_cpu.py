"""The loss of integer labels on one CPU in one pass over the logits, where its kernel was compiled.

XLA calls ``lmf_multi/_cpu.cpp`` instead of the operations, of which it would write the exponentials
to memory. It takes a primitive, since only its lowering knows what a program is compiled for.
"""

import logging
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from lmf_multi._cpu import library

_LOG = logging.getLogger("lmf_multi")
_NAME = "lmf_multi_one_class"
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_MASKED = -2  # the label of an example that takes no part; -1 is an unknown one

# What ``by_kernel`` takes, up to axis, to each example's loss and the gradient
Operations: TypeAlias = Callable[..., tuple[Array, Array]]


@cache
def has_kernel() -> bool:
    """Whether XLA can call the kernel; says once, for debugging, if JAX is too old or too new."""
    compiled = library()
    if compiled is None:
        return False
    try:
        function = cast(Any, jax.ffi).pycapsule(compiled.lmf_multi_one_class_xla)
        jax.ffi.register_ffi_target(_NAME, function, platform="cpu")
    except (AttributeError, RuntimeError) as error:
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


@partial(jax.custom_jvp, nondiff_argnums=(0, 10, 11))
def by_kernel(
    operations: Operations,
    z: Array,
    y: Array,
    masked: Array | None,
    Δ: Array | None,
    w: Array | None,
    a: Any,
    b: Any,
    γ: Any,
    s: Any,
    axis: int,
    with_grad: bool,
) -> tuple[Array, ...]:
    """Each example's loss, and perhaps the gradient, as ``operations`` gives them.

    Those are what shards and other devices run, what is exported, which may run without this
    package, and what is differentiated.

    Args:
        z: float, at most 32 bits, logits, the classes along ``axis``.
        y: int32, the logits' shape without the class axis; -1 for an unknown one, which gives NaN.
        masked: bool, the labels' shape: examples that do not count; or None.
        Δ, w: float32 (C,), margins and class weights, or None without LDAM and for ones.
        a, b: what LDAM and focal are multiplied by; None leaves them out.
    """
    Δ, a = (None, None) if Δ is None or a is None else (Δ, a)
    labels = y if masked is None else jnp.where(masked, _MASKED, y)
    numbers = (γ, s, 0 if a is None else a, 0 if b is None else b)
    results = _one_class.bind(
        *(z, labels, jnp.stack([jnp.asarray(number, jnp.float32) for number in numbers])),
        *(vector for vector in (Δ, w) if vector is not None),
        operations=operations,
        axis=axis,
        has_mask=masked is not None,
        has_ldam=a is not None,
        has_focal=b is not None,
        with_grad=with_grad,
    )
    return tuple(results)


@by_kernel.defjvp
def _by_kernel_jvp(
    operations: Operations, axis: int, with_grad: bool, primals: Any, tangents: Any
) -> Any:
    (z, y, masked, *others), (dz, _, _, *dothers) = primals, tangents

    def differentiable(z: Array, *others: Any) -> tuple[Array, ...]:
        return operations(z, y, masked, *others, axis)[: 1 + with_grad]

    return jax.jvp(differentiable, (z, *others), (dz, *dothers))


# --- the primitive, whose operands are logits, labels, numbers, and the vectors that there are

_one_class: Any = Primitive(_NAME)
_one_class.multiple_results = True
_compiled = jax.jit(
    _one_class.bind,
    static_argnames=("operations", "axis", "has_mask", "has_ldam", "has_focal", "with_grad"),
)


def _eager(*operands: Array, **settings: Any) -> Any:
    config = cast(Any, jax.config)
    if config.jax_debug_nans or config.jax_debug_infs:  # whose alarm names an operation
        return _by_operations(*operands, **settings)
    with jax.disable_jit(False):  # a primitive is compiled by itself whatever the user asks for
        return _compiled(*operands, **settings)


def _shapes(z: Any, labels: Any, *_: Any, with_grad: bool, **settings: Any) -> list[ShapedArray]:
    return [ShapedArray(x.shape, jnp.float32) for x in (labels, z)[: 1 + with_grad]]


def _by_operations(
    z: Array,
    labels: Array,
    numbers: Array,
    *vectors: Array,
    operations: Operations,
    axis: int,
    has_mask: bool,
    has_ldam: bool,
    has_focal: bool,
    with_grad: bool,
) -> tuple[Array, ...]:
    masked = labels == _MASKED if has_mask else None
    Δ = vectors[0] if has_ldam else None
    w = vectors[has_ldam] if len(vectors) > has_ldam else None
    γ, s, a, b = numbers
    terms = a if has_ldam else None, b if has_focal else None
    return operations(z, labels, masked, Δ, w, *terms, γ, s, axis)[: 1 + with_grad]


def _by_call(
    z: Array,
    labels: Array,
    *others: Array,
    axis: int,
    has_ldam: bool,
    has_focal: bool,
    with_grad: bool,
    **settings: Any,
) -> list[Array]:
    """Rows in memory order, (outer, C, inner), or (N, C), for XLA copies an inner axis of 1."""
    z = z if z.dtype == jnp.bfloat16 else z.astype(jnp.float32)
    outer, C, inner = math.prod(z.shape[:axis]), z.shape[axis], math.prod(z.shape[axis + 1 :])
    rows = (outer,) if inner == 1 else (outer, inner)
    shapes = [rows, (outer, C, *rows[1:])]
    call = jax.ffi.ffi_call(_NAME, [ShapedArray(x, jnp.float32) for x in shapes[: 1 + with_grad]])
    operands = z.reshape(shapes[1]), labels.reshape(rows), *others
    results = call(*operands, has_focal=np.bool_(has_focal), has_ldam=np.bool_(has_ldam))
    return [x.reshape(like.shape) for x, like in zip(results, (labels, z), strict=False)]


def _lowered(context: Any, *operands: Any, **settings: Any) -> Any:
    module = context.module_context
    where = module.axis_context
    alone = isinstance(where, mlir.ShardingContext) and where.num_devices == 1
    chosen = _by_call if alone and not module.lowering_parameters.for_export else _by_operations
    return mlir.lower_fun(chosen, multiple_results=True)(context, *operands, **settings)


def _batched(operands: Any, axes: Any, *, axis: int, **settings: Any) -> tuple[Any, list[int]]:
    (z, labels, *others), (i, j, *of_others) = operands, axes
    if any(k is not None for k in of_others):  # each its own numbers or vectors
        results = jax.vmap(partial(_by_operations, axis=axis, **settings), axes)(*operands)
    else:
        n = labels.shape[j] if i is None else z.shape[i]
        z, labels = _mapped(z, i, n), _mapped(labels, j, n)
        results = _one_class.bind(z, labels, *others, axis=axis + 1, **settings)
    return results, [0] * len(results)


def _mapped(x: Array, axis: int | None, n: int) -> Array:
    """With the axis that is mapped over in front."""
    return jnp.broadcast_to(x, (n, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)


_one_class.def_impl(_eager)
_one_class.def_abstract_eval(_shapes)
batching.primitive_batchers[_one_class] = _batched
mlir.register_lowering(_one_class, mlir.lower_fun(_by_operations, multiple_results=True))
mlir.register_lowering(_one_class, _lowered, platform="cpu")
