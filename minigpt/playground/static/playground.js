// Runs once for each part of the page that shows tokens; `element` is that part. Its content is
// written anew with every update, so that listeners are on the part and never on a token.

const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toFixed(1)) + " %";

let pointed = null; // the token that the panel is about, and where it was then
let wasAt = 0;

const moved = () => pointed && Math.abs(pointed.getBoundingClientRect().top - wasAt) > 2;

function panel() {
  let box = document.getElementById("token-panel");
  if (!box) {
    box = document.createElement("div");
    box.id = "token-panel";
    box.setAttribute("role", "tooltip");
    box.hidden = true;
    document.body.appendChild(box);
    document.addEventListener("scroll", () => (box.hidden ||= moved()), true);
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") box.hidden = true;
    });
  }
  return box;
}

function line(name, p, chosen) {
  const row = document.createElement("div");
  row.className = chosen ? "row chosen" : "row";
  const label = document.createElement("span");
  label.textContent = name;
  const bar = document.createElement("i");
  bar.style.width = 60 * p + "px";
  const number = document.createElement("b");
  number.textContent = percent(p);
  row.append(label, bar, number);
  return row;
}

function showAlternatives(token) {
  const { p, rank, alternatives } = JSON.parse(token.dataset.details);
  const box = panel();
  const title = document.createElement("p");
  title.textContent = "What the model expected here";
  box.replaceChildren(
    title, ...alternatives.map(([name, q], i) => line(name, q, i + 1 === rank)));
  if (rank > alternatives.length) {
    box.append(line("chosen, number " + rank, p, true));
  }
  box.hidden = false;
  [pointed, wasAt] = [token, token.getBoundingClientRect().top];
  const at = token.getClientRects()[0];
  const width = document.documentElement.clientWidth;
  box.style.left = Math.max(8, Math.min(at.left, width - box.offsetWidth - 8)) + "px";
  const below = at.bottom + 6 + box.offsetHeight < window.innerHeight;
  box.style.top = (below ? at.bottom + 6 : at.top - box.offsetHeight - 6) + "px";
}

function showLooks(token) {
  const text = token.closest(".looks");
  const row = JSON.parse(text.dataset.rows)[token.dataset.row];
  [...text.children].forEach((other, i) => {
    other.style.setProperty("--p", Math.sqrt(row[i] ?? 0)); // so that small shares can be seen
    other.classList.toggle("after", i >= row.length);
    other.classList.toggle("looking", other === token);
    other.title = i < row.length ? percent(row[i]) : "comes later: it cannot be seen";
  });
}

function show(event) {
  const token = event.target.closest?.(".token");
  if (token?.dataset.details) showAlternatives(token);
  else if (token?.dataset.row) showLooks(token);
}

function showLast() {
  const tokens = element.querySelectorAll(".looks .token");
  if (tokens.length) showLooks(tokens[tokens.length - 1]);
}

for (const kind of ["mouseover", "focusin", "click"]) element.addEventListener(kind, show);
for (const kind of ["mouseout", "focusout"]) {
  element.addEventListener(kind, () => (panel().hidden = true));
}
new MutationObserver(showLast).observe(element, { childList: true, subtree: true });
showLast();
