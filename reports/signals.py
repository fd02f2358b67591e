"""Signs of gradient masking, measured one by one, and the verdict they add up to.

Enters: a `View`. Leaves: for every variant its signals with their numbers, and one of three words.
Every comparison between perturbations is a paired test; all of them, over all variants, are one
Holm family. Probes are not in it: they have to agree with a comparison before anything is called
masked. The rules: `reports.masking_rules`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations

from harness import metrics
from harness.bootstrap import Estimate
from harness.records import CONTROLS, PAPER_ORDER, ResultRow
from reports.inference import (
    ALPHA,
    Difference,
    compare_apart,
    near_ceiling,
    rate_of,
)
from reports.masking_rules import Kind, Signal, State, Word, judge
from reports.probes import Probed, probe_of
from reports.view import VariantView, View

MOSTLY = 0.5
"""More samples than this without a gradient: nothing steers the attack."""
MIN_AGREEMENT = 0.2
"""Gradients whose promises agree less than this with the network are no guide."""
MIN_GAIN_OVER_RANDOM = 3.0
PATTERNS = ("wave", "chessboard", "start")


@dataclass(frozen=True)
class MaskingVerdict:
    """The word, and why."""

    variant: VariantView
    word: Word
    signals: dict[Kind, Signal]
    because: tuple[Kind, ...]
    """The signals that decided; for `undecided`, those that stand in the way."""
    near_ceiling: bool = False
    pattern: str = ""
    """What the own perturbation is where no gradient made it: `wave`, `chessboard`, `start`."""

    def raised(self) -> list[Signal]:
        return [signal for signal in self.signals.values() if signal.state == "raised"]


@dataclass(frozen=True)
class _Test:
    signal: Kind
    other: str
    row: ResultRow
    own: ResultRow
    found: Difference


@dataclass
class _Tested:
    """Tests of one variant with their adjusted p-values."""

    tests: list[tuple[_Test, float]] = field(default_factory=list)
    family: int = 0

    def of(self, kind: Kind) -> list[tuple[_Test, float]]:
        return [(test, p) for test, p in self.tests if test.signal == kind]


def masking_verdicts(view: View) -> list[MaskingVerdict]:
    """A verdict for every variant that was attacked with a perturbation crafted on itself."""
    if "masking" not in view.memo:
        view.memo["masking"] = _verdicts(view)
    found: list[MaskingVerdict] = view.memo["masking"]
    return found


def _verdicts(view: View) -> list[MaskingVerdict]:
    checked = [v for v in view.variants if v.white_box is not None and v.white_box.uer is not None]
    tested = _comparisons(view, checked)
    falls = _falls(view, checked)
    return [_verdict(view, v, tested[v.name], falls[v.name]) for v in checked]


def _comparisons(view: View, variants: list[VariantView]) -> dict[str, _Tested]:
    """Every other perturbation against the variant's own; one family over the experiment's."""
    asked: list[tuple[VariantView, Kind, str, ResultRow, ResultRow]] = []
    models = {v.name for v in view.variants}
    for variant in variants:
        # What a user brought is no part of the experiment, but stands beside what they brought.
        sources = PAPER_ORDER if variant.name in PAPER_ORDER else models
        own = variant.white_box
        assert own is not None
        others: list[tuple[Kind, str, ResultRow]] = [
            ("transfer", row.uap_source or "", row)
            for row in variant.transfers
            if row.uap_source in sources
        ]
        others += [
            ("control", name, variant.attacked[name])
            for name in CONTROLS
            if name in variant.attacked
        ]
        if variant.gradient_free is not None:
            found_by = _wave_of(view, variant.gradient_free)
            others.append(("gradient_free", found_by, variant.gradient_free))
        asked += [(variant, kind, name, row, own) for kind, name, row in others]
    tests, adjusted = compare_apart(
        view, [variant for variant, *_ in asked], [(row, own) for *_, row, own in asked]
    )
    sizes = Counter(variant.name in PAPER_ORDER for variant, *_ in asked)
    found = {v.name: _Tested(family=sizes[v.name in PAPER_ORDER]) for v in variants}
    for (variant, kind, name, row, own), test, p in zip(asked, tests, adjusted, strict=True):
        found[variant.name].tests.append((_Test(kind, name, row, own, test), p))
    return found


def _wave_of(view: View, row: ResultRow) -> str:
    """The wave that a search without gradients ended with, in periods; else nothing."""
    uap = view.uaps.get(row.uap_sha256 or "")
    wave = uap.meta.get("wave") if uap else None
    periods = [wave.get(key) for key in ("across", "down")] if isinstance(wave, dict) else []
    if not periods or not all(isinstance(n, int) for n in periods):
        return row.attack.upper() if row.attack == "spsa" else ""
    return f"a wave of {periods[0]} \u00d7 {periods[1]} periods".replace("-", "\u2212")


def _falls(view: View, variants: list[VariantView]) -> dict[str, Signal]:
    """Whether white-box UER is shown to fall with a growing budget; one family over all pairs."""
    pairs = [
        (variant, low, high) for variant in variants for low, high in combinations(variant.curve, 2)
    ]
    _, adjusted = compare_apart(
        view, [variant for variant, _, _ in pairs], [(low, high) for _, low, high in pairs]
    )
    sizes = Counter(of.name in PAPER_ORDER for of, _, _ in pairs)
    found: dict[str, Signal] = {}
    for variant in variants:
        drops = [
            (rate_of(low) - rate_of(high), low, high, p)
            for (of, low, high), p in zip(pairs, adjusted, strict=True)
            if of is variant and p < ALPHA and rate_of(high) < rate_of(low)
        ]
        family = sizes[variant.name in PAPER_ORDER]
        if drops:
            _, low, high, p = max(drops, key=lambda drop: drop[0])
            between = f"{low.eps:g} to {high.eps:g}"
            found[variant.name] = Signal(
                "monotone", "raised", rate_of(high), rate_of(low), other=between, p=p,
                family=family,
            )  # fmt: skip
        else:
            state: State = "clear" if len(variant.curve) > 1 else "not measured"
            found[variant.name] = Signal("monotone", state, family=family)
    return found


def _verdict(view: View, variant: VariantView, tested: _Tested, falls: Signal) -> MaskingVerdict:
    own = variant.white_box
    assert own is not None
    probe = probe_of(view, variant)
    signals: dict[Kind, Signal] = {
        "gradient_free": _gradient_free(tested, variant),
        "transfer": _transfer(tested),
        "control": _control(tested),
        "no_gradient": _no_gradient(probe),
        "slope": _guide("slope", probe.slope if probe else None, known=probe is not None),
        "agreement": _guide("agreement", probe.agreement if probe else None, known=bool(probe)),
        "random": _random(variant, own),
        "monotone": falls,
        "saturated": _saturated(view, own),
    }
    near = near_ceiling(view, rate_of(own))
    pattern = _pattern(view, own)
    word, because = judge(signals, near_ceiling=near, pattern=bool(pattern))
    return MaskingVerdict(variant, word, signals, because, near_ceiling=near, pattern=pattern)


def _pattern(view: View, own: ResultRow) -> str:
    """The pattern that a gradient attack ended with, as it did more than where gradients led."""
    uap = view.uaps.get(own.uap_sha256 or "")
    chosen = uap.meta.get("chosen") if uap else None
    return chosen if chosen in PATTERNS else ""


# --- the signals ---------------------------------------------------------------------------------


def _gradient_free(tested: _Tested, variant: VariantView) -> Signal:
    """A search without gradients: clear only where it is shown to do less.

    One that does no more than random signs did not search, whatever it is shown to do less than.
    """
    found = tested.of("gradient_free")
    if not found:
        return Signal("gradient_free", "not measured")
    test, p = found[0]
    random = variant.attacked.get("random")
    state: State = "unclear"
    if p < ALPHA:
        state = "raised" if test.found.value > 0 else "clear"
    if state == "clear" and random is not None and rate_of(test.row) <= rate_of(random):
        state = "not measured"
    return _of_test("gradient_free", state, test, p, tested.family)


def _transfer(tested: _Tested) -> Signal:
    """Another variant's perturbation that is shown to do more than its own."""
    found = tested.of("transfer")
    if not found:
        return Signal("transfer", "not measured")
    better = [(test, p) for test, p in found if p < ALPHA and test.found.value > 0]
    test, p = max(better or found, key=lambda pair: pair[0].found.value)
    return _of_test("transfer", "raised" if better else "clear", test, p, tested.family)


