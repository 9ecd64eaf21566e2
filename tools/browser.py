"""A headless Chromium: screenshots of pages, and the console messages of their scripts."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = "no headless Chromium is installed: apt-get install chromium (or chromium-headless-shell)"
CONSOLE = re.compile(r"CONSOLE[:(]\d+\)?\] (.*)")
SECONDS = 120
THEMES = {"dark": 0, "light": 1}


def find_browser() -> str | None:
    """Return the path of an installed browser; None without one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def screenshot(page: Path, out: Path, width: int, height: int, theme: str = "light") -> list[str]:
    """Write a PNG of a page; return the messages that its scripts wrote to the console, errors included.

    The page has no network access. Raises ValueError if there is no browser, or if it fails.
    """
    arguments = [f"--screenshot={out}", f"--window-size={width},{height}", "--hide-scrollbars"]
    log = _run(page, [*arguments, f"--blink-settings=preferredColorScheme={THEMES[theme]}"]).stderr
    if not out.is_file():
        raise ValueError(f"the browser made no screenshot of {page}: {log.strip()[-300:]}")
    return CONSOLE.findall(log)


def document(page: Path) -> str:
    """Return a page's HTML after its scripts have run."""
    return _run(page, ["--dump-dom"]).stdout


def _run(page: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    browser = find_browser()
    if browser is None:
        raise ValueError(MISSING)
    with tempfile.TemporaryDirectory() as profile:
        fixed = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={profile}"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", "--force-device-scale-factor=1"),
        ]
        url = page.resolve().as_uri()
        return subprocess.run(
            [browser, *fixed, *arguments, url],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            check=True,
        )
