"""Nothing runs that should not, and no secret is written down."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import load_config

LANGUAGE = "configs/language/quickstart.yaml"
SMALL = ["model.layers=1", "model.width=32", "model.heads=2", "model.mlp_width=64", "train.global_batch_size=2"]
SHORT = [*SMALL, "train.steps=4", "checkpoint.every_steps=2", "evaluate.every_steps=0", "monitor.every_steps=1"]


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mknod, (str(self.canary),)


@pytest.mark.slow
def test_no_pickle_in_a_checkpoint_is_opened(launch, wikipedia, tmp_path):
    run, canary = tmp_path / "run", tmp_path / "canary"
    first = launch(LANGUAGE, run, *SHORT, launcher="python")
    assert first.wait() == 0, first.output
    malicious = pickle.dumps(Malicious(canary))
    pickle.loads(malicious)
    canary.unlink()  # it works

    newest, before = (run / "checkpoints" / f"step_0000000{step}" for step in (4, 2))
    (newest / "state_00001.safetensors").write_bytes(malicious)  # planted
    (before / "state_00000.safetensors").write_bytes(malicious)  # changed
    again = launch(LANGUAGE, run, *SHORT, "train.steps=5", launcher="python")
    assert again.wait() == 2, again.output
    assert "no checkpoint in" in again.output and "is intact" in again.output
    assert not canary.exists()


@pytest.mark.slow
def test_secrets_in_the_environment_are_written_nowhere(launch, wikipedia, tmp_path, monkeypatch):
    secrets = {"HF_TOKEN": "swordfish-1", "AWS_SECRET_ACCESS_KEY": "swordfish-2", "NCCL_PASSWORD": "swordfish-3"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    job = launch(LANGUAGE, tmp_path, *SHORT, launcher="local.sh")
    assert job.wait() == 0, job.output
    written = [job.output.encode(), *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())]
    assert len(written) > 15 and not any(b"swordfish" in content for content in written)


@pytest.mark.parametrize(
    "override", ["run.dir=${oc.env:HOME}", "run.dir=!!python/object/apply:os.getcwd []"], ids=["environment", "python"]
)
def test_a_config_can_neither_read_the_environment_nor_call_anything(override):
    with pytest.raises(ValueError, match="run.dir"):
        load_config(LANGUAGE, [override])


def test_weights_from_elsewhere_are_safetensors(tmp_path):
    """A pickle under the right name is not opened as one."""
    canary = tmp_path / "canary"
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Malicious(canary)))
    script = f"from train.weights import load_weights; import torch; load_weights(torch.nn.Linear(2, 2), {str(tmp_path / 'model.safetensors')!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode != 0 and "safetensors" in result.stderr and not canary.exists()
