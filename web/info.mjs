// "LoRA info" in the menu of nodes that load LoRA files: a dialog with the facts about a file. Other
// people wrote the metadata, so they go into the page as text only.
import { say } from "./words.mjs";

const FILE = /^(?:lora_name|count\.lora_\d+)$/; // the widgets that name a file
const LOOK = `
.lcm-info { max-width: min(44rem, 92vw); max-height: 85vh; overflow: auto; padding: 1rem 1.25rem;
  border: 1px solid var(--border-color, #888); border-radius: 8px; background: var(--comfy-menu-bg, #222);
  color: var(--fg-color, #ddd); font: 14px/20px system-ui, sans-serif; }
.lcm-info::backdrop { background: #0008; }
.lcm-info h2 { margin: 0 0 0.75rem; font-size: 1rem; overflow-wrap: anywhere; }
.lcm-info dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1rem; margin: 0; }
.lcm-info dt { opacity: 0.85; }
.lcm-info dd { margin: 0; overflow-wrap: anywhere; user-select: text; }
.lcm-info summary { margin: 0.75rem 0 0.25rem; cursor: pointer; }
.lcm-info details dl { grid-template-columns: 1fr; font-size: 12px; gap: 0; }
.lcm-info details dd { margin: 0 0 0.35rem 1rem; }
.lcm-info pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; user-select: text; }
.lcm-info button { margin-top: 1rem; padding: 0.25rem 1rem; border: 1px solid var(--border-color, #888);
  border-radius: 4px; background: var(--comfy-input-bg, #333); color: inherit; font: inherit; cursor: pointer; }`;

function element(tag, text = "", ...children) {
  const made = document.createElement(tag);
  made.textContent = text;
  made.append(...children);
  return made;
}

function list(values, label) {
  return element("dl", "", ...Object.entries(values).flatMap(
    ([key, value]) => [element("dt", label(key)), element("dd", value)]));
}

function folded(title, content) {
  return element("details", "", element("summary", title), content);
}

/** Shows the facts about a file, or the error if it cannot be read. */
async function show(call, name) {
  const style = element("style", LOOK), title = element("h2", name), close = element("button", say("Close"));
  const content = element("div", say("Reading the file ..."));
  const dialog = element("dialog", "", style, title, content, close);
  dialog.className = "lcm-info";
  dialog.setAttribute("aria-label", say("LoRA info: {name}", { name }));
  close.type = "button";
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", ({ target }) => { if (target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => dialog.remove());
  // Keys pressed in the dialog must not act on the graph behind it.
  dialog.addEventListener("keydown", (event) => event.stopPropagation());
  document.body.append(dialog);
  dialog.showModal();
  try {
    const { facts, made_of: madeOf, metadata } = await call(`lora?name=${encodeURIComponent(name)}`);
    content.replaceChildren(list(facts, say));
    if (madeOf.length) content.append(folded(say("How it was made"), element("pre", madeOf.join("\n"))));
    if (Object.keys(metadata).length) content.append(folded(say("All metadata"), list(metadata, String)));
  } catch (error) {
    content.textContent = error.message;
  }
}

/** The menu entries for a node's LoRA files. call(path): calls the pack's API. */
export function infoItems(node, call) {
  if (!node.constructor?.nodeData?.category?.startsWith("LCM-LoRA")) return [];
  const named = (node.widgets ?? []).filter(({ name, value }) => FILE.test(name) && value && value !== "None");
  const items = [...new Set(named.map(({ value }) => value))].map((name) => ({ name, callback: () => show(call, name) }));
  if (items.length < 2) return items.map(({ callback }) => ({ content: say("LoRA info ..."), callback }));
  const options = items.map(({ name, callback }) => ({ content: name, callback }));
  return [{ content: say("LoRA info ..."), has_submenu: true, submenu: { options } }];
}
