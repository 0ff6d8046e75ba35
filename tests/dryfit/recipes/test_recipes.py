"""Models that continue no text, by name: their recipes, what a line says wrong, and the answers."""

import ast
import json
import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dryfit.ask import command
from dryfit.ask.recipe import RecipeQuestion, question
from dryfit.ask.words import parse
from dryfit.common.errors import UserError
from dryfit.recipes import follow
from dryfit.recipes.models import CONFIG, find, known
from dryfit.recipes.recipe import FOLDER, recipe, recipes

ROOT = Path(__file__).parents[3]


def asked(*words: str) -> RecipeQuestion:
    return question(find(words[0]), parse(words))


def answered(folder: Path, *words: str) -> dict:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DRYFIT_CACHE": "", "HF_HUB_OFFLINE": "1"}
    start = [sys.executable, "-P", "-m", "dryfit.ask.command"]
    done = subprocess.run(
        [*start, *words, "--json"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_a_short_program_with_settings(name: str) -> None:
    one = recipe(name)
    written = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    statements = [node for node in ast.walk(ast.parse(written)) if isinstance(node, ast.stmt)]
    assert len(statements) <= 100
    assert one.about.endswith(".")
    assert one.assumptions
    assert {"model", "micro_batch", "optimizer"} <= {
        *one.settings,
        "optimizer" if name.startswith("timm") else "",
    }
    assert {*one.limits, *one.multiples} <= set(one.settings)
    assert {each for spare in one.spares for each in spare} <= set(one.settings)
    changed = {each.name: each.choices[-1] for each in one.settings.values() if each.choices}
    changed |= {
        each.name: each.value + 1 for each in one.settings.values() if type(each.value) is int
    }
    text = one.program(changed | {"model": "someone/something"})
    found = {node.targets[0].id: node.value for node in ast.parse(text).body if _is_setting(node)}
    assert {key: ast.literal_eval(found[key]) for key in changed} == changed
    assert len(text.splitlines()) == len(one.text.splitlines())
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert len(set(imports)) == len(imports) and "from parts" not in text


def _is_setting(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.targets[0], ast.Name)
    )


def test_the_table_has_every_program_and_a_part_says_what_its_settings_mean() -> None:
    assert set(recipes()) == {path.stem for path in FOLDER.glob("*.py")}
    of_video, of_image = (
        " ".join(recipe(name).assumptions) for name in ("video_lora", "image_lora")
    )
    assert "blocks_swapped: " in of_video and "quantization: " not in of_video
    assert all(
        of_image.count(f"{name}: ") == 1
        for name in ("blocks_swapped", "quantization", "text_millions")
    )


@pytest.mark.parametrize("name", known())
def test_a_known_model_has_a_recipe_and_a_source(name: str) -> None:
    model = find(name)
    assert (
        model.recipe in recipes() and model.source and find(name.partition("/")[2].lower()) == model
    )


MILLIONS = {
    "image_classification": "AutoModel",
    "segmentation": "AutoModelForSemanticSegmentation",
    "object_detection": "AutoModelForObjectDetection",
    "speech_to_text": "AutoModel",
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", known())
def test_a_configuration_has_the_parameters_that_its_authors_count(name: str) -> None:
    import torch

    model, package = find(name), recipe(find(name).recipe).package
    if package and package != "sentence_transformers":
        pytest.importorskip(package)
    with torch.device("meta"):
        if model.kind == "timm":
            import timm

            made = timm.create_model(name.partition("/")[2])
        elif CONFIG not in model.files:
            import diffusers

            part = next(
                config
                for path, config in model.files.items()
                if path.startswith(("unet", "transformer"))
            )
            made = getattr(diffusers, part["_class_name"]).from_config(part)
        else:
            import transformers

            kind = getattr(transformers, MILLIONS.get(model.recipe, "AutoModel"))
            made = kind.from_config(transformers.AutoConfig.for_model(**model.config))
    count = sum(weight.numel() for weight in made.parameters()) / 1e6
    assert count == pytest.approx(known()[name]["millions"], rel=0.01)


# --- lines ------------------------------------------------------------------------------------------------------------


def test_options_are_the_recipes_settings() -> None:
    whisper = asked("openai/whisper-large-v3", "--gpu", "t4", "-b", "8")
    assert whisper.recipe.name == "speech_to_text" and whisper.values["micro_batch"] == 8
    assert (
        whisper.values["precision"] == "fp16" and "precision" in whisper.assumed
    )  # a T4 computes bf16 slowly
    assert "micro_batch" not in whisper.assumed
    embedder = asked(
        "BAAI/bge-m3", "-b", "64", "-s", "512", "--method", "lora", "--set", "chunk=16"
    )
    given = {"micro_batch": 64, "sequence_length": 512, "rank": 16, "chunk": 16}
    assert embedder.recipe.name == "bi_encoder" and given.items() <= embedder.values.items()
    flux = asked(
        "black-forest-labs/FLUX.1-dev", "--gpu", "4090", "--method", "qlora", "--set", "size=768"
    )
    assert (
        flux.recipe.name == "flux_lora"
        and flux.values["quantization"] == "nf4"
        and flux.values["size"] == 768
    )
    assert asked("timm/some_model.tag").recipe.name == "timm_classification"
    assert asked("stable-diffusion-v1-5", "--method", "full").values["rank"] == 0
    edit = asked("Qwen/Qwen-Image-Edit", "--set", "quantization=int8-quanto")
    assert (edit.values["references"], edit.values["quantization"]) == (1, "quanto"), (
        "the model's own, and another word"
    )
    assert (
        asked("BAAI/bge-m3", "--recipe", "text-classification").recipe.name == "text_classification"
    )


@pytest.mark.parametrize(
    ("line", "write"),
    [
        (
            "sdxl lora 12gb 3060 batch 2",
            "stabilityai/stable-diffusion-xl-base-1.0 --method lora --gpu rtx-3060-12gb -b 2",
        ),
        ("flux lora 4090", "black-forest-labs/FLUX.1-dev --method lora --gpu rtx-4090"),
        (
            "'train a flux.1 dev lora of rank 32 on a 4090'",
            "black-forest-labs/FLUX.1-dev --method lora --set lora.rank=32 --gpu rtx-4090",
        ),
        ("bert base batch 32 on a t4", "google-bert/bert-base-uncased -b 32 --gpu t4"),
        ("sd 3.5 medium on a 4090", "stabilityai/stable-diffusion-3.5-medium --gpu rtx-4090"),
        (
            "sdxl lora 1024 4090",
            "stabilityai/stable-diffusion-xl-base-1.0 --method lora -s 1024 --gpu rtx-4090",
        ),
    ],
)
def test_a_question_in_plain_words_is_read_as_a_line_that_is_right(
    line: str, write: str, capsys
) -> None:
    assert command.main([*shlex.split(line), "--yaml"]) == 0
    assert capsys.readouterr().out.startswith(f"# Read as: dryfit {write} --yaml\n")
    assert asked(*shlex.split(write)).recipe


def test_a_question_whose_card_may_be_two_is_refused_with_the_line_of_one() -> None:
    with pytest.raises(UserError) as caught:
        command.main("whisper large v3 3060".split())
    assert caught.value.write == "dryfit openai/whisper-large-v3 --gpu rtx-3060-12gb"


@pytest.mark.parametrize(
    ("words", "says", "write"),
    [
        (
            ["openai/whisper-tiny", "--set", "answer_token=4"],
            "no setting `answer_token`",
            "--set answer_tokens=4",
        ),
        (["openai/whisper-tiny", "-s", "4"], "no setting `sequence_length`", None),
        (["openai/whisper-tiny", "--set", "model=x"], "no setting `model`", None),
        (
            ["openai/whisper-tiny", "--set", "optimizer=adam8"],
            "does not take adam8",
            "--set optimizer=adamw",
        ),
        (["openai/whisper-tiny", "--set", "rank=true"], "does not take true", "--set rank=0"),
        (["openai/whisper-tiny", "--set", "rank"], "takes setting=value", "--set micro_batch=2"),
        (["FLUX.1-dev", "--set", "size=1000"], "does not take 1000", "--set size=992"),
        (["openai/whisper-tiny", "--quick"], "does not use --quick", None),
        (["openai/whisper-tiny", "--rows", "9"], "does not use --rows", None),
        (
            ["openai/whisper-tiny", "--gpu", "2x4090"],
            "runs on one GPU",
            "dryfit run --gpus 2 --gpu rtx-4090 train.py",
        ),
        (
            ["openai/whisper-tiny", "--recipe", "speach_to_text"],
            "no such recipe",
            "--recipe speech_to_text",
        ),
    ],
)
def test_what_a_line_says_wrong(words: list[str], says: str, write: str | None) -> None:
    with pytest.raises(UserError, match=says) as caught:
        command.main(words)
    assert caught.value.allowed and (write is None or caught.value.write == write)


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (["bert-base-uncased", "-s", "513"], 512),
        (["FacebookAI/roberta-base", "-s", "513"], 512),
        (["openai/whisper-tiny", "--set", "answer_tokens=449"], 448),
        (["BAAI/bge-reranker-v2-m3", "-s", "8193"], 8192),
        (["microsoft/deberta-v3-base", "-s", "4096"], None),
    ],
)
def test_a_size_that_the_model_has_no_positions_for(
    words: list[str], most: int | None, monkeypatch
) -> None:
    monkeypatch.setattr(follow, "find_spec", lambda name: True)
    one = asked(*words)
    if most is None:
        return follow.check(one.recipe, one.model, one.values)
    with pytest.raises(UserError, match=f"{most:,} at most"):
        follow.check(one.recipe, one.model, one.values)


