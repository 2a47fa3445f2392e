# mypy: ignore-errors
# Triton's language: what follows is compiled for the GPU, and has neither Python's types nor rules.
"""The softmax form as one Triton kernel, ``mixture``, which reads the logits once a pass.

The steps of ``lmf_multi.reference``; e, S and the like with a suffix _s are those of s z. A program
takes ROWS examples and keeps their logits in registers or, where a row is longer than BLOCK, takes
one example and goes over its classes block by block.

Arithmetic is in DTYPE, float32 except for float64 logits, with the rounding errors of differences
put back as in ``lmf_multi.jax._closed_form``: float64 is slow on most GPUs.
"""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

FLOAT32, FLOAT64 = tl.float32, tl.float64  # DTYPE's values, for callers
_INF = tl.constexpr(float("inf"))
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
_LOG2E_TAIL = tl.constexpr(1.9259629911266e-08)  # what float32 loses of it
# Beyond every log-odds that matters, and small enough for products with it to stay finite.
_LARGE = tl.constexpr(1e18)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit(do_not_specialize=["one"])
def mixture(
    z,  # logits, rows × classes by three strides
    y,  # class indices (N,), or distributions with strides of their own
    where,  # (N,) or None
    Δ,  # (C,), or None without LDAM
    w,  # (C,) or None
    o,  # (C,), added to the logits, or None
    out,  # forward: losses (N,), or with REDUCED (4, programs), sums for ``finish``
    statistics,  # (3, N), kept for the backward pass of rows longer than BLOCK
    grad,  # backward: gradient of the logits, in their dtype; None in the forward pass
    upstream,  # backward: gradient of the loss
    coefficients,  # backward: what LDAM and focal count for (2,), or None for alpha and beta
    N,
    inner,  # row r is (r // inner, r % inner) for the strides
    z_outer,
    z_inner,
    z_class,
    y_outer,
    y_inner,
    y_class,
    grad_outer,
    grad_inner,
    grad_class,
    upstream_stride,
    one,  # 1, but the compiler does not know
    ignore_index,
    alpha: tl.float64,
    beta: tl.float64,
    gamma: tl.float64,
    scale: tl.float64,
    smoothing: tl.float64,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,  # how often a program takes that many rows
    ALIGNMENT: tl.constexpr,  # a divisor of every row's offsets, for loads of several elements
    WITHIN: tl.constexpr,  # whether the rows of a step always share rows // inner
    ROW_A_THREAD: tl.constexpr,  # though the classes of a row are neighbours in memory
    DTYPE: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    IGNORES: tl.constexpr,  # whether examples with the label ignore_index are masked
    FOCAL: tl.constexpr,
    REDUCED: tl.constexpr,
):
    """a LDAM_y + b Focal_y of each example, their sums, or their gradient."""
    if ROW_A_THREAD:
        # threads share a row whose elements are known to be neighbours, and each of them would do
        # all the arithmetic that a row takes once: for few classes that is most of it
        z_class, y_class = z_class * one, y_class * one
    s, γ, ε = tl.full([], scale, DTYPE), tl.full([], gamma, DTYPE), tl.full([], smoothing, DTYPE)
    if coefficients is None:
        a, b = tl.full([], alpha, DTYPE), tl.full([], beta, DTYPE)
    else:
        a, b = tl.load(coefficients).to(DTYPE), tl.load(coefficients + 1).to(DTYPE)
    ldam, focal = tl.zeros([ROWS], DTYPE), tl.zeros([ROWS], DTYPE)
    W, presence = tl.zeros([ROWS], DTYPE), tl.zeros([ROWS], DTYPE)
    for step in range(STEPS):
        start = (tl.program_id(0) * STEPS + step) * ROWS
        ldam_of, focal_of, W_of, presence_of = _rows(
            z, y, where, Δ, w, o, out, statistics, grad, upstream, start, N, inner,
            z_outer, z_inner, z_class, y_outer, y_inner, y_class,
            grad_outer, grad_inner, grad_class, upstream_stride, one, ignore_index, a, b, γ, s, ε,
            C, BLOCK, ROWS, ALIGNMENT, WITHIN, DTYPE, SOFT, SMOOTHED, IGNORES, FOCAL, REDUCED,
        )  # fmt: skip
        ldam, focal = ldam + ldam_of, focal + focal_of
        W, presence = W + W_of, presence + presence_of
    if REDUCED:
        out += tl.program_id(0)
        programs = tl.num_programs(0)
        tl.store(out, tl.sum(ldam, 0))
        tl.store(out + programs, tl.sum(focal, 0))
        tl.store(out + 2 * programs, tl.sum(W, 0))
        tl.store(out + 3 * programs, tl.sum(presence, 0))


