import torch

import lowrank_ext as lr

model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
model = lr.adapt(model, lr.LoRAConfig(r=8, alpha=16, dropout=0.05))  # any torch model
print(lr.trainable_parameters(model))  # trainable=5120, total=38208, percent=13.4…
optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
model(torch.randn(32, 64)).square().mean().backward()
optimizer.step()
lr.save_adapter(model, "adapter")  # PEFT's format; lr.load_adapter reads it
lr.merge(model)  # W += scaling * lora_b @ lora_a; lr.unmerge takes it back, lr.unload keeps it
