"""The documentation's loss explorer, in a browser: what it shows is what the library computes."""

import html
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest

from lmf_multi import LMFSpec, reference
from tests.browser import visit
from tests.frameworks import load

EXPLORER = Path(__file__).parents[1] / "docs" / "explorer"
COUNTS = (6705, 1113, 514, 115)

# What a visitor does, between braces so that its names are not the page's.
VISITOR = """<script>{
const by = (id) => document.getElementById(id);
const follow = async (hash) => {
  const arrived = new Promise((done) => addEventListener("hashchange", done, { once: true }));
  location.hash = hash;
  await arrived;
};
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const enter = (id, value) => {
  by(id).value = value;
  by(id).dispatchEvent(new Event("input", { bubbles: true }));
};
const readout = () => Object.fromEntries([...by("readout").tBodies[0].rows].map((row) => {
  const values = [...row.cells].map((cell) => ({ ...cell.dataset }));
  return [row.dataset.line, Object.assign({ name: row.cells[0].textContent }, ...values)];
}));
const curves = () => [...document.querySelectorAll("figure svg path.line")].map(
  (path) => path.getAttribute("d")
);
const names = ["class_counts", "alpha", "beta", "gamma", "max_margin", "scale", "class_weight",
  "logit_adjustment", "at", "axis", "framework"];
const fields = () => Object.fromEntries(names.map((name) => [name, by(name).value]));
const page = () => ({
  readout: readout(), curves: curves(), fields: fields(), preset: by("preset").value,
  code: by("code").textContent,
});
const visitor = async () => { WHAT };
const tell = (seen) => {
  const told = JSON.stringify(seen);
  if (parent === window) document.body.dataset.seen = told;
  else parent.postMessage(told, "*");
};
visitor().then(tell, (error) => tell(`it failed: ${error}`));
}</script>"""


@pytest.fixture
def explore(tmp_path):
    """Do something in the page, as JavaScript that returns what it saw."""

    def explore(what, *, fragment="", mistake=None):
        for name in ("explorer.js", "explorer.css"):
            shutil.copy(EXPLORER / name, tmp_path)
        if mistake:
            right, wrong = mistake
            script = (EXPLORER / "explorer.js").read_text(encoding="utf-8")
            assert script.count(right) == 1
            (tmp_path / "explorer.js").write_text(script.replace(right, wrong), encoding="utf-8")
        dom, console = visit(tmp_path, visited(what), fragment=fragment, patience=30)
        assert console == []
        return seen_in(dom)

    return explore


def visited(what):
    page = (EXPLORER / "index.html").read_text(encoding="utf-8")
    return page.replace("</body>", VISITOR.replace("WHAT", what) + "</body>")


def seen_in(dom):
    return json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', dom)[1]))


def address(spec, **shown):
    """The page's address of a specification; ``at`` is where it is read."""
    settings = {name: value for name, value in asdict(spec).items() if name != "label_smoothing"}
    settings["class_counts"] = ",".join(map(str, spec.class_counts))
    return "#" + urlencode(settings | shown, safe=",")


def each(addresses, what):
    """JavaScript: follow one after the other, each of which differs from the one before."""
    return (
        f"const seen = []; for (const hash of {json.dumps(addresses)}) "
        f"{{ await follow(hash); seen.push({what}); }} return seen;"
    )


def logits_at(log_odds, label, num_classes):
    """In which label has these log-odds, and the other classes have equal logits."""
    z = np.full(num_classes, -np.log(num_classes - 1))
    z[label] = log_odds
    return z


def definition(spec, log_odds, label):
    """Loss and the gradient for the label's logit, by the reference."""
    value, gradient = reference.lmf_loss_and_grad(
        logits_at(log_odds, label, spec.num_classes)[None],
        [label],
        spec.margins,
        spec.weights,
        alpha=spec.alpha,
        beta=spec.beta,
        gamma=spec.gamma,
        scale=spec.scale,
        logit_adjustment=spec.adjustments,
        reduction="none",
    )
    return value[0], gradient[0, label]


def frequent_and_rarest(spec):
    n = np.array(spec.class_counts)
    return {"frequent": int(n.argmax()), "rarest": len(n) - 1 - int(n[::-1].argmin())}


