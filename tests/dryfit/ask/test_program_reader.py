"""Programs and notebooks: what counts is what their objects say when ``train()`` is called."""

import json
from pathlib import Path
from typing import Any

import pytest

from dryfit.ask.question import Question
from dryfit.common.errors import UserError
from dryfit.readers.cells import source
from tests.dryfit.ask.test_readers import asked, said

LOAD = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Llama-3.2-1B-Instruct", max_seq_length=2048, load_in_4bit=True)
"""
ADAPT = "model = FastLanguageModel.get_peft_model(model, r=16, target_modules=['q_proj', 'v_proj'], lora_alpha=16)\n"
TRAINER = """
trainer = SFTTrainer(model=model, tokenizer=tokenizer, args=SFTConfig(per_device_train_batch_size=2, MORE))
"""
TRAIN = "trainer_stats = trainer.train()\n"
WHOLE = (LOAD, ADAPT, TRAINER, TRAIN)


def book(folder: Path, *cells: str, more: str = "", **options: Any) -> Question:
    parts = [
        {"cell_type": "code", "source": cell.replace("MORE", more).splitlines(keepends=True)}
        for cell in cells
    ]
    return asked(folder, json.dumps({"cells": parts}), name="book.ipynb", **options)


NOT_RUN = "model, tokenizer = FastLanguageModel.from_pretrained(model_name='unsloth/Qwen3-8B', load_in_4bit=False)"


@pytest.mark.parametrize(
    ("cells", "fields"),
    [
        (
            WHOLE,
            {
                "method": "qlora",
                "quantization": {"double": True},
                "micro_batch": 2,
                "lora": {"rank": 16},
                "optimizer": "adamw_8bit",
                "gradient_accumulation": 2,
                "sequence_length": 2048,
                "gradient_checkpointing": "reentrant",
            },
        ),
        ((*WHOLE, f"if False:\n    {NOT_RUN}"), {}),
        ((f"if 0:\n    {NOT_RUN}\n", *WHOLE), {}),
        ((f"USE = not True\nif USE and missing:\n    {NOT_RUN}\nelse:\n    pass", *WHOLE), {}),
        (("LOADS = ['no']\nif len(LOADS) > 3:\n    " + NOT_RUN, *WHOLE), {}),
        (("zeros = [0] * 10**12\nline = '-' * 80\nmore = 'ab' * 1_000_000_000_000", *WHOLE), {}),
        (
            (LOAD, ADAPT, "class SFTTrainer(trl.SFTTrainer):\n    pass", TRAINER, TRAIN),
            {"micro_batch": 2},
        ),
        (
            (
                "if unknown():\n    parts = ['q_proj']\nelse:\n    parts = ['q_proj']",
                LOAD,
                ADAPT.replace("['q_proj', 'v_proj']", "parts"),
                TRAINER,
                TRAIN,
            ),
            {"lora": {"target_modules": ["q_proj"]}},
        ),
        ((*WHOLE, NOT_RUN), {}),  # a reload after training
        ((*WHOLE, "del model, trainer", NOT_RUN, "model.push_to_hub('x')"), {}),
        ((NOT_RUN, *WHOLE), {}),  # an earlier load, which the later one replaces
        (("%%bash\npip install \\\n  unsloth\necho $((1 + 2))", *WHOLE), {}),
        (("#@title Install\n%%capture\n!pip install -q \\\n    unsloth \\\n    trl", *WHOLE), {}),
        (("pip install unsloth\nmodel?\n%env X=1\nfiles = !ls", *WHOLE), {}),
        (("%%writefile x.py\nthis is not Python", *WHOLE), {}),
        (
            (
                "try:\n    import a\n    ROWS = 4\nexcept ImportError:\n    ROWS = 8",
                LOAD,
                ADAPT,
                TRAINER.replace("size=2", "size=ROWS"),
                TRAIN,
            ),
            {"micro_batch": 4},
        ),
        (
            (
                "def build(rows, length=512):\n"
                "    return SFTConfig(per_device_train_batch_size=rows, max_seq_length=length)",
                LOAD,
                ADAPT,
                "trainer = SFTTrainer(model, args=build(4, length=1024))",
                TRAIN,
            ),
            {"micro_batch": 4, "sequence_length": 1024},
        ),
        (
            (
                "class Own:\n    rows: int = 3\ncfg = Own()\ncfg.length = 256",
                LOAD,
                ADAPT,
                "given = {'per_device_train_batch_size': cfg.rows}\n"
                "trainer = SFTTrainer(model, max_seq_length=cfg.length, args=SFTConfig(**given))",
                TRAIN,
            ),
            {"micro_batch": 3, "sequence_length": 256},
        ),
        (
            (
                "name = 'Llama-3.2'\nsize = '1B' if len(name) == 9 else '3B'",
                LOAD.replace('"unsloth/Llama-3.2-1B-Instruct"', "f'unsloth/{name}-{size}'"),
                *WHOLE[1:],
            ),
            {},
        ),
        (
            (
                LOAD,
                ADAPT,
                TRAINER,
                "from unsloth.chat_templates import train_on_responses_only\n"
                "trainer = train_on_responses_only(trainer, instruction_part='a')",
                "async def f(): pass\nawait f()",
                TRAIN,
            ),
            {},
        ),
        (
            (
                LOAD.replace("max_seq_length=2048, ", ""),
                ADAPT,
                TRAINER.replace("MORE", "max_length=512"),
                TRAIN,
            ),
            {"sequence_length": 2048},
        ),  # Unsloth's own default stands before TRL's max_length
        (
            (LOAD.replace("True)", "True, full_finetuning=True)"), ADAPT, TRAINER, TRAIN),
            {"method": "full", "autocast": None, "precision": "bf16"},
        ),
        (
            (LOAD.replace("load_in_4bit=True", "load_in_16bit=True"), ADAPT, TRAINER, TRAIN),
            {"method": "lora"},
        ),
        (
            (LOAD, "model = FastLanguageModel.get_peft_model(model, r=8)", TRAINER, TRAIN),
            {
                "lora": {
                    "rank": 8,
                    "target_modules": [
                        "q_proj",
                        "k_proj",
                        "v_proj",
                        "o_proj",
                        "gate_proj",
                        "up_proj",
                        "down_proj",
                    ],
                }
            },
        ),
        (
            (LOAD, ADAPT.replace("'v_proj'", "'lm_head'"), TRAINER, TRAIN),
            {"adapter": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
        ),
        (
            (
                LOAD,
                ADAPT.replace("alpha=16", "alpha=16, use_gradient_checkpointing=False"),
                TRAINER,
                TRAIN,
            ),
            {"gradient_checkpointing": False},
        ),
    ],
)
def test_only_what_runs_before_the_training_counts(cells, fields, tmp_path: Path) -> None:
    found = book(tmp_path, *cells)
    assert found.model.startswith("unsloth/Llama-3.2-1B")
    said(found, **{"method": "qlora", **fields})


@pytest.mark.parametrize(
    ("program", "gpu", "fields"),
    [
        (LOAD, "t4", {"precision": "fp16", "autocast": "fp16"}),
        (LOAD, "v100-16gb", {"precision": "fp16", "autocast": "fp16"}),
        (LOAD, "l4", {"precision": "bf16", "autocast": "bf16"}),
        (LOAD, None, {"precision": "bf16", "autocast": "bf16"}),
        (
            LOAD.replace("True)", "True, dtype=torch.float16)"),
            "l4",
            {"precision": "fp16", "autocast": "fp16"},
        ),
        (
            "import unsloth\nif is_bfloat16_supported():\n    D = torch.bfloat16\nelse:\n    D = torch.float16\n"
            + LOAD.replace("True)", "True, dtype=D)"),
            "t4",
            {"precision": "fp16"},
        ),
        (
            "D = 'bfloat16' if torch.cuda.get_device_capability()[0] >= 8 else 'float16'\n"
            + LOAD.replace("True)", "True, dtype=D)"),
            "t4",
            {"precision": "fp16"},
        ),
    ],
)
def test_the_card_decides_between_bf16_and_fp16(program, gpu, fields, tmp_path: Path) -> None:
    flags = "bf16=is_bfloat16_supported(), fp16=not is_bfloat16_supported()"
    said(book(tmp_path, program, ADAPT, TRAINER, TRAIN, more=flags, gpu=gpu), **fields)


PLAIN = """
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", dtype=torch.float16)
halves = torch.cuda.is_bf16_supported(EMULATED)
args = TrainingArguments("x", bf16=halves, fp16=not halves)
rows = tokenizer("text", truncation=True, max_length=384)
trainer = Trainer(model=model, args=args)
trainer.train()
"""


@pytest.mark.parametrize(
    ("emulated", "autocast"), [("", "bf16"), ("including_emulation=False", "fp16")]
)
def test_pytorch_itself_says_that_an_older_card_has_bf16(
    emulated, autocast, tmp_path: Path
) -> None:
    """torch/cuda/__init__.py counts emulation in, where Unsloth's patched function does not."""
    found = asked(tmp_path, PLAIN.replace("EMULATED", emulated), name="train.py", gpu="t4")
    assert found.reading.fields["autocast"] == autocast and found.scenario.sequence_length == 384


