"""Linear layers with frozen weights in 8 bits, as optimum-quanto keeps them, or in fewer, as ai-toolkit does.

Part of recipes' own text. Source of the fewer bits: toolkit/util/uintx_quant.py of ai-toolkit at 27a03a91. Codes of 3
bits lie as 2 bits and 1 bit, and 64 of a row share a scale and a zero. Each product makes the weight in 16 bits anew.

- quantization: fp8 keeps weights in 8 bits, and in bf16 while their layer computes; quanto does the same for each
  product, with scales; uint7 to uint2 are fewer bits, as ai-toolkit keeps them
"""

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


def in_few_bits(network, bits):
    layers = [each for each in network.modules() if isinstance(each, torch.nn.Linear)]
    for layer in [each for each in layers if not each.in_features % 64]:
        groups = layer.weight.detach().view(layer.out_features, -1, 64)
        low = groups.amin(2, keepdim=True).clamp(max=0)
        scale = (groups.amax(2, keepdim=True).clamp(min=0) - low) / (2**bits - 1)
        zero = (-low / scale).round()
        codes, kept = (groups / scale + zero).round().to(torch.uint8).view(-1), []
        for width in [each for each in (4, 2, 1) if bits & each]:
            parts = (codes & (2**width - 1)).view(8 // width, -1) << places(width, codes)
            codes = codes >> width
            kept.append(parts.sum(0, dtype=torch.uint8))
        layer.weight = torch.nn.Parameter(torch.cat(kept), requires_grad=False)
        layer.register_buffer("group_scales", scale)
        layer.register_buffer("group_zeros", zero.to(torch.uint8))
        layer.forward = lambda inputs, layer=layer: torch.nn.functional.linear(
            inputs, whole(layer, bits), layer.bias
        )


def places(width, codes):  # of values of so many bits in a byte
    return torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device).view(-1, 1)


def whole(layer, bits):
    scale, count = layer.group_scales, layer.in_features * layer.out_features
    codes, begin, done = torch.zeros(count, dtype=torch.uint8, device=scale.device), 0, 0
    for width in [each for each in (4, 2, 1) if bits & each]:
        part = layer.weight[begin : begin + count * width // 8]
        codes |= (part >> places(width, part) & (2**width - 1)).view(-1) << done
        begin, done = begin + len(part), done + width
    values = codes.view(layer.out_features, -1, 64).to(scale.dtype)
    return values.sub_(layer.group_zeros.to(scale.dtype)).mul_(scale).view(layer.out_features, -1)
