// Placeholders for empty text fields of nodes: what to write there. Otherwise the front end shows ids.
import { say } from "./words.mjs";

const prompts = () => say("One prompt in each line.");
const TEXTS = {
  LCMCompare: {
    prompts,
    files: () => say("One LoRA file in each line, as loaders show it."),
    lines: () => say("The settings of one picture in each line, such as steps=4, cfg=1."),
  },
  LCMDistill: { sample_prompts: () => say("One prompt in each line. Empty: the first four of the data.") },
  LCMDistillData: { prompts: () => say("One prompt in each line. Empty: the list that comes with the pack.") },
  LCMLoRABlocks: { weights: () => say("Your own weights, such as output=0.8, down_blocks_1=0. Empty: those of the preset.") },
  LCMWeightSearch: { prompts: () => say("One prompt in each line, with the trigger words of the styles. Empty: prompts of this pack.") },
};

function put(inputs, texts) {
  for (const [name, [type, options]] of Object.entries({ ...inputs?.required, ...inputs?.optional })) {
    if (type === "STRING" && name in texts) options.placeholder = texts[name]();
    for (const option of options?.options ?? []) put(option.inputs, texts); // of a dynamic combo
  }
}

export function givePlaceholders(definition) {
  if (definition.name in TEXTS) put(definition.input, TEXTS[definition.name]);
}
