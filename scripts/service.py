"""Places orders in the shop of examples/service, reads its traces back from Phoenix, asserts on them, and takes the pictures.

    service.py run      PROJECT   places the orders, and waits until Phoenix has their spans
    service.py pictures DIRECTORY before.png and after.png, of Phoenix's pages of both projects

The projects are `before`, of the plain layer, and `after`. The environment names the servers: PHOENIX and SHOP (host:port), and CHROMIUM
(the program).
"""

import json
import os
import pathlib
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict

BEFORE, AFTER = "before", "after"
ORDERS = ["order-1", "order-2", "order-3"]
STEPS = ["POST /orders/{order}", "reserve_stock", "charge_card", "charge_card", "ship_parcel", "send_receipt"]
CALLS = ["ask_bank", "ask_bank", "POST /charges/{order}", "POST /charges/{order}"]
ROOT = "order"
WIDTH = 1_250  # of the browser's window
PATIENCE = 120  # seconds: a busy machine is slow, and a wait ends when there is what it waits for


def fetch(url, method="GET"):
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=PATIENCE) as response:
        return response.read()


def phoenix(path):
    return json.loads(fetch(f"http://{os.environ['PHOENIX']}/v1/{path}"))["data"]


def eventually(what, get):
    """Returns what `get` returns, once that is something."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if found := get():
                return found
        except urllib.error.HTTPError as error:
            if error.code != 404:  # the project is not there before its first span
                raise
        if time.monotonic() > end:
            sys.exit(f"waited {PATIENCE} s in vain for {what}")
        time.sleep(0.2)


def spans_of(project):
    return phoenix(f"projects/{project}/spans?limit=1000")


def run(project):
    for order in ORDERS:
        fetch(f"http://{os.environ['SHOP']}/orders/{order}", "POST")
        time.sleep(0.1)  # orders overlap
    expected = sorted(len(ORDERS) * (STEPS + CALLS + ([ROOT] if project == AFTER else [])))

    def complete():
        spans = spans_of(project)
        return spans if len(spans) >= len(expected) else None

    spans = eventually(f"{len(expected)} spans of {project}", complete)
    check(sorted(span["name"] for span in spans) == expected, f"{project}: other spans than expected: {spans}")

    traces, ids = defaultdict(list), {span["context"]["span_id"] for span in spans}
    for span in spans:
        traces[span["context"]["trace_id"]].append(span)
        check(span["parent_id"] is None or span["parent_id"] in ids, f"{project}: no parent: {span}")
    traces_of = defaultdict(set)
    for trace, members in traces.items():
        for span in members:
            if order := span["attributes"].get("workflow.instance_id"):
                traces_of[order].add(trace)
    check(sorted(traces_of) == ORDERS, f"{project}: other orders than expected: {sorted(traces_of)}")
    check(all(traces_of[order].isdisjoint(traces_of[other]) for order in ORDERS for other in ORDERS if order != other),
          f"{project}: orders share a trace")

    counts = {order: len(traces_of[order]) for order in ORDERS}
    if project == BEFORE:
        check(set(counts.values()) == {len(STEPS)}, f"{project}: expected a trace for each step: {counts}")
    else:
        check(set(counts.values()) == {1}, f"{project}: expected one trace for each order: {counts}")
        for members in traces.values():
            check(sorted(span["name"] for span in members) == sorted(STEPS + CALLS + [ROOT]), f"not an order: {members}")
            roots = [span for span in members if span["parent_id"] is None]
            check([root["name"] for root in roots] == [ROOT], f"another root than the workflow's own: {roots}")
            check(roots[0]["attributes"]["workflow.status"] == "completed", f"no outcome: {roots[0]}")
            inside = (roots[0]["start_time"] <= span["start_time"] and span["end_time"] <= roots[0]["end_time"] for span in members)
            check(all(inside), f"spans outside of their workflow: {members}")
    print(f"{project}: {len(ORDERS)} orders, {len(traces)} traces, {len(spans)} spans")


def check(holds, otherwise):
    if not holds:
        sys.exit(otherwise)


def pictures(directory):
    from playwright.sync_api import Error, sync_playwright

    projects = {project["name"]: project["id"] for project in phoenix("projects")}
    base = f"http://{os.environ['PHOENIX']}/projects"
    first = [span for span in spans_of(AFTER) if span["name"] == ROOT and span["attributes"]["workflow.instance_id"] == ORDERS[0]]

    def before(page):
        page.goto(f"{base}/{projects[BEFORE]}/traces")
        rows = page.locator("table tbody tr")
        rows.first.wait_for()
        page.get_by_role("button", name="Columns", exact=True).click()
        for column in ["input_value", "output_value", "userId", "annotations", "traceAnnotations"]:  # of language models
            page.locator(f"input[type=checkbox][name={column}]").uncheck(force=True)
        page.locator("input[type=checkbox][name=traceId]").check(force=True)
        page.keyboard.press("Escape")
        page.mouse.move(0, 0)
        page.wait_for_timeout(1_000)
        box = page.locator("table").bounding_box()
        page.screenshot(path=directory / "before.png", clip={**box, "width": WIDTH - box["x"]})

    def after(page):
        page.goto(f"{base}/{projects[AFTER]}/traces/{first[0]['context']['trace_id']}")
        page.get_by_text("send_receipt").first.wait_for()
        page.get_by_text("workflow.status").first.wait_for()
        page.wait_for_timeout(1_000)
        page.mouse.move(0, 0)
        left = page.get_by_role("separator", name="Resize drawer").bounding_box()["x"] + 2
        page.screenshot(path=directory / "after.png", clip={"x": left, "y": 48, "width": WIDTH - left, "height": 720})

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ["CHROMIUM"], args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        for picture, height in [(before, 1_100), (after, 800)]:
            print(f"picture: {picture.__name__}", flush=True)
            for attempt in range(3):  # the page sometimes hangs while it loads
                context = browser.new_context(viewport={"width": WIDTH, "height": height}, reduced_motion="reduce")
                context.set_default_timeout(PATIENCE * 1_000)
                context.add_init_script(
                    """localStorage["arize-phoenix-theme"] = "light";
                    localStorage["react-resizable-panels:trace-details-layout"] = '{"trace-tree":38,"span-details":62}';"""
                )
                try:
                    picture(context.new_page())
                    break
                except Error as error:
                    if attempt == 2:
                        raise
                    print(f"once more: {error}", flush=True)
                finally:
                    context.close()
        browser.close()
    for name in ["before.png", "after.png"]:
        shrink(directory / name)


def shrink(path):
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True)
    size = path.stat().st_size
    check(size < 200_000, f"{path} has {size} bytes")
    print(f"{path}: {size} bytes")


match sys.argv[1:]:
    case ["run", project]:
        run(project)
    case ["pictures", directory]:
        pictures(pathlib.Path(directory))
    case _:
        sys.exit(__doc__)
