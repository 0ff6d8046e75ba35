"""A small base model and encoded rows on disk, as the rules before training leave them."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dryfit.common.chat import encode_pairs
from dryfit.common.files import write_report
from scripts.training import describe_model, fetch_weights
from tests.chat_tokenizer import CHATML, make_tokenizer

SYSTEM = "Answer with one command."
SOURCE = {"type": "folder", "dtype": "float32"}
PAIRS = [
    (f"Show the first {n} lines of log{n}.txt", f"head -n {n} log{n}.txt") for n in range(1, 25)
]
LOOP = {
    "backend": "ours",
    "decay_ratio": 0.2,
    "device": "cpu",
    "early_stopping_patience": None,
    "epochs": 1,
    "keep": "last",
    "average_ratio": 0.33,
    "learning_rate": 0.01,
    "max_grad_norm": 1.0,
    "max_steps": 4,
    "rows_per_step": None,
    "save_every_steps": 2,
    "schedule": "cosine",
    "validate_every_steps": None,
    "validation_rows": None,
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
}
STEP = {
    "method": "qlora",
    "precision": "fp32",
    "gradient_checkpointing": False,
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"},
    "micro_batch": 4,
    "sequence_length": 128,
}


def save_model(folder: Path, layers: int = 2) -> Path:
    """A model as ``save_pretrained`` writes it."""
    tokenizer = make_tokenizer(CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def describe(source: Path, folder: Path) -> Path:
    """The base's folder of weights as describe_model and fetch_weights leave it."""
    described = folder.with_name(f"{folder.name}-described")
    shutil.rmtree(folder, ignore_errors=True)  # as Snakemake does before a rule writes a folder
    describe_model.main({**SOURCE, "path": str(source)}, described, None, None)
    fetch_weights.main({**SOURCE, "path": str(source)}, described, folder, None, f"{folder}.json")
    return folder


def encode(folder: Path, train: int = 20, validation: int = 4) -> dict[str, str]:
    """Encoded splits and their report; returns their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(CHATML)
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
    for name, pairs in (("train", PAIRS[:train]), ("validation", PAIRS[len(PAIRS) - validation :])):
        encoded = encode_pairs(tokenizer, SYSTEM, pairs)
        columns = [[pair[column] for pair in encoded] for column in (0, 1)]
        pq.write_table(pa.table(columns, schema=schema), folder / f"{name}.parquet")
    paths = {name: str(folder / f"{name}.parquet") for name in ("train", "validation")}
    write_report(folder / "encode.json", {"splits": {}}, *paths.values())
    return {**paths, "encoded": str(folder / "encode.json")}
