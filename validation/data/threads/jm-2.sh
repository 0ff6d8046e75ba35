python train_dreambooth_lora.py \
  --pretrained_model_name_or_path runwayml/stable-diffusion-v1-5 --instance_prompt W \
  --resolution 512 --train_batch_size 1 --num_train_epochs 96 --checkpointing_steps 32 \
  --gradient_accumulation_steps 1 --learning_rate 0.0001 --lr_scheduler constant_with_warmup \
  --mixed_precision fp16 --prior_generation_precision fp16 --rank 4 --use_8bit_adam \
  --enable_xformers_memory_efficient_attention --pre_compute_text_embeddings
