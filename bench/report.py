"""One record of a benchmark as one HTML file that needs nothing else, and its roofline as a PNG."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLORS = {"float32": "#2f6fde", "bfloat16": "#d9480f", "float16": "#2b8a3e", "float64": "#862e9c"}
GREY = "#857f73"
COMPUTE = ("float32", "bfloat16", "float16", "int8")
LEVELS = ("L1", "L2", "L3", "memory")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1080, 560, 70, 30, 24, 52

STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#23211d;--soft:#6f6a60;--line:#e4e0d6;--ours:#2f6fde1f;
 --good:#2b8a3e;--bad:#c92a2a;--bar:#cfc8b8}
@media(prefers-color-scheme:dark){:root{--paper:#191816;--card:#211f1c;--ink:#ece8df;--soft:#a39c8e;--line:#3a3732;
 --ours:#5c94ff26;--good:#69db7c;--bad:#ff8787;--bar:#55504a}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1200px;margin:0 auto;padding:40px 24px 64px}h1{font-size:30px;margin:0 0 4px;letter-spacing:-.02em}
h2{font-size:19px;margin:44px 0 10px}.soft,figcaption{color:var(--soft)}p{max-width:80ch}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin:24px 0}
.card,figure,.scroll{background:var(--card);border:1px solid var(--line);border-radius:10px}
.card{padding:14px 16px}.card b{display:block;font-size:26px;font-variant-numeric:tabular-nums;letter-spacing:-.02em}
figure{margin:0;padding:12px}figcaption{font-size:13px;padding:4px 8px}svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font:12px system-ui,sans-serif;
 paint-order:stroke;stroke:var(--card);stroke-width:4px}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:6px 9px;text-align:right;white-space:nowrap}th{color:var(--soft);font-weight:500;font-size:12.5px}
td:first-child,th:first-child,td.text{text-align:left}tr.case td{border-top:1px solid var(--line);font-weight:600;
 padding-top:12px;text-align:left}tr.ours{background:var(--ours)}tr.ours td:first-child{font-weight:600}
.bar{display:inline-block;width:110px;height:9px;border-radius:5px;background:var(--line);overflow:hidden}
.bar i{display:block;height:100%;background:var(--bar);border-radius:5px}tr.ours .bar i{background:var(--c)}
.dot{display:inline-block;width:9px;height:9px;border-radius:50%;background:var(--c);margin-right:7px}
.good{color:var(--good)}.bad{color:var(--bad)}code,pre{font:12.5px ui-monospace,Menlo,Consolas,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere}summary{cursor:pointer;color:var(--soft)}
"""


def write(record: dict[str, Any], path: Path) -> list[Path]:
    """JSON first, then the HTML made from it, then the PNG where matplotlib is installed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    written = [path, path.with_suffix(".html")]
    written[1].write_text(html(record))
    try:
        png(record, path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
    except ModuleNotFoundError as missing:
        if missing.name != "matplotlib":
            raise
    return written


def read(path: Path) -> dict[str, Any]:
    """A record that `write` wrote; ValueError where the file holds anything else."""
    try:
        record: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}), expected a record of `metate bench`") from None
    parts = {"command", "machine", "versions", "time", "rows"}
    if not isinstance(record, dict) or not parts <= record.keys():
        raise ValueError(f"{path} has no {', '.join(sorted(parts))}, expected a record of `metate bench`")
    return record


# What the tables and both plots show.


def timed(record: dict[str, Any]) -> list[Row]:
    """Rows with a speed: a wrong result has none to show."""
    return [row for row in record["rows"] if row["status"] == "ok" and "p50" in row]


def plotted(record: dict[str, Any]) -> list[Row]:
    """Those that do all the work that is counted, which takes their time: results are exact."""
    return [row for row in timed(record) if works(row)]


def works(row: Row) -> bool:
    return row.get("recall") is None and not row.get("call")


def groups(record: dict[str, Any]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows of one case together, ours first, the rivals from fast to slow."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in record["rows"]:
        found.setdefault((row["workload"], row["label"], row["dtype"]), []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: (not row["ours"], row["status"] != "ok", row.get("p50", 0)))
    return found


def _time(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _speed(row: Row) -> str:
    if row.get("recall") is not None:
        return f"recall {recall(row)}"
    if row.get("call"):
        return ""
    if row["bound"] == "memory":
        return f"{row['bytes_per_second'] / 1e9:.3g} GB/s"
    flops = row["flops_per_second"]
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"


def recall(row: Row) -> str:
    """The mean over samples, and by how much it is above the best rival's, give or take a standard error."""
    gap = row.get("recall_gap")
    return f"{row['recall']:.3f}" + (f" ({gap[0]:+.4f} ± {gap[1]:.4f})" if gap else "")


