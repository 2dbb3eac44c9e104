"""The doctor: rules that read what a run measured and say what is normal, what is wrong and what to change.

A rule reads ``summary.json`` and the curves, and returns a :class:`Finding` or None. It speaks where the evidence is
beyond what chance does. It names what it reads, so that "nothing was found" is told apart from "nothing was measured".
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from contrastive_align.report.history import History
from contrastive_align.report.summary import Change, show
from contrastive_align.report.words import interval


@dataclass
class Finding:
    """What a rule found.

    Attributes:
        rule: its name.
        level: ``"warning"``, or ``"note"`` for what the user may have wanted.
        says: what is normal and what was found, then what to change.
        evidence: the numbers that the rule read.
        threshold: the numbers from which on it speaks.
        source: where the threshold is from.
    """

    rule: str
    level: str
    says: str
    evidence: dict[str, float]
    threshold: str
    source: str


CONTRASTIVE, FDPG, CONDITIONAL = METHODS = ("contrastive", "fdpg", "conditional")


@dataclass(frozen=True)
class Rule:
    """A rule of the doctor.

    Attributes:
        name, title, level: of its findings.
        threshold, source: see :class:`Finding`.
        reads: what it reads, as :meth:`Case.has` takes it: alternatives, of which it needs one, in full.
        look: the function that looks at a run.
        methods: those whose runs it is meant for.
    """

    name: str
    title: str
    threshold: str
    source: str
    reads: Sequence[Sequence[str]]
    look: Callable[[Case], tuple[str, dict[str, float]] | None]
    level: str = "warning"
    methods: Sequence[str] = METHODS

    def can_look(self, case: Case) -> bool:
        """Whether the run measured what the rule reads."""
        return any(all(case.has(place) for place in places) for places in self.reads)

    def applies_to(self, case: Case) -> bool:
        """Whether the rule is meant for the run's method and loss."""
        labels = any("facts:label_entropy" in places for places in self.reads)
        return case.method in (*self.methods, "") and not (labels and case.fact("reads_labels") is False)


RULES: list[Rule] = []
OWN = "the definition: the smallest change that would matter to a reader of the samples"


def rule(
    name: str,
    title: str,
    threshold: str,
    source: str,
    *,
    reads: Sequence[Sequence[str]],
    level: str = "warning",
    methods: Sequence[str] = METHODS,
) -> Callable:
    """Register a function as a rule."""

    def register(look: Callable) -> Callable:
        RULES.append(Rule(name, title, threshold, source, reads, look, level, methods))
        return look

    return register


@dataclass
class Case:
    """What a rule may read of a run."""

    summary: Mapping[str, Any]
    history: History = field(default_factory=History)

    def change(self, name: str, of: str = "metrics") -> Change | None:
        """Return a measured change, of ``metrics`` or of ``samples``; None where it was not measured."""
        found = self.summary.get(of, {}).get(name)
        if found is None:
            return None
        known = {f.name for f in fields(Change)}
        values = {key: value for key, value in dict(found).items() if key in known}
        if values.get("before") is None or values.get("after") is None:
            return None
        change = Change(**values)
        change.se = math.nan if change.se is None else change.se
        return change

    @property
    def method(self) -> str:
        """One of ``METHODS``, by the trainer's name or by what was measured; empty where it is not known."""
        trainer = str(self.summary.get("method", {}).get("trainer", "")).lower()
        names = {*self.summary.get("metrics", {}), *self.history.curves}
        signs = {
            FDPG: names & {"kl_target", "log_z", "groups/no_mass"},
            CONDITIONAL: names & {"nll", "round/kl_start"} or any(n.startswith("reward_given/") for n in names),
            CONTRASTIVE: names & {"logps/best", "logps/best_delta", "rewards/margins"},
        }
        named = [method for method in METHODS if trainer.startswith(method)]
        return next(iter([*named, *(method for method, found in signs.items() if found)]), "")

    def has(self, place: str) -> bool:
        """Whether a number is known, by where it is and its name.

        ``metrics:loss`` and ``samples:kl`` were measured before and after, ``log:loss`` was logged, ``facts:x`` and
        ``method:x`` are of ``summary.json``, ``train:x`` counts training rows, and ``on:x`` is in what was measured on.
        A metric that ends in ``*`` stands for two or more that begin so.
        """
        kind, name = place.split(":", 1)
        if kind in ("metrics", "samples"):
            if not name.endswith("*"):
                return self.change(name, of=kind) is not None
            found = [n for n in self.summary.get(kind, {}) if n.startswith(name[:-1]) and not n.endswith("/nothing")]
            return sum(self.change(n, of=kind) is not None for n in found) > 1
        if kind == "log":
            return name in self.history
        if kind == "on":
            return name in self.summary.get("metrics_on", "")
        values = {"facts": self.summary.get("facts", {}), "method": self.summary.get("method", {})}
        values["train"] = self.summary.get("data", {}).get("train", {})
        return values[kind].get(name) is not None

    def option(self, name: str) -> str:
        """Return an option of the method as text."""
        value = self.summary.get("method", {}).get(name)
        return f"{value:g}" if isinstance(value, int | float) else "not known"

    def fact(self, name: str) -> float | None:
        """Return a number that describes the data or the options."""
        return self.summary.get("facts", {}).get(name)


