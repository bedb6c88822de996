// One conversation over a websocket, in moshi's protocol: the first byte of a message says what it is.

const HANDSHAKE = 0;
const SOUND = 1;
const TEXT = 2;
const METADATA = 4;
const ERROR = 5;
const SILENCE_MS = 10000; // after the handshake; a server sends something each second
const MOST_WAITING_BYTES = 64 * 1024; // sound that a slow network has not taken yet; 16 s of it

export class Connection {
  // `events`: ready(), sound(bytes), text(string), memory(object), place(number), closed(code, reason).
  constructor(ticket, events) {
    const url = new URL("api/chat", document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    url.searchParams.set("metadata", "1");
    if (ticket) url.searchParams.set("ticket", ticket);
    this.events = events;
    this.text = new TextDecoder();
    this.reason = "";
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.take(data);
    this.socket.onclose = ({ code, reason }) => this.end(code, reason || this.reason);
  }

  // A network that is gone closes no connection: who hears nothing for long takes it as lost.
  watch() {
    this.heard = Date.now();
    this.watchdog = setInterval(() => {
      if (Date.now() - this.heard < SILENCE_MS) return;
      this.close();
      this.end(1006, "");
    }, 1000);
  }

  end(code, reason) {
    clearInterval(this.watchdog);
    this.events.closed(code, reason);
  }

  take(data) {
    if (!(data instanceof ArrayBuffer) || data.byteLength === 0) return;
    this.heard = Date.now();
    const bytes = new Uint8Array(data, 1);
    switch (new Uint8Array(data)[0]) {
      case HANDSHAKE:
        if (!this.watchdog) this.watch();
        return this.events.ready();
      case SOUND:
        return this.events.sound(bytes);
      case TEXT:
        return this.events.text(this.text.decode(bytes));
      case METADATA:
        return this.takeMetadata(bytes);
      case ERROR:
        this.reason = this.text.decode(bytes);
    }
  }

  takeMetadata(bytes) {
    let message;
    try {
      message = JSON.parse(this.text.decode(bytes));
    } catch {
      return; // another server's metadata
    }
    if (message?.type === "memory") this.events.memory(message);
    if (message?.type === "queue") this.events.place(message.place);
  }

  sendSound(page) {
    if (this.socket.bufferedAmount < MOST_WAITING_BYTES) this.send(SOUND, page);
  }

  // What a button does: {"updates": false} or {"forget": true}.
  sendWish(wish) {
    this.send(METADATA, new TextEncoder().encode(JSON.stringify(wish)));
  }

  send(kind, bytes) {
    if (this.socket.readyState !== WebSocket.OPEN) return;
    const message = new Uint8Array(1 + bytes.length);
    message[0] = kind;
    message.set(bytes, 1);
    this.socket.send(message);
  }

  close() {
    clearInterval(this.watchdog);
    this.socket.onmessage = this.socket.onclose = null;
    this.socket.close(1000, "the person ended it");
  }
}