def _control(tested: _Tested) -> Signal:
    """Clear only where the own perturbation is shown to beat every pattern nobody optimised."""
    found = tested.of("control")
    if not found:
        return Signal("control", "not measured")
    test, p = max(found, key=lambda pair: pair[0].found.value)
    state: State = "unclear"
    if p < ALPHA:
        state = "raised" if test.found.value > 0 else "clear"
    return _of_test("control", state, test, p, tested.family)


def _of_test(kind: Kind, state: State, test: _Test, p: float, family: int) -> Signal:
    own, other = rate_of(test.own), rate_of(test.row)
    found = test.found
    return Signal(kind, state, other, own, found.low, found.high, test.other, p, family)


def _no_gradient(probe: Probed | None) -> Signal:
    """Samples that no gradient steers; the interval decides against half of them."""
    if probe is None:
        return Signal("no_gradient", "not measured")
    low, high = metrics.wilson(probe.zero_gradient, probe.images)
    state: State = "raised" if low > MOSTLY else "clear" if high < MOSTLY else "unclear"
    share = probe.zero_gradient / probe.images
    return Signal("no_gradient", state, share, low=low, high=high)


def _guide(kind: Kind, estimate: Estimate | None, *, known: bool) -> Signal:
    """Whether the network does what its gradient promises."""
    if estimate is None:  # no gradient at all promises nothing
        return Signal(kind, "raised" if known else "not measured", 0.0 if known else None)
    low, high = estimate.low, estimate.high
    state: State = "unclear"
    if high < MIN_AGREEMENT or low > MIN_AGREEMENT:
        state = "raised" if high < MIN_AGREEMENT else "clear"
    return Signal(kind, state, estimate.value, low=low, high=high)


