/** The page of the cohort: a table of slides that is sorted, filtered and searched in the browser. */

import { labelText } from "./similar.js";
import { debounced, element, get, number, showError, slideAddress } from "./view.js";

const ROW = 56; // px; the height of every row in view.css
const MARGIN = 8; // rows drawn beyond each end of the window
const collator = new Intl.Collator("en", { numeric: true });

const byId = (id) => document.getElementById(id);
const frame = byId("frame");
const table = byId("slides");
const body = table.tBodies[0];

try {
  const [study, slides] = await Promise.all([get("/api/study"), get("/api/slides")]);
  byId("study").textContent = study.name;
  document.title = `${study.name} · NIC`;
  byId("targets").append(
    ...study.targets.map(({ name }) =>
      element("a", { href: `/target/${encodeURIComponent(name)}` }, `${name} plots`),
    ),
  );
  byId("notice").textContent = study.targets
    .filter(({ problem }) => problem)
    .map(({ name, problem }) => `No labels of ${name}: ${problem}`)
    .join(" ");
  cohort(study, slides);
} catch (error) {
  showError(frame, error);
}

function cohort(study, slides) {
  const columns = columnsOf(study, slides);
  const texts = new Map(slides.map((slide) => [slide, searchText(slide)]));
  for (const split of [...new Set(slides.map((slide) => slide.split))].filter(Boolean).sort()) {
    byId("split").append(element("option", {}, split));
  }
  const state = readState(columns);
  let shown = [];
  const head = heads(columns, (column) => {
    state.descending = state.sort === column.id && !state.descending;
    state.sort = column.id;
    update();
  });
  table.tHead.append(...head.rows);

  const draw = () => {
    const first = Math.max(0, Math.floor(frame.scrollTop / ROW) - MARGIN);
    const last = Math.min(shown.length, Math.ceil((frame.scrollTop + frame.clientHeight) / ROW) + MARGIN);
    const rows = shown.slice(first, last).map((slide, index) => row(slide, columns, first + index + 3));
    body.replaceChildren(space(first), ...rows, space(shown.length - last));
  };
  const update = () => {
    const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
    shown = slides.filter(
      (slide) =>
        (!state.split || slide.split === state.split) &&
        (!state.state || stateOf(slide) === state.state) &&
        words.every((word) => texts.get(slide).includes(word)),
    );
    const column = columns.find(({ id }) => id === state.sort);
    if (column) shown.sort(by(column.value, state.descending));
    columns.forEach(({ id }, index) => {
      const order = state.descending ? "descending" : "ascending";
      head.cells[index].setAttribute("aria-sort", id === state.sort ? order : "none");
    });
    table.setAttribute("aria-rowcount", shown.length + 2);
    byId("count").textContent = countText(shown, slides);
    frame.scrollTop = 0;
    draw();
    history.replaceState(null, "", writeState(state) || location.pathname);
  };
  for (const id of ["search", "split", "state"]) {
    byId(id).value = state[id];
    byId(id).addEventListener(
      "input",
      debounced(id === "search" ? 80 : 0, () => {
        state[id] = byId(id).value;
        update();
      }),
    );
  }
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  frame.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  window.addEventListener("resize", debounced(100, draw));
  update();
}

/**
 * The columns: id, title, value to sort by, cell to show, class of its cells.
 *
 * The columns of a target have its name as group, and a full name for screen readers.
 */
function columnsOf(study, slides) {
  const text = (id, title) => ({ id, title, value: (slide) => slide[id], cell: (slide) => slide[id] ?? "–" });
  const columns = [
    { id: "thumbnail", title: "", cell: thumbnail, kind: "thumbnail" },
    { id: "slide", title: "Slide", value: (slide) => slide.slide, cell: slideLink, kind: "name" },
    text("patient", "Patient"),
    { id: "split", title: "Split", value: (slide) => slide.split, cell: splitCell },
  ];
  if (slides.some((slide) => slide.organ)) columns.push(text("organ", "Organ"));
  columns.push({
    id: "quality",
    title: "Quality",
    value: (slide) => flagsOf(slide).length,
    cell: quality,
    kind: "quality",
  });
  for (const target of study.targets) columns.push(...targetColumns(target, slides));
  return columns;
}

