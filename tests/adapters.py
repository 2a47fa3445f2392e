"""Every framework and mode behind one call: a case in NumPy, its value and gradient in NumPy."""

from functools import cache, cached_property

import numpy as np

from tests.cases import CLASSES, Result, loss_dtype
from tests.frameworks import load


class Adapter:
    """A framework in one mode; subclasses bring ``__call__``."""

    framework: str
    modes: tuple[str, ...]
    compiled_modes: tuple[str, ...] = ()
    reductions = ("none", "sum", "mean", "batch_mean")
    masks_distributions = True

    def __init__(self, mode):
        self.mode, self.compiles = mode, mode in self.compiled_modes

    @cached_property
    def losses(self):
        load(self.framework)
        return load(f"lmf_multi.{self.framework}")

    def takes(self, plan):
        """Whether the mode can run a plan."""
        return plan.reduction in self.reductions and not (
            plan.masked and plan.labels != "integer" and not self.masks_distributions
        )

    def function(self, case):
        return getattr(self.losses, f"{case.term}_loss")

    def loss(self, case, **options):
        return getattr(self.losses, CLASSES[case.term])(
            case.class_counts, **case.options, **options
        )


class Torch(Adapter):
    """Class axis 1; integer labels are masked by ``ignore_index``, distributions cannot be."""

    framework = "torch"
    modes = ("eager", "compile", "vmap")
    compiled_modes = ("compile",)
    masks_distributions = False

    def takes(self, plan):
        if self.mode == "vmap" and (plan.reduction != "none" or 0 in plan.batch_shape):
            return False  # one example at a time; vmap refuses an empty axis
        return super().takes(plan)

    def tensors(self, case):
        """Logits, labels and upstream gradient."""
        torch = load("torch")
        arrays = case_arrays(case, min(1, case.logits.ndim - 1))
        value_dtype = loss_dtype(case.dtype)

        def tensor(array, dtype):
            return torch.tensor(array).to(getattr(torch, dtype))

        z = tensor(arrays["z"], case.dtype).requires_grad_()
        labels = arrays["y"]
        if case.where is not None:
            labels = np.where(case.where, labels, -100)
        y, upstream = tensor(labels, case.label_dtype), tensor(arrays["upstream"], value_dtype)
        vectors = [None if v is None else tensor(v, value_dtype) for v in case.vectors]
        return z, y, upstream, vectors

    def __call__(self, case):
        z, y, upstream, vectors = self.tensors(case)
        if self.mode == "vmap":
            value, grad = self.by_example(case, z.detach(), y, upstream, vectors)
        else:
            if case.as_class:
                call, vectors, numbers = self.loss(case, reduction=case.reduction), [], {}
            else:
                call = self.function(case)
                numbers = case.numbers | {"reduction": case.reduction}
            call = compiled(call) if self.compiles else call
            value = call(z, y, *vectors, **numbers)
            value.backward(upstream)
            grad = z.grad
        axis = min(1, grad.ndim - 1)
        return Result(
            value.detach().double().numpy(),
            np.moveaxis(grad.double().numpy(), axis, -1),
            str(value.dtype).removeprefix("torch."),
            str(grad.dtype).removeprefix("torch."),
        )

    def by_example(self, case, z, y, upstream, vectors):
        """vmap over single examples of the gradient and the value."""
        func = load("torch.func")
        axis, C = min(1, z.ndim - 1), case.logits.shape[-1]
        rows = z.movedim(axis, -1).reshape(-1, C)
        labels = y.movedim(axis, -1).reshape(-1, C) if case.soft else y.reshape(-1)

        def scaled(z, y, upstream):
            value = self.function(case)(z, y, *vectors, **case.numbers, reduction="none")
            return upstream * value, value

        each = func.vmap(func.grad_and_value(scaled, has_aux=True))
        grad, (_, value) = each(rows, labels, upstream.reshape(-1))
        grad = grad.reshape(*case.batch_shape, C).movedim(-1, axis)
        return value.reshape(case.batch_shape), grad


