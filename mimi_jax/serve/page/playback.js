// An audio worklet that plays what it is sent. It waits until there is a little in stock, so that frames that
// come a bit later than others leave no gap.

const STOCK = 0.06; // seconds

class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.waiting = [];
    this.length = this.start = 0; // samples that wait, and how many of the first piece were played
    this.plays = false;
    this.port.onmessage = ({ data }) => {
      this.waiting.push(data);
      this.length += data.length;
    };
  }

  process(_, [[output]]) {
    this.plays ||= this.length >= STOCK * sampleRate;
    for (let i = 0; this.plays && i < output.length; i++) {
      while (this.waiting.length && this.start === this.waiting[0].length) {
        this.waiting.shift();
        this.start = 0;
      }
      if (!this.waiting.length) {
        this.plays = false;
        break;
      }
      output[i] = this.waiting[0][this.start++];
      this.length--;
    }
    return true;
  }
}

registerProcessor("playback", Playback);
