"""Tensors of other packages that add to their numbers: MONAI's images and torchvision's masks."""

import numpy as np
import pytest

from tests.frameworks import load

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (2, 3, 4, 5)).astype(np.float32)
LABELS, ELEMENTS = RNG.integers(0, 3, (2, 4, 5)), RNG.integers(0, 2, LOGITS.shape)
LABELS[0, 0] = -100


@pytest.fixture
def torch():
    load("torch._dynamo")  # before what imports TensorFlow
    return load("torch")


@pytest.fixture(params=["MetaTensor", "Mask"])
def dress(request, torch):
    if request.param == "Mask":
        return load("torchvision.tv_tensors").Mask
    return load("monai.data").MetaTensor


# of Dynamo's own look at logits that a model has computed
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("run", ["eager", "compiled", "whole"])
@pytest.mark.parametrize("which", ["labels", "logits", "both"])
@pytest.mark.parametrize("form", ["integer", "smoothed", "sigmoid"])
def test_they_count_as_their_numbers(torch, dress, form, which, run):
    losses = load("lmf_multi.torch")
    smoothing = 0.1 if form == "smoothed" else 0.0
    loss, y = losses.LMFLoss([625, 16, 1], label_smoothing=smoothing), torch.tensor(LABELS)
    if form == "sigmoid":
        loss, y = losses.SigmoidLMFLoss((9, 5, 3), (16, 5, 2)), torch.tensor(ELEMENTS)
    leaf = torch.tensor(LOGITS, requires_grad=True)
    expected = loss(leaf, y)
    (gradient,) = torch.autograd.grad(expected, leaf)
    z = leaf if which == "labels" else dress(leaf * 1)
    y = y if which == "logits" else dress(y)
    call = loss
    if run != "eager":
        torch._dynamo.reset()
        call = torch.compile(loss, backend="aot_eager", fullgraph=run == "whole")
    value = call(z, y).as_subclass(torch.Tensor)
    (grad,) = torch.autograd.grad(value, leaf)
    np.testing.assert_allclose(value.item(), expected.item(), rtol=1e-5)
    np.testing.assert_allclose(grad.numpy(), gradient.numpy(), rtol=1e-4, atol=1e-9)


def test_their_labels_out_of_range_are_refused(torch, dress):
    loss = load("lmf_multi.torch").LMFLoss([625, 16, 1])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 5"):
        loss(torch.tensor(LOGITS), dress(torch.tensor(np.where(LABELS == 1, 5, 0))))