@cache
def compiled(function):
    torch = load("torch")
    torch._dynamo.config.recompile_limit = 64  # one entry for each plan, and none evicted
    return torch.compile(function, fullgraph=True)


class Jax(Adapter):
    """Pure functions and pytrees, under strict dtype promotion; float64 with x64 enabled."""

    framework = "jax"
    modes = ("eager", "jit", "vmap")
    compiled_modes = modes  # even eager compiles each operation for its shapes

    def takes(self, plan):
        if plan.reduction != "none" and (self.mode == "vmap" or not plan.as_class):
            return False  # functions give one value for each example; vmap sees one example
        return super().takes(plan)

    def __call__(self, case):
        jax = load("jax")
        x64 = jax.enable_x64(case.dtype == "float64")
        with x64, jax.numpy_dtype_promotion("strict"):
            value, grad = self.run(case, jax.numpy)
        return Result(
            np.asarray(value).astype(np.float64),
            np.asarray(grad).astype(np.float64),
            value.dtype.name,
            grad.dtype.name,
        )

    def run(self, case, jnp):
        value_dtype = loss_dtype(case.dtype)
        axis, C = (-1 if self.mode == "vmap" else case.axis), case.logits.shape[-1]
        arrays = case_arrays(case, axis)
        if self.mode == "vmap":
            arrays = {
                name: array.reshape(-1, *((C,) if array.ndim > len(case.batch_shape) else ()))
                for name, array in arrays.items()
            }
        dtypes = {"z": case.dtype, "y": case.label_dtype, "where": bool, "upstream": value_dtype}
        arrays = {name: jnp.asarray(a.astype(jnp.dtype(dtypes[name]))) for name, a in arrays.items()}
        if case.as_class:
            loss = self.loss(case, axis=axis, reduction=case.reduction)
            value, grad = differentiated(CLASSES[case.term], self.mode)(loss, **arrays)
        else:
            vectors = [None if v is None else jnp.asarray(v, value_dtype) for v in case.vectors]
            smoothing = case.label_smoothing
            run = differentiated(self.function(case), self.mode, axis, smoothing)
            numbers = {k: v for k, v in case.numbers.items() if k != "label_smoothing"}
            value, grad = run((vectors, numbers), **arrays)
        grad = grad.reshape(case.logits.shape) if self.mode == "vmap" else grad
        return value.reshape(np.shape(case.exact[0])), jnp.moveaxis(grad, axis, -1)


def case_arrays(case, axis):
    """Logits, labels, mask if there is one, upstream gradient; NumPy, classes at ``axis``."""
    arrays = {"z": np.moveaxis(case.logits, -1, axis), "y": case.labels}
    if case.soft:
        arrays["y"] = np.moveaxis(case.labels, -1, axis)
    if case.where is not None:
        arrays["where"] = case.where
    shape = case.batch_shape if case.reduction == "none" else ()
    arrays["upstream"] = np.ones(shape) if case.upstream is None else case.upstream
    return arrays


@cache
def differentiated(function, mode, axis=-1, label_smoothing=0.0):
    """Value and gradient of a function, or of the loss that is given, by JAX."""
    jax = load("jax")

    def run(parameters, z, y, upstream, where=None):
        def value_of(z):
            if isinstance(function, str):  # the class's name, for a cache entry of its own
                return parameters(z, y, where=where)
            vectors, numbers = parameters
            options = {"axis": axis, "where": where, "label_smoothing": label_smoothing}
            return function(z, y, *vectors, **numbers, **options)

        value, pull = jax.vjp(value_of, z)
        return value, pull(upstream)[0]

    if mode == "jit":
        return jax.jit(run)
    if mode == "vmap":

        def mapped(parameters, **arrays):
            return jax.vmap(lambda arrays: run(parameters, **arrays))(arrays)

        return mapped
    return run


ADAPTERS = {
    f"{adapter.framework}-{mode}": adapter(mode)
    for adapter in (Torch, Jax)
    for mode in adapter.modes
}
