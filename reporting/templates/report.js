const DATA = JSON.parse(document.getElementById("data").textContent), SMALL = [320, 225];
let W = 320, H = 225, M = { l: 56, r: 10, t: 8, b: 36 }, clips = 0; // size and margins of the figure that is being drawn
const short = v => v === null || v === undefined ? "-" : Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(1).replace(".0e", "e") : String(+v.toPrecision(4));
const breakable = text => text.split("_").flatMap((part, i) => i ? ["_", el("wbr"), part] : [part]);

// --- marks: eight colours and shapes; the next eight methods have hollow ones, the next small ones, then small hollow ones ---

const colour = s => s < 0 ? "var(--soft)" : `var(--c${s % 8})`;
const DASHES = ["", "6 3", "2 2", "6 2 2 2"], LEVELS = ["5 3", "2 3", "10 3", "7 3 2 3"], level = s => LEVELS[Math.max(0, s) % 4];
function marker(style, x, y) {
  const round = Math.floor(Math.max(0, style) / 8), r = round % 4 < 2 ? 3.2 : 2, k = (Math.max(0, style) + Math.floor(round / 4)) % 8, f = r / 3.2;
  const c = round % 2 ? { fill: "var(--bg)", stroke: colour(style), "stroke-width": 1.2 } : { fill: colour(style), stroke: "var(--bg)", "stroke-width": .6 };
  const poly = n => Array.from({ length: n }, (_, i) => { const t = -Math.PI / 2 + [0, Math.PI / 4, 0, 0, Math.PI, 0, Math.PI / 2, -Math.PI / 2][k] + 2 * Math.PI * i / n;
    return `${x + 1.3 * r * Math.cos(t)},${y + 1.3 * r * Math.sin(t)}`; }).join(" ");
  return k === 5 ? el("path", { d: `M${x - 3.6 * f},${y - 1.3 * f}${"h1v-1h1v1h1v1h-1v1h-1v-1h-1z".replace(/-?1/g, d => 2.4 * f * d)}`, ...c }) : k === 0 ? el("circle", { cx: x, cy: y, r, ...c }) : el("polygon", { points: poly([0, 4, 4, 3, 3, 0, 3, 3][k]), ...c });
}
function star(style, x, y, r = 8) {
  const points = Array.from({ length: 10 }, (_, i) => { const far = i % 2 ? .44 * r : r, t = -Math.PI / 2 + Math.PI * i / 5; return `${x + far * Math.cos(t)},${y + far * Math.sin(t)}`; });
  return el("polygon", { points: points.join(" "), fill: colour(style), stroke: "var(--bg)" });
}

// --- axes ---

function scale(values, log, a, b, zero, exact) {
  let lo = Math.min(...values), hi = Math.max(...values);
  if (log) {
    lo = Math.log10(lo); hi = Math.log10(hi); if (hi - lo < .1) { lo -= .5; hi += .5; }
    [lo, hi] = [lo - .04 * (hi - lo), hi + .04 * (hi - lo)];
    const at = v => a + (b - a) * (Math.log10(Math.max(v, 10 ** lo)) - lo) / (hi - lo), ticks = [];
    const step = Math.max(1, Math.ceil((hi - lo) / 5));
    for (let e = Math.ceil(lo); e <= hi; e += step) ticks.push(10 ** e);
    return { at, ticks: ticks.length ? ticks : [10 ** lo, 10 ** hi] };
  }
  if (zero) lo = Math.min(0, lo);
  if (hi === lo) { hi += 1; lo -= zero ? 0 : 1; }
  const pad = zero || exact ? 0 : .04 * (hi - lo), raw = (hi - lo) / 4, mag = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(s => s * mag >= raw) * mag, ticks = [];
  for (let t = Math.ceil(lo / step) * step; t <= hi + 1e-9 * step; t += step) ticks.push(+t.toPrecision(10));
  return { at: v => a + (b - a) * (v - lo + pad) / (hi - lo + 2 * pad), ticks };
}
const longest = ticks => Math.max(0, ...(ticks || []).map(t => t.length));
const turned = p => p.ticks && !p.cells && 7 * longest(p.ticks) + 3 > (W - M.l - M.r) / p.ticks.length;
function axisTicks(p, svg, x) {
  (p.ticks || x.ticks).forEach((t, i) => svg.append(turned(p)
    ? el("text", { class: "small", transform: `translate(${x.at(i) + 3} ${H - M.b + 4}) rotate(-90)`, "text-anchor": "end" }, t)
    : el("text", { x: p.ticks ? x.at(i) : x.at(t), y: H - M.b + 14, "text-anchor": "middle" }, p.ticks ? t : short(t))));
}
function wrapped(text, most) {
  const lines = [""];
  for (const word of text.split(" ")) if ((lines.at(-1) + word).length > most && lines.at(-1)) lines.push(word); else lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
  return lines;
}
const atEdge = (names, sign) => names && names.length ? wrapped(`${sign} ${names.join(", ")}`, Math.floor((W - M.l - M.r) / 5.6)) : [];

