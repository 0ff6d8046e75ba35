"use strict";
// The planner's page: the analytic estimate, evaluated here for what is chosen; drawing.js draws it.
// The data come from will_it_fit/planner/page_data.py. What is computed is the same to the byte as in Python:
// will_it_fit/analytic/surface.py (evaluate) and will_it_fit/planner/calibrated.py (CalibratedEstimator).

const data = JSON.parse(document.getElementById("data").textContent);
const GIB = 2 ** 30, MIB = 2 ** 20;
const MOST_ROWS = 1024, LEAST_LENGTH = 64;
const byName = (list) => Object.fromEntries(list.map((entry) => [entry.name, entry]));
const MODELS = byName(data.models), METHODS = byName(data.methods), LAYOUTS = byName(data.layouts), GPUS = byName(data.gpus);
const { made } = drawing;
const element = (id) => document.getElementById(id);

// --- the estimate ---------------------------------------------------------------------------------------------------

const up = (value, multiple) => Math.ceil(value / multiple) * multiple;

// A request's block on average: the last block of a segment has what is left of it.
function typicalBlock(requested) {
  const size = up(Math.max(requested, 1), 512);
  const segment = size <= MIB ? 2 * MIB : size < 10 * MIB ? 20 * MIB : up(size, 2 * MIB);
  const rest = segment % size, count = (segment - rest) / size;
  return size + (rest <= MIB && MIB < size ? Math.floor(rest / count) : 0);
}

// The numbers behind the symbols of units at a length and a number of rows.
function symbolsAt(constants, length, rows) {
  const tokens = length * rows, targets = rows * (length - 1);
  const found = {
    b: rows, s: length, t: tokens, n: targets, c: Math.min(constants.chunk, targets),
    s8: up(length, 8), s32: up(length, 32), s128: up(length, 128),
  };
  const whole = Math.floor((length - 1) / 128), rest = (length - 1) % 128;
  found.W = whole * constants.W128 + (rest < 64 ? constants.W64 : constants.W128);
  for (const [name, indices, words] of [["t", tokens, constants.V], ["s", length, constants.p]]) {
    const segments = indices <= 3072 ? 0 : Math.min(indices, words);
    found["w" + name] = segments;
    found["g" + name] = indices <= 3072 ? 0 : segments + Math.floor(indices / 10);
  }
  return found;
}

// Surfaces with their units split once, and each size of block listed once.
const compiled = new Map();
const keyOf = (choice) => [choice.model, choice.method, choice.layout].join("|");
function surfaceOf(choice) {
  const index = data.surface_of[keyOf(choice) + "|" + GPUS[choice.gpu].capability];
  if (index === undefined) return null;
  if (!compiled.has(index)) {
    const surface = data.surfaces[index];
    const parts = surface.parts.map((part) => {
      const keys = new Map();
      const moments = part.moments.map((moment) => ({
        ...moment,
        terms: moment.terms.map(([group, unit, width, times]) => {
          const key = unit + "|" + width;
          if (!keys.has(key)) keys.set(key, { at: keys.size, symbols: unit.split("·"), width });
          return [group, keys.get(key).at, times];
        }),
      }));
      return { ...part, keys: [...keys.values()], moments };
    });
    compiled.set(index, { parts, symbols: surface.symbols });
  }
  return compiled.get(index);
}

// The estimate's peak: bytes, the phase it is in, and by group of components what for.
function evaluate(surface, length, rows) {
  const reached = (part) =>
    length >= part.from_length && rows >= part.from_rows && rows * (length - 1) >= part.from_targets;
  const part = surface.parts.findLast(reached);
  const symbols = symbolsAt(surface.symbols, length, rows);
  const blocks = part.keys.map((key) => {
    const size = key.symbols.reduce((product, symbol) => product * symbols[symbol], key.width);
    return size ? typicalBlock(size) : 0;
  });
  let best = null, peak = -1;
  for (const moment of part.moments) {
    let sum = 0;
    for (const group in moment.fixed) sum += moment.fixed[group];
    for (const [, at, times] of moment.terms) sum += times * blocks[at];
    if (sum > peak) [best, peak] = [moment, sum];
  }
  const groups = { ...best.fixed };
  for (const [group, at, times] of best.terms) groups[group] = (groups[group] || 0) + times * blocks[at];
  return { peak, phase: best.phase, groups };
}

