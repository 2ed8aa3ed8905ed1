"use strict";
// Sorts tables by their columns and narrows them down by name. Without it, everything is there in graph order.
for (const table of document.querySelectorAll("table.layers")) {
  const groups = [...table.tBodies];
  const value = (group, key) => {
    const cell = group.querySelector(`[data-${key}]`);
    const text = cell ? cell.getAttribute(`data-${key}`) : "";
    return text === "" ? Infinity : Number(text);
  };
  for (const heading of table.querySelectorAll("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const key = heading.dataset.sort;
      const upwards = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", upwards ? "ascending" : "descending");
      const order = groups.map((group) => [value(group, key), group]);
      order.sort((a, b) => (a[0] === b[0] ? 0 : (a[0] < b[0] ? -1 : 1) * (upwards ? 1 : -1)));
      table.append(...order.map((entry) => entry[1]));
    });
  }
  const field = document.createElement("input");
  field.type = "search";
  field.id = "filter";
  const label = document.createElement("label");
  label.htmlFor = "filter";
  label.className = "filter";
  label.append("Show layers whose name holds ", field);
  table.parentElement.before(label);
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    for (const group of groups) group.hidden = !group.dataset.name.toLowerCase().includes(wanted);
  });
}
// A link to a layer opens its histograms.
const reveal = () => {
  const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  const inner = target && target.querySelector("details");
  if (inner) inner.open = true;
};
window.addEventListener("hashchange", reveal);
reveal();
