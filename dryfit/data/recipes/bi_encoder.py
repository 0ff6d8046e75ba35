"""Embeddings of sentences with sentence-transformers' trainer: pairs, the other rows of the batch as negatives.

- a batch has micro_batch pairs, and both texts are sequence_length tokens long, the longest that occurs
- MultipleNegativesRankingLoss over the whole batch; its cached form embeds chunk rows at a time
- the weights are loaded in fp32; bf16 and fp16 are the Trainer's autocast over them
"""

from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

model = "BAAI/bge-m3"
micro_batch = 32  # pairs of a batch
sequence_length = 512  # tokens of a text
chunk = 0  # texts at a time of the cached loss; 0: the plain loss
precision = "bf16"  # bf16 | fp16 | fp32
rank = 0  # of LoRA; 0 trains all weights
gradient_checkpointing = False
optimizer = "adamw"  # adamw | adamw_unfused | adamw_8bit

embedder = SentenceTransformer(model, device="cuda", model_kwargs={"dtype": "float32"})
embedder.max_seq_length = sequence_length
if rank:
    embedder.add_adapter(LoraConfig("FEATURE_EXTRACTION", r=rank, target_modules="all-linear"))
text = "word " * sequence_length
rows = Dataset.from_dict(
    {"anchor": [text] * (2 * micro_batch), "positive": [text] * (2 * micro_batch)}
)
loss = MultipleNegativesRankingLoss(embedder)
if chunk:
    loss = CachedMultipleNegativesRankingLoss(embedder, mini_batch_size=chunk)
settings = SentenceTransformerTrainingArguments(
    "trained",
    per_device_train_batch_size=micro_batch,
    max_steps=2,
    bf16=precision == "bf16",
    fp16=precision == "fp16",
    gradient_checkpointing=gradient_checkpointing,
    optim={
        "adamw": "adamw_torch_fused",
        "adamw_unfused": "adamw_torch",
        "adamw_8bit": "adamw_bnb_8bit",
    }[optimizer],
    save_strategy="no",
    report_to="none",
)
SentenceTransformerTrainer(embedder, settings, train_dataset=rows, loss=loss).train()
