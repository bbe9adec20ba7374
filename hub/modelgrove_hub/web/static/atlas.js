// The atlas: points by WebGL (by a 2-D canvas where there is none), names and rings on a second canvas.
const place = document.getElementById("atlas");
const [canvas, over] = place.querySelectorAll("canvas");
const tip = place.querySelector(".tip");
const legend = document.querySelector(".legend");
const chooser = document.getElementById("colour");
const SPAN = 65535;
// Okabe and Ito's colours and a few between, told apart by most eyes.
const COLOURS = [
  "#1f8a63", "#d55e00", "#3f7fd0", "#c55a9b", "#b98900", "#7b61c9", "#2ba3b5", "#8d6e4a", "#6a8f1f", "#b0413e", "#5a77a8",
  "#c77f3a", "#4a9a8a", "#9a5ab0", "#7f8f3a", "#d0657a",
];
const OTHER = "#8a938d";

const answer = await fetch(place.dataset.source, { headers: { Accept: "application/json" } });
if (!answer.ok) {
  document.querySelector(".legend").textContent = `The map could not be read (${answer.status}).`;
  throw new Error(`atlas: ${answer.status}`);
}
const atlas = await answer.json();
const count = atlas.names.length;
const xs = Float32Array.from(atlas.x, (v) => v / SPAN), ys = Float32Array.from(atlas.y, (v) => v / SPAN);
let view = { x: 0.5, y: 0.5, zoom: 1 }, colours = new Uint8Array(count * 4), lit = null, hovered = -1, wanted = false;

// ---- colours
function groups(column) {
  const values = column === "region" ? nearRegion() : column === "by_card" ? atlas.by_card.map((v) => (v ? "its card" : "its weights")) : atlas[column].map((v) => v ?? "none");
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  const names = [...counts].sort((a, b) => b[1] - a[1]).map(([name]) => name);
  return { values, names, counts };
}
// What a model does is what the nearest named part of the map does.
function nearRegion() {
  return Array.from({ length: count }, (_, i) => {
    let best = "elsewhere", least = Infinity;
    for (const region of atlas.regions) {
      const far = (xs[i] - region.x / SPAN) ** 2 + (ys[i] - region.y / SPAN) ** 2;
      if (far < least) { least = far; best = region.word; }
    }
    return best;
  });
}
function paintBy(column) {
  const { values, names, counts } = groups(column);
  const byName = new Map(names.map((name, i) => [name, i < COLOURS.length ? COLOURS[i] : OTHER]));
  for (let i = 0; i < count; i++) {
    const colour = parseInt(byName.get(values[i]).slice(1), 16);
    const faint = lit && !lit.has(i);
    colours.set([colour >> 16, (colour >> 8) & 255, colour & 255, faint ? 36 : 225], 4 * i);
  }
  legend.replaceChildren(...names.slice(0, 24).map((name) => {
    const line = document.createElement("li");
    const dot = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const circle = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    dot.setAttribute("viewBox", "0 0 10 10");
    for (const [key, value] of Object.entries({ cx: 5, cy: 5, r: 5, fill: byName.get(name) })) circle.setAttribute(key, value);
    dot.append(circle);
    line.append(dot, `${name} (${counts.get(name)})`);
    return line;
  }));
  painter.colours();
  draw();
}

