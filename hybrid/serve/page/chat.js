// The chat: conversations, messages, and what is asked of the server.

import { rates, showLanes } from "./lanes.js";
import { copied, el, show } from "./markdown.js";
import { Refused, get, stream } from "./server.js";
import { chats, drop, keep, keepSettings, makeChat, settings } from "./store.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = { temperature: 1, top_p: 1, min_p: 1, top_k: 0, max_tokens: 0, seed: 0 };
const LIMITS = { length: "cut: it reached the most tokens it may have" };
const SAVE_MS = 700;

let chat = makeChat();
let set = settings();
let told = null;
let running = null; // the answer that is being written: its abort, its message, its element
let modelName = null;

// What a person sees of a conversation.

function draw() {
  document.title = chat.title ? `${chat.title} - hybrid` : "hybrid";
  $("title").textContent = chat.title || "New conversation";
  $("log").replaceChildren(...chat.messages.map((_, at) => article(at)));
  if (!chat.messages.length) $("log").append(el("div", "empty", el("b", "", "Ask something"), "What you write stays in this browser and on the server that you run."));
  drawList();
  toEnd(true);
}

function drawList() {
  $("chats").replaceChildren(
    ...chats().map((each) => {
      const pick = button(each.title || "New conversation", () => open(each));
      pick.classList.add("pick");
      if (each.id === chat.id) pick.setAttribute("aria-current", "true");
      const gone = button("\u00d7", () => remove(each));
      gone.classList.add("drop");
      gone.ariaLabel = `Delete ${each.title}`;
      return el("li", each.id === chat.id ? "now" : "", pick, gone);
    }),
  );
}

