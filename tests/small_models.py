"""Small models of transformers, not trained."""

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def llama_sizes(**options) -> LlamaConfig:
    """Of the models that Trainer and PEFT train in tests."""
    sizes = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
    return LlamaConfig(**sizes, **heads, **options)


def small_llama(**options) -> LlamaForCausalLM:
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options)).eval()


def small_gpt2() -> GPT2LMHeadModel:
    sizes = dict(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).eval()
