// Shows below a node's widgets what it did in its last run. The front end removes progress texts when a
// run ends; these texts stay and are saved with the workflow. They are a property of the node, because
// the saved values of widgets have no names, only positions.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { say } from "./words.mjs";

export const KEY = "lcm_lora_text"; // in a node's output, as nodes/texts.py writes it, and in its properties
export const JOB = "lcm_lora_job"; // likewise: the job that it shows; see distill.mjs
const EVENT = "lcm_lora.text"; // nodes/host.py sends it while a node runs
const MARGIN = 6; // around the text, in pixels of the graph
// Styles the element itself, because a style sheet in the page's head would affect all packs.
const LOOK = "box-sizing: border-box; padding: 4px 8px; border-radius: 4px; overflow: hidden; "
  + "background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); "
  + "font: 12px/16px system-ui, sans-serif; overflow-wrap: anywhere; user-select: text; cursor: text;";

let ruler = null;

/** A line with its values, some of which may be lines themselves. */
function spoken([text, values]) {
  const inner = Object.entries(values ?? {})
    .map(([name, value]) => [name, Array.isArray(value) ? spoken(value) : value]);
  return say(text, Object.fromEntries(inner));
}

function box(style = "") {
  const element = document.createElement("div");
  element.style.cssText = LOOK + style;
  return element;
}

/** The height that the element's text takes in a node of this width. */
function heightIn(element, width) {
  ruler ??= document.body.appendChild(box("position: absolute; visibility: hidden; left: -9999px;"));
  ruler.style.width = `${width - 2 * MARGIN}px`;
  ruler.replaceChildren(...[...element.childNodes].map((child) => child.cloneNode(true)));
  return element.childNodes.length ? ruler.offsetHeight + 2 * MARGIN : 0;
}

function widgetOf(node, make) {
  const existing = node.widgets?.find((widget) => widget.name === KEY);
  if (existing || !make) return existing;
  const element = box();
  element.className = "lcm-said";
  element.setAttribute("role", "status");
  const widget = node.addDOMWidget(KEY, KEY, element, {
    serialize: false, margin: MARGIN, getMinHeight: () => heightIn(element, node.size[0]),
  });
  widget.serialize = false; // widgets_values stay as they are without it
  clearOnRefusal(node);
  return widget;
}

/** Replaces the node's text with lines, [text, values, warning] each, and saves them with the workflow.
 */
function setText(node, lines) {
  if (lines.length) node.properties[KEY] = lines;
  else delete node.properties[KEY];
  delete node.properties[JOB];
  show(node, lines);
  if (!lines.length) node.onTextGone?.();
}

/** Whether the node shows no text. */
export const isSilent = (node) => !widgetOf(node, false)?.element.childNodes.length;

/** Shows lines until the node's text changes; does not save them. */
export function show(node, lines) {
  const isFirst = !widgetOf(node, false);
  const widget = widgetOf(node, lines.length > 0);
  const shown = JSON.stringify(lines.map((line) => [spoken(line), line[2]]));
  if (!widget || widget.shown === shown) return; // keeps the user's text selection
  widget.shown = shown;
  widget.element.replaceChildren(...lines.map((line) => {
    const row = document.createElement("div");
    row.textContent = line[2] ? `⚠ ${spoken(line)}` : spoken(line);
    if (line[2]) row.style.fontWeight = "600";
    return row;
  }));
  widget.element.style.visibility = lines.length ? "" : "hidden";
  fit(node, isFirst);
  node.setDirtyCanvas?.(true, true);
}

/** Makes room for the text. Nodes 2.0 does so itself. But when it loads a node, it adds room for folded
 * widgets too, and this removes that room. */
function fit(node, isFirst) {
  const height = node.computeSize()[1];
  const isFolded = window.LiteGraph.vueNodesMode && !node.showAdvanced && node.widgets.some(({ options }) => options?.advanced);
  if (!isFolded && node.size[1] < height) node.setSize([node.size[0], height]);
  if (isFolded && isFirst && node.size[1] <= height) node.setSize([node.size[0], 0]);
}

/** The node with this id of the server: "3", or "7:3" for node 3 inside the subgraph of node 7. */
export function nodeAt(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

/** Removes the text of the last run when the server refuses the node's inputs. Not all front ends have
 * an event for that, but all set this property. */
function clearOnRefusal(node) {
  let value = node.has_errors;
  Object.defineProperty(node, "has_errors", {
    configurable: true, enumerable: true,
    get: () => value,
    set(now) {
      value = now;
      if (now && node.properties[KEY]) setText(node, []);
    },
  });
}

/** Removes a node's old text. Called before it runs, so that no old text stays under an error. */
function clear(id) {
  const node = id === null || id === undefined ? null : nodeAt(id);
  if (node?.properties?.[KEY]) setText(node, []);
}

/** Shows the texts of this pack's nodes, also while they run. */
export function listenToNodes() {
  api.addEventListener("executing", ({ detail }) => clear(detail?.node ?? detail));
  for (const end of ["execution_error", "execution_interrupted"]) {
    api.addEventListener(end, ({ detail }) => clear(detail?.node_id));
  }
  api.addEventListener(EVENT, ({ detail: { node: id, lines } }) => {
    const node = nodeAt(id);
    if (node) setText(node, lines);
  });
}

/** Lets a type of node show its text, from a run and from a saved workflow. */
export function giveText(nodeType, definition) {
  if (!definition.category?.startsWith("LCM-LoRA")) return;
  const { onExecuted, onConfigure } = nodeType.prototype;
  nodeType.prototype.onExecuted = function (output, ...rest) {
    onExecuted?.call(this, output, ...rest);
    if (output?.[KEY]) setText(this, output[KEY]);
  };
  nodeType.prototype.onConfigure = function (...all) {
    onConfigure?.apply(this, all);
    if (this.properties?.[KEY]) show(this, this.properties[KEY]);
  };
}
