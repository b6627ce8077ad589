// Sorting and filtering of the table of sites. Without it the page is complete, only still.
(() => {
  const table = document.getElementById("site-table");
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  const NON_FINITE = { inf: Infinity, "-inf": -Infinity, nan: Infinity };

  const keyOf = (row, column) => {
    const cell = row.cells[column];
    const key = cell.dataset.key;
    if (key === undefined) return cell.textContent;
    if (key === "") return null; // not measured: always last
    return key in NON_FINITE ? NON_FINITE[key] : Number(key);
  };
  const compare = (a, b) =>
    typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a < b ? -1 : a > b ? 1 : 0;

  const sortBy = (column, direction) => {
    const rows = original.map((row) => [keyOf(row, column), row]);
    rows.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : direction * compare(a, b)));
    body.append(...rows.map(([, row]) => row));
  };

  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    header.replaceChildren(button);
    const first = header.classList.contains("num") ? "descending" : "ascending";
    const second = first === "descending" ? "ascending" : "descending";
    button.addEventListener("click", () => {
      const next = { none: first, [first]: second, [second]: "none" }[header.ariaSort];
      headers.forEach((other) => (other.ariaSort = "none"));
      header.ariaSort = next;
      if (next === "none") body.append(...original);
      else sortBy(column, next === "ascending" ? 1 : -1);
    });
  });

  const filter = document.getElementById("filter");
  const shown = document.getElementById("shown");
  filter.parentElement.hidden = false;
  const texts = original.map((row) => row.textContent.toLowerCase());
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let visible = 0;
    original.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      visible += row.hidden ? 0 : 1;
    });
    shown.textContent = words.length ? `${visible} of ${original.length} shown` : "";
  });
})();
