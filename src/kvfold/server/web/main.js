// Wires the parts together: the model's name, tabs, and what is shown when.

import { call, show } from "./api.js";
import * as chat from "./chat.js";
import * as needle from "./needle.js";
import * as sessions from "./sessions.js";

const element = (id) => document.getElementById(id);
const REFRESH_MS = 5000;

function select(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const on = other === tab;
    other.setAttribute("aria-selected", String(on));
    other.tabIndex = on ? 0 : -1;
    element(other.getAttribute("aria-controls")).hidden = !on;
  }
}

const tabs = [...document.querySelectorAll("[role=tab]")];
for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    select(next);
    next.focus();
  });
}

try {
  const { data } = await call("GET", "/v1/models");
  const [{ id, max_model_len: most }] = data;
  chat.connect(id);
  needle.connect(id);
  sessions.connect(async (name) => {
    select(tabs[0]);
    await chat.open(name);
  }, chat.currentName);
  const { profile } = await call("GET", "/sessions");
  element("model").textContent = `${id}, profile ${profile}, up to ${most.toLocaleString("en")} tokens`;
  for (const option of element("needle-context").options) option.disabled = Number(option.value) > most;
  await sessions.refresh();
  element("prompt").focus();
  setInterval(() => { if (!document.hidden) sessions.refresh().catch(() => {}); }, REFRESH_MS);
} catch (error) {
  show(error);
}
