// Keeps conversations and settings in this browser, and nowhere else.

const CHAT = "hybrid.chat.";
const SETTINGS = "hybrid.settings";

export function makeChat() {
  return { id: `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`, title: "", system: "", messages: [], changed: Date.now() };
}

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

function isChat(value) {
  return Boolean(value) && typeof value.id === "string" && Array.isArray(value.messages) && value.messages.every((each) => each && typeof each.content === "string" && ["user", "assistant"].includes(each.role));
}

// All conversations, the last one first; what is damaged is left out.
export function chats() {
  const found = [];
  for (let at = 0; at < localStorage.length; at++) {
    const name = localStorage.key(at);
    const value = name.startsWith(CHAT) ? read(name) : null;
    if (isChat(value)) found.push(value);
  }
  return found.sort((one, other) => other.changed - one.changed);
}

// Whether there was room for it.
export function keep(chat) {
  try {
    localStorage.setItem(CHAT + chat.id, JSON.stringify(chat));
    return true;
  } catch {
    return false;
  }
}

export function drop(chat) {
  localStorage.removeItem(CHAT + chat.id);
}

export function settings() {
  const value = read(SETTINGS);
  return value && typeof value === "object" ? value : {};
}

export function keepSettings(value) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(value));
  } catch {
    // They hold for this visit then.
  }
}