@dataclass
class Diagnosis:
    """What the rules found in a run.

    Attributes:
        findings: warnings first.
        rules: those that apply to the run's method.
        blind: those of them that could not look, because the run did not measure what they read.
        unfinished: whether the run goes on or was broken off.
    """

    findings: list[Finding]
    rules: list[Rule]
    blind: list[Rule]
    unfinished: bool = False

    @property
    def healthy(self) -> str:
        """The sentence on a run without a warning; empty where there is one."""
        if any(finding.level == "warning" for finding in self.findings):
            return ""
        looked, there_are, so_far = len(self.rules) - len(self.blind), len(self.rules), " so far" * self.unfinished
        if not looked:
            return f"None of the doctor's {there_are} rules could look: nothing that they read was measured{so_far}."
        if self.blind:
            return f"{looked} of {there_are} rules could look, and found nothing wrong{so_far}."
        return f"The doctor's {there_are} rules found nothing wrong{so_far}."

    @property
    def lines(self) -> list[str]:
        """The findings as lines for the console; one line where there is none."""
        said = [f"{f.level.upper() if f.level == 'warning' else f.level} ({f.rule}): {f.says}" for f in self.findings]
        return [self.healthy, *said] if self.healthy else said


def diagnose(summary: Mapping[str, Any], history: History) -> Diagnosis:
    """Let every rule look that applies to the run."""
    case, findings, rules, blind = Case(summary, history), [], [], []
    for each in RULES:
        result, can_look = each.look(case), each.can_look(case)
        if result is not None:
            findings.append(Finding(each.name, each.level, result[0], result[1], each.threshold, each.source))
        elif not can_look and each.applies_to(case):
            blind.append(each)
        if result is not None or can_look or each.applies_to(case):
            rules.append(each)
    findings.sort(key=lambda finding: finding.level != "warning")
    return Diagnosis(findings, rules, blind, bool(summary.get("unfinished")))


def as_dicts(findings: list[Finding]) -> list[dict[str, Any]]:
    """Return the findings for ``summary.json``."""
    return [asdict(finding) for finding in findings]


def _fell(change: Change | None, by: float) -> bool:
    return change is not None and change.before - change.after >= by and interval(change)[1] < 0


def _rose(change: Change | None, by: float) -> bool:
    return change is not None and change.after - change.before >= by and interval(change)[0] > 0


@rule(
    "diverged",
    "Diverged",
    "a loss, the last norm of the gradient, or a weight of a run that an error stopped is NaN or infinite",
    "the definition: no later step brings such a weight back.",
    reads=[("log:loss",), ("log:train_loss",), ("log:grad_norm",)],
)
def _diverged(case: Case) -> tuple[str, dict[str, float]] | None:
    curves, lost = case.history.curves, {}
    for name in ("loss", "nll", "eval_loss", "train_loss"):
        if name in curves and curves[name].not_finite:
            lost[name] = float(curves[name].not_finite)
    if "grad_norm" in curves and not curves["grad_norm"].ends_finite:  # with a gradient scaler, single steps have none
        lost["grad_norm"] = float(curves["grad_norm"].not_finite)
    if weights := case.fact("weights_not_finite"):
        lost["tensors of weights"] = float(weights)
    change = case.summary.get("metrics", {}).get("loss", {})
    if not lost and change.get("before") is not None and change.get("after") is None and change.get("n"):
        lost["loss after training"] = 1.0
    if not lost:
        return None
    found = ", ".join(f"{name}: {count:g}" for name, count in lost.items())
    return (
        f"Losses, gradients and weights should be finite; the run has values that are not ({found}), so that it "
        f"diverged. Lower --learning_rate (it is {case.option('learning_rate')}), warm up (--warmup_steps), or clip "
        "gradients (--max_grad_norm=1).",
        lost,
    )


