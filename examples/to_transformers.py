"""A model of the 7B architecture, saved here and read by transformers, with equal logits."""

import torch
from transformers import AutoModelForCausalLM

from openxlstm import load_pretrained, save_pretrained
from openxlstm.models import xLSTMLarge, xLSTMLargeConfig

model = xLSTMLarge(xLSTMLargeConfig(embedding_dim=128, num_heads=4, num_blocks=2, vocab_size=1000))
save_pretrained(model, "large")
ours, _ = load_pretrained("large")
theirs = AutoModelForCausalLM.from_pretrained("large")
tokens = torch.randint(1000, (2, 64))
with torch.no_grad():
    print("largest difference:", float((ours(tokens) - theirs(tokens).logits).abs().max()))
