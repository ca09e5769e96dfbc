const DATA = JSON.parse(document.getElementById("data").textContent), at = id => document.getElementById(id);
const percent = value => value === null ? "-" : `${value.toFixed(1)}\u00a0%`, signed = value => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(1)} points`;
const named = label => DATA.classes[label] === String(label) ? `class ${label}` : `class ${label} (${DATA.classes[label]})`;
const budgets = DATA.budgets;
let shown = DATA.first; // the last mask
function fill() {
  at("class").append(...DATA.classes.map((name, label) => el("option", { value: label }, name === String(label) ? name : `${label}: ${name}`)));
  at("class").value = DATA.first.class; at("budget").max = budgets.length - 1; at("budget").value = budgets.indexOf(DATA.first.kappa); budget();
}
function budget() {
  const kappa = budgets[+at("budget").value], text = `${kappa.toLocaleString("en")} of ${DATA.size.toLocaleString("en")} (${(100 * kappa / DATA.size).toFixed(1)} %)`;
  at("kappa").textContent = text; at("budget").setAttribute("aria-valuetext", text);
}
const guess = said => said ? `${DATA.classes[said[0]]} (${Math.round(100 * said[1])}\u00a0%)` : "no answer";
function pictures(box, samples, word) {
  box.replaceChildren(...samples.map(one => el("figure", { class: one.after && one.after[0] === one.label ? "kept" : "changed" },
    el("img", { src: "data:image/png;base64," + one.image, alt: `test image of ${named(one.label)}, before taken for ${guess(one.before)}, ${word} for ${guess(one.after)}` }),
    el("figcaption", {}, `${DATA.classes[one.label]}\nbefore ${guess(one.before)}\n${word} ${guess(one.after)}`))));
}
function costs(rows) { at("costs").replaceChildren(...rows.map(([name, value, note]) => el("div", {}, el("dt", {}, name), el("dd", {}, el("b", {}, value), el("span", {}, note))))); }
function mask(answer) {
  shown = answer; const { before, after } = answer, lost = after.retain_score - before.retain_score;
  at("said").textContent = `With ${answer.changed.toLocaleString("en")} weights switched off, ${named(answer.class)} is recognised ${percent(after.forget_score)} of the time (before: ${percent(before.forget_score)}).`;
  costs([["the class", percent(after.forget_score), `before: ${percent(before.forget_score)}`], ["other classes", percent(after.retain_score), `before: ${percent(before.retain_score)}, ${signed(lost)}`],
    ["weights off", answer.changed.toLocaleString("en"), `${(100 * answer.changed / DATA.size).toFixed(1)} % of the masked layer${DATA.layers > 1 ? "s" : ""}`], ["time", `${(1000 * answer.seconds).toFixed(0)} ms`, "to make the mask, on this machine"]]);
  at("bits").textContent = ""; at("lift").disabled = false;
  for (const side of ["forgotten", "others"]) pictures(at(side), answer.samples[side], "now");
}
function lifted(answer) {
  const { sha256, after } = answer;
  at("said").textContent = `The mask is off: ${named(answer.class)} is recognised ${percent(after.forget_score)} of the time, as before.`;
  if (after.forget_score !== shown.before.forget_score || !answer.identical) at("said").textContent = "The mask is off, and the classifier is not what it was: please report this.";
  costs([["the class", percent(after.forget_score), `before: ${percent(shown.before.forget_score)}`], ["other classes", percent(after.retain_score), `before: ${percent(shown.before.retain_score)}`],
    ["weights", answer.identical ? "identical" : "changed", "every bit compared with the untouched classifier's"]]);
  at("bits").textContent = `SHA-256 of the weights: before ${sha256.before.slice(0, 12)}, with the mask ${sha256.masked.slice(0, 12)}, lifted ${sha256.lifted.slice(0, 12)}.`;
  at("lift").disabled = true;
  for (const side of ["forgotten", "others"]) pictures(at(side), answer.samples[side], "lifted");
}
async function ask(what, label, kappa, show) {
  const buttons = ["forget", "lift"].map(at); buttons.forEach(b => { b.disabled = true; }); at("answer").setAttribute("aria-busy", "true");
  try {
    const reply = await fetch(`/${what}?class=${label}&kappa=${kappa}`), answer = await reply.json();
    if (reply.ok) { buttons.forEach(b => { b.disabled = false; }); show(answer); } else at("said").textContent = answer.error;
  } catch { at("said").textContent = "The server does not answer: is `demo` still running?"; }
  at("forget").disabled = false; at("answer").setAttribute("aria-busy", "false");
}
const forget = () => ask("forget", at("class").value, budgets[+at("budget").value], mask);
at("budget").addEventListener("input", budget); at("budget").addEventListener("change", forget); at("class").addEventListener("change", forget);
at("ask").addEventListener("submit", event => { event.preventDefault(); forget(); });
at("lift").addEventListener("click", () => ask("lift", shown.class, shown.kappa, lifted));
fill(); mask(DATA.first);
