"use strict";
const images = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const { figures, classes, splits, folder, sheets } = images; // the rest of it are columns of images
const [search, grid, dialog, original, scaled] = ["search", "grid", "dialog", "original", "scaled"].map(byId);
const count = images.path.length;
const all = [...Array(count).keys()]; // by split, then path
const labelOf = (i) => classes[images.label[i]] ?? "no class known";
const isJudged = (i) => images.label[i] !== null && images.predicted[i] !== null;
const isWrong = (i) => isJudged(i) && images.label[i] !== images.predicted[i];
const verdictOf = (i) => (isJudged(i) ? (isWrong(i) ? 0 : 1) : images.predicted[i] === null ? 3 : 2);
const VERDICTS = ["wrong", "right", "predicted, true class not known", "not predicted"];
const hasPredictions = images.predicted.some((number) => number !== null);
const textOf = (i) => [images.path[i], classes[images.label[i]], classes[images.predicted[i]]].join("\n").toLowerCase();
const texts = all.map(textOf);
figures.pixels = images.sizes.map((sizes) => sizes && sizes[0][0] * sizes[0][1]);

/* What is shown: filters, then an order. */

const issueNames = [...new Set(Object.values(images.issue).flat())].sort();
const ONLY = { all: () => true };
if (all.some(isJudged)) Object.assign(ONLY, { wrong: isWrong, right: (i) => isJudged(i) && !isWrong(i) });
if (issueNames.length) ONLY.flagged = (i) => i in images.issue;
for (const name of issueNames) ONLY[`issue: ${name}`] = (i) => (images.issue[i] ?? []).includes(name);
if (Object.keys(images.reason).length) ONLY.unreadable = (i) => i in images.reason;

// The wrong ones that were surest come first, then the right ones that were least sure, then by doubt.
const loss = (i) => figures.loss?.[i] ?? 0;
const byVerdict = (i) => 1000 * verdictOf(i) + (verdictOf(i) < 2 ? -loss(i) : (figures.probability?.[i] ?? 0));
const ORDERS = {
  "split and class": {
    key: (i) => images.split[i] * (classes.length + 1) + (images.label[i] ?? classes.length),
    group: (i) => `${splits[images.split[i]]}: ${labelOf(i)}`,
  },
  "wrong and doubtful first": { key: byVerdict, group: (i) => VERDICTS[verdictOf(i)] },
  path: { compare: (a, b) => (images.path[a] < images.path[b] ? -1 : 1) },
};
if (!hasPredictions) delete ORDERS["wrong and doubtful first"];
for (const [name, column] of Object.entries(figures)) {
  ORDERS[`${name}, highest first`] = { key: (i) => column[i] && -column[i], figure: name };
  ORDERS[`${name}, lowest first`] = { key: (i) => column[i], figure: name };
}

function fillSelect(id, options) {
  byId(id).append(...options.map(([value, text]) => new Option(text, value)));
  byId(id).parentElement.hidden = options.length < 2;
}
const numbered = (names, used) => [["", "all"], ...names.map((name, n) => [n, name]).filter(([n]) => used.has(n))];
fillSelect("split", numbered(splits, new Set(images.split)));
fillSelect("label", numbered(classes, new Set(images.label)));
fillSelect("predicted", hasPredictions ? numbered(classes, new Set(images.predicted)) : []);
fillSelect("only", Object.keys(ONLY).map((name) => [name, name]));
fillSelect("order", Object.keys(ORDERS).map((name) => [name, name]));
if (hasPredictions) byId("order").value = "wrong and doubtful first";

let shown = [], order = null, rows = [], cell = 0, caption = 0, gap = 0, current = 0;
const tiles = new Map(); // what of the page exists, by position in `shown` or "h" and a heading's row

function choose() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = ["split", "label", "predicted"].map((name) => [images[name], byId(name).value]);
  const isMeant = ONLY[byId("only").value];
  order = ORDERS[byId("order").value];
  shown = all.filter((i) => isMeant(i) && words.every((word) => texts[i].includes(word)) &&
    chosen.every(([column, value]) => value === "" || column[i] === Number(value)));
  if (order.compare) shown.sort(order.compare);
  else {
    const keys = all.map((i) => order.key(i) ?? Infinity); // what is not known comes last
    shown.sort((a, b) => (keys[a] === keys[b] ? a - b : keys[a] < keys[b] ? -1 : 1));
  }
  current = 0;
  byId("status").textContent = `${shown.length} of ${count} images`;
  arrange();
}

/* Where it is: rows of tiles and headings, of which only those in sight exist. */