# ------------------------------------------------------------------------------------------------ groups and their loss

_LABELS = ("facts:label_entropy", "facts:least_label_entropy", "facts:largest_label_entropy")


@rule(
    "likelihood_displacement",
    "Likelihood displacement",
    "the best completion loses at least 1 nat, beyond chance, and the others lose, too",
    "Razin et al. 2024, arXiv:2410.08847; Pal et al. 2024, arXiv:2402.13228. One nat is a factor of e in probability.",
    reads=[("metrics:logps/best", "metrics:logps/rest")],
    methods=[CONTRASTIVE],
)
def _likelihood_displacement(case: Case) -> tuple[str, dict[str, float]] | None:
    best, rest = case.change("logps/best"), case.change("logps/rest")
    if rest is None or not _fell(best, 1.0) or not _fell(rest, 0.0):
        return None
    lost, others = best.before - best.after, rest.before - rest.after
    return (
        f"The best completions should gain likelihood while the others lose it; here both fall, the best by "
        f"{show(lost)} nats and the others by {show(others)}, so that mass goes to texts nobody scored. Use "
        "--loss_type=NCA, which holds the best one up, add sft with a weight (--loss_type=NCA,sft), or lower "
        "--learning_rate.",
        {"best_fell": lost, "rest_fell": others},
    )


@rule(
    "length",
    "Reward by length",
    "samples grow by at least 30%, beyond chance, and either end 25% longer than the best completions of the data or "
    "the scores follow length (rank correlation in groups of 0.5 or more)",
    "Singhal et al. 2023, arXiv:2310.03716; Park et al. 2024, arXiv:2403.19159.",
    reads=[("samples:length", "facts:best_length"), ("samples:length", "facts:score_length_correlation")],
    methods=[CONTRASTIVE],
)
def _length(case: Case) -> tuple[str, dict[str, float]] | None:
    length = case.change("length", of="samples")
    if length is None or not _rose(length, 0.3 * length.before):
        return None
    best, follows = case.fact("best_length"), case.fact("score_length_correlation")
    too_long = best is not None and length.after > 1.25 * best
    if not too_long and not (follows is not None and follows >= 0.5):
        return None
    why = f"the best completions of the data have {show(best)} tokens" if too_long else ""
    if follows is not None and follows >= 0.5:
        why += f"{' and ' if why else ''}the scores follow length with a rank correlation of {follows:.2f}"
    return (
        f"Samples should grow no longer than good answers are; they went from {show(length.before)} to "
        f"{show(length.after)} tokens, where {why}. Score completions of like length, subtract a price of length from "
        "the reward, or raise --beta.",
        {"before": length.before, "after": length.after, "best_length": best, "correlation": follows},
    )


@rule(
    "no_signal",
    "No signal",
    "more than half of the groups (contrastive), prompts (f-DPG) or samples (conditional) say nothing",
    "the definition: a group with equal scores has no gradient that tells its completions apart.",
    reads=[("train:groups",), ("log:groups/no_mass",), ("log:round/no_signal",)],
)
def _no_signal(case: Case) -> tuple[str, dict[str, float]] | None:
    train, history = case.summary.get("data", {}).get("train", {}), case.history
    if train.get("groups") and train.get("no_signal", 0) > train["groups"] / 2:
        share = train["no_signal"] / train["groups"]
        return (
            f"Scores within a group should differ; in {share:.0%} of the training groups they are all equal. Score on "
            "a finer scale, or leave these groups out.",
            {"no_signal": share},
        )
    if "groups/no_mass" in history and (share := history["groups/no_mass"].end()) > 0.5:
        return (
            f"Every prompt should have samples that the target allows; {share:.0%} have none. Ask for less "
            "(a moment below 1), raise --num_generations, or start from a model that does it sometimes.",
            {"no_mass": share},
        )
    for name, what in (("round/no_signal", "scores that are all equal"), ("round/unscored", None)):
        if name in history and what and (share := history[name].end()) > 0.5:
            return (
                f"Samples of a round should differ in their scores; {share:.0%} have {what}. Use a reward on a finer "
                "scale, or raise --temperature so that samples differ.",
                {"no_signal": share},
            )
    return None