function targetColumns({ name, kind, unit }, slides) {
  const group = unit ? `${name} (${unit})` : name;
  const prediction = (slide) => slide.predictions?.[name];
  const label = (slide) => labelValue(slide.labels?.[name]);
  const value = (slide) => prediction(slide)?.value;
  const error = (slide) => prediction(slide)?.error;
  const written = { label: decimals(slides, label), value: decimals(slides, value), error: decimals(slides, error) };
  const columns = [
    {
      id: `label.${name}`,
      title: "label",
      value: label,
      cell: (slide) => labelCell(slide.labels?.[name], written.label),
      kind: kind === "classification" ? "first" : "first number",
    },
    {
      id: `prediction.${name}`,
      title: kind === "survival" ? "log hazard" : "predicted",
      value,
      cell: (slide) => predictionCell(prediction(slide), slide.labels?.[name], written.value),
      kind: "number",
    },
  ];
  if (slides.some((slide) => typeof error(slide) === "number")) {
    columns.push({
      id: `error.${name}`,
      title: "error",
      value: error,
      cell: (slide) => written.error(error(slide)),
      kind: "number",
    });
  }
  return columns.map((column) => ({ ...column, group, full: `${name}, ${column.title}` }));
}

/** The two rows of the head: the groups, and a button for each column that sorts. */
function heads(columns, sort) {
  const groups = [];
  for (const { group } of columns) {
    if (groups.length && groups.at(-1).group === group) groups.at(-1).columns += 1;
    else groups.push({ group, columns: 1 });
  }
  const cells = columns.map((column) => {
    if (!column.value) return element("th", { scope: "col", class: column.kind });
    const button = element("button", { type: "button", "aria-label": `Sort by ${column.full ?? column.title}` }, column.title);
    button.addEventListener("click", () => sort(column));
    return element("th", { scope: "col", class: column.kind }, button);
  });
  const above = groups.map(({ group, columns: count }) =>
    element("th", { colspan: count, scope: "colgroup", class: group ? "first group" : "group" }, group ?? ""),
  );
  return { rows: [element("tr", {}, ...above), element("tr", {}, ...cells)], cells };
}

/** A function that writes the numbers of a column alike: three digits of the largest one. */
function decimals(slides, value) {
  let largest = 0;
  for (const slide of slides) {
    const found = value(slide);
    if (typeof found === "number" && Math.abs(found) > largest) largest = Math.abs(found);
  }
  const digits = largest > 0 ? Math.min(Math.max(2 - Math.floor(Math.log10(largest)), 0), 9) : 0;
  const format = new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return (found) => (typeof found === "number" ? format.format(found) : "–");
}

function row(slide, columns, index) {
  const line = element("tr", { "aria-rowindex": index, class: slide.failed ? "failed" : null });
  const shown = slide.failed ? columns.slice(0, columns.findIndex(({ id }) => id === "quality")) : columns;
  line.append(...shown.map((column) => element("td", { class: column.kind || null }, column.cell(slide))));
  if (slide.failed) {
    const { reason, remedy } = slide.failed;
    const cell = element("td", { colspan: columns.length - shown.length, class: "reason", title: `${reason}\n${remedy}` });
    cell.append(element("strong", {}, reason), element("span", {}, remedy));
    line.append(cell);
  }
  return line;
}

/** A row as high as so many rows that are not drawn. */
function space(rows) {
  const line = element("tr", { "aria-hidden": "true", class: "space" });
  line.style.height = `${rows * ROW}px`;
  return line;
}

function thumbnail(slide) {
  if (!slide.thumbnail) return element("span", { class: "no-thumbnail" }, "–");
  return element("img", { src: slide.thumbnail, alt: "", loading: "lazy", decoding: "async" });
}