def test_a_recipe_whose_package_is_missing_names_what_installs_it(monkeypatch) -> None:
    monkeypatch.setattr(follow, "find_spec", lambda name: None)
    for name, extra in (
        ("FLUX.1-dev", "diffusion"),
        ("BAAI/bge-m3", "embeddings"),
        ("timm/resnet50", "vision"),
    ):
        one = asked(name)
        with pytest.raises(UserError, match="not installed") as caught:
            follow.check(one.recipe, one.model, one.values)
        assert caught.value.write == f'pip install "dryfit[{extra}]"'


def test_the_list_and_the_program(capsys) -> None:
    assert command.main(["BAAI/bge-m3", "--recipe", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(recipes()) and lines[0].startswith("* bi_encoder")
    assert command.main(["--recipe", "list"]) == 0
    assert not any(line.startswith("*") for line in capsys.readouterr().out.splitlines())
    assert command.main(["openai/whisper-tiny", "-b", "3", "--yaml"]) == 0
    text = capsys.readouterr().out
    assert "micro_batch = 3  #" in text and 'model = "openai/whisper-tiny"' in text
    compile(text, "program", "exec")


# --- folders and names ------------------------------------------------------------------------------------------------


def in_folder(folder: Path, **files: object) -> str:
    for name, content in files.items():
        file = folder / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def test_a_folder_says_by_its_files_what_trains_it(tmp_path: Path) -> None:
    ranker = {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "x"},
    }
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [None, None]}
    files = {
        "speech_to_text": {"config": {"model_type": "whisper"}},
        "bi_encoder": {"config": {"model_type": "bert"}, "modules": []},
        "cross_encoder": {"config": ranker},
        "unet_lora": {
            "model_index": {"_class_name": "StableDiffusionPipeline", **parts},
            "unet__config": {"a": 1},
        },
    }
    for name, content in files.items():
        (tmp_path / name).mkdir()
        assert find(in_folder(tmp_path / name, **content)).recipe == name
    assert set(find(str(tmp_path / "unet_lora")).files) == {"model_index.json", "unet/config.json"}
    assert (
        find(
            in_folder(
                tmp_path, config={"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            )
        )
        is None
    )


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"model_index": {"_class_name": "Own", "unet": ["my_module", "MyUNet"]}},
            "code of its own.*unet",
        ),
        (
            {
                "config": {
                    "model_type": "own",
                    "architectures": ["OwnForMaskedLM"],
                    "auto_map": {"AutoModel": "x"},
                }
            },
            "code of its own",
        ),
        ({"config": {"model_type": "clip", "vision_config": {}}}, "compares texts with images"),
    ],
)
def test_a_model_that_no_recipe_runs_leads_to_the_program_that_does(
    files, says, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        command.main([in_folder(tmp_path, **files), "--gpu", "4090"])
    assert caught.value.write.startswith("dryfit run") and caught.value.write.endswith("train.py")


def test_a_name_without_a_configuration(monkeypatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # read from the environment at its import
    with pytest.raises(UserError, match=r"turns speech.*not at hand") as caught:
        command.main(["openai/whisper-huge", "--gpu", "4090"])
    assert caught.value.write.startswith("dryfit openai/whisper-")
    assert (
        find("qwen2.5-coder-7b") is None
        and find("Qwen/Qwen3-8B") is None
        and find("someone/unheard-of") is None
    )


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_model_by_name_is_answered_with_its_recipe(tmp_path: Path) -> None:
    answer = answered(tmp_path, "openai/whisper-tiny", "--gpu", "t4", "-b", "2")
    assert answer["verdict"] == "fits" and answer["sentence"].startswith(
        "FITS: openai/whisper-tiny needs"
    )
    assert answer["trace"]["components"]["weights_fp32"] == 4 * 37_760_640
    told = answer["recipe"]
    assert (told["name"], told["model"]) == ("speech_to_text", "openai/whisper-tiny")
    assert (
        told["settings"]["micro_batch"] == 2
        and "micro_batch" not in told["assumed"]
        and told["assumptions"]
    )
    assert told["program"] == recipe("speech_to_text").program(
        {"model": "openai/whisper-tiny", **told["settings"]}
    )
    assert answer["program"]["updates"] == 2 and not list(tmp_path.iterdir())


@pytest.mark.nightly
def test_what_would_fit_is_in_the_words_of_the_recipe(tmp_path: Path) -> None:
    answer = answered(
        tmp_path, "bert-base-uncased", "--gpu", "2GiB", "-b", "8", "-s", "128", "--suggest"
    )
    assert answer["verdict"] == "does_not_fit"
    rows = answer["suggestions"]
    assert rows[0]["changes"] == {"gradient_checkpointing": True}
    assert rows[-1]["verdict"] == "fits" and all(row["verdict"] != "fits" for row in rows[:-1])
    assert all(row["command"].startswith("dryfit bert-base-uncased --gpu 2GiB") for row in rows)


@pytest.mark.thorough
def test_sizes_that_do_not_go_together_are_said_in_our_words(tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"vit-base-patch16-224 can't take such a step: Input image size \(250"
    ):
        answered(tmp_path, "google/vit-base-patch16-224", "--set", "size=250")


SMALL = {
    "bi_encoder": (
        "sentence-transformers/all-MiniLM-L6-v2",
        "-b",
        "4",
        "-s",
        "64",
        "--set",
        "chunk=2",
    ),
    "cross_encoder": ("sentence-transformers/all-MiniLM-L6-v2", "-b", "2", "-s", "64"),
    "image_classification": ("microsoft/resnet-50", "-b", "2"),
    "object_detection": ("facebook/detr-resnet-50", "-b", "1", "--set", "size=128"),
    "segmentation": ("nvidia/mit-b0", "-b", "1", "--set", "size=128"),
    "speech_ctc": ("facebook/wav2vec2-base-960h", "-b", "1", "--set", "seconds=2"),
    "text_to_text": ("facebook/bart-large", "-b", "1", "-s", "64"),
    "timm_classification": ("timm/resnet50.a1_in1k", "-b", "2"),
    "unet_lora": (
        "stable-diffusion-v1-5",
        "--set",
        "size=128",
        "--set",
        "cached=latents",
        "--set",
        "ema=true",
        "--set",
        "texts_trained=true",
    ),
}


# Pipelines of one small block of each kind, with the settings that the name asks for.
TINY = {
    "QwenImagePipeline": (
        "image_lora",
        {
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": [4, 6, 6],
        },
        ("size=64", "references=1"),
    ),
    "ZImagePipeline": (
        "image_lora",
        {
            "dim": 64,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 32,
            "axes_dims": [8, 12, 12],
        },
        ("size=64", "quantization=quanto"),
    ),
    "Flux2Pipeline": (
        "image_lora",
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": [4, 4, 4, 4],
        },
        ("size=64", "targets=linear"),
    ),
    "WanPipeline": (
        "film_lora",
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "ffn_dim": 64,
            "text_dim": 32,
            "in_channels": 48,
            "out_channels": 48,
        },
        ("quantization=fp8",),
    ),
    "WanImageToVideoPipeline": (
        "film_lora",
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "ffn_dim": 64,
            "text_dim": 32,
            "in_channels": 36,
        },
        (),
    ),
    "HunyuanVideo15Pipeline": (
        "film_lora",
        {
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "text_embed_dim": 32,
            "text_embed_2_dim": 32,
            "image_embed_dim": 32,
            "rope_axes_dim": [4, 6, 6],
        },
        ("cached=latents", "text_millions=1"),
    ),
    "ChromaPipeline": (
        "image_lora",
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": [8, 12, 12],
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 32,
            "approximator_layers": 1,
        },
        ("size=64", "quantization=uint3"),
    ),
    "HunyuanVideoPipeline": (
        "film_lora",
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "text_embed_dim": 32,
            "pooled_projection_dim": 32,
            "rope_axes_dim": [4, 6, 6],
        },
        ("quantization=quanto",),
    ),
    "LTXPipeline": (
        "film_lora",
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 32,
        },
        ("targets=linear",),
    ),
}
CLASSES = {
    "QwenImagePipeline": "QwenImageTransformer2DModel",
    "ZImagePipeline": "ZImageTransformer2DModel",
    "Flux2Pipeline": "Flux2Transformer2DModel",
    "WanPipeline": "WanTransformer3DModel",
    "WanImageToVideoPipeline": "WanTransformer3DModel",
    "ChromaPipeline": "ChromaTransformer2DModel",
    "HunyuanVideo15Pipeline": "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoPipeline": "HunyuanVideoTransformer3DModel",
    "LTXPipeline": "LTXVideoTransformer3DModel",
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind == "ZImagePipeline" else pytest.mark.nightly)
        for kind in TINY
    ],
)
def test_a_transformer_of_diffusers_takes_its_step(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="make test-recipes")
    name, config, more = TINY[kind]
    index = {"_class_name": kind, "transformer": ["diffusers", CLASSES[kind]]}
    folder = in_folder(
        tmp_path, model_index=index, transformer__config={"_class_name": CLASSES[kind], **config}
    )
    size = () if name == "image_lora" else ("frames=9", "height=64", "width=64")
    answer = answered(
        tmp_path, folder, "-b", "2", *(word for each in (*size, *more) for word in ("--set", each))
    )
    assert answer["recipe"]["name"] == name and answer["program"]["updates"] == 2


