"""What operators cost: FLOPs and bytes that one can work out by hand, and launches in the program's order."""

import pytest
import torch
from torch import nn

from dryfit.engine.costs import ATTENTION, COLLECTIVE, MEMORY, PRODUCT, CostRecorder
from dryfit.engine.fake_group import DDP_STREAM, fake_group
from dryfit.engine.trace import Options, trace_step

ROWS, INNER, COLUMNS = 64, 256, 128


def costs_of_linear(**options):
    with torch.device("meta"):
        model = nn.Linear(INNER, COLUMNS, bias=False)
        batch = torch.empty(ROWS, INNER)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)

    def step(batch):
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return trace_step(model, optimizer, step, batch, Options(costs=True, **options)).costs


def test_the_costs_of_a_linear_layers_step():
    costs = costs_of_linear()
    products = [
        costs.operators[index] for index in costs.calls if costs.operators[index].kind == PRODUCT
    ]
    assert [operator.flops for operator in products] == [2 * ROWS * INNER * COLUMNS] * 2
    assert products[0].shape == (1, ROWS, COLUMNS, INNER)
    assert products[0].bytes == 4 * (ROWS * INNER + INNER * COLUMNS + ROWS * COLUMNS)
    assert products[0].dtype == "float32"
    names = [costs.operators[index].name for index in costs.calls]
    assert names.count("aten::mm") == 2
    assert not {"aten::t", "aten::detach", "aten::empty", "aten::expand"} & set(names)
    assert [phase for phase, _ in costs.phases][:3] == ["inputs", "forward", "backward"]
    (update,) = [
        operator for operator in costs.operators if operator.name.startswith("aten::_foreach_add_")
    ]
    assert (
        update.bytes == 3 * 4 * INNER * COLUMNS and update.kind == MEMORY and not update.made_bytes
    )
    expanded = [operator for operator in costs.operators if operator.name == "aten::mm"][1]
    whole = 4 * (ROWS * COLUMNS + ROWS * INNER + INNER * COLUMNS)
    assert expanded.bytes == whole - 4 * (ROWS * COLUMNS - 1)  # the gradient of a sum is one number
    sums = costs.by_phase()
    launches = sum(kind["launches"] for kinds in sums.values() for kind in kinds.values())
    assert launches == len(costs.calls)
    assert sums["forward"][PRODUCT]["flops"] == 2 * ROWS * INNER * COLUMNS


def test_a_product_with_sums_in_another_dtype_counts_the_same():
    recorder = CostRecorder(0)
    recorder.mark("forward", 0)
    total, left, right = (
        torch.empty(4, 4, dtype=dtype, device="meta")
        for dtype in (torch.float32, *2 * [torch.bfloat16])
    )
    recorder.note(
        torch.ops.aten.addmm.dtype_out, (total, left, right, torch.float32), {"out": total}, total
    )
    (product,) = recorder.operators
    assert product.kind == PRODUCT and product.flops == 2 * 4**3


def test_the_last_update_of_a_program_that_trains_for_several_is_taken_alone():
    with torch.device("meta"):
        model = nn.Linear(INNER, COLUMNS, bias=False)
        batches = [torch.empty(rows, INNER) for rows in (ROWS, 2 * ROWS, 4 * ROWS)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)

    def program():
        for batch in batches:
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = trace_step(model, None, program, options=Options(costs=True, steps=1)).costs
    last = whole.between(
        [first for phase, first in whole.phases if phase == "forward"][-1], len(whole.calls)
    )
    flops = [[costs.operators[index].flops for index in costs.calls] for costs in (whole, last)]
    assert sum(flops[1]) == 2 * 4 * ROWS * INNER * COLUMNS * 2, (
        "a product forward and one for the weight's gradient"
    )
    assert sum(flops[0]) == sum(flops[1]) * 7 // 4


