// One job in the tab: its activity, its buttons, and its details.
import { Details } from "./details.mjs";
import { called, h, needsConfirmation } from "./elements.mjs";
import { doing, facts } from "./progress.mjs";
import { date, say } from "./words.mjs";

const BANK = ["encoding captions", "making latents"];
// Tooltips of buttons whose names do not say enough.
const EFFECTS = {
  pause: () => say("saves and waits; the next job starts"),
  stop: () => say("like pause, but ends the process if it does not answer within a minute"),
  "finish now": () => say("ends the training and writes the LoRA"),
};
const ACTIVE = ["preparing", "running", "stopping"];

/** [done, total, text] for the bar: the bank's progress until training begins, then the steps. */
function progress(job) {
  const { activity, activity_done: done, activity_total: total, step, steps } = job;
  if (!step && BANK.includes(activity) && total) return [done, total, doing(job)];
  return [step, steps, say("step {step} of {steps}", job)];
}

export class Row {
  /** toggle(): shows or hides the details. moves(): lets the rows move although the mouse is there. */
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
    this.name.textContent = called(job);
    this.head.title = date(job.created);
    this.state.textContent = doing(job);
    const [done, total, words] = progress(job);
    this.bar.max = Math.max(1, total);
    this.bar.value = job.state === "done" ? this.bar.max : done;
    this.bar.setAttribute("aria-label", `${called(job)}: ${words}`);
    this.line.textContent = facts(job);
    this.offer(job, waiting);
    this.show(isOpen);
    this.details?.update(job);
  }

  /** Shows the buttons for the job's state. Makes them again only when they change, to keep the focus. */
  offer(job, waiting) {
    const place = waiting.findIndex(({ id }) => id === job.id);
    const offers = [];
    if (job.state === "done") offers.push(["use in graph", () => this.server.useInGraph(job.lora_name)]);
    if (place > 0) offers.push(["up", () => this.ask("move", { before: waiting[place - 1].id })]);
    if (place >= 0 && place < waiting.length - 1) {
      offers.push(["down", () => this.ask("move", { before: waiting[place + 2]?.id ?? null })]);
    }
    // A job that paused for prompts resumes by itself, unless the user pauses it.
    const pausable = job.aside || ["queued", "preparing", "running"].includes(job.state);
    if (pausable) offers.push(["pause", () => this.ask("pause")]);
    if (job.state === "running") offers.push(["finish now", () => this.ask("finish")]);
    if (["paused", "failed"].includes(job.state) && !job.aside) offers.push(["resume", () => this.ask("resume")]);
    if (ACTIVE.includes(job.state)) offers.push(["stop", () => this.ask("stop")]);
    else offers.push(["delete", () => this.remove()]);
    this.actions = Object.fromEntries(offers);
    const names = [called(job), ...offers.map(([name]) => name)].join();
    if (names === this.shown) return;
    this.shown = names;
    const focused = document.activeElement?.closest?.("button")?.dataset.action;
    const had = this.buttons.contains(document.activeElement);
    this.buttons.replaceChildren(...offers.map(([name]) => this.labelled(
      h("button", { type: "button", "data-action": name, title: EFFECTS[name]?.() ?? "", onclick: () => this.act(name) }), say(name))));
    if (had) (this.buttons.querySelector(`[data-action="${focused}"]`) ?? this.head).focus();
  }

  /** Labels a button. Screen readers get the job's name too. */
  labelled(button, words) {
    button.textContent = words;
    button.setAttribute("aria-label", `${words}: ${called(this.job)}`);
    return button;
  }

  async act(name) {
    try {
      await this.actions[name]?.();
    } catch (error) {
      this.server.toast("error", called(this.job), error.message);
    }
  }

  async ask(action, body = {}) {
    await this.server.call(`jobs/${this.job.id}/${action}`, body);
    if (action === "move") this.moves();
    await this.server.refresh();
  }

  async remove() {
    if (needsConfirmation(this.buttons.querySelector('[data-action="delete"]'), say("really delete?"))) return;
    await this.ask("delete");
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
