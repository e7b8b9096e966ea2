"""What asks a run to stop."""

from __future__ import annotations

import subprocess
import sys


def _reasons(script: str, directory: str) -> list[str]:
    prelude = "import os, signal, sys; from pathlib import Path; from train.signals import StopRequest; stop = StopRequest()\n"
    command = [sys.executable, "-c", prelude + script, directory]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_first_signal_is_the_reason(tmp_path):
    script = "print(stop.reason); os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGTERM); print(stop.reason)"
    assert _reasons(script, str(tmp_path)) == ["None", "SIGUSR1"]


def test_a_file_does_the_same_once(tmp_path):
    script = """
file = Path(sys.argv[1]) / "stop"
file.touch()
stop.watch(file)
print(stop.reason)
file.touch()
print(stop.reason)
stop.done()
print(file.exists())
"""
    assert _reasons(script, str(tmp_path)) == ["None", f"the file {tmp_path}/stop", "False"]
