"""Linear layers with frozen weights in 8 bits, as optimum-quanto keeps them; part of recipes' own text."""

import torch


class EightBits(torch.autograd.Function):  # what optimum-quanto computes for a weight in 8 bits
    @staticmethod
    def forward(ctx, inputs, weight, scale):
        ctx.save_for_backward(inputs, weight, scale)
        return inputs.to(scale.dtype) @ (scale * weight.to(scale.dtype)).t()

    @staticmethod
    def backward(ctx, gradient):
        _, weight, scale = ctx.saved_tensors
        return gradient @ (scale * weight.to(scale.dtype)), None, None


def in_eight_bits(network):
    for layer in filter(lambda each: isinstance(each, torch.nn.Linear), network.modules()):
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 448
        layer.weight.data = (layer.weight.detach() / scale).to(torch.float8_e4m3fn)
        layer.register_buffer("row_scales", scale)
        layer.forward = lambda inputs, layer=layer: in_16_bits(layer, inputs)


def in_16_bits(layer, inputs):
    outputs = EightBits.apply(inputs, layer.weight, layer.row_scales)
    return outputs if layer.bias is None else outputs + layer.bias
