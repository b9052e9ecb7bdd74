"""report.html of runs and sweeps: what is in it, and that a real browser shows it without a request or an error."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, needs_browser
from conftest import TINY, TINY_PRETRAIN, run_here

from mae import engine
from mae.report import record, sweep
from mae.report import run as report
from mae.report.html import page


def data_of(path: Path) -> dict:
    """The data that a page holds."""
    found = re.search(r"id='data'>(.*?)</script>", path.read_text(), re.S)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A sweep of two pretraining runs, and a fine-tuned run of one of them."""
    place = tmp_path_factory.mktemp("report")
    for ratio in ("0.5", "0.75"):
        given = [*TINY_PRETRAIN, f"task.mask_ratio={ratio}", "task.eval_every_epochs=0.5"]
        assert run_here(place / "sweep" / f"mask_ratio_{ratio}", *given) == 0
    small = [*TINY, "task=finetune", "task.batch_size=32", "task.max_steps=3", "task.log_every_steps=1"]
    assert run_here(place / "finetune", *small, f"init={place / 'sweep' / 'mask_ratio_0.5'}") == 0
    sweep.write_sweep(place / "sweep")
    return place


@pytest.fixture(scope="module")
def pretrained(place) -> Path:
    return place / "sweep" / "mask_ratio_0.75"


# ---------------------------------------------------------------- what is in it


def test_a_run_ends_with_a_page_of_all_it_has(pretrained):
    (run,) = data_of(pretrained / "report.html")["runs"]
    assert run["state"] == "finished" and run["command"].startswith("python run.py model.embed_dim=32")
    rows = [row for row in record.read_record(pretrained).metrics if "loss" in row]
    assert run["series"]["loss"]["y"] == [row["loss"] for row in rows]
    assert run["series"]["loss"]["x"]["images_seen"] == [row["images_seen"] for row in rows]
    (pictures,) = run["pictures"]
    assert [item["caption"] for item in pictures["items"]][-1] == "step 10, epoch 2"
    changed = {row[0]: row[1:] for row in run["config"] if len(row) > 2}
    assert changed["model.embed_dim"] == ["32", "96"] and "task.mask_ratio" not in changed
    assert {"torch", "python", "device", "started"} <= {key for key, _ in run["environment"]}


def test_a_classifier_s_page_holds_classes_and_confusion(place):
    (run,) = data_of(place / "finetune" / "report.html")["runs"]
    assert len(run["classes"]["rows"]) == 10
    assert sum(n for _, _, n in run["classes"]["confusion"]) == sum(r["images"] for r in run["classes"]["rows"])
    hits = sum(n for true, predicted, n in run["classes"]["confusion"] if true == predicted)
    top1 = json.loads((place / "finetune" / "summary.json").read_text())["top1"]
    assert 100 * hits / sum(n for _, _, n in run["classes"]["confusion"]) == pytest.approx(top1)


def test_a_run_that_failed_or_diverged_has_a_page_too(tmp_path, monkeypatch):
    run = tmp_path / "diverged"
    bad = ["task.max_bad_steps=2", "optimizer.base_lr=1e30", "task.epochs=8", "task.warmup_epochs=0"]
    assert run_here(run, *TINY_PRETRAIN, *bad) == 3
    (run_of_page,) = data_of(run / "report.html")["runs"]
    assert run_of_page["state"] == "diverged" and any("not finite" in event for _, event in run_of_page["events"])

    def broken(*_, **__):
        raise RuntimeError("the <b>cable</b> was pulled")

    monkeypatch.setattr(engine, "run_task", broken)
    with pytest.raises(RuntimeError):
        run_here(tmp_path / "failed", *TINY_PRETRAIN)
    (run_of_page,) = data_of(tmp_path / "failed" / "report.html")["runs"]
    assert run_of_page["state"] == "failed" and "the <b>cable</b> was pulled" in run_of_page["events"][-1][1]


