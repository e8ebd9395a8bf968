"The real DeepSpeed engine on two CPU ranks, for each config that a run may choose."
import pytest

from qwen2vl_nb.run.loss import read_log
from qwen2vl_nb.recipe import find_adapter
from qwen2vl_nb.run.start import launch
from qwen2vl_nb.zero import zero_config

@pytest.mark.parametrize('name', ['z0', 'z2', 'z2_offload', 'z3', 'z3_offload'])
def test_lora_on_two_ranks(name, few_steps, tiny):
    "A few steps; the adapter that they write is loaded again into the base and changes what it says."
    import torch
    from peft import PeftModel
    from transformers import Qwen2VLForConditionalGeneration
    run = launch(few_steps(deepspeed=zero_config(name), use_cpu=None, max_steps=3, learning_rate=1e-2, warmup_ratio=None), nproc=2)
    run.wait()
    log = read_log(run).dropna(subset=['loss'])
    assert list(log.current_steps) == [1, 2, 3]
    assert log.loss.between(.5, 10).all(), 'damaged weights give a loss of nan, which is logged as 0.0'
    assert f"ds_{name}_config.json" in {p.name for p in run.output_dir.iterdir()}
    base = Qwen2VLForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32)
    words = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = base(input_ids=words).logits
        tuned = PeftModel.from_pretrained(base, find_adapter(run))
        after = tuned(input_ids=words).logits
    loras = [p for n,p in tuned.named_parameters() if 'lora_B' in n]
    assert loras and all(p.isfinite().all() for p in loras) and any(p.abs().sum() > 0 for p in loras)
    assert not torch.allclose(before, after)
