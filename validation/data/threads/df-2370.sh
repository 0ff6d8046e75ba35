export MODEL_NAME="stabilityai/stable-diffusion-2-1"
accelerate launch --mixed_precision="bf16" train_text_to_image_lora.py \
  --pretrained_model_name_or_path=$MODEL_NAME \
  --caption_column="text" --resolution=768 --random_flip --train_batch_size=1 \
  --num_train_epochs=100 --checkpointing_steps=5000 --learning_rate=1e-04 \
  --lr_scheduler="constant" --lr_warmup_steps=0 --seed=42 \
  --validation_prompt="a picture" --num_validation_images=4 \
  --enable_xformers_memory_efficient_attention --use_8bit_adam
