// Shows sample pictures large, in a dialog: the teacher beside 1, 2 and 4 steps, and the first sampling
// beside the chosen one. A sheet has a row for each prompt and these four columns of square pictures.
import { columns } from "./charts.mjs";
import { h } from "./elements.mjs";
import { say } from "./words.mjs";

async function loaded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

/** One picture of a sheet. */
function cut(sheet, row, column, label) {
  const side = sheet.naturalWidth / 4;
  const canvas = h("canvas", { width: side, height: side, role: "img", "aria-label": label });
  canvas.getContext("2d").drawImage(sheet, column * side, row * side, side, side, 0, 0, side, side);
  return h("figure", {}, canvas, h("figcaption", { "aria-hidden": "true" }, label));
}

export class Viewer {
  /** address(file): the URL of a sheet. */
  constructor(address) {
    this.address = address;
    this.slider = h("input", { type: "range", min: "0", "aria-label": say("sample pictures over time"), oninput: () => this.show() });
    this.caption = h("output", { "aria-hidden": "true" });
    this.both = h("input", { type: "checkbox", checked: "", onchange: () => this.show() });
    this.first = h("label", {}, this.both);
    this.title = h("h3", {});
    this.wrong = h("p", { role: "status" });
    this.rows = h("div", {});
    this.element = h("dialog", { class: "lcm-viewer", "aria-label": say("sample pictures") },
      h("header", {}, this.title, h("button", { type: "button", onclick: () => this.element.close() }, say("close"))),
      h("div", { class: "lcm-tools" }, this.slider, this.caption, this.first), this.wrong, this.rows);
    this.element.addEventListener("keydown", (event) => event.stopPropagation()); // these keys are not for the graph
    this.element.addEventListener("click", ({ target }) => { if (target === this.element) this.element.close(); });
  }

  /** Opens with the sheet number `at`. The focus goes back to where it was when it closes. */
  open(name, files, at, prompts) {
    this.files = files;
    this.prompts = prompts;
    this.title.textContent = name;
    this.slider.max = String(files.length - 1);
    this.slider.value = String(at);
    this.first.hidden = this.slider.hidden = files.length < 2;
    this.first.replaceChildren(this.both, say("beside those after step {step}", files[0]));
    this.element.showModal();
    this.show();
  }

  async show() {
    const file = this.files[Number(this.slider.value)], first = this.files[0];
    this.caption.textContent = say("after step {step}", file);
    this.slider.setAttribute("aria-valuetext", this.caption.textContent);
    const shown = this.both.checked && file !== first ? [first, file] : [file];
    this.wanted = shown;
    try {
      const sheets = await Promise.all(shown.map((shownFile) => loaded(this.address(shownFile))));
      if (this.wanted !== shown) return; // another step was chosen meanwhile
      const { naturalWidth, naturalHeight } = sheets[0];
      this.wrong.textContent = "";
      this.rows.replaceChildren(...Array.from({ length: Math.round((4 * naturalHeight) / naturalWidth) }, (_, row) => h("section", {},
        h("h4", {}, this.prompts[row] ?? say("picture {number}", { number: row + 1 })),
        h("div", { class: "lcm-row" }, cut(sheets[0], row, 0, say("teacher")),
          ...columns().flatMap((steps, i) => sheets.map((sheet, nth) =>
            cut(sheet, row, i + 1, say("{steps}, after step {step}", { steps, step: shown[nth].step }))))))));
    } catch (error) {
      this.wrong.textContent = error.message;
    }
  }
}
