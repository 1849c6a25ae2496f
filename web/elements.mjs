// How the tab makes its elements.

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

/** Whether a button has to ask again: the first press shows `question` on it for some seconds; a
 * second press within them is meant. */
export function asksAgain(button, question) {
  if (button.dataset.sure) {
    delete button.dataset.sure;
    return false;
  }
  const words = button.textContent, label = button.getAttribute("aria-label");
  button.dataset.sure = "yes";
  button.textContent = question;
  if (label) button.setAttribute("aria-label", label.replace(words, question));
  setTimeout(() => {
    delete button.dataset.sure;
    button.textContent = words;
    if (label) button.setAttribute("aria-label", label);
  }, 4000);
  return true;
}