function button(words, action) {
  const made = el("button", "", words);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

function article(at) {
  const message = chat.messages[at];
  const made = el("article", message.role, el("div", "who", message.role === "user" ? "You" : chat.model || "Model"));
  if (message.role === "user") {
    made.append(el("div", "text", message.content));
    const tools = el("div", "tools", button("Edit", () => edit(at)), copier(message));
    const last = at === chat.messages.length - 1;
    if (last && !message.error) tools.append(button("Ask again", () => answer()));
    if (message.error) made.append(alert(message.error, () => answer()));
    made.append(tools);
    return made;
  }
  const thought = el("details", "thought", el("summary", "", "Thoughts"), el("div", "text"));
  made.append(thought, el("div", "text body"), el("div", "tools"));
  fill(made, at);
  return made;
}

// Show what there is of an answer; also while more of it comes.
function fill(made, at) {
  const message = chat.messages[at];
  const live = running && running.message === message;
  const thought = made.querySelector(".thought");
  thought.hidden = !message.thought;
  thought.lastChild.textContent = message.thought || "";
  thought.firstChild.textContent = live && !message.content ? "Thinking" : "Thoughts";
  const body = made.querySelector(".body");
  show(body, message.content);
  body.classList.toggle("waits", Boolean(live && !message.content));
  const tools = made.querySelector(".tools");
  if (live) return;
  tools.replaceChildren(copier(message), button("Retry", () => retry(at)));
  const figures = [];
  if (message.figures) figures.push(message.figures);
  if (message.stopped) figures.push("stopped");
  if (LIMITS[message.reason]) figures.push(LIMITS[message.reason]);
  if (figures.length) tools.append(el("span", "figures", figures.join(" \u00b7 ")));
  made.querySelector(".error")?.remove();
  if (message.error) tools.before(alert(message.error, () => retry(at)));
}

function copier(message) {
  const made = button("Copy", () => copied(made, message.content));
  return made;
}

function alert(words, again) {
  const made = el("div", "error", `${words} `, button("Try again", again));
  made.setAttribute("role", "alert");
  return made;
}

function toEnd(always = false) {
  const log = $("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function say(words) {
  $("said").textContent = words;
}

// Conversations.

function open(other) {
  stop();
  chat = other;
  closeMenu();
  draw();
  $("ask").focus();
}

function remove(other) {
  if (!confirm(`Delete "${other.title}"?`)) return;
  if (other.id === chat.id) stop();
  drop(other);
  if (other.id === chat.id) chat = makeChat();
  draw();
}

function save() {
  chat.changed = Date.now();
  if (!keep(chat)) say("This browser has no room left: the conversation is not kept. Delete older ones.");
}

// Asking.

function send(text) {
  if (!text.trim() || running) return;
  chat.messages.push({ role: "user", content: text });
  if (!chat.title) chat.title = text.trim().split("\n")[0].slice(0, 60);
  $("ask").value = "";
  grow();
  answer();
}

function retry(at) {
  if (running) return;
  chat.messages.length = at;
  answer();
}

function edit(at) {
  if (running) return;
  const made = $("log").children[at];
  const area = el("textarea");
  area.value = chat.messages[at].content;
  area.rows = Math.min(12, area.value.split("\n").length + 1);
  area.ariaLabel = "Edit the message";
  const form = el("form", "edit", area, el("div", "row", el("button", "main", "Send"), button("Cancel", draw)));
  const done = (event) => {
    event.preventDefault();
    if (running || !area.value.trim()) return;
    chat.messages.length = at;
    send(area.value);
  };
  form.addEventListener("submit", done);
  area.addEventListener("keydown", (event) => {
    if (isEnter(event)) done(event);
    if (event.key === "Escape") draw();
  });
  made.replaceChildren(form);
  area.focus();
}

function request() {
  const body = { messages: chat.messages.map(({ role, content }) => ({ role, content })), stream: true, stream_options: { include_usage: true } };
  if (modelName) body.model = modelName;
  if (chat.system.trim()) body.messages.unshift({ role: "system", content: chat.system });
  for (const name of Object.keys(NUMBERS)) if (typeof set[name] === "number") body[name === "max_tokens" ? "max_completion_tokens" : name] = set[name];
  if (set.thinking && told?.thinking?.length) body.chat_template_kwargs = Object.fromEntries(told.thinking.map((name) => [name, set.thinking === "on"]));
  return body;
}

async function answer() {
  const mine = chat;
  const asked = mine.messages[mine.messages.length - 1];
  if (running || !asked || asked.role !== "user") return;
  delete asked.error;
  const message = { role: "assistant", content: "", thought: "", stopped: true };
  const body = request();
  mine.messages.push(message);
  running = { abort: new AbortController(), message };
  save();
  draw();
  busy(true);
  const made = $("log").lastChild;
  const at = mine.messages.length - 1;
  const clock = { begin: performance.now(), first: 0, last: 0, pieces: 0, saved: 0, frame: 0 };
  let usage = null;
  const paint = () => {
    clock.frame = 0;
    if (chat !== mine || !made.isConnected) return;
    fill(made, at);
    live(clock);
    toEnd();
  };
  ahead();
  try {
    for await (const chunk of stream(body, set.key, running.abort.signal)) {
      if (chunk.usage) usage = chunk.usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      if (choice.finish_reason) message.reason = choice.finish_reason;
      const { content, reasoning_content: thought } = choice.delta;
      if (!content && !thought) continue;
      message.content += content || "";
      message.thought += thought || "";
      clock.last = performance.now();
      clock.first ||= clock.last;
      clock.pieces++;
      clock.frame ||= requestAnimationFrame(paint);
      if (clock.last - clock.saved > SAVE_MS) {
        clock.saved = clock.last;
        keep(mine);
      }
    }
    message.stopped = false;
    message.figures = figures(clock, usage);
  } catch (error) {
    if (error.name !== "AbortError") {
      message.stopped = false;
      message.error = error instanceof Refused ? error.message : `Something went wrong in this page: ${error.message}`;
    }
  }
  cancelAnimationFrame(clock.frame);
  running = null;
  if (!message.content && !message.thought) {
    mine.messages.pop();
    if (message.error) asked.error = message.error;
  }
  mine.model = modelName || mine.model;
  if (chats().some((each) => each.id === mine.id)) {
    mine.changed = Date.now();
    keep(mine);
  }
  busy(false);
  if (chat === mine) draw();
  say(message.error || (message.stopped ? "Stopped." : "The answer is complete."));
  behind();
}

function figures(clock, usage) {
  const seconds = (clock.last - clock.first) / 1e3;
  const tokens = usage ? usage.completion_tokens : clock.pieces;
  const words = [`${tokens} tokens`];
  if (tokens > 1 && seconds > 0) words.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  if (clock.first) words.push(`first after ${((clock.first - clock.begin) / 1e3).toFixed(2)} s`);
  return words.join(" \u00b7 ");
}

function stop() {
  running?.abort.abort();
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("log").setAttribute("aria-busy", String(is));
}

// The lanes: predicted when an answer begins, measured as it comes, told by the server at its end.

function live(clock) {
  const seconds = (clock.last - clock.first) / 1e3 / Math.max(1, clock.pieces - 1);
  if (!told || clock.pieces < 3) return;
  showLanes($("lanes"), told, seconds);
  $("rates").textContent = rates(told, `${(1 / seconds).toFixed(1)} tokens/s now`);
}

async function lanes(path) {
  try {
    told = await get(path, set.key);
  } catch {
    return; // the answer itself says what is wrong
  }
  if (path !== "/lanes" && !running) return;
  showLanes($("lanes"), told);
  $("rates").textContent = rates(told, path === "/lanes" ? "" : "computing the prompt");
  $("thinking-label").hidden = !told.thinking.length;
}

function ahead() {
  const known = told?.last ? told.last.prompt_tokens + told.last.new_tokens : 64;
  return lanes(`/lanes?context=${known}`);
}

function behind() {
  return lanes("/lanes");
}

// Settings.

function openSettings(error = "") {
  for (const name of Object.keys(NUMBERS)) $(name).value = set[name] ?? "";
  $("system").value = chat.system;
  $("key").value = set.key || "";
  $("thinking").value = set.thinking || "";
  $("settings-error").textContent = error;
  $("settings-error").hidden = !error;
  if (!$("settings").open) $("settings").showModal();
  if (error) $("key").focus();
}

function takeSettings() {
  for (const name of Object.keys(NUMBERS)) {
    const value = $(name).valueAsNumber;
    if (Number.isFinite(value) && $(name).validity.valid) set[name] = value;
    else delete set[name];
  }
  set.key = $("key").value.trim();
  set.thinking = $("thinking").value;
  keepSettings(set);
  if (chat.system !== $("system").value) {
    chat.system = $("system").value;
    if (chat.messages.length) save();
  }
  begin();
}

// The page.

function grow() {
  const area = $("ask");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, 192)}px`;
}

function isEnter(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

function closeMenu() {
  $("side").classList.remove("open");
  $("shade").hidden = true;
  $("menu").setAttribute("aria-expanded", "false");
}

async function begin() {
  try {
    const list = await get("/v1/models", set.key);
    modelName = list.data[0].id;
    $("model").textContent = modelName;
    $("model").title = modelName;
    $("rates").classList.remove("error");
    await behind();
  } catch (error) {
    $("rates").textContent = error.message;
    $("rates").classList.add("error");
    if (error.status === 401) openSettings(error.message);
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("ask").value);
});
$("ask").addEventListener("input", grow);
$("ask").addEventListener("keydown", (event) => {
  if (!isEnter(event)) return;
  event.preventDefault();
  send($("ask").value);
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => open(makeChat()));
$("menu").addEventListener("click", () => {
  const is = $("side").classList.toggle("open");
  $("shade").hidden = !is;
  $("menu").setAttribute("aria-expanded", String(is));
  if (is) $("new").focus();
});
$("shade").addEventListener("click", closeMenu);
$("open-settings").addEventListener("click", () => openSettings());
$("settings").addEventListener("close", takeSettings);
$("reset").addEventListener("click", () => {
  for (const name of Object.keys(NUMBERS)) $(name).value = "";
  $("system").value = $("thinking").value = "";
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open) return;
  closeMenu();
  stop();
});
window.addEventListener("storage", drawList); // another tab has changed them

chat = chats()[0] || chat;
draw();
begin();
$("ask").focus();
