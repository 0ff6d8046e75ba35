"use strict";
// What the calculator draws: bars of what the memory is for, the border map, every GPU.
// It knows no memory: bytes, verdicts and words come from the page that draws. Styles: drawing.css.

const drawing = (() => {
  const STATES = ["fits", "close", "too-large"];
  const LEAST = 64; // tokens at the map's left edge

  function made(tag, content = "", attributes = {}) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name in element && !name.includes("-")) element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...[content].flat());
    return element;
  }
  const styled = (element, style) => (Object.assign(element.style, style), element);
  const number = (value) => value.toLocaleString("en");
  const percent = (share) => `${(100 * Math.min(Math.max(share, 0), 1)).toFixed(3)}%`;
  const swatch = (background) => styled(made("span", "", { className: "swatch" }), { background });
  const cell = (content, className = "") => made("td", content, { className });

  // A button that looks like a link; plain text where there is nothing to choose.
  function chooser(text, choose) {
    if (!choose) return text;
    const button = made("button", text, { type: "button", className: "choice" });
    button.addEventListener("click", choose);
    return button;
  }

  // The memory's parts side by side, up to ``end`` bytes, with a mark where the GPU's memory ends.
  function bar(parts, end, limit) {
    const found = parts.map(({ title, bytes, colour }) =>
      styled(made("span", "", { title }), { width: percent(bytes / end), background: colour }));
    if (limit) found.push(styled(made("i"), { left: `calc(${percent(limit / end)} - 3px)` }));
    return made("div", found, { className: "bar", "aria-hidden": "true" });
  }

  const legend = (parts) =>
    made("p", parts.map(({ title, colour }) => made("span", [swatch(colour), title])), { className: "legend" });

  // Every GPU: [{name, title, state, word, peak, usable, share, chosen}].
  function cards(body, rows, pick) {
    body.replaceChildren(...rows.map(({ name, title, state, word, peak, usable, share, chosen }) => {
      const meter = made("div", styled(made("b"), { width: percent(share) }), { className: "meter" });
      return made("tr", [
        cell([chooser(title, pick && (() => pick(name))), " ", made("span", word, { className: "note word" })]),
        cell(meter), cell(`${peak} of ${usable}`, "number"),
      ], { className: `${state}${chosen ? " chosen" : ""}` });
    }));
  }

  // The border map: a band for each micro-batch, and along it the lengths that fit, are too close to call, do not fit.
  // ``bands``: [{rows, fits, may_fit}], rows rising by doubling; ``end``: the longest row of the model.
  function border(place, { bands, end, here, words, pick, more = () => "" }) {
    const most = Math.max(end, 2 * LEAST), width = Math.log(most / LEAST);
    const at = (length) => (length < LEAST ? 0 : Math.min(Math.log(length / LEAST) / width, 1));
    const stateAt = (band, length) => STATES[length <= band.fits ? 0 : length <= band.may_fit ? 1 : 2];
    const tracks = [...bands].reverse().map((band) => {
      const ends = [at(band.fits), at(band.may_fit), 1];
      const pieces = STATES.map((state, index) =>
        styled(made("i", "", { className: state }), { width: percent(ends[index] - (index ? ends[index - 1] : 0)) }));
      const track = made("div", pieces, { className: "track" });
      track.dataset.rows = band.rows;
      return [made("span", number(band.rows), { className: "tick" }), track];
    });
    const height = Math.min(Math.log2(here.rows / bands[0].rows) + 0.5, bands.length);
    const dot = styled(made("b", "", { className: "here" }), { left: percent(at(here.length)), bottom: percent(height / bands.length) });
    const ticks = [];
    for (let length = LEAST; length <= most; length *= most / LEAST > 512 ? 4 : 2) {
      ticks.push(styled(made("span", number(length)), { left: percent(at(length)) }));
    }
    const readout = made("p", "Across: tokens of a row. Upwards: rows of the micro-batch. Click to choose both.",
      { className: "note readout" });
    const map = made("div", [
      made("div", tracks.flat(), { className: "bands" }), made("div", dot, { className: "over" }),
      made("div", ticks, { className: "lengths" }),
    ], { className: "map", role: "img", "aria-label": spoken(bands, end, words) });
    const pointed = ({ target, clientX }) => {
      const track = target.closest(".track");
      if (!track) return null;
      const { left, width: pixels } = track.getBoundingClientRect();
      const length = LEAST * Math.exp(width * Math.min(Math.max((clientX - left) / pixels, 0), 1));
      const band = bands.find(({ rows }) => rows === Number(track.dataset.rows));
      return { band, length: Math.min(Math.max(Math.round(length / LEAST), 1) * LEAST, end) };
    };
    map.addEventListener("pointermove", (event) => {
      const found = pointed(event);
      if (!found) return;
      const word = words[stateAt(found.band, found.length)];
      const { rows } = found.band;
      readout.textContent = `${number(rows)} ${rows === 1 ? "row" : "rows"} of ${number(found.length)} tokens: ${word}${more(found.length, rows)}`;
    });
    map.addEventListener("click", (event) => {
      const found = pointed(event);
      if (found) pick(found.length, found.band.rows);
    });
    const key = STATES.map((state) => made("span", [made("span", "", { className: `swatch ${state}` }), words[state]]));
    key.push(made("span", [made("b", "", { className: "here" }), "this step"]));
    place.replaceChildren(made("p", key, { className: "legend" }), map, readout);
  }

  function spoken(bands, end, words) {
    const lines = bands.map(({ rows, fits, may_fit }) => `micro-batch ${rows}: ${words.fits} up to ${fits} tokens` +
      (may_fit > fits ? `, ${words.close} up to ${may_fit}` : ""));
    return `Map of sequence length and micro-batch, up to ${end} tokens. ${lines.join("; ")}. The table below holds the same.`;
  }

  // The map as a table; each figure can be chosen.
  function borderTable(body, { bands, end, pick }) {
    const tokens = (length, rows) =>
      length ? chooser(`${number(length)} tokens`, () => pick(length, rows)) : "no length";
    body.replaceChildren(...bands.map(({ rows, fits, may_fit }) => made("tr", [
      made("th", number(rows), { scope: "row" }), cell(tokens(fits, rows)),
      cell(may_fit >= end ? "the model’s positions end" : tokens(may_fit, rows)),
    ])));
  }

  return { made, styled, swatch, chooser, bar, legend, cards, border, borderTable };
})();
