"use strict";
// State lives in the URL's hash (#layer=0&head=2&token=4&key=1&find=query), so that a link shows what its sender saw.
const data = JSON.parse(document.getElementById("data").textContent);
const { layers, heads, T, D, top: kept, tokens } = data, K = D / heads;
const $ = (id) => document.getElementById(id);
const last = { layer: layers - 1, head: 0, token: data.start[0], find: "" }; // what a hash does not say stays so
const svgNode = (name, attributes = {}, text = "") => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
};
let bytes; // the payload, unpacked
async function unpack() {
  const packed = Uint8Array.from(atob($("payload").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  bytes = new Uint8Array(await new Response(stream).arrayBuffer());
}

// One row of attention weights; where only the largest were kept, the others are 0
function weights(layer, head, row) {
  const result = new Float32Array(T), at = (layer * heads + head) * T + row;
  const value = (i) => (bytes[i] / 255) ** 2;
  if (!kept) return result.map((_, j) => value(at * T + j));
  const indices = layers * heads * T * kept;
  for (let k = 0; k < kept; k++) {
    const i = at * kept + k;
    result[bytes[indices + 2 * i] + 256 * bytes[indices + 2 * i + 1]] = value(i);
  }
  return result;
}

// Query (kind 0) or key (kind 1) of one token in one head, or null where it was left out to keep the page small
function vector(kind, layer, head, token) {
  const i = data.qk.indexOf(token);
  if (i < 0) return null;
  const start = layers * heads * T * (kept ? 3 * kept : T), part = 2 * layer + kind;
  const at = start + (part * data.qk.length + i) * D + head * K;
  return Array.from(bytes.subarray(at, at + K), (b) => (b << 24 >> 24) * data.scale[part]);
}

function state() {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (name, limit, otherwise) => {
    const value = parseInt(given.get(name), 10);
    return value >= 0 && value < limit ? value : otherwise;
  };
  const layer = number("layer", layers, last.layer), head = number("head", heads, last.head), token = number("token", T, last.token);
  const row = weights(layer, head, token); // the largest weight is shown unless another is asked for
  return { layer, head, token, key: number("key", T, row.indexOf(Math.max(...row))), find: given.get("find") ?? last.find };
}

function go(change) {
  const next = { ...last, ...change };
  if (!("key" in change)) delete next.key;
  location.hash = new URLSearchParams(next).toString();
}

function show(id, svg, caption) {
  const text = document.createElement("figcaption"), link = document.createElement("a");
  text.textContent = caption;
  link.textContent = "save SVG";
  link.download = `${id}.svg`;
  link.href = "data:image/svg+xml," + encodeURIComponent(new XMLSerializer().serializeToString(svg));
  text.append(link);
  $(id).replaceChildren(svg, text);
}

const canvasOf = (layer, head) => {
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  canvas.width = canvas.height = T;
  const image = context.createImageData(T, T), rows = tokens.map((_, i) => weights(layer, head, i));
  const most = Math.max(...rows.map((row) => Math.max(...row)));
  for (let i = 0; i < T; i++) {
    rows[i].forEach((w, j) => {
      const at = 4 * (i * T + j), ink = Math.sqrt(w / most);
      image.data.set([255 - 224 * ink, 255 - 160 * ink, 255 - 64 * ink, 255], at);
    });
  }
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
};

function matrix({ layer, head, token, key }) {
  const size = Math.max(6, Math.min(26, Math.floor(460 / T))), side = T <= 40 ? size * T : 460, label = T <= 40 ? 92 : 8;
  const cell = side / T, svg = svgNode("svg", { width: side + label + 4, height: side + label + 4, xmlns: "http://www.w3.org/2000/svg" });
  svg.append(svgNode("image", { x: label, y: label, width: side, height: side, href: canvasOf(layer, head), "image-rendering": "pixelated" }));
  if (T <= 40) tokens.forEach((name, i) => {
    const middle = label + (i + 0.5) * cell;
    svg.append(svgNode("text", { x: label - 5, y: middle + 4, "text-anchor": "end", "font-size": 12 }, name));
    svg.append(svgNode("text", { x: middle - 4, y: label - 5, transform: `rotate(-60 ${middle} ${label - 5})`, "font-size": 12 }, name));
  });
  svg.append(svgNode("rect", { x: label, y: label + token * cell, width: side, height: cell, fill: "none", stroke: "#b5382a" }));
  svg.append(svgNode("rect", { x: label + key * cell, y: label + token * cell, width: cell, height: cell, fill: "none", stroke: "#b5382a", "stroke-width": 2 }));
  svg.onclick = (event) => {
    const box = svg.getBoundingClientRect(), zoom = (side + label + 4) / box.width;
    const [j, i] = [event.clientX - box.left, event.clientY - box.top].map((p) => Math.floor((p * zoom - label) / cell));
    if (i >= 0 && j >= 0 && i < T && j < T) go({ token: i, key: j });
  };
  show("matrix", svg, `Layer ${layer + 1}, head ${head + 1}: ${kept ? `the ${kept} largest weights of each row` : "all weights"}.`);
}

// The tokens that a picture with one line a token has room for: around the chosen one, and those it looks at most
function neighbours(row, token) {
  if (T <= 48) return tokens.map((_, i) => i);
  const order = Array.from(row.keys()).sort((a, b) => row[b] - row[a]).slice(0, 24);
  return [...new Set([token, ...order])].sort((a, b) => a - b);
}

function lines({ layer, head, token }) {
  const chosen = weights(layer, head, token), shown = neighbours(chosen, token), step = 19, most = Math.max(...chosen);
  const name = (i) => (T <= 48 ? tokens[i] : `${i} ${tokens[i]}`);
  const svg = svgNode("svg", { width: 460, height: shown.length * step + 8, xmlns: "http://www.w3.org/2000/svg" });
  const y = (i) => shown.indexOf(i) * step + 14;
  for (const from of T <= 48 ? [...shown.filter((i) => i !== token), token] : [token]) {
    const row = from === token ? chosen : weights(layer, head, from);
    for (const to of shown) {
      if (row[to] < Math.min(0.02, most / 2)) continue;
      const stroke = from === token ? "#1f5fbf" : "#9aa5b1", opacity = from === token ? Math.sqrt(row[to]) : row[to] / 2;
      svg.append(svgNode("line", { x1: 142, y1: y(from) - 4, x2: 318, y2: y(to) - 4, stroke, "stroke-opacity": opacity, "stroke-width": 0.5 + 4 * row[to] }));
    }
  }
  for (const i of shown) {
    const weight = i === token ? 700 : 400;
    svg.append(svgNode("text", { x: 136, y: y(i), "text-anchor": "end", "font-weight": weight, "font-size": 12 }, name(i)));
    svg.append(svgNode("text", { x: 324, y: y(i), "font-size": 12 }, name(i) + (chosen[i] >= 0.005 ? `  ${chosen[i].toFixed(2)}` : "")));
  }
  svg.onclick = (event) => {
    const box = svg.getBoundingClientRect(), i = shown[Math.floor((event.clientY - box.top) * 460 / box.width / step)];
    if (i !== undefined) go(event.clientX - box.left < box.width / 2 ? { token: i } : { key: i });
  };
  show("lines", svg, `From each token on the left to those on the right; blue: from “${tokens[token]}”.`);
}

function pair({ layer, head, token, key }) {
  const query = vector(0, layer, head, token), other = vector(1, layer, head, key);
  if (!query || !other) return $("pair").replaceChildren(`Query and key are kept for ${data.qk.length} of ${T} tokens, to keep this file small; minibert study --save has them all.`);
  const terms = query.map((q, i) => q * other[i] / Math.sqrt(K)), most = Math.max(...terms.map(Math.abs), 1e-9);
  const step = Math.max(3, Math.min(9, 460 / K)), svg = svgNode("svg", { width: 10 + K * step, height: 220, xmlns: "http://www.w3.org/2000/svg" });
  terms.forEach((term, i) => {
    const height = Math.abs(term) / most * 100;
    svg.append(svgNode("rect", { x: 5 + i * step, y: term > 0 ? 110 - height : 110, width: step - 1, height, fill: term > 0 ? "#1f5fbf" : "#b5382a" }));
  });
  svg.append(svgNode("line", { x1: 0, x2: 10 + K * step, y1: 110, y2: 110, stroke: "#5d6874" }));
  const sum = terms.reduce((a, b) => a + b, 0), weight = weights(layer, head, token)[key];
  show("pair", svg, `“${tokens[token]}” asks, “${tokens[key]}” answers: the ${K} terms of q·k / √K sum to about ${sum.toFixed(2)}; softmax makes it a weight of ${weight.toFixed(3)}.`);
}

function course({ token }) {
  const lens = data.lens, i = lens ? lens.at.indexOf(token) : -1;
  if (i < 0) return $("course").replaceChildren(lens ? "The lens was not put on this token." : "");
  const svg = svgNode("svg", { width: 640, height: 190, xmlns: "http://www.w3.org/2000/svg" }), gap = 600 / (layers + 1);
  const most = Math.max(...lens.chances.map((layer) => layer[i][0]));
  lens.words.forEach((words, layer) => {
    const x = 20 + layer * gap, exact = lens.chances[layer][i][0], chance = exact / most;
    const same = words[i][0] === lens.words[layers][i][0];
    svg.append(svgNode("rect", { x, y: 150 - 130 * chance, width: gap * 0.7, height: 130 * chance, fill: same ? "#1b7f4b" : "#9aa5b1" }));
    svg.append(svgNode("text", { x, y: 144 - 130 * chance, "font-size": 12 }, words[i][0].slice(0, Math.max(3, Math.floor(gap / 8)))));
    svg.append(svgNode("text", { x, y: 168, "font-size": 12 }, `${layer || "emb."}: ${exact.toFixed(2)}`));
  });
  show("course", svg, `Token ${token}, “${tokens[token]}”: the likeliest word after each layer and its probability; green where it is the final one.`);
}

const filter = () => document.querySelectorAll(".names tbody tr").forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes($("find").value.toLowerCase()); });

