"use strict"; // what pages share: making elements, tables that sort, commands that copy
document.documentElement.classList.add("js");
const el = (tag, attrs = {}, ...kids) => {
  const svg = "svg g path rect line circle text title polygon clipPath".split(" ").includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) node.setAttribute(k, v);
  node.append(...kids); return node;
};

document.querySelectorAll("table.sortable").forEach(table => table.querySelectorAll("thead th").forEach((th, column) => {
  th.dataset.head = th.textContent.trim();  // for paper, where browsers leave the buttons of a repeated head out
  const button = el("button", { type: "button" }, ...th.childNodes); th.replaceChildren(button);
  button.addEventListener("click", () => {
    const up = th.getAttribute("aria-sort") !== "ascending", body = table.tBodies[0], value = r => { const t = r.cells[column].textContent, n = parseFloat(t.replaceAll(",", "")); return isNaN(n) ? t : n; };
    table.querySelectorAll("th").forEach(o => o.removeAttribute("aria-sort")); th.setAttribute("aria-sort", up ? "ascending" : "descending");
    const order = (a, b) => { const x = value(a), y = value(b); if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); };
    body.append(...[...body.rows].sort(order));
  });
}));
document.querySelectorAll("pre").forEach(pre => {
  const button = el("button", { type: "button", class: "plain" }, "Copy"), said = el("span", { role: "status", class: "soft" });
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(pre.textContent); said.textContent = " copied"; } catch {
      getSelection().selectAllChildren(pre); // where the page may not write to the clipboard
      said.textContent = document.execCommand("copy") ? " copied" : " selected: press Ctrl+C"; }
  });
  pre.after(button, said);
});
