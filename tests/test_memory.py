"Counted parameters against the real model class, built without weights."
import pytest

from qwen2vl_nb.memory import dimensions, lora_parameters, parameters

def _config(d):
    from transformers import Qwen2VLConfig
    text = dict(hidden_size=d.hidden, num_hidden_layers=d.layers, num_attention_heads=d.heads, num_key_value_heads=d.kv_heads, intermediate_size=d.intermediate,
                vocab_size=d.vocab, rope_scaling={'type': 'mrope', 'mrope_section': [16, 24, 24]}, tie_word_embeddings=d.tied)
    vision = dict(depth=d.vision_depth, embed_dim=d.vision_width, hidden_size=d.hidden, num_heads=16, mlp_ratio=d.vision_mlp, patch_size=d.patch)
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=d.tied)

def _model(d):
    import torch
    from transformers import Qwen2VLForConditionalGeneration
    with torch.device('meta'): model = Qwen2VLForConditionalGeneration(_config(d))
    model.tie_weights()
    return model

@pytest.mark.parametrize('size', ['2B', '7B', '72B'])
def test_parameters_are_those_of_the_model(size):
    d = dimensions(size)
    named = dict(_model(d).named_parameters())
    part = lambda name: 'projector' if '.merger.' in name else 'vision' if 'visual.' in name else 'language'
    counted = dict.fromkeys(parameters(d), 0)
    for name, p in named.items(): counted[part(name)] += p.numel()
    assert counted == parameters(d)

def test_adapter_parameters_are_those_of_peft():
    from peft import LoraConfig, get_peft_model
    d = dimensions('2B')
    targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
    model = get_peft_model(_model(d), LoraConfig(r=16, target_modules=targets))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == lora_parameters(d, rank=16)

def test_the_embedded_model(tiny):
    from safetensors import safe_open
    with safe_open(tiny/'model.safetensors', 'pt') as f: total = sum(f.get_tensor(k).numel() for k in f.keys())
    assert total == sum(parameters(dimensions(tiny)).values()) and total < 1.5e6
