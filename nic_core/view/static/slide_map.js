/** A slide as a Leaflet map, whose coordinates are px at level 0: lng is x, lat is y. */

/* global L */

import { number, slideApi } from "./view.js";

// y downwards; the zoom is log2(screen px per level-0 px)
const CRS = L.extend({}, L.CRS.Simple, { transformation: new L.Transformation(1, 0, 1, 0) });
const MAGNIFIED = 2; // zoom levels beyond full resolution
const SIDES = [1, 2, 5]; // the digits of a scale bar

/** The Leaflet point of a place in px at level 0. */
export function at(x, y) {
  return L.latLng(y, x);
}

/** The Leaflet bounds of a box [x0, y0, x1, y1] in px at level 0. */
export function bounds([x0, y0, x1, y1]) {
  return L.latLngBounds(at(x0, y0), at(x1, y1));
}

/**
 * Show the slide in the element: tiles over the thumbnail, an outline, zoom buttons.
 *
 * slide: the answer of /api/slides/{slide}. The view is left to the caller.
 */
export function slideMap(container, slide) {
  const extent = bounds([0, 0, slide.width, slide.height]);
  const map = L.map(container, {
    crs: CRS,
    // one level further out than the tiles, so that every slide fits a small window
    minZoom: slide.min_zoom - 1,
    maxZoom: slide.max_zoom + MAGNIFIED,
    zoomSnap: 0.25,
    zoomDelta: 1,
    wheelPxPerZoomLevel: 90,
    extent, // for show
    // far enough that every place of the slide can be the centre of every zoom
    maxBounds: extent.pad(4),
    attributionControl: false,
    zoomControl: false,
    boxZoom: true,
  });
  L.control.zoom({ position: "topleft" }).addTo(map);
  // below the tiles (z-index 200): the whole slide is seen before they arrive
  map.createPane("thumbnail").style.zIndex = "150";
  if (slide.thumbnail) L.imageOverlay(slide.thumbnail, extent, { pane: "thumbnail" }).addTo(map);
  const tiles = L.tileLayer(slideApi(slide.slide, "/tiles/{z}/{x}/{y}.jpg"), {
    tileSize: slide.tile_size,
    minZoom: slide.min_zoom - 1,
    maxZoom: slide.max_zoom + MAGNIFIED,
    minNativeZoom: slide.min_zoom,
    maxNativeZoom: slide.max_zoom,
    bounds: extent,
    noWrap: true,
    keepBuffer: 3,
    updateWhenZooming: false,
  });
  tiles.on("tileloadstart", ({ tile, coords }) => clip(tile, coords, slide));
  tiles.addTo(map);
  L.rectangle(extent, { color: "#8a929c", weight: 1, fill: false, interactive: false }).addTo(map);
  return map;
}

/** Hide what a tile shows beyond the right and the lower edge of the slide. */
function clip(tile, { x, y, z }, slide) {
  const side = slide.tile_size * 2 ** -z;
  const beyond = (index, end) => Math.max(0, 100 * (index + 1 - end / side));
  tile.style.clipPath = `inset(0 ${beyond(x, slide.width)}% ${beyond(y, slide.height)}% 0)`;
}

/** Show the whole slide. */
export function fit(map, slide) {
  map.fitBounds(bounds([0, 0, slide.width, slide.height]), { padding: [16, 16], animate: false });
}

/** The centre and the zoom of the map, as the permalink holds them. */
export function viewOf(map) {
  const centre = map.getCenter();
  return { x: centre.lng, y: centre.lat, zoom: map.getZoom() };
}

/** Move the map to a place of the permalink, or to the edge of the slide that is closest to it. */
export function show(map, { x, y, zoom }) {
  const { lng: width, lat: height } = map.options.extent.getNorthEast();
  const inside = (value, end) => Math.min(Math.max(value, 0), end);
  map.setView(at(inside(x, width), inside(y, height)), zoom, { animate: false });
}

/** The longest round length that is at most so many um, and its text. */
export function roundLength(um) {
  const power = 10 ** Math.floor(Math.log10(um));
  const side = power * Math.max(...SIDES.filter((digit) => digit * power <= um * (1 + 1e-9)));
  return { um: side, text: side >= 1000 ? `${number(side / 1000)} mm` : `${number(side)} µm` };
}

/** A scale bar of at most 140 screen px. mpp: um per px at level 0. */
export function addScaleBar(map, mpp) {
  const control = L.control({ position: "bottomleft" });
  control.onAdd = () => {
    const bar = L.DomUtil.create("div", "scale-bar");
    const update = () => {
      const umPerScreenPx = mpp / 2 ** map.getZoom();
      const { um, text } = roundLength(140 * umPerScreenPx);
      bar.style.width = `${um / umPerScreenPx}px`;
      bar.textContent = text;
    };
    map.on("zoom viewreset", update);
    map.whenReady(update);
    return bar;
  };
  control.addTo(map);
}

/** The whole slide, small, with a frame around what is seen; a click or a drag moves the map. */
export function addMinimap(map, slide) {
  if (!slide.thumbnail) return;
  const side = Math.min(160, map.getSize().x / 5);
  const scale = side / Math.max(slide.width, slide.height);
  const control = L.control({ position: "bottomright" });
  control.onAdd = () => {
    const box = L.DomUtil.create("div", "minimap");
    const picture = L.DomUtil.create("img", "", box);
    const frame = L.DomUtil.create("div", "frame", box);
    picture.src = slide.thumbnail;
    picture.alt = "";
    box.title = "The whole slide; a click moves the view";
    box.style.width = `${slide.width * scale}px`;
    box.style.height = `${slide.height * scale}px`;
    const update = () => {
      const seen = map.getBounds();
      const inside = (value, end) => Math.min(Math.max(value, 0), end) * scale;
      const [left, right] = [seen.getWest(), seen.getEast()].map((x) => inside(x, slide.width));
      // south is the smaller latitude, here the upper edge
      const [top, bottom] = [seen.getSouth(), seen.getNorth()].map((y) => inside(y, slide.height));
      Object.assign(frame.style, {
        left: `${left}px`,
        top: `${top}px`,
        width: `${Math.max(right - left, 3)}px`,
        height: `${Math.max(bottom - top, 3)}px`,
      });
    };
    const move = (event) => {
      if (event.buttons !== 1) return;
      const corner = box.getBoundingClientRect();
      const place = [event.clientX - corner.left, event.clientY - corner.top];
      map.panTo(at(place[0] / scale, place[1] / scale), { animate: false });
    };
    L.DomEvent.disableClickPropagation(box);
    L.DomEvent.on(box, "pointerdown", (event) => {
      event.preventDefault();
      box.setPointerCapture(event.pointerId);
      move(event);
    });
    L.DomEvent.on(box, "pointermove", move);
    map.on("move zoom resize", update);
    map.whenReady(update);
    return box;
  };
  control.addTo(map);
}
