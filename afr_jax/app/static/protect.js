// The page that protects a data set.

import { act, el, has, isActive, out, post, saveLink, single, watch } from "./page.js";

const find = (id) => document.getElementById(id);
const form = find("options");
single("zip");
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const data = new FormData(form);
  act(() => post("/api/jobs", { kind: "protect", method: data.get("method"), side_px: data.get("side_px"), tried: data.has("tried") }));
});

function victims(result) {
  if (!result.victims.length) return el("p", { class: "quiet" }, "No trial was made, so nothing is known of what this noise is worth.");
  const rows = result.victims.map((victim) => el("tr", {}, el("th", { scope: "row" }, victim.words), el("td", { class: "number" }, `${victim.accuracy} %`)));
  const [clean, guarded] = result.victims.map((victim) => victim.accuracy);
  const words = clean <= result.chance + 10
    ? "The small network learned hardly anything even from the images as they are, so this trial says nothing: more images are needed."
    : guarded < clean - 10 ? "The noise takes from such a network part of what it would learn; see the lines below it for what gives that back." : "The noise did not help against this small network.";
  return el("div", {},
    el("div", { class: "scrolls", tabindex: "0", role: "group", "aria-label": "What small networks learned" },
      el("table", {}, el("caption", {}, `Share of ${result.victims[0].num_test} clean images that a small network recognizes after training on …; guessing gives ${result.chance} %`), el("tbody", {}, ...rows))),
    el("p", {}, words));
}

function showResult(job) {
  const result = job.result;
  const examples = Array.from({ length: result.examples }, (_, number) => el("figure", {},
    el("img", { class: "example", src: out(job, `before_${number}`), alt: `Image ${number + 1} before` }),
    el("img", { class: "example", src: out(job, `after_${number}`), alt: `Image ${number + 1} with noise` })));
  return [
    el("h2", {}, "Results"),
    el("div", { class: "card" },
      el("p", {}, `${result.num_images} images of ${result.num_classes} classes carry noise: at most ${result.largest_change} of 255 steps of brightness. They are squares of ${result.side_px} pixels now.`),
      el("p", { class: "row" }, saveLink(job, "zip", "Save the images (zip)", true)),
      el("h3", {}, "What it is worth, and what breaks it"),
      victims(result),
      el("p", { class: "note" }, "Small networks and few rounds: a hint, no promise. Publish these images only, and none of the same without noise."),
      el("h3", {}, "Before (above) and after (below)"),
      el("div", { class: "pictures" }, ...examples),
      result.num_problems ? el("details", {}, el("summary", {}, result.num_problems === 1 ? "1 file was left out and is not protected" : `${result.num_problems} files were left out and are not protected`), el("ul", {}, ...result.problems.map((text) => el("li", {}, text)))) : null),
  ];
}

watch((found) => {
  find("start").disabled = !has("zip") || isActive(found.job);
}, showResult);
