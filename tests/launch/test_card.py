"""The model card: its program runs with the model as it was saved, and what it says of base, data and results is so."""

import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from small_trainers import COLUMNS
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers import trainer as trainer_module

from contrastive_align import demo
from contrastive_align.launch import cli
from contrastive_align.launch.contrastive import RewardRun


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def run_program(folder):
    """Run the card's program in another working directory, with the folder in the name's place."""
    card = (Path(folder) / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    lines = [f"folder = {str(folder)!r}" if line.startswith("folder = ") else line for line in code.splitlines()]
    assert lines != code.splitlines()
    found = {}
    exec("\n".join(lines), found)
    return found


def says_the_same(found, trainer):
    ids = torch.tensor([[3, 4, 5, 4]])
    more = {"decoder_input_ids": ids} if trainer.model.config.is_encoder_decoder else {}
    with torch.no_grad():
        loaded, trained = (m.eval()(input_ids=ids, **more).logits for m in (found["model"], trainer.model))
    assert torch.allclose(loaded.float(), trained.float(), atol=1e-4)


def finished(trainer):
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return Path(trainer.args.output_dir)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("column", COLUMNS, ids=str)
def test_the_program_runs(column, lora, tmp_path, capsys):
    told = {"peft_config": column.lora()} if lora else {}
    trainer = column.make(tmp_path / "out", told=told, learning_rate=0.5)
    says_the_same(run_program(finished(trainer)), trainer)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == ("peft" if lora else "transformers")
    assert not {"licence", "license", "base_model", "datasets"} & card.data.to_dict().keys()  # nothing of it is known
    assert f"`{Path(column.model_path()).name}`" in card.text and os.environ["HF_HOME"] not in card.content


def test_the_program_asks_in_chat(tmp_path, monkeypatch):
    column = COLUMNS[0]
    tokenizer = AutoTokenizer.from_pretrained(column.model_path())
    tokenizer.chat_template = CHAT
    talk = [
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}],
         "completions": [[{"role": "assistant", "content": text.strip()}] for text in row["completions"]]}
        for row in column.rows()
    ]  # fmt: skip
    for rows, chat in ((talk, True), (list(column.rows()), False)):
        told = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
        trainer = column.make(tmp_path / str(chat), told=told)
        assert trainer.is_conversational == chat
        found = run_program(finished(trainer))
        assert found["prompt"].startswith("<user>Why is the sky blue?<assistant>") == chat
        says_the_same(found, trainer)


def adapter_of(model_path, folder):
    column = COLUMNS[0]
    trainer = column.make(folder, told={"model": model_path, "peft_config": column.lora()}, learning_rate=0.5)
    trainer.train()
    trainer.save_model()
    return str(folder)


def test_a_start_from_an_adapter_names_its_base(tmp_path):
    """Merged into a base beside the new adapter, also twice over, the base is the first one's."""
    column = COLUMNS[0]
    start = adapter_of(column.model_path(), tmp_path / "first")
    for name in ("second", "third"):
        trainer = column.make(tmp_path / name, told={"model": start, "peft_config": column.lora()}, learning_rate=0.5)
        says_the_same(run_program(finished(trainer)), trainer)
        card = (tmp_path / name / "README.md").read_text()
        assert f"adapter of `{Path(column.model_path()).name}`" in card
        assert f"`{Path(start).name}` was merged into it before training" in card
        start = str(tmp_path / name)


def test_a_kept_adapter_and_4_bit_weights_have_their_real_size_and_rank(tiny_llama, tmp_path):
    path = tiny_llama(hidden_size=64, intermediate_size=128)
    whole = AutoModelForCausalLM.from_pretrained(path)
    lora = LoraConfig(r=4, rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    parameters, adapted = whole.num_parameters(), PeftModel(whole, lora)
    trained = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(
            json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | {"base_model_name_or_path": path}
        )
    )
    run = RewardRun(RewardRun.parse([
        f"--model_name_or_path={tmp_path / 'adapter'}", "--load_in_4bit", "--use_peft", "--lora_r=64",
        "--dtype=float32", f"--output_dir={tmp_path / 'out'}", "--max_train_samples=8", "--max_eval_samples=4",
        "--max_steps=1", "--disable_tqdm=true", "--bf16=false",
    ]))  # fmt: skip
    summary = run.execute()
    assert (summary.model["parameters"], summary.model["trained_parameters"]) == (parameters + trained, trained)
    assert summary.model["adapter"] == {"type": "LoRA", "r": 4, "alpha": 8, "rank_pattern": {"v_proj": 2}}
    assert "LoRA r=4 (v_proj: r=2), 4-bit float32" in summary.model["line"]
    found = run_program(tmp_path / "out")
    assert isinstance(found["quantisation"], BitsAndBytesConfig) and found["model"].is_loaded_in_4bit
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The adapter `adapter` was trained further." in card and str(tmp_path) not in card


