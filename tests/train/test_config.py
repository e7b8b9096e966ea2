"""Reading, overriding and refusing configurations; every recipe in configs/."""

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from train.config import AnyConfig, LanguageConfig, VisionConfig, flatten, load_config, to_yaml
from train.data.order import check_world_size
from train.models.flops import count_parameters
from train.models.language import LanguageModel
from train.models.vision import VisionModel

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/[lv]*/*.yaml"))

LANGUAGE = {
    "task": "language",
    "run": {"dir": "runs/test"},
    "model": {"vocab_size": 100, "layers": 4, "width": 32, "heads": 4, "mlp_width": 64, "sequence_length": 16},
    "data": {"train": "data/train", "validation": "data/validation"},
    "optimizer": {"lr": 0.001},
    "train": {"steps": 10, "global_batch_size": 8},
    "checkpoint": {"every_steps": 5},
}
VISION = LANGUAGE | {
    "task": "vision",
    "model": {"image_size": 32, "patch_size": 4, "classes": 10, "layers": 4, "width": 32, "heads": 4},
}


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # configs name DeepSpeed's files from there


def load(tmp_path: Path, base: dict[str, Any], *overrides: str) -> AnyConfig:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(base))
    return load_config(path, list(overrides))


def refusal(tmp_path: Path, base: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        load(tmp_path, base, *overrides)
    return str(error.value)


def test_file_over_defaults_and_overrides_over_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, LANGUAGE, "optimizer.lr=3e-4", "train.steps=20", "train.steps=30", "model.kv_heads=2")
    assert isinstance(config, LanguageConfig)
    assert (config.optimizer.lr, config.train.steps, config.model.kv_heads) == (3e-4, 30, 2)
    assert (config.model.layers, config.model.positions, config.train.micro_batch_size) == (4, "rope", None)


def test_task_chooses_the_class(tmp_path: Path) -> None:
    assert isinstance(load(tmp_path, VISION), VisionConfig)


@pytest.mark.parametrize(
    ("override", "expected"),
    [("all", "all"), ("last:2", "last:2"), ("2-4", "2-4"), ("3", 3), ("[1,3]", [1, 3])],
)
def test_twicing_layers_from_the_command_line(tmp_path: Path, override: str, expected: Any) -> None:
    assert load(tmp_path, LANGUAGE, f"model.twicing_layers={override}").model.twicing_layers == expected


@pytest.mark.parametrize("base", [LANGUAGE, VISION], ids=["language", "vision"])
def test_the_resolved_config_reads_back_equal(tmp_path: Path, base: dict[str, Any]) -> None:
    config = load(tmp_path, base, "model.twicing_layers=[1,3]", "train.stop_at_step=4")
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_flatten_names_every_leaf(tmp_path: Path) -> None:
    leaves = flatten(load(tmp_path, LANGUAGE))
    assert leaves["task"] == "language" and leaves["optimizer.lr"] == 0.001 and leaves["model.kv_heads"] is None
    assert not any(dataclasses.is_dataclass(value) for value in leaves.values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.laers=2", "unknown key model.laers; model has vocab_size, layers,"),
        ("checkpoint.every=2", "unknown key checkpoint.every; checkpoint has every_steps, keep"),
        ("modle.layers=2", "unknown key modle; the config has task, run, optimizer,"),
        ("train.steps=1.5", "train.steps: Value '1.5' of type 'float'"),
        ("train.steps=true", "train.steps: Value 'True' of type 'bool'"),
        ("train.steps=many", "train.steps: Value 'many' of type 'str'"),
        ("train.steps=", "train.steps: Incompatible value 'None'"),
        ("model.bias=maybe", "model.bias: Value 'maybe' is not a valid bool"),
        ("optimizer.betas=0.9", "optimizer.betas: a list is expected"),
        ("train=null", "train: field 'train' is not Optional"),
        ("model=3", "int is not a subclass of LanguageModelConfig"),
        ("run.dir=${nowhere}", "run.dir: Interpolation key 'nowhere' not found"),
        ("train.steps", "override 'train.steps' must have the form key=value"),
        ("=3", "override '=3' must have the form key=value"),
        ("optimizer.betas[0]=0.5", "must have the form key=value"),
        ("optimizer.betas=[0.9", "the value of override 'optimizer.betas=[0.9' is not valid YAML"),
    ],
)
def test_keys_and_types_that_do_not_exist(tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal(tmp_path, LANGUAGE, override)


def test_missing_values_are_listed_together(tmp_path: Path) -> None:
    base = {key: value for key, value in LANGUAGE.items() if key not in ("optimizer", "run")}
    assert refusal(tmp_path, base).endswith("no value for optimizer.lr, run.dir")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not valid YAML"),
        (b"task: language\ntask: vision", "is not valid YAML"),
        (b"- 1\n- 2", "task is None in"),
        (b"", "task is None in"),
        (b"task: speech", "task is 'speech' in"),
        (b"\xff\xfe\x00", "can't be read"),
    ],
    ids=["unclosed", "duplicate key", "list", "empty", "unknown task", "binary"],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(path)


def test_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.yaml does not exist"):
        load_config(tmp_path / "nothing.yaml")


AT_LEAST_1 = ["model.layers", "model.width", "model.heads", "data.lanes", "data.shuffle_block", "train.steps"] + [
    "train.stop_at_step",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.sequence_parallel_size",
    "train.planned_world_size",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "monitor.every_steps",
]
AT_LEAST_1_LANGUAGE = ["model.vocab_size", "model.kv_heads", "model.mlp_width", "model.sequence_length"]
AT_LEAST_1_VISION = ["model.image_size", "model.patch_size", "model.classes", "data.repeats"]
AT_LEAST_0 = ["data.workers", "optimizer.weight_decay", "optimizer.grad_clip", "schedule.warmup_steps"] + [
    "train.seed",
    "train.activation_checkpointing",
    "evaluate.every_steps",
]


@pytest.mark.parametrize("key", AT_LEAST_1 + AT_LEAST_1_LANGUAGE)
@pytest.mark.parametrize("value", [0, -3])
def test_language_numbers_below_1(tmp_path: Path, key: str, value: int) -> None:
    assert refusal(tmp_path, LANGUAGE, f"{key}={value}") == f"{key} is {value}; it must be at least 1"


@pytest.mark.parametrize("key", AT_LEAST_1 + AT_LEAST_1_VISION)
def test_vision_numbers_below_1(tmp_path: Path, key: str) -> None:
    assert refusal(tmp_path, VISION, f"{key}=0") == f"{key} is 0; it must be at least 1"


@pytest.mark.parametrize("key", [*AT_LEAST_0, "data.crop_padding", "data.mixup", "data.cutmix"])
def test_negative_numbers(tmp_path: Path, key: str) -> None:
    assert re.fullmatch(rf"{key} is -1(\.0)?; it must be at least 0", refusal(tmp_path, VISION, f"{key}=-1"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=vision", "task is 'vision'; it must be language"),
        ("run.dir=''", "run.dir is ''; it must be a folder or an address"),
        ("model.positions=alibi", "model.positions is 'alibi'; it must be one of rope, sinusoidal, learned"),
        ("model.norm=batch", "model.norm is 'batch'; it must be one of rms, layer"),
        ("model.norm_position=both", "model.norm_position is 'both'; it must be one of pre, post"),
        ("model.mlp=tanh", "model.mlp is 'tanh'; it must be one of swiglu, relu, gelu"),
        ("model.head=none", "model.head is 'none'; it must be one of tied, untied, adaptive"),
        ("model.attention_backend=flash", "model.attention_backend is 'flash'; it must be one of auto,"),
        ("data.on_bad_sample=ignore", "data.on_bad_sample is 'ignore'; it must be one of fail, skip"),
        ("schedule.kind=step", "schedule.kind is 'step'; it must be one of cosine, linear, constant"),
        ("train.precision=int8", "train.precision is 'int8'; it must be one of auto, bf16, fp16, fp32"),
        ("optimizer.lr=0", "optimizer.lr is 0.0; it must be above 0"),
        ("optimizer.lr=nan", "optimizer.lr is nan; it must be a finite number"),
        ("optimizer.lr=inf", "optimizer.lr is inf; it must be a finite number"),
        ("optimizer.eps=0", "optimizer.eps is 0.0; it must be above 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]; it must be two numbers"),
        (
            "optimizer.betas=[0.9,1.0]",
            "optimizer.betas is [0.9, 1.0]; it must be two numbers, each at least 0 and below 1",
        ),
        ("optimizer.betas=[0.9,.nan]", "optimizer.betas is [0.9, nan]; it must be two numbers"),
        ("schedule.final_lr_fraction=1.5", "schedule.final_lr_fraction is 1.5; it must be from 0 to 1"),
        ("model.rope_theta=0", "model.rope_theta is 0.0; it must be above 0"),
        ("model.dropout=1", "model.dropout is 1.0; it must be at least 0 and below 1"),
        ("model.heads=3", "model.heads is 3; it must be a divisor of model.width, 32"),
        ("model.kv_heads=3", "model.kv_heads is 3; it must be a divisor of model.heads, 4"),
        ("model.heads=32", "model.width is 32; it must be such that model.width / model.heads is even"),
        ("model.twicing_layers=5", "model.twicing_layers is 5; it must be"),
        ("model.twicing_layers=null", "model.twicing_layers is None; it must be"),
        ("train.micro_batch_size=3", "train.micro_batch_size is 3; it must be a divisor of train.global_batch_size, 8"),
        ("train.activation_checkpointing=5", "train.activation_checkpointing is 5; it must be at most model.layers, 4"),
        ("deepspeed.config=nowhere.json", "deepspeed.config is 'nowhere.json'; it must be a JSON file that exists"),
    ],
)
def test_impossible_language_values(tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal(tmp_path, LANGUAGE, override)


@pytest.mark.parametrize("cutoffs", ["[]", "[0,20]", "[30,20]", "[20,20]", "[20,100]"])
def test_impossible_adaptive_cutoffs(tmp_path: Path, cutoffs: str) -> None:
    message = refusal(tmp_path, LANGUAGE, "model.head=adaptive", f"model.adaptive_cutoffs={cutoffs}")
    assert message.startswith("model.adaptive_cutoffs is [") and "below model.vocab_size, 100" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.sequence_length=18"], "is 4; it must be a divisor of model.sequence_length, 18"),
        (["model.heads=2"], "is 4; it must be a divisor of model.heads, 2"),
        (["model.kv_heads=2"], "is 4; it must be a divisor of model.kv_heads, 2"),
        (["train.compile=true"], "train.compile is True; it must be false with train.sequence_parallel_size=4"),
    ],
)
def test_rows_that_can_not_be_shared(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(tmp_path, LANGUAGE, "train.sequence_parallel_size=4", *overrides)


def test_images_are_not_shared(tmp_path: Path) -> None:
    message = "train.sequence_parallel_size is 2; it must be 1 for vision"
    assert refusal(tmp_path, VISION, "train.sequence_parallel_size=2").startswith(message)


def test_odd_width_with_sinusoidal_positions(tmp_path: Path) -> None:
    message = refusal(tmp_path, LANGUAGE, "model.positions=sinusoidal", "model.width=33", "model.heads=3")
    assert message == "model.width is 33; it must be even with model.positions sinusoidal"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=language"], "task is 'language'; it must be vision"),
        (["model.patch_size=5"], "model.patch_size is 5; it must be a divisor of model.image_size, 32"),
        (["model.channels=2"], "model.channels is 2; it must be 1, grey images, or 3, colour"),
        (["model.channels=1"], "data.mean is [0.485, 0.456, 0.406]; it must be 1 numbers, as many as model.channels"),
        (["data.std=[1,1]"], "data.std is [1.0, 1.0]; it must be 3 numbers"),
        (["data.std=[1,0,1]"], "data.std is [1.0, 0.0, 1.0]; it must be above 0"),
        (["model.mlp_ratio=0"], "model.mlp_ratio is 0.0; it must be above 0"),
        (["model.drop_path=1"], "model.drop_path is 1.0; it must be at least 0 and below 1"),
        (["train.label_smoothing=1"], "train.label_smoothing is 1.0; it must be at least 0 and below 1"),
        (["data.random_erasing=2"], "data.random_erasing is 2.0; it must be from 0 to 1"),
        (["data.augmentation=blur"], "data.augmentation is 'blur'; it must be one of none, crop_flip, rand_augment"),
        (["model.heads=5"], "model.heads is 5; it must be a divisor of model.width, 32"),
        (["model.twicing_layers=last:9"], "model.twicing_layers is 'last:9'; it must be"),
        (
            ["data.mixup=0.8", "train.global_batch_size=7"],
            "train.global_batch_size is 7; it must be even with data.mixup",
        ),
        (["data.cutmix=1", "train.micro_batch_size=1"], "train.micro_batch_size is 1; it must be even with data.mixup"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_impossible_vision_values(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(tmp_path, VISION, *overrides)


def test_several_problems_are_told_at_once(tmp_path: Path) -> None:
    lines = refusal(tmp_path, LANGUAGE, "train.steps=0", "model.norm=batch", "optimizer.lr=-1").split("\n")
    assert {line.split(" is ")[0] for line in lines} == {"train.steps", "model.norm", "optimizer.lr"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it must be valid JSON"),
        ("[]", "it must be a JSON object"),
        ('{"train_batch_size": 8}', "without 'train_batch_size', which train.global_batch_size decides"),
        ('{"train_micro_batch_size_per_gpu": 8}', "which train.micro_batch_size decides"),
        ('{"gradient_accumulation_steps": 8}', "which train.global_batch_size and train.micro_batch_size decides"),
        ('{"gradient_clipping": 1.0}', "which optimizer.grad_clip decides"),
        ('{"optimizer": {}}', "which optimizer.* decides"),
        ('{"scheduler": {}}', "which schedule.* decides"),
        ('{"bf16": {"enabled": true}}', "which train.precision decides"),
        ('{"fp16": {"enabled": true}}', "which train.precision decides"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "disk"}}}', "to none, cpu or nvme, not disk"),
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}',
            "a file of stage 3, if its offload_optimizer is to nvme",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/", "pipeline_read": true}}}',
            "neither pipeline_read nor",
        ),
    ],
)
def test_deepspeed_files_that_decide_too_much(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(content)
    refused = refusal(tmp_path, LANGUAGE, f"deepspeed.config={path}")
    assert refused.startswith(f"deepspeed.config is '{path}'") and message in refused


@pytest.mark.parametrize(
    ("base", "overrides", "message"),
    [
        (LANGUAGE, ["model.adaptive_cutoffs=[50]"], "model.adaptive_cutoffs is ignored: model.head is tied"),
        (LANGUAGE, ["train.label_smoothing=0.1"], "train.label_smoothing is ignored"),
        (LANGUAGE, ["schedule.warmup_steps=10"], "schedule.warmup_steps, 10, is not below train.steps, 10"),
        (LANGUAGE, ["train.stop_at_step=10"], "train.stop_at_step, 10, is ignored: train.steps is 10"),
        (VISION, ["data.random_erasing=0.25"], "data.random_erasing is ignored: data.augmentation is none"),
        (VISION, ["evaluate.prompts=[a]"], "evaluate.prompts is ignored"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_without_effect_warn(tmp_path: Path, base: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.warns(UserWarning, match=re.escape(message)):
        load(tmp_path, base, *overrides)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_load_without_a_warning_and_fit_their_ranks(recipe: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = load_config(recipe)
    check_world_size(config, config.train.planned_world_size)
    assert config.train.steps > config.schedule.warmup_steps


PARAMETERS = {
    "configs/language/quickstart.yaml": 5_008_640,
    "configs/language/gpt2_124m.yaml": 124_439_808 + (50_304 - 50_257) * 768,  # GPT-2's own, and the padded vocabulary
    "configs/language/llama_1b.yaml": 1_235_814_400 - (128_256 - 32_768) * 2048,  # Llama 3.2 1B's, less vocabulary
    "configs/language/llama_70b.yaml": 68_976_648_192
    + 2 * (32_768 - 32_000) * 8192,  # Llama 2 70B's, padded vocabulary
    "configs/language/wikitext103_paper.yaml": 78_078_080,
    "configs/vision/quickstart.yaml": 2_684_554,
    "configs/vision/deit_tiny.yaml": 5_717_416,  # as published
    "configs/vision/deit_small.yaml": 22_050_664,  # as published
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_have_the_size_they_say(recipe: str) -> None:
    config = load_config(recipe)
    with torch.device("meta"):
        model = LanguageModel(config.model) if isinstance(config, LanguageConfig) else VisionModel(config.model)
    assert count_parameters(model)[0] == PARAMETERS[recipe]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_files_are_of_the_stage_they_are_named_after(stage: int) -> None:
    settings = json.loads((ROOT / f"configs/deepspeed/zero{stage}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage


def test_the_quickstart_reads_at_least_two_million_tokens() -> None:
    config = load_config("configs/language/quickstart.yaml")
    assert config.train.steps * config.train.global_batch_size * config.model.sequence_length >= 2_000_000
