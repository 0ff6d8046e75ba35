import datasets
import trl
from transformers import AutoConfig, AutoModelForCausalLM

model = AutoModelForCausalLM.from_config(
    AutoConfig.from_pretrained("mistralai/Mistral-7B-v0.1")
).to(0)
args = trl.SFTConfig(
    max_steps=100,
    per_device_train_batch_size=1,
    optim="galore_adamw",
    optim_target_modules=["attn", "mlp"],
    max_length=512,
    bf16=False,
    gradient_checkpointing=False,
)
trainer = trl.SFTTrainer(
    model=model, args=args, train_dataset=datasets.load_dataset("imdb", split="train")
)
trainer.train()
