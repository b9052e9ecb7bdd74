// Line charts drawn as SVG: hover shows values, dragging zooms, a double click shows all again.
"use strict";
const COLOURS = ["#2563a8", "#d9662b", "#2a8f5c", "#8f4bb3", "#b8323a", "#7a6a1e", "#2aa0b0", "#d4569a", "#555f6e", "#94b32a"];
const SVG = "http://www.w3.org/2000/svg";

function el(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((c) => c !== null && c !== undefined));
  return made;
}

function svg(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return typeof value === "string" ? value : JSON.stringify(value);
  if (value && Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size < 1e-12) return "0";
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * unit).find((s) => s >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

// series: [{label, x: [...], y: [...]}], numbers or null
function lineChart(title, series, xName) {
  const W = 460, H = 220, L = 54, R = 10, T = 8, B = 26;
  const root = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title});
  const tip = el("div", {class: "tip"}), legend = el("div", {class: "legend"});
  const off = new Set();
  let window_ = null, logarithmic = false, drag = null, scale = null;
  const live = () => series.filter((_, k) => !off.has(k));
  const colour = (s) => COLOURS[series.indexOf(s) % COLOURS.length];

  function bounds() {
    let [x0, x1] = [Infinity, -Infinity], [y0, y1] = [Infinity, -Infinity];
    for (const s of live()) for (const x of s.x) { x0 = Math.min(x0, x); x1 = Math.max(x1, x); }
    if (window_) [x0, x1] = window_;
    for (const s of live()) s.y.forEach((y, k) => {
      if (y === null || s.x[k] < x0 || s.x[k] > x1 || (logarithmic && y <= 0)) return;
      y0 = Math.min(y0, y); y1 = Math.max(y1, y);
    });
    if (!(x1 > x0)) [x0, x1] = [x0 - 0.5, x0 + 0.5];
    if (!Number.isFinite(y0)) [y0, y1] = logarithmic ? [0.1, 1] : [0, 1];
    if (logarithmic) [y0, y1] = [Math.log10(y0), Math.log10(y1)];
    const room = (y1 - y0) * 0.05 || Math.abs(y1) * 0.05 || (logarithmic ? 0.1 : 0.05);
    return [x0, x1, y0 - room, y1 + room];
  }

  function draw() {
    const [x0, x1, y0, y1] = bounds();
    const px = (x) => L + (x - x0) / (x1 - x0) * (W - L - R);
    const py = (y) => H - B - ((logarithmic ? Math.log10(y) : y) - y0) / (y1 - y0) * (H - T - B);
    scale = {x0, x1, px, py};
    root.replaceChildren();
    for (const y of ticks(y0, y1, 5)) {
      const at = H - B - (y - y0) / (y1 - y0) * (H - T - B);
      root.append(svg("line", {class: "frame", x1: L, x2: W - R, y1: at, y2: at}));
      root.append(svg("text", {x: L - 6, y: at + 4, "text-anchor": "end"}, shown(logarithmic ? 10 ** y : y)));
    }
    for (const x of ticks(x0, x1, 6)) {
      root.append(svg("text", {x: px(x), y: H - 9, "text-anchor": "middle"}, shown(x)));
    }
    for (const s of live()) {
      let path = "", pen = false;
      s.y.forEach((y, k) => {
        if (y === null || s.x[k] < x0 || s.x[k] > x1 || (logarithmic && y <= 0)) { pen = pen && y !== null; return; }
        path += `${pen ? "L" : "M"}${px(s.x[k]).toFixed(1)} ${py(y).toFixed(1)}`;
        pen = true;
      });
      root.append(svg("path", {d: path, fill: "none", stroke: colour(s), "stroke-width": 1.8, class: "curve"}));
      if (s.x.length <= 40) s.y.forEach((y, k) => {
        if (y === null || s.x[k] < x0 || s.x[k] > x1 || (logarithmic && y <= 0)) return;
        root.append(svg("circle", {cx: px(s.x[k]), cy: py(y), r: 2.6, fill: colour(s)}));
      });
    }
    root.append(svg("g", {class: "cursor"}));
  }

  const place = (event) => {
    const box = root.getBoundingClientRect();
    const at = Math.min(W - R, Math.max(L, (event.clientX - box.left) / box.width * W));
    return scale.x0 + (at - L) / (W - L - R) * (scale.x1 - scale.x0);
  };

  function hover(event) {
    const x = place(event), cursor = root.querySelector(".cursor"), rows = [];
    cursor.replaceChildren();
    if (drag !== null) {
      const [a, b] = [scale.px(drag), scale.px(x)].sort((m, n) => m - n);
      cursor.append(svg("rect", {x: a, y: T, width: b - a, height: H - T - B, fill: "#2563a8", opacity: 0.15}));
    }
    let nearest = null;
    for (const s of live()) {
      let best = -1;
      s.x.forEach((v, k) => {
        if (s.y[k] !== null && v >= scale.x0 && v <= scale.x1 && (best < 0 || Math.abs(v - x) < Math.abs(s.x[best] - x))) best = k;
      });
      if (best < 0) continue;
      if (nearest === null || Math.abs(s.x[best] - x) < Math.abs(nearest - x)) nearest = s.x[best];
      rows.push([s, s.y[best]]);
      if (!logarithmic || s.y[best] > 0) {
        cursor.append(svg("circle", {cx: scale.px(s.x[best]), cy: scale.py(s.y[best]), r: 4, fill: colour(s), stroke: "#fff"}));
      }
    }
    if (nearest === null) return;
    cursor.prepend(svg("line", {x1: scale.px(nearest), x2: scale.px(nearest), y1: T, y2: H - B, stroke: "#9aa5b3"}));
    tip.replaceChildren(el("div", {}, `${xName} ${shown(nearest)}`), ...rows.slice(0, 12).map(([s, y]) => {
      const dot = el("i", {});
      dot.style.background = colour(s);
      return el("div", {}, dot, `${s.label}: ${shown(y)}`);
    }));
    tip.style.display = "block";
    const box = root.getBoundingClientRect(), left = event.clientX - box.left;
    tip.style.left = `${left > box.width * 0.6 ? left - tip.offsetWidth - 8 : left + 24}px`;
    tip.style.top = `${Math.max(0, event.clientY - box.top)}px`;
  }

  root.addEventListener("mousemove", hover);
  root.addEventListener("mouseleave", () => { tip.style.display = "none"; drag = null; draw(); });
  root.addEventListener("mousedown", (event) => { drag = place(event); event.preventDefault(); });
  root.addEventListener("mouseup", (event) => {
    const end = place(event), span = drag === null ? 0 : Math.abs(end - drag);
    if (span > (scale.x1 - scale.x0) * 0.02) window_ = [Math.min(drag, end), Math.max(drag, end)];
    drag = null;
    draw();
  });
  root.addEventListener("dblclick", () => { window_ = null; draw(); });

  if (series.length > 1) series.forEach((s, k) => {
    const line = el("i", {});
    line.style.background = colour(s);
    legend.append(el("button", {onclick: (event) => {
      if (!off.delete(k)) off.add(k);
      event.currentTarget.classList.toggle("off");
      draw();
    }}, line, s.label));
  });
  draw();
  const card = el("div", {class: "card chart"}, el("h3", {}, title), root, tip, legend);
  card.setLogarithmic = (on) => { logarithmic = on; draw(); };
  card.dataset.title = title;
  return card;
}