// --- what is drawn ---

const heatColour = (v, most, signed) => signed
  ? `color-mix(in srgb, ${v < 0 ? "var(--c1)" : "var(--c0)"} ${Math.round(100 * Math.abs(v) / most)}%, var(--tint))`
  : `color-mix(in srgb, var(--c0) ${Math.round(100 * v / most)}%, var(--tint))`;
function heat(p, svg) {
  const n = p.cells.length, m = p.cells[0].length, most = Math.max(1e-9, ...p.cells.flat().map(Math.abs));
  const extra = p.margins ? 36 : 0, w = (W - M.l - M.r - extra) / m, h = (H - M.t - M.b - extra) / n;
  p.cells.forEach((row, i) => row.forEach((v, j) => {
    const cell = el("rect", { x: M.l + j * w, y: M.t + extra + i * h, width: w + .2, height: h + .2, fill: heatColour(v, most, p.signed) });
    if (p.signed && Math.abs(v) > 0) cell.append(el("title", {}, `true ${p.ticks[i]}, predicted ${p.ticks[j]}: ${short(v)}`));
    svg.append(cell);
  }));
  const size = n <= 10 ? "" : "small", every = Math.ceil((7 * longest(p.ticks) + 3) / w), down = Math.ceil(10 / h);
  (p.ticks || []).forEach((t, i) => {
    if (i % every === 0) svg.append(el("text", { class: size, x: M.l + (i + .5) * w, y: H - M.b + 13, "text-anchor": "middle" }, t));
    if (i % down === 0) svg.append(el("text", { class: size, x: M.l - 5, y: M.t + (i + .5) * h + 4, "text-anchor": "end" }, t)); });
  if (p.ends) { // the first and the last neuron of each axis
    const [rows, columns] = p.ends, right = M.l + m * w, bottom = H - M.b;
    svg.append(el("text", { class: "small", x: M.l, y: bottom + 12 }, "0"), el("text", { class: "small", x: right, y: bottom + 12, "text-anchor": "end" }, columns - 1),
      el("text", { class: "small", x: M.l - 5, y: M.t + extra + 8, "text-anchor": "end" }, "0"), el("text", { class: "small", x: M.l - 5, y: bottom, "text-anchor": "end" }, rows - 1));
  }
  if (p.margins) {
    const rows = p.cells.map(r => r.reduce((a, b) => a + b)), cols = p.cells[0].map((_, j) => p.cells.reduce((a, r) => a + r[j], 0));
    const top = Math.max(1, ...cols), right = Math.max(1, ...rows);
    cols.forEach((v, j) => svg.append(el("rect", { x: M.l + j * w, y: M.t + 32 * (1 - v / top), width: Math.max(.5, w - .4), height: 32 * v / top, fill: "var(--c1)" })));
    rows.forEach((v, i) => svg.append(el("rect", { x: W - M.r - 32, y: M.t + extra + i * h, width: 32 * v / right, height: Math.max(.5, h - .4), fill: "var(--c1)" })));
  }
}
function bars(p, s, k, count, box, x, y) {
  const w = .8 * (W - M.l - M.r) / p.ticks.length / count;
  s.y.forEach((v, i) => { const bar = el("rect", { x: x.at(i) + (k - count / 2) * w, width: w, y: y.at(v), height: Math.max(0, y.at(0) - y.at(v)), fill: colour(s.style) });
    bar.append(el("title", {}, `${s.label}, ${p.ticks[i]}: ${short(v)}`)); box.append(bar); });
}
function series(s, box, x, y, p) {
  const at = (v, i) => [x.at(s.x[i]), y.at(v)], line = { fill: "none", stroke: colour(s.style), "stroke-width": 1.6, "stroke-dasharray": DASHES[Math.floor(Math.max(0, s.style) / 8) % 4] };
  const points = s.y.map(at), path = list => "M" + list.map(p => p.map(v => v.toFixed(1)).join(",")).join("L");
  const inside = v => !p.y_range || (v >= p.y_range[0] && v <= p.y_range[1]);
  if (s.kind === "level") {
    if (s.low) box.append(el("rect", { x: M.l, width: W - M.l - M.r, y: y.at(s.high[0]), height: Math.max(0, y.at(s.low[0]) - y.at(s.high[0])), fill: colour(s.style), opacity: .08 }));
    box.append(el("line", { x1: M.l, x2: W - M.r, y1: y.at(s.y[0]), y2: y.at(s.y[0]), ...line, "stroke-dasharray": level(s.style) }));
  } else if (s.kind === "steps") s.y.forEach((v, i) => { if (v > 0) box.append(el("rect", { x: x.at(s.x[i]), width: x.at(s.x[i + 1]) - x.at(s.x[i]), y: y.at(v), height: Math.max(0, H - M.b - y.at(v)), fill: colour(s.style), opacity: .6 })); });
  else if (s.kind === "front") { const stairs = []; points.forEach((p, i) => { if (i) stairs.push([p[0], points[i - 1][1]]); stairs.push(p); });
    if (points.length === 1) stairs.unshift([points[0][0], H - M.b]); box.append(el("path", { d: path(stairs), ...line, "stroke-width": 5, opacity: .35 })); }
  else if (s.kind === "star") points.forEach(p => box.append(star(s.style, ...p, W > 400 ? 11 : 8)));
  else {
    if (s.low && s.kind === "line") box.append(el("path", { d: path([...s.high.map(at), ...s.low.map(at).reverse()]) + "Z", fill: colour(s.style), opacity: .08 }));
    if (s.low && s.kind === "points") s.x.forEach((v, i) => box.append(el("line", { x1: x.at(v), x2: x.at(v), y1: y.at(s.low[i]), y2: y.at(s.high[i]), ...line })));
    if (s.kind === "line") box.append(el("path", { d: path(points), ...line }));
    if (points.length <= 30) points.forEach((p, i) => { if (!inside(s.y[i])) return; const m = marker(s.style, ...p); m.append(el("title", {}, `${s.label}: ${short(s.x[i])}, ${short(s.y[i])}`)); box.append(m); });
  }
}
function plot(p, svg, list, at, ring) {
  const top = atEdge(p.above, "\u25b2"), bottom = atEdge(p.below, "\u25bc"), room = lines => lines.length ? 12 * lines.length + 6 : 0;
  const ys = p.y_range || list.flatMap(s => [...s.y, ...(s.low || []), ...(s.high || [])]).filter(v => v !== null && (!p.y_log || v > 0));
  const xs = p.ticks ? [-.5, p.ticks.length - .5] : list.filter(s => s.kind !== "level").flatMap(s => s.x), flat = list.some(s => ["bars", "steps"].includes(s.kind));
  const x = scale(xs.length ? xs : [0, 1], p.x_log, M.l, W - M.r), y = scale(ys, p.y_log, H - M.b - room(bottom), M.t + room(top), flat && !p.y_log);
  if (p.ticks) x.at = v => M.l + (W - M.l - M.r) * (v + .5) / p.ticks.length;
  y.ticks.forEach(t => svg.append(el("line", { x1: M.l, x2: W - M.r, y1: y.at(t), y2: y.at(t), stroke: "var(--line)", "stroke-width": .6 }), el("text", { x: M.l - 5, y: y.at(t) + 4, "text-anchor": "end" }, short(t))));
  axisTicks(p, svg, x);
  top.forEach((text, i) => svg.append(el("text", { class: "edge", x: M.l + 3, y: M.t + 9 + 12 * i }, text)));
  bottom.forEach((text, i) => svg.append(el("text", { class: "edge", x: M.l + 3, y: H - M.b - 4 - 12 * (bottom.length - 1 - i) }, text)));
  svg.append(el("line", { x1: M.l, x2: W - M.r, y1: H - M.b, y2: H - M.b, stroke: "var(--soft)" }));
  if (at !== null && !p.ticks) svg.append(el("line", { class: "now", x1: x.at(at), x2: x.at(at), y1: M.t, y2: H - M.b, stroke: "var(--mark)", "stroke-width": 2, opacity: .5 }));
  const frame = "clip" + clips++, columns = list.filter(s => s.kind === "bars"); // lines end where the axis does; marks may reach a little further
  svg.append(el("clipPath", { id: frame }, el("rect", { x: M.l - 12, width: W - M.l - M.r + 22, y: M.t - 8 + room(top), height: H - M.b - M.t + 16 - room(top) - room(bottom) })));
  list.forEach(s => { const box = el("g", { "data-of": s.label, "clip-path": `url(#${frame})` });
    if (s.kind === "bars") bars(p, s, columns.indexOf(s), columns.length, box, x, y); else series(s, box, x, y, p);
    svg.append(box); });
  if (ring && ring[1] !== null) svg.append(el("circle", { class: "ring", cx: x.at(ring[0]), cy: y.at(ring[1]), r: 8, fill: "none", stroke: "var(--fg)", "stroke-width": 1.5 }));
}
function icon(s) {
  const svg = el("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" });
  if (s.kind !== "points") svg.append(el("line", { x1: 0, x2: 26, y1: 6, y2: 6, stroke: colour(s.style), "stroke-width": ["bars", "steps", "front"].includes(s.kind) ? 8 : 2, "stroke-dasharray": ["level", "star"].includes(s.kind) ? level(s.style) : s.kind === "line" ? DASHES[Math.floor(s.style / 8) % 4] : "" }));
  if (s.kind === "line" || s.kind === "points" || s.kind === "level") svg.append(marker(s.style, 13, 6)); if (s.kind === "star") svg.append(star(s.style, 13, 6, 6));
  return svg;
}
function draw(p, { at = null, size = SMALL, known = null, ring = null } = {}) { // known: labels that the run's legend explains
  [W, H] = size;
  const below = H + (turned(p) ? Math.max(0, 5.5 * longest(p.ticks) - 20) : 0); // turned names reach down as far as they are long
  const svg = el("svg", { viewBox: `0 0 ${W} ${below}`, role: "img", "aria-label": p.alt || p.title }), list = p.series || [];
  if (p.cells) heat(p, svg); else if (list.length) plot(p, svg, list, at, ring);
  svg.append(el("text", { x: (W - M.r + M.l) / 2, y: below - 4, "text-anchor": "middle" }, p.x_label), el("text", { transform: `translate(11 ${(H - M.b + M.t) / 2}) rotate(-90)`, "text-anchor": "middle" }, p.y_label.split(", ")[0]));
  const figure = el("figure", {}, el("figcaption", {}, p.title), svg), own = list.filter(s => !known || !known.has(s.label));
  if (list.length > 1 && own.length) figure.append(el("div", { class: "key" }, ...own.map(s => el("span", {}, icon(s), " " + s.label))));
  return figure;
}

