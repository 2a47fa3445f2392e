"""What only PyTorch has: modules, devices, defaults, tracing without data, learned targets."""

import copy
import dataclasses
import io
import pickle
import weakref

import numpy as np
import pytest

from lmf_multi import class_margins, reference
from tests.adapters import ADAPTERS, TorchOperator
from tests.adapters import Torch as TorchAdapter
from tests.cases import Case, Result, SigmoidCase, rounded
from tests.checks import refuses
from tests.frameworks import load
from tests.hard import hard_examples

COUNTS, WEIGHTS = (625, 16, 1), np.array([0.5, 1.0, 3.0])
MARGINS = np.array([0.1, 0.25, 0.5])
RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.normal(0, 2, (6, 3)), np.array([0, 1, 2, 2, 1, 0])
SOFT = RNG.dirichlet([1] * 3, 6)
INTEGERS = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
FORMS = {
    "integer": {},
    "smoothed": {"label_smoothing": 0.1},
    "soft": {},
}


@pytest.fixture(scope="module")
def losses(torch):
    return load("lmf_multi.torch")


@pytest.fixture
def labels(torch):
    return torch.tensor(LABELS)


# --- the module


def test_buffers_stay_out_of_checkpoints(torch, losses):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), losses.LMFLoss(COUNTS))
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    assert not list(losses.LMFLoss(COUNTS).parameters())
    model.load_state_dict(torch.nn.Sequential(torch.nn.Linear(2, 3)).state_dict())


def test_vectors_follow_the_logits(torch, losses, labels):
    """To a device that the module was never moved to, and back; meta has no numbers to keep."""
    loss = losses.LMFLoss(COUNTS, logit_adjustment=1.0)
    assert not list(loss.buffers())
    expected = loss(torch.tensor(LOGITS), labels)
    assert torch.nn.Sequential(loss).to("meta")[0](torch.tensor(LOGITS), labels) == expected
    assert loss(torch.tensor(LOGITS, device="meta"), labels.to("meta")).device.type == "meta"
    assert loss(torch.tensor(LOGITS), labels) == expected
    assert losses.LDAMLoss(COUNTS).class_weight is None
    assert losses.FocalLoss().margins is None


def overwrite_buffers(torch, module):
    """As FSDP1's buffer_dtype does, or a loader that knows only what checkpoints hold."""
    for buffer in module.buffers():
        buffer.data = torch.full_like(buffer, 7).bfloat16()
    return module


LOADERS = {
    "meta, then empty": lambda torch, build: in_meta(torch, build).to_empty(device="cpu"),
    "meta, then loaded": lambda torch, build: in_meta(torch, build),
    "buffers overwritten": lambda torch, build: overwrite_buffers(torch, build()),
    "to the meta device": lambda torch, build: build().to("meta").to_empty(device="cpu"),
    "loaded to meta": lambda torch, build: saved_and_loaded(torch, build(), "meta"),
    "half": lambda torch, build: build().half(),
    "inference": lambda torch, build: in_inference(torch, build),
}


def in_meta(torch, build):
    with torch.device("meta"):
        return build()


def in_inference(torch, build):
    with torch.inference_mode():
        return build().to("meta").to("cpu")


def saved_and_loaded(torch, module, device):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, map_location=device, weights_only=False)


@pytest.mark.parametrize("how", LOADERS)
def test_loaders_cannot_change_the_numbers(torch, losses, labels, how):
    """Margins and weights follow from the counts, whatever is done to modules."""
    sigmoid = {"positive_counts": [5, 1, 2], "negative_counts": [1, 2, 3]}
    for build, y in (
        (lambda: losses.LMFLoss(COUNTS), labels),
        (lambda: losses.FocalLoss(COUNTS, class_weight="balanced"), labels),
        (lambda: losses.SigmoidLMFLoss(**sigmoid), torch.eye(3)[labels]),
    ):
        z = torch.tensor(LOGITS, requires_grad=True)
        results = []
        for loss in (build(), LOADERS[how](torch, build)):
            for weight in ("complement", "effective"):
                value = loss(z, y)
                results.append((value.item(), torch.autograd.grad(value, z)[0].numpy()))
                loss.set_class_weight(weight)
        for (value, grad), (expected, of_logits) in zip(results[2:], results[:2], strict=True):
            np.testing.assert_array_equal(value, expected)
            np.testing.assert_array_equal(grad, of_logits)


@pytest.mark.parametrize("name", ["LMFLoss", "LDAMLoss", "FocalLoss"])
def test_what_was_pickled_before_adjustments_lives_on(torch, losses, labels, name):
    """Its weights can be replaced, though it knows nothing of an adjustment."""
    options = {"class_weight": "balanced"}
    loss, expected = (getattr(losses, name)(COUNTS, **options) for _ in range(2))
    del loss._exact["logit_adjustment"], loss._config["logit_adjustment"]
    loss = pickle.loads(pickle.dumps(loss))
    for each in (loss, expected):
        each.set_class_weight("effective")
    z = torch.tensor(LOGITS)
    assert loss(z, labels) == expected(z, labels)


