"""This run beside the paper: whether they compare at all, and every number of one with the other's.

Enters: a `View`, and one of a run on the paper's other data set if there is one. Leaves: a `Study`,
or None where the data set is not one of the paper's; its cells hold a published rate and, where it
was measured, the row of the same quantity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from harness.records import HarnessError, ResultRow
from reports.estimates import sample_of
from reports.inference import rate_of
from reports.paper.values import Paper, Published, paper
from reports.view import VariantView, View
from reports.words import clean_text, label_of, listed

REFERENCE_EPS = 10.0
"""The budget of the paper's Figures 2, 3 and 4."""
UNKNOWN, UNRECORDED = "not recorded", "not recorded in the results store"
AS_PAPER = {"cifar10": "160 epochs, step", "svhn": "20 epochs, step"}
"""What preset `paper` records of training; the paper itself says where the learning rate falls."""
CRAFTED = "10 epochs over"
"""The paper's passes over the images it crafts on."""
_NAME = re.compile(r"(cifar10|svhn)(?!\d)", re.IGNORECASE)
_IMAGES = re.compile(r"([\d,]+) train / ([\d,]+) test images")


@dataclass(frozen=True)
class Cell:
    """One quantity: the published rate, and the row of it here."""

    what: str
    """In words, to name it where it is missing."""
    published: float
    row: ResultRow | None

    @property
    def here(self) -> float | None:
        """The rate that the paper's metric gives the row: TSR if targeted, else the error rate."""
        if self.row is None:
            return None
        return rate_of(self.row) if self.row.target is None else self.row.tsr


@dataclass(frozen=True)
class Study:
    """One of the paper's data sets, with this run's rows if they are of the same one."""

    view: View
    paper: Paper
    published: Published
    title: str
    """What this run's data set may be called."""
    eps: float
    """The budget claims are judged at."""
    elsewhere: bool = False
    """About the data set that this run is not of: no cell has a row."""
    beside: Study | None = None
    """A run on the paper's other data set, for what it says of both."""

    def about(self, key: str) -> Study:
        """The same about another data set of the paper, from the run on it if there is one."""
        if key == self.published.key:
            return self
        if self.beside is not None:
            return self.beside
        return replace(self, published=self.paper.datasets[key], elsewhere=True)

    def variant(self, name: str) -> VariantView | None:
        if self.elsewhere:
            return None
        return next((v for v in self.view.variants if v.name == name), None)

    def clean(self, name: str) -> Cell:
        """The error rate on clean images."""
        here = self.variant(name)
        rate = 1 - self.published.clean_accuracy[name]
        return Cell(f"{label_of(name)} on clean images", rate, here.clean if here else None)

    def attacked(self, victim: str, source: str, eps: float | None = None) -> Cell:
        """UER of a source's perturbation, from Figure 2 (at the judged budget by default)."""
        eps = self.eps if eps is None else eps
        here = self.variant(victim)
        return Cell(
            f"{label_of(victim)} under the perturbation of {label_of(source)}",
            self.published.transfer_uer[eps][victim][source],
            here.by_eps.get(eps, {}).get(source) if here else None,
        )

    def white_box(self, name: str, eps: float) -> Cell:
        """UER of a variant's own perturbation, from Figure 1."""
        here = self.variant(name)
        row = here.by_eps.get(eps, {}).get(name) if here else None
        return Cell(f"{label_of(name)} white-box", self.published.white_box_uer[eps][name], row)

    def control(self, name: str, control: str, eps: float) -> Cell:
        here = self.variant(name)
        return Cell(
            f"{label_of(name)} under the {label_of(control)} control",
            self.published.controls[control][eps][name],
            here.by_eps.get(eps, {}).get(control) if here else None,
        )

    @property
    def targeted_eps(self) -> float:
        """The budget of the targeted attacks: this run's where the paper has it too, else 10."""
        own = self.view.targeted_eps
        return own if own is not None and own in self.published.tsr else REFERENCE_EPS

    def targeted(self, name: str, target: int) -> Cell:
        """TSR of a variant's own perturbation towards a class, from Figures 3 and 4."""
        here = self.variant(name) if self.view.targeted_eps == self.targeted_eps else None
        return Cell(
            f"{label_of(name)} steered to class {target}",
            self.published.tsr[self.targeted_eps][name][target],
            here.targeted.get(target) if here else None,
        )

    @property
    def budgets(self) -> list[float]:
        """Every budget of a transfer matrix that both have, the judged one first."""
        shared = [e for e in self.view.transfer_budgets if e in self.published.transfer_uer]
        return sorted(shared, key=lambda eps: (eps != self.eps, eps))


def study_of(view: View, beside: View | None = None) -> Study | None:
    """The comparison with the paper, where the evaluated data set is one of its two.

    Args:
        view: the run the page is about.
        beside: a run on the other of the two.

    Raises:
        HarnessError: `beside` is of no data set, or of the same one.
    """
    study = _alone(view)
    if beside is None:
        return study
    other = _alone(beside)
    if study is None or other is None or study.published.key == other.published.key:
        raise HarnessError(
            "the paper\u2019s claims about both data sets need a run on CIFAR-10 and one on SVHN:"
            f" this is {clean_text(view.evaluation.dataset)} beside"
            f" {clean_text(beside.evaluation.dataset)}"
        )
    return replace(study, beside=other)


