"""`lowrank-ext guard train`: a LoRA-Guard from labelled texts, on the loop of finetune."""
