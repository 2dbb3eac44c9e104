"""Rebuild the bundled tokenizer, model and data sets: `python benchmarks/build_demo.py [--output_dir DIR]`.

Everything is drawn from the grammar in `contrastive_align/demo/task.py`, from a fixed seed and on a fixed number of
threads, so on one machine two runs write the same bytes. It takes a few minutes on two CPU cores.

1. A byte-level BPE tokenizer is trained, which can therefore encode any text.
2. A small Llama is trained from scratch on fresh text from the grammar.
3. Completions are sampled from that model and scored by the reward program.
"""

import argparse
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from contrastive_align import demo
from contrastive_align.demo.task import NAMES, TASKS, VERBS, all_prompts, contains_please, parse_prompt, reward


SEED = 20240917
THREADS = 2
PAD, EOS = "<pad>", "<eos>"

VOCAB_SIZE = 512
CONTEXT = 512
TOKENIZER_TEXTS = 5_000

STEPS = 800
BATCH_SIZE = 96
LEARNING_RATE = 4e-3
WARMUP_STEPS = 50

TRAIN_GROUPS = 1_200
TEST_GROUPS = 200
GROUP_SIZES = (2, 3, 4, 5, 6)
DRAWS = 10  # completions drawn for each prompt, of which the first different ones make its group
MAX_NEW_TOKENS = 40

# A conversation is written as the model has seen text: what the user says on a line, then the answer and the end
# token. The line break is the whole of the generation prompt, and it is there with and without one, so that the text
# of a prompt is always the beginning of the text of the prompt with its completion.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{%- else %}"
    "{{ message['content'] | trim + '\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
)

# How a request may be put, by manner, with the share of each manner in the text that the model is trained on.
# "please" is kept rare on purpose: it is the feature that a controlled model is asked to show half of the time.
MANNERS = {
    "blunt": (
        "{name}, {task} now!",
        "{task} at once, {name}!",
        "{task}, {name}, you fool!",
        "Hurry up and {task} now, {name}!",
    ),
    "plain": (
        "{name}, {task}.",
        "{name}, you need to {task}.",
        "I want you to {task}, {name}.",
        "It is time to {task}, {name}.",
    ),
    "polite": (
        "Could you {task}, {name}?",
        "{name}, would you {task}?",
        "{name}, would you kindly {task}?",
        "Could you please {task}, {name}?",
        "Please {task}, {name}.",
    ),
}
MANNER_SHARES = {"blunt": 0.40, "plain": 0.32, "polite": 0.28}
THANKS = ("Thank you.", "Many thanks.")
THANKS_SHARES = {"blunt": 0.0, "plain": 0.2, "polite": 0.4}
MISTAKE_SHARE = 0.1  # each of: the wrong person, the wrong task, no mark at the end


def sample_prompt(rng: random.Random) -> str:
    """One prompt, such as `Ask Anna to close the door.` and a line break."""
    return f"{rng.choice(VERBS)} {rng.choice(NAMES)} to {rng.choice(TASKS)}.\n"


def sample_completion(prompt: str, rng: random.Random) -> str:
    """One completion for `prompt`, in a random manner and sometimes with a mistake."""
    name, task = parse_prompt(prompt)
    if rng.random() < MISTAKE_SHARE:
        name = rng.choice(NAMES)
    if rng.random() < MISTAKE_SHARE:
        task = rng.choice(TASKS)
    manner = rng.choices(list(MANNERS), weights=[MANNER_SHARES[manner] for manner in MANNERS])[0]
    text = rng.choice(MANNERS[manner]).format(name=name, task=task)
    if rng.random() < THANKS_SHARES[manner]:
        text = f"{text} {rng.choice(THANKS)}"
    if rng.random() < MISTAKE_SHARE:
        text = text[:-1]
    return text[0].upper() + text[1:]


