"""A transformer of diffusers with frozen weights as they are kept, and its adapters; part of recipes' own text.

- text_millions: the text encoder is on the card where texts are not cached, in 8 bits beside a quantized transformer
"""

import torch
from diffusers import AutoModel, BitsAndBytesConfig
from diffusers.hooks import apply_layerwise_casting
from parts.block_swap import take_turns
from parts.eight_bits import in_eight_bits, in_few_bits
from parts.host_checkpoints import checkpointed_on_the_host
from peft import LoraConfig, prepare_model_for_kbit_training


def text_encoder(millions, quantization):  # what it computes is less than what a step does
    dtype = torch.bfloat16 if quantization == "none" else torch.float8_e4m3fn
    return torch.zeros(millions, 10**6, dtype=dtype, device="cuda")


# A transformer, and the names of the linear layers of its blocks.
def loaded(model, weights, quantization, in_16_bits=(), whole=False, on_host=True):
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    kept = {
        "quantization_config": four_bit if quantization == "nf4" else None,
        "torch_dtype": weights,
    }
    network = AutoModel.from_pretrained(model, subfolder="transformer", **kept)
    layers = {
        name: each for name, each in network.named_modules() if isinstance(each, torch.nn.Linear)
    }
    layers = {
        name: each
        for name, each in layers.items()
        if any(part.isdigit() for part in name.split(".")[:-1])
    }
    if quantization == "nf4":
        network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
    if quantization == "fp8":
        apply_layerwise_casting(
            network, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=in_16_bits
        )
    if quantization == "quanto" or "uint" in quantization:
        for part in [network if on_host else network.cuda()] if whole else layers.values():
            in_eight_bits(part) if quantization == "quanto" else in_few_bits(
                part, int(quantization[-1])
            )
    return network, list(layers)


def trained_weights(
    network, rank, layers, dtype, checkpointed, checkpoints, swapped
):  # rank 0: all of them
    network = (network if swapped else network.cuda()).requires_grad_(not rank)
    if checkpointed:
        network.enable_gradient_checkpointing(
            checkpointed_on_the_host if checkpoints == "host" else None
        )
    if rank:
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    if swapped:
        take_turns(network, swapped, checkpointed)
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    for weight in trained if rank and dtype else ():
        weight.data = weight.data.to(dtype)
    return trained
