"""C extensions where a card is simulated: what each function allocates, and what is said without an entry."""

import importlib.util
import sys

import pytest
import torch

from dryfit.engine import extensions
from dryfit.engine.card import A100, H100
from dryfit.engine.errors import TraceError
from dryfit.engine.extensions import MissingExtension, MissingFunction, extension
from dryfit.engine.patching import on_meta
from dryfit.engine.simulation import simulated
from dryfit.engine.trace import Options, trace_step

TOKENS, HEADS, SIZE, TEXTS = 256, 2, 128, 8
HALF, FULL = torch.bfloat16, torch.float32


def up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def queries(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=HALF, device="meta", requires_grad=True)


def traced(step, batch=(), card=H100):
    """The report of a step that has no model; its batch is a list of tensors."""
    return trace_step(torch.nn.Module(), None, step, list(batch), Options(steps=1))


def blocks(*sizes: int) -> int:
    """Bytes as the allocator counts them."""
    return sum(up(size, 512) for size in sizes)


def attention(card, step, *batch):
    with simulated(card):
        return traced(step, batch)


def test_flash_attention_3_allocates_what_its_source_says():
    """hopper/flash_api.cpp, mha_bwd: each text begins in a block of its own, of 64 rows at head size 128 and a mask."""
    given = [queries(TOKENS, HEADS, SIZE) for _ in range(3)]
    starts = torch.empty(TEXTS + 1, dtype=torch.int32, device="meta")

    def step(batch):
        from flash_attn_interface import flash_attn_varlen_func

        *qkv, cu_seqlens = batch
        for each in qkv:
            each.requires_grad_()
        output = flash_attn_varlen_func(
            *qkv, cu_seqlens, cu_seqlens, TOKENS, TOKENS, causal=True, window_size=(128, 0)
        )
        output.backward(torch.empty_like(output))

    report = attention(H100, step, *given, starts)
    tensor, sums, start = TOKENS * HEADS * SIZE * 2, TOKENS * HEADS * 4, 4 * (TEXTS + 1)
    padded = up(TOKENS + TEXTS * 64, 64)
    inputs = blocks(*[tensor] * 3, start)
    outputs = blocks(tensor, sums)
    scratch = blocks(
        *[HEADS * padded * 4] * 2, HEADS * padded * SIZE * 4, TOKENS // 64 * TEXTS * HEADS * 4
    )
    gradients = blocks(
        *[tensor] * 4
    )  # of the output, which the step makes, and of queries, keys and values
    assert report.phases["backward"] == inputs + outputs + gradients + scratch
    (said,) = report.warnings
    assert "FlashAttention-3" in said and "hopper/flash_api.cpp" in said


def test_queries_that_share_keys_take_sums_of_the_keys_gradients():
    def step(batch):
        from flash_attn_interface import flash_attn_func

        flash_attn_func(*(each.requires_grad_() for each in batch), causal=True).sum().backward()

    shared = attention(
        H100, step, queries(2, 128, 8, 64), queries(2, 128, 2, 64), queries(2, 128, 2, 64)
    )
    alone = attention(
        H100, step, queries(2, 128, 8, 64), queries(2, 128, 8, 64), queries(2, 128, 8, 64)
    )
    of_keys = 2 * 128 * 64 * 4
    smaller = 2 * (8 - 2) * 128 * 64 * 2 * 2  # keys and values, and their gradients
    added = 2 * blocks(of_keys * 2)
    assert alone.phases["backward"] - shared.phases["backward"] == 2 * smaller - added


@pytest.mark.parametrize("head", [64, 128, 256])
def test_a_block_of_the_backward_pass_depends_on_the_card(head):
    from dryfit.engine.flash_attention_3 import _block

    found = {}
    for card in (A100, H100):
        with simulated(card):
            found[card] = _block(head, True, True, 0.0)
    expected = {
        64: ((128, 128), (128, 128)),
        128: ((64, 128), (64, 128)),
        256: ((64, 64), (64, 80)),
    }
    assert (found[A100], found[H100]) == expected[head]


