// State of the leaderboard page, as one Alpine component over the data of the page; plots are drawn by plots.js.
"use strict";

const DATA = frozen(JSON.parse(document.getElementById("data").textContent));
const TABLES = DATA.tables;
const SUMMARIES = Object.fromEntries(DATA.budgets.map((budget) => [budget.name, budget.summary]));
const NONE = "-"; // of the source filter: rows without a source
const NO_TABLE = { key: "", title: "", subtitle: "", resolution: "", columns: [], rows: [], gaps: [], searched: [] };
const NO_ROW = { key: "", method: "", metrics: {}, groups: [], runs: [], curve: [], held: {}, versus_erm: {} };
const STATE = {
  table: "", view: "table", sort: "budget", details: "", a: "", b: "", // a, b: rows compared
  find: "", q: "", dataset: "", backbone: "", budget: "", family: "", source: "",
};
const PLACES = ["table", "view", "details"]; // a change of these is a step that the back button undoes
const LIMIT = 200; // rows drawn before one asks for more

function frozen(value) { // what is frozen stays plain: Alpine makes no proxies of it
  if (value && typeof value === "object") Object.values(Object.freeze(value)).forEach(frozen);
  return value;
}

// What a kind of column sorts by (null: undefined, always last), and a cell's main text, text aside and spoken text.
const KINDS = {
  rank: { value: (row) => row.rank, up: true },
  method: { value: (row) => row.method.toLowerCase(), up: true },
  budget: { up: true, lead: (row) => row.budget, aside: (row) => (row.tag === "carried" ? "(carried)" : "") },
  wga: {
    value: (row) => row.metrics.wga?.mean,
    lead: (row) => (row.from_counts ? "≈ " : "") + percent(row.metrics.wga?.mean),
    aside: (row) => interval(row.metrics.wga, percent),
  },
  difference: {
    value: (row, key) => difference(row, key)?.mean,
    lead: (row, key) => (difference(row, key) ? signed(difference(row, key).mean) : key === "best" && row.rank ? "best" : "–"),
    aside: (row, key) => interval(difference(row, key), signed),
  },
  share: { value: (row, key) => row.metrics[key]?.mean, lead: (row, key) => percent(row.metrics[key]?.mean) },
  gap: {
    value: (row, key) => row.metrics[key]?.mean,
    lead: (row, key) => (row.amplified.includes(key) ? "> " : "") + signed(row.metrics[key]?.mean),
    spoken: (row, key) => (row.amplified.includes(key) ? " amplified" : ""),
  },
  agreement: {
    value: (row, key) => row.agreement[key],
    lead: (row, key) => (defined(row.agreement[key]) ? percent(row.agreement[key], 0) : ""),
  },
  labels: { value: (row) => row.labels, up: true, lead: labels },
  cost: {
    value: (row, key) => row.cost?.[key === "cost" ? "marginal" : key], up: true,
    lead: (row, key) => ratio(row.cost, key === "cost" ? "marginal" : key),
    aside: (row, key) => (key === "scratch" && row.cost?.search ? `+ ${fixed(row.cost.search)}` : ""),
  },
  seeds: { value: (row) => row.seeds.length, lead: (row) => String(row.seeds.length) },
};
const difference = (row, key) => (key === "best" ? row.versus_best : row.versus_erm.wga);

function cell(row, { key, kind }) {
  const { lead, aside = () => "", spoken = () => "" } = KINDS[kind];
  const wga = kind === "wga" ? row.metrics.wga : null;
  return {
    key, span: 1, lead: lead(row, key), aside: aside(row, key), spoken: spoken(row, key),
    css: `${kind} ${kind === "gap" && row.amplified.includes(key) ? "amplified" : ""}`,
    strip: wga && { "--mid": wga.mean, "--low": wga.low ?? wga.mean, "--high": wga.high ?? wga.mean },
  };
}

// ---------------------------------------------------------------------------------------------------------- the choices

