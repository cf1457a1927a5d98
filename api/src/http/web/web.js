"use strict";
// The web console: a client of the API, like any other. What it shows is what the API says; nothing of that is ever
// taken for HTML.

const $ = (id) => document.getElementById(id);
const instances = new Map();
const images = new Map();
let shown = null; // Id of the instance on the page.
let following = null; // Ends the console that is followed.

const token = () => sessionStorage.getItem("token");
const headers = () => (token() ? { Authorization: "Bearer " + token() } : {});

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function tell(text) {
  $("message").textContent = text;
}

class Refused extends Error {}

async function request(method, path, body) {
  const asked = { method, headers: headers() };
  if (body !== undefined) {
    asked.headers["Content-Type"] = "application/json";
    asked.body = JSON.stringify(body);
  }
  const answer = await fetch(path, asked);
  if (!answer.ok) {
    const refusal = await answer.json().catch(() => ({}));
    if (answer.status === 401) leave();
    throw new Refused(refusal.error ? refusal.error.message : answer.statusText);
  }
  return answer;
}

const get = async (path) => (await request("GET", path)).json();

async function act(method, path, body) {
  try {
    tell("");
    const answer = await request(method, path, body);
    const changed = await answer.json().catch(() => null);
    for (const instance of changed && changed.instances ? changed.instances : [changed]) {
      if (instance && instance.interface) instances.set(instance.id, instance);
    }
    draw();
  } catch (error) {
    tell(error.message);
  }
}

function leave() {
  sessionStorage.removeItem("token");
  for (const id of ["list", "one", "leave"]) $(id).hidden = true;
  $("login").hidden = false;
}

// Lists.

async function everything() {
  instances.clear();
  let next = "";
  do {
    const page = await get("/v1/instances" + (next ? "?next_token=" + encodeURIComponent(next) : ""));
    page.items.forEach((instance) => instances.set(instance.id, instance));
    next = page.next_token;
  } while (next);
  images.clear();
  (await get("/v1/images")).items.forEach((image) => images.set(image.id, image));
  draw();
}

function button(text, does, confirmation) {
  const made = element("button", text, { type: "button" });
  made.addEventListener("click", () => {
    if (!confirmation || confirm(confirmation)) does();
  });
  return made;
}

function buttons(instance) {
  const path = "/v1/instances/" + instance.id;
  const made = [];
  if (instance.state === "running" || instance.state === "pending")
    made.push(button("Stop", () => act("POST", path + "/stop", {})));
  if (instance.state === "stopped") made.push(button("Start", () => act("POST", path + "/start")));
  if (instance.state === "running") made.push(button("Reboot", () => act("POST", path + "/reboot")));
  if (instance.state !== "terminated" && instance.state !== "shutting-down")
    made.push(
      button("Terminate", () => act("DELETE", path), `Terminate ${instance.id}, with its root disk, for good?`)
    );
  return made;
}

function row(cells) {
  const made = element("tr");
  for (const cell of cells) {
    const td = element("td");
    td.append(...(Array.isArray(cell) ? cell : [cell]));
    made.append(td);
  }
  return made;
}

const stateOf = (state) => element("span", state, { class: state });

function drawLists() {
  const sorted = [...instances.values()].sort((a, b) => (a.launch_time < b.launch_time ? 1 : -1));
  $("instances").replaceChildren(
    ...sorted.map((instance) =>
      row([
        element("a", instance.id, { href: "#" + instance.id }),
        instance.tags.Name || "",
        stateOf(instance.state),
        stateOf(instance.status.agent),
        instance.interface.private_address,
        instance.instance_type,
        buttons(instance),
      ])
    )
  );
  const all = [...images.values()];
  $("images").replaceChildren(
    ...all.map((image) => row([image.name, stateOf(image.state), (image.size / 1048576).toFixed(0) + " MiB"]))
  );
  const chosen = $("image").value;
  $("image").replaceChildren(
    ...all.filter((image) => image.state === "available").map((image) => element("option", image.name))
  );
  if (chosen) $("image").value = chosen;
}

// One instance.

function drawOne(instance) {
  $("one-id").textContent = instance.id;
  $("actions").replaceChildren(...buttons(instance));
  const facts = {
    Name: instance.tags.Name,
    State: instance.state,
    "Because": instance.state_reason && instance.state_reason.message,
    Agent: instance.status.agent,
    Address: instance.interface.private_address,
    Type: `${instance.instance_type} (${instance.vcpus} vCPU, ${instance.memory_mib} MiB)`,
    Image: (images.get(instance.image_id) || { name: instance.image_id }).name,
    Launched: instance.launch_time,
  };
  $("facts").replaceChildren(
    ...Object.entries(facts)
      .filter(([, value]) => value)
      .flatMap(([name, value]) => [element("dt", name), element("dd", value)])
  );
  drawBoot(instance.boot);
}

