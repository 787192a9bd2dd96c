// Long tables made by pandas can be sorted by a click on a header; what is too wide scrolls with the keyboard; paper is
// white, whatever the theme.
(() => {
  const LONG = 8; // rows

  // "98.8 [95.7, 99.7]" and "-8.7 ± 2" sort as numbers, the rest as text.
  const key = (cell) => {
    const text = (cell ? cell.textContent : "").trim().replace("\u2212", "-");
    const number = parseFloat(text);
    return Number.isNaN(number) ? text.toLowerCase() : number;
  };
  const compare = (a, b) =>
    typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;

  // A cell that spans several rows stands in each of them once the table is sorted.
  const unspan = (body) => {
    for (const row of [...body.rows]) {
      for (const cell of [...row.cells]) {
        const span = cell.rowSpan;
        if (span < 2) continue;
        const place = [...row.cells].indexOf(cell);
        cell.rowSpan = 1;
        let next = row.nextElementSibling;
        for (let i = 1; i < span && next; i++, next = next.nextElementSibling) {
          next.insertBefore(cell.cloneNode(true), next.cells[place] || null);
        }
      }
    }
  };

  const sort = (table, header, column) => {
    const body = table.tBodies[0];
    unspan(body);
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [key(row.cells[column]), row]);
    rows.sort((a, b) => (up ? 1 : -1) * compare(a[0], b[0]));
    body.append(...rows.map((pair) => pair[1]));
  };

  const prepare = (table) => {
    const head = table.tHead && table.tHead.rows;
    if (!head || !table.tBodies.length || table.tBodies[0].rows.length < LONG) return;
    const columns = Math.max(...[...table.tBodies[0].rows].map((row) => row.cells.length));
    for (let column = 0; column < columns; column++) {
      // pandas names columns in one line of the head and the index in another: take the cell that has the name.
      const cells = [...head].filter((row) => row.cells.length === columns).map((row) => row.cells[column]);
      const header = cells.find((cell) => cell.textContent.trim());
      if (!header) continue;
      const name = header.textContent.trim();
      const button = document.createElement("button");
      button.className = "sort";
      button.type = "button";
      button.textContent = name;
      button.title = `sort by ${name}`;
      button.addEventListener("click", () => sort(table, header, column));
      header.replaceChildren(button);
    }
  };

  // A number stays on one line with its interval, and a long name is not pressed into a column of single words.
  const keep = (cell) => {
    const text = cell.textContent.trim();
    if (/^(.{0,17}|[-+]?\d.{0,30})$/.test(text) && cell.tagName === "TD") cell.style.whiteSpace = "nowrap";
    if (text.length > 40) cell.style.minWidth = "11rem";
  };

  // What is wider than its place scrolls, so it has to take the focus.
  const reach = (box) => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  };

  const root = document.documentElement;
  let theme;
  window.addEventListener("beforeprint", () => {
    theme = root.dataset.theme;
    root.dataset.theme = "light";
  });
  window.addEventListener("afterprint", () => {
    root.dataset.theme = theme;
  });

  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll("table.dataframe").forEach(prepare);
    document.querySelectorAll("table.dataframe tbody :is(td, th)").forEach(keep);
    document
      .querySelectorAll(".bd-article table, .bd-article .output, .bd-article div:has(> table), .bd-article figure")
      .forEach(reach);
  });
})();