def test_vectors_are_not_assigned(torch, losses):
    """What is assigned would be lost when the module moves."""
    loss = losses.LMFLoss(COUNTS)
    with refuses(AttributeError, "class_weight must not be assigned; call set_class_weight"):
        loss.class_weight = torch.ones(3)
    sentence = "margins follow from the class counts; build a new loss for others"
    with refuses(AttributeError, sentence):
        loss.margins = torch.ones(3)
    sentence = "logit_adjustment follows from the class counts; build a new loss for another"
    with refuses(AttributeError, sentence):
        loss.logit_adjustment = torch.ones(3)


def test_counts_without_numbers_are_refused(torch, losses):
    sentence = "a tensor on the meta device holds no numbers, got shape (3,); pass a list"
    with refuses(ValueError, sentence):
        losses.LMFLoss(torch.tensor(COUNTS, device="meta"))


DEFAULTS = {
    "bfloat16": lambda torch: torch.set_default_dtype(torch.bfloat16),
    "float64": lambda torch: torch.set_default_dtype(torch.float64),
    "meta": lambda torch: torch.set_default_device("meta"),
}


DTYPES = {"eager": ["float64", "float32", "bfloat16"], "vmap": ["float32"], "operator": ["float32"]}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        (mode, dtype)
        for mode, dtypes in ({**DTYPES, "compile": ["float32"]}).items()
        for dtype in dtypes
    ],
)
def test_defaults_change_no_number(torch, losses, default, mode, dtype):
    """Neither dtype nor device of what a user makes without saying which."""
    adapter = {a.name: a for a in ADAPTERS}[f"torch-{mode}"]
    z = rounded(LOGITS, dtype)
    base = Case(z, LABELS, COUNTS, WEIGHTS, dtype=dtype)
    soft = dataclasses.replace(base, labels=rounded(SOFT, dtype), label_dtype=dtype)
    sigmoid = SigmoidCase(z, np.eye(3)[LABELS], (5, 2), dtype=dtype, label_smoothing=0.1)
    cases = [base, dataclasses.replace(base, where=np.arange(6) != 2), sigmoid]
    if mode == "eager":
        cases += [soft, *(dataclasses.replace(case, label_smoothing=0.1) for case in (base, soft))]
    cases = [
        dataclasses.replace(case, reduction=reduction, as_class=True)
        for case in cases
        for reduction in (("none", "mean") if mode == "eager" else ("none",))
    ]
    taken = [case for case in cases if adapter.takes(case)]
    assert taken
    torch._dynamo.reset()
    try:
        DEFAULTS[default](torch)
        for case in taken:
            case.check(adapter(case))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_casting_the_module_keeps_its_precision(torch, losses, labels):
    expected = reference.LMFLoss(COUNTS)(LOGITS, LABELS)
    for cast in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.float):
        loss = cast(losses.LMFLoss(COUNTS))
        value = loss(torch.tensor(LOGITS), labels)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


def test_copies_and_pickles(torch, losses, labels):
    loss = losses.LMFLoss(COUNTS, gamma=0.5)
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    z = torch.tensor(LOGITS)
    for twin in (copy.deepcopy(loss), torch.load(file, weights_only=False)):
        assert twin(z, labels) == loss(z, labels)
    assert "gamma=0.5" in repr(loss)


# --- labels


@pytest.mark.parametrize("dtype", INTEGERS)
def test_pixels_with_another_ignore_index(torch, losses, dtype):
    y = np.array([[[0, 1], [2, 7]]])
    z = RNG.normal(0, 1, (1, 3, 2, 2))
    loss = losses.LMFLoss(COUNTS, ignore_index=7)
    value = loss(torch.tensor(z), torch.tensor(y).to(getattr(torch, dtype)))
    expected = reference.LMFLoss(COUNTS, axis=1)(z, y, where=y != 7)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


def test_the_default_ignore_index_is_no_unsigned_label(torch, losses):
    """-100 as uint8 is 156."""
    y = torch.tensor([156, 3], dtype=torch.uint8)
    z, margins = RNG.normal(0, 1, (2, 200)), np.full(200, 0.5)
    with_7 = torch.cat([y, torch.tensor([7], dtype=torch.uint8)])
    for labels, options in ((y, {}), (y, {"label_smoothing": 0.1}), (with_7, {"ignore_index": 7})):
        logits = np.concatenate([z, z])[: len(labels)]
        value = losses.lmf_loss(torch.tensor(logits), labels, margins, **options)
        options["where"] = labels.numpy() != options.pop("ignore_index", -100)
        expected = reference.lmf_loss(logits, labels.numpy(), margins, **options)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="got 156"):
        losses.sigmoid_lmf_loss(torch.zeros(2), y, [0.1, 0.5])


