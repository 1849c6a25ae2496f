// Folds the input `steps` of Distil LCM-LoRA unless length is custom, because only then it counts.
const TYPE = "LCMDistill";

function fold(node) {
  const named = (name) => node.widgets.find((widget) => widget.name === name);
  const steps = named("steps"), isFolded = named("length").value !== "custom";
  if (!steps.options || Boolean(steps.options.advanced) === isFolded) return;
  steps.options.advanced = isFolded;
  // Nodes 2.0 reads the option again only when the list of widgets changes.
  const place = node.widgets.indexOf(steps);
  node.widgets.splice(place, 1);
  node.widgets.splice(place, 0, steps);
}

export function foldSteps(node) {
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
