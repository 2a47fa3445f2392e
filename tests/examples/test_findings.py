"""Several findings an image: what is read of them, trained with them, and scored of them."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from examples.data.tables import Columns
from examples.training import finding_scores
from examples.training.settings import parse
from lmf_multi import class_margins, class_weights, reference
from tests.examples import trees
from tests.examples.test_trainers import (  # noqa: F401
    INTERRUPTED,
    LOSS_OF,
    ROOT,
    assert_same_run,
    by_torchrun,
    history,
    jax_cache,
    run,
    trainer,
)
from tests.examples.trees import FINDINGS, SPLITS
from tests.frameworks import load

NAMED = Columns(findings=FINDINGS)


@pytest.fixture(scope="module")
def data():
    """The trainers' data."""
    return trees.reader()


def labels_of(dataset):
    """Of every image by its id, of all splits."""
    return {
        i: tuple(row)
        for name in SPLITS
        for i, row in zip(
            getattr(dataset, name).ids.tolist(), getattr(dataset, name).labels.tolist(), strict=True
        )
    }


# --- what is read


def test_columns_of_findings_are_read_with_what_nobody_knows(data, tmp_path):
    file = trees.findings(tmp_path)
    dataset = data.load(file, 8, columns=NAMED)
    cells = {"1": 1, "0": 0, "": -1, "-1": -1}
    rows = trees.read(file)
    expected = {row["path"]: tuple(cells[row[name]] for name in FINDINGS) for row in rows}
    assert labels_of(dataset) == expected
    assert dataset.class_names == FINDINGS and dataset.has_findings
    train = dataset.train.labels
    assert train.dtype == np.int64 and {-1, 0, 1} == set(train[:, 2].tolist())
    np.testing.assert_array_equal(dataset.class_counts[:, 1], (train == 1).sum(0))
    np.testing.assert_array_equal(dataset.class_counts[:, 0], (train == 0).sum(0))


def test_a_column_of_names_is_read(data, tmp_path):
    file = trees.findings(tmp_path)
    rows = trees.read(file)
    dataset = data.load(file, 8, columns=Columns(names="all"))
    assert dataset.class_names == tuple(sorted(FINDINGS))
    for row in rows:
        named = [name for name in sorted(FINDINGS) if name in row["all"]]
        found = labels_of(dataset)[row["path"]]
        assert [n for n, x in zip(dataset.class_names, found, strict=True) if x] == named
    some = data.load(file, 8, columns=Columns(names="all", findings=("Nodule",)))
    assert some.class_names == ("Nodule",)
    expected = {row["path"]: ("Nodule" in row["all"],) for row in rows}
    assert labels_of(some) == expected


def test_groups_stay_together_and_every_split_has_every_finding(data, tmp_path):
    file = trees.findings(tmp_path)
    group = {row["path"]: row["group"] for row in trees.read(file)}
    for seed in range(5):
        dataset = data.load(file, 8, columns=NAMED, split_seed=seed)
        splits = [getattr(dataset, name) for name in SPLITS]
        found = [{group[i] for i in split.ids.tolist()} for split in splits]
        assert sum(map(len, found)) == len(set.union(*found)) == 60
        assert all(((split.labels == 1).sum(0) > 0).all() for split in splits)
        shares = np.array([len(split) for split in splits]) / 120
        np.testing.assert_allclose(shares, [0.7, 0.15, 0.15], atol=0.05)
    by = "Split 70/15/15 by group, stratified by the rarest finding of each."
    assert by in dataset.notes


def test_a_finding_of_three_groups_is_in_all_splits(data, tmp_path):
    file = trees.findings(tmp_path)
    rows = trees.read(file)
    trees.write(file, [row | {"Fluid": int(row["group"] in ("5", "20", "41"))} for row in rows])
    for seed in range(5):
        dataset = data.load(file, 8, columns=NAMED, split_seed=seed)
        for name in SPLITS:
            assert (getattr(dataset, name).labels[:, 2] == 1).sum() == 2


