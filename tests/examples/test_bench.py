"""`bench_loss`, run as a user runs it: what it measures, writes, prints and refuses."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lmf_multi import LMFSpec
from tests.frameworks import load

NEEDS = {"torch": ["torch", "rich"], "jax": ["jax", "optax", "rich"], "keras": ["keras", "rich"]}
# as in a terminal where nothing was set
LOUD = ("TF_CPP_MIN_LOG_LEVEL", "KINETO_LOG_LEVEL", "JAX_PLATFORMS")


def bench(*arguments, **settings):
    """The command in a process of its own, which must succeed."""
    env = {name: value for name, value in os.environ.items() if name not in LOUD}
    env |= {"KERAS_BACKEND": "tensorflow"} | settings  # the one it measures
    command = [sys.executable, "-m", "examples.bench_loss", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("is_sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("framework", NEEDS)
def test_bench_measures_every_loss_in_turn(framework, is_sigmoid, tmp_path):
    for needed in NEEDS[framework]:
        load(needed)
    file = tmp_path / "figures.json"
    options = ["--framework", framework, "--quick", "--seconds", "0.1"]
    done = bench(*options, *["--sigmoid"] * is_sigmoid, "--json", file)
    assert done.stderr == ""
    found = json.loads(file.read_text())
    assert {"CPU", "Python", framework} <= set(found["about"])
    names = ["cross-entropy", *["published formula"] * (not is_sigmoid), "ours"]
    if framework == "torch":
        names += [f"{name}, compiled" for name in names]
    for dtype in ("float32", "bfloat16"):
        rows = [row for row in found["results"] if row["dtype"] == dtype]
        assert [row["loss"] for row in rows] == names
        for row in rows:
            assert row["shape"] == ([4096, 14] if is_sigmoid else [32, 7])
            assert row["milliseconds"] > 0 and row["copies"] > 0
            assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
            # the gradient, at least; XLA inside TensorFlow does not tell
            assert row["memory"] is None if framework == "keras" else row["memory"] >= 1
            assert (row["ratio"] == 1) == row["loss"].startswith("cross-entropy")
            assert f"{row['ratio']:.2f}" in done.stdout
            assert row["over"][row["loss"]] == 1 and list(row["over"]) == names
    assert done.stdout.lstrip().startswith(f"{framework}, forward + backward")


@pytest.mark.parametrize("framework", NEEDS)
def test_bench_measures_what_there_is_without_the_kernel(framework):
    """The switch reaches every framework."""
    for needed in NEEDS[framework]:
        load(needed)
    code = """
import sys
from examples import bench_loss

bench_loss.main(sys.argv[1:])
from lmf_multi import _kernel

