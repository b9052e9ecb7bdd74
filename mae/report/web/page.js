// Lays out the page from the data that stands in it: one run, several side by side, or a sweep.
"use strict";

function groupOf(key, several) {
  const family = ["lr", "grad_norm", "weight_norm"].find((f) => key.startsWith(`${f}/`));
  if (family) return family === "lr" ? "learning rate of each layer" : family.replace("grad_norm", "gradient norm").replace("_", " ") + " of each block";
  if (key.startsWith("val/loss_at_") && !several) return "val/loss at several mask ratios";
  if (key === "val/loss" && !several) return "loss";
  return key;
}

const TITLES = {lr: "learning rate", grad_norm: "gradient norm", images_per_second: "images a second",
  data_wait: "share of time waiting for data", memory_mb: "memory, MB", loss: "loss", amp_scale: "AMP scale"};

// The charts of runs. `update` shows the same runs with more values: zoom, axes and hidden series stay.
class Curves {
  constructor(runs) {
    this.axes = new Set(runs.flatMap((run) => Object.values(run.series).flatMap((s) => Object.keys(s.x))));
    this.x = "step";
    this.charts = new Map();  // group of metrics -> Chart
    this.grid = el("div", {class: "grid"});
    const choice = el("select", {id: "x", onchange: (event) => { this.x = event.target.value; this.draw(); }},
      ...[...this.axes].map((name) => el("option", {value: name}, name.replace("_", " "))));
    this.log = el("input", {type: "checkbox", id: "log", onchange: () => this.draw()});
    this.nodes = [el("h2", {}, "Curves"), el("div", {class: "bar"}, el("label", {}, "against ", choice), el("label", {}, this.log, " logarithmic"),
      el("span", {}, "drag to zoom in, double-click to see all, click a name to hide it, arrow keys read values")), this.grid];
    this.update(runs);
  }

  update(runs) {
    this.runs = runs;
    this.draw();
  }