// Bars from the end of the phase before to the end of each, in milliseconds since the request.
function drawBoot(boot) {
  const names = { disks_us: "disks", network_us: "network", vmm_us: "VMM answers", started_us: "boots", agent_us: "agent answers" };
  const ends = Object.entries(names).filter(([key]) => boot && boot[key] != null);
  if (!ends.length) {
    $("boot").replaceChildren(element("p", "Not known of this boot."));
    return;
  }
  const svgElement = (name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text) made.textContent = text;
    return made;
  };
  const total = Math.max(...ends.map(([key]) => boot[key])) || 1;
  const svg = svgElement("svg", { width: 700, height: ends.length * 24, role: "img", "aria-label": "boot by phase" });
  let before = 0;
  ends.forEach(([key, name], index) => {
    const [from, to] = [before, Math.max(before, boot[key])];
    const y = index * 24;
    svg.append(svgElement("text", { x: 0, y: y + 16 }, name));
    svg.append(svgElement("rect", { x: 110 + (from / total) * 460, y: y + 4, width: Math.max(1, ((to - from) / total) * 460), height: 16 }));
    svg.append(svgElement("text", { x: 580, y: y + 16 }, `+${((to - from) / 1000).toFixed(1)} ms`));
    before = to;
  });
  const sum = element("p", `${(total / 1000).toFixed(1)} ms from the request on`);
  $("boot").replaceChildren(svg, sum);
}

async function follow(id) {
  if (following) following.abort();
  following = new AbortController();
  const { signal } = following;
  const screen = $("console");
  screen.textContent = "";
  try {
    const answer = await fetch(`/v1/instances/${id}/console?follow=true`, { headers: headers(), signal });
    if (!answer.ok) return;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const down = screen.scrollTop + screen.clientHeight >= screen.scrollHeight - 4;
      // A serial line's escape sequences mean nothing here.
      screen.append(value.replace(/\x1b\[[0-9;?]*[A-Za-z]|\r/g, ""));
      if (screen.textContent.length > 400000) screen.textContent = screen.textContent.slice(-200000);
      if (down) screen.scrollTop = screen.scrollHeight;
    }
  } catch (error) {
    if (!signal.aborted) tell("the console broke off: " + error.message);
  }
}

function draw() {
  const id = location.hash.slice(1);
  const instance = instances.get(id);
  $("list").hidden = Boolean(instance);
  $("one").hidden = !instance;
  if (instance) drawOne(instance);
  else drawLists();
  if (shown === (instance ? id : null)) return;
  shown = instance ? id : null;
  if (shown) follow(shown);
  else if (following) following.abort();
}

// What happens.

const lists = { instance: [instances, "/v1/instances/"], image: [images, "/v1/images/"] };

async function refresh(event) {
  if (!lists[event.kind]) return;
  const [map, path] = lists[event.kind];
  if (event.state === undefined) map.delete(event.id);
  else {
    try {
      map.set(event.id, await get(path + event.id));
    } catch (error) {
      map.delete(event.id);
    }
  }
  draw();
}

async function events() {
  while (token()) {
    try {
      const answer = await request("GET", "/v1/events");
      await everything();
      tell("");
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        text += value;
        const parts = text.split("\n\n");
        text = parts.pop();
        for (const part of parts) {
          const field = (name) => (part.match(new RegExp(`^${name}: ?(.*)$`, "m")) || [])[1];
          if (field("event") === "lost") await everything();
          else if (field("data")) await refresh(JSON.parse(field("data")));
        }
      }
    } catch (error) {
      if (!token()) return;
      tell("the daemon is not reached: " + error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

// States change with an event; whether an agent answers does not.
async function watch() {
  while (token()) {
    try {
      const host = await get("/v1/host");
      const { used, capacity } = host;
      $("host").textContent =
        `${used.vcpus} of ${capacity.vcpus} vCPUs, ${used.memory_mib} of ${capacity.memory_mib} MiB` +
        (host.cordoned ? ", cordoned" : "");
      const unsure = [...instances.values()].filter(
        (instance) => instance.state === "running" && (instance.status.agent !== "ok" || instance.id === shown)
      );
      for (const instance of unsure.slice(0, 20)) await refresh({ kind: "instance", id: instance.id, state: "" });
    } catch (error) {
      // The one who listens for events says so.
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

async function enter() {
  $("login").hidden = true;
  $("leave").hidden = false;
  try {
    const types = await get("/v1/instance-types");
    $("type").replaceChildren(...types.items.map((type) => element("option", type.name)));
    $("type").value = "micro";
  } catch (error) {
    tell(error.message);
    if (!token()) return;
  }
  events();
  watch();
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value.trim());
  $("token").value = "";
  tell("");
  enter();
});
$("leave").addEventListener("click", () => {
  leave();
  location.reload();
});
$("run").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim();
  const body = { image: $("image").value, instance_type: $("type").value, tags: name ? { Name: name } : {} };
  act("POST", "/v1/instances", body);
});
addEventListener("hashchange", draw);
if (token()) enter();
else leave();
