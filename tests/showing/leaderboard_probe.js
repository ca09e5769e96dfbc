// Appended to a copy of the page by test_leaderboard.py: uses it as a person would and leaves what it saw in #seen.
const seen = { rows: [], errors: window.__errors || [] };
const shown = () => [...document.querySelectorAll(".question")].filter(q => q.offsetParent !== null).map(q => q.parentNode.dataset.dataset + " " + q.dataset.question);
const choose = (name, value) => { const s = document.getElementById("pick-" + name); s.value = value; s.dispatchEvent(new Event("change", { bubbles: true })); };
seen.first = shown(); choose("question", "cost"); seen.cost = shown(); choose("question", ""); seen.all = shown().length;
choose("dataset", "D"); seen.dataset = shown(); seen.said = document.getElementById("found").textContent;
choose("model", "N"); seen.none = [shown(), document.getElementById("found").textContent]; choose("model", ""); choose("dataset", "");
document.querySelectorAll("details").forEach(d => { d.open = true; });
seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.scrolling = [...document.querySelectorAll(".sheet")].filter(s => s.offsetParent && s.scrollWidth > s.clientWidth).length;
seen.unlabelled = [...document.querySelectorAll("input, select")].filter(n => !n.labels.length && !n.ariaLabel).length;
seen.focusable = [...document.querySelectorAll("th button, .note a, select, pre + button")].every(n => n.tabIndex === 0);
const table = document.querySelector("table.sortable"), names = () => [...table.tBodies[0].rows].map(r => r.cells[0].firstChild.textContent.trim());
const press = () => table.querySelectorAll("th button")[1].click();
press(); seen.up = names(); press(); seen.down = names(); seen.sorted = table.querySelectorAll("th")[1].getAttribute("aria-sort");
seen.hidden = [...table.querySelectorAll("thead th")].filter(n => n.offsetParent === null).length;
document.body.replaceChildren(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
