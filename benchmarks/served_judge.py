"""A judge behind another program's endpoint: LMC, LMU and SteerLM from the command line against ``transformers serve``.

    pip install "transformers[serving]"
    python benchmarks/served_judge.py [--teach 400]

The bundled model is taught for some two minutes to judge whether a request is polite: in categories, and in words with
a score. ``transformers serve`` serves it at its chat endpoint. Then the command trains the bundled model on samples
that it judges, with categories in front of the prompt (LMC) and with its words (LMU), and on attributes that it gave to
a file of completions (SteerLM). Printed: the answers read of those asked for, and how many of a file's it got right.
The exit status is 1 where a command fails, or where less than three answers in four are read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from contrastive_align import demo
from contrastive_align.judge.answers import answers_from, render


NAMES = ["Polite", "Rude"]
TEMPLATES = {"categories": "{prompt}\n{completion}\nJSON of {categories}?", "text": "{prompt}\n{completion}\nWords?"}
ANSWERS = {"categories": answers_from(NAMES, 8), "text": answers_from("text", 8)}
REPLIES = {
    "categories": ('{"category": "Polite"}', '{"category": "Rude"}'),
    "text": ('{"feedback": "Polite.", "score": 3}', '{"feedback": "Rude.", "score": 0}'),
}
COMMON = [
    "--use_cpu=true", "--bf16=false", "--gradient_checkpointing=false", "--report_to=none", "--disable_tqdm=true",
    "--logging_steps=1", "--save_strategy=no", "--per_device_train_batch_size=8", "--eval_prompts=4",
    f"--model_name_or_path={demo.MODEL_PATH}",
]  # fmt: skip
ONLINE = [
    "--prompts_per_round=12", "--num_generations=4", "--draws_per_round=48", "--num_train_epochs=2",
    "--max_completion_length=24",
]  # fmt: skip


def is_polite(completion: str) -> bool:
    return "please" in completion.lower()


def pairs() -> list[tuple[str, str]]:
    """Prompts and completions of the bundled data."""
    rows = demo.load_reward_dataset()["train"]
    return [(row["prompt"], text) for row in rows for text in row["completions"]]


def teach(folder: Path, steps: int) -> None:
    """Save a model that answers both kinds of question."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    known = [[pair for pair in pairs() if is_polite(pair[1]) is polite] for polite in (True, False)]
    for step in range(steps):
        rows, labels = [], []
        for i in range(16):
            kind, polite = ("categories", "text")[i % 2], rng.random() < 0.5
            prompt, completion = rng.choice(known[not polite])
            question = render(TEMPLATES[kind], prompt, completion, ANSWERS[kind])
            turns = [{"role": "user", "content": question}]
            asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            reply = [*tokenizer(REPLIES[kind][not polite])["input_ids"], tokenizer.eos_token_id]
            rows.append(asked + reply)
            labels.append([-100] * len(asked) + reply)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        wanted = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
        loss = model(input_ids=ids, labels=wanted).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"taught {step + 1} steps, loss {loss.item():.4f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def serve(model: Path, log: Path) -> tuple[subprocess.Popen, str]:
    """Start the server, and wait until it answers; return it and its address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", str(model), "--host", "localhost"]
    with log.open("w") as out:
        server = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"], stdout=out, stderr=out)
    until = time.monotonic() + 180
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).read()
            return server, f"http://localhost:{port}/v1"
        except OSError:
            time.sleep(1)
    server.kill()
    raise SystemExit(f"transformers serve did not start:\n{log.read_text()[-2000:]}")


def command(name: str, *flags: str, folder: Path) -> dict:
    """Run the command in a process of its own, and return the summary."""
    run = subprocess.run(
        [sys.executable, "-m", "contrastive_align", "conditional", *flags, *COMMON, f"--output_dir={folder}"],
        capture_output=True, text=True, env={**os.environ, "OPENAI_API_KEY": "none"},
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(f"{name}: exit {run.returncode}\n{run.stdout[-1500:]}\n{run.stderr[-1500:]}")
    return json.loads((folder / "summary.json").read_text())


def judged_file(scratch: Path, judge: Path) -> Path:
    """Let the judge score completions of a file, and write its scores as an attribute of each."""
    chosen = random.Random(1).sample(pairs(), 60)
    given, judged, rows = scratch / "given.jsonl", scratch / "judged.jsonl", scratch / "attributes.jsonl"
    given.write_text("".join(json.dumps({"prompt": p, "generations": [c]}) + "\n" for p, c in chosen))
    subprocess.run(
        [sys.executable, "-m", "contrastive_align", "steps", "judge", f"--input={given}", f"--output={judged}",
         f"--judge={judge}"],
        check=True, env={**os.environ, "OPENAI_API_KEY": "none"},
    )  # fmt: skip
    found = [json.loads(line) for line in judged.read_text().splitlines()]
    found = [(row["prompt"], row["generations"][0], row["scores"][0]) for row in found if row["scores"][0] is not None]
    right = sum((score == 3) is is_polite(completion) for _, completion, score in found)
    print(f"a file       {len(found)} of {len(chosen)} answers read, {right} right")
    kept = [{"prompt": prompt, "completion": text, "politeness": int(score)} for prompt, text, score in found]
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teach", type=int, default=400, help="steps")
    args = parser.parse_args()
    failed = False
    with TemporaryDirectory() as name:
        scratch = Path(name)
        teach(scratch / "judge-model", args.teach)
        server, url = serve(scratch / "judge-model", scratch / "server.log")
        try:
            for kind, method in (("categories", "LMC"), ("text", "LMU")):
                (scratch / f"{kind}.txt").write_text(TEMPLATES[kind])
                settings = {
                    "prompt": str(scratch / f"{kind}.txt"), "model": str(scratch / "judge-model"), "base_url": url,
                    "answers": NAMES if kind == "categories" else "text", "budget": 2000, "max_tokens": 40,
                    "concurrency": 2,
                }  # fmt: skip
                if kind == "text":
                    settings["max_words"] = 8
                (scratch / f"{kind}.yaml").write_text(json.dumps(settings))
                condition = "{kind: categories, categories: [Polite, Rude]}" if kind == "categories" else kind
                flags = [f"--condition={condition}", f"--judge={scratch / kind}.yaml", *ONLINE]
                found = command(method, *flags, folder=scratch / kind)["training"]["judge"]
                asked = found["answered"] + sum(found.get(k, 0) for k in ("unparsable", "failed"))
                failed |= found["answered"] < 0.75 * asked
                print(f"{method:<12} {found['answered']} of {asked} answers read  {found}", flush=True)
            rows = judged_file(scratch, scratch / "text.yaml")
            condition = "--condition={kind: attributes, attributes: {politeness: 3}}"
            found = command("SteerLM", condition, f"--dataset_name={rows}", "--max_steps=5", folder=scratch / "steer")
            print(f"SteerLM      trained {found['training']['steps']} steps on the judge's attributes")
        finally:
            server.kill()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
