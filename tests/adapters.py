"""Every framework and mode behind one call: a case in, its value and gradient out."""

import warnings
from functools import cache, cached_property

import numpy as np

from tests.cases import CLASSES, loss_dtype
from tests.engines import ENGINES
from tests.frameworks import KERAS_BACKEND, load


class Adapter:
    """A framework in one mode; the framework's own ways are in the subclasses."""

    framework: str
    engine: str
    modes: tuple[str, ...]
    traced_modes: tuple[str, ...]  # that cannot look at labels
    compiled_modes: tuple[str, ...]  # in which new shapes cost a compilation
    number_modes: tuple[str, ...] = ()  # in which new hyper-parameters cost one too
    left_out: tuple[str, ...] = ()  # words in the names of tests that concern other backends

    def __init__(self, mode):
        self.mode = mode
        self.traced = mode in self.traced_modes
        self.compiles = mode in self.compiled_modes
        self.compiles_numbers = mode in self.number_modes

    @property
    def name(self):
        return f"{self.framework}-{self.mode}"

    def __str__(self):
        return self.name

    @cached_property
    def losses(self):
        load(self.framework)
        return load(f"lmf_multi.{self.framework}")

    def takes(self, plan):
        """Whether a plan or a case can be run; vmap runs one example at a time."""
        return self.mode != "vmap" or plan.reduction == "none"

    def loss(self, case, **options):
        return getattr(self.losses, CLASSES[case.term])(*case.counts, **case.options, **options)

    def call_function(self, case, **static):
        """The function, and what it is called with besides the arrays."""
        function = getattr(self.losses, f"{case.term}_loss")
        dtype, numbers = loss_dtype(case.dtype), case.numbers
        vectors = [None if v is None else v.astype(dtype) for v in case.vectors]
        if case.adjustments is not None:
            numbers["logit_adjustment"] = case.adjustments.astype(dtype)
        return function_call(function, **static), (vectors, numbers)

    def class_axis(self, case):
        return case.axis

    def __call__(self, case):
        axis, C, shape = self.class_axis(case), case.logits.shape[-1], case.batch_shape
        arrays = {"z": case.logits, "y": case.labels}
        if case.where is not None:
            arrays["where"] = case.where
        ones = np.ones(shape if case.reduction == "none" else ())
        arrays["upstream"] = ones if case.upstream is None else case.upstream
        by_class = ("z", "y") if case.soft else ("z",)
        if case.by_element:
            by_class = tuple(arrays) if case.reduction == "none" else ("z", "y", "where")
        if self.mode == "vmap" and case.by_element:
            arrays = {k: a.ravel() for k, a in arrays.items()}
        elif self.mode == "vmap":
            arrays = {
                k: a.reshape(-1, C) if k in by_class else a.ravel() for k, a in arrays.items()
            }
        else:
            for name in set(by_class) & set(arrays):
                arrays[name] = np.moveaxis(arrays[name], -1, axis)
        dtypes = {
            "z": case.dtype,
            "y": case.label_dtype,
            "where": "bool",
            "upstream": loss_dtype(case.dtype),
        }
        call, parameters = self.call(case, arrays, -1 if self.mode == "vmap" else axis)
        result = ENGINES[self.engine](call, parameters, arrays, dtypes, self.mode)
        if self.mode == "vmap":
            return result._replace(
                value=result.value.reshape(shape), grad=result.grad.reshape(case.logits.shape)
            )
        if case.by_element and case.reduction == "none":
            result = result._replace(value=np.moveaxis(result.value, axis, -1))
        return result._replace(grad=np.moveaxis(result.grad, axis, -1))


@cache
def function_call(function, **static):
    def call(parameters, z, y, **mask):
        vectors, numbers = parameters
        return function(z, y, *vectors, **{**numbers, **static}, **mask)

    return call


def class_call(loss, z, y, **mask):
    return loss(z, y, **mask)


class Torch(Adapter):
    """Class axis 1; integer labels are masked by ``ignore_index``, distributions cannot be."""

    framework = engine = "torch"
    modes = ("eager", "compile", "vmap")
    compiled_modes = ("compile",)
    traced_modes = ("compile", "vmap")

    def takes(self, plan):
        maskable = plan.by_element or not (plan.soft and plan.masked)
        mappable = self.mode != "vmap" or 0 not in plan.batch_shape  # vmap refuses an empty axis
        return super().takes(plan) and maskable and mappable

    def class_axis(self, case):
        return min(1, case.logits.ndim - 1)

    def call(self, case, arrays, axis):
        if "where" in arrays and (self.mode == "vmap" or not case.by_element):
            arrays["y"] = np.where(arrays.pop("where"), arrays["y"], -100)
        if case.as_class:
            return class_call, self.loss(case, reduction=case.reduction)
        call, (vectors, numbers) = self.call_function(case, reduction=case.reduction)
        torch = load("torch")
        if "logit_adjustment" in numbers:
            numbers["logit_adjustment"] = torch.tensor(numbers["logit_adjustment"])
        return call, ([None if v is None else torch.tensor(v) for v in vectors], numbers)


class TorchOperator(Torch):
    """Compiled calls of the CPU kernel, for small batches too."""

    modes = traced_modes = compiled_modes = ("operator",)
    left_out = ("-float64", "impossible", "soft")

    def takes(self, plan):
        by_element = getattr(plan, "by_element", False)
        return super().takes(plan) and plan.dtype != "float64" and (by_element or not plan.soft)


