"""How a plan's page looks, in light and in dark. Hues are those that color-blind people tell apart
(Okabe and Ito's); whatever has one says it in words, too.
"""

CSS = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1c1e21;--soft:#5d646d;--line:#dcdfe3;
--column:#0072b2;--row:#d55e00;--batched:#b0568c;--vocabulary:#008a64;--gathered:#b98500;
--replicated:#8a9099;--other:#444;--parameters:#30475e;--gradients:#6b8cae;--slots:#b9cbdd;
--forward:#e4eefb;--backward:#f4e8f6;--rank:#e9eef4}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--card:#1d2024;--ink:#e8eaed;--soft:#9aa2ac;
--line:#343940;--column:#56b4e9;--row:#ff8a3c;--batched:#e39ac7;--vocabulary:#2fc79b;
--gathered:#f0c03f;--replicated:#858c96;--other:#ccc;--parameters:#a9c7e8;--gradients:#6688ab;
--slots:#3e5570;--forward:#1f3247;--backward:#3a2a40;--rank:#2a3038}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1.5rem 4rem;max-width:76rem;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:0 0 .7rem}
.lead{font-size:1.15rem;max-width:60rem;margin:.4rem 0 1.4rem}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:1rem 1.2rem;margin:0 0 1rem;overflow-x:auto}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(22rem,1fr));gap:1rem}
.say,footer,.path{color:var(--soft);font-size:.87rem}
.path{margin:.2rem 0;overflow-wrap:anywhere}
ul{margin:.3rem 0;padding-left:1.2rem}
.axes{margin-top:.8rem}
svg.mesh{display:block;max-width:100%;height:auto}
svg.defs{position:absolute}
svg text{fill:var(--ink);font:13px system-ui,sans-serif}
svg .mid{text-anchor:middle}
.rank{fill:var(--rank);stroke:var(--line)}
.glyph{color:var(--tone,var(--soft));vertical-align:middle}
.glyph,.defs{overflow:visible}
.part{fill:currentColor;opacity:.75}
.all{fill:none;stroke:currentColor}
.cut{stroke:currentColor;stroke-width:.8;fill:none}
.bar{margin:.35rem 0 .7rem}
.bar .who,.bar .sum{display:block;font-size:.87rem;color:var(--soft)}
.bar .sum b{color:var(--ink)}
.track{display:flex;height:1.1rem;border-radius:4px;overflow:hidden;background:var(--rank)}
.track span{display:block;height:100%}
.parameters{background:var(--parameters)}.gradients{background:var(--gradients)}
.slots{background:var(--slots)}
.key{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;vertical-align:-1px}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.3rem 1.3rem;font-size:.87rem}
.pill{display:inline-flex;align-items:center;gap:.35em;border:1px solid var(--line);
border-radius:99px;padding:0 .6em 0 .45em;margin-right:.35em;font-size:.84rem}
.pill i{width:.7em;height:.7em;border-radius:50%;background:var(--tone)}
.badge{display:inline-block;border-radius:5px;padding:0 .5em;margin:.1em .3em .1em 0;
font-size:.8rem;overflow-wrap:anywhere}
.badge::before{opacity:.7;margin-right:.35em}
.forward{background:var(--forward)}.forward.badge::before{content:"\\25b8"}
.backward{background:var(--backward)}.backward.badge::before{content:"\\25c2"}
.s-column{--tone:var(--column)}.s-row{--tone:var(--row)}.s-batched{--tone:var(--batched)}
.s-vocabulary{--tone:var(--vocabulary)}.s-gathered{--tone:var(--gathered)}
.s-replicated{--tone:var(--replicated)}.s-other{--tone:var(--other)}
details{margin:.35rem 0}
summary{cursor:pointer;overflow-wrap:anywhere}
.group,.fold{border-left:1px solid var(--line);padding-left:.9rem}
.fold{border:1px dashed var(--soft);border-radius:8px;padding:.4rem .9rem}
.times{background:var(--ink);color:var(--bg);border-radius:99px;padding:0 .6em;font-weight:600}
.layer{border-left:5px solid var(--tone);background:var(--bg);border-radius:0 6px 6px 0;
padding:.35rem .8rem}
.layer>summary i{color:var(--soft)}
table{border-collapse:collapse;font-size:.9rem;margin:.3rem 0}
th{text-align:left;font-weight:500;color:var(--soft)}
td,th{padding:.12rem .8rem .12rem 0;vertical-align:middle}
code{font:.85rem ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.flow,.why{margin:.2rem 0}.why{font-size:.9rem}.why b{font-weight:500;color:var(--soft)}
.flow>b{display:inline-block;min-width:5.2rem;font-weight:500;
color:var(--soft)}
.computes{border:1px solid var(--line);border-radius:5px;padding:0 .5em;font-size:.85rem}
.arrow{color:var(--soft)}
"""
