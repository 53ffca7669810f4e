/* Pictures that follow the typing, over the server's WebSocket; and one line for as long as it does not answer. */
(() => {
  "use strict";
  const RETRY = 1000, SILENCE = 15000;
  const SETTLED = 1500; // the first picture shares the machine with the page's own start: time another
  const sent = new Map(); // what and when, by the number of the message
  const clocks = new WeakMap(); // when they began
  let socket, number = 0, heard = 0;

  const find = (selector) => document.querySelector(selector);
  const settings = "#prompt, #seed, #lock, #steps, #model";

  function connect() {
    const address = new URL("/v1/images/live", location.href);
    address.protocol = address.protocol.replace("http", "ws");
    socket = new WebSocket(address, ["fewstep"]);
    socket.onopen = () => { answers(true); draw(); setTimeout(draw, SETTLED); };
    socket.onmessage = (event) => show(JSON.parse(event.data));
    socket.onclose = () => { sent.clear(); answers(false); setTimeout(connect, RETRY); };
  }

  function answers(yes) {
    document.body.classList.toggle("alone", !yes);
    if (!yes) for (const clock of document.querySelectorAll(".clock")) {
      clock.textContent = "no answer";
      clock.classList.remove("clock");
    }
    const line = find("#unanswered");
    if (!line) return;
    line.hidden = yes;
    line.textContent = yes ? "" : "The server does not answer: start it again with `fewstep demo`, and this page goes on.";
  }

  function draw() {
    const prompt = find("#prompt :is(input, textarea)")?.value.trim();
    if (!prompt || socket?.readyState !== WebSocket.OPEN) return;
    const steps = find("#steps input"), seed = find("#seed input").value;
    const wishes = { prompt, id: ++number };
    if (steps) wishes.num_inference_steps = Number(steps.dataset.counts.split(" ")[steps.value]);
    if (find("#lock input").checked && seed !== "") wishes.seed = Number(seed);
    const model = find("#model input")?.value;
    if (model) wishes.model = model;
    sent.set(number, { prompt, at: performance.now() });
    socket.send(JSON.stringify(wishes));
  }

  async function show(answer) {
    const asked = sent.get(answer.id);
    for (const earlier of sent.keys()) if (earlier <= answer.id) sent.delete(earlier); // dropped: a newer one came
    if (answer.id < heard) return;
    heard = answer.id;
    answers(true);
    tell(find("#live-fault"), answer.error ? answer.error.message : "");
    if (answer.error) return;
    const picture = find("#live-picture");
    picture.src = `data:image/png;base64,${answer.b64_json}`;
    picture.hidden = false;
    for (const button of document.querySelectorAll(".live button")) button.disabled = false;
    if (!find("#lock input").checked) set(find("#seed input"), answer.seed);
    picture.dataset.file = fileName(asked.prompt, answer.seed);
    await picture.decode().catch(() => {});
    await new Promise(requestAnimationFrame);
    const seconds = performance.now() - asked.at;
    find("#live-milliseconds").textContent = `${answer.milliseconds.toFixed(1)} ms`;
    const facts = [`${seconds.toFixed(0)} ms from the key to the screen`, `seed ${answer.seed}`];
    find("#live-facts").replaceChildren(...facts.map((fact) => Object.assign(document.createElement("li"), { textContent: fact })));
  }

  function tell(line, sentence) {
    line.textContent = sentence;
    line.hidden = !sentence;
  }

  function set(field, value) {
    if (!field || field.value === String(value)) return;
    field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true })); // for Gradio; it is no key of a person
  }

  function fileName(prompt, seed) {
    const words = prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60);
    return `${words || "picture"}-${seed}.png`;
  }

  function save(picture, name) {
    Object.assign(document.createElement("a"), { href: picture.src, download: name }).click();
  }

  document.addEventListener("input", (event) => {
    if (!event.isTrusted || !event.target.closest(settings)) return;
    const { counts } = event.target.dataset;
    if (counts) find("#steps output").textContent = counts.split(" ")[event.target.value];
    draw();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.prompt) {
      set(find("#prompt :is(input, textarea)"), button.dataset.prompt);
      draw();
    } else if (button?.dataset.file) {
      save(button.querySelector("img"), button.dataset.file);
    } else if (button?.closest(".live")) {
      const picture = find("#live-picture");
      save(picture, picture.dataset.file);
    } else if (event.target.closest("#model")) {
      setTimeout(draw, 200); // Gradio's list has no field that changes
    }
  });

  setInterval(() => {
    const now = performance.now();
    for (const clock of document.querySelectorAll(".clock")) {
      if (!clocks.has(clock)) clocks.set(clock, now);
      clock.textContent = `${Math.round(now - clocks.get(clock)).toLocaleString("en")} ms`;
    }
    const [oldest] = sent.values();
    if (oldest && now - oldest.at > SILENCE) answers(false);
  }, 50);

  const ready = setInterval(() => { // Gradio makes the page after this has run
    if (find("#prompt :is(input, textarea)") && find("#unanswered") && find("#live-picture")) {
      clearInterval(ready);
      (window.requestIdleCallback ?? setTimeout)(connect); // after all that the page loads; Safari has none
    }
  }, 20);
})();
