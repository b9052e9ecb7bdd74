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
  const head = ["run", "state", "task", "model", "data", "result", "step", "age", "loss", ...table.results, ...table.keys];
  const rows = table.rows.map((r) => el("tr", {},
    el("td", {}, el("a", {href: `/run?name=${encodeURIComponent(r.run)}`}, r.run)), el("td", {}, el("span", {class: `badge ${r.state}`}, r.state)),
    ...[r.task, r.model, r.data].map((v) => el("td", {}, v)),
    el("td", {class: "number"}, r.value === null ? "" : `${r.metric} ${shown(r.value)}`), el("td", {class: "number"}, shown(r.step)),
    el("td", {class: "number"}, age(r.age)), el("td", {}, spark(r.losses)),
    ...table.results.map((k) => el("td", {class: "number"}, shown(r.results[k]))),
    ...table.keys.map((k) => el("td", {}, r.keys[k] === undefined ? "" : shown(r.keys[k])))));
  return [el("h1", {}, "Runs"), el("p", {class: "soft", id: "about"}, aboutRuns(table)), wide("Runs", {},
    el("table", {id: "runs"}, el("thead", {}, el("tr", {}, ...head.map((t) => el("th", {scope: "col"}, t)))), el("tbody", {}, ...rows)))];
}

function aboutRuns(table) {
  const counts = ["running", "stale", "failed", "diverged"].map((state) => [table.rows.filter((r) => r.state === state).length, state]);
  return [`${table.rows.length} runs`, ...counts.filter(([n]) => n).map(([n, state]) => `${n} ${state}`), ...table.selection].join(", ");
}

// Shows new rows; cells that say the same stay as they are, with the focus in them
function updateTable(table) {
  const [, , card] = runTable(table), fresh = card.querySelector("table"), old = document.getElementById("runs");
  document.getElementById("about").textContent = aboutRuns(table);
  if (!old.tHead.isEqualNode(fresh.tHead)) old.tHead.replaceWith(fresh.tHead);
  const name = (row) => row.cells[0].textContent, rows = new Map([...old.tBodies[0].rows].map((row) => [name(row), row]));
  replace(old.tBodies[0], [...fresh.tBodies[0].rows].map((row) => {
    const known = rows.get(name(row));
    if (!known || known.cells.length !== row.cells.length) return row;
    [...row.cells].forEach((cell, k) => { if (!known.cells[k].isEqualNode(cell)) known.cells[k].replaceWith(cell); });
    return known;
  }));
}

function follow(url, seconds, draw) {
  const notice = el("p", {id: "notice", role: "status"});
  document.body.prepend(notice);
  let last = "";
  setInterval(async () => {
    try {
      const answer = await fetch(url);
      if (!answer.ok) return;  // a file was just being written
      const text = await answer.text();
      notice.textContent = "";
      if (text !== last) draw(JSON.parse(text));
      last = text;
    } catch (error) {
      notice.textContent ||= `No answer since ${new Date().toLocaleTimeString()}: the page shows what it had. mae runs --serve starts the server again.`;
    }
  }, seconds * 1000);
}