@rule(
    "one_hot_labels",
    "One-hot labels on graded scores",
    "the labels' mean entropy is in the lowest 2% of its range, and a tenth of the groups have 3 or more scores",
    "the definition: labels softmax(scores / temperature_alpha) that are one-hot read the order of the best alone.",
    level="note",
    reads=[("facts:graded_groups", *_LABELS)],
    methods=[CONTRASTIVE],
)
def _one_hot_labels(case: Case) -> tuple[str, dict[str, float]] | None:
    graded, place = case.fact("graded_groups"), _place_of_label_entropy(case)
    if not graded or graded < 0.1 or place is None or place >= 0.02:
        return None
    alpha = case.option("temperature_alpha")
    return (
        f"Graded scores can give graded labels; at temperature_alpha={alpha} the labels are one-hot, and only which "
        f"completion is best counts in the {graded:.0%} of the groups that have more grades. That is the published "
        "setting; --temperature_alpha=auto uses all grades.",
        {"entropy_place": place, "graded_groups": graded},
    )


@rule(
    "temperature_high",
    "Temperature too high",
    "the labels' mean entropy is in the highest 3% of its range",
    "the definition: equal labels ask for equal probabilities. 'auto' aims at half of the largest entropy.",
    reads=[_LABELS],
    methods=[CONTRASTIVE],
)
def _temperature_high(case: Case) -> tuple[str, dict[str, float]] | None:
    place = _place_of_label_entropy(case)
    if place is None or place <= 0.97:
        return None
    alpha = case.option("temperature_alpha")
    return (
        f"Labels should prefer the better completion; at temperature_alpha={alpha} they are all but equal "
        f"({place:.0%} of the largest entropy), so that little is learned of which is better. Lower "
        "--temperature_alpha, or use auto.",
        {"entropy_place": place},
    )


def _place_of_label_entropy(case: Case) -> float | None:
    """Return where the labels' entropy lies between one-hot (0) and equal (1); None where the loss reads no labels."""
    names = ("label_entropy", "least_label_entropy", "largest_label_entropy")
    found, least, largest = (case.fact(name) for name in names)
    if found is None or least is None or largest is None or largest - least < 1e-6:
        return None
    return (found - least) / (largest - least)


@rule(
    "learning_rate_high",
    "Learning rate too high",
    "the loss ends above that of the untouched model, beyond chance, on training data, too",
    "the untouched model is a point of the same loss: a run that ends above it has overshot.",
    reads=[("metrics:loss", "log:loss"), ("metrics:kl_target",), ("log:nll",)],
)
def _learning_rate_high(case: Case) -> tuple[str, dict[str, float]] | None:
    rate = case.option("learning_rate")
    advice = f"Lower --learning_rate (it is {rate}) to a third, or warm up longer (--warmup_steps)."
    for name, what, trained in _LOSSES:
        change = case.change(name)
        if change is None or not interval(change)[0] > 0 or show(change.after) == show(change.before):
            continue
        now = case.history[trained].end() if trained and trained in case.history else math.inf
        if trained and (trained not in case.history or now <= change.before):
            continue  # only the evaluation rose: overfitting
        return (
            f"{what} should fall; it rose from {show(change.before)} to {show(change.after)}"
            f"{f', and is {show(now)} on training data' if trained else ''}. {advice}",
            {"before": change.before, "after": change.after, "train": now if trained else change.after},
        )
    if "nll" in case.history:
        curve = case.history["nll"]
        if len(curve.points) > 3 and curve.end() > 1.1 * curve.lowest and curve.end() > 1.02 * curve.first:
            return (
                f"The likelihood loss should fall; it went from {show(curve.first)} to {show(curve.end())} nats per "
                f"token, after {show(curve.lowest)}. {advice}",
                {"before": curve.first, "lowest": curve.lowest, "after": curve.end()},
            )
    return None


# Measured metric -> what it is, and the metric of training steps that tells overshooting from overfitting.
_LOSSES = (
    ("loss", "The loss", "loss"),
    ("kl_target", "The divergence from the target", None),
)


