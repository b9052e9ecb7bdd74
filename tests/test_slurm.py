"""Jobs on SLURM, as far as that needs no cluster: what becomes of an attempt, the fence, states, bad settings."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_PRETRAIN, composed, run_cli, run_here
from omegaconf import OmegaConf

from mae.config import rules
from mae.config.build import call
from mae.config.saved import read_config
from mae.errors import UserError
from mae.launch import launch
from mae.launch.slurm import check, job, queue, state, status, submit
from mae.launch.slurm.check import Node
from mae.launch.slurm.queue import Job
from mae.launch.slurm.settings import SlurmSettings
from mae.launch.slurm.verdict import Ending, Verdict, cause_in, judge, newest_step
from mae.runs import attempt, files
from mae.runs.failure import write_failure
from mae.tracking import jsonl

OWN = {"rank": 1, "error": "KeyError: 'label'", "lost_peer": False, "traceback": "", "time": 0.0, "attempt": None}
PEER = OWN | {"rank": 0, "error": "RuntimeError: Connection closed by peer", "lost_peer": True}

BOTH = ["Exited with exit code 1", "Exited with exit code 130"]


def ending(**changed) -> Ending:
    plain = {"finished": False, "failure": None, "stopped": False, "causes": (), "code": 0, "advanced": False}
    return Ending(**(plain | {"lost_node": "", "left_first": False} | changed))


# ---------------------------------------------------------------- what becomes of an attempt


@pytest.mark.parametrize(
    ("end", "action", "reason"),
    [
        (ending(finished=True, causes=["Killed"], code=137), "finished", ""),
        (ending(stopped=True), "requeue", "it was asked to stop"),
        (ending(stopped=True, causes=["CANCELLED"], code=1), "requeue", "it was asked to stop"),
        (ending(causes=["User defined signal 2"], code=140), "requeue", "it was asked to stop"),  # while python starts
        (ending(causes=["Exited with exit code 130"], code=130, stopped=True), "requeue", "it was asked to stop"),
        # one leaves before the train loop, another loses it as a peer in there, and srun hears of this one first
        (ending(failure=PEER, stopped=True, left_first=True, causes=BOTH, code=130), "requeue", "it was asked to stop"),
        # one never comes, the other waits in vain, and srun ends the first because of that
        (ending(failure=PEER, stopped=True, causes=BOTH, code=130), "failed", "no checkpoint was written"),
        (ending(failure=PEER, stopped=True, causes=["Killed", *BOTH], code=137), "failed", "Killed (no checkpoint"),
        # an own fault, in any rank, also where the others were told to stop because of it (B1, B2)
        (ending(failure=OWN, causes=["Exited with exit code 1"], code=1), "failed", "KeyError: 'label'"),
        (ending(failure=OWN, stopped=True, advanced=True, code=1), "failed", "KeyError: 'label'"),
        # a crash goes on where it had made progress, and only there
        (ending(causes=["Killed"], code=137, advanced=True), "requeue", "crashed (Killed) after it had made progress"),
        (ending(causes=["Killed"], code=137), "failed", "Killed (no checkpoint was written"),
        (ending(causes=["Killed"], code=137, failure=PEER, stopped=True), "failed", "Killed (no checkpoint"),
        (ending(failure=PEER, code=1, causes=["Exited with exit code 1"]), "failed", "no checkpoint was written"),
        (ending(code=1), "failed", "srun ended with exit code 1"),
        (
            ending(failure=PEER, code=1, causes=["Exited with exit code 1"], lost_node="node2"),
            "requeue",
            "node node2 does",
        ),
    ],
)
def test_what_becomes_of_a_job_after_an_attempt(end, action, reason):
    verdict = judge(end, requeues_left=3)
    assert verdict.action == action and reason in verdict.reason


def test_a_job_is_requeued_no_more_often_than_allowed():
    assert judge(ending(stopped=True), 1).action == "requeue"
    assert judge(ending(stopped=True), 0) == Verdict(
        "failed", "it was asked to stop, and launcher.max_requeues is used up"
    )


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("srun: error: node2: task 1: Killed", "Killed"),
        ("srun: error: node2: tasks 0-1,3: Exited with exit code 3", "Exited with exit code 3"),
        ("srun: error: node1: task 0: Segmentation fault (core dumped)", "Segmentation fault"),
        ("slurmstepd-node1: error: *** STEP 1.0 ON node1 CANCELLED AT 2026-01-01T00:00:00 ***", "CANCELLED"),
        ("slurmstepd-node1: error: *** JOB 1 ON node1 CANCELLED AT 2026 DUE TO PREEMPTION ***", "CANCELLED"),
        ("srun: Force Terminated StepId=1.0", "CANCELLED"),
        ("srun: forcing job termination", "CANCELLED"),
        ("srun: Job step aborted: Waiting up to 32 seconds for job step to finish.", ""),
        ("srun: launch/slurm: _step_signal: Terminating StepId=1.0", ""),
    ],
)
def test_srun_s_words_for_an_end(line, cause):
    assert cause_in(line) == cause


def conclusion(monkeypatch, tmp_path, state: str, refused: str = "") -> tuple[int, dict, list]:
    """(exit code, verdict, requeues asked for) where SLURM shows a state at the end of an attempt to be requeued."""
    (tmp_path / "slurm").mkdir(exist_ok=True)
    asked = []
    monkeypatch.setattr(queue, "field", lambda *_: state)
    monkeypatch.setattr(queue, "requeue", lambda name: asked.append(name) or refused)
    monkeypatch.setattr(job.time, "sleep", lambda _: None)
    code = job.act_on(tmp_path, "7", 0, Verdict("requeue", "it was asked to stop"))
    return code, json.loads((tmp_path / "slurm" / "verdict.json").read_text()), asked


def test_a_job_that_slurm_has_taken_into_its_hands_is_left_to_it(monkeypatch, tmp_path):
    """B3: preempted without grace, it is requeued already; cancelled, it must not be."""
    for now in ("COMPLETING", "PENDING", "CANCELLED"):
        assert conclusion(monkeypatch, tmp_path, now)[2] == []
    for now in ("RUNNING", "SIGNALING"):  # the second for a moment, while a signal is on its way
        assert conclusion(monkeypatch, tmp_path, now)[2] == ["7"] and Job(now).alive
    monkeypatch.undo()
    monkeypatch.setattr(queue, "command", lambda *_, **__: (1, "", "Job is pending execution for job 7"))
    assert queue.requeue("7") == ""


def test_a_time_limit_that_comes_before_a_save_is_no_end(monkeypatch):
    asked, reason = [], "None"
    monkeypatch.setattr(queue, "field", lambda *_: reason)
    monkeypatch.setattr(queue, "requeue", lambda name: asked.append(name) or "")
    chances: list[None] = [None]
    job.at_time_limit("7", chances)  # TERM of a cancellation
    assert asked == []
    reason = "TimeLimit"
    for _ in range(2):
        job.at_time_limit("7", chances)
    assert asked == ["7"]


def test_a_cluster_that_does_not_requeue_is_named(monkeypatch, tmp_path):
    code, verdict, _ = conclusion(monkeypatch, tmp_path, "RUNNING", refused="Requested operation is disabled")
    assert code == 1 and verdict["action"] == "failed" and "SLURM does not requeue it: Requested" in verdict["reason"]


# ---------------------------------------------------------------- the fence


def test_an_older_attempt_commits_nothing(monkeypatch, tmp_path):
    """B7: whatever it is about to write, it finds a newer attempt's name and stops."""
    from mae import checkpoint

    (tmp_path / "checkpoints").mkdir()
    attempt.check(tmp_path)  # no attempts: no attempt
    attempt.claim(tmp_path, "7.0")
    monkeypatch.setenv(attempt.NAME, "7.0")
    jsonl.JsonLines(tmp_path).log({"step": 1})
    attempt.claim(tmp_path, "7.1")
    with pytest.raises(attempt.Superseded, match="A newer attempt has taken over"):
        jsonl.JsonLines(tmp_path).log({"step": 2})
    with pytest.raises(attempt.Superseded):
        checkpoint.write(tmp_path / "checkpoints" / "step_00000002", {}, {}, {"step": 2})
    write_failure(tmp_path, 0, ValueError("too late"))
    assert list((tmp_path / "checkpoints").iterdir()) == [] and not (tmp_path / "failure.json").exists()
    assert [row["step"] for row in files.read_json_lines(tmp_path / "metrics.jsonl")] == [1]


