"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const STORE = `ppx-listening-${data.seal}`;
const WORDS = { x: "X is better", y: "Y is better", same: "No difference" };
const SOUNDS = ["q", "x", "y"];
const audio = Object.fromEntries(SOUNDS.map((name) => [name, new Audio()]));
const LIMIT = 0.05;

// answers: "x", "y", "same" or null for each pair; heard: what was played of it
let state = fresh();
let current = 0;

function fresh() {
  return { answers: data.pairs.map(() => null), heard: data.pairs.map(() => []), finished: null };
}

// The two-sided exact p-value of a sign test: how likely a split at least as uneven is where both are as good.
function pValue(a, b) {
  const n = BigInt(a + b);
  let ways = 1n; // n over i
  let sum = 0n;
  for (let i = 0n; i <= BigInt(Math.min(a, b)); i++) {
    sum += ways;
    ways = (ways * (n - i)) / (i + 1n);
  }
  return Math.min(1, (2 * Number(sum)) / 2 ** Number(n));
}

// The fewest of n that p <= LIMIT takes for one side, or null.
function fewestOf(n) {
  for (let most = Math.ceil(n / 2); most <= n; most++) if (pValue(most, n - most) <= LIMIT) return most;
  return null;
}

// xorshift, as listening_page.masked has it
function unmasked(text, start) {
  let word = start;
  const bytes = Uint8Array.from(atob(text), (character) => {
    word ^= word << 13;
    word ^= word >>> 17;
    word ^= word << 5;
    return character.charCodeAt(0) ^ (word & 255);
  });
  return new TextDecoder().decode(bytes);
}

function load() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORE));
    const fits = (list) => Array.isArray(list) && list.length === data.pairs.length;
    if (stored && fits(stored.answers) && fits(stored.heard) && stored.heard.every(Array.isArray)) {
      const answers = stored.answers.map((answer) => (Object.hasOwn(WORDS, answer ?? "") ? answer : null));
      const complete = answers.every(Boolean);
      const heard = stored.heard.map((names) => names.filter((name) => SOUNDS.includes(name)));
      state = { answers, heard, finished: complete && typeof stored.finished === "string" ? stored.finished : null };
    }
  } catch {
    // no storage, or not ours: the test begins
  }
  const open = state.answers.indexOf(null);
  current = open < 0 ? data.pairs.length - 1 : open;
}

function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    element("storage").hidden = false;
  }
}

function say(text) {
  element("status").textContent = text;
}

function seconds(value) {
  return Number.isFinite(value) ? `${value.toFixed(1)} s` : "";
}

function stop() {
  for (const name of SOUNDS) audio[name].pause();
}

function toggle(name) {
  const sound = audio[name];
  if (!sound.paused) {
    sound.pause();
    return;
  }
  stop();
  sound.play().catch((error) => {
    if (error.name !== "AbortError") say("This browser does not play the sound (FLAC): try another one.");
  });
}

function heardBoth() {
  return ["x", "y"].every((name) => state.heard[current].includes(name));
}

function choose(answer) {
  if (!heardBoth()) {
    say("Play both answers first.");
    return;
  }
  state.answers[current] = answer;
  save();
  say(`Pair ${current + 1}: ${WORDS[answer]}.`);
  refresh();
}

function go(step) {
  const next = current + step;
  if (step > 0 && !state.answers[current]) {
    say("Choose first.");
    return;
  }
  if (next === data.pairs.length) {
    finish();
  } else if (next >= 0) {
    current = next;
    show();
    element("heading").focus();
  }
}

function show() {
  const pair = data.pairs[current];
  const question = data.questions[pair.question];
  stop();
  const sources = { q: question.sound, x: pair.x, y: pair.y };
  for (const name of SOUNDS) {
    if (audio[name].src !== sources[name]) audio[name].src = sources[name];
    else audio[name].currentTime = 0;
  }
  element("heading").textContent = `Pair ${current + 1} of ${data.pairs.length}`;
  element("file").textContent = question.file;
  say("");
  refresh();
}