// ---- the two painters
function webgl() {
  const gl = canvas.getContext("webgl", { antialias: true, alpha: true, premultipliedAlpha: false });
  if (!gl) return null;
  const shader = (type, source) => {
    const made = gl.createShader(type);
    gl.shaderSource(made, source);
    gl.compileShader(made);
    return made;
  };
  const program = gl.createProgram();
  gl.attachShader(program, shader(gl.VERTEX_SHADER, `
    attribute vec2 place; attribute vec4 colour; uniform vec4 view; uniform float size; varying vec4 tint;
    void main() { gl_Position = vec4((place - view.xy) * view.zw, 0.0, 1.0); gl_PointSize = size; tint = colour; }`));
  gl.attachShader(program, shader(gl.FRAGMENT_SHADER, `
    precision mediump float; varying vec4 tint;
    void main() { float d = length(gl_PointCoord - 0.5); float a = 1.0 - smoothstep(0.40, 0.5, d); gl_FragColor = vec4(tint.rgb, tint.a * a); }`));
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) return null;
  gl.useProgram(program);
  gl.enable(gl.BLEND);
  gl.blendFuncSeparate(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA, gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  const places = new Float32Array(2 * count);
  for (let i = 0; i < count; i++) { places[2 * i] = xs[i]; places[2 * i + 1] = ys[i]; }
  const buffer = (name, data, size, type, normal) => {
    const made = gl.createBuffer(), at = gl.getAttribLocation(program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, made);
    gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(at);
    gl.vertexAttribPointer(at, size, type, normal, 0, 0);
    return made;
  };
  buffer("place", places, 2, gl.FLOAT, false);
  const tints = buffer("colour", colours, 4, gl.UNSIGNED_BYTE, true);
  const uniforms = { view: gl.getUniformLocation(program, "view"), size: gl.getUniformLocation(program, "size") };
  return {
    colours() { gl.bindBuffer(gl.ARRAY_BUFFER, tints); gl.bufferData(gl.ARRAY_BUFFER, colours, gl.STATIC_DRAW); },
    draw(scale, size) {
      gl.viewport(0, 0, canvas.width, canvas.height);
      gl.clearColor(0, 0, 0, 0);
      gl.clear(gl.COLOR_BUFFER_BIT);
      gl.uniform4f(uniforms.view, view.x, view.y, (2 * scale * wide()) / canvas.width, (-2 * scale) / canvas.height);
      gl.uniform1f(uniforms.size, size);
      gl.drawArrays(gl.POINTS, 0, count);
    },
  };
}
function plain() {
  const context = canvas.getContext("2d");
  return {
    colours() {},
    draw(scale, size) {
      context.clearRect(0, 0, canvas.width, canvas.height);
      for (let i = 0; i < count; i++) {
        const x = (xs[i] - view.x) * scale * wide() + canvas.width / 2, y = (ys[i] - view.y) * scale + canvas.height / 2;
        if (x < -size || y < -size || x > canvas.width + size || y > canvas.height + size) continue;
        context.fillStyle = `rgba(${colours[4 * i]},${colours[4 * i + 1]},${colours[4 * i + 2]},${colours[4 * i + 3] / 255})`;
        if (count > 5000) context.fillRect(x - size / 2, y - size / 2, size, size);
        else { context.beginPath(); context.arc(x, y, size / 2, 0, 7); context.fill(); }
      }
    },
  };
}
const painter = webgl() ?? plain();
place.dataset.points = count;