def test_a_process_of_an_older_attempt_ends_even_while_it_is_blocked(tmp_path):
    attempt.claim(tmp_path, "7.0")
    code = (
        f"from pathlib import Path; from mae.runs import attempt; attempt.watch(Path({str(tmp_path)!r}), 0.1); input()"
    )
    blocked = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {attempt.NAME: "7.0"}, stdin=subprocess.PIPE
    )
    with pytest.raises(subprocess.TimeoutExpired):
        blocked.wait(1)
    attempt.claim(tmp_path, "7.1")
    assert blocked.wait(10) == 1


def test_an_attempt_begins_without_what_an_earlier_one_said(monkeypatch, tmp_path):
    """B4: a result that a survivor of a dead node has written is not believed."""
    monkeypatch.setenv(attempt.NAME, "")
    (tmp_path / "slurm" / "stopped").mkdir(parents=True)
    (tmp_path / "slurm" / "stopped" / "0").touch()
    for name in ("failure.json", "slurm/verdict.json"):
        (tmp_path / name).write_text("{}")
    job.start_attempt(tmp_path, "7.1")
    assert not (tmp_path / "failure.json").exists() and not (tmp_path / "slurm" / "verdict.json").exists()
    assert list((tmp_path / "slurm" / "stopped").iterdir()) == [] and attempt.holds(tmp_path)


