// The strip of the three lanes: what a token takes in each, predicted beside measured.

import { el } from "./markdown.js";

const NAMES = { cpu: "CPU", gpu: "GPU", link: "Link" };
const COLORS = { cpu: "var(--cpu)", gpu: "var(--gpu)", link: "var(--link)" };

function ms(seconds) {
  if (seconds === null || seconds === undefined) return "n/a";
  const value = seconds * 1e3;
  return `${value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)} ms`;
}

// Show what the server told; `liveS` are seconds of a token as they pass now, on the CPU alone.
export function showLanes(target, told, liveS = null) {
  const lanes = { ...told.lanes };
  if (liveS !== null && !told.device && lanes.cpu) lanes.cpu = { ...lanes.cpu, measured_s: liveS };
  const most = Math.max(1e-9, ...Object.values(lanes).flatMap((lane) => (lane ? [lane.predicted_s || 0, lane.measured_s || 0] : [])));
  target.replaceChildren(...Object.keys(NAMES).map((name) => one(name, lanes[name], most, told)));
}

function one(name, lane, most, told) {
  const track = el("div", "track");
  track.ariaHidden = "true";
  track.style.setProperty("--lane", COLORS[name]);
  let words;
  if (!lane || (lane.predicted_s === null && lane.measured_s === null)) {
    words = name === "cpu" || told.device ? "nothing measured yet" : "not in use: the CPU runs all";
  } else {
    const fill = el("div", "fill");
    fill.style.width = `${(95 * (lane.measured_s || 0)) / most}%`;
    track.append(fill);
    if (lane.predicted_s !== null) {
      const mark = el("div", "mark");
      mark.style.left = `${(95 * lane.predicted_s) / most}%`;
      track.append(mark);
    }
    words = lane.measured_s === null ? `predicted ${ms(lane.predicted_s)}` : ms(lane.measured_s);
    if (lane.measured_s !== null && lane.predicted_s !== null) words += `, predicted ${ms(lane.predicted_s)}`;
  }
  const told_words = el("dd", "", words);
  told_words.title = words;
  return el("div", "lane", el("dt", "", NAMES[name]), told_words, track);
}

// Say how fast the last answer was.
export function rates(told, live) {
  const words = [];
  const last = told.last;
  if (live) words.push(live);
  else if (last) {
    if (last.tokens_per_s) words.push(`${last.tokens_per_s.toFixed(1)} tokens/s`);
    if (last.ttft_s !== null) words.push(`first after ${last.ttft_s.toFixed(2)} s`);
    words.push(`${last.prompt_tokens} tokens in, ${last.new_tokens} out`);
    if (told.device && told.token.measured_s) words.push(`a token ${ms(told.token.measured_s)}, predicted ${ms(told.token.predicted_s)}`);
  }
  if (told.device) words.push(`hit rate ${told.hit_rate === null ? "n/a" : `${(100 * told.hit_rate).toFixed(0)} %`}`);
  if (told.note && !live) words.push(`not predicted: ${told.note}`);
  return words.join(" \u00b7 ");
}
