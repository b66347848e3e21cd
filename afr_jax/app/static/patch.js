// The page that makes patches.

import { act, el, has, isActive, out, post, saveLink, single, watch } from "./page.js";

const find = (id) => document.getElementById(id);
const form = find("options");
single("train");
single("test");
form.addEventListener("submit", (event) => {
  event.preventDefault();
  act(() => post("/api/jobs", { kind: "patch", ...Object.fromEntries([...new FormData(form)].filter(([, value]) => typeof value === "string")) }));
});

const percent = (value) => (value === null ? "–" : `${value} %`);

function table(result) {
  const head = el("tr", {}, el("th", { scope: "col" }, "On the face"), ...result.factors.map((factor) => el("th", { scope: "col", class: "number" }, factor)));
  const rows = result.rows.map((row) => el("tr", {}, el("th", { scope: "row" }, row.name),
    ...row.cells.map((cell) => el("td", { class: "number" }, percent(cell.rate), cell.rate === null ? "" : el("span", { class: "quiet" }, ` (${cell.low}–${cell.high})`)))));
  return el("div", { class: "scrolls", tabindex: "0", role: "group", "aria-label": "Share of frames in which the face is missed" },
    el("table", {}, el("caption", {}, "Frames in which MTCNN misses the face, by the scale factor of its pyramid; in brackets the 95 % interval"), el("thead", {}, head), el("tbody", {}, ...rows)));
}

function checks(result) {
  if (!result.checks.length) return null;
  const rows = result.checks.map((row) => el("tr", {}, el("th", { scope: "row" }, row.is_detector ? `detector: ${row.name}` : row.name),
    el("td", { class: "number" }, percent(row.clean)), el("td", { class: "number" }, percent(row.trained))));
  return el("div", { class: "scrolls", tabindex: "0", role: "group", "aria-label": "Other scenes and detectors" },
    el("table", {}, el("caption", {}, "When the scene or the detector is another one: frames in which the face is missed"),
      el("thead", {}, el("tr", {}, ...["", "no patch", "with the patches"].map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, ...rows)));
}

function showResult(job) {
  const result = job.result;
  const rate = (name) => result.rows.find((row) => row.name === name)?.cells[0].rate ?? null;
  const [trained, black] = [rate("the trained patches"), rate("plain black paper")];
  const honest = trained !== null && black !== null && trained <= black ? " Plain black paper does as well or better: these patches are worth nothing yet. Train longer, or use another film." : "";
  return [
    el("h2", {}, "Results"),
    el("div", { class: "card" },
      el("p", {}, `With the patches MTCNN misses the face in ${percent(trained)} of ${result.num_test} frames, without in ${percent(rate("no patch"))}, with plain black paper in ${percent(black)}.${honest}`),
      result.is_same_film ? el("p", { class: "note" }, "These frames are the end of the film whose beginning was trained on, so the figures flatter. Use another film, of another day, for honest ones.") : null,
      el("p", { class: "row" }, saveLink(job, "pdf", "Save the page to print (PDF)", true), saveLink(job, "result", "Save all figures (JSON)")),
      el("p", { class: "quiet" }, "Print at 100 %, not “fit to page”; the bar on the page is 50 mm long if the printer kept the size."),
      el("div", { class: "pictures" }, ...result.patches.map((patch) => el("figure", {}, el("img", { class: "patch", src: out(job, patch.key), alt: `Patch: ${patch.name}` }), el("figcaption", {}, patch.name)))),
      el("h3", {}, "How often the face is missed"),
      table(result),
      checks(result),
      el("h3", {}, "What the detector sees"),
      el("div", { class: "pictures" },
        el("figure", {}, el("img", { src: out(job, "clip"), alt: "Frames with the patches drawn in: red boxes where the detector finds a face, green where it misses it" }), el("figcaption", {}, "Red: a face is found. Green: it is missed.")),
        el("figure", {}, el("img", { src: out(job, "sheet"), alt: "Frames without the patches above, with them below" }), el("figcaption", {}, "Without the patches above, with them below."))),
      result.num_skipped ? el("p", { class: "quiet" }, `Left out: ${result.num_skipped} of the frames, with no face or no room for the patches.`) : null),
  ];
}

watch((found) => {
  find("start").disabled = !has("train") || isActive(found.job);
}, showResult);