def test_the_first_failure_is_the_one_that_is_kept(tmp_path):
    for rank, text in ((1, "the cause"), (0, "connection closed by peer")):
        try:
            raise RuntimeError(text)
        except RuntimeError as error:
            write_failure(tmp_path, rank, error, lost_peer=rank == 0)
    assert json.loads((tmp_path / "failure.json").read_text())["error"] == "RuntimeError: the cause"
    assert "rank 1 failed" in (tmp_path / "log.txt").read_text() and "the cause" in state.failure_reason(tmp_path)


def test_a_lost_peer_is_told_from_an_own_mistake():
    from torch import distributed as dist

    from mae.distributed.rendezvous import Absent, lost_peer

    assert lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"))
    assert lost_peer(dist.DistBackendError("NCCL error")) and lost_peer(Absent([1, 2], "node1:20000", 30))
    assert not lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not lost_peer(KeyError("a"))


def test_ranks_that_never_came_are_named_with_their_nodes(monkeypatch):
    from mae.distributed.rendezvous import Absent

    monkeypatch.setenv("RANK_HOSTS", "node1,node1,node2,node2")
    text = str(Absent([2, 3], "node1:20000", 30))
    assert text.startswith("Ranks 2 (node2), 3 (node2) never came to the rendezvous at node1:20000 within 30 s")


# ---------------------------------------------------------------- states


def test_a_state_in_passing_is_not_an_end(monkeypatch, tmp_path, capsys):
    """B5: NODE_FAIL shows for some seconds before SLURM requeues the job."""
    shown = iter([Job("RUNNING"), Job("NODE_FAIL"), Job("NODE_FAIL"), Job("PENDING", 1), Job("RUNNING", 1)])

    def jobs(ids):
        now = next(shown, None)
        if now is None:
            (tmp_path / "summary.json").write_text("{}")
        return {} if now is None else {"7": now}

    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job.json").write_text('{"job": "7"}')
    monkeypatch.setattr(queue, "jobs", jobs)
    assert state.follow([tmp_path], 0.0) == 0
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == [
        "RUNNING",
        "NODE_FAIL",
        "PENDING",
        "RUNNING",
        "FINISHED",
    ]


@pytest.mark.parametrize(
    ("job", "verdict", "expected"),
    [
        (Job("RUNNING"), None, "RUNNING"),
        (Job("COMPLETED"), None, "FAILED"),  # without a summary that is no success (B1)
        (Job("FAILED"), {"action": "failed", "reason": "why"}, "FAILED"),
        (Job("CANCELLED"), None, "CANCELLED"),
        (Job("TIMEOUT"), None, "TIMEOUT"),
        (None, {"action": "failed", "reason": "why"}, "FAILED"),
        (None, None, "UNFINISHED"),
    ],
)
def test_the_state_of_a_run(tmp_path, job, verdict, expected):
    (tmp_path / "slurm").mkdir()
    if verdict:
        (tmp_path / "slurm" / "verdict.json").write_text(json.dumps(verdict))
    assert state.run_state(tmp_path, job) == expected
    (tmp_path / "summary.json").write_text("{}")
    assert state.run_state(tmp_path, job) == "FINISHED"


