// Appended to a copy of the page by test_page.py: uses it as a person would and leaves what it saw in #seen.
const seen = { errors: window.__errors || [] }, visible = [...document.querySelectorAll(".run")].filter(s => !s.hidden);
const luminance = text => { const v = text.match(/[\d.]+/g).slice(0, 3).map(Number)
  .map(c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4); return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
const resolved = name => { const e = document.createElement("i"); e.style.color = `var(--${name})`; document.body.append(e);
  const c = getComputedStyle(e).color; e.remove(); return c; };
const back = getComputedStyle(document.body).backgroundColor;
seen.dark = luminance(back) < .1;
seen.text = Math.min(...["fg", "soft", "mark"].map(n => contrast(resolved(n), back)));
seen.series = Math.min(...[0, 1, 2, 3, 4, 5, 6, 7].map(n => contrast(resolved("c" + n), back)));
seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.visible = visible.map(s => s.id);
seen.figures = [...visible[0].querySelectorAll(".figures figure")].map(f => f.dataset.name);
seen.unnamed = [...document.querySelectorAll('svg[role=img]')].filter(s => !s.getAttribute("aria-label")).length;
seen.broken = [...document.querySelectorAll("svg *")].filter(n => [...n.attributes].some(a => /NaN|undefined|Infinity/.test(a.value))).length;
seen.images = [...visible[0].querySelectorAll("img")].map(i => i.alt);
seen.unlabelled = [...document.querySelectorAll("input, select")].filter(n => !n.labels.length && !n.ariaLabel).length;
const overlap = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
seen.collisions = [...visible[0].querySelectorAll("svg[role=img]")].flatMap(svg => { const all = [...svg.querySelectorAll("text")], box = n => n.getBoundingClientRect();
  return all.flatMap((one, i) => all.slice(i + 1).filter(other => overlap(box(one), box(other))).map(other => `${one.textContent} / ${other.textContent}`)); });
seen.cut = [...visible[0].querySelectorAll("svg[role=img]")].flatMap(svg => { const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(n => { const b = n.getBoundingClientRect(); return b.left < frame.left - 1 || b.right > frame.right + 1 || b.bottom > frame.bottom + 1; }).map(n => n.textContent); });
seen.captions = [...visible[0].querySelectorAll("figcaption")].map(n => n.textContent);
seen.dashes = [...new Set([...visible[0].querySelectorAll(".legend line")].map(n => n.getAttribute("stroke-dasharray")).filter(d => d))];
const slider = visible[0].querySelector("input.kappa"), said = () => visible[0].querySelector(".sweep .headline").textContent;
seen.slider = [];
for (let i = 0; i <= +slider.max; i++) { slider.value = i; slider.dispatchEvent(new Event("input")); seen.slider.push(said()); }
const table = visible[0].querySelector("table.sortable"), column = [...table.querySelectorAll("th")].findIndex(t => t.textContent.startsWith("retain_score"));
const cells = () => [...table.tBodies[0].rows].map(r => r.cells[column].textContent), press = () => table.querySelectorAll("th button")[column].click();
press(); seen.up = cells(); press(); seen.down = cells(); seen.sorted = table.querySelectorAll("th")[column].getAttribute("aria-sort");
seen.focus = [...document.querySelectorAll("th button")].every(b => b.tabIndex === 0);
const pick = document.getElementById("pick-class"); pick.value = "class 2"; pick.dispatchEvent(new Event("change"));
seen.picked = [...document.querySelectorAll(".run")].filter(s => !s.hidden).map(s => s.dataset.classes);
const rules = [...document.styleSheets].flatMap(s => [...s.cssRules]).filter(r => r.media);
const screenOnly = rules.filter(r => r.media.mediaText === "screen"), paper = rules.filter(r => r.media.mediaText === "print").flatMap(r => [...r.cssRules]);
screenOnly.forEach(r => { r.media.mediaText = "not all"; });
document.head.append(Object.assign(document.createElement("style"), { textContent: paper.map(r => r.cssText).join("\n") }));
document.body.style.cssText = "margin: 0; width: 718px"; // A4 without margins of 1 cm, at 96 to the inch
seen.offPaper = Math.max(...[...document.querySelectorAll("table")].map(t => t.getBoundingClientRect().right)) - 718;
document.body.replaceChildren(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
