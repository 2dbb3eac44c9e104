"""Which architectures the shared-prompt layout takes: every causal language model of the installed transformers.

    python benchmarks/architectures.py [--only llama gemma2 ...]

Each is built tiny and random, with windows, chunks and numbers of chosen keys shorter than the rows (two groups,
prompts of 90 and 70 tokens, completions of 3 to 80), but longer than what ``layout="auto"`` tries at the start. Then:
the layout it chooses and, where that is the shared one, how far log-probs (relative to the largest) and gradients are
from those of the model's own forward on one completion after the other; in brackets, how far its own gradient on padded
rows is. More than 1e-5 is a fault, where that is not rounding (three times what padding does), and the exit status 1.
Classes whose config takes other settings than these, or that take longer than half a minute, are named at
the end. Some four minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import signal
import sys
import warnings

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import set_verbosity_error

from contrastive_align.data import GroupCollator
from contrastive_align.models.head import add_head
from contrastive_align.models.layout import choose_layout
from contrastive_align.models.logps import completion_logps


SECONDS = 30
FAULT = 1e-5
LARGEST = 64  # hidden size and layers of what still counts as tiny
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Of these, what a config has; then fewer, for configs that some do not suit.
OTHER_NAMES = {
    "d_model": 32, "n_embd": 32, "n_layer": 3, "n_layers": 3, "num_layers": 3, "n_head": 4, "n_heads": 4, "d_ff": 64,
    "ffn_dim": 64, "n_positions": 256, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
}  # fmt: skip
WINDOWS = {
    "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1, "attention_chunk_size": 64,
    "index_topk": 32, "keep_window_size": 32,
}  # fmt: skip
EXPERTS = {
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
HEADS = {"head_dim": 8, "rotary_dim": 8}


def build(name: str) -> PreTrainedModel:
    """The class of this name, tiny, far from the start of training, where all log-probs are alike; without dropout."""
    config_class = CONFIG_MAPPING[name]
    known = {*getattr(config_class, "__dataclass_fields__", ()), *inspect.signature(config_class).parameters}
    without_dropout = {name: 0.0 for name in known if name.endswith(("dropout", "dropout_prob", "pdrop"))}
    heads = LATENT if "kv_lora_rank" in known else HEADS
    problem = None
    for options in (OTHER_NAMES | WINDOWS | EXPERTS | heads, OTHER_NAMES | WINDOWS, {}):
        try:
            config = config_class(**{**SHAPE, **without_dropout, **{k: v for k, v in options.items() if k in known}})
            text = config.get_text_config()
            if max(text.hidden_size, text.num_hidden_layers) > LARGEST:
                raise ValueError(f"hidden size {text.hidden_size}, {text.num_hidden_layers} layers")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            break
        except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError, ZeroDivisionError) as error:
            problem = error
    else:
        raise ValueError(f"not built: {problem}")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    lengths = [(90, (20, 30)), (70, (80, 3))]
    return [
        {"prompt_ids": ids(prompt), "completion_ids": [ids(n) for n in completions], "scores": [1.0, 0.0]}
        for prompt, completions in lengths
    ]


def gradient(model: PreTrainedModel, logps: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    logps.sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def own_logps(model: PreTrainedModel, batch: dict, apart: bool) -> torch.Tensor:
    """By the model's own forward, on padded rows or, ``apart``, on one row after the other without padding."""
    names = ("input_ids", "attention_mask", "completion_mask")
    rows = [tuple(batch[name] for name in names)]
    if apart:
        ends = batch["attention_mask"].sum(1).tolist()
        rows = [tuple(batch[name][i : i + 1, :end] for name in names) for i, end in enumerate(ends)]
    sums = []
    for ids, attention_mask, completion_mask in rows:
        logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
        log_probs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        sums.append((log_probs * completion_mask[:, 1:]).sum(1))
    return torch.cat(sums).view(batch["valid"].shape)  # two each


def compare(name: str) -> tuple[str, float | None, float | None, float | None]:
    """The layout and, where it is the shared one, the gaps of log-probs and gradient; the latter of the model's own."""
    model = build(name)
    batch = GroupCollator(0)(rows())
    want = own_logps(model, batch, apart=True)
    wanted_gradient = gradient(model, want)

    def off(logps: torch.Tensor) -> float:
        return ((gradient(model, logps) - wanted_gradient).norm() / wanted_gradient.norm()).item()

    own = off(own_logps(model, batch, apart=False))
    add_head(model)
    if choose_layout(model, "auto") == "padded":
        return "padded", None, None, None
    found = completion_logps(model, batch, layout="shared").logps
    return "shared", ((found - want).abs().max() / want.abs().max()).item(), off(found), own


def _too_long(*_) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    parser.add_argument("--only", nargs="+", choices=names, metavar="MODEL_TYPE", default=names)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    set_verbosity_error()
    signal.signal(signal.SIGALRM, _too_long)
    groups = {"shared": [], "padded": [], "not compared": []}
    faults = []
    for name in parser.parse_args().only:
        signal.alarm(SECONDS)
        try:
            layout, gap, off, own = compare(name)
        except Exception as error:  # whatever a class does with a config that does not suit it
            layout, gap = "not compared", None
            print(
                f"{name}: {type(error).__name__} ({str(error).splitlines()[0][:100] if str(error) else ''})", flush=True
            )
        finally:
            signal.alarm(0)
        groups[layout].append(name)
        if gap is not None:
            print(f"{name}: shared, log-probs {gap:.1e}, gradient {off:.1e} ({own:.1e})", flush=True)
            faults += [name] if gap > FAULT or off > max(FAULT, 3 * own) else []
    print()
    for layout, found in groups.items():
        print(f"{layout} ({len(found)}): {', '.join(found)}")
    if faults:
        sys.exit(f"Shared, and wrong: {', '.join(faults)}")


if __name__ == "__main__":
    main()
