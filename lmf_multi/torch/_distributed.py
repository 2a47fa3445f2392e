"""Sums over the processes of ``torch.distributed`` that train one model together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmf_multi.spec import Reduction


class Group:
    """A ``ProcessGroup`` as a module keeps it, which cannot be copied: copies share it."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> "Group":
        return self

    def __reduce__(self) -> Any:
        if self.group is None or self.group == "world":
            return Group, (self.group,)
        if self.group is not torch.distributed.group.WORLD:
            raise TypeError(
                "a loss can be pickled with the default process group alone, "
                f"got process_group={self.group!r}; set process_group to None, and anew after "
                "loading"
            )
        return Group, ("world",)


def check_group(group: Any, reduction: Reduction) -> None:
    """Refuse what is no process group, and a group without a reduction over it."""
    if group is None:
        return
    if reduction == "none":
        raise ValueError(
            "process_group needs a reduction over the batch, got reduction 'none'; "
            "use 'mean', 'batch_mean' or 'sum'"
        )
    if not torch.distributed.is_available():
        raise ValueError(f"process_group needs a PyTorch with torch.distributed, got {group!r}")
    if group != "world" and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f'process_group must be a ProcessGroup, "world" or None, got {group!r}')


def group_totals(totals: tuple[Tensor, Tensor], group: Any) -> tuple[Tensor, Tensor]:
    """Total class weight and number of examples, of all processes of the group."""
    W, presence = totals
    if W.requires_grad and group is not None:
        raise ValueError(
            "labels must be constant with process_group, got a tensor that requires grad; detach it"
        )
    both = torch.stack([W.sum(), presence.sum()])
    if group_size(group) > 1:
        torch.distributed.all_reduce(both, group=_resolved(group))
    return both[0], both[1]


def group_size(group: Any) -> int:
    """Number of processes; 1 without a group, or for "world" without ``init_process_group``."""
    if group is None or (group == "world" and not torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(_resolved(group))


def _resolved(group: Any) -> Any:
    return None if group == "world" else group


# --- DTensors: one tensor for all processes of a mesh, of which each holds a shard


def is_sharded(x: Any) -> bool:
    """Whether it is a ``DTensor``, whose import takes seconds."""
    return type(x) not in (Tensor, torch.nn.Parameter) and hasattr(x, "device_mesh")


def whole(x: Any) -> Any:
    """The whole of a ``DTensor``; anything else as it is."""
    return x.full_tensor() if is_sharded(x) else x


def check_shards(input: Any, **labels: Any) -> bool:
    """Whether the logits are a ``DTensor``; refuse labels that do not go with them."""
    for name, x in labels.items():
        if is_sharded(x) and not is_sharded(input):
            raise TypeError(
                f"{name} must be a plain tensor, as input is one, got a DTensor; "
                f"pass {name}.full_tensor(), or its to_local()"
            )
        if is_sharded(input) and isinstance(x, Tensor) and not is_sharded(x) and input.dim():
            one, every = input.to_local().shape[0], input.shape[0]
            if x.shape[:1] == (one,) and one != every:
                raise ValueError(
                    f"{name} must be a DTensor, as input is one, or hold all {every} examples, "
                    f"got {one}; wrap each process's own with DTensor.from_local"
                )
    return is_sharded(input)


def loss_of_shards(
    function: Callable[..., Tensor],
    count: Callable[..., tuple[Tensor, Tensor]],
    input: Any,
    labels: tuple[Any, ...],
    axis: int | None,
    reduction: Reduction,
    totals: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The reduced loss of a ``DTensor``: each process computes what its shard contributes.

    Logits that are sharded over examples stay where they are, and labels come to them; those
    sharded over the classes are gathered, as ``torch.nn.functional.cross_entropy`` gathers them.

    Args:
        function: of a shard, its labels and the totals: its loss.
        count: of labels, each example's class weight and presence.
        input: logits.
        labels: target, and the mask if there is one: DTensors of the logits' mesh, or plain tensors
            that are the same on every process.
        axis: of the logits, which no process can do without; the target may lack it.
        reduction: of ``function``.
        totals: replace the batch's total class weight and number of examples.

    Returns:
        A DTensor, the same everywhere, or sharded as the labels are for ``"none"``.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, rank = input.device_mesh, input.dim()
    everywhere = [Replicate()] * mesh.ndim
    splits = [
        p.dim % rank if type(p) is Shard and p.dim % rank != axis else None
        for p in input.placements
    ]  # the axis of the logits that each axis of the mesh splits

    def placed(x: Any, placements: list[Any]) -> Any:
        if not is_sharded(x):
            x = DTensor.from_local(x, mesh, everywhere, run_check=False)
        return x.redistribute(mesh, placements)

    def like_logits(x: Tensor) -> list[Any]:
        lacks_axis = x.dim() < rank
        return [
            Replicate() if j is None else Shard(j - 1 if lacks_axis and j > (axis or 0) else j)
            for j in splits
        ]

    def total(x: Tensor) -> Any:
        shares = [Replicate() if j is None else Partial() for j in splits]
        return DTensor.from_local(x, mesh, shares, run_check=False).redistribute(mesh, everywhere)

    shards = [None if x is None else placed(x, like_logits(x)).to_local() for x in labels]
    if totals is None and reduction in ("mean", "batch_mean"):
        W, presence = (total(each.sum()).to_local() for each in count(*shards))
        totals = W, presence
    loss = function(placed(input, like_logits(input)).to_local(), *shards, totals)
    if reduction != "none":
        return total(loss)  # type: ignore[no-any-return]
    shape = input.shape if loss.dim() == rank else input.shape[:axis] + input.shape[axis:][1:]
    stride = torch.empty(shape, device="meta").stride()
    result: Tensor = DTensor.from_local(
        loss, mesh, like_logits(loss), run_check=False, shape=shape, stride=stride
    )
    return result