def torch_batch(y, Δ, w, o, numbers, options):
    """What the fused kernel takes beside the logits; all of options but the axis has a default."""
    terms = load("lmf_multi._terms")
    batch = load("lmf_multi.torch._preparation").Batch
    numbers, (axis, *others), soft = terms.Numbers(*numbers), options, y.is_floating_point()
    options = terms.Options(axis % (y.dim() + (not soft)), *others)
    return batch(y, Δ, w, o, numbers, options, is_soft=soft, axis=options.axis)


class Triton(Adapter):
    """The fused kernel of PyTorch's CUDA tensors, any class axis and any mask; in Triton's
    interpreter, on CPU tensors, where there is no GPU.
    """

    framework = engine = "torch"
    modes = traced_modes = ("triton",)
    compiled_modes = ()
    left_out = ("sigmoid",)

    @cached_property
    def losses(self):
        load("triton")
        losses = super().losses
        round_as_hardware()
        return losses

    def call(self, case, arrays, axis):
        fused, torch = load("lmf_multi.torch._triton"), load("torch")
        ignore_index = None
        if case.as_class:
            loss = self.loss(case)
            vectors = [loss.margins, loss.class_weight, loss.logit_adjustment]
            if "where" in arrays and not case.soft:
                ignore_index = -100
                arrays["y"] = np.where(arrays.pop("where"), arrays["y"], ignore_index)
        else:
            margins = None if case.term == "focal" else case.margins
            vectors = (margins, case.weights, case.adjustments)
            vectors = [None if v is None else torch.tensor(v) for v in vectors]
        (alpha, beta), device = case.shares, "cuda" if torch.cuda.is_available() else "cpu"
        numbers = alpha, beta, case.gamma, case.scale, case.label_smoothing

        def call(_, z, y, where=None):
            z, *tensors = (None if v is None else v.to(device) for v in (z, y, *vectors, where))
            *tensors, where = tensors
            options = axis, where, ignore_index, "where", case.reduction
            batch = torch_batch(*tensors, numbers, options)
            assert fused.supports(z, batch)
            return fused.fused_loss(z, batch).cpu()

        return call, None

    def __call__(self, case):
        # NumPy warns, in the interpreter, of what GPUs compute in silence
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return super().__call__(case)


@cache
def round_as_hardware():
    """Triton's interpreter cuts float32 off to bfloat16, where GPUs round to the nearest."""
    torch, interpreter = load("torch"), load("triton.runtime.interpreter")
    tl, builder = load("triton.language"), interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def rounded(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = torch.tensor(src.data).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, dst_type.scalar)

    builder.cast_impl = rounded


class Jax(Adapter):
    """Pure functions and pytrees, under strict promotion; float64 with x64 enabled.

    "operations" is jit without the CPU kernel; "alarms" is eager without any jit, and an error
    where an operation gives NaN or infinity of finite input.
    """

    framework = engine = "jax"
    modes = ("eager", "alarms", "jit", "operations", "vmap")
    compiled_modes = modes  # even eager compiles each operation for its shapes
    traced_modes = modes[2:]

    def takes(self, plan):
        # functions give one value for each example
        return super().takes(plan) and (plan.as_class or plan.reduction == "none")

    def call(self, case, arrays, axis):
        if case.as_class:
            return class_call, self.loss(case, axis=axis, reduction=case.reduction)
        # static here; the class's smoothing is traced
        call, parameters = self.call_function(case, axis=axis, label_smoothing=case.label_smoothing)
        del parameters[1]["label_smoothing"]
        return call, parameters


class Keras(Adapter):
    """On the backend of this process; the class masks by ``ignore_class``, so integers only.

    "operations" is XLA without the CPU kernel.
    """

    framework, engine = "keras", KERAS_BACKEND
    modes = {
        "tensorflow": ("eager", "graph", "xla", "operations"),
        "jax": ("eager", "jit"),
        "torch": ("eager", "compile"),
    }[KERAS_BACKEND]
    compiled_modes = modes if KERAS_BACKEND == "jax" else modes[1:]
    traced_modes = modes[1:]
    number_modes = ("graph", "xla", "operations")

    @property
    def name(self):
        return f"keras-{KERAS_BACKEND}-{self.mode}"

    def takes(self, plan):
        if plan.as_class:
            return plan.by_element or not (plan.soft and plan.masked)
        return plan.reduction == "none"  # functions give one value for each example

    def call(self, case, arrays, axis):
        if not case.as_class:
            return self.call_function(case, axis=axis)
        ignore_class = None
        if "where" in arrays:
            ignore_class = -100
            arrays["y"] = np.where(arrays.pop("where"), arrays["y"], ignore_class)
        loss = self.loss(
            case,
            axis=axis,
            ignore_class=ignore_class,
            reduction={"mean": "sum_over_batch_size"}.get(case.reduction, case.reduction),
            dtype=case.dtype,
        )
        return lambda _, z, y: loss(y, z), None


ADAPTERS = [
    adapter(mode)
    for adapter in (Torch, TorchOperator, Triton, Jax, Keras)
    for mode in adapter.modes
]
