// Before and after of a photo at its full resolution, with a slider, zoom and the difference.

import { el } from "./page.js";

export function compare({ before, after, difference, width, height, name, faces }) {
  const make = (src, alt) => el("img", { src, alt, draggable: "false" });
  const original = make(before, `${name} before`);
  const cloaked = make(after, `${name} cloaked`);
  const change = make(difference, `The change of ${name}, ten times as strong, around gray`);
  change.hidden = true;
  const divider = el("div", { class: "divider" });
  const stage = el("div", { class: "stage" }, cloaked, original, change, divider);
  const scroll = el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `${name}: before and after` }, stage);
  const tags = [el("span", { class: "tag left", "aria-hidden": "true" }, "Before"), el("span", { class: "tag right", "aria-hidden": "true" }, "After")];
  const viewer = el("div", { class: "viewer" }, scroll, ...tags);
  const slider = el("input", { type: "range", min: "0", max: "100", value: "50", "aria-label": `How much of ${name} to show as it was before` });
  let zoom = 0; // 0: fits

  const fitted = () => {
    const tall = Math.min(innerHeight * 0.75, 768);
    return Math.min(1, scroll.clientWidth / width, tall / height);
  };
  const scale = () => zoom || fitted();

  function split() {
    const place = scroll.scrollLeft + (slider.value / 100) * Math.min(scroll.clientWidth, stage.offsetWidth);
    const x = Math.min(Math.max(place, 0), stage.offsetWidth);
    original.style.clipPath = `inset(0 ${stage.offsetWidth - x}px 0 0)`;
    divider.style.left = `${x}px`;
    slider.setAttribute("aria-valuetext", `${slider.value} % before, ${100 - slider.value} % after`);
  }
  function layout() {
    frame.style.maxWidth = zoom ? "none" : `${Math.round(width * Math.min(1, Math.min(innerHeight * 0.75, 768) / height)) + 2}px`;
    stage.style.width = `${Math.round(width * scale())}px`;
    stage.style.height = `${Math.round(height * scale())}px`;
    stage.classList.toggle("sharp", scale() >= 2);
    scroll.style.touchAction = zoom ? "auto" : "pan-y";
    for (const button of zooms) button.setAttribute("aria-pressed", String(Number(button.dataset.zoom) === zoom));
    split();
  }
  function zoomTo(factor, y = 0.5, x = 0.5) {
    zoom = factor;
    layout();
    scroll.scrollTo({ left: x * stage.offsetWidth - scroll.clientWidth / 2, top: y * stage.offsetHeight - scroll.clientHeight / 2, behavior: "instant" });
    split();
  }
  const zooms = [[0, "Fit"], [1, "100 %"], [2, "200 %"], [4, "400 %"]].map(([factor, text]) =>
    el("button", { type: "button", "data-zoom": factor, click: () => zoomTo(factor) }, text),
  );
  const close = faces.map((box, number) =>
    el("button", {
      type: "button",
      click: () => {
        const [y0, x0, y1, x1] = box;
        const wanted = Math.min((0.6 * scroll.clientWidth) / (x1 - x0), (0.6 * Math.min(innerHeight * 0.75, 768)) / (y1 - y0));
        zoomTo(Math.min(Math.max(wanted, fitted()), 8), (y0 + y1) / 2 / height, (x0 + x1) / 2 / width);
      },
    }, faces.length > 1 ? `Face ${number + 1}` : "Face"),
  );
  const isDifferent = el("button", {
    type: "button",
    "aria-pressed": "false",
    click: () => {
      change.hidden = !change.hidden;
      for (const each of [...tags, divider, slider]) each.hidden = !change.hidden;
      isDifferent.setAttribute("aria-pressed", String(!change.hidden));
      caption.hidden = change.hidden;
    },
  }, "Difference × 10");
  const caption = el("p", { class: "quiet", hidden: true }, "Gray is no change; what differs is shown ten times as strong.");

  slider.addEventListener("input", split);
  scroll.addEventListener("scroll", split);
  let held = null;
  scroll.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.offsetX > scroll.clientWidth + scroll.scrollLeft) return;
    if (zoom && event.pointerType !== "mouse") return; // fingers pan
    held = { x: event.clientX, y: event.clientY, left: scroll.scrollLeft, top: scroll.scrollTop };
    scroll.setPointerCapture(event.pointerId);
    if (!zoom) drag(event);
  });
  const drag = (event) => {
    if (!held) return;
    if (zoom) {
      scroll.scrollLeft = held.left - (event.clientX - held.x);
      scroll.scrollTop = held.top - (event.clientY - held.y);
      return;
    }
    const { left, width: wide } = stage.getBoundingClientRect();
    slider.value = Math.round((100 * (event.clientX - left)) / wide);
    split();
  };
  scroll.addEventListener("pointermove", drag);
  for (const kind of ["pointerup", "pointercancel"]) scroll.addEventListener(kind, () => (held = null));
  const frame = el("div", { class: "frame" }, viewer, slider);
  new ResizeObserver(layout).observe(frame);

  return el("div", { class: "compare" }, frame, el("div", { class: "tools", role: "group", "aria-label": `Views of ${name}` }, ...zooms, ...close, isDifferent), caption);
}
