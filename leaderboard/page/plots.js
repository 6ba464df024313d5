// Plots of the leaderboard page, as SVG by Observable Plot. Rows come as the page has them: numbers are fractions.
"use strict";

// ------------------------------------------------------------------------------------------------------ numbers as text

const defined = (value) => value !== null && value !== undefined;
const fixed = (value, digits = 1) => value.toFixed(digits).replace("-", "−");
const percent = (value, digits = 1) => (defined(value) ? fixed(100 * value, digits) : "n/a");
const signed = (value) => (defined(value) ? (value >= 0 ? "+" : "") + percent(value) : "n/a");
const interval = (from, show) => (from && defined(from.low) ? `[${show(from.low)}, ${show(from.high)}]` : "");
const estimate = (from, show = percent) => (from ? `${show(from.mean)} ${interval(from, show)}`.trim() : "n/a");
const count = (value) => value.toLocaleString("en");
const labels = (row) => count(row.labels) + (row.rendered ? ` + ${count(row.rendered)} rendered` : "");
const ratio = (cost, key) => (cost ? `${cost.same_session ? "" : "~"}${fixed(cost[key], 2)}` : "n/a");
const short = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
const unique = (values) => [...new Set(values)];

// --------------------------------------------------------------------------------------------------------- what all share

const LETTER = 6.6; // mean width in px at the plots' size
const share = (from, key) => 100 * (from[key] ?? from.mean);
const spread = (from) => ({ mean: 100 * from.mean, low: share(from, "low"), high: share(from, "high") });
const room = (names, most) => 16 + LETTER * d3.max(names, (name) => Math.min(most, name.length));
const columnsIn = (width, least, most) => Math.max(1, Math.min(most, Math.floor(width / least)));

function draw(host, make) {
  const padding = getComputedStyle(document.body), body = document.body.clientWidth;
  const width = host.clientWidth || body - parseFloat(padding.paddingLeft) - parseFloat(padding.paddingRight); // 0: not shown yet
  host.replaceChildren(...make(Math.max(300, width)).filter(Boolean));
}

function figure(heading, note, ...plots) {
  const made = document.createElement("figure"), caption = document.createElement("figcaption");
  caption.append(Object.assign(document.createElement("strong"), { textContent: heading }), ` ${note}`);
  made.append(caption, ...plots.filter(Boolean));
  return made;
}

function plot(options, marks) {
  const made = Plot.plot({ style: { fontSize: "12px", overflow: "visible" }, ...options, marks });
  made.addEventListener("input", () => light(made.value?.method));
  return made;
}

function light(name) { // one method, or group, in all plots
  for (const host of document.querySelectorAll(".drawn")) host.classList.toggle("lit", Boolean(name));
  for (const mark of document.querySelectorAll(".drawn [data-method]")) mark.classList.toggle("on", mark.dataset.method === name);
}

// Marks know their method, so that it can be lit, and their kind, so that they can be counted.
const tagged = (kind) => ({
  render(index, scales, values, dimensions, context, next) {
    const drawn = next(index, scales, values, dimensions, context);
    [...drawn.children].forEach((mark, i) => Object.assign(mark.dataset, { kind, method: this.data[index[i]].method }));
    return drawn;
  },
});

const axis = (label, more) => ({ label, labelArrow: "none", ...more });
const onTop = (label, more) => axis(label, { axis: "top", labelAnchor: "left", grid: true, ticks: 5, ...more });

// ------------------------------------------------------------------------------------------------------- plots of a table

function plotsOf(rows, gaps, baseline, width) {
  if (!rows.length) return [];
  const known = rows.filter((row) => row.cost?.scratch > 0), left = rows.length - known.length;
  const columns = columnsIn(width, 330, Math.max(2, gaps.length));
  const gapPlots = gaps.map((gap) => gapPlot(gap, rows, baseline, Math.floor(width / columns) - 8)).filter(Boolean);
  return [
    figure("Worst-group accuracy against labels used.", "Lines join a method over budgets, bars are 95 % intervals. "
      + "Named are ERM and the best row of each budget. Rows with the same number of labels stand side by side.",
      labelsPlot(rows, baseline, Math.min(width, 1100))),
    known.length && figure("Worst-group accuracy against cost from scratch, by budget.", "Filled and joined: no cheaper row "
      + "of the budget is as good (Pareto front). The draws of a search are not counted."
      + (left ? ` Left out for want of a cost: ${left}.` : ""), ...costPlots(known, width)),
    gapPlots.length && figure("Gaps by attribute.", "Closer to 0 is better. The dashed line is ERM; > marks a gap wider than "
      + "ERM's beyond its interval (amplified).", ...gapPlots),
  ];
}