def test_status_lists_a_sweep_that_ran_here_too(tmp_path):
    for name in ("0", "10", "2"):
        assert run_here(tmp_path / name, *TINY_PRETRAIN, "task.max_steps=1") == 0
    (tmp_path / "2" / "summary.json").unlink()
    table = status.status_table(tmp_path).splitlines()
    assert [line.split()[2] for line in table[1:]] == ["FINISHED", "UNFINISHED", "FINISHED"]
    assert "val_loss" in table[1] and "at step 1" in table[2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["status=/nowhere"], "/nowhere is not a directory."),
        (["status={empty}"], "holds no runs: no config.yaml lies in it or one folder below."),
        (["cancel={empty}", "launcher.nodes=2"], "stands alone, but launcher.nodes=2 follows it."),
        (["retry_failed={empty}", "task.epochs=2"], "task.epochs=2 cannot be changed with retry_failed="),
    ],
)
def test_questions_that_cannot_be_answered(tmp_path, words, sentence):
    ended = run_cli(*(word.replace("{empty}", str(tmp_path)) for word in words))
    assert ended.returncode == 1 and sentence in ended.stderr and "Traceback" not in ended.stderr


# ---------------------------------------------------------------- what is submitted, and what is refused


SLURM = ["launcher=slurm", "data=digits", *TINY_PRETRAIN]


def settings(*overrides: str) -> SlurmSettings:
    return call(SlurmSettings, composed(*SLURM, *overrides).launcher)


def test_devices_are_counted_over_nodes():
    for given, count in (("launcher.nodes=2 launcher.gpus_per_node=8", 16), ("launcher.tasks_per_node=4", 4)):
        assert rules.devices(composed(*SLURM, *given.split())) == count
    with pytest.raises(UserError, match=r"task.batch_size=32 does not divide by 24 devices: the nearest that do: 24"):
        composed(*SLURM, "launcher.nodes=3", "launcher.gpus_per_node=8")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("launcher.nods=2", "Could not override 'launcher.nods'"),
        ("launcher.nodes=0", "launcher.nodes must be 1 or more, got 0."),
        ("launcher.mem_gb=lots", "launcher.mem_gb must be a number or null, got 'lots'."),
        ("launcher.timeout_min=2", "launcher.signal_delay_s=120 is no shorter than launcher.timeout_min=2"),
    ],
)
def test_settings_that_cannot_be_are_refused(override, sentence):
    with pytest.raises(Exception) as caught:
        composed(*SLURM, override)
    assert sentence in str(caught.value)


KNOWN = [Node("main", True, f"n{i}", 64, 512000, 8, float("inf")) for i in range(4)]
KNOWN += [Node("debug", False, "n0", 64, 512000, 8, 30.0), Node("cpu", False, "c0", 128, 256000, 0, 1440.0)]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("launcher.nodes=4 launcher.gpus_per_node=8 task.batch_size=64", ""),
        ("launcher.partition=debg", "launcher.partition=debg does not exist on this cluster. Did you mean debug?"),
        ("launcher.partition=debug", "launcher.timeout_min=1440 is above the limit of partition debug, 30"),
        ("launcher.partition=cpu", "launcher.gpus_per_node=1 GPUs, but no node of partition cpu has more than 0"),
        ("launcher.gpus_per_node=16", "launcher.gpus_per_node=16 GPUs, but no node of partition main has more than 8"),
        ("launcher.nodes=8", "launcher.nodes=8, but partition main has 4 such nodes."),
        (
            "launcher.mem_gb=1000",
            "launcher.mem_gb x 1024=1024000 MB, but no node of partition main has more than 512000",
        ),
    ],
)
def test_what_the_nodes_cannot_give_is_named(override, sentence):
    found = list(check.unmet_requests(settings(*override.split()), KNOWN))
    assert (sentence in found[0]) if sentence else not found


