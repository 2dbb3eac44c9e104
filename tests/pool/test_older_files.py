"""Files that earlier versions wrote (fixtures/older, by commit fab731b) are read with the same content."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from contrastive_align.conditions import CONDITIONS, Condition, resolve_condition
from contrastive_align.judge.judge import Judge
from contrastive_align.pool import Pool, quantiles
from contrastive_align.pool.prompts import check_prompts


OLDER = Path(__file__).parents[1] / "fixtures" / "older"
EXPECTED = json.loads((OLDER / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def pool(tmp_path):
    shutil.copytree(OLDER / "pool", tmp_path / "pool")
    return Pool(tmp_path / "pool", label=lambda table: quantiles(table.score, n=2), drop_factor=0.5, seed=3)


def test_a_pool_has_the_same_samples_labels_and_draws(pool):
    assert [asdict(sample) for sample in pool] == EXPECTED["samples"] and len(pool) > 6
    table = pool.table()
    assert table.label.tolist() == EXPECTED["label"]
    assert [None if np.isnan(x) else x for x in table.score.tolist()] == EXPECTED["score"]
    assert (table.round.tolist(), table.row.tolist()) == (EXPECTED["round"], EXPECTED["row"])
    assert pool.draws(9, seed=5)[0].tolist() == EXPECTED["draws"]
    assert {str(number): step for number, step in pool.steps.items()} == EXPECTED["steps"]


def test_a_pool_knows_its_prompts_and_is_continued(pool):
    check_prompts(pool, EXPECTED["prompts"])
    with pytest.raises(ValueError, match=r"row 0 was 'Say hello\.'"):
        check_prompts(pool, EXPECTED["prompts"][::-1])
    samples = [type(pool[0])(**{**s, "round": 3, "step": 20}) for s in EXPECTED["samples"]]
    pool.add(samples)
    assert pool.rounds == [1, 2, 3]


@pytest.mark.parametrize("kind", sorted(CONDITIONS))
def test_a_condition_asks_the_same(kind):
    condition, expected = Condition.load(OLDER / "conditions" / kind), EXPECTED["conditions"][kind]
    assert condition.kind == kind and condition.spec.items() >= expected["spec"].items()
    assert condition == resolve_condition(expected["spec"])
    assert condition.apply_best("Hello {prompt}") == expected["asked"]
    assert (condition.names(), condition.tokens) == (expected["names"], expected["tokens"])


def test_a_judge_finds_its_answers_and_makes_no_call(tmp_path):
    shutil.copytree(OLDER / "judge", tmp_path / "judge")
    options = {"model": "m", "cache": tmp_path / "judge", "base_url": "http://127.0.0.1:9/v1"}  # nobody is there
    expected = EXPECTED["judge"]
    judge = Judge(OLDER / "judge_prompt.txt", answers="text", **options)
    found = [None if verdict is None else asdict(verdict) for verdict in judge(*expected["items"])]
    assert found == expected["verdicts"] and None in found
    judge = Judge("helpful_categories", answers=expected["categories"], **options)
    assert [asdict(verdict) for verdict in judge(["p"], ["a"])] == [expected["category_verdict"]]
    assert (judge.report()["calls"], judge.report()["calls_ever"]) == (0, expected["calls"])
