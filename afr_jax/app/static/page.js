// What all pages share: requests, uploads, the state of the server, progress.

export const tool = document.body.dataset.tool;
const token = document.querySelector("meta[name=afr-token]").content;
const page = Array.from(crypto.getRandomValues(new Uint8Array(8)), (n) => n.toString(16).padStart(2, "0")).join("");
const find = (id) => document.getElementById(id);

// An element with attributes (functions listen, "class" and so on) and children: text is only text.
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export function out(job, key, { save = false } = {}) {
  return `/out/${job.id}/${key}${save ? "?save" : ""}`;
}

export function say(text) {
  find("live").textContent = text;
}

export function complain(text) {
  const place = find("alert");
  place.textContent = text;
  place.hidden = !text;
  if (text) place.scrollIntoView({ block: "nearest" });
}

export async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "x-afr-token": token, ...(body instanceof Blob ? {} : { "content-type": "application/json" }) },
    body: body instanceof Blob ? body : JSON.stringify(body ?? {}),
  });
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ?? `the server answered with ${answer.status}`);
  return found;
}

// Sends files one after the other; each that is refused is named, the others go on.
export async function send(files, role, { name = (file) => file.name, told = () => {}, input = find(role) } = {}) {
  const problems = [];
  // The server would end the connection in the middle of such a file, and could not say why.
  const most = Number(input.dataset.megabytes);
  const isSmall = (file) => file.size <= most * 1e6 || !problems.push(`${file.name} is larger than ${most} MB`);
  files = files.filter(isSmall);
  let number = 0;
  for (const file of files) {
    told(`Reading ${number + 1} of ${files.length} …`);
    number += 1;
    const query = new URLSearchParams({ tool, role, name: name(file) });
    try {
      await post(`/api/files?${query}`, file);
    } catch (error) {
      const text = error instanceof TypeError ? "the server cannot be reached, or the file not be read" : error.message;
      problems.push(text.includes(file.name) ? text : `${file.name}: ${text}`);
      if (problems.length > 5) break;
    }
  }
  told("");
  complain(problems.join("\n"));
  await refresh();
}

// A place where files are dropped or chosen.
export function dropZone(id, taken) {
  const input = find(id);
  const zone = input.closest(".drop");
  const isMany = input.multiple;
  input.addEventListener("change", async () => {
    const files = [...input.files];
    if (files.length) await taken(files);
    input.value = "";
  });
  for (const kind of ["dragover", "dragenter"]) {
    zone.addEventListener(kind, (event) => {
      event.preventDefault();
      zone.classList.add("over");
    });
  }
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    const files = [...event.dataTransfer.files];
    if (files.length) taken(isMany ? files : files.slice(0, 1));
  });
}
// A file that misses its place would replace the page.
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());