function cloud(points, x) { // intervals, dots and a tip; names of those that are `named`
  const middle = d3.mean(d3.extent(points, (each) => each[x]));
  const text = (textAnchor, dx, fits) => Plot.text(points.filter((each) => each.named && fits(each[x])), {
    x, y: "mean", text: (each) => short(each.method, 24), textAnchor, dx,
    fill: "currentColor", stroke: "var(--paper)", strokeWidth: 4, ...tagged("name"),
  });
  const told = ({ row }) => [row.key, `wga ${estimate(row.metrics.wga)}`, `labels ${labels(row)}`,
    `cost from scratch ${ratio(row.cost, "scratch")}`].join("\n");
  return [
    Plot.ruleX(points, { x, y1: "low", y2: "high", stroke: "var(--accent)", strokeOpacity: 0.5, ...tagged("interval") }),
    Plot.dot(points, {
      x, y: "mean", r: 4, fill: (each) => (each.filled ? "var(--accent)" : "var(--paper)"),
      stroke: "var(--accent)", strokeWidth: 1.5, ...tagged("dot"),
    }),
    text("start", 8, (place) => place <= middle),
    text("end", -8, (place) => place > middle),
    Plot.tip(points, Plot.pointer({ x, y: "mean", title: told })),
  ];
}

const hostOf = (method) => method.replace(/@[a-z]+/, ""); // what a budget makes of a method is still that method

function labelsPlot(rows, baseline, width) {
  const used = rows.map((row) => row.labels).filter(Boolean);
  const [least, most] = (used.length ? d3.extent(used) : [10, 10]).map(Math.log10);
  const zero = least - Math.max(0.4, 0.25 * (most - least)); // a place for no label, left of the logarithmic axis
  const place = (number) => (number ? Math.log10(number) : zero), inset = Math.min(58, width / 10);
  const pixel = (most - zero) / (width - 64 - 2 * inset);
  const equal = d3.group(rows, (row) => row.labels);
  const points = rows.map((row) => {
    const others = equal.get(row.labels), beside = others.indexOf(row) - (others.length - 1) / 2;
    const x = place(row.labels) + beside * Math.min(11, width / 60, 110 / others.length) * pixel;
    const named = row === baseline || (row.rank && !row.versus_best);
    return { row, method: row.method, ...spread(row.metrics.wga), x, filled: true, named };
  });
  const whole = points.filter(({ row }) => !row.budget.includes(":")); // grants of some attributes are no steps of the ladder
  const lines = [...d3.group(whole, (each) => hostOf(each.method)).values()].filter((each) => each.length > 1);
  const ticks = d3.sort(equal.keys()).filter((number, i, all) => !i || place(number) - place(all[i - 1]) > 46 * pixel);
  return plot({
    width, height: 400, marginLeft: 44, marginBottom: 42, x: axis("", { insetLeft: inset, insetRight: inset }),
    y: axis("worst-group accuracy, percent", { grid: true, nice: true }),
  }, [
    Plot.axisX(ticks.map(place), axis("attribute labels used (0 apart, then logarithmic)", {
      labelAnchor: "center", tickFormat: (_, i) => count(ticks[i]),
    })),
    Plot.ruleX([(zero + least) / 2], { stroke: "var(--line)", strokeDasharray: "2 4" }),
    ...lines.map((line) => Plot.line(d3.sort(line, ({ row }) => row.labels), {
      x: "x", y: "mean", stroke: "var(--soft)", strokeOpacity: 0.6, ...tagged("line"),
    })),
    ...cloud(points, "x"),
  ]);
}

