// How a conversation ended, in one sentence, from the code and the reason that the server gave.

const BY_CODE = {
  1000: "The server ended the conversation.",
  1001: "The server was shut down.",
  1002: "The server did not understand this page.",
  1003: "The server did not understand this page.",
  1006: "The connection was lost.",
  1007: "The server could not read the sound.",
  1008: "The server ended the conversation.",
  1009: "The server found a message too long.",
  1011: "The server had an error.",
  1012: "The server is restarted.",
  1013: "The server is full: please try again later.",
};

// Such an end is not the person's wish and may be over in a moment: another server may answer.
export function mayComeBack(code) {
  return code === 1006 || code === 1012;
}

export function ending(code, reason) {
  const sentence = BY_CODE[code] ?? "The conversation ended.";
  const said = reason.trim().replace(/\.$/, "");
  return said ? `${sentence.replace(/\.$/, "")} (${said}).` : sentence;
}
