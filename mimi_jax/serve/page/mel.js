// Mel spectra of a stream, for pictures.

const WINDOW = 1024; // samples
export const BANDS = 64;
const FLOOR = 1e-4;

export class Mel {
  // Calls `column` with a Float32Array of levels from 0 to 1, low bands first, every `hop` samples.
  constructor(rate, hop, column) {
    this.hop = hop;
    this.column = column;
    this.samples = new Float32Array(WINDOW);
    this.missing = hop;
    this.window = Float32Array.from({ length: WINDOW }, (_, i) => Math.sin((Math.PI * i) / WINDOW) ** 2);
    this.filters = filters(rate);
  }

  push(audio) {
    for (let start = 0; start < audio.length; ) {
      const size = Math.min(this.missing, audio.length - start);
      this.samples.copyWithin(0, size);
      this.samples.set(audio.subarray(start, start + size), WINDOW - size);
      start += size;
      this.missing -= size;
      if (this.missing === 0) {
        this.missing = this.hop;
        this.column(this.#levels());
      }
    }
  }

  #levels() {
    const real = this.samples.map((x, i) => x * this.window[i]);
    const imaginary = new Float32Array(WINDOW);
    transform(real, imaginary);
    return Float32Array.from(this.filters, (filter) => {
      let sum = 0;
      for (const [bin, weight] of filter) sum += weight * Math.hypot(real[bin], imaginary[bin]);
      return Math.max(0, Math.min(1, Math.log10(FLOOR + sum / WINDOW) / 3 + 4 / 3));
    });
  }
}

// For each band, pairs of a bin and its weight.
function filters(rate) {
  const toMel = (hertz) => 2595 * Math.log10(1 + hertz / 700);
  const toHertz = (mel) => 700 * (10 ** (mel / 2595) - 1);
  const corner = (i) => (toHertz((toMel(rate / 2) * i) / (BANDS + 1)) * WINDOW) / rate;
  return Array.from({ length: BANDS }, (_, band) => {
    const [low, middle, high] = [corner(band), corner(band + 1), corner(band + 2)];
    const pairs = [];
    for (let bin = Math.ceil(low); bin <= high; bin++) {
      const weight = bin < middle ? (bin - low) / (middle - low) : (high - bin) / (high - middle);
      pairs.push([bin, weight]);
    }
    return pairs.length ? pairs : [[Math.round(middle), 1]];
  });
}

// The Fourier transform in place, of a power of two.
function transform(real, imaginary) {
  const size = real.length;
  for (let i = 1, j = 0; i < size; i++) {
    let bit = size >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
  }
  for (let length = 2; length <= size; length *= 2) {
    for (let k = 0; k < length / 2; k++) {
      const angle = (-2 * Math.PI * k) / length;
      const [c, s] = [Math.cos(angle), Math.sin(angle)];
      for (let i = k; i < size; i += length) {
        const j = i + length / 2;
        const re = real[j] * c - imaginary[j] * s;
        const im = real[j] * s + imaginary[j] * c;
        real[j] = real[i] - re;
        imaginary[j] = imaginary[i] - im;
        real[i] += re;
        imaginary[i] += im;
      }
    }
  }
}
