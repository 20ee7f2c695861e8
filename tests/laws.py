"""Row for every method: options that switch it on in a short run, options that switch it off, and
what the laws in ``test_methods.py`` and ``training/test_laws.py`` need to know of it."""

from dataclasses import dataclass, field
from typing import Any

from sparse_lora_dist.methods import METHODS, MethodFactory
from sparse_lora_dist.methods.protocol.form import Site
from tests.fixtures.toy_method import TOY


def sites_of(widths: dict[str, int]) -> tuple[Site, ...]:
    """Return linears with 24 inputs, rank 6, and these numbers of outputs by name."""
    return tuple(Site(name=n, in_features=24, out_features=o, rank=6) for n, o in widths.items())


@dataclass(frozen=True, kw_only=True)
class Law:
    """Row of one method."""

    factory: MethodFactory
    on: dict[str, Any] = field(default_factory=dict)
    """Options with which a run of 12 steps decides several times, and ``target_modules`` of a tiny
    Llama if the method does not take all linears."""
    off: dict[str, Any] = field(default_factory=dict)
    """Options with which the method prunes or grows nothing."""
    decides: bool = True
    """True: the method makes decisions (`Method.decide`)."""
    first_delta: float = 0.0
    """Largest absolute entry of the delta before the first step."""
    first_component_first: bool = False
    """True: components open in the order of their indices."""
    penalty: dict[str, float] = field(default_factory=dict)
    """Options that weigh what is added to the loss, with their values in the test."""
    is_pair: bool = True
    """True: the delta is a low-rank pair, which PEFT opens as LoRA."""
    peft_type: str | None = None
    """Name of the PEFT type other than LoRA that the method has. None: none."""
    off_is: str | None = "lora"
    """Method whose losses it repeats step for step when switched off. None: it cannot be."""
    sites: tuple[Site, ...] = sites_of({"q": 24, "k": 12, "up": 40})
    """Linears on which the method's functions are tested; the first is q, 24 x 24."""


LAWS: dict[str, Law] = {
    "lora": Law(factory=METHODS["lora"], decides=False),
    "roselora": Law(
        factory=METHODS["roselora"], on={"roselora_keep": 0.1}, off={"roselora_keep": 1.0}
    ),
    "sora": Law(
        factory=METHODS["sora"],
        on={"sora_every": 2, "sora_reopen": False},
        # The gates stay at 1.
        off={"sora_lambdas": (0.0,), "sora_gate_init": "ones", "sora_gate_lr_factor": 1e-30},
    ),
    "increlora": Law(
        factory=METHODS["increlora"],
        on={"increlora_every": 2, "increlora_target_rank": 2.0},
        off={
            "increlora_start_rank": 6,
            "increlora_target_rank": 6.0,
            "increlora_orthogonality": 0.0,
        },
        # The reserve component trains in advance at lambda 1e-5.
        first_delta=1e-4,
        first_component_first=True,
        penalty={"increlora_orthogonality": 0.1},
        off_is="adalora",
    ),
    "adalora": Law(
        factory=METHODS["adalora"],
        on={"adalora_every": 2, "adalora_target_rank": 2.0},
        off={"adalora_target_rank": 6.0, "adalora_orthogonality": 0.0},
        penalty={"adalora_orthogonality": 0.1},
        off_is="increlora",
    ),
    "shira": Law(
        factory=METHODS["shira"],
        on={"shira_support": "snip", "shira_calibration_steps": 2},
        decides=False,
        is_pair=False,
        peft_type="SHIRA",
        off_is=None,
    ),
    "sara": Law(
        factory=METHODS["sara"],
        on={"sara_nuclear": 1e-3},
        decides=False,
        is_pair=False,
        off_is=None,
    ),
    "sbora": Law(factory=METHODS["sbora"], decides=False, off_is=None),
    "melora": Law(factory=METHODS["melora"], decides=False, off={"melora_blocks": 1}),
    "lora_mini": Law(
        factory=METHODS["lora_mini"], on={"lora_mini_size": 5}, decides=False, off_is=None
    ),
    "neat": Law(
        factory=METHODS["neat"],
        on={"neat_form": "peft", "neat_depth": 1},
        decides=False,
        peft_type="PEANUT",
        off_is=None,
    ),
    "prilora": Law(
        factory=METHODS["prilora"],
        on={"prilora_every": 3},
        off={"prilora_first": 6, "prilora_sparsity": 0.0},
        decides=False,
    ),
    "lorta": Law(
        factory=METHODS["lorta"],
        on={"target_modules": "q_proj,o_proj"},
        decides=False,
        off_is=None,
        sites=sites_of({"q": 24, "k": 24, "up": 24}),
    ),
    "mora": Law(
        factory=METHODS["mora"],
        on={"mora_restarts": 2},
        decides=False,
        is_pair=False,
        off_is=None,
    ),
    "cola": Law(
        factory=METHODS["cola"], on={"cola_links": 3}, decides=False, off={"cola_links": 1}
    ),
    "pst": Law(
        factory=METHODS["pst"],
        on={"pst_every": 3},
        off={"pst_sparsity": 0.0},
        decides=False,
        is_pair=False,
        off_is=None,
    ),
    "losa": Law(factory=METHODS["losa"], decides=False, is_pair=False, off_is=None),
    "toy": Law(factory=TOY, off={"toy_keep": 1.0}),
}