// ---- drawing
const ratio = () => Math.min(devicePixelRatio || 1, 2);
// A wide window shows a wide map: distances on it say little, neighbourhoods much.
const wide = () => Math.max(1, Math.min(1.7, canvas.width / canvas.height));
const scale = () => Math.min(canvas.width, canvas.height) * view.zoom;
const radius = () => ratio() * Math.max(1.6, Math.min(9, (count < 500 ? 5 : count < 5000 ? 3.5 : 1.8) * Math.sqrt(Math.sqrt(view.zoom))));
const toScreen = (x, y) => [(x - view.x) * scale() * wide() + canvas.width / 2, (y - view.y) * scale() + canvas.height / 2];
function draw() {
  if (wanted) return;
  wanted = true;
  requestAnimationFrame(() => {
    wanted = false;
    const began = performance.now();
    painter.draw(scale(), 2 * radius());
    drawLabels();
    place.dataset.frame = (performance.now() - began).toFixed(1);
  });
}
function drawLabels() {
  const context = over.getContext("2d"), style = getComputedStyle(place);
  const text = style.color, back = style.backgroundColor;
  context.clearRect(0, 0, over.width, over.height);
  context.textAlign = "center";
  context.lineJoin = "round";
  const taken = [];
  const write = (word, x, y, font, width, alpha) => {
    context.font = font;
    const half = context.measureText(word).width / 2 + 4 * ratio(), tall = 10 * ratio();
    if (x + half < 0 || x - half > over.width || y < 0 || y > over.height) return;
    if (taken.some(([a, b, h, t]) => Math.abs(a - x) < h + half && Math.abs(b - y) < t + tall)) return;
    taken.push([x, y, half, tall]);
    context.globalAlpha = alpha;
    context.lineWidth = width * ratio();
    context.strokeStyle = back;
    context.strokeText(word, x, y + 4 * ratio());
    context.fillStyle = text;
    context.fillText(word, x, y + 4 * ratio());
  };
  const family = style.fontFamily;
  const near = [];
  for (let i = 0; i < count && near.length <= 240; i++) {
    const [x, y] = toScreen(xs[i], ys[i]);
    if (x > 0 && y > 0 && x < over.width && y < over.height && (!lit || lit.has(i))) near.push([i, x, y]);
  }
  if (near.length <= 240) drawPictures(context, near, back);
  for (const region of atlas.regions) {
    const [x, y] = toScreen(region.x / SPAN, region.y / SPAN);
    write(region.word, x, y, `650 ${(view.zoom > 3 ? 15 : 13.5) * ratio()}px ${family}`, 5, lit ? 0.45 : 0.95);
  }
  // Names, once there is room for them.
  if (near.length < 90 && view.zoom > 1.6 || lit && near.length < 40)
    for (const [i, x, y] of near) write(atlas.names[i].split("/").pop(), x, y + (pictures.get(i)?.complete ? side() / 2 : radius()) + 9 * ratio(), `${11.5 * ratio()}px ${family}`, 3, 0.9);
  context.globalAlpha = 1;
  if (hovered >= 0) {
    const [x, y] = toScreen(xs[hovered], ys[hovered]);
    context.beginPath();
    context.arc(x, y, radius() + 4 * ratio(), 0, 7);
    context.lineWidth = 2 * ratio();
    context.strokeStyle = text;
    context.stroke();
  }
}
// Where few models are in view, those that were painted with show their picture.
const pictures = new Map();
const side = () => ratio() * Math.min(72, 38 * Math.sqrt(view.zoom));
let fetching = 0;
function drawPictures(context, near, back) {
  const size = side(), drawn = [];
  for (const [i, x, y] of near) {
    const picture = pictures.get(i);
    if (!picture?.complete || !picture.naturalHeight) continue;
    if (drawn.some(([a, b]) => Math.abs(a - x) < size * 0.8 && Math.abs(b - y) < size * 0.8)) continue;
    drawn.push([x, y]);
    context.save();
    context.beginPath();
    context.roundRect(x - size / 2, y - size / 2, size, size, size / 6);
    context.lineWidth = 5 * ratio();
    context.strokeStyle = back;
    context.stroke();
    context.lineWidth = 3 * ratio();
    context.strokeStyle = `rgb(${colours.slice(4 * i, 4 * i + 3).join(",")})`;
    context.stroke();
    context.clip();
    const edge = Math.min(picture.naturalHeight, picture.naturalWidth);
    context.drawImage(picture, 0, 0, edge, edge, x - size / 2, y - size / 2, size, size);
    context.restore();
  }
  const asking = near.map(([i]) => i).filter((i) => !pictures.has(i));
  if (asking.length) {
    clearTimeout(fetching);
    fetching = setTimeout(() => fetchPictures(asking), 150);
  }
}
async function fetchPictures(asking) {
  for (let start = 0; start < asking.length; start += 50) {
    const some = asking.slice(start, start + 50);
    for (const i of some) pictures.set(i, null);
    const query = new URLSearchParams(some.map((i) => ["name", atlas.names[i]]));
    const answer = await fetch(`/atlas/faces?${query}`);
    if (!answer.ok) return;
    const found = await answer.json();
    for (const i of some) {
      if (!found[atlas.names[i]]) continue;
      const picture = new Image();
      picture.onload = draw;
      picture.src = found[atlas.names[i]];
      pictures.set(i, picture);
    }
  }
}
function resize() {
  for (const one of [canvas, over]) {
    one.width = Math.round(place.clientWidth * ratio());
    one.height = Math.round(place.clientHeight * ratio());
  }
  draw();
}
new ResizeObserver(resize).observe(place);