const floorDivide = (a, b) => (a - (((a % b) + b) % b)) / b; // of BigInts, as Python's // does

// What a GPU must have above the estimate's peak: between traced steps interpolated, outside in proportion.
function above(points, peak) {
  if (!points || !points.length) return 0;
  const at = points.filter(([known, more]) => known < peak || (known === peak && more < 0)).length;
  const whole = BigInt;
  if (at === 0 || at === points.length) {
    const [known, more] = points[Math.min(at, points.length - 1)];
    return Number(floorDivide(whole(more) * whole(peak), whole(known)));
  }
  const [[low, first], [high, second]] = [points[at - 1], points[at]];
  return first + Number(floorDivide(whole(second - first) * whole(peak - low), whole(Math.max(high - low, 1))));
}

// What a step needs on a GPU; null where there is no estimate.
function needed(choice) {
  const surface = surfaceOf(choice);
  if (!surface) return null;
  const points = data.traced[keyOf(choice)];
  const found = evaluate(surface, choice.sequence_length, choice.micro_batch);
  const more = above(points, found.peak);
  return { ...found, above: more, required: found.peak + more, traces: points ? points.length : 0 };
}

// What is needed over the peak, the least and the most: closed_form_errors.csv, by method and use of several GPUs.
const overPeak = (choice) => data.limits.over_peak[`${choice.method}|${LAYOUTS[choice.layout].strategy}`];
const within = (choice) => (data.borders[keyOf(choice) + "|" + choice.gpu] ?? [])
  .some(([length, rows]) => choice.sequence_length <= length && choice.micro_batch <= rows);

// Seconds to see so many rows once, between two traced steps by their tokens; null where the GPU's speed is not known.
// A step with fewer tokens than the smaller one takes as long as that one: the GPU waits for the CPU.
function secondsOf(choice, rows) {
  const points = data.seconds[keyOf(choice) + "|" + choice.gpu];
  if (!points) return null;
  const [[few, least], [many, most]] = [points[0], points[points.length - 1]];
  const tokens = choice.sequence_length * choice.micro_batch;
  const step = tokens <= few ? least : many === few ? (least * tokens) / few : least + ((most - least) * (tokens - few)) / (many - few);
  return Math.ceil(rows / choice.micro_batch) * step;
}
const spoken = (seconds) => seconds < 3600 ? `${(seconds / 60).toPrecision(2)} min` : `${Number((seconds / 3600).toPrecision(3))} h`;

const FITS = "fits", CLOSE = "close", FITS_NOT = "too-large"; // as drawing.js and the styles name them
const WORDS = { [FITS]: "fits", [CLOSE]: "too close to call", [FITS_NOT]: "does not fit" };
// At and below a replayed border it fits. Else what the peak can't tell is too close to call: fragments decide.
function verdictOf(choice, found) {
  const usable = GPUS[choice.gpu].usable_bytes, [least, most] = overPeak(choice);
  if (within(choice) || found.peak * most <= usable) return FITS;
  return found.peak * least > usable ? FITS_NOT : CLOSE;
}

// The largest of 1 .. limit for which a falling test is true; 0 if there is none.
function lastTrue(test, limit) {
  let good = 0, bad = 1;
  while (bad <= limit && test(bad)) [good, bad] = [bad, bad * 2];
  bad = Math.min(bad, limit + 1);
  while (bad - good > 1) {
    const middle = Math.floor((good + bad) / 2);
    if (test(middle)) good = middle;
    else bad = middle;
  }
  return good;
}

const positions = (model) => MODELS[model].positions || 2 ** 17;
const fits = (choice) => needed(choice).required <= GPUS[choice.gpu].usable_bytes;
const surelyFits = (choice) => verdictOf(choice, needed(choice)) === FITS;
const mayFit = (choice) => verdictOf(choice, needed(choice)) !== FITS_NOT;

function largestMicroBatch(choice, test = fits) {
  return lastTrue((rows) => test({ ...choice, micro_batch: rows }), data.limits.most_rows);
}

function longestSequence(choice, test = fits) {
  const step = data.limits.length_step;
  const limit = Math.floor(positions(choice.model) / step);
  return step * lastTrue((steps) => test({ ...choice, sequence_length: steps * step }), limit);
}