function slideLink(slide) {
  return element("a", { href: slideAddress(slide.slide) }, slide.slide);
}

function splitCell(slide) {
  if (!slide.exclude) return slide.split ?? "–";
  return element("span", { title: `Excluded: ${slide.exclude}` }, "excluded");
}

function flagsOf(slide) {
  return slide.quality?.flags ?? [];
}

function quality(slide) {
  const flags = flagsOf(slide);
  const { tissue_share: tissue, focus, cells } = slide.quality ?? {};
  const measured = `tissue ${number(100 * tissue)} %, focus ${number(focus)}, ${number(cells)} cells`;
  const title = [...flags, measured].join("\n");
  if (flags.length === 0) return element("span", { class: "muted", title }, cells === undefined ? "–" : "no flag");
  return element("span", { class: "flags", title }, flags.join(", "));
}

function labelCell(label, written) {
  if (label !== null && typeof label === "object") return written(label.time) + (label.event ? "" : "+");
  return typeof label === "number" ? written(label) : labelText(label);
}

function predictionCell(prediction, label, written) {
  if (!prediction) return "–";
  const { value, encoder, seen } = prediction;
  const origin = seen ? "This slide was in the training of the model." : "The model did not see this slide.";
  const cell = element("span", { title: `Encoder ${encoder}. ${origin}` });
  if (prediction.class === undefined) cell.append(written(value));
  else {
    const wrong = label !== undefined && label !== prediction.class;
    cell.append(element("span", { class: wrong ? "wrong" : null }, prediction.class), ` ${written(value)}`);
  }
  if (seen) cell.append(" *");
  return cell;
}

function labelValue(label) {
  return label !== null && typeof label === "object" ? label.time : label;
}

function stateOf(slide) {
  if (slide.failed) return "failed";
  return flagsOf(slide).length ? "flagged" : "plain";
}

function countText(shown, slides) {
  const failed = shown.filter((slide) => slide.failed).length;
  const total = shown.length === slides.length ? "" : ` of ${number(slides.length)}`;
  return `${number(shown.length)}${total} slides${failed ? `, ${failed} failed` : ""}`;
}

function searchText(slide) {
  // unrounded, as the label table has them
  const labels = Object.values(slide.labels ?? {}).map((label) => String(labelValue(label)));
  const parts = [slide.slide, slide.patient, slide.split, slide.organ, slide.exclude, slide.failed?.reason];
  parts.push(...labels, ...flagsOf(slide));
  return parts.filter(Boolean).join(" ").toLowerCase();
}

/** An order by a value, in which rows without a value come last. */
function by(value, descending) {
  const sign = descending ? -1 : 1;
  const missing = (entry) => entry === null || entry === undefined || Number.isNaN(entry);
  return (one, two) => {
    const [first, second] = [value(one), value(two)];
    if (missing(first) || missing(second)) return Number(missing(first)) - Number(missing(second));
    if (typeof first === "number" && typeof second === "number") return sign * (first - second);
    return sign * collator.compare(first, second);
  };
}

/** Search, filters and order, as the hash of the address holds them. */
function readState(columns) {
  const values = new URLSearchParams(location.hash.slice(1));
  const sort = values.get("sort") ?? "";
  const known = (id) => [...byId(id).options].some((option) => option.value === values.get(id));
  return {
    search: values.get("search") ?? "",
    split: known("split") ? values.get("split") : "",
    state: known("state") ? values.get("state") : "",
    sort: columns.some(({ id, value }) => value && id === sort.replace(/^-/, "")) ? sort.replace(/^-/, "") : "",
    descending: sort.startsWith("-"),
  };
}

function writeState({ search, split, state, sort, descending }) {
  const values = new URLSearchParams();
  for (const [name, value] of Object.entries({ search, split, state })) if (value) values.set(name, value);
  if (sort) values.set("sort", `${descending ? "-" : ""}${sort}`);
  return values.size ? `#${values}` : "";
}
