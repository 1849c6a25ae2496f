// The text below the widgets of Distil LCM-LoRA: what a job with its settings would take, and once the
// job is queued, its progress. Distillation Job Status shows the progress too.
import { api } from "../../scripts/api.js";
import { allNodes, orderOf } from "./graph.mjs";
import { doing, facts, gigabytes } from "./progress.mjs";
import { JOB, KEY, isSilent, show } from "./texts.mjs";
import { say } from "./words.mjs";

const TYPE = "LCMDistill";
const STATUS = "LCMJobStatus";
const PAUSE = 400; // milliseconds without a change before the server is asked
const ORDER = "lcm_lora_order"; // in the node's properties: the order of its job, as JSON
const seen = new WeakMap(); // node -> the order that its text describes, as JSON

let call = null;
let refresh = null;
let timer = null;

const ofType = (...types) => [...allNodes()].filter(({ type }) => types.includes(type));

function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  if (minutes >= 60) return say("{hours} h {minutes} min", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
  return minutes ? say("{minutes} min", { minutes }) : say("{seconds} s", { seconds: Math.ceil(seconds) });
}

/** The time, with where it comes from. */
function time({ training_seconds: training, drawing_seconds: drawing, time: basis }) {
  if (basis === "unknown") return say("time unknown: no job of this architecture has run on this device yet");
  const words = [basis === "measured"
    ? say("training {time}, measured by an earlier job", { time: duration(training) })
    : say("training {time}, estimated from an earlier job", { time: duration(training) })];
  if (drawing) words.push(say("drawing {time}, estimated", { time: duration(drawing) }));
  return words.join(" · ");
}

function room({ memory_bytes: bytes, memory: basis, disk_bytes: disk }) {
  const words = [];
  if (basis === "measured") words.push(say("memory {size} GB, measured", { size: gigabytes(bytes / 1e6) }));
  else if (basis === "estimated") words.push(say("memory at least {size} GB", { size: gigabytes(bytes / 1e6) }));
  else words.push(say("memory unknown"));
  if (disk != null) words.push(say("disk {size} GB", { size: gigabytes(disk / 1e6) }));
  return words.join(" · ");
}

/** What happens to an order that does not simply make a new job. */
function foreseen(queueing, name) {
  const lines = {
    same: () => [say("This job already exists")],
    replaces: () => [say("{name} exists already and will be replaced.", { name })],
    taken: () => [say("{name} exists already: choose another name, or switch overwrite on.", { name }), {}, true],
    promised: () => [say("Another job will make {name}: choose another name, or delete that job.", { name }), {}, true],
  };
  return queueing in lines ? [lines[queueing]()] : [];
}

/** An estimate as lines of a node. */
function lines(estimate, name) {
  const { steps, batch, resolution: pixels, drawn: count, architecture, own_resolution: own } = estimate;
  const order = count ? say("{steps} steps of {batch} pictures, {pixels} pixels, {count} drawn from prompts", { steps, batch, pixels, count })
    : say("{steps} steps of {batch} pictures, {pixels} pixels, from your pictures", { steps, batch, pixels });
  const shown = [...foreseen(estimate.queueing, name), [order], [time(estimate)], [room(estimate)]];
  if (own && own !== pixels) {
    shown.unshift([say("{architecture} is made for {own} pixels: switch auto_resolution on.", { architecture, own }), {}, true]);
  }
  return shown;
}

/** What an order would take, or why the server would refuse it, as lines. */
async function forecast(node, order) {
  const files = node.widgets.find(({ name }) => name === "checkpoint").options.values;
  if (Array.isArray(files) && !files.includes(order.checkpoint)) {
    return [[say("{name} is missing: choose another checkpoint, or download it and press R.", { name: order.checkpoint }), {}, true]];
  }
  const estimate = await call("estimate", order).catch(() => null); // the server may be gone
  return !estimate ? [] : estimate.refused ? [[estimate.refused, {}, true]] : lines(estimate, order.name);
}

/** Shows what a job would take on each node whose settings have changed, or whose text has gone. */
async function look() {
  for (const node of ofType(TYPE)) {
    const order = orderOf(node), key = JSON.stringify(order);
    if (seen.get(node) === key && !isSilent(node)) continue;
    seen.set(node, key);
    if (jobOf(node)) {
      refresh();
      continue;
    }
    const forecasted = order ? await forecast(node, order) : [];
    if (seen.get(node) === key && !jobOf(node)) show(node, forecasted);
  }
}

/** The id of the job that the node's current settings ordered. Other settings are another job. */
function jobOf(node) {
  return node.properties[ORDER] === seen.get(node) ? node.properties[JOB] : undefined;
}

/** Estimates again, because the files on the server have changed. */
export function lookAgain() {
  for (const node of ofType(TYPE)) seen.delete(node);
  lookSoon();
}

function lookSoon() {
  clearTimeout(timer);
  timer = setTimeout(look, PAUSE);
}

/** A job's activity and progress, as lines. */
function progressOf(job) {
  const isWrong = ["failed", "lost"].includes(job.state);
  return [[doing(job), {}, isWrong], ...(job.step || isWrong ? [[facts(job)]] : [])];
}

/** Shows the progress of jobs on the nodes that ordered them, and on the nodes for their status. */
export function showProgress(jobs) {
  for (const node of ofType(STATUS)) {
    const job = jobs.find(({ id }) => id === node.properties[JOB]);
    if (job) show(node, progressOf(job));
  }
  for (const node of ofType(TYPE)) {
    const job = jobs.find(({ id }) => id === jobOf(node));
    if (!job) continue;
    const order = node.properties[KEY]?.slice(1) ?? [];
    const isDone = job.state === "done";
    show(node, [...(isDone ? [[say("Finished: {name}", { name: job.lora_name })]] : progressOf(job)), ...order]);
  }
}

/** Lets the nodes show estimates and progress. request: calls the pack's API; refreshJobs: fetches the
 * jobs. */
export function giveProgress(nodeType, definition, request, refreshJobs) {
  [call, refresh] = [request, refreshJobs];
  if (definition.name === STATUS) giveStatus(nodeType);
  if (definition.name === TYPE) giveForecast(nodeType);
}

function giveStatus(nodeType) {
  const { onExecuted } = nodeType.prototype;
  nodeType.prototype.onExecuted = function (output, ...rest) {
    onExecuted?.call(this, output, ...rest);
    if (!output?.[JOB]) return;
    this.properties[JOB] = output[JOB][0];
    refresh();
  };
}

function giveForecast(nodeType) {
  const { onExecuted, onConfigure, onNodeCreated } = nodeType.prototype;
  nodeType.prototype.onExecuted = function (output, ...rest) {
    onExecuted?.call(this, output, ...rest);
    if (!output?.[JOB]) return;
    const order = JSON.stringify(orderOf(this));
    Object.assign(this.properties, { [JOB]: output[JOB][0], [ORDER]: order });
    seen.set(this, order);
    refresh();
  };
  nodeType.prototype.onConfigure = function (...all) {
    onConfigure?.apply(this, all);
    lookSoon();
  };
  nodeType.prototype.onNodeCreated = function (...all) {
    onNodeCreated?.apply(this, all);
    lookSoon();
  };
  nodeType.prototype.onTextGone = lookSoon; // texts.mjs calls it
}

/** Estimates again when the graph changes. */
export function listenToChanges() {
  api.addEventListener("graphChanged", lookSoon);
}
