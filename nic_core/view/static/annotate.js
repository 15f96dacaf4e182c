/** Draw regions on a slide, label them and save them (nic view --annotate). */

/* global L */

import { at } from "./slide_map.js";
import { RequestError, element, errorMessage, get, slideApi } from "./view.js";

const MOVED = 4; // px: a press that moves further is a drag of the map, not a corner
const CLOSE = 10; // px from the first corner at which a click closes a polygon
const COLOURS = ["#b8433f", "#3b6ea8", "#5a8f4e", "#b0782f", "#7a5aa6", "#4f9aa8"];

/** Add the section that draws, to the panel of a slide page. */
export async function addAnnotating(map, slide, panel) {
  const label = element("input", { type: "text", id: "region-label", maxlength: 80, list: "region-labels", autocomplete: "off" });
  const known = element("datalist", { id: "region-labels" });
  const polygon = element("button", { type: "button", "aria-pressed": "false" }, "Polygon");
  const rectangle = element("button", { type: "button", "aria-pressed": "false" }, "Rectangle");
  const status = element("p", { class: "muted", role: "status" });
  const list = element("ul", { class: "regions" });
  const section = element(
    "section",
    { "aria-labelledby": "annotate-title", id: "annotate" },
    element("h2", { id: "annotate-title" }, "Draw regions"),
    element("label", { class: "field", for: "region-label" }, "Label "),
    label,
    known,
    element("div", { class: "tools" }, polygon, rectangle),
    status,
    list,
  );
  panel.prepend(section);

  const address = slideApi(slide.slide, "/regions");
  const drawn = L.layerGroup().addTo(map);
  let saved = { version: "", features: [] };
  let busy = false;

  const showSaved = () => {
    drawn.clearLayers();
    const labels = [...new Set(saved.features.map(labelOf))].sort();
    const colour = (feature) => COLOURS[labels.indexOf(labelOf(feature)) % COLOURS.length];
    known.replaceChildren(...labels.map((text) => element("option", { value: text })));
    list.replaceChildren(
      ...saved.features.map((feature, index) => {
        const corners = feature.geometry.coordinates[0].map(([x, y]) => at(x, y));
        const shape = L.polygon(corners, { color: colour(feature), weight: 2, fillOpacity: 0.12, interactive: false });
        drawn.addLayer(shape);
        const go = element("button", { type: "button", class: "link" }, labelOf(feature));
        go.style.color = colour(feature);
        go.addEventListener("click", () => map.fitBounds(shape.getBounds(), { padding: [80, 80] }));
        const remove = element("button", { type: "button", "aria-label": `Remove region ${index + 1}, ${labelOf(feature)}` }, "remove");
        remove.addEventListener("click", () => save(saved.features.filter((other) => other !== feature)));
        return element("li", {}, go, remove);
      }),
    );
  };

  /** Save these regions as those of the slide; on an error the saved ones stay. */
  const save = async (features) => {
    if (busy) return false;
    busy = true;
    status.textContent = "Saving …";
    try {
      saved = await post(address, { version: saved.version, features });
      status.textContent = `Saved: ${saved.features.length} region${saved.features.length === 1 ? "" : "s"} of this slide.`;
      showSaved();
      return true;
    } catch (error) {
      status.replaceChildren(errorMessage(error));
      return false;
    } finally {
      busy = false;
    }
  };

  const finished = (ring) => {
    const properties = { objectType: "annotation", classification: { name: label.value.trim() } };
    const geometry = { type: "Polygon", coordinates: [[...ring, ring[0]]] };
    return save([...saved.features, { type: "Feature", geometry, properties }]);
  };
  const tools = { polygon, rectangle };
  const drawing = new Drawing(map, slide, finished, (tool, text) => {
    for (const [kind, button] of Object.entries(tools)) button.setAttribute("aria-pressed", String(kind === tool));
    if (text) status.textContent = text;
  });
  for (const [kind, button] of Object.entries(tools)) {
    button.addEventListener("click", () => {
      if (!label.value.trim()) {
        status.textContent = "Give a label first.";
        label.focus();
      } else {
        drawing.toggle(kind);
      }
    });
  }
  try {
    saved = await get(address);
    showSaved();
  } catch (error) {
    status.replaceChildren(errorMessage(error));
  }
}

function labelOf(feature) {
  return feature.properties.classification.name;
}

