"""Files of programs that train images, read into settings of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from dryfit.ask import command
from dryfit.ask.recipe import question
from dryfit.ask.words import parse
from dryfit.common.errors import UserError
from dryfit.common.files import read_yaml
from dryfit.data import data_path
from dryfit.recipes.recipe import recipe
from dryfit.recipes.trainers import read

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
    assert (found.recipe, found.model.name) == ("unet_lora", "stabilityai/stable-diffusion-xl-base-1.0")
    assert found.given == {
        "rank": 32, "micro_batch": 4, "size": 896, "precision": "bf16", "gradient_checkpointing": True,
        "optimizer": "adamw_8bit", "cached": "all", "targets": "linear", "adapter_precision": "fp32",
    }  # fmt: skip
    assert found.beside == ()
    less = read(file(tmp_path, SDXL.format(more="--full_bf16 --no_half_vae --optimizer_type=Adafactor")))
    assert (less.given["adapter_precision"], less.given["optimizer"]) == ("16bit", "adafactor")
    assert [note.partition(" ")[0] for note in found.notes] == ["images", "blob:", "~/sd_xl_base_1.0.safetensors"]


def test_a_configuration_file_is_that_of_the_program_that_its_network_needs(tmp_path: Path) -> None:
    found = read(file(tmp_path, FLUX, "flux.toml"))
    assert (found.program, found.model.name) == ("flux_train_network.py", "black-forest-labs/FLUX.1-dev")
    assert found.given["quantization"] == "fp8" and found.given["cached"] == "latents" and found.given["size"] == 512
    assert found.beside == ("adapters of the text encoders",), "--network_train_unet_only is not set"
    by_name = file(tmp_path, "accelerate launch flux_train_network.py --config_file flux --network_dim 4\n")
    assert read(by_name).given == found.given | {"rank": 4}


def test_an_example_of_diffusers_has_its_own_defaults(tmp_path: Path) -> None:
    found = read(file(tmp_path, DREAM.format(more="--validation_prompt='a dog'")))
    assert found.given == {
        "rank": 16, "micro_batch": 1, "size": 768, "gradient_checkpointing": True, "optimizer": "adamw_8bit",
        "cached": "texts",
    }  # fmt: skip
    assert found.beside == ("images sampled between epochs",) and found.notes == ()
    plain = read(file(tmp_path, "python train_text_to_image_lora_sdxl.py --mixed_precision fp16\n"))
    assert (plain.given["micro_batch"], plain.given["size"], plain.given["rank"]) == (16, 1024, 4)
    assert plain.given["cached"] == "none" and "targets" not in plain.given


def test_a_file_of_ai_toolkit_is_read_key_by_key(tmp_path: Path) -> None:
    found = read(file(tmp_path, TOOLKIT, "mine.yaml"))
    assert (found.tool, found.program, found.recipe) == ("ai-toolkit", "flux", "flux_lora")
    assert found.given == {
        "rank": 16, "micro_batch": 2, "size": 768, "gradient_checkpointing": True, "optimizer": "adamw_8bit",
        "quantization": "quanto", "low_vram": False, "samples": 1024, "ema": True, "targets": "linear",
        "adapter_precision": "fp32", "cached": "latents",
    }  # fmt: skip
    assert found.beside == () and [note.partition(":")[0] for note in found.notes] == ["train.blob"]
    films = TOOLKIT.replace("is_flux: true", "arch: wan21").replace("batch_size: 2", "unload_text_encoder: true")
    films = read(file(tmp_path, films.replace("FLUX.1-dev", "none").replace("black-forest-labs", "own"), "films.yaml"))
    assert (films.recipe, films.given["height"], films.given["frames"]) == ("film_lora", 768, 1)
    assert films.beside == ("images sampled between steps", "averaged weights of the adapters")
    assert read(file(tmp_path, "base_model: a\n", "axolotl.yaml")) is None
    assert read(file(tmp_path, "a: [\n", "broken.yaml")) is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("is_flux: true", "arch: hidream", "No recipe trains the architecture hidream"),
        ("is_flux: true", "is_lumina2: true", "No recipe trains the architecture is_lumina2"),
        ("quantize: true", "quantize: true, qtype: uint3", "does not take uint3"),
        ("quantize: true", "quantize: true, quantize_te: false", "text encoders in 16 bits"),
        ("quantize: true", "layer_offloading: true", "layers lie on the host"),
        ("linear: 16,", "linear: 16, network_kwargs: {only_if_contains: [a]},", "adapters of other layers"),
        ("is_flux: true", "is_v3: true", "has latents and embeddings of texts at hand"),
        ("adamw8bit", "prodigy", "No recipe has the optimizer prodigy"),
    ],
)
def test_what_no_recipe_has_of_ai_toolkit_is_refused_by_name(old: str, new: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        read(file(tmp_path, TOOLKIT.replace(old, new), "mine.yaml"))


def test_what_accelerate_is_told_counts_too(tmp_path: Path) -> None:
    program = "train_text_to_image_lora.py --use_8bit_adam --optimizer=AdamW\n"
    line = "accelerate launch --mixed_precision=fp16 {more} " + program
    found = read(file(tmp_path, line.format(more="")))
    assert found.given["precision"] == "fp16" and found.given["optimizer"] == "adamw_8bit" and found.beside == ()
    found = read(file(tmp_path, line.format(more="--multi_gpu --num_processes 2")))
    assert found.beside == ("what several GPUs exchange",)


def test_a_damaged_dataset_file_is_named(tmp_path: Path) -> None:
    named = file(tmp_path, SDXL.format(more=""))
    (tmp_path / "data.toml").write_text("[[datasets]\n", encoding="utf-8")
    with pytest.raises(UserError, match="can't be read as TOML") as caught:
        read(named)
    assert caught.value.where == tmp_path / "data.toml"


def test_options_of_the_line_come_before_the_file(tmp_path: Path) -> None:
    named = file(tmp_path, DREAM.format(more=""))
    asked = question(read(named).model, parse([named, "--gpu", "4090", "-b", "2", "--set", "size=512"]), read(named))
    assert (asked.values["micro_batch"], asked.values["size"], asked.values["rank"]) == (2, 512, 16)
    assert "optimizer" not in asked.assumed and asked.file.program == "train_dreambooth_lora_flux.py"


@pytest.mark.parametrize(
    ("text", "says", "field"),
    [
        (SDXL.format(more="--blocks_to_swap=18"), "`blocks_to_swap` decides memory", "blocks_to_swap"),
        (SDXL.format(more="--fp8_base"), "`fp8_base` decides memory", "fp8_base"),
        (SDXL.format(more="--network_args conv_dim=8"), "another kind of adapter", "network_args"),
        (SDXL.format(more="--optimizer_type=Prodigy"), "No recipe has the optimizer Prodigy", "optimizer_type"),
        (SDXL.format(more="--mixed_precision=int8"), "does not take int8", "precision"),
        (SDXL.format(more="--no_half_vae").replace("--cache_latents ", ""), "the VAE in fp32", "no_half_vae"),
        (DREAM.format(more="--mixed_precision=fp16"), "computes in bf16", "mixed_precision"),
        (SDXL.format(more="").replace("data.toml", "gone.toml"), "a file that is not there", None),
        (DREAM.format(more="--resolution=wide"), "size of the images can't be read", "resolution"),
        (DREAM.format(more="--lora_layers=attn.to_k"), "adapters of other layers", "lora_layers"),
        (DREAM.format(more="").replace("_flux", "_sd3"), "has latents and embeddings of texts at hand", None),
    ],
)
def test_what_no_recipe_has_is_refused_by_name(text: str, says: str, field: str | None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as caught:
        command.main([file(tmp_path, text), "--gpu", "4090"])
    assert caught.value.field == field and caught.value.allowed


def test_a_configuration_that_does_not_say_its_program_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which program") as caught:
        read(file(tmp_path, 'pretrained_model_name_or_path = "mine.safetensors"\n', "own.toml"))
    assert "--config_file own.toml" in caught.value.write


def test_other_files_are_left_to_others(tmp_path: Path) -> None:
    assert read(file(tmp_path, "accelerate launch train.py --model x\n")) is None
    assert read(file(tmp_path, "[project]\nname = 'x'\n", "pyproject.toml")) is None
    assert read("qwen2.5-coder-7b") is None and read(str(tmp_path / "none.sh")) is None


@pytest.mark.parametrize("tool", TABLE)
def test_the_table_names_settings_that_its_recipes_have(tool: str) -> None:
    table = TABLE[tool]
    own = {name for row in table["programs"].values() for name in recipe(row["recipe"]).settings}
    assert set(table["settings"].values()) <= own
    for row in table["programs"].values():
        recipe(row["recipe"]).checked(row.get("always", {}))
