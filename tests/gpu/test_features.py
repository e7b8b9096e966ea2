"""The operator among CUDA's and torch's features: streams, graphs, compile, autocast, checkpointing, errors, training."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from train.config import load_config
from train.models.language import LanguageModel
from twicing_core import twicing_attention

SHAPE = (2, 4, 300, 64)


@pytest.fixture
def qkv(device):
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(SHAPE, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    ]


@pytest.fixture(autouse=True)
def deterministic():
    """So that results can be compared bit for bit."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def attend(*qkv, **options):
    return twicing_attention(*qkv, is_causal=True, backend="fused", **options)


def gradients(function, qkv):
    for tensor in qkv:
        tensor.grad = None
    function(*qkv).float().square().sum().backward()
    return [tensor.grad for tensor in qkv]


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_works_on_the_current_stream(device, qkv):
    """The inputs are made on a stream that is busy: reading them on any other would be too early."""
    expected = attend(*qkv)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late = [tensor.detach().clone() for tensor in qkv]
        output = attend(*late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal([output], [expected])


def test_a_cuda_graph_captures_forward_and_backward(device, qkv):
    def step():
        return torch.autograd.grad(attend(*qkv).float().square().sum(), qkv)

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in qkv:
            tensor.mul_(0.5)
    graph.replay()
    assert_equal(captured, step())


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_with_inductor(device, qkv, packed):
    options = {"cu_seqlens": torch.tensor([0, 100, 300, 450, 600], dtype=torch.int32, device=device)} if packed else {}
    torch.compiler.reset()
    compiled = torch.compile(lambda *qkv: attend(*qkv, **options), fullgraph=True)
    assert_equal(gradients(compiled, qkv), gradients(lambda *qkv: attend(*qkv, **options), qkv))


def test_autocast_computes_in_its_dtype(device, qkv):
    floats = [tensor.detach().float() for tensor in qkv]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_equal([attend(*floats)], [attend(*qkv)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(device, qkv, reentrant):
    def checkpointed(*qkv):
        return checkpoint(attend, *qkv, use_reentrant=reentrant)

    assert_equal(gradients(checkpointed, qkv), gradients(attend, qkv))


def test_opcheck(device, qkv):
    query, key, value = qkv
    call = (None, True, 0.125, "long")
    torch.library.opcheck(torch.ops.twicing.forward.default, (query, key, value, *call))
    saved = [t.detach() for t in (query, key, value, *torch.ops.twicing.forward(query, key, value, *call))]
    grad_output = torch.randn_like(saved[0])
    torch.library.opcheck(torch.ops.twicing.backward.default, (grad_output, *saved, *call, True))


def test_views_of_one_projection_are_not_copied(device):
    projection = torch.randn(2, 300, 3 * 4, 64, device=device, dtype=torch.bfloat16)
    qkv = projection.transpose(1, 2).split(4, dim=1)
    attend(*qkv)
    torch.cuda.synchronize()
    before, one = torch.cuda.memory_allocated(), qkv[0].numel() * 2
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        attend(*qkv)
    assert torch.cuda.max_memory_allocated() - before < 2.5 * one  # O and U, no copies


def test_works_on_every_device(device, qkv):
    expected = attend(*qkv)
    for index in range(torch.cuda.device_count()):
        there = [tensor.detach().to(f"cuda:{index}") for tensor in qkv]
        if torch.cuda.get_device_capability(index) == torch.cuda.get_device_capability(device):
            assert_equal([attend(*there).to(device)], [expected])
        assert torch.cuda.current_device() == device.index


def test_a_launch_that_fails_is_an_error_in_words(device, qkv):
    with pytest.raises(RuntimeError, match="no kernel 'longer' was built for BFloat16 and head_dim 64"):
        torch.ops.twicing.forward(*qkv, None, True, 0.1, "longer")
    with pytest.raises(ValueError, match="got torch.float32; use composed or reference"):
        attend(*(tensor.float() for tensor in qkv))
    large = [torch.randn(1, 1, 64, 256, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    with pytest.raises(ValueError, match="have gradients up to head_dim 128, got 256; use composed or reference"):
        attend(*large)


def test_a_model_learns_as_with_the_composed_backend(device):
    """A few steps of the language quick start's model on one batch: the losses fall, and fall alike."""
    losses = {}
    for backend in ("fused", "composed"):
        torch.manual_seed(0)
        config = load_config("configs/language/quickstart.yaml").model
        config.attention_backend = backend
        model = LanguageModel(config).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = torch.randint(config.vocab_size, (4, config.sequence_length + 1), device=device)
        starts = torch.arange(0, 4 * config.sequence_length + 1, config.sequence_length // 2, device=device).int()
        losses[backend] = []
        for _ in range(20):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(ids[:, :-1], targets=ids[:, 1:].contiguous(), cu_seqlens=starts).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert losses["fused"][-1] < losses["fused"][0] - 0.5
    assert abs(losses["fused"][-1] - losses["composed"][-1]) < 0.1