export function megabytes(bytes) {
  return bytes < 100_000 ? `${Math.max(1, Math.round(bytes / 1000))} KB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

export function time(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export const isActive = (job) => job !== null && ["waiting", "running", "stopping"].includes(job.state);

const STAGES = {
  "face steps": (done, total) =>
    done ? `Changing the faces: step ${done} of ${total}` : "Preparing. The first time takes up to a minute.",
  photos: (done, total) => `Looking at the result: photo ${Math.min(done + 1, total)} of ${total}`,
  "query photos": () => "Looking for the face",
  training: (done, total) => (done ? `Training: ${done} of ${total} rounds` : "Preparing the training"),
  "scale factors": (done, total) => `Measuring how often the face is missed (part ${Math.min(done + 1, total)} of ${total})`,
  rounds: (done, total) => `Making the noise: round ${Math.min(done + 1, total)} of ${total}`,
  trial: (done, total) => `Trying it on small networks: ${done} of ${total} rounds`,
};

let shownJob = "";
let lastStage = "";
function showWork(job) {
  const work = find("work");
  work.hidden = !isActive(job);
  if (!isActive(job)) return;
  let text = "Starting. The first time takes up to a minute.";
  let share = null;
  if (job.state === "waiting") {
    text = job.ahead ? `Waiting: ${job.ahead} ${job.ahead === 1 ? "piece of work is" : "pieces of work are"} before this.` : "Waiting for the server to start.";
  } else if (job.state === "stopping") {
    text = "Stopping …";
  } else if (job.stage) {
    const [done, total] = job.stages[job.stage];
    text = (STAGES[job.stage] ?? (() => `At work: ${job.stage}`))(done, total);
    share = total && done ? done / total : null;
  }
  find("work-text").textContent = text;
  const bar = find("work-bar");
  if (share === null) bar.removeAttribute("value");
  else bar.value = share;
  const left = job.state === "running" && job.seconds_left !== null ? `, about ${time(job.seconds_left)} left for this step` : "";
  find("work-time").textContent = job.seconds ? `${time(job.seconds)} so far${left}` : "";
  find("work-cancel").disabled = job.state === "stopping";
  const stage = `${job.state} ${job.stage}`;
  if (stage !== lastStage) say(text);
  lastStage = stage;
}

let current = { uploads: [], job: null, extractors: [], trouble: null };
const watchers = [];
let showResult = () => [];
let timer = 0;
let isAsking = false;

export const state = () => current;

// Calls a function with the state whenever that changes, and another with a job that is done.
export function watch(watcher, result) {
  watchers.push(watcher);
  showResult = result;
  find("work-cancel").addEventListener("click", () => act(() => post(`/api/jobs/${current.job.id}/cancel`)));
  refresh();
}

// Does what a button asks for, and shows what is wrong.
export async function act(action) {
  try {
    complain("");
    await action();
  } catch (error) {
    complain(error instanceof TypeError ? "The server cannot be reached." : error.message);
  }
  await refresh();
}

export async function refresh() {
  if (isAsking) return;
  isAsking = true;
  clearTimeout(timer);
  try {
    const answer = await fetch(`/api/state?${new URLSearchParams({ tool, page })}`);
    const found = await answer.json();
    if (answer.ok) show(found);
    else complain(found.error);
  } catch {
    complain("The server cannot be reached. Is it still running?");
    current = { ...current, lost: true };
  }
  isAsking = false;
  const isBusy = isActive(current.job) || current.uploads.some((upload) => upload.look && isActive(upload.look));
  timer = setTimeout(refresh, isBusy ? 500 : 2500);
}

function show(found) {
  if (current.lost) complain("");
  current = found;
  if (found.trouble) complain(found.trouble);
  for (const watcher of watchers) watcher(found);
  const job = found.job;
  showWork(job);
  const key = job ? `${job.id} ${job.state}` : "";
  if (key === shownJob) return;
  const wasActive = shownJob !== "" && !isActive(job);
  shownJob = key;
  const place = find("results");
  place.replaceChildren();
  if (job === null || isActive(job)) return;
  if (job.state === "done") place.append(...showResult(job));
  else if (job.state === "failed") place.append(el("div", { class: "alert", role: "alert" }, `It did not work: ${job.message}`));
  else place.append(el("p", { class: "note" }, "Cancelled. Nothing was kept."));
  if (wasActive) {
    say(job.state === "done" ? "Done. The results are below." : "The work ended.");
    place.scrollIntoView({ block: "start" });
  }
}

addEventListener("pagehide", () => navigator.sendBeacon("/api/bye", JSON.stringify({ token, page })));
addEventListener("pageshow", (event) => event.persisted && refresh());

// A place for one file: what lies in it, and how it gets there.
export function single(id, { others = [] } = {}) {
  const status = find(`${id}-state`);
  dropZone(id, async (files) => {
    for (const role of others) await post(`/api/files/all/remove?${new URLSearchParams({ tool, role })}`).catch(() => {});
    await send(files, id, { told: (text) => status && (status.textContent = text) });
  });
  watchers.push((found) => {
    const upload = found.uploads.find((each) => each.role === id);
    if (status) status.textContent = upload ? `${upload.name}, ${megabytes(upload.bytes)}` : "nothing chosen yet";
  });
}

export function has(role) {
  return current.uploads.some((upload) => upload.role === role);
}

export function saveLink(job, key, text, isMain = false) {
  return el("a", { class: isMain ? "button main" : "button", href: out(job, key, { save: true }) }, text);
}

// What a recognizer makes of two faces, as a card with a meter.
export function verdictCard(verdict, { role = null, after = null, whom = "it" } = {}) {
  const most = Math.max(1.5, verdict.share * 1.1);
  const bar = el("i");
  bar.style.width = `${Math.min(100, (100 * verdict.share) / most)}%`;
  const mark = el("b");
  mark.style.left = `${100 / most}%`;
  const who = verdict.same ? "the same person" : "another person";
  return el(
    "li",
    { class: `verdict ${verdict.same ? "same" : "other"}` },
    el("p", {}, el("strong", {}, verdict.name), role ? ` – ${role}` : ""),
    el("p", {}, `takes ${whom} for `, el("strong", {}, who)),
    el("div", { class: "meter", "aria-hidden": "true" }, bar, mark),
    el("p", { class: "quiet" }, `Distance ${verdict.distance}; from ${verdict.threshold} on (the mark) it is another person.`),
    after ? el("p", { class: "quiet" }, after) : null,
  );
}
