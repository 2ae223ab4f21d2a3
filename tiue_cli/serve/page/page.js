// The page draws while one types: every change asks anew, and the request before it is given up.
"use strict";

const get = (id) => document.getElementById(id);
const prompt = get("prompt"), steps = get("steps"), count = get("count"), seed = get("seed"), teacher = get("teacher");
const sheet = get("sheet"), status = get("status"), large = get("large"), key = get("key");
const MAX_SEED = 2 ** 53 - 1000;
const FIRST_PROMPT = "a yellow star above a green tree";

let served = null;        // the first of GET /v1/models, and its teacher's name
let teacherName = null;
let asked = 0;            // number of the newest request; answers to older ones are dropped
let running = null;       // AbortController of the newest request
let urls = [];            // object URLs on the sheet, to be let go

async function api(path, body, signal) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (key.value) headers["Authorization"] = "Bearer " + key.value;
  const response = await fetch(path, {
    method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store",
  });
  const answer = await response.json();
  if (response.ok) return answer;
  if (response.status === 401) { get("key-control").hidden = false; }
  const failure = new Error(answer.error ? answer.error.message : "the server answered " + response.status);
  failure.status = response.status;
  failure.retryAfter = Number(response.headers.get("Retry-After")) || 1;
  throw failure;
}

function pngOf(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  urls.push(url);
  return url;
}

function say(text, failed = false) {
  status.textContent = text;
  status.classList.toggle("failed", failed);
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function figure(url, caption, text) {
  const box = element("figure"), image = element("img");
  image.src = url;
  image.alt = text;
  box.append(image);
  if (caption) box.append(element("figcaption", "", caption));
  return box;
}

function request(model) {
  const body = { prompt: prompt.value.trim(), model, n: Number(count.value), seed: Number(seed.value) };
  return model === teacherName ? body : { ...body, steps: Number(steps.value) };
}

async function draw() {
  const text = prompt.value.trim();
  if (!served || !text) return;
  if (!seed.checkValidity() || seed.value === "") { say("The seed is a whole number from 0.", true); return; }
  const number = ++asked;
  if (running) running.abort();
  running = new AbortController();
  const signal = running.signal;
  try {
    const started = performance.now();
    const student = await api("v1/images/generations", request(served.id), signal);
    if (number !== asked) return;
    const ms = performance.now() - started;
    const withTeacher = teacher.checked && teacherName !== null;
    show(text, student, null, withTeacher);
    const model = student.timings.model_ms.toFixed(1);
    const figures = `${student.data.length} × ${student.size} · K = ${student.steps} · model ${model} ms · ` +
      `answer ${ms.toFixed(0)} ms · seeds from ${student.seed}`;
    say(figures);
    if (!withTeacher) return;
    const taught = await api("v1/images/generations", request(teacherName), signal);
    if (number !== asked) return;
    show(text, student, taught, true);
    say(`${figures} · teacher, ${taught.steps} steps: ${taught.timings.model_ms.toFixed(0)} ms`);
  } catch (error) {
    if (error.name === "AbortError" || number !== asked) return;
    say(error.message, true);
    if (error.status === 429 || error.status === 503) setTimeout(() => number === asked && draw(), 1000 * error.retryAfter);
  }
}

function show(text, student, taught, pairs) {
  const old = urls;
  urls = [];
  sheet.classList.toggle("one", student.data.length === 1 && !pairs);
  sheet.classList.toggle("pairs", pairs);
  const tiles = student.data.map((image, index) => {
    const tile = element("button", "tile"), pair = element("div", "pair");
    const url = pngOf(image.b64_json), own = image.seed;
    tile.type = "button";
    tile.setAttribute("aria-label", `${text}, seed ${own}`);
    pair.append(figure(url, pairs ? "student, one pass" : "", `${text}, seed ${own}`));
    let taughtUrl = null;
    if (taught) {
      taughtUrl = pngOf(taught.data[index].b64_json);
      pair.append(figure(taughtUrl, `teacher, ${taught.steps} steps`, `${text}, by the teacher, seed ${own}`));
    } else if (pairs) {
      pair.append(element("div", "waiting", "the teacher draws …"));
    }
    const caption = element("div", "caption");
    caption.append(element("span", "", `seed ${own}`), element("span", "", `K = ${student.steps}`));
    tile.append(pair, caption);
    tile.addEventListener("click", () => enlarge(text, own, student, url, taughtUrl));
    return tile;
  });
  const focused = [...sheet.children].indexOf(document.activeElement);
  sheet.replaceChildren(...tiles);
  if (focused >= 0 && tiles[focused]) tiles[focused].focus();
  if (!large.open) old.forEach(URL.revokeObjectURL);
}

function enlarge(text, own, student, url, taughtUrl) {
  const pictures = [figure(url, taughtUrl ? "student, one pass" : "", text)];
  if (taughtUrl) pictures.push(figure(taughtUrl, "teacher", text));
  get("large-pictures").replaceChildren(...pictures);
  get("large-title").textContent = `${text} · seed ${own} · K = ${student.steps}`;
  const name = text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60) || "picture";
  get("download").href = url;
  get("download").download = `${name}-${own}.png`;
  get("use-seed").onclick = () => { seed.value = own; large.close(); draw(); };
  large.showModal();
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function newSeeds() {
  seed.value = (Number(seed.value) + Number(count.value)) % MAX_SEED;
  draw();
}

function changeSteps(by) {
  steps.value = Number(steps.value) + by;
  steps.dispatchEvent(new Event("input"));
}

async function connect() {
  try {
    const models = (await api("v1/models")).data;
    served = models[0];
    const other = models.find((model) => model.kind === "teacher" && model.id !== served.id);
    teacherName = other ? other.id : null;
    get("key-control").hidden = true;
  } catch (error) {
    say(error.message, true);
    if (error.status !== 401) setTimeout(connect, 1000);
    return;
  }
  get("model").textContent = `${served.id} · ${served.size}`;
  get("teacher-control").hidden = teacherName === null;
  steps.max = served.step_choices.length ? Math.max(...served.step_choices) : 50;
  steps.min = served.step_choices.length ? Math.min(...served.step_choices) : 1;
  steps.value = served.steps;
  count.max = served.max_images;
  get("steps-shown").value = steps.value;
  get("count-shown").value = count.value;
  if (!prompt.value) prompt.value = FIRST_PROMPT;
  fit();
  draw();
}

get("form").addEventListener("submit", (event) => event.preventDefault());
prompt.addEventListener("input", () => { fit(); draw(); });
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.isComposing) { event.preventDefault(); newSeeds(); }
});
steps.addEventListener("input", () => { get("steps-shown").value = steps.value; draw(); });
count.addEventListener("input", () => { get("count-shown").value = count.value; draw(); });
seed.addEventListener("input", draw);
teacher.addEventListener("change", draw);
key.addEventListener("change", connect);
get("dice").addEventListener("click", newSeeds);
get("close").addEventListener("click", () => large.close());
large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("textarea, input:not([type=range]):not([type=checkbox])");
  if (typing || large.open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); prompt.focus(); prompt.select(); }
  if (event.key === "[") changeSteps(-1);
  if (event.key === "]") changeSteps(1);
});
connect();
