// Who speaks: a secret that stays in this tab, and the ticket that the server gives for it.
//
// The secret goes to the server in a header alone, never in an address, where logs and histories would keep it.

const KEY = "moshi-ttt.token";
const UNKNOWN = "The server does not know this token.";

export class NeedsToken extends Error {}

export function hasToken() {
  return sessionStorage.getItem(KEY) !== null;
}

export function setToken(token) {
  sessionStorage.setItem(KEY, token);
}

export function forgetToken() {
  sessionStorage.removeItem(KEY);
}

// A ticket for one connection; null where the server gives none. Throws NeedsToken, or an Error with the reason.
export async function fetchTicket() {
  const token = sessionStorage.getItem(KEY);
  if (token && !/^[!-~]+$/.test(token)) throw new NeedsToken(UNKNOWN); // it cannot even stand in a header
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const url = new URL("api/ticket", document.baseURI);
  const answer = await fetch(url, { method: "POST", headers, cache: "no-store" }).catch(() => {
    throw new Error("The server does not answer.");
  });
  if (answer.status === 404) return null;
  if (answer.status === 401) throw new NeedsToken(token ? UNKNOWN : "This server asks for a token.");
  if (!answer.ok) throw new Error(await reasonOf(answer));
  return (await answer.json()).ticket;
}

async function reasonOf(answer) {
  if (answer.status === 503) return "The server is about to stop: please try again in a moment.";
  const wait = answer.headers.get("Retry-After");
  if (answer.status === 429) return `You tried too often: please wait ${wait ?? 60} seconds.`;
  const text = (await answer.text()).trim();
  return `The server refused (${answer.status}${text && text.length < 300 ? `: ${text.replace(/\.$/, "")}` : ""}).`;
}