function costPlots(rows, width) { // one for each budget, on the same axes
  const columns = columnsIn(width, 330, 4);
  const low = d3.min(rows, (row) => share(row.metrics.wga, "low")), high = d3.max(rows, (row) => share(row.metrics.wga, "high"));
  const [from, to] = d3.extent(rows, (row) => row.cost.scratch);
  return [...d3.group(rows, (row) => row.budget)].map(([budget, own]) => {
    let best = -1;
    const front = d3.sort(own, (row) => row.cost.scratch, (row) => -row.metrics.wga.mean).filter(({ metrics }) => {
      const better = metrics.wga.mean > best;
      best = Math.max(best, metrics.wga.mean);
      return better;
    });
    const points = own.map((row) => {
      const leads = front.includes(row);
      return { row, method: row.method, ...spread(row.metrics.wga), cost: row.cost.scratch, filled: leads, named: leads };
    });
    const steps = d3.sort(points.filter((each) => each.filled), (each) => each.cost);
    return plot({
      width: Math.floor(width / columns) - 8, height: 250, title: budget, marginLeft: 40, marginBottom: 40, marginTop: 26,
      y: axis("wga, percent", { domain: d3.nice(low, high, 5), grid: true, ticks: 5 }),
      x: axis("cost from scratch, ERM = 1", {
        type: "log", domain: [from / 1.25, to * 1.25], labelAnchor: "center", ticks: 4, tickFormat: "~g",
        insetLeft: 12, insetRight: 12,
      }),
    }, [
      Plot.line(steps, { x: "cost", y: "mean", curve: "step-after", stroke: "var(--soft)", strokeDasharray: "3 3" }),
      ...cloud(points, "cost"),
    ]);
  });
}

function gapPlot(gap, rows, baseline, width) {
  const points = rows.filter((row) => row.metrics[gap]).map((row) => (
    { ...spread(row.metrics[gap]), method: row.method, key: row.key, from: row.metrics[gap], wider: row.amplified.includes(gap) }));
  if (!points.length) return null;
  const erm = baseline?.metrics[gap], wider = points.filter((each) => each.wider);
  const color = (each) => (each.wider ? "var(--warn)" : "var(--accent)");
  const told = (each) => `${each.key}\n${gap} ${estimate(each.from, signed)}${each.wider ? "\namplified: wider than ERM's" : ""}`;
  return plot({
    width, height: 60 + 20 * points.length, marginLeft: room(points.map((each) => each.key), 27), marginTop: 38, marginRight: 16,
    x: onTop(`${gap}, points`, { nice: true, insetLeft: 16, ticks: 4 }),
    y: { label: null, domain: points.map((each) => each.key), tickFormat: (key) => short(key, 27), tickSize: 0 },
  }, [
    Plot.ruleX([0], { stroke: "var(--soft)" }),
    erm && Plot.ruleX([100 * erm.mean], { stroke: "var(--second)", strokeDasharray: "4 3" }),
    Plot.ruleY(points, { y: "key", x1: "low", x2: "high", stroke: color, strokeOpacity: 0.5, ...tagged("interval") }),
    Plot.dot(points, { y: "key", x: "mean", r: 4, fill: color, ...tagged("dot") }),
    Plot.text(wider, { y: "key", x: "low", text: () => ">", dx: -9, fontWeight: 700, fill: "var(--warn)", ...tagged("amplified") }),
    Plot.tip(points, Plot.pointerY({ y: "key", x: "mean", title: told })),
  ]);
}

// ------------------------------------------------------------------------------------------------------- plots of one row

// Bars of items { label, who, method, mean, low, high, text in the bar and beside it }; those of `first` in one colour.
function bars(items, first, x, width) {
  const names = unique(items.map((item) => item.label)), sides = unique(items.map((item) => item.who));
  const most = width < 500 ? 22 : 40, beside = LETTER * d3.max(items, (item) => item.beside.length);
  const color = (item) => (item.who === first ? "var(--accent)" : "var(--second)");
  return plot({
    width, height: 44 + names.length * (8 + 15 * sides.length),
    marginLeft: room(names, most), marginTop: 36, marginRight: 20 + beside,
    x, y: { axis: null, domain: sides, padding: 0.12 },
    fy: { label: null, domain: names, padding: 0.2, axis: "left", tickFormat: (name) => short(name, most), tickSize: 0 },
  }, [
    Plot.ruleX([0], { stroke: "var(--soft)" }),
    Plot.barX(items, { fy: "label", y: "who", x: "mean", fill: color, fillOpacity: 0.35, ...tagged("bar") }),
    Plot.ruleY(items, { fy: "label", y: "who", x1: "low", x2: "high", stroke: color, strokeWidth: 2 }),
    Plot.text(items, { fy: "label", y: "who", x: 0, dx: 4, textAnchor: "start", text: "text", fill: "currentColor" }),
    Plot.text(items, {
      fy: "label", y: "who", frameAnchor: "right", dx: 12, textAnchor: "start", text: "beside", fill: "var(--soft)",
    }),
  ]);
}

