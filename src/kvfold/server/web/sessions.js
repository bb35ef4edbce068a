// The list of sessions and the memory they take.

import { bytes, call, show } from "./api.js";

const element = (id) => document.getElementById(id);
let onOpen = () => {};
let current = () => null;

export function connect(open, name) {
  onOpen = open;
  current = name;
}

export function freeName(base, taken) {
  let name = base;
  for (let n = 2; taken.includes(name); n++) name = `${base}-${n}`;
  return name;
}

function button(label, name, work) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = label;
  made.setAttribute("aria-label", `${label} ${name}`);
  made.addEventListener("click", async () => {
    try {
      show(null);
      await work();
      await refresh();
    } catch (error) {
      show(error);
    }
  });
  return made;
}

function say(text) {
  element("session-status").textContent = text;
}

function row(session, names, disk) {
  const { name } = session;
  const path = `/sessions/${encodeURIComponent(name)}`;
  const item = document.createElement("li");
  item.dataset.name = name;
  if (name === current()) item.setAttribute("aria-current", "true");
  const title = document.createElement("strong");
  title.textContent = name;
  const facts = document.createElement("span");
  facts.className = "quiet";
  const where = session.in_memory ? (session.on_disk ? "saved" : "in memory") : "on disk";
  const ratio = session.ratio >= 1 ? `, ${session.ratio.toFixed(1)}× smaller` : "";
  facts.textContent = `${session.tokens.toLocaleString("en")} tokens, ${bytes(session.bytes)}${ratio}, ${where}`;
  const actions = document.createElement("div");
  actions.className = "bar";
  actions.append(button("Open", name, () => onOpen(name)));
  if (disk) actions.append(button("Save", name, async () => { await call("POST", `${path}/save`); say(`${name} is saved.`); }));
  actions.append(
    button("Fork", name, async () => {
      const fork = freeName(`${name}-fork`, names);
      await call("POST", `${path}/fork`, { name: fork });
      say(`${fork} goes on from ${name}.`);
    }),
    button("Delete", name, async () => { await call("DELETE", path); say(`${name} is deleted.`); }),
  );
  item.append(title, facts, actions);
  return item;
}

function meter(id, value, most) {
  const bar = element(id);
  bar.style.width = `${most ? (100 * value) / most : 0}%`;
  bar.setAttribute("aria-valuemax", String(most || 1));
  bar.setAttribute("aria-valuenow", String(value));
  bar.setAttribute("aria-valuetext", bytes(value));
  element(`${id}-bytes`).textContent = bytes(value);
}

export async function refresh() {
  const { data, memory, disk, unnamed } = await call("GET", "/sessions");
  const names = data.map((session) => session.name);
  const focused = document.activeElement?.getAttribute?.("aria-label");
  element("sessions").replaceChildren(...data.map((session) => row(session, names, disk)));
  if (focused) element("sessions").querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  element("no-sessions").hidden = data.length > 0;
  const most = Math.max(memory.bytes, memory.reference_bytes);
  meter("folded", memory.bytes, most);
  meter("reference", memory.reference_bytes, most);
  const ratio = memory.bytes ? memory.reference_bytes / memory.bytes : 0;
  const others = unnamed ? ` ${unnamed} more without a name are kept for prompts that begin alike.` : "";
  element("memory-note").textContent = (ratio > 1
    ? `${ratio.toFixed(1)}× less than at 16 bits, shared beginnings counted once. ${bytes(memory.limit_bytes)} allowed.`
    : `Recent tokens stay exact; longer chats fold. ${bytes(memory.limit_bytes)} are allowed.`) + others;
  return names;
}
