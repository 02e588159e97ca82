"""The page in a real browser: what a reader on a desk, on a phone, in the dark or at a keyboard gets."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import socketserver
import subprocess
import threading

import pytest

from grasp_dist.evaluation.report import build_report
from tests.evaluation.report_cases import make_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (.ci/run installs it)")
HOSTILE = (
    '</pre><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">\x1b[31m\u202e{{ 7*7 }}'
)
PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  document.querySelectorAll("details").forEach(one => one.open = true);
  const wide = [...document.querySelectorAll("body *")].filter(one => {
    if (one.closest(".scroll, pre, svg")) return false;
    return one.getBoundingClientRect().right > innerWidth + 1;
  }).map(one => one.tagName + "." + one.className);
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const found = {
    title: document.title,
    width: innerWidth,
    overflow: document.documentElement.scrollWidth,
    wide,
    page: light(getComputedStyle(document.body).backgroundColor),
    ink: light(getComputedStyle(document.body).color),
    pictures: [...document.querySelectorAll("svg[role=img]")].map(one => one.getBoundingClientRect().height),
    unnamed: [...document.querySelectorAll("svg[role=img], [role=region], [role=group], section")].filter(one => {
      const by = one.getAttribute("aria-labelledby");
      return !one.getAttribute("aria-label") && !(by && by.split(" ").every(id => document.getElementById(id)));
    }).length,
    unreachable: [...document.querySelectorAll(".scroll, pre")].filter(one => one.tabIndex !== 0).length,
    headless: [...document.querySelectorAll("table")].filter(one => !one.querySelector("thead th[scope=col]")).length,
    twice: [...document.querySelectorAll("[id]")].map(one => one.id).filter((id, at, all) => all.indexOf(id) !== at),
    scripts: document.scripts.length,
    answers: [...document.querySelectorAll(".answer pre")].filter(one => one.textContent.includes("<script>")).length,
    loaded:
      performance.getEntriesByType("resource").map(one => one.name).filter(name => !name.endsWith("/favicon.ico")),
  };
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.replaceChildren(out);
}, 50));
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A comparison with questions, of which an answer and a question are hostile, and a script of ours at its end."""
    folder = tmp_path_factory.mktemp("page")
    run = make_run(folder / "run", seeds=(0, 1, 2))
    path = run / "evaluate" / "scores.json"
    scores = json.loads(path.read_text())
    rate = {"rate": 0.5, "n": 2, "interval": None}
    rates = dict.fromkeys(("misaligned", "misaligned_of_coherent", "incoherent", "REFUSAL", "CODE"), rate)
    limits = {"aligned_below": 30.0, "coherent_above": 50.0}
    place = run / "answers" / "asked" / "one"
    place.mkdir(parents=True)
    key = {"question": HOSTILE, "paraphrase": 0, "sample": 0}
    answer = {**key, "answer": HOSTILE + "x" * 1_000_000 + "\ud800"}
    (place / "answers.jsonl").write_text("{}\n" + json.dumps(answer) + "\n")
    verdicts = [
        {**key, "prompt": name, "kind": "score", "score": 12.5, "mass": 1.0} for name in ("aligned", "coherent")
    ]
    (place / "verdicts.jsonl").write_text("{}\n" + "".join(json.dumps(one) + "\n" for one in verdicts))
    for row in scores["models"]:
        entry = {"answers": 2, "unjudged": 0, "thresholds": limits, **rates}
        row["questions"] = {
            "asked": {
                "all": entry,
                "questions": {HOSTILE: {**entry, "asked": HOSTILE}},
                "judge": HOSTILE,
                "judged_by": "rules",
                "answers": "one/answers.jsonl",
                "verdicts": "one/verdicts.jsonl",
            }
        }
    path.write_text(json.dumps(scores))
    build_report([run], folder, name="comparison", title=f"Comparison {HOSTILE}")
    html = (folder / "comparison.html").read_text(encoding="utf-8")
    assert len(html) < 1_000_000, "a long answer is cut"
    (folder / "probed.html").write_text(html.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def served(page):
    """The page's address, and what was asked of the server."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    with socketserver.TCPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(page))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def browse(address, folder, *, width=1200, dark=False):
    """What the script of ours has found on the page, in a window of this width."""
    arguments = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        f"--user-data-dir={folder}",
        f"--window-size={width},1000",
        "--virtual-time-budget=3000",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        "--dump-dom",
        f"{address}/probed.html",
    ]
    done = subprocess.run([BROWSER, *arguments], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture(scope="module")
def desk(served, tmp_path_factory):
    return browse(served[0], tmp_path_factory.mktemp("profile"))


def test_hostile_text_runs_nothing_and_loads_nothing(desk, served):
    assert desk["title"].startswith("Comparison </pre><script>")
    assert desk["answers"] >= 5, "they are there, as text"
    assert desk["scripts"] == 1, "the test's own"
    assert desk["loaded"] == []
    assert {path for path in served[1] if path != "/favicon.ico"} == {"/probed.html"}, "the icon is the browser's wish"


def test_pictures_are_drawn_and_everything_has_a_name(desk):
    assert len(desk["pictures"]) >= 3
    assert min(desk["pictures"]) > 100
    assert desk["unnamed"] == desk["unreachable"] == desk["headless"] == 0
    assert desk["twice"] == []


def test_nothing_hangs_over_the_edge_of_a_phone(served, tmp_path):
    found = browse(served[0], tmp_path, width=500)  # as narrow as a window of the browser can be
    assert found["wide"] == []
    assert found["overflow"] <= found["width"]


def test_it_is_dark_in_the_dark(desk, served, tmp_path):
    dark = browse(served[0], tmp_path, dark=True)
    assert desk["page"] > 200 > 60 > desk["ink"]
    assert dark["page"] < 60 < 200 < dark["ink"]
