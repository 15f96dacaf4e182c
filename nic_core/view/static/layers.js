/** The layers over a slide: what is drawn, and the list that switches and fades them. */

/* global L */

import { colourKey } from "./colour_key.js";
import { at, bounds } from "./slide_map.js";
import { element, get, showError } from "./view.js";

const GROUPS = {
  tissue: "Tissue",
  patches: "Patches",
  grid: "Grids",
  maps: "Probability maps",
  heat: "Heatmaps",
  annotations: "Annotations",
  labels: "Label images",
};

/**
 * The layers of a slide on a map. Each has a pane of its own, so that pictures and outlines fade alike.
 *
 * changed() is called after a layer was switched or faded by the user.
 */
export class Layers {
  constructor(map, layers, changed) {
    this.map = map;
    this.changed = changed;
    // the order of the list: that of the groups, then that of the server
    const names = Object.keys(GROUPS);
    this.entries = layers
      .map((layer) => ({ layer, opacity: layer.opacity ?? 1, drawn: null, row: null }))
      .sort((one, two) => names.indexOf(one.layer.group) - names.indexOf(two.layer.group));
    this.entries.forEach((entry, index) => {
      const pane = map.createPane(`layer-${entry.layer.id}`);
      pane.style.zIndex = String(410 + (entry.layer.kind === "image" ? 0 : 100) + index);
      pane.style.pointerEvents = "none";
      entry.pane = pane;
    });
  }

  /** The ids and opacities of the layers that are on. */
  shown() {
    const on = this.entries.filter((entry) => entry.drawn !== null);
    return new Map(on.map((entry) => [entry.layer.id, entry.opacity]));
  }

  /** Switch on exactly these layers (a Map of ids and opacities); unknown ids are returned. */
  set(wanted) {
    for (const entry of this.entries) {
      if (wanted.has(entry.layer.id)) this.fade(entry, wanted.get(entry.layer.id));
      this.switch(entry, wanted.has(entry.layer.id));
    }
    const known = new Set(this.entries.map((entry) => entry.layer.id));
    return [...wanted.keys()].filter((id) => !known.has(id));
  }

  /** Switch one layer by its number in the list, from 1. */
  toggle(position) {
    const entry = this.entries[position - 1];
    if (entry === undefined) return;
    this.switch(entry, entry.drawn === null);
    this.changed();
  }

  switch(entry, on) {
    if (on && entry.drawn === null) {
      entry.drawn = draw(entry, (error) => this.failed(entry, error)).addTo(this.map);
    } else if (!on && entry.drawn !== null) {
      entry.drawn.remove();
      entry.drawn = null;
    }
    if (entry.row !== null) {
      entry.row.box.checked = on;
      entry.row.details.hidden = !on;
      if (!on) entry.row.fault.replaceChildren();
    }
  }

  fade(entry, opacity) {
    entry.opacity = opacity;
    entry.pane.style.opacity = String(opacity);
    if (entry.row !== null) entry.row.slider.value = String(Math.round(100 * opacity));
  }

  failed(entry, error) {
    if (entry.row !== null) showError(entry.row.fault, error);
  }

  /** The list: a group for each kind of layer, a switch, a slider and the colour key for each layer. */
  list() {
    const groups = new Map();
    this.entries.forEach((entry, index) => {
      const { group, id } = entry.layer;
      if (!groups.has(group)) {
        const legend = element("legend", {}, GROUPS[group] ?? group);
        groups.set(group, element("fieldset", {}, legend));
      }
      groups.get(group).append(this.row(entry, index + 1, `layer-${id}`));
      this.fade(entry, entry.opacity);
    });
    if (groups.size === 0) return element("p", { class: "muted" }, "No product of this slide is in the store yet.");
    return element("div", {}, ...groups.values());
  }

  row(entry, position, id) {
    const { title, legend } = entry.layer;
    const box = element("input", { type: "checkbox", id });
    const key = element("kbd", { title: `Key ${position} switches this layer` }, String(position));
    const slider = element("input", {
      type: "range",
      min: 0,
      max: 100,
      step: 5,
      "aria-label": `Opacity of ${title}`,
    });
    const fault = element("div");
    const details = element("div", { class: "details" }, slider, legend ? colourKey(legend) : null, fault);
    details.hidden = true;
    entry.row = { box, slider, details, fault };
    box.addEventListener("change", () => {
      this.switch(entry, box.checked);
      this.changed();
    });
    slider.addEventListener("input", () => {
      this.fade(entry, Number(slider.value) / 100);
      this.changed();
    });
    const label = element("label", { for: id }, title);
    return element("div", { class: "layer" }, box, label, position < 10 ? key : null, details);
  }
}

/** The Leaflet layer of an entry; failed(error) is called where its data cannot be had. */
function draw({ layer }, failed) {
  const pane = `layer-${layer.id}`;
  if (layer.kind === "image") {
    const className = layer.pixelated ? "pixelated" : "";
    const image = L.imageOverlay(layer.url, bounds(layer.box), { pane, className });
    // a picture that fails says nothing of the reason: the same address does
    image.on("error", () => get(layer.url).catch(failed));
    return image;
  }
  const shapes = L.geoJSON(null, {
    pane,
    renderer: L.canvas({ pane, padding: 0.3 }),
    coordsToLatLng: ([x, y]) => at(x, y),
    interactive: false,
    style: (feature) => style(layer, feature),
  });
  get(layer.url)
    .then((data) => shapes.addData(data))
    .catch(failed);
  return shapes;
}

/** The colour of a shape: that of its label in the colour key. */
function style(layer, feature) {
  const { labels = [], colours = [] } = layer.legend ?? {};
  const position = Math.max(labels.indexOf(feature.properties?.label), 0);
  const color = colours[position] ?? "#1f4e8c";
  const filled = layer.kind === "cells";
  return { color, weight: filled ? 1 : 2, fill: filled, fillColor: color, fillOpacity: 0.35 };
}
