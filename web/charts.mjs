// The charts of a job: loss, distances and recall, smoothed, beside those of another job, and as a
// CSV file.
import { Chart } from "./chart.mjs";
import { called, h } from "./elements.mjs";
import { number, say } from "./words.mjs";

const LEAST = 0.001; // the smallest distance that a chart shows
const PART = 5000; // steps per request: the server sends at most this many rows, one for each step
// The columns of sample pictures in the file.
const SAMPLED = ["distance", "distance_to_data", "recall"], STEPS = ["1_step", "2_steps", "4_steps"];
let smoothing = 0; // from 0 to 0.95; outlives the tab

export const columns = () => [say("1 step"), say("2 steps"), say("4 steps")];

/** The exponential mean of the values so far, without the pull of a start at 0. */
function smoothed(points, weight) {
  let sum = 0, total = 0;
  return points.filter(([, value]) => value != null).map(([step, value]) => {
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return [step, sum / total];
  });
}

export class Charts {
  constructor(server, job) {
    this.server = server;
    this.job = job;
    this.other = null; // the id of the job beside it
    this.loss = new Chart(say("loss"));
    this.error = new Chart(say("distance to the teacher"));
    this.likeness = new Chart(say("distance to the data"));
    this.recall = new Chart(say("recall"));
    this.share = h("span", { "aria-hidden": "true" });
    this.slider = h("input", { type: "range", min: "0", max: "95", step: "5", value: String(smoothing * 100), oninput: () => this.smooth() });
    this.select = h("select", { onchange: () => this.compare() });
    this.tools = h("div", { class: "lcm-tools", hidden: "" },
      h("label", {}, say("smoothing"), this.slider, this.share),
      h("label", {}, say("compare with"), this.select),
      h("button", { type: "button", onclick: () => this.download() }, say("download CSV")));
    this.element = h("div", {}, this.tools, this.loss.element, this.error.element, this.likeness.element, this.recall.element);
    this.smooth();
  }

  /** Shows new metrics, and fetches those of the compared job. */
  async update(job, metrics) {
    this.job = job;
    this.metrics = metrics;
    this.offer();
    this.beside = this.other && await this.metricsOf(this.other).catch(() => null); // it may be deleted
    this.draw();
  }

  metricsOf(id) {
    return this.server.call(`jobs/${id}/metrics?points=300`);
  }

  /** The other jobs that have figures. */
  offer() {
    const others = this.server.jobs().filter(({ id, step }) => step && id !== this.job.id);
    if (!others.some(({ id }) => id === this.other)) this.other = null;
    const names = others.map((other) => `${other.id} ${called(other)}`).join("\n");
    if (names === this.offered) return;
    this.offered = names;
    this.select.replaceChildren(h("option", { value: "" }, say("no other job")),
      ...others.map((other) => h("option", { value: other.id }, called(other))));
    this.select.value = this.other ?? "";
    this.select.disabled = !others.length;
  }

  async compare() {
    this.other = this.select.value || null;
    try {
      this.beside = this.other && await this.metricsOf(this.other);
    } catch (error) {
      this.server.toast("error", called(this.job), error.message);
    }
    this.draw();
  }

  smooth() {
    smoothing = Number(this.slider.value) / 100;
    this.share.textContent = number(smoothing, { style: "percent" });
    this.slider.setAttribute("aria-valuetext", this.share.textContent);
    if (this.metrics) this.draw();
  }

  draw() {
    this.tools.hidden = !this.metrics.rows.length;
    const other = this.beside && this.server.jobs().find(({ id }) => id === this.other);
    const sources = [{ name: "", metrics: this.metrics }];
    if (other) sources.push({ name: `${called(other)}: `, metrics: this.beside, dashed: true });
    this.loss.draw(sources.flatMap(({ name, metrics: { columns: names, rows }, dashed }) => {
      const column = names.indexOf("loss");
      const points = rows.map((row) => [row[0], row[column]]);
      const line = { name: name + say("loss"), colour: dashed ? 2 : 1, dashed };
      return smoothing ? [{ ...line, points, faint: true }, { ...line, points: smoothed(points, smoothing) }] : [{ ...line, points }];
    }));
    const draw = (chart, rowsOf, first) => chart.draw(sources.flatMap(({ name, metrics, dashed }) => columns().map((steps, i) => ({
      name: name + steps, colour: i + 1, dashed, points: rowsOf(metrics).map((row) => [row[0], row[i + first]]),
    }))));
    draw(this.error, ({ errors }) => errors, 1);
    // By chance a distance can be below 0, which a logarithmic scale cannot show.
    draw(this.likeness, ({ likeness }) => likeness.map((row) => row.map((value) => Math.max(value, LEAST))), 1);
    draw(this.recall, ({ likeness }) => likeness, 4);
  }

  /** Saves all figures of the job, a line for each step that has some. */
  async download() {
    const { id, step: last } = this.job, name = called(this.job);
    const lines = new Map();
    let head = [];
    try {
      for (let from = 0; from <= last; from += PART) {
        const { columns: names, rows, errors, likeness } = await this.server.call(
          `jobs/${id}/metrics?from=${from}&to=${from + PART - 1}&points=${PART}`);
        head = [...names, ...SAMPLED.flatMap((kind) => STEPS.map((steps) => `${kind}_${steps}`))];
        for (const row of rows) lines.set(row[0], row);
        const compared = new Map(likeness.map(([step, ...values]) => [step, values]));
        for (const [step, ...values] of errors) {
          const line = lines.get(step) ?? [step, ...names.slice(1).map(() => "")];
          lines.set(step, [...line.slice(0, names.length), ...values, ...(compared.get(step) ?? [])]);
        }
      }
    } catch (error) {
      this.server.toast("error", name, error.message);
      return;
    }
    const full = [...lines.values()].map((line) => head.map((_, i) => line[i] ?? ""));
    const table = [head, ...full.sort((a, b) => a[0] - b[0])];
    const url = URL.createObjectURL(new Blob([table.map((line) => `${line.join(",")}\n`).join("")], { type: "text/csv" }));
    h("a", { href: url, download: `${name.replaceAll("/", "-")}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser reads it after the click
  }
}
