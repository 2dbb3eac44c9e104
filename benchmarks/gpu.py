"""What a GPU makes of this package: one table, each row beside the roofline, in at most ten minutes on one H200.

    python benchmarks/gpu.py [--rows A B C D E F G H I] [--seconds 600]
    python benchmarks/gpu.py --tiny        (every row in miniature on a CPU, so that none breaks unseen)

The models are random and made on the device. Times are medians of steps after a first one; a roofline is the floor of
the row's arithmetic (``floor.floor_flop``, which counts a prompt once and no recomputation) at 790 TFLOP/s in bfloat16,
or its traffic at 4.8 TB/s where that takes longer. "Reckoned" are values from such arithmetic, made before any run. A
row that fails, or for which no time is left, says so, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset, disable_progress_bars
from floor import Counts, floor_flop
from host_waits import Waits
from peft import LoraConfig
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from contrastive_align import ContrastiveConfig, ContrastiveTrainer, demo
from contrastive_align.data import GroupCollator
from contrastive_align.models import shared_prompt, token_loss
from contrastive_align.models.head import add_head
from contrastive_align.models.layout import choose_layout
from contrastive_align.models.logps import completion_logps
from contrastive_align.models.noise import gap_per_token
from contrastive_align.models.packed_row import PackedRow, Segment
from contrastive_align.sampling.decode import draw
from contrastive_align.sampling.noise import exponential_noise
from contrastive_align.trl_seam import add_fused_lm_head


FLOP_PER_SECOND, BYTES_PER_SECOND = 790e12, 4.8e12  # of an H200, in bfloat16, without sparsity
HEADER = ("row", "what", "measured", "roofline", "share of it", "reckoned")
BFLOAT = torch.bfloat16


@dataclass(frozen=True)
class Scale:
    """The sizes of all rows: ``shapes`` are tokens of a prompt, completions, tokens of each."""

    device: torch.device
    shapes: tuple[tuple[int, int, int], ...] = ((1024, 4, 512), (1024, 16, 512), (4096, 16, 256))
    heads: tuple[int, int, int] = (32, 8, 128)  # of queries, of keys, and the size of each
    large: dict[str, int] = field(default_factory=lambda: dict(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
    ))  # fmt: skip
    small: dict[str, int] = field(default_factory=lambda: dict(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192,
    ))  # fmt: skip
    deep: int = 32
    eight: int = 8  # layers where nothing is recomputed
    vocabulary: int = 32_000
    words: tuple[int, int, int] = (128_000, 8192, 4096)  # of row G: vocabulary, tokens, hidden size
    drawn: tuple[int, int] = (256, 32)
    steps: int = 3

    @classmethod
    def tiny(cls) -> Scale:
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        shape["intermediate_size"] = 48
        return cls(
            torch.device("cpu"), ((12, 2, 5), (12, 4, 5), (24, 3, 4)), (2, 1, 16), shape, shape, deep=2, eight=2,
            vocabulary=2000, words=(500, 64, 16), drawn=(4, 3), steps=1,
        )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of the table; ``floor`` is the least time in seconds that the roofline allows."""

    row: str
    what: str
    seconds: float | None = None
    floor: float | None = None
    found: str = ""
    reckoned: str = ""

    def cells(self) -> tuple[str, ...]:
        measured = self.found or ("" if self.seconds is None else f"{1e3 * self.seconds:.3g} ms")
        floor = "" if self.floor is None else f"{1e3 * self.floor:.3g} ms"
        share = "" if self.floor is None or not self.seconds else f"{self.floor / self.seconds:.0%}"
        return self.row, self.what, measured, floor, share, self.reckoned


def roofline(flop: float, traffic: float = 0.0) -> float:
    return max(flop / FLOP_PER_SECOND, traffic / BYTES_PER_SECOND)


