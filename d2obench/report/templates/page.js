"use strict";
// Sorting: a click on a header sorts by data-s where a field has one, else by its text; fields without a number go last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[place], text = cell.dataset.s ?? cell.textContent.trim();
        return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
      };
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => {
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
        const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
        return down ? -order : order;
      });
      rows.forEach(([, row]) => { row.classList.remove("g"); body.append(row); });
    });
  });
}
// Figures: the interactive chart follows the colour scheme; the image, which is light, stays for paper.
const themes = JSON.parse(document.getElementById("themes").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
async function draw() {
  const config = themes[dark.matches ? "dark" : "light"];
  for (const chart of document.querySelectorAll(".chart")) {
    const spec = JSON.parse(document.getElementById(chart.dataset.spec).textContent);
    const label = chart.dataset.label ??= chart.querySelector("img").alt;
    try {
      const target = document.createElement("div");
      target.className = "live";
      await vegaEmbed(target, spec, { actions: false, renderer: "svg", mode: "vega-lite", config, tooltip: { theme: dark.matches ? "dark" : "light" } });
      const svg = target.querySelector("svg");
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", label);
      chart.querySelector(".live")?.remove();
      chart.append(target);
      chart.dataset.state = "drawn";
    } catch (problem) {
      console.error(`${chart.dataset.spec}: ${problem}`);
    }
  }
}
if (document.querySelector(".chart")) {
  draw();
  dark.addEventListener("change", draw);
}
addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("section > details:not([open])")) { part.open = true; part.dataset.printed = ""; } });
addEventListener("afterprint", () => { for (const part of document.querySelectorAll("details[data-printed]")) { part.open = false; delete part.dataset.printed; } });
