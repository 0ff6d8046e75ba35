"""DTensor's answers for lists of tensors: worked out once for each kind, they are the ones for the whole list."""

import torch
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dryfit.engine import shardings
from dryfit.engine.fake_group import fake_group
from dryfit.engine.patching import patched


def test_what_holds_for_one_of_a_kind_holds_for_all_and_is_asked_once():
    ((propagator, name, quick),) = shardings.sharding_patches()
    whole, asked, answers = getattr(propagator, name), [], []

    def counted(which, schema):
        asked.append(len(schema.args_schema[0]))
        return whole(which, schema)

    quick = shardings._once_for_each_kind(counted)

    def both(which, schema):
        if not isinstance(schema.args_schema[0], (list, tuple)):
            return whole(which, schema)
        answers.append((schema.op.name(), quick(which, schema), whole(which, schema)))
        return answers[-1][1]

    with fake_group(4), patched([(propagator, name, both)]):
        mesh = init_device_mesh("meta", (2, 2))
        shapes, places = (
            [(8, 4), (4, 4), (4,), (8, 4)],
            [(Shard(0), Replicate()), (Shard(0), Shard(0))],
        )
        tensors = [
            distribute_tensor(torch.empty(shape, device="meta"), mesh, place)
            for _ in range(3)
            for place in places
            for shape in shapes
        ]
        others = [
            distribute_tensor(torch.empty(each.shape, device="meta"), mesh, places[0])
            for each in tensors
        ]
        torch._foreach_norm(tensors)
        torch._foreach_add_(tensors, 1)
        torch._foreach_div_(tensors, [2.0] * len(tensors))
        assert [each.placements for each in torch._foreach_add(tensors, others)] == [
            each.placements for each in tensors
        ]
        torch._foreach_mul(tensors[:2], 2)
        states = [[torch.empty_like(each) for each in tensors] for _ in range(3)]
        steps = [torch.zeros((), device="meta") for _ in tensors]
        settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0, "eps": 0.1}
        torch._fused_adamw_(tensors, *states, [], steps, **settings, amsgrad=False, maximize=False)
    assert asked == [6, 6, 6, 6, 2, 6]  # of 24, and of two that differ
    assert answers[3][1].needs_redistribute and not answers[1][1].needs_redistribute
    for operator, mine, theirs in answers:
        assert mine.output_spec == theirs.output_spec, operator
        assert mine.redistribute_schema == theirs.redistribute_schema, operator
        assert mine.needs_redistribute == theirs.needs_redistribute, operator
