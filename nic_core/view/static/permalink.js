/** The place, the zoom and the layers of a slide page, in the hash of its address. */

/**
 * Read "#x=12345&y=6789&zoom=-2&layers=tissue:0.8,heat.growth.mtl-4:0.5".
 *
 * x, y: centre of the view, px at level 0. zoom: log2(screen px per level-0 px).
 * view is null where one of the three is missing or no number; layers is null where it is
 * missing, else a Map of layer ids and opacities (0 to 1).
 */
export function readHash(hash) {
  const values = new URLSearchParams(hash.replace(/^#/, ""));
  const place = ["x", "y", "zoom"].map((name) => Number.parseFloat(values.get(name) ?? ""));
  const view = place.every(Number.isFinite) ? { x: place[0], y: place[1], zoom: place[2] } : null;
  if (!values.has("layers")) return { view, layers: null };
  const layers = new Map();
  for (const entry of values.get("layers").split(",").filter(Boolean)) {
    const colon = entry.lastIndexOf(":");
    const id = colon < 0 ? entry : entry.slice(0, colon);
    const opacity = colon < 0 ? 1 : Number.parseFloat(entry.slice(colon + 1));
    layers.set(id, Number.isFinite(opacity) ? Math.min(Math.max(opacity, 0), 1) : 1);
  }
  return { view, layers };
}

/** Write the hash that readHash reads. */
export function writeHash({ x, y, zoom }, layers) {
  const entries = [...layers].map(([id, opacity]) => `${encodeURIComponent(id)}:${round(opacity)}`);
  return `#x=${Math.round(x)}&y=${Math.round(y)}&zoom=${round(zoom)}&layers=${entries.join(",")}`;
}

function round(value) {
  return String(Number(value.toFixed(2)));
}
