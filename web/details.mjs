// The content of an open row: a job's settings and figures, charts, sample pictures and log.
import { Actions } from "./actions.mjs";
import { Charts } from "./charts.mjs";
import { h } from "./elements.mjs";
import { gigabytes } from "./progress.mjs";
import { Samples } from "./samples.mjs";
import { date, number, say } from "./words.mjs";

const LOG_KEPT = 200_000; // characters

export class Details {
  constructor(server, job) {
    this.server = server;
    this.offset = null;
    this.seen = "";
    this.wrong = h("div", { class: "lcm-line", role: "status" });
    this.charts = new Charts(server, job);
    this.samples = new Samples(server);
    this.actions = new Actions(server, job);
    this.log = h("pre", { tabindex: "0", "aria-label": say("log") });
    this.facts = h("dl", { class: "lcm-facts" });
    this.element = h("div", { class: "lcm-details" }, this.wrong, this.actions.element, this.facts, this.charts.element, this.samples.element,
      h("details", {}, h("summary", {}, say("log")), this.log));
    this.update(job);
  }

  close() {
    this.closed = true;
  }

  async update(job) {
    // The job's time of change shows whether anything is new, so an ended job is read only once.
    const stamp = `${job.changed} ${job.state}`;
    if (stamp === this.seen || this.busy) return;
    this.seen = stamp;
    this.busy = true;
    try {
      const [details, metrics] = await Promise.all([
        this.server.call(`jobs/${job.id}`), this.server.call(`jobs/${job.id}/metrics?points=300`),
      ]);
      if (this.closed) return;
      this.showFacts(details, metrics);
      this.actions.update(job, details);
      this.samples.update(job, details);
      await this.charts.update(job, metrics);
      await this.more(job);
      this.wrong.textContent = "";
    } catch (error) {
      this.seen = "";
      this.wrong.textContent = error.message;
    } finally {
      this.busy = false;
    }
  }

  /** Settings, times, and the newest speed, memory and gradient norm. */
  showFacts({ settings, checkpoint, created, changed }, { columns: names, rows }) {
    const last = (name) => rows.at(-1)?.[names.indexOf(name)];
    const short = (value) => number(value, { maximumSignificantDigits: 3 });
    const { rank, batch, lr, guidance, resolution, objective, data, start_from: start, text_encoders: encoders, vae } = settings;
    const kind = data?.kind === "pictures" ? say("pictures") : say("prompts");
    const facts = [
      [say("checkpoint"), checkpoint], [say("text encoders"), encoders?.join(", ")], ["VAE", vae],
      [say("data"), data?.kind === "pictures" ? kind : `${kind}, ${number(data?.count ?? 0)}`],
      [say("objective"), objective], [say("starts from"), start], [say("rank"), rank], [say("batch size"), batch],
      [say("guidance"), [guidance].flat().join("–")], [say("learning rate"), lr], [say("resolution"), resolution],
      [say("queued at"), date(created)], [say("last change"), date(changed)],
      [say("pictures a second"), last("samples_per_second"), short],
      [say("memory"), last("memory"), (bytes) => `${gigabytes(bytes / 1e6)} GB`],
      [say("gradient norm"), last("gradient_norm"), short],
    ].filter(([, value]) => value != null && value !== "");
    this.facts.replaceChildren(...facts.map(([name, value, shown = String]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, shown(value)))));
  }

  async more(job) {
    for (;;) {
      const query = this.offset === null ? "" : `?offset=${this.offset}`;
      const part = await this.server.call(`jobs/${job.id}/log${query}`);
      if (this.closed) return;
      const atEnd = this.log.scrollTop + this.log.clientHeight >= this.log.scrollHeight - 8;
      const grown = part.offset !== this.offset;
      this.offset = part.offset;
      if (part.text) this.log.textContent = (this.log.textContent + part.text).slice(-LOG_KEPT);
      if (atEnd) this.log.scrollTop = this.log.scrollHeight;
      if (!grown || part.text.length < 60_000) return;
    }
  }
}
