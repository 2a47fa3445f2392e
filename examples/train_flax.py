r"""Train an image classifier on imbalanced data with Flax: a CPU, a TPU or GPUs, or several hosts.

    python -m examples.train_flax
    python -m examples.train_flax --data HAM10000 --image-size 64 --learning-rate 1e-3 \
        --epochs 30 --decay-epochs 10
    python -m examples.train_flax --data HAM10000 --arch resnet50 --bf16 --distributed
    python -m examples.train_flax --data HAM10000 --arch resnet50 --bf16 --aot v5e:2x4

The second, for 6,308 training images of HAM10000, took 7 to 13 minutes in a thread of an AMD EPYC
that other work shared (November 2026): test macro-F1 0.550 and 0.514 for seeds 0 and 1; with
``--loss ce`` 0.527 and 0.549. On a GPU or TPU: not measured.

Of several hosts each runs the same command, with --distributed, on files that all of them see.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from examples.data.datasets import Split
from examples.data.findings import UNKNOWN
from examples.models import flax as models
from examples.models.common import HEADS, check_image_size
from examples.training import ahead_of_time
from examples.training import checkpoints_flax as checkpoints
from examples.training import recipe_flax as recipe
from examples.training.losses_flax import CrossEntropy
from examples.training.recipe import pieces
from examples.training.run import Processes, Run
from examples.training.settings import Settings, parse
from examples.training.start import check_shares, claim, load_data, one_sentence
from lmf_multi import class_weights, deferred_weights
from lmf_multi.jax import FocalLoss, LDAMLoss, LMFLoss, SigmoidLMFLoss

SYNC_EVERY = 20  # steps between looks at a device's losses: each look waits for the device


def main(argv: Sequence[str] | None = None) -> int:
    """Train, choose the epoch, test; the exit status."""
    settings = parse("flax", argv, __doc__.split("\n")[0])
    rank, world, mesh = processes(settings)
    device = mesh.devices.flat[0]
    replicated = NamedSharding(mesh, PartitionSpec())
    by_rows = NamedSharding(mesh, PartitionSpec("batch"))
    put = jax.jit(lambda tree: tree, out_shardings=replicated)  # as on one host, so on several
    # to memory of its own, which no step takes
    copied = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=replicated)
    if settings.aot:
        put = partial(ahead_of_time.abstract, sharding=replicated)

    # data
    with one_sentence():
        if not (settings.aot or claim(settings)):
            return 0
        dataset = load_data(settings, visible=rank == 0)
        check_shares(settings.batch_size, mesh.size, "devices", settings.accumulate)
        group = Processes(rank, world, agree=any_process)
        sync_every = 1 if device.platform == "cpu" else SYNC_EVERY
        run = Run(settings, dataset, group, sync_every)

    # model, loss, optimiser
    with one_sentence():
        check_image_size(settings.arch, dataset.image_size)
        build = partial(
            models.build,
            settings.arch,
            len(dataset.class_names),
            dtype=jnp.bfloat16 if settings.bf16 else jnp.float32,
        )
        model = build(**settings.network_options(), rngs=nnx.Rngs(settings.seed))
        criterion = put(build_loss(settings, dataset.class_counts))
        head = HEADS[settings.arch].partition(".")[0]

        def begun(model: nnx.Module) -> tuple[Any, ...]:
            """What the steps take, of a model and an optimiser that has made none.

            The graphs of training and evaluation, dropout's keys, the rest, and with --ema the
            trained weights' average.
            """
            trained = nnx.All(nnx.Param, nnx.PathContains(head)) if run.head_alone else nnx.Param
            optimizer = recipe.build_optimizer(settings, run.steps, run.head_alone)
            optimizer = nnx.Optimizer(model, optimizer, wrt=trained)
            parts = {"model": model, "optimizer": optimizer}
            # split once, merged inside the steps: they take and give arrays alone
            model.eval()
            evaluation = nnx.graphdef(parts)
            if not run.head_alone:  # batch norm and dropout leave its features alone
                model.train()
            # dropout's keys follow from the seed; how often they were drawn from is in the state
            training, keys, state = nnx.split(parts, nnx.RngKey, ...)
            state = put(state)
            has_average = settings.ema is not None and not settings.aot
            average = copied(recipe.weights_of(state, trained)) if has_average else None
            return training, evaluation, put(keys), state, average

        def read(folder: Path, state: nnx.State, average: Any) -> tuple[nnx.State, Any]:
            """A checkpoint's state and average, in the structure of others."""
            tree = put(checkpoints.load(folder, recipe.written(state, average)))
            return recipe.read(tree, average)

        folder = run.resume()
        training, evaluation, keys, state, average = begun(model)
        if folder:
            state, average = read(folder, state, average)

    # step
    # Compiled anew when the head is trained alone, whose state has fewer arrays.
    # The new state takes the old one's memory. It is whole on every device, a batch is not, so XLA
    # adds what sums over devices. The loss is an argument, no constant: when deferred weights set
    # in, nothing is compiled again.
    @partial(jax.jit, donate_argnums=0, out_shardings=replicated)
    def train_step(
        state: nnx.State, keys: nnx.State, criterion: Any, totals: Any, images: Array, labels: Array
    ) -> tuple[nnx.State, Array]:
        parts = nnx.merge(training, keys, state)

        def loss_of(model: nnx.Module) -> Array:
            # means, batch norm's too, are over the whole batch, however it is sharded; pixels are
            # normalised here so that devices are sent uint8, a quarter of float32's bytes
            return criterion(model(models.normalize(images)), labels, normalizers=totals)

        trained = nnx.DiffState(0, parts["optimizer"].wrt)
        loss, grads = nnx.value_and_grad(loss_of, argnums=trained)(parts["model"])
        parts["optimizer"].update(parts["model"], grads)
        return nnx.state(parts, nnx.Not(nnx.RngKey)), loss

    @partial(jax.jit, out_shardings=replicated)
    def logits_of(state: nnx.State, keys: nnx.State, images: Array) -> Array:
        parts = nnx.merge(evaluation, keys, state)
        return parts["model"](models.normalize(images))

    average_step = jax.jit(recipe.averaged, donate_argnums=0, out_shardings=replicated)
    loss_of = jax.jit(lambda criterion, logits, labels: criterion(logits, labels))
    totals_of = jax.jit(
        lambda criterion, labels: criterion.normalizers(labels), out_shardings=replicated
    )

    def sharded(local: np.ndarray) -> Array:
        """The global array, of which this process has its rows."""
        return jax.make_array_from_process_local_data(by_rows, local)

    def predict(state: nnx.State, split: Split) -> np.ndarray:
        """Logits (N, C) of a split in its order, on the host of every process."""
        batch = settings.batch_size
        mine = split.whole_batches(batch).reshape(-1, world, batch // world)[:, rank].ravel()
        batches = split.batches(mine, batch // world)
        # fetched together at the end: the host prepares the next batch while a device computes
        logits = [logits_of(state, keys, sharded(images)) for images, _ in batches]
        return np.concatenate(jax.device_get(logits))[: len(split)]

    if settings.aot:
        size = dataset.image_size
        rows = settings.batch_size // settings.accumulate
        images = jax.ShapeDtypeStruct((rows, size, size, 3), np.uint8)
        shape, dtype = run.label()
        labels = jax.ShapeDtypeStruct((rows, *shape), jax.dtypes.canonicalize_dtype(dtype))
        with one_sentence():
            batch = ahead_of_time.abstract((images, labels), by_rows)
            totals = None
            if settings.accumulate > 1:
                totals = put(jax.eval_shape(totals_of, criterion, labels))
            arguments = (state, keys, criterion, totals, *batch)
            compiled = ahead_of_time.compile_step(train_step, *arguments)
        ahead_of_time.report(settings.aot, compiled, mesh.size)
        return 0

    # loop
    with run:
        while not run.done:
            if run.head_is_next():
                state, average = read(run.begin_head(), state, average)
                parts = nnx.merge(evaluation, keys, recipe.validated(state, average))
                # another draw than the one that the features grew with
                key = jax.random.fold_in(jax.random.key(settings.seed), run.epoch)
                untrained = build(head=settings.head, rngs=nnx.Rngs(key))
                setattr(parts["model"], head, getattr(untrained, head))
                training, evaluation, keys, state, average = begun(parts["model"])
            if settings.drw is not None:
                weights = deferred_weights(dataset.class_counts, run.epoch, settings.drw)
                criterion = put(criterion.replace(class_weight=weights))
            for images, labels in run.train_batches():
                totals, losses = None, []
                if settings.accumulate > 1:
                    totals = totals_of(criterion, sharded(labels))
                for rows in pieces(settings.accumulate):
                    part = sharded(images[rows]), sharded(labels[rows])
                    state, loss = train_step(state, keys, criterion, totals, *part)
                    losses.append(loss)
                if average is not None:
                    share = 1.0 if run.stage_begins() else 1 - settings.ema
                    average = average_step(average, recipe.common(state, average), share)
                # JAX may still be at work on it
                run.took_step(loss if totals is None else sum(losses))
            if run.stopping and run.step < run.steps:
                run.save(partial(checkpoints.save, recipe.written(state, average)))
                return run.stop()
            logits = predict(recipe.validated(state, average), dataset.val)
            run.end_epoch(logits, float(loss_of(criterion, logits, dataset.val.labels)))
            run.save(partial(checkpoints.save, recipe.written(state, average)))
            if run.stopping and not run.done:
                return run.stop()

        if world > 1:
            multihost_utils.sync_global_devices("process 0 has written the best epoch")
        # the test images are seen once, by the model that the validation images chose
        best = read(run.checkpoints.of_epoch(run.best_epoch), state, average)
        state = recipe.validated(*best)
        run.finish(
            predict(state, dataset.test),
            predict(state, dataset.val),
            device="cpu" if device.platform == "cpu" else device.device_kind,
            peak_device_memory=peak_device_memory(),
        )
    return 0


def processes(settings: Settings) -> tuple[int, int, Mesh]:
    """Rank, number of processes and the mesh of all devices; joins the other hosts if asked to."""
    with one_sentence():
        if settings.aot:
            devices = ahead_of_time.devices(settings.aot)
            return 0, 1, Mesh(np.array(devices), ("batch",))
        if settings.distributed:
            join()
    # each process's devices side by side, so that its rows stay together
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return jax.process_index(), jax.process_count(), Mesh(np.array(devices), ("batch",))


def join() -> None:
    """Meet the other hosts.

    On TPU pods and GPU clusters under Slurm, Open MPI or Kubernetes JAX knows who they are;
    elsewhere three environment variables say it.
    """
    told = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    try:
        jax.distributed.initialize(
            **{name: int(os.environ[v]) for name, v in told.items() if v in os.environ}
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed needs a cluster that JAX knows, or JAX_COORDINATOR_ADDRESS, "
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID set: {error}"
        ) from error


def any_process(flag: bool) -> bool:
    """True where any process says so, on all of them at the same step."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def build_loss(settings: Settings, counts: np.ndarray) -> Any:
    """The loss that the settings name, of counts (C,) or (L, 2), as a pytree; a batch's mean."""
    if settings.has_findings:
        return jax.tree_util.Partial(annotated, SigmoidLMFLoss(**settings.loss_arguments(counts)))
    if settings.loss in ("ce", "bwcce", "crt"):
        options = settings.loss_options
        weight = class_weights(counts, options.get("class_weight"))
        return CrossEntropy(weight, options.get("label_smoothing", 0.0))
    losses: dict[str, Callable[..., Any]] = {
        "focal": FocalLoss,
        "ldam": LDAMLoss,
        "lmf": LMFLoss,
        "la": LMFLoss,
    }
    return losses[settings.loss](**settings.loss_arguments(counts))


def annotated(
    loss: SigmoidLMFLoss, logits: Array, labels: Array, normalizers: None = None
) -> Array:
    """The mean of logits and labels (N, L) over those findings that somebody has looked for."""
    return loss(logits, labels, where=labels != UNKNOWN)


def peak_device_memory() -> int | None:
    """Bytes that a device of this process held at most; None where it is the host's memory."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if s), default=None)


if __name__ == "__main__":
    sys.exit(main())