function draw() {
  const now = Object.assign(last, state()), cell = $("grid").querySelector("i"), image = $("grid").querySelector("img");
  for (const [name, value] of Object.entries(now)) $(name).value = value;
  filter();
  Object.assign(cell.style, { display: "block", width: `${100 / heads}%`, height: `${100 / layers}%`, left: `${100 * now.head / heads}%`, top: `${100 * now.layer / layers}%` });
  document.querySelectorAll(".chip").forEach((chip, i) => chip.classList.toggle("on", i === now.token));
  image.onclick = (event) => go({ head: Math.floor(event.offsetX / image.clientWidth * heads), layer: Math.floor(event.offsetY / image.clientHeight * layers) });
  for (const figure of [matrix, lines, pair, course]) figure(now);
}

// For the tests: what was unpacked makes sense, and all that should be drawn is drawn
function selftest() {
  let worst = 0;
  for (let row = 0; row < T; row += Math.ceil(T / 16)) worst = Math.max(worst, Math.abs(weights(layers - 1, heads - 1, row).reduce((a, b) => a + b) - 1));
  const expected = layers * heads * T * (kept ? 3 * kept : T) + 2 * layers * data.qk.length * D;
  $("selftest").value = JSON.stringify({ ...state(), worst: kept ? 0 : worst, bytes: bytes.length === expected, drawn: [...document.querySelectorAll("figure svg")].length, seconds: performance.now() / 1000 });
}

async function start() {
  document.documentElement.classList.add("script");
  const count = (size) => Array.from({ length: size }, (_, i) => i + 1), names = tokens.map((name, i) => `${i} ${name}`);
  for (const [id, values] of Object.entries({ layer: count(layers), head: count(heads), token: names, key: names })) {
    $(id).append(...values.map((name, i) => new Option(name, i)));
    $(id).onchange = () => go({ [id]: $(id).value });
  }
  Object.assign($("find"), { oninput: filter, onchange: () => go({ find: $("find").value, key: last.key }) });
  document.querySelectorAll(".chip").forEach((chip, i) => { chip.onclick = (event) => { event.preventDefault(); go({ token: i }); }; });
  await unpack();
  draw();
  selftest();
  addEventListener("hashchange", () => { if (location.hash.includes("=")) { draw(); selftest(); } });
}
start();
