// A line chart as SVG: steps to the right, values on a logarithmic scale. The pointer and the arrow
// keys read the values at a step. To a screen reader the chart is a slider over steps.
import { h } from "./elements.mjs";
import { linear, logarithmic } from "./ticks.mjs";
import { number, say } from "./words.mjs";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 320, HEIGHT = 140, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;

function s(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const short = (value) => number(value, Math.abs(value) < 0.001 || Math.abs(value) >= 10000
  ? { notation: "scientific", maximumSignificantDigits: 3 } : { maximumSignificantDigits: 3 });

const span = (list) => {
  const least = Math.min(...list), most = Math.max(...list);
  return most > least ? [least, most] : [least - 0.5, most + 0.5];
};

/** The point of a sorted line that is nearest to a step. */
const nearest = (points, step) => points.reduce((best, point) =>
  (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));

export class Chart {
  constructor(title) {
    this.title = title;
    this.step = null; // the step that is read; null if none is
    this.keys = h("figcaption");
    this.readout = h("div", { class: "lcm-readout", "aria-hidden": "true" });
    this.svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "slider", tabindex: "0", "aria-label": title });
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.read(null));
    this.svg.addEventListener("blur", () => this.read(null));
    this.svg.addEventListener("keydown", (event) => this.press(event));
    this.drawn = s("g", {});
    this.mark = s("g", {});
    this.svg.append(this.drawn, this.mark);
    this.element = h("figure", { class: "lcm-chart", hidden: "" }, this.keys, this.svg, this.readout);
  }

  /** Draws lines: {name, points: [[step, value], ...], colour: 1 to 3, dashed, faint}. Faint ones are
   * not read out. A single point is drawn as a dot. The chart is hidden if there is none. */
  draw(lines) {
    const drawable = lines.map((line) => ({ ...line, points: line.points.filter(([, value]) => value > 0) }))
      .filter(({ points }) => points.length);
    this.element.hidden = !drawable.length;
    if (!drawable.length) return;
    this.lines = drawable.filter(({ faint }) => !faint);
    const all = drawable.flatMap(({ points }) => points);
    this.steps = [...new Set(this.lines.flatMap(({ points }) => points.map(([step]) => step)))].sort((a, b) => a - b);
    const [left, right] = span(all.map(([step]) => step)), [low, high] = span(all.map(([, value]) => Math.log10(value)));
    this.x = (step) => LEFT + ((step - left) / (right - left)) * (WIDTH - LEFT - RIGHT);
    this.y = (value) => HEIGHT - BOTTOM - ((Math.log10(value) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    this.drawn.replaceChildren(
      s("rect", { x: LEFT, y: TOP, width: WIDTH - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM, class: "lcm-frame" }));
    for (const value of logarithmic(10 ** low, 10 ** high, 5)) {
      const y = this.y(value);
      this.drawn.append(
        s("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y, class: "lcm-grid" }),
        s("text", { x: LEFT - 4, y: y + 3.5, "text-anchor": "end" }, short(value)));
    }
    for (const step of linear(left, right, 5, 1)) {
      const x = this.x(step);
      const anchor = x > WIDTH - 24 ? "end" : "middle"; // so that the last label is not cut
      this.drawn.append(
        s("line", { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM, class: "lcm-grid" }),
        s("text", { x: anchor === "end" ? WIDTH - 1 : x, y: HEIGHT - 6, "text-anchor": anchor }, number(step)));
    }
    for (const { points, colour, dashed, faint } of drawable) {
      const places = points.map(([step, value]) => [this.x(step).toFixed(1), this.y(value).toFixed(1)]);
      const look = { class: [`lcm-line-${colour}`, dashed && "lcm-dashed", faint && "lcm-faint"].filter(Boolean).join(" ") };
      this.drawn.append(places.length > 1 ? s("polyline", { points: places.join(" "), ...look })
        : s("circle", { cx: places[0][0], cy: places[0][1], r: 3, ...look }));
    }
    this.keys.replaceChildren(this.title, ...(this.lines.length > 1 ? this.lines : []).map(({ name, colour, dashed }) =>
      h("span", { class: `lcm-key lcm-line-${colour}${dashed ? " lcm-dashed" : ""}` }, name)));
    this.svg.setAttribute("aria-valuemin", this.steps[0]);
    this.svg.setAttribute("aria-valuemax", this.steps.at(-1));
    this.read(this.step);
  }

  point({ clientX }) {
    const { left, width } = this.svg.getBoundingClientRect();
    const x = ((clientX - left) / width) * WIDTH;
    this.read(this.steps.reduce((best, step) => (Math.abs(this.x(step) - x) < Math.abs(this.x(best) - x) ? step : best)));
  }

  press(event) {
    const at = this.step === null ? this.steps.length - 1 : this.steps.indexOf(this.step);
    const moved = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1,
      PageDown: at - 10, PageUp: at + 10, Home: 0, End: this.steps.length - 1 }[event.key];
    if (moved === undefined) return;
    event.preventDefault();
    event.stopPropagation(); // the front end moves selected nodes with the arrow keys
    this.read(this.steps[Math.min(Math.max(moved, 0), this.steps.length - 1)]);
  }

  /** Marks a step and shows its values; null removes the mark and shows the newest values. */
  read(step) {
    this.step = this.steps.includes(step) ? step : null;
    const shown = this.step ?? this.steps.at(-1);
    const points = this.lines.map(({ points }) => nearest(points, shown));
    const values = this.lines.map(({ name }, i) => `${name} ${short(points[i][1])}`).join(", ");
    const text = say("step {step}: {values}", { step: shown, values });
    this.readout.textContent = text;
    this.svg.setAttribute("aria-valuenow", shown);
    this.svg.setAttribute("aria-valuetext", text);
    this.mark.replaceChildren();
    if (this.step === null) return;
    const x = this.x(this.step);
    this.mark.append(s("line", { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM, class: "lcm-mark" }),
      ...points.map(([at, value], i) =>
        s("circle", { cx: this.x(at), cy: this.y(value), r: 3, class: `lcm-line-${this.lines[i].colour}` })));
  }
}
