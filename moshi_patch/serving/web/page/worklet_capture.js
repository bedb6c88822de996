// Gathers what the microphone hears into pieces of 20 ms, mono, and posts them.

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Float32Array(Math.round(sampleRate / 50));
    this.filled = 0;
  }

  process([channels]) {
    const block = channels[0];
    if (!block) return true; // nothing is connected for the moment
    for (let at = 0; at < block.length; ) {
      const taken = Math.min(block.length - at, this.piece.length - this.filled);
      this.piece.set(block.subarray(at, at + taken), this.filled);
      this.filled += taken;
      at += taken;
      if (this.filled === this.piece.length) {
        this.port.postMessage(this.piece, [this.piece.buffer]);
        this.piece = new Float32Array(Math.round(sampleRate / 50));
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("capture", Capture);
