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

const asked = new WeakMap(); // button that shows its question -> what gives it its own words back

/** Whether a button has to ask again: the first press shows `question` on it for some seconds; a
 * second press within them is meant. */
export function asksAgain(button, question) {
  const end = asked.get(button);
  if (end) {
    end();
    return false;
  }
  const words = button.textContent, label = button.getAttribute("aria-label");
  button.textContent = question;
  if (label) button.setAttribute("aria-label", label.replace(words, question));
  const restore = () => {
    clearTimeout(timer);
    asked.delete(button);
    button.textContent = words;
    if (label) button.setAttribute("aria-label", label);
  };
  const timer = setTimeout(restore, 4000);
  asked.set(button, restore);
  return true;
}