def compare(readout, spec, log_odds):
    """What the page shows with the reference, as tight as logarithms of two libraries allow."""
    close = {"rtol": 1e-13, "atol": 1e-300}
    for line, label in frequent_and_rarest(spec).items():
        shown = readout[line]
        assert shown["name"].endswith(f"class {label} ({spec.class_counts[label]})")
        np.testing.assert_allclose(float(shown["margin"]), spec.margins[label], **close)
        np.testing.assert_allclose(float(shown["weight"]), spec.weights[label], **close)
        found = float(shown["loss"]), float(shown["gradient"])
        np.testing.assert_allclose(found, definition(spec, log_odds, label), **close)
    plain = LMFSpec(spec.class_counts, alpha=0, gamma=0, class_weight=None)
    found = [float(readout["plain"][name]) for name in ("loss", "gradient")]
    np.testing.assert_allclose(found, definition(plain, log_odds, 0), **close)


BY_HAND = [
    (LMFSpec(COUNTS), 0.0),
    (LMFSpec(COUNTS), -0.5),
    (LMFSpec(COUNTS, scale=64), 8.0),
    (LMFSpec(COUNTS, scale=64, logit_adjustment=1), -8.0),
    (LMFSpec(COUNTS, alpha=0, gamma=0.5, class_weight="effective"), 6.0),
    (LMFSpec(COUNTS, alpha=0, gamma=0, class_weight="balanced", logit_adjustment=-1), 1.0),
    (LMFSpec(COUNTS, beta=0, max_margin=4, class_weight=None), 2.5),
    (LMFSpec(COUNTS, alpha=0, beta=0), 1.0),
    (LMFSpec([90, 10], gamma=0.01, scale=0.5), 300.0),  # e^-300
    (LMFSpec([90, 10], gamma=0.01, scale=0.5), -1e6),
    (LMFSpec([1, 1], scale=1e-3, class_weight="effective"), -3.0),
    (LMFSpec([3, 5, 5, 3], class_weight="complement", logit_adjustment=2), 0.05),
    (LMFSpec([10**6, 1, 10**6], class_weight="effective", gamma=50), -0.25),
    (LMFSpec([2**53, 3, 1], class_weight="balanced", scale=3, logit_adjustment=0.7), -7.95),
    (LMFSpec.recommended([5, 50, 500, 5000]), 3.0),
]


def at_random(number):
    rng = np.random.default_rng(0)
    for _ in range(number):
        options = {
            "alpha": rng.choice([0, 0.3, 1, 2.5]),
            "beta": rng.choice([0, 0.7, 1, 3]),
            "gamma": rng.choice([0, 0.2, 1, 1.5, 5]),
            "max_margin": rng.choice([0.01, 0.5, 2]),
            "scale": rng.choice([0.1, 1, 5, 30, 64]),
            "class_weight": [None, "margin", "complement", "balanced", "effective"][rng.choice(5)],
            "logit_adjustment": rng.choice([-1, 0, 0.35, 1, 2]),
        }
        counts = (10 ** rng.uniform(0, 5, rng.integers(2, 13))).astype(int)
        yield LMFSpec(counts, **options), float(rng.uniform(-8, 8))


POINTS = [*BY_HAND, *at_random(60)]


def test_the_points_differ():
    assert len({(repr(spec), log_odds) for spec, log_odds in POINTS}) == len(POINTS) == 75
    assert len({spec.num_classes for spec, _ in POINTS}) > 9


def read_at(points):
    return each([address(spec, at=log_odds) for spec, log_odds in points], "readout()")


def test_values_and_gradients_are_those_of_the_reference(explore):
    for readout, (spec, log_odds) in zip(explore(read_at(POINTS)), POINTS, strict=True):
        compare(readout, spec, log_odds)


def test_a_mistake_of_a_billionth_would_be_seen(explore):
    mistake = ("w[y] * α,", "w[y] * α * (1 + 1e-9),")
    (readout,) = explore(read_at(POINTS[1:2]), mistake=mistake)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(readout, *POINTS[1])


PRESETS = {
    "published": LMFSpec(COUNTS),
    "recommended": LMFSpec.recommended(COUNTS),
    "cross_entropy": LMFSpec(COUNTS, alpha=0, gamma=0, class_weight=None),
    "focal": LMFSpec(COUNTS, alpha=0, class_weight=None),
    "ldam": LMFSpec(COUNTS, alpha=1, beta=0, class_weight=None),
    "balanced_softmax": LMFSpec(COUNTS, alpha=0, gamma=0, class_weight=None, logit_adjustment=1),
}
LIBRARY = {
    "published": reference.LMFLoss(COUNTS, reduction="none"),
    "recommended": reference.LMFLoss.from_spec(LMFSpec.recommended(COUNTS), reduction="none"),
    "cross_entropy": reference.FocalLoss(gamma=0, reduction="none"),
    "focal": reference.FocalLoss(reduction="none"),
    "ldam": reference.LDAMLoss(COUNTS, reduction="none"),
    "balanced_softmax": reference.FocalLoss(COUNTS, gamma=0, logit_adjustment=1, reduction="none"),
}


