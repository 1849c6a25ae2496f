// The sample pictures of a job, with a slider over the steps at which they were drawn.
import { columns } from "./charts.mjs";
import { called, h } from "./elements.mjs";
import { Viewer } from "./viewer.mjs";
import { say } from "./words.mjs";

export class Samples {
  constructor(server) {
    this.files = [];
    this.address = (file) => server.fileURL(`/lcm_lora/jobs/${this.job.id}/samples/${file.name}`);
    this.viewer = new Viewer(this.address);
    this.picture = h("img", { alt: "" });
    this.button = h("button", { type: "button", class: "lcm-open", onclick: () => this.enlarge() }, this.picture);
    this.slider = h("input", { type: "range", min: "0", max: "0", value: "0", "aria-label": say("sample pictures over time"), oninput: () => this.pick() });
    this.caption = h("figcaption");
    this.element = h("figure", { class: "lcm-samples", hidden: "" },
      h("div", { class: "lcm-columns", "aria-hidden": "true" }, ...[say("teacher"), ...columns()].map((word) => h("span", {}, word))),
      this.button, this.slider, this.caption, this.viewer.element);
  }

  update(job, { samples, prompts }) {
    const atEnd = Number(this.slider.value) >= this.files.length - 1;
    this.job = job;
    this.files = samples;
    this.prompts = prompts;
    this.element.hidden = !samples.length;
    this.slider.max = String(Math.max(0, samples.length - 1));
    if (atEnd) this.slider.value = this.slider.max;
    this.pick();
  }

  pick() {
    const file = this.files[Number(this.slider.value)];
    if (!file) return;
    const url = this.address(file);
    if (this.picture.src !== new URL(url, location.href).href) this.picture.src = url;
    this.button.setAttribute("aria-label", say("enlarge the sample pictures after step {step}: teacher, 1, 2 and 4 steps", file));
    this.caption.textContent = say("after step {step}", file);
    this.slider.setAttribute("aria-valuetext", this.caption.textContent);
  }

  enlarge() {
    this.viewer.open(called(this.job), this.files, Number(this.slider.value), this.prompts);
  }
}
