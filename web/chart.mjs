// A small line chart as SVG: steps to the right, values on a logarithmic scale.
import { number, say } from "./words.mjs";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 320, HEIGHT = 130, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;
const COLOURS = ["var(--lcm-line-1)", "var(--lcm-line-2)", "var(--lcm-line-3)"];

function s(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const short = (value) => number(value, Math.abs(value) < 0.01 || Math.abs(value) >= 10000
  ? { notation: "scientific", maximumFractionDigits: 1 } : { maximumSignificantDigits: 3 });

/** Draws `lines` ({name: values}) over `steps` into the figure; hides it if none has two points. */
export function chart(figure, title, steps, lines) {
  const positive = Object.values(lines).map((list) => list.filter((y) => y > 0));
  figure.hidden = positive.every((list) => list.length < 2);
  if (figure.hidden) return;
  const span = (list) => {
    const least = Math.min(...list), most = Math.max(...list);
    return most > least ? [least, most] : [least - 0.5, most + 0.5];
  };
  const [left, right] = span(steps), [low, high] = span(positive.flat().map(Math.log10));
  const x = (step) => LEFT + ((step - left) / (right - left)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((Math.log10(value) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const last = (list) => list.findLast((value) => value > 0);
  const svg = s("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": say("{title} to step {step}: {values}", {
      title, step: right,
      values: Object.entries(lines).map(([name, list]) => `${name} ${short(last(list) ?? NaN)}`).join(", "),
    }),
  });
  svg.append(
    s("rect", { x: LEFT, y: TOP, width: WIDTH - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM, class: "lcm-frame" }),
    s("text", { x: LEFT - 4, y: HEIGHT - BOTTOM, "text-anchor": "end" }, short(10 ** low)),
    s("text", { x: LEFT - 4, y: TOP + 9, "text-anchor": "end" }, short(10 ** high)),
    s("text", { x: LEFT, y: HEIGHT - 6 }, number(left)),
    s("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, number(right)),
  );
  Object.values(lines).forEach((list, i) => {
    const points = list.map((value, at) => (value > 0 ? `${x(steps[at]).toFixed(1)},${y(value).toFixed(1)}` : null));
    svg.append(s("polyline", { points: points.filter(Boolean).join(" "), style: `stroke: ${COLOURS[i]}` }));
  });
  const caption = document.createElement("figcaption");
  caption.append(title);
  if (Object.keys(lines).length > 1) {
    Object.keys(lines).forEach((name, i) => {
      const key = document.createElement("span");
      key.style.color = COLOURS[i];
      key.textContent = ` ${name}`;
      caption.append(key);
    });
  }
  figure.replaceChildren(svg, caption);
}
