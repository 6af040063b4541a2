// Makes elements of Markdown. Everything of a text becomes text nodes: nothing in it is ever HTML.

const FENCE = /^ {0,3}(```+|~~~+)\s*([^`]*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ROW = /^\s*\|.*\|\s*$/;
const DEEPEST = 12;
// Letters of a line in which marks are looked for.
const LONGEST = 5000;

export function el(name, classes, ...children) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  made.append(...children);
  return made;
}

// Cut a text into blocks, each with its lines: only the last one can change when more text comes.
export function blocks(text) {
  const found = [];
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  let at = 0;
  const take = (kind, test, more = {}) => {
    const begin = at++;
    while (at < lines.length && test(lines[at], begin)) at++;
    found.push({ kind, lines: lines.slice(begin, at), ...more });
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (!line.trim()) at++;
    else if (fence) {
      const begin = ++at;
      const ends = (each) => each.trim().startsWith(fence[1]) && !each.trim().replaceAll(fence[1][0], "");
      while (at < lines.length && !ends(lines[at])) at++;
      found.push({ kind: "code", language: fence[2].trim(), lines: lines.slice(begin, at++) });
    } else if (HEADING.test(line)) take("heading", () => false);
    else if (RULE.test(line)) take("rule", () => false);
    else if (/^ {0,3}>/.test(line)) take("quote", (each) => /^ {0,3}>/.test(each));
    else if (ROW.test(line) && /^\s*\|(\s*:?-+:?\s*\|)+\s*$/.test(lines[at + 1] || "")) take("table", (each) => ROW.test(each));
    else if (ITEM.test(line)) take("list", () => inList(lines, at));
    else take("paragraph", (each) => each.trim() && !begins(each));
  }
  return found;
}

// Whether a line after an item belongs to its list: another item, what is set in, or its text.
function inList(lines, at) {
  const goes = (line) => line !== undefined && (ITEM.test(line) || /^\s{2,}\S/.test(line));
  if (!lines[at].trim()) return goes(lines[at + 1]);
  return goes(lines[at]) || (lines[at - 1].trim() !== "" && !begins(lines[at]));
}

function begins(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || ITEM.test(line) || /^ {0,3}>/.test(line);
}

// Show a text in an element; blocks that are there already stay as they are.
export function show(target, text) {
  const made = blocks(text);
  const keys = made.map((block) => JSON.stringify(block));
  const before = target.shownBlocks || [];
  let same = 0;
  while (same < keys.length && keys[same] === before[same]) same++;
  while (target.children.length > same) target.lastChild.remove();
  for (const block of made.slice(same)) target.append(element(block, 0));
  target.shownBlocks = keys;
}

function element(block, depth) {
  const { kind, lines } = block;
  if (kind === "code") return code(block.language, lines.join("\n"));
  if (kind === "rule") return el("hr");
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return el(`h${marks.length}`, "", ...inline(text.trimEnd().replace(/\s#+$/, ""), 0));
  }
  if (kind === "table") return table(lines);
  if (depth < DEEPEST && kind === "quote") return within(el("blockquote"), lines.map((line) => line.replace(/^ {0,3}> ?/, "")), depth);
  if (depth < DEEPEST && kind === "list") return list(lines, depth);
  const made = el("p");
  lines.forEach((line, number) => {
    if (number) made.append(/ {2,}$|\\$/.test(lines[number - 1]) ? el("br") : "\n");
    made.append(...inline(line.trim().replace(/\\$/, ""), 0));
  });
  return made;
}

function within(target, lines, depth) {
  for (const block of blocks(lines.join("\n"))) target.append(element(block, depth + 1));
  return target;
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const made = el(/\d/.test(mark) ? "ol" : "ul");
  if (/\d/.test(mark) && parseInt(mark, 10) !== 1) made.start = parseInt(mark, 10);
  let item = [];
  const close = () => {
    if (!item.length) return;
    const parts = blocks(item.join("\n"));
    const target = el("li");
    parts.forEach((block, number) => {
      if (!number && block.kind === "paragraph") target.append(...inline(block.lines.join(" "), 0));
      else target.append(element(block, depth + 1));
    });
    made.append(target);
  };
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent.length + 1) {
      close();
      item = [found[3]];
    } else item.push(line.replace(/^\s{1,4}/, ""));
  }
  close();
  return made;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, name) => el("tr", "", ...cells(line).map((cell) => el(name, "", ...inline(cell, 0))));
  return el("table", "", el("thead", "", row(lines[0], "th")), el("tbody", "", ...lines.slice(2).map((line) => row(line, "td"))));
}

function code(language, text) {
  const copy = el("button", "", "Copy");
  copy.type = "button";
  copy.addEventListener("click", () => copied(copy, text));
  const bar = el("div", "bar", el("span", "", language || "code"), copy);
  const body = el("pre", "", el("code", "", text));
  body.tabIndex = 0;
  return el("div", "code", bar, body);
}

// Copy a text and say so on the button that asked for it.
export async function copied(button, text) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = before), 1500);
}

const INLINE = /(`+)([^`](?:.*?[^`])?)\1(?!`)|!?\[([^\]\n]{0,500})\]\(([^()\s]{1,2000}(?:\([^()\s]*\))?)(?:\s+"[^"]*")?\)|(\*\*|__)(\S(?:.*?\S)??)\5|(\*|_)(?=\S)([^*_]*[^\s*_])\7(?!\w)|~~(?=\S)(.+?)~~|(https?:\/\/[^\s<>"'`]{1,2000}[^\s<>"'`.,;:!?)\]])|\\([\\`*_{}[\]()#+\-.!|~>])/g;

function inline(text, depth) {
  if (depth > DEEPEST || text.length > LONGEST) return [text];
  const found = [];
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    const [all, , codeText, label, address, , strong, mark, slanted, struck, plain, escaped] = match;
    const before = text[match.index - 1] || " ";
    if (mark === "_" && /\w/.test(before)) continue;
    found.push(text.slice(last, match.index));
    if (codeText !== undefined) found.push(el("code", "", codeText.trim() || codeText));
    else if (address !== undefined) found.push(link(address, inline(label || address, depth + 1), all));
    else if (strong !== undefined) found.push(el("strong", "", ...inline(strong, depth + 1)));
    else if (slanted !== undefined) found.push(el("em", "", ...inline(slanted, depth + 1)));
    else if (struck !== undefined) found.push(el("del", "", ...inline(struck, depth + 1)));
    else if (plain !== undefined) found.push(link(plain, [plain], all));
    else found.push(escaped);
    last = match.index + all.length;
  }
  found.push(text.slice(last));
  return found.filter((part) => part !== "");
}

// Pictures become links, too: this page asks nobody but its server.
function link(address, label, all) {
  if (!/^(https?:|mailto:)/i.test(address)) return all;
  const made = el("a", "", ...label);
  made.href = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer";
  return made;
}
