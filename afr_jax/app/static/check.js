// The page that compares photos.

import { act, dropZone, el, has, isActive, out, post, send, single, tool, verdictCard, watch } from "./page.js";

const find = (id) => document.getElementById(id);
for (const id of ["first", "second", "query"]) single(id);
single("zip", { others: ["people"] });
dropZone("people", async (files) => {
  for (const role of ["zip", "people"]) await post(`/api/files/all/remove?${new URLSearchParams({ tool, role })}`).catch(() => {});
  const photos = files.filter((file) => !file.name.startsWith(".") && (file.type.startsWith("image/") || /\.(heic|heif|tiff?)$/i.test(file.name)));
  // The chosen folder itself is no person, those in it are.
  const name = (file) => file.webkitRelativePath.split("/").slice(1).join("/") || file.name;
  await send(photos, "people", { name, told: (text) => text && (find("people-state").textContent = text) });
});

find("pair-start").addEventListener("click", () => act(() => post("/api/jobs", { kind: "pair" })));
find("people-start").addEventListener("click", () => act(() => post("/api/jobs", { kind: "people" })));

function pairResult(job) {
  const { verdicts, names, faces } = job.result;
  const same = verdicts.filter((verdict) => verdict.same).length;
  const picture = (number) => el("figure", {}, el("img", { src: out(job, `face_${number}`), alt: `Face of ${names[number]}` }),
    el("figcaption", {}, names[number], faces[number] > 1 ? ` (the main one of ${faces[number]} faces)` : ""));
  return [
    el("h2", {}, "Results"),
    el("div", { class: "card" },
      el("p", {}, `${same} of ${verdicts.length} recognizers take the two for the same person.`),
      el("div", { class: "faces" }, picture(0), picture(1)),
      el("ul", { class: "verdicts" }, ...verdicts.map((verdict) => verdictCard(verdict, { whom: "the two" })))),
  ];
}

function strip(job, face) {
  return el("ul", { class: "strip" }, ...face.matches.map((match) =>
    el("li", { class: match.matched ? "yes" : "" },
      el("img", { src: out(job, match.picture), alt: `${match.person}, ${match.image}` }),
      el("div", {}, el("strong", {}, match.person), el("br"), `distance ${match.distance}`, el("br"),
        el("span", {}, match.matched ? `same person (below ${match.threshold})` : `another person (from ${match.threshold} on)`)))));
}

function peopleResult(job) {
  const { extractors, problems, num_problems: count, query } = job.result;
  const parts = [el("h2", {}, "Results")];
  for (const extractor of extractors) {
    const card = el("div", { class: "card" }, el("h3", {}, extractor.name),
      el("p", { class: "quiet" }, `${extractor.people} ${extractor.people === 1 ? "person" : "people"}, ${extractor.photos} photos of them with a face. The nearest faces come first; a frame marks those that count as the same person.`));
    for (const face of extractor.faces) {
      const best = face.matches[0];
      const words = best?.matched ? `is taken for ${best.person}` : "matches nobody";
      card.append(
        el("div", { class: "faces" }, el("figure", {}, el("img", { src: out(job, `query_${face.number}`), alt: `Face ${face.number + 1} of ${query}` }),
          el("figcaption", {}, `${extractor.faces.length > 1 ? `Face ${face.number + 1} of ${query}` : query} ${words}.`))),
        strip(job, face));
    }
    parts.push(card);
  }
  if (count) parts.push(el("details", {}, el("summary", {}, count === 1 ? "1 photo could not be used" : `${count} photos could not be used`), el("ul", {}, ...problems.map((text) => el("li", {}, text)))));
  return parts;
}

watch((found) => {
  const people = found.uploads.filter((upload) => upload.role === "people").length;
  const zip = found.uploads.find((upload) => upload.role === "zip");
  find("people-state").textContent = people ? `${people} photos` : "nothing chosen yet";
  find("pair-start").disabled = !has("first") || !has("second") || isActive(found.job);
  find("people-start").disabled = !has("query") || !(people || zip) || isActive(found.job);
}, (job) => (job.kind === "pair" ? pairResult(job) : peopleResult(job)));
