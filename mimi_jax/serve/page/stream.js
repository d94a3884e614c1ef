// A loopback stream: audio goes to the server; codes and what they sound like come back.
// docs/serving.md describes the bytes.

const decoder = new TextDecoder();

export class Stream {
  // `handlers` has functions: opened(about), frame(codes, audio, delay), ended(reason, isProblem).
  constructor(handlers) {
    const address = new URL("loopback", location.href.replace(/^http/, "ws"));
    address.hash = "";
    address.search = new URLSearchParams({ format: "s16le" });
    const token = new URLSearchParams(location.search).get("token");
    if (token) address.searchParams.set("token", token);
    this.handlers = handlers;
    this.rest = new Uint8Array(0);
    this.spec = null; // the header of the code stream
    this.codes = null; // of the frame whose audio comes next
    this.problem = null;
    this.isEnded = false;
    this.samples = 0; // that were sent
    this.sent = []; // when each frame was complete, of those that have not come back
    this.socket = new WebSocket(address);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => (typeof data === "string" ? this.#told(JSON.parse(data)) : this.#take(data));
    this.socket.onclose = ({ code, reason }) => {
      const wasStopped = code === 1000 || (this.isEnded && !this.about);
      const problem = this.problem ?? (wasStopped ? null : reason || "the connection was lost");
      this.handlers.ended(problem ?? "The stream has ended.", problem !== null);
    };
  }

  // Float32Array of samples at the server's rate.
  push(audio) {
    if (this.socket.readyState !== WebSocket.OPEN || !this.about || this.isEnded) return;
    this.socket.send(Int16Array.from(audio, (x) => Math.max(-32768, Math.min(32767, Math.round(32768 * x)))));
    const size = this.about.frame_size;
    const before = Math.floor(this.samples / size);
    this.samples += audio.length;
    for (let frame = before; frame < Math.floor(this.samples / size); frame++) this.sent.push(performance.now());
  }

  use(numQuantizers) {
    if (this.socket.readyState === WebSocket.OPEN) {
      this.socket.send(JSON.stringify({ num_quantizers: numQuantizers }));
    }
  }

  // No audio goes out after this. The last frames still come.
  end() {
    this.isEnded = true;
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ end: true }));
    else this.socket.close();
  }

  #told(fields) {
    if (fields.error) this.problem = fields.error;
    else {
      this.about = fields;
      this.handlers.opened(fields);
    }
  }

  #take(buffer) {
    const bytes = new Uint8Array(this.rest.length + buffer.byteLength);
    bytes.set(this.rest);
    bytes.set(new Uint8Array(buffer), this.rest.length);
    let start = 0;
    for (let size; (size = this.#packet(bytes.subarray(start))) > 0; ) start += size;
    this.rest = bytes.slice(start);
  }

  // Take the first packet. Returns its size, or 0 if not all of it is there.
  #packet(bytes) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    if (this.spec === null) {
      if (bytes.length < 8) return 0;
      const size = 8 + Number(view.getBigUint64(0, true));
      if (bytes.length < size) return 0;
      this.spec = JSON.parse(decoder.decode(bytes.subarray(8, size)));
      this.bits = Math.max(1, Math.ceil(Math.log2(this.spec.codebook_size)));
      return size;
    }
    const kind = String.fromCharCode(bytes[0] ?? 0);
    const packed = Math.ceil((this.bits * this.spec.num_codebooks) / 8);
    if (kind === "F" || kind === "L") {
      const head = kind === "F" ? 1 : 5;
      if (bytes.length < head + packed) return 0;
      this.codes = unpack(bytes.subarray(head, head + packed), this.bits, this.spec.num_codebooks);
      return head + packed;
    }
    if (kind === "P") {
      if (bytes.length < 5 || bytes.length < 5 + view.getUint32(1, true)) return 0;
      const size = view.getUint32(1, true);
      const pcm = new Int16Array(bytes.slice(5, 5 + size).buffer);
      const sent = this.sent.shift();
      this.handlers.frame(this.codes, Float32Array.from(pcm, (x) => x / 32768), sent ? performance.now() - sent : null);
      return 5 + size;
    }
    return kind === "E" ? 1 : 0;
  }
}

// Numbers of `bits` bits each, most significant bit first.
function unpack(bytes, bits, count) {
  const numbers = new Uint16Array(count);
  for (let i = 0; i < count * bits; i++) {
    const bit = (bytes[i >> 3] >> (7 - (i & 7))) & 1;
    numbers[Math.floor(i / bits)] = (numbers[Math.floor(i / bits)] << 1) | bit;
  }
  return numbers;
}
