// A conversation: streamed answers, kept in a session of its own.

import { call, events, show } from "./api.js";
import { freeName, refresh } from "./sessions.js";

const element = (id) => document.getElementById(id);
let model = "";
let name = null;
let messages = [];
let running = null;

export const currentName = () => name;

export function connect(id) {
  model = id;
  element("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = element("prompt").value.trim();
    if (text && !running) ask(text);
  });
  element("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    element("composer").requestSubmit();
  });
  element("stop").addEventListener("click", () => running?.abort());
  element("new-chat").addEventListener("click", () => start(null, []));
}

export async function open(session) {
  const found = await call("GET", `/sessions/${encodeURIComponent(session)}`);
  start(session, found.messages);
  if (!found.messages.length) show(`${session} was made of plain text: its next message starts over.`);
}

function start(session, known) {
  running?.abort();
  running = null;
  busy(false);
  name = session;
  messages = known;
  element("chat-name").textContent = session ?? "New chat";
  element("log").replaceChildren(element("welcome"));
  element("welcome").hidden = known.length > 0;
  for (const message of known) bubble(message.role, message.content);
  show(null);
  refresh().catch(show);
  element("prompt").focus();
}

function bubble(role, text) {
  const box = document.createElement("div");
  box.className = `message ${role === "user" ? "user" : "assistant"}`;
  const who = document.createElement("span");
  who.className = "unseen";
  who.textContent = role === "user" ? "You: " : role === "assistant" ? "Model: " : `${role}: `;
  const content = document.createElement("span");
  content.className = "text";
  content.textContent = text;
  const note = document.createElement("span");
  note.className = "quiet";
  note.hidden = true;
  box.append(who, content, note);
  element("log").append(box);
  scroll();
  return { box, content, note };
}

function scroll() {
  const log = element("log");
  log.scrollTop = log.scrollHeight;
}

function busy(on) {
  element("send").hidden = on;
  element("stop").hidden = !on;
  // Read aloud once it is whole, not word by word.
  element("log").setAttribute("aria-busy", String(on));
}

async function nameFor() {
  const now = new Date();
  const two = (n) => String(n).padStart(2, "0");
  return freeName(`chat-${two(now.getHours())}${two(now.getMinutes())}`, await refresh());
}

async function ask(text) {
  const control = running = new AbortController();
  show(null);
  busy(true);
  element("welcome").hidden = true;
  element("prompt").value = "";
  bubble("user", text);
  const answer = bubble("assistant", "");
  answer.box.classList.add("writing");
  answer.note.hidden = false;
  const asked = [...messages, { role: "user", content: text }];
  try {
    name ??= await nameFor();
    element("chat-name").textContent = name;
    await read(asked, answer, control.signal);
  } catch (error) {
    if (error.name !== "AbortError") {
      show(error);
      if (!answer.content.textContent) element("prompt").value ||= text;
    }
    if (!answer.note.textContent || error.name === "AbortError") answer.note.textContent = "stopped";
  } finally {
    answer.box.classList.remove("writing");
    if (running === control) {
      if (answer.content.textContent) messages = [...asked, { role: "assistant", content: answer.content.textContent }];
      running = null;
      busy(false);
      refresh().catch(show);
    }
  }
}

async function read(asked, answer, signal) {
  const body = {
    model,
    messages: asked,
    session: name,
    temperature: Number(element("temperature").value),
    max_tokens: Number(element("max-tokens").value),
  };
  let first = 0;
  for await (const data of events("/v1/chat/completions", body, signal)) {
    if (data.progress) answer.note.textContent = data.progress;
    const piece = data.choices?.[0]?.delta?.content;
    if (piece) {
      first ||= performance.now();
      answer.note.textContent = "";
      answer.content.textContent += piece;
      scroll();
    }
    if (data.usage) answer.note.textContent = facts(data.usage, performance.now() - first);
    scroll();
  }
}

function facts(usage, milliseconds) {
  const cached = usage.prompt_tokens_details.cached_tokens;
  const speed = usage.completion_tokens > 1 ? `, ${((1000 * (usage.completion_tokens - 1)) / milliseconds).toFixed(0)} per second` : "";
  return `${usage.completion_tokens} tokens${speed}; ${cached} of ${usage.prompt_tokens} prompt tokens were there already`;
}