def test_odir_is_read_with_its_columns_or_with_one_label_an_eye(data, tmp_path):
    trees.odir5k(tmp_path)
    several = data.load(tmp_path, 8, columns=Columns(findings=("N", "G")))
    assert (several.name, several.class_names) == ("odir5k", ("N", "G"))
    found = labels_of(several)
    assert found["4_left"] == found["4_right"] == (0, 1)
    assert found["2_left"] == (1, 1) and found["1_right"] == (1, 0)
    assert data.load(tmp_path, 8).class_counts.shape == (2,)


def changed(root, row=1, column="Mass", cell=None, rows=slice(None)):
    """The table with another cell, in all rows or one."""
    file = trees.findings(root)
    found = trees.read(file)[rows]
    for each in found if row is None else [found[row]]:
        each[column] = cell
    trees.write(file, found)
    return file


@pytest.mark.parametrize(
    ("build", "columns", "sentence"),
    [
        (
            lambda r: changed(r, cell="yes"),
            NAMED,
            "Mass must be 1, 0, or blank or -1 where nobody has looked for it, got yes for ima",
        ),
        (trees.findings, Columns(findings=("Mass", "Edema")), "must have a column Edema, got path"),
        (trees.findings, Columns(names="labels"), "must have a column labels, got path, group, M"),
        (
            lambda r: changed(r, None, cell="0"),
            NAMED,
            "finding 'Mass' must have at least 3 groups to be in train, val, test, got 0; add",
        ),
        (
            trees.findings,
            Columns(names="all", findings=("Mass", "Edema")),
            "finding 'Edema' must have at least 3 groups to be in train, val, test, got 0",
        ),
        (
            lambda r: changed(r, None, cell="1"),
            NAMED,
            "finding 'Mass' must be there in some images of train and absent from others, got it",
        ),
        (
            lambda r: trees.folders(r),
            NAMED,
            "--findings belongs to a table or to ODIR-5K, whose full_df.csv is not in",
        ),
        (lambda r: "digits", NAMED, "--findings belongs to a table or to ODIR-5K, got digits"),
    ],
)
def test_bad_findings_are_one_sentence(data, tmp_path, build, columns, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        data.load(build(tmp_path), 8, columns=columns)
    assert "\n" not in str(raised.value)


def test_a_finding_that_never_occurs_in_train_is_one_sentence(data, tmp_path):
    file = trees.findings(tmp_path, ("train", "val", "test"))
    rows = trees.read(file)
    for row in rows:
        row["Nodule"] = "0" if row["split"] == "train" else row["Nodule"]
    trees.write(file, rows)
    sentence = "finding 'Nodule' must be there in some images of train and absent from others"
    with pytest.raises(ValueError, match=sentence):
        data.load(file, 8, columns=NAMED)


def test_validation_without_any_finding_is_one_sentence(data, tmp_path):
    file = trees.findings(tmp_path, ("train", "val", "test"))
    nothing = dict.fromkeys(FINDINGS, "0")
    rows = trees.read(file)
    trees.write(file, [row | (nothing if row["split"] == "val" else {}) for row in rows])
    with pytest.raises(ValueError, match="val must have an image with a finding to choose by, got"):
        data.load(file, 8, columns=NAMED)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--loss crt", "findings are trained with --loss ce, bwcce, focal, ldam, lmf, la, got crt"),
        ("--sampler balanced", "--sampler balanced goes by an image's one class, but it may have"),
        ("--drw 3", "--drw 3 goes by an image's one class, but it may have several findings"),
        ("--mixup 0.2", "--mixup 0.2 goes by an image's one class, but it may have several"),
        ("--accumulate 2", "--accumulate 2 goes by an image's one class, but it may have several"),
        ("--label-column dx", "--label-column is one label an image; leave it or the findings out"),
        ("--findings Mass,Mass", "argument --findings: must be names that differ, got 'Mass,Mass'"),
        ("--findings Mass,", "argument --findings: must be names that differ, got 'Mass,'"),
        (
            "--data digits --findings-column all",
            "--findings-column belongs to a table, got --data digits",
        ),
    ],
)
def test_flags_that_do_not_go_with_findings_are_refused(flags, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("torch", ["--data", "t.csv", "--findings", "Mass,Nodule", *flags.split()], "")
    assert sentence in capsys.readouterr().err


def test_studies_and_heads_refuse_findings(tmp_path, capsys):
    load("optuna")
    flags = ["--data", "t.csv", "--findings", "Mass,Nodule", "--out", str(tmp_path / "out")]
    for program, sentence in (
        (
            "compare",
            "studies compare trainings of one class an image, got several findings of t.csv",
        ),
        ("heads", "heads take of the trainers' flags"),
    ):
        with pytest.raises(SystemExit) as stopped:
            load(f"examples.{program}").main(flags)
        assert sentence in f"{stopped.value}{capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


# --- losses


def cross_entropy(labels, logits, weights):
    """Weighted binary cross-entropy by hand, the mean over what is known: (N, L), (L, 2)."""
    p = 1 / (1 + np.exp(-logits))
    w = np.where(labels == 1, weights[:, 1], weights[:, 0])
    each = -w * np.where(labels == 1, np.log(p), np.log(1 - p))
    return each[labels >= 0].mean()


@pytest.mark.parametrize(
    "flags",
    [
        "ce",
        "bwcce",
        "bwcce --class-weight balanced",
        "focal",
        "focal --class-weight none --gamma 2",
        "lmf",
        "lmf --alpha 0.5 --scale 2 --logit-adjustment 1",
        "ldam --scale 1",
        "la",
    ],
)
def test_losses_of_findings_are_what_their_names_say(trainer, flags):  # noqa: F811
    settings = parse(trainer, f"--data t.csv --findings A,B,C --loss {flags}".split(), "")
    rng = np.random.default_rng(0)
    counts = np.array([[90, 10], [50, 40], [97, 3]])  # without and with
    logits = rng.normal(size=(16, 3)).astype(np.float32)
    labels = rng.integers(-1, 2, (16, 3))
    options = dict(settings.loss_options)
    scheme = options.pop("class_weight", None)
    weights = np.array([class_weights(pair, scheme) for pair in counts])
    z = logits.astype(np.float64)
    if settings.loss in ("ce", "bwcce"):
        expected = cross_entropy(labels, z, weights)
    else:
        τ = options.pop("logit_adjustment")
        z = z + τ * np.log(counts[:, 1] / counts[:, 0])
        most = options.pop("max_margin", 0.5)
        margins = np.array([class_margins(pair, most) for pair in counts])
        missing = {"lmf": {}, "ldam": {"beta": 0.0, "alpha": 1.0}}
        missing = missing.get(settings.loss, {"alpha": 0.0})
        missing |= {"gamma": 0.0} if settings.loss == "la" else {}
        expected = reference.sigmoid_lmf_loss(
            z, np.maximum(labels, 0), margins, weights, where=labels >= 0, **missing | options
        )
    found = LOSS_OF[trainer](settings, counts, logits, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    unknown = np.full_like(labels, -1)
    assert LOSS_OF[trainer](settings, counts, logits, unknown) == 0  # nothing to learn, no NaN


WHOLE_BATCH = """
import sys
import numpy as np, torch, torch.distributed as dist
from examples.training.settings import parse
from examples.train_torch import build_loss

torch.distributed.init_process_group("gloo")
rank, batch = dist.get_rank(), np.load(sys.argv[1])
settings = parse("torch", ["--data", "t.csv", "--findings", "A,B,C", "--loss", "lmf"], "")
criterion = build_loss(settings, batch["counts"], world=2)
logits = torch.from_numpy(batch["logits"][rank::2])
loss = criterion(logits, torch.from_numpy(batch["labels"][rank::2]))
np.save(f"{sys.argv[1]}-{rank}.npy", loss.item())
dist.barrier()
dist.destroy_process_group()
"""


def test_torchrun_gives_findings_the_whole_batchs_mean(tmp_path):
    """Two processes, in which nobody has looked for other numbers of findings."""
    torch, of_torch = load("torch"), load("examples.train_torch")
    rng = np.random.default_rng(0)
    counts, labels = np.array([[90, 10], [50, 40], [97, 3]]), rng.integers(-1, 2, (8, 3))
    labels[::2, 1:] = -1
    logits = rng.normal(size=(8, 3)).astype(np.float32)
    by_torchrun(tmp_path, WHOLE_BATCH, counts=counts, labels=labels, logits=logits)
    settings = parse("torch", ["--data", "t.csv", "--findings", "A,B,C", "--loss", "lmf"], "")
    criterion = of_torch.build_loss(settings, counts)
    expected = criterion(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    parts = [np.load(tmp_path / f"batch.npz-{rank}.npy") for rank in (0, 1)]
    np.testing.assert_allclose(np.mean(parts), expected, rtol=1e-6)


# --- scores


@pytest.fixture
def scored():
    """Labels with gaps and logits of 60 images and three findings."""
    rng = np.random.default_rng(1)
    labels = rng.integers(-1, 2, (60, 3))
    return labels, (labels + rng.normal(size=(60, 3))).astype(np.float32)


def test_thresholds_have_the_best_f1(scored):
    labels, logits = scored
    found = finding_scores.thresholds(labels, logits)
    for y, x, least in zip(labels.T, logits.T, found, strict=True):
        y, x = y[y >= 0], x[y >= 0]
        best = max(f1_score(y, x >= each) for each in x)
        np.testing.assert_allclose(f1_score(y, x >= least), best, rtol=1e-12)
    labels[labels[:, 1] == 1, 1] = 0
    assert finding_scores.thresholds(labels, logits)[1] == 0
    apart, x = np.array([[0], [0], [1], [1]]), np.array([[-4.0], [-1.0], [2.0], [5.0]])
    assert finding_scores.thresholds(apart, x) == [0.5]  # in the middle of the gap


def test_scores_of_findings_are_scikit_learns(scored):
    labels, logits = scored
    least = np.array([0.0, 0.5, -0.5])
    found = finding_scores.scores(labels, logits, least, "ABC")
    means = {"f1": [], "auroc": [], "average_precision": []}
    for i, name in enumerate("ABC"):
        known = labels[:, i] >= 0
        y, x = labels[known, i], logits[known, i]
        expected = {"f1": f1_score(y, x >= least[i]), "auroc": roc_auc_score(y, x)}
        expected |= {"average_precision": average_precision_score(y, x)}
        for score, value in expected.items():
            np.testing.assert_allclose(found["findings"][name][score], value, rtol=1e-12)
            means[score].append(value)
        assert found["findings"][name]["images_with"] == y.sum()
        assert found["findings"][name]["images_without"] == (1 - y).sum()
    np.testing.assert_allclose(found["macro_f1"], np.mean(means["f1"]))
    np.testing.assert_allclose(found["macro_auroc"], np.mean(means["auroc"]))
    np.testing.assert_allclose(found["average_precision"], np.mean(means["average_precision"]))


def test_a_finding_that_the_split_has_not_does_not_count(scored):
    labels, logits = scored
    labels[labels[:, 2] == 1, 2] = 0
    found = finding_scores.scores(labels, logits, np.zeros(3), "ABC")
    assert found["findings"]["C"]["f1"] is None and found["findings"]["C"]["auroc"] is None
    two = finding_scores.scores(labels[:, :2], logits[:, :2], np.zeros(2), "AB")
    assert {k: found[k] for k in two if k != "findings"} == {
        k: two[k] for k in two if k != "findings"
    }


# --- trained on


def flags(folder, *more):
    """Of a short training."""
    file = trees.findings(folder)
    words = f"--data {file} --findings {','.join(FINDINGS)} --image-size 16 --batch-size 16"
    return [*words.split(), "--epochs", "3", "--learning-rate", "3e-3", *more]


RECIPE = "--optimizer adamw --schedule cosine --warmup 1 --ema 0.5 --clip-norm 1 --augment flip"


def test_findings_of_new_images_are_those_of_the_run(trainer, tmp_path):  # noqa: F811
    """With much of what a training may have besides; the same again from the file it leaves."""
    out = tmp_path / "run"
    done = run(trainer, *flags(tmp_path, *RECIPE.split(), "--label-smoothing", "0.1"), "--out", out)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "result.json").read_text())
    with np.load(out / "predictions.npz") as kept:
        ids, logits = kept["ids"], kept["logits"]
    reaches = logits >= np.array([*found["thresholds"].values()])
    images, table = [tmp_path / i for i in ids], tmp_path / "new.csv"
    command = [sys.executable, "-m", "examples.predict", out, *images, "--out", table]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "whose logits reach their thresholds" in done.stdout
    rows = trees.read(table)
    expected = ["|".join(np.array(FINDINGS)[row]) for row in reaches]
    assert [row["predicted"] for row in rows] == expected and len({*expected}) > 1
    p = [[float(row[f"sigmoid {name}"]) for name in FINDINGS] for row in rows]
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-logits.astype(np.float64))), atol=1e-6)

    again = tmp_path / "again"
    done = run(trainer, "--config", out / "config.toml", "--out", again)
    assert done.returncode == 0, done.stderr
    assert_same_run(again, out)


