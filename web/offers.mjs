// Commands and their keys, a setting, the link on the About page, and entries in the menus of
// checkpoint loaders. ComfyUI translates them from ../locales.
import { app } from "../../scripts/app.js";
import { CHECKPOINT, addLoader, distilFrom } from "./graph.mjs";
import { say } from "./words.mjs";

const NOTIFY = "lcm_lora.notify";
const VERSION = "0.1.0"; // as in pyproject.toml
const HOME = "https://github.com/lcm-lora/comfyui-lcm-lora";

/** A part of the argument of registerExtension. tab: the id of the sidebar's tab. */
export const offers = (tab, openDistillation) => ({
  commands: [{
    id: "lcm_lora.jobs", label: "Show the LCM-LoRA jobs", icon: "pi pi-bolt",
    function: () => app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${tab}`),
  }, {
    id: "lcm_lora.distil", label: "Distil an LCM-LoRA", icon: "pi pi-bolt",
    function: openDistillation,
  }],
  // A letter alone, as for ComfyUI's own tabs; the settings can change it.
  keybindings: [{ combo: { key: "l" }, commandId: "lcm_lora.jobs" }],
  menuCommands: [{ path: ["Extensions", "LCM-LoRA"], commands: ["lcm_lora.jobs", "lcm_lora.distil"] }],
  settings: [{
    id: "lcm_lora.notify", name: "Notify me when a distillation job ends",
    tooltip: "The browser shows a notification of its own, also while its window is in the background.",
    category: ["LCM-LoRA", "Jobs", "notify"], type: "boolean", defaultValue: false,
    onChange: (isWanted, before) => { if (isWanted && before === false) wantNotified(true); },
  }],
  aboutPageBadges: [{ label: `LCM-LoRA ${VERSION}`, url: HOME, icon: "pi pi-bolt" }],
});

export const isNotified = () =>
  Boolean(app.extensionManager.setting.get(NOTIFY)) && window.Notification?.permission === "granted";

/** Turns notifications on or off; -> whether they are on. The browser asks the user first. */
export async function wantNotified(isWanted) {
  const isAllowed = isWanted && (await window.Notification?.requestPermission()) === "granted";
  if (Boolean(app.extensionManager.setting.get(NOTIFY)) !== isAllowed) {
    await app.extensionManager.setting.set(NOTIFY, isAllowed);
  }
  if (isWanted && !isAllowed) {
    app.extensionManager.toast.add({
      severity: "warn", life: 8000, summary: say("LCM-LoRA jobs"),
      detail: say("The browser does not allow notifications from this page: allow them in its settings."),
    });
  }
  return isAllowed;
}

/** Entries for the menu of a checkpoint loader. */
export function checkpointItems(node) {
  if (node.type !== CHECKPOINT) return [];
  return [
    { content: say("Add Load LCM-LoRA"), callback: () => addLoader(node) },
    { content: say("Distil an LCM-LoRA from it"), callback: () => distilFrom(node) },
  ];
}
