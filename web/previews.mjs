// Removes the live preview of Compare Settings when the final sheet is there. The front end keeps a
// node's preview until the node runs again, and Nodes 2.0 shows it beside the final sheet or instead.
import { api } from "../../scripts/api.js";
import { nodeAt } from "./texts.mjs";

const TYPE = "LCMCompare";

/** The front end's store of previews, which extensions have no API for. If it is not found, the preview
 * stays. */
function store() {
  const page = document.getElementById("vue-app")?.__vue_app__?.config.globalProperties;
  return page?.$pinia?._s.get("nodeOutput");
}

/** Removes the preview when the final sheet is there. */
export function endPreviews() {
  api.addEventListener("executed", ({ detail }) => {
    const node = nodeAt(detail.display_node ?? detail.node);
    if (node?.type !== TYPE) return;
    const { graph, id } = node, previews = store();
    if (previews?.revokePreviewsByLocatorId) {
      previews.revokePreviewsByLocatorId(graph.isRootGraph ? String(id) : `${graph.id}:${id}`);
      previews.refreshNodeOutputs?.(node); // otherwise Nodes 2.0 still shows the removed picture
    } else { // older front ends, which keep the last picture of the preview as the sheet
      previews?.revokePreviewsByExecutionId?.(String(detail.display_node ?? detail.node));
    }
  });
}