@pytest.mark.nightly
def test_blocks_that_wait_on_the_host_take_no_memory(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="make test-recipes")
    _, config, _ = TINY["LTXPipeline"]
    config = {
        "_class_name": CLASSES["LTXPipeline"],
        **config,
        "num_layers": 6,
        "num_attention_heads": 32,
        "cross_attention_dim": 512,
    }
    index = {"_class_name": "LTXPipeline", "transformer": ["diffusers", CLASSES["LTXPipeline"]]}
    folder = in_folder(tmp_path, model_index=index, transformer__config=config)
    sizes = ("frames=9", "height=64", "width=64", "rank=1")
    line = folder, "--gpu", "2GiB", *(word for each in sizes for word in ("--set", each))
    without, waiting = (
        answered(tmp_path, *line, "--set", f"blocks_swapped={count}") for count in (0, 4)
    )
    weights = [answer["trace"]["components"]["weights_bf16"] for answer in (without, waiting)]
    width, inner = 512, 2048
    matrices = (
        8 * width * width + 2 * width * inner
    )  # of a block: two attentions, two layers; biases and norms stay
    assert weights[0] - weights[1] == pytest.approx(4 * 2 * matrices, rel=0.01)
    hosted = answered(tmp_path, *line, "--set", "blocks_swapped=4", "--set", "checkpoints=host")
    assert hosted["program"]["updates"] == 2
    with pytest.raises(
        AssertionError, match=r"can't take such a step: it can swap 4 blocks at most, not 5"
    ):
        answered(tmp_path, *line, "--set", "blocks_swapped=5")


