// Line charts by uPlot: hover or the arrow keys show values, dragging zooms, a double click or Escape shows all again.
"use strict";
const CURVE_COLOURS = 10;
const HEIGHT = 220;
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
const colour = (k) => `--curve-${k % CURVE_COLOURS}`;
// The range of x: a single value stands in the middle
const rangeOfX = ({data: [xs]}, min, max) => xs.length === 1 ? [xs[0] - 0.5, xs[0] + 0.5] : [min, max];

// The range of y: a single value stands in the middle; shares in percent end at 100, and nothing positive begins below 0
function rangeOfY(title, min, max) {
  if (min === null || max === null) return [0, 1];
  const [low, high] = max > min ? uPlot.rangeNum(min, max, 0.1, true) : [min - (0.1 * Math.abs(min) || 1), max + (0.1 * Math.abs(max) || 1)];
  const percent = /top1|top5|knn|miou/.test(title) && max <= 100;
  return [min >= 0 ? Math.max(0, low) : low, percent ? Math.min(100, high) : high];
}

// The range of positive values on a logarithmic axis: one digit and zeros at both ends
function logRange(_, min, max) {
  if (!(min > 0)) return [0.1, 1];
  const unit = (v) => 10 ** Math.floor(Math.log10(v)), low = Math.floor(min / unit(min)) * unit(min);
  const high = Math.ceil(max / unit(max)) * unit(max);
  return [low, high > low ? high : low + unit(low)];
}

function tick(v) {
  if (v === null || v === undefined) return "";
  const size = Math.abs(v);
  if (size >= 1e5) return v.toLocaleString("en", {notation: "compact", maximumFractionDigits: 3});
  return size === 0 || size >= 1e-3 ? Number(v.toPrecision(6)).toLocaleString("en", {maximumFractionDigits: 6}) : v.toExponential();
}

// The cursors of all charts of a page move together; zoom is of each chart alone
const SYNC = {key: "curves", setSeries: false, scales: ["x", null],
  filters: {pub: (kind) => kind === "mousemove" || kind === "mouseleave", sub: () => true}};

class Chart {
  constructor(title) {
    this.hidden = new Set();  // labels of series
    this.range = null;  // of x, where zoomed
    this.logarithmic = false;
    this.canvas = el("div", {class: "canvas", tabindex: 0, role: "application", onkeydown: (event) => this.key(event)});
    this.legend = el("div", {class: "legend"});
    this.card = el("figure", {class: "card chart", "data-title": title}, el("figcaption", {}, title), this.canvas, this.legend);
    this.card.chart = this;
    this.title = title;
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (this.plot && width && width !== this.plot.width) this.plot.setSize({width, height: HEIGHT});
    }).observe(this.canvas);
  }

  // series: [{label, x: [...], y: [...]}], numbers or null; x ascends
  show(series, xName, logarithmic) {
    if (xName !== this.xName) this.range = null;
    Object.assign(this, {series, xName, logarithmic});
    const drawable = (y) => logarithmic && y !== null && y <= 0 ? undefined : y;
    this.draw(uPlot.join(series.map((s) => [s.x, s.y.map(drawable)])));
  }

  draw(data) {
    if (this.plot) this.plot.destroy();
    const axis = {stroke: () => style("--soft"), grid: {stroke: () => style("--line"), width: 1}, ticks: {show: false},
      font: "11px system-ui, sans-serif", values: (_, splits) => splits.map(tick)};
    this.plot = new uPlot({
      width: this.canvas.clientWidth || 440, height: HEIGHT, padding: [10, 24, 0, 0], legend: {show: false},
      scales: {x: {time: false, range: rangeOfX}, y: this.logarithmic ? {distr: 3, range: logRange} : {range: (_, min, max) => rangeOfY(this.title, min, max)}},
      axes: [{...axis, size: 28, space: 60}, {...axis, size: 58}],
      cursor: {y: false, drag: {x: true, y: false, dist: 4}, sync: SYNC, points: {size: 8}},
      series: [{}, ...this.series.map((s, k) => this.seriesOptions(s, k))],
      hooks: {setCursor: [() => this.read()], setScale: [(plot, scale) => { if (scale === "x") this.zoomed(plot); }]},
    }, data, this.canvas);
    this.lay();
    if (this.range) this.plot.setScale("x", this.range);
    this.read();
  }

  seriesOptions(s, k) {
    const stroke = () => style(colour(k));
    return {label: s.label, stroke, width: 1.8, points: {size: 5, width: 1, fill: stroke}, show: !this.hidden.has(s.label)};
  }

  zoomed(plot) {
    if (plot !== this.plot) return;
    const {min, max} = plot.scales.x, xs = plot.data[0];
    this.range = min > xs[0] || max < xs[xs.length - 1] ? {min, max} : null;
  }

  lay() {
    const entry = (s, k) => {
      const mark = el("i", {}), value = el("span", {class: "value"});
      mark.style.background = `var(${colour(k)})`;
      if (this.series.length === 1) return el("span", {}, mark, value);
      return el("button", {type: "button", "aria-pressed": !this.hidden.has(s.label), onclick: (event) => {
        const show = this.hidden.delete(s.label);
        if (!show) this.hidden.add(s.label);
        event.currentTarget.setAttribute("aria-pressed", show);
        this.plot.setSeries(k + 1, {show});
      }}, mark, `${s.label} `, value);
    };
    this.legend.replaceChildren(el("span", {class: "at"}), ...this.series.map(entry));
  }

  // Writes the values under the cursor, or the last ones where there is none
  read() {
    if (!this.plot) return;
    const {idx, idxs} = this.plot.cursor, xs = this.plot.data[0], hovered = idx !== null && idx !== undefined;
    const at = hovered ? idx : xs.length - 1;
    this.legend.querySelector(".at").textContent = `${this.xName.replace("_", " ")} ${shown(xs[at])}`;
    this.legend.querySelectorAll(".value").forEach((value, k) => {
      const ys = this.plot.data[k + 1], near = hovered && idxs ? idxs[k + 1] : ys.findLastIndex((y) => y !== undefined);
      value.textContent = shown(near === null ? null : ys[near]);
    });
    const last = this.series.map((s, k) => `${s.label} ${this.legend.querySelectorAll(".value")[k].textContent}`);
    this.canvas.setAttribute("aria-label", `${this.title} at ${this.legend.querySelector(".at").textContent}: ${last.slice(0, 6).join(", ")}`);
  }

  key(event) {
    const xs = this.plot.data[0], {min, max} = this.plot.scales.x;
    if (event.key === "Escape") this.plot.setScale("x", {min: xs[0], max: xs[xs.length - 1]});
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!step) return;
    event.preventDefault();
    const visible = xs.map((_, k) => k).filter((k) => xs[k] >= min && xs[k] <= max), last = visible.length - 1;
    const at = visible[Math.min(last, Math.max(0, visible.indexOf(this.plot.cursor.idx ?? visible[last]) + step))];
    this.plot.setCursor({left: this.plot.valToPos(xs[at], "x"), top: HEIGHT / 2});
  }

  remove() {
    this.plot.destroy();
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  document.querySelectorAll(".chart").forEach((card) => card.chart.plot.redraw());
});
