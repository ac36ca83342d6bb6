// A line chart as SVG: axes, smoothing, zoom by dragging, values under the pointer or the arrow keys. Colours come from the style sheet.
const NS = "http://www.w3.org/2000/svg";
const MOST = 2400; // points kept of one line while it grows

function draw(tag, attributes, ...children) {
  const made = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function ticks(low, high, wanted) {
  const span = high - low;
  if (!(span > 0) || !Number.isFinite(span)) return [low];
  const raw = span / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw * (1 - 1e-9));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i += 1) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  for (const factors of [[1], [1, 2, 5]]) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) {
      for (const f of factors) if (f * 10 ** e >= low && f * 10 ** e <= high) found.push(f * 10 ** e);
    }
    if (found.length >= 2) return found;
  }
  return ticks(low, high, 4);
}

export function words(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toPrecision(3)} G`;
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)} M`;
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace("-", "−");
  return value.toLocaleString("en", { maximumSignificantDigits: 4 }).replace("-", "−");
}

export function smoothed(values, weight) {
  let mean = 0;
  let share = 1;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    share *= weight;
    return mean / (1 - share);
  });
}

// Lowest and highest of each stretch stay, so that no peak is lost.
export function thin(line, most) {
  const n = line.x.length;
  if (n <= most) return;
  const size = Math.ceil(n / (most / 2));
  const kept = [];
  for (let start = 0; start < n; start += size) {
    let low = start;
    let high = start;
    for (let i = start; i < Math.min(n, start + size); i += 1) {
      if (line.y[i] < line.y[low]) low = i;
      if (line.y[i] > line.y[high]) high = i;
    }
    kept.push(...new Set([Math.min(low, high), Math.max(low, high)]));
  }
  if (kept[kept.length - 1] !== n - 1) kept.push(n - 1);
  line.x = kept.map((i) => line.x[i]);
  line.y = kept.map((i) => line.y[i]);
}

