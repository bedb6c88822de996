// The page: what its buttons do, and what it says about where the conversation stands.

import { Connection } from "./connection.js";
import { fetchTicket, forgetToken, hasToken, NeedsToken, setToken } from "./identity.js";
import { MemoryView, setMeter } from "./memory_view.js";
import { Microphone, NoMicrophone } from "./microphone.js";
import { Player } from "./player.js";
import { ending, mayComeBack } from "./sentences.js";
import { Transcript } from "./transcript.js";

const TRIES = 6; // after a lost connection; half a second before the first, each wait twice as long
const FIRST_WAIT_MS = 500;
const NO_NAMES = "This server knows no names: if it keeps a memory, a new person goes on with it.";
const NOTHING_YET = "It is shown here while you talk.";

const part = (id) => document.getElementById(id);
const transcript = new Transcript(part("text"), part("spoken"));
const memory = new MemoryView(part("layers"), part("layer"), part("memory-summary"));

// `phase`: "idle", "starting" (asked for the microphone, connecting, in the queue) or "talking".
// `round` counts starts and stops; `hasNames`: whether the server gives tickets.
const state = { phase: "idle", updates: true, tries: 0, round: 0, hasNames: true };
Object.assign(state, { microphone: null, player: null, connection: null });

function say(sentence, isProblem = false) {
  part("status").textContent = isProblem ? "" : sentence;
  part("problem").textContent = isProblem ? sentence : "";
}

function show(phase) {
  state.phase = phase;
  document.body.dataset.phase = phase;
  part("talk").textContent = phase === "idle" ? "Start talking" : "Stop";
  const isOff = phase !== "talking";
  for (const id of ["updates", "forget"]) part(id).disabled = isOff;
  part("updates").setAttribute("aria-pressed", String(state.updates));
}

async function start() {
  const round = ++state.round; // whatever an earlier start still waits for is void
  const isOver = () => round !== state.round;
  state.updates = true;
  state.tries = 0;
  show("starting");
  say("Waiting for the microphone …");
  try {
    const microphone = await Microphone.open();
    if (isOver()) return microphone.close();
    state.microphone = microphone;
    microphone.onlevel = (level) => setMeter(part("heard"), Math.sqrt(level));
    microphone.onend = (reason) => stop(reason, true);
    const player = await Player.open();
    if (isOver()) return player.close();
    state.player = player;
    player.onlevel = (level) => setMeter(part("said"), Math.sqrt(level));
    await connect(round);
  } catch (error) {
    if (!isOver()) fail(error);
  }
}

function fail(error) {
  stop(error.message, true);
  if (error instanceof NeedsToken) askForToken();
  else if (!(error instanceof NoMicrophone)) console.error(error);
}

async function connect(round) {
  say("Connecting …");
  const ticket = await fetchTicket();
  state.hasNames = ticket !== null;
  if (round !== state.round) return;
  state.connection = new Connection(ticket, {
    ready: () => beginTalk(),
    sound: (bytes) => state.player.hear(bytes),
    text: (text) => transcript.add(text),
    memory: (figures) => memory.show(figures),
    place: (place) => say(`All places are taken: you are number ${place} in the queue.`),
    closed: (code, reason) => ended(round, code, reason),
  });
}

function beginTalk() {
  state.tries = 0;
  state.player.begin();
  state.microphone.begin((page) => state.connection?.sendSound(page));
  if (!state.updates) state.connection.sendWish({ updates: false }); // as it was before the connection was lost
  show("talking");
  say("Connected: speak.");
}

function ended(round, code, reason) {
  if (round !== state.round) return;
  state.connection = null;
  state.microphone.end();
  state.player.end();
  if (!mayComeBack(code) || state.tries >= TRIES) return stop(ending(code, reason), code !== 1000);
  show("starting");
  say(`${ending(code, reason)} Trying again …`);
  const wait = FIRST_WAIT_MS * 2 ** state.tries++;
  setTimeout(() => {
    if (round !== state.round) return;
    connect(round).catch((error) => {
      if (round !== state.round) return;
      if (error instanceof NeedsToken) fail(error);
      else ended(round, 1006, ""); // no server yet
    });
  }, wait);
}

function stop(sentence, isProblem = false) {
  state.round += 1;
  for (const name of ["connection", "microphone", "player"]) {
    state[name]?.close();
    state[name] = null;
  }
  setMeter(part("heard"), 0);
  setMeter(part("said"), 0);
  show("idle");
  say(sentence, isProblem);
}

function askForToken() {
  part("token-form").hidden = false;
  part("token").focus();
}

part("talk").addEventListener("click", () => {
  if (state.phase === "idle") start();
  else stop("You ended the conversation.");
});

part("updates").addEventListener("click", () => {
  state.updates = !state.updates;
  state.connection?.sendWish({ updates: state.updates });
  show(state.phase);
});

part("forget").addEventListener("click", () => {
  part("forget-dialog").returnValue = ""; // Escape may leave the last one there
  part("forget-dialog").showModal();
});
part("forget-dialog").addEventListener("close", () => {
  if (part("forget-dialog").returnValue !== "forget" || state.phase !== "talking") return;
  state.connection.sendWish({ forget: true });
  transcript.clear();
  memory.clear(NOTHING_YET);
  say("What you said was forgotten.");
});

part("new-person").addEventListener("click", () => {
  const askedForToken = hasToken();
  stop(state.hasNames ? "A new person may start." : NO_NAMES);
  forgetToken();
  transcript.clear();
  memory.clear(NOTHING_YET);
  if (askedForToken) askForToken();
});

part("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setToken(part("token").value.trim());
  part("token").value = "";
  part("token-form").hidden = true;
  part("talk").focus();
  start();
});

window.addEventListener("pagehide", () => stop("You ended the conversation."));
memory.clear(NOTHING_YET);
show("idle");
say("Press the button and speak. Use headphones if you can.");
