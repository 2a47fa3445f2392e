"""The loss of integer labels in one pass over the logits, in what XLA compiles for CPUs alone.

TensorFlow's XLA calls ``lmf_multi/_kernel``, as JAX's does, by a StableHLO module in the graph.
A saved model may hold that module, in a trace from before, and needs this one imported.
"""

import ctypes
import logging
import math
import os
from functools import cache
from typing import Any

import tensorflow as tf

from lmf_multi._kernel import library
from lmf_multi._terms import Labels, Terms
from lmf_multi.keras._tensorflow._closed_form import one_class

_LOG = logging.getLogger("lmf_multi")
_MASKED = -2  # the label of an example that takes no part; -1 is an unknown one
_VERSION = 9  # of what a module in the graph may hold
# what XLA says that it does not know, where a saved step runs without this module
_NAME = "lmf_multi_one_class (import lmf_multi.keras before running this step)"


def has_kernel() -> bool:
    """Whether XLA can call the kernel, which the environment may switch off."""
    compiled = library()
    return compiled is not None and _registers(compiled)


@cache
def _registers(compiled: ctypes.CDLL) -> bool:
    """Tell XLA of the kernel; says once, for debugging, if it is too old or too new."""
    try:
        from tensorflow.compiler.tf2xla.python import xla
        from tensorflow.python.ops import control_flow_util  # noqa: F401
        from tensorflow.python.saved_model import save_context  # noqa: F401

        name = tf.sysconfig.get_link_flags()[-1].removeprefix("-l:")
        interface = ctypes.CDLL(os.path.join(tf.sysconfig.get_lib(), name)).XLA_FFI_GetApi
        newest = xla.call_module_maximum_supported_version()
    except (ImportError, OSError, AttributeError) as error:
        return _cannot(str(error))
    if newest < _VERSION:
        return _cannot(f"its modules are of version {newest}, not {_VERSION}")
    interface.restype = ctypes.c_void_p
    if compiled.lmf_multi_register_xla(ctypes.c_void_p(interface()), _NAME.encode()) != 1:
        return _cannot("it refuses the version of XLA's interface")
    return True


def _cannot(reason: str) -> bool:
    _LOG.debug("TensorFlow %s cannot call the CPU kernel: %s", tf.__version__, reason)
    return False


def has_kernel_for(z: tf.Tensor, axis: int) -> bool:
    """Whether XLA compiles this graph, for CPUs, and the kernel takes these logits.

    Not what saving traces: operations alone run where this package is not installed.
    """
    return (
        not tf.executing_eagerly()
        and z.dtype in (tf.float32, tf.bfloat16, tf.float16)
        and bool(z.shape[axis])
        and has_kernel()
        and _is_compiled_by_xla()
        and not _is_saved()
        and not any(tf.config.list_logical_devices(kind) for kind in ("GPU", "TPU"))
    )


def _is_compiled_by_xla() -> bool:
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

    is_compiled: bool = GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    return is_compiled


def _is_saved() -> bool:
    from tensorflow.python.saved_model.save_context import in_save_context

    saved: bool = in_save_context()
    return saved


