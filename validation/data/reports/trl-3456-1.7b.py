from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

trainer = GRPOTrainer(
    model="Qwen/Qwen3-1.7B",
    reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
    args=GRPOConfig(
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=1024,
        bf16=True,
        gradient_checkpointing=False,
        use_vllm=False,
    ),
    train_dataset=load_dataset("trl-lib/ultrafeedback-prompt", split="train"),
)
trainer.train()
