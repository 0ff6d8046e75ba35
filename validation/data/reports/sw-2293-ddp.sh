NPROC_PER_NODE=2 \
swift sft \
    --dtype bf16 \
    --model_id_or_path meta-llama/Meta-Llama-3-8B-Instruct \
    --sft_type full \
    --weight_decay 0.1 \
    --max_grad_norm 0.5 \
    --batch_size 1 \
    --gradient_accumulation_steps 16 \
    --max_length 4096
