"""The style sheet of a report's page: light and dark, for a phone, a wide window and paper."""

from __future__ import annotations

import base64
import hashlib

# Shades from the least to the most. In dark the least is nearest to the dark ground. One hue, told
# apart by lightness alone, so that they are in order for every kind of colour vision.
_LIGHT = ("#edf4fc #d6e7fa #bbd7f6 #9dc4f1 #7cadea #5a95e0 #2a78d6 #1c5fb0 #144787 #0d3059").split()
_DARK = ("#14263d #17355a #194679 #1d579a #2569b8 #3d83dc #649fe8 #8dbaf0 #b7d4f7 #e3effc").split()
_LIGHT_INK = "#10161d " * 6 + "#ffffff " * 4
_DARK_INK = "#ffffff " * 5 + "#0b1118 " * 5

# Lines: Okabe and Ito's palette, darker for light ground and lighter for dark ground where a line
# would have less than a contrast of 3 to 1.
_LINES_LIGHT = "#0072b2 #d55e00 #007a5a #aa4499 #8a6a00 #3b6fd4 #111111 #7a7a7a".split()
_LINES_DARK = "#56b4e9 #ff9a4d #3fd0a4 #e08fc4 #f0c643 #9db8ff #f2f2f2 #a5a5a5".split()
_DASHES = ("none", "7 3", "2 3", "9 3 2 3", "5 2", "1 2", "12 4", "4 4")


def _variables(shades: list[str], ink: str, lines: list[str]) -> str:
    named = [
        *(f"--h{i}:{colour}" for i, colour in enumerate(shades)),
        *(f"--n{i}:{colour}" for i, colour in enumerate(ink.split())),
        *(f"--s{i}:{colour}" for i, colour in enumerate(lines)),
    ]
    return ";".join(named)


_CLASSES = "".join(
    [
        *(f".h{i}{{fill:var(--h{i})}}.n{i}{{fill:var(--n{i})}}" for i in range(len(_LIGHT))),
        *(
            f".line.s{i}{{stroke:var(--s{i});stroke-dasharray:{dash}}}.dot.s{i}{{fill:var(--s{i})}}"
            for i, dash in enumerate(_DASHES)
        ),
    ]
)

STYLE = f"""
:root{{color-scheme:light dark;--ground:#f6f7f9;--card:#fff;--ink:#14181d;--soft:#55606d;
--line:#dfe3e8;--grid:#e9ecf0;--mark:#0072b2;--code:#fff0d6;--code-ink:#6b4100;
{_variables(_LIGHT, _LIGHT_INK, _LINES_LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{--ground:#0e1116;--card:#161b22;--ink:#e8ecf1;
--soft:#9ba7b4;--line:#2b323b;--grid:#242b34;--mark:#56b4e9;--code:#3d2c0d;--code-ink:#ffd591;
{_variables(_DARK, _DARK_INK, _LINES_DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--ground);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}}
main,header,footer{{max-width:1320px;margin:0 auto;padding:0 clamp(14px,3vw,36px)}}
header{{padding-top:36px}}
h1{{font-size:clamp(1.5rem,4vw,2.1rem);line-height:1.2;margin:0 0 6px;letter-spacing:-.015em;
overflow-wrap:anywhere}}
h2{{font-size:1.25rem;margin:46px 0 6px;letter-spacing:-.01em}}
h3{{font-size:.95rem;margin:0 0 8px}}
p{{margin:4px 0 14px;max-width:76ch}}
.soft,figcaption,.about,footer{{color:var(--soft)}}
a{{color:var(--mark)}}
nav ul{{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;padding:0;margin:14px 0 0;
font-size:.92rem}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin:22px 0 0;padding:0;list-style:none}}
.tiles li,figure,.card{{background:var(--card);border:1px solid var(--line);border-radius:12px}}
.tiles li{{padding:12px 16px}}
.tiles b{{display:block;font-size:1.3rem;line-height:1.25;font-weight:650;
font-variant-numeric:tabular-nums}}
.tiles span{{color:var(--soft);font-size:.85rem}}
.grid{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,390px),1fr));gap:16px;
align-items:start;margin-top:14px}}
.grid>:only-child{{max-width:640px}}
.facts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr));
gap:0 28px;margin:14px 0 0}}
.facts div{{display:flex;justify-content:space-between;gap:14px;padding:5px 0;
border-bottom:1px solid var(--line);font-size:.9rem}}
.facts dt{{color:var(--soft);min-width:9ch}}
.facts dd{{margin:0;text-align:right;font-variant-numeric:tabular-nums}}
figure,.card{{margin:0;padding:16px 18px;min-width:0}}
figure>svg{{display:block;width:100%;height:auto;max-width:560px;margin:0 auto}}
figcaption{{font-size:.86rem;margin-top:8px}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;padding:0;margin:0 0 6px;
font-size:.84rem;color:var(--soft)}}
.legend li{{display:flex;align-items:center;gap:6px;min-width:0}}
.key{{width:28px;height:10px;flex:none}}.scale{{width:120px;height:10px;flex:none}}
svg text{{font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
fill:var(--ink);font-variant-numeric:tabular-nums}}
svg .tick{{fill:var(--soft);font-size:12px}}svg .label{{fill:var(--soft)}}
{_CLASSES}
svg text[class^=n]{{font-size:11px}}
{"".join(f"svg .n{i}{{fill:var(--n{i})}}" for i in range(len(_LIGHT)))}
.line{{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}}
.line.solid{{stroke-dasharray:none}}
.line.faint{{stroke-width:1;opacity:.38;stroke-dasharray:none}}
path.grid{{stroke:var(--grid);stroke-width:1}}.axis{{stroke:var(--soft);stroke-width:1}}
.bar{{fill:var(--mark)}}
.wide{{overflow-x:auto;margin-top:10px}}
.wide:focus-visible{{outline:2px solid var(--mark)}}
table{{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}}
th,td{{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);
vertical-align:top;white-space:nowrap;overflow-wrap:normal}}
td.long{{white-space:normal;overflow-wrap:anywhere;min-width:16ch}}
td.num,th.num{{text-align:right}}
thead th{{color:var(--soft);font-weight:600}}
details{{margin-top:10px;font-size:.88rem}}summary{{cursor:pointer;color:var(--soft)}}
details .wide{{max-height:340px;overflow:auto}}
pre{{white-space:pre-wrap;margin:2px 0 10px;
font:.86rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}}
.samples h4{{margin:10px 0 0;font-size:.8rem;color:var(--soft);font-weight:600}}
.code{{background:var(--code);color:var(--code-ink);border-radius:4px;padding:0 4px;
font-size:.85em}}
.rest{{color:var(--soft);font-style:italic}}
footer{{padding-top:30px;padding-bottom:50px;font-size:.86rem}}
@media print{{body{{background:#fff}}figure,.card{{break-inside:avoid}}nav{{display:none}}}}
"""


def policy() -> str:
    """Return the Content-Security-Policy of a page: it loads nothing, runs nothing, and takes this
    one style sheet, named by its digest.
    """
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
