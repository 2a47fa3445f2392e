"""Every class in every framework survives pickle and copies, and its repr builds it again."""

import copy
import pickle

import numpy as np
import pytest

from tests.checks import refuses
from tests.frameworks import load

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (6, 3)).astype(np.float32)
LABELS, MULTI_LABELS = np.array([0, 1, 2, 2, 1, 0]), RNG.integers(0, 2, (6, 3))
COUNTS = {
    "LMFLoss": ([625, 16, 1],),
    "LDAMLoss": ([625, 16, 1],),
    "FocalLoss": ([625, 16, 1],),
    "SigmoidLMFLoss": ([625, 16, 1], [17, 626, 641]),
}
# Numbers without a short decimal form too: what is printed must be read back to the last bit.
NUMBERS = {
    "LMFLoss": {"alpha": 2 / 3, "beta": 0.1 + 0.2, "gamma": 0.5, "scale": 1e3 / 7},
    "LDAMLoss": {"max_margin": 1 / 3, "scale": 5},
    "FocalLoss": {"gamma": np.float32(0.1)},
    "SigmoidLMFLoss": {"alpha": 2 / 3, "beta": 0.1 + 0.2, "gamma": 0.5, "scale": 1e3 / 7},
}
WEIGHTS = {
    "as by default": {},
    "none": {"class_weight": None},
    "balanced": {"class_weight": "balanced"},
    "an array": {"class_weight": np.array([0.1, 2 / 3, 3.0])},
}
PAIRS = np.array([0.1, 2 / 3])  # negative and positive, for the sigmoid form
OPTIONS = {
    "reference": {"reduction": "sum", "axis": 1},
    "torch": {"reduction": "sum", "ignore_index": 2, "process_group": "world"},
    "jax": {"reduction": "sum", "axis": 1},
    "keras": {"reduction": "sum", "ignore_class": 2, "name": "mine", "dtype": "float64"},
}
TWINS = {
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "repr": lambda loss: eval(repr(loss), {type(loss).__name__: type(loss)}),
}


def build(framework, name, weights, options=None):
    if framework != "reference":
        load(framework)
    counts, weights = counts_of(name, weights), WEIGHTS[weights]
    if name == "SigmoidLMFLoss" and isinstance(weights.get("class_weight"), np.ndarray):
        weights = {"class_weight": PAIRS}
    cls = getattr(load(f"lmf_multi.{framework}"), name)
    return cls(*counts, **NUMBERS[name], **weights, **(options or {}))


def counts_of(name, weights):
    """Focal takes them for a named scheme alone."""
    return () if name == "FocalLoss" and weights != "balanced" else COUNTS[name]


