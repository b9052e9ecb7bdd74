"""The installed command `mae`, and its table of runs as text, JSON and a live page."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import Browser, needs_browser
from conftest import ROOT
from PIL import Image

from mae.cli import SUBCOMMANDS, call_subcommand, command
from mae.config.check import resolve
from mae.config.compose import composed
from mae.config.saved import write_config
from mae.program import PROGRAM
from mae.runs.locks import held_run
from mae.tools.run_rows import read_rows
from mae.tools.runs import Selection, main, order
from mae.tools.serve_runs import RunsHandler


def mae(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The installed command, from any directory."""
    code = "import sys; from mae.cli import command; sys.argv[0] = 'mae'; sys.exit(command())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def write_run(run: Path, *overrides: str, losses: tuple[float, ...] = (), age_s: float = 0, **summary: object) -> Path:
    """A run's directory with its config, metrics and summary."""
    run.mkdir(parents=True)
    write_config(run, resolve(composed(list(overrides))))
    lines = [json.dumps({"step": 10 * k, "loss": loss}) for k, loss in enumerate(losses, start=1)]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if summary:
        (run / "summary.json").write_text(json.dumps({"task": "pretrain", "steps": 30, "seconds": 1.0} | summary))
    for path in run.iterdir():
        os.utime(path, times=(time.time() - age_s, time.time() - age_s))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("table") / "runs"
    write_run(folder / "a", "task.mask_ratio=0.5", losses=(0.9, 0.5), val_loss=0.4)
    write_run(folder / "b", losses=(0.9, 0.6, 0.4), age_s=100, val_loss=0.3)
    write_run(folder / "sweep" / "c", "task=finetune", losses=(2.0,), age_s=7200)
    failed = write_run(folder / "d", "seed=3", age_s=300)
    (failed / "events.jsonl").write_text('{"step": 4, "event": "diverged: 50 steps in a row"}\n')
    write_run(folder / "a" / "checkpoints" / "inner")
    return folder


def test_the_table_has_every_run_its_state_and_the_differing_keys(runs, capsys):
    assert main([str(runs)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b", "d", "sweep/c"]  # newest first
    assert [line.split()[1] for line in lines] == ["finished", "finished", "diverged", "stale"]
    assert "task.mask_ratio" in head and "seed" in head and "model.depth" not in head
    assert "loss 2" in lines[3] and "2 h" in lines[3]


def test_paths_in_the_table_are_relative_to_the_working_directory(tmp_path, monkeypatch, capsys):
    for name, start in (("a", tmp_path / "runs" / "x=1"), ("b", Path("/elsewhere"))):
        write_run(tmp_path / "runs" / name, "task=knn", f"init='{start}'")
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    inits = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert inits == {"a": "runs/x=1", "b": "/elsewhere"}


def test_runs_are_filtered_and_sorted(runs, capsys):
    def names(*options: str) -> list[str]:
        assert main([str(runs), "--json", *options]) == 0
        return [row["run"] for row in json.loads(capsys.readouterr().out)]

    assert names("--best", "val_loss") == ["b", "a"]
    assert names("--where", "task.mask_ratio=0.75", "--where", "task=pretrain") == ["b", "d"]
    assert names("--where", "state=stale") == ["sweep/c"]
    assert names("--sort", "step") == ["d", "sweep/c", "a", "b"]


def test_runs_are_ordered_by_numbers_and_have_states_and_results_of_every_kind(tmp_path, capsys):
    write_run(tmp_path / "nine", "task=finetune", top1=9.5, ece=0.3)
    write_run(tmp_path / "hundred", "task=finetune", top1=100.0, ece=0.1)
    write_run(tmp_path / "near", "task=knn", "init=x", knn={"5": 40.0, "20": 60.0})
    broken = write_run(tmp_path / "broken", age_s=7200)
    (broken / "failure.json").write_text('{"rank": 0, "error": "UserError: no GPU", "traceback": ""}')
    write_run(broken / "bad_step")
    rows = {row.run: row for row in read_rows(tmp_path)}
    assert rows.keys() == {"nine", "hundred", "near", "broken"} and rows["broken"].state == "failed"
    assert rows["near"].result == "knn 60"
    chosen = ["nine", "hundred"]
    assert [row.run for row in order([rows[run] for run in chosen], None, "result")] == chosen
    assert [row.run for row in order(rows.values(), "ece", None)] == ["hundred", "nine"]
    assert [row.run for row in order(rows.values(), "knn", None)] == ["near"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--where", "task.mask_ration=0.5"], "task.mask_ration is neither a column nor a key of these runs. Did you"),
        (["--where", "seed"], "--where seed cannot be read: write KEY=VALUE, as task.mask_ratio=0.75."),
        (["--best", "val_los"], "no run has a result val_los. Did you mean val_loss?"),
        (["--sort", "ages"], "ages is neither a column nor a key of these runs. Did you mean age?"),
    ],
)
def test_a_key_that_no_run_has_is_refused_in_a_sentence(runs, options, sentence, capsys):
    assert main([str(runs), *options]) == 1
    assert sentence in capsys.readouterr().err


def test_a_directory_that_is_not_there_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'nowhere'} is not a directory.\n"


