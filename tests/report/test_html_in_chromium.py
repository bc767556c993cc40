"""report.html as a reader sees it: both themes, wide and narrow, nothing logged, nothing of the run executed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from aer_megatron.report.html import write_html
from tests.support.chromium import PROGRAM, Tab, open_tab
from tests.support.page_runs import HOSTILE, page_run, reward_hack, sample_row, write_samples

pytestmark = [
    pytest.mark.browser,
    pytest.mark.processes,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed"),
]
READY = "document.readyState === 'complete' && document.querySelectorAll('.plot canvas').length > 0"
FACTS = """({
    pwned: window.pwned ?? null,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    images: document.images.length,
    ground: getComputedStyle(document.body).backgroundColor,
    reasons: [...document.querySelectorAll('.reason')].map((node) => node.firstChild.textContent),
    doubts: [...document.querySelectorAll('.chip.doubt')].map((node) => node.textContent),
    first: document.querySelector('.sample').innerText,
})"""


async def look(tab: Tab, page: Path, folder: Path, width: int, theme: str) -> None:
    await tab.show(f"{page.as_uri()}#theme={theme}", width=width, height=900, ready=READY)
    facts = await tab.evaluate(FACTS)
    assert facts["pwned"] is None and facts["images"] == 0
    assert facts["overflow"] <= 0, f"{width} pixels: {facts['overflow']} too wide"
    assert (facts["ground"] == "rgb(246, 247, 249)") == (theme == "light")
    assert facts["reasons"][0] == "correct" and set(facts["doubts"]) == {"paid for an empty box"}
    assert "\\boxed{}" in facts["first"]
    await tab.screenshot(folder / f"head-{width}-{theme}.png")
    await tab.evaluate("document.getElementById('samples').scrollIntoView()")
    # the planted reward hack is on the first screen of the samples browser
    assert await tab.evaluate("document.querySelector('.chip.doubt').getBoundingClientRect().bottom < innerHeight")
    await tab.screenshot(folder / f"samples-{width}-{theme}.png")


async def open_the_hostile_sample(tab: Tab) -> None:
    """Opens every sample and looks at what the hostile one became."""
    await tab.evaluate(
        "(() => { const s = document.querySelector('select[aria-label=order]'); s.value = 'newest first';"
        " s.dispatchEvent(new Event('change')); document.querySelectorAll('.sample').forEach((d) => { d.open = 1; });"
        " return new Promise((done) => setTimeout(done, 300)); })()"
    )
    texts = await tab.evaluate("[...document.querySelectorAll('.tokens')].map((node) => node.textContent)")
    shown = HOSTILE.replace("\u202e", "‹U+202E›").replace("\u2028", "‹U+2028›").replace("\x1b", "␛")
    assert shown in texts
    colours = await tab.evaluate("document.querySelector('.tokens span:last-child').style.background")
    assert colours.startswith("rgba(")
    assert await tab.evaluate("window.pwned ?? null") is None


def test_the_page_is_read_in_both_themes_wide_and_narrow(tmp_path: Path) -> None:
    run = page_run(tmp_path / "run", 40, name=HOSTILE)
    rows = [*reward_hack(40), sample_row(40, HOSTILE, reward=0.0, reason=HOSTILE)]
    write_samples(run, rows)
    page = write_html([run, page_run(tmp_path / "other", 30, seed=1, lr=3e-4)], tmp_path / "report.html")

    async def read() -> list[str]:
        async with open_tab() as tab:
            for width in (1440, 400):
                for theme in ("light", "dark"):
                    await look(tab, page, tmp_path, width, theme)
            await open_the_hostile_sample(tab)
            return tab.logged

    assert asyncio.run(read()) == []


def test_a_script_that_is_not_the_pages_own_does_not_run(tmp_path: Path) -> None:
    page = write_html([page_run(tmp_path / "run", 3)], tmp_path / "report.html")
    page.write_text(page.read_text().replace("<noscript>", "<script>window.pwned = 1</script><noscript>"))

    async def read() -> tuple[object, list[str]]:
        async with open_tab() as tab:
            await tab.show(page.as_uri(), width=1440, height=900, ready=READY)
            return await tab.evaluate("window.pwned ?? null"), tab.logged

    pwned, logged = asyncio.run(read())
    assert pwned is None
    assert len(logged) == 1 and "Content Security Policy" in logged[0]
