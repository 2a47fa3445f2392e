"""The tables of a study: numbers that follow from the result files, and claims from the numbers."""

import csv
import doctest
import json
import re
import shutil

import numpy as np
import pytest
from scipy.stats import t as student_t

from tests.frameworks import load

for package in ("PIL", "sklearn", "rich", "tensorboard"):
    load(package)

from examples.study import planning, tables  # noqa: E402
from examples.study.comparisons import ALONE, ARGMAX, TUNED, interval, scored  # noqa: E402
from examples.training.results import write_history  # noqa: E402
from tests.examples.studies import made_up  # noqa: E402


def rows(folder, name):
    """Of a table's CSV file."""
    with (folder / f"table-{name}.csv").open() as stream:
        return list(csv.DictReader(stream))


def markdown(folder, title):
    """The lines of one table's rows."""
    text = (folder / "tables.md").read_text()
    section = re.search(rf"^## {re.escape(title)}.*?\n\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def test_scores_are_means_and_sample_deviations(tmp_path, capsys):
    scores = {"ce": [0.5, 0.6, 0.7], "lmf:scale=5": [0.8, 0.8, 0.8]}
    made_up(tmp_path, list(scores), seeds=3, scores=scores)
    assert tables.main([str(tmp_path)]) == 0
    ce, lmf = rows(tmp_path, "scores")
    np.testing.assert_allclose(float(ce["macro-F1"]), 0.6, rtol=1e-12)
    np.testing.assert_allclose(float(ce["macro-F1 standard deviation"]), 0.1, rtol=1e-12)
    assert (ce["data"], ce["architecture"], ce["framework"], ce["seeds"]) == (
        "digits",
        "small",
        "torch",
        "3",
    )
    assert lmf["loss"] == "lmf:scale=5"
    lines = markdown(tmp_path, "Scores")
    assert lines[0].startswith("| digits | small | torch | ce | 3 | 0.600 ± 0.100 | ")
    assert lines[1].startswith("| digits | small | torch | lmf:scale=5 | 3 | 0.800 ± 0.000 | ")
    assert capsys.readouterr().out == (tmp_path / "tables.md").read_text()


def test_scores_of_each_class_come_with_its_images_the_commonest_first(tmp_path):
    planned = made_up(tmp_path, ["ce", "lmf"], seeds=2, data=["a.npz", "b.npz"])
    tables.write(planned, tables.tables(planned))
    names = {"F1": "f1", "sensitivity": "recall", "precision": "precision"}
    for data in ("a", "b"):
        found = rows(tmp_path, f"per-class-{data}")
        shown = [(row["class"], row["images"], row["loss"]) for row in found]
        classes = [("mole", "600"), ("vein", "30"), ("wart", "5")]
        assert shown == [(*each, loss) for each in classes for loss in ("ce", "lmf")]
        for row in found:
            label = ("vein", "mole", "wart").index(row["class"])
            mine = [
                r for t, r in planned.results().items() if (t.data, t.loss) == (data, row["loss"])
            ]
            assert len(mine) == 2
            for name, score in names.items():
                for rule, tests in [
                    ("", [r["test"] for r in mine]),
                    (", τ tuned", [r["tuned"]["test"] for r in mine]),
                ]:
                    expected = np.mean([test[score][label] for test in tests])
                    np.testing.assert_allclose(float(row[name + rule]), expected, rtol=1e-12)


def test_every_row_is_reported_with_argmax_and_with_tau_tuned(tmp_path):
    planned = made_up(tmp_path, ["ce", "lmf"], seeds=3)
    tables.write(planned, tables.tables(planned))
    for name, rule in (("scores", ARGMAX), ("scores-tuned", TUNED)):
        found = rows(tmp_path, name)
        assert [row["loss"] for row in found] == ["ce", "lmf"]
        for row in found:
            mine = [r for t, r in planned.results().items() if t.loss == row["loss"]]
            for key, heading in tables.SCORES.items():
                expected = np.mean([scored(result, rule)[key] for result in mine])
                np.testing.assert_allclose(float(row[heading]), expected, rtol=1e-12)
    taus = [r["tuned"]["tau"] for t, r in planned.results().items() if t.loss == "lmf"]
    np.testing.assert_allclose(float(rows(tmp_path, "scores-tuned")[1]["τ"]), np.mean(taus))
    told = [(row["loss"], row["read by"]) for row in rows(tmp_path, "against-ce")]
    assert told == [("ce", ALONE), ("lmf", ARGMAX), ("lmf", TUNED)]


def test_what_older_files_do_not_have_is_a_dash(tmp_path):
    planned = made_up(
        tmp_path, ["ce", "lmf"], seeds=2, scores={"ce": [0.5, 0.6], "lmf": [0.7, 0.6]}
    )
    for file in tmp_path.glob("runs/*/result.json"):
        content = json.loads(file.read_text())
        for score in ("macro_auroc", "average_precision", "calibration_error"):
            del content["test"][score]
        file.write_text(json.dumps(content))
    tables.write(planned, tables.tables(planned))
    for line in markdown(tmp_path, "Scores"):
        assert line.endswith(" | – | – | – | 2 |")
    assert not (tmp_path / "table-scores-tuned.csv").exists()


def test_what_stopped_early_is_told(tmp_path):
    planned = made_up(tmp_path, ["ce", "lmf"], seeds=2)

    def note():
        (costs,) = (table for table in tables.tables(planned) if table.name == "costs")
        return costs.note

    for number, file in enumerate(sorted(tmp_path.glob("runs/*/result.json")), 1):
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"epochs_run": min(number, content["epochs"])}))
        if number == 1:
            assert note().endswith(" Stopped early: 1, after 1 to 1 epochs.")
    assert note().endswith(" Stopped early: 2, after 1 to 2 epochs.")


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.1, 0.2, 0.15, 0.12, 0.3], "better"),
        ([-0.1, -0.2, -0.15, -0.12, -0.3], "worse"),
        ([0.1, -0.2, 0.15, -0.12, 0.1], "no clear difference"),
        ([0.0] * 5, "no clear difference"),
        ([0.1, 0.2, 0.15, 0.3], "4 seeds, perhaps by chance"),
        ([0.4], "one seed, perhaps by chance"),
    ],
)
def test_words_claim_only_what_the_interval_does(tmp_path, gains, verdict):
    scores = {"ce": [0.5] * len(gains), "lmf": [0.5 + gain for gain in gains]}
    planned = made_up(tmp_path, list(scores), seeds=len(gains), scores=scores)
    tables.write(planned, tables.tables(planned))
    (row,) = rows(tmp_path, "against-ce")
    assert (row["loss"], row["seeds"], row["verdict"]) == ("lmf", str(len(gains)), verdict)
    np.testing.assert_allclose(float(row["difference"]), np.mean(gains), atol=1e-12)
    if len(gains) == 1:
        assert (row["from"], row["to"], row["p"]) == ("", "", "")
        (line,) = markdown(tmp_path, "Macro-F1 minus")
        assert line.endswith("| – | – | seeds | – | – | one seed, perhaps by chance |")
        return
    low, high = float(row["from"]), float(row["to"])
    assert min(gains) - 1e-12 <= low <= np.mean(gains) <= high <= max(gains) + 1e-12
    if len(gains) >= 5:
        assert (verdict == "better") == (low > 0) and (verdict == "worse") == (high < 0)
    if low > 0 or high < 0:  # all agree: exact, 2 of the signs' 2^n patterns
        np.testing.assert_allclose(float(row["p"]), 2 / 2 ** len(gains), rtol=1e-12)
    if not any(gains):
        assert float(row["p"]) == 1


