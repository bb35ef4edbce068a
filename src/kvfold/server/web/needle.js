// Facts hidden in a long text, asked for one after the other; the text is read once.

import { call, events, show } from "./api.js";
import { refresh } from "./sessions.js";

const element = (id) => document.getElementById(id);
let model = "";

export function connect(id) {
  model = id;
  element("needle-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    element("needle-start").disabled = true;
    show(null);
    try {
      await seek(Number(element("needle-context").value));
    } catch (error) {
      show(error);
      say("");
    } finally {
      element("needle-start").disabled = false;
      refresh().catch(show);
    }
  });
}

function say(text) {
  element("needle-status").textContent = text;
}

async function seek(context) {
  element("needles").replaceChildren();
  element("haystack").hidden = true;
  say("Hiding five facts…");
  const { document: text, needles } = await call("POST", "/needle", { context, seed: Math.floor(Math.random() * 1e6) });
  element("haystack").replaceChildren(...needles.map(() => document.createElement("i")));
  element("haystack").hidden = false;
  let found = 0;
  for (const [i, needle] of needles.entries()) {
    const mark = element("haystack").children[i];
    mark.style.left = `${100 * needle.depth}%`;
    const verdict = await one(text, needle);
    mark.className = verdict ? "found" : "missed";
    found += verdict;
  }
  say(`${found} of ${needles.length} facts found in ${text.length.toLocaleString("en")} tokens.`);
}

function item(needle) {
  const made = document.createElement("li");
  const question = document.createElement("div");
  question.textContent = needle.question;
  const answer = document.createElement("strong");
  const note = document.createElement("div");
  note.className = "quiet";
  question.append(" ", answer);
  const verdict = document.createElement("span");
  verdict.className = "verdict";
  made.append(question, verdict, note);
  element("needles").append(made);
  return { made, answer, verdict, note };
}

async function one(text, needle) {
  const { made, answer, verdict, note } = item(needle);
  const body = { model, prompt: [...text, ...needle.question_ids], max_tokens: needle.answer_tokens, temperature: 0 };
  const began = performance.now();
  let usage = null;
  for await (const data of events("/v1/completions", body)) {
    if (data.progress) say(`Reading: ${data.progress} tokens`);
    answer.textContent += data.choices?.[0]?.text ?? "";
    usage = data.usage ?? usage;
  }
  const right = answer.textContent === needle.answer;
  made.className = right ? "found" : "missed";
  verdict.textContent = right ? "Found" : `Missed; it was ${needle.answer}`;
  const cached = usage.prompt_tokens_details.cached_tokens;
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  note.textContent = `at ${Math.round(100 * needle.depth)} % of the text, ${seconds} s, ${cached.toLocaleString("en")} tokens read before`;
  return right;
}
