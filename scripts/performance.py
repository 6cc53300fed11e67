"""Writes what the benches have measured into docs/PERFORMANCE.md, between its markers, and draws its plots.

scripts/performance.py <directory of the results> <directory of the document>
"""

import csv
import math
import os
import re
import subprocess
import sys
from html import escape
from pathlib import Path

OURS = "ours"
MAPS = ["DashMap", "DashMap with foldhash", "papaya", "Mutex<HashMap>", "RwLock<HashMap>", "quick_cache", "moka", "mini-moka"]
COLOURS = {
    OURS: "#e8590c",
    "DashMap": "#1c7ed6",
    "DashMap with foldhash": "#74c0fc",
    "papaya": "#2f9e44",
    "Mutex<HashMap>": "#868e96",
    "RwLock<HashMap>": "#adb5bd",
    "quick_cache": "#9c36b5",
    "moka": "#e03131",
    "mini-moka": "#f08c00",
    "floor": "#0c8599",
    "plain layer": "#1c7ed6",
    "by hand": "#868e96",
}


class Results:
    def __init__(self, directory):
        self.rows = {}
        with open(directory / "results.csv", newline="") as file:
            for row in csv.DictReader(file):
                key = (row["bench"], row["case"], int(row["size"] or 0), int(row["threads"]), row["subject"])
                self.rows[key] = row
        self.memory = (directory / "memory.txt").read_text()
        self.python = (directory / "python.txt").read_text()

    def row(self, bench, case, subject, size=0, threads=1):
        return self.rows[bench, case, size, threads, subject]

    def median(self, *key, **more):
        return float(self.row(*key, **more)["median"])

    def ratio(self, *key, **more):
        return float(self.row(*key, **more)["ratio"])

    def instructions(self, comparison):
        """Without the allocator's."""
        return float(self.row("instructions", comparison, "ratio")["best"])

    def sizes(self, bench, case):
        return sorted({size for b, c, size, _, _ in self.rows if (b, c) == (bench, case)})

    def threads(self, bench, case, size):
        return sorted({n for b, c, s, n, _ in self.rows if (b, c, s) == (bench, case, size)})

    def bytes_per_instance(self, how):
        return float(re.search(rf"([\d.]+)  {how}\n", self.memory)[1])


def told(value):
    """With as many digits as a difference is worth."""
    return f"{value:.4f}" if 0.99 < value < 1.01 else f"{value:.3f}" if value < 1.1 else f"{value:.2f}"


