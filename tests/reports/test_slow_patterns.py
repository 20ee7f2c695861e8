"""Regular expressions that would never end."""

import time

import pytest

from sparse_lora_dist.config.sections import AdapterConfig
from sparse_lora_dist.errors import ConfigError, UserError
from sparse_lora_dist.system.patterns import first_that_ends, matching

NAMES = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(80) for p in "qkvo"]


@pytest.mark.parametrize(
    "pattern", [r"([a-z._\d]+)+[!?]", r"(.*)*[xy]", r"(a|a|\w|\.)*[!?]", ".*?" * 12 + "(?:!|x{3})"]
)
def test_a_pattern_that_would_never_end_is_decided_in_seconds(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_lora_dist.system.patterns.MATCH_S", 0.5)
    started = time.monotonic()
    try:
        assert matching("--target_modules", pattern, NAMES) == []  # regex is wiser than re
    except UserError as error:
        assert "takes longer than 0.5 s to match. Write it without repetitions" in str(error)
    assert time.monotonic() - started < 20


def test_a_pattern_that_takes_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_lora_dist.system.patterns.MATCH_S", 0.2)
    with pytest.raises(UserError, match=r"--target_modules '.*' takes longer than 0.2 s"):
        matching("--target_modules", ".*?" * 12 + "(?:!|x{3})", NAMES)


def test_usual_patterns_match_as_re_does() -> None:
    import re

    for pattern in (
        r".*\.(q|v)_proj",
        r"model\.layers\.(1?\d|2[0-3])\..*",
        r"(model\.)?(layers\.\d+\.)+self_attn\.[qk]_proj",
        r".*layers\.(?!1\d).*k_proj",
        r"(?i).*SELF_ATTN.*",
        r".*",
    ):
        assert matching("x", pattern, NAMES) == [n for n in NAMES if re.fullmatch(pattern, n)]


def test_the_end_of_a_name_matches_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    keys = ["proj", "q_proj", "layers.1.*v_proj|k_proj", "self_attn.o_proj", "model"]
    for name in [*NAMES, "model", "q_proj"]:
        assert (first_that_ends("x", keys, name) or name) == get_pattern_key(keys, name)


@pytest.mark.parametrize("pattern", ["(" * 3000 + ")" * 3000, "a{99999999999}", "(", "a" * 30_000])
def test_a_pattern_that_cannot_be_compiled_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AdapterConfig(target_modules=pattern)
    assert "--target_modules" in str(caught.value) and len(str(caught.value)) < 600