def _alone(view: View) -> Study | None:
    found = _NAME.match(view.evaluation.dataset)
    if found is None or len(view.evaluation.classes) != 10:
        return None
    published = paper().datasets[found.group(1).lower()]
    shared = [eps for eps in view.transfer_budgets if eps in published.transfer_uer]
    eps = REFERENCE_EPS if REFERENCE_EPS in shared or not shared else shared[0]
    return Study(view, paper(), published, _title(view, published), eps)


def _title(view: View, published: Published) -> str:
    """The data set's name; a part of it says of how many images it is."""
    counts = _IMAGES.search(view.evaluation.note)
    whole = f"{published.train_images:,}", f"{published.test_images:,}"
    if counts is not None and counts.groups() != whole:
        return f"{published.title} (partial: {counts[1]} train / {counts[2]} test images)"
    if "partial" in view.evaluation.dataset.lower():
        return f"{published.title} (partial)"
    return published.title


# --- scale ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """A part of the set-up, here and in the paper."""

    name: str
    here: str
    paper: str
    differs: bool = False


def facts(study: Study) -> list[Fact]:
    """The set-up as the store records it, beside the paper's."""
    view, theirs, setup = study.view, study.published, study.paper.setup
    models = [v.model for v in view.variants]
    protocol, attack, seed = view.craft or ("", "", 0)
    clean = [v.clean.n for v in view.variants if v.clean is not None]
    whole = len(view.evaluation.labels)
    images = min(clean, default=whole)
    training, crafting = _training(view), _crafting(view)
    evaluated = f"{images:,}"
    sample = sample_of(view)
    if sample is not None and sample.judged_by_torch:
        evaluated = f"{whole:,} by PyTorch, {images:,} of them by exported models"
    seeds = sorted({r.seed for g in view.seeds.values() for r in g.rows if r.seed is not None})
    training_seeds = sorted({m.seed for m in models if m.seed is not None})
    found = [
        Fact("data set", study.title, theirs.title, study.title != theirs.title),
        _fact("architecture", {m.arch for m in models}, setup.arch),
        _fact("width", {str(m.width) for m in models}, str(setup.width)),
        _fact("preset", {m.preset for m in models}, setup.preset),
        Fact("training of Full", training, theirs.training,
             training not in (UNRECORDED, AS_PAPER[theirs.key])),
        _fact("protocol", {protocol} - {""}, setup.protocol),
        _fact("attack", {attack} - {""}, setup.attack),
        Fact("crafting", crafting, f"{CRAFTED} the test images",
             crafting != UNKNOWN and not crafting.startswith(CRAFTED)),
        Fact("images evaluated", evaluated, f"{theirs.test_images:,}",
             not evaluated.startswith(f"{theirs.test_images:,}")),
        Fact("training seeds per model", f"1 (seed {listed([str(s) for s in training_seeds])})"
             if training_seeds else "not recorded", "1"),
        Fact("crafting seeds", _seeds(seeds or [seed]) if view.craft else "none", "1"),
    ]  # fmt: skip
    if study.beside is not None:
        found.append(Fact("beside it", study.beside.title, study.beside.published.title))
    return found


SCALE = ("architecture", "width", "preset", "protocol", "attack")
"""The facts that two runs share, or they are not of one scale."""


def unlike(study: Study, other: Study) -> list[str]:
    """Where two runs are not of one scale, in words: the first's, then the other's."""
    theirs = {fact.name: fact.here for fact in facts(other)}
    return [
        f"{fact.name} {fact.here} and {theirs[fact.name]}"
        for fact in facts(study)
        if fact.name in SCALE and fact.here != theirs[fact.name]
    ]


def _training(view: View) -> str:
    """As its record says; those of older versions do not."""
    full = next((v.model for v in view.variants if v.name == "full"), None)
    said = full.manifest.get("training") if full is not None else None
    return said if isinstance(said, str) else UNRECORDED


def _fact(name: str, here: set[str], theirs: str) -> Fact:
    return Fact(name, listed(sorted(here)) or "none", theirs, here != {theirs})


def _seeds(seeds: list[int]) -> str:
    return f"{len(seeds):,} (seed {listed([str(s) for s in seeds])})"


def _crafting(view: View) -> str:
    """Passes over how many images, where every perturbation drawn was made alike."""
    found = set()
    for variant in view.variants:
        for row in variant.curve:
            record = view.uaps.get(row.uap_sha256 or "")
            meta = record.meta if record is not None else {}
            settings, images = meta.get("settings"), meta.get("images")
            epochs = settings.get("epochs") if isinstance(settings, dict) else None
            if isinstance(epochs, int) and isinstance(images, int):
                found.add(f"{epochs:,} epochs over {images:,} images")
    return found.pop() if len(found) == 1 else "not alike" if found else UNKNOWN


def scale_text(study: Study) -> str:
    """What may be compared: values, or only directions."""
    apart = [f"{f.name} {f.here} (the paper: {f.paper})" for f in facts(study) if f.differs]
    if not apart:
        return (
            "What the results store records of the set-up is the paper\u2019s, so values may be"
            " compared, with the caveats at the end of this page in mind."
        )
    return (
        f"This run is not at the paper\u2019s scale: {'; '.join(apart)}. Values are not comparable,"
        " only directions are: who is above whom, and whether a claim\u2019s pattern shows."
    )
