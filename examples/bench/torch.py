"""What ``bench_loss`` measures in PyTorch: forward and backward, eager and compiled."""

import contextlib
import itertools
import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.bench.measure import LIGER, Run, host_clock, interrupted_after, logits_size
from lmf_multi import LMFSpec
from lmf_multi.torch import LMFLoss

# which says, where there is a compiler for CUDA and no GPU, that there is none
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

CACHED = 2**28  # bytes: more than a GPU keeps of what it has just read
LARGE = {"cuda": 2**30, "cpu": 2**28}  # bytes that are copied to measure the device

Loss = Callable[[Tensor, Tensor], Tensor]


def contenders(shape: tuple[int, ...], dtype: str, device: str) -> dict[str, Run]:
    """Names, and what runs one forward and backward pass on fixed logits and labels."""
    torch.manual_seed(0)
    # a GPU gets other logits at each call, as in training, where they do not wait in its cache
    copies = max(1, min(64, CACHED // logits_size(shape, dtype))) if device == "cuda" else 1
    logits = [torch.randn(shape, device=device, dtype=getattr(torch, dtype)) for _ in range(copies)]
    C = shape[1]
    y = torch.randint(0, C, (shape[0], *shape[2:]), device=device)
    # long-tailed, as in the applications: 1000 to 10
    spec = LMFSpec([round(1000 * 100 ** (-j / (C - 1))) for j in range(C)])
    criterion = LMFLoss.from_spec(spec).to(device)
    margins, weights = (torch.tensor(v, device=device) for v in (spec.margins, spec.weights))

    def published(z: Tensor, y: Tensor) -> Tensor:
        return published_formula(z, y, margins.to(z.dtype), weights.to(z.dtype), spec)

    losses: dict[str, Loss] = {
        "cross-entropy": F.cross_entropy,
        "published formula": published,
        "ours": criterion,
    }
    torch._dynamo.reset()  # each shape is compiled for itself
    compiled = {f"{name}, compiled": torch.compile(loss) for name, loss in losses.items()}

    def step(loss: Loss, logits: list[Tensor] = logits) -> Run:
        turns = itertools.cycle([z.detach().requires_grad_() for z in logits])

        def run() -> None:
            z = next(turns)  # not backward(), which would copy a gradient that Liger keeps
            torch.autograd.grad(loss(z, y), z)

        return Run(run, lambda: peak_memory(run, device))

    source, target = itertools.cycle(logits), torch.empty_like(logits[0])
    runs = {"copy": Run(lambda: target.copy_(next(source)), lambda: None)}
    runs |= {name: step(loss) for name, loss in (losses | compiled).items()}
    if device == "cuda":
        for name in ("cross-entropy", "ours"):
            runs[f"{name}, CUDA graph"] = captured(losses[name], logits, y)
    if device == "cuda" and len(shape) == 2 and find_spec("liger_kernel"):
        # it writes the gradient over the logits: it gets its own
        runs[LIGER] = step(lambda z, y: liger()(z, y), [z.clone() for z in logits])
    return runs


def captured(loss: Loss, logits: list[Tensor], y: Tensor) -> Run:
    """Replays of what it launches, which take the GPU's time without Python's."""
    graphs = []
    for values in logits:
        z = values.detach().requires_grad_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.autograd.grad(loss(z, y), z)
        torch.cuda.current_stream().wait_stream(side)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            torch.autograd.grad(loss(z, y), z)
    turns = itertools.cycle(graphs)
    return Run(lambda: next(turns).replay(), lambda: None)


@cache
def liger() -> Loss:
    """Liger-Kernel's own choice of a kernel."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss: Loss = LigerCrossEntropyLoss()
    return loss


def clock(call: Callable[[], object], calls: int, device: str) -> float:
    """Seconds of so many calls, on the GPU's own clock if they run there."""
    if device != "cuda":
        return host_clock(call, calls, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def prepare(device: str) -> dict[str, float]:
    """Bytes a second that a large copy reads and writes; and the compiler is loaded."""
    z = torch.zeros(8, 4, device=device, requires_grad=True)
    y = torch.zeros(8, dtype=torch.int64, device=device)
    # what fails or hangs here does so again where it is noted down
    with contextlib.suppress(Exception), interrupted_after(45):
        torch.compile(F.cross_entropy)(z, y).backward()
    source = torch.ones(LARGE[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [clock(lambda: target.copy_(source), 1, device) for _ in range(20)]
    return {"copy_bandwidth": 2 * LARGE[device] / sorted(times)[10]}


def published_formula(z: Tensor, y: Tensor, Δ: Tensor, w: Tensor, spec: LMFSpec) -> Tensor:
    """LMF as it is published: a cross-entropy of shifted, scaled logits and a focal one."""
    is_y = F.one_hot(y, z.shape[1]).movedim(-1, 1).to(z.dtype)
    by_class = [-1] + [1] * (z.dim() - 2)
    ldam = F.cross_entropy(spec.scale * (z - is_y * Δ.view(by_class)), y, weight=w)
    ce = F.cross_entropy(z, y, reduction="none")
    focal = (1 - torch.exp(-ce)) ** spec.gamma * w[y] * ce
    return spec.alpha * ldam + spec.beta * focal.mean()


def peak_memory(run: Callable[[], None], device: str) -> int:
    """Bytes that a run holds at most beyond logits and labels."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(change for _, change in sorted(changes)), default=0)


def versions() -> dict[str, str]:
    """What the figures were measured with."""
    found = {"torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {"CUDA": str(torch.version.cuda), "GPU": torch.cuda.get_device_name()}
    return found
