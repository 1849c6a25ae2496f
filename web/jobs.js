// The sidebar tab "LCM-LoRA jobs": registers it, keeps the list of jobs, and says when one ends.
// Also lets the nodes show what they say (texts.mjs), keeps and moves the rows of nodes that have
// some (rows.mjs), folds what does not count (folds.mjs), and shows what LoRA files say about
// themselves (info.mjs). Templates come with notes in the language of the page (notes.mjs).
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { giveProgress, listenToChanges, lookAgain, showProgress } from "./distill.mjs";
import { called } from "./elements.mjs";
import { foldSteps } from "./folds.mjs";
import { edit, openTemplate, openWorkflow, useInGraph } from "./graph.mjs";
import { infoItems } from "./info.mjs";
import { translateNotes } from "./notes.mjs";
import { checkpointItems, isNotified, offers, wantNotified } from "./offers.mjs";
import { Panel } from "./panel.mjs";
import { givePlaceholders } from "./placeholders.mjs";
import { endPreviews } from "./previews.mjs";
import { keepRows, rowItems } from "./rows.mjs";
import { giveText, listenToNodes } from "./texts.mjs";
import { say, speak } from "./words.mjs";

const EVENT = "lcm_lora.jobs";
const POLL = 5000; // milliseconds, should the server's events get lost
const TAB = "lcm-lora-jobs";

const state = { jobs: [], running: 0, total: 0, error: "" };
let panel = null;
let states = null; // id -> state at the last look; null until the first
let asking = null; // the request that is under way, and the one after it
let next = null;

async function call(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const answer = await api.fetchApi(`/lcm_lora/${path}`, options);
  const data = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(data.error ?? say("The server answered {status}.", { status: answer.status }));
  return data;
}

function toast(severity, summary, detail) {
  app.extensionManager.toast.add({ severity, summary, detail, life: 8000 });
}

/** Takes over the language that the front end has now. */
function listen() {
  speak(app.extensionManager.setting.get("Comfy.Locale") ?? "en");
}

/** Fetches the list. Calls that come while one is under way share the next one, for the answer to
 * the first may be older than what they want to see. */
function refresh() {
  if (!asking) return (asking = fetchJobs());
  next ??= asking.then(() => {
    next = null;
    return refresh();
  });
  return next;
}

function fetchJobs() {
  return call("jobs?limit=200")
    .then((list) => {
      Object.assign(state, list, { error: "" });
      announce();
    })
    .catch((error) => { state.error = error.message; })
    .finally(() => {
      asking = null;
      panel?.update(state);
      showProgress(state.jobs);
      badge();
    });
}

/** The number on the tab's icon. The front end watches its own record of the tab, so that is set. */
function badge() {
  const tab = app.extensionManager.sidebarTab?.sidebarTabs?.find(({ id }) => id === TAB);
  if (tab) tab.iconBadge = state.running ? String(state.running) : null;
}

/** A toast for each job that has ended since the last look. */
function announce() {
  const before = states;
  states = new Map(state.jobs.map((job) => [job.id, job.state]));
  if (!before) return;
  for (const job of state.jobs) {
    if (!before.has(job.id) || before.get(job.id) === job.state) continue;
    if (job.state === "done") {
      toast("success", say("LCM-LoRA is ready"), job.lora_name);
      notify(job, say("LCM-LoRA is ready"), job.lora_name);
      app.refreshComboInNodes?.(); // so that loaders offer the new file
    } else if (job.state === "failed") {
      toast("error", say("Distillation failed: {name}", { name: called(job) }), job.error ?? job.message);
      notify(job, say("Distillation failed: {name}", { name: called(job) }), job.error ?? job.message);
    }
  }
}

/** The browser's own notification, if the user has asked for them. */
function notify(job, title, body) {
  if (!isNotified()) return;
  try {
    new Notification(title, { body, tag: `lcm-lora ${job.id}` }); // one for all tabs of the browser
  } catch {} // browsers of phones have the name, and refuse
}

function openDistillation() {
  // The pack's folder, which may have any name: this file is /extensions/FOLDER/jobs.js.
  const folder = new URL(".", import.meta.url).pathname.split("/").at(-2);
  return openTemplate("Distil an LCM-LoRA", api.apiURL(`/workflow_templates/${folder}/Distil an LCM-LoRA.json`));
}

app.registerExtension({
  name: "lcmlora.jobs",
  ...offers(TAB, openDistillation),
  init: listen,
  beforeConfigureGraph(graph) {
    listen();
    return translateNotes(graph);
  },
  beforeRegisterNodeDef(nodeType, definition) {
    giveText(nodeType, definition);
    givePlaceholders(definition);
    giveProgress(nodeType, definition, call, refresh);
  },
  nodeCreated(node) {
    keepRows(node);
    foldSteps(node);
  },
  refreshComboInNodes: lookAgain,
  getNodeMenuItems(node) {
    listen();
    return [...rowItems(node), ...infoItems(node, call), ...checkpointItems(node)];
  },
  setup() {
    listen();
    listenToNodes();
    listenToChanges();
    endPreviews();
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: "pi pi-bolt",
      iconBadge: null,
      label: "LCM-LoRA", // short, or older front ends cut it
      title: say("LCM-LoRA jobs"),
      tooltip: say("LCM-LoRA jobs"),
      type: "custom",
      render(element) {
        panel?.close();
        listen();
        panel = new Panel(element, {
          call, refresh, toast, useInGraph, edit, openDistillation, isNotified, wantNotified,
          openWorkflow: async (job) => openWorkflow(await call(`jobs/${job.id}/workflow`), called(job)),
          fileURL: (path) => api.apiURL(path), jobs: () => state.jobs,
        });
        panel.update(state);
        refresh();
      },
      destroy() {
        panel?.close();
        panel = null;
      },
    });
    api.addEventListener(EVENT, refresh);
    api.addEventListener("reconnected", refresh);
    setInterval(() => { if (panel || state.running) refresh(); }, POLL);
    refresh();
  },
});
