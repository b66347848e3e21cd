// The page that cloaks photos.

import { compare } from "./compare.js";
import { act, dropZone, el, isActive, megabytes, out, post, saveLink, send, state, tool, verdictCard, watch } from "./page.js";

const find = (id) => document.getElementById(id);
const form = find("options");
const cards = new Map(); // by upload: what it shows, and its element
const kept = JSON.parse(sessionStorage.getItem("faces") ?? "{}");

dropZone("photos", (files) => send(files, "photo", { input: find("photos"), told: (text) => (find("photos-state").textContent = text) }));
find("photos-clear").addEventListener("click", () =>
  act(() => post(`/api/files/all/remove?${new URLSearchParams({ tool, role: "photo" })}`)));

// Numbers of the faces of a photo that are chosen.
function chosen(upload) {
  const faces = upload.look?.result?.faces ?? [];
  const usual = faces.flatMap((face, number) => (face.chosen ? [number] : []));
  return kept[upload.id] ?? usual;
}

function toggle(upload, number) {
  const now = new Set(chosen(upload));
  if (!now.delete(number)) now.add(number);
  kept[upload.id] = [...now].sort((a, b) => a - b);
  sessionStorage.setItem("faces", JSON.stringify(kept));
  showPhotos(state());
}

function faceButton(upload, face, number, isChosen) {
  const { width, height } = upload.look.result;
  const [y0, x0, y1, x1] = face.box;
  const name = `Face ${number + 1} of ${upload.name}`;
  const button = el("button", {
    type: "button",
    class: "box",
    "aria-pressed": String(isChosen),
    "aria-label": face.free ? name : `${name}: ${face.reason}`,
    title: face.reason ?? "Click to leave this face as it is, or to cloak it",
    disabled: !face.free,
    click: () => toggle(upload, number),
  }, el("span", { "aria-hidden": "true" }, `${number + 1}`));
  const percent = (part, whole) => `${Math.min(Math.max((100 * part) / whole, 0), 100)}%`;
  button.style.left = percent(x0, width);
  button.style.top = percent(y0, height);
  button.style.width = percent(x1 - x0, width);
  button.style.height = percent(y1 - y0, height);
  return button;
}

function photoCard(upload) {
  const look = upload.look;
  const remove = el("button", { type: "button", class: "small", "aria-label": `Remove ${upload.name}`, click: () => act(() => post(`/api/files/${upload.id}/remove`)) }, "Remove");
  const about = el("div", { class: "about" }, el("p", { class: "name" }, upload.name));
  const card = el("article", { class: "photo", "data-upload": upload.id, "data-state": look.state }, about);
  const line = (text) => about.append(el("p", { class: "quiet" }, text));
  if (look.state === "failed") {
    card.classList.add("wrong");
    line(`It cannot be used: ${look.message}`);
  } else if (look.state !== "done") {
    line(look.ahead ? `Waiting (${look.ahead} before it) …` : "Looking for faces …");
  } else {
    const { faces, already } = look.result;
    const now = chosen(upload);
    const frame = el("div", { class: "frame" }, el("img", { src: out(look, "preview"), alt: upload.name }));
    faces.forEach((face, number) => frame.append(faceButton(upload, face, number, now.includes(number))));
    card.prepend(frame);
    if (already) line("It is cloaked already and is left as it is.");
    else if (!faces.length) {
      card.classList.add("wrong");
      line("No face was found, so there is nothing to cloak.");
    } else {
      line(`${faces.length} ${faces.length === 1 ? "face" : "faces"} found, ${now.length} chosen. Click a face to choose it or leave it.`);
      faces.forEach((face, number) => face.reason && line(`Face ${number + 1} is not chosen by itself: ${face.reason}.`));
    }
  }
  line(megabytes(upload.bytes));
  about.append(remove);
  return card;
}

function showPhotos(found) {
  const list = find("photos-list");
  const there = new Set(found.uploads.map((upload) => upload.id));
  for (const [id, { element }] of cards) {
    if (!there.has(id)) {
      element.remove();
      cards.delete(id);
    }
  }
  for (const upload of found.uploads) {
    const key = JSON.stringify([upload.look.state, upload.look.ahead, chosen(upload)]);
    const known = cards.get(upload.id);
    if (known?.key === key) continue;
    // The face that was clicked keeps the focus.
    const focused = known ? [...known.element.querySelectorAll("button")].indexOf(document.activeElement) : -1;
    const element = photoCard(upload);
    if (known) known.element.replaceWith(element);
    else {
      const after = found.uploads.slice(found.uploads.indexOf(upload) + 1).map((each) => cards.get(each.id)).find(Boolean);
      list.insertBefore(element, after?.element ?? null);
    }
    if (focused >= 0) element.querySelectorAll("button")[focused]?.focus();
    cards.set(upload.id, { key, element });
  }
  find("photos-clear").hidden = found.uploads.length < 2;
  const usable = found.uploads.filter((upload) => upload.look.result && !upload.look.result.already);
  const count = usable.reduce((sum, upload) => sum + chosen(upload).length, 0);
  const isLooking = found.uploads.some((upload) => isActive(upload.look));
  find("start").disabled = !count || isLooking || isActive(found.job);
  find("start").textContent = count ? `Cloak ${count} ${count === 1 ? "face" : "faces"}` : "Cloak";
  find("start-hint").textContent = isActive(found.job) ? "at work, see below" : isLooking ? "still looking for faces" : count ? "" : "choose a photo with a face first";
}

