// Plays pieces of sound in their order. Waits for a little more of it after a gap, and never falls far behind.

const START_S = 0.12; // heard before playing begins: packets do not come evenly
const MOST_S = 1.5; // more than this waits: the oldest is left out
const KEPT_S = 0.3; // ... until this much is left
const REPORT_S = 0.1;

class Play extends AudioWorkletProcessor {
  constructor() {
    super();
    this.pieces = [];
    this.at = 0; // within the first piece, in its samples
    this.waiting = 0; // seconds
    this.playing = false;
    this.loudest = 0;
    this.sinceReport = 0;
    this.port.onmessage = ({ data }) => this.add(data);
  }

  add(piece) {
    if (piece === "clear") {
      this.pieces = [];
      this.at = this.waiting = 0;
      this.playing = false;
      return;
    }
    this.pieces.push(piece);
    this.waiting += piece.samples.length / piece.rate;
    if (this.waiting > MOST_S) while (this.waiting > KEPT_S && this.pieces.length > 1) this.leaveFirst();
  }

  leaveFirst() {
    const { samples, rate } = this.pieces.shift();
    this.waiting = Math.max(0, this.waiting - (samples.length - this.at) / rate);
    this.at = 0;
  }

  process(_, [channels]) {
    const [out] = channels;
    if (this.waiting >= START_S) this.playing = true;
    for (let index = 0; index < out.length && this.playing; index++) out[index] = this.next();
    for (const other of channels.slice(1)) other.set(out);
    for (const sample of out) this.loudest = Math.max(this.loudest, Math.abs(sample));
    this.sinceReport += out.length / sampleRate;
    if (this.sinceReport >= REPORT_S) {
      this.port.postMessage(this.loudest);
      this.loudest = this.sinceReport = 0;
    }
    return true;
  }

  // The next sample; between two of them when sound and speaker differ in rate.
  next() {
    const { samples, rate } = this.pieces[0];
    const before = Math.floor(this.at);
    const after = samples[Math.min(before + 1, samples.length - 1)];
    const sample = samples[before] + (after - samples[before]) * (this.at - before);
    this.at += rate / sampleRate;
    this.waiting -= 1 / sampleRate;
    if (this.at >= samples.length) {
      const over = this.at - samples.length;
      this.pieces.shift();
      this.at = this.pieces.length ? over : 0;
      if (!this.pieces.length) {
        this.waiting = 0;
        this.playing = false;
      }
    }
    return sample;
  }
}

registerProcessor("play", Play);