def value_of(loss, framework):
    labels = MULTI_LABELS if type(loss).__name__ == "SigmoidLMFLoss" else LABELS
    if framework == "torch":
        torch = load("torch")
        return loss(torch.tensor(LOGITS), torch.tensor(labels)).numpy()
    if framework == "keras":
        return load("keras").ops.convert_to_numpy(loss(labels, LOGITS))
    return np.asarray(loss(LOGITS, labels))


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("options", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("framework", OPTIONS)
def test_a_twin_gives_equal_numbers(framework, name, weights, options, twin):
    loss = build(framework, name, weights, OPTIONS[framework] if options else None)
    other = TWINS[twin](loss)
    assert type(other) is type(loss)
    assert other is not loss
    assert repr(other) == repr(loss)
    value = value_of(loss, framework)
    assert np.isfinite(value).all() and (value > 0).all()
    np.testing.assert_array_equal(value_of(other, framework), value)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("framework", OPTIONS)
def test_the_numbers_are_those_of_the_arguments(framework, name):
    """The comparison above can fail: another exponent or scale is another number and repr."""
    loss = build(framework, name, "none")
    changed = {"scale": 4.0} if name == "LDAMLoss" else {"gamma": 0.75}
    options = NUMBERS[name] | changed | {"class_weight": None}
    other = type(loss)(*counts_of(name, "none"), **options)
    assert repr(other) != repr(loss)
    assert abs(value_of(other, framework) - value_of(loss, framework)) > 1e-3


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_replaced_class_weights_are_kept(framework, name, twin):
    loss = build(framework, name, "none")
    before = value_of(loss, framework)
    loss.set_class_weight(PAIRS if name == "SigmoidLMFLoss" else [0.1, 2 / 3, 3.0])
    value = value_of(loss, framework)
    assert abs(value - before) > 1e-3
    np.testing.assert_array_equal(value_of(TWINS[twin](loss), framework), value)


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_named_class_weights_of_focal_are_replaced(framework):
    """By numbers, for which it has no use for the counts any more, and keeps none."""
    loss = build(framework, "FocalLoss", "balanced")
    assert "class_counts=[625, 16, 1]" in repr(loss)
    loss.set_class_weight([0.1, 2 / 3, 3.0])
    expected = build(framework, "FocalLoss", "an array")
    assert "class_counts=None" in repr(loss)
    assert value_of(loss, framework) == value_of(expected, framework)
    sentence = (
        "class_weight 'balanced' is computed from class counts, got class_counts=None; "
        "pass class_counts, or as an array what lmf_multi.class_weights computes"
    )
    with refuses(ValueError, sentence):
        loss.set_class_weight("balanced")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("framework", OPTIONS)
def test_the_repr_of_many_classes_is_short(framework, name):
    """The first and last three of more than 20 counts and weights, and of no use to ``eval``."""
    load("torch" if framework == "reference" else framework)
    cls, many = getattr(load(f"lmf_multi.{framework}"), name), np.arange(1, 8143)
    weights = np.stack([many, many], 1) if name == "SigmoidLMFLoss" else many
    counts = () if name == "FocalLoss" else [many] * len(COUNTS[name])
    loss = cls(*counts, class_weight=weights)
    assert len(repr(loss)) < 600
    few = "[1.0, 2.0, 3.0, ..., 8140.0, 8141.0, 8142.0]"
    if name == "SigmoidLMFLoss":
        few = "[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], ..., [8140.0, 8140.0], [8141.0, 8141.0], "
    assert f"class_weight={few}" in repr(loss)
    with pytest.raises(TypeError, match=r"must be numbers.*, got .*, Ellipsis, "):
        value_of(eval(repr(loss), {name: cls}), framework)


@pytest.fixture
def one_process(tmp_path):
    """``torch.distributed`` with this process alone."""
    distributed = load("torch").distributed
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield distributed
    distributed.destroy_process_group()


@pytest.mark.parametrize("copied", ["copy", "deepcopy", "average"])
def test_copies_share_a_process_group(one_process, copied):
    """PyTorch can copy none, and ``AveragedModel`` copies a model with its losses."""
    torch, losses = load("torch"), load("lmf_multi.torch")
    copied = TWINS.get(copied, torch.optim.swa_utils.AveragedModel)
    for group in (one_process.new_group([0]), one_process.group.WORLD):
        model = torch.nn.Sequential(losses.LMFLoss([625, 16, 1], process_group=group))
        twin = next(m for m in copied(model).modules() if isinstance(m, losses.LMFLoss))
        assert twin.process_group is group
        np.testing.assert_array_equal(value_of(twin, "torch"), value_of(model[0], "torch"))


def test_the_default_process_group_is_pickled_by_name(one_process):
    """As ``DistributedDataParallel`` does it; another group is nothing to another process."""
    loss = build("torch", "LMFLoss", "none", {"process_group": one_process.group.WORLD})
    assert pickle.loads(pickle.dumps(loss)).process_group == "world"
    loss.process_group = one_process.new_group([0])
    sentence = (
        "a loss can be pickled with the default process group alone, "
        f"got process_group={loss.process_group!r}; set process_group to None, and anew after "
        "loading"
    )
    with refuses(TypeError, sentence):
        pickle.dumps(loss)
    loss.process_group = None
    np.testing.assert_array_equal(
        value_of(pickle.loads(pickle.dumps(loss)), "torch"), value_of(loss, "torch")
    )


@pytest.mark.parametrize("twin", TWINS)
def test_replaced_leaves_are_kept(twin):
    """In JAX, where a leaf may have become an array on the way through a transformation."""
    jax, losses = load("jax"), load("lmf_multi.jax")
    loss = losses.LMFLoss([625, 16, 1]).replace(gamma=0.5, alpha=2 / 3)
    for each in (loss, jax.tree.map(jax.numpy.asarray, loss)):
        value = value_of(each, "jax")
        np.testing.assert_array_equal(value_of(TWINS[twin](each), "jax"), value)
    assert abs(value - value_of(losses.LMFLoss([625, 16, 1]), "jax")) > 1e-3


def test_a_pretrained_model_keeps_its_loss(tmp_path):
    """Loaders of models leave what is in no checkpoint uninitialised; FSDP2 starts on meta."""
    torch, transformers = load("torch"), load("transformers")
    losses = load("lmf_multi.torch")

    class Config(transformers.PretrainedConfig):
        model_type = "lmf-multi-test"

        def __init__(self, class_counts=(9, 3, 1), **options):
            super().__init__(**options)
            self.class_counts = list(class_counts)

    class Classifier(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.head = torch.nn.Linear(4, len(config.class_counts))
            self.loss = losses.LMFLoss(config.class_counts)
            self.post_init()

        def forward(self, features, labels):
            return self.loss(self.head(features), labels)

    features, labels = torch.randn(6, 4), torch.arange(6) % 3
    model = Classifier(Config([50, 5, 2]))
    model.save_pretrained(tmp_path)
    twin = Classifier.from_pretrained(tmp_path)
    assert twin(features, labels) == model(features, labels)
    with torch.device("meta"):
        empty = Classifier(Config([50, 5, 2]))
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert empty(features, labels) == model(features, labels)