def by_kernel(z: tf.Tensor, labels: Labels, terms: Terms, axis: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss (N,) and gradient (N, C) of ``one_class``, whose derivatives theirs are.

    y is int32, z has at most 32 bits, Δ and w have 32.
    """
    Δ, w, a, b, γ, s = terms
    y = labels.y if labels.masked is None else tf.where(labels.masked, _MASKED, labels.y)
    numbers = (γ, s, 0.0 if a is None else a, 0.0 if b is None else b)
    numbers = tf.stack([tf.cast(number, tf.float32) for number in numbers])
    vectors = [vector for vector in (None if a is None else Δ, w) if vector is not None]

    @tf.custom_gradient  # type: ignore[untyped-decorator]  # TensorFlow carries no types
    def called(z: tf.Tensor) -> Any:
        def pull(*upstream: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                tape.watch(z)
                results = one_class(tf.cast(z, tf.float32), labels, terms, axis)
            return tape.gradient(results, z, upstream)

        return _call(z, y, [numbers, *vectors], axis, a is not None, b is not None), pull

    loss, grad = called(z)
    return loss, grad


def _call(
    z: tf.Tensor,
    labels: tf.Tensor,
    others: list[tf.Tensor],
    axis: int,
    has_ldam: bool,
    has_focal: bool,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss (N,) and gradient (N, C) of labels (N,), of which -2 are masked.

    Rows go in memory order, (outer, C, inner), or (N, C), for XLA copies an inner axis of 1.
    ``others`` are the numbers (4,), and Δ and w (C,) where they are.
    """
    from tensorflow.compiler.tf2xla.python.xla import call_module

    sizes = [tf.shape(z)[i] if n is None else n for i, n in enumerate(z.shape)]
    inner = [math.prod(sizes[axis + 1 :])] if axis + 1 < len(sizes) else []
    shape = [math.prod(sizes[:axis]), sizes[axis], *inner]
    rows = tf.reshape(z, shape), tf.reshape(labels, [shape[0], *inner])
    loss, grad = call_module(
        [*rows, *others],
        version=_VERSION,
        module=_module([*rows, *others], has_ldam, has_focal),
        Sout=[rows[1].shape, rows[0].shape],
        Tout=[tf.float32, tf.float32],
        platforms=["CPU"],
    )
    return tf.reshape(loss, tf.shape(labels)), tf.reshape(grad, tf.shape(z))


def _module(operands: list[tf.Tensor], has_ldam: bool, has_focal: bool) -> str:
    """A call in StableHLO, whose results' shapes are two more operands: XLA learns sizes late."""
    z, labels, *_ = operands
    types = [_type(x.shape, _ELEMENTS[x.dtype]) for x in operands]
    results = f"{_type(labels.shape, 'f32')}, {_type(z.shape, 'f32')}"
    given = [f"%x{i}" for i in range(len(operands))]
    parameters = ", ".join(f"{x}: {type}" for x, type in zip(given, types, strict=True))
    terms = f"has_focal = {has_focal}, has_ldam = {has_ldam}".lower()
    axes = range(len(z.shape))
    of_loss, of_grad = [i for i in axes if i != 1], list(axes)
    of_results = f"tensor<{len(of_loss)}xi32>, tensor<{len(of_grad)}xi32>"
    return f"""
module attributes {{jax.uses_shape_polymorphism = true}} {{
  func.func public @main({parameters}) -> ({results}) {{
    {"".join(_size(i, types[0]) for i in axes)}
    %of_loss = {_sizes(of_loss)}
    %of_grad = {_sizes(of_grad)}
    %results:2 = stablehlo.custom_call @"{_NAME}"(
        {", ".join(given)}, %of_loss, %of_grad) {{
      api_version = 4 : i32,
      backend_config = {{{terms}}},
      indices_of_shape_operands = dense<[{len(operands)}, {len(operands) + 1}]> : tensor<2xi64>
    }} : ({", ".join(types)}, {of_results}) -> ({results})
    return %results#0, %results#1 : {results}
  }}
}}"""


_ELEMENTS = {tf.float32: "f32", tf.bfloat16: "bf16", tf.float16: "f16", tf.int32: "i32"}


def _type(shape: tf.TensorShape, element: str) -> str:
    return "".join(["tensor<", *("?x" if n is None else f"{n}x" for n in shape), element, ">"])


def _size(axis: int, type: str) -> str:
    return f"""
    %n{axis} = stablehlo.get_dimension_size %x0, dim = {axis} : ({type}) -> tensor<i32>
    %s{axis} = stablehlo.reshape %n{axis} : (tensor<i32>) -> tensor<1xi32>"""


def _sizes(axes: list[int]) -> str:
    each, types = ", ".join(f"%s{i}" for i in axes), ", ".join("tensor<1xi32>" for _ in axes)
    return f"stablehlo.concatenate {each}, dim = 0 : ({types}) -> tensor<{len(axes)}xi32>"


has_kernel()  # for saved models, which hold the call and not what it needs
