"""Score a packed row by this package's head, and by TRL's as on a GPU: its Triton kernels, interpreted on a CPU."""

import copy
import json

import torch
import trl.kernels.chunked_logprob as kernels
import trl.trainer.utils as utils
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from contrastive_align.data import GroupCollator
from contrastive_align.models.head import add_head
from contrastive_align.models.layout import set_layout
from contrastive_align.models.logps import completion_logps


SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 700, "max_position_embeddings": 128, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ids = torch.arange(60).multiply(7).add(3).tolist()
BATCH = GroupCollator(0)(
    [
        {"prompt_ids": ids[:9], "completion_ids": [ids[9:13], ids[13:20], ids[20:22]], "scores": [2.0, 1.0, 0.0]},
        {"prompt_ids": ids[22:26], "completion_ids": [ids[26:31], ids[31:33]], "scores": [0.0, 1.0]},
    ]
)


def scored(model, *, by_trl):
    """Log-probs, gradient and statistics of the tokens."""
    model = copy.deepcopy(model)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    if by_trl:
        before = model.forward
        model.forward = lambda *args, token_stats=True, token_objective=None, **kwargs: before(*args, **kwargs)
    else:
        add_head(model)
    found = completion_logps(model, BATCH, layout="shared")
    (found.logps * torch.linspace(-1, 2, found.logps.numel()).view_as(found.logps)).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return found.logps[BATCH["valid"]], gradient, found.tokens


def main():
    """Print the gaps of two models. It changes TRL's kernels, in this process."""
    assert kernels._TRITON_AVAILABLE
    kernels._use_triton = utils._use_triton = lambda device: True
    gaps = {}
    for name, config, cls in (("Llama", LlamaConfig, LlamaForCausalLM), ("Gemma2", Gemma2Config, Gemma2ForCausalLM)):
        torch.manual_seed(0)
        model = cls(config(**SHAPE)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=p.size(-1) ** -0.5) if p.dim() > 1 else None
        add_head(ours := copy.deepcopy(model))
        assert set_layout([ours], "shared") == "shared"
        model.set_attn_implementation(ours.config._attn_implementation)
        (a, g, s), (b, h, t) = scored(model, by_trl=False), scored(model, by_trl=True)
        gaps[name] = {"logps": (a - b).abs().max().item(), "gradient": ((g - h).norm() / g.norm()).item()}
        gaps[name] |= {k: (s[k].float() - t[k].float()).abs().max().item() for k in s}
    print(json.dumps(gaps))


if __name__ == "__main__":
    main()
