// What the model says, as text: shown piece by piece, read out to screen readers phrase by phrase.

const PHRASE_MS = 1500; // a pause that ends a phrase
const LONG_PHRASE = 80; // characters; it ends with its word then
const MOST_PIECES = 500; // of a paragraph; who never pauses gets a new one
const MOST_PARAGRAPHS = 50;

export class Transcript {
  // `shown` is what is seen; `spoken` is a live region that only screen readers meet.
  constructor(shown, spoken) {
    this.shown = shown;
    this.spoken = spoken;
    this.phrase = "";
  }

  add(text) {
    const last = this.shown.lastElementChild;
    const isFull = last?.childNodes.length >= MOST_PIECES;
    const paragraph = this.paused || isFull || !last ? this.newParagraph() : last;
    this.paused = false;
    const atEnd = this.shown.scrollHeight - this.shown.scrollTop - this.shown.clientHeight < 40;
    paragraph.append(paragraph.hasChildNodes() ? text : text.trimStart());
    if (atEnd) this.shown.scrollTop = this.shown.scrollHeight;
    if (this.phrase.length > LONG_PHRASE && text.startsWith(" ")) this.endPhrase(false); // it never pauses
    this.phrase += text;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.endPhrase(true), PHRASE_MS);
    if (/[.!?]\s*$/.test(text)) this.endPhrase(false);
  }

  newParagraph() {
    const paragraph = document.createElement("p");
    this.shown.append(paragraph);
    while (this.shown.childElementCount > MOST_PARAGRAPHS) this.shown.firstElementChild.remove();
    return paragraph;
  }

  endPhrase(paused) {
    if (paused) this.paused = true;
    if (!this.phrase.trim()) return;
    const line = document.createElement("p");
    line.textContent = this.phrase.trim();
    this.spoken.append(line);
    while (this.spoken.childElementCount > 3) this.spoken.firstElementChild.remove();
    this.phrase = "";
  }

  clear() {
    clearTimeout(this.timer);
    this.phrase = "";
    this.shown.replaceChildren();
    this.spoken.replaceChildren();
  }
}
