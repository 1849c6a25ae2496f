// What Distill LCM-LoRA shows below its widgets: what a job with its settings would take, and once
// that is queued, how far the job is.
import { api } from "../../scripts/api.js";
import { allNodes, orderOf } from "./graph.mjs";
import { doing, facts, gigabytes } from "./progress.mjs";
import { JOB, KEY, show } from "./texts.mjs";
import { say } from "./words.mjs";

const TYPE = "LCMDistill";
const PAUSE = 400; // milliseconds without a change before the server is asked
const ORDER = "lcm_lora_order"; // in the node's properties: what its job was ordered with
const seen = new WeakMap(); // node -> the order that its text is about

let call = null;
let refresh = null;
let timer = null;

const distillations = () => [...allNodes()].filter(({ type }) => type === TYPE);

function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  if (minutes >= 60) return say("{hours} h {minutes} min", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
  return minutes ? say("{minutes} min", { minutes }) : say("{seconds} s", { seconds: Math.ceil(seconds) });
}

/** The time as a sentence that says how it is known. */
function time({ training_seconds: training, drawing_seconds: drawing, time: basis }) {
  if (basis === "unknown") return say("time unknown: no job of this architecture has run on this device yet");
  const words = [basis === "measured"
    ? say("training {time}, as an earlier job measured", { time: duration(training) })
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

/** An estimate as lines of a node. */
function lines(estimate) {
  const { steps, batch, resolution: pixels, drawn: count, architecture, own_resolution: own } = estimate;
  const order = count ? say("{steps} steps of {batch} pictures, {pixels} pixels, {count} drawn from prompts", { steps, batch, pixels, count })
    : say("{steps} steps of {batch} pictures, {pixels} pixels, from your pictures", { steps, batch, pixels });
  const said = [[order], [time(estimate)], [room(estimate)]];
  if (own && own !== pixels) {
    said.unshift([say("{architecture} is made for {own} pixels: switch auto_resolution on.", { architecture, own }), {}, true]);
  }
  return said;
}

/** Shows what a job would take on each node whose settings have changed. */
async function look() {
  for (const node of distillations()) {
    const order = orderOf(node), key = JSON.stringify(order);
    if (seen.get(node) === key) continue;
    seen.set(node, key);
    if (jobOf(node)) {
      refresh();
      continue;
    }
    // What is wrong with the settings is said by the node when it is queued.
    const estimate = order && await call("estimate", order).catch(() => null);
    if (seen.get(node) === key && !jobOf(node)) show(node, estimate ? lines(estimate) : []);
  }
}

/** The id of the job that the node's settings have ordered. Other settings are another job. */
function jobOf(node) {
  return node.properties[ORDER] === seen.get(node) ? node.properties[JOB] : undefined;
}

function lookSoon() {
  clearTimeout(timer);
  timer = setTimeout(look, PAUSE);
}

/** Shows how far the jobs are that nodes have ordered. */
export function showProgress(jobs) {
  for (const node of distillations()) {
    const job = jobs.find(({ id }) => id === jobOf(node));
    if (!job) continue;
    const isWrong = ["failed", "lost"].includes(job.state);
    const now = job.state === "done" ? say("Finished: {name}", { name: job.lora_name }) : doing(job);
    const hasFacts = job.state !== "done" && (job.step || isWrong);
    const order = node.properties[KEY]?.slice(1) ?? [];
    show(node, [[now, {}, isWrong], ...(hasFacts ? [[facts(job)]] : []), ...order]);
  }
}

/** Lets nodes for a distillation show these. request: calls the pack's API; refresh: fetches the jobs. */
export function giveProgress(nodeType, definition, request, refreshJobs) {
  if (definition.name !== TYPE) return;
  [call, refresh] = [request, refreshJobs];
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
}

/** Follows changes of the graph. */
export function listenToChanges() {
  api.addEventListener("graphChanged", lookSoon);
}
