export MODEL_NAME="stabilityai/stable-diffusion-xl-base-1.0"
accelerate launch train_dreambooth_lora_sdxl.py \
  --pretrained_model_name_or_path=$MODEL_NAME --mixed_precision="fp16" \
  --instance_prompt="a photo" --resolution=1024 --train_batch_size=1 \
  --gradient_accumulation_steps=1 --learning_rate=1e-4 --max_train_steps=1000 \
  --validation_prompt="a photo" --validation_epochs=25 --num_validation_images=4 \
  --gradient_checkpointing --use_8bit_adam --checkpointing_steps=500 \
  --enable_xformers_memory_efficient_attention
