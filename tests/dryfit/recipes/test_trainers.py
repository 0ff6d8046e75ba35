"""Files of programs that train images, read into settings of a recipe."""

import json
import re
from functools import partial
from pathlib import Path

import pytest

from dryfit.ask import command
from dryfit.ask.recipe import question
from dryfit.ask.words import parse
from dryfit.cards.verdict import Verdict, Word
from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.data import data_path
from dryfit.program.answer import _omissions
from dryfit.recipes import follow
from dryfit.recipes.models import find
from dryfit.recipes.recipe import recipe
from dryfit.recipes.trainers import TrainerFile, TrainerReading, read

TABLE = read_yaml(data_path("recipes", "trainers.yaml"))
SDXL = """accelerate launch --num_cpu_threads_per_process 1 sdxl_train_network.py \\
  --pretrained_model_name_or_path="$HOME/sd_xl_base_1.0.safetensors" --dataset_config=data.toml --network_dim=32 \\
  --network_module=networks.lora --optimizer_type="AdamW8bit" --mixed_precision=bf16 --gradient_checkpointing \\
  --cache_latents --cache_text_encoder_outputs --network_train_unet_only --learning_rate=1e-4 {more}
"""
DATA = """[general]
enable_bucket = true
[[datasets]]
resolution = [1024, 768]
batch_size = 2
[[datasets]]
batch_size = 4
resolution = 512
"""
FLUX = """pretrained_model_name_or_path = "flux1-dev.safetensors"
network_module = "networks.lora_flux"
network_dim = 16
[images]
resolution = "512,512"
mixed_precision = "bf16"
fp8_base = true
gradient_checkpointing = true
cache_latents_to_disk = true
"""
DREAM = """export MODEL_NAME="black-forest-labs/FLUX.1-dev"
accelerate launch train_dreambooth_lora_flux.py --pretrained_model_name_or_path=$MODEL_NAME --mixed_precision=bf16 \\
  --resolution=768 --train_batch_size=1 --gradient_checkpointing --use_8bit_adam --rank=16 {more}
"""


TOOLKIT = """job: extension
config:
  name: mine
  process:
    - type: sd_trainer
      network: {type: lora, linear: 16, linear_alpha: 16}
      datasets:
        - {folder_path: images, caption_ext: txt, cache_latents_to_disk: true, resolution: [512, 768]}
      train: {batch_size: 2, optimizer: adamw8bit, dtype: bf16, ema_config: {use_ema: true}, steps: 9, blob: 3}
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true, quantize: true}
      sample: {width: 1024, height: 768, prompts: [a dog]}
"""


def file(folder: Path, text: str, name: str = "train.sh") -> str:
    (folder / "data.toml").write_text(DATA, encoding="utf-8")
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_a_script_of_sd_scripts_says_its_settings(tmp_path: Path) -> None:
    found = read(file(tmp_path, SDXL.format(more="--blob=3")))
    assert (found.tool, found.program) == ("kohya's sd-scripts", "sdxl_train_network.py")
    assert (found.recipe, found.model.name) == (
        "unet_lora",
        "stabilityai/stable-diffusion-xl-base-1.0",
    )
    assert found.given == {
        "rank": 32,
        "micro_batch": 4,
        "size": 896,
        "precision": "bf16",
        "gradient_checkpointing": True,
        "optimizer": "adamw_8bit",
        "cached": "all",
        "targets": "linear",
        "adapter_precision": "fp32",
        "texts_trained": False,
    }
    assert found.beside == ()
    less = read(
        file(tmp_path, SDXL.format(more="--full_bf16 --no_half_vae --optimizer_type=Adafactor"))
    )
    assert (less.given["adapter_precision"], less.given["optimizer"]) == ("16bit", "adafactor")
    assert noted(found) == {"images", "blob", "~/sd_xl_base_1.0.safetensors"}


