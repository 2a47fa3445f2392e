"use strict";

// --- the loss: names, steps and order of lmf_multi/spec.py and lmf_multi/reference.py, whose
// --- legend of symbols is in lmf_multi/_terms.py; one example with an integer label

const sum = (values) => values.reduce((total, value) => total + value, 0);

function classMargins(n, max_margin) {
  const rarest = Math.min(...n);
  return n.map((n_j) => max_margin * (rarest / n_j) ** 0.25);
}

function logPriors(n) {
  const N = sum(n);
  return n.map((n_j) => Math.log(n_j / N));
}

function classWeights(n, scheme, max_margin, effective_beta = 0.9999) {
  const N = sum(n), C = n.length;
  if (scheme === "margin") return classMargins(n, max_margin);
  if (scheme === "complement") return n.map((n_j) => (1 - n_j / N) / (C - 1));
  if (scheme === "balanced") return n.map((n_j) => N / (C * n_j));
  if (scheme === "effective") {
    // 1 - b^n without the cancellation that b close to 1 would bring
    const inverse = n.map((n_j) => -1 / Math.expm1(n_j * Math.log(effective_beta)));
    return inverse.map((value) => value * (C / sum(inverse)));
  }
  return n.map(() => 1);
}

const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

// softplus(-τ) and its slope, with τ = ω(s z) - s Δ
function ldam(τ, s) {
  return [softplus(-τ), -s * Math.exp(-softplus(τ))];
}

// sigmoid(-ω)^γ softplus(-ω) and its slope; the power in log space has no bad point
function focal(ω, γ) {
  const ce = softplus(-ω), modulation = Math.exp(-γ * softplus(ω));
  const p = Math.exp(-ce), miss = Math.exp(-softplus(ω));
  return [modulation * ce, -modulation * (γ * p * ce + miss)];
}

// w_y (α LDAM_y + β Focal_y) of the logits z, and its derivative for z_y
function oneClass(z, y, { Δ, w, α, β, γ, s, o }) {
  const others = z.toSpliced(y, 1), added = o.toSpliced(y, 1);
  const sums = others.map((z_k, k) => z_k + added[k]);
  const top = sums.indexOf(Math.max(...sums)), M = others[top];
  const d = z[y] - M + (o[y] - added[top]);
  const x = others.map((z_k, k) => z_k - M + (added[k] - added[top]));
  const S_s = sum(x.map((x_k) => Math.exp(s * x_k))), S = sum(x.map(Math.exp));
  const [ldam_y, ldam_slope] = ldam(s * (d - Δ[y]) - Math.log(S_s), s);
  const [focal_y, focal_slope] = focal(d - Math.log(S), γ);
  const a = w[y] * α, b = w[y] * β;
  return [a * ldam_y + b * focal_y, a * ldam_slope + b * focal_slope];
}

// The model's own logits: ω is z_y - log Σ_k≠y e^z_k, and the other classes' logits are equal.
const logitsAt = (ω, y, C) => Array.from({ length: C }, (_, k) => (k === y ? ω : -Math.log(C - 1)));

// The three lines of both plots: each a function from ω to loss and gradient.
function linesOf(setting) {
  const n = setting.class_counts, C = n.length;
  const Δ = classMargins(n, setting.max_margin);
  const w = classWeights(n, setting.class_weight, setting.max_margin);
  const o = logPriors(n).map((value) => setting.logit_adjustment * value);
  const { alpha: α, beta: β, gamma: γ, scale: s } = setting;
  const line = (kind, name, y) => ({
    kind, name, examples: `class ${y} (${n[y]})`, margin: Δ[y], weight: w[y],
    at: (ω) => oneClass(logitsAt(ω, y, C), y, { Δ, w, α, β, γ, s, o }),
  });
  return [
    line("frequent", "most frequent", n.indexOf(Math.max(...n))),
    line("rarest", "rarest", n.lastIndexOf(Math.min(...n))),
    {
      kind: "plain", name: "cross-entropy", examples: "any class",
      at: (ω) => [softplus(-ω), -Math.exp(-softplus(ω))],
    },
  ];
}

// --- the setting: what LMFSpec takes, and how the page shows it; text in fields and in the address

