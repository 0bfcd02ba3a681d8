(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const table = byId("results");
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const elsewhere = table.tBodies[1];
  const [metric, methods, streams, least] = ["metric", "methods", "streams", "least"].map(byId);
  let order = { column: null, up: false };

  const shown = (r, c) => {
    const found = data.cells[r][c][metric.value];
    return found && found.values >= Number(least.value) ? found : null;
  };

  function span(name, text) {
    const made = document.createElement("span");
    made.className = name;
    made.textContent = text;
    return made;
  }

  function draw() {
    byId("meaning").textContent = data.metrics[metric.value];
    const fits = (box, text) => text.toLowerCase().includes(box.value.trim().toLowerCase());
    const columns = heads.map((head, c) => c === 0 || fits(streams, head.textContent));
    rows.forEach((row, r) => {
      [...row.cells].slice(1).forEach((td, c) => {
        const inside = td.firstElementChild;
        const found = shown(r, c);
        if (!found) inside.replaceChildren("–");
        else {
          const parts = [span(found.best ? "mean rank1" : "mean", found.mean)];
          if (found.spread) parts.push(span("spread", ` ± ${found.spread}`));
          inside.replaceChildren(...parts, span("beside", found.of));
        }
      });
      row.hidden = !fits(methods, row.cells[0].textContent)
        || !data.cells[r].some((_, c) => columns[c + 1] && shown(r, c));
    });
    for (const row of table.rows) {
      if (row.cells.length === heads.length) {
        [...row.cells].forEach((cell, c) => { cell.hidden = !columns[c]; });
      }
    }
    if (elsewhere) elsewhere.hidden = !byId("elsewhere").checked || metric.value !== "accuracy";
    sort();
  }

  function sort() {
    const { column, up } = order;
    heads.forEach((head, c) => {
      if (column === c) head.setAttribute("aria-sort", up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    const numbers = rows.map((_, r) => r);
    if (column === 0 && !up) numbers.reverse();
    else if (column) {
      const keys = rows.map((_, r) => shown(r, column - 1)?.order);
      numbers.sort((a, b) => {
        if (keys[a] === undefined || keys[b] === undefined) {
          return (keys[a] === undefined) - (keys[b] === undefined) || a - b;
        }
        return up ? keys[a] - keys[b] : keys[b] - keys[a];
      });
    }
    body.append(...numbers.map((r) => rows[r]));
  }

  /* A column of figures begins with the largest, that of names with the first. */
  heads.forEach((head, c) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(head.firstChild);
    button.addEventListener("click", () => {
      order = { column: c, up: order.column === c ? !order.up : c === 0 };
      sort();
    });
    head.prepend(button);
  });
  for (const control of [metric, methods, streams, least, byId("elsewhere")]) {
    if (control) control.addEventListener("input", draw);
  }
  document.querySelector(".controls").hidden = false;
  draw();
})();
