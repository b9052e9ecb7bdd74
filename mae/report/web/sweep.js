// What the page of a sweep adds: its figure, parallel coordinates, the table of its members.
"use strict";

function mix(share) {  // from blue, the worst, over grey to orange, the best
  const stops = [[37, 99, 168], [150, 160, 172], [217, 102, 43]], at = Math.max(0, Math.min(1, share)) * 2;
  const k = Math.min(1, Math.floor(at)), t = at - k;
  return `rgb(${stops[k].map((v, i) => Math.round(v + (stops[k + 1][i] - v) * t)).join(",")})`;
}

function parallel(sweep) {
  const W = 1180, H = 330, T = 46, B = 26, L = 90, R = 90;
  const axes = sweep.columns.filter((c) => sweep.members.some((m) => m.values[c] !== null && m.values[c] !== undefined));
  const main = sweep.metric, root = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `parallel coordinates of ${sweep.members.length} members; the table below has their values`});
  const px = (k) => axes.length === 1 ? W / 2 : L + k / (axes.length - 1) * (W - L - R);
  const range = {};
  axes.forEach((c, k) => {
    const found = sweep.members.map((m) => m.values[c]).filter((v) => v !== null && v !== undefined);
    const numeric = found.every((v) => typeof v === "number");
    const values = numeric ? [Math.min(...found), Math.max(...found)] : [...new Set(found.map(shown))];
    range[c] = (v) => {
      if (!numeric) return H - B - (values.length > 1 ? values.indexOf(shown(v)) / (values.length - 1) : 0.5) * (H - T - B);
      return H - B - (values[1] > values[0] ? (v - values[0]) / (values[1] - values[0]) : 0.5) * (H - T - B);
    };
    root.append(svg("line", {class: "frame", x1: px(k), x2: px(k), y1: T, y2: H - B, "stroke-width": 1.5}));
    const name = svg("text", {x: px(k), y: 18, "text-anchor": "middle"}, c);
    name.style.fontWeight = 600;
    root.append(name);
    const marks = numeric && values[0] === values[1] ? [values[0]] : values.slice(0, 12);
    for (const v of marks) root.append(svg("text", {x: px(k) + 7, y: range[c](v) + (numeric ? (v === values[1] ? -5 : 14) : 4)}, shown(v)));
  });
  const results = sweep.members.map((m) => m.values[main]).filter((v) => typeof v === "number");
  const [low, high] = [Math.min(...results), Math.max(...results)];
  const told = el("p", {class: "soft"}, `Each line is a member, from blue (worst ${main ?? "result"}) over grey to orange (best); the thick one is the best. Move over a line to read it.`);
  for (const m of sweep.members) {
    const points = axes.map((c, k) => [px(k), m.values[c]]).filter(([, v]) => v !== null && v !== undefined);
    const value = m.values[main];
    let share = typeof value === "number" && high > low ? (value - low) / (high - low) : 0.5;
    if (sweep.lower_is_better) share = 1 - share;
    const d = axes.map((c, k) => [px(k), m.values[c], c]).filter(([, v]) => v !== null && v !== undefined)
      .map(([x, v, c], k) => `${k ? "L" : "M"}${x.toFixed(1)} ${range[c](v).toFixed(1)}`).join("");
    if (points.length < 1) continue;
    const path = svg("path", {d, class: m.name === sweep.best ? "best" : "", stroke: typeof value === "number" ? mix(share) : "#c3cad3"});
    path.addEventListener("mouseenter", () => {
      root.querySelectorAll("path").forEach((p) => p.classList.toggle("dim", p !== path));
      path.classList.add("lit");
      told.textContent = `${m.name}: ` + axes.map((c) => `${c} ${shown(m.values[c])}`).join(", ");
    });
    path.addEventListener("mouseleave", () => {
      root.querySelectorAll("path").forEach((p) => p.classList.remove("dim", "lit"));
    });
    root.append(path);
  }
  return el("div", {}, wide("Parallel coordinates", {class: "card parallel"}, root), told);
}

function memberTable(sweep) {
  const columns = ["member", "state", ...sweep.columns];
  const head = el("tr", {}), body = el("tbody", {});
  const rows = sweep.members.map((m) => {
    const link = m.report ? el("a", {href: m.report}, m.name) : m.name;
    const cells = [el("td", {}, link), el("td", {}, m.state)];
    for (const c of sweep.columns) {
      cells.push(el("td", {class: typeof m.values[c] === "number" ? "number" : ""}, shown(m.values[c])));
    }
    const row = el("tr", m.name === sweep.best ? {class: "best"} : {}, ...cells);
    row.keys = [m.name, m.state, ...sweep.columns.map((c) => m.values[c])];
    return row;
  });
  let sorted = -1, down = false;
  const sort = (k) => {
    down = sorted === k ? !down : false;
    sorted = k;
    rows.sort((a, b) => {
      const [p, q] = [a.keys[k], b.keys[k]];
      const order = typeof p === "number" && typeof q === "number" ? p - q : String(p).localeCompare(String(q), "en", {numeric: true});
      return down ? -order : order;
    });
    [...head.children].forEach((th, i) => th.setAttribute("aria-sort", i !== k ? "none" : down ? "descending" : "ascending"));
    body.replaceChildren(...rows);
  };
  columns.forEach((c, k) => head.append(el("th", {scope: "col"}, el("button", {type: "button", onclick: () => sort(k)}, c))));
  body.append(...rows);
  return wide("Members", {}, el("table", {class: "sortable"}, el("thead", {}, head), body));
}

function paperTables(paper) {  // the tables of the paper, ours beside its numbers
  const number = (v, ours) => el("td", {class: ours ? "number ours" : "number"}, v === null ? "–" : v.toFixed(1));
  const cards = paper.tables.map((table) => {
    const rows = table.rows.map((r) => el("tr", r.default ? {class: "default"} : {},
      el("td", {}, r.member ? el("a", {href: `${r.member}/report.html`}, r.text) : r.text),
      ...[0, 1].flatMap((k) => r.results.map((pair) => number(pair[k], k === 0)))));
    return wide(table.title, {class: "card paper"}, el("h3", {}, `(${table.letter}) ${table.title}`), el("table", {},
      el("tr", {}, el("th", {}), el("th", {colspan: 2}, "ours"), el("th", {colspan: 2}, "the paper's")),
      el("tr", {}, el("th", {}, "case"), ...["ft", "lin", "ft", "lin"].map((t) => el("th", {class: "number"}, t))), ...rows));
  });
  return [el("h2", {}, "Table 1"), el("p", {class: "soft"}, paper.about), el("div", {class: "tables"}, ...cards)];
}

function sweepParts(sweep) {
  const parts = sweep.paper ? paperTables(sweep.paper) : [];
  if (sweep.best) {
    parts.push(el("h2", {}, "Best member"), el("p", {}, `${sweep.best}: ${sweep.metric} ${shown(sweep.best_value)}`),
      sweep.verdict ? el("p", {id: "verdict"}, sweep.verdict) : "", el("pre", {id: "best"}, sweep.command));
  }
  if (sweep.figure) {
    parts.push(el("h2", {}, "Result"), el("figure", {class: "card"}, el("img", {src: sweep.figure, alt: "metric against the swept value"})));
  }
  parts.push(el("h2", {}, "Parallel coordinates"), parallel(sweep), el("h2", {}, "Members"), memberTable(sweep));
  if (sweep.note) parts.push(el("p", {class: "soft"}, sweep.note));
  return parts;
}
