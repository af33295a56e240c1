"""docs/images/chat.png: the server's chat page with a real answer of `mini` (needs the test extra and Chromium).

    python recipes/mini/picture.py OUT.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys

from playwright.sync_api import sync_playwright

QUESTIONS = ("What are the symptoms of asthma?",)


def main(out: str) -> None:
    with subprocess.Popen([sys.executable, "-m", "deepseek", "serve", "mini", "--port", "0"], stdout=subprocess.PIPE,
                          text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split(" on ")[1].split(",")[0].strip().removesuffix("/v1")
            with sync_playwright() as own:
                browser = own.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 900, "height": 560}, device_scale_factor=1.5)
                page.set_default_timeout(120_000)  # milliseconds
                page.goto(f"{url}/")
                for question in QUESTIONS:
                    page.get_by_label("Message").fill(question)
                    page.keyboard.press("Enter")
                    page.get_by_role("button", name="Regenerate").wait_for()
                page.screenshot(path=out)
                browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main(sys.argv[1])
