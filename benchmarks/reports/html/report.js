(() => {
  "use strict";
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);

  /** An element with properties and children; texts stay texts. */
  function make(name, properties, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(properties || {})) {
      if (value === undefined || value === null || value === "") continue;
      if (key === "class") element.className = value;
      else element.setAttribute(key, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  /* theme */
  const theme = byId("theme");
  const kept = {
    get() { try { return localStorage.getItem("cl-merge-theme") || ""; } catch { return ""; } },
    set(value) { try { localStorage.setItem("cl-merge-theme", value); } catch { /* not kept */ } },
  };
  function setTheme(value) {
    if (value) root.dataset.theme = value;
    else delete root.dataset.theme;
  }
  theme.value = ["light", "dark"].includes(kept.get()) ? kept.get() : "";
  setTheme(theme.value);
  theme.addEventListener("change", () => { setTheme(theme.value); kept.set(theme.value); });

  /* the table */
  const table = byId("results");
  const bodies = [...table.tBodies];
  const rows = bodies.flatMap((body) => [...body.rows].filter((row) => !row.matches(".group")));
  const homes = rows.map((row) => row.parentElement);
  const links = rows.map((row) => [...row.cells].slice(1).map((td) => td.firstElementChild));
  const sorted = make("tbody");
  sorted.hidden = true;
  table.append(sorted);
  const metric = byId("metric");
  let order = { column: null, up: false };

  function figure(shown, paper) {
    const { mean, spread, seeds, rank } = shown;
    const quiet = (text) => make("span", { class: "unseen" }, text);
    const parts = [make("span", { class: rank ? `mean rank${rank}` : "mean" }, mean)];
    if (spread) parts.push(make("span", { class: "spread" }, ` ± ${spread}`));
    if (rank) parts.push(quiet(` (${rank === 1 ? "best" : "second best"})`));
    if (paper && paper.difference) {
      const difference = make("span", { class: `difference d${paper.strength}` }, paper.difference);
      const said = [quiet(", "), `paper ${paper.value} `, difference];
      parts.push(make("span", { class: "beside" }, ...said));
    }
    if (seeds) parts.push(make("span", { class: "beside" }, quiet(", "), `${seeds} seeds`));
    return parts;
  }

  function draw() {
    const name = metric.value;
    byId("shown").textContent = data.metrics[name][0];
    byId("meaning").firstElementChild.textContent = data.metrics[name][1];
    rows.forEach((row, r) => links[r].forEach((link, c) => {
      const cell = data.cells[r][c];
      const shown = cell.figures[name];
      link.className = shown ? "" : cell.gap === "failed" ? "gap failed" : "gap";
      if (shown) link.replaceChildren(...figure(shown, name === "accuracy" ? cell.paper : null));
      else link.replaceChildren(cell.gap);
      if (!link.className) link.removeAttribute("class");
    }));
    sort();
  }

  function sort() {
    const { column, up } = order;
    heads.forEach((head, c) => {
      if (column === c) head.setAttribute("aria-sort", up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    for (const body of bodies) body.hidden = column !== null;
    sorted.hidden = column === null;
    if (column === null) {
      rows.forEach((row, r) => homes[r].append(row));
      return;
    }
    const key = (r) => column === 0
      ? data.methods[r][0] : data.cells[r][column - 1].figures[metric.value]?.order;
    const compare = column === 0 ? (a, b) => a.localeCompare(b, "en") : (a, b) => a - b;
    const keys = rows.map((_, r) => key(r));
    const numbers = rows.map((_, r) => r).sort((a, b) => {
      const [one, other] = [keys[a], keys[b]];
      if (one === undefined || other === undefined) {
        return (one === undefined) - (other === undefined);
      }
      return up ? compare(one, other) : compare(other, one);
    });
    sorted.append(...numbers.map((r) => rows[r]));
  }

  /* A column of figures begins with the largest, that of names with the first; then the other way,
     then as it was. */
  const heads = [byId("by-method"), ...table.querySelectorAll("th.by")];
  heads.forEach((head, c) => {
    const button = make("button", { type: "button", class: "sort" }, ...head.childNodes);
    button.addEventListener("click", () => {
      const first = c === 0;
      if (order.column !== c) order = { column: c, up: first };
      else if (order.up === first) order = { column: c, up: !first };
      else order = { column: null, up: false };
      sort();
    });
    head.append(button);
  });
  metric.value = "accuracy";
  metric.addEventListener("change", draw);
  for (const control of document.querySelectorAll(".theme, .metric")) control.hidden = false;

  /* details of a figure */
  const dialog = byId("cell");
  const body = byId("cell-body");
  const places = new Map();
  data.cells.forEach((row, r) => row.forEach((cell, c) => places.set(cell.id, [r, c])));
  let opener = null;

  function address(hash) {
    try { history.replaceState(null, "", hash || location.pathname + location.search); }
    catch { /* the address stays as it is */ }
  }

  function open(id, from) {
    const [r, c] = places.get(id);
    opener = from || links[r][c];
    byId("cell-title").textContent = `${data.methods[r][0]} on ${data.settings[c]}`;
    body.replaceChildren(...details(r, c));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    byId("cell-title").focus({ preventScroll: true });
  }

  function details(r, c) {
    const cell = data.cells[r][c];
    const parts = [];
    if (data.methods[r][1]) parts.push(make("p", {}, data.methods[r][1]));
    const first = cell.seeds.find((seed) => seed.training || seed.merger) || {};
    const facts = [
      ["training", first.training],
      ["merger", first.merger],
      ["scale", cell.seeds.filter((s) => s.scale !== undefined).map((s) => scale(s.scale))
        .filter((text, i, all) => all.indexOf(text) === i).join("; ")],
      ["paper", cell.paper && `${cell.paper.value} %`
        + (cell.paper.difference ? ` (${cell.paper.difference})` : "")],
    ].filter(([, text]) => text);
    if (facts.length) {
      parts.push(make("dl", { class: "facts" }, ...facts.map(
        ([term, text]) => make("div", {}, make("dt", {}, term), make("dd", {}, text)))));
    }
    const sides = [];
    if (Object.keys(cell.figures).length) {
      sides.push(make("div", {}, make("h3", {}, "All metrics"), metricsTable(cell)));
    }
    if (cell.seeds.some((seed) => seed.matrix)) sides.push(make("div", {}, ...matrices(cell)));
    parts.push(make("div", { class: "sides" }, ...sides));
    parts.push(make("h3", {}, cell.seeds.length === 1 ? "Run" : "Runs"), ...cell.seeds.flatMap(run));
    return parts;
  }

  const scale = (value) => typeof value === "object"
    ? Object.entries(value).map(([name, number]) => `${name} ${number}`).join(", ")
    : String(value);

  function metricsTable(cell) {
    const many = data.seeds.length > 1;
    const head = ["metric", ...(many ? ["mean", "± std"] : []), ...data.seeds.map((s) => `seed ${s}`)];
    const lines = Object.entries(data.metrics).filter(([name]) => cell.figures[name]);
    return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "All metrics" },
      make("table", { class: "data" },
        make("caption", { class: "unseen" }, "All metrics, by seed"),
        make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))),
        make("tbody", {}, ...lines.map(([name, [title]]) => {
          const { mean, spread, values } = cell.figures[name];
          const texts = [...(many ? [mean, spread] : []), ...values];
          return make("tr", {}, make("th", { scope: "row" }, title),
            ...texts.map((text) => make("td", {}, text || "–")));
        }))));
  }

  function matrices(cell) {
    const found = cell.seeds.map((seed, i) => [seed, i]).filter(([seed]) => seed.matrix);
    const among = make("select", {}, make("option", { value: "matrix" }, "all classes"),
      make("option", { value: "aware" }, "the classes of its own task"));
    const which = make("select", {},
      ...found.map(([, i]) => make("option", { value: String(i) }, String(data.seeds[i]))));
    const place = make("div", { class: "scroll", tabindex: "0", role: "group",
      "aria-label": "Accuracy matrix" });
    const show = () => {
      const seed = cell.seeds[Number(which.value)];
      place.replaceChildren(heat(seed[among.value] || seed.matrix, data.runs[seed.run].tasks));
    };
    among.addEventListener("change", show);
    which.addEventListener("change", show);
    show();
    return [
      make("h3", {}, "Accuracy by task, %"),
      make("div", { class: "choice" }, make("label", {}, "among ", among),
        found.length > 1 ? make("label", {}, "seed ", which) : null),
      place,
    ];
  }

  function heat({ steps, rows: found }, names) {
    const [count, tasks] = [found.length, found[0].length];
    const label = (i) => count < steps ? "after any" : count === 1 && tasks > 1 ? "after all"
      : `after ${i + 1}`;
    const many = tasks > 12;
    const line = (values, i) => make("tr", {}, make("th", { scope: "row" }, label(i)),
      ...values.map((v) => {
        if (v === null) return make("td", {}, "–");
        return make("td", { style: `--v:${v}` }, v.toFixed(many ? 0 : 1));
      }));
    return make("table", { class: many ? "heat many" : "heat" },
      make("caption", { class: "unseen" }, "Accuracy on each task after learning each"),
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "task"),
        ...Array.from({ length: tasks },
          (_, j) => make("th", { scope: "col", title: names[j] }, String(j + 1))))),
      make("tbody", {}, ...found.map(line)));
  }

  function run(seed, i) {
    const facts = data.runs[seed.run];
    const links = Object.entries(facts.links).flatMap(
      ([name, link]) => [make("a", { href: link }, name), " "]);
    const said = seed.reason ? `${seed.state}: ${seed.reason}` : seed.state;
    const parts = [make("p", {}, `Seed ${data.seeds[i]}, ${facts.path}, `,
      make("span", { class: seed.reason ? "failed" : "" }, said), ". ", ...links)];
    if (facts.config) {
      parts.push(make("details", {}, make("summary", {}, "Configuration"),
        make("pre", { tabindex: "0" }, facts.config)));
    }
    return parts;
  }

  table.addEventListener("click", (event) => {
    const link = event.target.closest("td a");
    if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) {
      return;
    }
    event.preventDefault();
    address(link.hash);
    open(link.hash.slice(1), link);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => {
    address("");
    body.replaceChildren();
    if (opener) opener.focus();
  });
  const fromAddress = () => {
    const id = location.hash.slice(1);
    if (places.has(id)) open(id, null);
  };
  window.addEventListener("hashchange", fromAddress);
  fromAddress();
})();