def test_weights_that_take_turns_compute_what_all_of_them_do() -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    text = (FOLDER / "parts" / "block_swap.py").read_text(encoding="utf-8")
    found: dict = {}
    exec(
        text.replace(".cuda()", ".clone()")
        .replace(".cpu()", ".clone()")
        .replace("block.clone()", "block"),
        found,
    )

    def network(checkpointed: bool, places: int | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(0)
        blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(5)).requires_grad_(False)
        if places:
            found["share_places"](blocks, places, checkpointed)
            stay = {each.weight.data_ptr() for each in blocks[:places]}
        inputs = torch.randn(2, 4, requires_grad=True)
        hidden = inputs
        for block in blocks:
            run = lambda each, block=block: block(each).tanh()  # noqa: E731
            hidden = checkpoint(run, hidden, use_reentrant=False) if checkpointed else run(hidden)
            assert not places or block.weight.data_ptr() in stay, (
                "a block computes where another one lay"
            )
        hidden.sum().backward()
        return hidden, [inputs.grad]

    for checkpointed in (True, False):
        for places in (2, 3):
            outputs, gradients = network(checkpointed, places)
            expected, usual = network(checkpointed, None)
            assert torch.equal(outputs, expected) and torch.equal(gradients[0], usual[0])


def test_checkpoints_on_the_host_give_the_same_gradients() -> None:
    import torch

    text = (FOLDER / "parts" / "host_checkpoints.py").read_text(encoding="utf-8")
    found: dict = {}
    exec(
        text.replace(".cuda()", ".clone()")
        .replace(".cpu()", ".clone()")
        .replace('"cuda"', '"cpu"'),
        found,
    )

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(4, 4) for _ in range(3)]
        hidden, others = torch.randn(2, 4), torch.randn(2, 4)
        with torch.autocast("cpu", torch.bfloat16):
            for layer in layers:

                def block(first, second, none, layer=layer):
                    return (
                        layer(first).tanh(),
                        layer(second) + first,
                    )

                arguments = block, hidden, others, None
                hidden, others = (
                    found["checkpointed_on_the_host"](*arguments)
                    if checkpointed
                    else block(*arguments[1:])
                )
        (hidden.float().sum() + others.float().sum()).backward()
        return [layer.weight.grad for layer in layers]

    assert all(map(torch.equal, gradients(True), gradients(False)))


