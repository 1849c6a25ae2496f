// Makes the tab's elements.

/** The name of a job for people. */
export const called = (job) => job.title || job.name;

/** An element with these attributes ("on..." are its listeners, "class" its classes) and children. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const restorers = new WeakMap(); // button that shows a question -> function that restores its words

/** Whether the user has yet to confirm: the first press shows `question` on the button for some
 * seconds; a second press during that time confirms. */
export function needsConfirmation(button, question) {
  const end = restorers.get(button);
  if (end) {
    end();
    return false;
  }
  const words = button.textContent, label = button.getAttribute("aria-label");
  button.textContent = question;
  if (label) button.setAttribute("aria-label", label.replace(words, question));
  const restore = () => {
    clearTimeout(timer);
    restorers.delete(button);
    button.textContent = words;
    if (label) button.setAttribute("aria-label", label);
  };
  const timer = setTimeout(restore, 4000);
  restorers.set(button, restore);
  return true;
}
