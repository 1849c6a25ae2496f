// The tab's content. Each job's elements are made once and updated later, so that focus, scroll
// position and open rows stay as they are.
import { h, needsConfirmation } from "./elements.mjs";
import { Row } from "./row.mjs";
import { say } from "./words.mjs";

let open = null; // id of the job whose details are shown; outlives the tab

export class Panel {
  constructor(element, server) {
    this.server = server;
    this.rows = new Map();
    this.note = h("p", { class: "lcm-note", role: "status" });
    this.list = h("ul", { class: "lcm-jobs", "aria-label": say("LCM-LoRA jobs") });
    // Rows must not move while the mouse is on the list. Touch screens have no hovering.
    this.list.addEventListener("pointerenter", ({ pointerType }) => { this.isPointedAt = pointerType === "mouse"; });
    this.list.addEventListener("pointerleave", () => {
      this.isPointedAt = false;
      if (this.state) this.update(this.state);
    });
    this.heading = h("h2", { tabindex: "-1" }, say("LCM-LoRA jobs"));
    this.template = this.button(say("open the distillation template"), () => server.openDistillation());
    this.clear = this.button(say("clear finished jobs"), () => this.clearFinished());
    this.filter = h("input", { type: "search", placeholder: say("filter by name or state"), "aria-label": say("filter by name or state"), oninput: () => this.update(this.state) });
    this.notified = h("input", { type: "checkbox", onchange: () => this.notify() });
    this.notified.checked = server.isNotified();
    this.tools = h("div", { class: "lcm-tools" }, this.filter, this.clear);
    const notices = h("label", { class: "lcm-tools" }, this.notified, say("notify me when a job ends"));
    notices.hidden = !("Notification" in window); // without https a browser has none
    this.root = h("div", { class: "lcm-panel" }, this.heading, this.tools, notices, this.note, this.template, this.list);
    // In the tab, because the page's head belongs to all packs.
    const style = new URL("./jobs.css", import.meta.url).href;
    element.replaceChildren(h("link", { rel: "stylesheet", href: style }), this.root);
  }

  button(words, act) {
    const acted = () => Promise.resolve(act()).catch((error) => this.server.toast("error", words, error.message));
    return h("button", { type: "button", onclick: acted }, words);
  }

  async notify() {
    this.notified.checked = await this.server.wantNotified(this.notified.checked);
  }

  /** Deletes the finished jobs that the list shows. The user has to press the button twice. */
  async clearFinished() {
    const finished = this.state.jobs.filter((job) => job.state === "done" && this.isShown(job)).map(({ id }) => id);
    if (needsConfirmation(this.clear, say("really delete the finished jobs ({count})? Their LoRAs stay.", { count: finished.length }))) {
      this.counted = finished;
      return;
    }
    this.heading.focus();
    try {
      // Only those in the question: another job may have finished since.
      for (const id of finished.filter((id) => this.counted.includes(id))) await this.server.call(`jobs/${id}/delete`, {});
    } finally {
      await this.server.refresh();
    }
  }

  /** Whether the filter lets a job through. */
  isShown(job) {
    const text = [job.title, job.name, say(job.state), say(job.activity)].join(" ").toLocaleLowerCase();
    return text.includes(this.filter.value.trim().toLocaleLowerCase());
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
    // A moved row has lost the focus and gets it back. If the row is gone, the next row gets it.
    const heir = row.isConnected ? row : this.list.children[Math.min(place, this.list.children.length - 1)];
    const same = focused.isConnected ? focused : heir?.querySelector(`[data-action="${focused.dataset.action}"]`);
    const target = (row.isConnected && same) || heir?.querySelector(".lcm-head") || this.heading;
    target.focus({ preventScroll: true });
  }

  fill({ jobs: all, total, error }) {
    const jobs = all.filter((job) => this.isShown(job));
    this.tools.hidden = !all.length;
    this.clear.disabled = !jobs.some(({ state }) => state === "done");
    this.template.hidden = Boolean(all.length || error);
    this.note.textContent = error || (all.length ? (jobs.length < total ? say("{shown} of {total} are shown.", { shown: jobs.length, total }) : "")
      : say("No jobs yet. Queue a graph with the node “Distil LCM-LoRA (background)”."));
    const listed = new Set(jobs.map((job) => job.id));
    for (const [id, row] of this.rows) {
      if (listed.has(id)) continue;
      row.close();
      row.element.remove();
      this.rows.delete(id);
    }
    const waiting = all.filter((job) => job.state === "queued");
    jobs.forEach((job, place) => {
      let row = this.rows.get(job.id);
      if (!row) {
        row = new Row(this.server, () => this.toggle(job.id), () => { this.mayMove = true; });
        this.rows.set(job.id, row);
      }
      row.update(job, waiting, open === job.id);
      const stays = this.isPointedAt && !this.mayMove;
      if (stays && !row.element.isConnected) this.list.append(row.element);
      else if (!stays && this.list.children[place] !== row.element) {
        this.list.insertBefore(row.element, this.list.children[place] ?? null);
      }
    });
    this.mayMove = false;
  }

  toggle(id) {
    open = open === id ? null : id;
    for (const [id, row] of this.rows) row.show(open === id);
  }
}
