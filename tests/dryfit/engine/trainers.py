"""Trainers of others, tiny, on a device: whole, with what they need to take two updates."""

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
WORDS = {"<pad>": 0, "<eos>": 1, **{f"w{number}": number + 2 for number in range(290)}}
PROMPT, LONG, SHORT = "w1 w2 w3 w4", "w6 " * 30, "w5 " * 20


def tokenizer():
    made = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def language_model(device, kind="qwen2", of=AutoModelForCausalLM, **more):
    torch.manual_seed(0)
    with torch.device(device):
        return of.from_config(AutoConfig.for_model(kind, **SIZES, **more), dtype=torch.bfloat16)


def arguments(folder, **changes):
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        **changes,
    }


def lora():
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def rows(**columns):
    return Dataset.from_dict(
        {
            name: [values[number % len(values)] for number in range(8)]
            for name, values in columns.items()
        }
    )


def plain(device, folder, **changes):
    data = Dataset.from_dict({name: [[2, 3, 4, 5] * 8] * 8 for name in ("input_ids", "labels")})
    config = transformers.TrainingArguments(**arguments(folder, **changes))
    return transformers.Trainer(language_model(device), config, train_dataset=data)


def sft(device, folder, **changes):
    import trl

    data = rows(text=[PROMPT + " " + LONG, PROMPT + " " + SHORT])
    config = trl.SFTConfig(**arguments(folder, **changes))
    return trl.SFTTrainer(
        language_model(device),
        config,
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=lora(),
    )


def pairs():
    return rows(prompt=[PROMPT], chosen=[SHORT], rejected=[LONG])


def dpo(device, folder, **changes):
    import trl

    config = trl.DPOConfig(**arguments(folder, **changes))
    model = language_model(device)
    return trl.DPOTrainer(
        model, args=config, train_dataset=pairs(), processing_class=tokenizer(), peft_config=lora()
    )


def kto(device, folder, **changes):
    try:
        from trl import KTOConfig, KTOTrainer
    except ImportError:
        from trl.experimental.kto import KTOConfig, KTOTrainer
    data = rows(prompt=[PROMPT], completion=[SHORT, LONG], label=[True, False])
    config = KTOConfig(**arguments(folder, **changes))
    model = language_model(device)
    return KTOTrainer(
        model, args=config, train_dataset=data, processing_class=tokenizer(), peft_config=lora()
    )


def orpo(device, folder, **changes):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config = ORPOConfig(**arguments(folder, **changes))
    model = language_model(device)
    return ORPOTrainer(
        model, args=config, train_dataset=pairs(), processing_class=tokenizer(), peft_config=lora()
    )


def reward(device, folder, **changes):
    import trl

    of = transformers.AutoModelForSequenceClassification
    model = language_model(device, of=of, num_labels=1, pad_token_id=0)
    config = trl.RewardConfig(**arguments(folder, **changes))
    return trl.RewardTrainer(
        model,
        config,
        train_dataset=rows(chosen=[SHORT], rejected=[LONG]),
        processing_class=tokenizer(),
    )


def grpo(device, folder, **changes):
    import trl

    options = {"num_generations": 4, "max_completion_length": 24, "per_device_train_batch_size": 4}
    options |= {"generation_kwargs": {"min_new_tokens": 24}}
    return trl.GRPOTrainer(
        language_model(device),
        reward_funcs=lambda completions, **_: [float(number) for number in range(len(completions))],
        args=trl.GRPOConfig(**arguments(folder, **options | changes)),
        train_dataset=rows(prompt=[PROMPT]),
        processing_class=tokenizer(),
        peft_config=lora(),
    )
