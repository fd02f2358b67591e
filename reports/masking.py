"""The gradient-masking verdict in words and numbers, and the shape every group of sentences has.

Enters: a `View`. Leaves: a `Group` of plain-text sentences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reports.inference import ALPHA
from reports.masking_rules import EQUIVALENT, Kind, Signal
from reports.signals import MaskingVerdict, masking_verdicts
from reports.view import View
from reports.words import DASH, interval, label_of, listed, p_value, percent, plural

Tone = Literal["plain", "warn"]


@dataclass(frozen=True)
class Sentence:
    """A statement; `lead` is what it is about, set apart where it is printed."""

    text: str
    lead: str = ""


@dataclass(frozen=True)
class Group:
    """Sentences under one sub-heading."""

    anchor: str
    title: str
    sentences: tuple[Sentence, ...]
    tone: Tone = "plain"


CHECKS: dict[Kind, str] = {
    "gradient_free": "a search without gradients (harness craft --attack fourier)",
    "transfer": "transfer from other variants",
    "control": "random-sign and chessboard controls",
    "no_gradient": "samples without a gradient",
    "slope": "the slope along the gradient",
    "agreement": "gradients against the network's own slopes",
    "random": "a lead over random signs",
    "monotone": "a sweep over \u03b5",
    "saturated": "the saturated fraction of the loss",
}
OTHER_EXPLANATIONS: dict[Kind, str] = {
    "gradient_free": "no sign says that its gradients are no guide: its own attack may be"
    " under-optimised",
    "transfer": "its own attack may be under-optimised, or the source shares its weights",
    "control": "its own attack may be under-optimised",
    "no_gradient": "nothing that takes no gradient is shown to do more",
    "slope": "nothing that takes no gradient is shown to do more",
    "agreement": "nothing that takes no gradient is shown to do more",
    "random": "the budget may be too small to do harm",
    "monotone": "the attack at the larger budget may have been unlucky",
    "saturated": "confident mistakes saturate the loss too",
}
"""Why a raised signal alone is no proof."""


def masking_group(view: View) -> Group:
    title = "Gradient masking: can the white-box numbers be believed?"
    verdicts = masking_verdicts(view)
    if not verdicts:
        return Group(
            "masking",
            title,
            (Sentence("No variant was attacked with a perturbation crafted on itself."),),
        )
    masked = [v for v in verdicts if v.word == "masked"]
    said = [Sentence(f"{_because(v)}.", f"{v.variant.label}: masked") for v in masked]
    undecided: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.word == "undecided":
            undecided.setdefault(_open(verdict), []).append(verdict.variant.label)
    said += [Sentence(text, f"{listed(who)}: undecided") for text, who in undecided.items()]
    clear = [v for v in verdicts if v.word == "not masked"]
    for outdone in (True, False):
        some = [v for v in clear if (v.signals["gradient_free"].state == "clear") == outdone]
        if some:
            who = listed([v.variant.label for v in some])
            said.append(Sentence(_clear(some, outdone=outdone), f"{who}: not masked"))
    if masked:
        said.append(
            Sentence(
                "The white-box UER of a masked variant is no evidence of robustness: read its worst"
                " case instead, which only bounds from below what a better attack would do.",
                "What it means",
            )
        )
    return Group("masking", title, tuple(said), "warn" if masked else "plain")


def _because(verdict: MaskingVerdict) -> str:
    reasons = []
    if verdict.pattern and not {"gradient_free", "control", "transfer"} & set(verdict.because):
        reasons.append(f"its own attack ends with {_PATTERNS[verdict.pattern]}, not with gradients")
    for kind in verdict.because:
        signal = verdict.signals[kind]
        no_more = signal.state == "unclear"
        reasons.append(_no_more(verdict, signal) if no_more else signal_text(signal))
    text = "; ".join(reasons)
    return text[0].upper() + text[1:]


def _no_more(verdict: MaskingVerdict, signal: Signal) -> str:
    """The own attack is bounded: within `EQUIVALENT` of what takes no gradient."""
    what = {"gradient_free": "a search without gradients"}.get(
        signal.kind, f"the {label_of(signal.other)} control"
    )
    own = f"its own attack ends with {_PATTERNS[verdict.pattern]} and" if verdict.pattern else ""
    return (
        f"{own or 'its own attack'} makes it err on {percent(signal.reference)}, less than five"
        f" points more than {what} ({percent(signal.value)})"
    )


def _open(verdict: MaskingVerdict) -> str:
    """What keeps a verdict from being one."""
    raised = verdict.raised()
    text = ""
    if raised:
        reasons = [f"{signal_text(s)}, but {OTHER_EXPLANATIONS[s.kind]}" for s in raised]
        text = "; ".join(reasons)
        text = f"{text[0].upper()}{text[1:]}."
    else:
        unclear = [k for k in verdict.because if verdict.signals[k].state == "unclear"]
        if unclear:
            text = "; ".join(signal_text(verdict.signals[kind]) for kind in unclear)
            text = f"{text[0].upper()}{text[1:]}."
    if verdict.pattern:
        text += (
            f" Its own perturbation is {_PATTERNS[verdict.pattern]}, which no gradient made: it did"
            " more than what gradients led to."
        )
    missing = [kind for kind, s in verdict.signals.items() if s.state == "not measured"]
    weak = verdict.signals["gradient_free"]
    if weak.state == "not measured" and weak.value is not None:
        missing.remove("gradient_free")
        text += " A search without gradients did no more than random signs, so it says nothing."
    if missing:
        text += f" Not measured: {listed([CHECKS[kind] for kind in missing])}."
    if verdict.near_ceiling:
        text += " The white-box UER is near the highest possible: little can be hidden behind it."
    return text.strip()


def _clear(verdicts: list[MaskingVerdict], *, outdone: bool) -> str:
    """What was shown, over all of them; `outdone`: also that the search does less."""
    free = [v.signals["gradient_free"] for v in verdicts]
    guide = [v.signals["agreement"] for v in verdicts]
    reach = _span([s.value for s in free])
    own = _span([s.reference for s in free])
    largest = max(s.p or 0.0 for s in free)
    family = f"Holm over {plural(free[0].family, 'test')}"
    several = len(verdicts) > 1
    at_most = " at most" if several and largest >= 0.001 else ""
    near = [v.variant.label for v in verdicts if v.signals["control"].state == "unclear"]
    ceiling = ""
    if near:
        ceiling = f" On {listed(near)}, near the highest rate, no control is shown to do less."
    bounded = all((s.high or 0.0) < EQUIVALENT for s in free)
    limit = (
        "less than five points more"
        if bounded
        else "less than five points more, or near the highest rate"
    )
    shown_to_be = (
        f"shown to be less{' for each' if several else ''} ({p_value(largest)}{at_most}, {family})"
        if outdone
        else f"no difference shown ({limit}; {family})"
    )
    return (
        "All signs were measured and none is raised. Gradients agree with the network to"
        f" {_plain_span([s.value for s in guide])} (cosine). A search without gradients, at no more"
        f" cost, reaches {reach} where gradients reach {own}, {shown_to_be}.{ceiling}"
    )


def signal_text(signal: Signal) -> str:
    """A signal in words, with its numbers; what it says depends on its state."""
    value, reference, other = percent(signal.value), percent(signal.reference), signal.other
    p = signal.p if signal.p is not None else 1.0
    test = f"{p_value(p)}, Holm over {plural(signal.family, 'test')}"
    between = interval(signal.low, signal.high)
    texts: dict[Kind, str] = {
        "gradient_free": f"a search without gradients{f', {other},' if other else ''} makes it err"
        f" on {value}, its own attack on {reference} ({shown(p)}{test})",
        "transfer": f"the perturbation crafted on {label_of(other)} makes it err on {value}, its"
        f" own on {reference} ({shown(p)}{test})",
        "control": f"the {label_of(other)} control, which attacks no model, makes it err on"
        f" {value}, its own perturbation on {reference} ({shown(p)}{test})",
        "no_gradient": f"{value} of the clean attack images ({between}) have no gradient at all",
        "slope": f"along its gradient the margin changes by {number(signal.value)} of what the"
        f" gradient promises",
        "agreement": f"along random directions its gradient agrees with the network to"
        f" {number(signal.value)} only (cosine)",
        "random": f"its own perturbation turns {value} of the correctly classified images, with"
        f" less than three times the odds of random signs, which turn {reference}",
        "monotone": f"its white-box UER falls from {reference} to {value} as the budget grows from"
        f" {other} ({test})",
        "saturated": f"{value} of the samples gave a saturated loss, hence no gradient, while"
        f" crafting, but only {reference} of the images are misclassified",
    }
    return texts[signal.kind]


def short_verdict(verdict: MaskingVerdict) -> str:
    """A few words for a table cell; empty where there is nothing to warn of."""
    if verdict.word == "masked":
        return "gradients masked"
    raised = verdict.raised()
    return f"masking undecided: {listed([_SHORT[s.kind] for s in raised])}" if raised else ""


_PATTERNS = {"wave": "a wave", "chessboard": "a chessboard", "start": "its random start"}
_SHORT: dict[Kind, str] = {
    "gradient_free": "beaten without gradients",
    "transfer": "a transfer does more",
    "control": "a control does more",
    "no_gradient": "no gradients",
    "slope": "slopes not as promised",
    "agreement": "gradients do not agree",
    "random": "barely beats random sign",
    "monotone": "not monotone in \u03b5",
    "saturated": "loss saturated",
}


def shown(p: float) -> str:
    return "" if p < ALPHA else "no difference shown, "


def number(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def _span(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    low, high = percent(min(known)), percent(max(known))
    return low if low == high else f"{percent(min(known), unit=False)} to {high}"


def _plain_span(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    low, high = number(min(known)), number(max(known))
    return low if low == high else f"{low} to {high}"
