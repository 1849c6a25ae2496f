// Sets, places and reads nodes of the graph.
import { app } from "../../scripts/app.js";
import { say } from "./words.mjs";

export const CHECKPOINT = "CheckpointLoaderSimple";
const LOADER = "LCMLoRALoader";
const GAP = 40;

const ofType = (type) => app.canvas.graph.nodes.filter((node) => node.type === type);
const isSelected = (node) => Boolean(app.canvas.selected_nodes?.[node.id]);

function set(node, name, value) {
  const widget = node.widgets?.find((candidate) => candidate.name === name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
}

/** Whether a node of this size fits there: its box with its title overlaps no other node. */
function isFree([x, y], [width, height]) {
  const title = window.LiteGraph.NODE_TITLE_HEIGHT;
  return app.canvas.graph.nodes.every(({ pos, size, flags }) => {
    const bottom = pos[1] + (flags?.collapsed ? 0 : size[1]);
    return x + width + GAP <= pos[0] || pos[0] + size[0] + GAP <= x
      || y + height + GAP <= pos[1] - title || bottom + GAP <= y - title;
  });
}

/** Adds a node at `start`, or further down at the first place that is free. */
function place(type, start) {
  const node = window.LiteGraph.createNode(type);
  const at = [...start];
  while (!isFree(at, node.size)) at[1] += GAP;
  node.pos = at;
  app.canvas.graph.add(node);
  return node;
}

/** Selects nodes and brings them into the view. */
function present(nodes) {
  const { canvas } = app;
  canvas.deselectAll?.();
  canvas.selectItems?.(nodes);
  const [x, y, width, height] = canvas.ds.visible_area;
  const isSeen = ({ pos, size }) => pos[0] >= x && pos[1] >= y && pos[0] + size[0] <= x + width && pos[1] + size[1] <= y + height;
  if (!nodes.every(isSeen)) canvas.centerOnNode(nodes.at(-1));
  canvas.setDirty(true, true);
}

/** The middle of the visible area. */
function middle() {
  const [x, y, width, height] = app.canvas.ds.visible_area;
  return [x + width / 2, y + height / 2];
}

/** Sets the selected Load LCM-LoRA, or the only one. Otherwise places a new one beside the others,
 * connected to the checkpoint if there is exactly one. */
export async function useInGraph(name) {
  await app.refreshComboInNodes?.();
  const loaders = ofType(LOADER), selected = loaders.filter(isSelected);
  const existing = selected.length === 1 ? selected[0] : loaders.length === 1 ? loaders[0] : null;
  const node = existing ?? placed(loaders.at(-1));
  set(node, "lora_name", name);
  present([node]);
}

/** A new loader, below the last one or to the right of the checkpoint. */
function placed(last) {
  const checkpoints = ofType(CHECKPOINT), only = checkpoints.length === 1 ? checkpoints[0] : null;
  const beside = last ? [last.pos[0], last.pos[1] + last.size[1] + 2 * GAP]
    : only ? [only.pos[0] + only.size[0] + GAP, only.pos[1]] : middle();
  const node = place(LOADER, beside);
  if (only) {
    const input = node.inputs.findIndex(({ type }) => type === "MODEL");
    only.connect(only.outputs.findIndex(({ type }) => type === "MODEL"), node, input);
  }
  return node;
}

const modelOutput = (node) => node.outputs.findIndex(({ type }) => type === "MODEL");
const toTheRightOf = (node) => [node.pos[0] + node.size[0] + GAP, node.pos[1]];

/** Adds a Load LCM-LoRA between a checkpoint and all nodes that used its MODEL. */
export function addLoader(checkpoint) {
  const node = place(LOADER, toTheRightOf(checkpoint)), from = modelOutput(checkpoint);
  const links = (checkpoint.outputs[from].links ?? []).map((id) => checkpoint.graph.getLink(id));
  const ends = links.map(({ target_id, target_slot }) => [target_id, target_slot]);
  for (const [id, slot] of ends) {
    node.connect(modelOutput(node), checkpoint.graph.getNodeById(id), slot);
  }
  checkpoint.connect(from, node, node.inputs.findIndex(({ type }) => type === "MODEL"));
  present([node]);
}

/** Adds the nodes that distil a checkpoint, below its loader. */
export function distilFrom(checkpoint) {
  const [x, y] = checkpoint.pos;
  const source = place("LCMDistillData", [x, y + checkpoint.size[1] + 2 * GAP]);
  const node = place("LCMDistill", toTheRightOf(source));
  const chosen = checkpoint.widgets.find(({ name }) => name === "ckpt_name");
  set(source, "auto_resolution", true);
  set(node, "checkpoint", chosen.value);
  set(node, "length", "good");
  source.connect(0, node, node.inputs.findIndex(({ name }) => name === "data"));
  present([source, node]);
}

/** The nodes of a graph and of the subgraphs in it. */
export function* allNodes(graph = app.rootGraph ?? app.graph) {
  for (const node of graph?.nodes ?? []) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph);
  }
}

