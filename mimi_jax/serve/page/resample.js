// Change the sampling rate of a stream: each sample is a sum of samples around it, weighted by a windowed sinc.

const ZEROS = 16; // of the sinc, on each side

export class Resampler {
  constructor(from, to) {
    this.step = from / to; // input samples from one output sample to the next
    this.cutoff = Math.min(1, to / from) * 0.95;
    this.side = Math.ceil(ZEROS / this.cutoff); // input samples on each side
    this.input = new Float32Array(2 * this.side);
    this.position = this.side; // of the next output sample in `input`
  }

  // Float32Array in, Float32Array out. The result lags behind by `side` samples.
  push(audio) {
    if (this.step === 1) return audio;
    const input = new Float32Array(this.input.length + audio.length);
    input.set(this.input);
    input.set(audio, this.input.length);
    const output = [];
    while (this.position + this.side < input.length) {
      const centre = Math.floor(this.position);
      let sum = 0;
      for (let i = centre - this.side + 1; i <= centre + this.side; i++) {
        sum += input[i] * this.#weight(this.position - i);
      }
      output.push(sum);
      this.position += this.step;
    }
    const done = Math.floor(this.position) - this.side;
    this.input = input.slice(done);
    this.position -= done;
    return Float32Array.from(output);
  }

  #weight(distance) {
    const x = Math.PI * this.cutoff * distance;
    const window = 0.5 + 0.5 * Math.cos((Math.PI * distance) / this.side);
    return (x === 0 ? this.cutoff : (this.cutoff * Math.sin(x)) / x) * window;
  }
}
