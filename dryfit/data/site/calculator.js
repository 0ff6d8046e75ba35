// The calculator's page: what is chosen goes to Python in worker.js as JSON, and what comes back is shown.
// Nothing is computed here. The address (#...) holds the whole choice.
const $ = (id) => document.getElementById(id);
const { made, swatch } = drawing; // of drawing.js
const LATER = ["methods-block", "border-block", "cards-block"]; // what details() fills
const { content, dataset: { wait } } = document.querySelector("meta[name=hub]");
const HUB = content.replace(/\/$/, "");
const ROWS = JSON.parse($("first").textContent).rows; // micro-batches whose longest rows are shown
const fetched = {}; // what the Hub answered, by id
const waiting = new Map(); // number of a question to who waits for its answer
let worker, latest = 0, number = 0, fileName = "", shown = "";
let over = []; // what a click on the page changed of a file, which alone wins over it

// --- Python ------------------------------------------------------------------------------------------------------

function start() {
  if (typeof WebAssembly !== "object" || typeof Worker !== "function") {
    return refuse("This browser has no WebAssembly, in which the calculator runs. Another browser does; or ask on a" +
      " command line: dryfit qwen2.5-coder-7b --gpu rtx-4090");
  }
  progress("Python is loading (13 MB; the browser keeps it) ...");
  worker = new Worker("worker.js", { type: "module" });
  worker.onerror = () => broken("worker.js");
  worker.onmessage = ({ data }) => {
    if (data.broken) return broken(data.broken);
    if (data.ready) return progress(""), keepForOffline();
    waiting.get(data.id)?.(data.answer);
    waiting.delete(data.id);
  };
}

function broken(what) {
  refuse(`The calculator's files could not be loaded (${what}). Is there a network? Reload the page then.`);
}

function keepForOffline() {
  navigator.serviceWorker?.register("service-worker.js").catch(() => {});
}

export function ask(request) {
  return new Promise((resolve) => {
    waiting.set(++number, resolve);
    worker.postMessage({ id: number, request: JSON.stringify({ ...request, fetched }) });
  });
}

async function fromHub({ id, path }) {
  try {
    const answer = await fetch(`${HUB}/${path}`, { signal: AbortSignal.timeout(Number(wait)) });
    fetched[id] = { status: answer.status, code: answer.headers.get("x-error-code"), text: await answer.text() };
  } catch {
    fetched[id] = { status: 0 };
  }
}

// --- what is chosen ----------------------------------------------------------------------------------------------

const runFields = [...document.querySelectorAll("[data-run]")];
const whole = (id) => ($(id).value ? Number($(id).value) : null);

function choice() {
  const settings = {};
  for (const field of document.querySelectorAll("[data-set]")) if (field.value) settings[field.dataset.set] = typed(field);
  const run = Object.fromEntries(runFields.filter(({ value }) => value.trim()).map((one) => [one.dataset.run, one.value.trim()]));
  const byFile = document.forms.form.source.value === "file";
  return {
    model: byFile ? "" : $("model").value.trim(),
    file: byFile ? { name: fileName, text: $("text").value } : null, over: byFile ? over : [],
    method: $("method").value, gpu: $("gpu").value.trim(), gpus: whole("count") ?? 1, strategy: $("strategy").value,
    sequence_length: whole("length"), micro_batch: whole("rows"), settings, run,
  };
}

const WORDS = { true: true, false: false, null: null };
const typed = ({ type, value }) => (type === "number" ? Number(value) : value in WORDS ? WORDS[value] : value);

async function toAddress(chosen) {
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(chosen)) {
    if (value !== null && value !== "" && typeof value !== "object") words.set(name, value);
  }
  for (const [name, value] of Object.entries(chosen.settings)) words.set(`set.${name}`, value);
  for (const [name, value] of Object.entries(chosen.run)) words.set(`run.${name}`, value);
  if (chosen.file) words.set("file", await packed(chosen.file.text)), words.set("name", chosen.file.name);
  if (chosen.file && chosen.over?.length) words.set("over", chosen.over.join(" "));
  return `#${words}`;
}