def test_what_goes_wrong_with_a_page_is_a_warning(pretrained, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    (run / "images" / "broken.png").mkdir()
    report.write_report(run)
    assert "report.html could not be made" in caplog.text


def test_several_runs_lie_side_by_side(place, tmp_path, capsys):
    runs = [str(place / "sweep" / name) for name in ("mask_ratio_0.5", "mask_ratio_0.75")]
    out = tmp_path / "both.html"
    assert report.main([*runs, "--out", str(out)]) == 0 and capsys.readouterr().out.strip() == str(out)
    data = data_of(out)
    assert ["task.mask_ratio", "0.5", "0.75"] in data["differences"]
    assert {row[0] for row in data["differences"]} == {"task.mask_ratio", "output_dir"}


def test_what_is_no_run_is_said(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert "is not the directory of a run: it holds no config.yaml." in capsys.readouterr().err


def test_a_page_keeps_markup_in_data_harmless():
    made = page("<t>", {"runs": [], "differences": [["</script><script>alert(1)</script>"]]})
    assert "<title>&lt;t&gt;</title>" in made and "</script><script>alert" not in made


def test_a_pipeline_s_figures_have_the_best_of_k_neighbours():
    stages = {"pretrain": {"val_loss": 0.4}, "knn": {"knn": {"10": 40.0, "20": 41.5}}}
    figures = dict(report.main_figures({"stages": stages, "seconds": 9}))
    assert figures == {"pretrain validation loss": 0.4, "knn k-NN accuracy (%)": 41.5, "seconds": 9}


def test_long_curves_are_thinned_but_keep_their_end():
    rows = [{"step": k, "images_seen": k, "epoch": 0.0, "loss": float(k)} for k in range(10001)]
    thin = report.series(rows)["loss"]
    assert len(thin["y"]) <= report.POINTS + 1 and thin["y"][-1] == 10000.0 and thin["x"]["step"][-1] == 10000


# ---------------------------------------------------------------- in a real browser

LOSS = '.chart[data-title="loss"]'
PLOT = f"{LOSS} .u-over"
LEGEND = f"document.querySelector('{LOSS} .legend')"
SCALES = f"document.querySelector('{LOSS}').chart.plot.scales"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@needs_browser
def test_a_chart_shows_values_zooms_and_becomes_logarithmic(pretrained, browser):
    (run,) = data_of(pretrained / "report.html")["runs"]
    losses = dict(zip(run["series"]["loss"]["x"]["step"], run["series"]["loss"]["y"], strict=True))
    browser.open(pretrained / "report.html")
    assert browser.console == [] and browser.requests == []
    assert browser.evaluate("document.querySelectorAll('.chart canvas').length") >= 6

    def legend() -> dict[str, float]:
        text = browser.evaluate(f"{LEGEND}.innerText")
        return {name: float(value) for name, value in re.findall(r"(\S+) ([\d.]+)(?!\S)", text)}

    def zoom() -> list[float]:
        return browser.evaluate(f"[{SCALES}.x.min, {SCALES}.x.max]")

    assert legend()["step"] == 10 and legend()["loss"] == pytest.approx(losses[10], rel=1e-3)
    browser.hover(PLOT, 0.0)
    assert legend()["step"] == 1 and legend()["loss"] == pytest.approx(losses[1], rel=1e-3)
    browser.drag(PLOT, 0.4, 0.7)
    assert zoom() == pytest.approx([1 + 0.4 * 9, 1 + 0.7 * 9], abs=0.1)
    browser.click(PLOT, times=2)
    assert zoom() == [1, 10]
    assert browser.evaluate(f"{SCALES}.y.distr") == 1
    browser.click("#log")
    assert browser.evaluate(f"{SCALES}.y.distr") == 3
    browser.click(f"{LOSS} .legend button")
    assert browser.evaluate(f"document.querySelector('{LOSS}').chart.plot.series.map((s) => s.show)") == [
        True,
        False,
        True,
    ]


@needs_browser
def test_a_chart_is_read_by_the_keyboard(pretrained, browser):
    browser.open(pretrained / "report.html")
    browser.evaluate(f"document.querySelector('{LOSS} .canvas').focus()")
    for _ in range(3):
        browser.key("ArrowLeft")
    assert browser.evaluate(f"{LEGEND}.querySelector('.at').textContent") == "step 7"
    browser.drag(PLOT, 0.4, 0.7)
    browser.key("Escape")
    assert browser.evaluate(f"[{SCALES}.x.min, {SCALES}.x.max]") == [1, 10]


@needs_browser
def test_a_slider_shows_earlier_pictures(pretrained, browser):
    browser.open(pretrained / "report.html")
    source = "document.querySelector('.pictures img').src"
    last = browser.evaluate(source)
    assert (
        last.startswith("data:image/")
        and browser.evaluate("document.querySelector('.pictures img').naturalWidth") > 100
    )
    browser.evaluate("document.querySelector('.pictures input').focus()")
    browser.key("ArrowLeft")
    assert browser.evaluate(source) != last


@needs_browser
def test_the_page_of_a_classifier_and_of_several_runs_live_in_a_browser(place, tmp_path, browser):
    browser.open(place / "finetune" / "report.html")
    assert browser.console == [] and browser.requests == []
    assert browser.evaluate("['per-class', 'confusion'].every((id) => document.getElementById(id))")
    out = tmp_path / "both.html"
    assert report.main([str(place / "finetune"), str(place / "sweep" / "mask_ratio_0.5"), "--out", str(out)]) == 0
    browser.open(out)
    assert browser.console == [] and browser.requests == []
    names = browser.evaluate(f"[...{LEGEND}.querySelectorAll('button')].map((b) => b.textContent.split(' ')[0])")
    assert names == ["finetune", "mask_ratio_0.5"]
    assert browser.evaluate("document.getElementById('differences').textContent").startswith("key")


@needs_browser
def test_a_sweep_s_page_lives_in_a_browser(place, browser):
    browser.open(place / "sweep" / "report.html")
    assert browser.console == [] and browser.requests == []
    assert browser.evaluate("document.querySelectorAll('figure img[src^=\"data:image/svg\"]').length") == 1
    assert browser.evaluate("document.querySelectorAll('.parallel path').length") == 2
    column = "table.sortable th:nth-child(3)"
    for order, first in (("ascending", "mask_ratio_0.5"), ("descending", "mask_ratio_0.75")):
        browser.click(f"{column} button")
        assert browser.evaluate(f"document.querySelector('{column}').ariaSort") == order
        assert browser.evaluate("document.querySelector('table.sortable td').textContent") == first


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_are_accessible_and_fit_a_phone(place, pretrained, browser, dark):
    for path in (pretrained / "report.html", place / "finetune" / "report.html", place / "sweep" / "report.html"):
        browser.open(path, dark=dark)
        assert browser.violations() == []
        browser.open(path, dark=dark, width=360, height=740)
        assert browser.violations() == []
        assert browser.evaluate("document.documentElement.scrollWidth") == 360
        widths = browser.evaluate("[...document.querySelectorAll('.chart canvas')].map((c) => c.clientWidth)")
        assert widths and max(widths) <= 340


@needs_browser
def test_the_browser_notices_a_request_an_error_and_a_violation(pretrained, tmp_path, browser):
    page = pretrained / "report.html"
    browser.open(page)
    browser.evaluate("setTimeout(() => { throw new Error('noticed'); })")
    browser.settle()
    assert any("noticed" in line for line in browser.console)
    browser.evaluate("fetch('http://127.0.0.1:9/x').catch(() => 0)")
    assert any("Content Security Policy" in line for line in browser.console)  # which keeps the promise by itself
    bare = tmp_path / "bare.html"
    bare.write_text(page.read_text().replace("Content-Security-Policy", "x").replace("--soft: #5d6a7c", "--soft: #eee"))
    browser.open(bare)
    browser.evaluate("fetch('http://127.0.0.1:9/x').catch(() => 0)")
    assert browser.requests == ["http://127.0.0.1:9/x"]
    assert any("color-contrast" in violation for violation in browser.violations())