// All that the page says of a choice.
function answer(choice) {
  const found = needed(choice);
  if (!found) return { reason: data.reasons[keyOf(choice)] };
  const usable = GPUS[choice.gpu].usable_bytes;
  return {
    ...found,
    usable,
    verdict: verdictOf(choice, found),
    bordered: data.borders[keyOf(choice) + "|" + choice.gpu] !== undefined,
    headroom: usable - found.required,
    largest_micro_batch: largestMicroBatch(choice),
    largest_sequence_length: longestSequence(choice),
    sure: { micro_batch: largestMicroBatch(choice, surelyFits), sequence_length: longestSequence(choice, surelyFits) },
    most: { micro_batch: largestMicroBatch(choice, mayFit), sequence_length: longestSequence(choice, mayFit) },
  };
}

// --- charts ---------------------------------------------------------------------------------------------------------

// The parts of what is chosen, the largest groups of components first.
function partsOf(found) {
  const parts = data.groups.filter(({ name }) => found.groups[name]).map((group) => ({ ...group, bytes: found.groups[group.name] }));
  return found.above > 0 ? [...parts, { ...data.above, bytes: found.above }] : parts;
}

// A bar for each way to use one or several such GPUs.
function showParts(limit) {
  const rows = data.layouts.map((layout) => ({ layout, found: needed({ ...state, layout: layout.name }) })).filter(({ found }) => found);
  const end = Math.max(limit, ...rows.map(({ found }) => found.required));
  const used = new Map();
  element("parts").tBodies[0].replaceChildren(...rows.map(({ layout: { name, title }, found }) => {
    const parts = partsOf(found);
    for (const part of parts) used.set(part.title, part);
    const chosen = made("button", title, { type: "button", className: "choice" });
    chosen.addEventListener("click", () => choose({ layout: name }));
    return made("tr", [made("td", chosen), made("td", drawing.bar(parts, end, limit)), made("td", gib(found.required), { className: "number" })],
      { className: name === state.layout ? "chosen" : "" });
  }));
  const order = [...data.groups, data.above].map(({ title }) => title);
  element("legend").replaceChildren(drawing.legend([...used.values()].sort((a, b) => order.indexOf(a.title) - order.indexOf(b.title))));
}

// For micro-batches that double, the longest row that fits and the longest that may.
function bandsOf(choice) {
  const most = Math.min(MOST_ROWS, Math.max(16, choice.micro_batch, largestMicroBatch({ ...choice, sequence_length: LEAST_LENGTH }, mayFit)));
  const bands = [];
  for (let rows = 1; rows < 2 * most; rows *= 2) {
    const step = { ...choice, micro_batch: rows };
    bands.push({ rows, fits: longestSequence(step, surelyFits), may_fit: longestSequence(step, mayFit) });
  }
  return bands;
}

function showBorder() {
  const end = Math.floor(positions(state.model) / data.limits.length_step) * data.limits.length_step;
  const shown = {
    bands: bandsOf(state), end, words: WORDS, here: { length: state.sequence_length, rows: state.micro_batch },
    pick: (length, rows) => choose({ sequence_length: length, micro_batch: rows }),
    more: (length, rows) => `; ${gib(needed({ ...state, sequence_length: length, micro_batch: rows }).required)} needed`,
  };
  drawing.border(element("border"), shown);
  drawing.borderTable(element("longest").tBodies[0], shown);
}

function showCards() {
  drawing.cards(element("cards").tBodies[0], data.gpus.map(({ name, title, usable_bytes: usable }) => {
    const step = { ...state, gpu: name }, found = needed(step), verdict = verdictOf(step, found);
    const seconds = secondsOf(step, rowsOfData());
    const word = WORDS[verdict] + (seconds === null ? "" : `, all rows once in ${spoken(seconds)}`);
    return { name, title, state: verdict, word, peak: gib(found.required), usable: gib(usable),
      share: found.required / usable, chosen: name === state.gpu };
  }), (name) => choose({ gpu: name }));
}

const rowsOfData = () => Math.max(1, Math.round(Number(element("rows").value)) || 1);
function showTime() {
  const seconds = secondsOf(state, rowsOfData()), error = GPUS[state.gpu].time_error;
  element("time").hidden = seconds === null;
  if (seconds === null) return;
  element("hours").textContent = spoken(seconds);
  element("hours_range").textContent = error === null ? "not measured on this GPU: compares settings"
    : `${spoken(seconds * (1 - error))} to ${spoken(seconds * (1 + error))}, between two traced steps`;
}