def test_configuration_files_and_examples_have_their_own_defaults(tmp_path: Path) -> None:
    found = read(file(tmp_path, FLUX, "flux.toml"))
    assert (found.program, found.model.name) == (
        "flux_train_network.py",
        "black-forest-labs/FLUX.1-dev",
    )
    assert (
        found.given["quantization"] == "fp8"
        and found.given["cached"] == "latents"
        and found.given["size"] == 512
    )
    assert found.beside == ("adapters of the text encoders",), (
        "--network_train_unet_only is not set"
    )
    by_name = file(
        tmp_path, "accelerate launch flux_train_network.py --config_file flux --network_dim 4\n"
    )
    assert read(by_name).given == found.given | {"rank": 4}
    found = read(file(tmp_path, DREAM.format(more="--validation_prompt='a dog'")))
    assert found.given == {
        "rank": 16,
        "micro_batch": 1,
        "size": 768,
        "gradient_checkpointing": True,
        "optimizer": "adamw_8bit",
        "cached": "none",
    }
    assert found.beside == ("images sampled between epochs",) and found.notes == ()
    plain = read(file(tmp_path, "python train_text_to_image_lora_sdxl.py --mixed_precision fp16\n"))
    assert (plain.given["micro_batch"], plain.given["size"], plain.given["rank"]) == (16, 1024, 4)
    assert plain.given["cached"] == "none" and "targets" not in plain.given


