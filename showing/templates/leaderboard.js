const boards = [...document.querySelectorAll(".board")], pick = name => document.getElementById("pick-" + name);
for (const name of ["dataset", "model"]) pick(name).append(el("option", { value: "" }, "all"), ...[...new Set(boards.map(b => b.dataset[name]))].map(v => el("option", { value: v }, v)));
function show() {
  const [dataset, model, question] = ["dataset", "model", "question"].map(name => pick(name).value);
  boards.forEach(b => {
    b.hidden = (dataset && b.dataset.dataset !== dataset) || (model && b.dataset.model !== model);
    b.querySelectorAll(".question").forEach(q => { q.hidden = question && q.dataset.question !== question; });
  });
  const left = boards.filter(b => !b.hidden), rows = left.reduce((sum, b) => sum + +b.dataset.rows, 0);
  document.getElementById("found").textContent = left.length ? `${rows} row${rows === 1 ? "" : "s"} in ${left.length} table${left.length === 1 ? "" : "s"}` : "no run is of this dataset and model";
}
const filters = document.getElementById("filters"); filters.hidden = false;
filters.addEventListener("change", show); filters.addEventListener("submit", event => event.preventDefault());
show();
