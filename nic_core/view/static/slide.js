/** The page of one slide. */

/* global L */

import { addAnnotating } from "./annotate.js";
import { Layers } from "./layers.js";
import { readHash, writeHash } from "./permalink.js";
import { labelText, showSimilar } from "./similar.js";
import { addMinimap, addScaleBar, at, fit, show, slideMap, viewOf } from "./slide_map.js";
import { debounced, element, get, length, number, showError, slideAddress, slideApi, subject } from "./view.js";

const HOVER_PAUSE = 60; // ms without a movement until the values under the pointer are asked for

const name = subject();
const byId = (id) => document.getElementById(id);

document.title = `${name} · NIC`;
byId("slide").textContent = name;

const help = byId("help");
byId("help-button").addEventListener("click", () => help.showModal());

try {
  const [slide, study] = await Promise.all([get(slideApi(name)), get("/api/study")]);
  byId("study").textContent = study.name;
  open(slide, study);
} catch (error) {
  fail(error);
}
describe();

function fail(error) {
  byId("panel").hidden = true;
  showError(byId("map"), error);
}

function open(slide, study) {
  const map = slideMap(byId("map"), slide);
  const layers = new Layers(map, slide.layers, () => {
    keepLink();
    showValues();
  });
  byId("layers").append(layers.list());

  const follow = (hash) => {
    const { view, layers: wanted } = readHash(hash);
    if (view) show(map, view);
    else fit(map, slide);
    const unknown = layers.set(wanted ?? firstLayers(slide));
    const notices = [];
    if (slide.failed) notices.push(`The slide ${slide.failed.reason}: ${slide.failed.remedy}.`);
    if (unknown.length) notices.push(`This slide has no layer ${unknown.join(", ")}, which the address names.`);
    byId("notice").textContent = notices.join(" ");
  };
  const keepLink = debounced(100, () => {
    const hash = writeHash(viewOf(map), layers.shown());
    history.replaceState(null, "", hash);
    for (const link of document.querySelectorAll("a[data-keep-hash]")) link.hash = hash;
  });
  follow(location.hash);
  keepLink();
  map.on("moveend", keepLink);
  window.addEventListener("hashchange", () => follow(location.hash));

  addScaleBar(map, slide.mpp);
  addMinimap(map, slide);
  showSize(slide);
  const showValues = pointer(map, slide, study, layers);
  keys(map, slide, layers);
  if (study.annotate) addAnnotating(map, slide, byId("panel"));
  byId("compare").hidden = study.encoders.length < 2;
  byId("compare").href = `/compare/${encodeURIComponent(name)}`;
  map.getContainer().focus({ preventScroll: true });
}

/** The layers of an address that names none: the outline of the tissue. */
function firstLayers(slide) {
  const outline = slide.layers.find((layer) => layer.group === "tissue");
  return new Map(outline ? [[outline.id, outline.opacity ?? 1]] : []);
}

function showSize(slide) {
  const size = `${number(slide.width)} × ${number(slide.height)} px`;
  const um = `${length(slide.width * slide.mpp)} × ${length(slide.height * slide.mpp)}`;
  byId("size").textContent = `${size}, ${um} at ${number(slide.mpp)} µm/px`;
}

/**
 * Values under the pointer; a click searches cells like the one under it.
 *
 * Returns a function that shows the last values again, with those of the layers that are on.
 */
function pointer(map, slide, study, layers) {
  const values = byId("values");
  const place = byId("place");
  let request = new AbortController();
  let found = null;
  const showValues = () => {
    values.replaceChildren(...(found ? valueTable(found, slide, layers.shown()) : []));
  };
  const ask = async ({ lng: x, lat: y }) => {
    request.abort();
    request = new AbortController();
    const query = new URLSearchParams({ x: Math.floor(x), y: Math.floor(y) });
    return get(slideApi(name, `/at?${query}`), request.signal);
  };
  const describePlace = debounced(HOVER_PAUSE, async (point) => {
    if (!inside(slide, point)) return;
    try {
      found = await ask(point);
      showValues();
    } catch (error) {
      showError(values, error);
    }
  });
  const follow = (point) => {
    byId("pointer").hidden = !inside(slide, point);
    if (inside(slide, point)) {
      place.textContent = `x ${length(point.lng * slide.mpp)}, y ${length(point.lat * slide.mpp)}`;
    } else {
      found = null;
      showValues();
    }
    describePlace(point);
  };
  map.on("mousemove", (event) => follow(event.latlng));
  // with the keyboard, the centre of the view takes the pointer's place
  map.on("moveend", () => {
    if (!map.getContainer().matches(":hover")) follow(map.getCenter());
  });

  const encoders = byId("encoder");
  encoders.append(...study.encoders.map((encoder) => element("option", {}, encoder.name)));
  let search = new AbortController();
  let frame = null;
  const searchAt = async (point) => {
    if (!inside(slide, point)) return;
    const panel = byId("similar");
    const encoder = study.encoders.find((entry) => entry.name === encoders.value);
    search.abort();
    search = new AbortController();
    try {
      const cell = (await ask(point)).grids[encoder.name];
      frame?.remove();
      frame = null;
      if (!cell) {
        panel.replaceChildren(element("p", { class: "muted" }, `${encoder.name} has no cell here.`));
        return;
      }
      frame = cellFrame(cell, encoder, slide).addTo(map);
      await showSimilar(panel, name, encoder.name, cell, search.signal);
    } catch (error) {
      showError(panel, error);
    }
  };
  let last = null;
  const searchLast = (point) => {
    last = point;
    if (study.encoders.length === 0) return;
    byId("similar-title").scrollIntoView({ block: "nearest" });
    searchAt(point);
  };
  map.on("click", (event) => searchLast(event.latlng));
  map.on("keypress", (event) => {
    if (event.originalEvent.key === "Enter") searchLast(map.getCenter());
  });
  encoders.addEventListener("change", () => {
    if (last) searchAt(last);
  });
  return showValues;
}