function arrange() {
  const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
  gap = 0.75 * rem;
  caption = (hasPredictions ? 4.1 : 2.7) * rem;
  const width = grid.clientWidth, columns = Math.max(2, Math.floor((width + gap) / (sheets.side + gap)));
  cell = Math.floor((width - gap * (columns - 1)) / columns);
  rows = [];
  const groups = shown.map((i) => order.group?.(i)), sizes = {};
  for (const group of groups) sizes[group] = (sizes[group] ?? 0) + 1;
  let top = 0;
  const add = (row) => (rows.push({ top, ...row }), (top += row.height));
  for (let start = 0, end = 0; start < shown.length; start = end) {
    const group = groups[start];
    if (group !== groups[start - 1]) add({ height: 3 * rem, start, end, text: `${group} (${sizes[group]})` });
    while (end < Math.min(start + columns, shown.length) && groups[end] === group) end++;
    add({ height: cell + caption + gap, start, end });
  }
  grid.style.height = `${top}px`;
  for (const tile of tiles.values()) tile.remove();
  tiles.clear();
  render();
}

const rowOf = (position) => rows.findIndex((row) => position >= row.start && position < row.end);

function render() {
  const from = -grid.getBoundingClientRect().top - cell, to = from + innerHeight + 2 * cell;
  const wanted = new Map(), kept = rowOf(current); // the row with the focus stays
  rows.forEach((row, number) => {
    if (number !== kept && (row.top + row.height < from || row.top > to)) return;
    if (row.text) wanted.set(`h${number}`, () => make("h2", "", row.text, { top: `${row.top}px` }));
    for (let position = row.start; position < row.end; position++) wanted.set(position, () => makeTile(row, position));
  });
  for (const [key, tile] of tiles) if (!wanted.has(key)) tile.remove(), tiles.delete(key);
  for (const [key, make] of wanted) if (!tiles.has(key)) tiles.set(key, grid.appendChild(make()));
}

function make(tag, className, text = "", style = {}) {
  const made = Object.assign(document.createElement(tag), { className, textContent: text });
  Object.assign(made.style, style);
  return made;
}

function makeTile(row, position) {
  const i = shown[position], path = images.path[i], left = (position - row.start) * (cell + gap);
  const style = { top: `${row.top}px`, left: `${left}px`, width: `${cell}px`, height: `${cell + caption}px` };
  const tile = make("button", isWrong(i) ? "tile wrong" : "tile", "", style);
  const trueLabel = hasPredictions && images.label[i] !== null ? `true: ${labelOf(i)}` : labelOf(i);
  const facts = listFacts(i).map((fact) => fact.join(" ")).join(", ");
  const ariaLabel = `${position + 1} of ${shown.length}: ${path}, ${facts}`;
  Object.assign(tile, { ariaLabel, title: path, tabIndex: position === current ? 0 : -1 });
  tile.dataset.position = position;
  tile.append(makeFrame(i), make("span", "name", path.split("/").pop()), make("span", "label", trueLabel));
  if (images.predicted[i] !== null) {
    const bar = tile.appendChild(make("span", "bar")), chance = figures.probability?.[i];
    bar.style.setProperty("--p", chance ?? 0);
    bar.append(make("span", "", classes[images.predicted[i]]), make("span", "", format("probability", chance)));
  }
  return tile;
}

function makeFrame(i) {
  const reason = images.reason[i];
  const frame = make("span", reason ? "frame unread" : "frame", reason, { height: `${cell}px` });
  if (!reason) paint(frame.appendChild(make("span", "cut")), i, cell / Math.max(...images.sizes[i][1]));
  if (i in images.issue) frame.append(make("span", "mark", images.issue[i].join(", ")));
  if (order.figure) frame.append(make("span", "mark figure", format(order.figure, figures[order.figure][i])));
  return frame;
}

/* Cuts an image's thumbnail out of its sheet, without half a pixel at each edge, which scaling mixes with the next. */
function paint(element, i, scale) {
  const inSheet = i % sheets.count, [width, height] = images.sizes[i][1];
  const start = (cells) => `${-(cells * sheets.side + 0.5) * scale}px`;
  Object.assign(element.style, {
    width: `${Math.max(1, width - 1) * scale}px`,
    height: `${Math.max(1, height - 1) * scale}px`,
    backgroundImage: `url("thumbnails/${Math.floor(i / sheets.count)}.jpg")`,
    backgroundSize: `${sheets.columns * sheets.side * scale}px auto`,
    backgroundPosition: `${start(inSheet % sheets.columns)} ${start(Math.floor(inSheet / sheets.columns))}`,
  });
}