def test_a_weight_in_8_bits_computes_what_quanto_does() -> None:
    import torch

    found: dict = {}
    exec((FOLDER / "parts" / "eight_bits.py").read_text(encoding="utf-8"), found)
    layer = torch.nn.Linear(3, 2).requires_grad_(False)
    layer.weight.data = torch.tensor([[448.0, 2.0, -1.0], [224.0, 112.0, 56.0]])
    inputs = torch.randn(4, 3, requires_grad=True)
    expected = layer(inputs)
    gradient = torch.autograd.grad(expected.sum(), inputs)[0]
    found["in_eight_bits"](layer)
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.row_scales.flatten().tolist() == [
        1.0,
        0.5,
    ]
    assert torch.equal(layer(inputs), expected), "these weights are exact in 8 bits"
    assert torch.equal(torch.autograd.grad(layer(inputs).sum(), inputs)[0], gradient)


@pytest.mark.parametrize("bits", range(2, 8))
def test_a_weight_in_fewer_bits_is_off_by_half_a_step_at_most(bits: int) -> None:
    import torch

    found: dict = {}
    exec((FOLDER / "parts" / "eight_bits.py").read_text(encoding="utf-8"), found)
    layer, other = (torch.nn.Linear(width, 3).requires_grad_(False) for width in (128, 65))
    before, inputs = layer.weight.clone(), torch.randn(4, 128, requires_grad=True)
    for each in (layer, other):
        found["in_few_bits"](each, bits)
    now = found["whole"](layer, bits)
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == 3 * 128 * bits // 8
    assert (
        now - before
    ).abs().max() <= 0.51 * layer.group_scales.max() and other.weight.dtype == torch.float32
    assert torch.equal(layer(inputs), torch.nn.functional.linear(inputs, now, layer.bias))
    assert torch.allclose(
        torch.autograd.grad(layer(inputs).sum(), inputs)[0], now.sum(0).expand(4, -1)
    )


