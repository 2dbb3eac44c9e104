"""A toy task: ask somebody to do something, politely.

A prompt names a person and a task, and a completion is what one would say to that person:

    Ask Anna to close the door.
    Could you please close the door, Anna? Thank you.

The bundled model was trained on text that speaks in three manners (blunt, plain, polite) and now and then makes a
mistake (`benchmarks/build_demo.py`), so it is fluent but neither reliable nor courteous. `reward` is a small program
that prefers reliable and courteous completions; raising it is the exercise. There is nothing to download and no reward
model, and every score can be checked by eye.
"""

import re
from typing import Any


VERBS = ("Ask", "Tell", "Get")

# fmt: off
NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Karen", "Leo", "Maria",
    "Noah", "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Umar", "Vera", "Will", "Xenia", "Yusuf", "Zoe",
    "Clara", "Oscar", "Nina", "Hugo",
)

TASKS = (
    "close the door", "open the window", "wash the dishes", "water the plants", "feed the cat", "walk the dog",
    "make the tea", "bake the bread", "set the table", "sweep the floor", "fix the lamp", "clean the car",
    "paint the fence", "mow the lawn", "call the doctor", "send the letter", "buy the milk", "find the keys",
    "move the chair", "carry the bags", "read the report", "print the map", "turn off the light", "lock the gate",
)
# fmt: on

# The parts of the reward. They add up to 1 for a request that is right, complete and has three courteous markers.
NAME_POINTS = 0.3
TASK_POINTS = 0.3
ENDING_POINTS = 0.1
MARKER_POINTS = 0.1
COURTEOUS = ("please", "could you", "would you", "kindly", "thank you", "thanks")
RUDE = ("now", "at once", "hurry up", "fool")
MAX_COURTEOUS = 3
MAX_RUDE = 2
FREE_WORDS = 16
EXTRA_WORD_POINTS = 0.05


def all_prompts() -> list[str]:
    """Every prompt of the grammar, in a fixed order."""
    return [f"{verb} {name} to {task}.\n" for name in NAMES for task in TASKS for verb in VERBS]


def parse_prompt(prompt: str) -> tuple[str | None, str | None]:
    """Return the person and the task of a prompt, or `(None, None)` if this grammar does not make it."""
    match = re.search(rf"\b(?:{'|'.join(VERBS)}) (\w+) to ([\w ]+)\.", prompt)
    return (match[1], match[2]) if match else (None, None)


def reward(prompts: list, completions: list, **columns: Any) -> list[float]:
    """Score each completion between 0 and 1 for being right, complete and courteous.

    The score is a sum of parts, rounded to two decimals and kept between 0 and 1:

    | part                                                        | points               |
    | ----------------------------------------------------------- | -------------------- |
    | names the person asked, and nobody else                     | 0.3                  |
    | says the task, and no other                                 | 0.3                  |
    | starts with a capital letter and ends with `.`, `!` or `?`  | 0.1                  |
    | each courteous marker, such as "please"                     | 0.1, for at most 3   |
    | each rude marker, such as "hurry up"                        | -0.1, for at most 2  |
    | each word after the 16th                                    | -0.05                |

    A marker counts once however often it is said, so repeating a word earns nothing and in the end costs points. A
    prompt that is not of this grammar asks nobody for anything, so the first two parts are then 0.

    Args:
        prompts: Texts, or lists of messages of which the last is read.
        completions: Texts or lists of messages, one for each prompt.
        **columns: Ignored. Trainers pass the other columns of the dataset, and more, to every reward function.
    """
    return [_score(_text(prompt), _text(completion)) for prompt, completion in zip(prompts, completions, strict=True)]


def contains_please(prompts: list, completions: list, **columns: Any) -> list[float]:
    """1.0 for each completion that has the word "please" and 0.0 for the others; the arguments are `reward`'s."""
    return [float(" please " in _words(_text(completion))) for completion in completions]


def _score(prompt: str, completion: str) -> float:
    name, task = parse_prompt(prompt)
    said = _words(completion)
    score = NAME_POINTS * _says_only(said, name, NAMES) + TASK_POINTS * _says_only(said, task, TASKS)
    score += ENDING_POINTS * bool(re.fullmatch(r"[A-Z].*[.!?]", completion.strip(), flags=re.DOTALL))
    score += MARKER_POINTS * min(_count(said, COURTEOUS), MAX_COURTEOUS)
    score -= MARKER_POINTS * min(_count(said, RUDE), MAX_RUDE)
    score -= EXTRA_WORD_POINTS * max(len(said.split()) - FREE_WORDS, 0)
    return round(min(max(score, 0.0), 1.0), 2)


def _text(value: str | list[dict[str, Any]]) -> str:
    """Return the text itself, or the content of the last message of a conversation."""
    if isinstance(value, str):
        return value
    return value[-1]["content"] if value else ""


def _words(text: str) -> str:
    """Put one space around each lower-case word of a text, so that ` now ` is not found in "know"."""
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "


def _count(said: str, phrases: tuple[str, ...]) -> int:
    """How many different phrases of `phrases` are said; each counts once."""
    return sum(f" {phrase.lower()} " in said for phrase in phrases)


def _says_only(said: str, wanted: str | None, known: tuple[str, ...]) -> bool:
    """Whether `wanted` is said and nothing else of `known`, so that listing everything does not pay."""
    return wanted is not None and f" {wanted.lower()} " in said and _count(said, known) <= 1
