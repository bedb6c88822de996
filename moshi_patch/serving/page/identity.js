// Who speaks: a secret that stays in this tab, and the ticket that the server gives for it.
//
// The secret goes to the server in a header alone, never in an address, where logs and histories would keep it.

const KEY = "moshi-ttt.token";

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
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(new URL("api/ticket", document.baseURI), { method: "POST", headers, cache: "no-store" });
  if (answer.status === 404) return null;
  if (answer.status === 401 || answer.status === 403) {
    throw new NeedsToken(token ? "The server does not know this token." : "This server asks for a token.");
  }
  if (!answer.ok) throw new Error((await answer.text()).trim() || `The server answered ${answer.status}.`);
  return (await answer.json()).ticket;
}
