"""report.html of runs and sweeps: what is in it, and that a real browser shows it without a request or an error."""

import json
import re
import shutil
from pathlib import Path

import pytest
from browser import look, needs_browser
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
    (told,) = data_of(run / "report.html")["runs"]
    assert told["state"] == "diverged" and any("not finite" in event for _, event in told["events"])

    def broken(*_, **__):
        raise RuntimeError("the <b>cable</b> was pulled")

    monkeypatch.setattr(engine, "run_task", broken)
    with pytest.raises(RuntimeError):
        run_here(tmp_path / "failed", *TINY_PRETRAIN)
    (told,) = data_of(tmp_path / "failed" / "report.html")["runs"]
    assert told["state"] == "failed" and "the <b>cable</b> was pulled" in told["events"][-1][1]


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


def test_long_curves_are_thinned_but_keep_their_end():
    rows = [{"step": k, "images_seen": k, "epoch": 0.0, "loss": float(k)} for k in range(10001)]
    thin = report.series(rows)["loss"]
    assert len(thin["y"]) <= report.POINTS + 1 and thin["y"][-1] == 10000.0 and thin["x"]["step"][-1] == 10000


# ---------------------------------------------------------------- in a real browser

HAND = """
const out = {};
const chart = document.querySelector('.chart[data-title="loss"]'), svgs = chart.querySelector("svg");
const box = svgs.getBoundingClientRect();
const at = (x) => ({clientX: box.left + box.width * x, clientY: box.top + box.height / 2, bubbles: true});
svgs.dispatchEvent(new MouseEvent("mousemove", at(0.5)));
out.tip = chart.querySelector(".tip").textContent;
const before = chart.querySelector(".curve").getAttribute("d");
svgs.dispatchEvent(new MouseEvent("mousedown", at(0.4)));
svgs.dispatchEvent(new MouseEvent("mouseup", at(0.7)));
out.zoomed = chart.querySelector(".curve").getAttribute("d") !== before;
svgs.dispatchEvent(new MouseEvent("dblclick", at(0.5)));
out.back = chart.querySelector(".curve").getAttribute("d") === before;
const range = document.querySelector("input[type=range]"), image = document.querySelector(".pictures img");
const last = image.src;
range.value = 0;
range.dispatchEvent(new Event("input"));
out.slid = image.src !== last;
out.size = [image.naturalWidth > 100];
document.body.dataset.out = JSON.stringify(out);
"""


@needs_browser
def test_a_run_s_page_lives_in_a_browser(pretrained, tmp_path):
    seen = look(pretrained / "report.html", tmp_path, HAND)
    assert seen.console == [] and seen.requests == []
    assert seen.count('class="card chart"') >= 6 and seen.count('class="curve"') >= 6
    assert seen.count(r'<img alt="reconstruction" src="data:image') == 1 and 'data-ready="yes"' in seen.document
    found = re.search(r'data-out="(.*?)"', seen.document)
    assert found
    out = json.loads(found[1].replace("&quot;", '"'))
    assert out["zoomed"] and out["back"] and out["slid"] and re.match(r"step \d+loss: [\d.]+", out["tip"])


@needs_browser
def test_the_page_of_a_classifier_and_of_several_runs_live_in_a_browser(place, tmp_path):
    seen = look(place / "finetune" / "report.html", tmp_path)
    assert seen.console == [] and seen.requests == []
    assert 'id="per-class"' in seen.document and 'id="confusion"' in seen.document
    out = tmp_path / "both.html"
    assert report.main([str(place / "finetune"), str(place / "sweep" / "mask_ratio_0.5"), "--out", str(out)]) == 0
    seen = look(out, tmp_path)
    assert seen.console == [] and seen.requests == [] and 'id="differences"' in seen.document


SORT = """
document.querySelectorAll("table.sortable th")[2].click();
document.querySelectorAll("table.sortable th")[2].click();
document.body.dataset.first = document.querySelector("table.sortable tbody tr").textContent;
"""


@needs_browser
def test_a_sweep_s_page_lives_in_a_browser(place, tmp_path):
    seen = look(place / "sweep" / "report.html", tmp_path, SORT)
    assert seen.console == [] and seen.requests == []
    assert seen.count(r'<img src="data:image/svg\+xml') == 1 and seen.count(r"<path d=") >= 2
    assert 'data-first="mask_ratio_0.75' in seen.document and 'id="best"' in seen.document


@needs_browser
def test_the_browser_test_would_notice_a_request_and_an_error(pretrained, tmp_path):
    seen = look(pretrained / "report.html", tmp_path, "throw new Error('noticed'); ")
    assert any("noticed" in line for line in seen.console)
    seen = look(pretrained / "report.html", tmp_path, "fetch('http://127.0.0.1:9/x').catch(() => 0);")
    assert any("Content Security Policy" in line for line in seen.console)  # which keeps the promise by itself
    bare = tmp_path / "bare.html"
    bare.write_text((pretrained / "report.html").read_text().replace("Content-Security-Policy", "x"))
    seen = look(bare, tmp_path, "fetch('http://127.0.0.1:9/x').catch(() => 0);")
    assert seen.requests == ["http://127.0.0.1:9/x"]