// ---- pointer: a grid of cells finds the nearest point without looking at all of them
const CELLS = Math.max(1, Math.min(256, Math.ceil(Math.sqrt(count / 4))));
const cells = new Map();
for (let i = 0; i < count; i++) {
  const key = Math.min(CELLS - 1, Math.floor(xs[i] * CELLS)) * CELLS + Math.min(CELLS - 1, Math.floor(ys[i] * CELLS));
  (cells.get(key) ?? cells.set(key, []).get(key)).push(i);
}
function nearest(px, py) {
  const s = scale(), x = (px * ratio() - canvas.width / 2) / (s * wide()) + view.x, y = (py * ratio() - canvas.height / 2) / s + view.y;
  const reach = (radius() + 7 * ratio()) / s, low = (v) => Math.max(0, Math.floor((v - reach) * CELLS));
  const high = (v) => Math.min(CELLS - 1, Math.floor((v + reach) * CELLS));
  let best = -1, least = reach * reach;
  for (let a = low(x); a <= high(x); a++)
    for (let b = low(y); b <= high(y); b++)
      for (const i of cells.get(a * CELLS + b) ?? []) {
        const far = (xs[i] - x) ** 2 + (ys[i] - y) ** 2;
          if (far < least) { least = far; best = i; }
      }
  return best;
}
const known = new Map();
let asked = 0;
function hover(i, px, py) {
  canvas.classList.toggle("over", i >= 0);
  if (i !== hovered) {
    hovered = i;
    tip.hidden = true;
    clearTimeout(asked);
    if (i >= 0) asked = setTimeout(() => tell(i), 60);
    draw();
  }
  if (i >= 0) {
    tip.style.left = `${Math.max(8, Math.min(px + 16, place.clientWidth - 250))}px`;
    tip.style.top = `${Math.max(8, Math.min(py + 16, place.clientHeight - 110))}px`;
  }
}
async function tell(i) {
  const name = atlas.names[i];
  if (!known.has(name)) {
    const answer = await fetch(`/atlas/model?name=${encodeURIComponent(name)}`);
    if (!answer.ok) return;
    known.set(name, await answer.text()); // escaped by the server's template
  }
  if (hovered !== i) return;
  tip.innerHTML = known.get(name);
  tip.hidden = false;
}
let from = null, moved = 0;
canvas.addEventListener("pointerdown", (event) => {
  from = [event.clientX, event.clientY];
  moved = 0;
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  if (from) {
    const [dx, dy] = [event.clientX - from[0], event.clientY - from[1]];
    moved += Math.abs(dx) + Math.abs(dy);
    from = [event.clientX, event.clientY];
    view.x -= (dx * ratio()) / (scale() * wide());
    view.y -= (dy * ratio()) / scale();
    canvas.classList.add("moving");
    draw();
  } else hover(nearest(event.offsetX, event.offsetY), event.offsetX, event.offsetY);
});
canvas.addEventListener("pointerup", (event) => {
  from = null;
  canvas.classList.remove("moving");
  const i = nearest(event.offsetX, event.offsetY);
  if (moved < 6 && i >= 0) location.href = `/m/${atlas.names[i].split("/").map(encodeURIComponent).join("/")}`;
});
canvas.addEventListener("pointerleave", () => hover(-1));
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoomAt(event.offsetX, event.offsetY, Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)));
}, { passive: false });
canvas.addEventListener("dblclick", (event) => zoomAt(event.offsetX, event.offsetY, 2));
function zoomAt(px, py, factor) {
  const dx = px * ratio() - canvas.width / 2, dy = py * ratio() - canvas.height / 2, before = scale();
  view.zoom = Math.max(0.6, Math.min(400, view.zoom * factor));
  view.x += (dx / before - dx / scale()) / wide();
  view.y += dy / before - dy / scale();
  draw();
}
document.getElementById("whole").addEventListener("click", () => { view = { x: 0.5, y: 0.5, zoom: 1 }; draw(); });
chooser.addEventListener("change", () => paintBy(chooser.value));

// ---- search highlights its hits
const number = new Map(atlas.names.map((name, i) => [name, i]));
document.querySelector("[data-atlas-search]").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = event.target.elements.q.value.trim();
  lit = null;
  if (text) {
    const found = await fetch(`/api/v1/search?limit=40&text=${encodeURIComponent(text)}`);
    const hits = found.ok ? (await found.json()).hits : [];
    const sure = hits.filter((hit) => hit.sure);
    lit = new Set((sure.length ? sure : hits.slice(0, 5)).map((hit) => number.get(hit.name)).filter((i) => i !== undefined));
    place.dataset.lit = lit.size;
  }
  paintBy(chooser.value);
});
const media = matchMedia("(prefers-color-scheme: dark)");
media.addEventListener("change", draw);
addEventListener("themechange", () => requestAnimationFrame(draw));
if (new Set(atlas.tree).size < 2 && atlas.regions.length) chooser.value = "region";
resize();
paintBy(chooser.value);
