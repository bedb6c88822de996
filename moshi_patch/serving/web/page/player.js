// What the server says, from Ogg-Opus to the speaker.

import { OggReader, isHeader, opusHead } from "./ogg.js";

const RATE = 48000; // Opus is decoded at this rate

export class Player {
  // Call it when somebody has pressed a button: a browser lets no page sound by itself.
  static async open() {
    const player = new Player();
    player.context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
    await player.context.audioWorklet.addModule(new URL("worklet_play.js", import.meta.url));
    player.node = new AudioWorkletNode(player.context, "play", { numberOfInputs: 0, outputChannelCount: [1] });
    player.node.port.onmessage = ({ data }) => player.onlevel(data);
    player.node.connect(player.context.destination);
    await player.context.resume();
    return player;
  }

  constructor() {
    this.onlevel = () => {};
  }

  // A new stream begins.
  begin() {
    this.end();
    this.reader = new OggReader();
    this.timestamp = 0;
    this.decoder = this.newDecoder();
  }

  newDecoder() {
    const decoder = new AudioDecoder({
      output: (sound) => this.play(sound),
      error: () => {}, // a packet that is no Opus; the next one gets a new decoder
    });
    decoder.configure({ codec: "opus", sampleRate: RATE, numberOfChannels: 1, description: opusHead() });
    return decoder;
  }

  hear(bytes) {
    for (const data of this.reader?.read(bytes) ?? []) {
      if (isHeader(data)) continue;
      if (this.decoder.state === "closed") this.decoder = this.newDecoder();
      this.decoder.decode(new EncodedAudioChunk({ type: "key", timestamp: this.timestamp, data }));
      this.timestamp += 20000;
    }
  }

  play(sound) {
    const samples = new Float32Array(sound.numberOfFrames);
    sound.copyTo(samples, { planeIndex: 0, format: "f32-planar" });
    const rate = sound.sampleRate;
    sound.close();
    this.node.port.postMessage({ samples, rate }, [samples.buffer]);
  }

  end() {
    if (this.decoder && this.decoder.state !== "closed") this.decoder.close();
    this.decoder = this.reader = null;
    this.node.port.postMessage("clear");
  }

  close() {
    this.end();
    this.onlevel = () => {};
    this.context.close();
  }
}
