// The pack's only extension. It registers the sidebar tab "LCM-LoRA jobs", keeps the list of jobs, and
// shows a message when one ends. It also shows texts on nodes (texts.mjs), keeps and moves the rows of
// nodes (rows.mjs), folds an input without effect (folds.mjs), shows the facts about LoRA files
// (info.mjs), and translates the notes of templates (notes.mjs).
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { giveProgress, listenToChanges, lookAgain, showProgress } from "./distill.mjs";
import { called } from "./elements.mjs";
import { foldByLength } from "./folds.mjs";
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
const POLL = 5000; // milliseconds between requests, in case the server's events get lost
const TAB = "lcm-lora-jobs";

const state = { jobs: [], running: 0, total: 0, error: "" };
let panel = null;
let states = null; // id -> state at the last look; null until the first
let current = null; // the request under way
let next = null; // the request after it

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

/** Switches to the front end's current language. */
function listen() {
  speak(app.extensionManager.setting.get("Comfy.Locale") ?? "en");
}

/** Fetches the list. Calls during a request share the next request, because the answer to the current
 * one may be too old for them. */
function refresh() {
  if (!current) return (current = fetchJobs());
  next ??= current.then(() => {
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
      current = null;
      panel?.update(state);
      showProgress(state.jobs);
      badge();
    });
}

/** Sets the number on the tab's icon, in the front end's own record of the tab, which it watches. */
function badge() {
  const tab = app.extensionManager.sidebarTab?.sidebarTabs?.find(({ id }) => id === TAB);
  if (tab) tab.iconBadge = state.running ? String(state.running) : null;
}

/** Shows a toast for each job that has ended since the last look. */
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

/** Shows a notification of the browser, if the user has switched them on. */
function notify(job, title, body) {
  if (!isNotified()) return;
  try {
    new Notification(title, { body, tag: `lcm-lora ${job.id}` }); // one for all tabs of the browser
  } catch {} // browsers on phones have the class but refuse to make one
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
    foldByLength(node);
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