// --- the page -------------------------------------------------------------------------------------------------------

let state = { ...data.chosen };
const gib = (bytes, digits = 2) => (bytes / GIB).toFixed(digits) + " GiB";
const number = (value) => value.toLocaleString("en");

const logarithmic = {
  sequence_length: { least: () => LEAST_LENGTH, most: () => positions(state.model), snap: (v) => up(Math.round(v), 64) },
  micro_batch: { least: () => 1, most: () => MOST_ROWS, snap: Math.round },
};
function sliderFrom(field) {
  const { least, most, snap } = logarithmic[field];
  const value = least() * (most() / least()) ** (element(field + "_slider").value / 1000);
  return Math.min(snap(value), most());
}
function sliderTo(field) {
  const { least, most } = logarithmic[field];
  const share = Math.log(Math.max(state[field], least()) / least()) / Math.log(most() / least());
  element(field + "_slider").value = Math.round(1000 * Math.min(share, 1));
  element(field + "_slider").setAttribute("aria-valuetext", number(state[field]));
}

// A choice that can be: what is not known stays as it was.
function choose(changes) {
  const next = { ...state, ...changes };
  const known = { model: MODELS, method: METHODS, layout: LAYOUTS, gpu: GPUS };
  for (const field in known) {
    if (!Object.hasOwn(known[field], next[field])) next[field] = state[field];
  }
  for (const [field, most] of [["sequence_length", positions(next.model)], ["micro_batch", data.limits.most_rows]]) {
    if (!Number.isFinite(next[field])) next[field] = state[field];
    next[field] = Math.min(Math.max(Math.round(next[field]), 1), most);
  }
  state = next;
  show();
}

function show() {
  for (const field of ["model", "method", "layout", "gpu", "sequence_length", "micro_batch"]) element(field).value = state[field];
  element("sequence_length").max = positions(state.model);
  Object.keys(logarithmic).forEach(sliderTo);
  history.replaceState(null, "", "#" + new URLSearchParams(state));
  element("scenario").textContent = scenarioText();
  showSettings();
  const found = answer(state);
  const card = element("verdict");
  card.className = "card " + (found.reason ? "unknown" : found.verdict);
  document.querySelectorAll(".drawn").forEach((section) => (section.hidden = Boolean(found.reason)));
  if (found.reason) return showNothing(found.reason);
  const gpu = GPUS[state.gpu], layout = LAYOUTS[state.layout], several = layout.gpus > 1;
  const kind = !several ? gpu.title : layout.strategy === "ddp" ? `several ${gpu.title}` : `${layout.gpus} × ${gpu.title}`;
  const word = { [FITS]: "Fits ", [CLOSE]: "Too close to call on ", [FITS_NOT]: "Does not fit " }[found.verdict];
  element("word").textContent = word + kind;
  const close = element("close");
  close.hidden = found.verdict !== CLOSE;
  close.querySelector("span").textContent = closeText(found);
  element("required_label").textContent = (several ? "needed on each GPU" : "needed by the step") + ", estimated";
  element("usable_label").textContent = several ? "usable on each GPU" : "usable on the GPU";
  element("required").textContent = gib(found.required);
  element("usable").textContent = gib(found.usable);
  element("headroom").textContent = gib(Math.abs(found.headroom));
  element("headroom_label").textContent = (found.headroom < 0 ? "missing" : "to spare") + ", estimated";
  for (const field of Object.keys(logarithmic)) {
    const [sure, most] = [found.sure[field], found.most[field]];
    element("largest_" + field).textContent = sure ? number(sure) : "none";
    element("most_" + field).textContent = most > sure ? `too close to call up to ${number(most)}` : "";
  }
  element("source").textContent = sourceText(found);
  element("parts_note").textContent =
    `The memory of each GPU at the peak of the step, ${found.phase === "optimizer" ? "in the optimizer's update" : `in its ${found.phase} pass`}.`
    + " A row shows the same step on one GPU or several; its name chooses it.";
  showParts(found.usable);
  showBorder();
  showTime();
  showCards();
}

function showNothing(reason) {
  element("word").textContent = "No estimate";
  for (const id of ["required", "usable", "headroom", "largest_micro_batch", "largest_sequence_length"]) {
    element(id).textContent = "–";
  }
  element("close").hidden = element("time").hidden = true;
  for (const field of Object.keys(logarithmic)) element("most_" + field).textContent = "";
  element("source").textContent = `This page has no estimate, because ${reason}. The trace answers: see below.`;
}