@rule(
    "learning_rate_low",
    "Learning rate too low",
    "the margin of implied rewards stays within 0.05 and the loss within 1% (contrastive), the divergence loses less "
    "than a tenth (f-DPG), the best and the worst condition differ by less than a twentieth of the reward's spread "
    "(conditional)",
    "a margin of 0.05 moves the probability between two completions by one in eighty (report/words.py).",
    reads=[("metrics:rewards/margins",), ("metrics:kl_target",), ("metrics:reward_given/*", "metrics:mean_reward")],
)
def _learning_rate_low(case: Case) -> tuple[str, dict[str, float]] | None:
    rate = case.option("learning_rate")
    if _no_signal(case) or _temperature_high(case) or _learning_rate_high(case):
        return None  # nothing moves for another reason
    advice = f"Raise --learning_rate (it is {rate}) to three times as much, or train longer."
    margin, loss = case.change("rewards/margins"), case.change("loss")
    falls = _fell(loss, 0.01 * abs(loss.before)) if loss is not None else False  # of an SFT loss the margin is no aim
    if margin is not None and not falls and interval(margin)[1] < 0.05 and abs(margin.after) < 0.05:
        return (
            f"The margin of implied rewards should open; it went from {show(margin.before)} to {show(margin.after)}. "
            f"{advice}",
            {"margin": margin.after},
        )
    distance = case.change("kl_target")
    if distance is not None and distance.before > 0.02 and math.isfinite(distance.after):
        left = distance.after / distance.before
        if 0.9 < left and interval(distance)[0] <= 0 < distance.before:
            return (
                f"The divergence from the target should fall towards 0; {left:.0%} of it is left "
                f"({show(distance.after)} of {show(distance.before)} nats). {advice}",
                {"left": left},
            )
    given = _given(case)
    if len(given) > 1 and (start := case.change("mean_reward")) is not None and start.before_se:
        spread = start.before_se * math.sqrt(start.n)
        apart = given[0][1].after - given[-1][1].after
        if abs(apart) < 0.05 * spread:
            return (
                f"The conditions should give different rewards; the best gives {show(given[0][1].after)} and the worst "
                f"{show(given[-1][1].after)}. {advice}",
                {"apart": apart, "spread": spread},
            )
    return None


@rule(
    "reference_moved",
    "The reference moved",
    "sync_ref_model, or log-probs of the reference on the evaluation set that differ by more than 0.1% + 0.01 nats "
    "between two evaluations",
    "the definition: implied rewards and KL are measured against one fixed model.",
    reads=[("facts:reference_moves",), ("log:eval_logps/best", "log:eval_logps/best_delta")],
    methods=[CONTRASTIVE],
)
def _reference_moved(case: Case) -> tuple[str, dict[str, float]] | None:
    what = "A fixed reference makes implied rewards and margins comparable over the run"
    if case.fact("reference_moves"):
        return (
            f"{what}; with sync_ref_model it follows the policy, so that there is no before to compare with. Leave "
            "--sync_ref_model out.",
            {"sync_ref_model": 1.0},
        )
    at = "eval_logps/best", "eval_logps/best_delta"
    if any(name not in case.history for name in at):
        return None
    own = [a.mean - b.mean for a, b in zip(case.history[at[0]].points, case.history[at[1]].points, strict=False)]
    shift = max(own) - min(own)
    if shift <= 0.01 + 1e-3 * abs(own[0]):
        return None
    return (
        f"{what}; between two evaluations its log-probs of the same completions moved by {show(shift)} nats. Resume "
        "from the same start and adapter, or give the reference by name.",
        {"shift": shift},
    )


@rule(
    "overfitting",
    "Overfitting",
    "the evaluation loss ends above its lowest by more than 2 standard errors while the training loss is below both",
    "the definition of early stopping (Prechelt 1998), with the evaluation's own noise as its patience.",
    reads=[("metrics:loss", "log:loss", "on:evaluation split")],
    methods=[CONTRASTIVE],
)
def _overfitting(case: Case) -> tuple[str, dict[str, float]] | None:
    change, history = case.change("loss"), case.history
    held_out = "evaluation split" in case.summary.get("metrics_on", "")
    if change is None or not held_out or "loss" not in history or not math.isfinite(change.se):
        return None
    lowest = min([change.before, *([history["eval_loss"].lowest] if "eval_loss" in history else [])])
    trained, noise = history["loss"].end(), max(change.se, 1e-12)
    if change.after - lowest <= 2 * noise or trained >= min(lowest, change.after - 2 * noise):
        return None
    return (
        f"Training and evaluation should fall together; the evaluation loss ended at {show(change.after)}, above its "
        f"lowest of {show(lowest)}, while the training loss is {show(trained)}. Train for fewer epochs, keep the best "
        "checkpoint (--load_best_model_at_end, --eval_strategy=steps), or add data.",
        {"evaluation": change.after, "lowest": lowest, "training": trained},
    )


