// The live preview of Compare Settings: the sheet as it grows. The front end keeps a node's preview
// until the node runs again, and the new rendering shows it beside, and in place of, the final sheet.
import { api } from "../../scripts/api.js";
import { nodeAt } from "./texts.mjs";

const TYPE = "LCMCompare";

/** The front end's store of previews. No API for extensions gives it; where it is not found, the
 * preview stays. */
function store() {
  const page = document.getElementById("vue-app")?.__vue_app__?.config.globalProperties;
  return page?.$pinia?._s.get("nodeOutput");
}

/** Takes the preview away when the final sheet is there. */
export function endPreviews() {
  api.addEventListener("executed", ({ detail }) => {
    const node = nodeAt(detail.display_node ?? detail.node);
    if (node?.type !== TYPE) return;
    const { graph, id } = node, previews = store();
    if (previews?.revokePreviewsByLocatorId) {
      previews.revokePreviewsByLocatorId(graph.isRootGraph ? String(id) : `${graph.id}:${id}`);
      previews.refreshNodeOutputs?.(node); // or the new rendering shows the picture that is gone
    } else { // older front ends, which keep the last picture of the preview as the sheet
      previews?.revokePreviewsByExecutionId?.(String(detail.display_node ?? detail.node));
    }
  });
}
