// Opus packets into Ogg pages and back (RFC 3533, RFC 7845): one logical stream, one channel.
//
// A packet is a Uint8Array. Positions count samples at 48 kHz, whatever rate the sound has.

const CAPTURE = 0x5367674f; // "OggS", little endian
const HEADER_BYTES = 27;
const CONTINUED = 1;
const FIRST = 2;
const MAX_PACKET_BYTES = 1 << 20; // a server that never ends its packet must not fill the memory

const CRC_TABLE = new Uint32Array(256).map((_, index) => {
  let value = index << 24;
  for (let bit = 0; bit < 8; bit++) value = (value << 1) ^ (value < 0 ? 0x04c11db7 : 0);
  return value;
});

function checksum(bytes) {
  let value = 0;
  for (const byte of bytes) value = (value << 8) ^ CRC_TABLE[(value >>> 24) ^ byte];
  return value >>> 0;
}

// How long a packet plays, in samples at 48 kHz, from its first byte or two (RFC 6716, section 3.1).
export function packetSamples(packet) {
  const config = packet[0] >> 3;
  const shape = packet[0] & 3;
  const frames = shape === 0 ? 1 : shape === 3 ? packet[1] & 63 : 2;
  if (config >= 16) return frames * (120 << (config & 3)); // CELT: 2.5, 5, 10, 20 ms
  if (config >= 12) return frames * (480 << (config & 1)); // hybrid: 10, 20 ms
  return frames * [480, 960, 1920, 2880][config & 3]; // SILK: 10, 20, 40, 60 ms
}

export function opusHead(preSkip = 312, rate = 48000) {
  const head = new Uint8Array(19);
  const view = new DataView(head.buffer);
  head.set(new TextEncoder().encode("OpusHead"));
  head[8] = 1; // version
  head[9] = 1; // channels
  view.setUint16(10, preSkip, true);
  view.setUint32(12, rate, true);
  return head;
}

function opusTags() {
  const vendor = new TextEncoder().encode("browser");
  const tags = new Uint8Array(16 + vendor.length);
  tags.set(new TextEncoder().encode("OpusTags"));
  new DataView(tags.buffer).setUint32(8, vendor.length, true);
  tags.set(vendor, 12);
  return tags;
}

export class OggWriter {
  constructor(serial = (Math.random() * 2 ** 32) >>> 0) {
    this.serial = serial;
    this.sequence = 0;
    this.position = 0;
  }

  // The two pages that begin a stream. `head` is an OpusHead, as an encoder describes itself.
  begin(head) {
    return joined([this.page([head], 0, FIRST), this.page([opusTags()], 0, 0)]);
  }

  // One page with these packets, which must be fewer than 50 and shorter than a second each.
  write(packets) {
    for (const packet of packets) this.position += packetSamples(packet);
    return this.page(packets, this.position, 0);
  }

  page(packets, position, flags) {
    const lacing = packets.flatMap((packet) => [
      ...new Array(Math.floor(packet.length / 255)).fill(255),
      packet.length % 255,
    ]);
    const page = joined([new Uint8Array(HEADER_BYTES), Uint8Array.from(lacing), ...packets]);
    const view = new DataView(page.buffer);
    view.setUint32(0, CAPTURE, true);
    page[5] = flags;
    view.setBigUint64(6, BigInt(position), true);
    view.setUint32(14, this.serial, true);
    view.setUint32(18, this.sequence++, true);
    page[26] = lacing.length;
    view.setUint32(22, checksum(page), true);
    return page;
  }
}

// Takes bytes as they come, cut anywhere, and gives whole packets. Damage loses the page that it is in.
export class OggReader {
  constructor() {
    this.rest = new Uint8Array(0);
    this.partial = [];
  }

  read(bytes) {
    this.rest = joined([this.rest, bytes]);
    const packets = [];
    let at = 0;
    while (this.rest.length - at >= HEADER_BYTES) {
      const view = new DataView(this.rest.buffer, this.rest.byteOffset + at);
      const segments = this.rest[at + 26];
      const body = at + HEADER_BYTES + segments;
      if (view.getUint32(0, true) !== CAPTURE) {
        at += 1;
        continue;
      }
      if (this.rest.length < body) break;
      const lacing = this.rest.subarray(at + HEADER_BYTES, body);
      const end = body + lacing.reduce((sum, length) => sum + length, 0);
      if (this.rest.length < end) break;
      if (this.isWhole(at, end)) {
        this.takePage(this.rest[at + 5], lacing, body, packets);
        at = end;
      } else {
        this.partial = [];
        at += 1;
      }
    }
    this.rest = this.rest.slice(at);
    return packets;
  }

  isWhole(at, end) {
    const page = this.rest.slice(at, end);
    const view = new DataView(page.buffer);
    const stated = view.getUint32(22, true);
    view.setUint32(22, 0);
    return checksum(page) === stated;
  }

  takePage(flags, lacing, body, packets) {
    let broken = Boolean(flags & CONTINUED) && this.partial.length === 0; // its beginning was lost
    if (!(flags & CONTINUED)) this.partial = [];
    for (const length of lacing) {
      this.partial.push(this.rest.slice(body, body + length));
      body += length;
      if (this.partial.length * 255 > MAX_PACKET_BYTES) broken = true;
      if (length < 255) {
        if (!broken) packets.push(joined(this.partial));
        this.partial = [];
        broken = false;
      }
    }
    if (broken) this.partial = [];
  }
}

export function isHeader(packet) {
  return ["OpusHead", "OpusTags"].includes(new TextDecoder("latin1").decode(packet.subarray(0, 8)));
}

function joined(parts) {
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}
