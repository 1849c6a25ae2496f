// Translates the notes and titles in the pack's templates. A template is one file for all languages, so
// this happens when it is opened. notes/LANGUAGE.json maps the English texts to the translations.
import { SPOKEN, language } from "./words.mjs";

const tables = new Map(); // language -> its table

/** Translates only graphs with one of our notes, because other graphs may use the same titles. */
export async function translateNotes(graph) {
  const notes = graph.nodes?.filter(({ type }) => type === "MarkdownNote") ?? [];
  const locale = language();
  if (!notes.length || !SPOKEN.includes(locale)) return;
  if (!tables.has(locale)) {
    tables.set(locale, await (await fetch(new URL(`notes/${locale}.json`, import.meta.url))).json());
  }
  const table = tables.get(locale), known = (text) => Object.hasOwn(table, text);
  if (!notes.some(({ widgets_values: [text] = [] }) => known(text))) return;
  for (const node of graph.nodes) {
    if (known(node.title)) node.title = table[node.title];
    if (node.type === "MarkdownNote") node.widgets_values = node.widgets_values.map((text) => (known(text) ? table[text] : text));
  }
}