def test_presets_are_the_library_s(explore):
    chosen = """
        const seen = {};
        enter("at", "-0.4");
        for (const { value } of by("preset").options) {
          enter("gamma", "3.3");
          enter("scale", "7");
          enter("preset", value);
          seen[value] = page();
        }
        return seen;
    """
    seen = explore(chosen)
    assert seen.pop("own")["preset"] == "own"  # which changes nothing
    assert seen.keys() == PRESETS.keys() == LIBRARY.keys()
    for name, page in seen.items():
        assert page["preset"] == name
        settings = {key: json.loads(v) for key, v in page["fields"].items() if key in NUMBERS}
        weight = page["fields"]["class_weight"]
        settings["class_weight"] = None if weight == "None" else weight
        assert LMFSpec(COUNTS, **settings) == PRESETS[name]
        compare(page["readout"], PRESETS[name], -0.4)
        for line, label in frequent_and_rarest(PRESETS[name]).items():
            value = LIBRARY[name](logits_at(-0.4, label, 4)[None], np.array([label]))
            np.testing.assert_allclose(float(page["readout"][line]["loss"]), value, rtol=1e-13)


CALLED = [
    *(spec for spec, _ in POINTS[:20]),
    *PRESETS.values(),
    LMFSpec(range(1, 60), class_weight=None),
    LMFSpec([2**53, 1], alpha=1e-7, beta=1e21),
]


@pytest.mark.parametrize("framework", ["torch", "jax", "keras"])
def test_the_call_builds_the_loss_that_is_shown(framework, explore):
    load(framework)
    addresses = [address(spec, framework=framework, at=i) for i, spec in enumerate(CALLED)]
    codes = explore(each(addresses, "page().code"))
    for code, spec in zip(codes, CALLED, strict=True):
        names = {}
        exec(code, names)
        loss = names[{"torch": "criterion", "jax": "loss_fn", "keras": "loss"}[framework]]
        expected = names["LMFLoss"].from_spec(spec)
        assert arguments(loss) == arguments(expected)
        for name in (n for n in NUMBERS if n not in code):
            assert getattr(spec, name) == getattr(LMFSpec(COUNTS), name)
        assert len(names) == 3  # with __builtins__: one import, one loss


def arguments(loss):
    return loss.get_config() if hasattr(loss, "get_config") else repr(loss)


NUMBERS = ("alpha", "beta", "gamma", "max_margin", "scale", "logit_adjustment")
# Field, what is typed, and its sentence, or what the library's sentence goes on with.
FAULTS = [
    ("class_counts", "12", "class_counts must hold one count for each of at least 2 classes, got 12"
    "; separate them by commas or spaces"),
    ("class_counts", " , ", "class_counts must hold one count for each of at least 2 classes, "
    "got nothing; separate them by commas or spaces"),
    ("class_counts", "90; 10", "class_counts must be numbers, got 90; for class 0"
    "; separate them by commas or spaces"),
    ("class_counts", "90, 0", LMFSpec),
    ("class_counts", "0.9 0.1", LMFSpec),
    ("class_counts", "90 -1", LMFSpec),
    ("class_counts", "1 9007199254740993000", "class_counts must be at most 9007199254740992, "
    "got 9007199254740993000 for class 1; divide all of them by one number"),
    ("alpha", "-1", "; 0 leaves the LDAM term out"),
    ("beta", "-0.5", "; 0 leaves the focal term out"),
    ("gamma", "-2", "; 0 turns the focal term into cross-entropy"),
    ("max_margin", "0", "; 0.5 is the default"),
    ("scale", "0", "; 1 leaves the logits as they are"),
    ("scale", "", "scale must be a number, got nothing; 1 leaves the logits as they are"),
    ("alpha", "0x10", "alpha must be a number, got 0x10; 0 leaves the LDAM term out"),
    ("logit_adjustment", "one", "logit_adjustment must be a number, got one; 0 leaves it out"),
    ("gamma", "1e999", "gamma must be finite, got 1e999"
    "; 0 turns the focal term into cross-entropy"),
    ("at", "-", "at must be a number, got -; the plots go from -8 to 8"),
]  # fmt: skip