def test_every_trainer_learns_findings_and_goes_on_bit_for_bit(trainer, tmp_path):  # noqa: F811
    arguments, out = flags(tmp_path, "--loss", "lmf", "--scale", "1"), tmp_path / "run"
    done = run(trainer, *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"82 training images \(Mass 36 of 82, Nodule 32 of 82, Fluid 12 of 65", done.stdout
    )
    found, rows = json.loads((out / "result.json").read_text()), history(out)
    chosen = [float(row["val_macro_f1"]) for row in rows]
    best = {"macro_f1": max(chosen), "epoch": 1 + int(np.argmax(chosen))}
    assert found["best_validation"] == best
    assert {"val_macro_auroc", "val_average_precision"} < set(rows[0])
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    with np.load(out / "predictions.npz") as kept:
        labels, logits = kept["labels"], kept["logits"]
        val_labels, val_logits = kept["val_labels"], kept["val_logits"]
    assert labels.shape == logits.shape == (18, 3)
    least = finding_scores.thresholds(val_labels, val_logits)
    assert list(found["thresholds"].values()) == least.tolist()
    f1 = [
        f1_score(y[y >= 0], x[y >= 0] >= t)
        for y, x, t in zip(labels.T, logits.T, least, strict=True)
    ]
    np.testing.assert_allclose(found["test"]["macro_f1"], np.mean(f1), rtol=1e-12)
    assert found["test"]["macro_auroc"] > 0.7  # colours tell
    assert f"Test macro-F1 {np.mean(f1):.4f}, macro-AUROC" in done.stdout
    assert (found["findings"], found["loss"]["name"]) == (list(FINDINGS), "lmf")

    other = [*arguments, "--out", tmp_path / "stopped"]
    stopped = run(trainer, trainer, "epoch 2 step 2", "SIGINT", *other, code=INTERRUPTED)
    assert stopped.returncode == 130, stopped.stderr
    done = run(trainer, *other, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "stopped", out)


@pytest.mark.parametrize("loss", ["ce", "bwcce", "focal", "ldam", "la"])
def test_pytorch_trains_findings_with_every_loss(loss, tmp_path):
    arguments = flags(tmp_path, "--loss", loss, "--augment", "flip", "--findings-column", "all")
    assert load("examples.train_torch").main([*arguments, "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["data"]["class_names"] == list(FINDINGS)
    assert 0 <= found["test"]["macro_f1"] <= 1
