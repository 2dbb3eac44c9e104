"""``contrastive-align sample``: the commands of docs/sampling.md, and accepted samples of every reward and model."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from contrastive_align import demo
from contrastive_align.launch import chat, cli, merge, report, sample
from contrastive_align.launch.accepted import AcceptedAnswers
from contrastive_align.launch.past_run import chats, read_summary
from contrastive_align.launch.sample import read_questions
from contrastive_align.launch.usage import UsageError
from contrastive_align.targets import Target


DOCUMENT = Path(__file__).parents[2] / "docs" / "sampling.md"
PROMPTS = ["Ask Grace to mow the lawn.\n", "Ask Paul to print the map.\n", "Tell Emma to buy the milk.\n"]
SMALL = {
    "fdpg": [
        "--max_steps=1", "--fit_samples=256", "--fit_tolerance=0.5", "--fit_min_ess=2", "--eval_samples=200",
        "--eval_prompts=4", "--num_generations=8", "--per_device_train_batch_size=8", "--max_completion_length=24",
        "--report_prompts=0", "--use_cpu=true",
    ],
    "sample": ["--max_completion_length=24"],
}  # fmt: skip


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    lines = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    return sorted(lines, key=lambda argv: argv[0] != "fdpg")  # trained once, at first


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the document's run was made."""
    path = tmp_path_factory.mktemp("document")
    (path / "prompts.txt").write_text("\n".join(prompt.strip() for prompt in PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        (trained,) = [argv for argv in commands() if argv[0] == "fdpg"]
        cli.main([*trained, *SMALL["fdpg"]])
    return path


def rows_of(path):
    text = path.read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("argv", [argv for argv in commands() if argv[0] == "sample"], ids=lambda argv: argv[3])
def test_the_documents_commands_run(argv, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    cli.main([*argv, *SMALL["sample"], "--overwrite"])
    (output,) = [word.partition("=")[2] for word in argv if word.startswith("--output=")]
    rows, said = rows_of(folder / output), capsys.readouterr().out
    assert len(rows) == 3
    if any(word.startswith("--qrs=") for word in argv):
        accepted, proposed, rate = re.search(r"accepted (\d+) of (\d+) proposals \((.*?)\); beta ", said).groups()
        assert float(rate) == pytest.approx(int(accepted) / int(proposed), abs=1e-3)
        assert "alpaca_eval" in str(argv) or all(0 < row["acceptance_rate"] <= 1 for row in rows)


def test_the_chosen_beta_is_in_the_runs_table_and_is_the_default(folder):
    summary = json.loads((folder / "runs/fdpg/summary.json").read_text())
    beta = summary["distributions"]["tuned+QRS"]["beta"]["value"]
    assert any(row[0] == f"acceptance, beta {beta:.4g}" for row in summary["table"])
    assert AcceptedAnswers(str(folder / "runs/fdpg")).beta == beta
    assert AcceptedAnswers(str(folder / "runs/fdpg"), acceptance=0.3).beta is None


def saved_run(tmp_path, model, tokenizer, features, **target_options):
    """The folder that f-DPG leaves, of a run without a step."""
    start, run = tmp_path / "start", tmp_path / "run"
    for place in (start, run):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    target = Target.from_reward(features, **target_options) if target_options else Target(features)
    target.save(run / "target.json")
    model_record = {"start": str(start), "adapter": None}
    record = {"model": model_record, "method": {"max_completion_length": 4}, "data": {"train": {}}}
    (run / "summary.json").write_text(json.dumps(record))
    return run


def test_accepted_samples_of_an_encoder_decoder_follow_the_target(tmp_path, capsys):
    """One token of four: beta above every ratio accepts samples of base * exp(reward)."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    ids = {"pad_token_id": tokenizer.pad_token_id or 0, "eos_token_id": tokenizer.eos_token_id}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **shape, **ids))
    run = saved_run(tmp_path, model, tokenizer, {"length": "characters"}, beta=4.0)
    argv = [
        "sample",
        f"--qrs={run}",
        "--prompt=a",
        "--num_generations=400",
        "--qrs_beta=10",
        "--max_completion_length=1",
    ]
    (row,) = cli.main(argv)
    assert len(row["generations"]) == 400 and "QRS accepted" in capsys.readouterr().out
    with torch.no_grad():
        loaded = AutoModelForSeq2SeqLM.from_pretrained(run)
        inputs = tokenizer("a", return_tensors="pt")["input_ids"]
        p = loaded(input_ids=inputs, decoder_input_ids=torch.tensor([[0]])).logits[0, -1].double().log_softmax(-1)
    lengths = torch.tensor([len(tokenizer.decode([i], skip_special_tokens=True)) for i in range(len(p))]).double()
    target = (p + lengths / 4.0).softmax(-1)
    wanted, spread = float(target @ lengths), float((target @ lengths**2 - (target @ lengths) ** 2) ** 0.5)
    found = sum(map(len, row["generations"])) / 400
    assert abs(found - wanted) < 4 * spread / 400**0.5
    assert abs(found - float(p.exp() @ lengths)) > 4 * spread / 400**0.5
    (beams,) = cli.main(["sample", f"--model={run}", "--prompt=a", "--num_beams=3", "--num_generations=2"])
    assert len(beams["generations"]) == 2


def test_a_completion_leaves_the_prompt_room_in_a_short_context(capsys):
    cli.main(["sample", f"--model={demo.MODEL_PATH}", "--prompt=Ask Ben to feed the cat."])
    assert "sampled" in capsys.readouterr().out


def test_what_contradicts_is_refused(tmp_path):
    for argv, found in {
        (): "--model_name_or_path=MODEL and --qrs",
        ("--model=a", "--acceptance=0.5"): "--acceptance belongs to --qrs",
        ("--qrs=a", "--acceptance=0.5", "--tv=0.1"): "both decide beta",
        ("--model=a", "--num_beams=2", "--temperature=0.5"): "--temperature has no meaning",
        ("--model=a", "--num_beams=2", "--num_generations=3"): "at least --num_generations=3",
        ("--qrs=a", "--qrs_beta=0"): "--qrs_beta is 0.0, expected a finite number above 0.",
        ("--qrs=a", "--qrs_beta=nan"): "--qrs_beta is nan, expected a finite number above 0.",
        ("--qrs=a", "--acceptance=1.5"): "--acceptance is 1.5, expected a finite number above 0, up to 1.",
        ("--qrs=a", "--acceptance=nan"): "--acceptance is nan, expected",
        ("--qrs=a", "--tv=-1"): "--tv is -1.0, expected a finite number above 0, up to 1.",
        ("--model=a", "--temperature=nan"): "--temperature is nan, expected a finite number of 0 or more.",
        ("--model=a", "--top_p=nan"): "--top_p is nan, expected",
        ("--qrs=a", "--tv=0.05", "--top_k=1"): "--top_k=1 leaves completions out",
        ("--qrs=a", "--tv=0.05", "--top_p=0.9"): "--top_p=0.9 leaves completions out",
        ("--qrs=a", "--tv=0.05", "--temperature=0"): "--temperature=0 leaves completions out",
        (f"--qrs={tmp_path}",): "has no target.json: --qrs takes the output_dir",
    }.items():
        with pytest.raises(UsageError) as error:
            cli.main(["sample", "--prompt=a", *argv])
        assert found in error.value.message


TEXT_REWARD = """
def length(prompts, completions, topic, **columns):
    assert all(isinstance(text, str) for text in [*prompts, *completions]), prompts
    assert set(topic) <= {"a lawn", None}, topic
    return [float(len(text)) for text in completions]
"""


def test_prompts_of_qrs_keep_their_form_and_rows_may_lack_columns(tmp_path, capsys):
    """The bundled model has a chat template, and its run was on texts, of which the reward reads the length."""
    (tmp_path / "rewards.py").write_text(TEXT_REWARD)
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    assert tokenizer.chat_template
    run = saved_run(tmp_path, model, tokenizer, f"{tmp_path / 'rewards.py'}:length", beta=20.0)
    rows = [{"prompt": PROMPTS[0], "topic": "a lawn"}, {"prompt": PROMPTS[1], "length": 3}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["sample", f"--qrs={run}", f"--prompts={tmp_path / 'rows.jsonl'}", "--max_completion_length=2"]
    found = cli.main([*argv, "--top_k=50", f"--compare={demo.MODEL_PATH}"])
    said = capsys.readouterr().out
    assert [set(row) for row in found] == [{*row, "generations", "acceptance_rate", "generator"} for row in rows]
    assert "run" in said and " | model" in said and "TV to the target given what the options leave" in said


def test_one_function_says_whether_a_run_chats(tmp_path, folder):
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    summary = read_summary(folder / "runs/fdpg")
    assert summary["data"]["train"]["conversational"] is False and not chats(summary, tokenizer)
    del summary["data"]["train"]["conversational"]  # of an earlier version
    assert not chats(summary, tokenizer)
    assert chats({"data": {"train": {"conversational": True}}, "method": summary["method"]}, tokenizer)
    assert read_summary(folder / "runs/fdpg" / "checkpoint-1") == read_summary(folder / "runs/fdpg")
    assert read_summary(tmp_path) == {}


def test_columns_of_a_question_hide_no_answer(tmp_path, capsys):
    rows = [{"prompt": PROMPTS[0], "output": "its own"}, {"prompt": PROMPTS[1], "choices": ["A", "B"]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = cli.main(["sample", f"--model={demo.MODEL_PATH}", f"--prompts={tmp_path / 'rows.json'}"])
    said = [line.removeprefix("sampled  ") for line in capsys.readouterr().out.splitlines() if "sampled" in line]
    assert said == [repr(row["generations"][0]) for row in found] and "'its own'" not in said


def test_files_of_prompts_are_read_as_training_reads_them(tmp_path):
    odd = "one\u2028two\u0085three"
    for name, text in {
        "a.jsonl": json.dumps({"prompt": odd}, ensure_ascii=False),
        "a.json": json.dumps([{"prompt": odd}], ensure_ascii=False),
        "a.txt": odd,
        "a.questions": json.dumps({"prompt": odd}),
    }.items():
        (tmp_path / name).write_text(f"\ufeff{text}\r\n", encoding="utf-8")
        assert read_questions(tmp_path / name, "jsonl") == [{"prompt": odd}], name
    for data, said in {
        b'{"prompt": "caf\xe9"}': "latin.jsonl is not UTF-8 text",
        b'{"prompt": "a"}\n{"prompt": }': "latin.jsonl, row 1 (line 2): not JSON",
        b"[1]": "latin.jsonl, row 0 (line 1): the row is 1, expected an object",
        b'{"question": "a"}': "latin.jsonl, row 0: the keys ['question'], expected prompt",
        b"\n": "latin.jsonl has no rows",
    }.items():
        (tmp_path / "latin.jsonl").write_bytes(data)
        with pytest.raises(UsageError) as error:
            read_questions(tmp_path / "latin.jsonl", "jsonl")
        assert said in error.value.message


def test_two_turns_fit_by_default_and_a_row_that_does_not_is_named(tmp_path, monkeypatch):
    turns = [{"turns": [PROMPTS[0], PROMPTS[1]], "category": "stem"}] * 2
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, turns)))
    argv = ["sample", f"--model={demo.MODEL_PATH}", f"--prompts={file}"]
    assert len(cli.main([*argv, "--format=mt_bench"])) == 2
    long = {"prompt": " ".join(PROMPTS * 20)}
    file.write_text("\n".join(map(json.dumps, [turns[0], long])))
    monkeypatch.setattr(sample, "converse", lambda *_: pytest.fail("sampled before all rows were checked"))
    with pytest.raises(UsageError) as error:
        cli.main(argv)
    said = "tokens; with an answer of up to 128 (--max_completion_length)"  # a quarter of the context
    assert f"{file}, row 1: its prompt has" in error.value.message and said in error.value.message
    file.write_text(json.dumps(turns[0]))
    with pytest.raises(UsageError) as error:
        cli.main([*argv, "--max_completion_length=300"])
    fits = re.search(r"row 0: its 2 turns have .* Give --max_completion_length=(\d+) or less", error.value.message)
    monkeypatch.undo()
    cli.main([*argv, f"--max_completion_length={fits[1]}"])


def conversation(monkeypatch, *lines):
    said = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt="": next(said, "/quit"))


def test_chat_goes_on_where_the_context_ends(tmp_path, monkeypatch, capsys):
    conversation(monkeypatch, *[line.strip() for line in PROMPTS * 3], " ".join(PROMPTS * 20).replace("\n", " "), "Hi.")
    assert cli.main(["chat", f"--model={demo.MODEL_PATH}", "--alone"]) == 10
    out = capsys.readouterr().out
    assert out.count("note: the oldest turns are left out from now on") == 1
    assert "that is more than the" in out and "--max_completion_length" in out
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    conversation(monkeypatch, "Hi.", "And?")
    cli.main(["chat", f"--model={tmp_path}", "--alone", "--max_completion_length=2"])
    assert capsys.readouterr().out.count("has no chat template, so that it sees the last line alone") == 1


def test_every_parser_takes_log_level(tmp_path, capsys):
    required = {chat: ["--model=a"], merge: ["a", "--output_dir=b"], report: ["a"], sample: []}
    for module, argv in required.items():
        assert module.build_parser().parse_args([*argv, "--log_level=debug"]).log_level == "debug"
    with pytest.raises(UsageError) as error:
        cli.main(["sample", "--model=a", f"--prompts={tmp_path / 'none.txt'}", "--log_level=debug"])
    assert "no file" in error.value.message and "Traceback" in capsys.readouterr().err