def sentence(field, typed, expected):
    """As it stands, or as the library says it."""
    if isinstance(expected, str) and not expected.startswith(";"):
        return expected
    with pytest.raises(ValueError) as error:
        if field == "class_counts":
            LMFSpec([float(word) for word in re.findall(r"[-.\d]+", typed)])
        else:
            LMFSpec(COUNTS, **{field: json.loads(typed)})
    return str(error.value) + (expected if isinstance(expected, str) else "")


def test_bad_input_gives_one_sentence_and_the_plot_stays(explore):
    seen = explore(
        """
        await follow("#scale=2&alpha=0.75&at=1.5");
        const fields_ = JSON.stringify(fields());
        const look = () => JSON.stringify([readout(), curves(), page().code, location.hash]);
        const before = look(), seen = [];
        for (const [field, typed] of FAULTS) {
          const good = by(field).value;
          enter(field, typed);
          await pause(300);
          const sentences = [...document.querySelectorAll(".error")].filter((e) => e.textContent);
          seen.push([
            sentences.map((e) => [e.id, e.textContent]), look() === before,
            by(field).getAttribute("aria-invalid"), by(field).value === typed,
            by(field).getAttribute("aria-describedby"),
          ]);
          by(field).value = good;
          by(field).dispatchEvent(new Event("input"));
          if (by(`${field}_error`).textContent !== "") throw "a sentence stays";
        }
        if (JSON.stringify(fields()) !== fields_) throw "a field has changed";
        return seen;
        """.replace("FAULTS", json.dumps([fault[:2] for fault in FAULTS]))
    )
    for (field, typed, expected), found in zip(FAULTS, seen, strict=True):
        error = f"{field}_error"
        assert found[0] == [[error, sentence(field, typed, expected).replace(".0,", ",")]], typed
        assert found[1:] == [True, "true", True, error]


def test_a_link_at_fault_says_so_and_shows_the_defaults(explore):
    sentences, page, start = explore(
        """
        const sentences = [...document.querySelectorAll(".error")].map((e) => e.textContent);
        const first = page();
        await follow("#");
        return [sentences.filter(Boolean), first, page()];
        """,
        fragment="#gama=2&class_weight=rare&alpha=-1",
    )
    assert sentences == [
        "the address must hold settings of this page, got gama; they are class_counts, alpha, "
        "beta, gamma, max_margin, scale, class_weight, logit_adjustment, at, axis, framework",
        "class_weight must be one of margin, complement, balanced, effective, None, got rare; "
        "choose one here",
        "alpha must be at least 0, got -1; 0 leaves the LDAM term out",
    ]
    for name in ("readout", "curves", "code"):
        assert page[name] == start[name]
    compare(start["readout"], LMFSpec(COUNTS), 0.0)


def test_a_setting_can_be_linked(explore):
    changed, fragment = explore(
        """
        enter("class_counts", " 70 20,10\\t1 ");
        enter("class_weight", "balanced");
        enter("scale_slider", "12.5");
        enter("beta", "1e+21");
        enter("at_slider", "-2.35");
        enter("axis", "logarithmic");
        enter("framework", "jax");
        const before = history.length;
        await pause(300);
        if (history.length !== before) throw "a way back for each pixel";
        return [page(), location.hash];
        """
    )
    assert fragment.startswith("#class_counts=70,20,10,1&alpha=1.5&")
    linked = explore("return page();", fragment=fragment)
    for name in ("readout", "curves", "code", "preset"):
        assert linked[name] == changed[name]
    counts, beta = "70,20,10,1", "1e+21"
    assert linked["fields"] == changed["fields"] | {"class_counts": counts, "beta": beta}
    spec = LMFSpec([70, 20, 10, 1], scale=12.5, beta=1e21, class_weight="balanced")
    compare(linked["readout"], spec, -2.35)