def test_the_hubs_kernels_are_the_same_module():
    with simulated(H100):
        from kernels import get_kernel

        package = get_kernel("varunneal/flash-attention-3")
        assert package.flash_attn_interface is sys.modules["flash_attn_interface"]
        assert package.flash_attn_func is package.flash_attn_interface.flash_attn_func
        with pytest.raises(MissingExtension, match="downloads a C extension") as caught:
            get_kernel("somebody/kernel")
        assert "varunneal/flash-attention-3" in str(caught.value)
    assert importlib.util.find_spec("kernels") is None and "flash_attn_interface" not in sys.modules


def test_an_installed_hub_keeps_its_other_kernels(tmp_path, monkeypatch):
    (tmp_path / "kernels.py").write_text(
        "def get_kernel(name, version=None):\n    return name, version\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    with simulated(H100):
        import kernels

        assert kernels.get_kernel("somebody/kernel", version=2) == ("somebody/kernel", 2)
        assert kernels.get_kernel("kernels-community/flash-attn3").flash_attn_func
    assert kernels.get_kernel("kernels-community/flash-attn3") == (
        "kernels-community/flash-attn3",
        None,
    )
    monkeypatch.delitem(sys.modules, "kernels")


def test_an_argument_that_changes_what_is_allocated_is_refused():
    with simulated(H100), on_meta():
        from flash_attn_interface import flash_attn_func

        with pytest.raises(TraceError, match="num_splits"):
            flash_attn_func(*[queries(1, 128, 2, 64)] * 3, num_splits=4)
        assert flash_attn_func(*[queries(1, 128, 2, 64)] * 3, num_splits=1).shape == (1, 128, 2, 64)


def test_flash_attention_2_pads_rows_and_heads():
    """csrc/flash_attn/flash_api.cpp: rows to 128, heads to 32, one gradient for each query where they share keys."""
    with simulated(A100), on_meta():
        import flash_attn_2_cuda

        q, k = queries(2, 1000, 8, 80), queries(2, 1000, 2, 80)
        rest = None, 0.0, 0.1, True, -1, -1, 0.0
        out, sums, kept, state = flash_attn_2_cuda.fwd(q, k, k, None, *rest, False, None)
        assert out.shape == q.shape and sums.shape == (2, 8, 1000) and sums.dtype == FULL
        assert not kept.numel() and state.nbytes == 16
        *grads, row = flash_attn_2_cuda.bwd(
            out, q, k, k, out, sums, None, None, None, *rest, False, None, state
        )
        assert [each.shape for each in grads] == [q.shape, k.shape, k.shape] and row.shape == (
            2,
            8,
            1024,
        )
        q, starts = queries(1000, 8, 80), torch.empty(5, dtype=torch.int32, device="meta")
        given = (
            starts,
            starts,
            None,
            None,
            None,
            None,
            500,
            500,
            0.0,
            0.1,
            False,
            True,
            -1,
            -1,
            0.0,
            False,
            None,
        )
        out, sums, *_ = flash_attn_2_cuda.varlen_fwd(q, q, q, None, *given)
        assert out.shape == q.shape and sums.shape == (8, 1000)
        given = (
            starts,
            starts,
            None,
            500,
            500,
            0.0,
            0.1,
            False,
            True,
            -1,
            -1,
            0.0,
            False,
            None,
            None,
        )
        *_, row = flash_attn_2_cuda.varlen_bwd(out, q, q, q, out, sums, None, None, None, *given)
        assert row.shape == (8, 1000 + 128 * 4)


@pytest.mark.parametrize(
    ("sequences", "queries_", "keys", "head", "parts"),
    [(1, 64, 8192, 128, 64), (8, 64, 1024, 128, 8), (64, 4096, 4096, 128, 1), (1, 64, 128, 64, 1)],
)
def test_few_queries_split_many_keys(sequences, queries_, keys, head, parts):
    """On 2 x 108 processors: 64 blocks of keys fill 216 best in as few parts as hold 85 % of that."""
    with simulated(A100):
        assert extensions._splits(sequences, queries_, keys, head) == parts


def test_a_selective_scan_keeps_states_and_gated_outputs():
    with simulated(A100), on_meta():
        import selective_scan_cuda

        u, A = torch.empty(2, 64, 5000, dtype=HALF), torch.empty(64, 16)
        B = torch.empty(2, 1, 16, 5000, dtype=HALF)
        D, bias = torch.empty(64), torch.empty(64)
        out, states, gated = selective_scan_cuda.fwd(u, u, A, B, B, D, u, bias, True)
        assert (
            states.shape == (2, 64, 3, 32)
            and states.dtype == FULL
            and gated.shape == out.shape == u.shape
        )
        found = selective_scan_cuda.bwd(u, u, A, B, B, D, u, bias, u, states, out, None, True, True)
        du, ddelta, dA, dB, dC, dD, dbias, dz, again = found
        assert (dA.dtype, dB.dtype, dC.shape, dD.shape, dbias.shape) == (
            FULL,
            HALF,
            B.shape,
            (64,),
            (64,),
        )
        assert du.shape == ddelta.shape == dz.shape == again.shape == u.shape
        assert (
            len(
                selective_scan_cuda.bwd(
                    u, u, A, B, B, None, None, None, u, states, None, None, True, False
                )
            )
            == 7
        )


def test_a_convolution_takes_scratch_only_where_sums_may_not_be_chance():
    def step(batch):
        import causal_conv1d_cuda

        causal_conv1d_cuda.causal_conv1d_bwd(batch[0], batch[1], batch[2], batch[0])

    given = torch.empty(2, 64, 512), torch.empty(64, 4), torch.empty(64)
    before, peaks = torch.are_deterministic_algorithms_enabled(), []
    try:
        for ordered in (False, True):
            torch.use_deterministic_algorithms(ordered)
            peaks.append(attention(A100, step, *given).peak_allocated_bytes)
    finally:
        torch.use_deterministic_algorithms(before)
    assert peaks[1] - peaks[0] == blocks(2 * 64 * 4 * 4, 2 * 64 * 4)


def test_an_extension_without_an_entry_is_named_with_what_to_write():
    def step(batch):
        try:
            import wkv_cuda  # noqa: F401
        except ImportError as error:
            raised.append(str(error))
        return batch

    raised: list[str] = []
    with simulated(A100) as simulation:
        assert importlib.util.find_spec("wkv_cuda") is None, "who only looks is not told off"
        report = traced(step, [torch.empty(2)])
        assert simulation.missing == ["wkv_cuda"]
    assert (
        "The C extension wkv_cuda has no entry" in raised[0]
        and '@extension("wkv_cuda", "forward"' in raised[0]
    )
    assert any("wkv_cuda has no entry in the table" in text for text in report.warnings)
    with pytest.raises(ModuleNotFoundError, match="No module named 'wkv_cuda'"):
        import wkv_cuda  # noqa: F401


def test_an_entry_of_ones_own_is_called_and_said(monkeypatch):
    monkeypatch.setattr(extensions, "_TABLE", dict(extensions._TABLE))

    @extension("wkv_cuda", "forward", source="wkv.cpp of version 4")
    def forward(inputs):
        scratch = torch.empty(inputs.numel() * 256, device=inputs.device)  # noqa: F841
        return torch.empty_like(inputs)

    def step(batch):
        import wkv_cuda

        wkv_cuda.forward(batch[0])

    report = attention(A100, step, torch.empty(1024))
    assert report.peak_allocated_bytes == blocks(4096, 4096, 1024 * 256 * 4)
    assert report.warnings == (
        "in the place of wkv_cuda ran what it allocates, after wkv.cpp of version 4",
    )
    with simulated(A100):
        import wkv_cuda

        with pytest.raises(MissingFunction, match="no function backward of wkv_cuda"):
            wkv_cuda.backward(None)
        assert not hasattr(wkv_cuda, "other")
