"""The page in a real browser, as wide as a desk and as a phone; left out where there is no Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from sparsight.api import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--allow-file-access-from-files", "--virtual-time-budget=5000",
)  # fmt: skip
LOOK = """<iframe id="page" src="report.html" style="width: {width}px; height: 1000px; border: 0"></iframe>
<pre id="found"></pre>
<script>
document.getElementById("page").onload = () => {{
  const page = document.getElementById("page").contentDocument, found = [];
  page.querySelectorAll("details").forEach(d => d.open = true);
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const clipped = e => e.closest(".scroll, pre");  // what scrolls in a box of its own is cut by it
  const texts = [...page.body.querySelectorAll("*")].filter(own).map(e => [e, e.getBoundingClientRect()])
    .filter(([e, r]) => r.width > 0 && r.height > 0);
  for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < texts.length; j++) {{
    const [a, p] = texts[i], [b, q] = texts[j];
    if (a.contains(b) || b.contains(a) || clipped(a) !== clipped(b)) continue;
    const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (wide > 2 && high > 2) found.push(a.textContent.trim().slice(0, 40) + " | " + b.textContent.trim().slice(0, 40));
  }}
  const root = page.documentElement;
  const asked = page.defaultView.performance.getEntriesByType("resource").map(e => e.name);
  document.getElementById("found").textContent = JSON.stringify({{
    overlapping: found, texts: texts.length, wide: root.scrollWidth - root.clientWidth,
    asked: asked.filter(address => !address.startsWith("data:")),
  }});
}};
</script>"""


def browse(folder, width):
    """What a look at `folder/report.html` finds, and what the page wrote to the console."""
    (folder / "look.html").write_text(LOOK.format(width=width))
    words = (f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", f"--window-size={width + 40},1100")
    page = (folder / "look.html").as_uri()
    done = subprocess.run([CHROMIUM, *QUIET, *words, "--dump-dom", page], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_overlaps_nothing_is_asked_for_and_the_console_is_silent(width, sweep, tmp_path):
    report([sweep], out=tmp_path / "report.html")
    found, console = browse(tmp_path, width)
    assert found["texts"] > 100
    assert found["overlapping"] == []
    assert found["wide"] <= 0
    assert found["asked"] == []
    assert console == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_look_sees_what_it_looks_for(tmp_path):
    (tmp_path / "report.html").write_text(
        "<p style='margin-bottom: -30px'>one one one</p><p>two two two</p><div style='width: 900px'>wide</div>"
        "<script>console.error('bad')</script><img src='http://127.0.0.1:9/x.png'>"
    )
    found, console = browse(tmp_path, 390)
    assert found["overlapping"] == ["one one one | two two two"]
    assert found["wide"] > 0
    assert found["asked"] == ["http://127.0.0.1:9/x.png"]
    assert any("bad" in line for line in console)