async function fromAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  if (![...words.keys()].length) return false;
  const put = (id, name) => { $(id).value = words.get(name) ?? ""; };
  for (const name of ["model", "method", "gpu", "strategy"]) put(name, name);
  put("length", "sequence_length"), put("rows", "micro_batch"), put("count", "gpus");
  $("count").value ||= 1;
  for (const field of document.querySelectorAll("[data-set]")) field.value = words.get(`set.${field.dataset.set}`) ?? "";
  for (const field of runFields) field.value = words.get(`run.${field.dataset.run}`) ?? "";
  if (words.has("file")) $("text").value = await unpacked(words.get("file")), fileName = words.get("name") ?? "";
  over = (words.get("over") ?? "").split(" ").filter(Boolean);
  document.forms.form.source.value = words.has("file") ? "file" : "model";
  return true;
}

async function packed(text) {
  const stream = new Blob([text]).stream().pipeThrough(new CompressionStream("deflate-raw"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const letters = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return btoa(letters).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

async function unpacked(text) {
  try {
    const letters = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
    return await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"))).text();
  } catch {
    return "the file in this link is damaged: ask for the link again";
  }
}

// --- question and answer -----------------------------------------------------------------------------------------

async function answer(mayFetch) {
  if (!worker) return;
  const mine = ++latest, chosen = choice();
  arrange(chosen);
  history.replaceState(null, "", await toAddress(chosen));
  let found = JSON.parse(await ask({ ask: "answer", ...chosen }));
  if (mine === latest && found.fetch) {
    const name = found.fetch.id.replace(/@main$/, "");
    if (!mayFetch) return say("unknown", [`${name} is not listed here. “Answer” looks it up on the Hugging Face Hub.`]);
    say("unknown", [`The Hub is asked for the configuration of ${name} ...`]);
    await fromHub(found.fetch);
    const { status } = fetched[found.fetch.id], { id } = found.fetch;
    found = JSON.parse(await ask({ ask: "answer", ...chosen }));
    if (status === 0 || status === 429 || status >= 500) delete fetched[id]; // the next try asks again
  }
  if (mine !== latest) return;
  show(found);
  if (found.peak_bytes) await details(chosen, mine, found);
}

async function details(chosen, mine, found) {
  const asked = async (kind, more = {}) => JSON.parse(await ask({ ...chosen, ask: kind, ...more }));
  const { changes = [] } = found.tight ? await asked("changes") : {};
  if (mine === latest) await showChanges(changes, chosen);
  const { others } = await asked("others");
  if (mine === latest) showRead([...found.added, ...found.read, ...others]);
  const { methods = [] } = await asked("methods");
  if (mine === latest) showMethods(methods);
  const { gpus = [] } = await asked("gpus");
  if (mine === latest) showCards(gpus, found.answer.gpu?.name);
  const bands = [];
  for (const rows of ROWS) {
    if (mine !== latest) return;
    bands.push((await asked("longest", { rows })).longest);
  }
  if (mine === latest) showBorder(bands.filter(Boolean), found.answer.scenario);
}

function arrange(chosen) {
  const byFile = document.forms.form.source.value === "file";
  $("by-model").hidden = byFile, $("by-file").hidden = !byFile;
  for (const option of document.querySelectorAll("option[data-default]")) {
    option.dataset.text ??= option.textContent;
    option.textContent = byFile ? "as the file says" : option.dataset.text;
  }
  const [sharded] = $("strategy").options;
  sharded.textContent = byFile ? "as the file says" : chosen.gpus > 1 ? "fsdp2 (default)" : "none: one GPU";
  const count = Object.keys(chosen.settings).length;
  $("changed").textContent = count ? `(${count} set)` : "";
  $("of-the-run").textContent = chosen.run.rows ? `(${Number(chosen.run.rows).toLocaleString("en")} rows)` : "";
}

// --- what is shown -----------------------------------------------------------------------------------------------

// Messages have names between backticks.
const marked = (text) => text.split("`").map((part, index) => (index % 2 ? made("code", part) : part));

function say(state, sentences) {
  $("verdict").className = `verdict ${state}`;
  $("verdict").replaceChildren(...sentences.map((one) => made("p", marked(one))));
  $("answer").hidden = true; // nothing of an earlier answer stays beside this
  $("found").replaceChildren();
}

function progress(text) {
  $("progress").hidden = !text;
  $("progress").textContent = text;
}

function refuse(sentence) {
  progress("");
  say("error", [sentence]);
}

function show(found) {
  if (found.error) {
    const sentences = found.error.flatMap(({ problem, where, found: value, allowed, write }) => [
      problem, ...(value ? [`Found: ${value}${where ? ` (${where})` : ""}`] : []),
      ...(allowed ? [`Allowed: ${allowed}.`] : []), ...(write ? [`For example: ${write}`] : []),
    ]);
    say("error", sentences);
    return searchHub();
  }
  say(found.state, [found.verdict]);
  $("answer").hidden = false;
  $("step").textContent = `For: ${found.step}`;
  for (const id of ["exactness", "evidence", "rule", "hours"]) $(id).textContent = found[id];
  $("command").textContent = found.command;
  $("yaml").textContent = found.yaml;
  showRead([...found.added, ...found.read]);
  for (const id of ["parts-block", ...LATER]) $(id).hidden = !found.peak_bytes;
  for (const id of LATER) $(id).classList.add("old"); // until details() has the new ones
  $("changes-block").hidden = true; // details() shows it again
  $("assumed").textContent = Object.entries(found.assumed).map(([name, value]) => `${name}: ${value}`).join("; ") ||
    "nothing: the file decides all of it";
  if (found.peak_bytes) showParts(found);
}

// A name without an owner that is not listed: the Hub's models of that name, to choose from.
async function searchHub() {
  const name = $("model").value.trim();
  if (document.forms.form.source.value === "file" || !/^[\w.-]{3,}$/.test(name)) return;
  const look = made("button", `Search the Hugging Face Hub for ${name}`, { type: "button" });
  $("found").replaceChildren(made("p", [look]));
  look.addEventListener("click", async () => {
    let models = null;
    try {
      const words = new URLSearchParams({ search: name, sort: "downloads", direction: "-1", limit: "8" });
      const answer = await fetch(`${HUB}/api/models?${words}`, { signal: AbortSignal.timeout(Number(wait)) });
      if (answer.ok) models = (await answer.json()).map(({ id }) => id).filter((id) => /^[\w.-]+\/[\w.-]+$/.test(id));
    } catch { /* it does not answer */ }
    const said = models === null ? "The Hub does not answer." : models.length ? "On the Hub:" : `The Hub has no model named ${name}.`;
    const picks = (models ?? []).map((id) => {
      const pick = made("button", id, { type: "button", className: "choice" });
      pick.addEventListener("click", () => { $("model").value = id; answer(true); });
      return made("li", [pick]);
    });
    $("found").replaceChildren(made("p", said), made("ul", picks));
  });
}

const showRead = (lines) => $("read").replaceChildren(...lines.map((line) => made("li", line.trim())));

function showParts({ parts, peak_bytes: peak, answer: { gpu } }) {
  $("bar").replaceChildren(drawing.bar(parts, Math.max(peak, gpu?.usable_bytes ?? 0), gpu?.usable_bytes));
  $("parts").tBodies[0].replaceChildren(...parts.map(({ title, shown: size, colour }) => made("tr", [
    made("td", [swatch(colour), title]), made("td", size, { className: "number" }),
  ])));
}

const STATES = { fits: "should fit", close: "too close to call", "too-large": "does not fit" };

function showMethods(methods) {
  $("methods-block").hidden = methods.length < 2;
  $("methods-block").classList.remove("old");
  $("methods").tBodies[0].replaceChildren(...methods.map(({ method, peak, state, least, chosen }) => made("tr", [
    made("td", [chosen ? method : drawing.chooser(method, () => choose({ method })), " ",
      made("span", STATES[state] ?? "", { className: "note word" })]),
    made("td", peak, { className: "number" }),
    made("td", least ? [drawing.chooser(least.title, () => choose({ gpu: least.name, method })), ` ${least.usable}`] : "none alone"),
  ], { className: `${state}${chosen ? " chosen" : ""}` })));
}

function showCards(cards, chosen) {
  $("cards-block").hidden = !cards.length;
  $("cards-block").classList.remove("old");
  const rows = cards.map((card) => ({ ...card, word: STATES[card.state], chosen: card.name === chosen }));
  drawing.cards($("cards").tBodies[0], rows, (name) => choose({ gpu: name }));
}

function showBorder(bands, { sequence_length: length, micro_batch: rows }) {
  $("border-block").hidden = !bands.length;
  $("border-block").classList.remove("old");
  if (!bands.length) return;
  const pick = (length, rows) => choose({ length, rows });
  const shown = { bands, end: bands[0].positions, here: { length, rows }, words: STATES, pick };
  drawing.border($("border"), shown);
  drawing.borderTable($("longest").tBodies[0], shown);
}

const FIELD = { gpu: "gpu", length: "sequence_length", rows: "micro_batch", method: "method" }; // of the form's inputs

function choose(fields) {
  for (const [id, value] of Object.entries(fields)) $(id).value = value, over.push(FIELD[id]);
  answer(true);
}

async function showChanges(changes, { file, run, over: before }) {
  const items = changes.map(async ({ cost, command, choice: changed, fields }) => {
    const href = await toAddress({ ...changed, run, file, over: [...before, ...fields], model: file ? "" : changed.model });
    return made("li", [made("a", made("code", command), { href }), made("span", ` ${cost}`, { className: "note" })]);
  });
  $("changes").replaceChildren(...(await Promise.all(items)));
  $("changes-block").hidden = !changes.length;
}

async function copy(text, what) {
  const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  $("copied").textContent = done ? `${what} is copied` : "This browser does not copy; mark it and copy it yourself";
}

// --- the page's life ---------------------------------------------------------------------------------------------

function listen() {
  const form = document.forms.form;
  let later;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    document.activeElement?.blur?.(); // a telephone's keyboard would cover what comes
    $("verdict").scrollIntoView({ block: "start" });
    await answer(true);
    $("verdict").scrollIntoView({ block: "nearest" });
  });
  for (const pick of document.querySelectorAll("[data-gpu]")) {
    pick.addEventListener("click", () => choose({ gpu: pick.dataset.gpu }));
  }
  form.addEventListener("input", ({ target }) => {
    if (target.id === "text") fileName = "", over = [];
    clearTimeout(later);
    later = setTimeout(answer, 150, false);
  });
  $("model").addEventListener("change", () => answer(true));
  $("text").addEventListener("change", () => answer(true));
  $("file").addEventListener("change", async ({ target: { files: [file] } }) => {
    if (file) $("text").value = await file.text(), fileName = file.name, over = [], answer(true);
  });
  $("copy-command").addEventListener("click", () => copy($("command").textContent, "The command"));
  $("copy-link").addEventListener("click", () => copy(location.href, "The link"));
  window.addEventListener("hashchange", async () => (await fromAddress()) && answer(true));
}

const linked = await fromAddress();
if (!linked) { // the answer to what stands in the form, made with the page
  const first = JSON.parse($("first").textContent);
  show(first);
  showRead([...first.added, ...first.read, ...first.others]);
  for (const draw of [ // one after the other, so that the page answers a finger in between
    () => showMethods(first.methods), () => showCards(first.gpus, first.answer.gpu.name), () => showBorder(first.longest, first.answer.scenario),
  ]) {
    await new Promise((done) => setTimeout(done));
    draw();
  }
}
listen();
if (document.readyState !== "complete") await new Promise((done) => window.addEventListener("load", done));
start();
answer(true);
window.calculator = { ask };