def test_a_file_of_ai_toolkit_is_read_key_by_key(tmp_path: Path) -> None:
    found = read(file(tmp_path, TOOLKIT, "mine.yaml"))
    assert (found.tool, found.program, found.recipe) == ("ai-toolkit", "flux", "flux_lora")
    assert found.given == {
        "rank": 16,
        "micro_batch": 2,
        "size": 768,
        "gradient_checkpointing": True,
        "optimizer": "adamw_8bit",
        "quantization": "quanto",
        "low_vram": False,
        "samples": 1024,
        "ema": True,
        "targets": "linear",
        "adapter_precision": "fp32",
        "cached": "latents",
    }
    assert found.beside == () and [note.partition(":")[0] for note in found.notes] == ["train.blob"]
    films = TOOLKIT.replace("is_flux: true", "arch: wan21").replace(
        "batch_size: 2", "unload_text_encoder: true"
    )
    films = read(
        file(
            tmp_path,
            films.replace("FLUX.1-dev", "none").replace("black-forest-labs", "own"),
            "films.yaml",
        )
    )
    qwen = TOOLKIT.replace("is_flux: true", "arch: qwen_image_edit_plus, low_vram: true")
    qwen = qwen.replace("quantize: true", "quantize: true, qtype: uint3|a.safetensors")
    qwen = read(
        file(tmp_path, qwen.replace("folder_path: images,", "control_path: [a, b],"), "qwen.yaml")
    )
    assert (qwen.given["quantization"], qwen.given["references"], qwen.given["cached"]) == (
        "uint3",
        2,
        "latents",
    )
    assert qwen.beside == ("images sampled between steps", "a second adapter in the model")
    whole = TOOLKIT.replace("network: {type: lora, linear: 16, linear_alpha: 16}", "")
    assert read(file(tmp_path, whole, "whole.yaml")).given["rank"] == 0, (
        "without an adapter all weights are trained"
    )
    wan = TOOLKIT.replace("is_flux: true", "arch: wan22_14b, low_vram: true")
    assert "the second transformer, or its adapters" in read(file(tmp_path, wan, "wan.yaml")).beside
    alone = wan.replace("low_vram: true", "low_vram: true, model_kwargs: {train_low_noise: false}")
    assert read(file(tmp_path, alone, "wan.yaml")).beside == ("images sampled between steps",)
    assert (films.recipe, films.given["height"], films.given["frames"]) == ("film_lora", 768, 1)
    assert films.beside == ("images sampled between steps",) and films.given["ema"]
    assert read(file(tmp_path, "base_model: a\n", "axolotl.yaml")) is None
    assert read(file(tmp_path, "a: [\n", "broken.yaml")) is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("is_flux: true", "arch: hidream", "No recipe trains the architecture hidream"),
        ("is_flux: true", "is_lumina2: true", "No recipe trains the architecture is_lumina2"),
        (
            "quantize: true",
            "quantize: true, qtype: convrot4",
            "No recipe has the quantization convrot4",
        ),
        ("quantize: true", "quantize: true, quantize_te: false", "text encoders in 16 bits"),
        ("quantize: true", "layer_offloading: true", "layers lie on the host"),
        (
            "linear: 16,",
            "linear: 16, network_kwargs: {only_if_contains: [a]},",
            "adapters of other layers",
        ),
        ("is_flux: true", "only_if_contains: [a]", "a part of the weights is trained"),
        ("type: lora", "type: lokr", "another kind of adapter"),
        ("sd_trainer", "concept_slider", "another kind of training"),
        ("adamw8bit", "prodigy", "No recipe has the optimizer prodigy"),
    ],
)
def test_what_no_recipe_has_of_ai_toolkit_is_refused_by_name(
    old: str, new: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        read(file(tmp_path, TOOLKIT.replace(old, new), "mine.yaml"))


def test_what_precision_and_accelerate_say_counts_too(tmp_path: Path) -> None:
    layers = "--lora_layers=attn.to_k,attn.to_q,attn.to_v,attn.to_out.0"
    found = read(file(tmp_path, DREAM.format(more=f"--mixed_precision=fp16 {layers}")))
    assert (
        found.given["adapter_precision"] == "fp32" and "targets" not in found.given
    )  # attention is the recipe's own
    assert any("fp16 is taken as bf16" in note for note in found.notes)
    program = "train_text_to_image_lora.py --use_8bit_adam --optimizer=AdamW\n"
    line = "accelerate launch --mixed_precision=fp16 {more} " + program
    found = read(file(tmp_path, line.format(more="")))
    assert (
        found.given["precision"] == "fp16"
        and found.given["optimizer"] == "adamw_8bit"
        and found.beside == ()
    )
    found = read(file(tmp_path, line.format(more="--multi_gpu --num_processes 2")))
    assert found.beside == ("what several GPUs exchange",)


def test_a_damaged_file_and_one_that_names_no_program_are_said(tmp_path: Path) -> None:
    named = file(tmp_path, SDXL.format(more=""))
    (tmp_path / "data.toml").write_text("[[datasets]\n", encoding="utf-8")
    with pytest.raises(UserError, match="This is not TOML") as caught:
        read(named)
    assert caught.value.where == tmp_path / "data.toml"
    with pytest.raises(UserError, match="which program") as caught:
        read(file(tmp_path, 'pretrained_model_name_or_path = "mine.safetensors"\n', "own.toml"))
    assert "--config_file own.toml" in caught.value.write


def test_options_of_the_line_come_before_the_file(tmp_path: Path) -> None:
    named = file(tmp_path, DREAM.format(more=""))
    asked = question(
        read(named).model,
        parse([named, "--gpu", "4090", "-b", "2", "--set", "size=512"]),
        read(named),
    )
    assert (asked.values["micro_batch"], asked.values["size"], asked.values["rank"]) == (2, 512, 16)
    assert (
        "optimizer" not in asked.assumed and asked.file.program == "train_dreambooth_lora_flux.py"
    )


@pytest.mark.parametrize(
    ("text", "says", "field"),
    [
        (
            SDXL.format(more="--blocks_to_swap=18"),
            "the recipe unet_lora has no blocks_swapped",
            "blocks_to_swap",
        ),
        (SDXL.format(more="--fp8_base"), "`fp8_base` decides memory", "fp8_base"),
        (SDXL.format(more="--network_args conv_dim=8"), "another kind of adapter", "network_args"),
        (
            SDXL.format(more="--optimizer_type=Prodigy"),
            "No recipe has the optimizer Prodigy",
            "optimizer_type",
        ),
        (
            SDXL.format(more="--mixed_precision=int8"),
            "No recipe has the precision int8",
            "mixed_precision",
        ),
        (
            SDXL.format(more="--no_half_vae").replace("--cache_latents ", ""),
            "the VAE in fp32",
            "no_half_vae",
        ),
        (DREAM.format(more="--mixed_precision=no"), "computes in bf16", "mixed_precision"),
        (SDXL.format(more="").replace("data.toml", "gone.toml"), "a file that is not there", None),
        (DREAM.format(more="--resolution=wide"), "size of the images can't be read", "resolution"),
        (DREAM.format(more="--lora_layers=attn.to_k"), "adapters of other layers", "lora_layers"),
        (DREAM.format(more="").replace("_flux", "_sd3"), "has latents at hand", None),
    ],
)
def test_what_no_recipe_has_is_refused_by_name(
    text: str, says: str, field: str | None, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        command.main([file(tmp_path, text), "--gpu", "4090"])
    assert caught.value.field == field and caught.value.allowed


def test_other_files_are_left_to_others(tmp_path: Path) -> None:
    assert read(file(tmp_path, "accelerate launch train.py --model x\n")) is None
    assert read(file(tmp_path, "[project]\nname = 'x'\n", "pyproject.toml")) is None
    assert read("qwen2.5-coder-7b") is None and read(str(tmp_path / "none.sh")) is None
    assert read(file(tmp_path, '{"model_type": "llama", "hidden_size": 64}', "config.json")) is None
    assert (
        read(file(tmp_path, "[1]", "list.json")) is None
        and read(file(tmp_path, "{", "broken.json")) is None
    )


@pytest.mark.parametrize("tool", TABLE)
def test_the_table_names_settings_that_its_recipes_have(tool: str) -> None:
    table = TABLE[tool]
    own = {name for row in table["programs"].values() for name in recipe(row["recipe"]).settings}
    assert set(table["settings"].values()) <= own | {
        "precision"
    }  # which is bf16, where a recipe has none
    for row in table["programs"].values():
        recipe(row["recipe"]).checked(row.get("always", {}))
        for name in (row["model"], *row.get("sizes", ()), *row.get("flavours", {}).values()):
            assert name is None or find(name).recipe == row["recipe"]


@pytest.mark.parametrize(
    ("tool", "program"), [(tool, program) for tool in TABLE for program in TABLE[tool]["programs"]]
)
def test_what_takes_more_memory_is_a_setting_or_named_and_nothing_fits_beside_it(
    tool: str, program: str
) -> None:
    table, row = TABLE[tool], TABLE[tool]["programs"][program]
    cached = {"cache_latents": True, "cache_text_encoder_outputs": True}
    cached["pretrained_model_name_or_path"] = row["model"] or row["sizes"][0]
    precision = next(key for key, name in table["settings"].items() if name == "precision")
    cached[precision] = next(
        word for word, value in table["values"]["precision"].items() if value == "bf16"
    )
    own = recipe(row["recipe"]).settings
    for key, what in table["adds"].items():
        value = 512 if key == "samples" else True
        found = TrainerReading(table, row, {**cached, key: value}, Path("train.sh")).training(
            program
        )
        if key in own:
            assert found.given[key] == value
        elif key not in row.get("has", ()):
            assert found.beside == (what,)
            left_out = {"not_followed": found.beside, "adds": found.beside, "growth_bytes": 0}
            assert (
                Verdict(headroom_bytes=1 << 40).leaving_out(_omissions(left_out, 1 << 40)).word
                is Word.TOO_CLOSE
            )


# --- tools with files of their own ------------------------------------------------------------------------------------

PIPE = """dataset = 'data/set.toml'
epochs = 9
micro_batch_size_per_gpu = [[512, 4], [1024, 2]]
activation_checkpointing = 'unsloth'
blocks_to_swap = 20
blob = 3
[model]
type = 'wan'
ckpt_path = '/models/Wan2.1-T2V-14B'
dtype = 'bfloat16'
transformer_dtype = 'float8'
timestep_sample_method = 'logit_normal'
[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'
[optimizer]
type = 'AdamW8bitKahan'
lr = 2e-5
"""
PIPE_DATA = """resolutions = [512, [640, 480]]
frame_buckets = [1, 33]
[[directory]]
path = '/images'
[[directory]]
path = '/films'
frame_buckets = [17, 65]
"""
ONE = {
    "__version": 11,
    "training_method": "LORA",
    "model_type": "QWEN",
    "base_model_name": "Qwen/Qwen-Image",
    "batch_size": 2,
    "resolution": "512,768",
    "train_dtype": "BFLOAT_16",
    "lora_rank": 32,
    "learning_rate": 3e-4,
    "transformer": {
        "train": True,
        "weight_dtype": "FLOAT_8",
        "offload_fraction": 0.5,
        "activation_offloading": True,
    },
    "text_encoder": {"train": False, "weight_dtype": "FLOAT_8"},
    "optimizer": {"optimizer": "ADAMW_8BIT", "beta1": 0.9},
    "sample_after_unit": "NEVER",
    "ema": "CPU",
    "blob": 3,
    "samples": [{"width": 512}],
    "additional_embeddings": [],
    "quantization": {"svd_dtype": "NONE"},
}
SIMPLE = {
    "--model_family": "flux",
    "--model_type": "lora",
    "--model_flavour": "kontext",
    "--lora_rank": 8,
    "--data_backend_config": "config/multidatabackend.json",
    "--gradient_checkpointing": "true",
    "--resolution": 768,
    "--base_model_precision": "int8-quanto",
    "--optimizer": "optimi-lion",
    "--mixed_precision": "bf16",
    "--blob": 3,
    "--validation_prompt": "a cat",
    "--validation_resolution": "1024x768",
    "--learning_rate": "1e-4",
    "--musubi_blocks_to_swap": 10,
    "--train_batch_size": "1",
    "--use_ema": "true",
}
BACKENDS = [
    {
        "id": "a",
        "type": "local",
        "resolution": 0.25,
        "resolution_type": "area",
        "conditioning_data": ["b"],
    },
    {"id": "b", "type": "local", "dataset_type": "conditioning", "resolution": 2048},
    {"id": "c", "type": "local", "resolution": 1024, "disabled": True},
    {"id": "d", "type": "local", "resolution": 640, "train_batch_size": 3},
    {"id": "e", "dataset_type": "text_embeds", "default": True},
]


def pipe(folder: Path, **changes: str) -> str:
    (folder / "set.toml").write_text(PIPE_DATA, encoding="utf-8")
    text = PIPE
    for old, new in changes.items():
        text = re.sub(rf"^{old}.*$", new, text, flags=re.M)
    return file(folder, text, "wan.toml")


def one(folder: Path, **changes: object) -> str:
    return file(folder, json.dumps({**ONE, **changes}), "config.json")


def simple(folder: Path, data: object = BACKENDS, **changes: object) -> str:
    (folder / "multidatabackend.json").write_text(json.dumps(data), encoding="utf-8")
    return file(
        folder,
        json.dumps({**SIMPLE, **{f"--{name}": value for name, value in changes.items()}}),
        "config.json",
    )


def noted(found: TrainerFile) -> set[str]:
    return {note.partition(" ")[0].rstrip(":") for note in found.notes}


def test_a_file_of_diffusion_pipe_is_read_with_that_of_its_images(tmp_path: Path) -> None:
    found = read(pipe(tmp_path))
    assert (found.tool, found.recipe, found.model.name) == (
        "diffusion-pipe",
        "film_lora",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    )
    assert found.given == {
        "rank": 32,
        "micro_batch": 4,
        "height": 560,
        "width": 560,
        "frames": 65,
        "gradient_checkpointing": True,
        "optimizer": "adamw",
        "quantization": "fp8",
        "blocks_swapped": 20,
        "targets": "linear",
        "checkpoints": "host",
        "cached": "all",
    }
    assert found.beside == () and noted(found) == {"images", "optimizer.type", "blob"}
    changes = {"ckpt_path": "checkpoint_path = '/x.safetensors'", "type = 'wan'": "type = 'sdxl'"}
    sdxl = read(pipe(tmp_path, blocks="", transformer_dtype="", **changes))
    assert sdxl.given["texts_trained"] and sdxl.given["cached"] == "latents" and sdxl.beside == ()


def test_a_file_of_one_trainer_is_read_part_by_part(tmp_path: Path) -> None:
    found = read(one(tmp_path))
    assert (found.tool, found.program, found.recipe, found.model.name) == (
        "OneTrainer",
        "QWEN",
        "image_lora",
        "Qwen/Qwen-Image",
    )
    # 60 blocks, half of their weights offloaded, and a ring buffer of up to a tenth more than the other half.
    assert found.given == {
        "rank": 32,
        "micro_batch": 2,
        "size": 768,
        "gradient_checkpointing": True,
        "optimizer": "adamw_8bit",
        "quantization": "fp8",
        "base_precision": "16bit",
        "blocks_swapped": 26,
        "targets": "linear",
        "ema": False,
        "checkpoints": "host",
        "cached": "all",
    }
    assert found.beside == () and noted(found) == {"blob"}
    sdxl = read(
        one(
            tmp_path,
            model_type="STABLE_DIFFUSION_XL_10_BASE",
            unet={},
            text_encoder_2={"train": True},
        )
    )
    assert (sdxl.recipe, sdxl.given["cached"], sdxl.given["base_precision"]) == (
        "unet_lora",
        "latents",
        "fp32",
    )
    assert sdxl.given["texts_trained"] and sdxl.beside == ("adapters of convolutions",)
    older = one(
        tmp_path,
        gradient_checkpointing="CPU_OFFLOADED",
        layer_offload_fraction=0.9,
        optimizer="ADAFACTOR",
        transformer={"weight_dtype": "NFLOAT_4"},
        text_encoder={},
        sample_after_unit="STEP",
        sample_definition_file_name="gone.json",
    )
    assert (
        read(older).given["cached"] == "latents"
        and "adapters of the text encoders" in read(older).beside
    )
    older = json.loads(Path(older).read_text()) | {"text_encoder": {"train": False}}
    found = read(file(tmp_path, json.dumps(older), "older.json"))
    assert (
        found.given["blocks_swapped"],
        found.given["optimizer"],
        found.given["quantization"],
    ) == (53, "adafactor", "nf4")
    assert found.beside == ("images sampled between steps",)
    inline = {"sample_after_unit": "STEP", "sample_definition_file_name": None}
    for enabled in (True, False):
        samples = [{"width": 640, "enabled": enabled}]
        assert (
            "images sampled between steps" in read(one(tmp_path, **inline, samples=samples)).beside
        ) == enabled


def test_a_file_of_simple_tuner_is_read_with_that_of_its_data(tmp_path: Path) -> None:
    found = read(simple(tmp_path))
    assert (found.tool, found.program, found.model.name) == (
        "SimpleTuner",
        "flux",
        "black-forest-labs/FLUX.1-Kontext-dev",
    )
    assert found.given == {
        "rank": 8,
        "micro_batch": 3,
        "size": 640,
        "gradient_checkpointing": True,
        "optimizer": "adamw",
        "ema": False,
        "quantization": "quanto",
        "samples": 1024,
        "cached": "all",
        "adapter_precision": "fp32",
        "low_vram": False,
        "checkpoints": "card",
    }
    assert found.beside == () and noted(found) == {"optimizer", "musubi_blocks_to_swap", "blob"}
    assert read(simple(tmp_path, quantize_via="cpu")).given["low_vram"]
    sd3 = simple(
        tmp_path, model_family="sd3", model_flavour="medium", validation_prompt=None, data=[]
    )
    assert read(sd3).beside == ("weights in 16 bits on the card until they are quantized",)
    by_variables = "export MODEL_FAMILY='sdxl'\nTRAIN_BATCH_SIZE=2\nUSE_GRADIENT_CHECKPOINTING=true\nRESOLUTION=768\n"
    more = 'TRAINER_EXTRA_ARGS="--lora_rank=4 --resolution_type=pixel --train_text_encoder"\n'
    found = read(file(tmp_path, by_variables + more, "config.env"))
    assert (
        found.given["rank"] == 4
        and found.given["texts_trained"]
        and found.given["cached"] == "latents"
    )
    assert found.given["size"] == 768 and found.beside == (
        "sides longer than the resolution, which stands for the shorter one",
    )


def test_a_script_of_musubi_tuner_says_its_settings(tmp_path: Path) -> None:
    line = "accelerate launch src/musubi_tuner/wan_train_network.py --task t2v-14B --dit dit.safetensors --sdpa \\\n"
    line += "  --dataset_config data.toml --blocks_to_swap 18 --network_module networks.lora_wan --network_dim 32 \\\n"
    line += (
        "  --mixed_precision bf16 --gradient_checkpointing --optimizer_type adamw8bit --fp8_base\n"
    )
    found = read(file(tmp_path, line))
    assert found.model.name == "Wan-AI/Wan2.1-T2V-14B-Diffusers" and found.beside == ()
    assert (found.given["blocks_swapped"], found.given["rank"], found.given["quantization"]) == (
        18,
        32,
        "fp8",
    )
    assert found.given["frames"] == 1 and noted(found) == {"images"}


@pytest.mark.parametrize(
    ("made", "says", "field"),
    [
        (
            partial(pipe, ckpt_path="ckpt_path = '/models/Wan2.2-S2V-14B'"),
            "trains several sizes",
            None,
        ),
        (partial(pipe, dataset="dataset = 'gone.toml'"), "a file that is not there", None),
        (
            partial(pipe, epochs="pipeline_stages = 2"),
            "the model on several GPUs",
            "pipeline_stages",
        ),
        (partial(pipe, blocks="blocks_to_swap = 'many'"), "does not take many", "blocks_swapped"),
        (partial(pipe, micro="micro_batch_size_per_gpu = [4]"), "another type", None),
        (
            partial(pipe, transformer_dtype="transformer_dtype = 'int3'"),
            "quantization int3",
            "model.transformer_dtype",
        ),
        (partial(one, model_type="SANA"), "architecture SANA", "model_type"),
        (partial(one, training_method="EMBEDDING"), "another kind of training", "training_method"),
        (partial(one, peft_type="OFT_2"), "another kind of adapter", "peft_type"),
        (partial(one, multi_gpu=True), "several GPUs", "multi_gpu"),
        (
            partial(one, optimizer={"fused_back_pass": True}),
            "within the backward pass",
            "optimizer.fused_back_pass",
        ),
        (partial(one, resolution="wide"), "size of the images can't be read", "resolution"),
        (partial(one, transformer={"offload_fraction": "half"}), "another type", None),
        (
            partial(simple, model_flavour="fluxbooru"),
            "flux fluxbooru is not at hand",
            "model_flavour",
        ),
        (partial(simple, model_family="hidream"), "architecture hidream", "model_family"),
        (partial(simple, lora_type="lycoris"), "another kind of adapter", "lora_type"),
        (partial(simple, ramtorch=True), "layers lie on the host", "ramtorch"),
        (
            partial(simple, base_model_precision="int2-quanto"),
            "quantization int2-quanto",
            "base_model_precision",
        ),
        (partial(simple, train_batch_size="two", data=[]), "does not take two", "micro_batch"),
        (partial(simple, data_backend_config="gone.json"), "a file that is not there", None),
    ],
)
def test_what_no_recipe_has_of_other_tools_is_refused_by_name(
    made, says: str, field: str | None, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        command.main([made(tmp_path), "--gpu", "4090"])
    assert caught.value.field == field and caught.value.allowed


def test_blocks_that_are_trained_do_not_wait_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "find_spec", lambda name: True)
    found = read(one(tmp_path, training_method="FINE_TUNE", ema="OFF"))
    with pytest.raises(UserError, match="`blocks_swapped` of the recipe image_lora needs `rank`"):
        follow.check(recipe(found.recipe), found.model, {"blocks_swapped": 26, **found.given})