function refresh() {
  const answer = state.answers[current];
  const count = state.answers.filter(Boolean).length;
  const open = data.pairs.length - count;
  const last = current === data.pairs.length - 1;
  element("answered").textContent = `${count} of ${data.pairs.length} answered`;
  element("progress").value = count;
  element("choices").disabled = !heardBoth();
  for (const choice of document.getElementsByName("choice")) choice.checked = choice.value === answer;
  element("hint").textContent = heardBoth() ? "You can change it until the result is shown." : "Play both answers first.";
  element("back").disabled = current === 0;
  element("next").disabled = !answer || (last && open > 0);
  element("next").firstElementChild.textContent = last ? "Show the result" : "Next";
  for (const name of SOUNDS) {
    const button = element(`play-${name}`);
    button.setAttribute("aria-pressed", String(!audio[name].paused));
    button.classList.toggle("played", state.heard[current].includes(name));
  }
}

function finish() {
  const open = state.answers.indexOf(null);
  if (open >= 0) {
    say(`Pair ${open + 1} has no answer yet.`);
    return;
  }
  stop();
  state.finished ??= new Date().toISOString();
  save();
  reveal();
  element("outcome").focus();
}

function results() {
  const text = unmasked(data.sealed[1], data.sealed[0]);
  const key = JSON.parse(text);
  const pairs = data.pairs.map((pair, index) => {
    const x = key.x[index];
    const y = x === "a" ? "b" : "a";
    const answer = state.answers[index];
    const file = data.questions[pair.question].file;
    return { pair: index + 1, question: file, seed: pair.seed, x, y, answer, preferred: { x, y, same: null }[answer] };
  });
  const count = (side) => pairs.filter((pair) => pair.preferred === side).length;
  const [a, b, same] = [count("a"), count("b"), count(null)];
  return {
    format: "ppx-listening", version: 1, toolkit: data.toolkit, finished: state.finished,
    a: key.a, b: key.b, voice: data.voice, seed: data.seed,
    a_better: a, b_better: b, no_difference: same, decided: a + b, p_value: a + b ? pValue(a, b) : null,
    equal_sounds: key.equal, pairs, seal: data.seal, key: text,
  };
}

function percent(p) {
  return p < 0.0001 ? "less than 0.01 %" : `${(100 * p).toPrecision(p < 0.1 ? 2 : 3)} %`;
}

function meaning(found) {
  const { a_better: a, b_better: b, decided: n, p_value: p } = found;
  if (!n) return "No pair was decided: to this listener the two sounded alike, or equally good.";
  const most = Math.max(a, b);
  const chance = `If both were equally good, a split at least as uneven as ${most} to ${n - most} would come up by chance in ${percent(p)} of such tests`;
  if (p <= LIMIT) return `${chance}: on these recordings this listener prefers ${a > b ? "A" : "B"}.`;
  const needed = fewestOf(n);
  const power = needed ? `${needed} of ${n} for one side would have been.` : `with ${n} decided pair${n === 1 ? "" : "s"} nothing can be: at least 6 are needed.`;
  return `${chance}. That is not rare enough (${100 * LIMIT} %) to speak of a difference; ${power} It does not show that they are equal.`;
}

function reveal() {
  const found = results();
  const { a, b } = found;
  const names = { a: `A: ${a.name} (${a.recipe})`, b: `B: ${b.name} (${b.recipe})` };
  const [more, less] = [Math.max(found.a_better, found.b_better), Math.min(found.a_better, found.b_better)];
  const better = more === less ? "Even" : `${more === found.a_better ? "A" : "B"} was chosen more often`;
  element("outcome").textContent = found.decided ? `${better}: ${more} to ${less}` : "No difference in any pair";
  element("meaning").textContent = meaning(found);
  const tally = [[names.a, found.a_better], [names.b, found.b_better], ["No difference", found.no_difference]];
  element("tally").replaceChildren(...tally.map(([name, count]) => bar(name, count)));
  const p = found.p_value === null ? "no p-value" : `p = ${found.p_value.toPrecision(3)}`;
  element("test-line").textContent = `${p}: two-sided exact binomial test of ${found.decided} decided pairs; ${found.no_difference} without a difference left out.`;
  if (found.equal_sounds.length) element("test-line").textContent += ` The same sound by both, sample for sample: pair ${found.equal_sounds.join(", ")}.`;
  element("rows").replaceChildren(...found.pairs.map((pair) => {
    const row = document.createElement("tr");
    const preferred = pair.preferred ? pair.preferred.toUpperCase() : "no difference";
    for (const text of [pair.pair, pair.question, pair.seed, pair.x.toUpperCase(), preferred]) {
      row.insertCell().textContent = text;
    }
    return row;
  }));
  element("json").value = JSON.stringify(found, null, 1);
  element("download").href = `data:application/json;charset=utf-8,${encodeURIComponent(element("json").value)}`;
  element("test").hidden = true;
  element("result").hidden = false;
  check(found.key);
}