function inside(slide, { lng: x, lat: y }) {
  return x >= 0 && y >= 0 && x < slide.width && y < slide.height;
}

/** The square of a grid's cell, px at level 0. */
function cellFrame({ row, column }, encoder, slide) {
  const scale = encoder.mpp / slide.mpp;
  const side = encoder.stride * scale;
  const margin = ((encoder.patch - encoder.stride) / 2) * scale;
  const corner = [margin + column * side, margin + row * side];
  const square = L.latLngBounds(at(...corner), at(corner[0] + side, corner[1] + side));
  return L.rectangle(square, { color: "#111827", weight: 2, fill: false, interactive: false });
}

/** Values of a place: a table, and a hint where heatmaps are off. */
function valueTable(found, slide, shown) {
  const rows = [];
  for (const [geometry, patch] of Object.entries(found.patch)) {
    rows.push([`patch ${geometry}`, patch.kept ? "kept" : `left out: ${patch.reason}`]);
    rows.push(["tissue", percent(patch.tissue)], ["focus", number(patch.focus)]);
  }
  for (const [encoder, cell] of Object.entries(found.grids)) {
    rows.push([`cell of ${encoder}`, cell ? `row ${cell.row}, column ${cell.column}` : "none"]);
  }
  for (const [map, classes] of Object.entries(found.maps)) {
    for (const [label, probability] of Object.entries(classes)) {
      rows.push([`${map}: ${label}`, percent(probability)]);
    }
  }
  if (typeof found.label === "number") rows.push(["label image", number(found.label)]);
  const heat = slide.layers.filter(({ id }) => id in found.heat);
  for (const { id, title } of heat) {
    if (shown.has(id)) rows.push([title, number(found.heat[id])]);
  }
  if (rows.length === 0) return [element("p", { class: "muted" }, "No cell here.")];
  const lines = rows.map(([title, value]) =>
    element("tr", {}, element("th", { scope: "row" }, title), element("td", {}, value)),
  );
  const table = element("table", { class: "values" }, element("tbody", {}, ...lines));
  if (heat.every(({ id }) => shown.has(id))) return [table];
  return [table, element("p", { class: "muted" }, "A heatmap's value is listed while its layer is on.")];
}

function percent(fraction) {
  return typeof fraction === "number" ? `${number(100 * fraction)} %` : "–";
}

/** Keys beside those of Leaflet (arrows, +, -). */
function keys(map, slide, layers) {
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("select, textarea, input:not([type=checkbox])");
    if (typing || event.ctrlKey || event.altKey || event.metaKey || help.open) return;
    if (event.key >= "1" && event.key <= "9") layers.toggle(Number(event.key));
    else if (event.key === "f") fit(map, slide);
    else if (event.key === "?") help.showModal();
    else if (event.key === "[") byId("previous").click();
    else if (event.key === "]") byId("next").click();
  });
}

/** Patient, split and labels of the slide, and its neighbours in the cohort. */
async function describe() {
  const slides = await get("/api/slides").catch(() => []);
  const position = slides.findIndex((entry) => entry.slide === name);
  if (position < 0) return;
  const { patient, split, exclude, labels } = slides[position];
  const facts = Object.entries({ patient, split, excluded: exclude }).filter(([, value]) => value);
  for (const [target, label] of Object.entries(labels)) facts.push([target, labelText(label)]);
  byId("facts").textContent = facts.map(([title, value]) => `${title}: ${value}`).join(" · ");
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    const neighbour = slides[position + step];
    const link = byId(id);
    link.hidden = neighbour === undefined;
    if (neighbour) {
      link.href = slideAddress(neighbour.slide);
      link.title = `${neighbour.slide} (key ${step < 0 ? "[" : "]"})`;
    }
  }
}
