"""The look and the behaviour of ``report.html``: its style sheet and its script, inlined, nothing fetched.

The style follows the reader's light or dark setting, becomes one column on a telephone (each table row a card) and
prints. The script draws the front in the page's own colours, again when they change, and copies commands; without it
the page still says everything.
"""

STYLE = """
:root { color-scheme: light dark;
  --page: #f4f6f8; --card: #ffffff; --ink: #171b21; --soft: #56606c; --line: #e0e5ea; --wash: #f7f9fb;
  --blue: #0072b2; --orange: #bf4b00; --green: #00704f; --amber: #8a5a00; --dot: #9aa5b1;
  --blue-wash: #e7f2fa; --green-wash: #e3f4ee; --amber-wash: #fbf1dc; --orange-wash: #fff3ea; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0e1116; --card: #161b22; --ink: #e7ebf0; --soft: #9da8b5; --line: #2b323b; --wash: #1b2129;
  --blue: #5ab4f0; --orange: #ff9d57; --green: #55cfa6; --amber: #e6b85c; --dot: #6f7b88;
  --blue-wash: #14293a; --green-wash: #12312a; --amber-wash: #33290f; --orange-wash: #2c2018; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 44px 24px 28px; }
.eyebrow { margin: 0 0 6px; color: var(--blue); font-weight: 600; font-size: 14px; letter-spacing: .02em; }
h1 { margin: 0; font-size: clamp(27px, 4.2vw, 44px); line-height: 1.14; letter-spacing: -.022em; font-weight: 750;
  text-wrap: balance; }
.sub { margin: 12px 0 0; color: var(--soft); font-size: 17px; overflow-wrap: anywhere; }
.sub strong { color: var(--ink); font-weight: 600; }
h2 { margin: 0 0 4px; font-size: 20px; letter-spacing: -.01em; }
.hint { margin: 0 0 16px; color: var(--soft); font-size: 14.5px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 24px; margin-top: 20px; }
.kpis { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin: 28px 0 0; }
.kpis > div { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 16px 20px; }
.kpis dt { color: var(--soft); font-size: 14px; }
.kpis dd { margin: 0; }
.kpis .value { font-size: 30px; line-height: 1.25; font-weight: 700; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.kpis .note { color: var(--soft); font-size: 13.5px; }
.pair { display: grid; grid-template-columns: 5fr 7fr; gap: 20px; align-items: start; }
#front { width: 100%; height: 470px; }
.still { display: block; width: 100%; height: auto; border-radius: 8px; background: #fff; }
.points { width: 100%; border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
.points th { text-align: right; color: var(--soft); font-weight: 600; font-size: 13px; padding: 6px 9px;
  border-bottom: 1px solid var(--line); vertical-align: bottom; }
.points td, .points tbody th { text-align: right; padding: 13px 9px 2px; vertical-align: top; white-space: nowrap; }
.points tbody th { color: inherit; font-size: 15px; border: 0; min-width: 158px; white-space: normal;
  overflow-wrap: anywhere; }
.points thead th { overflow-wrap: break-word; max-width: 170px; }
.points th:nth-child(4) { white-space: nowrap; }
.points th.left, .points td.left, .points tbody th { text-align: left; }
.points .words td { padding: 2px 9px 13px 43px; border-bottom: 1px solid var(--line); text-align: left;
  white-space: normal; }
.points tr.point + .words:last-child td, .points .words:last-child td { border-bottom: 0; }
.points .chosen > * { background: var(--orange-wash); }
.dim { color: var(--soft); font-size: 13.5px; }
.number { display: inline-grid; place-items: center; width: 25px; height: 25px; border-radius: 50%;
  background: var(--blue); color: var(--card); font-size: 13px; font-weight: 700; }
.number.original { background: var(--ink); } .number.written { background: var(--orange); }
.number.off { background: none; color: var(--soft); box-shadow: inset 0 0 0 1.5px var(--dot); }
.badge { display: inline-block; border-radius: 99px; padding: 1px 10px; font-size: 13px; font-weight: 600;
  background: var(--wash); color: var(--soft); }
.badge.certified { background: var(--green-wash); color: var(--green); }
.badge.accepted { background: var(--blue-wash); color: var(--blue); }
.badge.below { background: var(--amber-wash); color: var(--amber); }
.badge.noisy { background: var(--amber-wash); color: var(--amber); }
.state .badge + .badge { display: block; width: fit-content; margin-top: 3px; }
details summary { cursor: pointer; color: var(--blue); font-size: 14px; padding: 2px 0; width: fit-content;
  overflow-wrap: anywhere; }
.steps { font-size: 14px; color: var(--soft); }
details ol { margin: 6px 0 10px; padding-left: 22px; max-width: 78ch; }
details li { padding: 1px 0; }
.bars { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.bars th, .bars td { padding: 7px 0; font-weight: 400; text-align: left; }
.bars thead th { color: var(--soft); font-size: 13px; font-weight: 600; }
.bars tbody th { width: 45%; padding-right: 12px; overflow-wrap: anywhere; }
.bars td:last-child, .bars th:last-child { text-align: right; width: 72px; }
.bar { height: 12px; border-radius: 6px; background: var(--dot); min-width: 3px; }
.bar.model { background: var(--blue); } .bar.written { background: var(--orange); }
.facts { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: 9px 20px; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .9em; }
.command { display: flex; gap: 10px; align-items: stretch; margin-top: 8px; }
.command pre { flex: 1; min-width: 0; margin: 0; padding: 11px 14px; background: var(--wash); font-size: 14px;
  border: 1px solid var(--line); border-radius: 9px; white-space: pre-wrap; overflow-wrap: anywhere; }
.command button { flex: none; align-self: flex-start; min-width: 82px; padding: 11px 14px; border-radius: 9px;
  border: 1px solid var(--line); background: var(--card); color: var(--blue); cursor: pointer; font-family: inherit;
  font-size: 14px; font-weight: 600; }
.command button:hover { background: var(--blue-wash); }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
footer { color: var(--soft); font-size: 13.5px; margin: 22px 2px 0; }
.out { position: absolute; left: -999em; }
@media (max-width: 860px) { .kpis { grid-template-columns: 1fr 1fr; } .pair { grid-template-columns: 1fr; gap: 0; } }
@media (max-width: 1180px) {
  .points, .points tbody, .points tr, .points td, .points tbody th { display: block; }
  .points thead { position: absolute; left: -999em; }
  .points tr.point { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px 14px; padding: 14px 0 6px; }
  .points tr.chosen, .points tr.chosen + .words { background: var(--orange-wash); margin: 0 -12px; padding-left: 12px;
    padding-right: 12px; }
  .points tr.chosen { border-radius: 10px 10px 0 0; } .points tr.chosen + .words { border-radius: 0 0 10px 10px; }
  .points td, .points tbody th { padding: 2px 0; }
  .points td, .points tbody th { text-align: left; }
  .points tr.point > td[data-label]::before { content: attr(data-label); display: block; color: var(--soft);
    font-size: 12.5px; line-height: 1.3; }
  .points tr.point > .mark { grid-column: 1; grid-row: 1; }
  .points tr.point > .state { grid-column: 2 / -1; grid-row: 1; justify-self: end; }
  .points tbody th { grid-column: 1 / -1; }
  .points .words td { padding: 4px 0 14px; }
  .state .badge + .badge { display: inline-block; margin: 0 0 0 6px; } }
@media (max-width: 560px) {
  main { padding: 26px 14px 20px; } .card { padding: 18px 16px; } .kpis { gap: 10px; }
  .kpis > div { padding: 12px 14px; } .kpis .value { font-size: 25px; }
  .points tr.point { grid-template-columns: 1fr 1fr; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: 10px; }
  .command { flex-direction: column; } .command button { align-self: stretch; } #front { height: 400px; } }
@media print { body { background: #fff; } .card, .kpis > div { break-inside: avoid; }
  .command button { display: none; } }
"""

