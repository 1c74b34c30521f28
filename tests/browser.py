"""The page in a real browser: keyboard, phone, stages side by side, and what a title may hold.

`make test-browser`; needs Debian's chromium and the extra `browser`.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import servers
import tiny_run

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
CHROMIUM = shutil.which("chromium") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs the command `chromium`")
HOSTILE = "<img src=x onerror=document.title='broken'>"
QUIET = (
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PICTURES = os.environ.get("PICTURES")  # a folder for screenshots


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    run = tiny_run.history_run(tmp_path_factory.mktemp("run"))
    with servers.served(run) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield found
        found.close()


@pytest.fixture
def page(browser, address):
    """The page on a large screen; it loads nothing from elsewhere and reports no error."""
    wanted, errors = [], []
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    found = context.new_page()
    found.set_default_timeout(20_000)
    found.on("request", lambda request: wanted.append(request.url))
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.goto(address)
    yield found
    assert all(url.startswith((address, "data:")) for url in wanted) and not errors
    context.close()


def choose(page, text: str) -> None:
    """By keyboard alone: types a text and takes the first title found."""
    page.keyboard.type(text)
    page.get_by_role("option").first.wait_for()
    page.keyboard.press("Enter")


def listed(page, name: str = "SFT") -> list[str]:
    """The titles of a ranked list, once it is there."""
    titles = page.get_by_role("list", name=f"Recommended by {name}").locator(".title")
    titles.first.wait_for()
    return titles.all_inner_texts()


def keep(page, name: str) -> None:
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)


def test_the_keyboard_alone_chooses_a_history_and_the_list_is_the_server_s(page, address):
    page.keyboard.press("Tab")
    for text in ("alien", "hea"):
        choose(page, text)
    page.get_by_role("list", name="Liked titles").locator("li").nth(1).wait_for()
    found = listed(page)
    asked = {"history": ["alien", "heat"], "k": 10}
    items = httpx.post(f"{address}/recommend", json=asked, timeout=30).json()["items"]
    assert found == [item["title"] for item in items] and len(found) == 8
    while page.evaluate("document.activeElement.className") != "" or not page.evaluate(
        "document.activeElement.closest('#lists') !== null"
    ):
        page.keyboard.press("Tab")  # from the search over the history to the first result
    page.keyboard.press("Enter")
    page.locator(".why").wait_for()
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    keep(page, "keyboard")


def test_stages_are_compared_side_by_side(page):
    page.get_by_role("combobox").focus()
    choose(page, "jaws")
    page.get_by_label("Side by side").check()
    base, sft = listed(page, "Base"), listed(page, "SFT")
    assert len(base) == len(sft) == 9 and set(base) == set(sft) and base != sft
    keep(page, "stages")


def test_a_title_is_text_whatever_it_holds(page):
    answer = {"items": [{"id": 3, "title": HOSTILE, "score": -1.0}]}
    for path in ("items", "recommend"):
        page.route(f"**/{path}*", lambda route: route.fulfill(json=answer))
    page.get_by_role("combobox").focus()
    choose(page, "<img")
    assert HOSTILE in page.get_by_role("list", name="Liked titles").inner_text()
    assert listed(page) == [HOSTILE]
    assert page.title() == "What next?" and page.locator("img").count() == 0


def test_items_of_one_title_are_told_apart(page):
    years = {3: 1962, 4: 1991}
    about = [{"id": item, "title": "Cape Fear", "year": year} for item, year in years.items()]
    ranked = [{"id": item, "title": "Cape Fear", "score": -1.0} for item in (4, 3)]
    ranked.append({"id": 5, "title": "Heat", "score": -2.0})
    page.route("**/items*", lambda route: route.fulfill(json={"items": about}))
    page.route("**/recommend*", lambda route: route.fulfill(json={"items": ranked}))
    page.get_by_role("combobox").focus()
    choose(page, "cape")
    assert listed(page) == ["Cape Fear 1991", "Cape Fear 1962", "Heat"]


def test_removed_titles_and_unknown_ones_are_told(page):
    page.get_by_role("combobox").focus()
    choose(page, "jaws")
    listed(page)
    page.get_by_label("Remove jaws").click()
    page.get_by_text("Choose a title to begin.").wait_for()
    page.keyboard.type("no such title")
    page.get_by_text("No title contains").wait_for()


def test_a_phone_shows_all_without_scrolling_sideways_and_with_large_targets(browser, address):
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True
    )
    page = context.new_page()
    page.goto(address)
    page.get_by_role("combobox").tap()
    choose(page, "alien")
    listed(page)
    page.get_by_label("Side by side").check()
    listed(page, "Base")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for target in page.get_by_role("button").all():
        assert target.bounding_box()["height"] >= 40
    keep(page, "phone")
    context.close()


def test_a_server_that_has_gone_is_told(browser, tmp_path):
    run = tiny_run.history_run(tmp_path)
    page = browser.new_page()
    with servers.served(run) as (address, _):
        page.goto(address)
        page.get_by_text("Choose a title to begin.").wait_for()
    page.get_by_role("combobox").focus()
    page.keyboard.type("jaws")
    page.locator("#status.error").wait_for()
    page.close()
