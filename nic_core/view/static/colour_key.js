/** The colour key of a layer: what its colours mean. */

import { element, number } from "./view.js";

/** A key of the kinds ramp (low to high), classes (a colour each) and note (a sentence). */
export function colourKey(legend) {
  const key = element("div", { class: "key" });
  if (legend.kind === "ramp") {
    const ramp = element("div", { class: "ramp", "aria-hidden": "true" });
    ramp.style.background = `linear-gradient(to right, ${legend.colours.join(", ")})`;
    const unit = legend.unit ? ` ${legend.unit}` : "";
    const ends = [end(legend.low, unit), end(legend.high, unit)];
    key.append(ramp, element("div", { class: "ends" }, ...ends.map((text) => element("span", {}, text))));
  } else if (legend.kind === "classes") {
    const items = legend.labels.map((label, index) => {
      const patch = element("span", { class: "swatch", "aria-hidden": "true" });
      patch.style.background = legend.colours[index];
      return element("li", {}, patch, label);
    });
    key.append(element("ul", {}, ...items));
  }
  if (legend.meaning) key.append(element("p", {}, legend.meaning));
  return key;
}

function end(value, unit) {
  return typeof value === "number" ? number(value) + unit : String(value ?? "");
}
