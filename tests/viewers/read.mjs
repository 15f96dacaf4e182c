// Print, as JSON, what zarrita and the loader of Viv read from an OME-Zarr image.
// usage: node read.mjs STORE

import { createHash } from "node:crypto";
import { loadOmeZarrFromStore } from "@vivjs/loaders";
import { FileSystemStore } from "@zarrita/storage";
import * as zarr from "zarrita";

const sha256 = ({ buffer, byteOffset, byteLength }) =>
  createHash("sha256").update(new Uint8Array(buffer, byteOffset, byteLength)).digest("hex");

async function byZarrita(store) {
  const root = await zarr.open.v3(zarr.root(store), { kind: "group" });
  const levels = [];
  for (const { path } of root.attrs.ome.multiscales[0].datasets) {
    const array = await zarr.open.v3(root.resolve(path), { kind: "array" });
    const { data, shape } = await zarr.get(array);
    levels.push({ dtype: array.dtype, shape, sha256: sha256(data) });
  }
  return levels;
}

async function byViv(store) {
  const { data, metadata } = await loadOmeZarrFromStore(store);
  const levels = [];
  for (const level of data) {
    const channels = level.labels.includes("c") ? level.shape[0] : 1;
    const planes = [];
    for (let c = 0; c < channels; c++) {
      const selection = level.labels.includes("c") ? { c } : {};
      const { data: pixels, width, height } = await level.getRaster({ selection });
      planes.push({ width, height, sha256: sha256(pixels) });
    }
    levels.push({ dtype: level.dtype, labels: level.labels, planes });
  }
  return { levels, multiscales: metadata.multiscales, omero: metadata.omero };
}

const store = new FileSystemStore(process.argv[2]);
console.log(JSON.stringify({ zarrita: await byZarrita(store), viv: await byViv(store) }));