EACH_TIME = {"bi_encoder", "timm_classification", "unet_lora"}  # one of each package


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in EACH_TIME else pytest.mark.nightly) for name in SMALL],
)
def test_a_recipe_runs(name: str, tmp_path: Path) -> None:
    package = recipe(name).package
    if package and find_spec(package) is None:
        pytest.skip(f"{package} is not installed: make test-recipes")
    answer = answered(tmp_path, *SMALL[name], "--recipe", name, "--gpu", "h200")
    assert answer["program"]["updates"] == 2 and answer["trace"]["phases"].keys() >= {
        "forward",
        "backward",
        "optimizer",
    }
    assert any("unread-others.csv" in part["evidence"] for part in answer["margin"]["parts"]), (
        "as any recipe has it"
    )


@pytest.mark.parametrize(
    ("now", "usable", "few"), [(0, 1600, 16), (10, 1600, 26), (0, 4000, 1), (0, 800, 30)]
)
def test_as_few_blocks_wait_on_the_host_as_spare_what_is_missing(
    now: int, usable: int, few: int
) -> None:
    """Thirty more spare 900 of 2,000 bytes, and a step may take 95 % of the card; at least one more, at most all."""
    without, waiting = (
        {"trace": {"required_bytes": size}, "gpu": {"usable_bytes": usable}}
        for size in (2000, 1100)
    )
    assert follow._as_few(now, now + 30, without, waiting) == few