// --- one legend for all figures of a run ---

function legendOf(run) { // label -> how it is drawn
  const names = Object.keys(run.labels), found = new Map(names.map((name, i) => [run.labels[name], { label: run.labels[name], style: i, kind: name === "retrain" ? "star" : run.swept.includes(name) ? "line" : "level" }]));
  for (const s of Object.values(run.figures).flat().flatMap(p => p.series || []))
    if (s.kind === "front" || (!found.has(s.label) && names.some(name => s.label.startsWith(run.labels[name] + ", ")))) found.set(s.label, s);
  return found;
}
function showLegend(section, legend) {
  const hidden = new Set(), apply = () => section.querySelectorAll("[data-of]").forEach(n => { n.style.display = hidden.has(n.dataset.of) ? "none" : ""; });
  section.querySelector(".legend").replaceChildren(...[...legend.values()].map(s => {
    const button = el("button", { type: "button", "aria-pressed": "true" }, icon(s), " " + s.label);
    button.addEventListener("click", () => { const off = !hidden.delete(s.label); if (off) hidden.add(s.label); button.setAttribute("aria-pressed", String(!off)); apply(); });
    return button; }));
  return apply;
}

// --- the sweep ---

const unmap = rows => rows.map(row => [...row].map(Number));
function maskMap(run, point, rows, i) {
  const [name, m, n] = run.layers[i], block = `${Math.ceil(m / rows.length)} x ${Math.ceil(n / rows[0].length)}`;
  return draw({ title: `where ${run.labels[run.answer]} switches off: ${name}, ${m} x ${n}${block === "1 x 1" ? "" : `, cells of ${block} weights`}; darkest: most. Bars: sums of rows and columns`,
    x_label: "input neuron", y_label: "output neuron", cells: unmap(rows), margins: true, ends: [m, n], alt: `map of the mask at kappa ${point.kappa} in ${name}` });
}
function showPoint(run, box, point, known) {
  const metrics = Object.entries(run.metrics), parts = [], column = name => ({ class: `c${run.levels[name] || 3}` });
  const rows = Object.entries(point.values).map(([name, v]) => el("tr", {}, el("th", { scope: "row" }, run.labels[name] || name), ...v.map((x, i) => el("td", column(metrics[i][0]), short(x)))));
  parts.push(el("p", { class: "headline", role: "status" }, point.sentence));
  const row = el("div", { class: "grid" });
  point.map.forEach((rows, i) => row.append(maskMap(run, point, rows, i)));
  if (point.bars) { const names = point.bars.methods, styles = Object.keys(run.labels); row.append(draw({ title: point.bars.title, x_label: "class", y_label: "share of images [%]", ticks: point.bars.ticks, alt: "shares of forgotten images by predicted class",
    series: point.bars.values.map((y, i) => ({ label: run.labels[names[i]], x: y.map((_, j) => j), y, kind: "bars", style: styles.indexOf(names[i]) })) }, { known })); }
  parts.push(row);
  if (run.samples && point.said[run.answer]) {
    const named = label => run.samples.names[label] ?? label;
    const text = s => `${named(s[0])} (${Math.round(100 * s[1])}\u00a0%)`, before = point.said.default || [], after = point.said[run.answer];
    parts.push(el("h3", {}, "Forgotten test images, before and after"), el("div", { class: "thumbs" }, ...run.samples.images.map((data, i) => el("figure", {},
      el("img", { src: "data:image/png;base64," + data, alt: `test image of class ${named(run.samples.labels[i])}, before taken for ${before[i] ? named(before[i][0]) : "unknown"}, after for ${named(after[i][0])}` }),
      el("figcaption", {}, `class ${named(run.samples.labels[i])}\nbefore ${before[i] ? text(before[i]) : "-"}\nafter ${text(after[i])}`)))));
  }
  parts.push(el("details", {}, el("summary", {}, `every method at kappa ${point.kappa}`), el("div", { class: "sheet", role: "region", "aria-label": "every method at this point" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "method"), ...metrics.map(([name, m]) => el("th", { scope: "col", ...column(name) }, ...breakable(`${name} [${m.unit}]`))))), el("tbody", {}, ...rows)),
    el("label", { class: "more" }, el("input", { type: "checkbox" }), " all columns"))));
  const open = box.querySelector("details")?.open; if (open) parts.at(-1).open = true;
  box.replaceChildren(...parts);
}
function sweep(section, run, known, apply) {
  if (!run.points.length) return;
  const budgets = [...new Set(run.points.map(p => p.top_k))], box = el("div"), uid = "s" + run.id;
  const pickK = el("select", { "aria-label": "top_k" }, ...budgets.map(k => el("option", {}, k))), slider = el("input", { type: "range", min: 0, step: 1, id: uid, class: "kappa" });
  const out = el("output", { for: uid }), here = () => run.points.filter(p => p.top_k === +pickK.value);
  const show = () => { const list = here(); slider.max = list.length - 1; const p = list[Math.min(+slider.value, list.length - 1)];
    out.textContent = p.kappa.toLocaleString("en"); slider.setAttribute("aria-valuetext", `kappa ${p.kappa}`); showPoint(run, box, p, known); apply(); };
  pickK.value = run.chosen[1]; slider.max = here().length - 1; slider.value = here().findIndex(p => p.kappa === run.chosen[0]);
  slider.addEventListener("input", show); pickK.addEventListener("change", show);
  const controls = el("div", { class: "controls" }, ...(budgets.length > 1 ? [el("label", {}, "top_k", pickK)] : []), el("label", { for: uid }, "kappa", slider, out));
  section.querySelector(".sweep").append(...(run.points.length > 1 ? [el("h2", {}, "How many weights: the sweep"), controls] : [el("h2", {}, "Which weights")]), box);
  show();
}
function build(section, run) {
  if (section.dataset.built) return; section.dataset.built = "1";
  const legend = legendOf(run), known = new Set(legend.keys()), apply = showLegend(section, legend), figures = section.querySelector(".figures");
  const put = (place, names, more) => names.forEach(name => run.figures[name].forEach(p => { const f = draw(p, { known, ...more }); f.dataset.name = name; place.append(f); }));
  const picture = section.querySelector(".picture"), wide = Math.max(320, Math.min(560, picture.clientWidth || 560));
  const chosen = run.points.find(p => p.kappa === run.chosen[0] && p.top_k === run.chosen[1]), scores = Object.keys(run.metrics);
  const ring = chosen && ["forget_score", "retain_score"].map(name => chosen.values[run.answer][scores.indexOf(name)] ?? null);
  if (run.figures.trade_off) put(picture, ["trade_off"], { size: [wide, .62 * wide], ring });
  if (ring) picture.querySelector("figcaption").append(`; ring: ${run.labels[run.answer]}, kappa ${run.chosen[0].toLocaleString("en")}; star: retrained`);
  sweep(section, run, known, apply);
  for (const { title, names, open } of run.groups) {
    const grid = el("div", { class: "grid" }), part = el("details", {}, el("summary", {}, el("h2", {}, title)), grid);
    const fill = () => { if (!grid.childNodes.length) { put(grid, names); apply(); } };
    part.addEventListener("toggle", fill); if (open) { part.open = true; fill(); }
    figures.append(part);
  }
}

// --- runs to choose from ---

addEventListener("beforeprint", () => document.querySelectorAll("details.paper").forEach(d => { d.open = true; }));
const sections = [...document.querySelectorAll(".run")], picks = ["what", "class", "run"].map(n => document.getElementById("pick-" + n));
function reveal(id) { sections.forEach(s => { s.hidden = s.id !== id; }); sections.forEach((s, i) => { if (!s.hidden) build(s, DATA[i]); }); }
function fill(select, values) { const old = select.value; select.replaceChildren(...values.map(([v, t]) => el("option", { value: v }, t))); if (values.some(([v]) => v === old)) select.value = old; }
if (sections.length === 1) build(sections[0], DATA[0]); else if (sections.length) {
  const unique = list => [...new Set(list)].map(v => [v, v]), [what, cls, run] = picks;
  const update = () => {
    fill(what, unique(sections.map(s => s.dataset.what))); let left = sections.filter(s => s.dataset.what === what.value);
    fill(cls, unique(left.map(s => s.dataset.classes))); left = left.filter(s => s.dataset.classes === cls.value);
    fill(run, left.map(s => [s.id, s.dataset.name])); reveal(run.value);
  };
  picks.forEach(p => p.addEventListener("change", update)); update();
}
