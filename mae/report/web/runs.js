// The table of all runs, and what keeps a served page up to date.
"use strict";

function spark(values) {
  const numbers = values.filter((v) => typeof v === "number");
  if (numbers.length < 2) return "";
  const low = Math.min(...numbers), high = Math.max(...numbers), root = svg("svg", {viewBox: "0 0 100 24", class: "spark", role: "img", "aria-label": `loss from ${shown(numbers[0])} to ${shown(numbers[numbers.length - 1])}`});
  const points = numbers.map((v, k) => `${(k / (numbers.length - 1) * 98 + 1).toFixed(1)},${(high > low ? 22 - (v - low) / (high - low) * 20 : 12).toFixed(1)}`);
  root.append(svg("polyline", {points: points.join(" "), fill: "none", stroke: "var(--accent)", "stroke-width": 1.5}));
  return root;
}

function age(seconds) {
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) if (seconds >= 2 * size) return `${Math.round(seconds / size)} ${unit}`;
  return `${Math.round(seconds)} s`;
}

function runTable(table) {
  const head = ["run", "state", "task", "model", "data", "result", "step", "age", "loss", ...table.keys];
  const rows = table.rows.map((r) => el("tr", {},
    el("td", {}, el("a", {href: `/run?name=${encodeURIComponent(r.run)}`}, r.run)), el("td", {}, el("span", {class: `badge ${r.state}`}, r.state)),
    ...[r.task, r.model, r.data].map((v) => el("td", {}, v)),
    el("td", {class: "number"}, r.value === null ? "" : `${r.metric} ${shown(r.value)}`), el("td", {class: "number"}, shown(r.step)),
    el("td", {class: "number"}, age(r.age)), el("td", {}, spark(r.losses)),
    ...table.keys.map((k) => el("td", {}, r.keys[k] === undefined ? "" : shown(r.keys[k])))));
  const about = `${table.rows.length} runs, ${table.rows.filter((r) => r.state === "running").length} running`;
  return [el("h1", {}, "Runs"), el("p", {class: "soft"}, about), el("div", {class: "card"},
    el("table", {id: "runs", class: "sortable"}, el("thead", {}, el("tr", {}, ...head.map((t) => el("th", {scope: "col"}, t)))), el("tbody", {}, ...rows)))];
}

function follow(url, seconds, draw) {
  let last = "";
  setInterval(async () => {
    try {
      const text = await (await fetch(url)).text();
      if (text !== last && last) draw(JSON.parse(text));
      last = text;
    } catch (error) { /* the server is gone, or a file was just being written: the page stays as it is */ }
  }, seconds * 1000);
}
