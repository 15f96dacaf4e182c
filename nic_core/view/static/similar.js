/** The panel "like this one": the cells of the cohort whose embeddings are most similar to one cell's. */

import { writeHash } from "./permalink.js";
import { element, get, number, showError, slideAddress, slideApi } from "./view.js";

const COUNT = 12;
const PICTURE = 96; // px

/** Fill the panel with the cells that are most similar to a cell of a grid. */
export async function showSimilar(panel, slide, encoder, { row, column }, signal) {
  panel.replaceChildren(element("p", { class: "muted" }, "Searching …"));
  const query = new URLSearchParams({ encoder, row, column, count: COUNT });
  try {
    const found = await get(slideApi(slide, `/similar?${query}`), signal);
    const seconds = found.seconds.toFixed(2);
    panel.replaceChildren(
      element(
        "p",
        { class: "muted" },
        `Most similar to row ${row}, column ${column} of ${slide}: ` +
          `${number(found.cells_searched)} cells searched in ${seconds} s.`,
      ),
      element("ol", { class: "similar" }, ...found.cells.map(similarCell)),
    );
  } catch (error) {
    showError(panel, error);
  }
}

function similarCell(cell) {
  const query = new URLSearchParams({ x: cell.x, y: cell.y, size: cell.size, px: PICTURE });
  const picture = element("img", {
    src: slideApi(cell.slide, `/patch?${query}`),
    width: PICTURE,
    height: PICTURE,
    loading: "lazy",
    alt: `Row ${cell.row}, column ${cell.column} of ${cell.slide}`,
  });
  const labels = Object.entries(cell.labels ?? {}).map(([target, label]) => `${target}: ${labelText(label)}`);
  const hash = writeHash({ x: cell.x, y: cell.y, zoom: -1 }, new Map([["tissue", 1]]));
  return element(
    "li",
    { title: labels.join("\n") },
    element("a", { href: slideAddress(cell.slide, hash) }, picture, element("span", {}, cell.slide)),
    element("small", {}, `similarity ${number(cell.similarity)}`),
  );
}

/** A label of a target: a number, a class, or a survival time with its event. */
export function labelText(label) {
  if (label === null || label === undefined) return "–";
  if (typeof label === "object") return `${number(label.time)}${label.event ? "" : "+"}`;
  return typeof label === "number" ? number(label) : String(label);
}