def _limit(row: Row) -> str:
    return f"{row['of_limit']:.0%}" if works(row) else ""


def _geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


# The plot: operations a byte against operations a second, both logarithmic.


class Axes:
    """Where a point of the roofline lies on the canvas; the ranges hold every point and the ridge of every ceiling."""

    def __init__(self, record: dict[str, Any]) -> None:
        rows, ceiling = plotted(record), record["ceilings"]["all"]
        peaks = [ceiling[name] for name in COMPUTE if name in ceiling]
        intensities = [row["flops"] / row["bytes"] for row in rows] or [1.0]
        ridges = [peak / ceiling["memory"] for peak in peaks]
        speeds = [row["flops_per_second"] for row in rows] or [min(peaks)]
        self.x = (min(*intensities, *ridges) / 3, max(*intensities, *ridges) * 3)
        self.y = (min(*speeds, self.x[0] * ceiling["memory"]) / 1.5, max(*peaks, *speeds) * 1.8)

    def at(self, intensity: float, speed: float) -> tuple[float, float]:
        across = math.log(intensity / self.x[0]) / math.log(self.x[1] / self.x[0])
        up = math.log(speed / self.y[0]) / math.log(self.y[1] / self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    @staticmethod
    def ticks(low: float, high: float) -> Iterator[float]:
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
            for digit in (1, 2, 5):
                if low <= digit * 10.0**power <= high:
                    yield digit * 10.0**power


def roofs(record: dict[str, Any]) -> list[tuple[str, float, str]]:
    """The slanted ceilings: name, bytes a second, and whether all threads or one."""
    ceilings = record["ceilings"]
    found = [(level, ceilings["all"][level], "all") for level in LEVELS if level in ceilings["all"]]
    if "1" in ceilings:
        found.append(("memory, 1 thread", ceilings["1"]["memory"], "one"))
    return found


def flats(record: dict[str, Any]) -> list[tuple[str, float, str]]:
    """The level ceilings, as `roofs`."""
    ceilings, used = record["ceilings"], {row["dtype"] for row in record["rows"]}
    found = [
        (name, ceilings["all"][name], "all")
        for name in COMPUTE
        if name in ceilings["all"] and name in used | {"float32"}
    ]
    if "1" in ceilings:
        found.append(("float32, 1 thread", ceilings["1"]["float32"], "one"))
    return found


def svg(record: dict[str, Any]) -> str:
    axes = Axes(record)
    parts = [*_grid(axes), *_ceilings(record, axes)]
    for rows in groups({"rows": plotted(record)}).values():
        parts += _points(rows, axes)
    parts += _shares(plotted(record), axes)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="roofline">{"".join(parts)}</svg>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _grid(axes: Axes) -> Iterator[str]:
    for x in axes.ticks(*axes.x):
        left, bottom = axes.at(x, axes.y[0])
        yield _line(left, bottom, left, TOP, 'stroke="var(--line)"')
        yield f'<text x="{left:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{x:g}</text>'
    for y in axes.ticks(*axes.y):
        left, top = axes.at(axes.x[0], y)
        yield _line(left, top, WIDTH - RIGHT, top, 'stroke="var(--line)"')
        yield f'<text x="{left - 8:.1f}" y="{top + 4:.1f}" text-anchor="end">{y / 1e9:g}</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 12}" text-anchor="end">operations a byte (compulsory traffic)</text>'
    yield f'<text x="{LEFT - 56}" y="{TOP - 8}">GFLOP/s</text>'


def _ceilings(record: dict[str, Any], axes: Axes) -> Iterator[str]:
    top = max(speed for _, speed, _ in flats(record))
    for name, bandwidth, threads in roofs(record):
        start = max(axes.x[0], axes.y[0] / bandwidth)
        end = min(axes.x[1], top / bandwidth)
        if end <= start:
            continue
        weight = "1.8" if name == "memory" else "1"
        dash = "" if name == "memory" else 'stroke-dasharray="5 4"' if threads == "all" else 'stroke-dasharray="2 4"'
        (x1, y1), (x2, y2) = axes.at(start, start * bandwidth), axes.at(end, end * bandwidth)
        yield _line(x1, y1, x2, y2, f'stroke="var(--soft)" stroke-width="{weight}" {dash}')
        angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
        x, y = x1 + (x2 - x1) * 0.06, y1 + (y2 - y1) * 0.06
        label = f"{name} {bandwidth / 1e9:.3g} GB/s"
        yield f'<text x="{x:.1f}" y="{y - 5:.1f}" transform="rotate({angle:.1f} {x:.1f} {y:.1f})">{label}</text>'
    for name, speed, threads in flats(record):
        x1, y = axes.at(max(axes.x[0], speed / record["ceilings"]["all"]["memory"] / 40), speed)
        color, dash = COLORS.get(name, "var(--soft)"), "" if threads == "all" else 'stroke-dasharray="2 4"'
        yield _line(max(x1, LEFT), y, WIDTH - RIGHT, y, f'stroke="{color}" stroke-width="1.8" {dash}')
        label = f"{name} {speed / 1e9:.4g} GFLOP/s"
        yield f'<text x="{max(x1, LEFT) + 6:.1f}" y="{y - 6:.1f}">{label}</text>'


def _points(rows: list[Row], axes: Axes) -> Iterator[str]:
    for row in reversed(rows):  # ours last, on top
        intensity, color = row["flops"] / row["bytes"], COLORS.get(row["dtype"], "var(--ink)")
        x, y = axes.at(intensity, row["flops_per_second"])
        ends = [axes.at(intensity, row["flops"] / row[p])[1] for p in ("p20", "p80")]
        yield "<g>" + _line(x, ends[0], x, ends[1], f'stroke="{color}" stroke-width="1.5"')
        fill = f'fill="{color}"' if row["ours"] else 'fill="var(--card)" fill-opacity="0.6"'
        radius = 6 if row["ours"] else 4
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {fill} stroke="{color}" stroke-width="1.5">'
        case = f"{row['contender']}\n{row['workload']}, {row['label']}, {row['dtype']}"
        speed = f"{_time(row['p50'])}, {_speed(row)}, {row['of_limit']:.0%} of the limit"
        yield f"<title>{escape(case)}\n{speed}</title></circle>"
        yield "</g>"


def _shares(rows: list[Row], axes: Axes) -> Iterator[str]:
    """Our shares of the limit beside the marks, where they do not hide one another."""
    placed: list[tuple[float, float]] = []
    for row in rows:
        x, y = axes.at(row["flops"] / row["bytes"], row["flops_per_second"])
        if row["ours"] and all(abs(x - a) > 36 or abs(y - b) > 14 for a, b in placed):
            placed.append((x, y))
            yield f'<text x="{x + 9:.1f}" y="{y + 4:.1f}">{row["of_limit"]:.0%}</text>'


# The page.


def html(record: dict[str, Any]) -> str:
    machine, commit = record["machine"], record["git"].get("sha", "")[:10]
    where = machine["gpus"][0]["name"] if machine["gpus"] else machine["cpu"]
    details = [
        record["time"],
        f"{machine['threads']} threads",
        f"ISA {machine['isa'][0] if machine['isa'] else 'none'}",
    ]
    details += [f"{name} {version}" for name, version in record["versions"].items()]
    if commit:
        details.append(f"commit {commit}{' with changes' if record['git']['dirty'] else ''}")
    full = {key: value for key, value in record.items() if key != "rows"}
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>metate bench: {escape(where)}</title><style>{STYLE}</style><main>
<h1>{escape(where)}</h1><div class="soft">{escape(" · ".join(details))}</div>
{_cards(record)}
<h2>Roofline</h2><figure>{svg(record)}<figcaption>{_legend(record)}</figcaption></figure>
<h2>Every case</h2>{_table(record)}{_protocol(record)}
<h2>Machine</h2><details><summary>ceilings, versions, conditions</summary>
<pre>{escape(json.dumps(full, indent=1))}</pre></details></main></html>
"""


def _cards(record: dict[str, Any]) -> str:
    cards = []
    for workload in dict.fromkeys(row["workload"] for row in record["rows"]):
        ours = [row for row in timed(record) if row["ours"] and row["workload"] == workload]
        ratios = [row["times_best_rival"] for row in ours if "times_best_rival" in row]
        if ratios:
            text = f"{escape(workload)}: speed over the best rival's, geometric mean of {len(ratios)}"
            if works(ours[0]):
                text += f"; up to {max(row['of_limit'] for row in ours):.0%} of the limit"
            cards.append(_card(f"<b>{_geometric_mean(ratios):.2f}×</b>", text))
    wrong = sum(row["status"] == "wrong" and row["ours"] for row in record["rows"])
    checked = sum(row["error"] is not None and row["ours"] for row in record["rows"])
    verdict = f'<b class="bad">{wrong} wrong</b>' if wrong else f'<b class="good">{checked} of {checked}</b>'
    cards.append(_card(verdict, "results within twice the error of plain torch"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(headline: str, text: str) -> str:
    return f'<div class="card">{headline}<span class="soft">{text}</span></div>'


def _legend(record: dict[str, Any]) -> str:
    used = dict.fromkeys(row["dtype"] for row in record["rows"])
    dots = " ".join(f'<span style="--c:{COLORS.get(name)}"><i class="dot"></i>{name}</span>&ensp;' for name in used)
    return (
        f"{dots} filled: metate, with its share of the limit; hollow: rivals. Bars: 20th to 80th percentile. "
        "Every ceiling was measured on this machine just before; a share of a CPU's memory is of what it gave beside "
        "the row. Point at a mark for its name."
    )


def _table(record: dict[str, Any]) -> str:
    names = ("", "", "median", "p20 – p80", "speed", "of the limit", "× best rival", "error / allowed", "")
    lines = [f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"]
    for (workload, label, dtype), rows in groups(record).items():
        best = min((row["p50"] for row in rows if row["status"] == "ok" and "p50" in row), default=1.0)
        color = COLORS.get(dtype, "var(--soft)")
        case = f'<span class="soft">{escape(label)} · {dtype}</span>'
        title = f'<i class="dot" style="--c:{color}"></i>{escape(workload)} {case}'
        lines.append(f'<tr class="case"><td colspan="{len(names)}">{title}</td></tr>')
        lines += [_table_row(row, best, color) for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _table_row(row: Row, best: float, color: str) -> str:
    kind = ' class="ours"' if row["ours"] else ""
    name = f"<td>{escape(row['contender'])}</td>"
    if row["status"] != "ok" or "p50" not in row:
        tone = "bad" if row["status"] in ("wrong", "failed") else "soft"
        reason = escape(f"{row['status']}: {row['detail']}")
        return f'<tr{kind}>{name}<td class="text {tone}" colspan="8">{reason}</td></tr>'
    width = 100 * best / row["p50"]
    ratio = f"{row['times_best_rival']:.2f}" if row["ours"] and "times_best_rival" in row else ""
    tone = "good" if ratio and row["times_best_rival"] >= 1 else "bad"
    note = f"disturbed {row['disturbed']:.0%}" if row["disturbed"] else ""
    cells = [
        f'<span class="bar" style="--c:{color}"><i style="width:{width:.1f}%"></i></span>',
        _time(row["p50"]),
        f"{_time(row['p20'])} – {_time(row['p80'])}",
        _speed(row),
        _limit(row),
        f'<b class="{tone}">{ratio}</b>',
        "" if row["error"] is None else f"{row['error']:.1e} / {row['allowed']:.1e}",
        f'<span class="soft">{note}</span>',
    ]
    return f"<tr{kind}>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _protocol(record: dict[str, Any]) -> str:
    protocol = record["protocol"]
    return f"""<p class="soft">Fresh random inputs, contenders in {protocol["rounds"]} alternating rounds,
{protocol["time"]}; the limit is the longer of operations over the measured peak and compulsory bytes over the measured
bandwidth. The error is the largest, relative to the largest true value in float64; ours may be twice that of plain
torch and one unit in the last place, a rival's {protocol["rival_slack"]} times that. A wrong result shows no speed.
"disturbed": the share of the time that our threads waited for a core.</p>"""


# For the project's own pages.


def page(records: Iterable[dict[str, Any]]) -> str:
    """docs/measured.md."""
    head = ["# Measured", "", "Written by `metate docs --measured` from records of `metate bench`; do not edit.", ""]
    return "\n".join([*head, *map(section, records)])


def section(record: dict[str, Any]) -> str:
    """Our rows beside the best rival of each case."""
    lines = [
        f"## `{record['command']}`",
        "",
        _origin(record),
        "",
        "| case | dtype | metate | of the limit | best rival | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    for (workload, label, dtype), ours, best in compared(record):
        speed = ", ".join(filter(None, (_time(ours["p50"]), _speed(ours))))
        rival, ratio = f"{best['contender']}, {_time(best['p50'])}", f"{ours['times_best_rival']:.2f}"
        lines.append(f"| {workload}, {label} | {dtype} | {speed} | {_limit(ours)} | {rival} | {ratio} |")
    return "\n".join(lines) + "\n"


def summary(records: Sequence[dict[str, Any]]) -> str:
    """How much faster than the best rival of each case, in a line for each operator and dtype: README's tables."""
    machines: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        machines.setdefault(_machine(record), []).append(record)
    return "\n\n".join(f"{_origins(found)}\n\n{_spreads(found)}" for found in machines.values())


def _origins(records: Sequence[dict[str, Any]]) -> str:
    """One machine, the versions of all who took part on it, days, commands."""
    versions = dict.fromkeys(version for record in records for version in _versions(record))
    days = dict.fromkeys(record["time"][:10] for record in records)
    commands = ", ".join(f"`{record['command']}`" for record in records)
    return f"{_machine(records[0])}; {', '.join(versions)}; {', '.join(days)}: {commands}."


def _spreads(records: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| | dtype | cases | times as fast as the best rival: least, median, most | of the limit, median |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        rows: dict[tuple[str, str], list[Row]] = {}
        for (workload, _, dtype), ours, _ in compared(record):
            rows.setdefault((workload, dtype), []).append(ours)
        for (workload, dtype), found in rows.items():
            ratios = [row["times_best_rival"] for row in found]
            spread = ", ".join(f"{f(ratios):.2f}" for f in (min, statistics.median, max))
            limits = [row["of_limit"] for row in found if works(row)]
            limit = f"{statistics.median(limits):.0%}" if limits else ""
            lines.append(f"| {workload} | {dtype} | {len(found)} | {spread} | {limit} |")
    return "\n".join(lines)


def compared(record: dict[str, Any]) -> Iterator[tuple[tuple[str, str, str], Row, Row]]:
    """Of each case (workload, label, dtype) that a rival does too: our row, and the fastest rival's."""
    for case, rows in groups({"rows": timed(record)}).items():
        ours, others = [row for row in rows if row["ours"]], [row for row in rows if not row["ours"]]
        if ours and others:
            yield case, ours[0], others[0]


def _origin(record: dict[str, Any]) -> str:
    """Machine, versions of who took part, day."""
    return f"{_machine(record)}; {', '.join(_versions(record))}; {record['time'][:10]}."


def _machine(record: dict[str, Any]) -> str:
    machine = record["machine"]
    where = machine["gpus"][0]["name"] if machine["gpus"] else machine["cpu"]
    return f"{where}, {machine['threads']} threads, ISA {machine['isa'][0] if machine['isa'] else 'none'}"


def _versions(record: dict[str, Any]) -> list[str]:
    """Of torch, and of who else took part."""
    rivals = {row["contender"] for row in timed(record) if not row["ours"]} | {"torch"}
    return [
        f"{name} {version}"
        for name, version in record["versions"].items()
        if any(rival.startswith(name.removesuffix("-cpu")) for rival in rivals)
    ]


# The picture.


def png(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes_range, machine = Axes(record), record["machine"]
    figure, plot = pyplot.subplots(figsize=(11, 6), dpi=150)
    top = max(speed for _, speed, _ in flats(record))
    for name, bandwidth, threads in roofs(record):
        xs = [axes_range.x[0], top / bandwidth]
        style = "-" if name == "memory" else "--" if threads == "all" else ":"
        plot.plot(xs, [x * bandwidth / 1e9 for x in xs], style, color=GREY, lw=1.4 if style == "-" else 1, zorder=1)
    for name, speed, threads in flats(record):
        plot.axhline(speed / 1e9, color=COLORS.get(name, GREY), lw=1.4, ls="-" if threads == "all" else ":", zorder=1)
        label, right = f"{name} {speed / 1e9:.4g} GFLOP/s", axes_range.x[1] / 1.05
        plot.text(right, speed / 1e9, label, ha="right", va="bottom", fontsize=8, color=GREY)
    for row in sorted(plotted(record), key=lambda row: row["ours"]):
        x, y, color = row["flops"] / row["bytes"], row["flops_per_second"] / 1e9, COLORS.get(row["dtype"], "black")
        spread = [[max(y - row["flops"] / row["p80"] / 1e9, 0)], [max(row["flops"] / row["p20"] / 1e9 - y, 0)]]
        size, fill, layer = (7.0, color, 3) if row["ours"] else (4.5, "white", 2)
        plot.errorbar(x, y, yerr=spread, fmt="o", ms=size, color=color, mfc=fill, lw=1, zorder=layer)
    for name in dict.fromkeys(row["dtype"] for row in plotted(record)):
        plot.plot([], [], "o", color=COLORS.get(name, "black"), label=name)
    plot.plot([], [], "o", color=GREY, mfc="white", ms=4.5, label="rivals")
    plot.set(xscale="log", yscale="log", xlim=axes_range.x, ylim=[y / 1e9 for y in axes_range.y])
    plot.set(xlabel="operations a byte (compulsory traffic)", ylabel="GFLOP/s")
    where = machine["gpus"][0]["name"] if machine["gpus"] else f"{machine['cpu']}, {machine['threads']} threads"
    plot.set_title(f"metate on {where}", loc="left", fontsize=12)
    plot.legend(frameon=False, loc="lower right", fontsize=9)
    plot.grid(True, which="major", color="#e4e0d6", lw=0.7)
    plot.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _label_roofs(plot, record, axes_range)
    figure.savefig(path)
    pyplot.close(figure)


def _label_roofs(plot: Any, record: dict[str, Any], axes_range: Axes) -> None:
    """Names along the slanted ceilings, once the plot has its final shape."""
    for name, bandwidth, _ in roofs(record):
        start = max(axes_range.x[0], axes_range.y[0] / bandwidth) * 1.12
        if start * bandwidth >= max(speed for _, speed, _ in flats(record)):
            continue  # the level ceilings are lower
        (x1, y1), (x2, y2) = plot.transData.transform([(x, x * bandwidth / 1e9) for x in (start, 2 * start)])
        angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
        label = f"{name} {bandwidth / 1e9:.3g} GB/s"
        along: Any = {"rotation": angle, "rotation_mode": "anchor", "va": "bottom", "fontsize": 8, "color": GREY}
        plot.text(start, 1.04 * start * bandwidth / 1e9, label, **along)
