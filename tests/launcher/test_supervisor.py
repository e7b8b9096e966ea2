"""The supervisor's decisions, with shell scripts in the place of the training: what they do to the run directory is real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# What a job does to its run directory, $RUN; $N counts its starts.
PRELUDE = """
N=$(($(cat $RUN/starts 2>/dev/null || echo 0) + 1)); mkdir -p $RUN/stacks; echo $N > $RUN/starts
beat() { touch -d "+$1 seconds" $RUN/.heartbeat; }
status() { echo "$1" > $RUN/status.partial; mv $RUN/status.partial $RUN/status.json; }
begin() { beat 100; status "{\\"state\\": \\"running\\", \\"pid\\": $$, \\"restarts\\": $((N - 1))}"; sleep 0.3; }
save() { mkdir -p $RUN/checkpoints/step_0000000$1; }
finish() { status '{"state": "finished", "exit_code": 0, "step": 9, "reason": "train.steps"}'; exit 0; }
stopped() { status "{\\"state\\": \\"stopped\\", \\"exit_code\\": 75, \\"step\\": 5, \\"reason\\": \\"$(cat $RUN/stop)\\"}"; exit 75; }
fail() { status "{\\"state\\": \\"failed\\", \\"exit_code\\": $1, \\"reason\\": \\"$2\\", \\"restart\\": $3, \\"restarts\\": 0}"; exit $1; }
"""


def _start(run: Path, script: str, *options: str, hang_seconds: int = 120) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "launch.supervise",
        "--backoff=0.05",
        *options,
        "--",
        "bash",
        "-c",
        PRELUDE + script,
    ]
    config = ["-m", "train", "configs/language/quickstart.yaml", f"run.dir={run}", f"train.hang_seconds={hang_seconds}"]
    environment = os.environ | {"RUN": str(run), "PYTHONPATH": str(REPOSITORY)}
    run.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*command, *config], cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, output = process.communicate(timeout=60)
    return process.returncode, output


def _status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_that_dies_is_started_again_while_it_makes_progress(tmp_path):
    code, output = _end(_start(tmp_path, "begin; save $N; [[ $N < 6 ]] || finish; kill -9 $$", "--patience=2"))
    assert code == 0 and (tmp_path / "starts").read_text() == "6\n"
    assert _status(tmp_path)["state"] == "finished"
    log = (tmp_path / "log.txt").read_text()
    assert log.count("supervisor: start: bash") == 6
    assert "restart 5 in 0.05 s after step 5: the job was killed (signal 9)" in log
    assert "end: finished at step 9" in log and log.count("\n") == output.count("\n")


def test_without_a_new_checkpoint_it_gives_up_and_waits_longer_each_time(tmp_path):
    code, output = _end(_start(tmp_path, "begin; save 1; exit 1", "--patience=3"))
    assert code == 1
    assert [line.split(" after ")[0].split("restart ")[1] for line in output.splitlines() if ": restart " in line] == [
        "1 in 0.05 s", "2 in 0.1 s", "3 in 0.2 s",
    ]  # fmt: skip
    status = _status(tmp_path)
    assert status["state"] == "failed" and status["restarts"] == 3
    assert status["reason"].startswith("3 starts in a row made no new checkpoint; the last one ended with: the job was")


def test_restarts_are_bounded(tmp_path):
    code, output = _end(_start(tmp_path, "begin; save $N; exit 1", "--max-restarts=2"))
    assert code == 1 and "giving up: restarted 2 times" in output


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        ("begin; fail 1 'the loss is nan' false", 1, "end: the loss is nan"),
        ("begin; fail 2 'no such data' false", 2, "end: no such data"),
        ("exit 2", 2, "the job ended before it began (exit code 2)"),
    ],
)
def test_what_a_restart_would_not_mend(tmp_path, script, code, reason):
    result, output = _end(_start(tmp_path, script))
    assert (result, (tmp_path / "starts").read_text()) == (code, "1\n") and reason in output


def test_a_mistake_that_comes_up_later_is_tried_again(tmp_path):
    script = (
        "((N != 2)) || exit 2; begin; save $N; ((N != 3)) || fail 2 'not mounted' false; ((N < 4)) || finish; exit 1"
    )
    code, output = _end(_start(tmp_path, script))
    assert code == 0 and (tmp_path / "starts").read_text() == "4\n", output


def test_another_runs_directory_is_left_alone(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "running", "pid": 1}')
    code, _ = _end(_start(tmp_path, "exit 1", "--patience=1"))
    assert code == 1 and not (tmp_path / "log.txt").exists() and _status(tmp_path) == {"state": "running", "pid": 1}


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_becomes_the_stop_file(tmp_path, signal_name):
    process = _start(tmp_path, "begin; until [[ -f $RUN/stop ]]; do sleep 0.05; done; stopped")
    _wait_for(lambda: (tmp_path / "log.txt").exists())
    process.send_signal(signal.Signals[signal_name])
    code, output = _end(process)
    assert code == 75 and f"supervisor: stop: {signal_name}" in output
    assert _status(tmp_path)["reason"] == signal_name
    assert f"end: stopped at step 5 ({signal_name})" in (tmp_path / "log.txt").read_text()


def test_a_job_that_dies_while_it_stops_can_go_on_later(tmp_path):
    process = _start(tmp_path, "begin; save 3; until [[ -f $RUN/stop ]]; do sleep 0.05; done; kill -9 $$")
    _wait_for(lambda: (tmp_path / "log.txt").exists())
    process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == 75 and (tmp_path / "starts").read_text() == "1\n"
    status = _status(tmp_path)
    assert status["reason"] == "stopped by SIGTERM, but the job was killed (signal 9)" and status["step"] == 3


def test_a_second_ctrl_c_ends_the_job_at_once(tmp_path):
    process = _start(tmp_path, "begin; trap '' TERM INT; while true; do sleep 0.1; done & sleep 100")
    _wait_for(lambda: (tmp_path / "log.txt").exists())
    process.send_signal(signal.SIGINT)
    _wait_for(lambda: (tmp_path / "stop").exists())
    process.send_signal(signal.SIGINT)
    code, _ = _end(process)
    assert code == 1 and _status(tmp_path)["reason"] == "interrupted twice"


def test_a_signal_before_the_job_has_begun_and_between_two_starts(tmp_path):
    process = _start(tmp_path / "early", "sleep 100")
    _wait_for(lambda: (tmp_path / "early" / "starts").exists())
    process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == 75
    process = _start(tmp_path / "between", "begin; exit 1", "--backoff=100")
    _wait_for(
        lambda: (
            "restart 1" in (tmp_path / "between" / "log.txt").read_text()
            if (tmp_path / "between" / "log.txt").exists()
            else False
        )
    )
    process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == 75 and _status(tmp_path / "between")["state"] == "stopped"


def test_nothing_of_a_job_outlives_it(tmp_path):
    """Not even what left the process group, as the ranks of torchrun do."""
    script = "begin; setsid bash -c 'echo $$ > $RUN/orphan; trap \"\" TERM; sleep 1000 & wait' & until [[ -s $RUN/orphan ]]; do sleep 0.05; done; finish"
    code, _ = _end(_start(tmp_path, script))
    assert code == 0
    assert not Path(f"/proc/{(tmp_path / 'orphan').read_text().strip()}").exists()


def test_an_overdue_heartbeat_ends_the_job(tmp_path, monkeypatch):
    script = "begin; ((N == 1)) || finish; save 1; beat -100; kill -STOP $$"
    code, output = _end(_start(tmp_path, script))
    assert code == 0 and "hung: no heartbeat, and no rank could write down its stacks" in output


def test_stacks_are_kept(tmp_path):
    script = "begin; ((N == 1)) || finish; echo 'Timeout (0:02:00)!' > $RUN/stacks/rank_00001.txt; exit 1"
    code, output = _end(_start(tmp_path, script))
    kept = list(tmp_path.glob("stacks_*/rank_00001.txt"))
    assert code == 0 and len(kept) == 1 and f"the stacks of its ranks are in {kept[0].parent}" in output


def test_hosts_are_waited_for(tmp_path):
    script = "begin; finish"
    process = _start(tmp_path, script, f"--ready=test -e {tmp_path}/ready", "--backoff=0.2")
    time.sleep(1)
    assert process.poll() is None and not (tmp_path / "starts").exists()
    (tmp_path / "ready").touch()
    code, output = _end(process)
    assert code == 0 and "waiting: `test -e" in output


def test_several_hosts_each_have_one_and_the_first_writes(tmp_path):
    code, output = _end(_start(tmp_path, "begin; exit 1", "--node-rank=1", "--patience=1"))
    assert code == 1 and "giving up" in output
    assert not (tmp_path / "log.txt").exists() and _status(tmp_path)["state"] == "running"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["deepspeed", "train.py"], "the command must end in"),
        (["python", "-m", "train", "configs/language/quickstart.yaml", "--dry-run"], "the command must end in"),
        (["python", "-m", "train", "configs/nowhere.yaml"], "configs/nowhere.yaml does not exist"),
        (["python", "-m", "train", "configs/language/quickstart.yaml", "train.stps=1"], "unknown key train.stps"),
    ],
)
def test_mistakes_are_told_before_anything_starts(command, message):
    result = subprocess.run(
        [sys.executable, "-m", "launch.supervise", "--", *command], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