def test_holms_correction_stands_beside_p(tmp_path):
    gains = {"ce": 0.0, "bwcce": 0.2, "focal": 0.01, "lmf": 0.3}
    scores = {loss: (0.5 + gain + 0.01 * np.arange(6)).tolist() for loss, gain in gains.items()}
    scores["focal"][0] -= 0.2
    planned = made_up(tmp_path, list(gains), seeds=6, scores=scores)
    tables.write(planned, tables.tables(planned))
    found = {row["loss"]: row for row in rows(tmp_path, "against-ce")}
    p = {loss: float(row["p"]) for loss, row in found.items()}
    np.testing.assert_allclose([p["bwcce"], p["lmf"]], 1 / 32, rtol=1e-12)
    corrected = {loss: float(row["p, Holm"]) for loss, row in found.items()}
    np.testing.assert_allclose([corrected["bwcce"], corrected["lmf"]], 3 / 32, rtol=1e-12)
    np.testing.assert_allclose(corrected["focal"], max(p["focal"], 3 / 32), rtol=1e-12)


def test_the_interval_of_many_differences_is_students():
    gains = np.random.default_rng(0).normal(0.1, 0.3, 200)
    half = student_t.ppf(0.975, 199) * gains.std(ddof=1) / np.sqrt(200)
    expected = gains.mean() - half, gains.mean() + half
    np.testing.assert_allclose(interval(gains), expected, atol=0.1 * half)


