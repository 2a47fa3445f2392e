"""Two steps of training inside other packages, against the same steps by hand.

By hand means: the logits' gradient comes from the reference, in float64, and goes down the slope.
"""

import copy
import io

import numpy as np
import pytest

from lmf_multi import class_margins
from lmf_multi.reference import lmf_loss_and_grad
from tests.frameworks import KERAS_BACKEND, load

RATE = 0.125  # which float32 holds: TensorFlow keeps Keras' rate as such
RTOL = 1e-10
COUNTS = (625, 16, 1)
MARGINS = class_margins(COUNTS)  # the published class weights too
RNG = np.random.default_rng(0)
INPUTS, LABELS = RNG.normal(0, 1, (8, 4)), np.array([0, 1, 2, 2, 0, 0, 1, 0])
BATCHES = [slice(0, 4), slice(4, 8)]
KERNEL, BIAS = RNG.normal(0, 1, (4, 3)), RNG.normal(0, 1, 3)


def by_hand(kernel=KERNEL, bias=BIAS, share=1.0, **options):
    """A linear classifier after one step for each batch, and each batch's loss before its step."""
    values = []
    for batch in BATCHES:
        x, y = INPUTS[batch], LABELS[batch]
        value, grad = lmf_loss_and_grad(x @ kernel + bias, y, MARGINS, MARGINS, **options)
        kernel = kernel - RATE * share * x.T @ grad
        bias = bias - RATE * share * grad.sum(0)
        values.append(value)
    return kernel, bias, values


def check(kernel, bias, values, share=1.0, **options):
    """Parameters and losses are those by hand, which differ from where they started."""
    expected = by_hand(share=share, **options)
    assert np.abs(expected[0] - KERNEL).max() > 0.01
    for actual, exact in zip((kernel, bias, values), expected, strict=True):
        np.testing.assert_allclose(actual, exact, rtol=RTOL)


def torch_step_by_hand(model, logits, y, **options):
    """One step of a PyTorch model down the reference's gradient for its logits."""
    torch = load("torch")
    _, grad = lmf_loss_and_grad(logits.detach().numpy(), y, MARGINS, MARGINS, **options)
    model.zero_grad()
    logits.backward(torch.tensor(grad))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= RATE * parameter.grad


# --- Lightning


@pytest.fixture
def classifier():
    """A LightningModule with the loss as submodule, and what it saw."""
    torch, lightning = load("torch"), load("lightning")
    losses = load("lmf_multi.torch")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 3, dtype=torch.float64)
            with torch.no_grad():
                self.linear.weight.copy_(torch.tensor(KERNEL.T))
                self.linear.bias.copy_(torch.tensor(BIAS))
            self.loss = losses.LMFLoss(COUNTS)
            self.values = []

        def training_step(self, batch, _):
            x, y = batch
            value = self.loss(self.linear(x), y)
            self.values.append(value.item())
            return value

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), RATE)

    return Classifier


# Lightning of PyTorch's pytree, and of data loaders on a machine with cores to spare
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_lightning(classifier, tmp_path):
    torch, lightning = load("torch"), load("lightning")
    model = classifier()
    data = torch.utils.data.TensorDataset(torch.tensor(INPUTS), torch.tensor(LABELS))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    check(model.linear.weight.detach().T, model.linear.bias.detach(), model.values)

    trainer.save_checkpoint(tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {"linear.weight", "linear.bias"}  # counts may change after training
    loaded = classifier.load_from_checkpoint(tmp_path / "model.ckpt")
    np.testing.assert_array_equal(loaded.linear.weight.detach(), model.linear.weight.detach())


# --- Hugging Face


@pytest.fixture
def classify_texts():
    """A two-token BERT of 20 numbers a layer, from its configuration: nothing is downloaded."""
    torch, transformers = load("torch"), load("transformers")
    load("accelerate")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=4,
        max_position_embeddings=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).double()


TOKENS = RNG.integers(0, 11, (8, 2))


def train_with_trainer(model, compute_loss, folder, trainer=None, **arguments):
    """A copy of the model after an epoch of plain gradient descent in batches of two."""
    transformers = load("transformers")
    model = copy.deepcopy(model)
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,  # no clipping
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    data = [{"input_ids": x, "labels": y} for x, y in zip(TOKENS, LABELS, strict=True)]
    trainer = (trainer or transformers.Trainer)(
        model=model, args=arguments, train_dataset=data, compute_loss_func=compute_loss
    )
    trainer.train()
    return parameters_of(model)


def train_by_hand(model, **options):
    """The same for whole batches of four."""
    model = copy.deepcopy(model)
    for batch in BATCHES:
        logits = model(input_ids=load("torch").tensor(TOKENS[batch])).logits
        torch_step_by_hand(model, logits, LABELS[batch], **options)
    return parameters_of(model)