@pytest.mark.parametrize("kernel", ["1", "0"])
@pytest.mark.parametrize("mode", ["eager", "vmap"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_dtype(monkeypatch, dtype, mode, kernel):
    """In every form of the loss, with the kernel and without."""
    monkeypatch.setenv("LMF_MULTI_CPU_KERNEL", kernel)
    case = Case(LOGITS, LABELS, COUNTS, WEIGHTS, label_dtype=dtype)
    pairs = SigmoidCase(LOGITS, np.eye(3, dtype=int)[LABELS], (16, 3), label_dtype=dtype)
    for each in (case, pairs):
        for smoothing in (0.0, 0.1):
            for precision in ("float32", "float64"):
                logits = rounded(LOGITS, precision)
                one = dataclasses.replace(
                    each, logits=logits, label_smoothing=smoothing, dtype=precision
                )
                one.check(TorchAdapter(mode)(one))


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_unsigned_labels_in_compiled_code(dtype):
    options = {"dtype": "float32", "label_dtype": dtype}
    case = Case(rounded(LOGITS, "float32"), LABELS, COUNTS, WEIGHTS, **options)
    case.check(TorchOperator("operator")(case))
    smoothed = dataclasses.replace(case, label_smoothing=0.1)
    smoothed.check(TorchAdapter("compile")(smoothed))
    pairs = SigmoidCase(case.logits, np.eye(3, dtype=int)[LABELS], (16, 3), **options)
    pairs.check(TorchAdapter("compile")(pairs))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_labels_beyond_int64(torch, losses, dtype, smoothing):
    """2^64 - 100 is no -100, which would be ignored, in any form."""
    z, y = torch.tensor(LOGITS).to(getattr(torch, dtype)), [0, 1, 2, 2, 1, 2**64 - 100]
    y, options = torch.tensor(y, dtype=torch.uint64), {"label_smoothing": smoothing}
    loss = losses.LMFLoss(COUNTS, **options)
    remedy = "mask examples without a class with ignore_index=-100"
    with refuses(ValueError, f"labels must be in [0, 3), got {2**64 - 100}; {remedy}"):
        loss(z, y)
    for run in (torch.func.vmap(loss), torch.compile(loss, backend="eager", fullgraph=True)):
        value = run(z, y)
        expected = np.arange(6) == 5 if value.dim() else True
        np.testing.assert_array_equal(value.isnan().numpy(), expected)
    with pytest.raises(ValueError, match=f"got {2**64 - 100}"):
        loss.normalizers(y)
    pairs = losses.SigmoidLMFLoss(3, 9, **options)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\], got 1.84467e\+19"):
        pairs(z[:, 0], y)


# --- tensor subclasses


@pytest.fixture
def dressed(torch):
    """A class that adds to its numbers, and what each operation on it appends to."""

    class Dressed(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.operations.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    Dressed.operations = []
    return Dressed


# of Dynamo's own look at logits that a model has computed
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("form", ["integer", "smoothed", "soft", "sigmoid"])
@pytest.mark.parametrize("which", ["labels", "logits", "both"])
def test_subclasses_count_as_their_numbers(torch, losses, labels, dressed, form, which):
    """Eagerly, compiled and mapped: without a word of theirs in the operations."""
    y = torch.tensor(SOFT) if form == "soft" else labels
    loss = losses.LMFLoss(COUNTS, **FORMS.get(form, {}))
    if form == "sigmoid":
        loss, y = losses.SigmoidLMFLoss(3, 9), torch.tensor(np.eye(3, dtype=int)[LABELS])
    z = torch.tensor(LOGITS, requires_grad=True)
    expected = loss(z, y)
    (gradient,) = torch.autograd.grad(expected, z)
    y = y if which == "logits" else y.as_subclass(dressed)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for run in (loss, compiled, torch.compile(loss, backend="aot_eager")):
        x = z if which == "labels" else z.as_subclass(dressed)
        dressed.operations.clear()
        value = run(x, y)
        if run is loss:
            assert type(value) is torch.Tensor and not dressed.operations
        (grad,) = torch.autograd.grad(value.as_subclass(torch.Tensor), z)
        np.testing.assert_allclose(value.detach().numpy(), expected.detach().numpy(), rtol=1e-12)
        np.testing.assert_allclose(grad.numpy(), gradient.numpy(), rtol=1e-10, atol=1e-14)
    x = z.detach() if which == "labels" else z.detach().as_subclass(dressed)
    each = torch.func.vmap(loss)(x, y).as_subclass(torch.Tensor)
    plain = torch.func.vmap(loss)(z.detach(), y.as_subclass(torch.Tensor))
    np.testing.assert_allclose(each.numpy(), plain.numpy(), rtol=1e-12)


def test_subclasses_are_looked_at(torch, losses, labels, dressed):
    """Labels out of range, masks, vectors and totals of a larger batch."""
    z, mask = torch.tensor(LOGITS), torch.tensor(LABELS == 1)
    remedy = "mask examples without a class with ignore_index=-100, or pass ignore_index=5"
    with refuses(ValueError, f"labels must be in [0, 3), got 5; {remedy}"):
        losses.LMFLoss(COUNTS)(z, torch.full((6,), 5).as_subclass(dressed))
    margins, weights = (torch.tensor(v) for v in (MARGINS, WEIGHTS))
    vectors = [v.as_subclass(dressed) for v in (margins, weights)]
    pair = losses.SigmoidLMFLoss(3, 9)
    dressed.operations.clear()
    value = losses.lmf_loss(z, labels, *vectors)
    assert value == losses.lmf_loss(z, labels, margins, weights)
    masked = pair(z[:, 0], labels // 2, where=mask.as_subclass(dressed))
    assert masked == pair(z[:, 0], labels // 2, where=mask)
    totals = pair.normalizers((labels // 2).as_subclass(dressed), where=mask.as_subclass(dressed))
    assert totals == pair.normalizers(labels // 2, where=mask)
    assert not dressed.operations


# --- sums


def test_compiled_sums_of_many(torch):
    """Thousands of additions to one float32 would round to the same side."""
    total = load("lmf_multi.torch._tensors").total
    run = torch.compile(total, fullgraph=True)
    for size, number in ((120_000, 0.3), (2**24 + 3, 1.0)):
        x = torch.full((size,), number)
        exact = x.double().sum().item()
        np.testing.assert_allclose([total(x).item(), run(x).item()], exact, rtol=1e-7)


def test_compiled_means_of_many(torch, losses):
    x, t = torch.randn(30_000, 4), torch.randint(0, 2, (30_000, 4))
    loss = losses.SigmoidLMFLoss((10, 20, 30, 3), (50, 60, 50, 80))
    expected = loss(x.double(), t)
    value = torch.compile(loss, fullgraph=True)(x, t)
    np.testing.assert_allclose(value.item(), expected.item(), rtol=1e-6)


def test_a_negative_ignore_index_masks_only_itself(torch, losses):
    z, y = torch.tensor(LOGITS), torch.tensor([0, 1, -1, 2, 1, 0])
    sentence = "labels must be in [0, 3), got -1; mask examples without a class with "
    with refuses(ValueError, sentence + "ignore_index=-100, or pass ignore_index=-1"):
        losses.lmf_loss(z, y, MARGINS)
    value = losses.lmf_loss(z, y, MARGINS, ignore_index=-1)
    expected = reference.lmf_loss(LOGITS, y.numpy(), MARGINS, where=y.numpy() != -1)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("value", [None, 255.0, True], ids=repr)
def test_ignore_index_is_a_whole_number(torch, losses, labels, value):
    """As in ``cross_entropy``, whose sentence this is not."""
    z, t = torch.tensor(LOGITS), torch.tensor(np.eye(3, dtype=int)[LABELS])
    with pytest.raises(TypeError):
        torch.nn.functional.cross_entropy(z, labels, ignore_index=value)
    sentence = (
        f"ignore_index must be a whole number, got {value!r}; "
        "pass a label that does not occur, as -100, to ignore no label"
    )
    loss = losses.LMFLoss(COUNTS)
    loss.ignore_index = value
    for call in (
        lambda: losses.lmf_loss(z, labels, MARGINS, ignore_index=value),
        lambda: losses.ldam_loss(z, labels, MARGINS, ignore_index=value),
        lambda: losses.focal_loss(z, labels, ignore_index=value),
        lambda: losses.sigmoid_lmf_loss(z, t, MARGINS[:2], ignore_index=value),
        lambda: losses.LMFLoss(COUNTS, ignore_index=value),
        lambda: losses.SigmoidLMFLoss(3, 9, ignore_index=value),
        lambda: loss(z, labels),
        lambda: loss.normalizers(labels),
    ):
        with refuses(TypeError, sentence):
            call()
    value = losses.LMFLoss(COUNTS, ignore_index=np.int64(2))(z.float(), labels)
    expected = losses.LMFLoss(COUNTS, ignore_index=2)(z.float(), labels)
    np.testing.assert_array_equal(value.numpy(), expected.numpy())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_distributions_ignore_no_label(torch, losses, compiled):
    """As in ``cross_entropy``: a label that is not negative was meant to be one."""
    z, q = torch.tensor(LOGITS), torch.tensor(SOFT)
    with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point"):
        torch.nn.functional.cross_entropy(z, q, ignore_index=255)
    sentence = (
        "ignore_index needs integer labels, got distributions and ignore_index=255; "
        "leave such examples out of the batch"
    )
    loss = losses.LMFLoss(COUNTS, ignore_index=255)
    with refuses(ValueError, sentence):
        loss.normalizers(q)
    if compiled:
        with pytest.raises(Exception, match="ignore_index needs integer labels"):
            torch.compile(loss, backend="eager")(z, q)
    with refuses(ValueError, sentence):
        loss(z, q)
    expected = reference.LMFLoss(COUNTS)(LOGITS, SOFT)
    value = losses.LMFLoss(COUNTS, ignore_index=-1)(z, q)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


def test_learned_distributions_get_their_gradient(torch, losses):
    q, z = torch.tensor(SOFT, requires_grad=True), torch.tensor(LOGITS, requires_grad=True)
    losses.lmf_loss(z, q, MARGINS, WEIGHTS, reduction="sum").backward()
    each = [
        reference.lmf_loss(LOGITS, np.full(6, j), MARGINS, WEIGHTS, reduction="none")
        for j in range(3)
    ]
    np.testing.assert_allclose(q.grad.numpy(), np.stack(each, 1), rtol=1e-12)
    _, grad = reference.lmf_loss_and_grad(LOGITS, SOFT, MARGINS, WEIGHTS, reduction="sum")
    np.testing.assert_allclose(z.grad.numpy(), grad, rtol=1e-12, atol=1e-12)


def test_learned_margins_are_refused(torch, losses, labels):
    margins = torch.tensor(MARGINS, requires_grad=True)
    sentence = "{} must be constant, got a tensor that requires grad; detach it"
    with refuses(ValueError, sentence.format("margins")):
        losses.lmf_loss(torch.tensor(LOGITS), labels, margins)
    with refuses(ValueError, sentence.format("class_weight")):
        losses.focal_loss(torch.tensor(LOGITS), labels, margins)


# --- eager: the kernel, and the operations of what it does not take


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["classes last", "classes first"])
def test_operations_of_hard_examples(torch, monkeypatch, dtype, layout):
    """Masked ones with NaN among them."""
    monkeypatch.setenv("LMF_MULTI_CPU_KERNEL", "0")
    logits, labels = hard_examples(3)
    logits, where = rounded(logits, dtype), np.arange(len(labels)) % 5 > 0
    logits[~where] = np.nan
    weights = np.array([0.5, 1.0, 3.0])
    case = Case(logits, labels, COUNTS, weights, where=where, dtype=dtype, reduction="mean")
    if layout == "classes first":  # (1, C, rows)
        case = dataclasses.replace(
            case, logits=logits[None], labels=labels[None], where=where[None], axis=1
        )
    case.check(TorchAdapter("eager")(case))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_small_label_dtypes_count_many_rows(torch, losses, dtype):
    z, y = RNG.normal(0, 2, (700, 3)), RNG.integers(0, 3, 700)
    value = losses.LMFLoss(COUNTS)(torch.tensor(z), torch.tensor(y).to(getattr(torch, dtype)))
    np.testing.assert_allclose(value.numpy(), reference.LMFLoss(COUNTS)(z, y), rtol=1e-12)


def test_the_gradient_is_kept_for_a_second_backward_pass(torch, losses, labels):
    z = torch.tensor(LOGITS, requires_grad=True)
    loss = losses.LMFLoss(COUNTS)(z, labels)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (tripled,) = torch.autograd.grad(3 * loss, z, retain_graph=True)
    (last,) = torch.autograd.grad(loss, z)
    np.testing.assert_allclose(tripled.numpy(), 3 * first.numpy(), rtol=1e-15)
    np.testing.assert_array_equal(last.numpy(), first.numpy())


@pytest.mark.parametrize("kernel", ["1", "0"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_strong_focusing_of_hopeless_examples(torch, losses, monkeypatch, dtype, kernel):
    """γ multiplies what softplus(n) misses n by, which is nothing for large n."""
    monkeypatch.setenv("LMF_MULTI_CPU_KERNEL", kernel)
    odds = rounded(np.linspace(10, 90, 2000), dtype)
    logits, labels = np.stack([-odds, np.zeros(2000), np.zeros(2000)], 1), np.zeros(2000, int)
    case = Case(logits, labels, COUNTS, term="focal", gamma=8.0, dtype=dtype)
    case.check(TorchAdapter("eager")(case))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_loss_can_be_scaled_in_place(torch, losses, labels, dtype, reduction):
    """As trainers do, Hugging Face's among them."""
    z = torch.tensor(LOGITS, dtype=getattr(torch, dtype), requires_grad=True)
    criterion = losses.LMFLoss(COUNTS, reduction=reduction)
    (expected,) = torch.autograd.grad(criterion(z, labels).sum(), z)
    loss = criterion(z, labels)
    loss *= 2
    (grad,) = torch.autograd.grad(loss.sum(), z)
    np.testing.assert_allclose(grad.numpy(), 2 * expected.numpy(), rtol=1e-14)


def test_evaluation_computes_no_gradient(torch, losses, labels, monkeypatch):
    """Where the kernel computes: it is given no array to write one to."""
    given, make = [], torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: given.append(1) or make(*a, **k))
    loss, z = losses.LMFLoss(COUNTS), torch.tensor(LOGITS, dtype=torch.float32)
    value = loss(z, labels)
    with torch.no_grad():
        loss(z.clone().requires_grad_(), labels)
    assert not given
    assert value.item() == loss(z.clone().requires_grad_(), labels).item()
    assert len(given) == 1


# --- what dtypes and devices the operations need


class Dtypes:
    """The dtypes of every operation's results, with their number of elements."""

    def __init__(self, torch):
        from torch.utils._python_dispatch import TorchDispatchMode

        self.seen = seen = set()

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
                result = operation(*args, **(kwargs or {}))
                for x in torch.utils._pytree.tree_leaves(result):
                    if isinstance(x, torch.Tensor):
                        seen.add((x.dtype, x.numel()))
                return result

        self.mode = Watch()


@pytest.mark.parametrize("form", ["integer", "ignored", "smoothed", "soft", "sigmoid", "multi"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_float32_logits_need_no_float64(torch, losses, monkeypatch, form, compiled, dtype):
    """As devices have none: no array of the size of logits or examples, in either pass."""
    monkeypatch.setenv("LMF_MULTI_CPU_KERNEL", "0")
    N, C = 50, 7
    z = torch.tensor(RNG.normal(0, 3, (N, C)), dtype=getattr(torch, dtype), requires_grad=True)
    y = torch.tensor(RNG.integers(0, C, N))
    loss = losses.LMFLoss(range(1, C + 1), label_smoothing=0.1 if form == "smoothed" else 0.0)
    if form == "ignored":
        y[::5] = -100
    elif form == "soft":
        y = torch.tensor(RNG.dirichlet(np.ones(C), N), dtype=torch.float32)
    elif form in ("sigmoid", "multi"):
        loss = losses.SigmoidLMFLoss(range(1, C + 1), range(9, C + 9))
        y = torch.tensor(RNG.integers(0, 2, (N, C)))
        y = y.float() if form == "multi" else y
    run, watch = torch.compile(loss, backend="aot_eager") if compiled else loss, Dtypes(torch)
    run(z, y)  # what is compiled once is no matter of a step
    with watch.mode:
        torch.autograd.grad(run(z, y), z)
    sizes = {n for dtype, n in watch.seen if dtype == torch.float32}
    assert N * C in sizes and (form in ("sigmoid", "multi") or N in sizes)
    assert all(n <= 2 * C for dtype, n in watch.seen if dtype == torch.float64)


# --- no look at the data


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_shapes_are_enough(torch, losses, form, reduction):
    """On the meta device there are no numbers to wait for, forwards or backwards."""
    z = torch.empty(4, 3, 5, device="meta", requires_grad=True)
    y = torch.empty(4, 5, dtype=torch.int64, device="meta")
    y = torch.empty(4, 3, 5, device="meta") if form == "soft" else y
    loss = losses.LMFLoss(COUNTS, **FORMS[form], reduction=reduction).to("meta")
    value = loss(z, y)
    assert value.shape == ((4, 5) if reduction == "none" else ())
    assert value.device.type == "meta"
    value.sum().backward()
    assert z.grad.shape == z.shape


@pytest.mark.parametrize("form", FORMS)
def test_fake_tensors_are_enough(torch, losses, form):
    """Data-dependent control flow raises under FakeTensorMode; on the CPU's own device too."""
    fake = load("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode():
        z = torch.empty(4, 3, requires_grad=True)
        y = torch.empty(4, 3) if form == "soft" else torch.empty(4, dtype=torch.int64)
        with pytest.raises(fake.DataDependentOutputException):
            y.sum().item()  # the check can fail
        value = losses.lmf_loss(z, y, torch.empty(3), torch.empty(3), **FORMS[form])
        value.backward()
        assert z.grad.shape == (4, 3)


def test_export(torch, losses, labels):
    z = torch.tensor(LOGITS, dtype=torch.float32)
    program = torch.export.export(losses.LMFLoss(COUNTS), (z, labels)).module()
    expected = reference.LMFLoss(COUNTS)(LOGITS.astype(np.float32), LABELS)
    np.testing.assert_allclose(program(z, labels).detach().numpy(), expected, rtol=1e-5)


# --- precision and modes of autograd


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast(torch, losses, labels, dtype):
    """The loss is float32 whatever autocast made of the logits, and exact for those."""
    layer = torch.nn.Linear(3, 3)
    x = torch.tensor(20 * LOGITS, dtype=torch.float32)
    loss = losses.LMFLoss(COUNTS)
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):
        z = layer(x)
        z.retain_grad()
        value = loss(z, labels)
    assert z.dtype == getattr(torch, dtype)
    assert value.dtype == torch.float32
    value.backward()
    exact = z.detach().double().numpy()
    np.testing.assert_allclose(value.item(), reference.LMFLoss(COUNTS)(exact, LABELS), rtol=1e-5)
    assert z.grad.dtype == z.dtype
    assert torch.isfinite(layer.weight.grad).all()


def test_without_gradients(torch, losses, labels):
    z = torch.tensor(LOGITS, requires_grad=True)
    expected = losses.lmf_loss(z, labels, MARGINS).item()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            value = losses.lmf_loss(z, labels, MARGINS)
        assert not value.requires_grad
        assert value.item() == expected
    assert losses.lmf_loss(z.detach(), labels, MARGINS).item() == expected


# PyTorch's own, when it loads its rules for forward mode
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("form", FORMS)
def test_forward_mode(torch, losses, labels, form):
    y = torch.tensor(SOFT) if form == "soft" else labels
    direction = RNG.normal(0, 1, (6, 3))

    def f(z):
        return losses.lmf_loss(z, y, MARGINS, WEIGHTS, **FORMS[form])

    value, slope = torch.func.jvp(f, (torch.tensor(LOGITS),), (torch.tensor(direction),))
    expected, grad = reference.lmf_loss_and_grad(LOGITS, y.numpy(), MARGINS, WEIGHTS, **FORMS[form])
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(slope.numpy(), (grad * direction).sum(), rtol=1e-11)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("of", ["logits", "labels"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dual_tensors(torch, losses, labels, reduction, of):
    """Forward mode without ``torch.func``; what ``mean`` divides by has a tangent too."""
    from torch.autograd import forward_ad

    v, of_labels = RNG.normal(0, 1, (6, 3)), of == "labels"

    def f(x):
        z, y = (torch.tensor(LOGITS), x) if of_labels else (x, labels)
        return losses.lmf_loss(z, y, MARGINS, WEIGHTS, reduction=reduction)

    x = torch.tensor(SOFT if of_labels else LOGITS)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.tensor(v)))).tangent
    if of_labels:
        options = {"reduction": reduction}
        up, down = (
            reference.lmf_loss(LOGITS, SOFT + step * v, MARGINS, WEIGHTS, **options)
            for step in (1e-5, -1e-5)
        )
        np.testing.assert_allclose(slope.numpy(), (up - down) / 2e-5, rtol=1e-7)
        return
    _, grad = reference.lmf_loss_and_grad(LOGITS, LABELS, MARGINS, WEIGHTS, reduction=reduction)
    each = (grad * v).sum(1)
    np.testing.assert_allclose(
        slope.numpy(), each if reduction == "none" else each.sum(), rtol=1e-11
    )


CALLS = {
    "kernel": ("float32", {}),
    "integer": ("float64", {}),
    "smoothed": ("float32", {"label_smoothing": 0.1}),
    "soft": ("float64", {"soft": True}),
    "sigmoid": ("float32", {"sigmoid": True}),
}


def call_and_gradient(torch, losses, form, reduction):
    """A loss of logits alone, those logits, and the reference's gradient of its sum."""
    dtype, options = CALLS[form][0], dict(CALLS[form][1])
    soft, sigmoid = (options.pop(name, False) for name in ("soft", "sigmoid"))
    options |= {"reduction": reduction, "as_class": True, "dtype": dtype}
    z, case = rounded(LOGITS, dtype), Case
    labels, counts = (SOFT, COUNTS) if soft else (LABELS, COUNTS)
    if soft:
        options |= {"label_dtype": dtype}
    if sigmoid:
        case, labels, counts = SigmoidCase, np.eye(3)[LABELS], (5, 2)
    case = case(z, labels, counts, None if sigmoid else WEIGHTS, **options)
    kind = losses.SigmoidLMFLoss if sigmoid else losses.LMFLoss
    loss = kind(*case.counts, **case.options, reduction=reduction)
    y = torch.tensor(labels, dtype=getattr(torch, dtype) if soft else torch.int64)
    z = torch.tensor(z, dtype=getattr(torch, dtype), requires_grad=True)
    return (lambda z: loss(z, y)), z, case


def check_gradient(case, loss, grad):
    names = (str(tensor.dtype).removeprefix("torch.") for tensor in (loss, grad))
    case.check(Result(loss.detach().double().numpy(), grad.double().numpy(), *names))


forms = pytest.mark.parametrize("form", CALLS)
both = pytest.mark.parametrize("reduction", ["mean", "none"])


@forms
@both
def test_batched_gradients(torch, losses, form, reduction):
    """Of several upstream gradients at once, as ``jacobian(vectorize=True)`` takes them."""
    f, z, case = call_and_gradient(torch, losses, form, reduction)
    loss = f(z)
    ones = torch.stack([torch.ones_like(loss), 2 * torch.ones_like(loss)])
    (grads,) = torch.autograd.grad(loss, z, ones, is_grads_batched=True)
    check_gradient(case, loss, grads[0])
    check_gradient(case, loss, grads[1] / 2)
    jacobian = torch.autograd.functional.jacobian(f, z, vectorize=True)
    while jacobian.dim() > 2:
        jacobian = jacobian.sum(0)
    check_gradient(case, loss, jacobian)


# Dynamo's own, of logits that some layer computed
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@forms
@both
def test_logits_may_change_after_the_loss(torch, losses, form, reduction):
    """In place, before the backward pass; second derivatives need them as they were."""
    f, z, case = call_and_gradient(torch, losses, form, reduction)
    for run in (f, torch.compile(f, fullgraph=True)):
        torch._dynamo.reset()
        logits = z * 1
        loss = run(logits)
        logits.detach().sigmoid_()
        (grad,) = torch.autograd.grad(loss.sum(), z)
        check_gradient(case, loss, grad)
    logits = z * 1
    loss = f(logits).sum()
    logits.detach().sigmoid_()
    with pytest.raises(RuntimeError, match=r"the logits must .* got them changed in place 1 times"):
        torch.autograd.grad(loss, z, create_graph=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("compiled", [False, True])
def test_class_weights_may_change_in_place(torch, losses, dtype, compiled):
    """As those of PyTorch's losses may, which a schedule does; whatever the logits' dtype."""
    z, y = torch.tensor(LOGITS, dtype=getattr(torch, dtype)), torch.tensor(LABELS)
    loss, weights = losses.LMFLoss(COUNTS), [1.0, 2.0, 5.0]
    if compiled:
        torch._dynamo.reset()  # of what others compiled: a function has eight versions at most
    run = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    before = run(z, y).item()
    loss.class_weight.copy_(torch.tensor(weights))
    expected = losses.LMFLoss(COUNTS, class_weight=weights)(z, y).item()
    assert abs(expected - before) > 0.01
    assert run(z, y).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", ["integer", "soft", "sigmoid"])
def test_second_derivatives_need_the_labels_as_they_were(torch, losses, form, dtype):
    """A buffer that is filled anew before the backward pass; first derivatives read none."""
    z = torch.tensor(LOGITS, dtype=getattr(torch, dtype), requires_grad=True)
    y = torch.tensor(LABELS)
    y = y if form == "integer" else torch.nn.functional.one_hot(y, 3)
    y = y.to(z.dtype) if form == "soft" else y
    loss = losses.SigmoidLMFLoss(COUNTS, COUNTS) if form == "sigmoid" else losses.LMFLoss(COUNTS)
    (expected,) = torch.autograd.grad(loss(z, y.clone()), z)
    value = loss(z, y)
    y.zero_()
    (grad,) = torch.autograd.grad(value, z, retain_graph=True)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"the labels must .* got them changed in place 1 times"):
        torch.autograd.grad(value, z, create_graph=True)


@forms
def test_logits_are_freed(torch, losses, form):
    """By the backward pass, and by checkpointing, which computes them again."""
    f, z, case = call_and_gradient(torch, losses, form, "mean")
    alive = []

    def g(z):
        logits = z * 1
        alive.append(weakref.ref(logits))
        return f(logits)

    loss = g(z)
    loss.backward()
    assert alive[-1]() is None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    z.grad = None
    loss = torch.utils.checkpoint.checkpoint(g, z, use_reentrant=False)
    assert alive[-1]() is None
    loss.backward()
    check_gradient(case, loss, z.grad)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")
@forms
@both
def test_recorded_operations(torch, losses, form, reduction):
    """Whoever records operations gets those of the loss, not its value as a constant."""
    f, z, case = call_and_gradient(torch, losses, form, reduction)
    with torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(f)(torch.zeros_like(z))
        _, slope = torch.func.linearize(f, z.detach())
    rows = torch.eye(z.numel(), dtype=z.dtype).view(-1, *z.shape)
    grad = torch.stack([slope(row).sum() for row in rows]).view(z.shape)
    check_gradient(case, graph(z.detach()), grad)


@forms
def test_gradients_for_each_example(torch, losses, form):
    """``vmap`` of ``grad``, compiled, as differentially private training has it."""
    f, z, case = call_and_gradient(torch, losses, form, "none")
    y = {"soft": SOFT, "sigmoid": np.eye(3)[LABELS]}.get(form, LABELS)
    loss, y = f.__closure__[0].cell_contents, torch.tensor(y)
    y = y.to(z.dtype) if form == "soft" else y.long()

    def of_one(z, y):
        value = loss(z[None], y[None])
        return value.sum(), value[0]

    torch._dynamo.reset()
    each = torch.compile(torch.func.vmap(torch.func.grad_and_value(of_one, has_aux=True)))
    grad, (_, value) = each(z.detach(), y)
    check_gradient(case, value, grad)


def test_inputs_are_not_changed(torch, losses, labels):
    z, q = torch.tensor(LOGITS, requires_grad=True), torch.tensor(SOFT)
    for y in (labels, q):
        losses.lmf_loss(z, y, MARGINS, WEIGHTS, label_smoothing=0.1).backward()
    np.testing.assert_array_equal(z.detach().numpy(), LOGITS)
    np.testing.assert_array_equal(q.numpy(), SOFT)
    np.testing.assert_array_equal(labels.numpy(), LABELS)


def test_gradients_accumulate_over_shards(torch, losses, labels):
    """``batch_mean`` adds up over shards of equal size; SPEC, reductions."""
    z = torch.tensor(LOGITS)
    loss = losses.LMFLoss(COUNTS, reduction="batch_mean")
    shards = [loss(z[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose((sum(shards) / 3).numpy(), loss(z, labels).numpy(), rtol=1e-12)


@pytest.mark.parametrize("shape", [(3000, 120), (3, 4, 250, 200), (1, 2, 300_000)], ids=str)
def test_large_batches(torch, losses, shape):
    """Which eager CPU code may take a few rows at a time: masked, with any layout of pixels."""
    C = shape[1]
    z = RNG.normal(0, 3, shape).astype(np.float32)
    y = RNG.integers(-1, C, (shape[0], *shape[2:]))
    up = RNG.uniform(0.5, 2, y.shape).astype(np.float32)
    counts = np.arange(1, C + 1)
    tensor = torch.tensor(z, requires_grad=True)
    loss = losses.LMFLoss(counts, ignore_index=-1, reduction="none")
    value = loss(tensor, torch.tensor(y))
    value.backward(torch.tensor(up))
    margins = class_margins(counts)
    exact, grad = reference.lmf_loss_and_grad(
        z, y, margins, margins, axis=1, where=y != -1, reduction="none"
    )
    np.testing.assert_allclose(value.detach().numpy(), exact, rtol=1e-5)
    error = np.abs(tensor.grad.numpy() - grad * up[:, None]).max(1)
    largest = np.abs(grad * up[:, None]).max(1)
    assert (error <= 1e-5 * largest).all()
    assert (largest[y != -1] > 0).mean() > 0.9
