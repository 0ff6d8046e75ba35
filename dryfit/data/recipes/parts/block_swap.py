"""Blocks of a transformer that take turns on the card, as kohya's block swap moves them; part of recipes' own text.

Source: library/custom_offloading_utils.py of kohya-ss/sd-scripts at 48d368fa, from which musubi-tuner and
diffusion-pipe have theirs: frozen weights that leave are copied to the host, and those that come are copied to where
they lay. A weight without one of its name and shape stays once it has come, and so do biases, scales and adapters.

- blocks_swapped: blocks whose weights wait on the host, as kohya's block swap; checkpoints: where their inputs wait to
  be computed again; what copies cost in time is not counted
"""


def take_turns(
    network, count, checkpointed
):  # of two kinds of blocks count // 2, and twice the rest
    kinds = [each for name, each in network.named_children() if name.endswith(("blocks", "layers"))]
    most = max((len(blocks) - 2) * (len(kinds) - at) for at, blocks in enumerate(kinds))
    if count > most:
        raise ValueError(f"it can swap {most} blocks at most, not {count}")
    for part in network.children():
        if not any(part is blocks for blocks in kinds):
            part.cuda()
    for own in network.parameters(recurse=False):
        own.data = own.data.cuda()
    counts = [count // 2, 2 * (count - count // 2)] if len(kinds) > 1 else [count]
    for blocks, away in zip(kinds, counts, strict=True):
        share_places(blocks, len(blocks) - min(away, len(blocks) - 2), checkpointed)


def share_places(blocks, places, checkpointed):
    held, frozen = list(range(places)), []
    for index, block in enumerate(blocks):
        block.cuda()
        own = {name: each for name, each in block.named_parameters() if not each.requires_grad}
        frozen.append({name: each for name, each in own.items() if name.endswith("weight")})
        for weight in frozen[index].values() if index >= places else ():
            weight.data = weight.data.cpu()

    def come(index):
        other, held[index % places] = held[index % places], index
        for name, weight in frozen[index].items() if other != index else ():
            leaves = frozen[other].get(name)
            if leaves is None or leaves.shape != weight.shape:
                weight.data = weight.data.cuda()
                continue
            place = leaves.data
            leaves.data = place.cpu()
            place.copy_(weight.data)
            weight.data = place

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(
            lambda *_, index=index: come(index)
        )  # and where it is computed again
        if not checkpointed:
            block.register_full_backward_pre_hook(lambda *_, index=index: come(index))