def test_nodes_are_read_from_sinfo(monkeypatch):
    text = "main*|n1|64|512000|2-00:00:00|gpu:a100:8(S:0-1),nvme:1\ncpu|n2|128+|256000+|infinite|(null)\n"
    monkeypatch.setattr(queue, "command", lambda *_, **__: (0, text, ""))
    assert check.nodes() == [
        Node("main", True, "n1", 64, 512000, 8, 2880.0),
        Node("cpu", False, "n2", 128, 256000, 0, float("inf")),
    ]
    monkeypatch.setattr(queue, "command", lambda *_, **__: (1, "", "slurm_load_partitions: Unable to contact"))
    with pytest.raises(UserError, match="SLURM's controller does not answer .*Unable to contact"):
        check.nodes()


def test_without_sbatch_one_sentence_says_so(tmp_path):
    ended = run_cli(*SLURM, f"output_dir={tmp_path / 'run'}", env={"PATH": str(tmp_path)})
    assert ended.returncode == 1 and ended.stderr.startswith("launcher=slurm needs SLURM's sbatch, which is not on the")
    assert len(ended.stderr.splitlines()) == 1


def test_a_warning_that_is_shorter_than_a_save_is_refused(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "save_seconds").write_text("200.0")
    found = list(check._slow_saves(settings(), [tmp_path]))
    assert "launcher.signal_delay_s=120 is too short" in found[0] and "took 200 s. Give it 400." in found[0]


def test_a_save_is_measured_against_the_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MAE_SIGNAL_DELAY_S", "0.0001")
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    assert run_here(tmp_path / "run", *TINY_PRETRAIN, "task.max_steps=1") == 0
    assert float((tmp_path / "run" / "slurm" / "save_seconds").read_text()) > 0
    assert "launcher.signal_delay_s=0.0001 is the warning before a time limit" in (tmp_path / "run/log.txt").read_text()


def script(monkeypatch, tmp_path, *overrides: str, members: int = 1) -> str:
    """The sbatch script of a run, or of a sweep's members."""
    programs = tmp_path / "bin"
    programs.mkdir()
    counted = f"n=$(cat {programs}/n 2>/dev/null || echo 7); echo $((n + 1)) > {programs}/n"
    queued = f"{counted}; echo Submitted batch job $n"
    for name, text in (("sbatch", f"env > {programs}/env; {queued}"), ("srun", "true"), ("squeue", "false")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(check, "nodes", lambda: KNOWN)
    runs = [tmp_path / "sweep" / str(i) for i in range(members)]
    for run in runs:
        run.mkdir(parents=True)
        (run / "config.yaml").touch()
    folder = runs[0] if members == 1 else tmp_path / "sweep"
    assert submit.submit([(run, settings("launcher.probe_s=0", *overrides)) for run in runs], folder) == 0
    return (folder / "slurm" / "7_submission.sh").read_text()


def test_every_option_reaches_sbatch(monkeypatch, tmp_path):
    given = {"account": "a", "qos": "q", "constraint": "c", "exclude": "n3", "reservation": "r", "mem_gb": "1.5"}
    given |= {"nodes": "2", "gpus_per_node": "4", "cpus_per_task": "3", "timeout_min": "77", "signal_delay_s": "33"}
    given |= {"additional_parameters": "{mail-type: FAIL}", "setup": "[module load cuda]", "partition": "main"}
    added = given.pop("additional_parameters")
    words = [f"launcher.{key}={value}" for key, value in given.items()]
    text = script(monkeypatch, tmp_path, *words, f"+launcher.additional_parameters={added}")
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines()]
    expected = "account=a qos=q constraint=c exclude=n3 reservation=r mem=1536M nodes=2 ntasks-per-node=4 requeue "
    expected += "gpus-per-node=4 cpus-per-task=3 time=77 signal=USR2@33 mail-type=FAIL partition=main open-mode=append"
    assert set(expected.split()) <= set(lines) and "module load cuda" in lines
    assert not any(line.startswith("array") for line in lines)


