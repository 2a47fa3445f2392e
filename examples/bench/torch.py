"""What ``bench_loss`` measures in PyTorch: forward and backward, eager and compiled."""

import math
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from lmf_multi import LMFSpec
from lmf_multi.torch import LMFLoss

LIGER = "Liger's cross-entropy"  # on CUDA, where the package liger-kernel is installed


def contenders(
    shape: tuple[int, ...], dtype: str, device: str, compiled: bool = True
) -> dict[str, Callable[[], None]]:
    """Names, and what runs one forward and backward pass on fixed logits and labels."""
    torch.manual_seed(0)
    z = torch.randn(shape, device=device, dtype=getattr(torch, dtype)).requires_grad_()
    C = shape[1]
    y = torch.randint(0, C, (shape[0], *shape[2:]), device=device)
    # long-tailed, as in the applications: 1000 to 10
    spec = LMFSpec([round(1000 * 100 ** (-j / (C - 1))) for j in range(C)])
    criterion = LMFLoss.from_spec(spec).to(device)
    margins, weights = (torch.tensor(v, device=device) for v in (spec.margins, spec.weights))

    def published(z: Tensor, y: Tensor) -> Tensor:
        return published_formula(z, y, margins.to(z.dtype), weights.to(z.dtype), spec)

    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cross-entropy": F.cross_entropy,
        "published formula": published,
        "ours": criterion,
    }
    if compiled:
        torch._dynamo.reset()  # each shape is compiled for itself
        losses |= {f"{name}, compiled": torch.compile(loss) for name, loss in losses.items()}

    def step(loss: Callable[[Tensor, Tensor], Tensor], z: Tensor = z) -> Callable[[], None]:
        def run() -> None:
            z.grad = None
            loss(z, y).backward()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    source, target = z.detach(), torch.empty_like(z)

    def copy() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    runs = {"copy": copy, **{name: step(loss) for name, loss in losses.items()}}
    if device == "cuda" and len(shape) == 2 and find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        # it writes the gradient over the logits: it gets its own
        runs[LIGER] = step(LigerCrossEntropyLoss(), z.detach().clone().requires_grad_())
    return runs


def published_formula(z: Tensor, y: Tensor, Δ: Tensor, w: Tensor, spec: LMFSpec) -> Tensor:
    """LMF as it is published: a cross-entropy of shifted, scaled logits and a focal one."""
    is_y = F.one_hot(y, z.shape[1]).movedim(-1, 1).to(z.dtype)
    by_class = [-1] + [1] * (z.dim() - 2)
    ldam = F.cross_entropy(spec.scale * (z - is_y * Δ.view(by_class)), y, weight=w)
    ce = F.cross_entropy(z, y, reduction="none")
    focal = (1 - torch.exp(-ce)) ** spec.gamma * w[y] * ce
    return spec.alpha * ldam + spec.beta * focal.mean()


def peak_memory(name: str, shape: tuple[int, ...], dtype: str, device: str) -> int:
    """Bytes that a run holds at most beyond logits and labels."""
    run = contenders(shape, dtype, device, compiled="compiled" in name)[name]
    run()
    if device == "cuda":
        last_gradient = math.prod(shape) * getattr(torch, dtype).itemsize
        before = torch.cuda.memory_allocated() - last_gradient  # which the run frees first
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = highest = 0
    for _, change in sorted(changes):
        held = max(0, held + change)  # the last gradient, which the run frees first, does not count
        highest = max(highest, held)
    return highest


def versions() -> dict[str, str]:
    """What the figures were measured with."""
    found = {"torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {"CUDA": str(torch.version.cuda), "GPU": torch.cuda.get_device_name()}
    return found
