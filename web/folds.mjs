// Shows inputs of Distil LCM-LoRA for the lengths that need them, and folds them otherwise.
const TYPE = "LCMDistill";
const SHOWN_FOR = { steps: "custom", start_from: "fit" }; // input -> length

function fold(node) {
  const named = (name) => node.widgets.find((widget) => widget.name === name);
  for (const [name, length] of Object.entries(SHOWN_FOR)) {
    const widget = named(name), isFolded = named("length").value !== length;
    if (!widget.options || Boolean(widget.options.advanced) === isFolded) continue;
    widget.options.advanced = isFolded;
    // Nodes 2.0 reads the option again only when the list of widgets changes.
    const place = node.widgets.indexOf(widget);
    node.widgets.splice(place, 1);
    node.widgets.splice(place, 0, widget);
  }
}

export function foldByLength(node) {
  const length = node.comfyClass === TYPE && node.widgets.find(({ name }) => name === "length");
  if (!length) return;
  const { callback } = length, { onConfigure } = node;
  length.callback = function (...all) {
    callback?.apply(this, all);
    fold(node);
  };
  node.onConfigure = function (...all) {
    onConfigure?.apply(this, all);
    fold(node);
  };
  fold(node);
}