const PUBLISHED = {
  alpha: 1.5, beta: 1, gamma: 1.5, max_margin: 0.5, scale: 30,
  class_weight: "margin", logit_adjustment: 0,
};
const PRESETS = {
  published: {},
  recommended: { alpha: 1, beta: 0, scale: 1, class_weight: "None", logit_adjustment: 1 },
  cross_entropy: { alpha: 0, gamma: 0, class_weight: "None" },
  focal: { alpha: 0, class_weight: "None" },
  ldam: { alpha: 1, beta: 0, class_weight: "None" },
  balanced_softmax: { alpha: 0, gamma: 0, class_weight: "None", logit_adjustment: 1 },
};
const SHOWN = { at: 0, axis: "linear", framework: "torch" };
const START = { class_counts: "6705, 1113, 514, 115", ...texts({ ...PUBLISHED, ...SHOWN }) };

function texts(values) {
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, String(value)]));
}

// Rule, whether it holds, remedy.
const RULES = {
  alpha: ["at least 0", (value) => value >= 0, "0 leaves the LDAM term out"],
  beta: ["at least 0", (value) => value >= 0, "0 leaves the focal term out"],
  gamma: ["at least 0", (value) => value >= 0, "0 turns the focal term into cross-entropy"],
  max_margin: ["positive", (value) => value > 0, "0.5 is the default"],
  scale: ["positive", (value) => value > 0, "1 leaves the logits as they are"],
  logit_adjustment: ["a number", () => true, "0 leaves it out"],
  at: ["a number", () => true, "the plots go from -8 to 8"],
};
const NUMERAL = /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i;

function checkedNumber(name, text) {
  const [rule, holds, remedy] = RULES[name], value = Number(text);
  const broken = !NUMERAL.test(text.trim()) ? "a number" : !Number.isFinite(value) ? "finite"
    : holds(value) ? null : rule;
  const got = text.trim() || "nothing";
  if (broken) throw RangeError(`${name} must be ${broken}, got ${got}; ${remedy}`);
  return value;
}

function checkedCounts(text) {
  const words = text.split(/[\s,]+/).filter((word) => word !== "");
  words.forEach((word, j) => {
    const value = Number(word), [rule, remedy] = !NUMERAL.test(word)
      ? ["numbers", "separate them by commas or spaces"]
      : !Number.isInteger(value) ? ["whole numbers", "pass numbers of examples, not frequencies"]
      : value < 1 ? ["at least 1 for every class", "drop the class or merge it with another"]
      : value > 2 ** 53 ? [`at most ${2 ** 53}`, "divide all of them by one number"]
      : [];
    const got = `${word} for class ${j}`;
    if (rule) throw RangeError(`class_counts must be ${rule}, got ${got}; ${remedy}`);
  });
  if (words.length < 2) {
    throw RangeError("class_counts must hold one count for each of at least 2 classes, "
      + `got ${words[0] ?? "nothing"}; separate them by commas or spaces`);
  }
  return words.map(Number);
}

function checkedChoice(name, text) {
  const choices = [...$(name).options].map((option) => option.value);
  if (choices.includes(text)) return text;
  const got = text || "nothing";
  throw RangeError(`${name} must be one of ${choices.join(", ")}, got ${got}; choose one here`);
}

function checked(name, text) {
  if (name === "class_counts") return checkedCounts(text);
  return name in RULES ? checkedNumber(name, text) : checkedChoice(name, text);
}

function presetOf(setting) {
  const same = (preset) => Object.entries({ ...PUBLISHED, ...preset })
    .every(([name, value]) => setting[name] === value);
  return Object.keys(PRESETS).find((key) => same(PRESETS[key])) ?? "own";
}

function pythonCall(setting) {
  const name = { torch: "criterion", jax: "loss_fn", keras: "loss" }[setting.framework];
  const written = (value) => (typeof value === "number" || value === "None" ? value : `"${value}"`);
  const options = Object.keys(PUBLISHED).filter((key) => setting[key] !== PUBLISHED[key])
    .map((key) => `${key}=${written(setting[key])}`);
  const given = [`[${setting.class_counts.join(", ")}]`, ...options];
  const short = `${name} = LMFLoss(${given.join(", ")})`;
  const call = short.length <= 88 ? short : `${name} = LMFLoss(\n    ${given.join(",\n    ")},\n)`;
  return `from lmf_multi.${setting.framework} import LMFLoss\n\n${call}\n`;
}

// --- the page

