// Asks the server; every error is words that a person can act on.

export class Refused extends Error {
  constructor(words, status = 0) {
    super(words);
    this.status = status;
  }
}

const GONE = "The server cannot be reached. Is it still running?";

async function ask(path, key, options = {}) {
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (/ISO-8859-1|headers/i.test(error.message)) throw new Refused("The API key has letters that no key has.", 401);
    throw new Refused(GONE);
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer) {
  let words = "";
  try {
    words = (await answer.json()).error.message;
  } catch {
    words = `it answered ${answer.status} ${answer.statusText}`;
  }
  if (answer.status === 401) return new Refused("The server wants its API key: give it in the settings.", 401);
  if (answer.status === 429 || answer.status === 503) {
    const wait = Number(answer.headers.get("Retry-After"));
    return new Refused(`The server is busy: ${words}.${wait ? ` Try again in ${wait} s.` : ""}`, answer.status);
  }
  return new Refused(`The server refused this: ${words}`, answer.status);
}

export async function get(path, key) {
  return (await ask(path, key)).json();
}

// Yield what a streamed answer consists of; ends with the stream's end, or throws in words.
export async function* stream(body, key, signal) {
  const answer = await ask("/v1/chat/completions", key, { method: "POST", body: JSON.stringify(body), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The server went away in the middle of the answer.");
    }
    if (piece.done) throw new Refused("The server went away in the middle of the answer.");
    const events = (rest + piece.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      const value = JSON.parse(event.slice(6));
      if (value.error) throw new Refused(`The answer broke off: ${value.error.message}`);
      yield value;
    }
  }
}
