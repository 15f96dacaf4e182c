/** The page of a target: plots whose points are slides or patients; a click opens the hottest cell. */

/* global Bokeh */

import { writeHash } from "./permalink.js";
import { element, errorMessage, get, slideAddress, subject } from "./view.js";

const UNITS = "units"; // name of the data source of the points
const OPENED_ZOOM = -1; // half of full resolution
const HEAT_OPACITY = 0.5;

const name = subject();
const byId = (id) => document.getElementById(id);

document.title = `${name} · NIC`;
byId("target").textContent = name;

try {
  const address = `/api/targets/${encodeURIComponent(name)}`;
  const [study, found] = await Promise.all([get("/api/study"), get(address)]);
  byId("study").textContent = study.name;
  byId("targets").append(...study.targets.map(({ name: other }) => targetLink(other)));
  const point = found.level === "patient" ? "patient" : "slide";
  byId("facts").textContent = `${found.kind} · a point is a ${point}; click it to open its hottest cell`;
  await showPlots(found, address);
} catch (error) {
  byId("plots").replaceChildren(errorMessage(error));
}

function targetLink(other) {
  const current = other === name ? "page" : null;
  return element("a", { href: `/target/${encodeURIComponent(other)}`, "aria-current": current }, other);
}

async function showPlots(found, address) {
  const plots = byId("plots");
  if (found.items.length === 0) {
    plots.replaceChildren(element("p", { class: "muted" }, "No slide model of this target is in the store yet."));
    return;
  }
  const drawn = [];
  const sections = found.encoders.map((encoder) => {
    const figures = found.items
      .filter((entry) => entry.encoder === encoder)
      .map((entry) => {
        const place = element("div", {});
        drawn.push({ entry, place });
        return element("figure", {}, element("figcaption", {}, entry.title), place);
      });
    const row = element("div", { class: "plot-row" }, ...figures);
    return element("section", {}, element("h2", {}, `Embeddings of ${encoder}`), row);
  });
  plots.replaceChildren(...sections);
  for (const { entry, place } of drawn) {
    const view = await Bokeh.embed.embed_item(entry.item, place);
    const [root] = view.roots ?? [view];
    const source = root.model.document.get_model_by_name(UNITS);
    const selected = source?.selected;
    selected?.properties.indices.change.connect(() => {
      const [first] = selected.indices;
      if (first !== undefined) openUnit(address, entry.encoder, [...source.data.unit][first]);
    });
  }
}

/** Open the slide of a unit at its hottest cell, with the heatmap. */
async function openUnit(address, encoder, unit) {
  const notice = byId("notice");
  try {
    const query = new URLSearchParams({ encoder, unit });
    const { slide, x, y, layer } = await get(`${address}/hottest?${query}`);
    const view = { x, y, zoom: OPENED_ZOOM };
    const hash = layer ? writeHash(view, new Map([["tissue", 1], [layer, HEAT_OPACITY]])) : "";
    location.assign(slideAddress(slide, hash));
  } catch (error) {
    notice.textContent = [error.message, error.remedy].filter(Boolean).join(": ");
  }
}
