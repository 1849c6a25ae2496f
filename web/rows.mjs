// Keeps the values in the rows of Few-step LoRA Stack, Combine LoRA Vectors, Compare Settings and Find
// LoRA Weights, because the front end makes all rows again when their number changes. Also moves the
// rows of a stack from its menu.
import { say } from "./words.mjs";

const STACK = "LCMLoRAStack";
const COUNTED = [STACK, "LCMLoRACombine", "LCMCompare", "LCMWeightSearch"];
const COUNT = "count";
const FIELDS = ["on", "lora", "weight", "text_weight"];
const MOST_ROWS = 8;

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const fieldOf = (node, field, row) => widgetOf(node, `${COUNT}.${field}_${row}`);
const numberOf = (node) => Number(widgetOf(node, COUNT).value);

function set(widget, value) {
  widget.value = value;
  widget.callback?.(value); // tells both kinds of nodes
}

/** Keeps the values of rows when the number of rows changes. */
export function keepRows(node) {
  const count = COUNTED.includes(node.comfyClass) && widgetOf(node, COUNT);
  if (!count) return;
  const values = new Map(), watched = new WeakSet();
  const watch = () => {
    for (const widget of node.widgets) {
      if (!widget.name.startsWith(`${COUNT}.`) || watched.has(widget)) continue;
      watched.add(widget);
      const { onRemove } = widget;
      widget.onRemove = function (...all) {
        values.set(widget.name, widget.value);
        onRemove?.apply(this, all);
      };
    }
  };
  const { callback } = count;
  count.callback = function (...all) {
    callback?.apply(this, all);
    for (const [name, value] of values) {
      const widget = widgetOf(node, name);
      if (widget && widget.value !== value) set(widget, value);
    }
    values.clear();
    watch();
  };
  const { onConfigure } = node;
  node.onConfigure = function (...all) {
    onConfigure?.apply(this, all);
    values.clear(); // of the rows before these
    watch();
  };
  watch();
}

/** A function that connects an input's source to another slot; null if nothing is connected. */
function sourceOf(node, name) {
  const { graph } = node, number = node.inputs.find((input) => input.name === name)?.link;
  const link = number == null ? null : graph.getLink?.(number) ?? graph.links[number];
  if (!link) return null;
  const { origin_id: id, origin_slot: from } = link, origin = graph.getNodeById(id);
  if (origin) return (slot) => origin.connect(from, node, slot);
  const input = graph.inputNode?.slots[from]; // of the subgraph that the node is in
  return input ? (slot) => input.connect(node.inputs[slot], node) : null;
}

function connect(node, name, source) {
  const slot = node.inputs.findIndex((input) => input.name === name);
  if (source) source(slot);
  else if (slot >= 0 && node.inputs[slot].link != null) node.disconnectInput(slot);
}

/** Exchanges two rows, with what is connected to their inputs. */
function swap(node, one, other) {
  for (const field of FIELDS) {
    const [a, b] = [fieldOf(node, field, one), fieldOf(node, field, other)];
    const [left, right] = [a.value, b.value], [from, to] = [sourceOf(node, a.name), sourceOf(node, b.name)];
    set(a, right);
    set(b, left);
    if (!from && !to) continue;
    connect(node, a.name, null);
    connect(node, b.name, from);
    connect(node, a.name, to);
  }
}

function remove(node, row) {
  const last = numberOf(node);
  for (let next = row; next < last; next += 1) swap(node, next, next + 1);
  if (last > 1) set(widgetOf(node, COUNT), String(last - 1));
  else set(fieldOf(node, "lora", 1), "None");
}

/** The menu entries for the rows of a stack. */
export function rowItems(node) {
  if (node.comfyClass !== STACK) return [];
  const last = numberOf(node);
  const item = (content, change) => ({
    content,
    callback: () => {
      node.graph.beforeChange?.(node);
      change();
      node.graph.afterChange?.(node);
      node.setDirtyCanvas(true, true);
    },
  });
  const items = last < MOST_ROWS
    ? [item(say("Add a row"), () => set(widgetOf(node, COUNT), String(last + 1)))] : [];
  for (let row = 1; row <= last; row += 1) {
    if (row > 1) items.push(item(say("Move row {row} up", { row }), () => swap(node, row, row - 1)));
    if (row < last) items.push(item(say("Move row {row} down", { row }), () => swap(node, row, row + 1)));
  }
  for (let row = 1; row <= last; row += 1) {
    items.push(item(say("Remove row {row}", { row }), () => remove(node, row)));
  }
  return [{ content: say("LoRA rows"), has_submenu: true, submenu: { options: items } }];
}