const ACCURACY = onTop("accuracy on test, percent", { domain: [0, 100] });
const groupBars = (row, beside) => row.groups.filter((group) => group.accuracy).map((group) => ({
  label: group.name, who: row.key, method: group.name, ...spread(group.accuracy),
  text: percent(group.accuracy.mean), beside: beside(group),
}));

function pairPlots(a, b, gaps, width) {
  const rows = unique([a, b]), narrow = Math.min(width, 900);
  const wide = rows.flatMap((row) => gaps.filter((gap) => row.metrics[gap]).map((gap) => ({
    label: gap, who: row.key, method: row.method, ...spread(row.metrics[gap]), text: "", beside: signed(row.metrics[gap].mean),
  })));
  const groups = rows.flatMap((row) => groupBars(row, (group) => count(group.m_test)));
  return [
    groups.length && figure("Accuracy by group.", "At the right the test images; lines are 95 % intervals.",
      bars(groups, a.key, ACCURACY, narrow)),
    wide.length && figure("Gaps.", "Closer to 0 is better; lines are 95 % intervals.",
      bars(wide, a.key, onTop("points", { nice: true }), narrow)),
  ];
}

function detailPlots(row, width) {
  const groups = groupBars(row, (group) => `${count(group.n_train)} / ${count(group.m_test)}`), many = groups.length > 16;
  const absent = row.groups.filter((group) => !group.accuracy).map((group) => group.name);
  const note = `At the right train / test images; lines are 95 % intervals.${many ? " Worst first." : ""}`
    + (absent.length ? ` Without test images: ${absent.join(", ")}.` : "");
  return [
    groups.length && figure("Accuracy by group.", note,
      bars(many ? d3.sort(groups, (group) => group.mean) : groups, row.key, ACCURACY, width)),
    row.curve.length && figure("Validation accuracy by epoch.",
      "Mean over seeds; the lowest at the end is marked. Ticks below: epochs that were selected.", curves(row, width)),
  ];
}

function curves(row, width) {
  const names = row.curve_names, most = width < 500 ? 18 : 30, gap = 5; // between names, in percent
  const points = names.flatMap((name, g) => row.curve.map((epoch, i) => (
    { method: name, epoch: i + 1, mean: 100 * (epoch[g] ?? NaN) }))); // a group that validation lacks has no line
  const ends = d3.sort(points.filter((each) => each.epoch === row.curve.length && each.mean >= 0), (each) => each.mean);
  ends.forEach((end, i) => { end.place = i ? Math.max(end.mean, ends[i - 1].place + gap) : end.mean; });
  [...ends].reverse().forEach((end, i, all) => { end.place = Math.min(end.place, i ? all[i - 1].place - gap : 103); });
  const color = (each) => (each.method === ends[0]?.method ? "var(--warn)" : "var(--accent)");
  return plot({
    width, height: 320, marginLeft: 40, marginBottom: 40, marginRight: room(names, most),
    x: axis("epoch", { labelAnchor: "center", tickFormat: "d", ticks: Math.min(10, row.curve.length) }),
    y: axis("validation accuracy, percent", { domain: [0, 100], grid: true }),
  }, [
    Plot.line(points, { x: "epoch", y: "mean", z: "method", stroke: color, strokeWidth: 1.5, ...tagged("line") }),
    Plot.tickX(row.runs.filter((run) => run.step), { x: "step", insetTop: 250, stroke: "currentColor", strokeWidth: 1.5 }),
    Plot.text(ends, {
      x: "epoch", y: "place", text: (each) => short(each.method, most), textAnchor: "start", dx: 8, fill: color, ...tagged("name"),
    }),
    Plot.tip(points, Plot.pointer({ x: "epoch", y: "mean", title: (each) => `${each.method}\nepoch ${each.epoch}: ${fixed(each.mean)}` })),
  ]);
}