function showExtractors(found) {
  const place = find("extractors");
  if (place.childElementCount === found.extractors.length) return;
  place.replaceChildren(...found.extractors.map(({ name, surrogate }) =>
    el("label", {}, el("input", { type: "checkbox", name: "surrogates", value: name, checked: surrogate }), ` ${name}`)));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const data = new FormData(form);
  const faces = Object.fromEntries(state().uploads
    .filter((upload) => upload.look.result && !upload.look.result.already)
    .map((upload) => [upload.id, chosen(upload)]));
  const ticked = data.getAll("surrogates");
  act(() => post("/api/jobs", { kind: "cloak", mode: data.get("mode"), format: data.get("format"), surrogates: ticked, faces }));
});

const STATUS = {
  cloaked: "Cloaked",
  partly_cloaked: "Cloaked in part: a face that was left is larger than each one that was cloaked",
  already_cloaked: "Left as it is: it is cloaked already",
  no_face: "No face was cloaked",
  unreadable: "It could not be read",
  failed: "It did not work, and there is no file",
};

function faceResult(face, number, job) {
  const title = el("h4", {}, `Face ${number + 1}`);
  if (!face.verdicts) {
    const words = face.status === "skipped" ? "left as it is" : face.status;
    return el("div", {}, title, el("p", { class: "quiet" }, `${words}${face.reason ? `: ${face.reason}` : ""}`));
  }
  const cardOf = (verdict) => verdictCard(verdict, {
    role: verdict.made_against ? "the cloak was made against it" : "had no part in the cloak",
    after: verdict.after === null ? "After strong JPEG the face was not found again." :
      `After JPEG of quality 75: ${verdict.after_same ? "the same person" : "another person"} (${verdict.after}).`,
  });
  const figures = face.figures.map(({ name, value, words }) => el("div", {}, el("dt", {}, `${name}:`), el("dd", {}, `${value} – ${words}`)));
  return el("div", {}, title,
    face.status === "cloaked" ? null : el("p", { class: "quiet" }, `${face.status}: ${face.reason}`),
    face.found_again ? null : el("p", { class: "quiet" }, "The detectors do not find this face any more; it was measured where it was."),
    el("ul", { class: "verdicts" }, ...face.verdicts.map(cardOf)),
    el("dl", { class: "figures" }, ...figures));
}

function photoResult(job, photo) {
  const parts = [el("h3", {}, photo.image), el("p", {}, STATUS[photo.status] ?? photo.status, photo.reason && photo.status !== "partly_cloaked" ? ` (${photo.reason})` : "")];
  if (photo.output) {
    const key = (kind) => out(job, `${photo.number}_${kind}`);
    parts.push(compare({
      before: key("before"), after: key("file"), difference: key("difference"),
      width: photo.width, height: photo.height, name: photo.image,
      faces: photo.faces.filter((face) => face.verdicts).map((face) => face.box),
    }));
    parts.push(el("p", { class: "row" }, saveLink(job, `${photo.number}_file`, `Save ${photo.output}`)));
    parts.push(...photo.faces.map((face, number) => faceResult(face, number, job)));
  }
  return el("article", { class: "card result" }, ...parts);
}

function showResult(job) {
  const { photos, judges, outputs } = job.result;
  const made = photos.filter((photo) => photo.output);
  const verdicts = photos.flatMap((photo) => photo.faces).flatMap((face) => face.verdicts ?? []);
  const moved = verdicts.filter((verdict) => verdict.same === false).length;
  const summary = made.length
    ? `${made.length} of ${photos.length} ${photos.length === 1 ? "photo is" : "photos are"} cloaked. ${moved} of ${verdicts.length} verdicts of the recognizers below are “another person”.`
    : "No photo was cloaked; why stands below.";
  const caution = judges.length
    ? "What a recognizer that had no part says is the better hint of what others will do. None of this is a promise."
    : "Every recognizer here had a part in making the cloak, so its verdict says little of others. Untick one under “Recognizers” to let it judge as a stranger.";
  return [
    el("h2", { tabindex: "-1" }, "Results"),
    el("p", {}, summary),
    made.length ? el("p", { class: "note" }, caution) : null,
    outputs.zip ? el("p", { class: "row" }, saveLink(job, "zip", made.length === 1 ? "Save photo and report (zip)" : "Save all (zip)", true)) : null,
    ...photos.map((photo) => photoResult(job, photo)),
  ].filter(Boolean);
}

watch((found) => {
  showExtractors(found);
  showPhotos(found);
}, showResult);
