"""Where the rows of arrays lie, for kernels that are told addresses and strides."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_ROWS = 2**31 - 2**16  # counted in 32 bits, a last tile included


class Layout(NamedTuple):
    """Row r of an array starts at (r // inner) · stride[0] + (r % inner) · stride[1]."""

    inner: int
    z: tuple[int, int, int]
    y: tuple[int, int, int]
    grad: tuple[int, int, int]
    alignment: int


def layout_of(z: Tensor, y: Tensor, axis: int) -> Layout | None:
    """Strides of rows and classes, or None where the rows' axes are more than two."""
    y_strides = y.stride() if y.is_floating_point() else None
    return strides_of(z.shape, axis % z.dim(), z.stride(), y_strides)


@lru_cache(maxsize=256)
def strides_of(
    shape: torch.Size, axis: int, z: tuple[int, ...], y: tuple[int, ...] | None
) -> Layout | None:
    grad = torch.empty_like(torch.empty_strided(shape, z, device="meta")).stride()
    arrays = (z, grad, z if y is None else y)
    axes: list[tuple[int, list[int]]] = []
    for i, size in enumerate(shape):
        steps = [strides[i] for strides in arrays]
        if i == axis or size == 1 or 0 in shape:  # no rows lie anywhere
            continue
        if axes and axes[-1][1] == [size * step for step in steps]:
            axes[-1] = (axes[-1][0] * size, steps)
        else:
            axes.append((size, steps))
    rows = math.prod(size for size, _ in axes)
    reach = max(strides[axis] for strides in arrays) * (shape[axis] - 1)
    if len(axes) > 2 or rows > _MOST_ROWS or reach >= 2**31:
        return None
    inner = axes[1][0] if len(axes) == 2 else 1
    outers, inners = [*(steps for _, steps in axes), [0] * 3, [0] * 3][:2]
    z_, grad_, y_ = (
        (outer, inner_, strides[axis])
        for outer, inner_, strides in zip(outers, inners, arrays, strict=True)
    )
    return Layout(inner, z_, y_, grad_, math.gcd(16, *outers, *inners))
