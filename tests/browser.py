"""The page in a real browser: python tests/browser.py [FOLDER]

Needs Debian's chromium (apt-get install chromium) and playwright (pip install playwright), and the
built-in model: train_sft.py runs first where there is none. A person is played who likes full
sentences: 40 thumbs, a choice, a training run on the thumbs, blind votes. Then a model is played
whose replies would break a page that takes them for HTML. Screenshots and rows are in FOLDER.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
MINUTE = 60_000  # ms
EVIL = "<img src=x onerror=document.title='broken'><b>bold</b> &amp;  two  spaces\nand <script>"
HOSTILE = f"""
from nanoalign.tools import chat, page
said = {f"<think>{EVIL}</think>{EVIL}"!r}
page.reply = lambda server, talk, send: send(said) or said
chat.main()
"""


class Server:
    """A server of its own, on a port of its own."""

    def __init__(self, home: Path, port: int, *start: str):
        words = [sys.executable, *(start or ["-m", "nanoalign.chat"]), "--web", "--port", str(port)]
        words += ["--seed", "1", "--feedback", str(home / "thumbs.jsonl")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
        self.url = f"http://127.0.0.1:{port}"
        assert any(line.startswith(self.url) for line in self.process.stdout), "it did not start"

    def __enter__(self) -> str:
        return self.url

    def __exit__(self, *_):
        self.process.terminate()
        assert self.process.wait(60) == 0


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def idle(page):
    expect(page.locator("#send")).to_be_enabled(timeout=MINUTE)


def likes(text: str) -> bool:
    """The taste of the person who is played."""
    return text.endswith(".")


def play(page, home: Path, shot) -> None:
    """Forty thumbs, a choice, training, votes."""
    idle(page)
    shot("empty")
    began = time.time()
    for i in range(40):
        page.click("#random")
        idle(page)
        text = page.locator(".assistant .text").last.inner_text()
        page.locator(f".thumb.{'up' if likes(text) else 'down'}").last.click()
        expect(page.locator(".thumb.on")).to_have_count(i + 1)
    print(f"40 thumbs in {time.time() - began:.0f} s")
    kept = rows(home / "thumbs.jsonl")
    assert len(kept) == 40
    assert all(row["label"] == likes(row["completion"][0]["content"]) for row in kept)
    for name in ("up", "down") if kept[-1]["label"] is False else ("down", "up"):
        page.locator(f".thumb.{name}").last.click()  # a mind that changes, and changes back
        expect(page.locator(f".thumb.{name}").last).to_have_class(f"thumb {name} on")
    assert [row["label"] for row in rows(home / "thumbs.jsonl")] == [row["label"] for row in kept]
    shot("chat")
    better = page.get_by_role("button", name="A is better")
    while not better.count():
        page.click("#two")
        idle(page)
    shot("choice")
    better.click()
    expect(page.locator("#choices")).to_have_text("1")
    assert len(rows(home / "thumbs.pairs.jsonl")) == 1

    began = time.time()
    page.click("#kto")
    expect(page.locator("svg.curve")).to_have_count(2, timeout=5 * MINUTE)
    page.reload()  # a closed tab changes nothing
    expect(page.locator("svg.curve")).to_have_count(2, timeout=MINUTE)
    shot("training")
    expect(page.locator("#result")).to_be_visible(timeout=10 * MINUTE)
    print(f"trained in {time.time() - began:.0f} s. {page.locator('#result').inner_text()}")
    idle(page)
    began = time.time()
    while "come" in page.locator("#votes").inner_text():
        page.click("#two")
        idle(page)
        if better.count():  # else both replies are the same
            a, b = map(likes, page.locator(".pair .text").all_inner_texts())
            name = "Neither" if a == b else f"{'AB'[b]} is better"
            page.get_by_role("button", name=name).click()
            expect(page.locator(".bar button.main", has_text=name)).to_be_visible()
    page.locator("#votes").scroll_into_view_if_needed()
    shot("trained")
    print(f"voted in {time.time() - began:.0f} s: {page.locator('#votes').inner_text()}")


def be_hostile(page, home: Path, shot) -> None:
    """What people and models write is text, every character of it."""
    idle(page)
    page.fill("#text", EVIL)
    page.press("#text", "Enter")
    idle(page)
    for name in (".user .text", ".assistant .text", ".assistant .thought"):
        assert page.locator(name).evaluate("e => e.textContent") == EVIL
    assert page.title() == "nanoalign" and not page.locator("#turns img, #turns b").count()
    shot("hostile")
    page.locator(".thumb.down").click()
    expect(page.locator(".thumb.on")).to_have_count(1)
    (row,) = rows(home / "thumbs.jsonl")
    assert row["prompt"][0]["content"] == row["completion"][0]["content"] == EVIL


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "screenshots").resolve()
    if not Path("runs/sft/config.json").exists():
        subprocess.run([sys.executable, ROOT / "train_sft.py"], check=True)
    with sync_playwright() as playing:
        browser = playing.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        parts = ("chat", play, []), ("hostile", be_hostile, ["-c", HOSTILE])
        for port, (name, part, start) in enumerate(parts, 7871):
            home = folder / name
            home.mkdir(parents=True, exist_ok=True)
            for old in home.glob("thumbs*"):
                old.unlink()
            with Server(home, port, *start) as url:
                page = browser.new_page(viewport={"width": 1200, "height": 900})
                foreign, errors = [], []
                page.on("request", lambda r: r.url.startswith(url) or foreign.append(r.url))
                page.on("pageerror", lambda e: errors.append(str(e)))
                page.goto(url)
                part(page, home, lambda name: page.screenshot(path=folder / f"{name}.png"))
                assert not foreign and not errors, (foreign, errors)
                page.close()
        browser.close()
    print(f"screenshots and rows are in {folder}")


if __name__ == "__main__":
    main()