export class Chart {
  // spec: {title, unit, log, lines: [{name, field, role, x, y, colour?}]}; zoomed(low, high) may fetch finer lines
  constructor(host, spec, { smoothing = 0.9, zoomed = null, height = 250 } = {}) {
    Object.assign(this, { host, spec, smoothing, zoomed, height, range: null, at: null, hidden: new Set() });
    host.replaceChildren();
    this.picture = draw("svg", { class: "chart live-chart", role: "img", tabindex: "0" });
    this.legend = document.createElement("ul");
    this.legend.className = "legend readout";
    host.append(this.picture, this.legend);
    this.picture.addEventListener("pointermove", (e) => this.#move(e));
    this.picture.addEventListener("pointerleave", () => { this.at = null; this.#mark(); });
    this.picture.addEventListener("pointerdown", (e) => { this.from = this.#value(e); this.picture.setPointerCapture(e.pointerId); });
    this.picture.addEventListener("pointerup", (e) => this.#release(e));
    this.picture.addEventListener("dblclick", () => this.zoom(null));
    this.picture.addEventListener("keydown", (e) => this.#key(e));
    this.pending = 0;
    new ResizeObserver(() => this.later()).observe(host);
    this.render();
  }

  later() {
    if (!this.pending) this.pending = requestAnimationFrame(() => { this.pending = 0; this.render(); });
  }

  add(rows) {
    let changed = false;
    for (const line of this.spec.lines) {
      for (const row of rows) {
        if (typeof row[line.field] !== "number" || (line.x.length && row.step < line.x[line.x.length - 1])) continue;
        line.x.push(row.step);
        line.y.push(row[line.field]);
        changed = true;
      }
      thin(line, MOST);
    }
    if (changed) this.later();
  }

  zoom(range) {
    this.range = range;
    this.render();
    if (this.zoomed) this.zoomed(range, (lines) => { this.spec.lines = lines; this.render(); });
  }

  #shown() {
    const [low, high] = this.range ?? [-Infinity, Infinity];
    return this.spec.lines.map((line, index) => ({ ...line, index })).filter((line) => !this.hidden.has(line.name)).map((line) => {
      const keep = line.x.map((x, i) => i).filter((i) => line.x[i] >= low && line.x[i] <= high);
      return { ...line, x: keep.map((i) => line.x[i]), y: keep.map((i) => line.y[i]) };
    }).filter((line) => line.x.length);
  }

  render() {
    const width = Math.max(240, this.host.clientWidth || 480);
    const { height } = this;
    const edge = { left: 58, right: 12, top: 12, bottom: 30 };
    const lines = this.#shown();
    this.picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.picture.setAttribute("height", height);
    this.picture.replaceChildren(draw("title", {}, `${this.spec.title}, ${this.spec.unit}`));
    const ys = lines.flatMap((line) => line.y);
    this.#names(lines);
    if (!ys.length) return;
    const log = this.spec.log && ys.every((y) => y > 0);
    let [low, high] = [Math.min(...lines.map((l) => Math.min(...l.y))), Math.max(...ys)];
    if (log) [low, high] = [low / 1.2, high * 1.2];
    else {
      const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      [low, high] = [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
    }
    let first = Math.min(...lines.map((l) => l.x[0]));
    let last = Math.max(...lines.map((l) => l.x[l.x.length - 1]));
    if (first === last) [first, last] = [first - 1, last + 1];
    const [a, b] = log ? [Math.log10(low), Math.log10(high)] : [low, high];
    const right = width - edge.right;
    const bottom = height - edge.bottom;
    const px = (x) => edge.left + ((x - first) / (last - first)) * (right - edge.left);
    const py = (y) => bottom - (((log ? Math.log10(y) : y) - a) / (b - a)) * (bottom - edge.top);
    Object.assign(this, { px, py, first, last, lines, edge, bottom, right });
    for (const value of log ? logTicks(low, high) : ticks(low, high, 6)) {
      const y = py(value);
      this.picture.append(draw("line", { x1: edge.left, x2: right, y1: y, y2: y, class: "grid" }));
      this.picture.append(draw("text", { x: edge.left - 8, y: y + 4, "text-anchor": "end", class: "tick" }, words(value)));
    }
    for (const value of ticks(first, last, width / 110).filter(Number.isInteger)) {
      this.picture.append(draw("text", { x: px(value), y: bottom + 20, "text-anchor": "middle", class: "tick" }, value.toLocaleString("en")));
      this.picture.append(draw("line", { x1: px(value), x2: px(value), y1: bottom, y2: bottom + 4, class: "axis" }));
    }
    this.picture.append(draw("line", { x1: edge.left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
    for (const line of lines) this.#curve(line);
    this.pointer = draw("line", { y1: edge.top, y2: bottom, class: "pointer", visibility: "hidden" });
    this.band = draw("rect", { y: edge.top, height: bottom - edge.top, class: "band", visibility: "hidden" });
    this.picture.append(this.band, this.pointer);
    this.#mark();
  }

  #curve(line) {
    const colour = line.colour === undefined ? "" : ` c${line.colour % 8}`;
    const path = (ys, css) => {
      const at = line.x.map((x, i) => `${this.px(x).toFixed(1)},${this.py(ys[i]).toFixed(1)}`);
      this.picture.append(draw("polyline", { points: at.join(" "), class: `curve ${css}${colour}` }));
    };
    if (line.role === "points" || line.x.length === 1) {
      for (const [i, x] of line.x.entries()) {
        this.picture.append(draw("circle", { cx: this.px(x), cy: this.py(line.y[i]), r: 4, class: `mark ${line.role}${colour}` }));
      }
      return;
    }
    const smooth = line.role === "raw" && this.smoothing > 0 && line.x.length > 4;
    path(line.y, smooth ? "raw faint" : line.role === "raw" ? "raw full" : line.role === "exact" ? "smooth" : line.role);
    if (smooth) path(smoothed(line.y, this.smoothing), "smooth");
  }

  #names(lines) {
    const shown = new Set(lines.map((line) => line.name));
    this.legend.replaceChildren(...this.spec.lines.map((line) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.className = `key ${line.role}${line.colour === undefined ? "" : ` c${line.colour % 8}`}`;
      button.setAttribute("aria-pressed", String(!this.hidden.has(line.name)));
      button.title = "Show or hide";
      button.addEventListener("click", () => {
        if (!this.hidden.delete(line.name)) this.hidden.add(line.name);
        this.render();
      });
      const value = document.createElement("output");
      const last = line.y[line.y.length - 1];
      value.textContent = shown.has(line.name) && last !== undefined ? words(last) : "";
      button.append(line.name, " ", value);
      item.append(button);
      return item;
    }));
  }

  #value(event) {
    const box = this.picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * this.picture.viewBox.baseVal.width;
    const share = (at - this.edge.left) / (this.right - this.edge.left);
    return this.first + Math.min(1, Math.max(0, share)) * (this.last - this.first);
  }

  #move(event) {
    if (!this.px) return;
    this.at = this.#value(event);
    this.#mark();
  }

  #release(event) {
    if (this.from === undefined || !this.px) return;
    const [a, b] = [this.from, this.#value(event)].sort((x, y) => x - y);
    this.from = undefined;
    if (this.px(b) - this.px(a) > 8) this.zoom([a, b]);
    else this.#mark();
  }

  #key(event) {
    if (event.key === "Escape") { this.zoom(null); return; }
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const xs = this.lines?.[0]?.x ?? [];
    if (!xs.length) return;
    event.preventDefault();
    const now = this.at === null ? xs.length - 1 : this.#nearest(xs, this.at) + (event.key === "ArrowLeft" ? -1 : 1);
    this.at = xs[Math.min(xs.length - 1, Math.max(0, now))];
    this.#mark();
  }

  #nearest(xs, at) {
    let [low, high] = [0, xs.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < at) low = middle + 1;
      else high = middle;
    }
    return low > 0 && at - xs[low - 1] < xs[low] - at ? low - 1 : low;
  }

  #mark() {
    if (!this.pointer) return;
    const outputs = [...this.legend.querySelectorAll("output")];
    this.pointer.setAttribute("visibility", this.at === null ? "hidden" : "visible");
    this.band.setAttribute("visibility", this.from === undefined || this.at === null ? "hidden" : "visible");
    if (this.from !== undefined && this.at !== null) {
      const [a, b] = [this.px(this.from), this.px(this.at)].sort((x, y) => x - y);
      this.band.setAttribute("x", a);
      this.band.setAttribute("width", Math.max(0, b - a));
    }
    let step = null;
    for (const line of this.lines) {
      const i = this.at === null ? line.x.length - 1 : this.#nearest(line.x, this.at);
      if (step === null && this.at !== null) step = line.x[i];
      outputs[line.index].textContent = words(line.y[i]) + (this.at === null ? "" : ` @ ${line.x[i].toLocaleString("en")}`);
    }
    if (step !== null) { this.pointer.setAttribute("x1", this.px(step)); this.pointer.setAttribute("x2", this.px(step)); }
  }

  // The drawing as a file of its own: what the style sheet says is written into it.
  file() {
    const copy = this.picture.cloneNode(true);
    const from = [this.picture, ...this.picture.querySelectorAll("*")];
    [copy, ...copy.querySelectorAll("*")].forEach((node, i) => {
      const style = getComputedStyle(from[i]);
      for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-family"]) node.setAttribute(name, style.getPropertyValue(name));
    });
    copy.setAttribute("xmlns", NS);
    return new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" });
  }
}
