// The memory of the person who speaks, live: one card per layer, and what a step of the model takes.

const POINTS = 120; // of the curve: two minutes at one a second
const [WIDTH, HEIGHT] = [240, 48];
const FRAME_MS = 80;

export class MemoryView {
  // `template` is the <template> of a card.
  constructor(list, template, summary) {
    Object.assign(this, { list, template, summary });
    this.cards = new Map();
  }

  show({ layers: given, updates = true, step_ms, waiting_frames, dropped_frames }) {
    const layers = Array.isArray(given) ? given : [];
    for (const layer of layers) this.card(layer.layer).show(layer);
    const said = [];
    if (layers.length === 0) said.push("This model has no memory.");
    else said.push(updates ? "The memory is learning." : "The memory is held as it is.");
    if (Number.isFinite(step_ms)) said.push(`A step takes ${step_ms.toFixed(0)} of ${FRAME_MS} ms.`);
    if (waiting_frames > 1) said.push(`${waiting_frames} frames wait.`);
    if (dropped_frames > 0) said.push(`${dropped_frames} frames were left out.`);
    this.summary.textContent = said.join(" ");
  }

  card(layer) {
    if (!this.cards.has(layer)) {
      const card = new Card(this.template, layer);
      this.cards.set(layer, card);
      this.list.append(card.element);
    }
    return this.cards.get(layer);
  }

  clear(text) {
    this.cards.clear();
    this.list.replaceChildren();
    this.summary.textContent = text;
  }
}

class Card {
  constructor(template, layer) {
    this.element = template.content.cloneNode(true).firstElementChild;
    this.part = (name) => this.element.querySelector(`[data-part="${name}"]`);
    this.part("name").textContent = `Layer ${layer}`;
    this.part("chunk").setAttribute("aria-label", `Layer ${layer}: how much of the chunk is heard`);
    this.part("known").setAttribute("aria-label", `Layer ${layer}: share of the last chunk that was known`);
    this.history = [];
  }

  show({ relative_delta: delta, known, chunk_filled: filled }) {
    this.part("delta").textContent = Number.isFinite(delta) ? `${(delta * 100).toPrecision(3)} %` : "–";
    setMeter(this.part("chunk"), filled);
    this.part("known-row").hidden = !Number.isFinite(known);
    setMeter(this.part("known"), known);
    if (!Number.isFinite(delta)) return;
    this.history = [...this.history, delta].slice(-POINTS);
    const most = Math.max(...this.history, 1e-12);
    const points = this.history.map((value, index) => {
      const x = (index / (POINTS - 1)) * WIDTH;
      const y = HEIGHT - 2 - (value / most) * (HEIGHT - 4);
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    });
    this.part("curve").setAttribute("points", points.join(" "));
  }
}

// A meter is an element with the role and, in it, the bar. `value` is from 0 to 1.
export function setMeter(meter, value) {
  const percent = Math.round(100 * Math.min(1, Math.max(0, value || 0)));
  meter.setAttribute("aria-valuenow", percent);
  meter.setAttribute("aria-valuetext", `${percent} %`);
  meter.firstElementChild.style.inlineSize = `${percent}%`;
}
