"""The bundled demo: its grammar, its reward, its data, its tokenizer and its model."""

import random
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from contrastive_align.demo import (
    MODEL_PATH,
    contains_please,
    load_preference_dataset,
    load_reward_dataset,
    reward,
)
from contrastive_align.demo.task import all_prompts, parse_prompt


BUILD = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "build_demo.py"))
sample, split_prompts = BUILD["sample"], BUILD["split_prompts"]
sample_completion, sample_prompt = BUILD["sample_completion"], BUILD["sample_prompt"]
PROMPT = "Ask Anna to close the door.\n"


def score(completion: str, prompt: str = PROMPT) -> float:
    return reward([prompt], [completion])[0]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()


@pytest.fixture(scope="module")
def groups():
    return load_reward_dataset()


def test_reward_follows_its_table():
    assert score("Could you please close the door, Anna? Thank you.") == 1.0
    assert score("Could you please close the door, Anna?") == 0.9
    assert score("Anna, close the door.") == 0.7
    assert score("Anna, close the door") == 0.6
    assert score("Anna, close the door now!") == 0.6
    assert score("Hurry up and close the door now, Anna!") == 0.5
    assert score("Anna, feed the cat.") == 0.4
    assert score("Ben, feed the cat now!") == 0.0
    assert score("") == 0.0


def test_polite_beats_blunt_beats_wrong():
    polite, blunt = (
        score("Anna, would you kindly close the door? Many thanks."),
        score("Close the door at once, Anna!"),
    )
    wrong = [score("Close the door at once, Ben!"), score("Feed the cat at once, Anna!")]
    assert polite > blunt > max(wrong)


def test_repetition_and_listing_do_not_pay():
    once = score("Please close the door, Anna.")
    assert score("Please, please, please close the door, Anna.") == once
    assert score("Please close the door, Anna. " + "Please! " * 40) < once
    assert score("Please close the door, Anna. Thank you. " * 5) < score("Please close the door, Anna. Thank you.")
    assert score("Please close the door, Anna, Ben, Carla.") < once
    assert score("Please close the door, feed the cat, Anna.") < once


def test_words_are_whole_words():
    assert score("Anna, close the door, you know.") == score("Anna, close the door.")
    assert contains_please([PROMPT] * 3, ["PLEASE, go.", "I am pleased.", ""]) == [1.0, 0.0, 0.0]


def test_rewards_read_the_last_message_of_a_conversation():
    text = "Could you close the door, Anna?"
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": PROMPT.strip()}]
    completion = [{"role": "assistant", "content": text}]
    assert reward([prompt], [completion], completion_ids=[[1]], extra="ignored") == [score(text)]
    assert contains_please([prompt], [completion], extra="ignored") == [0.0]


def test_a_foreign_prompt_is_scored_too():
    assert score("Could you help?", "What is two and two?") == pytest.approx(0.2)


def test_grammar_is_seeded_varied_and_within_range():
    def draw(seed: int) -> list[tuple[str, str]]:
        rng = random.Random(seed)
        prompts = [sample_prompt(rng) for _ in range(2000)]
        return [(prompt, sample_completion(prompt, rng)) for prompt in prompts]

    pairs = draw(1)
    assert pairs == draw(1) != draw(2)
    scores = reward(*zip(*pairs, strict=True))
    assert min(scores) >= 0 and max(scores) == 1
    assert len(set(scores)) >= 8
    known = set(all_prompts())
    assert all(prompt in known and None not in parse_prompt(prompt) for prompt, _ in pairs)


def test_reward_dataset_is_what_it_says(groups):
    assert len(groups["train"]) >= 500 and len(groups["test"]) >= 100
    for split in groups.values():
        for row in split:
            size = len(row["completions"])
            assert 2 <= size <= 6
            assert len(set(row["completions"])) == size
            assert row["scores"] == reward([row["prompt"]] * size, row["completions"])
            assert not any("<eos>" in text or "<pad>" in text for text in row["completions"])
    scores = [score for row in groups["train"] for score in row["scores"]]
    assert len(set(scores)) >= 8
    assert {len(row["scores"]) for row in groups["train"]} == {2, 3, 4, 5, 6}


def test_test_prompts_ask_for_something_new(groups):
    train, test = (groups[split]["prompt"] for split in ("train", "test"))
    assert len(set(train)) == len(train) and len(set(test)) == len(test)
    assert {parse_prompt(prompt) for prompt in train}.isdisjoint(parse_prompt(prompt) for prompt in test)
    again_train, again_test = split_prompts(random.Random(0))
    assert {parse_prompt(prompt) for prompt in again_train}.isdisjoint(parse_prompt(prompt) for prompt in again_test)


def test_preference_dataset_is_best_and_worst_of_the_groups(groups):
    for name, split in load_preference_dataset().items():
        by_prompt = {row["prompt"]: row for row in groups[name]}
        assert len(split) == sum(len(set(row["scores"])) > 1 for row in by_prompt.values())
        for row in split:
            group = by_prompt[row["prompt"]]
            points = dict(zip(group["completions"], group["scores"], strict=True))
            assert points[row["chosen"]] == max(group["scores"]) > min(group["scores"]) == points[row["rejected"]]


@pytest.mark.parametrize(
    "text",
    [
        "Ask Anna to close the door.\n",
        "  two  spaces , and a tab\t\n\n",
        "naïve façade, 東京, Привет, ﷽, 👩‍👩‍👧 🇨🇭",
        "\x00\x7f\ufeff\u2028",
    ],
)
def test_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_has_what_trainers_expect(tokenizer, model):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token_id is None and tokenizer.unk_token_id is None
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id


def test_prompt_and_completion_meet_between_two_tokens(tokenizer, groups):
    for row in groups["test"]:
        for completion in row["completions"]:
            apart = tokenizer(row["prompt"])["input_ids"] + tokenizer(completion)["input_ids"]
            assert tokenizer(row["prompt"] + completion)["input_ids"] == apart


@pytest.mark.parametrize("content", [PROMPT, PROMPT.strip()])
def test_chat_template_writes_the_plain_form(tokenizer, content):
    user, assistant = {"role": "user", "content": content}, {"role": "assistant", "content": "Anna, close the door."}
    for add_generation_prompt in (True, False):
        rendered = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=add_generation_prompt)
        assert rendered == PROMPT
    assert tokenizer.apply_chat_template([user, assistant], tokenize=False) == PROMPT + "Anna, close the door.<eos>"
    encoded = tokenizer.apply_chat_template(
        [user, assistant], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    said = [token for token, mine in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mine]
    assert tokenizer.decode(said) == "Anna, close the door.<eos>"


def test_model_is_small_and_samples_plainly(model, tokenizer, groups):
    assert model.num_parameters() <= 2_000_000
    assert model.dtype == torch.float32
    prompts = groups["test"]["prompt"][:] * 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        completions = sample(model, tokenizer, prompts)
    ended = [(prompt, text) for prompt, text in zip(prompts, completions, strict=True) if text is not None]
    assert len(ended) >= 0.97 * len(prompts)
    please = contains_please(*zip(*ended, strict=True))
    assert 0.05 <= sum(please) / len(please) <= 0.18
    scores = reward(*zip(*ended, strict=True))
    assert 0.5 <= sum(scores) / len(scores) <= 0.75
    assert len(set(scores)) >= 8
