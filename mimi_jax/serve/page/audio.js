// Where audio comes from, and where it goes.

export class Microphone {
  // Calls `heard` with Float32Arrays at `rate`.
  static async open(rate, heard) {
    const media = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    const microphone = new Microphone(media, new AudioContext());
    try {
      await microphone.#hear(rate, heard);
    } catch (error) {
      microphone.close();
      throw error;
    }
    return microphone;
  }

  constructor(media, context) {
    this.media = media;
    this.context = context;
  }

  async #hear(rate, heard) {
    await this.context.audioWorklet.addModule("capture.js");
    const node = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0, processorOptions: { rate } });
    node.port.onmessage = ({ data }) => heard(data);
    this.context.createMediaStreamSource(this.media).connect(node);
  }

  close() {
    for (const track of this.media.getTracks()) track.stop();
    if (this.context.state !== "closed") this.context.close();
  }
}

export class Recording {
  // Calls `heard` with pieces of a file as fast as they are played.
  static async open(file, rate, heard, ended) {
    // A context decodes to its own rate.
    const decoded = await new OfflineAudioContext(1, 1, rate).decodeAudioData(await file.arrayBuffer());
    const audio = new Float32Array(decoded.length);
    for (let number = 0; number < decoded.numberOfChannels; number++) {
      const channel = decoded.getChannelData(number);
      for (let i = 0; i < audio.length; i++) audio[i] += channel[i] / decoded.numberOfChannels;
    }
    return new Recording(audio, rate, heard, ended);
  }

  constructor(audio, rate, heard, ended) {
    const began = performance.now();
    let start = 0;
    this.timer = setInterval(() => {
      const stop = Math.min(audio.length, Math.floor(((performance.now() - began) * rate) / 1000));
      if (stop > start) heard(audio.subarray(start, stop));
      start = stop;
      if (stop === audio.length) {
        this.close();
        ended();
      }
    }, 20);
  }

  close() {
    clearInterval(this.timer);
  }
}

export class Player {
  // Plays the original and the decoded, each of which can be muted, after `ready`. `rate` is that of both.
  constructor(rate) {
    this.rate = rate;
    this.context = new AudioContext({ sampleRate: rate });
    this.context.resume();
    this.ready = this.#open();
    this.ready.catch(() => {}); // whoever waits for it gets the error
  }

  async #open() {
    await this.context.audioWorklet.addModule("playback.js");
    this.tracks = {};
    for (const name of ["original", "decoded"]) {
      const source = new AudioWorkletNode(this.context, "playback", { numberOfInputs: 0 });
      const gain = this.context.createGain();
      source.connect(gain).connect(this.context.destination);
      this.tracks[name] = { source, gain };
    }
  }

  play(name, audio) {
    this.tracks[name].source.port.postMessage(audio);
  }

  mute(name, isMuted) {
    if (this.tracks) this.tracks[name].gain.gain.value = isMuted ? 0 : 1;
  }

  close() {
    if (this.context.state !== "closed") this.context.close();
  }
}