print("kernel:", _kernel.library() is not None)
"""
    options = ["--framework", framework, "--quick", "--seconds", "0.1"]
    for more, expected in (
        ([], "kernel: True"),
        (["--operations"], "kernel: False"),
    ):
        command = [sys.executable, "-c", code, *options, *more]
        env = os.environ | {"KERAS_BACKEND": "tensorflow"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == expected


def test_bench_compiles_for_a_tpu_that_is_not_here(tmp_path):
    """XLA's own counts, which do not vary: at most 1.5 times cross-entropy's bytes on each chip."""
    for needed in ("jax", "optax", "rich", "libtpu"):
        load(needed)
    file = tmp_path / "programs.json"
    bench("--framework", "jax", "--aot", "v5e:2x2", "--json", file)
    programs = {(tuple(p["shape"]), p["loss"]): p for p in json.loads(file.read_text())["programs"]}
    for rows, C in [(4096, 1000), (65536, 8)]:
        accessed = {
            name: programs[(rows, C), name]["bytes_accessed"]
            for name in ("cross-entropy", "published formula", "ours")
        }
        transfers = 2 * 4 * rows * C  # the logits read and their gradient written, at least
        assert transfers <= accessed["ours"] <= 1.5 * accessed["cross-entropy"]
        assert accessed["ours"] < accessed["published formula"]
        assert (
            programs[(rows, C), "ours"]["temporaries"] < transfers / 2
        )  # none of the logits' size


def test_bench_losses_are_what_they_are_called():
    """The published formula and ours agree where it is accurate: what is timed is one loss."""
    torch, peers = load("torch"), load("examples.bench.torch")
    spec = LMFSpec([100, 10, 1])
    z, y = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    Δ, w = torch.tensor(spec.margins), torch.tensor(spec.weights)
    published = peers.published_formula(z.double(), y, Δ, w, spec)
    ours = load("lmf_multi.torch").LMFLoss.from_spec(spec)(z.double(), y)
    torch.testing.assert_close(ours, published, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--aot", "v5e:2x2"], "--aot v5e:2x2 needs --framework jax, got torch"),
        (
            ["--aot", "sm_90", "--framework", "jax"],
            "--aot sm_90 needs --framework torch, got jax",
        ),
        (
            ["--sigmoid", "--aot", "sm_90"],
            "--sigmoid measures one framework here, without --all and --aot",
        ),
        (["--rehearse"], "--rehearse needs --all FILE, and runs on the CPU"),
        (["--framework", "numpy"], "invalid choice: 'numpy'"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(arguments, sentence, capsys):
    from examples import bench_loss

    with pytest.raises(SystemExit):
        bench_loss.parse(arguments)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_bench_compiles_for_a_gpu_that_is_not_here(architecture, tmp_path):
    """No registers spilt at any shape that is measured on a GPU, and 3 transfers of the logits."""
    load("triton")
    from examples.bench_loss import CUDA_SHAPES

    file = tmp_path / "programs.json"
    done = bench("--aot", architecture, "--json", file, TRITON_CACHE_DIR=str(tmp_path))
    programs = json.loads(file.read_text())["programs"]
    assert len(programs) == 2 * 2 * len(CUDA_SHAPES)
    for program in programs:
        assert program["spilt"] == program["stack"] == 0, program
        assert 16 <= program["registers"] <= 255
        row = f"| {tuple(program['shape'])} {program['dtype']} |"
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(row))
        assert "; 0 / 0; " in line
    moved = {
        (tuple(program["shape"]), program["dtype"], program["kernel"]): program["bytes_a_logit"]
        for program in programs
    }
    assert moved[(65536, 1000), "bfloat16", "forward"] == 2 + 8 / 1000
    assert moved[(65536, 1000), "float32", "backward"] == 8 + 8 / 1000


def test_a_rehearsal_takes_every_step_and_measures_nothing(tmp_path):
    """In Triton's interpreter; compilers and the other frameworks have tests of their own."""
    for needed in ("torch", "triton"):
        load(needed)
    file = tmp_path / "rehearsal.json"
    code = f"""
from examples.bench.everything import Order, run_all
run_all(Order({str(file)!r}, "cpu", [], 0.01, True), 600, ["torch", "tests"])
"""
    env = os.environ | {"TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = json.loads(file.read_text())
    parts = found["parts"]
    assert parts["torch"]["state"] == parts["tests"]["state"] == "finished"
    assert parts["tests"]["passed"] == 3 and parts["tests"]["failing"] == {}
    assert {row["loss"] for row in parts["torch"]["results"]} >= {"ours", "cross-entropy"}
    assert parts["torch"]["copy_bandwidth"] > 0 and parts["torch"]["missing"] == {}
    assert {"CPU", "date"} <= set(found["about"]) and "torch" in parts["torch"]["about"]

    from examples.bench import pages

    with pytest.raises(SystemExit, match="is a rehearsal, which measures nothing"):
        pages.tables([str(file)])


def test_the_kernel_is_what_a_rehearsal_runs():
    """Its settings lead the benchmark's own loss to the Triton kernel."""
    for needed in ("torch", "triton"):
        load(needed)
    from examples.bench.everything import REHEARSAL

    code = """
import os
from examples.bench.torch import contenders
from lmf_multi.torch import _triton_kernels

launched, run = [], _triton_kernels.mixture.run
_triton_kernels.mixture.run = lambda *a, **k: launched.append(1) or run(*a, **k)
ours = contenders((4, 3), "float32", "cpu")["ours"]
for more in ({}, {"LMF_MULTI_TRITON": "1"}):
    os.environ |= more
    ours.call()
    print(len(launched))
"""
    env = os.environ | REHEARSAL
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["2", "2"]  # a forward and a backward pass, and then none


def test_each_outcome_is_told_once(tmp_path):
    """By whichever process: workers of xdist report to the one that began them."""
    (tmp_path / "test_it.py").write_text(
        "def test_one():\n    pass\n\n\ndef test_two():\n    assert 0\n"
    )
    options = ["-p", "examples.bench.outcomes", "-p", "no:cacheprovider", "-c", os.devnull]
    for workers in (0, 2):
        file = tmp_path / f"outcomes-{workers}"
        command = [sys.executable, "-m", "pytest", *options, "-n", str(workers), tmp_path]
        env = os.environ | {"OUTCOMES": str(file)}
        subprocess.run(command, capture_output=True, env=env)
        lines = map(json.loads, file.read_text().splitlines())
        found = sorted((line["test"].rpartition(":")[2], line["outcome"]) for line in lines)
        assert found == [("test_one", "passed"), ("test_two", "failed")]


def made_up(**about):
    """What --all leaves on a GPU's machine, with two shapes of which one is incomplete."""
    names = ["cross-entropy", "ours", "cross-entropy, compiled", "ours, compiled", LIGER]
    names += ["cross-entropy, CUDA graph", "ours, CUDA graph"]
    milliseconds = {"cross-entropy": 2.0, "ours": 0.8, "cross-entropy, compiled": 1.0}
    milliseconds["ours, CUDA graph"] = 0.8
    rows = []
    for shape, losses in (((65536, 1000), names), ((8, 5, 512, 512), names[:2])):
        for loss in losses:
            time, peer = milliseconds.get(loss, 1.0), 2.0 if "comp" not in loss else 1.0
            ratio = time / peer
            over = {other: time / milliseconds.get(other, 1.0) for other in losses}
            figures = {"milliseconds": time, "ratio": ratio, "ratio_low": ratio, "copies": 1.6}
            figures |= {"ratio_high": ratio + 0.01, "memory": 1.0, "over": over}
            rows.append({"shape": shape, "dtype": "float32", "loss": loss, **figures})
    missing = {"(8, 5, 512, 512) float32 ours, compiled": "TimeoutError: not ready within 7 s"}
    tests = {"passed": 9, "failed": 1, "skipped": 0, "failing": {"test_x": "E 1 != 2"}}
    parts = {
        "torch": {"results": rows, "missing": missing, "state": "finished", "about": {"torch": 2}},
        "tests": {**tests, "state": "finished"},
        "keras": {"state": "not installed: tensorflow"},
    }
    about = {"CPU": "a CPU, 2 cores", "date": "2026-11-26", **about}
    device = "cuda" if "GPU" in about else "cpu"
    return {"rehearsal": False, "device": device, "about": about, "parts": parts}


LIGER = "Liger's cross-entropy"


def test_tables_name_the_processor_of_each_row(tmp_path):
    """And say what was not measured; a loss without its cross-entropy has no row."""
    from examples.bench import pages

    files = []
    for name, about in (("gpu", {"GPU": "a GPU"}), ("cpu", {}), ("other", {"CPU": "another"})):
        files.append(tmp_path / name)
        files[-1].write_text(json.dumps(made_up(**about)))
    lines = pages.tables(map(str, files)).splitlines()
    header = "| processor | (65536, 1000) | (8, 5, 512, 512) |"
    assert lines.count(f"| time over plain cross-entropy's {header}") == 2  # CPUs' and GPUs'
    assert "| PyTorch, eager | a CPU, 2 cores | 0.40 (0.40–0.41) | 0.40 (0.40–0.41) |" in lines
    assert "| PyTorch, eager | another | 0.40 (0.40–0.41) | 0.40 (0.40–0.41) |" in lines
    assert "| PyTorch, eager, float32 | a GPU | 0.80 |" in lines  # over the compiled one
    assert "| PyTorch, CUDA graph, float32 | a GPU | 0.80 |" not in lines  # no fair comparison
    # 12 bytes and two labels for each logit in 0.8 ms; 1.6 times as long as 8
    speed = (12 + 16 / 1000) * 65536 * 1000 / 0.8e-3 / 1e9
    start = f"| PyTorch, CUDA graph, float32 | a GPU | 94% ({speed:.0f} GB/s) |"
    assert any(line.startswith(start) for line in lines)
    assert "tests: 9 passed, 1 failed, 0 skipped (finished)" in lines
    assert "failed: test_x: E 1 != 2" in lines
    assert "keras: not installed: tensorflow" in lines
    assert any(line.endswith("compiled: TimeoutError: not ready within 7 s") for line in lines)


def test_what_is_slow_or_fails_leaves_time_for_the_rest():
    """Within a limit; without one a failure is an error."""
    from examples.bench.measure import Run, figures, host_clock

    def fail():
        raise ValueError("no such\nthing")

    def hang():
        time.sleep(60)

    def work():
        time.sleep(1e-4)

    def contenders(shape, dtype, device):
        calls = {"copy": work, "cross-entropy": work, "ours": work, "published formula": fail}
        calls |= {"cross-entropy, compiled": hang, "ours, compiled": work}
        return {name: Run(call, lambda: 12) for name, call in calls.items()}

    framework = SimpleNamespace(contenders=contenders, clock=host_clock)
    cells = [((3, 1), "float32"), ((6, 1), "float32")]
    measured = list(figures(framework, cells, "cpu", 0.01, limit=6.0))
    assert len(measured) == 2
    for (shape, dtype), (results, missing) in zip(cells, measured, strict=True):
        assert [result.loss for result in results] == ["cross-entropy", "ours"]
        assert results[1].memory == 12 / (4 * shape[0])
        assert missing[f"{shape} {dtype} published formula"] == "ValueError: no such thing"
        assert missing[f"{shape} {dtype} cross-entropy, compiled"].startswith("TimeoutError: not")
        reason = "there is no cross-entropy, compiled to compare with"
        assert missing[f"{shape} {dtype} ours, compiled"] == reason
    with pytest.raises(ValueError, match="no such"):
        list(figures(framework, cells, "cpu", 0.01))


def test_a_part_that_hangs_or_fails_leaves_the_rest(tmp_path, capfd, monkeypatch):
    """And what it had written until then."""
    from examples.bench import everything

    half = '{"results": [1], "missing": {}}'
    bodies = {
        "torch": f"open(file, 'w').write('{half}'); time.sleep(60)",
        "jax": "raise SystemExit('no GPU')",
        "sm_80": f"open(file, 'w').write('{half}')",
    }

    def command_of(name, order, limit, part):
        code = f"import time; file = {str(part)!r}; {bodies[name]}"
        return [sys.executable, "-c", code], dict(os.environ)

    monkeypatch.setattr(everything, "command_of", command_of)
    file = tmp_path / "all.json"
    order = everything.Order(str(file), "cpu", [], 0.1, False)
    everything.run_all(order, 4.0, bodies)
    parts = json.loads(file.read_text())["parts"]
    assert {name: part["state"] for name, part in parts.items()} == {
        "torch": "out of time",
        "jax": "failed: exit status 1: no GPU",
        "sm_80": "finished",
    }
    assert parts["torch"]["results"] == parts["sm_80"]["results"] == [1]
    assert "no GPU" in capfd.readouterr().err