def median_seconds(run: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Return the median time of ``run`` on the device, after one call that is not counted."""
    run()
    found = []
    for _ in range(steps):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------- models and trainers


def config_of(scale: Scale, shape: dict[str, int], **changes: Any) -> LlamaConfig:
    return LlamaConfig(**{"vocab_size": scale.vocabulary, "max_position_embeddings": 8192, **shape, **changes})


def random_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a model made on the device, whose signals neither die out nor grow with its depth."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), mock.patch.object(LlamaForCausalLM, "init_weights", lambda self: self.tie_weights()):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=p.size(-1) ** -0.5)
    return model


def groups_of(scale: Scale, shape: tuple[int, int, int], vocabulary: int | None = None) -> list[dict]:
    prompt, k, completion = shape
    ids = torch.randint(3, vocabulary or scale.vocabulary, (prompt + k * completion,)).tolist()
    completions = [ids[prompt + i * completion :][:completion] for i in range(k)]
    return [{"prompt_ids": ids[:prompt], "completion_ids": completions, "scores": [float(i) for i in range(k)]}]


def options_of(scale: Scale, folder: str, checkpointing: bool) -> dict[str, Any]:
    return dict(
        output_dir=folder, max_length=None, per_device_train_batch_size=1, gradient_checkpointing=checkpointing,
        bf16=scale.device.type == "cuda", use_cpu=scale.device.type == "cpu", report_to=[], disable_tqdm=True,
        save_strategy="no", logging_strategy="no", learning_rate=1e-5,
    )  # fmt: skip


@dataclass
class Steps:
    """A trainer, to make steps of one group with."""

    trainer: Any
    groups: list[dict]

    def step(self) -> None:
        trainer = self.trainer
        batch = trainer._prepare_inputs(trainer.data_collator(self.groups))
        trainer.training_step(trainer.model, batch)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    def seconds(self, scale: Scale) -> float:
        return median_seconds(self.step, scale.device, scale.steps)

    def peak(self, scale: Scale) -> float | None:
        """Return the peak memory of a step above what is there before, in bytes; None on a CPU."""
        self.step()
        if scale.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        return torch.cuda.max_memory_allocated() - before

    def floor(self, tuning: str) -> float:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        counts = Counts.of(model, model.config)
        return roofline(floor_flop(self.groups, len(self.groups[0]["completion_ids"]), counts, tuning, "uncached"))

    def take(self, layout: str, groups: list[dict]) -> None:
        """Go on with another layout and group."""
        self.trainer.layout, self.groups = layout, groups
        attention = "sdpa" if layout == "padded" else shared_prompt.ATTENTION_NAME
        self.trainer.base_models()[0].set_attn_implementation(attention)


@contextlib.contextmanager
def stepping(
    scale: Scale,
    model: Any,
    groups: list[dict],
    *,
    lora: bool,
    checkpointing: bool = False,
    trl: bool = False,
    **more: Any,
) -> Iterator[Steps]:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    peft = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    with tempfile.TemporaryDirectory() as folder:
        options = options_of(scale, folder, checkpointing)
        if trl:
            row, args = {"prompt": "a", "chosen": "b", "rejected": "c"}, DPOConfig(loss_type=["nca_pair"], **options)
            maker = DPOTrainer
            best, other = groups[0]["completion_ids"][:2]
            groups = [{"prompt_ids": groups[0]["prompt_ids"], "chosen_ids": best, "rejected_ids": other}]
        else:
            row = {"prompt_ids": [3, 4], "completion_ids": [[5], [6]], "scores": [1.0, 0.0]}
            maker, args = ContrastiveTrainer, ContrastiveConfig(loss_type="nca", layout="shared", **options)
        rows = Dataset.from_list([row])
        trainer = maker(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft, **more)
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model.train()
        yield Steps(trainer, groups)
        trainer.accelerator.free_memory()
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- the rows


def row_a(scale: Scale) -> Iterator[Line]:
    """Log-probs and gradients against float32 on padded rows, what "auto" chooses, and what one row sees of another."""
    groups = [g for i in range(3) for g in groups_of(scale, (17 + i, 3, 6 + i))]
    batch = {n: t.to(scale.device) for n, t in GroupCollator(0)(groups).items()}
    exact = None
    for dtype, layout in ((torch.float32, "padded"), (torch.float32, "shared"), (BFLOAT, "padded"), (BFLOAT, "shared")):
        model = random_model(config_of(scale, scale.small, num_hidden_layers=2), scale.device, dtype)
        add_fused_lm_head(model)
        add_head(model)
        model.set_attn_implementation("sdpa" if layout == "padded" else shared_prompt.ATTENTION_NAME)
        scored = completion_logps(model, batch, layout=layout)
        scored.logps.sum().backward()
        gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        found = scored.logps.detach()[batch["valid"]], gradient
        if exact is None:
            exact = found
            continue
        gap = gap_per_token(found[0], exact[0], scored.lengths[batch["valid"]]).item()
        relative = ((found[1] - exact[1]).norm() / exact[1].norm()).item()
        said = f"{gap:.1e} nats a token, gradient {relative:.1e}"
        yield Line("A", f"{layout}, {str(dtype)[6:]}, beside padded float32", found=said)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    words = other["completion_mask"][1].bool()
    other["input_ids"][1, words] = (other["input_ids"][1, words] + 7) % scale.vocabulary
    with torch.no_grad():
        moved = (completion_logps(model, other, layout="shared").logps - scored.logps)[0, [0, 2]].abs().max().item()
    yield Line("A", "leak: what a completion moves with the words of another", found=f"{moved:.1e}", reckoned="0")
    model = random_model(config_of(scale, scale.small, num_hidden_layers=scale.deep), scale.device, BFLOAT)
    add_fused_lm_head(model)
    add_head(model)
    yield Line("A", f"auto, {scale.deep} layers, bfloat16", found=choose_layout(model, "auto"), reckoned="shared")


def package_attention(prompt: int, completions: tuple[int, ...]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return this package's attention over a packed row of one group, as a function of q, k and v (1, H, n, D)."""
    row = PackedRow([Segment(prompt, completions)], prompt + max(completions))
    module = SimpleNamespace(training=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return shared_prompt.shared_prompt_attention(module, q, k, v, None, shared_prompt=row)[0].transpose(1, 2)

    return attend


def flex_attention_of(scale: Scale, group: Tensor, n: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & ((group[k] == 0) | (group[k] == group[q]))

    mask = create_block_mask(sees, None, None, n, n, device=scale.device.type)
    attend = torch.compile(flex_attention, dynamic=False) if scale.device.type == "cuda" else flex_attention
    return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=True)


def one_call_a_branch(prompt: int, k: int, completion: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return attention in a call for the prompt and one for each branch, to which the prompt's keys are copied."""
    from torch.nn.attention.bias import causal_lower_right

    def attend(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = [F.scaled_dot_product_attention(
            q[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], is_causal=True, enable_gqa=True
        )]  # fmt: skip
        for at in range(prompt, prompt + k * completion, completion):
            own = [torch.cat([x[:, :, :prompt], x[:, :, at : at + completion]], 2) for x in (key, value)]
            triangle = causal_lower_right(completion, prompt + completion)
            found.append(F.scaled_dot_product_attention(
                q[:, :, at : at + completion], *own, attn_mask=triangle, enable_gqa=True
            ))  # fmt: skip
        return torch.cat(found, 2)

    return attend


def row_b(scale: Scale) -> Iterator[Line]:
    """Attention alone, forward, and forward with backward."""
    heads, kv_heads, d = scale.heads
    dtype = BFLOAT if scale.device.type == "cuda" else torch.float32
    for (prompt, k, completion), reckoned in zip(scale.shapes, ("0.15 ms", "0.52 ms", "1.2 ms"), strict=True):
        n = prompt + k * completion
        group = torch.cat([torch.zeros(prompt), torch.arange(1, k + 1).repeat_interleave(completion)]).to(scale.device)
        at = torch.arange(n, device=scale.device)
        dense = (at[None] <= at[:, None]) & ((group[None] == 0) | (group[None] == group[:, None]))
        plain = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
        ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            "this package": package_attention(prompt, (completion,) * k),
            "one call a branch": one_call_a_branch(prompt, k, completion),
            "FlexAttention": flex_attention_of(scale, group, n),
            "dense mask": functools.partial(plain, attn_mask=dense),
            "padded": functools.partial(plain, is_causal=True),
        }
        pairs = prompt * (prompt + 1) / 2 + k * (completion * prompt + completion * (completion + 1) / 2)
        forward = roofline(4 * heads * d * pairs, 2 * d * n * (2 * heads + 2 * kv_heads))
        expected = None
        for name, attend in ways.items():
            rows, length = (k, prompt + completion) if name == "padded" else (1, n)
            torch.manual_seed(0)
            q, key, v = (
                torch.randn(rows, h, length, d, device=scale.device, dtype=dtype, requires_grad=True)
                for h in (heads, kv_heads, kv_heads)
            )
            grad, what = torch.randn_like(q), f"{name}, ({prompt}, {k} x {completion})"

            def once(attend=attend, q=q, key=key, v=v):
                with torch.no_grad():
                    return attend(q, key, v)

            def both(attend=attend, q=q, key=key, v=v, grad=grad):
                torch.autograd.grad(attend(q, key, v), (q, key, v), grad)

            told = reckoned if name == "this package" else ""
            try:
                found = once().float()
                yield Line(
                    "B", f"{what}, forward", median_seconds(once, scale.device, 3 * scale.steps), forward, "", told
                )
                seconds = median_seconds(both, scale.device, 3 * scale.steps)
                yield Line("B", f"{what}, forward and backward", seconds, 3.5 * forward)
            except (RuntimeError, NotImplementedError) as error:  # a device without the kernel, or without the memory
                yield Line("B", what, found=first_line(error))
                continue
            expected = found if expected is None else expected
            if name != "padded" and (gap := (found - expected).abs().max().item()) > 0.05:
                yield Line("B", f"{what}: not what this package computes", found=f"{gap:.2g}")


def rows_c_to_e(scale: Scale) -> Iterator[Line]:
    """A step of a 7B model: LoRA, bf16, checkpointing, live reference."""
    reckoned = {"padded": ("622 ms", "2,486 ms", "7,818 ms"), "shared": ("316 ms", "971 ms", "979 ms")}
    model = random_model(config_of(scale, scale.large), scale.device, BFLOAT)
    with stepping(scale, model, groups_of(scale, scale.shapes[0]), lora=True, checkpointing=True) as steps:
        for i, (name, shape) in enumerate(zip("CDE", scale.shapes, strict=True)):
            for layout in ("shared", "padded"):
                steps.take(layout, groups_of(scale, shape))
                what = f"7B step, {layout}, ({shape[0]}, {shape[1]} x {shape[2]})"
                yield Line(name, what, steps.seconds(scale), steps.floor("lora"), reckoned=reckoned[layout][i])


def row_f(scale: Scale) -> Iterator[Line]:
    """Peak memory of C to E without checkpointing, 8 layers."""
    reckoned = {"padded": ("1.6", "5.6", "11.3"), "shared": ("0.5", "1.5", "1.4")}
    model = random_model(config_of(scale, scale.large, num_hidden_layers=scale.eight), scale.device, BFLOAT)
    with stepping(scale, model, groups_of(scale, scale.shapes[0]), lora=True) as steps:
        for i, shape in enumerate(scale.shapes):
            for layout in ("shared", "padded"):
                steps.take(layout, groups_of(scale, shape))
                peak = steps.peak(scale)
                found = "not measured on a CPU" if peak is None else f"{peak / 1e9:.2f} GB"
                what = f"peak, {layout}, ({shape[0]}, {shape[1]} x {shape[2]}), {scale.eight} layers"
                yield Line("F", what, found=found, reckoned=f"attention's part {reckoned[layout][i]} GB")


def row_g(scale: Scale) -> Iterator[Line]:
    """The token loss at two sizes of a chunk, and drawing beside transformers' own decoding."""
    vocabulary, n, width = scale.words
    dtype = BFLOAT if scale.device.type == "cuda" else torch.float32
    hidden, reference = (torch.randn(n, width, device=scale.device, dtype=dtype) for _ in range(2))
    weight = torch.randn(vocabulary, width, device=scale.device, dtype=dtype) * width**-0.5
    labels = torch.randint(vocabulary, (n,), device=scale.device)
    hidden.requires_grad_()
    floor = roofline(3 * 2 * n * width * vocabulary, 3 * 4 * n * vocabulary)
    for logits in (2**23, 2**27):
        rows = max(1, logits // vocabulary)

        def loss(rows=rows):
            with mock.patch.object(token_loss, "rows_at_once", lambda *_: (rows, max(1, rows // 4))):
                terms = token_loss.token_loss(
                    hidden, weight, None, labels, reference=(reference, weight, None), kl_coef=0.1, entropy_coef=0.0,
                    kl_direction="reverse",
                )  # fmt: skip
            terms.loss.backward()

        seconds = median_seconds(loss, scale.device, scale.steps)
        told = "" if logits == 2**23 else "half of the line above or less"
        yield Line("G", f"token loss, chunks of {rows} of {n} tokens", seconds, floor, reckoned=told)
    count, tokens = scale.drawn
    shape = {**scale.small, "num_hidden_layers": min(4, scale.small["num_hidden_layers"])}
    model = random_model(config_of(scale, shape, vocab_size=vocabulary), scale.device, dtype).eval()
    prompts = [g["prompt_ids"] for _ in range(4) for g in groups_of(scale, (16, 1, 1), vocabulary)]

    def drawing():
        tokens_of = {"eos_token_ids": [], "pad_token_id": 0}
        draw(model, prompts, per_prompt=count // 4, max_new_tokens=tokens, seeds=[0, 1, 2, 3], **tokens_of)

    rows = torch.tensor([p for p in prompts for _ in range(count // 4)], device=scale.device)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def decoding():
        with torch.no_grad():
            model.generate(rows, attention_mask=torch.ones_like(rows), **options)

    def noise():
        seeds = torch.arange(count, device=scale.device)
        for step in range(tokens):
            exponential_noise(seeds, step, vocabulary)

    plain, own, of_noise = (median_seconds(run, scale.device, scale.steps) for run in (decoding, drawing, noise))
    what = f"{count} rows x {tokens} tokens"
    yield Line("G", f"{what}, greedy, by transformers", plain)
    yield Line("G", f"{what}, drawn", own)
    yield Line("G", f"the noise of this, {of_noise / own:.1%} of the time", of_noise, reckoned="under 5%")


def row_h(scale: Scale) -> Iterator[Line]:
    """Waits for the device in a step, a 4-bit model, and full fine-tuning of 1B."""
    shape = scale.shapes[0]
    model = random_model(config_of(scale, scale.small, num_hidden_layers=2), scale.device, BFLOAT)
    with stepping(scale, model, groups_of(scale, shape), lora=True) as steps:
        for layout in ("shared", "padded"):
            steps.take(layout, groups_of(scale, shape))
            steps.step()
            with Waits() as waits:
                steps.step()
            yield Line(
                "H", f"waits of the host in a step, {layout}", found=str(waits.found.total()), reckoned="TRL: 21"
            )
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(scale, scale.large, num_hidden_layers=scale.eight)
        random_model(config, scale.device, BFLOAT).save_pretrained(folder)
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BFLOAT
        )  # fmt: skip
        more = {"lora": True, "checkpointing": True, "quantization_config": four_bit}
        with stepping(scale, folder, groups_of(scale, shape), **more) as steps:
            yield Line("H", f"C in 4 bits (NF4), {scale.eight} layers", steps.seconds(scale), None)
    model = random_model(config_of(scale, scale.small), scale.device, BFLOAT)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        with stepping(scale, folder, groups_of(scale, shape), lora=False) as steps:
            seconds, floor = steps.seconds(scale), steps.floor("full")
            yield Line("H", "1B, full fine-tuning", seconds, floor, reckoned="at least 45% of the roofline")


def row_i(scale: Scale) -> Iterator[Line]:
    """TRL's DPOTrainer beside this package."""
    prompt, _, completion = scale.shapes[0]
    trl = None
    for name, k in (("TRL", 2), ("this package", 2), ("this package", 4)):
        groups = groups_of(scale, (prompt, k, completion), vocabulary=2000)
        model = random_model(config_of(scale, scale.small), scale.device, BFLOAT)
        with stepping(scale, model, groups, lora=True, trl=name == "TRL") as steps:
            seconds = steps.seconds(scale)
            floor = None if name == "TRL" else steps.floor("lora")
        trl = trl or seconds
        found = f"{1e3 * seconds:.3g} ms, {trl / seconds:.2f} times as fast as TRL at K = 2"
        told = "at least 1.5 times" if (name, k) == ("this package", 2) else ""
        yield Line("I", f"{name}, ({prompt}, {k} x {completion})", seconds, floor, found, told)


ROWS = {
    "A": row_a,
    "B": row_b,
    **dict.fromkeys("CDE", rows_c_to_e),
    "F": row_f,
    "G": row_g,
    "H": row_h,
    "I": row_i,
}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def measured(scale: Scale, rows: list[str], seconds: float) -> Iterator[Line]:
    """Yield the lines of the rows; a row that fails, or for which no time is left, is a line that says so."""
    began, done = time.monotonic(), set()
    for name in rows:
        if ROWS[name] in done:
            continue
        done.add(ROWS[name])
        if time.monotonic() - began > seconds:
            yield Line(name, "left out", found=f"{seconds:g} s are over")
            continue
        try:
            for line in ROWS[name](scale):
                if line.row in rows:
                    yield line
        except Exception as error:
            if scale.device.type == "cpu":
                raise
            yield Line(name, "failed", found=first_line(error))
            torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), default=sorted(ROWS))
    parser.add_argument("--seconds", type=float, default=600, help="no row begins later")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed and none was found. On a CPU: --tiny, which measures nothing of use.")
    logging.set_verbosity_error()
    disable_progress_bars()
    scale = Scale.tiny() if options.tiny else Scale(torch.device("cuda"))
    device = "a CPU, in miniature" if options.tiny else torch.cuda.get_device_name()
    print(f"{device}; torch {torch.__version__}, CUDA {torch.version.cuda}, transformers {transformers.__version__}\n")
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    for line in measured(scale, options.rows, options.seconds):
        print(f"| {' | '.join(line.cells())} |", flush=True)


if __name__ == "__main__":
    main()
