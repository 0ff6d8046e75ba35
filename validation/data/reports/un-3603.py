import os

os.environ["UNSLOTH_VLLM_STANDBY"] = "1"

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="codellama/CodeLlama-7b-hf",
    max_seq_length=1536,
    load_in_4bit=True,
    fast_inference=True,
    gpu_memory_utilization=0.8,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=64,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=64,
    use_gradient_checkpointing="unsloth",
)
trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
    args=GRPOConfig(
        per_device_train_batch_size=1,
        num_generations=8,
        max_prompt_length=512,
        max_completion_length=1024,
        optim="adamw_8bit",
    ),
    train_dataset=load_dataset("AI-MO/NuminaMath-TIR", split="train"),
)
trainer.train()