GRPO = (
    LOAD
    + ADAPT
    + """
trainer = GRPOTrainer(model=model, args=GRPOConfig(per_device_train_batch_size=1, num_generations=4, MORE))
trainer.train()
"""
)


@pytest.mark.parametrize(
    ("more", "rows", "length"),
    [
        ("max_prompt_length=256, max_completion_length=512", 4, 768),
        ("max_prompt_length=256, max_completion_length=length(x)", 4, 2048),
        ("max_prompt_length=longest(x), max_completion_length=2048 - longest(x)", 4, 2048),
        ("max_completion_length=512, max_prompt_length=256, gradient_accumulation_steps=4", 1, 768),
    ],
)
def test_a_row_of_unsloths_grpo(more, rows, length, tmp_path: Path) -> None:
    """models/rl.py: a batch that isn't a multiple of the generations becomes their number."""
    found = book(tmp_path, GRPO, more=more)
    assert (found.reading.fields["micro_batch"], found.reading.fields["sequence_length"]) == (
        rows,
        length,
    )


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (
            "SentenceTransformerTrainer(model=FastSentenceTransformer.from_pretrained('x')).train()",
            "embedding model",
        ),
        (
            LOAD.replace("True)", "True, auto_model=WhisperForConditionalGeneration)")
            + TRAINER
            + TRAIN,
            "Whisper",
        ),
        (LOAD.replace("True)", "True, auto_model=AutoModel)") + TRAINER + TRAIN, "without a head"),
        (
            LOAD.replace("True)", "True, qat_scheme='int4')") + TRAINER + TRAIN,
            "rounded to integers",
        ),
        (LOAD + TRAINER.replace("MORE", "'broken") + TRAIN, "not Python"),
        (LOAD + "print(model)", "No trainer"),
        (
            "".join(
                f"def f{n}(x):\n    if x:\n        f{n + 1}(x)\n    else:\n        f{n + 1}(x)\n    f{n + 1}(x)\n"
                for n in range(12)
            )
            + "f0(y)\n"
            + LOAD
            + TRAINER
            + TRAIN,
            "too often to be followed",
        ),
        (
            LOAD.replace('"unsloth/Llama-3.2-1B-Instruct"', "chosen()") + TRAINER + TRAIN,
            "names no model",
        ),
        (
            "snapshot_download('a/b', local_dir='mine')\n"
            + LOAD.replace("unsloth/Llama-3.2-1B-Instruct", "mine/LLM")
            + TRAINER
            + TRAIN,
            "the program itself makes",
        ),
        (LOAD + TRAINER.replace("size=2", "size=rows()") + TRAIN, "micro_batch: 1"),
        (LOAD.replace("=2048", "=longest()") + TRAINER + TRAIN, "sequence_length: 2048"),
        (
            LOAD + TRAINER.replace("MORE", "data_collator=1") + "row = {'type': 'image'}\n"
            "trainer = SFTTrainer(model, data_collator=UnslothVisionDataCollator(model, tokenizer))\n"
            + TRAIN,
            "images",
        ),
        (
            "row = {'type': 'audio'}\n"
            + LOAD
            + "trainer = SFTTrainer(model, data_collator=UnslothVisionDataCollator(model, tokenizer))\n"
            + TRAIN,
            "sound",
        ),
        (
            "model = AutoModelForCausalLM.from_pretrained('gpt2')\nTrainer(model, TrainingArguments('x')).train()",
            "at no length",
        ),
    ],
)
def test_a_step_that_can_not_be_followed_has_no_answer(program, says, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        book(tmp_path, program, more="")
    assert says in str(caught.value)


def test_what_is_open_is_answered_with_an_option_and_other_trainings_are_named(
    tmp_path: Path,
) -> None:
    program = LOAD.replace("=2048", "=longest()") + TRAINER.replace("size=2", "size=rows()") + TRAIN
    said(
        book(tmp_path, program, sequence_length=128, micro_batch=3),
        sequence_length=128,
        micro_batch=3,
    )
    images = (
        "trainer = SFTTrainer(model, data_collator=UnslothVisionDataCollator(model, tokenizer))\n"
    )
    said(
        book(tmp_path, LOAD + images + TRAIN, settings=["images=null"]),
        images=None,
        sequence_length=2048,
    )
    found = book(tmp_path, LOAD, ADAPT, TRAINER, TRAIN, GRPO.replace(LOAD + ADAPT, ""), more="")
    assert found.reading.fields["micro_batch"] == 4
    assert any(
        "trains several times (SFTTrainer" in note and "about GRPOTrainer" in note
        for note in found.reading.notes
    )


@pytest.mark.parametrize(
    ("program", "key", "errs"),
    [
        (
            "other = SNAC.from_pretrained('a/b')\nother = other.to('cuda')\n" + LOAD,
            "SNAC",
            "too low",
        ),
        (LOAD.replace("True)", "True, offload_embedding=True)"), "offload_embedding", "too high"),
        (LOAD.replace("True)", "True, load_in_fp8=True)"), "load_in_fp8", "too high"),
        (LOAD.replace("Llama-3.2-1B-Instruct", "gemma-3-1b-it"), "dtype", "too low"),
        (
            "if chosen():\n    "
            + LOAD.strip().splitlines()[0]
            + "\n    "
            + NOT_RUN
            + "\n"
            + LOAD.replace("\n    ", " ")
            + "if chosen():\n    model = model.merged()\n    model, tokenizer = FastLanguageModel.from_pretrained("
            "'unsloth/Llama-3.2-1B', 64)\n",
            "chosen()",
            "either way",
        ),
        (LOAD + "more = {}\n", "**", "either way"),
    ],
)
def test_what_is_left_out_is_said(program, key, errs, tmp_path: Path) -> None:
    trainer = TRAINER.replace("MORE", "**settings()") if key == "**" else TRAINER
    found = book(tmp_path, program, ADAPT, trainer, TRAIN, gpu="t4")
    assert {remark.key: remark.errs for remark in found.reading.remarks}.get(key) == errs


def test_cells_keep_their_places_and_those_after_the_training_are_not_reached(
    tmp_path: Path,
) -> None:
    said(book(tmp_path, *WHOLE, "def broken(:"), method="qlora")
    with pytest.raises(UserError, match="not Python") as caught:
        book(tmp_path, LOAD, "def broken(:", *WHOLE[1:])
    assert "cell 2 of code, line 1" in str(caught.value.where)
    path = tmp_path / "x.ipynb"
    cell = ["if x:\n", "    !pip install \\\n", "        y\n", "z = 1"]
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": cell}]}))
    assert source(path).splitlines() == ["if x:", "    pass", "", "z = 1"]
