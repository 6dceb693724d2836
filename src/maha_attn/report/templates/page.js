"use strict";
for (const plot of document.querySelectorAll(".plot")) {
  const figure = JSON.parse(plot.querySelector("script").textContent);
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  Plotly.newPlot(plot, figure.data, figure.layout, config);
  if (figure.layout.meta.legend) plot.after(legend(plot, figure.data));
}

function legend(plot, traces) {
  const list = document.createElement("ul");
  list.className = "legend";
  for (const name of new Set(traces.map((trace) => trace.name))) {
    const trace = traces.find((each) => each.name === name);
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    button.style.setProperty("--color", trace.line.color);
    button.style.setProperty("--style", trace.line.dash === "dot" ? "dotted" : "solid");
    if (traces.every((each) => each.name !== name || each.mode === "markers")) button.className = "points";
    button.textContent = name;
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", String(shown));
      const same = traces.flatMap((each, index) => (each.name === name ? [index] : []));
      Plotly.restyle(plot, { visible: shown }, same);
    });
    const item = document.createElement("li");
    item.append(button);
    list.append(item);
  }
  return list;
}

const number = (text) => {
  const value = parseFloat(text.replace(/,/g, "").replace("−", "-"));
  return Number.isNaN(value) ? null : value;
};

for (const heading of document.querySelectorAll("thead th")) {
  heading.querySelector("button").addEventListener("click", () => {
    const descending = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = heading.closest("table").tBodies[0];
    const key = (row) => row.cells[heading.cellIndex].textContent.trim();
    const rows = [...body.rows].sort((first, second) => {
      const [a, b] = [key(first), key(second)];
      const [x, y] = [number(a), number(b)];
      if ((x === null) !== (y === null) && (a === "–" || b === "–")) return x === null ? 1 : -1;
      const order = x !== null && y !== null ? x - y : a.localeCompare(b);
      return descending ? -order : order;
    });
    body.append(...rows);
  });
}