def parameters_of(model):
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def test_trainer(classify_texts, tmp_path):
    loss = load("lmf_multi.torch").LMFLoss(COUNTS)

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return loss(outputs.logits, labels)

    trained = train_with_trainer(
        classify_texts, compute_loss, tmp_path, per_device_train_batch_size=4
    )
    expected = train_by_hand(classify_texts)
    assert np.abs(expected - parameters_of(classify_texts)).max() > 0.01
    np.testing.assert_allclose(trained, expected, rtol=RTOL, atol=RTOL)


ACCUMULATION = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def test_trainer_accumulates_the_batch_mean(classify_texts, tmp_path):
    """Exact with what the Trainer knows: the number of examples in the accumulated batch."""
    loss = load("lmf_multi.torch").LMFLoss(COUNTS, reduction="sum")

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return loss(outputs.logits, labels) / num_items_in_batch

    trained = train_with_trainer(classify_texts, compute_loss, tmp_path, **ACCUMULATION)
    expected = train_by_hand(classify_texts, reduction="batch_mean")
    np.testing.assert_allclose(trained, expected, rtol=RTOL, atol=RTOL)


def test_trainer_accumulates_the_published_mean(classify_texts, tmp_path):
    """Exact only with the class weight of the accumulated batch too, which a Trainer can count."""
    torch, transformers = load("torch"), load("transformers")
    loss = load("lmf_multi.torch").LMFLoss(COUNTS)

    class Trainer(transformers.Trainer):
        def get_batch_samples(self, *arguments):
            batches, _ = super().get_batch_samples(*arguments)
            totals = [torch.stack(loss.normalizers(batch["labels"])) for batch in batches]
            return batches, sum(totals)

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return loss(outputs.logits, labels, normalizers=tuple(num_items_in_batch))

    trained = train_with_trainer(classify_texts, compute_loss, tmp_path, Trainer, **ACCUMULATION)
    expected = train_by_hand(classify_texts)
    np.testing.assert_allclose(trained, expected, rtol=RTOL, atol=RTOL)


def test_trainer_does_not_see_that_means_are_averaged(classify_texts, tmp_path):
    """The mean of the parts' means is another number: what the two tests above avoid."""
    loss = load("lmf_multi.torch").LMFLoss(COUNTS)

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return loss(outputs.logits, labels) / ACCUMULATION["gradient_accumulation_steps"]

    trained = train_with_trainer(classify_texts, compute_loss, tmp_path, **ACCUMULATION)
    assert np.abs(trained - train_by_hand(classify_texts)).max() > 1e-3


# --- torch.export


FORMS = {"integer": {}, "smoothed": {"label_smoothing": 0.1}, "soft": {}}


