"""Documents packed into one row do not see each other, in the real engine while it trains."""

import pytest

from tests.conftest import Ranks
from tests.fixtures.tiny_run import TinyRun
from tests.tiers import grid


@grid("checkpointing attention", ["false", "true"], ["sdpa", "eager"])
def test_changing_one_document_changes_no_logits_of_another(
    ranks: Ranks,
    tiny: TinyRun,
    tmp_path_factory: pytest.TempPathFactory,
    attention: str,
    checkpointing: str,
) -> None:
    flags = tiny.flags(
        tmp_path_factory.mktemp("packed"),
        gradient_checkpointing=checkpointing,
        attn_implementation=attention,
        dropout=0.1,
    )
    for measured in ranks(2, "tests.work.run:packed_documents", flags=flags):
        for changed, differences in measured["changed"].items():
            own = differences.pop(changed)
            assert own > 0.1, "the changed document itself must notice"
            assert all(difference == 0.0 for difference in differences.values()), differences
        # Without restarts in the positions it is one document: the measurement sees a leak.
        assert measured["as one document"] > 0.01
        assert measured["gradient"] > 0.0