function bar(name, count) {
  const row = document.createElement("div");
  const [label, number, line] = ["span", "b", "progress"].map((kind) => row.appendChild(document.createElement(kind)));
  label.textContent = name;
  number.textContent = count;
  line.max = data.pairs.length;
  line.value = count;
  line.setAttribute("aria-label", name);
  return row;
}

// Says whether the key is the one that was sealed, where the browser can tell.
async function check(key) {
  if (!globalThis.crypto?.subtle) return;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(key)));
  const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  say(hex === data.seal ? "The key is the one that was sealed." : "The key does not match its seal: this page was changed.");
}

async function copy() {
  try {
    await navigator.clipboard.writeText(element("json").value);
    say("Copied.");
  } catch {
    element("json").select();
    say(document.execCommand("copy") ? "Copied." : "Not copied: the text is selected, copy it by hand.");
  }
}

function again() {
  state = fresh();
  current = 0;
  save();
  for (const id of ["rows", "tally"]) element(id).replaceChildren();
  for (const id of ["outcome", "meaning", "test-line"]) element(id).textContent = "";
  element("json").value = "";
  element("download").removeAttribute("href");
  begin();
  element("heading").focus();
}

function begin() {
  element("result").hidden = Boolean(!state.finished);
  element("test").hidden = Boolean(state.finished);
  if (state.finished) reveal();
  else show();
}

const KEYS = {
  q: () => toggle("q"), x: () => toggle("x"), y: () => toggle("y"),
  1: () => choose("x"), 2: () => choose("y"), 0: () => choose("same"),
  n: () => go(1), p: () => go(-1),
};

document.addEventListener("keydown", (event) => {
  const act = KEYS[event.key.toLowerCase()];
  if (!act || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (state.finished || !element("shortcuts").checked) return;
  event.preventDefault();
  act();
});

for (const name of SOUNDS) {
  const sound = audio[name];
  const seek = element(`seek-${name}`);
  element(`play-${name}`).addEventListener("click", () => toggle(name));
  seek.addEventListener("input", () => {
    if (Number.isFinite(sound.duration)) sound.currentTime = (seek.value / 1000) * sound.duration;
  });
  const time = () => {
    seek.value = sound.duration ? (1000 * sound.currentTime) / sound.duration : 0;
    seek.setAttribute("aria-valuetext", `${seconds(sound.currentTime)} of ${seconds(sound.duration)}`);
    if (name !== "q") element(`time-${name}`).textContent = Number.isFinite(sound.duration) ? `${sound.currentTime.toFixed(1)} / ${seconds(sound.duration)}` : "";
  };
  for (const kind of ["timeupdate", "loadedmetadata", "seeked"]) sound.addEventListener(kind, time);
  for (const kind of ["pause", "ended"]) sound.addEventListener(kind, refresh);
  sound.addEventListener("play", () => {
    if (!state.heard[current].includes(name)) state.heard[current].push(name);
    save();
    refresh();
  });
  sound.addEventListener("error", () => say("This browser does not play the sound (FLAC): try another one."));
}
for (const choice of document.getElementsByName("choice")) choice.addEventListener("change", () => choose(choice.value));
element("back").addEventListener("click", () => go(-1));
element("next").addEventListener("click", () => go(1));
element("copy").addEventListener("click", copy);
element("again").addEventListener("click", again);
element("seal").textContent = data.seal;
load();
begin();