@pytest.fixture(params=FORMS)
def exported(request):
    """A training graph with the loss in it, the module it came from, labels, exact gradients."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    y = np.eye(3)[LABELS] * 0.7 + 0.1 if request.param == "soft" else LABELS

    class Training(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 3, dtype=torch.float64)
            self.loss = losses.LMFLoss(COUNTS, **FORMS[request.param])

        def forward(self, x, y):
            return self.loss(self.linear(x), y)

    model, x, target = Training(), torch.tensor(INPUTS), torch.tensor(y)
    # what strict=True makes of any autograd.Function has no gradient
    program = torch.export.export(model, (x, target), strict=False)
    with torch.no_grad():  # the graph holds no numbers of the model it came from
        model.linear.weight.copy_(torch.tensor(KERNEL.T))
        model.linear.bias.copy_(torch.tensor(BIAS))
    value, grad = lmf_loss_and_grad(
        INPUTS @ KERNEL + BIAS, y, MARGINS, MARGINS, **FORMS[request.param]
    )
    return program, model, (x, target), (value, grad.T @ INPUTS, grad.sum(0))


def test_an_exported_graph_can_be_saved_and_trained(exported):
    program, model, inputs, (value, weight_grad, bias_grad) = exported
    torch, file = load("torch"), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    trained = torch.export.load(file).module()
    trained.load_state_dict(model.state_dict(), strict=False)
    loss = trained(*inputs)
    loss.backward()
    np.testing.assert_allclose(loss.item(), value, rtol=RTOL)
    np.testing.assert_allclose(trained.linear.weight.grad, weight_grad, rtol=RTOL)
    np.testing.assert_allclose(trained.linear.bias.grad, bias_grad, rtol=RTOL)


def test_an_exported_forward_backward_graph(exported):
    """One graph of loss and gradients, without autograd when it runs."""
    program, model, inputs, (value, weight_grad, bias_grad) = exported
    experimental = load("torch.export.experimental")
    joint = experimental._export_forward_backward(program)
    state, inputs = {**model.state_dict(), **program.constants}, iter(inputs)
    arguments = [
        next(inputs) if spec.target is None else state[spec.target].detach()
        for spec in joint.graph_signature.input_specs
    ]
    outputs = joint.graph_module(*arguments)
    assert not any(output.requires_grad for output in outputs)
    names = [spec.arg.name for spec in joint.graph_signature.output_specs]
    outputs = dict(zip(names, outputs, strict=True))
    backward = joint.graph_signature.backward_signature
    grads = {name: outputs[node] for node, name in backward.gradients_to_parameters.items()}
    np.testing.assert_allclose(outputs[backward.loss_output], value, rtol=RTOL)
    np.testing.assert_allclose(grads["linear.weight"], weight_grad, rtol=RTOL)
    np.testing.assert_allclose(grads["linear.bias"], bias_grad, rtol=RTOL)


# --- Keras


@pytest.fixture
def keras():
    """Keras in float64, which it applies to data and loss weights too."""
    if KERAS_BACKEND == "jax":
        pytest.skip("Keras on JAX has no float64 unless JAX_ENABLE_X64 is set")
    keras = load("keras")
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield keras
    keras.config.set_floatx(before)


def test_keras_model_with_two_losses(keras):
    """0.7 LMF of one head and 0.3 focal of the other: the shared layer gets both gradients."""
    losses, weights = load("lmf_multi.keras"), {"grade": 0.7, "lesion": 0.3}
    inputs = keras.Input((4,))
    logits = keras.layers.Dense(3, name="shared")(inputs)
    heads = {name: keras.layers.Identity(name=name)(logits) for name in weights}
    model = keras.Model(inputs, heads)
    model.get_layer("shared").set_weights([KERNEL, BIAS])
    model.compile(
        optimizer=keras.optimizers.SGD(RATE),
        loss={"grade": losses.LMFLoss(COUNTS), "lesion": losses.FocalLoss(gamma=2.0)},
        loss_weights=weights,
    )
    lesions = LABELS[::-1].copy()
    kernel, bias = KERNEL, BIAS
    for batch in BATCHES:
        x, grade, lesion = INPUTS[batch], LABELS[batch], lesions[batch]
        model.reset_metrics()
        shown = model.train_on_batch(x, {"grade": grade, "lesion": lesion}, return_dict=True)
        z = x @ kernel + bias
        lmf, lmf_grad = lmf_loss_and_grad(z, grade, MARGINS, MARGINS)
        focal, focal_grad = lmf_loss_and_grad(z, lesion, MARGINS, alpha=0.0, gamma=2.0)
        values = {"loss": 0.7 * lmf + 0.3 * focal, "grade_loss": lmf, "lesion_loss": focal}
        for name, value in values.items():
            np.testing.assert_allclose(shown[name], value, rtol=RTOL, err_msg=name)
        grad = 0.7 * lmf_grad + 0.3 * focal_grad
        kernel, bias = kernel - RATE * x.T @ grad, bias - RATE * grad.sum(0)
    for actual, exact in zip(model.get_layer("shared").get_weights(), (kernel, bias), strict=True):
        np.testing.assert_allclose(actual, exact, rtol=RTOL)


# --- Flax and optax


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_optax_with_nnx_value_and_grad(compiled):
    jax, optax = load("jax"), load("optax")
    nnx, losses = load("flax.nnx"), load("lmf_multi.jax")

    def train_step(model, optimizer, loss, x, y):
        value, grads = nnx.value_and_grad(lambda model: loss(model(x), y))(model)
        optimizer.update(model, grads)
        return value

    with jax.enable_x64(True):
        f64 = {"dtype": "float64", "param_dtype": "float64"}
        model = nnx.Linear(4, 3, rngs=nnx.Rngs(0), **f64)
        nnx.update(model, {"kernel": jax.numpy.asarray(KERNEL), "bias": jax.numpy.asarray(BIAS)})
        optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)
        step, loss = nnx.jit(train_step) if compiled else train_step, losses.LMFLoss(COUNTS)
        values = [step(model, optimizer, loss, INPUTS[batch], LABELS[batch]) for batch in BATCHES]
        check(model.kernel[...], model.bias[...], values)


# --- TensorFlow


@pytest.mark.parametrize("mode", ["eager", "function", "xla"])
def test_gradient_tape(mode):
    tf = load("tensorflow")
    if KERAS_BACKEND != "tensorflow":
        pytest.skip("lmf_multi.keras computes on the backend of Keras")
    loss = load("lmf_multi.keras").LMFLoss(COUNTS, dtype="float64")
    kernel, bias = tf.Variable(KERNEL), tf.Variable(BIAS)

    def train_step(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, x @ kernel + bias)
        kernel_grad, bias_grad = tape.gradient(value, (kernel, bias))
        kernel.assign_sub(RATE * kernel_grad)
        bias.assign_sub(RATE * bias_grad)
        return value

    if mode != "eager":
        train_step = tf.function(train_step, jit_compile=mode == "xla")
    values = [train_step(INPUTS[batch], LABELS[batch]).numpy() for batch in BATCHES]
    check(kernel.numpy(), bias.numpy(), values)