COPY = """
for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    let done = false;
    try { await navigator.clipboard.writeText(source.textContent); done = true; } catch (refused) {
      const range = document.createRange();
      range.selectNodeContents(source);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}
"""

DRAW = """
const data = JSON.parse(document.getElementById("front-data").textContent);
const place = document.getElementById("front");
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
function draw() {
  const [ink, soft, line, card, blue, orange, green, dot] =
    ["ink", "soft", "line", "card", "blue", "orange", "green", "dot"].map(color);
  const narrow = place.clientWidth < 560, look = { original: ink, written: orange, front: blue, other: soft };
  const of = (kinds) => data.points.filter((p) => kinds.includes(p.kind));
  const pick = (list, key) => list.map((p) => p[key]);
  const traces = [];
  if (data.candidates.length) traces.push({ name: "candidates", legendrank: 5, type: "scatter", mode: "markers",
    x: pick(data.candidates, "x"), y: pick(data.candidates, "y"), text: pick(data.candidates, "hover"),
    hovertemplate: "%{text}<extra></extra>",
    marker: { color: dot, opacity: 0.5, size: 8, symbol: pick(data.candidates, "symbol") } });
  traces.push({ name: "front", type: "scatter", mode: "lines", hoverinfo: "skip", showlegend: false,
    x: data.line.x, y: data.line.y, line: { color: blue, width: 3 } });
  for (const [kind, name, symbol, size, legendrank] of [
      ["other", "also measured", "circle", 19, 4], ["front", "front", "circle", 21, 2],
      ["original", "original", "diamond", 23, 1], ["written", "written", "circle", 27, 3]]) {
    const list = of([kind]);
    if (!list.length) continue;
    traces.push({ name, legendrank, type: "scatter", mode: "markers+text", x: pick(list, "x"), y: pick(list, "y"),
      text: pick(list, "number"),
      textfont: { color: kind === "other" ? soft : card, size: kind === "written" ? 14 : 12 },
      customdata: pick(list, "hover"), hovertemplate: "%{customdata}<extra></extra>",
      error_y: { type: "data", symmetric: false, array: list.map(() => 0), arrayminus: pick(list, "down"),
        color: look[kind], thickness: 1.6, width: 5 },
      marker: { color: kind === "other" ? card : look[kind], size, symbol, opacity: 1,
        line: { color: kind === "other" ? dot : card, width: kind === "other" ? 1.6 : 2 } } });
  }
  const layout = { paper_bgcolor: card, plot_bgcolor: card, hovermode: "closest", dragmode: narrow ? false : "zoom",
    font: { family: getComputedStyle(document.body).fontFamily, color: soft, size: 13 },
    margin: { l: narrow ? 52 : 84, r: 14, t: narrow ? 58 : 38, b: 56 },
    hoverlabel: { align: "left", bgcolor: card, bordercolor: line, font: { color: ink, size: 14 } },
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.01, yanchor: "bottom", itemsizing: "trace",
      bgcolor: "rgba(0,0,0,0)", font: { color: soft, size: 13 } },
    xaxis: { title: { text: data.x, font: { color: ink, size: 14 } }, range: data.rangeX, type: data.typeX,
      gridcolor: line, zeroline: false, ticksuffix: "x", nticks: narrow ? 5 : 10 },
    yaxis: { title: narrow ? undefined : { text: "Quality kept", font: { color: ink, size: 14 }, standoff: 14 },
      range: data.rangeY, gridcolor: line, zeroline: false, tickformat: data.formatY, automargin: true },
    shapes: data.keep === null ? [] : [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: data.keep, y1: data.keep,
      line: { color: green, width: 1.5, dash: "dash" } }],
    annotations: data.keep === null ? [] : [{ xref: "paper", x: 1, xanchor: "right", y: data.keep, yanchor: "bottom",
      text: data.keepText, showarrow: false, font: { color: green, size: 13 } }] };
  Plotly.react(place, traces, layout, { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
    // named one by one, so that none that uploads is among them
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]],
    toImageButtonOptions: { filename: "pareto", scale: 2 } });
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
let before = place.clientWidth < 560;
addEventListener("resize", () => {
  const now = place.clientWidth < 560;
  if (now !== before) { before = now; draw(); }
});
"""
