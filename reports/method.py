"""How it was measured: the facts a reader needs to repeat or to doubt the numbers.

Enters: a `View`. Leaves: labelled facts and small tables of text, escaped where printed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.records import CONTROLS, ResultRow
from reports import words
from reports.tradeoff import VERDICT_MARKS
from reports.view import View
from reports.words import DASH, clean_text, fact, label_of, listed, plural

MANIFEST_KEYS = ("slimming", "checks", "nominal_bits", "notes")
"""What an export may say of itself in its manifest; only these are printed."""

COMMANDS = (
    ("harness run", "everything: train, compress, export, craft, attack, report"),
    ("harness export --all", "every variant to ONNX, checked against PyTorch"),
    ("harness attack-device --device {device}", "run exported models under perturbations"),
    ("harness results --json", "the rows behind this page"),
    ("harness report", "write this page again"),
)
OWN_COMMANDS = (
    (
        "harness run --factory PKG:FN --checkpoint FILE --name NAME",
        "everything for one model: export, craft, attack, time, report",
    ),
    *COMMANDS[2:],
)

DEFINITIONS = (
    ("UER", "universal evasion rate: share of all evaluation images that the model gets wrong"
     " under the perturbation. Images it gets wrong without one count too, as in the paper."),
    ("Evasion on correct", "the same share over the images the model gets right when clean."),
    ("Fooling rate", "share of images whose predicted class the perturbation changes."),
    ("TSR", "targeted success rate: share of all images predicted as the target class."),
    ("UAP", "universal adversarial perturbation: one fixed pattern added to every image."),
    ("\u03b5", "the largest change of any pixel, in steps of 1/255."),
    ("White-box", "the perturbation was crafted on the very variant it is applied to."),
    ("Transfer", "it was crafted on another variant (the source) than the one attacked."),
    ("Fleet", "the perturbation was crafted on all variants at once, in turns, step by step."),
    ("Leave-one-out", "it was crafted on the fleet without the variant it is applied to: what an"
     " attacker achieves who has every other model but not the deployed one."),
    ("Worst untargeted", "the highest UER of any untargeted perturbation measured at that budget,"
     " whatever it was crafted on, of those that every model faced and its own."),
    ("Controls", "random signs and a chessboard at full budget: patterns made without looking at"
     " any model. An attack that does not beat them says little."),
    ("Gradient masking", "a model looks robust because crafting on it fails, not because it is."),
    ("Deployment gap", "a rate of the exported model on the device minus the rate of the PyTorch"
     " model on the same images."),
    ("Pareto front", "the models that no other model beats on both axes."),
    ("MACs, BOPs", "multiply-accumulates of one image, and the same weighted by the bits of both"
     " factors as executed."),
    ("Peak RSS", "largest resident memory of the measuring process."),
    ("p50, p90", "half, nine tenths of the timed inferences were at most this long."),
    ("Sample", "a random part of the images, the classes in proportion, the same for every model."
     " Error rates are then estimates for the whole set: PyTorch\u2019s there plus the mean paired"
     " difference on the sample, with its 95 % interval (Tango\u2019s score interval, finite"
     " population; exact where no prediction differs)."),
    ("95 % interval", "Wilson score interval: covers the choice of images, nothing else."),
)  # fmt: skip


@dataclass(frozen=True)
class TextTable:
    """Headings and rows of plain text; the first column names the row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers (and dashes) only, to be aligned on the right."""
        return tuple(
            all(cell == DASH or _number(cell) for cell in column)
            and any(cell != DASH for cell in column)
            for column in zip(*self.rows, strict=True)
        ) or (False,) * len(self.head)


def facts(view: View) -> list[tuple[str, str]]:
    """(name, value) pairs."""
    evaluation = view.evaluation
    channels, height, width = evaluation.image_shape
    rows = [r for r in view.rows if r.evaluation_sha256 == evaluation.sha256]
    used = {r.uap_sha256: r for r in rows if r.uap_sha256 is not None}
    crafted = [r for r in used.values() if r.uap_source not in CONTROLS]
    targeted = sum(r.target is not None for r in crafted)
    models = [v.model for v in view.variants if v.model.method != "user"]
    own = len(view.variants) - len(models)
    dates = sorted(r.created_at for r in rows)
    commits = sorted({r.git_commit for r in rows if r.git_commit})
    found = [
        ("Data set", f"{evaluation.dataset}: {len(evaluation.labels):,} evaluation images of"
         f" {width} x {height} pixels, {plural(channels, 'channel')},"
         f" {plural(len(evaluation.classes), 'class', 'classes')}"),
        ("About the data", evaluation.note),
        ("Models", f"{listed(sorted({m.arch for m in models}))}, width"
         f" {listed(sorted({str(m.width) for m in models}))}, preset"
         f" {listed(sorted({m.preset for m in models}))}, training seed"
         f" {listed(sorted({str(m.seed) for m in models}))}" if models else ""),
        ("Your own models", str(own) if own else ""),
        ("Perturbations", f"{len(used)}: {len(crafted) - targeted} untargeted,"
         f" {targeted} targeted, {len(used) - len(crafted)} controls" if used else "none"),
        ("Crafting", _craft(view)),
        ("Protocol", _protocol(view)),
        ("What the device received", "8-bit images, clip(round(x + 255 delta), 0, 255)"),
        ("Predictions", f"{sum(r.n for r in rows):,} in {plural(len(rows), 'run')}, all kept"),
        ("Measured", _span(dates[0], dates[-1])),
        ("Git commit", listed(commits) or "not recorded"),
    ]  # fmt: skip
    return [(name, clean_text(value, 600)) for name, value in found if value]


def _number(cell: str) -> bool:
    return len(cell) < 12 and cell[:1] in "0123456789+\u2212"


def _span(first: str, last: str) -> str:
    """Two ISO times in UTC, to the minute."""
    start, end = (time[:16].replace("T", " ") for time in (first, last))
    return f"{start} UTC" if start == end else f"{start} to {end} UTC"


def _craft(view: View) -> str:
    if view.craft is None:
        return "nothing was crafted"
    _, attack, seed = view.craft
    return f"attack {attack}, crafting seed {seed}"


def _protocol(view: View) -> str:
    if view.craft is None:
        return ""
    meaning = {
        "clean": "clean: crafted on a part of the training split, evaluated on unseen images",
        "paper": "paper: crafted on the evaluation split itself, as the authors did",
    }
    return meaning.get(view.craft[0], view.craft[0])


def machines(view: View) -> TextTable:
    """Where things ran."""
    rows = []
    for device, runtime, m in view.machines:
        extra = fact(m.extra) if m.extra else DASH
        rows.append(
            (device.label, f"{runtime} {m.runtime_version}", m.arch, m.cpu, str(m.cores), m.os,
             m.python, extra)
        )  # fmt: skip
    head = ("Device", "Runtime", "Arch", "CPU", "Cores", "System", "Python", "More")
    return TextTable(head, tuple(tuple(clean_text(c, 90) for c in row) for row in rows))


def latencies(view: View) -> TextTable | None:
    """Percentiles, spread and verdict with its reasons; None where nothing was timed."""
    rows = []
    for variant in view.variants:
        if variant.timing is None:
            continue
        mode, timing = variant.timing
        verdict = f"{VERDICT_MARKS[timing.verdict]} {timing.verdict.lower()}"
        rows.append(
            (
                variant.label,
                mode,
                *(words.milliseconds(q, unit=False)
                  for q in (timing.p50_ms, timing.p90_ms, timing.p99_ms)),
                f"{timing.n:,}",
                words.percent(timing.spread),
                words.milliseconds(timing.load_ms, unit=False),
                words.milliseconds(timing.first_ms, unit=False),
                verdict,
                "; ".join(timing.reasons) or DASH,
            )
        )  # fmt: skip
    head = ("Variant", "Mode", "p50, ms", "p90, ms", "p99, ms", "Samples", "Spread", "Load, ms",
            "First, ms", "Verdict", "Reasons")  # fmt: skip
    return TextTable(head, tuple(rows)) if rows else None


def compression(view: View) -> TextTable:
    """What each file holds, as counted on it, and what its export says of itself."""
    present = [k for k in MANIFEST_KEYS if any(k in v.model.manifest for v in view.variants)]
    rows = []
    for variant in view.variants:
        cost, manifest = variant.model.cost, variant.model.manifest
        rows.append(
            (
                variant.label,
                words.method_name(variant.method),
                words.size(cost.file_bytes),
                words.size(cost.gzip_bytes),
                words.count(cost.params),
                words.percent(cost.nonzeros / cost.params) if cost.params else DASH,
                words.count(cost.bops_nominal),
                words.count(cost.bops_executed),
                str(cost.opset),
                variant.model.sha256[:12],
                *(fact(manifest[key]) if key in manifest else DASH for key in present),
            )
        )
    head = ("Variant", "Method", "File", "Gzip", "Params", "Non-zero", "BOPs nominal",
            "BOPs executed", "Opset", "SHA-256")  # fmt: skip
    titles = tuple(key.replace("_", " ").capitalize() for key in present)
    return TextTable(head + titles, tuple(rows))


def commands(view: View) -> list[tuple[str, str]]:
    device = clean_text(view.device.name, 40)
    own = all(v.model.method == "user" for v in view.variants)
    lines = OWN_COMMANDS if own else COMMANDS
    return [(line.format(device=device), meaning) for line, meaning in lines]


def device_comparison(view: View) -> TextTable | None:
    """Each variant on each device; None when there is one device."""
    if len(view.devices) < 2:
        return None
    everywhere = [v.any_row for device in view.devices for v in view.by_device[device]]
    optional: list[tuple[str, Callable[[ResultRow], str]]] = []
    if any(row.energy_mj is not None for row in everywhere):
        optional.append(("Energy, mJ a run", lambda row: _millijoules(row.energy_mj)))
    if any(row.instructions is not None for row in everywhere):
        optional.append(("Arm instructions a run", lambda row: words.count(row.instructions)))
    rows = []
    for variant in view.variants:
        for device in view.devices:
            other = next((v for v in view.by_device[device] if v.name == variant.name), None)
            if other is None:
                continue
            clean = other.clean.clean_accuracy if other.clean else None
            rows.append(
                (
                    label_of(variant.name),
                    device.label,
                    _images(other.any_row),
                    words.percent(clean),
                    _rate(other.white_box),
                    _rate(other.worst),
                    words.percent(other.lowest_agreement),
                    words.milliseconds(other.any_row.latency_p50_ms),
                    *(cell(other.any_row) for _, cell in optional),
                )
            )
    head = ("Variant", "Device", "Images", "Clean accuracy", "White-box UER", "Worst UER",
            "Torch agreement (lowest)", "Latency p50")  # fmt: skip
    return TextTable((*head, *(title for title, _ in optional)), tuple(rows))


def _millijoules(value: float | None) -> str:
    return words.DASH if value is None else f"{value:.3g}"


def _images(row: ResultRow) -> str:
    return f"{row.n:,}" if row.n == row.n_of else f"{row.n:,} of {row.n_of:,}"


def _rate(row: ResultRow | None) -> str:
    """The UER; of a sample with its interval, which is what the sample's size costs."""
    if row is None or row.n == row.n_of:
        return words.percent(row.uer if row else None)
    return f"{words.percent(row.uer)} [{words.interval(row.uer_low, row.uer_high)}]"