def count(number):
    return f"{number:,.0f}"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def targets(results):
    instructions, storage = "`benches/instructions.sh`", "`cargo bench --bench storage`"
    traceparent = "`cargo bench --bench traceparent`"
    backends = "`cargo bench --bench backends --all-features`"
    dash = lambda case, threads=1: results.ratio("storage", case, OURS, size=100_000, threads=threads)
    plain, map_ = "plain OpenTelemetry layer", "`DashMap<String, _>`, default"
    scanned = max(results.sizes("backends", "restart"))
    scan = results.ratio("backends", "restart", "RedbBackend scans", size=scanned)
    hit = lambda peer: dash("hit") / results.ratio("storage", "hit", peer, size=100_000)

    def on_two_threads(case):
        """The ratio of a hit to the plain layer, as a ratio to that on one thread."""
        size = results.sizes("layer", case)[0]
        one, two = (results.ratio("layer", case, "ours-tagged-hit", size=size, threads=n) for n in (1, 2))
        return two / one

    rows = [
        ("what a tagged span adds", "the best by hand: `DashMap<String, Context>` with foldhash, and `set_parent`", 1.15, results.instructions("added-best"), instructions),
        ("untagged span, whole life", plain, 1.01, results.instructions("untagged"), instructions),
        ("one entry and exit", plain, 1.005, results.instructions("entered"), instructions),
        ("tagged span that finds its instance", plain, 1.12, results.instructions("hit"), instructions),
        ("… with a backend behind memory", plain, 1.16, results.instructions("hit-backend"), instructions),
        ("… with `max_spans` and `max_age`", plain, 1.16, results.instructions("hit-bounded"), instructions),
        ("… with a run id", plain, 1.16, results.instructions("hit-run"), instructions),
        ("… through `storage.tracer`", "the tracer alone", 1.16, results.instructions("hit-api"), instructions),
        ("… out of another trace", "plain layer and a link", 1.25, results.instructions("foreign"), instructions),
        *((f"tagged span that finds its instance, 2 threads, {which}: its ratio to the plain layer", "that ratio on one thread", 1.05, on_two_threads(case), "`cargo bench --bench layer`") for which, case in [("many instances", "threads"), ("one hot instance", "hot")]),
        ("get hit, 100,000 ids", map_, 0.5, dash("hit"), storage),
        ("overwrite, 100,000 ids", map_, 0.5, dash("overwrite"), storage),
        ("insert, 100,000 ids", map_, 0.5, dash("insert"), storage),
        ("remove, 100,000 ids", map_, 0.55, dash("remove"), storage),
        ("get hit, 2 threads, 100,000 ids", map_, 0.5, dash("hit", threads=2), storage),
        *((f"get hit, 100,000 ids", f"`{peer}`" if peer in MAPS[1:5] else f"{peer}, a bound and a time to live", 1.0, hit(peer), storage) for peer in MAPS[1:]),
        ("traceparent, parse", "the SDK's propagator", 0.15, results.ratio("traceparent", "parse", OURS), traceparent),
        ("traceparent, format", "the SDK's propagator", 0.07, results.ratio("traceparent", "format", OURS), traceparent),
        ("`store` with redb, calling thread", "without", 1.6, results.instructions("redb-store"), instructions),
        (f"{count(scanned)} instances scanned at the start", "redb's own walk", 2.0, scan, backends),
    ]
    lines = [
        [what, against, f"≤ {target:g}" if target != 1.0 else "< 1", told(value) if value <= target else f"{told(value)}, **missed**", command]
        for what, against, target, value, command in rows
    ]
    bytes_ = results.bytes_per_instance("stored by a call")
    memory = f"{bytes_:.1f} bytes" + ("" if bytes_ <= 140 else ", **missed**")
    python = re.search(r"\d+", results.python)[0]
    lines.insert(1, ["memory allocations that an untagged span adds", plain, "0", "0, or a test fails", "`cargo test --test allocations`"])
    lines.append(["memory of an instance, one million with UUIDs for ids", f"the Python original's dict: {python} bytes", "≤ 140 bytes", memory, "`cargo run --release --features durable-root --example memory`, `python3 benches/python_dict.py`"])
    return table(["what", "against", "target", "measured", "command"], lines)


def others(results):
    """The comparisons of instructions for which nothing was aimed at."""
    rows = [
        ("what a tagged span adds", "lookup, `extract` and `set_parent` by hand", "added"),
        ("within a span of its instance", "plain layer, tagged", "nested"),
        ("first span of an instance", "plain layer, tagged", "first"),
        ("… with redb", "without", "redb-span"),
        ("id recorded later", "plain layer, id recorded later", "late"),
        ("replayed, and not exported", "plain layer, tagged", "replayed"),
        ("durable roots, untagged span", "plain layer, untagged", "rooted-untagged"),
        ("durable roots, finds its instance", "plain layer, tagged", "rooted"),
        ("durable roots, first span of an instance", "plain layer, tagged", "rooted-first"),
        ("fat LTO and one codegen unit, untagged span", "plain layer, built alike", "lto-untagged"),
        ("fat LTO and one codegen unit, finds its instance", "plain layer, built alike", "lto-hit"),
    ]
    lines = [[what, against, told(results.instructions(name))] for what, against, name in rows]
    return table(["what", "against", "measured"], lines)


