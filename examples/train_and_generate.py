"""Text to tokens to a trained model to text, in Python."""

from openxlstm import Generator
from openxlstm.checkpoint import train_bpe
from openxlstm.data import PackedLoader, Texts, TokenDataset, open_corpus, prepare
from openxlstm.models import build_model
from openxlstm.training import Trainer, TrainerConfig

corpus = open_corpus(Texts([f"{n} times {n} is {n * n}.\n" * 4 for n in range(300)]))
tokenizer = train_bpe(corpus.texts("train"), vocab_size=300)
prepare(corpus, "data/squares", tokenizer, progress=False)
loader = PackedLoader(TokenDataset.open("data/squares"), batch_size=8, context_length=64)
model = build_model({"model_type": "xlstm_lm", "embedding_dim": 64, "num_blocks": 2, "vocab_size": 300})
config = TrainerConfig(steps=20, batch_size=8, output="runs/squares", progress=False, tensorboard=False)
result = Trainer(model, config, loader, tokenizer=tokenizer).fit()
print(f"{result.tokens} tokens in {result.seconds:.1f} s")
print(Generator(model, tokenizer).generate("12 times 12", max_new_tokens=20, seed=0))
