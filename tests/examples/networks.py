"""What the tests of the trainers' networks share."""

import numpy as np

from tests.frameworks import load

# float64 through 50 to 120 layers; float32 through five
RTOL = {"float64": 1e-10, "float32": 1e-5}
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)


def models_of(framework):
    """The module that builds its networks; where the framework is absent the test is skipped."""
    load(framework)
    return load(f"examples.models.{framework}")


def assert_same(ours, theirs, dtype):
    """Compare relative to the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=RTOL[dtype] * np.abs(theirs).max())


def randomized(model):
    """A PyTorch model none of whose parameters and statistics is as it was initialized."""
    torch = load("torch")
    generator = torch.Generator().manual_seed(0)
    for name, values in model.state_dict().items():
        noise = torch.rand(values.shape, generator=generator)
        if name.endswith("running_var"):
            values.copy_(0.5 + noise)
        elif values.ndim == 1:  # scales, biases, means
            values.add_(noise - 0.5)
    return model


def predict(model, images):
    """Logits in NumPy, without a compiled function for each model."""
    return load("keras").ops.convert_to_numpy(model(images, training=False))