function format(name, value) {
  if (value === null || value === undefined) return "–";
  if (name === "pixels") return value.toLocaleString("en");
  if (name === "probability" && value >= 0.9995 && value < 1) return ">0.999"; // 1.000 would claim a certainty
  return value.toFixed(3);
}

function listFacts(i) {
  const facts = [["split", splits[images.split[i]]], ["class", labelOf(i)]];
  const predicted = classes[images.predicted[i]];
  if (predicted !== undefined) facts.push(["predicted", isWrong(i) ? `${predicted}, wrong` : predicted]);
  for (const [name, column] of Object.entries(figures))
    if (name !== "pixels" && column[i] !== null) facts.push([name.replaceAll("_", " "), format(name, column[i])]);
  if (i in images.issue) facts.push(["issues", images.issue[i].join(", ")]);
  if (i in images.near_duplicate_sets) facts.push(["duplicates", images.near_duplicate_sets[i].join("; ")]);
  const reason = images.reason[i];
  return [...facts, reason ? ["cannot be read", reason] : ["size", `${images.sizes[i][0].join(" × ")} px`]];
}

/* Moving about, and one image enlarged. */

function moveTo(position) {
  if (tiles.has(current)) tiles.get(current).tabIndex = -1;
  current = Math.max(0, Math.min(shown.length - 1, position));
  const row = rows[rowOf(current)], top = grid.getBoundingClientRect().top + row.top;
  const covered = getComputedStyle(search.form).position === "sticky" ? search.form.offsetHeight : 0;
  if (top < covered) scrollBy(0, top - covered);
  else if (top + row.height > innerHeight) scrollBy(0, Math.min(top + row.height - innerHeight, top - covered));
  render();
  tiles.get(current).tabIndex = 0;
}

function focusOn(position) {
  moveTo(position);
  tiles.get(current).focus({ preventScroll: true });
}

function positionInNextRow(step) {
  const lines = rows.filter((row) => !row.text), here = lines.indexOf(rows[rowOf(current)]), there = lines[here + step];
  return there ? Math.min(there.start + current - lines[here].start, there.end - 1) : current;
}

const STEPS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
const ROW_STEPS = { ArrowUp: -1, ArrowDown: 1 };

function enlarge(position) {
  moveTo(position);
  const i = shown[current], path = images.path[i];
  byId("title").textContent = path;
  byId("facts").replaceChildren(...listFacts(i).flatMap(([name, text]) => [make("dt", "", name), make("dd", "", text)]));
  if (!dialog.open) dialog.showModal();
  byId("reason").textContent = images.reason[i] ?? "";
  original.hidden = !folder || Boolean(images.reason[i]);
  scaled.hidden = true;
  original.alt = scaled.ariaLabel = `${path}, ${labelOf(i)}`;
  if (original.hidden) showScaled();
  else original.src = [folder, ...path.split("/").map(encodeURIComponent)].join("/");
}

/* The thumbnail instead: of an image in a shard or a store, of a drawing, or of a format that browsers do not show. */
function showScaled() {
  const i = shown[current], { clientWidth, clientHeight } = scaled.parentElement;
  [original.hidden, scaled.hidden] = [true, Boolean(images.reason[i])];
  if (scaled.hidden) return;
  const [width, height] = images.sizes[i][1];
  paint(scaled, i, Math.min(clientWidth / width, clientHeight / height));
}

for (const control of search.form.elements) control.addEventListener("input", choose);
search.form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("scroll", render, { passive: true }); // which browsers send once a frame
addEventListener("resize", arrange);
document.querySelector("details")?.addEventListener("toggle", render);
grid.addEventListener("click", (event) => {
  const tile = event.target.closest(".tile");
  if (tile) enlarge(Number(tile.dataset.position));
});
grid.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || !(event.key in STEPS || event.key in ROW_STEPS)) return;
  event.preventDefault();
  focusOn(event.key in STEPS ? current + STEPS[event.key] : positionInNextRow(ROW_STEPS[event.key]));
});
original.addEventListener("error", showScaled);
dialog.addEventListener("keydown", (event) => {
  if (event.key in STEPS) enlarge(current + STEPS[event.key]);
});
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
dialog.addEventListener("close", () => focusOn(current));
byId("previous").addEventListener("click", () => enlarge(current - 1));
byId("next").addEventListener("click", () => enlarge(current + 1));
byId("close").addEventListener("click", () => dialog.close());
choose();