@triton.jit
def _rows(
    z, y, where, Δ, w, o, out, statistics, grad, upstream, start, N, inner,
    z_outer, z_inner, z_class, y_outer, y_inner, y_class,
    grad_outer, grad_inner, grad_class, upstream_stride, one, ignore_index, a, b, γ, s, ε,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ALIGNMENT: tl.constexpr,
    WITHIN: tl.constexpr, DTYPE: tl.constexpr, SOFT: tl.constexpr, SMOOTHED: tl.constexpr,
    IGNORES: tl.constexpr, FOCAL: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """w LDAM_y, w Focal_y, w_y and presence of the examples from a start on (ROWS,), or what is
    stored of each."""
    rows = start + tl.arange(0, ROWS)
    inside = rows < N
    if WITHIN:  # one division for all rows, whose first is a multiple of ROWS, as inner is
        i, j = start // inner, start % inner
        if z.dtype.element_ty.primitive_bitwidth == 16:
            # else the compiler, which loads 16 bytes at once, gives each thread 8 rows, and has
            # several threads do the arithmetic of the same ones
            j = tl.multiple_of(j * one, 4)
        else:
            j = tl.multiple_of(j, ROWS)
        j += tl.arange(0, ROWS)
    else:
        i, j = rows // inner, rows % inner
    i, j = i.to(tl.int64), j.to(tl.int64)
    z += _offsets(i, z_outer, ALIGNMENT) + _offsets(j, z_inner, ALIGNMENT)
    u = tl.full([ROWS], 1, DTYPE)
    if grad is not None:
        grad += _offsets(i, grad_outer, ALIGNMENT) + _offsets(j, grad_inner, ALIGNMENT)
        u = tl.load(upstream + rows * upstream_stride, inside, 0.0).to(DTYPE)
    a, b = a * u, b * u

    valid = inside
    if where is not None:
        valid = valid & (tl.load(where + rows, inside, 0) != 0)
    if SOFT:
        y += _offsets(i, y_outer, ALIGNMENT) + _offsets(j, y_inner, ALIGNMENT)
        presence = valid.to(DTYPE)
    else:
        y, valid, presence = _targets(y + rows, inside, valid, ignore_index, C, IGNORES, DTYPE)
    if SOFT or SMOOTHED:
        ldam, focal, W = _all_classes(
            z, y, Δ, w, o, grad, valid, inside, presence, a, b, γ, s, ε,
            z_class, y_class, grad_class, C, BLOCK, DTYPE, SOFT, SMOOTHED, FOCAL,
        )  # fmt: skip
    elif C <= BLOCK:
        ldam, focal, W = _one_class(
            z, y, Δ, w, o, grad, valid, inside, presence, a, b, γ, s,
            z_class, grad_class, C, BLOCK, DTYPE, FOCAL,
        )  # fmt: skip
    else:
        ldam, focal, W = _one_class_online(
            z, y, Δ, w, o, grad, statistics + rows, N, valid, inside, presence, a, b, γ, s,
            z_class, grad_class, C, BLOCK, DTYPE, FOCAL,
        )  # fmt: skip
    if grad is None and not REDUCED:
        loss = tl.zeros_like(presence)
        if Δ is not None:
            loss += a * ldam
        if FOCAL:
            loss += b * focal
        tl.store(out + rows, loss, inside)
    return ldam, focal, W, presence


@triton.jit
def finish(
    sums,  # (4, programs): w LDAM, w Focal, class weights and examples
    total_weight,  # () or None: the total class weight
    total_examples,  # and the number of examples in place of those of the batch
    loss,  # ()
    coefficients,  # (2,)
    programs,
    alpha: tl.float64,
    beta: tl.float64,
    BY_WEIGHT: tl.constexpr,
    BY_EXAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss from the programs' sums, which are added in the same order each time."""
    i = tl.arange(0, BLOCK)
    ldam, focal = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    W, presence = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        inside = start + i < programs
        ldam += tl.load(sums + start + i, inside, 0.0).to(tl.float64)
        focal += tl.load(sums + programs + start + i, inside, 0.0).to(tl.float64)
        if BY_EXAMPLES and total_weight is None:
            W += tl.load(sums + 2 * programs + start + i, inside, 0.0).to(tl.float64)
            presence += tl.load(sums + 3 * programs + start + i, inside, 0.0).to(tl.float64)
    by_weight, by_examples = tl.full([], 1.0, tl.float64), tl.full([], 1.0, tl.float64)
    if BY_EXAMPLES:
        if total_weight is None:
            total, n = tl.sum(W, 0), tl.sum(presence, 0)
        else:
            total, n = tl.load(total_weight), tl.load(total_examples)
        by_examples = tl.where(n < 1, 1.0, n)
        by_weight = by_examples
        if BY_WEIGHT:
            by_weight = tl.where(total == 0, 1.0, total)
    # here, once: a division in float64 costs the other kernel a third of its registers
    a, b = tl.full([], alpha, tl.float64) / by_weight, tl.full([], beta, tl.float64) / by_examples
    tl.store(loss, a * tl.sum(ldam, 0) + b * tl.sum(focal, 0))
    tl.store(coefficients, a)
    tl.store(coefficients + 1, b)


@triton.jit
def _offsets(i, stride, ALIGNMENT: tl.constexpr):
    """Where rows start, with the multiple that the compiler cannot know."""
    offsets = i * stride
    if ALIGNMENT > 1:
        offsets = tl.multiple_of(offsets, ALIGNMENT)
    return offsets


@triton.jit
def _targets(
    y, inside, valid, ignore_index, C: tl.constexpr, IGNORES: tl.constexpr, DTYPE: tl.constexpr
):
    """Class indices, C for none; the mask; presence: 1, 0 for a masked row, NaN out of range."""
    y = tl.load(y, inside, 0).to(tl.int64)
    if IGNORES:
        valid = valid & (y != ignore_index)
    known = valid & (y >= 0) & (y < C)
    # not a global: Triton compares those at each launch, and NaN is not equal to itself
    presence = tl.where(known, 1.0, tl.where(valid, float("nan"), 0.0)).to(DTYPE)
    return tl.where(known, y, C).to(tl.int32), valid, presence


@triton.jit
def _one_class(
    z, y, Δ, w, o, grad, valid, inside, presence, a, b, γ, s,
    z_class, grad_class,
    C: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, FOCAL: tl.constexpr,
):  # fmt: skip
    """w LDAM_y, w Focal_y and w_y of each example, or its gradient stored."""
    x, lost, in_row, is_y = _logits(z, y, o, inside, 0, z_class, C, BLOCK, DTYPE)
    z_y, lost_y = _labelled(z, y, o, valid, z_class, C, DTYPE)
    # a masked row becomes one in which no other class is possible: loss and gradient exactly 0
    x = tl.where(is_y | ~valid[None, :], -_INF, x)
    M = _below(_at_least(tl.max(x, 0), -_LARGE), o)
    x = _above(x, M[None, :], lost, o)
    e_s, S_s, e, S = x, M, x, M
    if Δ is not None:
        e_s = _exps(x, s)
        S_s = _at_least(tl.sum(e_s, 0), 1.0)
    if FOCAL:
        e = _exps(x, 1.0)
        S = _at_least(tl.sum(e, 0), 1.0)
    ldam, focal, W, G_s, G = _row(
        z_y, lost_y, M, S_s, S, y, Δ, w, o, valid, presence, a, b, γ, s, C, FOCAL
    )
    if grad is not None:
        g = _row_gradient(e_s, S_s, G_s, e, S, G, is_y, Δ, FOCAL)
        _store(grad, g, in_row, 0, grad_class, BLOCK)
    return ldam, focal, W


@triton.jit
def _one_class_online(
    z, y, Δ, w, o, grad, statistics, N, valid, inside, presence, a, b, γ, s,
    z_class, grad_class,
    C: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, FOCAL: tl.constexpr,
):  # fmt: skip
    """The same where a row is longer than a block; its maximum and sums stay for the gradient."""
    z_y, lost_y = _labelled(z, y, o, valid, z_class, C, DTYPE)
    if grad is None:
        M = tl.zeros_like(presence) - _LARGE
        S_s, S = tl.zeros_like(presence), tl.zeros_like(presence)
        for start in range(0, C, BLOCK):
            x, lost, _, is_y = _logits(z, y, o, inside, start, z_class, C, BLOCK, DTYPE)
            x = tl.where(is_y | ~valid[None, :], -_INF, x)
            m = _below(_at_least(tl.max(x, 0), M), o)
            x = _above(x, m[None, :], lost, o)
            if Δ is not None:
                S_s = S_s * _exps(M - m, s) + tl.sum(_exps(x, s), 0)
            if FOCAL:
                S = S * _exps(M - m, 1.0) + tl.sum(_exps(x, 1.0), 0)
            M = m
        S_s, S = _at_least(S_s, 1.0), _at_least(S, 1.0)
        tl.store(statistics, M, inside)
        tl.store(statistics + N, S_s, inside)
        tl.store(statistics + 2 * N, S, inside)
    else:
        M = tl.load(statistics, inside, 0.0)
        S_s, S = tl.load(statistics + N, inside, 1.0), tl.load(statistics + 2 * N, inside, 1.0)
    ldam, focal, W, G_s, G = _row(
        z_y, lost_y, M, S_s, S, y, Δ, w, o, valid, presence, a, b, γ, s, C, FOCAL
    )
    if grad is not None:
        for start in range(0, C, BLOCK):
            x, lost, in_row, is_y = _logits(z, y, o, inside, start, z_class, C, BLOCK, DTYPE)
            x = _above(tl.where(is_y | ~valid[None, :], -_INF, x), M[None, :], lost, o)
            g = _row_gradient(_exps(x, s), S_s, G_s, _exps(x, 1.0), S, G, is_y, Δ, FOCAL)
            _store(grad, g, in_row, start, grad_class, BLOCK)
    return ldam, focal, W


@triton.jit
def _logits(
    z, y, o, inside, start, z_class,
    C: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Classes × rows of logits, -inf outside, and with an adjustment what adding it lost; which of
    them there are, and which are labelled.

    Masked rows too, so that the load neither waits for the labels nor falls apart into elements.
    """
    cols = start + tl.arange(0, BLOCK)
    in_row = (cols < C)[:, None] & inside[None, :]
    x = tl.load(z[None, :] + (cols * z_class)[:, None], in_row, -_INF).to(DTYPE)
    lost = x
    if o is not None:
        x, lost = _difference(x, -tl.load(o + cols, cols < C, 0.0).to(DTYPE)[:, None])
    return x, lost, in_row, cols[:, None] == y[None, :]


@triton.jit
def _labelled(z, y, o, valid, z_class, C: tl.constexpr, DTYPE: tl.constexpr):
    """The logit of each row's label, and with an adjustment what adding it lost.

    Read once more, from the cache: to pick it out of the row takes two operations a class.
    """
    known = valid & (y < C)
    z_y = tl.load(z + y * z_class, known, 0.0).to(DTYPE)
    lost = z_y
    if o is not None:
        z_y, lost = _difference(z_y, -tl.load(o + y, known, 0.0).to(DTYPE))
    return z_y, lost


@triton.jit
def _below(M, o):
    """A little less than the largest of adjusted logits, which was rounded: without rounding it is
    above, so that its exponential is 1 or more."""
    if o is not None:
        M -= tl.abs(M) * (2.0**-23 if M.dtype == tl.float32 else 2.0**-52)
    return M


@triton.jit
def _above(x, M, lost, o):
    """x - M, with what x has lost: M is about as large as x, the difference need not be."""
    x = x - M
    if o is not None:
        x += lost
    return x


@triton.jit
def _store(grad, g, in_row, start, grad_class, BLOCK: tl.constexpr):
    cols = start + tl.arange(0, BLOCK)
    tl.store(grad[None, :] + (cols * grad_class)[:, None], g, in_row)


@triton.jit
def _row(
    z_y, lost, M, S_s, S, y, Δ, w, o, valid, presence, a, b, γ, s,
    C: tl.constexpr, FOCAL: tl.constexpr,
):  # fmt: skip
    """Terms of the labelled class times its weight, that weight, and ∂L/∂ω of each term."""
    W = presence
    if w is not None:
        W = presence * tl.load(w + y, valid & (y < C), 0.0).to(presence.dtype)
    ldam, focal = tl.zeros_like(presence), tl.zeros_like(presence)
    G_s, G = ldam, focal
    if Δ is not None:
        margin = tl.load(Δ + y, valid & (y < C), 0.0).to(presence.dtype)
        ldam, slope = _ldam(_log_odds(z_y, M, S_s, s, margin, lost, o), s)
        ldam, G_s = _times(W, ldam), tl.where(valid, a * (W * slope), 0.0)
    if FOCAL:
        focal, slope = _focal(_log_odds(z_y, M, S, 1.0, None, lost, o), γ)
        focal, G = _times(W, focal), tl.where(valid, b * (W * slope), 0.0)
    return ldam, focal, W, G_s, G


@triton.jit
def _row_gradient(e_s, S_s, G_s, e, S, G, is_y, Δ, FOCAL: tl.constexpr):
    """∂L/∂z: the slope for the labelled class, less its shares for the others."""
    if Δ is None:
        others = e * (-G / S)[None, :]
    elif FOCAL:
        others = e_s * (-G_s / S_s)[None, :] + e * (-G / S)[None, :]
    else:
        others = e_s * (-G_s / S_s)[None, :]
    return tl.where(is_y, (G_s + G)[None, :], others)


@triton.jit
def _all_classes(
    z, y, Δ, w, o, grad, valid, inside, presence, a, b, γ, s, ε,
    z_class, y_class, grad_class,
    C: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    SOFT: tl.constexpr, SMOOTHED: tl.constexpr, FOCAL: tl.constexpr,
):  # fmt: skip
    """Σ_j q_j w_j LDAM_j, the same of focal, and Σ_j q_j w_j, or the gradient stored.

    Σ_{k≠j} e^{z_k} is the whole sum less one term for every class but the largest, where that
    difference would cancel; the largest has a sum of its own.
    """
    cols = tl.arange(0, BLOCK)
    if SOFT:
        x, lost, in_row, _ = _logits(z, valid, o, inside, 0, z_class, C, BLOCK, DTYPE)
        q = tl.load(y[None, :] + (cols * y_class)[:, None], in_row, 0.0).to(DTYPE)
        q = tl.where(valid[None, :], q, 0.0)
    else:
        x, lost, in_row, is_y = _logits(z, y, o, inside, 0, z_class, C, BLOCK, DTYPE)
        q = tl.where(is_y, presence[None, :], 0.0)
    x = tl.where(valid[None, :], x, 0.0)
    if o is not None:
        lost = tl.where(valid[None, :], lost, 0.0)
    w_j = tl.full([BLOCK], 1.0, DTYPE)
    if w is not None:
        w_j = tl.load(w + cols, cols < C, 0.0).to(DTYPE)
    W = tl.sum(q * w_j[:, None], 0)
    if SMOOTHED:
        q = (1 - ε) * q + (ε / C) * presence[None, :]
    q = tl.where(in_row, q * w_j[:, None], 0.0)

    M = tl.max(x, 0)
    top = tl.min(tl.where(x == M[None, :], cols[:, None], BLOCK), 0)
    is_top = cols[:, None] == top[None, :]
    others = tl.where(is_top, -_INF, x)
    M, M_others = _below(M, o), _below(_at_least(tl.max(others, 0), -_LARGE), o)
    M_j = tl.where(is_top, M_others[None, :], M[None, :])
    others = _above(others, M_others[None, :], lost, o)

    ldam, focal, g = tl.zeros_like(presence), tl.zeros_like(presence), tl.zeros_like(x)
    if Δ is not None:
        margins = tl.load(Δ + cols, cols < C, 0.0).to(DTYPE)[:, None]
        e, S, r_top = _sums_of_others(x, M, lost, o, others, is_top, s)
        ldam_j, slope = _ldam(_log_odds(x, M_j, S, s, margins, lost, o), s)
        ldam = tl.sum(_times(q, ldam_j), 0)
        g += _chain(a[None, :] * (q * slope), e, S, r_top, is_top)
    if FOCAL:
        e, S, r_top = _sums_of_others(x, M, lost, o, others, is_top, 1.0)
        focal_j, slope = _focal(_log_odds(x, M_j, S, 1.0, None, lost, o), γ)
        focal = tl.sum(_times(q, focal_j), 0)
        g += _chain(b[None, :] * (q * slope), e, S, r_top, is_top)
    if grad is not None:
        g = tl.where(valid[None, :], g, 0.0)
        _store(grad, g, in_row, 0, grad_class, BLOCK)
    return ldam, focal, W


@triton.jit
def _sums_of_others(x, M, lost, o, others, is_top, s):
    """Exponentials, their sum over k ≠ j for every j, and r of the largest class."""
    e, e_others = _exps(_above(x, M[None, :], lost, o), s), _exps(others, s)
    S_others = _at_least(tl.sum(e_others, 0), 1.0)[None, :]
    S = tl.where(is_top, S_others, tl.sum(e, 0)[None, :] - e)
    return e, S, e_others / S_others


@triton.jit
def _chain(G, e, S, r_top, is_top):
    """Gradient for the logits from the slopes G_j = ∂L/∂ω_j: G_k - Σ_{j≠k} G_j r_jk."""
    t = tl.where(is_top, 0.0, G / S)
    G_top = tl.sum(tl.where(is_top, G, 0.0), 0)[None, :]
    return G - e * (tl.sum(t, 0)[None, :] - t) - r_top * G_top


@triton.jit
def _log_odds(z, M, S, s, Δ, lost, o):
    """s (z - M - Δ) - log S, with the rounding errors of the differences, times s, put back; with
    an adjustment that of z too."""
    h, errors = _difference(z, M)
    if Δ is not None:
        h, of_margin = _difference(h, Δ)
        errors += of_margin
    if o is not None:
        errors += lost
    return s * h + (s * errors - tl.log(S))


@triton.jit
def _difference(a, b):
    """a - b, rounded, and what the rounding lost (Knuth's TwoSum)."""
    c = a - b
    lost = (a - (c + (a - c))) + ((a - c) - b)
    return c, tl.where(tl.abs(lost) < _INF, lost, 0.0)


@triton.jit
def _ldam(τ, s):
    """softplus(-τ) and its slope, with τ = ω(s z) - s Δ."""
    u = _exp(-tl.abs(τ))
    return tl.where(τ < 0, -τ, 0.0) + _log1p(u), -s * (tl.where(τ > 0, u, 1.0) / (1 + u))


@triton.jit
def _focal(ω, γ):
    """sigmoid(-ω)^γ softplus(-ω) and its slope; the power in log space has no bad point."""
    u = _exp(-tl.abs(ω))
    log1p_u = _log1p(u)
    ce = tl.where(ω < 0, -ω, 0.0) + log1p_u
    modulation = _exp(-γ * (tl.where(ω > 0, ω, 0.0) + log1p_u))
    p, rest = tl.where(ω > 0, 1.0, u) / (1 + u), tl.where(ω > 0, u, 1.0) / (1 + u)
    slope = -modulation * (γ * p * tl.where(ce > _LARGE, _LARGE, ce) + rest)
    return modulation * ce, slope


@triton.jit
def _exps(x, s):
    """e^{s x} of x ≤ 0 in the fastest way; what is smaller than a normal number may become 0."""
    return _exp2(x * (s * _LOG2E))


@triton.jit
def _exp2(x):
    """2^x, in one instruction: tl.exp2, which gives subnormal numbers too, takes four."""
    if _INTERPRETED or x.dtype == tl.float64:
        return tl.exp2(x)
    else:
        return libdevice.exp2(x)


@triton.jit
def _exp(x):
    """e^x of x ≤ 0 to the last digits, subnormal numbers too.

    On NVIDIA's GPUs ``tl.exp`` of float32 is 2^(x log2 e), which loses x times an epsilon, and
    ``_exp2`` flushes subnormal results to 0: hence the product's tail, and the square of a root.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.where(x < -150, -75.0, x * 0.5)
        t = x * _LOG2E
        lost = tl.fma(x, _LOG2E, -t) + x * _LOG2E_TAIL
        root = _exp2(t) * (1 + lost * _LN2)
        return root * root


@triton.jit
def _log1p(u):
    """log(1 + u) of u in [0, 1]. What rounds in v = 1 + u is put back; it counts for 1 / v, for
    which 1 - u is near enough, as less is lost the smaller u is."""
    v = 1 + u
    return tl.log(v) - ((v - 1) - u) * (1 - u)


@triton.jit
def _at_least(x, least):
    """Their maximum, NaN where x is, and the sum of exponentials unless no class is possible."""
    return tl.where(x < least, least, x)


@triton.jit
def _times(coefficient, term):
    """Their product with 0 · ∞ = 0: what counts for nothing may be impossible."""
    return tl.where((coefficient == 0) & (term == _INF), 0.0, coefficient * term)
