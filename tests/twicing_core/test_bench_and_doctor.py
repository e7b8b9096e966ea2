"""The two commands of `python -m twicing_core`."""

import argparse
import json

import pytest
import torch

from twicing_core import bench, doctor, measure_preferences


@pytest.fixture
def parse():
    def parse(module, *words):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        return parser.parse_args(words)

    return parse


@pytest.mark.parametrize(
    ("words", "taken", "reason"),
    [
        ([], ["fused", "fused", "fused", "composed"], "got torch.float64"),
        (["--dropout", "0.1"], ["reference"] * 4, "must drop the same entries of A in both products"),
        (["--mask"], ["composed"] * 4, "take no attn_mask"),
        (["--shape", "1", "1", "5", "4"], ["composed"] * 4, "take head_dim 8 to 256, got 4"),
    ],
    ids=["plain", "dropout", "mask", "small_heads"],
)
def test_doctor_says_what_auto_takes_and_why_not_the_others(capsys, monkeypatch, parse, words, taken, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.build, "unavailable", lambda: None)
    monkeypatch.setattr(doctor.build, "library", lambda: "/cache/cpu.so")
    monkeypatch.setattr(doctor.fused, "multiplies_bfloat16", lambda: True)
    assert doctor.run(parse(doctor, *words)) == 0
    output = capsys.readouterr().out
    assert [line.split()[0] for line in output.splitlines() if "auto takes it" in line] == taken
    assert reason in output and "/cache/cpu.so" in output


def test_doctor_without_kernels(capsys, monkeypatch, parse):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.build, "unavailable", lambda: "no C++ compiler 'g++' found")
    doctor.run(parse(doctor))
    output = capsys.readouterr().out
    assert "fused kernels  none: no C++ compiler 'g++' found" in output
    assert output.count("auto takes it") == 4 and "composed   yes: auto takes it" in output


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"small": bench.Shape(1, 2, 40, 8, True)})
    monkeypatch.setattr(bench, "gemm_peak", lambda dtype, device: 1e12)
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda threads: None)


def test_bench_writes_every_number(small, capsys, tmp_path, parse):
    words = [
        "--shapes",
        "small",
        "--rounds",
        "2",
        "--no-memory",
        "--dtype",
        "float32",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert bench.run(parse(bench, *words)) == 0
    written = json.loads((tmp_path / "a.json").read_text())
    assert {(r["candidate"], r["backward"]) for r in written["results"]} == {
        (name, backward) for name in bench.CANDIDATES for backward in (False, True)
    }
    assert all(r["median"] > 0 and r["seq"] == 40 for r in written["results"])
    assert capsys.readouterr().out.count("one SDPA") == 2


@pytest.mark.parametrize("name", [name for name in bench.CANDIDATES if name != "one SDPA"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_candidates_compute_the_same(make_qkv, run, name, is_causal):
    qkv = make_qkv(dtype=torch.float32)
    actual = run(qkv, function=bench.CANDIDATES[name], is_causal=is_causal)
    expected = run(qkv, backend="reference", is_causal=is_causal)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_peak_memory_tells_seq_by_seq_from_linear():
    shape = bench.Shape(1, 2, 1024, 16, True)
    linear, quadratic = (
        bench.peak_memory(name, shape, torch.float32, "cpu", True) for name in ("composed", "reference")
    )
    if linear is None:
        pytest.skip("this system does not tell the peak")
    assert quadratic > 2 * 1024 * 1024 * 4 > linear


def test_plot_needs_matplotlib_only_when_asked(tmp_path):
    pytest.importorskip("matplotlib")
    results = [
        {"shape": "small", "backward": backward, "candidate": name, "median": 1.0}
        for name in bench.CANDIDATES
        for backward in (False, True)
    ]
    bench.plot(results, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_bench_compares_what_it_is_told_to(small, capsys, parse):
    bench.run(parse(bench, "--candidates", "one SDPA", "composed", "--rounds", "1", "--no-memory"))
    output = capsys.readouterr().out
    assert output.count("one SDPA") == output.count("composed") == 2 and "fused" not in output


def test_an_unknown_name_is_told(parse):
    with pytest.raises(SystemExit, match="--shapes gpt2: on cpu there are vit-tiny, "):
        bench.run(parse(bench, "--shapes", "gpt2"))
    with pytest.raises(SystemExit, match="--candidates 2 flash: on cpu there are fused, "):
        bench.run(parse(bench, "--candidates", "2 flash"))


def test_what_cannot_is_left_out(monkeypatch, capsys):
    def cannot(*args, **options):
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    candidates = {"no": cannot, "one SDPA": bench.CANDIDATES["one SDPA"]}
    timings = bench.measure(bench.Shape(1, 1, 8, 8, True), candidates, torch.float32, "cpu", False, 1, False)
    assert (
        list(timings) == ["one SDPA"]
        and "no cannot: No available kernel. Aborting execution.\n" in capsys.readouterr().out
    )


def test_preferences_are_the_fastest_of_what_was_measured():
    times = {"composed forward": 5, "composed training": 20, "long forward": 4, "long backward": 9}
    times |= {"wavefront forward": 6, "wavefront backward": 8}
    assert measure_preferences.fastest(times)[:3] == ("long", "long", "wavefront")
    assert measure_preferences.fastest(times | {"composed forward": 3})[:3] == ("composed", "long", "wavefront")
    assert measure_preferences.fastest(times | {"composed training": 11})[:3] == ("long", "composed", "composed")


def test_preferences_measure_every_kernel_that_fits():
    """On the CPU's kernel, as if it were CUDA's."""
    times = measure_preferences.measure(bench.Shape(1, 2, 40, 16, True), "cpu", 2)
    forwards = {f"{name} forward" for name in ("composed", "long", "short", "wavefront", "wavefront_lag1")}
    assert set(times) == forwards | {"composed training"} | {
        f"{name} backward" for name in ("long", "short", "wavefront")
    }
    assert all(time > 0 for time in times.values())


def test_preferences_need_a_gpu(monkeypatch, parse):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="it needs a GPU, and --device cuda"):
        bench.run(parse(bench, "--save-preferences", "--device", "cuda"))


def test_doctor_says_what_auto_would_take_on_gpus(capsys, monkeypatch, parse):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    doctor.run(parse(doctor, "--shape", "1", "8", "4096", "64", "--causal"))
    lines = capsys.readouterr().out.splitlines()
    hopper = next(line for line in lines if line.strip().startswith("sm_9x"))
    assert hopper.endswith("inference: composed; training: long, long backward")


def test_minimal_flops():
    assert bench.minimal_flops(bench.Shape(2, 3, 10, 4, False), False) == 3 * 2 * 6 * 100 * 4
    assert bench.minimal_flops(bench.Shape(2, 3, 10, 4, True), True) == 9 * 6 * 100 * 4


@pytest.mark.parametrize("tiles", [False, True])
def test_halves_are_multiplied_in_float32_on_cpus_without_tiles(monkeypatch, tiles):
    monkeypatch.setattr(bench.fused, "multiplies_bfloat16", lambda: tiles)
    assert bench.multiplied_in(torch.bfloat16, "cpu") == (torch.bfloat16 if tiles else torch.float32)
    assert bench.multiplied_in(torch.float16, "cpu") == torch.float32
    assert bench.multiplied_in(torch.bfloat16, "cuda") == torch.bfloat16
