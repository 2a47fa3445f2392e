"""The two terms, by whatever computes them, and how JAX differentiates them.

The gradient's closed form is computed together with the value: reverse mode keeps one array of the
logits' size, and forward mode and Hessians differentiate the closed form.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from lmf_multi._terms import Labels, Terms
from lmf_multi.jax._closed_form import value_and_grad
from lmf_multi.jax._cpu import by_kernel, has_kernel_for


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def mixture(z: Array, labels: Labels, terms: Terms, axis: int | None) -> Array:
    """W (a LDAM + b Focal) of each example (N,), of logits (N, C), with ``axis`` their class axis.

    Without one it is the sigmoid form, of logits (N,).
    """
    return _chosen(z, labels, terms, axis, False)[0]


@partial(mixture.defjvp, symbolic_zeros=True)
def _mixture_jvp(axis: int | None, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (z, labels, terms), (dz, dlabels, dterms) = primals, tangents
    loss, grad = _chosen(z, labels, terms, axis, True)
    dloss = jnp.zeros_like(loss)
    if not isinstance(dz, SymbolicZero):
        change = grad * dz.astype(grad.dtype)
        dloss += change if axis is None else change.sum(axis)
    others = dlabels.q, dterms  # of what an argument lacks, None, so has its tangent
    if not all(isinstance(d, SymbolicZero) for d in jax.tree.leaves(others)):

        def value(q: Array | None, terms: Terms) -> Array:
            return _chosen(z, labels._replace(q=q), terms, axis, False)[0]

        _, d = jax.jvp(value, (labels.q, terms), jax.tree.map(_instantiate, others))
        dloss += d
    return loss, dloss


def _instantiate(tangent: Any) -> Any:
    is_zero = isinstance(tangent, SymbolicZero)
    return jnp.zeros(tangent.shape, tangent.dtype) if is_zero else tangent


def _chosen(
    z: Array, labels: Labels, terms: Terms, axis: int | None, with_grad: bool
) -> tuple[Array, Any]:
    """Loss (N,), and the gradient (N, C) where it is wanted, by the kernel or by operations."""
    if (axis is None or labels.q is None) and has_kernel_for(z):
        return by_kernel(z, labels, terms, axis, with_grad)
    return value_and_grad(z, labels, terms, axis)
