// The microphone as pages of Ogg-Opus: the browser's own encoder, and the pages of ogg.js around it.

import { OggWriter, opusHead } from "./ogg.js";

const PACKETS_PER_PAGE = 2; // of 20 ms: one message each 40 ms, as moshi's own page sends them
const PIECES_PER_LEVEL = 5; // a level each 100 ms
const OPUS = { codec: "opus", numberOfChannels: 1, bitrate: 32000, opus: { application: "voip", frameDuration: 20000 } };
const SOUND = { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true };

// Why there is no microphone, in one sentence for people.
export class NoMicrophone extends Error {}

export class Microphone {
  // Asks for the microphone, so call it when somebody has pressed a button. Throws NoMicrophone.
  static async open() {
    if (!window.isSecureContext) {
      throw new NoMicrophone("A browser gives a page the microphone only over HTTPS or on this computer (localhost).");
    }
    if (!navigator.mediaDevices?.getUserMedia || !window.AudioEncoder || !window.AudioWorkletNode) {
      throw new NoMicrophone("This browser cannot record Opus: a current Chrome, Edge, Firefox or Safari can.");
    }
    const stream = await navigator.mediaDevices.getUserMedia({ audio: SOUND }).catch((error) => {
      throw new NoMicrophone(reasonOf(error));
    });
    const microphone = new Microphone(stream);
    try {
      await microphone.prepare();
    } catch (error) {
      microphone.close();
      throw error instanceof NoMicrophone ? error : new NoMicrophone(`The microphone cannot be used: ${error.message}.`);
    }
    return microphone;
  }

  constructor(stream) {
    this.stream = stream;
    this.loudest = this.pieces = 0;
    this.onlevel = () => {};
    this.onend = () => {};
    const [track] = stream.getAudioTracks();
    track.onended = () => this.onend("The microphone was taken away.");
  }

  async prepare() {
    this.context = new AudioContext();
    this.rate = this.context.sampleRate;
    const { supported } = await AudioEncoder.isConfigSupported({ ...OPUS, sampleRate: this.rate });
    if (!supported) {
      await this.context.close();
      this.context = new AudioContext({ sampleRate: 48000 });
      this.rate = 48000;
    }
    await this.context.audioWorklet.addModule(new URL("worklet_capture.js", import.meta.url));
    this.node = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
    this.node.port.onmessage = ({ data }) => this.hear(data);
    this.context.createMediaStreamSource(this.stream).connect(this.node);
    await this.context.resume();
  }

  // From now on `send` is called with the pages of a new stream, the headers first.
  begin(send) {
    this.end();
    this.send = send;
    this.samples = 0;
    this.writer = null;
    this.packets = [];
    this.encoder = new AudioEncoder({
      output: (chunk, metadata) => this.takePacket(chunk, metadata),
      error: (error) => this.onend(`The browser's Opus encoder failed: ${error.message}.`),
    });
    this.encoder.configure({ ...OPUS, sampleRate: this.rate });
  }

  hear(piece) {
    this.loudest = piece.reduce((most, sample) => Math.max(most, Math.abs(sample)), this.loudest);
    if (++this.pieces % PIECES_PER_LEVEL === 0) {
      this.onlevel(this.loudest);
      this.loudest = 0;
    }
    if (this.encoder?.state !== "configured") return;
    const timestamp = Math.round((this.samples / this.rate) * 1e6);
    this.samples += piece.length;
    const shape = { format: "f32-planar", sampleRate: this.rate, numberOfFrames: piece.length, numberOfChannels: 1 };
    const sound = new AudioData({ ...shape, timestamp, data: piece });
    this.encoder.encode(sound);
    sound.close();
  }

  takePacket(chunk, metadata) {
    if (!this.send) return; // ended, with a packet still on its way
    const packet = new Uint8Array(chunk.byteLength);
    chunk.copyTo(packet);
    if (!this.writer) {
      this.writer = new OggWriter();
      const description = metadata?.decoderConfig?.description;
      this.send(this.writer.begin(description ? bytesOf(description) : opusHead(312, this.rate)));
    }
    this.packets.push(packet);
    if (this.packets.length === PACKETS_PER_PAGE) this.send(this.writer.write(this.packets.splice(0)));
  }

  end() {
    this.send = null;
    if (this.encoder && this.encoder.state !== "closed") this.encoder.close();
    this.encoder = null;
  }

  close() {
    this.end();
    this.onlevel = this.onend = () => {};
    for (const track of this.stream.getTracks()) track.stop();
    this.context?.close();
  }
}

function bytesOf(buffer) {
  return ArrayBuffer.isView(buffer)
    ? new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.byteLength)
    : new Uint8Array(buffer);
}

function reasonOf(error) {
  const reasons = {
    NotAllowedError: "The browser was not allowed to use the microphone: allow it beside the address, then start again.",
    NotFoundError: "This computer has no microphone that the browser can see.",
    NotReadableError: "The microphone is used by another program, or the system does not let the browser have it.",
  };
  return reasons[error.name] ?? `The microphone cannot be used: ${error.message || error.name}.`;
}