# ---------------------------------------------------------------------------------------------------------- the samples


@rule(
    "eos_lost",
    "End of text lost",
    "the share of samples that end by themselves falls by at least 0.2, beyond chance",
    OWN,
    reads=[("samples:eos_rate",), ("log:completions/eos_rate",), ("log:round/finished",)],
)
def _eos_lost(case: Case) -> tuple[str, dict[str, float]] | None:
    change = case.change("eos_rate", of="samples")
    found = (change.before, change.after) if change is not None and _fell(change, 0.2) else None
    for name in ("completions/eos_rate", "round/finished"):
        if found is None and name in case.history:
            curve = case.history[name]
            found = (curve.first, curve.end()) if curve.first - curve.end() >= 0.2 else None
    if found is None:
        return None
    return (
        f"Samples should end by themselves; {found[0]:.0%} did before and {found[1]:.0%} do now. Check that "
        "completions end in the tokenizer's EOS and are not cut by --max_length, raise --max_completion_length, or "
        "lower --learning_rate.",
        {"before": found[0], "after": found[1]},
    )


@rule(
    "repetition",
    "Repetition",
    "the share of tokens in 3-grams that their text had before rises by at least 0.1, beyond chance",
    "Holtzman et al. 2019, arXiv:1904.09751: human text hardly repeats; degenerate text does.",
    reads=[("samples:repetition",)],
)
def _repetition(case: Case) -> tuple[str, dict[str, float]] | None:
    change = case.change("repetition", of="samples")
    if not _rose(change, 0.1):
        return None
    return (
        f"Samples should not repeat themselves; {change.after:.0%} of their tokens are in 3-grams that came before, "
        f"{change.before:.0%} at the start. Lower --learning_rate, raise --beta (or --kl_coef), or take fewer steps.",
        {"before": change.before, "after": change.after},
    )


MOST_KL = 1.0  # nats per token


@rule(
    "kl_large",
    "KL from the reference too large",
    f"samples are at least {MOST_KL:g} nats per token and 10 nats away from the reference on average (f-DPG: and twice "
    "as far as the target itself)",
    "Gao et al. 2022, arXiv:2210.10760: beyond some KL the true reward falls. The best of n samples has KL log n - "
    "(n - 1) / n, 10 nats at n = 60,000.",
    reads=[("samples:kl", "samples:length")],
    methods=[CONTRASTIVE, FDPG],
)
def _kl_large(case: Case) -> tuple[str, dict[str, float]] | None:
    kl, length = case.change("kl", of="samples"), case.change("length", of="samples")
    if kl is None or length is None or not length.after:
        return None
    low = interval(kl)[0]
    per_token = kl.after / length.after
    goal = case.summary.get("distributions", {}).get("target", {}).get("KL(pi||base)", {}).get("value")
    if low < 5 or kl.after < 10 or per_token < MOST_KL or (goal is not None and kl.after < 2 * goal):
        return None
    return (
        f"Samples should stay within reach of the reference; they are {show(kl.after)} nats away, {show(per_token)} "
        "per token, farther than the best of tens of thousands of its samples. Raise --beta (or --kl_coef), lower "
        "--learning_rate, or train for fewer steps.",
        {"kl": kl.after, "per_token": per_token},
    )


# --------------------------------------------------------------------------------------------- proposals and conditions


SCATTER = 0.5  # nats
_DRAWN = ("method:num_generations", "method:prompts_per_generation")