def ladder(results):
    names = [
        ("no subscriber", "nothing"),
        ("tracing-subscriber's registry", "registry"),
        ("OpenTelemetry layer, untagged span", "plain-untagged"),
        ("this crate's layer, untagged span", "ours-untagged"),
        ("OpenTelemetry layer, tagged span", "plain-tagged"),
        ("the same with a parent that is already there", "plain-attached"),
        ("this crate, a tagged span that finds its instance", "ours-tagged-hit"),
        ("… within another span of its instance", "ours-tagged-nested"),
        ("… within a span of another trace", "ours-tagged-foreign"),
        ("… that opens its instance", "ours-tagged-miss"),
        ("… whose id is recorded later", "ours-recorded-hit"),
        ("OpenTelemetry layer, id recorded later", "plain-recorded"),
        ("lookup, `extract` and `set_parent` by hand", "by-hand"),
        ("the best by hand: the context is in a map, and set", "by-hand-cached"),
        ("one entry and exit, OpenTelemetry layer", "plain-entered"),
        ("one entry and exit, this crate's layer", "ours-entered"),
    ]
    size = results.sizes("layer", "ladder")[0]
    lines = []
    for what, rung in names:
        counted = results.rows.get(("instructions", rung, 0, 1, rung))
        lines.append([what, count(results.median("layer", "ladder", rung, size=size)), count(float(counted["median"])) if counted else ""])
    return table(["one span, from its creation to its close", "ns", "instructions"], lines)


def instances(results):
    head = ["instances"]
    for who in ["this crate", "`DashMap`", "the floor"]:
        head.append(f"get hit, {who}, ns")
    head += ["tagged span, plain layer, ns", "this crate, ns", "by hand, ns"]
    lines = []
    for size in results.sizes("storage", "hit"):
        hits = [results.median("storage", "hit", who, size=size) for who in [OURS, "DashMap", "floor"]]
        spans = [results.median("layer", "instances", who, size=size) for who in ["plain-tagged", "ours-tagged-hit", "by-hand"]]
        lines.append([count(size), *(f"{ns:.0f}" for ns in hits), *(count(ns) for ns in spans)])
    return table(head, lines)


def threads(results):
    lines = []
    size = results.sizes("layer", "threads")[0]
    for n in results.threads("layer", "threads", size):
        rate = lambda rung: f"{1e6 / results.median('layer', 'threads', rung, size=size, threads=n):,.0f}"
        lines.append([str(n), *(rate(rung) for rung in ["plain-untagged", "ours-untagged", "plain-tagged", "ours-tagged-hit", "by-hand"])])
    return table(["threads", "plain layer, untagged", "this crate, untagged", "plain layer, tagged", "this crate, tagged", "by hand"], lines)


def rates(results):
    size = results.sizes("layer", "ladder")[0]
    ns = lambda rung: results.median("layer", "ladder", rung, size=size)
    plain, added, by_hand = ns("plain-tagged"), ns("ours-tagged-hit") - ns("plain-tagged"), ns("by-hand") - ns("plain-tagged")
    share = lambda rate, cost: f"{max(rate * cost / 1e9 * 100, 0):.3g} %"
    lines = [[count(rate), share(rate, plain), share(rate, added), share(rate, by_hand)] for rate in [1_000, 10_000, 100_000]]
    return table(["tagged spans a second", "OpenTelemetry itself", "this crate adds", "by hand would add"], lines)


