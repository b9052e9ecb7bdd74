// Elements of a page, and numbers as it writes them.
"use strict";
const SVG = "http://www.w3.org/2000/svg";

function el(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((c) => c !== null && c !== undefined));
  return element;
}

function svg(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
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

// Makes these the children of an element; those that it has already are not moved
function replace(parent, nodes) {
  for (const child of [...parent.childNodes]) if (!nodes.includes(child)) child.remove();
  nodes.forEach((node, k) => { if (parent.childNodes[k] !== node) parent.insertBefore(node, parent.childNodes[k] || null); });
}

// A card that may be wider than the window: it can then be scrolled by keyboard too
function wide(title, attributes, ...children) {
  return el("div", {class: "card", role: "region", tabindex: 0, "aria-label": title, ...attributes}, ...children);
}