def _random(variant: VariantView, own: ResultRow) -> Signal:
    """Shown to have less than three times the odds of random signs, of the images it got right.

    Odds, as three times a rate beyond a third is more than everything.
    """
    random = variant.attacked.get("random")
    if random is None or random.evasion_on_correct is None or own.evasion_on_correct is None:
        return Signal("random", "not measured")
    value, reference = own.evasion_on_correct, random.evasion_on_correct
    correct = max(1, round(own.n * (own.clean_accuracy or 0.0)))
    high = metrics.wilson(min(correct, round(value * correct)), correct)[1]
    low = metrics.wilson(min(correct, round(reference * correct)), correct)[0]
    weak = _odds(high) < MIN_GAIN_OVER_RANDOM * _odds(low)
    return Signal("random", "raised" if weak else "clear", value, reference, other="random")


def _odds(rate: float) -> float:
    return rate / (1 - rate) if rate < 1 else math.inf


def _saturated(view: View, own: ResultRow) -> Signal:
    """More samples beyond the loss clamp, hence without a gradient, than misclassified images.

    Where the attack has won, a saturated sample is simply one that is misclassified already.
    """
    uap = view.uaps.get(own.uap_sha256 or "")
    value = metrics.fraction(uap.meta.get("saturated_fraction")) if uap else None
    if value is None:
        return Signal("saturated", "not measured")
    weak = value > max(MOSTLY, own.uer_high if own.uer_high is not None else rate_of(own))
    return Signal("saturated", "raised" if weak else "clear", value, rate_of(own))