/** Inputs of the distillation that choose a LoRA file, or "none" where an order has "". */
const LORAS = ["style_lora", "start_from"];

/** The values of a node's own inputs. */
function valuesOf(node) {
  const { required = {}, optional = {} } = node.constructor.nodeData?.input ?? {};
  const isOwn = (name) => name.split(".")[0] in required || name in optional;
  return Object.fromEntries((node.widgets ?? []).filter(({ name }) => isOwn(name)).map(({ name, value }) => [name, value]));
}

/** The order of a Distil LCM-LoRA node and the nodes connected to it; null if its data or its teacher
 * comes from a node of another type. */
export function orderOf(node) {
  const source = node.getInputNode(node.inputs.findIndex(({ name }) => name === "data"));
  if (source?.type !== "LCMDistillData") return null;
  const { source: kind, ...rest } = valuesOf(source), order = valuesOf(node);
  const at = node.inputs.findIndex(({ name }) => name === "teacher");
  const parts = at < 0 ? null : node.getInputNode(at);
  if (parts && parts.type !== "LCMTeacher") return null;
  const names = parts ? Object.entries(valuesOf(parts)).map(([name, file]) => [name, file === "none" ? "" : file]) : [];
  const { file, folder, ...data } = Object.fromEntries(Object.entries(rest).map(([name, value]) => [name.replace("source.", ""), value]));
  const path = file ?? folder ?? "";
  const files = LORAS.map((name) => [name, order[name] === "none" ? "" : order[name] ?? ""]);
  return { ...order, ...Object.fromEntries(files), data: { ...data, kind, path }, teacher: Object.fromEntries(names) };
}

/** The name of a copy: my-lora becomes my-lora-2, and that my-lora-3. */
function nextName(name) {
  const [, stem, number] = /^(.*?)(?:-(\d{1,4}))?$/.exec(name);
  return `${stem}-${number ? Number(number) + 1 : 2}`;
}

/** Puts the settings of an order into new nodes. The LoRA gets a new name, because the order's name is
 * taken. */
export async function edit({ data, teacher, ...order }) {
  await app.refreshComboInNodes?.();
  const source = place("LCMDistillData", middle());
  set(source, "source", data.kind); // first, because it decides which other inputs exist
  const named = { "prompt file": "file", pictures: "folder" }[data.kind];
  for (const [name, value] of Object.entries(data)) set(source, `source.${name}`, value);
  if (named) set(source, `source.${named}`, data.path);
  set(source, "resolution", data.resolution);
  set(source, "auto_resolution", Boolean(data.auto_resolution)); // older orders have none
  const node = place("LCMDistill", [source.pos[0] + source.size[0] + GAP, source.pos[1]]);
  const files = LORAS.map((name) => [name, order[name] || "none"]); // older orders lack some
  const values = { ...order, ...Object.fromEntries(files), name: nextName(order.name) };
  for (const [name, value] of Object.entries(values)) set(node, name, value);
  source.connect(0, node, node.inputs.findIndex(({ name }) => name === "data"));
  const placed = [source, node];
  if (teacher?.diffusion_model) {
    const parts = place("LCMTeacher", [source.pos[0], source.pos[1] + source.size[1] + 2 * GAP]);
    for (const [name, file] of Object.entries(teacher)) set(parts, name, file || "none");
    parts.connect(0, node, node.inputs.findIndex(({ name }) => name === "teacher"));
    placed.push(parts);
  }
  present(placed);
}

/** Opens a workflow in a tab of its own. */
export const openWorkflow = (workflow, name) => app.loadGraphData(workflow, true, true, name);

/** Opens one of the pack's templates in a tab of its own. */
export async function openTemplate(name, address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(say("The server answered {status}.", { status: answer.status }));
  await openWorkflow(await answer.json(), name);
}
