"""The web console in a real browser: log in by token, run an instance, watch it, stop and terminate it.

Arguments: the daemon's URL, a token. Chromium is the system's.
"""

import re
import shutil
import sys

from playwright.sync_api import expect, sync_playwright

url, token = sys.argv[1:]

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
    )
    page = browser.new_page()
    problems, elsewhere = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console",
        lambda message: message.type == "error"
        and problems.append(f"{message.text} ({message.location.get('url')})"),
    )
    page.on("request", lambda request: request.url.startswith(url) or elsewhere.append(request.url))
    page.on("dialog", lambda dialog: dialog.accept())
    page.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)

    # A token that is none is refused, in words.
    page.goto(url)
    page.fill("#token", "nonsense")
    page.click("#login button")
    expect(page.locator("#message")).to_contain_text("token")
    expect(page.locator("#login")).to_be_visible()
    problems.clear()

    page.fill("#token", token)
    page.click("#login button")
    expect(page.locator("#images")).to_contain_text("tiny")
    page.fill("#name", "<b>web</b>")
    page.click("#run button")
    row = page.locator("#instances tr")
    expect(row).to_have_count(1)
    expect(row).to_contain_text("<b>web</b>")
    expect(row.locator("td").nth(2)).to_have_text("running")

    # Its page: facts, boot times, and the console as it is written.
    row.locator("a").click()
    expect(page.locator("#facts")).to_contain_text("running")
    expect(page.locator("#boot rect")).to_have_count(4)
    expect(page.locator("#console")).to_contain_text("Simulated guest boots")
    page.get_by_role("button", name="Reboot").click()
    expect(page.locator("#console")).to_contain_text(re.compile("boots.*boots", re.S))
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#facts")).to_contain_text("stopped")
    page.get_by_role("button", name="Terminate").click()
    expect(page.locator("#facts")).to_contain_text("terminated")

    # The token lives as long as the tab: it is there after a reload, and nowhere in another.
    page.reload()
    expect(page.locator("#one")).to_be_visible()
    other = browser.new_page()
    other.goto(url)
    expect(other.locator("#login")).to_be_visible()

    # The policy keeps what is not the page's own from being run.
    ran = page.evaluate(
        """() => { const s = document.createElement("script"); s.textContent = "window.ran = true";
                   document.head.append(s); return window.ran === true; }"""
    )
    assert not ran, "an inline script was run"
    problems = [problem for problem in problems if "Content Security Policy" not in problem]
    assert not problems, problems
    assert not elsewhere, elsewhere
    browser.close()
print("the web console works in Chromium")
