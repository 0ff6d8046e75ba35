CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
NPROC_PER_NODE=7 \
swift rlhf \
    --rlhf_type grpo \
    --model Qwen/Qwen2.5-3B-Instruct \
    --attn_impl flash_attn \
    --reward_funcs format \
    --use_vllm false \
    --use_lmdeploy true \
    --num_infer_workers 1 \
    --train_type lora \
    --target_modules all-linear \
    --gradient_checkpointing true \
    --gradient_checkpointing_kwargs '{"use_reentrant": true}' \
    --lora_rank 64 \
    --lora_alpha 64 \
    --torch_dtype bfloat16 \
    --max_completion_length 1024 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --learning_rate 1e-6 \
    --gradient_accumulation_steps 6 \
    --max_length 3072
