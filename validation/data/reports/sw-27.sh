NPROC_PER_NODE=2 \
swift sft \
    --model_id_or_path models/qwen1.5-7b.json \
    --sft_type full \
    --batch_size 1 \
    --max_length 2048