// Why the estimate can't tell, and who can.
function closeText(found) {
  const known = found.bordered
    ? "The peak is above that of the largest step that the trace saw fit, and below what the GPU has."
    : "No border of this model was traced for this page, and the peak leaves less than fragments may take.";
  return `${known} With PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, set before Python starts, fragments take next`
    + " to nothing. The trace tells: save the file below as mine.yaml and type ";
}

function sourceText(found) {
  const estimate = `The analytic estimate of the peak is ${gib(found.peak)}`;
  if (!found.traces) {
    return `${estimate}. This combination was not traced for this page. A GPU must have more than the peak, usually by some`
      + ` per cent, since the allocator's blocks don't fit together perfectly.${storageText()}`;
  }
  const sign = found.above < 0 ? "less" : "more";
  return `${estimate}. By ${found.traces} traces of this model and method, and interpolation between them, a GPU must have`
    + ` ${gib(Math.abs(found.above))} ${sign}.${storageText()}`;
}

// What FSDP2 leaves whole on each GPU, and needn't.
function storageText() {
  const { strategy, gpus } = LAYOUTS[state.layout], packed = Math.floor(MODELS[state.model].linear_parameters / 2);
  if (state.method !== "qlora" || strategy !== "fsdp2" || data.storage !== "uint8" || !packed) return "";
  const saved = packed - Math.floor(packed / gpus);
  return ` FSDP2 leaves 4-bit weights whole on each GPU; quantization: {storage: bf16} divides them too and saves ${gib(saved)}.`;
}

function placeText() {
  const { strategy, gpus, written } = LAYOUTS[state.layout], gpu = GPUS[state.gpu].written;
  if (gpus === 1) return { gpu: gpu.name ?? gpu };
  return { parallel: { strategy, gpus, ...written }, gpu: { ...gpu, count: gpus } };
}

function scenarioText() {
  const lines = { model: MODELS[state.model].written, method: state.method, ...METHODS[state.method].written,
    sequence_length: state.sequence_length, micro_batch: state.micro_batch, ...placeText() };
  const plain = /^[a-z][a-z0-9_.-]*$/i; // what YAML reads as text without quotes, as all words of a scenario are
  const text = (value) =>
    Array.isArray(value) ? "[" + value.map(text).join(", ") + "]"
      : value !== null && typeof value === "object"
        ? "{" + Object.entries(value).map(([key, item]) => `${key}: ${text(item)}`).join(", ") + "}"
        : typeof value === "string" && plain.test(value) ? value : JSON.stringify(value);
  return Object.entries(lines).map(([key, value]) => `${key}: ${text(value)}`).join("\n");
}

function showSettings() {
  element("settings").replaceChildren(
    ...Object.entries(METHODS[state.method].settings).filter(([, value]) => value !== null).flatMap(([key, value]) => {
      const [term, said] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = key.replaceAll("_", " ");
      said.textContent = key === "lora" ? `rank ${value.rank}` : String(value);
      return [term, said];
    }),
  );
}

function fill(id, entries) {
  element(id).replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
}

function start() {
  fill("model", data.models.map(({ name, parameters }) =>
    [name, parameters ? `${name} (${(parameters / 1e9).toFixed(2)} billion)` : name]));
  fill("method", data.methods.map(({ name, title }) => [name, title]));
  fill("layout", data.layouts.map(({ name, title }) => [name, title]));
  fill("gpu", data.gpus.map(({ name, title, total_bytes }) =>
    [name, `${title}, ${(total_bytes / GIB).toFixed(0)} GiB`]));
  for (const id of ["model", "method", "layout", "gpu"]) {
    element(id).addEventListener("change", (event) => choose({ [id]: event.target.value }));
  }
  for (const id of Object.keys(logarithmic)) {
    element(id).addEventListener("change", (event) => choose({ [id]: Number(event.target.value || NaN) }));
    element(id + "_slider").addEventListener("input", () => choose({ [id]: sliderFrom(id) }));
  }
  element("rows").value = 10000;
  element("rows").addEventListener("change", show);
  const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  for (const field of Object.keys(logarithmic)) if (field in asked) asked[field] = Number(asked[field]);
  choose(asked);
}

start();
document.body.dataset.ready = "yes";
