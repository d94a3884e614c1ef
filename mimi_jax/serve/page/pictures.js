// Pictures of the last seconds, which scroll to the left.

const SECONDS = 8;

class Picture {
  // `columns` a second; `draw` paints one column of width 1 on a canvas of height `rows`.
  constructor(canvas, columns, rows) {
    this.context = canvas.getContext("2d", { alpha: false });
    canvas.width = SECONDS * columns;
    canvas.height = rows;
    this.clear();
  }

  clear() {
    const { canvas } = this.context;
    this.context.fillStyle = getComputedStyle(canvas).backgroundColor;
    this.context.fillRect(0, 0, canvas.width, canvas.height);
  }

  scroll() {
    const { canvas } = this.context;
    this.context.drawImage(canvas, -1, 0);
    this.context.fillStyle = getComputedStyle(canvas).backgroundColor;
    this.context.fillRect(canvas.width - 1, 0, 1, canvas.height);
    return canvas.width - 1;
  }

  dot(x, y, color, height = 1) {
    this.context.fillStyle = color;
    this.context.fillRect(x, y, 1, height);
  }
}

export class Waveform extends Picture {
  constructor(canvas, rate) {
    super(canvas, 100, 100);
    this.hop = rate / 100;
    this.low = this.high = this.count = 0;
  }

  push(audio) {
    for (const sample of audio) {
      this.low = Math.min(this.low, sample);
      this.high = Math.max(this.high, sample);
      if (++this.count >= this.hop) {
        const top = 50 - 48 * Math.min(1, this.high);
        const bottom = 50 - 48 * Math.max(-1, this.low);
        const color = getComputedStyle(this.context.canvas).getPropertyValue("--accent");
        this.dot(this.scroll(), top, color, Math.max(1, bottom - top));
        this.low = this.high = this.count = 0;
      }
    }
  }
}

export class Spectrogram extends Picture {
  constructor(canvas, columns, bands) {
    super(canvas, columns, bands);
    this.bands = bands;
  }

  // Levels from 0 to 1, low bands first.
  push(levels) {
    const x = this.scroll();
    levels.forEach((level, band) => this.dot(x, this.bands - 1 - band, warmth(level)));
  }
}

export class CodeMap extends Picture {
  constructor(canvas, framesPerSecond, codebooks, size) {
    super(canvas, framesPerSecond, codebooks);
    this.size = size;
  }

  // The codes of a frame, of which the first `heard` are decoded.
  push(codes, heard) {
    const x = this.scroll();
    codes.forEach((code, row) => {
      const hue = (360 * code) / this.size;
      this.dot(x, row, `hsl(${hue} 65% 52% / ${row < heard ? 1 : 0.18})`);
    });
  }
}

// From the paper's color to yellow, through blue and red.
function warmth(level) {
  return level < 0.02 ? "transparent" : `hsl(${(250 + 170 * level) % 360} 75% ${25 + 45 * level}% / ${Math.min(1, 2.5 * level)})`;
}
