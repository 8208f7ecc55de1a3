// This script runs once for each part of the page that shows tokens; `element` is that part. Each
// update replaces its content, so listeners are attached to the part and not to the tokens.

const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toFixed(1)) + " %";

let panelToken = null; // token that the panel describes
let panelTop = 0; // top edge of that token when the panel was shown

const moved = () => panelToken && Math.abs(panelToken.getBoundingClientRect().top - panelTop) > 2;

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

function line(name, p, sampled) {
  const row = document.createElement("div");
  row.className = sampled ? "row sampled" : "row";
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
  title.textContent = "Most likely tokens at this position";
  box.replaceChildren(
    title, ...alternatives.map(([name, q], i) => line(name, q, i + 1 === rank)));
  if (rank > alternatives.length) {
    box.append(line("sampled, rank " + rank, p, true));
  }
  box.hidden = false;
  [panelToken, panelTop] = [token, token.getBoundingClientRect().top];
  const edges = token.getClientRects()[0];
  const width = document.documentElement.clientWidth;
  box.style.left = Math.max(8, Math.min(edges.left, width - box.offsetWidth - 8)) + "px";
  const below = edges.bottom + 6 + box.offsetHeight < window.innerHeight;
  box.style.top = (below ? edges.bottom + 6 : edges.top - box.offsetHeight - 6) + "px";
}

function showAttention(token) {
  const text = token.closest(".attention");
  const row = JSON.parse(text.dataset.rows)[token.dataset.row];
  [...text.children].forEach((other, i) => {
    other.style.setProperty("--p", Math.sqrt(row[i] ?? 0)); // keeps small weights visible
    other.classList.toggle("future", i >= row.length);
    other.classList.toggle("query", other === token);
    other.title = i < row.length ? percent(row[i]) : "a later token, which is not visible to this one";
  });
}

function show(event) {
  const token = event.target.closest?.(".token");
  if (token?.dataset.details) showAlternatives(token);
  else if (token?.dataset.row) showAttention(token);
}

function showLast() {
  const tokens = element.querySelectorAll(".attention .token");
  if (tokens.length) showAttention(tokens[tokens.length - 1]);
}

for (const kind of ["mouseover", "focusin", "click"]) element.addEventListener(kind, show);
for (const kind of ["mouseout", "focusout"]) {
  element.addEventListener(kind, () => (panel().hidden = true));
}
new MutationObserver(showLast).observe(element, { childList: true, subtree: true });
showLast();
