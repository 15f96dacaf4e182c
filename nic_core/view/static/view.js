/** What every page uses: requests, elements, numbers. */

/** An answer of the server that is no success, with its sentence and its remedy. */
export class RequestError extends Error {
  constructor(status, error, remedy) {
    super(error);
    this.status = status;
    this.remedy = remedy;
  }
}

/** The JSON of an address of this server; throws a RequestError. */
export async function get(url, signal) {
  const response = await fetch(url, { signal }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new RequestError(0, "The server does not answer.", "Start 'nic view' again and reload this page.");
  });
  const text = await response.text();
  if (response.ok) return JSON.parse(text);
  let answer;
  try {
    answer = JSON.parse(text);
  } catch {
    answer = { error: `The server answered ${response.status} ${response.statusText}.` };
  }
  throw new RequestError(response.status, answer.error, answer.remedy ?? "");
}

/** An element with attributes (null and false: left out) and children (strings or nodes). */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, value === true ? "" : value);
    }
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** The error and its remedy as a message that screen readers announce. */
export function errorMessage(error) {
  const remedy = error.remedy ? element("p", {}, error.remedy) : null;
  return element("div", { class: "fault", role: "alert" }, element("p", {}, error.message), remedy);
}

/**
 * Show in a place that its content cannot be had.
 *
 * A request that was aborted is no error; an error of these pages is thrown on, to be seen in the console.
 */
export function showError(place, error) {
  if (error.name === "AbortError") return;
  place.replaceChildren(errorMessage(error));
  if (!(error instanceof RequestError)) throw error;
}

/** Three significant digits; whole numbers as they are. */
export function number(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const digits = Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(3);
  return Number(digits).toLocaleString("en", { maximumFractionDigits: 6 });
}

/** A length in um as "250 µm" or "2.5 mm". */
export function length(um) {
  return Math.abs(um) < 1000 ? `${number(um)} µm` : `${number(um / 1000)} mm`;
}

/** The address of a page of a slide. */
export function slideAddress(slide, hash = "") {
  return `/slide/${encodeURIComponent(slide)}${hash}`;
}

/** The address of the API of a slide. */
export function slideApi(slide, rest = "") {
  return `/api/slides/${encodeURIComponent(slide)}${rest}`;
}

/** The last part of the address of this page: the slide or target that it shows. */
export function subject() {
  return decodeURIComponent(location.pathname.split("/").pop());
}

/** A function that calls the last of several quick calls, after a pause of so many ms. */
export function debounced(pause, call) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), pause);
  };
}