async function post(address, content) {
  const headers = { "content-type": "application/json" };
  const response = await fetch(address, { method: "POST", headers, body: JSON.stringify(content) });
  const answer = await response.json().catch(() => ({ error: `The server answered ${response.status}.` }));
  if (!response.ok) throw new RequestError(response.status, answer.error, answer.remedy ?? "");
  return answer;
}

/** The corners of a region that is being drawn. Clicks on the map are taken before Leaflet sees them. */
class Drawing {
  constructor(map, slide, finished, changed) {
    Object.assign(this, { map, slide, finished, changed, tool: null, corners: [], press: null, last: 0 });
    this.shape = L.polyline([], { color: "#111827", weight: 2, dashArray: "4 4", interactive: false }).addTo(map);
    const container = map.getContainer();
    const onMap = (event) => this.tool !== null && !event.target.closest(".leaflet-control");
    container.addEventListener("pointerdown", (event) => (this.press = [event.clientX, event.clientY]), true);
    container.addEventListener("pointermove", (event) => onMap(event) && this.preview(event), true);
    for (const kind of ["click", "dblclick"]) {
      container.addEventListener(
        kind,
        (event) => {
          if (!onMap(event)) return;
          event.stopPropagation();
          event.preventDefault();
          // a double click is two clicks before: the second has closed the polygon
          if (kind === "click") this.click(event);
        },
        true,
      );
    }
    document.addEventListener(
      "keydown",
      (event) => {
        if (this.tool === null || event.target.matches("input, select, textarea")) return;
        const actions = { Escape: () => this.stop("Nothing was saved."), Enter: () => this.close(), Backspace: () => this.back() };
        if (actions[event.key] === undefined) return;
        event.preventDefault();
        event.stopPropagation();
        actions[event.key]();
      },
      true,
    );
  }

  toggle(tool) {
    if (this.tool === tool) {
      this.stop("");
      return;
    }
    this.stop("");
    this.tool = tool;
    this.map.getContainer().style.cursor = "crosshair";
    const help =
      tool === "rectangle"
        ? "Click two opposite corners. Escape cancels."
        : "Click the corners; a double click, Enter or a click on the first corner closes. Backspace removes the last one, Escape cancels.";
    this.changed(tool, help);
  }

  stop(text) {
    this.tool = null;
    this.corners = [];
    this.shape.setLatLngs([]);
    this.map.getContainer().style.cursor = "";
    this.changed(null, text);
  }

  /** The place of the pointer on the slide, [x, y] in px at level 0 to a tenth. */
  place(event) {
    const { lng, lat } = this.map.mouseEventToLatLng(event);
    const within = (value, end) => Math.min(Math.max(Math.round(10 * value) / 10, 0), end);
    return [within(lng, this.slide.width), within(lat, this.slide.height)];
  }

  click(event) {
    const [x, y] = this.press ?? [event.clientX, event.clientY];
    if (Math.hypot(event.clientX - x, event.clientY - y) > MOVED) return;
    if (this.tool === "polygon" && this.corners.length >= 3 && (event.detail >= 2 || this.nearFirst(event))) {
      this.close();
      return;
    }
    if (event.detail >= 2) return; // the corner is there since the first of the two clicks
    this.corners.push(this.place(event));
    if (this.tool === "rectangle" && this.corners.length === 2) this.close();
    else this.preview(event);
  }

  nearFirst(event) {
    const first = this.map.latLngToContainerPoint(at(...this.corners[0]));
    return first.distanceTo(this.map.mouseEventToContainerPoint(event)) < CLOSE;
  }

  preview(event) {
    if (this.corners.length === 0) return;
    const next = this.place(event);
    const corners = this.tool === "rectangle" ? rectangle(this.corners[0], next) : [...this.corners, next];
    this.shape.setLatLngs([...corners, corners[0]].map(([x, y]) => at(x, y)));
  }

  back() {
    this.corners.pop();
    this.shape.setLatLngs(this.corners.map(([x, y]) => at(x, y)));
  }

  async close() {
    const ring = this.tool === "rectangle" && this.corners.length === 2 ? rectangle(...this.corners) : this.corners;
    if (ring.length < 3) {
      this.changed(this.tool, "A region needs three corners.");
      return;
    }
    this.stop("");
    await this.finished(ring);
  }
}

function rectangle([x0, y0], [x1, y1]) {
  return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
}
