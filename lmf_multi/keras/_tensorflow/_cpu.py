"""The loss in one pass over the logits, in what XLA compiles for CPUs alone.

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

from lmf_multi._kernel import INTERFACE, library
from lmf_multi._terms import Labels, Terms
from lmf_multi.keras._tensorflow._closed_form import value_and_grad

_LOG = logging.getLogger("lmf_multi")
_MASKED = -2  # the label of an example that takes no part; -1 is an unknown one, or NaN
_VERSION = 9  # of what a module in the graph may hold
# what XLA says that it does not know, where a saved step runs without this module, or with another
# that hands the kernel something else
_NAME = f"lmf_multi_loss_{INTERFACE} (import lmf_multi.keras before running this step)"


def has_kernel(logits: int = 0) -> bool:
    """Whether XLA can call the kernel, which the environment may switch off."""
    compiled = library(logits)
    return compiled is not None and _registers(compiled)


@cache
def _registers(compiled: ctypes.CDLL) -> bool:
    """Tell XLA of the kernel; says once, for debugging, if it is too old or too new."""
    try:
        from tensorflow.compiler.tf2xla.python import xla
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


def has_kernel_for(z: tf.Tensor, axis: int | None) -> bool:
    """Whether XLA compiles this graph, for CPUs, and the kernel takes these logits.

    Not what saving traces: operations alone run where this package is not installed.
    """
    return (
        not tf.executing_eagerly()
        and z.dtype in (tf.float32, tf.bfloat16, tf.float16)
        and (axis is None or bool(z.shape[axis]))
        and _is_compiled_by_xla()
        and not any(tf.config.list_logical_devices(kind) for kind in ("GPU", "TPU"))
        and has_kernel(z.shape.num_elements() or 0)
        and not _is_saved()
    )


def _is_compiled_by_xla() -> bool:
    try:
        from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
    except ImportError:
        return False
    is_compiled: bool = GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    return is_compiled


def _is_saved() -> bool:
    from tensorflow.python.saved_model.save_context import in_save_context

    saved: bool = in_save_context()
    return saved


def by_kernel(
    z: tf.Tensor, labels: Labels, terms: Terms, axis: int | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss (N,) and gradient (N, C) of ``value_and_grad``, whose derivatives theirs are.

    z has at most 32 bits, y is int32, Δ, w and o are float32. In the sigmoid form, which has no
    axis, y and q are float32 too, and not yet smoothed.
    """
    (y, masked, q), (Δ, w, a, b, γ, s, o, ε) = labels, terms
    vectors = [vector for vector in (None if a is None else Δ, w, o) if vector is not None]
    if axis is not None:
        sizes = _sizes_around(z, axis)
    else:
        sizes, vectors = _of_labels(z, vectors)
        y = tf.where(y < 0, math.nan, y) if q is None else q[1]
    y = y if masked is None else tf.where(masked, tf.cast(_MASKED, y.dtype), y)
    numbers = (γ, s, 0.0 if a is None else a, 0.0 if b is None else b, ε)
    numbers = tf.stack([tf.cast(number, tf.float32) for number in numbers])
    settings = {"has_adjustment": o is not None, "has_focal": b is not None}
    settings |= {"has_ldam": a is not None, "is_sigmoid": axis is None}

    @tf.custom_gradient  # type: ignore[untyped-decorator]  # TensorFlow carries no types
    def called(z: tf.Tensor) -> Any:
        def pull(*upstream: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                tape.watch(z)
                results = value_and_grad(tf.cast(z, tf.float32), labels, terms, axis)
            return tape.gradient(results, z, upstream)

        return _call(z, y, [numbers, *vectors], sizes, settings), pull

    loss, grad = called(z)
    return loss, grad


def _sizes_around(z: tf.Tensor, axis: int) -> list[Any]:
    """How many numbers are before, along and after an axis, the last only if there is one."""
    sizes = [tf.shape(z)[i] if n is None else n for i, n in enumerate(z.shape)]
    inner = [math.prod(sizes[axis + 1 :])] if axis + 1 < len(sizes) else []
    return [math.prod(sizes[:axis]), sizes[axis], *inner]


def _of_labels(z: tf.Tensor, vectors: list[tf.Tensor]) -> tuple[list[Any], list[tf.Tensor]]:
    """The same around the label axis of the sigmoid form, and vectors (…, L).

    They broadcast against the logits, those of negative and positive with 2 in front.
    """
    signs = [v.shape[: len(v.shape) - len(z.shape)].as_list() for v in vectors]
    own = [v.shape[len(sign) :] for v, sign in zip(vectors, signs, strict=True)]
    axis = next((i for shape in own for i, n in enumerate(shape) if n > 1), None)
    sizes = [1, 1, tf.size(z)] if axis is None else _sizes_around(z, axis)
    flat = [tf.reshape(v, [*sign, -1]) for v, sign in zip(vectors, signs, strict=True)]
    L = 1 if axis is None else sizes[1]
    flat = [tf.broadcast_to(v, [*sign, L]) for v, sign in zip(flat, signs, strict=True)]
    return sizes, flat


def _call(
    z: tf.Tensor,
    labels: tf.Tensor,
    others: list[tf.Tensor],
    sizes: list[Any],
    settings: dict[str, bool],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss (N,) and gradient (N, C) of labels (N,), of which -2 are masked.

    Rows go in memory order, (outer, C, inner), or (N, C), for XLA copies an inner axis of 1.
    ``others`` are the numbers (5,), and Δ, w and o (C,) where they are.
    """
    from tensorflow.compiler.tf2xla.python.xla import call_module

    of_labels = sizes if settings["is_sigmoid"] else [sizes[0], *sizes[2:]]
    operands = [tf.reshape(z, sizes), tf.reshape(labels, of_labels), *others]
    loss, grad = call_module(
        operands,
        version=_VERSION,
        module=_module(operands, settings),
        Sout=[operands[1].shape, operands[0].shape],
        Tout=[tf.float32, tf.float32],
        platforms=["CPU"],
    )
    return tf.reshape(loss, tf.shape(labels)), tf.reshape(grad, tf.shape(z))


def _module(operands: list[tf.Tensor], settings: dict[str, bool]) -> str:
    """A call in StableHLO, whose results' shapes are two more operands: XLA learns sizes late."""
    z, labels, *_ = operands
    types = [_type(x.shape, _ELEMENTS[x.dtype]) for x in operands]
    results = f"{_type(labels.shape, 'f32')}, {_type(z.shape, 'f32')}"
    given = [f"%x{i}" for i in range(len(operands))]
    parameters = ", ".join(f"{x}: {type}" for x, type in zip(given, types, strict=True))
    terms = ", ".join(f"{name} = {value}".lower() for name, value in settings.items())
    axes = range(len(z.shape))
    of_grad, of_loss = list(axes), [i for i in axes if i != 1 or settings["is_sigmoid"]]
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
