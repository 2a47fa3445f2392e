"""Sums over the processes of ``torch.distributed`` that train one model together."""

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