def backends(results):
    lines = []
    for case, what in [("store", "`store` of a new instance"), ("first span", "first span of an instance"), ("later span", "later span")]:
        wall = lambda who: count(results.median("backends", case, who))
        processor = lambda who: count(results.median("backends", case + " processor time", who))
        lines.append([what, *(f"{processor(who)} ({wall(who)})" for who in ["no backend", "redb", "redb eventually"])])
    calling = table(["calling thread, ns of processor time (by the clock)", "no backend", "redb", "redb, `Eventual`"], lines)
    size = max(results.sizes("backends", "restart"))
    steps = [
        ("redb opens the file and checks it", "redb opens and checks"),
        ("redb walks through it", "redb scans"),
        ("`RedbBackend::open`: checked, and made smaller where that is worth it", "RedbBackend opens"),
        ("`RedbBackend` scans: decoded, nothing kept", "RedbBackend scans"),
        ("`build` of a storage: scanned and brought into memory", "a storage is built"),
    ]
    lines = [[what, f"{results.median('backends', 'restart', step, size=size) * size / 1e9:.2f}", told(results.ratio("backends", "restart", step, size=size))] for what, step in steps]
    start = table([f"{count(size)} instances in the file", "seconds", "against redb's walk"], lines)
    return f"{calling}\n\n{start}"


def pauses(results):
    """The lines of the memory example, as they are."""
    lines = [line.strip() for line in results.memory.splitlines() if "median" in line]
    return "\n".join(f"- An insertion with one million instances at most, {line}." for line in lines)