  groups() {
    const several = this.runs.length > 1, groups = new Map();
    for (const run of this.runs) for (const [key, s] of Object.entries(run.series)) {
      const group = groupOf(key, several);
      if (several && group.includes(" of each ")) continue;
      const label = several ? run.name : key.replace(/^(lr|grad_norm|weight_norm)\//, "");
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push({label, x: s.x[this.x] || s.x.step, y: s.y});
    }
    const rank = ([group]) => group === "loss" ? 0 : group.includes("val/") ? 1 : group.includes("loss") ? 2 : group.includes("norm") ? 4 : 3;
    return [...groups].sort((a, b) => rank(a) - rank(b));
  }

  draw() {
    const groups = this.groups();
    const cards = groups.map(([group, series]) => {
      if (!this.charts.has(group)) this.charts.set(group, new Chart(TITLES[group] || group));
      const chart = this.charts.get(group);
      chart.show(series, this.x, this.log.checked);
      return chart.card;
    });
    replace(this.grid, cards);
  }
}

function curves(runs) {
  return runs.some((run) => Object.keys(run.series).length) ? new Curves(runs).nodes : [];
}

function slider(group) {
  const last = group.items.length - 1, image = el("img", {alt: group.name}), caption = el("p", {class: "soft"});
  const range = el("input", {type: "range", min: 0, max: last, value: last, "aria-label": `${group.name} over time`});
  const show = () => {
    const item = group.items[range.value];
    image.src = item.src;
    caption.textContent = item.caption;
  };
  range.addEventListener("input", show);
  show();
  return el("div", {class: "card pictures"}, el("h3", {}, group.name), image, last ? range : null, caption);
}

function layers(run) {
  if (run.layers.length < 2) return [];
  const [head, ...rows] = run.layers, best = Math.max(...rows.map((r) => Number(r[1])));
  return [el("h2", {}, "Layers"), wide("Layers", {id: "layers"}, el("h3", {}, "A probe of each layer, from one pass of the encoder"),
    el("table", {}, el("tr", {}, ...head.map((t) => el("th", {}, t))), ...rows.map((r) => el("tr", {class: Number(r[1]) === best ? "changed" : ""},
      el("td", {}, el("code", {}, `task.layer=${r[0]}`)), ...r.slice(1).map((v) => el("td", {class: "number"}, shown(Number(v))))))))];
}

function classes(run) {
  const c = run.classes;
  if (!c) return [];
  const parts = [];
  if (c.rows.length) {
    const rows = [...c.rows].sort((a, b) => a.accuracy - b.accuracy);
    const body = rows.map((r) => {
      const bar = el("span", {class: "share"});
      bar.style.width = `${1.6 * r.accuracy}px`;
      return el("tr", {}, el("td", {}, r.name), el("td", {class: "number"}, shown(r.images)),
        el("td", {class: "number"}, r.accuracy.toFixed(1) + " %"), el("td", {}, bar));
    });
    const table = (list) => el("table", {}, el("tr", {}, ...["class", "images", "accuracy", ""].map((t) => el("th", {}, t))), ...list);
    const card = wide("Accuracy of each class", {id: "per-class"}, el("h3", {}, "Accuracy of each class, the worst first"), table(body.slice(0, 40)));
    if (body.length > 40) card.append(el("details", {}, el("summary", {}, `${body.length - 40} more`), table(body.slice(40))));
    parts.push(card);
  }
  if (c.confusion.length) parts.push(confusion(c));
  return [el("h2", {}, "Classes"), el("div", {class: "grid"}, ...parts)];
}

function confusion(c) {
  const names = [...new Set(c.confusion.flatMap(([t, p]) => [t, p]))];
  const order = c.rows.map((r) => r.name).filter((n) => names.includes(n));
  names.forEach((n) => { if (!order.includes(n)) order.push(n); });
  if (order.length > 30) {
    const wrong = c.confusion.filter(([t, p]) => t !== p).sort((a, b) => b[2] - a[2]).slice(0, 40);
    return wide("Most often confused", {id: "confusion"}, el("h3", {}, "Most often confused"), el("table", {},
      el("tr", {}, el("th", {}, "class"), el("th", {}, "taken for"), el("th", {}, "images")),
      ...wrong.map(([t, p, n]) => el("tr", {}, el("td", {}, t), el("td", {}, p), el("td", {class: "number"}, shown(n))))));
  }
  const count = new Map(c.confusion.map(([t, p, n]) => [`${t}\n${p}`, n]));
  const total = new Map(order.map((t) => [t, c.confusion.filter((r) => r[0] === t).reduce((s, r) => s + r[2], 0)]));
  const rows = order.map((t) => el("tr", {}, el("th", {}, t), ...order.map((p) => {
    const n = count.get(`${t}\n${p}`) || 0, share = n / (total.get(t) || 1);
    const cell = el("td", {title: `${t} taken for ${p}: ${n}`}, n ? String(n) : "");
    const tint = t === p ? 8 + 37 * share : 10 + 35 * Math.min(1, share * 4);  // percent; the text stays readable
    if (n) cell.style.background = `color-mix(in srgb, var(--curve-${t === p ? 0 : 1}) ${tint}%, var(--card))`;
    return cell;
  })));
  return wide("Confusion", {id: "confusion"}, el("h3", {}, "Confusion: rows the true class, columns the predicted one"),
    el("table", {class: "confusion"}, el("thead", {}, el("tr", {}, el("th", {}), ...order.map((p) => el("th", {}, p)))), ...rows));
}

function settings(run) {
  const row = ([key, value, standard]) => el("tr", {class: standard === undefined ? "" : "changed"}, el("td", {}, el("code", {}, key)),
    el("td", {class: "value"}, el("code", {}, value)), el("td", {class: "value soft"}, standard === undefined ? "" : `default ${standard}`));
  const changed = run.config.filter((c) => c.length > 2);
  const parts = [el("h2", {}, "Configuration")];
  if (run.command) parts.push(el("pre", {}, run.command));
  parts.push(wide("Configuration", {id: "config"},
    el("h3", {}, changed.length ? "What differs from the defaults" : "Nothing differs from the defaults"), el("table", {}, ...changed.map(row)),
    el("details", {}, el("summary", {}, `all ${run.config.length} keys`), el("table", {}, ...run.config.map(row)))));
  return parts;
}

function pairs(title, id, rows) {
  if (!rows.length) return [];
  return [el("h2", {}, title), wide(title, {id}, el("table", {},
    ...rows.map(([k, v]) => el("tr", {}, el("td", {class: "soft"}, k), el("td", {class: "value"}, v)))))];
}

function tiles(run) {
  return el("div", {class: "tiles"}, ...run.tiles.map(([name, value]) => el("div", {class: "tile"}, el("b", {}, shown(value)), el("span", {}, name))));
}

const SECTIONS = new Map();  // name -> the data and nodes of a section: the same data keep their nodes, open or scrolled

function section(name, data, build) {
  const text = JSON.stringify(data);
  if (SECTIONS.get(name)?.text !== text) SECTIONS.set(name, {text, nodes: build()});
  return SECTIONS.get(name).nodes;
}

let CURVES = null;  // of the page of one run

function oneRun(run) {
  const parts = [...section("head", [run.name, run.state, run.about, run.tiles, run.learning], () => [
    el("h1", {}, run.name, el("span", {class: `badge ${run.state}`}, run.state)), el("p", {class: "soft"}, run.about), tiles(run),
    ...(run.learning ? [el("p", {id: "learning"}, el("b", {}, "Is it still learning? "), run.learning)] : [])])];
  if (run.pictures.length) parts.push(...section("pictures", [], () => [el("h2", {}, "Pictures")]));
  for (const group of run.pictures) parts.push(...section(`picture ${group.name}`, group, () => [slider(group)]));
  if (Object.keys(run.series).length) {
    if (!CURVES) CURVES = new Curves([run]);
    else section("curves", run.series, () => { CURVES.update([run]); return []; });
    parts.push(...CURVES.nodes);
  }
  parts.push(...section("layers", run.layers, () => layers(run)), ...section("classes", run.classes, () => classes(run)), ...section("settings", run.config, () => settings(run)),
    ...section("events", run.events, () => pairs("Events", "events", run.events)),
    ...section("environment", run.environment, () => pairs("Environment", "environment", run.environment)));
  return parts;
}

function several(runs, differences) {
  const keys = [...new Set(runs.flatMap((r) => r.tiles.map(([k]) => k)))];
  const head = (first) => el("tr", {}, el("th", {}, first), ...runs.map((r) => el("th", {}, r.name)));
  const results = keys.map((k) => el("tr", {}, el("td", {class: "soft"}, k),
    ...runs.map((r) => el("td", {}, shown((r.tiles.find(([n]) => n === k) || [])[1])))));
  const differ = differences.map(([key, ...values]) => el("tr", {}, el("td", {}, el("code", {}, key)), ...values.map((v) => el("td", {class: "value"}, el("code", {}, v)))));
  const parts = [el("h2", {}, "Results"), wide("Results", {}, el("table", {}, head(""), ...results)),
    el("h2", {}, "Where the configurations differ"),
    wide("Where the configurations differ", {id: "differences"}, differ.length ? el("table", {}, head("key"), ...differ) : el("p", {}, "Nowhere."))];
  parts.push(...curves(runs));
  for (const run of runs) if (run.pictures.length) parts.push(el("h2", {}, run.name), ...run.pictures.map(slider));
  for (const run of runs) if (run.classes) { const made = classes(run); made[0].textContent = `Classes: ${run.name}`; parts.push(...made); }
  return parts;
}

const DATA = JSON.parse(document.getElementById("data").textContent);
const MAIN = document.querySelector("main");
if (DATA.table) {
  MAIN.append(...runTable(DATA.table));
  follow("/runs.json", 3, updateTable);
} else if (DATA.sweep) {
  MAIN.append(el("h1", {}, DATA.title), el("p", {class: "soft"}, DATA.sweep.about), ...sweepParts(DATA.sweep), ...curves(DATA.runs));
} else if (DATA.runs.length === 1) {
  MAIN.append(...oneRun(DATA.runs[0]));
  if (DATA.live) follow(`/run.json${location.search}`, 5, (data) => replace(MAIN, oneRun(data.runs[0])));
}
else MAIN.append(el("h1", {}, DATA.title), ...several(DATA.runs, DATA.differences));
document.body.dataset.ready = "yes";
