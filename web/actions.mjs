// The actions of an open job: rename it, train it for more steps, put its settings into the graph, and
// use the LoRA of one of its checkpoints.
import { called, h } from "./elements.mjs";
import { number, say } from "./words.mjs";

export class Actions {
  constructor(server, job) {
    this.server = server;
    this.job = job;
    this.title = h("input", { type: "text", maxlength: "200" });
    this.steps = h("input", { type: "number", min: "1", max: "1000000", required: "" });
    this.select = h("select", { "aria-label": say("checkpoint of step") });
    this.rename = this.form(say("name"), this.title, say("rename"), () => this.ask("rename", { title: this.title.value }));
    this.extend = this.form(say("more steps"), this.steps, say("train on"), () => this.ask("extend", { steps: this.steps.valueAsNumber }));
    this.export = this.form(say("checkpoint of step"), this.select, say("use in graph"), () => this.use());
    this.edit = h("button", { type: "button", onclick: () => this.act(() => this.server.edit(this.order)) }, say("clone and edit"));
    this.open = h("button", { type: "button", onclick: () => this.act(() => this.server.openWorkflow(this.job)) }, say("open its workflow"));
    this.element = h("div", { class: "lcm-actions" }, this.open, this.edit, this.rename, this.extend, this.export);
    this.title.value = called(job);
    this.steps.value = String(job.steps);
    this.extend.hidden = this.export.hidden = this.edit.hidden = this.open.hidden = true;
  }

  /** A field and its button; Enter in the field presses it. */
  form(label, field, words, act) {
    const submit = (event) => {
      event.preventDefault();
      this.act(act);
    };
    return h("form", { onsubmit: submit }, h("label", {}, label, field), h("button", { type: "submit" }, words));
  }

  update(job, { checkpoints, order, workflow }) {
    if (called(job) !== called(this.job) && document.activeElement !== this.title) this.title.value = called(job);
    this.job = job;
    this.order = order;
    this.edit.hidden = !order;
    this.open.hidden = !workflow;
    // A cluster's storage keeps no checkpoints of ended jobs to go on from.
    this.extend.hidden = job.state !== "done" || !checkpoints.length || job.device.startsWith("ray");
    this.export.hidden = !checkpoints.length;
    const offered = checkpoints.join();
    if (offered === this.offered) return;
    this.offered = offered;
    this.select.replaceChildren(...checkpoints.map((step) => h("option", { value: step }, number(step))));
    this.select.value = String(checkpoints.at(-1));
  }

  async act(act) {
    try {
      await act();
    } catch (error) {
      this.server.toast("error", called(this.job), error.message);
    }
  }

  async ask(action, body) {
    await this.server.call(`jobs/${this.job.id}/${action}`, body);
    await this.server.refresh();
  }

  async use() {
    const { lora_name: name } = await this.server.call(`jobs/${this.job.id}/export`, { step: Number(this.select.value) });
    await this.server.useInGraph(name);
  }
}
