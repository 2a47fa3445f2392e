"""Random cases: shapes, label forms, weights, masks, reductions, numbers and dtypes."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.cases import Case, SigmoidCase, loss_dtype, rounded
from tests.hard import GAMMAS, SCALES


@dataclass(frozen=True)
class Plan:
    """What compiled code is compiled for; everything else about a case may vary freely."""

    batch_shape: tuple[int, ...] = (4,)
    num_classes: int = 3
    labels: str = "integer"  # or "one-hot" or "soft"
    dtype: str = "float32"
    term: str = "lmf"
    weighted: bool = True
    masked: bool = True
    smoothed: bool = False
    adjusted: bool = False
    reduction: str = "none"
    as_class: bool = False
    axis: int = -1
    by_element: bool = False

    @property
    def soft(self):
        return self.labels != "integer"


PLANS = (
    Plan(),
    Plan(reduction="mean", as_class=True),
    Plan((2, 3), 4, smoothed=True, adjusted=True, reduction="mean", as_class=True, axis=1),
    Plan((2, 2, 2), 2, "soft", masked=False, dtype="float64"),
    Plan((5,), 6, "soft", smoothed=True, masked=False, reduction="batch_mean", as_class=True),
    Plan((), 5, term="focal", dtype="float64", masked=False),
    Plan((3, 2), 3, term="ldam", weighted=False, adjusted=True, axis=0),
    Plan((6,), 4, adjusted=True),
    Plan((4,), 3, "one-hot", "bfloat16", reduction="sum", masked=False, as_class=True),
    Plan((4,), 3, dtype="float16", term="focal", smoothed=True),
    Plan((0,), 3, reduction="mean", as_class=True),
)


@st.composite
def plans(draw, backend):
    """A plan of the fixed few where each costs a compilation, any plan elsewhere."""
    if backend.compiles:
        return draw(st.sampled_from([plan for plan in PLANS if backend.takes(plan)]))
    any_plan = free_plans(
        draw,
        Plan,
        num_classes=st.integers(2, 6),
        labels=st.sampled_from(["integer", "one-hot", "soft"]),
        term=st.sampled_from(["lmf", "ldam", "focal"]),
    )
    return draw(any_plan.filter(backend.takes))


def free_plans(draw, kind, **own):
    """Any plan of a kind, with what this kind alone chooses from."""
    batch_shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    return st.builds(
        kind,
        batch_shape=st.just(batch_shape),
        dtype=st.sampled_from(["float32", "float64", "bfloat16", "float16"]),
        weighted=st.booleans(),
        masked=st.booleans(),
        smoothed=st.booleans(),
        adjusted=st.booleans(),
        reduction=st.sampled_from(["none", "sum", "mean", "batch_mean"]),
        as_class=st.booleans(),
        axis=st.integers(-1 - len(batch_shape), len(batch_shape)),
        **own,
    )


def units(shape):
    return hnp.arrays(np.float64, shape, elements=st.floats(-1.0, 1.0, width=32), fill=st.nothing())


def others(draw, plan, shape):
    """What of a case is the same in both forms, its losses of ``shape``."""
    return {
        "alpha": draw(st.sampled_from([0.25, 1.5])),
        "beta": draw(st.sampled_from([0.5, 1.0])),
        "gamma": draw(st.sampled_from(GAMMAS)),
        "scale": draw(st.sampled_from(SCALES)),
        "max_margin": draw(st.sampled_from([0.1, 0.5])),
        "label_smoothing": draw(st.sampled_from([0.05, 0.1, 1.0])) if plan.smoothed else 0.0,
        "logit_adjustment": draw(st.sampled_from([-0.5, 1.0, 3.0])) if plan.adjusted else 0.0,
        "reduction": plan.reduction,
        "upstream": 2 * draw(units(shape)) if plan.reduction == "none" else None,
        "dtype": plan.dtype,
        "axis": plan.axis,
        "as_class": plan.as_class,
    }


@st.composite
def cases(draw, backend):
    plan = draw(plans(backend))
    shape, C = plan.batch_shape, plan.num_classes
    size = draw(st.sampled_from([1.0, 10.0, 100.0, 1e4]))
    logits = rounded(size * draw(units((*shape, C))), plan.dtype)

    labels = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, C - 1)))
    label_dtype = draw(st.sampled_from(["int32", "int64"]))
    if plan.labels == "integer" and not plan.smoothed and draw(st.booleans()):
        # classes that are impossible, unless they are the label's or all others are too
        impossible = draw(hnp.arrays(bool, (*shape, C))) & (labels[..., None] != np.arange(C))
        logits = np.where(impossible, -np.inf, logits)
    if plan.labels == "one-hot":
        labels = np.eye(C)[labels]
    if plan.labels == "soft":
        positive = np.abs(draw(units((*shape, C)))) + 2.0**-20
        labels = positive / positive.sum(-1, keepdims=True)
    if plan.labels != "integer":
        label_dtype = draw(st.sampled_from([plan.dtype, loss_dtype(plan.dtype)]))
        labels = rounded(labels, label_dtype)

    where = None
    if plan.masked:  # whatever the masked examples hold
        where = draw(hnp.arrays(bool, shape))
        garbage = draw(st.sampled_from([0.0, np.nan, np.inf, -np.inf]))
        logits = np.where(where[..., None], logits, garbage)
        if plan.labels == "integer":
            labels = np.where(where, labels, draw(st.sampled_from([-100, -1, C])))
        else:
            labels = np.where(where[..., None], labels, garbage)
    weights = None
    if plan.weighted:
        weights = 4 * np.abs(draw(units((C,))))
        weights[weights < 2.0**-20] = 0.0  # or a weighted mean with smoothing leaves float32
        weights[draw(st.integers(0, C - 1))] = 1.0
        if plan.as_class:
            weights = draw(st.sampled_from(["margin", "complement", "balanced", weights]))
    return Case(
        logits,
        labels,
        tuple(draw(st.lists(st.integers(1, 500), min_size=C, max_size=C))),
        weights,
        plan.term,
        where=where,
        label_dtype=label_dtype,
        **others(draw, plan, shape),
    )


@dataclass(frozen=True)
class SigmoidPlan(Plan):
    """As ``Plan``; ``num_classes`` labels along the axis, ``by_label`` with arrays of their own."""

    by_label: bool = True
    by_element: bool = True


SIGMOID_PLANS = (
    SigmoidPlan(),
    SigmoidPlan(by_label=False, dtype="float64"),
    SigmoidPlan((2,), 3, "soft", by_label=False, smoothed=True, adjusted=True),
    SigmoidPlan((4,), 5, adjusted=True, reduction="mean", as_class=True),
    SigmoidPlan(adjusted=True, weighted=False, masked=False),
    SigmoidPlan((2, 3), 1, "soft", reduction="mean", as_class=True, axis=1),
    SigmoidPlan((5,), 2, smoothed=True, reduction="batch_mean", as_class=True),
    SigmoidPlan((3,), 4, dtype="bfloat16", weighted=False, masked=False),
    SigmoidPlan((0,), 3, reduction="mean", as_class=True),
)


@st.composite
def sigmoid_cases(draw, backend):
    """Elements with labels that do not exclude each other."""

    def takes(plan):
        return backend.takes(plan) and not (backend.mode == "vmap" and plan.by_label)

    if backend.compiles:
        plan = draw(st.sampled_from([plan for plan in SIGMOID_PLANS if takes(plan)]))
    else:
        any_plan = free_plans(
            draw,
            SigmoidPlan,
            num_classes=st.integers(1, 4),
            labels=st.sampled_from(["integer", "soft"]),
            by_label=st.booleans(),
        )
        plan = draw(any_plan.filter(takes))
    L = plan.num_classes
    shape, vectors = (*plan.batch_shape, L), (L,) if plan.by_label else ()
    size = draw(st.sampled_from([1.0, 10.0, 100.0, 1e4]))
    logits = rounded(size * draw(units(shape)), plan.dtype)
    labels = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 1)))
    label_dtype = draw(st.sampled_from(["int32", "int64"]))
    if plan.soft:
        label_dtype = draw(st.sampled_from([plan.dtype, loss_dtype(plan.dtype)]))
        labels = rounded(np.abs(draw(units(shape))), label_dtype)
    where = None
    if plan.masked:  # whatever the masked elements hold
        where = draw(hnp.arrays(bool, shape))
        logits = np.where(where, logits, draw(st.sampled_from([0.0, np.nan, np.inf, -np.inf])))
        labels = np.where(where, labels, draw(st.sampled_from([-100, -1, 2])))
    counts = hnp.arrays(np.int64, vectors, elements=st.integers(1, 500))
    weights = None
    if plan.weighted:
        weights = 2.0**-10 + 4 * np.abs(draw(units((*vectors, 2))))
        if plan.as_class:
            weights = draw(st.sampled_from(["margin", "complement", "balanced", weights]))
    return SigmoidCase(
        logits,
        labels,
        (draw(counts), draw(counts)),
        weights,
        where=where,
        label_dtype=label_dtype,
        **others(draw, plan, shape),
    )
