/** Two encoders side by side on one slide; both maps keep the same place and zoom. */

/* global L */

import { colourKey } from "./colour_key.js";
import { readHash, writeHash } from "./permalink.js";
import { addScaleBar, bounds, fit, show, slideMap, viewOf } from "./slide_map.js";
import { debounced, element, errorMessage, get, slideAddress, slideApi, subject } from "./view.js";

const GRID = "grid"; // the choice that is no target

const name = subject();
const byId = (id) => document.getElementById(id);

document.title = `${name}, two encoders · NIC`;
byId("slide").textContent = name;

try {
  const [slide, study] = await Promise.all([get(slideApi(name)), get("/api/study")]);
  byId("study").textContent = study.name;
  if (slide.failed) throw Object.assign(new Error(slide.failed.reason), { remedy: slide.failed.remedy });
  open(slide, study);
} catch (error) {
  byId("sides").replaceChildren(errorMessage(error));
}

function open(slide, study) {
  const asked = new URLSearchParams(location.search);
  const encoders = study.encoders.map((encoder) => encoder.name);
  const [first, second] = [asked.get("left") ?? encoders[0], asked.get("right") ?? encoders[1] ?? encoders[0]];
  const unknown = [first, second].filter((encoder) => !encoders.includes(encoder));
  if (unknown.length) {
    byId("notice").textContent = `The study has no encoder ${unknown.join(", ")}: choose one of the lists.`;
  }
  const sections = [...document.querySelectorAll(".side")];
  const sides = sections.map((section, index) => {
    const map = slideMap(section.querySelector("[data-map]"), slide);
    const select = section.querySelector("[data-encoder]");
    select.append(...encoders.map((encoder) => element("option", {}, encoder)));
    select.value = [first, second][index];
    return { map, select, key: section.querySelector("[data-key]"), drawn: null };
  });

  const shown = byId("shown");
  shown.append(element("option", { value: GRID }, "grid colours"));
  for (const { name: target } of study.targets) {
    if (slide.layers.some((layer) => layer.id.startsWith(`heat.${target}.`))) {
      shown.append(element("option", { value: target }, `heat of ${target}`));
    }
  }
  const wanted = asked.get("show");
  if (wanted && [...shown.options].some((option) => option.value === wanted)) shown.value = wanted;
  const opacity = byId("opacity");

  const draw = () => sides.forEach((side) => drawSide(side, slide, shown.value, opacity.value / 100));
  const keepLink = debounced(100, () => {
    const [left, right] = sides.map((side) => side.select.value);
    const query = new URLSearchParams({ left, right, show: shown.value });
    const hash = writeHash(viewOf(sides[0].map), new Map());
    history.replaceState(null, "", `?${query}${hash}`);
    byId("back").href = slideAddress(name, hash.replace(/&layers=$/, ""));
  });

  link(sides.map((side) => side.map));
  const { view } = readHash(location.hash);
  if (view) show(sides[0].map, view);
  else fit(sides[0].map, slide);
  for (const { map, select } of sides) {
    addScaleBar(map, slide.mpp);
    map.on("moveend", keepLink);
    select.addEventListener("change", () => (draw(), keepLink()));
  }
  shown.addEventListener("change", () => (draw(), keepLink()));
  opacity.addEventListener("input", draw);
  window.addEventListener("hashchange", () => {
    const { view: moved } = readHash(location.hash);
    if (moved) show(sides[0].map, moved);
  });
  draw();
  keepLink();
}

/** Keep the maps at one place and zoom: a move of one moves the other. */
function link(maps) {
  let moving = false;
  for (const map of maps) {
    map.on("move zoom", () => {
      if (moving) return;
      moving = true;
      for (const other of maps) if (other !== map) other.setView(map.getCenter(), map.getZoom(), { animate: false });
      moving = false;
    });
  }
}

/** Draw the grid or the heat of a side's encoder, with its colour key. */
function drawSide(side, slide, choice, opacity) {
  side.drawn?.remove();
  side.drawn = null;
  const encoder = side.select.value;
  const id = choice === GRID ? `grid.${encoder}` : `heat.${choice}.${encoder}`;
  const layer = slide.layers.find((entry) => entry.id === id);
  if (layer === undefined) {
    const missing = choice === GRID ? "grid with colours" : `heatmap of ${choice}`;
    side.key.replaceChildren(element("p", { class: "muted" }, `No ${missing} by ${encoder || "this encoder"} in the store.`));
    return;
  }
  const className = layer.pixelated ? "pixelated" : "";
  const image = L.imageOverlay(layer.url, bounds(layer.box), { className, opacity });
  image.on("error", () => get(layer.url).catch((error) => side.key.replaceChildren(errorMessage(error))));
  side.drawn = image.addTo(side.map);
  side.key.replaceChildren(element("strong", {}, layer.title), colourKey(layer.legend));
}