def test_pointer_and_slider_move_the_readout(explore):
    moved, slid, spoken, probability = explore(
        """
        const svg = by("gradient"), box = svg.getBoundingClientRect();
        const [left, right] = [...svg.querySelectorAll("text[text-anchor=middle]")]
          .filter((tick) => ["−8", "8"].includes(tick.textContent))
          .map((tick) => Number(tick.getAttribute("x")));
        const clientX = box.left + left + (right - left) * (8 + 2.5) / 16;
        svg.dispatchEvent(new PointerEvent("pointermove", { clientX }));
        const moved = page();
        enter("at_slider", "-1.05");
        const slid = page();
        return [moved, slid, by("at_slider").ariaValueText, by("probability").textContent];
        """
    )
    assert moved["fields"]["at"] == "2.5" and slid["fields"]["at"] == "-1.05"
    compare(moved["readout"], LMFSpec(COUNTS), 2.5)
    compare(slid["readout"], LMFSpec(COUNTS), -1.05)
    assert moved["curves"] == slid["curves"]
    losses = [f"{line} {float(slid['readout'][line]['loss']):.4g}" for line in slid["readout"]]
    assert spoken == f"-1.05; loss: {', '.join(losses)}" and len(losses) == 3
    assert probability == f"{1 / (1 + np.exp(1.05)):.4g}"


@pytest.mark.parametrize(
    "spec",
    [LMFSpec(COUNTS, scale=2, logit_adjustment=1), LMFSpec(COUNTS, alpha=4e5, scale=1, beta=0)],
    ids=["small", "large"],
)
def test_the_curves_are_the_values(spec, explore):
    """Read off the axes: 401 points on each line, at the height that its value has."""
    points = explore(
        """
        const number = (text) => Number(text.replaceAll("−", "-"));
        const ticks = (svg, anchor) => [...svg.querySelectorAll(`text[text-anchor=${anchor}]`)]
          .map((t) => [number(t.textContent), Number(t.getAttribute(anchor === "end" ? "y" : "x"))])
          .filter(([value]) => Number.isFinite(value));
        const seen = {};
        for (const id of ["loss", "gradient"]) seen[id] = {
          x: ticks(by(id), "middle"), y: ticks(by(id), "end"),
          paths: [...by(id).querySelectorAll("path.line")].map((p) => p.getAttribute("d")),
        };
        return seen;
        """,
        fragment=address(spec),
    )
    for index, id in enumerate(("loss", "gradient")):
        for (line, label), path in zip(
            frequent_and_rarest(spec).items(), points[id]["paths"], strict=False
        ):
            xy = np.array([point.split(",") for point in path[1:].split("L")], float)
            assert len(xy) == 401, line
            (x_slope, x_at_0), (y_slope, y_at_0) = (
                np.polyfit(*np.array(points[id][axis]).T, 1) for axis in "xy"
            )
            log_odds = (xy[:, 0] - x_at_0) / x_slope
            np.testing.assert_allclose(log_odds, np.linspace(-8, 8, 401), atol=0.01)
            height = (xy[:, 1] - (y_at_0 - 4)) / y_slope  # a number is set 4 px below its line
            values = [definition(spec, each, label)[index] for each in np.linspace(-8, 8, 401)]
            np.testing.assert_allclose(height, values, atol=abs(0.05 / y_slope))


def test_the_code_is_copied_or_selected(explore):
    copied, refused, code = explore(
        """
        const again = { configurable: true };
        let written = null;
        const clipboard = (writeText) =>
          Object.defineProperty(navigator, "clipboard", { get: () => ({ writeText }), ...again });
        clipboard(async (text) => { written = text; });
        by("copy").click();
        await pause(10);
        const copied = [written, by("copied").textContent];
        clipboard(async () => { throw new Error("no permission"); });
        by("copy").click();
        await pause(10);
        return [copied, [String(getSelection()), by("copied").textContent], by("code").textContent];
        """
    )
    assert copied == [code, "Copied."]
    assert refused[0].strip() == code.strip() and refused[1].startswith("The browser refused; ")


def test_numbers_beyond_the_sliders_are_drawn(explore):
    huge = [
        replace(LMFSpec(COUNTS), **{name: number}) for name in NUMBERS for number in (1e308, 1e-308)
    ]
    addresses = [address(spec, axis=axis) for spec in huge for axis in ("linear", "logarithmic")]
    markup = "[...document.querySelectorAll('figure svg')].map((svg) => svg.outerHTML)"
    seen = explore(each(addresses, markup))
    for svgs in seen:
        for svg in svgs:
            assert svg.count('class="line ') == 3 and 4 < svg.count("<text") < 25
            assert "NaN" not in re.sub('aria-label="[^"]*"', "", svg)
            assert "Infinity" not in re.sub('aria-label="[^"]*"', "", svg)


