"""Pixels and voxels as a layout of their own: no copy of the logits, masks, counts of pixels."""

import numpy as np
import pytest

from lmf_multi import class_counts, reference
from tests.frameworks import KERAS_BACKEND, load

RNG = np.random.default_rng(0)
CLASSES, IGNORE = 4, 255
SHAPES = [(2, 5, 6), (2, 3, 4, 5)]  # (N, H, W) and (N, D, H, W)


def pixels(shape):
    """Logits with the classes last, labels with ignored pixels, and their counts."""
    logits = RNG.normal(0, 3, (*shape, CLASSES))
    labels = RNG.choice([0, 0, 0, 0, 1, 1, 2, 3, IGNORE], shape)
    logits[labels == IGNORE] = np.nan
    return logits, labels, class_counts(labels, CLASSES, ignore_index=IGNORE)


def exact(logits, labels, counts):
    loss = reference.LMFLoss(counts)
    return reference.lmf_loss_and_grad(
        logits, labels, loss.margins, loss.class_weight, where=labels != IGNORE
    )


def test_counts_of_pixels():
    _, labels, counts = pixels(SHAPES[0])
    assert counts.sum() == (labels != IGNORE).sum() < labels.size
    np.testing.assert_array_equal(counts, [(labels == c).sum() for c in range(CLASSES)])


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_torch_layouts(shape, channels_last):
    torch, losses = load("torch"), load("lmf_multi.torch")
    logits, labels, counts = pixels(shape)
    memory = torch.contiguous_format
    if channels_last:
        memory = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
    z = torch.tensor(np.moveaxis(logits, -1, 1)).contiguous(memory_format=memory)
    z.requires_grad_()
    loss = losses.LMFLoss(counts, ignore_index=IGNORE)(z, torch.tensor(labels))
    loss.backward()
    value, grad = exact(logits, labels, counts)
    np.testing.assert_allclose(loss.item(), value, rtol=1e-12)
    np.testing.assert_allclose(np.moveaxis(z.grad.numpy(), 1, -1), grad, rtol=1e-11, atol=1e-16)
    assert z.grad.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("channels_last", [False, True])
def test_torch_copies_no_layout(channels_last):
    """No operation rearranges the logits; all numbers of their shape keep their strides."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    logits, labels, counts = pixels((2, 300, 400))  # more than a piece
    memory = torch.channels_last if channels_last else torch.contiguous_format
    z = torch.tensor(np.moveaxis(logits, -1, 1), dtype=torch.float32)
    z, y = z.contiguous(memory_format=memory).requires_grad_(), torch.tensor(labels)
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else [result]:
                is_tensor = isinstance(each, torch.Tensor) and each.is_floating_point()
                if is_tensor and each.shape == z.shape:
                    seen.append((operation.overloadpacket.__name__, each.stride()))
            return result

    loss = losses.LMFLoss(counts, ignore_index=IGNORE)
    with Record():
        loss(z, y).backward()
    assert seen
    assert {stride for _, stride in seen} == {z.stride()}
    assert not {"permute", "transpose", "index", "index_put"} & {name for name, _ in seen}
    other = torch.contiguous_format if channels_last else torch.channels_last
    with Record():
        z.contiguous(memory_format=other)
    assert {stride for _, stride in seen} != {z.stride()}  # the check can fail


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_jax_layouts(shape):
    jax, losses = load("jax"), load("lmf_multi.jax")
    logits, labels, counts = pixels(shape)
    loss = losses.LMFLoss(counts)

    def of(z):
        return loss(z, labels, where=labels != IGNORE)

    with jax.enable_x64(True):
        value, grad = jax.jit(jax.value_and_grad(of))(logits)
        program = str(jax.make_jaxpr(jax.grad(of))(logits))
    expected = exact(logits, labels, counts)
    np.testing.assert_allclose(value, expected[0], rtol=1e-12)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-11, atol=1e-16)
    assert "exp" in program and "transpose[" not in program and "reshape[" not in program


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_keras_layouts(shape):
    load("keras")
    losses = load("lmf_multi.keras")
    logits, labels, counts = pixels(shape)
    value, _ = exact(logits, labels, counts)
    loss = losses.LMFLoss(counts, ignore_class=IGNORE)
    np.testing.assert_allclose(float(loss(labels, logits.astype("float32"))), value, rtol=1e-5)
    # masks with a channel, as image pipelines hand them over
    masks = labels[..., None].astype("uint8")
    np.testing.assert_allclose(float(loss(masks, logits.astype("float32"))), value, rtol=1e-5)


def test_keras_tensorflow_copies_no_layout():
    if KERAS_BACKEND != "tensorflow":
        pytest.skip("runs with Keras on tensorflow")
    load("keras")
    tf, losses = load("tensorflow"), load("lmf_multi.keras")
    logits, labels, counts = pixels(SHAPES[0])
    loss = losses.LMFLoss(counts, ignore_class=IGNORE)

    @tf.function
    def step(z):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = loss(labels, z)
        return tape.gradient(value, z)

    graph = step.get_concrete_function(tf.constant(logits, tf.float32)).graph
    operations = {operation.type for operation in graph.get_operations()}
    assert "Exp" in operations and "Transpose" not in operations


def test_torch_training_on_pixel_counts():
    """A 1 x 1 convolution finds the rare class, in channels_last and bfloat16 autocast too."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    torch.manual_seed(0)
    labels = torch.tensor(RNG.choice(3, (4, 16, 16), p=[0.9, 0.08, 0.02]))
    images = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    images = images.contiguous(memory_format=torch.channels_last)
    model = torch.nn.Conv2d(3, 3, 1).to(memory_format=torch.channels_last)
    criterion = losses.LMFLoss(class_counts(labels), scale=5.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
    rare = labels == 2
    assert rare.any() and (model(images).argmax(1)[rare] == 2).all()