@rule(
    "ess_low",
    "Effective sample size too low",
    "the weights towards the target are worth less than a tenth of a step's samples in the last fifth of the run; or, "
    "in the last half, samples weighted towards the target miss its moment by a quarter of the way from the base; or a "
    f"step's log Z scatters by {SCATTER:g} nats over the run",
    "Kong 1992: the variance of a weighted mean is that of as many independent samples as the ESS. Owen 2013, Monte "
    "Carlo theory, 9.2: a self-normalised mean is biased towards the proposal by about 1 / ESS. Log Z is estimated "
    f"with a variance of about 1 / ESS, so {SCATTER:g} nats are {1 / SCATTER**2:.0f} samples.",
    reads=[("log:moment/target/ess", *_DRAWN), ("log:log_z",)],
    methods=[FDPG],
)
def _ess_low(case: Case) -> tuple[str, dict[str, float]] | None:
    advice = (
        "Raise --num_generations, ask for a moment nearer to the base's, or start from a model nearer to the target."
    )
    found = _effective(case, "moment/target/ess")
    if found is not None and found[0] < found[1] / 10:
        return (
            f"A step's samples should show the target; weighted towards it, {show(found[0])} of {found[1]:g} count. "
            f"{advice}",
            {"ess": found[0], "samples": found[1]},
        )
    for name in case.summary.get("metrics", {}):
        wanted = case.summary["metrics"][name].get("target")
        if not name.startswith("moment/") or wanted is None or f"{name}/target" not in case.history:
            continue
        start, seen = case.change(name).before, case.history[f"{name}/target"].end(0.5)
        if abs(wanted - start) > 0.05 and (wanted - seen) / (wanted - start) > 0.25:
            return (
                f"A step's samples should show the target; weighted towards it, they give {name} {show(seen)} where it "
                f"is {show(wanted)}, so that most prompts have no sample to learn from. {advice}",
                {"seen": seen, "wanted": wanted, "base": start},
            )
    points = [point.mean for point in case.history["log_z"].points] if "log_z" in case.history else []
    if len(points) > 4 and (scatter := statistics.stdev(points)) > SCATTER:
        return (
            f"A step's samples should show the target; its log Z differs by {show(scatter)} nats from step to step, as "
            f"if {show(1 / scatter**2)} of them counted, so that many prompts have no sample to learn from. {advice}",
            {"scatter": scatter},
        )
    return None


@rule(
    "proposal_stale",
    "Proposal stale",
    "the weights of policy over proposal are worth less than a quarter of a step's samples in the last half of the run",
    "Kong 1992, as above; sequential Monte Carlo resamples from a half on (Del Moral et al. 2006).",
    reads=[("log:reverse_kl_target/ess", *_DRAWN)],
    methods=[FDPG],
)
def _proposal_stale(case: Case) -> tuple[str, dict[str, float]] | None:
    found = _effective(case, "reverse_kl_target/ess", 0.5)
    if found is None or found[0] >= found[1] / 4:
        return None
    return (
        f"Samples should come from near the policy; weighted for it, {show(found[0])} of a step's {found[1]:g} count. "
        "Use --proposal=policy, or a shorter --proposal_window.",
        {"ess": found[0], "samples": found[1]},
    )


def _effective(case: Case, name: str, share: float = 0.2) -> tuple[float, float] | None:
    """Return the effective and the drawn samples of a step in a run's last part; None where they are not logged."""
    method = case.summary.get("method", {})
    drawn = (method.get("num_generations") or 0) * (method.get("prompts_per_generation") or 0)
    return (case.history[name].end(share), float(drawn)) if name in case.history and drawn else None


@rule(
    "conditions_order",
    "Conditions that do not order",
    "a better condition gives less reward than the next, beyond 1.96 standard errors of their difference",
    "the definition: conditions are sorted best first, so that their rewards must fall.",
    reads=[("metrics:reward_given/*",)],
    methods=[CONDITIONAL],
)
def _conditions_order(case: Case) -> tuple[str, dict[str, float]] | None:
    for (better, one), (worse, other) in itertools.pairwise(_given(case)):
        noise = math.hypot(one.after_se or 0.0, other.after_se or 0.0)
        if other.after - one.after > 1.96 * noise and show(one.after) != show(other.after):
            return (
                f"Better conditions should give more reward; {better} gives {show(one.after)} and {worse} "
                f"{show(other.after)}. Check that the reward rises with quality, use fewer conditions or train on.",
                {"better": one.after, "worse": other.after, "noise": noise},
            )
    return None


def _given(case: Case) -> list[tuple[str, Change]]:
    prefix, metrics = "reward_given/", case.summary.get("metrics", {})
    names = [name for name in metrics if name.startswith(prefix) and name != f"{prefix}nothing"]
    return [(name.removeprefix(prefix), change) for name in names if (change := case.change(name)) is not None]
