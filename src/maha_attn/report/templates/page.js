"use strict";
for (const plot of document.querySelectorAll(".plot")) {
  const figure = JSON.parse(plot.querySelector("script").textContent);
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  Plotly.newPlot(plot, figure.data, figure.layout, config);
}

const number = (text) => {
  const value = parseFloat(text.replace(/,/g, ""));
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