const $ = (id) => document.getElementById(id);
const [LEFT, RIGHT] = [-8, 8];
const GRID = Array.from({ length: 401 }, (_, i) => LEFT + (i * (RIGHT - LEFT)) / 400);
const shown = (value) => String(Number(value.toPrecision(4))).replaceAll("-", "−");

let text = { ...START }; // of every field
let good = null; // the last setting without a fault

function update() {
  const setting = {};
  let faults = 0;
  for (const name of Object.keys(START)) {
    const field = $(name);
    if (field.value !== text[name]) field.value = text[name];
    let sentence = "";
    try {
      setting[name] = checked(name, text[name]);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      [sentence, faults] = [error.message, faults + 1];
    }
    if (!sentence && name in RULES) $(`${name}_slider`).value = setting[name];
    $(`${name}_error`).textContent = sentence;
    field.setAttribute("aria-invalid", String(sentence !== ""));
  }
  if (faults === 0) {
    good = setting;
    $("preset").value = presetOf(good);
    $("code").textContent = pythonCall(good);
    draw();
  }
  return faults === 0;
}

function draw() {
  const lines = linesOf(good), values = lines.map((line) => line.at(good.at));
  $("readout").tBodies[0].replaceChildren(...lines.map((line, i) => row(line, values[i])));
  $("probability").textContent = shown(Math.exp(-softplus(-good.at)));
  const spoken = lines.map((line, i) => `${line.kind} ${shown(values[i][0])}`).join(", ");
  $("at_slider").ariaValueText = `${good.at}; loss: ${spoken}`;
  plot($("loss"), "Loss in nats", lines, 0);
  plot($("gradient"), "Gradient in nats per logit unit", lines, 1);
}

function row(line, [loss, gradient]) {
  const [tr, th, span] = ["tr", "th", "span"].map((name) => document.createElement(name));
  tr.dataset.line = line.kind;
  th.scope = "row";
  th.innerHTML = `<svg aria-hidden="true"><path class="line ${line.kind}" d="M0 5H34"/></svg>`;
  span.textContent = line.examples;
  th.append(`${line.name} `, span);
  tr.append(th);
  const { margin, weight } = line;
  for (const [name, value] of Object.entries({ margin, weight, loss, gradient })) {
    const td = tr.insertCell();
    td.textContent = value === undefined ? "–" : shown(value);
    td.dataset[name] = value ?? "";
  }
  return tr;
}

// Ticks, and where a value lies between the lowest and the highest of them.
function linearAxis(values) {
  const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)], rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const [first, last] = [Math.floor(low / step), Math.ceil(high / step)];
  const ticks = Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
  return { ticks, place: (value) => (value / step - first) / (last - first) };
}

function logarithmicAxis(values) {
  const decades = values.filter((value) => value > 0).map(Math.log10);
  const last = Math.ceil(Math.max(...decades));
  const first = Math.max(Math.floor(Math.min(...decades)), last - 8);
  const step = last - first > 5 ? 2 : 1, length = Math.floor((last - first) / step) + 1;
  const ticks = Array.from({ length }, (_, i) => Number(`1e${last - i * step}`));
  return { ticks, place: (value) => (Math.log10(value) - first) / (last - first) };
}

function tickText(value) {
  const far = value !== 0 && (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3);
  const round = Number(value.toPrecision(6)); // 3 · 0.2 is 0.6000000000000001
  return (far ? round.toExponential() : String(round)).replace("e+", "e").replaceAll("-", "−");
}

