// Talking to the server: JSON, its errors, and server-sent events.

const storage = "kvfold-key";
const element = (id) => document.getElementById(id);

export class Refused extends Error {}

function headers() {
  const key = sessionStorage.getItem(storage);
  const known = { "Content-Type": "application/json" };
  return key ? { ...known, Authorization: `Bearer ${key}` } : known;
}

// Resolves when a key was given; several requests that were refused wait for the same dialog.
let asking = null;
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = element("key-dialog");
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(storage, element("key").value);
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

async function send(method, path, body, signal) {
  const options = { method, headers: headers(), signal };
  if (body !== undefined) options.body = JSON.stringify(body);
  const response = await fetch(path, options);
  if (response.status === 401) {
    await askForKey();
    return send(method, path, body, signal);
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => null);
    throw new Refused(problem?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

export async function call(method, path, body) {
  return (await send(method, path, body)).json();
}

// Yields what each event holds, and {progress: "…"} for the comments that come while a prompt is read.
export async function* events(path, body, signal) {
  const response = await send("POST", path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith(":")) yield { progress: part.slice(1).trim() };
      else if (part !== "data: [DONE]") {
        const data = JSON.parse(part.slice("data: ".length));
        if (data.error) throw new Refused(data.error.message);
        yield data;
      }
    }
  }
}

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  for (; n >= 1024 && i < units.length - 1; i++) n /= 1024;
  return `${n.toFixed(i && n < 100 ? 1 : 0)} ${units[i]}`;
}

export function show(error) {
  const place = element("problem");
  place.hidden = !error;
  place.textContent = error ? String(error.message ?? error) : "";
}