def machine(_):
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    system = re.search(r'PRETTY_NAME="(.*)"', Path("/etc/os-release").read_text())[1]
    rustc = subprocess.run(["rustc", "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    return (
        f"Measured on {cpu[1] if cpu else 'an unknown processor'}, {os.cpu_count()} cores, {memory / 1024**2:.0f} GiB of memory, "
        f"{system}, Linux {os.uname().release.split('-')[0]}, rustc {rustc}."
    )


STYLE = """
    text { font: 12px system-ui, sans-serif; fill: #495057 }
    .title { font-size: 14px; font-weight: 600 }
    .grid { stroke: #868e96; stroke-opacity: .3 }
    @media (prefers-color-scheme: dark) { text { fill: #ced4da } }
"""


def svg(path, width, height, title, body):
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">\n<style>{STYLE}</style>\n<text class="title" x="10" y="20">{escape(title)}</text>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def text(x, y, what, anchor="start", more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(what)}</text>'


def line(x1, y1, x2, y2):
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def lines_plot(path, title, x_label, y_label, series, y_format):
    """Both axes are logarithmic."""
    width, height, left, right, top, bottom = 760, 400, 70, 590, 40, 340
    xs = sorted({x for points in series.values() for x, _ in points})
    ys = [y for points in series.values() for _, y in points]
    low, high = math.log10(min(ys)) - 0.05, math.log10(max(ys)) + 0.05
    x_low, x_high = math.log10(xs[0]), math.log10(xs[-1])
    at_x = lambda x: left + (math.log10(x) - x_low) / (x_high - x_low) * (right - left)
    at_y = lambda y: bottom - (math.log10(y) - low) / (high - low) * (bottom - top)
    body = []
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for factor in (1, 2, 5):
            y = factor * 10**exponent
            if low <= math.log10(y) <= high:
                body += [line(left, at_y(y), right, at_y(y)), text(left - 6, at_y(y) + 4, y_format(y), "end")]
    for x in xs:
        body += [line(at_x(x), top, at_x(x), bottom), text(at_x(x), bottom + 18, f"{x:,}", "middle")]
    body.append(text((left + right) / 2, bottom + 40, x_label, "middle"))
    middle = (top + bottom) / 2
    body.append(text(16, middle, y_label, "middle", f' transform="rotate(-90 16 {middle:.1f})"'))
    # The names stand where the lines end, apart from each other.
    ends = sorted((at_y(points[-1][1]), name) for name, points in series.items())
    places, last = {}, -math.inf
    for y, name in ends:
        places[name] = last = max(y, last + 14)
    beyond = max(places.values()) - bottom
    if beyond > 0:
        places = {name: y - beyond for name, y in places.items()}
    for name, points in series.items():
        colour, wide = COLOURS[name], 3 if name == OURS else 1.5
        dash = ' stroke-dasharray="3 3"' if name == "floor" else ""
        path_ = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
        body.append(f'<polyline fill="none" stroke="{colour}" stroke-width="{wide}"{dash} points="{path_}"/>')
        body += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="{wide}" fill="{colour}"/>' for x, y in points]
        body.append(f'<rect x="{right + 10}" y="{places[name] - 4:.1f}" width="10" height="8" fill="{colour}"/>')
        body.append(text(right + 26, places[name] + 4, name))
    svg(path, width, height, title, body)


def bars_plot(path, title, x_label, bars):
    width, left, right, top, step = 720, 250, 660, 40, 26
    bottom = top + step * len(bars)
    most = max(value for _, value, _ in bars)
    unit = 10 ** math.floor(math.log10(most))
    unit = unit / 2 if most / unit < 3 else unit
    at_x = lambda value: left + value / most * (right - left)
    body = []
    for n in range(int(most / unit) + 1):
        body += [line(at_x(n * unit), top, at_x(n * unit), bottom), text(at_x(n * unit), bottom + 18, count(n * unit), "middle")]
    for n, (name, value, colour) in enumerate(bars):
        y = top + n * step
        body.append(text(left - 8, y + 17, name, "end"))
        body.append(f'<rect x="{left}" y="{y + 4}" width="{at_x(value) - left:.1f}" height="{step - 8}" fill="{colour}"/>')
        body.append(text(at_x(value) + 5, y + 17, count(value)))
    body.append(text((left + right) / 2, bottom + 40, x_label, "middle"))
    svg(path, width, bottom + 55, title, body)


def plots(results, docs):
    hits = {
        name: [(size, results.median("storage", "hit", name, size=size)) for size in results.sizes("storage", "hit")]
        for name in [OURS, *MAPS, "floor"]
    }
    lines_plot(docs / "performance-instances.svg", "One get that finds its instance, one thread", "instances", "ns", hits, lambda y: f"{y:g}")
    numbers = results.threads("storage", "hit", 100_000)
    rate = lambda name, n: 1e3 / results.median("storage", "hit", name, size=100_000, threads=n)
    on_threads = {name: [(n, rate(name, n)) for n in numbers] for name in [OURS, *MAPS, "floor"]}
    title = f"Gets that find their instance, of 100,000, on {os.cpu_count()} cores"
    lines_plot(docs / "performance-threads.svg", title, "threads", "million a second", on_threads, lambda y: f"{y:g}")
    size = results.sizes("layer", "ladder")[0]
    ns = lambda rung: results.median("layer", "ladder", rung, size=size)
    bars = [
        ("registry alone", ns("registry"), COLOURS["by hand"]),
        ("plain layer, untagged", ns("plain-untagged"), COLOURS["plain layer"]),
        ("this crate, untagged", ns("ours-untagged"), COLOURS[OURS]),
        ("plain layer, tagged", ns("plain-tagged"), COLOURS["plain layer"]),
        ("this crate, tagged, found", ns("ours-tagged-hit"), COLOURS[OURS]),
        ("this crate, nested", ns("ours-tagged-nested"), COLOURS[OURS]),
        ("this crate, in another trace", ns("ours-tagged-foreign"), COLOURS[OURS]),
        ("this crate, first of its instance", ns("ours-tagged-miss"), COLOURS[OURS]),
        ("by hand, tagged, found", ns("by-hand"), COLOURS["by hand"]),
    ]
    bars_plot(docs / "performance-spans.svg", "One span from its creation to its close", "ns", bars)


def main():
    results, docs = Results(Path(sys.argv[1])), Path(sys.argv[2])
    document = docs / "PERFORMANCE.md"
    parts = [machine, targets, others, ladder, instances, threads, rates, backends, pauses]
    written = document.read_text()
    for part in parts:
        name = part.__name__
        markers = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        made = part(results)
        written, found = markers.subn(lambda match: f"{match[1]}{made}\n{match[2]}", written)
        assert found == 1, f"the document has {found} places for {name}"
    plots(results, docs)
    document.write_text(written)


main()
