"""Activation checkpoints that lie on the host until their block is computed again; part of recipes' own text.

Source: utils/unsloth_utils.py of diffusion-pipe, and create_cpu_offloading_wrapper of kohya-ss/sd-scripts.
"""

import torch


class OnTheHost(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, block, ties, *arguments
    ):  # `ties` makes the outputs need gradients where no argument does
        ctx.block, ctx.dtype = block, torch.get_autocast_dtype("cuda")
        away = [isinstance(each, torch.Tensor) and each.requires_grad for each in arguments]
        ctx.kept = [
            each.cpu() if gone else each for each, gone in zip(arguments, away, strict=True)
        ]
        ctx.away = away
        return block(*arguments)

    @staticmethod
    def backward(ctx, *gradients):
        inputs = [
            each.cuda().requires_grad_() if gone else each
            for each, gone in zip(ctx.kept, ctx.away, strict=True)
        ]
        with torch.enable_grad(), torch.autocast("cuda", ctx.dtype):
            outputs = ctx.block(*inputs)
        torch.autograd.backward(outputs, gradients)
        return (
            None,
            None,
            *(each.grad if gone else None for each, gone in zip(inputs, ctx.away, strict=True)),
        )


def checkpointed_on_the_host(block, *arguments):
    return OnTheHost.apply(block, torch.zeros(1, device="cuda", requires_grad=True), *arguments)