function plot(svg, title, lines, index) {
  const { width, height } = svg.getBoundingClientRect();
  if (width < 100) return; // not laid out yet: a change of its size draws it
  const logarithmic = good.axis === "logarithmic";
  const read = (line, ω) => (logarithmic ? Math.abs(line.at(ω)[index]) : line.at(ω)[index]);
  const curves = lines.map((line) => GRID.map((ω) => read(line, ω)));
  const marks = lines.map((line) => read(line, good.at));
  const values = curves.flat().filter((value) => Math.abs(value) < 1e300); // no NaN, room for ticks
  const { ticks, place } = logarithmic ? logarithmicAxis(values) : linearAxis(values);

  const [x0, x1, y0, y1] = [60, width - 12, height - 44, 10];
  const x = (ω) => x0 + ((ω - LEFT) / (RIGHT - LEFT)) * (x1 - x0);
  const y = (value) => y0 + Math.min(Math.max(place(value), -1), 2) * (y1 - y0);
  const path = (curve) => curve.map((value, i) => [x(GRID[i]), y(value)])
    .filter(([, height]) => !Number.isNaN(height))
    .map((point, i) => `${i ? "L" : "M"}${point.map((v) => v.toFixed(2))}`).join("");
  const at = good.at >= LEFT && good.at <= RIGHT ? x(good.at) : -100;
  const line = (kind, d) => `<path class="${kind}" d="${d}"/>`;
  const text = (x, y, side, words) =>
    `<text x="${x}" y="${y}" text-anchor="${side}">${words}</text>`;
  svg.innerHTML = [
    ...ticks.map((tick) => line(tick === 0 ? "zero" : "grid", `M${x0} ${y(tick)}H${x1}`)
      + text(x0 - 6, y(tick) + 4, "end", tickText(tick))),
    ...[-8, -6, -4, -2, 0, 2, 4, 6, 8].map((tick) => line("grid", `M${x(tick)} ${y0}V${y1}`)
      + text(x(tick), y0 + 18, "middle", tickText(tick))),
    text((x0 + x1) / 2, y0 + 38, "middle", "log-odds of the true class, logit units"),
    line("cursor", `M${at} ${y0}V${y1}`),
    `<clipPath id="${svg.id}_area">`,
    line("", `M${x0} ${y0 + 6}V${y1 - 6}H${x1 + 6}V${y0 + 6}`),
    `</clipPath><g clip-path="url(#${svg.id}_area)">`,
    ...curves.map((curve, i) => line(`line ${lines[i].kind}`, path(curve))),
    ...lines.map(({ kind }, i) => [kind, y(marks[i])]).filter(([, cy]) => !Number.isNaN(cy))
      .map(([kind, cy]) => `<circle class="${kind}" cx="${at}" cy="${cy}" r="5"/>`),
    "</g>",
  ].join("");

  const ends = curves.map((curve) => `${shown(curve[0])} to ${shown(curve.at(-1))}`);
  const spoken = lines.map(({ name }, i) => `${name} ${ends[i]}`).join(", ");
  svg.ariaLabel = `${title} over the log-odds of the true class from −8 to 8: ${spoken}. `
    + "The table has the values at one log-odds.";
  svg.onpointermove = (event) => {
    const share = (event.clientX - svg.getBoundingClientRect().left - x0) / (x1 - x0);
    const ω = LEFT + Math.min(Math.max(share, 0), 1) * (RIGHT - LEFT);
    change({ at: String(Math.round(ω * 20) / 20) });
  };
}

// --- what a visitor does

let waiting = null;

function change(changes) {
  text = { ...text, ...changes };
  clearTimeout(waiting); // browsers refuse an address that changes with every pixel
  if (update()) waiting = setTimeout(() => history.replaceState(null, "", addressOf(good)), 200);
}

function addressOf(setting) {
  const address = new URLSearchParams(texts(setting));
  return `#${address}`.replaceAll("%2C", ",");
}

function follow() {
  clearTimeout(waiting);
  const given = [...new URLSearchParams(location.hash.slice(1))];
  const unknown = given.find(([name]) => !(name in START));
  $("link_error").textContent = unknown ? "the address must hold settings of this page, "
    + `got ${unknown[0]}; they are ${Object.keys(START).join(", ")}` : "";
  text = { ...START, ...Object.fromEntries(given.filter(([name]) => name in START)) };
  update();
}

for (const name of Object.keys(START)) {
  for (const control of [$(name), $(`${name}_slider`)]) {
    control?.addEventListener("input", () => change({ [name]: control.value }));
  }
}
$("preset").addEventListener("input", (event) => {
  const preset = PRESETS[event.target.value];
  if (preset) change(texts({ ...PUBLISHED, ...preset }));
});
for (const form of document.forms) form.onsubmit = () => false;
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("code").textContent);
    $("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren($("code"));
    $("copied").textContent = "The browser refused; the code is selected, press Ctrl+C or ⌘C.";
  }
});
window.addEventListener("hashchange", follow);
new ResizeObserver(draw).observe($("loss"));
if (window.frameElement) { // in a page of the documentation, which has a heading and scrolls
  document.body.classList.add("framed");
  new ResizeObserver(() => {
    window.frameElement.style.height = `${document.body.offsetHeight + 16}px`;
  }).observe(document.body);
}
update(); // what stays where the address is at fault
follow();
