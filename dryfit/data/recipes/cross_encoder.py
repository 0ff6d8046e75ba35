"""A reranker with sentence-transformers' trainer: pairs of texts with a label each, binary cross-entropy.

- a pair is sequence_length tokens long, the longest that occurs
- the weights are loaded in fp32; bf16 and fp16 are the Trainer's autocast over them
"""

from datasets import Dataset
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

model = "BAAI/bge-reranker-v2-m3"
micro_batch = 16  # pairs of a batch
sequence_length = 512  # tokens of a pair
precision = "bf16"  # bf16 | fp16 | fp32
gradient_checkpointing = False
optimizer = "adamw"  # adamw | adamw_unfused | adamw_8bit

ranker = CrossEncoder(model, num_labels=1, device="cuda", model_kwargs={"dtype": "float32"})
ranker.max_seq_length = sequence_length
rows = 2 * micro_batch
text = "word " * sequence_length
pairs = Dataset.from_dict(
    {"query": ["word"] * rows, "answer": [text] * rows, "label": [1.0] * rows}
)
settings = CrossEncoderTrainingArguments(
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
CrossEncoderTrainer(
    ranker, settings, train_dataset=pairs, loss=BinaryCrossEntropyLoss(ranker)
).train()
