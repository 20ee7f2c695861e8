"""Files and command lines with thousands of unknown keys: the answer takes as long as reading."""

import json
import time
from pathlib import Path

import pytest

from sparse_lora_dist.config import spelling
from sparse_lora_dist.config.load import load_config
from sparse_lora_dist.errors import MOST_PROBLEMS, ConfigError

YAML, JSON, WORDS = "a YAML file", "an engine file", "a command line"


def message(argv: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(argv)
    return str(error.value)


@pytest.mark.parametrize(("given", "count"), [(WORDS, 20_000), (YAML, 1000), (JSON, 20_000)])
def test_suggestions_are_looked_for_only_where_they_are_shown(
    given: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, looked = [f"learning_rate_{i}" for i in range(count)], []
    usual = spelling.get_close_matches

    def counted(word: str, *rest: object, **more: object) -> list[str]:
        looked.append(word)
        return usual(word, *rest, **more)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(spelling, "get_close_matches", counted)
    file = tmp_path / "file"
    argv = [f"--{name}" for name in names]
    if given == YAML:
        file.write_text("".join(f"{name}: 1\n" for name in names))
        argv = ["--config", str(file)]
    if given == JSON:
        file.write_text(json.dumps(dict.fromkeys(names, 1)))
        argv = ["--ds_config", str(file)]
    started = time.process_time()
    said = message(argv)
    assert len(looked) <= MOST_PROBLEMS
    assert time.process_time() - started < 15
    assert len(said) < 20_000
    if given != JSON:
        assert "learning_rate_0 is not an option; did you mean " in said
        assert f"the configuration has {count} problems" in said
        assert said.splitlines()[-1].strip() == f"- and {count - MOST_PROBLEMS} more"
