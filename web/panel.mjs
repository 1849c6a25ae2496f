// The tab's content. Elements are made once for each job and filled again on each update, so that
// focus, scroll and what is open stay as they are.
import { h } from "./elements.mjs";
import { Row } from "./row.mjs";
import { say } from "./words.mjs";

let open = null; // id of the job whose details are shown; outlives the tab

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