# --- how it looks

LOOK = """
  const colour = (element, name) => getComputedStyle(element)[name];
  const outside = [];
  for (const svg of document.querySelectorAll("figure svg")) {
    const box = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")];
    const boxes = texts.map((t) => t.getBoundingClientRect());
    boxes.forEach((b, i) => {
      if (b.left < box.left || b.right > box.right || b.top < box.top || b.bottom > box.bottom)
        outside.push(texts[i].textContent);
      boxes.slice(0, i).forEach((c, j) => {
        if (b.left < c.right && c.left < b.right && b.top + 3 < c.bottom && c.top + 3 < b.bottom)
          outside.push(`${texts[i].textContent} over ${texts[j].textContent}`);
      });
    });
  }
  const controls = [...document.querySelectorAll("input, select, button, pre[tabindex]")];
  const curves = [...document.querySelectorAll("#loss path.line")];
  const first = (selector) => document.querySelector(selector);
  return {
    width: innerWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    scroll: [document.documentElement, first(".wide")].map((e) => e.scrollWidth - e.clientWidth),
    right: Math.max(...controls.map((c) => c.getBoundingClientRect().right)),
    outside,
    unnamed: controls.filter((c) => !(c.labels?.length || c.ariaLabel || c.matches("button")))
      .map((c) => c.id),
    unreachable: controls.filter((c) => c.tabIndex !== 0).map((c) => c.id),
    ground: colour(document.body, "backgroundColor"),
    texts: ["body", "a", "figure svg text", ".note", "#alpha_error", "th span"].map((s) =>
      colour(first(s), s.includes("svg") ? "fill" : "color")),
    lines: curves.map((path) => colour(path, "stroke")),
    dashes: curves.map((path) => colour(path, "strokeDasharray")),
  };
"""
# A window is at least 500 pixels wide, a frame is not.
FRAMES = """<!doctype html><meta name="color-scheme" content="light dark"><body><script>
const seen = [];
addEventListener("message", ({ data }) => {
  seen.push(JSON.parse(data));
  document.body.dataset.seen = JSON.stringify(seen);
});
for (const width of [400, 800, 1400]) for (const hash of ["", "#alpha=-1", "HASH"])
  document.body.insertAdjacentHTML("beforeend",
    `<iframe style="width: ${width}px; height: 900px; border: 0" src="inner.html${hash}">`);
</script>"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width_and_is_legible_in_both_schemes(scheme, tmp_path):
    shutil.copytree(EXPLORER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "inner.html").write_text(visited(LOOK), encoding="utf-8")
    wide = address(LMFSpec([10**9] * 50, scale=1e5, class_weight="balanced"), at=-3.35)
    frames = FRAMES.replace("HASH", wide + "&axis=logarithmic")
    dom, console = visit(tmp_path, frames, scheme, width=1500, patience=30)
    assert console == []
    seen = seen_in(dom)
    assert sorted(look["width"] for look in seen) == sorted([400, 800, 1400] * 3)
    for look in seen:
        assert look["dark"] == (scheme == "dark")
        assert look["scroll"] == [0, 0] and look["right"] <= look["width"]
        assert look["outside"] == look["unnamed"] == look["unreachable"] == []
        for text in look["texts"]:
            assert contrast(text, look["ground"]) >= 4.5  # WCAG 2.2, 1.4.3
        for line in look["lines"]:
            assert contrast(line, look["ground"]) >= 3  # 1.4.11
        assert len(set(look["dashes"])) == len(set(look["lines"])) == 3


def contrast(one, other):
    """WCAG's ratio of relative luminances, of two colours as ``rgb(0, 114, 178)``."""

    def luminance(colour):
        c = np.array(re.findall(r"\d+", colour)[:3], float) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722] + 0.05

    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return light / dark


def test_contrast():
    np.testing.assert_allclose(contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)"), 21)
    assert round(contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)"), 2) == 4.48


def test_it_needs_nothing_but_its_own_files():
    page = (EXPLORER / "index.html").read_text(encoding="utf-8")
    assert sorted(re.findall(r'(?:src|href)="([^"]*)"', page)) == [
        "../", "explorer.css", "explorer.js",
    ]  # fmt: skip
    for name in ("index.html", "explorer.js", "explorer.css"):
        text = (EXPLORER / name).read_text(encoding="utf-8")
        assert not re.search(r"http|//www|url\((?!#)|@import|fetch\(|\bimport\(", text), name
