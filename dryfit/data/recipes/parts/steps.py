"""The optimizer, and what follows the loss; part of recipes' own text."""

import torch
from bitsandbytes.optim import AdamW8bit
from diffusers.training_utils import EMAModel
from transformers import Adafactor


def optimizer_of(trained, name, ema):  # and the averaged weights
    averaged = EMAModel(trained) if ema else None
    if name == "adafactor":
        return Adafactor(trained, lr=1e-4, scale_parameter=False, relative_step=False), averaged
    return {"adamw": torch.optim.AdamW, "adamw_8bit": AdamW8bit}[name](trained, lr=1e-4), averaged


def update(loss, trained, steps, averaged=None, scaler=None):  # the scaler is for fp16
    scaler = scaler or torch.amp.GradScaler("cuda", enabled=False)
    scaler.scale(loss).backward()
    scaler.unscale_(steps)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    scaler.step(steps)
    scaler.update()
    steps.zero_grad()
    if averaged:
        averaged.step(trained)
