"""What CUDA's kernels allocate beyond their outputs, each figure worked out from the kernel's source by hand."""

import bitsandbytes  # noqa: F401  registers its operators
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from dryfit.engine.attention import (
    FlashAttention2,
    MemoryEfficientAttention,
    cpu_kernel,
    cuda_kernel,
    flash_attention_package,
)
from dryfit.engine.cuda_rules import MIB, cublas_workspace_bytes, efficient_workspace_bytes
from dryfit.engine.errors import AttentionKernelError
from dryfit.engine.kernels import CudaKernels, dispatch
from dryfit.engine.trace import Options, measure_step, trace_step


def meta(*shape: int, dtype: torch.dtype = torch.float16, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


class Seen(TorchDispatchMode):
    """Names of the operators that ran, and bytes of their new tensors."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        if "empty" in func._schema.name:
            self.bytes.append(out.numel() * out.element_size())
        return out


def test_a_softmax_multiplies_gradient_and_output_after_its_output_exists_and_log_softmax_nothing():
    grad = meta(2, 8, 16, 16, dtype=torch.float32)
    before, after = CudaKernels().temporaries(
        torch.ops.aten._softmax_backward_data.default, (grad, grad, -1, torch.half)
    )
    assert (before, after) == ([], [grad.numel() * 4])
    grad = meta(16, 32, dtype=torch.float32)
    func = torch.ops.aten._log_softmax_backward_data.default
    assert CudaKernels().temporaries(func, (grad, grad, -1, torch.float32)) == ([], [])


@pytest.mark.parametrize(
    "capability, size", [((7, 5), 8_519_680), ((8, 0), 8_519_680), ((9, 0), 32 * MIB)]
)
def test_a_workspace_for_the_forward_thread_comes_once(capability, size):
    kernels = CudaKernels(capability)
    product = (torch.ops.aten.mm.default, (meta(4, 4), meta(4, 4)))
    assert cublas_workspace_bytes(capability) == size
    assert [*kernels.persistent(*product)] == [size]
    assert [*kernels.persistent(*product)] == []


def test_the_autograd_thread_has_its_own_workspace_and_a_bias_needs_cublaslt():
    kernels = CudaKernels((7, 5))
    found = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.extend(kernels.persistent(torch.ops.aten.mm.default, (grad, grad)))
            return grad

    bias = (torch.ops.aten.addmm.default, (meta(4), meta(4, 4), meta(4, 4)))
    assert [*kernels.persistent(*bias)] == [8_519_680, MIB]
    Product.apply(meta(4, 4, grad=True)).sum().backward()
    assert found == [8_519_680]


def test_products_and_embeddings_take_scratch():
    kernels = CudaKernels((8, 0), "2.4.1")
    bias = (torch.ops.aten.addmm.default, (meta(4), meta(4, 4), meta(4, 4)))
    assert [*kernels.persistent(*bias)] == [8_519_680]
    assert kernels.temporaries(*bias) == ([], [MIB]) == kernels.temporaries(*bias)
    assert CudaKernels((8, 0), "2.13.0+cpu").temporaries(*bias) == ([], [])
    func = torch.ops.bitsandbytes.gemm_4bit.default
    inputs, packed, absmax = (
        meta(2048, 64),
        meta(64, 1, dtype=torch.uint8),
        meta(4, dtype=torch.float32),
    )
    assert CudaKernels().temporaries(func, (inputs, packed, [128, 64], absmax, 64, "nf4")) == (
        [128 * 64 * 2],
        [],
    )
    nested = {"absmax_8bit": meta(128, dtype=torch.uint8)}
    assert CudaKernels().temporaries(
        func, (inputs, packed, [128, 64], absmax, 64, "nf4"), nested
    ) == ([128 * 4, 128 * 4, 128 * 64 * 2], [])
    func = torch.ops.aten.embedding_dense_backward.default
    for count, some in ((3072, False), (3073, True)):
        grad, indices = meta(count, 8), meta(count, dtype=torch.int64)
        before, after = CudaKernels().temporaries(func, (grad, indices, 1000, -1, False))
        assert bool(before) is some and after == []


def test_masks_and_softmax_in_another_dtype():
    scores = meta(4, 4)
    with dispatch("cuda"), Seen() as seen:
        out = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
    assert out.dtype == torch.float32 and seen.names == ["aten::_softmax"]
    with dispatch("cuda"), Seen() as seen:  # only half: ATen native/SoftMax.cpp
        torch.nn.functional.softmax(scores.bfloat16(), dim=-1, dtype=torch.float32)
    assert seen.names == ["aten::_to_copy", "aten::_to_copy", "aten::_softmax"]
    assert torch.nn.functional.softmax.__module__ == "torch.nn.functional"  # put back
    hidden = meta(4, 8, dtype=torch.float32, grad=True)
    with dispatch("cuda"), Seen() as seen:
        out = torch.nn.Dropout(0.1)(hidden)
        same = torch.nn.functional.dropout(hidden, 0.0)
        still = torch.nn.functional.dropout(hidden, 0.1, training=False)
    assert seen.names == ["aten::native_dropout"] and same is hidden and still is hidden
    assert (
        out.grad_fn._saved_result1.dtype == torch.bool
        and out.grad_fn._saved_result1.shape == hidden.shape
    )
    assert torch.nn.functional.dropout.__module__ == "torch.nn.functional"  # put back


def test_memory_efficient_attention():
    # T4, head of 64: blocks of 64 x 64, key and value gradients in registers, 16 + 64 * 64 * 4 bytes for each block.
    query, key, value = (meta(2, 4, 100, 64, grad=True) for _ in range(3))
    with Seen() as forward:
        out = MemoryEfficientAttention.apply(query, key, value, None, (7, 5))
    tensor = 2 * 4 * 100 * 64 * 2
    assert forward.bytes == [tensor, 2 * 4 * 128 * 4]  # queries padded to 32
    grad = meta(2, 4, 100, 64)
    with Seen() as backward:
        out.backward(grad)
    assert backward.bytes[:5] == [tensor] * 3 + [2 * 4 * 100 * 4, 2 * 4 * 2 * (16 + 64 * 64 * 4)]
    assert query.grad.shape == query.shape


def test_the_workspace_also_sums_keys_and_values_where_registers_do_not_suffice():
    small = efficient_workspace_bytes(128, 128, 128, "fp16", (8, 0))  # 128 x 128 blocks
    assert small == 16 + 128 * 128 * 4
    large = efficient_workspace_bytes(
        128, 128, 128, "fp16", (8, 6)
    )  # 64 x 64 blocks: 2 x 2 of them, and two sums of 128 x 128
    assert large == 4 * (16 + 64 * 64 * 4) + 2 * 128 * 128 * 4


def test_flash_attention_keeps_grouped_keys_until_backward():
    query = meta(1, 100, 8, 64, grad=True)
    key, value = (meta(1, 100, 2, 64, grad=True) for _ in range(2))
    out = FlashAttention2.apply(query, key, value)
    grad = meta(1, 100, 8, 64)
    with Seen() as backward:
        out.backward(grad)
    full, grouped = 100 * 8 * 64 * 2, 100 * 2 * 64 * 2
    assert backward.bytes[:3] == [full, grouped, grouped]
    assert backward.bytes[3:7] == [8 * 128 * 4, 128 * 8 * 64 * 4, full, full]


HALF, WIDE = torch.float16, torch.float32


@pytest.mark.parametrize(
    "capability, dtype, heads, keys, head, values, masked, kernel",
    [
        ((8, 0), HALF, 8, 2, 128, 128, False, "FLASH_ATTENTION"),
        (
            (8, 0),
            HALF,
            8,
            8,
            192,
            128,
            False,
            "EFFICIENT_ATTENTION",
        ),  # heads of two sizes, as DeepSeek has them
        ((8, 0), HALF, 8, 8, 288, 288, False, "EFFICIENT_ATTENTION"),
        (
            (8, 0),
            HALF,
            8,
            8,
            128,
            128,
            True,
            "EFFICIENT_ATTENTION",
        ),  # a sliding window makes a mask
        ((8, 0), WIDE, 8, 8, 128, 128, False, "EFFICIENT_ATTENTION"),
        ((8, 0), WIDE, 8, 2, 128, 128, False, "MATH"),
        ((7, 5), HALF, 8, 2, 128, 128, False, "MATH"),
        ((7, 5), HALF, 8, 8, 128, 128, False, "EFFICIENT_ATTENTION"),
        ((7, 5), torch.bfloat16, 8, 8, 128, 128, False, "MATH"),
        ((7, 5), HALF, 8, 8, 20, 20, False, "MATH"),  # heads of 40 bytes
    ],
)
def test_which_kernel_a_card_takes(capability, dtype, heads, keys, head, values, masked, kernel):
    query, key = meta(1, heads, 64, head, dtype=dtype), meta(1, keys, 64, head, dtype=dtype)
    value = meta(1, keys, 64, values, dtype=dtype)
    mask = meta(1, 1, 64, 64, dtype=dtype) if masked else None
    assert cuda_kernel(query, key, value, mask, capability).name == kernel


def test_what_a_kernel_refuses_and_a_cpu_takes():
    query = meta(1, 8, 64, 128)
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.raises(AttentionKernelError, match="a mask, compute"),
    ):
        cuda_kernel(query, query, query, meta(1, 1, 64, 64), (8, 0))
    query, value = meta(1, 8, 64, 128), meta(1, 8, 64, 64)
    assert cpu_kernel(query, query, query, None, 0.0) == SDPBackend.FLASH_ATTENTION
    assert cpu_kernel(query, query, query, None, 0.1) == SDPBackend.MATH
    assert cpu_kernel(query, query, value, None, 0.0) == SDPBackend.MATH


def test_a_mask_is_kept_for_the_backward_pass_and_padded_to_eight():
    query = meta(2, 4, 100, 64, grad=True)
    mask = torch.empty((2, 1, 100, 100), dtype=torch.bool, device="meta")
    with dispatch("cuda", (8, 0)):
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query, mask)
    bias = out.grad_fn.saved_tensors[-1]
    assert bias.shape == mask.shape and bias.dtype == query.dtype
    assert bias.untyped_storage().nbytes() == 2 * 100 * 104 * 2
    assert (
        torch.nn.functional.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"
    )  # put back


def test_the_stand_in_for_the_package_is_known_to_transformers():
    from transformers import AttentionInterface

    assert callable(AttentionInterface()[flash_attention_package()])


@pytest.mark.parametrize(
    "loss", ["mse_loss", "smooth_l1_loss", "binary_cross_entropy", "soft_margin_loss", "l1_loss"]
)
def test_a_loss_that_is_reduced_where_it_stands_keeps_what_it_stood_in(loss):
    compute, reports = getattr(torch.nn.functional, loss), []
    for device, answer in (("meta", trace_step), ("cpu", measure_step)):
        with torch.device(device):
            model, batch = torch.nn.Linear(8, 64), (torch.rand(32, 8), torch.rand(32, 64))

        def step(batch, model=model):
            value = compute(model(batch[0]).sigmoid(), batch[1])
            value.backward()
            model.zero_grad()

        reports.append(answer(model, None, step, batch, Options(target="cpu")))
    assert reports[0].phases == reports[1].phases


@pytest.mark.parametrize(
    "version, dtype, fused",
    [("2.8.0", torch.bfloat16, False), ("2.9.0", torch.bfloat16, True), ("2.9.0", None, False)],
)
def test_rms_norm_is_one_kernel_where_dtypes_agree(version, dtype, fused):
    rows, size = 256, 1024
    with torch.device("meta"):
        norm = torch.nn.RMSNorm(size, dtype=dtype)
        batch = torch.empty(rows, size, dtype=torch.bfloat16, requires_grad=True)
    outputs = []
    options = Options(steps=1, torch_version=version)
    report = trace_step(norm, None, lambda batch: outputs.append(norm(batch)), batch, options)
    scales = rows * 4
    assert (report.components["activations"] == rows * size * 2 + scales) == fused
    assert fused or report.components["activations"] > rows * size * 8  # in fp32, and multiplied
    trace_step(norm, None, lambda batch: norm(batch).sum().backward(), batch, options)
    assert norm.weight.grad.shape == (size,) and norm.weight.grad.dtype == norm.weight.dtype
