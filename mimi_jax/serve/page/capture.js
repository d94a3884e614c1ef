// An audio worklet that gives what the microphone hears, at another sampling rate.

import { Resampler } from "./resample.js";

class Capture extends AudioWorkletProcessor {
  constructor({ processorOptions }) {
    super();
    this.resampler = new Resampler(sampleRate, processorOptions.rate);
  }

  process([channels]) {
    if (channels?.length) {
      const mono = new Float32Array(channels[0].length);
      for (const channel of channels) for (let i = 0; i < mono.length; i++) mono[i] += channel[i] / channels.length;
      const audio = this.resampler.push(mono);
      if (audio.length) this.port.postMessage(audio);
    }
    return true;
  }
}

registerProcessor("capture", Capture);
