"""The report's style sheet: light and dark, phone to paper; system fonts, nothing fetched."""

STYLE = """
:root { color-scheme: light dark;
  --page:#f6f7f9; --card:#ffffff; --ink:#16202c; --soft:#566273; --line:#dfe4ea; --accent:#0b6e75;
  --all:#3d4a5c; --comprehension:#0b6e75; --generation:#b4500f; --good:#146c43; --good-bg:#e6f4ec;
  --bad:#a8201a; --bad-bg:#fdecea; }
@media (prefers-color-scheme: dark) { :root {
  --page:#11161c; --card:#1a2129; --ink:#e7ecf2; --soft:#a2aebb; --line:#303a46; --accent:#5cc4cb;
  --all:#c3cedb; --comprehension:#5cc4cb; --generation:#f2a065; --good:#7fd6a5; --good-bg:#173326;
  --bad:#ff9d94; --bad-bg:#3b1d1c; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--page); color:var(--ink); line-height:1.5; -webkit-text-size-adjust:100%;
  font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; font-size:16px; }
main, header > div { max-width:1080px; margin:0 auto; padding:0 20px; }
header { background:var(--card); border-bottom:1px solid var(--line); padding:36px 0 0; }
h1 { font-size:clamp(1.55rem,4vw,2.1rem); line-height:1.2; letter-spacing:-.015em; margin:0 0 6px; }
h2 { font-size:1.3rem; letter-spacing:-.01em; margin:48px 0 10px; }
h3 { font-size:1.02rem; margin:28px 0 8px; }
p { margin:6px 0 14px; max-width:72ch; } .soft, figcaption span { color:var(--soft); }
a { color:var(--accent); } nav { margin:22px 0 0; display:flex; flex-wrap:wrap; gap:4px 22px; padding-bottom:14px; }
nav a { text-decoration:none; font-weight:600; font-size:.93rem; } nav a:hover { text-decoration:underline; }
:focus-visible { outline:3px solid var(--accent); outline-offset:2px; }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(160px,1fr)); gap:12px; margin:24px 0 0;
  padding:0; list-style:none; }
.cards li { border:1px solid var(--line); border-top:3px solid var(--accent); border-radius:8px; padding:12px 14px; }
.cards b { display:block; font-size:1.6rem; line-height:1.2; font-variant-numeric:tabular-nums; letter-spacing:-.02em; }
.cards span { display:block; font-size:.86rem; font-weight:600; }
.cards small { display:block; margin-top:2px; color:var(--soft); font-size:.8rem; line-height:1.35; }
.grid { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr)); gap:14px; }
figure { margin:0; } .chart, .qa li, .drawing, .table { background:var(--card); border:1px solid var(--line);
  border-radius:8px; }
.chart { padding:12px 14px 8px; } .chart figcaption { font-size:.88rem; } .chart svg { display:block; width:100%; }
.keys { display:block; } .key { white-space:nowrap; margin-right:12px; font-size:.82rem; }
.key::before { content:""; display:inline-block; width:16px; border-top:3px solid var(--stroke); margin-right:5px;
  vertical-align:middle; }
.all { --stroke:var(--all); } .comprehension { --stroke:var(--comprehension); }
.generation { --stroke:var(--generation); } .key.generation::before { border-top-style:dashed; }
polyline { fill:none; stroke:var(--stroke); stroke-width:2; stroke-linejoin:round; }
polyline.generation { stroke-dasharray:6 2.5; } polyline.raw { stroke-width:1; opacity:.28; stroke-dasharray:none; }
polyline.held-out { stroke-width:1.2; stroke-dasharray:none; }
circle { fill:var(--card); stroke:var(--stroke); stroke-width:2; }
.key.held-out::before { width:10px; height:10px; border:2px solid var(--stroke); border-radius:50%; }
.gridline { stroke:var(--line); } .tick { fill:var(--soft); font-size:13px; }
.table { overflow-x:auto; } .table + p { margin-top:10px; } td { white-space:nowrap; }
table { border-collapse:collapse; width:100%; font-size:.92rem; }
th, td { padding:9px 14px; text-align:right; font-variant-numeric:tabular-nums; border-top:1px solid var(--line); }
th:first-child, td:first-child { text-align:left; } tbody th { font-weight:600; }
thead th { border-top:0; color:var(--soft); font-size:.82rem; font-weight:600; vertical-align:bottom; }
.qa { list-style:none; padding:0; margin:0; display:grid; gap:12px;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr)); }
.qa li { display:grid; grid-template-columns:72px 1fr; gap:14px; padding:12px; border-left:4px solid var(--good); }
.qa li.wrong { border-left-color:var(--bad); } .qa .none { display:grid; place-items:center; font-size:.72rem;
  height:72px; color:var(--soft); border:1px dashed var(--line); border-radius:4px; text-align:center; }
.qa img { width:72px; height:72px; object-fit:cover; border-radius:4px; background:#000; }
.qa p { margin:0 0 6px; font-weight:600; font-size:.94rem; overflow-wrap:anywhere; }
.qa dl { margin:0; font-size:.9rem; display:grid; grid-template-columns:auto 1fr; gap:1px 10px; }
dt { color:var(--soft); } dd { margin:0; overflow-wrap:anywhere; } .qa dd { min-width:0; }
.mark { display:inline-block; margin-top:6px; padding:0 8px; border-radius:99px; font-size:.76rem; font-weight:700;
  color:var(--good); background:var(--good-bg); } .wrong .mark { color:var(--bad); background:var(--bad-bg); }
.drawing { padding:12px; } .drawing > figcaption { font-size:.9rem; margin-bottom:8px; overflow-wrap:anywhere; }
.drawing > figcaption span { font-size:.8rem; white-space:nowrap; }
.four { display:grid; grid-template-columns:repeat(4,1fr); gap:8px; }
.four img, .four .none { width:100%; aspect-ratio:1; object-fit:contain; border-radius:4px; background:#000;
  display:block; image-rendering:pixelated; }
.four .none { background:none; border:1px dashed var(--line); display:grid; place-items:center; color:var(--soft);
  font-size:.72rem; }
.four figcaption { font-size:.74rem; line-height:1.35; margin-top:4px; font-variant-numeric:tabular-nums; }
.four figcaption b { display:block; font-size:.78rem; }
.wide { grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr)); }
details { margin:10px 0; } summary { cursor:pointer; font-weight:600; padding:4px 0; }
pre { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:14px; overflow-x:auto;
  font-size:.8rem; line-height:1.45; } .facts { display:grid; grid-template-columns:minmax(90px,auto) 1fr; gap:4px 18px;
  font-size:.93rem; margin:10px 0; }
footer { max-width:1080px; margin:56px auto 32px; padding:14px 20px 0; color:var(--soft); font-size:.82rem; }
@media (max-width:520px) { main, header > div { padding:0 14px; } header { padding-top:24px; }
  .cards { grid-template-columns:1fr 1fr; } .cards b { font-size:1.35rem; }
  th, td { padding:8px 9px; font-size:.84rem; }
  .four { gap:5px; } }
@media print { :root { --page:#fff; --card:#fff; --ink:#000; --soft:#444; --line:#bbb; --all:#333; --good:#146c43;
  --bad:#a8201a; --comprehension:#0b6e75; --generation:#b4500f; --accent:#0b6e75; color-scheme:light; }
  body { font-size:10.5pt; } nav { display:none; } h2 { break-after:avoid; margin-top:28px; }
  .chart, .qa li, .drawing, .cards li, tr { break-inside:avoid; } .mark { border:1px solid currentColor; } }
"""