def test_a_run_that_a_process_holds_is_running(tmp_path):
    run = write_run(tmp_path / "held", age_s=7200)
    (state,) = [row.state for row in read_rows(tmp_path)]
    assert state == "stale"
    with held_run(run):
        (state,) = [row.state for row in read_rows(tmp_path)]
    assert state == "running"


@contextmanager
def served(selection: Selection) -> Iterator[str]:
    """The address of a server of a table."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(RunsHandler, selection)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def address(runs) -> Iterator[str]:
    with served(Selection(runs)) as address:
        yield address


def fetch(url: str, **headers: str) -> dict:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        return json.loads(answer.read())


def test_the_served_page_follows_the_runs_and_reads_nothing_else(runs, address):
    assert {row["run"] for row in fetch(f"{address}/runs.json")["rows"]} == {"a", "b", "d", "sweep/c"}
    (run,) = fetch(f"{address}/run.json?name=sweep/c")["runs"]
    assert run["series"]["loss"]["y"] == [2.0] and run["state"] == "stale"
    with (runs / "sweep" / "c" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 1.5}\n')
    (run,) = fetch(f"{address}/run.json?name=sweep/c")["runs"]
    assert run["series"]["loss"]["y"] == [2.0, 1.5] and run["state"] == "running"
    for path in ("/run?name=../runs/a", "/run?name=a/checkpoints/inner", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch(address + path)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        fetch(f"{address}/runs.json", Host="elsewhere.example")


def test_the_served_table_has_the_chosen_runs_in_the_chosen_order(runs):
    for selection, names in (
        (Selection(runs, best="val_loss"), ["b", "a"]),
        (Selection(runs, conditions=("task=pretrain", "task.mask_ratio=0.75")), ["b", "d"]),
        (Selection(runs, sort="state"), ["d", "a", "b", "sweep/c"]),
    ):
        with served(selection) as address:
            assert [row["run"] for row in fetch(f"{address}/runs.json")["rows"]] == names


def test_the_command_serves_its_selection_on_loopback_alone(runs):
    code = "import signal, sys; from mae.tools.runs import main; "
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's background jobs ignore Ctrl-C
    code += "sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(runs), "--best", "val_loss", "--where", "task=pretrain", "--serve", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout
        address = process.stdout.readline().split()[0].rstrip("/")
        assert [row["run"] for row in fetch(f"{address}/runs.json")["rows"]] == ["b", "a"]
        port = int(address.rpartition(":")[2])
        with socket.socket() as elsewhere, pytest.raises(ConnectionRefusedError):
            elsewhere.connect(("127.0.0.2", port))  # it would be answered if all addresses were listened on
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()


@needs_browser
@pytest.mark.slow
def test_a_browser_shows_the_table_and_a_run_while_they_go_on(tmp_path):
    runs = tmp_path / "runs"
    live = write_run(runs / "live", losses=(0.9, 0.8, 0.7))
    write_run(runs / "silent", losses=(0.9, 0.8), age_s=7200)
    state = "[...document.querySelectorAll('#runs tbody tr')].map((r) => [r.cells[0].innerText, r.cells[1].innerText])"
    steps = "document.querySelector('.chart[data-title=loss] .at').textContent"
    zoom = "document.querySelector('.chart[data-title=loss]').chart.plot.scales.x.max"

    def learn(step: int) -> None:
        with (live / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 0.5}) + "\n")

    with served(Selection(runs)) as address, Browser(tmp_path / "profile") as browser:
        for dark in (False, True):
            browser.open(address, dark=dark)
            assert browser.evaluate(state) == [["live", "running"], ["silent", "stale"]]
            assert browser.violations() == [] and browser.console == []
        assert browser.evaluate("document.getElementById('about').textContent") == "2 runs, 1 running, 1 stale"
        browser.evaluate("document.querySelector('#runs a').focus()")
        learn(40)
        browser.wait("document.querySelector('#runs tbody tr').cells[6].textContent === '40'")
        assert browser.evaluate("document.activeElement.textContent") == "live"  # a reader's focus stays
        write_run(runs / "new", losses=(0.1,))
        browser.wait(f"{state}.length === 3")
        browser.open(f"{address}/run?name=live")
        assert browser.evaluate("document.querySelector('.badge').textContent") == "running"
        browser.drag(".chart[data-title=loss] .u-over", 0.0, 0.5)
        zoomed = browser.evaluate(zoom)
        assert zoomed < 30
        browser.evaluate("document.querySelector('#config details').open = true")
        learn(50)
        (live / "images").mkdir()
        Image.new("RGB", (8, 8)).save(live / "images" / "reconstruction_00000050.png")
        browser.wait(f"{steps} === 'step 50' && document.querySelector('.pictures p')?.textContent === 'step 50'")
        assert browser.evaluate(zoom) == zoomed and browser.evaluate("document.querySelector('#config details').open")
        assert browser.console == []


def test_a_port_that_is_taken_is_refused_in_a_sentence(runs, address, capsys):
    port = address.rpartition(":")[2]
    assert main([str(runs), "--serve", port]) == 1
    assert f"Port {port} cannot be listened on" in capsys.readouterr().err


def test_the_installed_command_works_from_any_directory(tmp_path):
    done = mae("--help", cwd=tmp_path)
    assert (
        done.returncode == 0 and "mae checkpoints RUN" in done.stdout and "  mae task=finetune init=RUN" in done.stdout
    )
    done = mae("dry_run=true", cwd=tmp_path)
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr


@pytest.mark.parametrize("word", [word for word, entry in SUBCOMMANDS.items() if entry.path])
def test_each_subcommand_names_a_function(word):
    module, _, function = SUBCOMMANDS[word].path.partition(":")
    assert callable(getattr(importlib.import_module(f"mae.{module}"), function))


def test_a_subcommand_without_its_directory_shows_its_usage(capsys, monkeypatch):
    monkeypatch.setenv(PROGRAM, "mae")
    for arguments, sentence in (
        (["status"], "usage: mae status DIR\n"),
        (["checkpoints"], "usage: mae checkpoints RUN"),
    ):
        monkeypatch.setattr(sys, "argv", ["mae", *arguments])
        assert command() == 2
        assert capsys.readouterr().err.startswith(sentence)


def test_a_subcommand_is_called_by_its_own_name(capsys, monkeypatch):
    monkeypatch.setenv(PROGRAM, "mae")
    with pytest.raises(SystemExit):
        call_subcommand(SUBCOMMANDS["report"], ["--help"])
    assert capsys.readouterr().out.startswith("usage: mae report")


COMPLETE = """
complete_line() {  # prints the candidates for a line whose last word is being typed, as bash asks for them
  COMP_LINE="$1" COMP_POINT=${#1} COMPREPLY=()
  local words=($COMP_LINE)
  COMP_CWORD=$(( ${#words[@]} - 1 ))
  hydra_bash_completion
  echo "${COMPREPLY[*]}"
}
"""


@pytest.mark.slow
def test_bash_completes_groups_keys_and_subcommands(tmp_path):
    installed = tmp_path / "mae"
    installed.write_text(f"#!{sys.executable}\nimport sys\nfrom mae.cli import command\nsys.exit(command())\n")
    installed.chmod(0o755)
    path = os.pathsep.join((str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    typed = {"task.mask": "task.mask_ratio=", "data=fash": "data=fashion_mnist"}
    for program, expected in (("python run.py", typed), ("mae", typed | {"checkp": "checkpoints checkpoint."})):
        lines = "\n".join(f"complete_line '{program} {word}'" for word in expected)
        script = f'{COMPLETE}\neval "$({program} -sc install=bash)"\n{lines}\ncomplete -p {program.split()[0]}'
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
        *candidates, rule = done.stdout.splitlines()
        assert candidates == list(expected.values()), done.stderr
        assert rule.endswith(f"-F hydra_bash_completion {program.split()[0]}")
