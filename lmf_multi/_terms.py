"""What travels together through every framework, and the legend of all its symbols.

N examples or pixels, along as many axes as there are; C classes, along one axis of the logits. In
the sigmoid form each element of the logits is an example, and C is 2, negative and positive, along
a first axis of what has classes.

====== ========= ===================================================================
symbol shape     meaning
====== ========= ===================================================================
z, x   (N, C)    logits, nats; x (N,) in the sigmoid form
y      (N,)      the class of each label; -1 for an unknown one, which gives NaN
masked (N,)      whether an example takes no part
q      (N, C)    labels as distributions; rows of 0 for a masked example
Δ      (C,)      margins, logit units, before scaling
o      (C,)      what is added to the logits before anything else, τ log π, nats; in the
                 sigmoid form (L,) or ()
w      (C,)      class weights
W      (N,)      an example's class weight, w_y or Σ_j q_j w_j
a, b   ()        what LDAM and focal of a class weight of 1 count for, α and β over
                 what the reduction divides each by
γ, s   ()        focusing exponent, LDAM's scale
ε      ()        label smoothing
ω, τ   as z      one-vs-rest log-odds, nats, without and with scale and margin
M, S   (N,)      the largest logit among the other classes, and their Σ e^(z_k - M)
====== ========= ===================================================================
"""

from typing import Any, NamedTuple

from lmf_multi.spec import Reduction


class Numbers(NamedTuple):
    """The hyper-parameters of a loss, as ``lmf_loss`` takes them; () each."""

    alpha: Any = 1.5
    beta: Any = 1.0
    gamma: Any = 1.5
    scale: Any = 30.0
    label_smoothing: Any = 0.0

    def by_name(self) -> dict[str, Any]:
        """``_asdict()``, which PyTorch 2.4's compiler cannot trace."""
        return dict(zip(Numbers._fields, self, strict=True))


class Vectors(NamedTuple):
    """What is constant for each class: (C,), or in the sigmoid form (2,) or (L, 2); or None."""

    margins: Any
    class_weight: Any
    logit_adjustment: Any = None  # (C,); in the sigmoid form () or (L,)

    def by_name(self) -> dict[str, Any]:
        """As ``Numbers.by_name``."""
        return dict(zip(Vectors._fields, self, strict=True))


class Options(NamedTuple):
    """How a batch is read and reduced.

    axis: the class axis of the logits, in the sigmoid form the label axis.
    where: bool (N,); False leaves an example out; or None.
    ignore_index: examples with this integer label take no part; or None.
    mask_name: what masks are called in sentences.
    reduction: what each example's contribution is divided for; their sum is the reduced loss.
    totals: total class weight and number of examples, () each, in place of the batch's; or None.
    """

    axis: int
    where: Any = None
    ignore_index: int | None = None
    mask_name: str = "where"
    reduction: Reduction = "none"
    totals: Any = None

    def but(self, **changes: Any) -> "Options":
        """``_replace()``, which PyTorch 2.4's compiler cannot trace."""
        return Options(**{**dict(zip(Options._fields, self, strict=True)), **changes})


class Labels(NamedTuple):
    """Labels as the arithmetic takes them: classes y with their mask, or distributions q."""

    y: Any = None
    masked: Any = None
    q: Any = None


class Terms(NamedTuple):
    """Everything that the two terms are made of beside logits and labels.

    Δ or a is None without LDAM, b is None without focal, w is None for ones, o for zeros. Labels of
    the softmax form are smoothed before, where their classes are laid out anyway: ε is 0 there.
    """

    Δ: Any
    w: Any
    a: Any
    b: Any
    γ: Any
    s: Any
    o: Any = None
    ε: Any = 0.0


def numbers_of(loss: Any) -> Numbers:
    """The hyper-parameters of a loss object, whose attributes they are."""
    return Numbers(loss.alpha, loss.beta, loss.gamma, loss.scale, loss.label_smoothing)