const options = (values) => unique(values).filter(Boolean).map((value) => ({ value, text: value }));
const ROWS = TABLES.flatMap((table) => table.rows);
const TABLE_FILTERS = [
  { key: "dataset", label: "Dataset", options: options(TABLES.map((table) => table.dataset)) },
  { key: "backbone", label: "Backbone", options: options(TABLES.map((table) => table.backbone)) },
];
const ROW_FILTERS = [
  { key: "budget", label: "Budget", options: options(DATA.budgets.map((budget) => budget.name)) },
  { key: "family", label: "Family", options: options(ROWS.map((row) => row.family).sort()) },
  {
    key: "source", label: "Source",
    options: [{ value: NONE, text: "without" }, ...options(ROWS.map((row) => row.source).sort())],
  },
];
const FILTERS = [...TABLE_FILTERS, ...ROW_FILTERS];
const words = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const state = Object.fromEntries(Object.keys(STATE).map((key) => [key, given.get(key) ?? STATE[key]]));
  for (const { key, options } of FILTERS) if (!options.some((option) => option.value === state[key])) state[key] = "";
  if (!VIEWS.some((view) => view.key === state.view)) state.view = STATE.view;
  return state;
}

function writeHash(state) {
  const before = readHash();
  const kept = Object.entries(state).filter(([key, value]) => value && value !== STATE[key]);
  const hash = "#" + new URLSearchParams(kept);
  if (hash === (location.hash || "#")) return;
  const step = PLACES.some((key) => before[key] !== state[key]);
  history[step ? "pushState" : "replaceState"](null, "", hash);
}

const VIEWS = [{ key: "table", text: "Table" }, { key: "plots", text: "Plots" }, { key: "compare", text: "Compare" }];
const storage = (() => { try { return window.localStorage; } catch { return null; } })(); // may be forbidden for files

// -------------------------------------------------------------------------------------------------------- the component

let memo = {}; // the tables found, until another filter is set; a board has thousands of rows

