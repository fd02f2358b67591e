"""What the values of a configuration must be, key by key.

Enters: a `Config` as it was read. Leaves: nothing, or one error that names the key and the rule.
"""

from __future__ import annotations

from harness.config import Config
from harness.records import BLOCKS_PER_STAGE, UsageError

ATTACKS = ("momentum", "sgd", "fourier")
"""`momentum`: the strongest here (ADR 7); `sgd`: the paper's; `fourier`: no gradients (ADR 10)."""
PROTOCOLS = ("clean", "paper")
MIN_EPS_255, MAX_EPS_255 = 1.0, 255.0
"""A device receives whole pixel levels: less than one of them is nothing."""


def check(config: Config, where: str) -> None:
    """Refuse what cannot be run.

    Raises:
        UsageError: naming the key, its value and the rule.
    """
    train, craft = config.train, config.craft

    def need(ok: bool, key: str, value: object, rule: str) -> None:
        if not ok:
            raise UsageError(f"{where}: {key} = {value!r}, but it must be {rule}")

    need(config.arch in BLOCKS_PER_STAGE, "arch", config.arch, f"one of {list(BLOCKS_PER_STAGE)}")
    need(config.protocol in PROTOCOLS, "protocol", config.protocol, f"one of {list(PROTOCOLS)}")
    need(config.attack in ATTACKS, "attack", config.attack, f"one of {list(ATTACKS)}")
    need(1 <= config.width <= 1024, "width", config.width, "from 1 to 1024")
    need(0 <= config.seed < 2**31, "seed", config.seed, "from 0 to 2^31 - 1")
    for key in ("epochs", "batch_size"):
        need(getattr(train, key) >= 1, f"train.{key}", getattr(train, key), "at least 1")
        need(getattr(craft, key) >= 1, f"craft.{key}", getattr(craft, key), "at least 1")
    for key in ("pp_epochs", "apot_epochs", "crop_padding", "cutout_size"):
        need(getattr(train, key) >= 0, f"train.{key}", getattr(train, key), "at least 0")
    for key in ("lr", "mixup_alpha", "pp_lr", "apot_lr", "bn_eps"):
        need(getattr(train, key) > 0, f"train.{key}", getattr(train, key), "above 0")
    need(0 <= train.momentum < 1, "train.momentum", train.momentum, "in [0, 1)")
    for key in ("weight_decay", "apot_alpha_lr_activation", "apot_alpha_lr_weight"):
        need(getattr(train, key) >= 0, f"train.{key}", getattr(train, key), "at least 0")
    for key in ("sfp_keep", "pp_keep"):
        need(0 < getattr(train, key) <= 1, f"train.{key}", getattr(train, key), "in (0, 1]")
    schedules, granularities = ("step", "one_cycle"), ("channel", "unit")
    need(train.schedule in schedules, "train.schedule", train.schedule, f"one of {schedules}")
    for key, value, choices in (
        ("train.precision", train.precision, ("fp32", "bf16")),
        ("train.sfp_start", train.sfp_start, ("scratch", "full")),
        ("craft.split", craft.split, ("protocol", "attack", "evaluation")),
        ("craft.batch_norm", craft.batch_norm, ("protocol", "eval", "train")),
    ):
        need(value in choices, key, value, f"one of {choices}")
    if config.protocol != "paper":
        for key, value in (("split", craft.split), ("batch_norm", craft.batch_norm)):
            rule = '"protocol" under protocol clean, which crafts on the attack split, in eval mode'
            need(value == "protocol", f"craft.{key}", value, rule)
    need(not train.nesterov or train.momentum > 0, "train.nesterov", True, "false without momentum")
    couplings = ("layer", "stage")
    need(
        train.sfp_coupling in couplings,
        "train.sfp_coupling",
        train.sfp_coupling,
        f"one of {couplings}",
    )
    need(
        train.pp_granularity in granularities,
        "train.pp_granularity",
        train.pp_granularity,
        f"one of {granularities}",
    )
    transfer = craft.transfer_eps
    if isinstance(transfer, str):
        need(transfer == "all", "craft.transfer_eps", transfer, 'a budget, a list of them or "all"')
    lists = {"eps": craft.eps, "transfer_eps": transfer if isinstance(transfer, tuple) else ()}
    budgets = [(f"{name}[{i}]", eps) for name, of in lists.items() for i, eps in enumerate(of)]
    if isinstance(transfer, float):
        budgets.append(("transfer_eps", transfer))
    for key, eps in budgets:
        need(MIN_EPS_255 <= eps <= MAX_EPS_255, f"craft.{key}", eps, "from 1 to 255 (1/255 units)")
    for key, of in lists.items():
        need(len(set(of)) == len(of), f"craft.{key}", list(of), "without repeats")
    need(bool(craft.transfer_budgets), "craft.transfer_eps", transfer or [], "at least one budget")
    need(1 <= craft.restarts <= 100, "craft.restarts", craft.restarts, "from 1 to 100")
    if config.protocol == "paper":
        rule = "1 under protocol paper, whose images to choose by are those it evaluates on"
        need(craft.restarts == 1, "craft.restarts", craft.restarts, rule)
    last_seed = config.seed + craft.seeds - 1
    need(1 <= craft.seeds <= 100, "craft.seeds", craft.seeds, "from 1 to 100")
    need(last_seed < 2**31, "craft.seeds", craft.seeds, "small enough: seeds end at 2^31 - 1")
    need(craft.fleet_epochs >= 0, "craft.fleet_epochs", craft.fleet_epochs, "at least 0 (0: none)")
    if isinstance(craft.targets, str):
        need(craft.targets == "all", "craft.targets", craft.targets, '"all" or a list of classes')
    else:
        need(
            all(t >= 0 for t in craft.targets), "craft.targets", list(craft.targets), "not negative"
        )
    need(craft.attack_images >= 1, "craft.attack_images", craft.attack_images, "at least 1")
    need(craft.inner_batch >= 1, "craft.inner_batch", craft.inner_batch, "at least 1")
    need(0 < craft.momentum < 1, "craft.momentum", craft.momentum, "in (0, 1)")
    need(craft.step > 0, "craft.step", craft.step, "above 0")
    need(craft.beta > 0, "craft.beta", craft.beta, "above 0")
    need(1 <= config.export.align <= 1024, "export.align", config.export.align, "from 1 to 1024")
    need(config.eval.images >= 0, "eval.images", config.eval.images, "at least 0 (0: all)")
    device_images = config.eval.device_images
    need(device_images >= 0, "eval.device_images", device_images, "at least 0 (0: all)")
    for section, values in (("eval", config.eval), ("latency", config.latency)):
        need(1 <= values.threads <= 256, f"{section}.threads", values.threads, "from 1 to 256")
    need(config.eval.batch_size >= 1, "eval.batch_size", config.eval.batch_size, "at least 1")
    modes = ("quick", "full", "off")
    need(config.latency.mode in modes, "latency.mode", config.latency.mode, f"one of {modes}")