# ------------------------------------------------------------------------------------------------------ what is pushed


class Hub:
    """Stands in for the hub's API: keeps what is uploaded, one folder of bytes an upload."""

    def __init__(self):
        self.uploads = []

    def create_repo(self, name, **options):
        return type("Repo", (), {"repo_id": f"me/{Path(name).name}"})

    def upload_folder(self, *, folder_path, ignore_patterns=(), run_as_future=False, **options):
        folder = Path(folder_path)
        self.uploads.append(
            {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        )
        return type("Job", (), {"add_done_callback": lambda self, call: call(self), "done": lambda self: True})()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(trainer_module, "hf_api", lambda: hub)
    return hub


def test_nothing_that_is_pushed_names_a_path(hub, tmp_path, monkeypatch):
    """From a local base with an adapter merged into it, local data, and a checkpoint pushed on the way."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    column = COLUMNS[0]
    start = adapter_of(column.model_path(), tmp_path / "home" / "first")
    data = tmp_path / "home" / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, column.rows())))
    out = tmp_path / "home" / "out"
    argv = [
        "reward", f"--model_name_or_path={start}", "--use_peft", "--lora_r=2", "--lora_target_modules=q_proj",
        f"--dataset_name={data}", f"--output_dir={out}", "--push_to_hub", "--max_steps=2", "--save_strategy=steps",
        "--save_steps=1", "--disable_tqdm=true", "--per_device_train_batch_size=4", "--max_length=64", "--use_cpu",
        "--bf16=false", "--test_split_size=0.25",
    ]  # fmt: skip
    cli.main(argv)
    local = (out / "README.md").read_text()
    assert len(hub.uploads) >= 2 and not list(out.glob("_published*"))
    for upload in hub.uploads:
        named = [name for name, content in upload.items() if str(tmp_path).encode() in content]
        assert named == [] and "training_args.bin" not in upload
        assert json.loads(upload["adapter_config.json"])["base_model_name_or_path"] == "merged_base"
        assert "merged_base/model.safetensors" in upload
    assert hub.uploads[-1]["README.md"].decode() == local and str(tmp_path) not in local
    assert "on `rows.jsonl`" in local and '"me/out"' in local and "datasets" not in ModelCard(local).data.to_dict()

    # The table is that of summary.json, and a run that is resumed has the same card.
    summary = json.loads((out / "summary.json").read_text())
    for row in summary["table"][1:]:
        assert f"| {' | '.join(cell.replace('_', chr(92) + '_') for cell in row)} |" in local
    (out / "checkpoint-2" / "trainer_state.json").unlink()
    cli.main([*argv, "--resume_from_checkpoint=true"])
    assert (out / "README.md").read_text() == local
    pushed = tmp_path / "pushed"
    for name, content in hub.uploads[-1].items():
        (pushed / name).parent.mkdir(parents=True, exist_ok=True)
        (pushed / name).write_bytes(content)
    assert run_program(pushed)["model"].get_base_model().config.hidden_size == 16


def test_the_bases_licence_is_inherited(tmp_path):
    column = COLUMNS[0]
    base = tmp_path / "base"
    trainer = column.make(tmp_path / "whole", max_steps=1)
    for own, want in (
        ("license: cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}),
        (
            "license: other\nlicense_name: ours\nlicense_link: https://a.b/c",
            {"license": "other", "license_name": "ours", "license_link": "https://a.b/c"},
        ),
        ("licence: license", {}),
    ):
        trainer.save_model(str(base))
        (base / "README.md").write_text(f"---\n{own}\n---\n\n# Base\n")
        trainer.start_base = str(base)
        trainer.create_model_card(dataset_name="org/data")
        found = ModelCard.load(tmp_path / "whole" / "README.md").data.to_dict()
        assert {name: value for name, value in found.items() if name.startswith("licen")} == want
        assert found["datasets"] == "org/data" or found["datasets"] == ["org/data"]


def test_the_bundled_run_has_a_true_card(tmp_path):
    small = ["--max_steps=1", "--per_device_train_batch_size=32", "--fit_samples=64", "--eval_samples=100"]
    cli.main(["fdpg", f"--output_dir={tmp_path}", *small, "--disable_tqdm=true"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == demo.LICENCE and "huggingface.co/None" not in card.content
    assert "the demo model of contrastive-align, trained on the demo data of contrastive-align" in card.text
    assert (
        "| KL(p\\|\\|pi) |" in card.text
        and "whether moment/contains:please moved cannot be told from n = 2" in card.text
    )
    run_program(tmp_path)