def test_differences_are_paired_by_seed_and_what_is_missing_is_told(tmp_path):
    scores = {"ce": [0.1, 0.5, 0.9], "lmf": [0.2, 0.6, 0.4]}
    planned = made_up(tmp_path, list(scores), seeds=3, scores=scores)
    (tmp_path / "runs" / "digits-small-torch-lmf-2" / "result.json").unlink()
    begun = planning.planned("digits", "small", "torch", "focal", 0, [])
    planned = planning.remember(tmp_path, "more", [begun])
    (planned.out(begun) / "checkpoints").mkdir(parents=True)
    tables.write(planned, tables.tables(planned))
    (row,) = rows(tmp_path, "against-ce")
    assert row["seeds"] == "2"
    np.testing.assert_allclose(float(row["difference"]), 0.1, rtol=1e-12)
    assert markdown(tmp_path, "Missing: 2 of 7 trainings") == [
        "| digits | small | torch | lmf | 2 | no checkpoint yet |",
        "| digits | small | torch | focal | 0 | unfinished |",
    ]


def test_the_gathered_results_are_enough_for_the_tables(tmp_path):
    planned = made_up(tmp_path, ["ce", "lmf"], seeds=2)
    for training in planned.trainings:
        rows = [{"epoch": e, "val_loss": 0.1 + training.seed / e} for e in (1, 2, 3)]
        write_history(planned.out(training) / "history.csv", rows)

    def told(study):
        rows = [
            (study.result(t), study.seconds(t), study.history(t)["val_loss"])
            for t in study.trainings
        ]
        return [table.markdown() for table in tables.tables(study)], rows

    before = told(planned)
    planning.gather(planned)
    shutil.rmtree(tmp_path / "runs")
    again = planning.read(tmp_path)
    assert told(again) == before and "| seeds, images |" in before[0][0]
    planning.gather(again)  # what is gathered from is not lost
    assert told(planning.read(tmp_path)) == before
    more = planning.plan(["digits"], ["small"], ["torch"], ["lmf"], 3, ["--epochs", "3"])
    study = planning.remember(tmp_path, "more", more)  # which loses none of them
    assert (len(study.results()), len(study.trainings)) == (4, 5)
    longer = planning.plan(["digits"], ["small"], ["torch"], ["lmf"], 1, ["--epochs", "4"])
    assert planning.remember(tmp_path, "longer", longer).result(longer[0]) is None


def test_frameworks_and_data_are_not_mixed(tmp_path):
    planned = made_up(tmp_path, ["ce", "lmf"], data=["a", "b"], frameworks=["torch", "keras"])
    found = {table.name: table for table in tables.tables(planned)}
    assert len(found["scores"].rows) == 8
    assert [row[:5] for row in found["against-ce"].rows] == [
        (data, "small", framework, *told)
        for data in ("a", "b")
        for framework in ("torch", "keras")
        for told in (("ce", ALONE), ("lmf", ARGMAX), ("lmf", TUNED))
    ]
    assert "missing" not in found


def test_a_folder_without_a_study_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        tables.main([str(tmp_path)])
    assert str(stopped.value) == (
        f"error: {tmp_path} must hold the study.json of examples.compare, which is not there"
    )


def test_doctests():
    found = doctest.testmod(tables, extraglobs={"np": np})
    assert found.failed == 0 and found.attempted > 0
