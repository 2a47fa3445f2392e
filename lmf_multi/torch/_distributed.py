"""Sums over the processes of ``torch.distributed`` that train one model together."""

from typing import Any, NamedTuple

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


class Shards(NamedTuple):
    """How a ``DTensor`` of logits lies on its mesh while each process computes its part.

    Logits that are sharded over examples stay where they are, and labels come to them; those
    sharded over the classes are gathered, as ``torch.nn.functional.cross_entropy`` gathers them.

    mesh: of the processes.
    shape: of the logits, all of them.
    axis: of the logits, which no process can do without; labels may lack it.
    splits: the axis of the logits that each axis of the mesh splits, or None.
    """

    mesh: Any
    shape: torch.Size
    axis: int | None
    splits: tuple[int | None, ...]

    @classmethod
    def of(cls, z: Any, axis: int | None) -> "Shards":
        """Of logits, a ``DTensor``."""
        from torch.distributed.tensor import Shard

        dims = [p.dim % z.dim() if type(p) is Shard else None for p in z.placements]
        return cls(z.device_mesh, z.shape, axis, tuple(None if j == axis else j for j in dims))

    def local(self, x: Any) -> Tensor:
        """This process's part of logits, labels or a mask, of the mesh or the same everywhere."""
        from torch.distributed.tensor import DTensor, Replicate

        if not is_sharded(x):
            x = DTensor.from_local(x, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        part: Tensor = x.redistribute(self.mesh, self._placements(x)).to_local()
        return part

    def total(self, x: Tensor) -> Any:
        """The sum of all parts' numbers, a ``DTensor`` that is the same everywhere."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        shares = [Replicate() if j is None else Partial() for j in self.splits]
        x = DTensor.from_local(x, self.mesh, shares, run_check=False)
        return x.redistribute(self.mesh, [Replicate()] * self.mesh.ndim)

    def joined(self, loss: Tensor, reduction: Reduction) -> Tensor:
        """The reduced loss of all parts, or with ``"none"`` every example's, sharded as labels."""
        from torch.distributed.tensor import DTensor

        if reduction != "none":
            return self.total(loss)  # type: ignore[no-any-return]
        shape, axis = self.shape, self.axis
        if loss.dim() != len(shape):
            shape = shape[:axis] + shape[axis:][1:]
        stride, placements = torch.empty(shape, device="meta").stride(), self._placements(loss)
        result: Tensor = DTensor.from_local(
            loss, self.mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return result

    def _placements(self, x: Any) -> list[Any]:
        """Those of the logits, for an array that may lack the axis."""
        from torch.distributed.tensor import Replicate, Shard

        before = len(self.shape) if x.dim() == len(self.shape) else self.axis or 0
        return [
            Replicate() if j is None else Shard(j - 1 if j > before else j) for j in self.splits
        ]
