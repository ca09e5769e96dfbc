// Appended to the demo's page by test_demo.py: uses it as a person would and leaves what it saw in #seen.
{ // names of its own
const seen = { errors: [] }; onerror = message => { seen.errors.push(message); };
const leave = () => document.body.replaceChildren(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
addEventListener("unhandledrejection", event => { seen.errors.push(String(event.reason)); leave(); });
const text = id => document.getElementById(id).textContent, settled = async () => { await new Promise(r => setTimeout(r, 30));
  while (document.getElementById("answer").getAttribute("aria-busy") === "true") await new Promise(r => setTimeout(r, 30)); };
const costs = () => [...document.querySelectorAll("#costs b")].map(b => b.textContent), pictures = id => [...document.querySelectorAll(`#${id} img`)].map(i => i.alt);
onload = async () => {
  seen.first = text("said"); seen.firstCosts = costs();
  const pick = document.getElementById("class"); pick.value = "3"; pick.dispatchEvent(new Event("change")); await settled();
  seen.forgotten = text("said"); seen.costs = costs(); seen.alts = pictures("forgotten"); seen.others = pictures("others").length;
  const slider = document.getElementById("budget"); slider.value = 0; slider.dispatchEvent(new Event("input")); seen.kappa = text("kappa");
  document.getElementById("lift").click(); await settled(); seen.lifted = text("said"); seen.identical = costs()[2]; seen.bits = text("bits");
  seen.off = document.getElementById("lift").disabled;
  seen.unlabelled = [...document.querySelectorAll("input, select")].filter(n => !n.labels.length && !n.ariaLabel).length;
  seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  leave();
};
}
