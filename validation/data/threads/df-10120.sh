accelerate launch train_dreambooth_sd3.py \
  --pretrained_model_name_or_path="stabilityai/stable-diffusion-3-medium-diffusers" --mixed_precision="fp16" \
  --instance_prompt="a photo" --resolution=256 --train_batch_size=1 --gradient_accumulation_steps=4 \
  --learning_rate=1e-4 --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=300 \
  --validation_prompt="a photo" --validation_epochs=25 --use_8bit_adam --seed="0"
