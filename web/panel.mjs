// The tab's content. Elements are made once for each job and filled again on each update, so that
// focus, scroll and what is open stay as they are.
import { chart } from "./chart.mjs";
import { date, number, say } from "./words.mjs";

const ACTIVE = ["preparing", "running", "stopping"];
const LOSS = { minimumFractionDigits: 4, maximumFractionDigits: 4 };
const LOG_KEPT = 200_000; // characters
let open = null; // id of the job whose details are shown; outlives the tab

function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** What a job is doing, in more words than its state where they are known. */
function doing(job) {
  const { activity, activity_done: done, activity_total: total } = job;
  if (!activity) return say(job.state);
  if (activity === "waiting for memory" && total) {
    return say("waiting for memory: {free} of {needed} GB are free", { free: gigabytes(done), needed: gigabytes(total) });
  }
  return total ? say("{activity} {done} of {total}", { activity: say(activity), done, total }) : say(activity);
}

const gigabytes = (megabytes) => number(megabytes / 1000, { minimumFractionDigits: 1, maximumFractionDigits: 1 });

function time(seconds) {
  if (seconds == null) return "";
  const minutes = Math.floor(seconds / 60);
  if (minutes >= 60) {
    return say("{hours} h {minutes} min left", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
  }
  return minutes ? say("{minutes} min left", { minutes })
    : say("{seconds} s left", { seconds: Math.ceil(seconds) });
}

const columns = () => [say("1 step"), say("2 steps"), say("4 steps")];

export class Panel {
  constructor(element, server) {
    this.server = server;
    this.rows = new Map();
    this.note = h("p", { class: "lcm-note", role: "status" });
    this.list = h("ul", { class: "lcm-jobs", "aria-label": say("LCM-LoRA jobs") });
    // A row must not move away under the pointer; on a screen that is touched nothing hovers.
    this.list.addEventListener("pointerenter", ({ pointerType }) => { this.isPointedAt = pointerType === "mouse"; });
    this.list.addEventListener("pointerleave", () => {
      this.isPointedAt = false;
      if (this.state) this.update(this.state);
    });
    this.heading = h("h2", { tabindex: "-1" }, say("LCM-LoRA jobs"));
    this.root = h("div", { class: "lcm-panel" }, this.heading, this.note, this.list);
    // Within the tab, for the page's head belongs to all packs.
    const style = new URL("./jobs.css", import.meta.url).href;
    element.replaceChildren(h("link", { rel: "stylesheet", href: style }), this.root);
  }

  close() {
    for (const row of this.rows.values()) row.close();
    this.rows.clear();
  }

  update(state) {
    this.state = state;
    const focused = this.list.contains(document.activeElement) ? document.activeElement : null;
    const row = focused?.closest("li");
    const place = [...this.list.children].indexOf(row);
    this.fill(state);
    if (!focused || this.list.contains(document.activeElement)) return;
    // A row that moved has lost the focus. Of one that is gone, the next one takes it.
    const heir = row.isConnected ? row : this.list.children[Math.min(place, this.list.children.length - 1)];
    const same = focused.isConnected ? focused : heir?.querySelector(`[data-action="${focused.dataset.action}"]`);
    const target = (row.isConnected && same) || heir?.querySelector(".lcm-head") || this.heading;
    target.focus({ preventScroll: true });
  }

  fill({ jobs, total, error }) {
    this.note.textContent = error || (jobs.length
      ? (total > jobs.length ? say("The newest {shown} of {total} are shown.", { shown: jobs.length, total }) : "")
      : say("No jobs yet. Queue a graph with the node “Distill LCM-LoRA (background)”."));
    const listed = new Set(jobs.map((job) => job.id));
    for (const [id, row] of this.rows) {
      if (listed.has(id)) continue;
      row.close();
      row.element.remove();
      this.rows.delete(id);
    }
    const waiting = jobs.filter((job) => job.state === "queued");
    jobs.forEach((job, place) => {
      let row = this.rows.get(job.id);
      if (!row) {
        row = new Row(this.server, () => this.toggle(job.id), () => { this.isAsked = true; });
        this.rows.set(job.id, row);
      }
      row.update(job, waiting, open === job.id);
      const stays = this.isPointedAt && !this.isAsked;
      if (stays && !row.element.isConnected) this.list.append(row.element);
      else if (!stays && this.list.children[place] !== row.element) {
        this.list.insertBefore(row.element, this.list.children[place] ?? null);
      }
    });
    this.isAsked = false;
  }

  toggle(id) {
    open = open === id ? null : id;
    for (const [id, row] of this.rows) row.show(open === id);
  }
}

class Row {
  /** toggle(): shows or hides the details. moves(): its place may change although the pointer is there. */
  constructor(server, toggle, moves) {
    this.server = server;
    this.moves = moves;
    this.name = h("span", { class: "lcm-name" });
    this.state = h("span", { class: "lcm-state" });
    this.head = h("button", { class: "lcm-head", type: "button", onclick: toggle, "aria-expanded": "false" }, this.name, this.state);
    this.bar = h("progress", { max: "1", value: "0" });
    this.line = h("div", { class: "lcm-line" });
    this.buttons = h("div", { class: "lcm-buttons" });
    this.element = h("li", {}, this.head, this.bar, this.line, this.buttons);
    this.shown = "";
    this.details = null;
  }

  update(job, waiting, isOpen) {
    this.job = job;
    this.element.dataset.state = job.state;
    this.element.dataset.job = job.id;
    this.name.textContent = job.name;
    this.head.title = date(job.created);
    this.state.textContent = doing(job);
    this.bar.max = Math.max(1, job.steps);
    this.bar.value = job.state === "done" ? this.bar.max : job.step;
    const words = [say("step {step} of {steps}", job)];
    this.bar.setAttribute("aria-label", `${job.name}: ${words[0]}`);
    if (job.loss != null) words.push(say("loss {loss}", { loss: number(job.loss, LOSS) }));
    if (job.seconds_left != null) words.push(time(job.seconds_left));
    if (job.message && !job.activity) words.push(job.message);
    this.line.textContent = words.join(" · ");
    this.offer(job, waiting);
    this.show(isOpen);
    this.details?.update(job);
  }

  /** The buttons that make sense now; made again only when they change, which keeps the focus. */
  offer(job, waiting) {
    const place = waiting.findIndex(({ id }) => id === job.id);
    const offers = [];
    if (job.state === "done") offers.push(["use in graph", () => this.server.useInGraph(job.lora_name)]);
    if (place > 0) offers.push(["up", () => this.ask("move", { before: waiting[place - 1].id })]);
    if (place >= 0 && place < waiting.length - 1) {
      offers.push(["down", () => this.ask("move", { before: waiting[place + 2]?.id ?? null })]);
    }
    // One that has stepped aside comes back by itself, unless it is paused for good.
    const pausable = job.aside || ["queued", "preparing", "running"].includes(job.state);
    if (pausable) offers.push(["pause", () => this.ask("pause")]);
    if (job.state === "running") offers.push(["finish now", () => this.ask("finish")]);
    if (["paused", "failed"].includes(job.state) && !job.aside) offers.push(["resume", () => this.ask("resume")]);
    if (ACTIVE.includes(job.state)) offers.push(["stop", () => this.ask("stop")]);
    else offers.push(["delete", () => this.remove()]);
    this.actions = Object.fromEntries(offers);
    const names = offers.map(([name]) => name).join();
    if (names === this.shown) return;
    this.shown = names;
    const focused = document.activeElement?.closest?.("button")?.dataset.action;
    const had = this.buttons.contains(document.activeElement);
    this.buttons.replaceChildren(...offers.map(([name]) => this.labelled(
      h("button", { type: "button", "data-action": name, onclick: () => this.act(name) }), say(name))));
    if (had) (this.buttons.querySelector(`[data-action="${focused}"]`) ?? this.head).focus();
  }

  /** Labels a button. Screen readers get the job's name too. */
  labelled(button, words) {
    button.textContent = words;
    button.setAttribute("aria-label", `${words}: ${this.job.name}`);
    return button;
  }

  async act(name) {
    try {
      await this.actions[name]?.();
    } catch (error) {
      this.server.toast("error", this.job.name, error.message);
    }
  }

  async ask(action, body = {}) {
    await this.server.call(`jobs/${this.job.id}/${action}`, body);
    if (action === "move") this.moves();
    await this.server.refresh();
  }

  /** Asks once more in place: the second press within some seconds deletes. */
  async remove() {
    const button = this.buttons.querySelector('[data-action="delete"]');
    if (button.dataset.sure) return this.ask("delete");
    button.dataset.sure = "yes";
    this.labelled(button, say("really delete?"));
    setTimeout(() => {
      delete button.dataset.sure;
      this.labelled(button, say("delete"));
    }, 4000);
  }

  show(isOpen) {
    this.head.setAttribute("aria-expanded", String(isOpen));
    if (isOpen && !this.details) {
      this.details = new Details(this.server, this.job);
      this.element.append(this.details.element);
    } else if (!isOpen && this.details) {
      this.details.close();
      this.details.element.remove();
      this.details = null;
    }
  }

  close() {
    this.details?.close();
  }
}

/** Loss, sample pictures and log of one job. */
class Details {
  constructor(server, job) {
    this.server = server;
    this.offset = null;
    this.seen = "";
    this.wrong = h("div", { class: "lcm-line", role: "status" });
    this.loss = h("figure", { class: "lcm-chart" });
    this.error = h("figure", { class: "lcm-chart" });
    this.picture = h("img", { alt: "" });
    this.slider = h("input", { type: "range", min: "0", max: "0", value: "0", "aria-label": say("sample pictures over time"), oninput: () => this.pick() });
    this.caption = h("figcaption");
    this.samples = h("figure", { class: "lcm-samples", hidden: "" },
      h("div", { class: "lcm-columns", "aria-hidden": "true" }, ...[say("teacher"), ...columns()].map((word) => h("span", {}, word))),
      this.picture, this.slider, this.caption);
    this.log = h("pre", { tabindex: "0", "aria-label": say("log") });
    this.facts = h("dl", { class: "lcm-facts" });
    this.element = h("div", { class: "lcm-details" }, this.wrong, this.facts, this.loss, this.error, this.samples,
      h("details", {}, h("summary", {}, say("log")), this.log));
    this.files = [];
    this.update(job);
  }

  close() {
    this.closed = true;
  }

  async update(job) {
    // What changes is told by the job itself; an ended one is read once.
    const stamp = `${job.changed} ${job.state}`;
    if (stamp === this.seen || this.busy) return;
    this.seen = stamp;
    this.busy = true;
    try {
      const [details, metrics] = await Promise.all([
        this.server.call(`jobs/${job.id}`), this.server.call(`jobs/${job.id}/metrics?points=300`),
      ]);
      if (this.closed) return;
      const column = metrics.columns.indexOf("loss");
      chart(this.loss, say("loss"), metrics.rows.map((row) => row[0]), { [say("loss")]: metrics.rows.map((row) => row[column]) });
      chart(this.error, say("distance to the teacher"), metrics.errors.map((row) => row[0]), Object.fromEntries(
        columns().map((name, i) => [name, metrics.errors.map((row) => row[i + 1])])));
      this.tell(details, metrics);
      this.pictures(job, details.samples);
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
  tell({ settings, checkpoint, created, changed }, { columns: names, rows }) {
    const last = (name) => rows.at(-1)?.[names.indexOf(name)];
    const short = (value) => number(value, { maximumSignificantDigits: 3 });
    const { rank, batch, lr, guidance, resolution, objective, data } = settings;
    const kind = data?.kind === "pictures" ? say("pictures") : say("prompts");
    const facts = [
      [say("checkpoint"), checkpoint],
      [say("data"), data?.kind === "pictures" ? kind : `${kind}, ${number(data?.count ?? 0)}`],
      [say("objective"), objective], [say("rank"), rank], [say("batch size"), batch],
      [say("guidance"), [guidance].flat().join("–")], [say("learning rate"), lr], [say("resolution"), resolution],
      [say("queued at"), date(created)], [say("last change"), date(changed)],
      [say("pictures a second"), last("samples_per_second"), short],
      [say("memory"), last("memory"), (bytes) => `${gigabytes(bytes / 1e6)} GB`],
      [say("gradient norm"), last("gradient_norm"), short],
    ].filter(([, value]) => value != null && value !== "");
    this.facts.replaceChildren(...facts.map(([name, value, shown = String]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, shown(value)))));
  }

  pictures(job, files) {
    const atEnd = Number(this.slider.value) >= this.files.length - 1;
    this.id = job.id;
    this.files = files;
    this.samples.hidden = !files.length;
    this.slider.max = String(Math.max(0, files.length - 1));
    if (atEnd) this.slider.value = this.slider.max;
    this.pick();
  }

  pick() {
    const file = this.files[Number(this.slider.value)];
    if (!file) return;
    const url = this.server.fileURL(`/lcm_lora/jobs/${this.id}/samples/${file.name}`);
    if (this.picture.src !== new URL(url, location.href).href) this.picture.src = url;
    this.picture.alt = say("sample pictures after step {step}: teacher, 1, 2 and 4 steps", file);
    this.caption.textContent = say("after step {step}", file);
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
