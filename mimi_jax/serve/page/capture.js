// An audio worklet that gives what the microphone hears, at another sampling rate.

import { Resampler } from "./resample.js";

const SECONDS = 0.02; // of a message; a worklet gets audio in pieces of 3 ms

class Capture extends AudioWorkletProcessor {
  constructor({ processorOptions }) {
    super();
    this.resampler = new Resampler(sampleRate, processorOptions.rate);
    this.piece = new Float32Array(SECONDS * processorOptions.rate);
    this.length = 0; // samples in `piece`
  }

  process([channels]) {
    if (channels?.length) {
      const mono = new Float32Array(channels[0].length);
      for (const channel of channels) for (let i = 0; i < mono.length; i++) mono[i] += channel[i] / channels.length;
      for (const sample of this.resampler.push(mono)) {
        this.piece[this.length++] = sample;
        if (this.length === this.piece.length) {
          this.port.postMessage(this.piece);
          this.length = 0;
        }
      }
    }
    return true;
  }
}

registerProcessor("capture", Capture);