def test_a_new_flag_of_sbatch_is_a_field_and_a_line_of_yaml(tmp_path):
    for name in ("mae", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name)
    settings_file, yaml = tmp_path / "mae/launch/slurm/settings.py", tmp_path / "conf/launcher/slurm.yaml"
    field, line = '    nice: Annotated[int, "[0, inf)"] | None\n', "nice: null\n"
    settings_file.write_text(settings_file.read_text().replace("    qos: str", f"{field}    qos: str"))
    yaml.write_text(yaml.read_text() + line)
    code = (
        "from mae.config.build import call; from mae.config.check import check_config, resolve\n"
        "from mae.config.compose import composed; from mae.launch.slurm.settings import SlurmSettings\n"
        "cfg = check_config(resolve(composed(['launcher=slurm', 'launcher.nice=5', 'data=digits'])))\n"
        "print(call(SlurmSettings, cfg.launcher).flags()['nice'])"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "5", done.stderr


def test_a_container_s_python_is_used(monkeypatch, tmp_path):
    text = script(monkeypatch, tmp_path, "launcher.python='apptainer exec image.sif python'")
    assert "\napptainer exec image.sif python -u -c " in text


AROUND = {  # of a job in which somebody types the command
    "SLURM_JOB_ID": "99",
    "SLURM_MEM_PER_CPU": "4000",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_TRES_PER_TASK": "cpu:2",
    "SLURM_NTASKS_PER_GPU": "1",
    "SLURM_CPUS_PER_TASK": "2",
    "SLURMD_NODENAME": "n1",
    "SRUN_DEBUG": "3",
    "SBATCH_MEM_PER_CPU": "4000",
    "SUBMITIT_EXECUTOR": "slurm",
    "CUDA_VISIBLE_DEVICES": "3",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    attempt.NAME: "99.0",
}


@pytest.mark.parametrize("members", [1, 3])
def test_a_job_submitted_inside_a_job_inherits_none_of_its_settings(monkeypatch, tmp_path, members):
    stay = {"SLURM_CONF": "/etc/other.conf", "SBATCH_ACCOUNT": "lab", "OMP_NUM_THREADS": "4", "SINFO_FORMAT": "%n"}
    for name, value in (AROUND | stay).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    script(monkeypatch, tmp_path, members=members)  # of several also the job that sums them up, the last one handed in
    handed = dict(line.partition("=")[::2] for line in (tmp_path / "bin" / "env").read_text().splitlines())
    assert not AROUND.keys() & handed.keys()
    assert stay.items() <= handed.items()
    assert {key: value for key, value in os.environ.items() if key != "PATH"} == {
        key: value for key, value in before.items() if key != "PATH"
    }


def test_a_retried_job_inherits_none_of_the_settings_of_the_job_around_it(monkeypatch, tmp_path):
    script(monkeypatch, tmp_path)
    run = tmp_path / "again"
    run.mkdir()
    cfg = composed(*SLURM, "launcher.probe_s=0", f"output_dir={run}")
    (run / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    for name, value in AROUND.items():
        monkeypatch.setenv(name, value)
    status.retry_failed(run, [])
    assert not [line for line in (tmp_path / "bin" / "env").read_text().splitlines() if line.startswith("SLURM_")]


def test_a_retried_run_has_the_changed_launcher_where_its_ranks_read_it(monkeypatch, tmp_path):
    script(monkeypatch, tmp_path)
    run = tmp_path / "again"
    (run / "bad_step").mkdir(parents=True)
    cfg = composed(*SLURM, "launcher.probe_s=0", "launcher.dependency=afterok:1", f"output_dir={run}")
    for folder in (run, run / "bad_step"):  # of replay=RUN, which is no run to retry
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    assert status.runs_under(run) == [run]
    status.retry_failed(run, ["launcher.sharding=full"])
    launcher = read_config(run).launcher
    assert launcher.sharding == "full" and launcher.dependency is None


def test_outside_of_a_job_the_shell_s_wishes_stay(monkeypatch, tmp_path):
    wishes = {"SBATCH_MEM_PER_CPU": "4000", "SBATCH_PARTITION": "main", "SLURM_CPU_BIND": "none"}
    for name, value in wishes.items():
        monkeypatch.setenv(name, value)
    script(monkeypatch, tmp_path)
    handed = (tmp_path / "bin" / "env").read_text().splitlines()
    assert all(f"{name}={value}" in handed for name, value in wishes.items())


def test_the_probe_of_a_node_is_no_step_of_the_job_around_it(monkeypatch, tmp_path):
    (tmp_path / "srun").write_text(f"#!/bin/sh\nenv > {tmp_path}/env; echo good\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in AROUND.items():
        monkeypatch.setenv(name, value)
    check._probe(settings("launcher.probe_s=1"), tmp_path)
    assert not [line for line in (tmp_path / "env").read_text().splitlines() if line.startswith("SLURM_")]


def test_what_a_user_wants_to_see_of_slurm_does_not_change_what_is_read(monkeypatch):
    for name in ("SQUEUE_FORMAT", "SINFO_FORMAT", "SACCT_FORMAT", "SCANCEL_INTERACTIVE", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "x")
    _, said, _ = queue.command("env")
    assert "_FORMAT=x" not in said and "SCANCEL_" not in said


def test_a_sweep_is_one_bounded_array(monkeypatch, tmp_path):
    text = script(monkeypatch, tmp_path, "launcher.array_parallelism=2", members=6)
    assert "#SBATCH --array=0-5%2" in text.splitlines()
    assert json.loads((tmp_path / "sweep" / "3" / "slurm" / "job.json").read_text())["job"] == "7_3"
    last = (tmp_path / "sweep" / "slurm" / "8_submission.sh").read_text()
    assert "#SBATCH --dependency=afterany:7" in last and "mae.sweep" in last  # table, figure and page at the end


def test_the_code_is_kept_under_a_name_made_from_its_contents(tmp_path):
    first, second = submit.snapshot(tmp_path), submit.snapshot(tmp_path)
    assert first == second and (first / "mae" / "engine.py").read_text() == (ROOT / "mae" / "engine.py").read_text()
    assert (
        (first / "run.py").exists() and (first / "conf" / "config.yaml").exists() and len(list(tmp_path.iterdir())) == 1
    )


@pytest.mark.parametrize("program", [job.TASK, job.SUPERVISE, submit.REPORT, submit.LAST])
def test_the_programs_that_a_job_runs_name_modules_and_functions_that_exist(program):
    tree = ast.parse(
        "import sys; " + program.format(code=str(ROOT), run="RUN", submission="SUBMISSION", folder="FOLDER")
    )
    names: dict[str, object] = {}
    imports: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "<job>", "exec"), names)
    functions = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    modules = [str(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and str(n.value).startswith("mae.")]
    assert functions and all(callable(eval(name, names)) for name in functions)
    assert all(importlib.util.find_spec(module) for module in modules)


def test_ranks_are_numbered_as_slurm_numbers_tasks():
    env = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_CPUS_PER_TASK": "4"}
    ranks = job.ranks_from(env | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert ranks == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "4"}
    assert job.ranks_from(env | {"CUDA_VISIBLE_DEVICES": "1"})["LOCAL_RANK"] == "0"  # SLURM gave it one of its own
    assert job.ranks_from(env | {"ROCR_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": ""})["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "visible",
    [
        {"CUDA_VISIBLE_DEVICES": "MIG-b"},
        {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"},  # of which CUDA would show every task the first
        {"ROCR_VISIBLE_DEVICES": "3"},
        {"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"},
    ],
)
def test_a_task_takes_the_device_or_the_slice_that_is_its_own(visible):
    env = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", **visible}
    ranks = job.ranks_from(env)
    assert ranks["LOCAL_RANK"] == "0"
    assert (env | ranks).get("CUDA_VISIBLE_DEVICES") in (None, "MIG-b")


def test_the_newest_whole_checkpoint_is_found_without_torch(tmp_path):
    assert newest_step(tmp_path) == -1
    for name in ("step_00000004/manifest.json", "step_00000008/manifest.json", ".step_00000012.1/manifest.json"):
        (tmp_path / "checkpoints" / name).parent.mkdir(parents=True)
        (tmp_path / "checkpoints" / name).touch()
    assert newest_step(tmp_path) == 8


def test_the_login_node_needs_no_torch():
    code = "import sys; from mae.launch.slurm import job, status, submit; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False" and launch.LAUNCHERS["slurm"] is submit.slurm
