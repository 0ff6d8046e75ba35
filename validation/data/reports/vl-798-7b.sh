torchrun --nproc_per_node=2 -m verl.trainer.fsdp_sft_trainer \
    data.train_files=train.parquet \
    data.val_files=val.parquet \
    data.max_length=2048 \
    model.partial_pretrain=Qwen/Qwen2.5-7B-Instruct
