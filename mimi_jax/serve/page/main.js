// The page: buttons, a slider, pictures and numbers around one stream.

import { Microphone, Player, Recording } from "./audio.js";
import { BANDS, Mel } from "./mel.js";
import { CodeMap, Spectrogram, Waveform } from "./pictures.js";
import { Stream } from "./stream.js";

const HOPS = 50; // columns of a spectrogram a second
const START = 8; // codebooks, if the server has so many
const RATE = 24000; // Hz, of nearly all models

const $ = (id) => document.getElementById(id);
let live = null; // what runs: its stream, source, player and pictures
let about = null; // what the server said of its model

async function start(openSource) {
  stop();
  say("Connecting…");
  const mine = (live = { frames: 0, late: 0, slowest: 0, delays: [] });
  $("stop").disabled = false;
  try {
    // At once: browsers let a page play only what begins with a click.
    mine.player = new Player(about?.sampling_rate ?? RATE);
    await new Promise((resolve, reject) => {
      mine.stream = new Stream({
        opened: (fields) => {
          about = fields;
          if (fields.channels === 1) resolve();
          else reject(new Error("This page is for models of one channel."));
        },
        frame: (...frame) => live === mine && show(mine, ...frame),
        ended: (reason, isProblem) => {
          reject(new Error(reason));
          finish(mine, reason, isProblem);
        },
      });
    });
    if (live !== mine) return;
    if (mine.player.rate !== about.sampling_rate) {
      mine.player.close();
      mine.player = new Player(about.sampling_rate);
    }
    await mine.player.ready;
    setUp(mine);
    setMutes();
    const source = await openSource(about.sampling_rate, (audio) => hear(mine, audio), () => mine.stream.end());
    if (live !== mine || mine.stream.isEnded) return source.close();
    mine.source = source;
    say("Live.");
  } catch (error) {
    finish(mine, error.message, true);
  }
}

// Make what depends on the server's model.
function setUp(mine) {
  const rate = about.sampling_rate;
  const slider = $("codebooks");
  const isFirst = slider.dataset.ready === undefined;
  slider.max = about.max_quantizers;
  slider.min = about.min_quantizers;
  if (isFirst) {
    slider.value = Math.min(START, about.max_quantizers);
    slider.dataset.ready = "";
  }
  mine.stream.use(Number(slider.value));
  showRate();
  mine.waveform = new Waveform($("waveform"), rate);
  const columns = (canvas) => {
    const picture = new Spectrogram($(canvas), HOPS, BANDS);
    return new Mel(rate, rate / HOPS, (levels) => picture.push(levels));
  };
  mine.melIn = columns("mel-in");
  mine.melOut = columns("mel-out");
  mine.codes = new CodeMap($("codes"), rate / about.frame_size, about.max_quantizers, about.codebook_size);
}

function hear(mine, audio) {
  mine.stream.push(audio);
  mine.player.play("original", audio.slice());
  mine.waveform.push(audio);
  mine.melIn.push(audio);
}

function show(mine, codes, audio, delay) {
  mine.player.play("decoded", audio.slice());
  mine.codes.push(codes, Number($("codebooks").value));
  mine.melOut.push(audio);
  mine.frames++;
  if (delay !== null) {
    mine.delays = [...mine.delays.slice(-24), delay];
    mine.slowest = Math.max(mine.slowest, delay);
    mine.late += delay > (1000 * about.frame_size) / about.sampling_rate;
    $("latency").textContent = Math.round(mine.delays.reduce((sum, x) => sum + x) / mine.delays.length);
    $("slowest").textContent = Math.round(mine.slowest);
  }
  $("late").textContent = mine.late;
  $("frames").textContent = mine.frames;
}

function stop() {
  live?.source?.close();
  live?.stream?.end();
}

// The end of a stream: of the live one, or of one that another has replaced.
function finish(mine, reason, isProblem) {
  mine.source?.close();
  mine.stream?.end();
  if (live !== mine) return mine.player?.close();
  live = null;
  setTimeout(() => mine.player?.close(), 1000); // when the last frames were heard
  $("stop").disabled = true;
  say(reason, isProblem);
}

function say(text, isProblem = false) {
  $("status").textContent = text;
  $("status").classList.toggle("problem", isProblem);
}

function showRate() {
  const count = Number($("codebooks").value);
  const bits = Math.ceil(Math.log2(about?.codebook_size ?? 2048));
  const frames = about ? about.sampling_rate / about.frame_size : 12.5;
  $("rate").value = about ? `${count}, ${((count * bits * frames) / 1000).toFixed(2)} kbit/s` : "";
}

function setMutes() {
  for (const name of ["original", "decoded"]) live?.player?.mute(name, !$(`hear-${name}`).checked);
}

function openFile(file) {
  if (file && window.isSecureContext) start((rate, heard, ended) => Recording.open(file, rate, heard, ended));
}

$("microphone").onclick = () => start((rate, heard) => Microphone.open(rate, heard));
$("choose").onclick = () => {
  $("file").value = ""; // so that the same file can be opened again
  $("file").click();
};
$("file").onchange = () => openFile($("file").files[0]);
$("stop").onclick = stop;
$("codebooks").oninput = () => {
  showRate();
  live?.stream?.use(Number($("codebooks").value));
};
$("hear-original").onchange = $("hear-decoded").onchange = setMutes;

document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
};
document.ondragleave = () => document.body.classList.remove("dropping");
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  openFile(event.dataTransfer.files[0]);
};

if (!window.isSecureContext) {
  say("Browsers let a page hear and play only over HTTPS, or if its server is on this machine.", true);
  for (const name of ["microphone", "choose"]) $(name).disabled = true;
}