def build_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the grammar; all 256 bytes are in its alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_sample_text(rng) for _ in range(TOKENIZER_TEXTS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        padding_side="left",  # so that a batch of prompts can be continued
        clean_up_tokenization_spaces=False,  # decoding must give back exactly what was encoded
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build an untrained Llama of under a million parameters, which by default samples at temperature 1."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
    """Train on prompts and completions alike, on text that is drawn afresh for every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (STEPS - step) / (STEPS - WARMUP_STEPS))
    )
    model.train()
    start = time.perf_counter()
    for step in range(STEPS):
        texts = [_sample_text(rng) + EOS for _ in range(BATCH_SIZE)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        # With padding on the right the causal mask alone is enough, and it is the quicker one.
        loss = model(input_ids=batch["input_ids"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - start:6.1f} s", flush=True)
    model.eval()


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], batch_size: int = 500
) -> list[str | None]:
    """Draw one sample per prompt, without the end token; `None` if it did not end within 40 tokens."""
    completions: list[str | None] = []
    for begin in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[begin : begin + batch_size], return_tensors="pt", padding=True)
        output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS)
        for row in output[:, batch["input_ids"].shape[1] :]:
            ended = bool((row == tokenizer.eos_token_id).any())
            completions.append(tokenizer.decode(row, skip_special_tokens=True) if ended else None)
    return completions


def split_prompts(rng: random.Random) -> tuple[list[str], list[str]]:
    """Split the prompts so that no test prompt shares both its person and its task with a training prompt."""
    prompts = all_prompts()
    rng.shuffle(prompts)
    test: dict[tuple[str | None, str | None], str] = {}
    for prompt in prompts:
        if len(test) < TEST_GROUPS:
            test.setdefault(parse_prompt(prompt), prompt)
    train = [prompt for prompt in prompts if parse_prompt(prompt) not in test]
    return train[:TRAIN_GROUPS], list(test.values())


def build_groups(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], rng: random.Random
) -> list[dict]:
    """Sample and score a group of different completions for each prompt, without prompts that have fewer than two."""
    draws = sample(model, tokenizer, [prompt for prompt in prompts for _ in range(DRAWS)])
    groups = []
    for index, prompt in enumerate(prompts):
        different = list(dict.fromkeys(text for text in draws[index * DRAWS : (index + 1) * DRAWS] if text))
        completions = different[: rng.choice(GROUP_SIZES)]
        if len(completions) > 1:
            scores = reward([prompt] * len(completions), completions)
            groups.append({"prompt": prompt, "completions": completions, "scores": scores})
    return groups


def build_pairs(groups: list[dict]) -> list[dict]:
    """Pair the best and the worst completion of each group whose scores differ."""
    pairs = []
    for group in groups:
        ranked = sorted(zip(group["scores"], group["completions"], strict=True))
        (worst_score, worst), (best_score, best) = ranked[0], ranked[-1]
        if best_score > worst_score:
            pairs.append({"prompt": group["prompt"], "chosen": best, "rejected": worst})
    return pairs


def main(arguments: list[str] | None = None) -> None:
    """Build everything and print what there is to know about it."""
    parser = argparse.ArgumentParser(description="Rebuild the bundled model and data sets.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path(demo.__file__).parent, help="where model/ and data/ are written"
    )
    output_dir = parser.parse_args(arguments).output_dir

    start = time.perf_counter()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)

    tokenizer = build_tokenizer(rng)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, rng)
    save_model(model, tokenizer, output_dir / "model")

    data_dir = output_dir / "data"
    data_dir.mkdir(parents=True, exist_ok=True)
    train_prompts, test_prompts = split_prompts(rng)
    for split, prompts in (("train", train_prompts), ("test", test_prompts)):
        groups = build_groups(model, tokenizer, prompts, rng)
        pairs = build_pairs(groups)
        _write_lines(data_dir / f"{split}.jsonl", groups)
        _write_lines(data_dir / f"preference_{split}.jsonl", pairs)
        print(f"{split}: {len(groups)} groups, {len(pairs)} pairs")

    prompts = test_prompts * 5
    completions = sample(model, tokenizer, prompts)
    ended = [(prompt, text) for prompt, text in zip(prompts, completions, strict=True) if text is not None]
    scores = reward(*zip(*ended, strict=True))
    please = contains_please(*zip(*ended, strict=True))
    print(f"plain samples: {len(ended) / len(prompts):.1%} end within {MAX_NEW_TOKENS} tokens")
    print(f"mean reward {sum(scores) / len(scores):.3f}, contain 'please' {sum(please) / len(please):.1%}")
    print(f"took {time.perf_counter() - start:.0f} s")


def _sample_text(rng: random.Random) -> str:
    prompt = sample_prompt(rng)
    return prompt + sample_completion(prompt, rng)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, model_dir: Path) -> None:
    """Write weights, configuration and tokenizer into a folder that every user can read."""
    model.save_pretrained(model_dir)
    # The weights are written for their owner's eyes only, and an installed package is read by others as well.
    (model_dir / "model.safetensors").chmod(0o644)
    # The chat template is kept inside the configuration so that the folder holds nothing but JSON and the weights.
    tokenizer.save_pretrained(model_dir, save_jinja_files=False)


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
