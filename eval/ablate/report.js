// Tables sort by the column whose head is pressed: numbers, with their units, by size, all else by name; empty cells stay last.
const units = { KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, k: 1e3, M: 1e6, G: 1e9, T: 1e12 };
function value(text) {
  const found = text.replaceAll(",", "").match(/^(-?[\d.]+(?:e[+-]?\d+)?)(?:\s+(\w+))?/);
  return found ? Number(found[1]) * (units[found[2]] || 1) : text;
}
function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  // names hold numbers: width=64 stands before width=128
  const [left, right] = [a, b].map((text) => String(text).split(/(\d+(?:\.\d+)?)/));
  for (let i = 0; i < Math.min(left.length, right.length); i++) {
    if (left[i] !== right[i]) return i % 2 ? left[i] - right[i] : left[i].localeCompare(right[i], "en");
  }
  return left.length - right.length;
}
for (const table of document.querySelectorAll(".sorts table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const was = head.getAttribute("aria-sort"), first = i ? "descending" : "ascending";
      const now = was === null ? first : was === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", now);
      const rows = [...body.rows].map((row) => [value(row.cells[i].textContent.trim()), row]);
      rows.sort(([a], [b]) => (a === "") - (b === "") || (now === "ascending" ? compare(a, b) : compare(b, a)));
      body.append(...rows.map(([, row]) => row));
    });
  });
}