def test_sums_by_module_have_the_backward_pass_with_its_module():
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(INNER, COLUMNS, bias=False), nn.ReLU(), nn.Linear(COLUMNS, 8, bias=False)
        )
        batch = torch.empty(ROWS, INNER)
    options = Options(costs=True, origins=True, steps=1)
    report = trace_step(model, None, lambda x: model(x).sum().backward(), batch, options)
    sums = report.to_mapping()["costs_by_module"]
    assert (
        sums["0"][PRODUCT]["flops"] == 2 * 2 * ROWS * INNER * COLUMNS
    )  # forward, and the weight's gradient
    assert sums["2"][PRODUCT]["flops"] == 3 * 2 * ROWS * COLUMNS * 8  # its input's gradient too
    assert PRODUCT not in sums["1"] and sums["1"][MEMORY]["launches"] == 2
    launches = sum(kind["launches"] for kinds in sums.values() for kind in kinds.values())
    assert launches == len(report.costs.calls)


@pytest.mark.parametrize(("causal", "share"), [(True, 0.5), (False, 1.0)])
def test_causal_attention_costs_half(causal, share):
    batch, heads, tokens, head = 2, 4, 64, 32

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(head, head, bias=False)

        def forward(self, hidden):
            return nn.functional.scaled_dot_product_attention(
                self.projection(hidden), hidden, hidden, is_causal=causal
            )

    with torch.device("meta"):
        model = Attention().to(torch.bfloat16)
        hidden = torch.empty(batch, heads, tokens, head, dtype=torch.bfloat16)

    costs = trace_step(
        model,
        None,
        lambda x: model(x).sum().backward(),
        hidden,
        options=Options(steps=1, costs=True),
    ).costs
    kernels = [
        costs.operators[index] for index in costs.calls if costs.operators[index].kind == ATTENTION
    ]
    forward = 4 * batch * heads * tokens * tokens * head * share
    assert [kernel.flops for kernel in kernels] == [forward, 2.5 * forward]


@pytest.mark.parametrize(("tokens", "share"), [(64, 1.0), (512, 1.0), (768, 7 / 9), (1024, 0.75)])
def test_on_the_cpu_causal_attention_leaves_out_whole_blocks_of_512_keys(tokens, share):
    with torch.device("meta"):
        query = torch.empty(1, 2, tokens, 32)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    recorder = CostRecorder(0)
    recorder.note(
        attend, (query, query, query, 0.0, True), {}, attend(query, query, query, 0.0, True)
    )
    (kernel,) = recorder.operators
    assert (
        kernel.flops == round(4 * query.numel() * tokens * share)
        and kernel.made_bytes == 4 * query.numel()
    )


@pytest.mark.parametrize("gpus", [2, 4])
def test_an_all_reduce_of_ddp_sends_all_but_a_part_twice(gpus):
    with torch.device("meta"):
        model = nn.Linear(INNER, COLUMNS, bias=False)
        batch = torch.empty(ROWS, INNER)
    wrapped = {}

    def begin():
        wrapped["model"] = nn.parallel.DistributedDataParallel(model)
        return step

    def step(batch):
        wrapped["model"](batch).sum().backward()
        model.zero_grad()

    with fake_group(gpus):
        costs = trace_step(model, None, None, batch, Options(begin=begin, costs=True)).costs
    sent = [
        costs.operators[index].moved_bytes
        for index, stream in zip(costs.calls, costs.streams, strict=True)
        if costs.operators[index].kind == COLLECTIVE and stream == DDP_STREAM
    ]
    assert sent == [2 * 4 * INNER * COLUMNS * (gpus - 1) // gpus]


def test_nothing_is_recorded_unasked_and_memory_is_the_same():
    with torch.device("meta"):
        model, batch = nn.Linear(8, 8), torch.empty(4, 8)

    def run(**options):
        return trace_step(
            model, None, lambda x: model(x).sum().backward(), batch, Options(**options)
        )

    assert run().costs is None and "costs" not in run().to_mapping()
    assert "costs_by_module" not in run(costs=True).to_mapping()  # that takes origins
    with_costs = run(costs=True)
    assert with_costs.peak_allocated_bytes == run().peak_allocated_bytes
    assert with_costs.to_mapping()["costs"]["forward"][PRODUCT]["flops"] == 2 * 4 * 8 * 8