const board = () => ({
  ...readHash(),
  filtersOpen: window.innerWidth > 700,
  limit: LIMIT,
  width: window.innerWidth,
  help: "",
  pinned: "",
  theme: storage?.getItem("worstgroup-theme") ?? "",
  views: VIEWS,
  total: TABLES.length,
  many: TABLES.length > 1,
  crowded: TABLES.length > 8,
  tableFilters: TABLE_FILTERS.filter((filter) => filter.options.length > 1),
  rowFilters: ROW_FILTERS.filter((filter) => filter.options.length > 1),

  init() {
    const restore = () => Object.assign(this, readHash());
    window.addEventListener("popstate", restore);
    window.addEventListener("hashchange", restore);
    window.addEventListener("resize", () => { this.width = window.innerWidth; });
    window.addEventListener("beforeprint", () => {
      for (const part of document.querySelectorAll("main details")) part.open = true;
    });
    Alpine.effect(() => writeHash(Object.fromEntries(Object.keys(STATE).map((key) => [key, this[key]]))));
    Alpine.effect(() => {
      document.documentElement.dataset.theme = this.theme;
      storage?.setItem("worstgroup-theme", this.theme);
    });
    Alpine.effect(() => {
      const { dialog } = this.$refs;
      if (this.detail.key && !dialog.open) dialog.showModal();
      if (!this.detail.key && dialog.open) dialog.close();
    });
  },

  // Tables and rows that match.
  matches(row) {
    const source = !this.source || (this.source === NONE ? !row.source : row.source === this.source);
    const fits = ["budget", "family"].every((key) => !this[key] || row[key] === this[key]);
    return source && fits && words(this.q).every((word) => row.method.toLowerCase().includes(word));
  },
  get filtered() { return Boolean(this.q || this.find || FILTERS.some(({ key }) => this[key])); },
  get found() {
    const asked = JSON.stringify(["q", "find", ...FILTERS.map((filter) => filter.key)].map((key) => this[key]));
    if (asked !== memo.asked) memo = { asked, found: TABLES.filter((table) => this.offers(table)) };
    return memo.found;
  },
  offers(table) {
    return ["dataset", "backbone"].every((key) => !this[key] || table[key] === this[key])
      && words(this.find).every((word) => table.title.toLowerCase().includes(word))
      && table.rows.some((row) => this.matches(row));
  },
  get current() { return this.found.find((table) => table.key === this.table) ?? this.found[0] ?? NO_TABLE; },
  get rows() { return this.current.rows.filter((row) => this.matches(row)); },
  get grouped() { return Boolean(this.sections[0]?.name); },
  get sections() {
    const key = this.sort.replace(/^-/, ""), down = this.sort.startsWith("-");
    const column = this.current.columns.find((each) => each.key === key);
    if (!column || key === "budget") {
      const some = d3.group(this.rows.slice(0, this.limit), (row) => row.budget);
      const sections = [...some].map(([name, rows]) => ({ key: name, name, summary: SUMMARIES[name], rows }));
      return down ? sections.reverse() : sections;
    }
    const value = (row) => (row.reason && key !== "method" ? null : KINDS[column.kind].value(row, key));
    const order = down ? d3.descending : d3.ascending;
    const rows = d3.sort(this.rows, (x, y) => defined(value(y)) - defined(value(x)) || order(value(x), value(y)));
    return [{ key: "all", name: "", summary: "", rows: rows.slice(0, this.limit) }];
  },
  tableLabel(table) {
    const shown = table.rows.filter((row) => this.matches(row)).length, all = table.rows.length;
    return `${table.title} (${shown === all ? all : `${shown} of ${all}`} rows)`;
  },
  chosen(filter, option) { return this[filter.key] === option.value; },
  set(key, value) { this[key] = value; },
  clear() { for (const key of ["q", "find", ...FILTERS.map((filter) => filter.key)]) this[key] = ""; },
  get filtersLabel() {
    const active = ["q", ...ROW_FILTERS.map((filter) => filter.key)].filter((key) => this[key]).length;
    return `Filter rows${active ? ` (${active})` : ""}`;
  },
  go(key) { Object.assign(this, { table: key, details: "", a: "", b: "", limit: LIMIT }); },
  step(by) {
    const at = this.found.indexOf(this.current) + by;
    if (this.found.length) this.go(this.found.at(at % this.found.length).key);
  },

  // The table's head and cells.
  sortBy({ key, kind }) {
    const first = KINDS[kind].up ? key : "-" + key, other = KINDS[kind].up ? "-" + key : key;
    this.sort = this.sort === first ? other : first;
  },
  ariaSort({ key }) { return this.sort === key ? "ascending" : this.sort === "-" + key ? "descending" : "none"; },
  arrow({ key }) { return this.sort === key ? "▲" : this.sort === "-" + key ? "▼" : ""; },
  explain(column, button) {
    const box = this.$refs.help, place = button.getBoundingClientRect();
    this.help = `${column.heading}: ${column.help}`;
    box.showPopover();
    box.style.top = `${place.bottom + 6}px`;
    box.style.left = `${Math.max(8, Math.min(place.left - 20, window.innerWidth - 336))}px`;
  },
  cells(row) {
    const [budget, ...others] = this.current.columns.slice(2);
    if (!row.reason) return [budget, ...others].map((column) => cell(row, column));
    const reason = { key: "reason", css: "reason", span: others.length, lead: `n/a: ${row.reason}`, aside: "", spoken: "" };
    return [cell(row, budget), reason];
  },
  show(row) { this.details = row.key; },
  rowClicked(row, event) {
    if (!row.reason && !event.target.closest("label, button") && getSelection().isCollapsed) this.show(row);
  },

  // Two rows to compare.
  isPicked(row) { return row.key === this.a || row.key === this.b; },
  pick(row) {
    if (row.key === this.a) [this.a, this.b] = [this.b, ""];
    else if (row.key === this.b) this.b = "";
    else this[this.a ? "b" : "a"] = row.key;
  },
  unpick() { this.a = this.b = ""; },
  get picks() { return this.a && this.b ? `${this.a} and ${this.b}` : `${this.a || this.b}: choose a second row to compare`; },
  get comparable() { return this.current.rows.filter((row) => !row.reason); },
  get baseline() { // ERM's row that the others are compared with has itself no difference
    const own = this.comparable.filter((row) => row.host === "erm" && !row.source && !Object.keys(row.versus_erm).length);
    return own.length === 1 ? own[0] : null;
  },
  get pair() {
    const known = (key) => this.comparable.find((row) => row.key === key);
    const best = d3.greatest(this.comparable, (row) => row.metrics.wga?.mean);
    const a = known(this.a) ?? best ?? NO_ROW;
    const b = known(this.b) ?? [this.baseline, ...this.comparable].find((row) => row && row !== a) ?? a;
    return { a, b };
  },
  paired(a, b, name) { // an interval of a - b, where the board holds one
    if (b === this.baseline) return a.versus_erm[name];
    return name === "wga" && a.budget === b.budget && b.rank && !b.versus_best ? a.versus_best : null;
  },
  get comparison() {
    const { a, b } = this.pair, flip = ({ mean, low, high }) => ({ mean: -mean, low: -high, high: -low });
    const names = this.current.columns.filter(({ kind }) => ["wga", "share", "gap"].includes(kind)).map(({ key }) => key);
    const lines = names.map((name) => {
      const [x, y] = [a.metrics[name], b.metrics[name]], back = this.paired(b, a, name);
      const both = this.paired(a, b, name) ?? (back ? flip(back) : x && y ? { mean: x.mean - y.mean } : null);
      const show = name.startsWith("gap_") ? signed : percent;
      const mark = (row) => (row.amplified?.includes(name) ? "> " : "");
      const between = a === b ? "" : estimate(both, signed);
      return { name, a: mark(a) + estimate(x, show), b: mark(b) + estimate(y, show), difference: between };
    });
    const plain = (name, show) => ({ name, a: show(a), b: show(b), difference: "" });
    return a.key ? [
      ...lines,
      plain("labels", labels),
      plain("cost", (row) => ratio(row.cost, "marginal")),
      plain("cost scratch", (row) => ratio(row.cost, "scratch")),
      plain("seeds", (row) => String(row.seeds.length)),
    ] : [];
  },

  // One row in detail.
  get detail() { return this.comparable.find((row) => row.key === this.details) ?? NO_ROW; },
  get facts() {
    const row = this.detail;
    if (!row.key) return [];
    return [
      ["table", this.current.title],
      ["wga", estimate(row.metrics.wga) + (row.metrics.wga?.sd ? `, sd ${percent(row.metrics.wga.sd)} over seeds` : "")],
      ["rank in its budget", String(row.rank ?? "n/a")],
      ["vs best of the budget", row.versus_best ? estimate(row.versus_best, signed) : "is the best"],
      ["vs erm", row.versus_erm.wga ? estimate(row.versus_erm.wga, signed) : "none"],
      ...Object.entries(row.held).map(([name, value]) => [name.replace("_", " "), estimate(value)]),
      ["labels", labels(row)],
      ["cost", `${ratio(row.cost, "marginal")} given ERM's checkpoint, ${ratio(row.cost, "scratch")} from scratch`],
      ["family", row.family],
      ["settings", row.settings || "defaults"],
      ...(row.from_counts ? [["intervals", "from group counts, the answers being kept back: wider than from answers"]] : []),
    ];
  },
  runCells(run) {
    const wilson = `[${run.wilson.map((bound) => percent(bound)).join(", ")}]`;
    const seconds = defined(run.device_s) ? fixed(run.device_s) : "n/a";
    return [run.seed, percent(run.wga), wilson, run.worst_group, percent(run.acc_mean), run.step ?? "–", seconds, run.run.slice(0, 12)];
  },
  stepRow(by) {
    const shown = this.sections.flatMap((section) => section.rows).filter((row) => !row.reason);
    if (shown.length) this.details = shown.at((shown.indexOf(this.detail) + by) % shown.length).key;
  },
  backdrop(event) { if (event.target === this.$refs.dialog) this.details = ""; },

  // Plots.
  get methods() { return unique(this.rows.filter((row) => !row.reason).map((row) => row.method)); },
  pin(name) { this.pinned = this.pinned === name ? "" : name; light(this.pinned); },
  light(name) { light(name); },
  drawPlots(host) {
    const rows = this.rows.filter((row) => row.metrics.wga), { gaps } = this.current, { baseline } = this;
    this.redraw(host, (width) => plotsOf(rows, gaps, baseline, width));
  },
  drawPair(host) {
    const { a, b } = this.pair, { gaps } = this.current;
    this.redraw(host, (width) => (a.key ? pairPlots(a, b, gaps, width) : []));
  },
  drawDetail(host) {
    const { detail } = this;
    this.redraw(host, (width) => (detail.key ? detailPlots(detail, width) : []));
  },
  redraw(host, make) { if (this.width) draw(host, make); }, // anew when the window's width changes
});
document.addEventListener("alpine:init", () => Alpine.data("board", board));
